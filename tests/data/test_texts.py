"""The text of every study: a section, or sentences for labels; which studies have none."""

import numpy as np
import pandas as pd
import pytest

from gloria_core.data.prompts import PromptError
from gloria_core.data.texts import choose_texts


def frame_of(findings=("", "", "", ""), impression=("", "", "", ""), mass=(1, 0, -1, np.nan)):
    return pd.DataFrame(
        {
            "study_id": ["a", "b", "c", "d"],
            "split": ["train", "train", "valid", "test"],
            "findings": list(findings),
            "impression": list(impression),
            "label_rank": 0.5,
            "boxes": "",
            "masks": "",
            "Mass": mass,
        }
    )


def chosen(frame, dataset="own", **options):
    return choose_texts(frame, dataset, **{"usual": "impression", **options})


def test_a_section_that_every_study_has_needs_no_word():
    texts = chosen(frame_of(impression=["A mass."] * 4), prompts="")
    assert (len(texts.frame), texts.section, texts.prompts, texts.notes) == (4, "impression", None, [])


def test_studies_without_text_among_others_are_left_out_and_counted():
    texts = chosen(frame_of(impression=["A mass.", " ", "Clear.", "Clear."]))
    assert texts.frame["study_id"].tolist() == ["a", "c", "d"] and texts.prompts is None
    assert texts.notes == ["1 of 4 studies have no impression; they are left out."]
    labelled = chosen(frame_of(impression=["A mass.", "", "Clear.", ""]), prompts="labels")
    assert labelled.frame["study_id"].tolist() == ["a", "b", "c"]  # d has no label either


def test_another_section_is_read_where_the_usual_one_is_empty():
    texts = chosen(frame_of(findings=["A mass.", "", "Clear.", "Clear."]))
    assert texts.section == "findings" and "No study has text in its impression; the findings is read." in texts.notes
    assert chosen(frame_of(findings=["A mass.", "", "", ""]), usual="both").section == "both"
    named = chosen(frame_of(findings=["A mass."] * 4), section="impression")
    assert named.section == "impression" and named.prompts.name == "labels"


def test_labels_are_put_into_sentences_where_no_study_has_a_report():
    texts = chosen(frame_of())
    assert texts.prompts.name == "labels" and texts.frame["study_id"].tolist() == ["a", "b", "c"]
    assert "3 of 4 studies have no impression: their text is sentences for their labels" in texts.notes[0]
    assert "1 of 4 studies have no impression and no label; they are left out." in texts.notes
    assert chosen(frame_of(), dataset="nih").prompts.name == "nih"
    with pytest.raises(PromptError, match="no prompt set 'labls'"):
        chosen(frame_of(), prompts="labls")


def test_vocabulary_and_first_rows():
    words = chosen(frame_of()).tokenizer()
    assert "mass" in words.get_vocab()
    reports = frame_of(findings=["zebra lung"] * 4, impression=["A mass."] * 3 + ["walrus lung"])
    assert "z" in chosen(reports).tokenizer().get_vocab() and "w" not in chosen(reports).tokenizer().get_vocab()
    only_test = chosen(reports.assign(split="test"))
    assert "w" in only_test.tokenizer().get_vocab() and only_test.split("train").empty
    assert chosen(reports).first(3)["study_id"].tolist() == ["c", "a", "b"]
    assert only_test.first(2)["study_id"].tolist() == ["a", "b"]


def test_nothing_at_all_still_has_a_vocabulary():
    texts = chosen(frame_of().drop(columns="Mass"))
    assert texts.frame.empty and len(texts.tokenizer()) > 5
