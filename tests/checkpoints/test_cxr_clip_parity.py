"""CXR-CLIP against the numbers of the authors' released code, for seeded weights in the published file layout."""

import copy
import dataclasses
import json
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import lightning_file
import numpy as np
import pytest
import torch
from parity_kit import Tolerance, call, golden_params, gradient, load, numbers_in, read_json, text_batch

from gloria_core.checkpoints import native
from gloria_core.checkpoints.layouts import cxr_clip
from gloria_core.checkpoints.model import ConfigError, assemble
from gloria_core.models.heads import cosine_matrix
from gloria_core.models.weights import WeightsError
from gloria_core.types import Batch, ImageFeatures, TextBatch

NAMES = ("image", "image_view", "text", "text2")


@pytest.fixture(scope="module", params=golden_params("cxr_clip_r50", "cxr_clip_swint"))
def kit(request, tmp_path_factory):
    """Golden numbers, the model loaded from a file of the published layout, and one batch of two views and texts."""
    golden = json.loads(request.param.read_text())
    layout, state = read_json(golden["method"], "layout"), call(golden["weights"])
    path, stored = tmp_path_factory.mktemp("cxr_clip") / layout["files"][0], layout["config"]["value"]
    write(path, state, stored, layout["config"]["pickled_lists"])
    model, places = load(cxr_clip, path, state, stored)
    inputs = {name: call(text) for name, text in golden["inputs"].items()}
    pixels = torch.from_numpy(np.stack([inputs["images"], inputs["image_views"]], axis=1))
    texts = interleave(text_batch(inputs["text_tokens"]), text_batch(inputs["text_tokens2"]))
    batch = Batch(pixels, texts, torch.zeros(len(pixels), 0), torch.arange(len(pixels)))
    with torch.no_grad():
        images, words = model.encode_images(pixels), model.encode_texts(texts)
        vectors = model.objective.global_embeddings(images, words)
    by_name = [vector[k::2] for vector in vectors for k in range(2)]
    return SimpleNamespace(
        golden=golden,
        layout=layout,
        swin="swint" in golden["method"],
        model=model,
        places=places,
        batch=batch,
        images=images,
        texts=words,
        embeddings=dict(zip(NAMES, by_name, strict=True)),
        check=Tolerance(golden),
    )


def write(path, state, config, lists):
    """The container of the released trainer: a plain dict in which the named lists are omegaconf's."""
    config = copy.deepcopy(config)
    with lightning_file.fake_libraries() as classes:
        whole = lightning_file.wrap(config, classes)
        for dotted in lists:
            *parts, last = dotted.split(".")
            node = config
            for part in parts:
                node = node[part]
            node[last] = lightning_file.wrap(node[last], classes, last)
            node[last].__dict__["_parent"] = whole  # drags the whole tree into the pickle
        content = {
            "model": state,
            "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 5e-5, "params": [0]}]},
            "scheduler": {"tsteps": 10, "base_lrs": [5e-5], "lr_lambdas": [{}]},
            "config": config,
            "epoch": 15,
            "train_loss": 1.5,
        }
        torch.save(content, path)


def interleave(first: TextBatch, second: TextBatch) -> TextBatch:
    """Text 1 of study 0, text 2 of study 0, text 1 of study 1, ..."""
    tensors = {}
    for field in dataclasses.fields(TextBatch):
        one, two = getattr(first, field.name), getattr(second, field.name)
        if isinstance(one, torch.Tensor):
            tensors[field.name] = torch.stack([one, two], dim=1).flatten(0, 1)
    return TextBatch(**tensors)


def unit(vectors):
    return vectors / vectors.norm(dim=1, keepdim=True)


def test_every_tensor_found_its_place(kit):
    report, config = kit.model.load_report, kit.model.config
    assert report.complete
    assert len(report.matched) + len(report.ignored) == kit.layout["state_dict"]["entries"]
    unused = ("position_ids", "pooler.dense.weight", "pooler.dense.bias", "relative_position_index")
    assert all(name.endswith(unused) for name in report.ignored)
    assert len(report.ignored) == (3 + 12 if kit.swin else 3)
    assert not kit.model.training
    assert kit.model.origin == "CXR-CLIP"
    assert (config.behavior, config.crop, config.max_tokens, config.region_stage) == ("published", 224, 256, "layer4")
    assert config.image_encoder == ("swin_tiny" if kit.swin else "resnet50")
    assert config.norm == ("half" if kit.swin else "imagenet")
    settings, options = kit.golden["settings"], config.objective_options
    assert options["icl_weight"] == settings["i2i_weight"]
    assert options["tcl_weight"] == settings["t2t_weight"]
    assert options["text_pooling"] == settings["text_pooling"]
    assert config.image_pooling == (settings["image_pooling"] if kit.swin else "default")


def test_encoders(kit):
    golden, objective = kit.golden["pooled_before_projection"], kit.model.objective
    pooled = objective._pooled_text(kit.texts)
    vectors = [*(kit.images.pooled[k::2] for k in range(2)), *(pooled[k::2] for k in range(2))]
    for name, vector in zip(NAMES, vectors, strict=True):
        kit.check.vectors(vector, golden[name])
    pieces = kit.batch.text.attention_mask.sum(dim=1)
    assert pieces[0::2].tolist() == kit.golden["pieces"]["text_tokens"]
    assert pieces[1::2].tolist() == kit.golden["pieces"]["text_tokens2"]


def test_regions(kit):
    golden, regions = kit.golden["image_regions"], kit.images.regions[0::2]
    n, h, w, d = regions.shape
    assert golden["shape"] == ([n, h * w, d] if kit.swin else [n, d, h, w])
    for name, expected in golden["at"].items():
        image, *place = numbers_in(name)
        row, column = place if len(place) == 2 else divmod(place[0], w)
        kit.check(regions[image, row, column, :8], expected)
    kit.check.moments(regions, golden)


def test_tokens_of_the_first_text(kit):
    golden, tokens = kit.golden["text_tokens"], kit.texts.tokens[0::2]
    for name, expected in golden["at"].items():
        caption, token = numbers_in(name)
        kit.check(tokens[caption, token, :8], expected)


def test_embeddings_and_cosines(kit):
    for name, vectors in kit.embeddings.items():
        kit.check.vectors(unit(vectors), kit.golden["embedding"][name], "embedding")
    for name, expected in kit.golden["cosine"].items():
        one, other = next((a, b) for a, b in product(NAMES, NAMES) if f"{a}_{b}" == name)
        kit.check(cosine_matrix(kit.embeddings[one], kit.embeddings[other]), expected, "cosine")
    scores = kit.model.objective.similarity(kit.images, kit.texts)
    kit.check(scores[0::2, 1::2], kit.golden["cosine"]["image_text2"], "cosine")
    kit.check(kit.model.objective.logit_scale, kit.golden["logit_scale"]["parameter"])
    kit.check(kit.model.objective.logit_scale.exp(), kit.golden["logit_scale"]["exp"])


def test_loss_terms(kit):
    golden, objective = kit.golden["loss"], copy.deepcopy(kit.model.objective)
    with torch.no_grad():
        output = objective(kit.images, kit.texts, kit.batch)
        for ours, theirs in (("image_to_text", "i2t"), ("text_to_image", "t2i"), ("icl", "icl"), ("tcl", "tcl")):
            kit.check(output.terms[ours], golden[theirs])
        kit.check((output.terms["image_to_text"] + output.terms["text_to_image"]) / 2, golden["mvs"])
        kit.check(output.total, golden["total"])
        for (a, image), (c, text) in product(enumerate(("image", "image_view")), enumerate(("text", "text2"))):
            pair = objective(images_of(kit, a), texts_of(kit, c))  # one view and one text: a single pairing
            kit.check(pair.terms["image_to_text"], golden["image_to_text"][f"{image}_{text}"])
            kit.check(pair.terms["text_to_image"], golden["text_to_image"][f"{image}_{text}"])
        objective.icl_weight = objective.tcl_weight = 0.0
        kit.check(objective(kit.images, kit.texts, kit.batch).total, golden["total_without_icl_tcl"])
        objective.icl_weight, objective.tcl_weight, objective.label_smoothing = 1.0, 0.5, 0.1
        kit.check(objective(kit.images, kit.texts, kit.batch).total, golden["total"])  # evaluation is never smoothed
        smoothed = objective.train()(kit.images, kit.texts, kit.batch)
        kit.check(smoothed.total, golden["total_label_smoothing_0.1"])


def images_of(kit, view):
    return ImageFeatures(kit.images.pooled[view::2], kit.images.regions[view::2])


def texts_of(kit, text):
    chosen = {f.name: getattr(kit.texts, f.name) for f in dataclasses.fields(kit.texts)}
    return replace(kit.texts, **{name: value[text::2] for name, value in chosen.items() if value is not None})


def test_gradients(kit):
    kit.model.zero_grad()
    kit.model(kit.batch).total.backward()
    try:
        for name, expected in kit.golden["gradient_l2"].items():
            kit.check.gradient(gradient(kit.model, kit.places, name), expected, name)
        assert all(parameter.grad is not None for parameter in kit.model.parameters())
    finally:
        kit.model.zero_grad()


def test_mean_pooling_of_the_fork(kit):
    """By the settings of the file, and by the recipe in the docstring of the layout."""
    golden = kit.golden.get("mean_pooling_variant")
    if golden is None:
        pytest.skip("a ResNet pools by the mean in any case")
    config = replace(kit.model.config, image_pooling="mean")
    again = assemble(config, kit.model.text_encoder.config, None).eval()
    again.load_state_dict(kit.model.state_dict())
    with torch.no_grad():
        images = again.encode_images(kit.batch.pixels)
        vectors = again.objective.global_embeddings(images, kit.texts)[0]
        kit.check.vectors(unit(vectors[0::2]), golden["image"], "embedding")
        kit.check.vectors(unit(vectors[1::2]), golden["image_view"], "embedding")
        kit.check(again.objective.similarity(images, kit.texts)[0::2, 0::2], golden["cosine_image_text"], "cosine")
        kit.check(again.objective(images, kit.texts, kit.batch).total, golden["total"])


# ------------------------------------------------------------------------------- the layout, without golden numbers


def names_of(encoder):
    """Names and shapes by which a file of the layout is known, without the tensors."""
    text = "text_encoder.text_encoder."
    shapes = {
        "logit_scale": (),
        "image_projection.projection.weight": (512, 8),
        "text_projection.projection.weight": (512, 64),
        f"{text}embeddings.word_embeddings.weight": (30, 64),
        f"{text}embeddings.position_embeddings.weight": (16, 64),
        f"{text}embeddings.token_type_embeddings.weight": (2, 64),
        f"{text}encoder.layer.0.intermediate.dense.weight": (128, 64),
    }
    if encoder == "resnet":
        blocks = [(1, 2), (2, 2), (3, 2), (4, 2)]
        shapes |= {f"image_encoder.resnet.layer{s}.{b}.conv1.weight": (1,) for s, n in blocks for b in range(n)}
        shapes["image_encoder.resnet.conv1.weight"] = (64, 3, 7, 7)
    else:
        root = "image_encoder.image_encoder."
        shapes[f"{root}embeddings.patch_embeddings.projection.weight"] = (96, 3, 4, 4)
        shapes[f"{root}embeddings.norm.weight"] = (96,)
        for stage, depth in enumerate((2, 2, 6, 2)):
            for block in range(depth):
                shapes[f"{root}encoder.layers.{stage}.blocks.{block}.attention.self.query.weight"] = (96, 96)
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


CGMH = {"data_train": {"cgmh": {"name": "cgmh", "data_type": "imagetext"}}}


def translated(tensors, stored):
    """The configuration and the text architecture."""
    return cxr_clip.LAYOUTS[0].translate(tensors, stored).network.args


def test_settings_of_the_file():
    stored = {
        "loss": {"cxr_clip": {"i2i_weight": 0.0, "t2t_weight": 0.25, "label_smoothing": 0.1}},
        "model": {"text_encoder": {"pooling": "bos", "name": "some/bert"}, "projection_head": {"name": "linear"}},
        "base": {"image_size": 256, "text_max_length": 77},
    }
    config = translated(names_of("resnet"), stored)[0]
    assert config.objective_options == {
        "icl_weight": 0.0,
        "tcl_weight": 0.25,
        "label_smoothing": 0.1,
        "projection_dim": 512,
        "text_pooling": "cls",
    }
    assert (config.crop, config.max_tokens, config.text_encoder) == (256, 77, "some/bert")
    assert config.image_encoder == "resnet18"
    assert translated(names_of("resnet"), {})[0].objective_options["tcl_weight"] == 0.5


def test_pooling_of_the_fork_is_told_from_its_data():
    swin = names_of("swin")
    assert translated(swin, {})[0].image_pooling == "first_token"
    assert translated(swin, {"data_train": {"c": {"name": "chexpert"}}})[0].image_pooling == "first_token"
    assert translated(swin, CGMH)[0].image_pooling == "mean"
    assert translated(swin, {"data_valid": CGMH["data_train"]})[0].image_pooling == "mean"
    assert translated(names_of("resnet"), CGMH)[0].image_pooling == "default"


def test_our_own_file_keeps_bert_without_its_pooler(tmp_path):
    """Published weights with one layer have a pooler elsewhere; here it would be a tensor that no loss reaches."""
    config, text = translated(names_of("resnet"), {})
    config = replace(config, image_encoder="resnet_tiny")
    model = assemble(config, text, None).eval()
    again = native.load(native.save(tmp_path / "model.pt", model))
    assert model.text_encoder.bert.pooler is None
    assert again.text_encoder.bert.pooler is None
    assert again.config == config
    assert torch.equal(again.objective.logit_scale, model.objective.logit_scale)


def test_what_is_not_supported():
    with pytest.raises(ConfigError, match="'mlp'; only linear"):
        cxr_clip.LAYOUTS[0].translate(names_of("swin"), {"model": {"projection_head": {"name": "mlp"}}})
    deeper = names_of("swin") | {"image_encoder.image_encoder.encoder.layers.2.blocks.6.x": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"Swin of the sizes \(96, 4, 2, 2, 7, 2\); known: swin_tiny"):
        cxr_clip.LAYOUTS[0].translate(deeper, {})
    other = {name: value for name, value in names_of("resnet").items() if not name.startswith("image_encoder.")}
    with pytest.raises(WeightsError, match="none that is known"):
        cxr_clip.LAYOUTS[0].translate(other, {})


def test_files_of_other_methods_are_not_recognised():
    shapes = {name: tuple(value.shape) for name, value in names_of("swin").items()}
    assert cxr_clip.LAYOUTS[0].recognise(shapes, {})
    for name in ("logit_scale", "image_projection.projection.weight", "text_projection.projection.weight"):
        assert not cxr_clip.LAYOUTS[0].recognise({key: shape for key, shape in shapes.items() if key != name}, {})
