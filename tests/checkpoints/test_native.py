"""Our checkpoint files: atomic, complete, readable without running code."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from gloria_core.checkpoints import native
from gloria_core.checkpoints.model import ModelConfig, build_model
from gloria_core.data.tokenizer import tokenize, train_wordpiece
from gloria_core.models.weights import WeightsError

TEXTS = ["small left effusion .", "no edema or consolidation"]


@pytest.fixture(scope="module")
def model():
    tokenizer = train_wordpiece(TEXTS, vocab_size=64)
    config = ModelConfig(image_encoder="resnet_tiny", text_encoder="bert_tiny", last_layers=2, seed=3)
    return build_model(config, tokenizer)


def test_everything_comes_back(model, tmp_path):
    optimizer = torch.optim.AdamW(model.parameters())
    model.encode_texts(tokenize(model.tokenizer, TEXTS)).sentence.sum().backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "epoch": 2, "rng": torch.get_rng_state(), "history": [(1, 0.5)]}
    path = native.save(tmp_path / "deep" / "best.pt", model, training_state=state, extra={"note": "x"})
    again = native.load(path)
    assert not again.training
    assert again.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    ours, theirs = tokenize(model.tokenizer, TEXTS), tokenize(again.tokenizer, TEXTS)
    assert torch.equal(ours.input_ids, theirs.input_ids)
    loaded = native.read(path)["training_state"]
    assert loaded["epoch"] == 2
    assert loaded["history"] == [(1, 0.5)]
    torch.optim.AdamW(again.parameters()).load_state_dict(loaded["optimizer"])
    assert native.read(path)["extra"] == {"note": "x"}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("gpu", "expected"), [(True, "cuda"), (False, "cpu")])
def test_the_model_is_put_on_the_gpu_if_there_is_one(model, tmp_path, monkeypatch, gpu, expected):
    path, devices = native.save(tmp_path / "a.pt", model), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(type(model), "to", lambda self, device: devices.append(device) or self)
    native.load(path)
    native.load(path, map_location="cpu")
    assert devices == [expected, "cpu"]


def test_no_training_state_is_none(model, tmp_path):
    assert native.read(native.save(tmp_path / "a.pt", model))["training_state"] is None


def test_loading_leaves_the_global_random_state(model, tmp_path):
    path = native.save(tmp_path / "a.pt", model)
    before = torch.get_rng_state()
    native.load(path)
    assert torch.equal(before, torch.get_rng_state())


def test_a_failed_save_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = native.save(tmp_path / "a.pt", model, extra={"n": 1})

    def broken(content, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        native.save(path, model, extra={"n": 2})
    monkeypatch.undo()
    assert native.read(path)["extra"] == {"n": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.999])
def test_truncated_file(model, tmp_path, kept):
    path = native.save(tmp_path / "a.pt", model)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(WeightsError, match=r"a\.pt cannot be read, it is truncated"):
        native.load(path)


def test_missing_foreign_and_newer_files(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("nothing.pt", "."):
        with pytest.raises(WeightsError, match=rf"file {tmp_path.resolve()}.* does not exist"):
            native.load(name)
    published = {"state_dict": {"gloria.a": torch.zeros(2)}, "hyper_parameters": Path("x")}
    torch.save(published, tmp_path / "chexpert_resnet50.ckpt")
    (tmp_path / "pytorch_model.bin").write_bytes(safetensors.torch.save({"a": torch.zeros(2)}))
    for name in ("chexpert_resnet50.ckpt", "pytorch_model.bin"):
        with pytest.raises(WeightsError, match="published weights are read by load_pretrained") as error:
            native.load(name)
        assert "weights_only" not in str(error.value)  # PyTorch advises to load the file unsafely
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="not written by gloria_core"):
        native.load(tmp_path / "other.pt")
    content = native.read(native.save(tmp_path / "a.pt", model))
    torch.save({**content, "version": 99}, tmp_path / "newer.pt")
    with pytest.raises(WeightsError, match="format version 99"):
        native.load(tmp_path / "newer.pt")


def test_file_that_does_not_fit_its_configuration(model, tmp_path):
    content = native.read(native.save(tmp_path / "a.pt", model))
    del content["model"]["objective.global_embedder.bias"]
    torch.save(content, tmp_path / "hole.pt")
    with pytest.raises(WeightsError, match=r"1 missing: objective\.global_embedder\.bias"):
        native.load(tmp_path / "hole.pt")
    content["config"]["imge_size"] = 3
    torch.save(content, tmp_path / "field.pt")
    with pytest.raises(WeightsError, match=r"'imge_size'\. Did you mean 'image_size'"):
        native.load(tmp_path / "field.pt")


def test_what_could_not_be_read_back_is_not_written(model, tmp_path):
    with pytest.raises(TypeError, match=r"training_state\['rng'\]\[0\] is a set"):
        native.save(tmp_path / "a.pt", model, training_state={"rng": [{1, 2}]})
    assert not list(tmp_path.iterdir())


def test_model_without_tokenizer(model, tmp_path):
    model.tokenizer, kept = None, model.tokenizer
    try:
        assert native.load(native.save(tmp_path / "a.pt", model)).tokenizer is None
    finally:
        model.tokenizer = kept
