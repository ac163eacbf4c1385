import numpy as np
import pytest

from gloria_core.tasks.detection import metrics as dm
from gloria_core.tasks.detection.metrics import Boxes, box_iou, evaluate, image_ap, match, precision_recall

ONE = [0.0, 0.0, 10.0, 10.0]
FAR = [50.0, 50.0, 60.0, 60.0]
TWO = [20.0, 20.0, 30.0, 30.0]


def _boxes(boxes=(), labels=None, scores=None):
    boxes = np.array(boxes, float).reshape(-1, 4)
    labels = np.zeros(len(boxes), int) if labels is None else np.array(labels, int)
    return Boxes(boxes, labels, None if scores is None else np.array(scores, float))


def _value(table, target="a", metric="map_40_75"):
    rows = table[(table["target"] == target) & (table["metric"] == metric)]
    assert len(rows) == 1
    return rows["value"].iloc[0]


def _row(table, target="a", metric="map_40_75"):
    return table[(table["target"] == target) & (table["metric"] == metric)].iloc[0]


def _random(seed, images=30, classes=3):
    """Truth, and detections that are moved truths and noise; scores all differ."""
    rng, truths, found = np.random.default_rng(seed), [], []
    for _ in range(images):
        corner, sides, n = rng.uniform(0, 60, (4, 2)), rng.uniform(5, 30, (4, 2)), rng.integers(0, 5)
        boxes, labels = np.concatenate([corner, corner + sides], 1)[:n], rng.integers(0, classes, n)
        truths.append(Boxes(boxes, labels))
        moved = np.concatenate([boxes + rng.normal(0, 2, boxes.shape), boxes + rng.normal(0, 5, boxes.shape)])
        noise = np.concatenate([corner, corner + sides[::-1]], 1)[: rng.integers(0, 5)]
        moved = np.concatenate([moved, noise])
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        guesses = np.concatenate([labels, labels, rng.integers(0, classes, len(noise))])
        found.append(Boxes(moved, guesses, rng.uniform(size=len(moved))))
    return truths, found


def _naive_ap(truths, found, label, iou):
    """AP as the definition says it: one loop over detections, one over recalls."""
    taken, hits, total = {}, [], sum((t.labels == label).sum() for t in truths)
    listed = [
        (score, image, box)
        for image, boxes in enumerate(found)
        for score, box, k in zip(boxes.scores, boxes.boxes, boxes.labels, strict=True)
        if k == label
    ]
    for _, image, box in sorted(listed, key=lambda item: -item[0]):
        own = [g for g, k in enumerate(truths[image].labels) if k == label and (image, g) not in taken]
        overlaps = [(box_iou(box[None], truths[image].boxes[g][None])[0, 0], g) for g in own]
        best = max(overlaps, default=(0.0, None))
        hits.append(best[0] >= iou)
        if hits[-1]:
            taken[image, best[1]] = True
    precision, recall = [], []
    for n in range(1, len(hits) + 1):
        precision.append(sum(hits[:n]) / n)
        recall.append(sum(hits[:n]) / total)
    read = [max([p for p, r in zip(precision, recall, strict=True) if r >= level], default=0) for level in dm.RECALLS]
    return np.mean(read)


def test_iou_by_hand():
    a = np.array([[0, 0, 10, 10], [5, 5, 5, 5]])
    b = np.array([[5, 5, 15, 15], [0, 0, 10, 10], [30, 30, 31, 31], [5, 5, 5, 5]])
    np.testing.assert_allclose(box_iou(a, b), [[25 / 175, 1, 0, 0], [0, 0, 0, 0]])
    assert box_iou(np.zeros((0, 4)), b).shape == (0, 4)


def test_perfect_and_empty_and_everywhere_wrong():
    truths = [_boxes([ONE, TWO]), _boxes()]
    perfect = evaluate(truths, [_boxes([TWO, ONE], scores=[0.9, 0.2]), _boxes(scores=[])], ["a"], n_bootstrap=20)
    assert (perfect["value"] == 1).all() and (perfect["n"] == 2).all() and (perfect["n_boxes"] == 2).all()
    nothing = evaluate(truths, [_boxes(scores=[])] * 2, ["a"], n_bootstrap=20)
    assert (nothing["value"] == 0).all() and nothing["note"].str.contains("no interval: 2 of 3 needed patients").all()
    wrong = evaluate(truths, [_boxes([FAR], scores=[0.9]), _boxes([ONE], scores=[1.0])], ["a"], n_bootstrap=0)
    assert (wrong["value"] == 0).all()


def test_ap_of_three_detections_by_hand():
    found = [_boxes([ONE, FAR, TWO], scores=[0.9, 0.8, 0.7])]
    table = evaluate([_boxes([ONE, TWO])], found, ["a"], n_bootstrap=0)
    assert _value(table) == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert _value(table, metric="recall_40_75") == 1


def test_thresholds_are_those_of_the_names():
    # IoU 6/10: true at 0.40 ... 0.60, which is 5 of 8 and 3 of 10 thresholds
    table = evaluate([_boxes([ONE])], [_boxes([[0, 0, 10, 6.0001]], scores=[1.0])], ["a"], n_bootstrap=0)
    assert _value(table) == pytest.approx(5 / 8)
    assert _value(table, metric="map_50_95") == pytest.approx(3 / 10)
    assert _value(table, metric="ap_50") == 1
    assert dm.IOUS[0] == 0.4 and dm.IOUS[7] == 0.75 and dm.IOUS[-1] == 0.95 and len(dm.IOUS) == 12


def test_a_box_is_found_once():
    found = [_boxes([ONE, ONE], scores=[0.9, 0.8])]
    assert match(np.array([ONE]), np.array([ONE, ONE]))[:, 0].all()
    assert not match(np.array([ONE]), np.array([ONE, ONE]))[:, 1].any()
    table = evaluate([_boxes([ONE, TWO])], found, ["a"], n_bootstrap=0)
    assert _value(table) == pytest.approx(51 / 101)


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_naive_definition(seed):
    truths, found = _random(seed)
    table = evaluate(truths, found, ["a", "b", "c"], n_bootstrap=0)
    for k, label in enumerate("abc"):
        each = [_naive_ap(truths, found, k, iou) for iou in dm.IOUS]
        assert _value(table, label) == pytest.approx(np.mean(each[:8]))
        assert _value(table, label, "map_50_95") == pytest.approx(np.mean(each[2:]))
    macro = np.mean([_value(table, label) for label in "abc"])
    assert _value(table, "macro") == pytest.approx(macro)


@pytest.mark.parametrize("seed", range(3))
def test_equals_pycocotools(seed):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed; the naive definition is tested above")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truths, found = _random(seed)

    def entries(boxes, image):
        scores = boxes.scores if boxes.scores is not None else [None] * len(boxes)
        for box, label, score in zip(boxes.boxes, boxes.labels, scores, strict=True):
            x, y, w, h = *box[:2], *(box[2:] - box[:2])
            entry = {"image_id": image, "category_id": int(label), "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            yield entry if score is None else entry | {"score": float(score)}

    truth = COCO()
    listed = [entry for image, boxes in enumerate(truths) for entry in entries(boxes, image)]
    truth.dataset = {
        "images": [{"id": image} for image in range(len(truths))],
        "categories": [{"id": k} for k in range(3)],
        "annotations": [entry | {"id": number} for number, entry in enumerate(listed, start=1)],
    }
    truth.createIndex()
    guesses = truth.loadRes([entry for image, boxes in enumerate(found) for entry in entries(boxes, image)])
    for metric, ious in (("map_40_75", dm.IOUS[:8]), ("map_50_95", dm.IOUS[2:])):
        judge = COCOeval(truth, guesses, "bbox")
        judge.params.iouThrs, judge.params.maxDets = np.array(ious), [100]
        judge.evaluate()
        judge.accumulate()
        theirs = judge.eval["precision"][:, :, :, 0, 0].mean(axis=(0, 1))
        table = evaluate(truths, found, ["a", "b", "c"], n_bootstrap=0)
        np.testing.assert_allclose([_value(table, label, metric) for label in "abc"], theirs, atol=1e-9)
        recall = judge.eval["recall"][:, :, 0, 0].mean(axis=0)
        if metric == "map_40_75":
            np.testing.assert_allclose([_value(table, label, "recall_40_75") for label in "abc"], recall, atol=1e-9)


def test_resampling_is_repeating_images():
    truths, found = _random(5, images=12)
    counts = np.random.default_rng(0).integers(0, 4, 12)
    one = precision_recall(0, truths, found)
    repeated = np.repeat(np.arange(12), counts)
    again = precision_recall(0, [truths[i] for i in repeated], [found[i] for i in repeated])
    np.testing.assert_allclose(one(counts[None].astype(np.float32)), again(np.ones((1, len(repeated)))))


def test_blocks_change_nothing(monkeypatch):
    truths, found = _random(6, images=10)
    whole = evaluate(truths, found, ["a", "b", "c"], n_bootstrap=50)
    monkeypatch.setattr(dm, "_CELLS", 30)
    assert evaluate(truths, found, ["a", "b", "c"], n_bootstrap=50).equals(whole)


def test_intervals_hold_the_value_and_patients_widen_them():
    truths, found = _random(7, images=60)
    truths, found = [t for t in truths for _ in range(4)], [f for f in found for _ in range(4)]
    alone = evaluate(truths, found, ["a", "b", "c"], n_bootstrap=300)
    grouped = evaluate(truths, found, ["a", "b", "c"], groups=np.arange(240) // 4, n_bootstrap=300)
    for table in (alone, grouped):
        assert (table["ci_low"] < table["value"]).all() and (table["value"] < table["ci_high"]).all()
    assert alone["value"].equals(grouped["value"])
    width = [_row(t, "macro")["ci_high"] - _row(t, "macro")["ci_low"] for t in (alone, grouped)]
    assert 1.5 < width[1] / width[0] < 2.7  # four copies of each image: twice as wide


def test_equal_scores_do_not_depend_on_the_order_of_images():
    truths, found = _random(8)
    found = [Boxes(f.boxes, f.labels, np.round(f.scores, 1)) for f in found]
    table = evaluate(truths, found, ["a", "b", "c"], n_bootstrap=0)
    turned = evaluate(truths[::-1], found[::-1], ["a", "b", "c"], n_bootstrap=0)
    np.testing.assert_allclose(table["value"], turned["value"], rtol=1e-12)
    # one operating point: everything at once
    same = [_boxes([ONE], scores=[0.5]), _boxes([ONE], scores=[0.5])]
    table = evaluate([_boxes(), _boxes([ONE])], same, ["a"], n_bootstrap=0)
    assert _value(table) == pytest.approx(0.5)


def test_every_image_is_scored_and_the_published_rule_skips():
    truths = [_boxes([ONE]), _boxes([ONE]), _boxes()]
    found = [
        _boxes([ONE], scores=[0.6]),  # right
        _boxes([ONE], scores=[0.4]),  # right, but below the published confidence: the image is skipped
        _boxes([ONE], scores=[0.9]),  # a false alarm in an image without boxes: skipped
    ]
    ours = _row(evaluate(truths, found, ["a"], n_bootstrap=0))
    # ranks: false, true, true: precision 2/3 at both recalls
    assert ours["value"] == pytest.approx(2 / 3) and ours["n"] == 3
    theirs = evaluate(truths, found, ["a"], published=True, groups=["p", "q", "q"], n_bootstrap=10)
    row = _row(theirs, metric="map_40_75_published")
    assert row["value"] == 1 and row["n"] == 1 and row["n_boxes"] == 1
    assert set(theirs["metric"]) == {name + "_published" for name in dm.METRICS}


def test_undefined_is_nan_with_a_note():
    truths, found = [_boxes([ONE], [0]), _boxes()], [_boxes([ONE], [0], [0.5]), _boxes([ONE], [2], [0.5])]
    table = evaluate(truths, found, ["a", "b", "c"], untrained=["c"], n_bootstrap=30)
    assert _value(table, "a") == 1
    assert np.isnan(_value(table, "b")) and "no box of this class in 2 images" in _row(table, "b")["note"]
    assert _value(table, "macro") == 1 and _row(table, "macro")["note"].startswith("mean over 1 of 3 labels")
    table = evaluate(truths, found, ["a", "b", "c"], untrained=["a"], n_bootstrap=30)
    assert "training subset" in _row(table, "a")["note"] and np.isnan(_row(table, "a")["ci_low"])
    assert np.isnan(_value(table, "macro")) and _row(table, "macro")["note"] == "mean over 0 of 3 labels"
    nothing = evaluate(truths, [_boxes(scores=[])] * 2, ["a", "b", "c"], published=True, n_bootstrap=5)
    assert nothing["value"].isna().all() and (nothing["n"] == 0).all()
    assert nothing["note"].iloc[0] == "no image to score"


def test_macro_is_of_the_named_classes():
    truths, found = _random(9)
    table = evaluate(truths, found, ["a", "b", "c"], macro=["a", "c"], n_bootstrap=0)
    assert _value(table, "macro") == pytest.approx((_value(table, "a") + _value(table, "c")) / 2)
    assert _row(table, "macro")["n_boxes"] == _row(table, "a")["n_boxes"] + _row(table, "c")["n_boxes"]


def test_errors():
    truths, found = [_boxes([ONE])], [_boxes([ONE], scores=[0.5])]
    for change, error, word in (
        ({"detections": []}, ValueError, "shorter"),
        ({"metrics": ["map"]}, KeyError, "'map'"),
        ({"macro": ["b"]}, KeyError, "'b'"),
    ):
        given = {"truths": truths, "detections": found, "labels": ["a"]} | change
        with pytest.raises(error, match=word):
            evaluate(**given)
    with pytest.raises(ValueError, match="x1 <= x2"):
        _boxes([[5, 0, 4, 1]])
    with pytest.raises(ValueError, match="finite"):
        _boxes([[0, 0, np.nan, 1]])
    with pytest.raises(ValueError, match="scores"):
        _boxes([ONE], scores=[0.1, 0.2])


def test_image_ap_is_of_single_images():
    truths, found = _random(10, images=15)
    values = image_ap(truths, found, ["a", "b", "c"])
    for i, value in enumerate(values):
        if not len(truths[i]):
            assert np.isnan(value)
            continue
        alone = evaluate([truths[i]], [found[i]], ["a", "b", "c"], n_bootstrap=0)
        assert value == pytest.approx(_value(alone, "macro"))
