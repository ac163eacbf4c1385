"""PRIOR against the numbers of the authors' released code, for seeded weights in the published file layout."""

import json
import re
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from parity_kit import Tolerance, call, golden_params, load, read_json, text_batch
from small_files import published_names
from transformers import BertConfig

from gloria_core.checkpoints import native
from gloria_core.checkpoints.layouts import prior
from gloria_core.checkpoints.model import ModelConfig, assemble
from gloria_core.checkpoints.published import load_pretrained
from gloria_core.models.weights import WeightsError
from gloria_core.objectives.prior import gather_sentences, gumbel
from gloria_core.types import Batch

check = Tolerance(rtol=1e-4, atol=5e-5)  # README of the golden numbers
FIRST_EPOCH = {"stage1": 0, "stage2": 2, "stage3": 5}  # of ten epochs
TERMS = {  # theirs -> ours, and what theirs is already multiplied with
    "global_alignment_loss": ("global", 1),
    "local_image_loss": ("local_image", 1),
    "local_text_loss": ("local_text", 1),
    "proto_loss": ("prototype", 10),
    "rec_image_loss": ("image", 1),
    "spg_loss": ("report", 10),
    "kl_loss": ("consistency", 1),
    "gpa_loss": ("report_global", 1),
}


@pytest.fixture(scope="module", params=golden_params("prior_total"))
def kit(request, tmp_path_factory):
    """Golden numbers, the model loaded from a file of the published layout, and the inputs with their features."""
    golden = json.loads(request.param.read_text())
    how = golden["how"]
    path, state = tmp_path_factory.mktemp("prior") / "total_prior.ckpt", call(how["weights"])
    torch.save(state, path)
    model, places = load(prior, path, state, {})
    assert "bank temperature 0.9" in how["weights"]
    assert model.objective.bank.temperature == 0.9
    pixels, captions, prompts = (call(how[name]) for name in ("images", "captions", "zero_shot"))
    index = sentence_index(captions["attention_mask"])
    texts = replace(text_batch(captions), sentence_ids=torch.from_numpy(np.where(index > 0, index - 1, -1)))
    inputs = {"images": pixels, "input_ids": captions["input_ids"], "sentence_index": index}
    for name, values in {**inputs, "prompt_ids": prompts["input_ids"]}.items():
        assert zlib.crc32(np.ascontiguousarray(values).tobytes()) == golden["checks"][f"{name}_crc32"], name
    kit = SimpleNamespace(golden=golden, model=model, places=places, texts=texts, prompts=text_batch(prompts))
    kit.batch = Batch(torch.from_numpy(pixels)[:, None], texts, torch.zeros(len(pixels), 0), torch.arange(len(pixels)))
    # once, and with their graph: the stored gradients need no more of it than the last layers
    kit.images, kit.features = model.encode_images(kit.batch.pixels), model.encode_texts(texts)
    return kit


def sentence_index(attention_mask):
    """The rule of the golden file: sentence k of row b takes 4 + (b + k - 1) % 5 positions from position 1 on."""
    index = np.full(attention_mask.shape, -1, dtype=np.int64)
    for b, row in enumerate(index):
        position, k, sep = 1, 1, attention_mask[b].sum() - 1
        while position < sep:
            end = min(sep, position + 4 + (b + k - 1) % 5)
            row[position:end] = k
            position, k = end, k + 1
    return index


def enter(kit, stage):
    kit.model.objective.plan(10)
    kit.model.objective.on_epoch(FIRST_EPOCH[stage])


def noise(kit, name):
    """Noise of the named kind; the generator starts anew with every call of this function."""
    if name != "numpy_gumbel":
        return torch.zeros_like
    generator = np.random.default_rng(json.loads(re.search(r"default_rng\((\[.*?\])\)", str(kit.golden["how"]))[1]))
    return lambda logits: torch.from_numpy(generator.gumbel(size=tuple(logits.shape)).astype(np.float32))


@pytest.fixture(autouse=True)
def _as_found(request):
    """Every test leaves the bank and the stage as they were loaded."""
    yield
    if kit := request.node.funcargs.get("kit"):
        kit.model.objective.stage, kit.model.objective.bank.noise = 3, gumbel


def test_every_tensor_found_its_place(kit):
    report, config = kit.model.load_report, kit.model.config
    layout = read_json("prior_total", "layout")
    assert report.complete
    assert len(report.matched) + len(report.ignored) == layout["tensors"]
    for name in report.ignored:
        assert name.endswith("position_ids") or any(name.startswith(n.split("*")[0]) for n in layout["never_used"])
    assert (config.image_encoder, config.channels, config.max_tokens, config.last_layers) == ("resnet50", 1, 256, 1)
    assert config.behavior == "published"
    assert kit.model.origin == "PRIOR"
    assert not kit.model.training


def test_embeddings(kit):
    golden, objective = kit.golden["batch"], kit.model.objective
    enter(kit, "stage1")
    regions = kit.images.regions.permute(0, 3, 1, 2)
    assert list(regions.shape) == golden["layer4"]["shape"]
    check(regions[0, 0, 0], golden["layer4"]["image0_channel0_row0"])
    check.moments(regions, golden["layer4"])
    with torch.no_grad():
        image, text = objective.global_embeddings(kit.images, kit.features)
        local = objective.local_embeddings(kit.images, kit.features)[0].flatten(1, 2)
        tokens = objective.text_head(kit.features.tokens)
    check.vectors(image, golden["image_global"])
    check.vectors(text, golden["text_global_raw_sentences"])
    assert list(local.shape) == golden["image_local"]["shape"]
    for name, values in (("image_local", local), ("text_tokens", tokens)):
        found = torch.stack([values[row, index, :8] for row, index in golden[name]["positions"]])
        check(found, golden[name]["first8"])
    check.moments(local, golden["image_local"])
    normal = [torch.nn.functional.normalize(value, dim=1) for value in (image, text)]
    check(normal[0] @ normal[1].T, golden["cosine_image_text_raw_sentences"])


def test_sentences_attention_and_bank(kit):
    golden, objective = kit.golden["batch"], kit.model.objective
    enter(kit, "stage1")
    with torch.no_grad():
        sentences = gather_sentences(objective.text_head(kit.features.tokens), kit.features.token_sentences)
        padded, regions = sentences.padded(sentences.packed), objective.local_embeddings(kit.images, kit.features)[0]
        cross = objective.cross_attention(regions.flatten(1, 2), padded, sentences.mask)
        attention = objective.attention(kit.images, kit.features)
    counts = sentences.mask.sum(dim=1).tolist()
    assert kit.features.token_mask.sum(dim=1).tolist() == golden["tokens_per_caption"]
    assert counts == golden["sentences_per_caption"]
    assert len(sentences.packed) == golden["sentences"]["total"]
    check(sentences.packed[:3, :8], golden["sentences"]["caption0_first8"])
    check(sentences.packed[: counts[0]].norm(dim=1), golden["sentences"]["l2_caption0"])
    check.moments(sentences.packed, golden["sentences"])
    expected = golden["attention_region_sentence_caption0_sentence1"]
    check(cross.of_region[0, :, 0], expected["region_to_sentence"])
    check(cross.of_sentence[0, 0], expected["sentence_to_region"])
    word = int((kit.features.word_sentence[0] == 0).nonzero()[0])
    check(attention[0, word].flatten(), expected["sentence_to_region"])
    check(cross.told[0, 0, :8], golden["attended"]["text_to_image_row0_first8"])
    check(cross.seen[0, 0, :8], golden["attended"]["image_to_text_row0_first8"])
    objective.bank.noise = torch.zeros_like
    logits = objective.bank.logits(sentences.packed)[0]
    values, index = (logits / objective.bank.temperature).softmax(dim=0).topk(5)
    check(logits[:8], golden["bank_noise_free"]["logits_sentence0_first8"])
    check(values, golden["bank_noise_free"]["weights_sentence0_top5_value"])
    assert index.tolist() == golden["bank_noise_free"]["weights_sentence0_top5_index"]


def check_losses(output, golden, stage):
    known = {name: value for name, value in golden.items() if name in TERMS}
    assert len(output.terms) == len(known)
    for theirs, expected in known.items():
        ours, factor = TERMS[theirs]
        check(factor * output.terms[ours], expected, name=f"{stage} {theirs}")
    check(output.total, golden["loss"], name=f"{stage} total")


@pytest.mark.parametrize("stage", ["stage2", "stage3"])
def test_losses_with_portable_noise(kit, stage):
    golden, bank = kit.golden["batch"]["losses"][stage]["numpy_gumbel"], kit.model.objective.bank
    enter(kit, stage)
    bank.noise = noise(kit, "numpy_gumbel")
    with torch.no_grad():
        check_losses(kit.model.objective(kit.images, kit.features, kit.batch), golden, stage)
        if stage == "stage3":
            kept = gather_sentences(
                kit.model.objective.text_head(kit.features.tokens), kit.features.token_sentences, most=16
            )
            logits = bank.logits(kept.packed)
            weights = ((logits + noise(kit, "numpy_gumbel")(logits)) / bank.temperature).softmax(dim=1)[0]
            assert int(weights.argmax()) == golden["bank_first_call_row0_argmax"]
            check(weights[:4], golden["bank_weights_row0_first4"])


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_losses_and_gradients_without_noise(kit, stage):
    kind = "no_bank" if stage == "stage1" else "noise_free"
    enter(kit, stage)
    kit.model.objective.bank.noise = noise(kit, kind)
    output = kit.model.objective(kit.images, kit.features, kit.batch)
    check_losses(output, kit.golden["batch"]["losses"][stage][kind], stage)
    golden, parameters = kit.golden["batch"]["grad_l2_of_total"][f"{stage}_{kind}"], dict(kit.model.named_parameters())
    gradients = torch.autograd.grad(
        output.total, [parameters[kit.places[name][0]] for name in golden], retain_graph=True
    )
    for (name, expected), gradient in zip(golden.items(), gradients, strict=True):
        check.gradient(gradient, expected, name)


@pytest.mark.parametrize("kind", ["numpy_gumbel_raw_log", "softmax_raw_log", "softmax_exp"])
def test_zero_shot(kit, kind):
    golden, objective = kit.golden["zero_shot"][kind], kit.model.objective
    with torch.no_grad():
        prompts = kit.model.encode_texts(kit.prompts)
        objective.bank.noise = noise(kit, "numpy_gumbel" if kind.startswith("numpy") else "none")
        whole, local = objective.zero_shot_logits(kit.images, prompts)
        objective.bank.noise = noise(kit, "numpy_gumbel" if kind.startswith("numpy") else "none")
        scores = objective.zero_shot_scores(kit.images, prompts)
        if kind.endswith("exp"):
            whole = whole / objective.logit_scale * objective.logit_scale.exp()
            scores = whole.softmax(dim=1) + local.softmax(dim=1) / 2
    check(whole, golden["global_logits"])
    check(local, golden["local_logits"])
    check(scores, golden["scores"])
    best = scores.topk(2, dim=1)
    clear = best.values[:, 0] - best.values[:, 1] > 2e-6  # random weights leave near ties
    assert scores.argmax(dim=1)[clear].tolist() == torch.tensor(golden["prediction"])[clear].tolist()


# ------------------------------------------------------------------------------------------ a small file


@pytest.fixture(scope="module")
def small():
    """A small model of the published architecture, and its tensors under the published names."""
    options = {"embed_dim": 64, "n_prototypes": 5, "n_queries": 3, "decoder_layers": 1}
    config = ModelConfig(
        objective="prior",
        behavior="published",
        objective_options=options,
        image_encoder="resnet18",
        region_stage="layer4",
        last_layers=1,
        channels=1,
    )
    text = BertConfig(vocab_size=40, hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=96)
    model = assemble(config, text, None).eval()
    tensors = published_names(model, "prior")
    for name in ("text_encoder.encoder", "sentence_decoder"):
        tensors[f"{name}.embeddings.position_ids"] = torch.arange(512)[None]
    for name in ("global_text_projection", "text_encoder.encoder.pooler.dense"):
        tensors |= {f"{name}.weight": torch.zeros(64, 64), f"{name}.bias": torch.zeros(64)}
    tensors["sentence_decoder.embeddings.word_embeddings.weight"] = torch.zeros(40, 64)
    return model, tensors


def same(model, other):
    mine, yours = model.state_dict(), other.state_dict()
    return mine.keys() == yours.keys() and all(torch.equal(value, yours[name]) for name, value in mine.items())


def test_published_names_of_the_small_file_are_those_of_the_key_list(small):
    known = read_json("prior_total", "keys")
    assert [name for name in small[1] if name not in known] == []


@pytest.mark.parametrize("variant", ["flat", "lightning", "sequential", "distributed"])
def test_every_variant_of_the_file_is_read(small, tmp_path, variant):
    model, tensors = small
    if variant == "sequential":
        tensors = {re.sub(r"_projection\.", "_projection.0.", name): value for name, value in tensors.items()}
    if variant == "distributed":
        tensors = {f"module.{name}": value for name, value in tensors.items()}
    if variant == "lightning":
        tensors = {"epoch": 3, "pytorch-lightning_version": "1.5.10", "optimizer_states": [], "state_dict": tensors}
    torch.save(tensors, tmp_path / "total_prior.ckpt")
    found = load_pretrained(tmp_path / "total_prior.ckpt")
    assert same(found, model)
    assert found.config.objective_options == model.config.objective_options
    assert len(found.load_report.ignored) == 7


def test_a_lacking_or_foreign_tensor_is_named(small, tmp_path):
    path, tensors = tmp_path / "total_prior.ckpt", dict(small[1])
    lacking = tensors.pop("local_cross_attention.key1.weight")
    torch.save(tensors, path)
    with pytest.raises(WeightsError, match=r"missing: objective\.cross_attention\.key1\.weight"):
        load_pretrained(path)
    torch.save({**tensors, "local_cross_attention.key1.weight": lacking, "extra.weight": lacking}, path)
    with pytest.raises(WeightsError, match=r"unexpected: extra\.weight"):
        load_pretrained(path)
    torch.save({name: value for name, value in tensors.items() if name != "prototype_queries"}, path)
    with pytest.raises(WeightsError, match=r"looks like PRIOR, but has no tensor .*queries"):
        load_pretrained(path)


def test_a_loaded_model_survives_our_own_format(small, tmp_path):
    torch.save(small[1], tmp_path / "total_prior.ckpt")
    model = load_pretrained(tmp_path / "total_prior.ckpt")
    assert same(native.load(native.save(tmp_path / "own.pt", model)), model)
