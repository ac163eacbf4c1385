"""Items (views, texts, reports from labels), batches and their order, and prepared datasets, on hand-made frames."""

import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from gloria_core.data.cache import ImageCache
from gloria_core.data.dataset import Collate, StudyDataset, make_loader, open_dataset, save_dataset
from gloria_core.data.manifest import ManifestError, read_manifest, write_manifest
from gloria_core.data.prompts import PromptError, PromptSet
from gloria_core.data.reports import ReportError
from gloria_core.data.tokenizer import train_wordpiece

SIZE, CROP = 16, 12
IMPRESSIONS = [
    "Stable cardiomegaly. No effusion. Lungs are clear.",
    "Mild edema. No pneumothorax.",
    "Left effusion.",
    "Clear lungs. No change.",
    "Bibasilar atelectasis. No edema. Heart is normal.",
    "Right effusion. No focal consolidation.",
    "No acute disease. Tube in place.",
]
TOKENIZER = train_wordpiece(IMPRESSIONS, vocab_size=200, min_frequency=1)

CLASSES = {
    "Edema": {"pos": ["There is edema.", "Edema is seen.", "Wet lungs."], "neg": ["No edema."], "unc": ["Edema?"]},
    "Mass": {"pos": ["A mass.", "There is a mass."], "neg": ["No mass."], "unc": ["Perhaps a mass."]},
    "No Finding": {"pos": ["Normal chest.", "Clear."], "neg": [], "unc": []},
}
PROMPTS = PromptSet("test", CLASSES)


class FakeCache:
    """Every pixel of image k is 10 k + (row + column) % 10, so that image and crop can be told from the pixels."""

    def __getitem__(self, path):
        rows, columns = np.indices((SIZE, SIZE))
        return (10 * int(path.split("_")[1]) + (rows + columns) % 10).astype(np.uint8)


def make_frame(n=7, **columns):
    frame = pd.DataFrame(
        {
            "study_id": [f"s{i}" for i in range(n)],
            "patient_id": [f"p{i}" for i in range(n)],
            "split": "train",
            "images": [f"img_{2 * i};img_{2 * i + 1}" for i in range(n)],
            "views": "LATERAL;PA",
            "findings": "Heart is normal. Lungs are clear.",
            "impression": [IMPRESSIONS[i % 7] for i in range(n)],
            "label_rank": np.linspace(0, 0.9, n),
            "Edema": [[1.0, 0.0, -1.0, np.nan][i % 4] for i in range(n)],
            "Fracture": 0.0,
            "boxes": "",
            "masks": "",
            "meta_source": "test",
        }
    )
    return frame.assign(**columns)


def dataset(frame=None, **options):
    return StudyDataset(make_frame() if frame is None else frame, FakeCache(), crop=CROP, **options)


def batches(source, **options):
    return list(make_loader(source, Collate(TOKENIZER), **({"batch_size": 2, "shuffle": True} | options)))


def all_same(first, second):
    return all(same(a, b) for a, b in zip(first, second, strict=True))


def same(first, second):
    return all(
        torch.equal(a, b)
        for a, b in (
            (first.pixels, second.pixels),
            (first.index, second.index),
            (first.text.input_ids, second.text.input_ids),
            (first.text.sentence_ids, second.text.sentence_ids),
            (first.labels.nan_to_num(9), second.labels.nan_to_num(9)),
        )
    )


# ------------------------------------------------------------------------------------------------------- items


def test_an_item_without_augmentation():
    item = dataset()[2]
    assert item.pixels.shape == (1, CROP, CROP)
    assert item.pixels.dtype == np.uint8
    assert np.array_equal(item.pixels[0], FakeCache()["img_5"][2:14, 2:14])  # the frontal, centre crop
    assert item.texts == ("Left effusion.",)
    assert item.spans == (((0, 14),),)
    assert (item.index, item.study_id) == (2, "s2")
    assert item.labels.tolist() == [-1.0, 0.0]
    assert np.isnan(dataset(labels=["Fracture", "Edema"])[3].labels[1])
    assert len(dataset()) == 7
    with pytest.raises(IndexError):
        dataset()[7]


def test_rows_keep_their_numbers_after_filtering():
    source = dataset(make_frame().iloc[[4, 1]])
    assert [source[i].study_id for i in range(2)] == ["s4", "s1"]


def test_sections():
    assert dataset(text="findings")[0].texts == ("Heart is normal. Lungs are clear.",)
    frame = make_frame(findings=["Heart is normal", *[""] * 6])
    both = dataset(frame, text="both")
    assert both[0].texts[0] == "Heart is normal\n\n" + IMPRESSIONS[0]
    assert both[0].spans[0][:2] == ((0, 15), (17, 37))
    assert both[1].texts[0] == IMPRESSIONS[1]


def test_an_empty_section_names_study_and_remedy():
    with pytest.raises(ReportError, match=r"no impression in 2 studies \(study_id s1, s3\); use text='both'"):
        dataset(make_frame(impression=["a b", " ", "a b", "", "a b", "a b", "a b"]))
    with pytest.raises(ReportError, match="s0"):
        dataset(make_frame(impression="", findings=["", *["a b"] * 6]), text="both")


def test_random_sentences_cover_the_report_and_nothing_else():
    source = dataset(sentence="random")
    seen = set()
    for epoch in range(40):
        source.set_epoch(epoch)
        item = source[0]
        seen.add(item.texts[0])
        assert item.spans == (((0, len(item.texts[0])),),)
    assert seen == {"Stable cardiomegaly.", "No effusion.", "Lungs are clear."}


def test_published_sentences_are_cleaned():
    source = dataset(make_frame(impression="1. Stable Cardiomegaly. Normal. A 2.5 cm nodule."), sentence="published")
    seen = {source[i].texts[0] for i in range(7)}
    assert seen == {"stable cardiomegaly", "5 cm nodule"}
    # the rule drops sentences of one word; a report of which it leaves nothing is read as it is
    words = make_frame(impression=["Normal.", "Edema", "ÉÈ ñ.", "Effusion. Edema. Normal.", *["a b"] * 3])
    short = dataset(words, sentence="published")
    assert [short[i].texts[0] for i in range(5)] == ["Normal.", "Edema", "ÉÈ ñ.", "Effusion. Edema. Normal.", "a b"]
    assert [short[i].spans for i in range(2)] == [(((0, 7),),), (((0, 5),),)]
    assert Collate(TOKENIZER)([short[0], short[1]]).text.words[0][1:-1] == ("Normal", ".")


def test_two_texts_are_independent_draws():
    source = dataset(make_frame(60), sentence="random", texts=2)
    pairs = [source[i].texts for i in range(0, 60, 7)] + [source[i].texts for i in range(4, 60, 7)]
    assert {len(pair) for pair in pairs} == {2}
    equal = sum(first == second for first, second in pairs)
    assert 0 < equal < len(pairs)
    sections = {dataset(make_frame(60), text="both", texts=2)[i].texts for i in range(0, 60, 7)}
    assert len(sections) > 1  # one section each
    assert {text for pair in sections for text in pair} == {"Heart is normal. Lungs are clear.", IMPRESSIONS[0]}


def which(item):
    """Numbers of the images shown, told from the pixels."""
    return tuple(int(view.min()) // 10 for view in item.pixels)


def test_views():
    frame = make_frame(
        3, images=["img_0;img_1;img_2", "img_3", "img_4;img_5"], views=["LATERAL;PA;AP", "PA", "LATERAL"]
    )
    frame.loc[2, "views"] = "LATERAL;LATERAL"
    assert [which(dataset(frame)[i]) for i in range(3)] == [(1,), (3,), (4,)]  # without a frontal: what it has
    assert [which(dataset(frame, views=2)[i]) for i in range(3)] == [(1, 2), (3, 3), (4, 5)]
    assert which(dataset(frame, views=4)[0]) == (1, 2, 0, 1)
    one, two = dataset(frame, augment="crop"), dataset(frame, views=2, augment="crop")
    seen_one, seen_two = set(), set()
    for epoch in range(30):
        one.set_epoch(epoch)
        two.set_epoch(epoch)
        seen_one |= set(which(one[0]))
        seen_two.add(tuple(sorted(which(two[0]))))
        assert which(two[1]) == (3, 3)
    assert seen_one == {1, 2}  # never the lateral
    assert seen_two == {(0, 1), (0, 2), (1, 2)}  # never the same image twice
    crops = [two[1].pixels for two.epoch in range(10)]
    assert any(not np.array_equal(crop[0], crop[1]) for crop in crops)


def test_augmentation():
    plain = FakeCache()["img_1"]
    windows = {plain[top : top + CROP, left : left + CROP].tobytes() for top in range(5) for left in range(5)}
    source, jitter = dataset(augment="crop"), dataset(augment=True)
    crops, brightness = set(), []
    for epoch in range(40):
        source.set_epoch(epoch)
        jitter.set_epoch(epoch)
        crops.add(source[0].pixels.tobytes())
        brightness.append(float(jitter[0].pixels.mean()) - float(source[0].pixels.mean()))
    assert crops <= windows  # a crop and nothing else: no flip
    assert len(crops) > 4
    assert np.std(brightness) > 3
    assert max(np.abs(brightness)) < 0.1 * 255 + 0.1 * 128


def test_items_depend_on_seed_epoch_and_number_only():
    options = {"sentence": "random", "augment": True, "views": 2, "texts": 2}
    first, second = dataset(**options), dataset(**options)
    for source in (first, second):
        source.set_epoch(3)
    forward = [first[i] for i in range(7)]
    backward = [second[i] for i in reversed(range(7))][::-1]
    assert all(
        a.texts == b.texts and np.array_equal(a.pixels, b.pixels) for a, b in zip(forward, backward, strict=True)
    )
    other = dataset(seed=1, **options)
    other.set_epoch(3)
    assert any(not np.array_equal(forward[i].pixels, other[i].pixels) for i in range(7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "report"}, r"text\n  Input should be 'impression', 'findings' or 'both'"),
        ({"sentence": "first"}, r"sentence\n  Input should be 'all'"),
        ({"augment": "flip"}, "augment.*\n  Input should be 'crop'"),
        ({"views": 0}, r"views\n  Input should be greater than 0"),
        ({"labels": ["Edma"]}, r"no label column \['Edma'\]; the manifest has \['Edema', 'Fracture'\]"),
    ],
)
def test_unknown_options(options, message):
    with pytest.raises(ValueError, match=message):
        dataset(**options)


def test_a_crop_larger_than_the_cache():
    with pytest.raises(ValueError, match="crop=20 is larger"):
        StudyDataset(make_frame(), FakeCache(), crop=20)[0]


def studies(views=("PA",), **columns):
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


def both_sections(frame, **options):
    return StudyDataset(frame, FakeCache(), **({"crop": CROP, "text": "both"} | options))


def over_epochs(source, what, epochs=60, index=0):
    """What a study gives in each of many epochs."""
    results = []
    for epoch in range(epochs):
        source.set_epoch(epoch)
        results.append(what(source[index]))
    return results


# ------------------------------------------------------------------------------------------------------- which views


def test_two_views_are_distinct_where_the_study_has_two():
    """Two AP, one PA and two laterals: the released code shows two images of one view here, always."""
    frame = studies(["AP;AP;PA;LATERAL;LATERAL"])
    views = frame["views"][0].split(";")
    pairs = over_epochs(both_sections(frame, views=2, augment="crop"), which, epochs=400)
    kinds = Counter(tuple(views[i] for i in pair) for pair in pairs)
    assert all(first != second for first, second in kinds)
    assert len(kinds) == 6
    assert min(kinds.values()) > 400 / 6 * 0.6  # every view equally often, however many images it has
    assert {image for pair in pairs for image in pair} == {0, 1, 2, 3, 4}


def test_then_two_images_of_one_view_then_one_image_twice():
    frame = studies(["PA;PA;PA", "LATERAL;LATERAL", "AP"])
    source = both_sections(frame, views=2, augment="crop")
    assert {frozenset(pair) for pair in over_epochs(source, which)} == {frozenset(p) for p in ((0, 1), (0, 2), (1, 2))}
    assert set(over_epochs(source, which, index=1)) == {(3, 4), (4, 3)}
    assert set(over_epochs(source, which, index=2)) == {(5, 5)}
    crops = over_epochs(source, lambda item: np.array_equal(*item.pixels), index=2)
    assert not all(crops)  # the same image, two augmentations


def test_without_augmentation_the_first_of_each_view():
    frame = studies(["LATERAL;PA;PA;AP", "PA;PA;LATERAL", "PA"])
    source = both_sections(frame, views=2)
    assert [which(source[i]) for i in range(3)] == [(1, 3), (4, 6), (7, 7)]
    assert len(set(over_epochs(source, which, epochs=5))) == 1
    assert which(both_sections(frame, views=4)[0]) == (1, 3, 0, 2)
    assert np.array_equal(*source[2].pixels)


# ------------------------------------------------------------------------------------------------------- texts


def test_two_texts_are_both_sections_in_random_order():
    pairs = Counter(over_epochs(both_sections(studies(), texts=2), lambda item: item.texts, epochs=200))
    assert set(pairs) == {("Heart normal.", "No change."), ("No change.", "Heart normal.")}
    assert min(pairs.values()) > 60
    alone = both_sections(studies(findings=""), texts=2)[0]
    assert alone.texts == ("No change.", "No change.")
    assert alone.spans == (((0, 10),), ((0, 10),))
    assert (
        sorted(both_sections(studies(), texts=3)[0].texts)[0] != sorted(both_sections(studies(), texts=3)[0].texts)[2]
    )


def test_other_wordings_half_of_the_time():
    frame = studies(meta_findings_augmented="The heart is normal.", meta_impression_augmented="Unchanged.")
    source = both_sections(frame, texts=2, augmented_texts=True)
    pairs = over_epochs(source, lambda item: item.texts, epochs=400)
    wordings = Counter(text for pair in pairs for text in pair)
    assert set(wordings) == {"Heart normal.", "No change.", "The heart is normal.", "Unchanged."}
    assert 140 < wordings["Unchanged."] < 260
    findings = {"Heart normal.", "The heart is normal."}
    assert all(len(findings & set(pair)) == 1 for pair in pairs)  # one of each section
    assert {text for pair in over_epochs(both_sections(frame, texts=2), lambda item: item.texts) for text in pair} == {
        "Heart normal.",
        "No change.",
    }


def test_a_single_section_comes_in_both_wordings():
    """(text, other) in random order, as in the released code."""
    frame = studies(findings="", meta_findings_augmented="", meta_impression_augmented="Unchanged.")
    pairs = Counter(
        over_epochs(both_sections(frame, texts=2, augmented_texts=True), lambda item: item.texts, epochs=200)
    )
    assert set(pairs) == {("No change.", "Unchanged."), ("Unchanged.", "No change.")}
    assert min(pairs.values()) > 60
    one = both_sections(frame, text="impression", augmented_texts=True, sentence="random")
    assert set(over_epochs(one, lambda item: item.texts)) == {("No change.",), ("Unchanged.",)}
    joined = both_sections(studies(meta_impression_augmented="Unchanged."), augmented_texts=True)
    assert set(over_epochs(joined, lambda item: item.texts)) == {
        ("Heart normal.\n\nNo change.",),
        ("Heart normal.\n\nUnchanged.",),
    }


def test_wrong_use_of_other_wordings():
    with pytest.raises(ValueError, match="no column meta_findings_augmented or meta_impression_augmented"):
        both_sections(studies(), augmented_texts=True)
    with pytest.raises(ReportError, match="study s0: meta_findings_augmented has text, but findings is empty"):
        both_sections(studies(findings="", meta_findings_augmented="x y"), augmented_texts=True)


# ----------------------------------------------------------------------------------------- reports from labels


def labelled(**labels):
    return studies(["PA", "PA"], findings=["", "Heart normal."], impression=["", "No change."], **labels)


def test_studies_without_text_get_a_report_from_labels():
    source = both_sections(labelled(Edema=1.0, Mass=1.0), prompts=PROMPTS, texts=2, augment="crop")
    pairs = over_epochs(source, lambda item: item.texts, epochs=200)
    one, two = CLASSES["Edema"]["pos"], CLASSES["Mass"]["pos"]
    allowed = {f"{a} {b}" for a in one for b in two} | {f"{b} {a}" for a in one for b in two}
    assert {text for pair in pairs for text in pair} == allowed
    assert 0 < sum(a == b for a, b in pairs) < 200 * 0.25  # two draws of their own
    assert set(source[1].texts) == {"Heart normal.", "No change."}  # reports stay reports
    spans = source[0].spans[0]
    assert [source[0].texts[0][a:b] for a, b in spans] == source[0].texts[0].replace(". ", ".|").split("|")


def test_published_cutting_takes_texts_from_labels_and_other_wordings():
    source = both_sections(labelled(Edema=1.0, Mass=1.0), prompts=PROMPTS, augment=True, sentence="published")
    lines = [line for kind in ("Edema", "Mass") for line in CLASSES[kind]["pos"]]
    cleaned = {line.lower().strip(".") if len(line.split()) > 1 else line for line in lines}
    seen = set(over_epochs(source, lambda item: item.texts[0], epochs=100))
    assert seen <= cleaned | {"edema mass"} and {"there is edema"} < seen
    assert source[1].texts[0] in {"heart normal", "no change"}
    frame = studies(["PA"], findings=["Heart normal."], impression=[""], meta_findings_augmented="The heart is fine.")
    source = dataset(frame, sentence="published", text="findings", augmented_texts=True)
    assert set(over_epochs(source, lambda item: item.texts[0])) == {"heart normal", "the heart is fine"}


def test_uncertain_sentences_and_no_finding():
    frame = labelled(Edema=-1.0, Mass=0.0)
    assert set(over_epochs(both_sections(frame, prompts=PROMPTS, augment=True), lambda item: item.texts[0])) == {
        "Edema?"
    }
    healthy = labelled(Edema=0.0, Mass=0.0)
    assert set(over_epochs(both_sections(healthy, prompts=PROMPTS, augment=True), lambda item: item.texts[0])) == {
        "Normal chest.",
        "Clear.",
    }


def test_reports_from_labels_are_fixed_without_augmentation():
    frame = labelled(Edema=1.0, Mass=-1.0)
    source = both_sections(frame, prompts=PROMPTS, texts=2)
    assert set(over_epochs(source, lambda item: item.texts, epochs=10)) == {("There is edema.", "There is edema.")}
    assert both_sections(labelled(Edema=-1.0), prompts=PROMPTS)[0].texts == ("Normal chest.",)


def test_what_lacks_for_a_report_is_told_at_once():
    with pytest.raises(ReportError, match=r"no findings or impression or label in 1 studies \(study_id s0\)"):
        both_sections(labelled(), prompts=PROMPTS)
    with pytest.raises(ReportError, match=r"no findings or impression in 1 studies \(study_id s0\)"):
        both_sections(labelled(Edema=1.0))
    bare = PromptSet("bare", CLASSES | {"Mass": {"pos": ["A mass."], "neg": [], "unc": []}})
    absent = both_sections(labelled(Edema=1.0, Mass=0.0), prompts=bare, augment=True)
    assert absent[0].texts[0] in CLASSES["Edema"]["pos"]
    doubtful = labelled(Edema=1.0, Mass=-1.0)
    with pytest.raises(PromptError, match="no 'unc' sentence for 'Mass'"):
        both_sections(doubtful, prompts=bare, augment=True)
    assert both_sections(doubtful, prompts=bare)[0].texts == ("There is edema.",)  # without augmentation none is needed
    with pytest.raises(PromptError, match="does not know 'Mass'"):
        both_sections(labelled(Mass=1.0), prompts=PromptSet("edema", {"Edema": CLASSES["Edema"]}))
    with pytest.raises(PromptError, match="does not know 'No Finding'"):
        both_sections(labelled(Edema=0.0), prompts=PromptSet("edema", {"Edema": CLASSES["Edema"]}))


def test_texts_from_labels_and_other_wordings_depend_on_seed_epoch_and_number_only():
    frame = studies(
        ["AP;PA;LATERAL"] * 6,
        findings=["", "a b."] * 3,
        impression=["", "c d."] * 3,
        meta_impression_augmented=["", "e f."] * 3,
        Edema=1.0,
        Mass=[1.0, 0.0, -1.0] * 2,
    )
    options = {"views": 2, "texts": 2, "augment": True, "augmented_texts": True, "prompts": PROMPTS}
    first, second, other = (
        both_sections(frame, **options),
        both_sections(frame, **options),
        both_sections(frame, seed=1, **options),
    )
    for source in (first, second, other):
        source.set_epoch(3)
    forward, backward = [first[i] for i in range(6)], [second[i] for i in reversed(range(6))][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert a.texts == b.texts
        assert np.array_equal(a.pixels, b.pixels)
    assert [item.texts for item in forward] != [other[i].texts for i in range(6)]
    first.set_epoch(4)
    assert [item.texts for item in forward] != [first[i].texts for i in range(6)]


# ----------------------------------------------------------------------------------------------------- batches


def test_collate():
    source = dataset(views=2, texts=2, sentence="random", augment="crop")
    items = [source[i] for i in (3, 0, 1)]
    batch = Collate(TOKENIZER, channels=3, norm="half", max_tokens=20)(items)
    assert batch.pixels.shape == (3, 2, 3, CROP, CROP)
    assert batch.pixels.dtype == torch.float32
    expected = torch.from_numpy(np.stack([item.pixels for item in items])).float() / 255 * 2 - 1
    assert torch.allclose(batch.pixels[:, :, 1], expected, atol=1e-6)
    assert batch.index.tolist() == [3, 0, 1]
    assert (batch.views, batch.texts_per_study, len(batch.text)) == (2, 2, 6)
    words = [" ".join(row[1:-1]).replace(" .", ".") for row in batch.text.words]
    assert words == [text for item in items for text in item.texts]
    assert batch.labels.dtype == torch.float32
    assert batch.labels[:, 0].isnan().tolist() == [True, False, False]
    single = Collate(TOKENIZER, channels=1)(items)
    assert single.pixels.shape == (3, 2, 1, CROP, CROP)


def test_collate_names_the_study_without_words():
    source = dataset(make_frame(impression=["\x00", *["fine"] * 6]))
    with pytest.raises(ReportError, match="study s0"):
        Collate(TOKENIZER)([source[1], source[0]])


def test_order_depends_on_seed_and_epoch():
    def order(**options):
        return torch.cat([batch.index for batch in batches(dataset(), **options)]).tolist()

    assert order(shuffle=False) == list(range(7))
    assert sorted(order(seed=1)) == list(range(7))
    assert order(seed=1, epoch=2) == order(seed=1, epoch=2)
    assert len({tuple(order(seed=s, epoch=e)) for s in range(3) for e in range(3)}) == 9
    assert [len(batch.index) for batch in batches(dataset())] == [2, 2, 2, 1]
    assert [len(batch.index) for batch in batches(dataset(), drop_last=True)] == [2, 2, 2]


def test_the_epoch_reaches_the_items_and_leaves_the_dataset_alone():
    source = dataset(augment="crop")
    source.set_epoch(5)
    fifth = batches(source, shuffle=False)
    assert all_same(fifth, batches(dataset(augment="crop"), shuffle=False, epoch=5))
    assert not all_same(fifth, batches(source, shuffle=False, epoch=6))
    assert source.epoch == 5


def test_skipped_batches_are_the_first_ones():
    options = {"seed": 4, "epoch": 1, "drop_last": True}
    source = dataset(augment=True, sentence="random")
    whole = batches(source, **options)
    rest = batches(source, **options, skip_batches=2)
    assert len(make_loader(source, Collate(TOKENIZER), batch_size=2, shuffle=True, skip_batches=2)) == 2
    assert len(rest) == 1
    assert same(rest[0], whole[2])


@pytest.mark.parametrize("drop_last", [True, False])
def test_shares_of_the_processes_make_up_the_batch(drop_last):
    source = dataset(make_frame(14), augment=True, sentence="random")
    options = {"seed": 2, "epoch": 3, "drop_last": drop_last}
    whole = batches(source, batch_size=6, **options)
    shares = [batches(source, batch_size=3, rank=rank, world_size=2, **options) for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) == len(whole)
    for batch, first, second in zip(whole, *shares, strict=True):
        assert torch.equal(batch.index, torch.cat([first.index, second.index]))
        assert torch.equal(batch.pixels, torch.cat([first.pixels, second.pixels]))


def test_loader_refuses_impossible_batches():
    with pytest.raises(ValueError, match="use drop_last=True"):
        batches(dataset(), batch_size=3, world_size=2)
    with pytest.raises(ValueError, match="smaller batch_size"):
        batches(dataset(), batch_size=8, drop_last=True)
    with pytest.raises(ValueError, match="rank=2"):
        batches(dataset(), rank=2, world_size=2)


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_change_nothing(method, workers):
    source = dataset(augment=True, sentence="random", views=2)
    options = {"batch_size": 2, "shuffle": True, "seed": 3, "epoch": 1}
    loader = make_loader(source, Collate(TOKENIZER), **options, workers=workers)
    loader.multiprocessing_context = method
    assert all_same(batches(source, **options), loader)


def test_with_a_real_manifest_and_cache(tmp_path):
    frame = make_frame(3, images=[f"img_{i}.png" for i in range(3)], views="PA")
    for i, name in enumerate(frame["images"]):
        Image.fromarray(np.full((20, 20), 10 * i, np.uint8)).save(tmp_path / name)
    write_manifest(frame, tmp_path / "manifest.csv")
    frame = read_manifest(tmp_path / "manifest.csv", root=tmp_path)
    cache = ImageCache.build(frame, tmp_path, size=SIZE, folder=tmp_path / "cache", progress=False)
    source = StudyDataset(frame, cache, crop=CROP, augment="crop")
    assert source.label_names == ["Edema", "Fracture"]
    options = {"batch_size": 3, "shuffle": False}
    (batch,) = batches(source, **options)
    assert torch.allclose(batch.pixels.mean(dim=(1, 2, 3, 4)), torch.tensor([0.0, 10, 20]) / 255 * 2 - 1, atol=1e-5)
    (again,) = batches(source, **options, workers=1)
    assert same(batch, again)


# ------------------------------------------------------------------------------------------- prepared datasets


def prepared(tmp_path, on_error="raise", **columns):
    frame = make_frame(6, images=[f"img_{i}.png" for i in range(6)], views="PA", **columns)
    for name in frame["images"]:
        Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / name)
    return save_dataset(tmp_path / "set", frame, name="tiny", root=tmp_path, size=SIZE, on_error=on_error)


def test_what_save_dataset_writes_open_dataset_opens(tmp_path):
    written = prepared(tmp_path)
    opened = open_dataset(tmp_path / "set" / "manifest.csv")
    assert (opened.name, opened.root, opened.size) == ("tiny", tmp_path.resolve(), SIZE)
    assert list(opened.frame["study_id"]) == list(written.frame["study_id"])
    assert opened.cache["img_0.png"].shape == (SIZE, SIZE)
    with pytest.raises(ManifestError, match="has no test study: nothing can be scored on it"):
        opened.split("test")
    (tmp_path / "set" / "dataset.json").unlink()
    with pytest.raises(ManifestError, match="`manifest` is blank: run notebook 01 first"):
        open_dataset("")
    with pytest.raises(ManifestError, match=r"dataset\.json is missing: run notebooks/01"):
        open_dataset(tmp_path / "set" / "manifest.csv")


def box(x, y, w, h, image=0):
    return json.dumps([{"label": "Mass", "image": image, "xywh": [x, y, w, h]}])


@pytest.mark.parametrize(
    ("outside", "why"),
    [
        ((30, 2, 4, 4), "beyond the right"),
        ((2, 3, 4, 18.5), "partly below"),
        ((-1.5, 2, 4, 4), "left of it"),
        ((2, -9, 4, 4), "above"),
        ((100, 200, 300, 400), "pixels of a larger image"),
        ((0, 0, 20, 21.01), "more than rounding"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_box_outside_its_image_is_named_or_leaves_its_study_out(tmp_path, outside, why):
    boxes = ["", box(0, 0, 20, 20), box(*outside), box(-1, -0.4, 5, 5), box(10, 10, 11, 10.6), ""]
    match = r"row 4 .study 's2'., column 'boxes': .*of 'Mass' leaves img_2.png .20 x 20 pixels.; boxes count the pixels"
    with pytest.raises(ManifestError, match=match):
        prepared(tmp_path, boxes=boxes)
    assert not (tmp_path / "set" / "manifest.csv").exists()
    kept = prepared(tmp_path, boxes=boxes, on_error="exclude").frame
    assert list(kept["study_id"]) == ["s0", "s1", "s3", "s4", "s5"]
    assert list(kept["boxes"])[1:4] == [boxes[1], boxes[3], boxes[4]]  # kept as they were given
    assert "leaves img_2.png" in (tmp_path / "set" / "excluded.csv").read_text()


def test_boxes_are_compared_with_their_own_image_and_wrong_ones_are_told_before_decoding(tmp_path):
    Image.fromarray(np.zeros((40, 90), np.uint8)).save(tmp_path / "wide.png")
    frame = make_frame(2, images=["img_0.png;wide.png", "img_1.png"], views=["PA;LATERAL", "PA"], impression="a b")
    for name in ("img_0.png", "img_1.png"):
        Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / name)
    options = {"name": "two", "root": tmp_path, "size": SIZE}
    save_dataset(tmp_path / "set", frame.assign(boxes=[box(70, 10, 20, 30, image=1), ""]), **options)
    with pytest.raises(ManifestError, match=r"leaves img_0\.png .20 x 20"):
        save_dataset(tmp_path / "set", frame.assign(boxes=[box(70, 10, 20, 30), ""]), **options)
    with pytest.raises(ManifestError, match=r"leaves wide\.png .90 x 40"):
        save_dataset(tmp_path / "set", frame.assign(boxes=[box(70, 10, 20, 32, image=1), ""]), **options)
    with pytest.raises(ManifestError, match=r"row 2 .study 's0'"):  # no study would be left
        save_dataset(tmp_path / "set", frame.iloc[:1].assign(boxes=[box(99, 0, 9, 9)]), on_error="exclude", **options)
    with pytest.raises(ManifestError, match=r"column 'boxes'.*'image' is 2"):
        save_dataset(tmp_path / "new", frame.assign(boxes=[box(0, 0, 2, 2, image=2), ""]), **options)
    assert not (tmp_path / "new").exists()


def test_test_sets_with_and_without_the_studies_that_a_rule_names(tmp_path):
    data = prepared(tmp_path, split=["train", "test", "test", "test", "valid", "train"], meta_source=list("AABBAB"))
    assert list(data.exclude("meta_source=A")["study_id"]) == ["s0", "s2", "s3", "s4", "s5"]
    assert {name: list(rows.index) for name, rows in data.test_sets().items()} == {"tiny": [1, 2, 3]}
    sets = data.test_sets(exclude="meta_source=A")
    assert {name: list(rows.index) for name, rows in sets.items()} == {
        "tiny": [1, 2, 3],
        "tiny not meta_source=A": [2, 3],
    }
    for rule, message in {
        "meta_sorce=A": r"no column 'meta_sorce'\. Did you mean 'meta_source'\?",
        "meta_source=C": "names 0 of 3 test studies.*is one of: A, B",
        "split=test": "names 3 of 3 test studies",
    }.items():
        with pytest.raises(ManifestError, match=message):
            data.exclude(rule)
    data.frame["score"] = [1.0, np.nan, 2.0, np.nan, 1.0, np.nan]  # a column with empty cells
    with pytest.raises(ManifestError, match="names 0 of 3 test studies"):
        data.exclude("score=3")
