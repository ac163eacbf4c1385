"""Which two images and which two texts of a study are shown together, and reports made from labels."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest

from gloria_core.data.dataset import StudyDataset
from gloria_core.data.prompts import PromptError, PromptSet
from gloria_core.data.reports import ReportError

SIZE, CROP = 16, 12
CLASSES = {
    "Edema": {"pos": ["There is edema.", "Edema is seen.", "Wet lungs."], "neg": ["No edema."], "unc": ["Edema?"]},
    "Mass": {"pos": ["A mass.", "There is a mass."], "neg": ["No mass."], "unc": ["Perhaps a mass."]},
    "No Finding": {"pos": ["Normal chest.", "Clear."], "neg": [], "unc": []},
}
PROMPTS = PromptSet("test", CLASSES)


class Numbered:
    """Every pixel of image k is 10 k + (row + column) % 10."""

    def image(self, path):
        rows, columns = np.indices((SIZE, SIZE))
        return (10 * int(path.split("_")[1]) + (rows + columns) % 10).astype(np.uint8)


def make_frame(views=("PA",), **columns):
    """One study for each entry of `views`, with as many images as it names views."""
    counts = np.cumsum([0, *[row.count(";") + 1 for row in views]])
    frame = pd.DataFrame(
        {
            "study_id": [f"s{i}" for i in range(len(views))],
            "patient_id": [f"p{i}" for i in range(len(views))],
            "split": "train",
            "images": [";".join(f"img_{k}" for k in range(counts[i], counts[i + 1])) for i in range(len(views))],
            "views": list(views),
            "findings": "Heart normal.",
            "impression": "No change.",
            "label_rank": 0.0,
            "Edema": np.nan,
            "Mass": np.nan,
            "No Finding": np.nan,
            "is_male": 1.0,
            "boxes": "",
            "masks": "",
        }
    )
    return frame.assign(**columns)


def dataset(frame, **options):
    return StudyDataset(frame, Numbered(), **({"crop": CROP, "text": "both"} | options))


def drawn(source, what, epochs=60, index=0):
    """What a study gives in each of many epochs."""
    found = []
    for epoch in range(epochs):
        source.set_epoch(epoch)
        found.append(what(source[index]))
    return found


def which(item):
    return tuple(int(view.min()) // 10 for view in item.pixels)


# ------------------------------------------------------------------------------------------------------- views


def test_two_views_are_distinct_where_the_study_has_two():
    """Two AP, one PA and two laterals: the released code shows two images of one view here, always."""
    frame = make_frame(["AP;AP;PA;LATERAL;LATERAL"])
    views = frame["views"][0].split(";")
    pairs = drawn(dataset(frame, views=2, augment="crop"), which, epochs=400)
    kinds = Counter(tuple(views[i] for i in pair) for pair in pairs)
    assert all(first != second for first, second in kinds)
    assert len(kinds) == 6
    assert min(kinds.values()) > 400 / 6 * 0.6  # every view equally often, however many images it has
    assert {image for pair in pairs for image in pair} == {0, 1, 2, 3, 4}


def test_then_two_images_of_one_view_then_one_image_twice():
    frame = make_frame(["PA;PA;PA", "LATERAL;LATERAL", "AP"])
    source = dataset(frame, views=2, augment="crop")
    assert {frozenset(pair) for pair in drawn(source, which)} == {frozenset(p) for p in ((0, 1), (0, 2), (1, 2))}
    assert set(drawn(source, which, index=1)) == {(3, 4), (4, 3)}
    assert set(drawn(source, which, index=2)) == {(5, 5)}
    crops = drawn(source, lambda item: np.array_equal(*item.pixels), index=2)
    assert not all(crops)  # the same image, two augmentations


def test_without_augmentation_the_first_of_each_view():
    frame = make_frame(["LATERAL;PA;PA;AP", "PA;PA;LATERAL", "PA"])
    source = dataset(frame, views=2)
    assert [which(source[i]) for i in range(3)] == [(1, 3), (4, 6), (7, 7)]
    assert len(set(drawn(source, which, epochs=5))) == 1
    assert which(dataset(frame, views=4)[0]) == (1, 3, 0, 2)
    assert np.array_equal(*source[2].pixels)


# ------------------------------------------------------------------------------------------------------- texts


def test_two_texts_are_both_sections_in_random_order():
    pairs = Counter(drawn(dataset(make_frame(), texts=2), lambda item: item.texts, epochs=200))
    assert set(pairs) == {("Heart normal.", "No change."), ("No change.", "Heart normal.")}
    assert min(pairs.values()) > 60
    alone = dataset(make_frame(findings=""), texts=2)[0]
    assert alone.texts == ("No change.", "No change.")
    assert alone.spans == (((0, 10),), ((0, 10),))
    assert sorted(dataset(make_frame(), texts=3)[0].texts)[0] != sorted(dataset(make_frame(), texts=3)[0].texts)[2]


def test_other_wordings_half_of_the_time():
    frame = make_frame(meta_findings_augmented="The heart is normal.", meta_impression_augmented="Unchanged.")
    source = dataset(frame, texts=2, augmented_texts=True)
    pairs = drawn(source, lambda item: item.texts, epochs=400)
    wordings = Counter(text for pair in pairs for text in pair)
    assert set(wordings) == {"Heart normal.", "No change.", "The heart is normal.", "Unchanged."}
    assert 140 < wordings["Unchanged."] < 260
    findings = {"Heart normal.", "The heart is normal."}
    assert all(len(findings & set(pair)) == 1 for pair in pairs)  # one of each section
    assert {text for pair in drawn(dataset(frame, texts=2), lambda item: item.texts) for text in pair} == {
        "Heart normal.",
        "No change.",
    }


def test_a_single_section_comes_in_both_wordings():
    """(text, other) in random order, as in the released code."""
    frame = make_frame(findings="", meta_findings_augmented="", meta_impression_augmented="Unchanged.")
    pairs = Counter(drawn(dataset(frame, texts=2, augmented_texts=True), lambda item: item.texts, epochs=200))
    assert set(pairs) == {("No change.", "Unchanged."), ("Unchanged.", "No change.")}
    assert min(pairs.values()) > 60
    one = dataset(frame, text="impression", augmented_texts=True, sentence="random")
    assert set(drawn(one, lambda item: item.texts)) == {("No change.",), ("Unchanged.",)}
    joined = dataset(make_frame(meta_impression_augmented="Unchanged."), augmented_texts=True)
    assert set(drawn(joined, lambda item: item.texts)) == {
        ("Heart normal.\n\nNo change.",),
        ("Heart normal.\n\nUnchanged.",),
    }


def test_wrong_use_of_other_wordings():
    with pytest.raises(ValueError, match="no column meta_findings_augmented or meta_impression_augmented"):
        dataset(make_frame(), augmented_texts=True)
    with pytest.raises(ReportError, match="study s0: meta_findings_augmented has text, but findings is empty"):
        dataset(make_frame(findings="", meta_findings_augmented="x y"), augmented_texts=True)
    frame = make_frame(meta_findings_augmented="x")
    with pytest.raises(ValueError, match="sentence='published'"):
        dataset(frame, augmented_texts=True, sentence="published")
    with pytest.raises(ValueError, match="sentence='published'"):
        dataset(frame, prompts=PROMPTS, sentence="published")


# ----------------------------------------------------------------------------------------- reports from labels


def labelled(**labels):
    return make_frame(["PA", "PA"], findings=["", "Heart normal."], impression=["", "No change."], **labels)


def test_studies_without_text_get_a_report_from_labels():
    source = dataset(labelled(Edema=1.0, Mass=1.0), prompts=PROMPTS, texts=2, augment="crop")
    pairs = drawn(source, lambda item: item.texts, epochs=200)
    one, two = CLASSES["Edema"]["pos"], CLASSES["Mass"]["pos"]
    allowed = {f"{a} {b}" for a in one for b in two} | {f"{b} {a}" for a in one for b in two}
    assert {text for pair in pairs for text in pair} == allowed
    assert 0 < sum(a == b for a, b in pairs) < 200 * 0.25  # two draws of their own
    assert set(source[1].texts) == {"Heart normal.", "No change."}  # reports stay reports
    spans = source[0].spans[0]
    assert [source[0].texts[0][a:b] for a, b in spans] == source[0].texts[0].replace(". ", ".|").split("|")


def test_negative_and_uncertain_sentences():
    frame = labelled(Edema=-1.0, Mass=0.0)
    texts = drawn(dataset(frame, prompts=PROMPTS, augment=True, n_negative=3), lambda item: item.texts[0])
    assert set(texts) == {"Edema? No mass.", "No mass. Edema?"}
    assert set(drawn(dataset(frame, prompts=PROMPTS, augment=True), lambda item: item.texts[0])) == {"Edema?"}
    healthy = labelled(Edema=0.0, Mass=0.0)
    assert set(drawn(dataset(healthy, prompts=PROMPTS, augment=True), lambda item: item.texts[0])) == {
        "Normal chest.",
        "Clear.",
    }


def test_reports_from_labels_are_fixed_without_augmentation():
    frame = labelled(Edema=1.0, Mass=-1.0)
    source = dataset(frame, prompts=PROMPTS, texts=2, n_negative=3)
    assert set(drawn(source, lambda item: item.texts, epochs=10)) == {("There is edema.", "There is edema.")}
    assert dataset(labelled(Edema=-1.0), prompts=PROMPTS)[0].texts == ("Normal chest.",)


def test_what_lacks_for_a_report_is_told_at_once():
    with pytest.raises(ReportError, match=r"text and labels of 1 studies is empty \(study_id s0\)"):
        dataset(labelled(), prompts=PROMPTS)
    with pytest.raises(ReportError, match=r"findings and impression of 1 studies is empty \(study_id s0\)"):
        dataset(labelled(Edema=1.0))
    no_negative = PromptSet("bare", CLASSES | {"Mass": {"pos": ["A mass."], "neg": [], "unc": []}})
    frame = labelled(Edema=1.0, Mass=0.0)
    assert dataset(frame, prompts=no_negative, augment=True)[0].texts[0] in CLASSES["Edema"]["pos"]
    with pytest.raises(PromptError, match="no 'neg' sentence for 'Mass'"):
        dataset(frame, prompts=no_negative, augment=True, n_negative=1)
    assert dataset(frame, prompts=no_negative, n_negative=1)[0].texts == ("There is edema.",)  # none of them is needed
    with pytest.raises(PromptError, match="does not know 'Mass'"):
        dataset(labelled(Mass=1.0), prompts=PromptSet("edema", {"Edema": CLASSES["Edema"]}))
    with pytest.raises(PromptError, match="does not know 'No Finding'"):
        dataset(labelled(Edema=0.0), prompts=PromptSet("edema", {"Edema": CLASSES["Edema"]}))


def test_items_depend_on_seed_epoch_and_number_only():
    frame = make_frame(
        ["AP;PA;LATERAL"] * 6,
        findings=["", "a b."] * 3,
        impression=["", "c d."] * 3,
        meta_impression_augmented=["", "e f."] * 3,
        Edema=1.0,
        Mass=[1.0, 0.0, -1.0] * 2,
    )
    options = {"views": 2, "texts": 2, "augment": True, "augmented_texts": True, "prompts": PROMPTS, "n_negative": 1}
    first, second, other = dataset(frame, **options), dataset(frame, **options), dataset(frame, seed=1, **options)
    for source in (first, second, other):
        source.set_epoch(3)
    forward, backward = [first[i] for i in range(6)], [second[i] for i in reversed(range(6))][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert a.texts == b.texts
        assert np.array_equal(a.pixels, b.pixels)
    assert [item.texts for item in forward] != [other[i].texts for i in range(6)]
    first.set_epoch(4)
    assert [item.texts for item in forward] != [first[i].texts for i in range(6)]
