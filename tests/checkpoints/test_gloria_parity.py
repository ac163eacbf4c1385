"""GLoRIA against the numbers of the authors' released code, for seeded weights in the published file layout."""

import json
from types import SimpleNamespace

import lightning_file
import pytest
import seeded
import torch
from parity_kit import Tolerance, call, golden_params, gradient, load, numbers_in, read_json, text_batch
from torch.nn import functional as F

from gloria_core.checkpoints.layouts import gloria
from gloria_core.data.reports import clean_report
from gloria_core.data.tokenizer import load_tokenizer, tokenize
from gloria_core.gloria_api.model import GLoRIAModel
from gloria_core.models.word_region import word_region_similarity
from gloria_core.types import ImageFeatures, TextFeatures

CASES = ("mixed", "short", "full", "unknown")


@pytest.fixture(scope="module", params=golden_params("gloria"))
def kit(request, tmp_path_factory):
    """Golden numbers, the model loaded from a file of the published layout, and the images."""
    golden, stored = json.loads(request.param.read_text()), read_json("gloria", "layout")["config"]["value"]
    folder = tmp_path_factory.mktemp("gloria")
    state = call(golden["weights"])
    path = lightning_file.write(folder / "chexpert_resnet50.ckpt", state, stored)
    (folder / "vocab.txt").write_text("\n".join(seeded.vocabulary()) + "\n")
    model, places = load(gloria, path, state, stored, tokenizer=load_tokenizer(folder / "vocab.txt"))
    pixels = torch.from_numpy(call(golden["inputs"]["images"]))
    with torch.no_grad():
        images = model.encode_images(pixels)
    return SimpleNamespace(
        golden=golden, model=model, places=places, pixels=pixels, images=images, check=Tolerance(golden)
    )


def captions_of(kit, case):
    arrays = call(kit.golden["inputs"]["captions"][case])
    if case == "unknown":
        for row, column in kit.golden["inputs"]["unknown_case"]["set_id_100_at_row_column"]:
            arrays["input_ids"][row, column] = seeded.UNK
    return text_batch(arrays)


def test_every_tensor_found_its_place(kit):
    report = kit.model.load_report
    assert report.complete
    assert len(report.matched) + len(report.ignored) == len(read_json("gloria", "keys"))
    assert kit.model.config.image_encoder == "resnet50"
    assert not kit.model.training
    options, settings = kit.model.config.objective_options, kit.golden["settings"]
    assert options["temp_attention"] == settings["temperature_attention"]
    assert options["temp_loss"] == settings["temperature_loss"]
    assert kit.model.config.resize_to == settings["resize_in_model"]


def test_image_embeddings(kit):
    golden = kit.golden["image"]
    with torch.no_grad():
        regions = kit.model.objective.local_embedder(kit.images.regions)
        kit.check.vectors(kit.images.pooled, golden["pooled_2048"])
        kit.check.vectors(kit.model.objective.global_embedder(kit.images.pooled), golden["global"])
    assert list(regions.permute(0, 3, 1, 2).shape) == golden["local"]["shape"]
    for name, expected in golden["local"]["at"].items():
        image, row, column = numbers_in(name)
        kit.check(regions[image, row, column, :8], expected)
    kit.check.moments(regions, golden["local"])


@pytest.mark.parametrize("case", CASES)
def test_text_embeddings(kit, case):
    golden, texts = kit.golden["cases"][case], captions_of(kit, case)
    with torch.no_grad():
        features = kit.model.encode_texts(texts)
    assert texts.attention_mask.sum(dim=1).tolist() == golden["pieces"]
    assert (features.word_mask & ~features.special_mask).sum(dim=1).tolist() == golden["word_count"]
    window = kit.model.objective.local_embeddings(kit.images, features)[2]
    assert window.sum(dim=1).tolist() == golden["training_window"]
    for words, first in zip(texts.words, golden["first_words"], strict=True):
        assert [*words, *["[PAD]"] * 6][:6] == first
    kit.check.vectors(features.sentence, golden["text_global"])
    wide = torch.nn.functional.pad(features.words, (0, 0, 0, 97 - features.words.shape[1]))
    assert list(wide.transpose(1, 2).shape) == golden["text_local"]["shape"]
    for name, expected in golden["text_local"]["at"].items():
        row = int(name.removeprefix("caption")[0])
        column = {"cls": 0, "word1": 1}.get(name.split("_")[1]) if "sep" not in name else int(name.split("column")[1])
        kit.check(wide[row, column, :8], expected)
    kit.check.moments(wide, golden["text_local"])


@pytest.mark.parametrize("case", CASES)
def test_losses_logits_attention_and_gradients(kit, case):
    golden, model = kit.golden["cases"][case], kit.model
    texts, gradients = captions_of(kit, case), golden.get("gradient_l2", {})
    model.zero_grad()
    with torch.set_grad_enabled(bool(gradients)):
        images = model.encode_images(kit.pixels) if gradients else kit.images
        output = model.objective(images, model.encode_texts(texts))
    if gradients:
        output.total.backward()
    names = ("local_image_to_text", "local_text_to_image", "global_image_to_text", "global_text_to_image")
    for name, theirs in zip(names, ("local_0", "local_1", "global_0", "global_1"), strict=True):
        kit.check(output.terms[name], golden["loss"][theirs])
    kit.check(output.total, golden["loss"]["total"])
    kit.check(output.attention[0, 2].flatten(), golden["attention_caption0_word2"], "attention_caption0_word2")
    for name, expected in gradients.items():
        kit.check.gradient(gradient(model, kit.places, name), expected, name)
    model.zero_grad()


@pytest.mark.parametrize("case", CASES)
def test_logits_of_training_and_similarities_of_inference(kit, case):
    golden, objective = kit.golden["cases"][case], kit.model.objective
    with torch.no_grad():
        features = kit.model.encode_texts(captions_of(kit, case))
        local = word_region_similarity(
            *objective.local_embeddings(kit.images, features),
            temp_attention=4.0,
            temp_similarity=5.0,
            aggregation="sum",
        )
        whole = objective.global_similarity(kit.images, features)
        kit.check(objective.temp_loss * local, golden["local_logits"])
        kit.check(objective.temp_loss * whole, golden["global_logits"])
        kit.check(whole, golden["global_cosine"], "global_cosine")
        window = golden["similarity_window_words"]
        kit.check(objective.local_similarity(kit.images, features), window["local"])
        kit.check(objective.similarity(kit.images, features), window["both"])
        long = golden["similarity_window_with_sep_and_padding"]
        local = local_in_window(kit, features, long["cap_lens"])
        kit.check(local, long["local"])
        kit.check((local + whole) / 2, long["both"])


def z_scores(scores: list[torch.Tensor]) -> torch.Tensor:
    """Best prompt of each class, then z-score of each class over the images, with the population's deviation."""
    best = torch.stack([score.amax(dim=1) for score in scores], dim=1)
    return (best - best.mean(dim=0)) / best.std(dim=0, correction=0)


def local_in_window(kit, features: TextFeatures, cap_lens: list[int]) -> torch.Tensor:
    """As the released inference has it: words zero-padded to 97 columns, of which the first `cap_lens` count."""
    regions = kit.model.objective.local_embedder(kit.images.regions).permute(0, 3, 1, 2)
    words = F.pad(features.words, (0, 0, 0, 97 - features.words.shape[1])).transpose(1, 2)
    return GLoRIAModel(kit.model).get_local_similarities(regions, words, cap_lens)


def similarity_in_window(kit, features: TextFeatures, window: list[int]) -> torch.Tensor:
    return (local_in_window(kit, features, window) + kit.model.objective.global_similarity(kit.images, features)) / 2


def test_zero_shot_from_ids(kit):
    golden, scores = kit.golden["zero_shot_ids"], []
    for name in golden["columns"]:
        arrays = call(kit.golden["inputs"]["zero_shot_ids"][name])
        with torch.no_grad():
            scores.append(kit.model.objective.similarity(kit.images, kit.model.encode_texts(text_batch(arrays))))
        kit.check(scores[-1], golden["both"][name])
    kit.check(z_scores(scores), golden["values"], "zero_shot values (z-scores)")


def test_zero_shot_from_text(kit):
    golden, scores = kit.golden["zero_shot_text"], []
    for name in golden["columns"]:
        prompts = [clean_report(prompt) for prompt in golden["prompts"][name]]
        texts = tokenize(kit.model.tokenizer, prompts, max_tokens=97)
        for row, ids in zip(texts.input_ids.tolist(), golden["ids"][name], strict=True):
            assert [value for value in row if value != seeded.PAD] == ids
        with torch.no_grad():
            scores.append(similarity_in_window(kit, kit.model.encode_texts(texts), golden["cap_lens"][name]))
        kit.check(scores[-1], golden["both"][name])
    kit.check(z_scores(scores), golden["values"], "zero_shot values (z-scores)")


def test_image_train_mode_bn(kit):
    """The released loader leaves BatchNorm in training mode; asked for by hand it gives the same numbers."""
    golden, encoder = kit.golden["image_train_mode_bn"], kit.model.image_encoder
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder.train()
    try:
        with torch.no_grad():
            images: ImageFeatures = encoder(kit.pixels)
            kit.check.vectors(kit.model.objective.global_embedder(images.pooled), golden["global"])
        kit.check(encoder.trunk.bn1.running_mean[:8], golden["running_mean_bn1_after_first8"])
    finally:
        encoder.load_state_dict(before)
        encoder.eval()
