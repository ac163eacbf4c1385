"""GLoRIA against the numbers of the authors' released code, for seeded weights in the published file layout."""

import ast
import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace

import lightning_file
import numpy as np
import pytest
import torch

from gloria_core.checkpoints.published import load_pretrained
from gloria_core.data.reports import clean_report
from gloria_core.data.tokenizer import load_tokenizer, text_batch_from_ids, tokenize
from gloria_core.models.word_region import word_region_similarity
from gloria_core.types import ImageFeatures, TextFeatures

FOLDER = Path(os.environ.get("PARITY_DIR", Path(__file__).parents[3] / "shared" / "parity"))
GOLDEN = sorted((FOLDER / "gloria").glob("golden_seed*.json"))
CASES = ("mixed", "short", "full", "unknown")
TITLES = {
    "gloria.text_encoder.model.": "text_encoder.bert.",
    "gloria.img_encoder.model.": "image_encoder.trunk.",
    "gloria.img_encoder.": "objective.",
}

pytestmark = pytest.mark.skipif(not GOLDEN, reason=f"no gloria/golden_seed*.json below PARITY_DIR ({FOLDER})")


@pytest.fixture(scope="module")
def seeded():
    spec = importlib.util.spec_from_file_location("seeded", FOLDER / "seeded.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=GOLDEN, ids=[f"parity-{path.stem}" for path in GOLDEN])
def kit(request, seeded, tmp_path_factory):
    """Golden numbers, the model loaded from a file of the published layout, the vocabulary, and the images."""
    golden = json.loads(request.param.read_text())
    layout = json.loads((FOLDER / "gloria" / "layout.json").read_text())
    folder = tmp_path_factory.mktemp("gloria")
    state = call(seeded, golden["weights"])
    path = lightning_file.write(folder / "chexpert_resnet50.ckpt", state, layout["config"]["value"])
    vocabulary = seeded.vocabulary()
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = load_tokenizer(folder / "vocab.txt")
    model = load_pretrained(path, tokenizer)
    path.unlink()
    pixels = torch.from_numpy(call(seeded, golden["inputs"]["images"]))
    with torch.no_grad():
        images = model.encode_images(pixels)
    return SimpleNamespace(
        golden=golden,
        model=model,
        seeded=seeded,
        vocabulary=vocabulary,
        pixels=pixels,
        images=images,
    )


def read_captions(kit, arrays):
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    return text_batch_from_ids(**tensors, vocabulary=kit.vocabulary)


def call(seeded, text):
    """What a golden file spells as a call, such as "seeded.captions(4, 97, 20, shortest=1)", with literal arguments."""
    tree = ast.parse(text, mode="eval").body
    arguments = [ast.literal_eval(argument) for argument in tree.args]
    return getattr(seeded, tree.func.attr)(*arguments, **{k.arg: ast.literal_eval(k.value) for k in tree.keywords})


def captions_of(kit, case):
    arrays = call(kit.seeded, kit.golden["inputs"]["captions"][case])
    if case == "unknown":
        for row, column in kit.golden["inputs"]["unknown_case"]["set_id_100_at_row_column"]:
            arrays["input_ids"][row, column] = kit.seeded.UNK
    return read_captions(kit, arrays)


def check(kit, actual, expected, name="default"):
    """Within the golden file's tolerance, whose relative part refers to the largest magnitude of the compared list."""
    tolerance = kit.golden["tolerance"]["recommended"]
    limit = tolerance.get(name, tolerance["default"])
    actual = actual.detach().numpy() if isinstance(actual, torch.Tensor) else np.asarray(actual)
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    allowed = limit["atol"] + limit["rtol"] * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=allowed, err_msg=name)


def check_vectors(kit, actual, golden):
    """Rows whose first eight values and length are stored."""
    assert list(actual.shape) == golden["shape"]
    check(kit, actual[:, :8], golden["first8"])
    check(kit, actual.norm(dim=1), golden["l2"])


def test_every_tensor_found_its_place(kit):
    report = kit.model.load_report
    assert report.complete
    assert len(report.matched) + len(report.ignored) == len(json.loads((FOLDER / "gloria" / "keys.json").read_text()))
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
        check_vectors(kit, kit.images.pooled, golden["pooled_2048"])
        check_vectors(kit, kit.model.objective.global_embedder(kit.images.pooled), golden["global"])
    assert list(regions.permute(0, 3, 1, 2).shape) == golden["local"]["shape"]
    for name, expected in golden["local"]["at"].items():
        image, row, column = (int("".join(filter(str.isdigit, part))) for part in name.split("_"))
        check(kit, regions[image, row, column, :8], expected)
    check(kit, regions.mean(), golden["local"]["mean"])
    check(kit, regions.std(correction=0), golden["local"]["std"])


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
    check_vectors(kit, features.sentence, golden["text_global"])
    wide = torch.nn.functional.pad(features.words, (0, 0, 0, 97 - features.words.shape[1]))
    assert list(wide.transpose(1, 2).shape) == golden["text_local"]["shape"]
    for name, expected in golden["text_local"]["at"].items():
        row = int(name.removeprefix("caption")[0])
        column = {"cls": 0, "word1": 1}.get(name.split("_")[1]) if "sep" not in name else int(name.split("column")[1])
        check(kit, wide[row, column, :8], expected)
    check(kit, wide.mean(), golden["text_local"]["mean"])
    check(kit, wide.std(correction=0), golden["text_local"]["std"])


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
        check(kit, output.terms[name], golden["loss"][theirs])
    check(kit, output.total, golden["loss"]["total"])
    check(kit, output.attention[0, 2].flatten(), golden["attention_caption0_word2"], "attention_caption0_word2")
    parameters = dict(model.named_parameters())
    for theirs, expected in gradients.items():
        prefix = next(prefix for prefix in TITLES if theirs.startswith(prefix))
        gradient = parameters[TITLES[prefix] + theirs.removeprefix(prefix)].grad
        check(kit, gradient.norm(), expected, "gradient_l2")
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
        check(kit, objective.temp_loss * local, golden["local_logits"])
        check(kit, objective.temp_loss * whole, golden["global_logits"])
        check(kit, whole, golden["global_cosine"], "global_cosine")
        window = golden["similarity_window_words"]
        check(kit, objective.local_similarity(kit.images, features), window["local"])
        check(kit, objective.similarity(kit.images, features), window["both"])
        long = golden["similarity_window_with_sep_and_padding"]
        local = objective.local_similarity(kit.images, features, window=long["cap_lens"])
        check(kit, local, long["local"])
        check(kit, (local + whole) / 2, long["both"])


def z_scores(scores: list[torch.Tensor]) -> torch.Tensor:
    """Best prompt of each class, then z-score of each class over the images, with the population's deviation."""
    best = torch.stack([score.amax(dim=1) for score in scores], dim=1)
    return (best - best.mean(dim=0)) / best.std(dim=0, correction=0)


def similarity_in_window(kit, features: TextFeatures, window: list[int]) -> torch.Tensor:
    objective, images = kit.model.objective, kit.images
    return (
        objective.local_similarity(images, features, window=window) + objective.global_similarity(images, features)
    ) / 2


def test_zero_shot_from_ids(kit):
    golden, scores = kit.golden["zero_shot_ids"], []
    for name in golden["columns"]:
        arrays = call(kit.seeded, kit.golden["inputs"]["zero_shot_ids"][name])
        with torch.no_grad():
            scores.append(
                kit.model.objective.similarity(kit.images, kit.model.encode_texts(read_captions(kit, arrays)))
            )
        check(kit, scores[-1], golden["both"][name])
    check(kit, z_scores(scores), golden["values"], "zero_shot values (z-scores)")


def test_zero_shot_from_text(kit):
    golden, scores = kit.golden["zero_shot_text"], []
    for name in golden["columns"]:
        prompts = [clean_report(prompt) for prompt in golden["prompts"][name]]
        texts = tokenize(kit.model.tokenizer, prompts, max_tokens=97)
        for row, ids in zip(texts.input_ids.tolist(), golden["ids"][name], strict=True):
            assert [value for value in row if value != kit.seeded.PAD] == ids
        with torch.no_grad():
            scores.append(similarity_in_window(kit, kit.model.encode_texts(texts), golden["cap_lens"][name]))
        check(kit, scores[-1], golden["both"][name])
    check(kit, z_scores(scores), golden["values"], "zero_shot values (z-scores)")


def test_image_train_mode_bn(kit):
    """The released loader leaves BatchNorm in training mode; asked for by hand it gives the same numbers."""
    golden, encoder = kit.golden["image_train_mode_bn"], kit.model.image_encoder
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder.train()
    try:
        with torch.no_grad():
            images: ImageFeatures = encoder(kit.pixels)
            check_vectors(kit, kit.model.objective.global_embedder(images.pooled), golden["global"])
        check(kit, encoder.trunk.bn1.running_mean[:8], golden["running_mean_bn1_after_first8"])
    finally:
        encoder.load_state_dict(before)
        encoder.eval()
