"""Fine-tuning learns, stops, keeps its best epoch, and leaves the pretrained model alone."""

import numpy as np
import pandas as pd
import pytest
import torch

from gloria_core.data.images import to_tensor
from gloria_core.models.image_encoder import ImageEncoder
from gloria_core.tasks.classification.finetuning import (
    Classifier,
    FinetuneConfig,
    classification_loss,
    finetune,
    image_crops,
    label_efficiency,
    layer_groups,
    parameter_groups,
    positive_weights,
    predict,
)
from gloria_core.tasks.label_efficiency import LabelEfficiency

FAST = {"batch_size": 4, "precision": "float32", "learning_rate": 3e-3}


class Halves:
    """Stands in for the image cache: image i is bright on the left if i is even, on the right if it is odd."""

    def __getitem__(self, path):
        number = int(path.removeprefix("i"))
        image = np.random.default_rng(number).integers(0, 60, (40, 40), dtype=np.uint8)
        half = slice(0, 20) if number % 2 == 0 else slice(20, 40)
        image[:, half] += 150
        return image


def studies(numbers):
    frame = pd.DataFrame({"study_id": [f"s{n}" for n in numbers], "images": [f"i{n}" for n in numbers], "views": "PA"})
    return frame, pd.DataFrame({"left": [float(n % 2 == 0) for n in numbers]})


@pytest.fixture
def small(model):
    """The shared tiny model, looking at 32 of 40 pixels."""
    changed = type(model.config)(**{**model.config.to_dict(), "image_size": 40, "crop": 32})
    held, model.config = model.config, changed
    yield model
    model.config = held


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("frozen", [False, True])
def test_it_learns_and_leaves_the_pretrained_encoder_alone(small, head, frozen):
    before = {name: value.clone() for name, value in small.state_dict().items()}
    config = FinetuneConfig(epochs=12, head=head, frozen=frozen, hidden_dim=16, patience=12, **FAST)
    tuned = finetune(small, studies(range(32)), studies(range(100, 116)), Halves(), config)
    scores = predict(tuned, studies(range(200, 220))[0], Halves())
    assert list(scores.columns) == ["left"]
    assert (scores["left"][::2].mean() - scores["left"][1::2].mean()) > 0
    if not frozen:
        assert ((scores["left"] > 0) == (np.arange(20) % 2 == 0)).mean() >= 0.9
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())
    moved = [
        not torch.equal(value, before[f"image_encoder.{name.removeprefix('encoder.')}"])
        for name, value in tuned.model.state_dict().items()
        if name.startswith("encoder.") and value.is_floating_point()
    ]
    assert any(moved) != frozen  # a frozen encoder keeps its BatchNorm statistics too


def test_same_seed_same_weights_and_global_randomness_untouched(small):
    config = FinetuneConfig(epochs=2, dropout=0.3, **FAST)
    state = torch.get_rng_state()
    runs = [finetune(small, studies(range(9)), studies(range(50, 54)), Halves(), config) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in runs[0].model.state_dict().items():
        assert torch.equal(value, runs[1].model.state_dict()[name]), name


def test_the_best_epoch_is_kept(small):
    config = FinetuneConfig(epochs=8, patience=2, **{**FAST, "learning_rate": 0.3})  # so high that it gets worse
    valid = studies(range(50, 58))
    tuned = finetune(small, studies(range(16)), valid, Halves(), config)
    assert tuned.best_epoch == tuned.history["valid_loss"].idxmin() + 1
    assert len(tuned.history) <= tuned.best_epoch + 2
    logits = torch.tensor(predict(tuned, valid[0], Halves()).to_numpy())
    loss = classification_loss(logits, torch.tensor(valid[1].to_numpy()), loss="bce")
    assert float(loss) == pytest.approx(tuned.history["valid_loss"].min(), rel=0.05, abs=1e-6)


def test_without_validation_the_last_epoch_is_kept(small):
    train = studies(range(8))
    config = FinetuneConfig(epochs=3, patience=1, **FAST)
    nothing, unknown = studies([]), (studies([50, 51])[0], studies([50, 51])[1] * np.nan)
    for valid in (nothing, unknown):
        tuned = finetune(small, train, valid, Halves(), config)
        assert tuned.best_epoch == 3 and tuned.history["valid_loss"].isna().all()


def test_label_efficiency_is_finetuning_on_each_subset(small):
    frame, targets = studies(range(40))
    split = np.repeat(["train", "valid", "test"], [16, 8, 16])
    frame = frame.assign(patient_id=frame["study_id"], split=split, label_rank=np.arange(40) % 16 / 16)
    config, parts = FinetuneConfig(epochs=1, **FAST), {"all": frame, "few": frame[30:]}
    protocol = LabelEfficiency((0.5, 1.0), subsets=2, macro=["left"], n_bootstrap=10, test_sets=parts)
    rows, tuned = label_efficiency(small, frame, targets, Halves(), config, protocol)
    assert list(tuned) == [(0.5, 0), (0.5, 1), (1.0, 0)] and set(rows["target"]) == {"left", "macro"}
    assert rows.groupby("dataset")["n"].first().to_dict() == {"all": 16, "few": 10}
    valid = frame[16:24], targets[16:24]
    alone = finetune(small, (frame[:16], targets[:16]), valid, Halves(), config)
    for name, value in tuned[1.0, 0].model.state_dict().items():
        assert torch.equal(value, alone.model.state_dict()[name]), name


def test_a_loss_that_is_not_finite_names_the_studies(small):
    config = FinetuneConfig(epochs=2, **{**FAST, "learning_rate": 1e30})
    with pytest.raises(ValueError, match=r"not finite.*studies s\d"):
        finetune(small, studies(range(8)), studies(range(8)), Halves(), config)


def test_random_crops_depend_on_seed_epoch_and_item_only(small):
    paths = ["i0", "i1", "i2"]
    first, both = (image_crops(paths, Halves(), small.config, rows, seed=(1, 0)) for rows in ([2], [0, 2]))
    assert torch.equal(both[1], first[0]) and first.shape == (1, 3, 32, 32)
    drawn = {image_crops(paths, Halves(), small.config, [2], seed=(1, e)).numpy().tobytes() for e in range(6)}
    assert len(drawn) > 3
    image, centre = Halves()["i2"], image_crops(paths, Halves(), small.config, [2])
    expected = to_tensor(image[None, 4:36, 4:36].copy(), channels=3, norm=small.config.norm)
    assert torch.equal(centre, expected)


def test_loss_leaves_out_what_is_not_known():
    logits = torch.tensor([[0.3, -1.0], [2.0, 0.5]])
    targets = torch.tensor([[1.0, float("nan")], [0.0, 1.0]])
    right = [1 / (1 + np.exp(-0.3)), 1 - 1 / (1 + np.exp(-2.0)), 1 / (1 + np.exp(-0.5))]
    by_hand = -np.log(right).mean()
    assert float(classification_loss(logits, targets, loss="bce")) == pytest.approx(by_hand, rel=1e-6)
    assert float(classification_loss(logits, torch.full((2, 2), float("nan")), loss="bce")) == 0.0
    exclusive = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    by_hand = (np.log(np.exp(0.3) + np.exp(-1)) - 0.3 + np.log(np.exp(2) + np.exp(0.5)) - 0.5) / 2
    assert float(classification_loss(logits, exclusive, loss="ce")) == pytest.approx(by_hand, rel=1e-6)
    with pytest.raises(ValueError, match="exactly one positive"):
        classification_loss(logits, torch.ones(2, 2), loss="ce")


def test_positive_weights():
    targets = np.array([[1, 0, 1], [0, 0, np.nan], [0, 0, 1], [0, 0, 1]], dtype=float)
    assert positive_weights(targets).tolist() == [3.0, 1.0, 1.0]
    assert positive_weights(np.array([[1.0]] + [[0.0]] * 50)).tolist() == [20.0]


@pytest.mark.parametrize("name", ["resnet_tiny", "resnet18", "efficientnet_lite0"])
def test_layer_groups_hold_every_parameter_once_and_rates_fall_towards_the_input(name):
    model = Classifier(ImageEncoder(name), 3, FinetuneConfig())
    groups = layer_groups(model.encoder)
    held = [id(parameter) for group in groups for parameter in group]
    assert sorted(held) == sorted(id(parameter) for parameter in model.encoder.parameters())
    rates = parameter_groups(model, learning_rate=1.0, layer_decay=0.5)
    assert [group["lr"] for group in rates] == [0.5**k for k in range(len(groups) + 1)]
    assert rates[-1]["params"][0] is next(model.encoder.trunk.parameters())


def test_bad_settings_are_refused(small):
    for wrong in ({"head": "deep"}, {"loss": "mse"}, {"layer_decay": 0.0}, {"epochs": 0}, {"class_weights": "yes"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FinetuneConfig(**wrong)
    with pytest.raises(ValueError, match="`train` must not be empty"):
        finetune(small, studies([]), studies([1]), Halves(), FinetuneConfig())
    with pytest.raises(ValueError, match="2 studies, 1 rows"):
        finetune(small, (studies([1, 2])[0], studies([1])[1]), studies([1]), Halves(), FinetuneConfig())
