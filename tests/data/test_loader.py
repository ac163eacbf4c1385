"""Items, batches and their order, on hand-made frames with a cache that is a dictionary."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from gloria_core.data.cache import ImageCache
from gloria_core.data.dataset import Collate, StudyDataset, make_loader, open_dataset, save_dataset
from gloria_core.data.manifest import ManifestError, read_manifest, write_manifest
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


class FakeCache:
    """Every pixel of image k is 10 k + (row + column) % 10, so that image and crop can be told from the pixels."""

    def image(self, path):
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
    assert np.array_equal(item.pixels[0], FakeCache().image("img_5")[2:14, 2:14])  # the frontal, centre crop
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
    with pytest.raises(ReportError, match=r"impression of 2 studies is empty \(study_id s1, s3\); use text='both'"):
        dataset(make_frame(impression=["a b", " ", "a b", "", "a b", "a b", "a b"]))
    with pytest.raises(ReportError, match="s0"):
        dataset(make_frame(impression="", findings=["", *["a b"] * 6]), text="both")
    with pytest.raises(ReportError, match=r"cleaning.*s1"):
        dataset(make_frame(impression=["a b", "Normal.", *["a b"] * 5]), sentence="published")


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
    return [int(view.min()) // 10 for view in item.pixels]


def test_views():
    frame = make_frame(
        3, images=["img_0;img_1;img_2", "img_3", "img_4;img_5"], views=["LATERAL;PA;AP", "PA", "LATERAL"]
    )
    frame.loc[2, "views"] = "LATERAL;LATERAL"
    assert [which(dataset(frame)[i]) for i in range(3)] == [
        [1],
        [3],
        [4],
    ]  # a study without a frontal shows what it has
    assert [which(dataset(frame, views=2)[i]) for i in range(3)] == [[1, 2], [3, 3], [4, 5]]
    assert which(dataset(frame, views=4)[0]) == [1, 2, 0, 1]
    one, two = dataset(frame, augment="crop"), dataset(frame, views=2, augment="crop")
    seen_one, seen_two = set(), set()
    for epoch in range(30):
        one.set_epoch(epoch)
        two.set_epoch(epoch)
        seen_one |= set(which(one[0]))
        seen_two.add(tuple(sorted(which(two[0]))))
        assert which(two[1]) == [3, 3]
    assert seen_one == {1, 2}  # never the lateral
    assert seen_two == {(0, 1), (0, 2), (1, 2)}  # never the same image twice
    crops = [two[1].pixels for two.epoch in range(10)]
    assert any(not np.array_equal(crop[0], crop[1]) for crop in crops)


def test_augmentation():
    plain = FakeCache().image("img_1")
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
        ({"text": "report"}, "text is 'report'"),
        ({"sentence": "first"}, "sentence is 'first'"),
        ({"augment": "flip"}, "augment is 'flip'"),
        ({"views": 0}, "views is 0"),
        ({"labels": ["Edma"]}, r"no label column \['Edma'\]; the manifest has \['Edema', 'Fracture'\]"),
    ],
)
def test_unknown_options(options, message):
    with pytest.raises(ValueError, match=message):
        dataset(**options)


def test_a_crop_larger_than_the_cache():
    with pytest.raises(ValueError, match="crop=20 is larger"):
        StudyDataset(make_frame(), FakeCache(), crop=20)[0]


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


def prepared(tmp_path, **columns):
    frame = make_frame(6, images=[f"img_{i}.png" for i in range(6)], views="PA", **columns)
    for name in frame["images"]:
        Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / name)
    return save_dataset(tmp_path / "set", frame, name="tiny", root=tmp_path, size=SIZE)


def test_what_save_dataset_writes_open_dataset_opens(tmp_path):
    written = prepared(tmp_path)
    opened = open_dataset(tmp_path / "set" / "manifest.csv")
    assert (opened.name, opened.root, opened.size) == ("tiny", tmp_path.resolve(), SIZE)
    assert list(opened.frame["study_id"]) == list(written.frame["study_id"])
    assert opened.cache.image("img_0.png").shape == (SIZE, SIZE)
    with pytest.raises(ManifestError, match="no row in split 'test'"):
        opened.split("test")
    (tmp_path / "set" / "dataset.json").unlink()
    with pytest.raises(ManifestError, match=r"dataset\.json is missing: run notebooks/01"):
        open_dataset(tmp_path / "set" / "manifest.csv")


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
