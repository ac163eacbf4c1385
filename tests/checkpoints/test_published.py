"""Files of GLoRIA and its fork: read without omegaconf or Lightning, whole or not at all."""

import sys

import lightning_file
import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn
from torchvision.models import resnet18

from gloria_core.checkpoints import native
from gloria_core.checkpoints.image_models import ImageClassifier
from gloria_core.checkpoints.model import ModelConfig, build_model
from gloria_core.checkpoints.published import load_pretrained
from gloria_core.data.tokenizer import train_wordpiece
from gloria_core.models.image_encoder import ImageEncoder
from gloria_core.models.weights import WeightsError

CONFIG = lightning_file.CONFIG


@pytest.fixture(scope="module")
def state():
    return lightning_file.small_gloria()


def test_architecture_and_settings_come_from_the_file(state, tmp_path):
    model = load_pretrained(lightning_file.write(tmp_path / "any_name.ckpt", state, CONFIG))
    assert "omegaconf" not in sys.modules
    assert "pytorch_lightning" not in sys.modules
    config = model.config
    assert (config.image_encoder, config.region_stage, config.behavior) == ("resnet18", "layer3", "published")
    assert (config.image_size, config.crop, config.last_layers, config.text_layers) == (64, 56, 2, "mean")
    assert config.text_encoder == "some/bert"
    assert config.objective_options == {
        "temp_attention": 3.0,
        "temp_similarity": 6.0,
        "temp_loss": 9.0,
        "local_weight": 0.5,
        "global_weight": 1.0,
    }
    assert model.text_encoder.config.vocab_size == 50
    assert not model.training
    assert torch.equal(
        model.objective.local_embedder.weight, state["gloria.img_encoder.local_embedder.weight"][:, :, 0, 0]
    )
    ignored = [name.rpartition("model.")[2] for name in model.load_report.ignored]
    assert sorted(ignored) == ["embeddings.position_ids", "pooler.dense.bias", "pooler.dense.weight"]
    assert len(model.load_report.matched) == len(state) - 3


def test_weights_only_save_and_bare_state_dict(state, tmp_path):
    lean = lightning_file.write(tmp_path / "lean.ckpt", state, CONFIG, weights_only=True)
    assert load_pretrained(lean).config.objective_options["temp_attention"] == 3.0
    torch.save({f"module.{name}": value.half() for name, value in state.items()}, tmp_path / "bare.pt")
    model = load_pretrained(tmp_path / "bare.pt")
    assert model.config.objective_options["temp_attention"] == 4.0
    assert model.config.image_size == 256
    assert model.objective.global_embedder.weight.dtype == torch.float32


def test_a_loaded_model_can_be_kept_as_our_own(state, tmp_path, make_texts):
    model = load_pretrained(lightning_file.write(tmp_path / "a.ckpt", state, CONFIG))
    again = native.load(native.save(tmp_path / "own.pt", model))
    texts, pixels = make_texts([[1, 2], [1]], vocabulary=50), torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        one, two = (m.objective.similarity(m.encode_images(pixels), m.encode_texts(texts)) for m in (model, again))
    assert torch.equal(one, two)


def test_partial_files_are_refused_unless_allowed(state, tmp_path):
    holes = {name: value for name, value in state.items() if not name.endswith("layer4.1.bn2.bias")}
    holes["gloria.surprise"] = torch.zeros(2)
    holes["gloria.img_encoder.global_embedder.weight"] = torch.zeros(64, 500)
    path = lightning_file.write(tmp_path / "holes.ckpt", holes, CONFIG)
    with pytest.raises(
        WeightsError, match=r"1 missing: image_encoder.trunk.layer4.1.bn2.bias; 1 unexpected: gloria.sur"
    ):
        load_pretrained(path)
    with pytest.warns(UserWarning, match="in part"):
        report = load_pretrained(path, allow_partial=True).load_report
    assert not report.complete
    assert report.unexpected == ("gloria.surprise",)
    assert "(64, 500)" in report.mismatched[0]


def test_what_is_not_a_gloria_is_named(state, tmp_path):
    torch.save({"state_dict": {"backbone.weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(WeightsError, match="no known layout fits"):
        load_pretrained(tmp_path / "other.ckpt")
    torch.save({"epoch": 1}, tmp_path / "empty.ckpt")
    with pytest.raises(WeightsError, match="holds no tensors"):
        load_pretrained(tmp_path / "empty.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(WeightsError, match="holds a list"):
        load_pretrained(tmp_path / "list.ckpt")
    deeper = dict(state)
    for name, value in state.items():
        if "layer1.1." in name:
            deeper[name.replace("layer1.1.", "layer1.2.")] = value
    with pytest.raises(WeightsError, match=r"basic blocks of the sizes \(3, 2, 2, 2\)"):
        load_pretrained(lightning_file.write(tmp_path / "deep.ckpt", deeper, CONFIG))
    layers = {"model": {"text": {"last_n_layers": 9}}}
    with pytest.raises(WeightsError, match="last_layers must be one of 1, 2, 3, 4, got 9"):
        load_pretrained(lightning_file.write(tmp_path / "layers.ckpt", state, layers))
    pieces = {"model": {"text": {"agg_tokens": False}}}
    with pytest.raises(WeightsError, match="agg_tokens: false"):
        load_pretrained(lightning_file.write(tmp_path / "pieces.ckpt", state, pieces))


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_truncated_files(state, tmp_path, kept):
    path = lightning_file.write(tmp_path / "cut.ckpt", state, CONFIG)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(WeightsError, match=r"cut\.ckpt cannot be read"):
        load_pretrained(path)
    with pytest.raises(WeightsError, match="does not exist"):
        load_pretrained(tmp_path / "none.ckpt")


# ------------------------------------------------------------------------------------- what else the authors save


def bare(state):
    return {name.removeprefix("gloria."): value for name, value in state.items()}


def extended(path, state):
    """The container of gloria-Extended."""
    content = {
        "epochs": 4,
        "model_state_dict": state,
        "optimizer_state_dict": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []},
        "best_metrics": {"val_loss": 9.9},
        "timestamp": "2025-06-16T10:00:00",
    }
    torch.save(content, path)
    return path


def test_gloria_extended(state, tmp_path):
    model = load_pretrained(extended(tmp_path / "checkpoint_best.pth", bare(state)))
    assert (model.origin, model.behavior) == ("gloria-Extended", "published")
    assert model.config.objective_options["temp_attention"] == 4.0  # nothing is stored: the fork's defaults
    lightning = load_pretrained(lightning_file.write(tmp_path / "a.ckpt", state, CONFIG))
    assert (lightning.origin, lightning.behavior) == ("GLoRIA (Lightning)", "published")
    for name, value in lightning.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def classifier_state(state, *, prefix="model."):
    """GLoRIA's fine-tuned classifier: the whole image encoder, embedders too, and a head."""
    encoder = {f"{prefix}{n}": v for n, v in bare(state).items() if n.startswith("img_encoder.")}
    head = {f"{prefix}classifier.weight": torch.randn(5, 512), f"{prefix}classifier.bias": torch.randn(5)}
    return {**encoder, **head}


def test_classifiers_of_gloria(state, tmp_path):
    tensors = classifier_state(state)
    with_weights = {**tensors, "loss.pos_weight": torch.ones(5)}
    model = load_pretrained(lightning_file.write(tmp_path / "a.ckpt", with_weights, CONFIG))
    assert isinstance(model, ImageClassifier)
    assert not model.training
    assert model.img_encoder.resize_to == 299
    assert sorted(name.rpartition("img_encoder.")[2] for name in model.load_report.ignored) == [
        "global_embedder.bias",
        "global_embedder.weight",
        "local_embedder.weight",
        "loss.pos_weight",
    ]
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = model(pixels)
        features = model.img_encoder(pixels).pooled
    expected = features @ tensors["model.classifier.weight"].T + tensors["model.classifier.bias"]
    torch.testing.assert_close(logits, expected)
    fork = load_pretrained(extended(tmp_path / "b.pth", classifier_state(state, prefix="")))
    assert torch.equal(fork.img_encoder.trunk.conv1.weight, model.img_encoder.trunk.conv1.weight)
    # from ImageNet: the bare network, which does not resize
    plain = {f"model.img_encoder.{n}": v for n, v in resnet18().state_dict().items() if not n.startswith("fc.")}
    head = {"model.classifier.weight": torch.zeros(1, 512), "model.classifier.bias": torch.zeros(1)}
    model = load_pretrained(lightning_file.write(tmp_path / "c.ckpt", {**plain, **head}, CONFIG))
    assert model.img_encoder.resize_to is None
    deep = {**tensors, "model.classifier.0.weight": torch.zeros(4, 512), "model.classifier.2.weight": torch.zeros(5, 4)}
    del deep["model.classifier.weight"]
    with pytest.raises(WeightsError, match="its head is neither linear nor two layers"):
        load_pretrained(lightning_file.write(tmp_path / "d.ckpt", deep, CONFIG))


@pytest.mark.parametrize("hidden", [0, 16])
def test_classifiers_of_mgca(tmp_path, hidden):
    """SSLFineTuner: flatten, dropout and linear; or linear without bias, BatchNorm, ReLU, dropout and linear."""
    torch.manual_seed(0)
    plain = [nn.Linear(512, 3)]
    deep = [nn.Linear(512, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, 3)]
    head = nn.Sequential(nn.Flatten(), nn.Dropout(), *(deep if hidden else plain)).eval()
    tensors = {f"backbone.model.{n}": v for n, v in resnet18().state_dict().items() if not n.startswith("fc.")}
    tensors |= {"backbone.global_embed.head.0.weight": torch.zeros(4, 512)}
    tensors |= {f"linear_layer.block_forward.{n}": v for n, v in head.state_dict().items()}
    model = load_pretrained(lightning_file.write(tmp_path / "a.ckpt", tensors, {}))
    assert model.img_encoder.resize_to == 299
    assert model.load_report.ignored == ("backbone.global_embed.head.0.weight",)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), head(model.img_encoder(pixels).pooled))


def test_classifiers_of_cxr_clip(tmp_path):
    """ResNet and Swin; the settings name a pretraining file that need not exist."""
    tensors = {f"image_encoder.resnet.{n}": v for n, v in resnet18().state_dict().items() if not n.startswith("fc.")}
    tensors |= {"classifier.classification_head.weight": torch.ones(3, 512)}
    tensors |= {"classifier.classification_head.bias": torch.arange(3.0)}
    config = {"model": {"load_backbone_weights": "/gone/r50_m.tar"}}
    torch.save({"model": tensors, "config": config, "epoch": 1, "train_loss": 0.5}, tmp_path / "model-best.tar")
    model = load_pretrained(tmp_path / "model-best.tar")
    assert isinstance(model, ImageClassifier)
    assert model.classifier.bias.tolist() == [0.0, 1.0, 2.0]
    assert model.load_report.complete
    swin = ImageEncoder("swin_tiny")
    tensors = {f"image_encoder.image_encoder.{name}": value for name, value in swin.trunk.state_dict().items()}
    tensors |= {"classifier.classification_head.weight": torch.ones(1, 768)}
    tensors |= {"classifier.classification_head.bias": torch.zeros(1)}
    torch.save({"model": tensors, "config": config}, tmp_path / "swin.tar")
    model = load_pretrained(tmp_path / "swin.tar")
    assert (model.img_encoder.name, model.img_encoder.pooling) == ("swin_tiny", "first_token")


def test_unets(tmp_path):
    torch.manual_seed(0)
    unet = smp.Unet("resnet18", encoder_weights=None, classes=1, in_channels=1).eval()
    lightning = {f"model.{name}": value for name, value in unet.state_dict().items()}
    first = load_pretrained(lightning_file.write(tmp_path / "a.ckpt", lightning, CONFIG))
    second = load_pretrained(extended(tmp_path / "b.pth", unet.state_dict()))
    pixels = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        expected = unet(pixels)
        assert torch.equal(first(pixels), expected)
        assert torch.equal(second(pixels), expected)
    assert not first.training
    assert (first.origin, first.behavior) == ("U-Net (GLoRIA, gloria-Extended)", "published")


def test_our_own_checkpoints(tmp_path):
    texts = ["small left effusion .", "no edema or consolidation"]
    tokenizer = train_wordpiece(texts, vocab_size=64)
    config = ModelConfig(image_encoder="resnet_tiny", text_encoder="bert_tiny", last_layers=2)
    model = build_model(config, tokenizer)
    again = load_pretrained(native.save(tmp_path / "best.pt", model))
    assert (again.origin, again.behavior, again.training) == ("gloria_core checkpoint", "corrected", False)
    assert len(again.load_report.matched) == len(model.state_dict())
    assert again.tokenizer is not None
    with pytest.raises(WeightsError, match="has its tokenizer"):
        load_pretrained(tmp_path / "best.pt", tokenizer)
