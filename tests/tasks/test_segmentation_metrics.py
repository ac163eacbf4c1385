import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from torchmetrics.segmentation import DiceScore, MeanIoU

from gloria_core.tasks.metrics import resamples
from gloria_core.tasks.segmentation.metrics import (
    PUBLISHED_THRESHOLD,
    THRESHOLDS,
    MaskCounts,
    best_thresholds,
    count,
    published_dice,
    segmentation_rows,
)


def blobs(seed=0, n=6, classes=2, side=16, empty=()):
    """Random probabilities, and truth that is empty for the (image, class) pairs in `empty`."""
    rng = np.random.default_rng(seed)
    truth = rng.random((n, classes, side, side)) < 0.3
    for image, label in empty:
        truth[image, label] = False
    probabilities = np.clip(0.35 * truth + rng.random(truth.shape) * 0.65, 0, 1)
    return torch.from_numpy(probabilities).float(), torch.from_numpy(truth)


def of_masks(predicted, truth, known=None):
    """Counts of predictions that are certain of every pixel."""
    predicted, truth = np.asarray(predicted, float), np.asarray(truth, bool)
    return count(torch.from_numpy(predicted), torch.from_numpy(truth), known)


def dice(predicted, truth):
    total = predicted.sum() + truth.sum()
    return 2 * (predicted & truth).sum() / total if total else 1.0


def iou(predicted, truth):
    union = (predicted | truth).sum()
    return (predicted & truth).sum() / union if union else 1.0


def test_by_hand():
    truth, half, other = np.array([[1, 1], [0, 0]]), np.array([[1, 0], [0, 0]]), np.array([[0, 0], [0, 1]])
    nothing = np.zeros((2, 2))
    for predicted, true, expected in (
        (truth, truth, (1, 1)),
        (half, truth, (2 / 3, 0.5)),
        (other, truth, (0, 0)),
        (nothing, nothing, (1, 1)),
        (half, nothing, (0, 0)),
        (nothing, half, (0, 0)),
    ):
        counts = of_masks(predicted[None, None], true[None, None])
        for name, value in zip(("dice", "iou"), expected, strict=True):
            assert counts.per_image(name)[0, 0] == pytest.approx(value)


def test_counts_are_those_of_a_loop():
    probabilities, truth = blobs(empty=[(0, 0)])
    counts = count(probabilities, truth)
    for number, level in enumerate(THRESHOLDS):
        above = probabilities.numpy() > np.float32(level)
        assert (counts.predicted[..., number] == above.sum((2, 3))).all()
        assert (counts.overlap[..., number] == (above & truth.numpy()).sum((2, 3))).all()
    assert (counts.truth == truth.numpy().sum((2, 3))).all()


def test_a_pixel_at_the_threshold_is_not_predicted():
    counts = count(torch.full((1, 1, 2, 2), 0.5), torch.ones(1, 1, 2, 2, dtype=torch.bool))
    assert counts.predicted[0, 0, PUBLISHED_THRESHOLD] == 0
    assert counts.predicted[0, 0, PUBLISHED_THRESHOLD - 1] == 4


def test_what_is_not_finite_raises():
    with pytest.raises(ValueError, match="NaN or infinite"):
        count(torch.full((1, 1, 2, 2), float("nan")), torch.ones(1, 1, 2, 2, dtype=torch.bool))


def test_per_image_equals_the_functions_of_two_masks():
    probabilities, truth = blobs(empty=[(0, 0), (3, 1)])
    counts = count(probabilities, truth)
    predicted = probabilities.numpy() > 0.5
    for kind, function in (("dice", dice), ("iou", iou)):
        found = counts.per_image(kind)[..., PUBLISHED_THRESHOLD]
        for image in range(len(truth)):
            for label in range(truth.shape[1]):
                expected = function(predicted[image, label], truth[image, label].numpy())
                assert found[image, label] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_equals_segmentation_models_pytorch(seed):
    probabilities, truth = blobs(seed)
    counts = count(probabilities, truth)
    stats = smp.metrics.get_stats(probabilities, truth.long(), mode="multilabel", threshold=0.5)
    reference = smp.metrics.f1_score(*stats, reduction=None).numpy()
    assert counts.per_image()[..., PUBLISHED_THRESHOLD] == pytest.approx(reference, abs=1e-6)
    reference = smp.metrics.iou_score(*stats, reduction=None).numpy()
    assert counts.per_image("iou")[..., PUBLISHED_THRESHOLD] == pytest.approx(reference, abs=1e-6)
    pooled = smp.metrics.f1_score(*(part.sum(dim=0, keepdim=True) for part in stats), reduction=None)[0].numpy()
    assert counts.pooled()[:, PUBLISHED_THRESHOLD] == pytest.approx(pooled, abs=1e-6)


def test_equals_torchmetrics():
    probabilities, truth = blobs(4)
    counts, predicted = count(probabilities, truth), (probabilities > 0.5).long()
    for kind, metric in (
        ("dice", DiceScore(num_classes=2, average="none", input_format="one-hot")),
        ("iou", MeanIoU(num_classes=2, per_class=True, input_format="one-hot")),
    ):
        metric.update(predicted, truth.long())
        found = counts.per_image(kind)[..., PUBLISHED_THRESHOLD].mean(axis=0)
        assert found == pytest.approx(metric.compute().numpy(), abs=1e-6)


def released_get_dice(probabilities, truth):
    """`get_dice` of GLoRIA's and MGCA's released code, for one batch of one class."""
    p, t = probabilities.numpy() > 0.5, truth.numpy() > 0.5
    scores = []
    for image in range(len(p)):
        if t[image].sum() > 0:
            scores.append(2 * (p[image] & t[image]).sum() / (p[image].sum() + t[image].sum()))
        else:
            scores.append(1.0 if p[image].sum() == 0 else 0.0)
    return np.mean(scores)


def test_published_is_the_mean_of_batch_means():
    probabilities, truth = blobs(2, n=7, empty=[(0, 0), (1, 0), (6, 0)])
    probabilities[0] = 0.2  # empty on empty: 1
    batches = [slice(0, 3), slice(3, 6), slice(6, 7)]
    expected = [np.mean([released_get_dice(probabilities[b, k], truth[b, k]) for b in batches]) for k in range(2)]
    found = published_dice(count(probabilities, truth), batch_size=3)
    assert found == pytest.approx(expected, abs=1e-12)
    plain = count(probabilities, truth).per_image()[..., PUBLISHED_THRESHOLD].mean(axis=0)
    assert abs(found[0] - plain[0]) > 1e-3  # the last image weighs as much as three others


def rows_of(counts, labels=("a", "b"), **options):
    options = {"thresholds": [PUBLISHED_THRESHOLD] * len(labels), "n_bootstrap": 200} | options
    return segmentation_rows(counts, labels, **options).set_index(["target", "metric"])


def test_limits_perfect_empty_and_inverted():
    truth = np.zeros((4, 2, 4, 4), bool)
    truth[0, 0, :2], truth[1, 0], truth[0, 1, 0, 0] = True, True, True
    perfect, empty, inverted = (rows_of(of_masks(p, truth)) for p in (truth, 0 * truth, ~truth))
    for metric in ("dice_positives", "iou_positives", "dice_all", "iou_all", "dice_pooled", "dice_published"):
        assert perfect.loc[("a", metric), "value"] == perfect.loc[("b", metric), "value"] == 1
        assert inverted.loc[("a", metric), "value"] == 0
    assert empty.loc[("a", "dice_positives"), "value"] == empty.loc[("a", "dice_pooled"), "value"] == 0
    for rows in (perfect, empty, inverted):  # the baseline does not depend on the prediction
        assert rows.loc[("a", "dice_all_empty"), "value"] == 0.5 and rows.loc[("b", "dice_all_empty"), "value"] == 0.75
    assert empty.loc[("a", "dice_all"), "value"] == 0.5 and empty.loc[("b", "dice_all"), "value"] == 0.75
    assert (perfect.loc[("a", "dice_positives"), "n"], perfect.loc[("a", "dice_all"), "n"]) == (2, 4)


def test_a_label_without_foreground_in_the_test_split_is_nan_and_says_so():
    truth = np.zeros((3, 2, 4, 4), bool)
    truth[0, 0, :2] = True
    rows = rows_of(of_masks(truth, truth), macro=["a", "b"])
    for metric in ("dice_positives", "iou_positives", "dice_pooled"):
        row = rows.loc[("b", metric)]
        assert np.isnan([row["value"], row["ci_low"], row["ci_high"]]).all() and row["note"]
        assert rows.loc[("macro", metric), "value"] == 1
        assert rows.loc[("macro", metric), "note"].startswith("mean over 1 of 2 labels")
    assert rows.loc[("b", "dice_all"), "value"] == rows.loc[("b", "dice_all_empty"), "value"] == 1


def test_no_foreground_anywhere():
    rows = rows_of(of_masks(np.zeros((2, 2, 4, 4)), np.zeros((2, 2, 4, 4))), macro=["a", "b"])
    assert np.isnan(rows.loc[("macro", "dice_positives"), "value"])
    assert rows.loc[("macro", "dice_all"), "value"] == 1 and rows.loc[("macro", "dice_all_empty"), "value"] == 1


def test_unknown_pairs_count_nowhere():
    probabilities, truth = blobs(3, empty=[(5, 0)])
    known = np.ones((6, 2), bool)
    known[[1, 5], 0] = False
    some, kept = count(probabilities, truth, known), [0, 2, 3, 4]
    left = count(probabilities[kept], truth[kept])
    a, b = rows_of(some), rows_of(left)
    for metric in ("dice_positives", "dice_all", "dice_all_empty", "dice_pooled", "iou_all"):
        assert a.loc[("a", metric), "value"] == pytest.approx(b.loc[("a", metric), "value"])
        assert a.loc[("a", metric), "n"] == 4
        assert a.loc[("b", metric), "n"] == 6


def test_a_label_that_was_not_fitted_has_no_value():
    probabilities, truth = blobs(1)
    rows = rows_of(count(probabilities, truth), notes=["", "not fitted: 0 masks"], macro=["a", "b"])
    for metric in ("dice_positives", "dice_all", "dice_pooled", "dice_published"):
        assert np.isnan(rows.loc[("b", metric), "value"]) and rows.loc[("b", metric), "note"].startswith("not fitted")
        assert rows.loc[("macro", metric), "value"] == rows.loc[("a", metric), "value"]
    assert rows.loc[("b", "dice_all_empty"), "value"] == 0  # a baseline needs no fit


def test_thresholds_maximise_the_pooled_dice():
    probabilities, truth = blobs(5, n=4)
    counts = count(probabilities, truth)
    for label, chosen in enumerate(best_thresholds(counts)):
        flat, t = probabilities[:, label].numpy(), truth[:, label].numpy()
        all_of_them = [dice(flat > np.float32(level), t) for level in THRESHOLDS]
        assert all_of_them[chosen] == pytest.approx(max(all_of_them))
        assert counts.pooled()[label, chosen] == pytest.approx(max(all_of_them))


def test_threshold_of_a_tie_and_of_a_class_without_masks_is_one_half():
    truth = np.zeros((2, 2, 4, 4), bool)
    truth[:, 0, :2] = True
    counts = of_masks(truth, truth)  # every threshold is perfect for class 0; class 1 has no mask
    assert best_thresholds(counts).tolist() == [PUBLISHED_THRESHOLD] * 2


def test_thresholds_are_per_class():
    probabilities, truth = blobs(6)
    counts = count(probabilities, truth)
    rows = rows_of(counts, thresholds=[2, 12])
    assert rows.loc[("a", "dice_positives"), "value"] == pytest.approx(counts.per_image()[:, 0, 2].mean())
    assert rows.loc[("b", "dice_positives"), "value"] == pytest.approx(counts.per_image()[:, 1, 12].mean())
    assert rows.loc[("b", "dice_positives"), "threshold"] == THRESHOLDS[12]
    assert rows.loc[("b", "dice_published"), "threshold"] == 0.5


def test_interval_is_the_bootstrap_over_patients():
    probabilities, truth = blobs(7, n=12)
    counts, patients = count(probabilities, truth), [f"p{i // 3}" for i in range(12)]
    row = rows_of(counts, groups=patients, n_bootstrap=60, seed=4).loc[("a", "dice_positives")]
    scores = counts.per_image()[:, 0, PUBLISHED_THRESHOLD]
    weights = np.concatenate(list(resamples(12, groups=patients, n_bootstrap=60, seed=4)))
    drawn = [np.average(scores, weights=w) for w in weights]
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=1e-6)
    alone = rows_of(counts, n_bootstrap=60, seed=4).loc[("a", "dice_positives")]
    assert alone["ci_high"] - alone["ci_low"] != pytest.approx(row["ci_high"] - row["ci_low"])


def test_joined_counts_keep_the_order():
    probabilities, truth = blobs(8)
    whole = count(probabilities, truth)
    parts = MaskCounts.joined([count(probabilities[:2], truth[:2]), count(probabilities[2:], truth[2:])])
    assert (parts.overlap == whole.overlap).all() and (parts.truth == whole.truth).all()
    assert len(parts) == 6
