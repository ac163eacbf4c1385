import copy

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from gloria_core.data.cache import ImageCache
from gloria_core.tasks.detection import training as detection
from gloria_core.tasks.detection.data import box_data
from gloria_core.tasks.detection.training import MGCA, DetectionConfig, label_efficiency, train_detector
from gloria_core.tasks.label_efficiency import LabelEfficiency

SHORT = {"width": 16, "epochs": 0.1, "precision": "float32"}
QUICK = DetectionConfig(**SHORT, min_steps=30, batch_size=8, learning_rate=5e-3, validations=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_model):
    """Sixty studies of thirty patients: a bright square (Lung Opacity) in every second image, a bar in some."""
    folder, rng, rows = tmp_path_factory.mktemp("squares"), np.random.default_rng(0), []
    for study in range(60):
        image = rng.integers(0, 60, (64, 64), dtype=np.uint8)
        boxes = []
        if study % 2:
            x, y = rng.integers(2, 34, 2)
            image[y : y + 26, x : x + 26] = 250
            boxes.append({"label": "Lung Opacity", "image": 0, "xywh": [int(x), int(y), 26, 26]})
        if study % 20 == 19:
            image[2:8, 4:60] = 180
            boxes.append({"label": "Edema", "image": 0, "xywh": [4, 2, 56, 6]})
        Image.fromarray(image).save(folder / f"{study}.png")
        split = ["train", "train", "train", "valid", "test"][study // 2 % 5]
        row = {"study_id": f"s{study}", "patient_id": f"p{study // 2}", "split": split, "images": f"{study}.png"}
        row |= {"views": "PA", "label_rank": study // 2 / 30, "Edema": 0.0, "Lung Opacity": float(study % 2)}
        rows.append(row | {"boxes": str(boxes).replace("'", '"') if boxes else "", "masks": ""})
    frame = pd.DataFrame(rows)
    cache = ImageCache.build(frame, folder, size=64, folder=folder / "cache", workers=1, progress=False)
    return box_data(make_model(), frame, cache)


def test_the_protocol_end_to_end(data, model):
    before = copy.deepcopy(model.state_dict())
    test = data.rows("test")
    sets = {"all": data.frame, "part": data.frame.iloc[test[1:]]}
    protocol = LabelEfficiency((0.2, 1.0), subsets=2, n_bootstrap=20, test_sets=sets)
    table, fits = label_efficiency(model, data, protocol, QUICK)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    rows = table[table["dataset"] == "all"]
    assert list(fits) == [(0.2, 0), (0.2, 1), (1.0, 0)] and rows.groupby(["label_fraction", "seed"]).ngroups == 3
    assert table[table["dataset"] == "part"]["n"].max() == 11
    assert set(rows["metric"]) == {"map_40_75", "map_50_95", "ap_50", "recall_40_75", "map_40_75_published"}
    assert (rows.loc[~rows["metric"].str.endswith("published"), "n"] == 12).all()
    first = rows[(rows["label_fraction"] == 0.2) & (rows["seed"] == 0)]
    opacity = first[first["target"] == "Lung Opacity"]
    assert (first["n_train"] == 8).all() and (opacity["train_positives"] == 4).all()
    edema = first[(first["target"] == "Edema") & (first["metric"] == "map_40_75")].iloc[0]
    assert np.isnan(edema["value"]) and "training subset" in edema["note"]
    one, history = fits[0.2, 0], fits[1.0, 0].history
    again = detection.score(data, test, list(one.detections.values()), trained_on=one.train, n_bootstrap=20)
    pd.testing.assert_frame_equal(again, first[again.columns].reset_index(drop=True))
    assert history["step"].tolist() == [15, 30] and history["train_loss"].iloc[1] < history["train_loss"].iloc[0]
    assert [len(fit.detections) for fit in fits.values()] == [12] * 3
    steps, published = detection.published_steps(fits), rows.query("target == 'macro' and metric.str.endswith('ed')")
    np.testing.assert_allclose(steps["and images skipped"], published["value"])
    assert steps["images left"].tolist() == published["n"].tolist()
    guesses = detection.baselines(data, protocol)
    assert set(guesses["objective"]) == {"empty", "centre_prior"} and (guesses["seed"] == 0).all()
    assert [len(group) for group in one.cases(test, each=1).values()] == [1, 1, 1]


def test_squares_are_found_and_beat_the_baselines(data, model):
    options = {"width": 32, "batch_size": 8, "learning_rate": 5e-3, "precision": "float32"}
    config = DetectionConfig(**options, min_steps=120, validations=1)
    trained = train_detector(model, data, data.rows("train"), data.rows("valid"), config)
    test = data.rows("test")

    def reached(boxes):
        rows = detection.score(data, test, boxes, n_bootstrap=0).query("metric == 'ap_50' and target == 'Lung Opacity'")
        return rows["value"].iloc[0]

    prior = reached(detection.centre_prior(data, data.rows("train"), len(test)))
    assert reached(detection.empty(len(test))) == 0
    assert reached(trained.detect(test)) > prior + 0.25


def test_stored_features_give_the_same_detector(data, model):
    store = detection.feature_store(model, data, QUICK)
    rows, valid = data.rows("train"), data.rows("valid")
    kept = train_detector(model, data, rows, valid, QUICK, store=store)
    assert len(store) == len(rows) + len(valid)
    plain = train_detector(model, data, rows, valid, QUICK)
    pd.testing.assert_frame_equal(kept.history, plain.history, rtol=1e-3)
    other = train_detector(model, data, rows, valid, QUICK, store=store).network.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in kept.network.state_dict().items())
    assert not kept.network.training and not plain.network.training
    for options in ({"frozen": False}, {"batch_norm": "train"}):
        assert detection.feature_store(model, data, DetectionConfig(**options)) is None


def test_frozen_trunk_stays_and_a_learning_one_moves(data, model):
    for frozen in (True, False):
        config = DetectionConfig(**SHORT, frozen=frozen, min_steps=2, validations=1)
        detector = train_detector(model, data, data.rows("train"), data.rows("valid"), config).network
        same = [
            torch.equal(v, model.image_encoder.trunk.state_dict()[n]) for n, v in detector.trunk.state_dict().items()
        ]
        assert all(same) == frozen


@pytest.mark.parametrize("name", ["faster_rcnn", "yolov3_mgca"])
def test_other_detectors_run_the_protocol(data, model, name):
    config = DetectionConfig(detector=name, width=16, epochs=0.1, min_steps=2, batch_size=4, validations=1)
    rows, _ = label_efficiency(model, data, LabelEfficiency((1.0,), n_bootstrap=5), config)
    assert rows["value"].dropna().between(0, 1).all() and len(rows) == 15


def test_published_settings(data, model):
    assert (MGCA.detector, MGCA.frozen, MGCA.batch_norm, MGCA.epochs, MGCA.batch_size) == (
        "yolov3_mgca", True, "train", 50, 16,
    )  # fmt: skip
    assert (MGCA.learning_rate, MGCA.weight_decay, MGCA.schedule, MGCA.patience) == (5e-4, 1e-6, "constant", 10)
    detector = detection.build_detector(model, data, MGCA)
    assert detector.score_threshold == 0.5 and detector.batch_norm == "train" and detector.frozen


def test_every_detector_obeys_the_learning_rate():
    given = {"frozen": False, "epochs": 2.0, "min_steps": 3}
    yolo = detection.detector_config("yolov3_mgca", **given, learning_rate=1e-4)
    assert (yolo.learning_rate, yolo.epochs, yolo.frozen, yolo.weight_decay) == (1e-4, 2.0, False, 1e-6)
    assert detection.detector_config("yolov3_mgca", **given).learning_rate == 5e-4
    assert detection.detector_config("faster_rcnn", **given) == DetectionConfig(detector="faster_rcnn", **given)


@pytest.mark.parametrize("valid", [[], [0, 2]])
def test_without_a_validation_box_the_last_weights_are_kept(data, model, valid):
    said, config = [], DetectionConfig(**SHORT, min_steps=4, validations=2)
    trained = train_detector(model, data, data.rows("train"), valid, config, progress=said.append)
    assert trained.history["valid_map"].isna().all() and trained.history["step"].tolist() == [2, 4]
    assert said[0] == "no box in the validation split: the last weights are kept"


def test_the_best_state_is_kept(data, model, monkeypatch):
    said, states = iter([0.1, 0.4, 0.3, 0.2, 0.9]), []

    def validate(trained, rows):
        states.append(copy.deepcopy(trained.network.state_dict()))
        return next(said)

    monkeypatch.setattr(detection.TrainedDetector, "mean_ap", validate)
    config = DetectionConfig(**SHORT, min_steps=10, validations=5, patience=2)
    trained = train_detector(model, data, data.rows("train"), data.rows("valid"), config)
    assert trained.history["valid_map"].tolist() == [0.1, 0.4, 0.3, 0.2]  # two checks without a better one end it
    assert all(torch.equal(value, states[1][name]) for name, value in trained.network.state_dict().items())


def test_centre_prior_is_the_mean_box(data):
    rows = [1, 3, 19]
    (prior,) = detection.centre_prior(data, rows, 1)
    own = np.concatenate([data.truths[i].boxes[data.truths[i].labels == 1] for i in rows])
    np.testing.assert_allclose(prior.boxes[prior.labels == 1], own.mean(0, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(prior.scores, [1 / 3, 1.0])
    assert len(detection.centre_prior(data, [0], 2)[1]) == 0  # no box to take the mean of


def test_errors(data, model, make_model):
    for options, word in (
        ({"detector": "ssd"}, "retinanet"),
        ({"schedule": "step"}, "schedule"),
        ({"validations": 0}, "validations"),
        ({"epochs": 0}, "epochs"),
    ):
        with pytest.raises(ValueError, match=word):
            DetectionConfig(**options)
    with pytest.raises(ValueError, match="no training study"):
        train_detector(model, data, [], [1], QUICK)
    broken = make_model()
    with torch.no_grad():
        broken.image_encoder.trunk.conv1.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"not finite.*s\d"):
        train_detector(broken, data, [1, 3], [1], QUICK)
