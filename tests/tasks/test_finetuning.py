"""Fine-tuning learns, stops, keeps its best epoch, and leaves the pretrained model alone."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from gloria_core.checkpoints.image_models import ImageClassifier
from gloria_core.data.images import to_tensor
from gloria_core.models.image_encoder import ImageEncoder
from gloria_core.tasks.annotated_images import frontal_images
from gloria_core.tasks.classification.finetuning import (
    FinetuneConfig,
    classification_loss,
    finetune,
    label_efficiency,
    layer_groups,
    parameter_groups,
    positive_weights,
    random_crops,
)
from gloria_core.tasks.label_efficiency import LabelEfficiency

FAST = {"batch_size": 4, "precision": "float32", "learning_rate": 3e-3}


class Halves:
    """Stands in for the image cache: image i is bright on the left if i is even, on the right if it is odd."""

    def rows(self, paths):
        return np.stack([self.image(int(path.removeprefix("i"))) for path in paths])

    def image(self, number):
        image = np.random.default_rng(number).integers(0, 60, (40, 40), dtype=np.uint8)
        half = slice(0, 20) if number % 2 == 0 else slice(20, 40)
        image[:, half] += 150
        return image


def studies(model, train, valid=(), test=()):
    """Images of these numbers, and their targets."""
    numbers = [*train, *valid, *test]
    split = np.repeat(["train", "valid", "test"], [len(train), len(valid), len(test)])
    frame = pd.DataFrame({"study_id": [f"s{n}" for n in numbers], "images": [f"i{n}" for n in numbers], "views": "PA"})
    frame = frame.assign(patient_id=frame["study_id"], split=split)
    targets = pd.DataFrame({"left": [float(n % 2 == 0) for n in numbers]})
    return frontal_images(model, frame, Halves(), ["left"]), targets


def fit(model, data, targets, config):
    return finetune(model, data, targets, data.rows("train"), data.rows("valid"), config)


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
    data, targets = studies(small, range(32), range(100, 116), range(200, 220))
    tuned = fit(small, data, targets, config)
    scores = tuned.scores(data.rows("test"))
    assert list(scores.columns) == ["left"]
    assert (scores["left"].iloc[::2].mean() - scores["left"].iloc[1::2].mean()) > 0
    if not frozen:
        assert ((scores["left"] > 0) == (np.arange(20) % 2 == 0)).mean() >= 0.9
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())
    moved = [
        not torch.equal(value, before[f"image_encoder.{name.removeprefix('img_encoder.')}"])
        for name, value in tuned.network.state_dict().items()
        if name.startswith("img_encoder.") and value.is_floating_point()
    ]
    assert any(moved) != frozen  # a frozen encoder keeps its BatchNorm statistics too


def test_same_seed_same_weights_and_global_randomness_untouched(small):
    config = FinetuneConfig(epochs=2, dropout=0.3, **FAST)
    state = torch.get_rng_state()
    runs = [fit(small, *studies(small, range(9), range(50, 54)), config) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in runs[0].network.state_dict().items():
        assert torch.equal(value, runs[1].network.state_dict()[name]), name


def test_the_best_epoch_is_kept(small):
    config = FinetuneConfig(epochs=8, patience=2, **{**FAST, "learning_rate": 0.3})  # so high that it gets worse
    data, targets = studies(small, range(16), range(50, 58))
    tuned, valid = fit(small, data, targets, config), data.rows("valid")
    assert tuned.best_epoch == tuned.history["valid_loss"].idxmin() + 1
    assert len(tuned.history) <= tuned.best_epoch + 2
    logits = torch.tensor(tuned.scores(valid).to_numpy())
    loss = classification_loss(logits, torch.tensor(targets.loc[valid].to_numpy()))
    assert float(loss) == pytest.approx(tuned.history["valid_loss"].min(), rel=0.05, abs=1e-6)


def test_without_validation_the_last_epoch_is_kept(small):
    config = FinetuneConfig(epochs=3, patience=1, **FAST)
    data, targets = studies(small, range(8), [50, 51])
    for part, known in (studies(small, range(8)), (data, targets.where(np.arange(10)[:, None] < 8))):
        tuned = fit(small, part, known, config)
        assert tuned.best_epoch == 3 and tuned.history["valid_loss"].isna().all()


def test_label_efficiency_is_finetuning_on_each_subset(small):
    data, targets = studies(small, range(16), range(16, 24), range(24, 40))
    frame = data.frame.assign(label_rank=np.arange(40) % 16 / 16)
    data = dataclasses.replace(data, frame=frame)
    config, parts = FinetuneConfig(epochs=1, **FAST), {"all": frame, "few": frame[30:]}
    protocol = LabelEfficiency((0.5, 1.0), subsets=2, macro=["left"], n_bootstrap=10, test_sets=parts)
    rows, tuned = label_efficiency(small, data, targets, config, protocol)
    assert list(tuned) == [(0.5, 0), (0.5, 1), (1.0, 0)] and set(rows["target"]) == {"left", "macro"}
    assert rows.groupby("dataset")["n"].first().to_dict() == {"all": 16, "few": 10}
    alone = fit(small, data, targets, config)
    for name, value in tuned[1.0, 0].network.state_dict().items():
        assert torch.equal(value, alone.network.state_dict()[name]), name


def test_a_loss_that_is_not_finite_names_the_studies(small):
    config = FinetuneConfig(epochs=2, **{**FAST, "learning_rate": 1e30})
    with pytest.raises(ValueError, match=r"not finite.*studies s\d"):
        fit(small, *studies(small, range(8), range(8)), config)


def test_random_crops_depend_on_seed_epoch_and_item_only(small):
    data, _ = studies(small, range(3))
    first, both = (random_crops(data, rows, [(1, 0, row) for row in rows]) for rows in ([2], [0, 2]))
    assert torch.equal(both[1], first[0]) and first.shape == (1, 3, 32, 32)
    drawn = {random_crops(data, [2], [(1, epoch, 2)]).numpy().tobytes() for epoch in range(6)}
    assert len(drawn) > 3
    expected = to_tensor(Halves().image(2)[None, 4:36, 4:36].copy(), channels=3, norm=small.config.norm)
    assert torch.equal(data.pixels([2]), expected)


def test_loss_leaves_out_what_is_not_known():
    logits = torch.tensor([[0.3, -1.0], [2.0, 0.5]])
    targets = torch.tensor([[1.0, float("nan")], [0.0, 1.0]])
    right = [1 / (1 + np.exp(-0.3)), 1 - 1 / (1 + np.exp(-2.0)), 1 / (1 + np.exp(-0.5))]
    by_hand = -np.log(right).mean()
    assert float(classification_loss(logits, targets)) == pytest.approx(by_hand, rel=1e-6)
    assert float(classification_loss(logits, torch.full((2, 2), float("nan")))) == 0.0


def test_positive_weights():
    targets = np.array([[1, 0, 1], [0, 0, np.nan], [0, 0, 1], [0, 0, 1]], dtype=float)
    assert positive_weights(targets).tolist() == [3.0, 1.0, 1.0]
    assert positive_weights(np.array([[1.0]] + [[0.0]] * 50)).tolist() == [20.0]


@pytest.mark.parametrize("name", ["resnet_tiny", "resnet18", "efficientnet_lite0"])
def test_layer_groups_hold_every_parameter_once_and_rates_fall_towards_the_input(name):
    model = ImageClassifier(ImageEncoder(name), 3, frozen=False)
    groups = layer_groups(model.img_encoder)
    held = [id(parameter) for group in groups for parameter in group]
    assert sorted(held) == sorted(id(parameter) for parameter in model.img_encoder.parameters())
    rates = parameter_groups(model, learning_rate=1.0, layer_decay=0.5)
    assert [group["lr"] for group in rates] == [0.5**k for k in range(len(groups) + 1)]
    assert rates[-1]["params"][0] is next(model.img_encoder.trunk.parameters())


def test_bad_settings_are_refused(small):
    for wrong in ({"head": "deep"}, {"layer_decay": 0.0}, {"epochs": 0}, {"class_weights": "yes"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FinetuneConfig(**wrong)
    with pytest.raises(ValueError, match="`train` must not be empty"):
        fit(small, *studies(small, [], [1]), FinetuneConfig())
    with pytest.raises(ValueError, match="2 studies, 1 rows"):
        fit(small, studies(small, [1, 2])[0], studies(small, [1])[1], FinetuneConfig())
