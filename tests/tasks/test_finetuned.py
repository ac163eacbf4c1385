"""What notebooks 04 to 06 train is kept, comes back with the same scores, and is scored elsewhere without training."""

import warnings

import lightning_file
import numpy as np
import pandas as pd
import pytest
import segmentation_models_pytorch as smp
import torch
from notebook_cells import CellError, run_notebook
from torchvision.models import resnet18

import gloria_core
from gloria_core.checkpoints.image_models import ImageClassifier
from gloria_core.checkpoints.model import VisionLanguageModel
from gloria_core.data.dataset import open_dataset, save_dataset
from gloria_core.data.images import read_gray
from gloria_core.models.detection import RetinaDetector
from gloria_core.models.image_encoder import ImageEncoder
from gloria_core.models.weights import WeightsError
from gloria_core.tasks.finetuned import NETWORKS, FineTuned, Use, as_finetuned, open_model

FEW = {"n_bootstrap": 5}
NOTEBOOKS = {
    "04_finetune_classification": {"fractions": [1.0], "subsets": 1, "finetune_fractions": [1.0], "finetune_epochs": 1},
    "05_segmentation": {"fractions": [1.0], "subsets": 1, "steps": 2, "validate_every": 1, "channels": [8, 8, 8, 8, 8]},
    "06_detection": {"fractions": [1.0], "subsets": 1, "epochs": 0.1, "min_steps": 2, "width": 16},
}


@pytest.fixture(scope="module", autouse=True)
def float32():
    """As of tests/tasks/conftest.py, for the fixtures of this module too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gloria_core.training.precision.cpu_multiplies_bfloat16", bool)
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The manifest of a small phantom, and an untrained checkpoint."""
    folder = tmp_path_factory.mktemp("study")
    given = {"dataset": "phantom", "n_patients": 60, "image_size": 64}
    run_notebook("01_data_preparation", given, folder / "01")
    manifest = str(folder / "01/manifest.csv")
    given = {"manifest": manifest, "objective": "random", "image_encoder": "resnet_tiny", "crop": 56, "epochs": 1}
    run_notebook("02_pretraining", given, folder / "02")
    return manifest, str(folder / "02/checkpoints/best.pt")


@pytest.fixture(scope="module")
def trained(study, tmp_path_factory):
    """Folders of one run of each notebook."""
    folder = tmp_path_factory.mktemp("trained")
    for name, given in NOTEBOOKS.items():
        run_notebook(name, {"manifest": study[0], "checkpoint": study[1], **given, **FEW}, folder / name)
    return {name: folder / name for name in NOTEBOOKS}


def numbers(folder, prefix=""):
    rows = pd.read_csv(folder / "metrics.csv")
    rows = rows[rows["metric"].str.startswith(prefix) & (rows["split"] == "test")]
    rows["metric"] = rows["metric"].str.removeprefix(prefix)
    return rows.set_index(["objective", "target", "metric"])[["value", "ci_low", "ci_high", "n"]].sort_index()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_kept_model_has_the_scores_that_its_run_reported(name, study, trained, tmp_path):
    path = trained[name] / "checkpoints/best.pt"
    run_notebook(name, {"manifest": study[0], "model": str(path), **FEW}, tmp_path)
    first, again = numbers(trained[name]), numbers(tmp_path)
    assert len(again) > 20
    both = first.index.intersection(again.index)
    assert set(again.index) == set(both)
    # a probe's features were computed in other batches, so that probabilities differ in the eighth digit
    pd.testing.assert_frame_equal(first.loc[both], again, rtol=1e-7, atol=1e-12)
    left = {metric for _, _, metric in first.index.difference(again.index)}
    assert all(metric.startswith("finetuned_") for metric in left)
    loaded = gloria_core.load(path, map_location="cpu")
    assert isinstance(loaded, FineTuned)
    assert (loaded.config.run_id, loaded.config.label_fraction, loaded.training) == (trained[name].name, 1.0, False)


def test_the_fine_tuned_classifier_too(study, trained, tmp_path):
    name = "04_finetune_classification"
    path = trained[name] / "checkpoints/finetuned.pt"
    run_notebook(name, {"manifest": study[0], "model": str(path), **FEW}, tmp_path)
    first, again = numbers(trained[name], "finetuned_"), numbers(tmp_path)
    pd.testing.assert_frame_equal(first, again.loc[first.index], rtol=1e-9, atol=1e-12)


def test_predictions_on_files_and_arrays_are_those_of_the_study(study, trained):
    data = open_dataset(study[0])
    frame = data.split("test").head(3)
    files = [data.root / images.split(";")[0] for images in frame["images"]]
    grays = [read_gray(file) for file in files]
    classifier, segmenter, detector = (
        gloria_core.load(folder / "checkpoints/best.pt", map_location="cpu") for folder in trained.values()
    )
    table = classifier.predict(files)
    assert len(table) == 3 * len(classifier.labels) and set(table["image"]) == set(map(str, files))
    chances = classifier.predict(grays)["probability"]
    assert np.array_equal(table["probability"], chances, equal_nan=True) and chances.dropna().between(0, 1).all()
    decided = table.dropna(subset=["probability", "threshold"])
    assert (decided["positive"] == (decided["probability"] >= decided["threshold"])).all() and len(decided)
    assert table.loc[table["threshold"].isna(), "positive"].isna().all()
    masks = segmenter.predict(files)
    for gray, of_image in zip(grays, masks, strict=True):
        assert list(of_image) == list(segmenter.labels)
        assert all(mask.shape == gray.shape and mask.dtype == bool for mask in of_image.values())
    detector.thresholds = dict.fromkeys(detector.labels, 0.0)
    boxes = detector.predict(grays)
    assert set(boxes["label"]) <= set(detector.labels) and len(boxes)
    for number, gray in enumerate(grays):
        own = boxes[boxes["image"] == str(number)]
        assert (own["x"] + own["width"] <= gray.shape[1] + 1e-3).all() and (own[["width", "height"]] >= 0).all(
            axis=None
        )
    detector.thresholds = dict.fromkeys(detector.labels, 1.1)
    assert detector.predict(grays).empty


def test_boxes_come_back_in_the_pixels_of_the_file(monkeypatch):
    """A detector that finds all of the square but the padding finds the whole image."""

    class Everything(RetinaDetector):
        def detect(self, stages):
            boxes = torch.tensor([[16.0, 0.0, 48.0, 64.0]])
            return [{"boxes": boxes, "labels": torch.tensor([0]), "scores": torch.tensor([0.9])} for _ in stages[0]]

    monkeypatch.setitem(NETWORKS, "retinanet", Everything)
    network = Everything(ImageEncoder("resnet_tiny"), classes=1, side=64, width=16)
    made = FineTuned(network, Use(labels=["A"], crop=64, image_size=64))
    (row,) = made.predict([np.zeros((200, 100), np.uint8)]).to_dict("records")
    assert [row[name] for name in ("x", "y", "width", "height")] == pytest.approx([0, 0, 100, 200])


def test_a_test_set_alone_is_enough(study, trained, tmp_path):
    """All studies of the dataset in split test: nothing can be trained, and a model is scored all the same."""
    data = open_dataset(study[0])
    frame = data.frame.assign(split="test").head(40)
    save_dataset(tmp_path / "all_test", frame, name="elsewhere", root=data.root, size=64)
    given = {"manifest": str(tmp_path / "all_test/manifest.csv"), **FEW}
    for name, folder in trained.items():
        with pytest.raises(CellError, match=r"all studies .* are test|no study is in split 'train'"):
            run_notebook(name, {**given, "checkpoint": study[1]}, tmp_path / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = {"model": str(folder / "checkpoints/best.pt"), "labels": ["Edema", "Atelectasis"]}
            run_notebook(name, given | model, tmp_path / name)
        rows = pd.read_csv(tmp_path / name / "metrics.csv")
        assert len(rows) and set(rows["dataset"]) == {"elsewhere"}


# ------------------------------------------------------------------------------------------------ upstream networks


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """Released layouts with seeded weights: a classifier of five findings with an MLP head, and a U-Net."""
    folder = tmp_path_factory.mktemp("upstream")
    torch.manual_seed(0)
    trunk = {n: v for n, v in resnet18().state_dict().items() if not n.startswith("fc.")}
    head = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(512, 8, bias=False), torch.nn.BatchNorm1d(8),
        torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Linear(8, 2),
    )  # fmt: skip
    tensors = {f"backbone.model.{n}": v for n, v in trunk.items()}
    tensors |= {f"linear_layer.block_forward.{n}": v for n, v in head.state_dict().items()}
    lightning_file.write(folder / "mlp.ckpt", tensors, {})
    unet = smp.Unet("resnet18", encoder_weights=None, classes=1)
    lightning_file.write(folder / "unet.ckpt", {f"model.{n}": v for n, v in unet.state_dict().items()}, {})
    return folder


def test_upstream_files_are_scored(study, upstream, tmp_path):
    name, given = "04_finetune_classification", {"manifest": study[0], "model": str(upstream / "mlp.ckpt"), **FEW}
    with pytest.raises(CellError, match="2 outputs without names: give their 2 names"):
        run_notebook(name, given, tmp_path / name)
    with pytest.warns(UserWarning, match=r"mlp\.ckpt expects 224 pixels; the 64 of these images are used whole"):
        run_notebook(name, {**given, "labels": ["Edema", "Atelectasis"]}, tmp_path / name)
    assert {"Edema", "Atelectasis", "macro"} == set(pd.read_csv(tmp_path / name / "metrics.csv")["target"])
    name, given = "05_segmentation", {"manifest": study[0], "model": str(upstream / "unet.ckpt"), **FEW}
    run_notebook(name, {**given, "labels": ["Edema"]}, tmp_path / name)
    assert {"Edema", "macro"} == set(pd.read_csv(tmp_path / name / "metrics.csv")["target"])


def test_what_the_loaders_of_gloria_return_can_be_saved(tmp_path):
    torch.manual_seed(0)
    classifier = ImageClassifier(ImageEncoder("resnet18"), 2).eval()
    unet = smp.Unet("resnet18", encoder_weights=None, classes=1, decoder_channels=(32, 16, 16, 8, 8)).eval()
    pixels = torch.randn(2, 3, 64, 64)
    for model, labels in ((classifier, ["A", "B"]), (unet, ["A"])):
        path = gloria_core.save(tmp_path / "a.pt", model, labels=labels)
        again = gloria_core.load(path, map_location="cpu")
        assert again.labels == tuple(labels) and again.thresholds == dict.fromkeys(labels, 0.5)
        with torch.no_grad():
            torch.testing.assert_close(again(pixels), model(pixels), rtol=1e-3, atol=1e-4)
        assert list(tmp_path.iterdir()) == [path]
    again = gloria_core.load(gloria_core.save(tmp_path / "b.pt", classifier), map_location="cpu")
    assert not again.config.labels and len(again.predict([np.zeros((70, 50), np.uint8)])) == 2


# -------------------------------------------------------------------------------------------------------- errors


def test_what_does_not_fit_is_named(study, trained, upstream, tmp_path, make_model):
    path = trained["04_finetune_classification"] / "checkpoints/best.pt"
    known = gloria_core.load(path, map_location="cpu").labels
    with pytest.raises(ValueError, match=r"label 'Edema': this dataset has none .*Did you mean 'Oedema'"):
        open_model(path, "classification", [*(name for name in known if name != "Edema"), "Oedema"])
    with pytest.raises(ValueError, match=r"label 'Mass': .*best\.pt has none of that name"):
        open_model(path, "classification", [*known, "Mass"], labels=["Mass"])
    some = open_model(path, "classification", ["Edema", "Mass"], labels=["Edema"])
    assert some.labels == ("Edema",) and some.outputs == [known.index("Edema")]
    with pytest.raises(WeightsError, match="is a model for classification, not for segmentation"):
        open_model(path, "segmentation", known)
    with pytest.raises(WeightsError, match="has no classifier, decoder or detector: give a pretrained model as"):
        open_model(study[1], "classification", known)
    with pytest.raises(CellError, match=r"is a fine-tuned model: .*give it as `model`"):
        run_notebook("04_finetune_classification", {"manifest": study[0], "checkpoint": str(path)}, tmp_path / "x")
    tuned = as_finetuned(gloria_core.load(path))
    cache = type("Cache", (), {"size": 128})
    with pytest.raises(ValueError, match="trained on images of 64 pixels and this dataset has 128"):
        tuned.on(type("Data", (), {"cache": cache}))
    assert isinstance(gloria_core.load(study[1]), VisionLanguageModel)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (None, "truncated"),
        ("", "does not exist"),
    ],
)
def test_broken_files_are_named(trained, tmp_path, content, says):
    path = tmp_path / "best.pt"
    if content is None:
        content = (trained["04_finetune_classification"] / "checkpoints/best.pt").read_bytes()[:-2000]
    if content:
        path.write_bytes(content)
    for read in (gloria_core.load, lambda path: open_model(path, "classification", ["A"])):
        with pytest.raises(WeightsError, match=rf"best\.pt.*{says}"):
            read(path)
