"""Configurations are strict, and building a model is deterministic and leaves no trace."""

import dataclasses
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import gloria_core
from gloria_core.checkpoints.model import ConfigError, ModelConfig, build_model, paper_config
from gloria_core.data.tokenizer import train_wordpiece

TINY = {"image_encoder": "resnet_tiny", "text_encoder": "bert_tiny", "last_layers": 2, "image_size": 64, "crop": 64}


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(["small left effusion .", "no edema or consolidation"], vocab_size=64)


def test_configuration_survives_json():
    config = ModelConfig(objective="convirt", objective_options={"temperature": 0.2}, resize_to=299, seed=4)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert ModelConfig.from_dict({}) == ModelConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_encodr": "resnet18"}, "unknown field 'image_encodr'. Did you mean 'image_encoder'"),
        ({"crop": "128"}, "field 'crop': .*valid integer, got '128'"),
        ({"crop": True}, "field 'crop': .*valid integer, got True"),
        ({"frozen_image": 1}, "field 'frozen_image': .*valid boolean, got 1"),
        ({"resize_to": 2.5}, "field 'resize_to': .*valid integer"),
        ({"behavior": "legacy"}, "field 'behavior': .*'published'"),
        ({"objective": "glorai"}, "objective must be one of convirt, .*Did you mean 'gloria'"),
        ({"channels": 2}, "field 'channels': Input should be 1 or 3, got 2"),
        ({"norm": "minmax"}, "field 'norm': Input should be 'half', 'imagenet'"),
        ({"crop": 200}, "crop must be 1 to image_size = 128, got 200"),
        ({"objective_options": {"behavior": "published"}}, "field of its own"),
    ],
)
def test_bad_configurations_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(values)


STUDY = {
    "objective_options": {"temperature": 0.2},
    "behavior": "corrected",
    "image_encoder": "resnet_tiny",
    "region_stage": "",
    "image_weights": "imagenet",
    "text_encoder": "bert_tiny",
    "frozen_text_layers": 0,
    "text_section": "",
    "crop": 56,
    "image_size": 64,
    "seed": 3,
}


def test_a_paper_s_settings_on_a_study():
    convirt = paper_config("convirt", STUDY)
    assert (convirt.objective, convirt.objective_options, convirt.seed) == ("convirt", {"temperature": 0.2}, 3)
    assert (convirt.image_weights, convirt.text_weights, convirt.text_dropout) == ("imagenet", "auto", 0.0)
    prior = paper_config("prior", {**STUDY, "objective_options": {}, "text_encoder": "some/bert"})
    assert (prior.region_stage, prior.text_section, prior.max_tokens, prior.text_dropout) == (
        "layer4",
        "both",
        256,
        0.1,
    )
    chosen = {"region_stage": "layer2", "text_section": "findings", "frozen_text_layers": -1}
    prior = paper_config("prior", STUDY | chosen)
    assert (prior.region_stage, prior.text_section, prior.frozen_text_layers) == ("layer2", "findings", -1)


@pytest.mark.parametrize(("name", "image", "text"), [("random", "random", "random"), ("imagenet", "imagenet", "auto")])
def test_baselines_are_gloria_untrained(name, image, text):
    config = paper_config(name, STUDY)
    assert (config.objective, config.objective_options) == ("gloria", {})
    assert (config.image_weights, config.text_weights) == (image, text)


def test_text_dropout_takes_an_int():
    assert ModelConfig.from_dict({"text_dropout": 0}).text_dropout == 0


def test_seed_alone_decides_and_the_global_state_is_left(tokenizer):
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first = build_model(ModelConfig(**TINY), tokenizer).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(99)
    second = build_model(ModelConfig(**TINY), tokenizer).state_dict()
    other = build_model(ModelConfig(**TINY, seed=1), tokenizer).state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(first["image_encoder.trunk.conv1.weight"], other["image_encoder.trunk.conv1.weight"])


def test_views_are_flattened_study_by_study(tokenizer):
    model = build_model(ModelConfig(**TINY), tokenizer).eval()
    pixels = torch.randn(2, 3, 3, 64, 64)
    with torch.no_grad():
        together, alone = model.encode_images(pixels), model.encode_images(pixels[1])
    assert together.pooled.shape[0] == 6
    torch.testing.assert_close(together.pooled[3:], alone.pooled, rtol=1e-4, atol=1e-5)


def test_options_reach_the_parts(tokenizer):
    config = ModelConfig(
        **TINY,
        objective_options={"temp_loss": 3.0},
        channels=1,
        frozen_image=True,
        frozen_text_layers=-1,
        text_dropout=0.4,
        behavior="published",
        region_stage="layer2",
    )
    model = build_model(config, tokenizer)
    assert model.objective.temp_loss == 3.0
    assert model.objective.behavior == model.text_encoder.behavior == "published"
    assert model.image_encoder.in_channels == 1
    assert model.objective.local_embedder.in_features == 32
    assert model.text_encoder.config.attention_probs_dropout_prob == 0.4
    assert {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"objective"}


def test_unknown_option_of_the_objective(tokenizer):
    with pytest.raises(TypeError, match="has no option 'temp_los'"):
        build_model(ModelConfig(**TINY, objective_options={"temp_los": 1.0}), tokenizer)


def test_tokenizer_and_text_encoder_must_belong_together(tokenizer, tmp_path):
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(vocab_size=10, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="do not belong together"):
        build_model(ModelConfig(**{**TINY, "text_encoder": str(tmp_path)}), tokenizer)
    with pytest.raises(ConfigError, match="takes its vocabulary from a tokenizer"):
        build_model(ModelConfig(**TINY), None)


def test_configuration_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().crop = 3


def test_importing_the_package_is_light():
    """Planning a study imports the package, and must not wait for torch."""
    code = "import sys, gloria_core; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(gloria_core.__file__).parents[1])


def test_entries_of_the_package():
    assert gloria_core.build_model is build_model
    assert "load_pretrained" in dir(gloria_core)
    with pytest.raises(AttributeError, match="lod"):
        gloria_core.lod  # noqa: B018
    declared = tomllib.loads((Path(gloria_core.__file__).parents[1] / "pyproject.toml").read_text())
    assert declared["project"]["version"] == gloria_core.__version__
