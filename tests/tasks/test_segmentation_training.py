import copy
import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from gloria_core.data.cache import ImageCache
from gloria_core.data.manifest import ManifestError
from gloria_core.tasks.annotated_images import annotation_counts, best_median_worst, choose_annotations
from gloria_core.tasks.label_efficiency import LabelEfficiency
from gloria_core.tasks.segmentation.data import augmented, segmentation_data
from gloria_core.tasks.segmentation.metrics import THRESHOLDS
from gloria_core.tasks.segmentation.training import (
    SegmentationConfig,
    feature_store,
    label_efficiency,
    mean_mask_counts,
    train_segmenter,
)

SQUARE, DOT = "Lung Opacity", "Lung Lesion"
SMALL = {"channels": (16, 16, 8, 8, 8), "precision": "float32"}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """24 images of noise, 64 x 64; half of them with a bright square (left in even studies), three with a dot."""
    root, rng, rows = tmp_path_factory.mktemp("drawn"), np.random.default_rng(0), []
    for study in range(24):
        image, entries = rng.integers(0, 80, (64, 64)).astype(np.uint8), []
        if study % 2 == 0:
            top, left = rng.integers(8, 30), rng.integers(8, 20)
            mask = np.zeros((64, 64), np.uint8)
            mask[top : top + 20, left : left + 20] = 255
            image[mask > 0] = 220
            Image.fromarray(mask).save(root / f"m{study}.png")
            entries.append({"label": SQUARE, "image": 0, "path": f"m{study}.png"})
        if study in (0, 1, 16, 21):
            mask = np.zeros((64, 64), np.uint8)
            mask[40:46, 40:46] = 255
            Image.fromarray(mask).save(root / f"d{study}.png")
            entries.append({"label": DOT, "image": 0, "path": f"d{study}.png"})
        Image.fromarray(image).save(root / f"i{study}.png")
        rows.append(
            {
                "study_id": f"s{study}",
                "patient_id": f"p{study}",
                "split": "train" if study < 12 else "valid" if study < 18 else "test",
                "images": f"i{study}.png",
                "views": "PA",
                "label_rank": (study % 12) / 12,
                SQUARE: float(study % 2 == 0),
                DOT: float(study in (0, 1, 16, 21)),
                "masks": json.dumps(entries) if entries else "",
            }
        )
    frame = pd.DataFrame(rows)
    return root, frame, ImageCache.build(frame, root, size=64, folder=root / "cache", workers=1, progress=False)


@pytest.fixture(scope="module")
def data(drawn, make_model):
    root, frame, cache = drawn
    return segmentation_data(make_model(), frame, cache, root, [SQUARE, DOT])


@pytest.fixture
def encoder(make_model):
    return make_model().image_encoder


def with_masks(frame, study, entries):
    frame = frame.copy()
    frame.loc[frame["study_id"] == study, "masks"] = json.dumps(entries) if entries else ""
    return frame


# --- truth ---------------------------------------------------------------------------------------------------------


def test_truth_is_the_mask_on_the_crop(data, drawn):
    root = drawn[0]
    assert (len(data), data.crop, data.labels) == (24, 56, (SQUARE, DOT))
    for row in (0, 1, 2, 5):
        for column, name in enumerate("md"):
            file = root / f"{name}{row}.png"
            expected = np.zeros((64, 64), bool) if not file.is_file() else np.asarray(Image.open(file)) > 0
            assert (data.truth([row])[0, column] == expected[4:60, 4:60]).all()
            assert data.areas([row])[0, column] == expected[4:60, 4:60].sum()
    assert data.truth([3, 0]).shape == (2, 2, 56, 56)
    assert (data.images([2])[0] == np.asarray(Image.open(root / "i2.png"))[4:60, 4:60]).all()
    assert data.pixels([0, 1]).shape == (2, 3, 56, 56)


def test_masks_of_one_label_are_united_and_other_views_are_no_truth(drawn, make_model):
    root, frame, cache = drawn
    two = [{"label": SQUARE, "image": 0, "path": path} for path in ("m0.png", "d0.png")]
    frame = with_masks(frame, "s0", two)
    found = segmentation_data(make_model(), frame, cache, root, [SQUARE])
    both = (np.asarray(Image.open(root / "m0.png")) > 0) | (np.asarray(Image.open(root / "d0.png")) > 0)
    assert (found.truth([0])[0, 0] == both[4:60, 4:60]).all()
    frame["images"] = "i0.png;" + frame["images"]
    frame["views"] = "LATERAL;PA"
    with pytest.raises(ValueError, match="no study has masks of 'Lung Opacity'"):
        segmentation_data(make_model(), frame, cache, root, [SQUARE])


def test_what_a_study_without_a_mask_is(drawn, make_model):
    root, frame, cache = drawn
    frame = with_masks(frame, "s2", [])  # its label says 1, and nobody drew it
    known = {}
    for unmarked in ("by_label", "empty", "unknown"):
        known[unmarked] = segmentation_data(make_model(), frame, cache, root, [SQUARE], unmarked=unmarked).known[:, 0]
    assert known["empty"].all()
    assert np.flatnonzero(~known["by_label"]).tolist() == [2]
    assert np.flatnonzero(known["unknown"]).tolist() == [row for row in range(0, 24, 2) if row != 2]
    counts = annotation_counts(frame, "masks")
    assert counts.loc[SQUARE].to_dict() == {"train": 5, "valid": 3, "test": 3, "positive without one": 1}
    assert counts.loc[DOT].to_dict() == {"train": 2, "valid": 1, "test": 1, "positive without one": 0}
    with pytest.raises(ValueError, match="unmarked must be one of"):
        segmentation_data(make_model(), frame, cache, root, [SQUARE], unmarked="none")


def test_a_bad_mask_is_named_with_its_row(drawn, make_model, tmp_path):
    root, frame, cache = drawn
    Image.fromarray(np.zeros((32, 64), np.uint8)).save(root / "wide.png")
    (root / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    for path, says in (
        ("none.png", r"row 4, study s2, column 'masks': .*none\.png: no such file"),
        ("broken.png", r"row 4, study s2, column 'masks': .*broken\.png"),
        ("wide.png", r"row 4, study s2, column 'masks': wide\.png has 32 x 64 pixels, its image 64 x 64"),
    ):
        bad = with_masks(frame, "s2", [{"label": SQUARE, "image": 0, "path": path}])
        with pytest.raises(ManifestError, match=says):
            segmentation_data(make_model(), bad, cache, root, [SQUARE])
    with pytest.raises(ValueError, match="masks of 'Edema'; there are masks of: Lung Lesion, Lung Opacity"):
        segmentation_data(make_model(), frame, cache, root, ["Edema"])
    with pytest.raises(ValueError, match="no label is given"):
        segmentation_data(make_model(), frame, cache, root, [])


# --- inputs --------------------------------------------------------------------------------------------------------


def test_the_store_gives_what_the_encoder_gives_and_asks_once(data, encoder):
    config = SegmentationConfig(**SMALL)
    plain = feature_store(copy.deepcopy(encoder), data, SegmentationConfig(**SMALL, memory=0))
    store, asked = feature_store(encoder, data, config), []
    encode = store.encode
    store.encode = lambda rows: asked.append(list(rows)) or encode(rows)
    for rows in ([3, 1, 3], [1, 2], [2, 3, 1]):
        for found, expected in zip(store(rows), plain(rows), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert asked == [[3, 1], [2]]
    assert (len(store), len(plain)) == (3, 0)


def test_augmentation_moves_image_and_mask_together():
    truth = torch.zeros(16, 1, 64, 64)
    truth[:, :, 20:40, 10:50] = 1
    pixels = 2 * truth - 1
    moved, mask = augmented(pixels, truth, np.random.default_rng(0))
    changed = [not torch.equal(a, b) for a, b in zip(mask, truth, strict=True)]
    assert 3 <= sum(changed) <= 13
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert float(((moved > 0) != (mask > 0.5)).float().mean()) < 0.01
    assert float(moved.min()) >= -1 and float(moved[:, :, 0, 0].max()) == -1  # corners from outside are black
    areas = mask.sum(dim=(1, 2, 3)) / truth[0].sum()
    assert float(areas.min()) > 0.8 and float(areas.max()) < 1.24


# --- fitting -------------------------------------------------------------------------------------------------------


def fitted(encoder, data, train=range(12), **options):
    config = SegmentationConfig(
        **SMALL | {"steps": 60, "validate_every": 20, "batch_size": 4, "learning_rate": 5e-3} | options
    )
    return train_segmenter(encoder, data, list(train), data.rows("valid"), config=config)


def test_it_learns_and_keeps_the_best_step(data, encoder):
    state, rng = copy.deepcopy(encoder.state_dict()), torch.get_rng_state()
    found = fitted(encoder, data)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
    assert not encoder.frozen and all(p.requires_grad for p in encoder.parameters())
    best = found.history.loc[found.history["valid_dice"].idxmax()]
    assert found.step == best["step"] and best["valid_dice"] > found.history["valid_dice"].iloc[0]
    test = data.rows("test")
    counts = found.counts(test)
    positives = data.truth(test)[:, 0].any((1, 2))
    assert counts.at(found.thresholds).per_image()[positives, 0, 0].mean() > 0.8
    levels = np.array([THRESHOLDS[k] for k in found.thresholds], np.float32)
    assert (found.masks(test) == (found.probabilities(test).numpy() > levels[:, None, None])).all()
    area = found.masks(test).sum((2, 3))
    assert (counts.at(found.thresholds).predicted[..., 0] == area).all()


def test_same_seed_same_network_and_the_store_changes_nothing(data, encoder):
    short = {"steps": 6, "validate_every": 3}
    a, b = fitted(encoder, data, **short), fitted(encoder, data, **short)
    assert all(torch.equal(x, b.network.state_dict()[name]) for name, x in a.network.state_dict().items())
    other = train_segmenter(encoder, data, range(12), data.rows("valid"), config=a.config, seed=1)
    assert not np.allclose(a.probabilities([0]), other.probabilities([0]))
    without = fitted(encoder, data, **short, memory=0)
    assert without.probabilities([0]) == pytest.approx(a.probabilities([0]), abs=1e-3)


@pytest.mark.parametrize("options", [{"frozen": False}, {"batch_norm": "train"}, {"augment": True}])
def test_other_ways_to_train(data, encoder, options):
    state = copy.deepcopy(encoder.state_dict())
    found = fitted(encoder, data, steps=4, validate_every=4, **options)
    assert found.store is None and np.isfinite(found.history["train_loss"]).all()
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
    moved = {k for k, v in found.network.encoder.state_dict().items() if not torch.equal(v, state[k])}
    weights = {k for k, _ in found.network.encoder.named_parameters()}
    assert bool(moved & weights) == ("frozen" in options)
    assert bool(moved) == ("augment" not in options)
    with pytest.raises(ValueError, match="a feature store needs"):
        train_segmenter(
            encoder,
            data,
            [0],
            [12],
            config=found.config,
            store=feature_store(encoder, data, SegmentationConfig(**SMALL)),
        )


def test_patience_ends_a_training_that_does_not_improve(data, encoder):
    found = fitted(encoder, data, steps=20, validate_every=1, patience=2, learning_rate=0.0, weight_decay=0.0)
    assert found.step < found.history["step"].max() < 20
    assert (found.history["step"] > found.step).sum() == 2


def test_a_class_without_masks_in_the_subset_is_noted_and_left_out_of_the_macro(data, encoder):
    found = fitted(encoder, data, train=[2, 3, 4, 5], steps=2, validate_every=2)
    assert found.notes == ("", "not fitted: no mask in 4 training studies")
    rows = found.score(data.rows("test"), macro=[SQUARE, DOT], n_bootstrap=20)
    rows = rows.set_index(["target", "metric"])
    for metric in ("dice_positives", "dice_all", "dice_pooled", "dice_positives_prior"):
        assert np.isnan(rows.loc[(DOT, metric), "value"])
        assert rows.loc[(DOT, metric), "note"] == "not fitted: no mask in 4 training studies"
        assert rows.loc[("macro", metric), "value"] == rows.loc[(SQUARE, metric), "value"]
        assert rows.loc[("macro", metric), "note"] == "mean over 1 of 2 labels"
    assert rows.loc[(DOT, "dice_all_empty"), "value"] == pytest.approx(5 / 6)


def test_nothing_to_learn_or_to_choose_by_raises(data, encoder):
    config = SegmentationConfig(**SMALL, steps=1)
    with pytest.raises(ValueError, match="no mask in 2 training studies; labels: Lung Opacity, Lung Lesion"):
        train_segmenter(encoder, data, [3, 5], data.rows("valid"), config=config)
    for wrong in ({"loss": "dize"}, {"steps": 0}, {"batch_norm": "frozen"}, {"patience": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SegmentationConfig(**wrong)


# --- the protocol --------------------------------------------------------------------------------------------------


def test_fractions_and_seeds(data, encoder):
    config = SegmentationConfig(**SMALL, steps=2, validate_every=2, batch_size=4)
    state, test = copy.deepcopy(encoder.state_dict()), data.rows("test")
    sets = {"all": data.frame, "part": data.frame.iloc[test[:4]]}
    protocol = LabelEfficiency((0.5, 1.0), subsets=2, macro=[SQUARE], n_bootstrap=10, test_sets=sets)
    rows, found = label_efficiency(encoder, data, protocol, config)
    assert list(found) == [(0.5, 0), (0.5, 1), (1.0, 0)]
    assert [len(found[key].train) for key in found] == [6, 6, 12]
    assert len({id(one.store) for one in found.values()}) == 1 and len(found[0.5, 0].store) > 12
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items()) and not encoder.frozen
    assert not rows.duplicated(["target", "metric", "label_fraction", "seed", "dataset"]).any()
    assert set(rows["target"]) == {SQUARE, DOT, "macro"}
    assert {
        "dice_positives",
        "dice_all",
        "dice_all_empty",
        "dice_pooled",
        "dice_published",
        "dice_pooled_prior",
    } <= set(rows["metric"])
    for name, part in (("all", test), ("part", test[:4])):
        again = found[0.5, 1].score(part, macro=[SQUARE], n_bootstrap=10)
        first = rows[(rows["seed"] == 1) & (rows["metric"] == "dice_all") & (rows["dataset"] == name)]
        assert again[again["metric"] == "dice_all"]["value"].tolist() == pytest.approx(
            first["value"].tolist(), nan_ok=True
        )


def test_a_subset_without_any_mask_has_rows_that_say_so(drawn, make_model, encoder):
    root, frame, cache = drawn
    frame = frame.copy()
    frame.loc[0, "label_rank"], frame.loc[3, "label_rank"] = 0.99, 0.0
    frame["label_rank"] = np.where(frame["study_id"] == "s1", 0.99, frame["label_rank"])
    data = segmentation_data(make_model(), frame, cache, root, [SQUARE, DOT])
    config = SegmentationConfig(**SMALL, steps=1)
    rows, found = label_efficiency(
        encoder, data, LabelEfficiency((0.01, 1.0), macro=data.labels, n_bootstrap=5), config
    )
    assert list(found) == [(1.0, 0)]
    none = rows[rows["label_fraction"] == 0.01].set_index(["target", "metric"])
    full = rows[rows["label_fraction"] == 1.0].set_index(["target", "metric"])
    assert sorted(none.index) == sorted(full.index)
    values = none[~none.index.get_level_values("metric").isin(["dice_all_empty"])]
    assert values["value"].isna().all()
    notes = values.loc[values.index.get_level_values("target") != "macro", "note"]
    assert set(notes) == {"not fitted: no mask in 1 training studies"}
    assert (none["n"] == full["n"]).all()
    for label in data.labels:
        assert none.loc[(label, "dice_all_empty"), "value"] == full.loc[(label, "dice_all_empty"), "value"]


@pytest.mark.parametrize("valid", [[], [13, 15]])
def test_without_a_validation_mask_the_last_step_and_one_half_are_kept(data, encoder, valid):
    said, config = [], SegmentationConfig(**SMALL, steps=4, validate_every=2, batch_size=4)
    found = train_segmenter(encoder, data, [0, 2, 3], valid, config=config, progress=said.append)
    assert found.step == 4 and found.history["valid_dice"].isna().all()
    assert [THRESHOLDS[k] for k in found.thresholds] == [0.5, 0.5]
    assert "the last step is kept, and the threshold is 0.5" in said[0]
    frame = data.frame.assign(split=data.frame["split"].replace("valid", "train"))
    rows = dataclasses.replace(found, data=dataclasses.replace(data, frame=frame)).score(data.rows("test"))
    assert rows.query("target == @SQUARE and metric == 'dice_positives_prior'")["value"].notna().all()


def test_boxes_are_masks_where_there_are_no_masks(drawn, make_model):
    root, frame, cache = drawn
    boxes = {0: [10, 12, 20, 9.5], 3: [50, 60, 30, 30]}
    frame = frame.assign(boxes="", masks="")
    for row, box in boxes.items():
        frame.loc[row, "boxes"] = json.dumps([{"label": SQUARE, "image": 0, "xywh": box}])
    chosen = choose_annotations(frame, ["masks", "boxes"])
    assert (chosen.source, chosen.labels) == ("boxes", [SQUARE])
    found = segmentation_data(make_model(), frame, cache, root, chosen.labels, source=chosen.source)
    expected = np.zeros((2, 64, 64), bool)
    expected[0, 12:22, 10:30] = expected[1, 60:, 50:] = True
    assert (found.truth([0, 3])[:, 0] == expected[:, 4:60, 4:60]).all()
    frame.loc[3, "boxes"] = json.dumps([{"label": SQUARE, "image": 0, "xywh": [70, 0, 5, 5]}])
    with pytest.raises(ValueError, match=r"study s3: box .* lies outside its image"):
        segmentation_data(make_model(), frame, cache, root, [SQUARE], source="boxes")


def test_what_keeps_a_dataset_from_being_used_is_one_sentence(drawn):
    frame = drawn[1].assign(boxes="")
    assert choose_annotations(frame, ["masks", "boxes"]).problem == ""
    assert choose_annotations(frame, ["masks"], preferred=[DOT]).labels == [DOT]
    assert choose_annotations(frame, ["masks"], preferred=["Edema"]).labels == [SQUARE, DOT]
    for change, says in (
        ({"masks": ""}, "no study has masks or boxes; choose a dataset that has"),
        ({"split": "test"}, "no study is in split 'train', so there is nothing to learn from"),
        ({"split": "train"}, "no study is in split 'test', so there is nothing to score"),
        ({"masks": frame["masks"].where(frame["split"] != "train", "")}, "no study in split 'train' has masks of"),
    ):
        assert says in choose_annotations(frame.assign(**change), ["masks", "boxes"]).problem
    with pytest.raises(ValueError, match="source must be one of masks, boxes, not 'points'"):
        choose_annotations(frame, ["points"])
    one = frame.assign(masks=frame["masks"].where(frame["study_id"] != "s21", ""))
    assert "(Lung Opacity)" in choose_annotations(one, ["masks"], [DOT]).problem


def test_a_predicted_mask_goes_back_to_the_pixels_of_the_file(drawn, data):
    root = drawn[0]
    back = data.on_original(2, data.truth([2])[0, 0])
    assert (back == (np.asarray(Image.open(root / "m2.png")) > 0)).all()  # the square lies inside the crop
    whole = data.on_original(2, np.ones((56, 56), bool))
    assert whole[4:60, 4:60].all() and whole.sum() == 56 * 56


def test_the_mean_mask_baseline_by_hand(data):
    train, rows = [0, 2, 4, 5], [6, 7]
    counts = mean_mask_counts(data, train, rows)
    mean = data.truth([0, 2, 4])[:, 0].mean(axis=0)  # study 5 has no square and does not count
    for number, level in enumerate(THRESHOLDS):
        above = mean.astype(np.float32) > np.float32(level)
        assert (counts.predicted[:, 0, number] == above.sum()).all()
        assert counts.overlap[0, 0, number] == (above & data.truth([6])[0, 0]).sum()


@pytest.mark.parametrize(
    ("scores", "each", "expected"),
    [
        ([0.1, 0.9, 0.5], 1, {"best": [1], "median": [2], "worst": [0]}),
        ([0.1, np.nan, 0.9, 0.5, 0.6], 1, {"best": [2], "median": [4], "worst": [0]}),
        ([0.5, 0.5], 1, {"best": [0], "median": [], "worst": [1]}),
        ([0.5], 2, {"best": [0], "median": [], "worst": []}),
        ([np.nan], 1, {"best": [], "median": [], "worst": []}),
        ([9, 8, 7, 6, 5, 4, 3, 2, 1], 2, {"best": [0, 1], "median": [3, 4], "worst": [7, 8]}),
    ],
)
def test_best_median_worst(scores, each, expected):
    assert best_median_worst(scores, each) == expected
