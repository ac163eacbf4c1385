"""Published GLoRIA files: read without omegaconf or Lightning, whole or not at all, and never as code."""

import os
import pickle
import sys

import lightning_file
import pytest
import torch
from torchvision.models import resnet18
from transformers import BertConfig, BertModel

from gloria_core.checkpoints import native
from gloria_core.checkpoints.native import CheckpointError
from gloria_core.checkpoints.published import load_pretrained, read_state

CONFIG = {
    "model": {
        "gloria": {"local_loss_weight": 0.5, "temp1": 3.0, "temp2": 6.0, "temp3": 9.0},
        "text": {"bert_type": "some/bert", "last_n_layers": 2, "aggregate_method": "mean"},
    },
    "data": {"text": {"word_num": 97}, "image": {"imsize": 64}},
    "transforms": {"norm": "half", "random_crop": {"crop_size": 56}},
    "callbacks": ["a", "b"],
}


@pytest.fixture(scope="module")
def state():
    """A small GLoRIA in the published names: ResNet-18, and a BERT of three layers, 64 wide."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=64, num_hidden_layers=3, num_attention_heads=1, intermediate_size=96)
    parts = {
        "gloria.text_encoder.model.": BertModel(config).state_dict(),
        "gloria.img_encoder.model.": {k: v for k, v in resnet18().state_dict().items() if not k.startswith("fc.")},
    }
    tensors = {prefix + name: value for prefix, part in parts.items() for name, value in part.items()}
    tensors["gloria.text_encoder.model.embeddings.position_ids"] = torch.arange(512)[None]
    tensors["gloria.img_encoder.global_embedder.weight"] = torch.randn(64, 512)
    tensors["gloria.img_encoder.global_embedder.bias"] = torch.randn(64)
    tensors["gloria.img_encoder.local_embedder.weight"] = torch.randn(64, 256, 1, 1)
    return tensors


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
        CheckpointError, match=r"1 missing: image_encoder.trunk.layer4.1.bn2.bias; 1 unexpected: gloria.sur"
    ):
        load_pretrained(path)
    with pytest.warns(UserWarning, match="in part"):
        report = load_pretrained(path, allow_partial=True).load_report
    assert not report.complete
    assert report.unexpected == ("gloria.surprise",)
    assert "(64, 500)" in report.mismatched[0]


def test_what_is_not_a_gloria_is_named(state, tmp_path):
    torch.save({"state_dict": {"backbone.weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="no known layout fits"):
        load_pretrained(tmp_path / "other.ckpt")
    torch.save({"epoch": 1}, tmp_path / "empty.ckpt")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        load_pretrained(tmp_path / "empty.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(CheckpointError, match="holds a list"):
        load_pretrained(tmp_path / "list.ckpt")
    deeper = dict(state)
    for name, value in state.items():
        if "layer1.1." in name:
            deeper[name.replace("layer1.1.", "layer1.2.")] = value
    with pytest.raises(CheckpointError, match=r"\(3, 2, 2, 2\) basic blocks"):
        load_pretrained(lightning_file.write(tmp_path / "deep.ckpt", deeper, CONFIG))
    layers = {"model": {"text": {"last_n_layers": 9}}}
    with pytest.raises(CheckpointError, match="last_layers must be 1 to 4, got 9"):
        load_pretrained(lightning_file.write(tmp_path / "layers.ckpt", state, layers))
    pieces = {"model": {"text": {"agg_tokens": False}}}
    with pytest.raises(CheckpointError, match="agg_tokens: false"):
        load_pretrained(lightning_file.write(tmp_path / "pieces.ckpt", state, pieces))


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_truncated_files(state, tmp_path, kept):
    path = lightning_file.write(tmp_path / "cut.ckpt", state, CONFIG)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(CheckpointError, match=r"cut\.ckpt cannot be read"):
        load_pretrained(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_pretrained(tmp_path / "none.ckpt")


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "template"),
    [
        (os.system, "touch {}"),
        (eval, "open({!r}, 'w').close()"),
        (exec, "open({!r}, 'w').close()"),
        (os.path.join, "{}"),
        (getattr, "{}"),
        (__import__, "{}"),
        (open, "{}"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "bare-pickle"])
def test_code_is_refused_and_not_run(state, tmp_path, function, template, legacy):
    trace, path = tmp_path / "trace", tmp_path / "evil.ckpt"
    arguments = (
        (template.format(str(trace)), "w")
        if function in (open, getattr, os.path.join)
        else (template.format(str(trace)),)
    )
    content = {"state_dict": {}, "hyper_parameters": Calls(function, *arguments)}
    if legacy:
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"evil\.ckpt"):
        read_state(path)
    assert not trace.exists()


def test_code_under_an_innocent_name_is_never_imported(tmp_path, monkeypatch):
    """Names of stubbed libraries become empty classes even where such a library is installed and does harm."""
    trace = tmp_path / "trace"
    (tmp_path / "omegaconf.py").write_text(
        f"class DictConfig:\n    def __init__(self, *a): open({str(trace)!r}, 'w').close()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import omegaconf

    monkeypatch.setattr(sys.modules["omegaconf"], "DictConfig", omegaconf.DictConfig)
    torch.save(
        {"state_dict": {"a": torch.zeros(1)}, "hyper_parameters": Calls(omegaconf.DictConfig, 1)}, tmp_path / "f.pt"
    )
    monkeypatch.delitem(sys.modules, "omegaconf")
    tensors, config = read_state(tmp_path / "f.pt")
    assert list(tensors) == ["a"]
    assert config == {}
    assert not trace.exists()
    assert "omegaconf" not in sys.modules
