"""Prompts: GLoRIA's own to the letter, reports from labels, and files that are wrong."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from gloria_core.data.manifest import COMPETITION_LABELS
from gloria_core.data.prompts import (
    PromptError,
    PromptSet,
    available_prompts,
    class_combinations,
    gloria_class_prompts,
    load_prompts,
    prompts_for,
    report_from_labels,
    zero_shot_prompts,
)
from gloria_core.data.sources.nih import NIH_LABELS

# what the released code of GLoRIA returns on the first call after its import (generate_chexpert_class_prompts(5))
FIRST_CALL = {
    "Atelectasis": [
        "minimal residual atelectasis at the left lung zone",
        "minimal subsegmental atelectasis at the left lung base",
        " trace atelectasis at the mid lung zone",
        "mild bandlike atelectasis at the lung bases",
        "minimal bandlike atelectasis at the right lung base",
    ],
    "Cardiomegaly": [
        " portable view of the chest demonstrates mild cardiomegaly ",
        " cardiac silhouette size is upper limits of normal ",
        " heart size remains at mildly enlarged ",
        " mildly prominent cardiac silhouette ",
        " ap erect chest radiograph demonstrates the heart size is the upper limits of normal ",
    ],
    "Consolidation": [
        "apperance of bilateral consolidation at the right lung base",
        "improved patchy consolidation at the lower lung zone",
        "apperance of partial consolidation at the left upper lobe",
        "increased partial consolidation at the left lung base",
        "increased airspace consolidation at the upper lung zone",
    ],
    "Edema": [
        " pulmonary edema ",
        "improvement in pulmonary interstitial edema ",
        "decreased pulmonary edema ",
        "moderate pulmonary edema ",
        "mild pulmonary edema ",
    ],
    "Pleural Effusion": [
        "increased left subpulmonic pleural effusion",
        "stable tiny bilateral pleural effusion",
        "large tiny subpulmonic pleural effusion",
        "decreased tiny subpulmonic pleural effusion",
        " tiny bilateral pleural effusion",
    ],
}


def tiny() -> PromptSet:
    """Sentences whose words give away label, kind and number."""
    kinds = ("pos", "neg", "unc")
    labels = ("A", "B", "C", "No Finding")
    return PromptSet("tiny", {x: {kind: [f"{x}-{kind}-{i}." for i in range(3)] for kind in kinds} for x in labels})


def test_gloria_first_call_to_the_letter():
    assert gloria_class_prompts() == FIRST_CALL


def test_gloria_prompts_neither_read_nor_move_the_global_generator():
    random.seed(123)
    before = random.getstate()
    assert gloria_class_prompts() == FIRST_CALL
    assert random.getstate() == before
    assert gloria_class_prompts() == FIRST_CALL
    assert gloria_class_prompts(5, seed=7) != FIRST_CALL


def test_gloria_combinations_are_counted_as_published():
    gloria = load_prompts("chexpert_gloria")
    counts = {label: len(class_combinations(gloria, label)) for label in gloria.combinations}
    assert counts == {
        "Atelectasis": 210,
        "Cardiomegaly": 15,
        "Consolidation": 192,
        "Edema": 18,
        "Pleural Effusion": 54,
    }
    assert len(zero_shot_prompts(gloria, "Pleural Effusion")) == 36
    assert all(p == " ".join(p.split()) for label in counts for p in zero_shot_prompts(gloria, label))
    assert "Apache-2.0" in gloria.attribution and set(counts) == set(COMPETITION_LABELS)


@pytest.mark.parametrize("n", [16, 0, -1])
def test_more_prompts_than_there_are(n):
    with pytest.raises(PromptError, match=rf"{n} are needed"):
        gloria_class_prompts(n)
    assert len(gloria_class_prompts(15)["Cardiomegaly"]) == 15


# --- reports from labels ---------------------------------------------------------------------------------------------


def test_deterministic_report_takes_first_sentences_of_what_is_present():
    labels = {"A": 1.0, "B": -1.0, "C": 1.0, "No Finding": 0.0, "is_male": 1.0}
    assert report_from_labels(labels, tiny()) == "A-pos-0. C-pos-0."
    assert report_from_labels({"A": 0.0, "B": -1.0}, tiny()) == "No Finding-pos-0."


def test_sampled_report_says_every_label_once_and_n_negatives():
    labels = {"A": 1.0, "B": -1.0, "C": 0.0, "No Finding": 0.0, "is_male": 1.0}
    seen = set()
    for seed in range(200):
        sentences = report_from_labels(labels, tiny(), rng=np.random.default_rng(seed), n_negative=1).split()
        assert sorted(s[:5] for s in sentences) == ["A-pos", "B-unc", "C-neg"]
        seen.update(sentences)
        seen.add(tuple(s[0] for s in sentences))
    assert len([s for s in seen if isinstance(s, str)]) == 9
    assert len([s for s in seen if isinstance(s, tuple)]) == 6


def test_negatives_are_known_absent_and_never_more_than_there_are():
    labels = {"A": float("nan"), "B": 0.0, "C": -1.0}
    report = report_from_labels(labels, tiny(), rng=np.random.default_rng(0), n_negative=9)
    assert sorted(s[:5] for s in report.split()) == ["B-neg", "C-unc"]
    assert "neg" not in report_from_labels(labels, tiny(), rng=np.random.default_rng(0))


def test_a_report_is_never_empty():
    report = report_from_labels({"A": float("nan"), "B": 0.0}, tiny(), rng=np.random.default_rng(0))
    assert report.startswith("No Finding-pos")


def test_same_generator_same_report():
    labels = dict.fromkeys("ABC", 1.0)
    one, two = (report_from_labels(labels, tiny(), rng=np.random.default_rng(5)) for _ in range(2))
    assert one == two


def test_report_with_unknown_label():
    with pytest.raises(PromptError, match=r"'tiny' does not know 'Z'; it has: A, B"):
        report_from_labels({"Z": 1.0}, tiny())
    lacking = PromptSet("lacking", {"A": {"pos": ["a."], "neg": [], "unc": []}})
    with pytest.raises(PromptError, match="no 'unc' sentence for 'A'"):
        report_from_labels({"A": -1.0}, lacking, rng=np.random.default_rng(0))


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [*NIH_LABELS, "No Finding"])
def test_nih_sentences_are_many_and_different(label):
    kinds = load_prompts("nih").classes[label]
    assert len(kinds["pos"]) >= 8 and len(kinds["neg"]) >= 3 and len(kinds["unc"]) >= 3
    sentences = [s for values in kinds.values() for s in values]
    assert len(set(sentences)) == len(sentences)
    assert all(s[0].isupper() and s.endswith(".") and s == " ".join(s.split()) for s in sentences)


def test_nih_sentences_belong_to_one_label_and_kind():
    where: dict[str, tuple[str, str]] = {}
    for label, kinds in load_prompts("nih").classes.items():
        for kind, sentences in kinds.items():
            for sentence in sentences:
                assert where.setdefault(sentence, (label, kind)) == (label, kind)


def test_a_file_of_ones_own(tmp_path):
    content = {"name": "mine", "classes": {"Goitre": {"pos": ["Goitre."]}}}
    (tmp_path / "mine.json").write_text(json.dumps(content))
    mine = load_prompts(tmp_path / "mine.json")
    assert zero_shot_prompts(mine, "Goitre") == ["Goitre."] and mine.name == "mine"
    with pytest.raises(PromptError, match="'neg'"):
        zero_shot_prompts(mine, "Goitre", kind="neg")
    with pytest.raises(PromptError, match="no 'maybe' sentence for 'Goitre'"):
        zero_shot_prompts(mine, "Goitre", kind="maybe")


def test_unknown_name_lists_the_known():
    assert {"chexpert_gloria", "nih"} <= set(available_prompts())
    with pytest.raises(PromptError, match=r"'nhi'.*chexpert_gloria.*nih"):
        load_prompts("nhi")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "Invalid JSON"),
        ("[]", "should be an object"),
        ('{"name": "x"}', "classes: Dictionary should have at least 1 item"),
        ('{"classes": {"A": {"pos": ["x"]}}, "clases": 1}', "clases: Unexpected keyword argument"),
        ('{"classes": {"A": {"positive": ["x"]}}}', "classes > A > positive .*'pos', 'neg' or 'unc'"),
        ('{"classes": {"A": {"pos": "x"}}}', "classes > A > pos: Input should be a valid"),
        ('{"classes": {"A": {"pos": ["x", ""]}}}', "classes > A > pos > 1: "),
    ],
)
def test_malformed_files(tmp_path, content, words):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(PromptError, match=words) as caught:
        load_prompts(tmp_path / "p.json")
    assert "p.json" in str(caught.value)


def test_prompts_for_every_dataset():
    """The dataset's own set, completed from the names of labels; else sentences from names; a named set as it is."""
    assert prompts_for("nih", load_prompts("nih").classes) == load_prompts("nih")
    mixed = prompts_for("nih", ["Mass", "Goitre"])
    assert mixed.name == "nih, labels" and mixed.classes["Mass"] == load_prompts("nih").classes["Mass"]
    assert mixed.classes["Goitre"]["neg"][0] == "No goitre." and "Goitre" not in load_prompts("nih").classes
    made = prompts_for("kermany", ["Pleural_Thickening", "COVID-19", "Normal"])
    assert made.name == "labels" and list(made.classes) == ["Pleural_Thickening", "COVID-19", "Normal", "No Finding"]
    assert made.classes["Pleural_Thickening"]["pos"][0] == "Pleural thickening."
    assert made.classes["COVID-19"]["unc"][0] == "Possible COVID-19."
    assert made.classes["Normal"] == made.classes["No Finding"]
    assert prompts_for("nih", ["Mass"], "labels").name == "labels"
    assert prompts_for("kermany", ["Pneumonia"], "chexpert") == load_prompts("chexpert")
    with pytest.raises(PromptError, match="no prompt set 'cexpert'"):
        prompts_for("kermany", ["Pneumonia"], "cexpert")
