"""CXR-CLIP against the numbers of the authors' released code, for seeded weights in the published file layout."""

import ast
import copy
import dataclasses
import importlib.util
import json
import os
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import lightning_file
import numpy as np
import pytest
import torch

from gloria_core.checkpoints import native
from gloria_core.checkpoints.layouts import cxr_clip
from gloria_core.checkpoints.model import ConfigError, assemble
from gloria_core.checkpoints.published import load_pretrained
from gloria_core.data.tokenizer import text_batch_from_ids
from gloria_core.models.heads import cosine_matrix
from gloria_core.types import Batch, ImageFeatures, TextBatch

FOLDER = Path(os.environ.get("PARITY_DIR", Path(__file__).parents[3] / "shared" / "parity"))
GOLDEN = [path for kind in ("r50", "swint") for path in sorted((FOLDER / f"cxr_clip_{kind}").glob("golden_seed*.json"))]
TITLES = {
    "text_encoder.text_encoder.": "text_encoder.bert.",
    "image_encoder.resnet.": "image_encoder.trunk.",
    "image_encoder.image_encoder.": "image_encoder.trunk.",
    "image_projection.projection.": "objective.image_projection.",
    "text_projection.projection.": "objective.text_projection.",
    "logit_scale": "objective.logit_scale",
}
RENAMED = {  # read by hand from layout.json, "renamed_since_transformers_5"
    "attention.self.query.": "attention.q_proj.",
    "attention.self.relative_position_bias_table": "attention.relative_position_bias.relative_position_bias_table",
    "blocks.1.output.dense.": "blocks.1.mlp.fc2.",
}
NAMES = ("image", "image_view", "text", "text2")

needs_golden = pytest.mark.skipif(not GOLDEN, reason=f"no cxr_clip_*/golden_seed*.json below PARITY_DIR ({FOLDER})")


@pytest.fixture(scope="module")
def seeded():
    spec = importlib.util.spec_from_file_location("seeded", FOLDER / "seeded.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=GOLDEN, ids=[f"parity-{path.parent.name}-{path.stem}" for path in GOLDEN])
def kit(request, seeded, tmp_path_factory):
    """Golden numbers, the model loaded from a file of the published layout, and one batch of two views and texts."""
    golden = json.loads(request.param.read_text())
    layout = json.loads(request.param.with_name("layout.json").read_text())
    path = tmp_path_factory.mktemp("cxr_clip") / layout["files"][0]
    state = call(seeded, golden["weights"])
    write(path, state, layout["config"]["value"], layout["config"]["pickled_lists"])
    model = load_pretrained(path)
    path.unlink()
    inputs = {name: call(seeded, text) for name, text in golden["inputs"].items()}
    pixels = torch.from_numpy(np.stack([inputs["images"], inputs["image_views"]], axis=1))
    texts = interleave(read_captions(seeded, inputs["text_tokens"]), read_captions(seeded, inputs["text_tokens2"]))
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
        batch=batch,
        images=images,
        texts=words,
        embeddings=dict(zip(NAMES, by_name, strict=True)),
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


def call(seeded, text):
    """What a golden file spells as a call, such as "seeded.captions(4, 256, 100, longest=40)"."""
    tree = ast.parse(text, mode="eval").body
    arguments = [ast.literal_eval(argument) for argument in tree.args]
    return getattr(seeded, tree.func.attr)(*arguments, **{k.arg: ast.literal_eval(k.value) for k in tree.keywords})


def read_captions(seeded, arrays):
    return text_batch_from_ids(
        **{name: torch.from_numpy(value) for name, value in arrays.items()},
        vocabulary=seeded.vocabulary(),
    )


def interleave(first: TextBatch, second: TextBatch) -> TextBatch:
    """Text 1 of study 0, text 2 of study 0, text 1 of study 1, ..."""
    tensors = {}
    for field in dataclasses.fields(TextBatch):
        one, two = getattr(first, field.name), getattr(second, field.name)
        if isinstance(one, torch.Tensor):
            tensors[field.name] = torch.stack([one, two], dim=1).flatten(0, 1)
    return TextBatch(**tensors)


def check(kit, actual, expected, name="default"):
    """Within the golden file's tolerance, whose relative part refers to the largest magnitude of the compared list."""
    tolerance = kit.golden["tolerance"]["recommended"]
    limit = next((value for key, value in tolerance.items() if name in key.split(" and ")), tolerance["default"])
    actual = actual.detach().numpy() if isinstance(actual, torch.Tensor) else np.asarray(actual)
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    allowed = limit["atol"] + limit["rtol"] * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=allowed, err_msg=name)


def check_vectors(kit, actual, golden, name="default"):
    """Rows whose first eight values and length are stored."""
    assert list(actual.shape) == golden["shape"]
    check(kit, actual[:, :8], golden["first8"], name)
    check(kit, actual.norm(dim=1), golden["l2"], name)


def unit(vectors):
    return vectors / vectors.norm(dim=1, keepdim=True)


@needs_golden
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


@needs_golden
def test_encoders(kit):
    golden, objective = kit.golden["pooled_before_projection"], kit.model.objective
    pooled = objective._pooled_text(kit.texts)
    vectors = [*(kit.images.pooled[k::2] for k in range(2)), *(pooled[k::2] for k in range(2))]
    for name, vector in zip(NAMES, vectors, strict=True):
        check_vectors(kit, vector, golden[name])
    pieces = kit.batch.text.attention_mask.sum(dim=1)
    assert pieces[0::2].tolist() == kit.golden["pieces"]["text_tokens"]
    assert pieces[1::2].tolist() == kit.golden["pieces"]["text_tokens2"]


@needs_golden
def test_regions(kit):
    golden, regions = kit.golden["image_regions"], kit.images.regions[0::2]
    n, h, w, d = regions.shape
    assert golden["shape"] == ([n, h * w, d] if kit.swin else [n, d, h, w])
    for name, expected in golden["at"].items():
        image, *place = (int("".join(filter(str.isdigit, part))) for part in name.split("_"))
        row, column = place if len(place) == 2 else divmod(place[0], w)
        check(kit, regions[image, row, column, :8], expected)
    check(kit, regions.mean(), golden["mean"])
    check(kit, regions.std(correction=0), golden["std"])


@needs_golden
def test_tokens_of_the_first_text(kit):
    golden, tokens = kit.golden["text_tokens"], kit.texts.tokens[0::2]
    for name, expected in golden["at"].items():
        caption, token = (int("".join(filter(str.isdigit, part))) for part in name.split("_")[:2])
        check(kit, tokens[caption, token, :8], expected)


@needs_golden
def test_embeddings_and_cosines(kit):
    for name, vectors in kit.embeddings.items():
        check_vectors(kit, unit(vectors), kit.golden["embedding"][name], "embedding")
    for name, expected in kit.golden["cosine"].items():
        one, other = next((a, b) for a, b in product(NAMES, NAMES) if f"{a}_{b}" == name)
        check(kit, cosine_matrix(kit.embeddings[one], kit.embeddings[other]), expected, "cosine")
    scores = kit.model.objective.similarity(kit.images, kit.texts)
    check(kit, scores[0::2, 1::2], kit.golden["cosine"]["image_text2"], "cosine")
    check(kit, kit.model.objective.logit_scale, kit.golden["logit_scale"]["parameter"])
    check(kit, kit.model.objective.logit_scale.exp(), kit.golden["logit_scale"]["exp"])


@needs_golden
def test_loss_terms(kit):
    golden, objective = kit.golden["loss"], copy.deepcopy(kit.model.objective)
    with torch.no_grad():
        output = objective(kit.images, kit.texts, kit.batch)
        for ours, theirs in (("image_to_text", "i2t"), ("text_to_image", "t2i"), ("icl", "icl"), ("tcl", "tcl")):
            check(kit, output.terms[ours], golden[theirs])
        check(kit, (output.terms["image_to_text"] + output.terms["text_to_image"]) / 2, golden["mvs"])
        check(kit, output.total, golden["total"])
        for (a, image), (c, text) in product(enumerate(("image", "image_view")), enumerate(("text", "text2"))):
            pair = objective(images_of(kit, a), texts_of(kit, c))  # one view and one text: a single pairing
            check(kit, pair.terms["image_to_text"], golden["image_to_text"][f"{image}_{text}"])
            check(kit, pair.terms["text_to_image"], golden["text_to_image"][f"{image}_{text}"])
        objective.icl_weight = objective.tcl_weight = 0.0
        check(kit, objective(kit.images, kit.texts, kit.batch).total, golden["total_without_icl_tcl"])
        objective.icl_weight, objective.tcl_weight, objective.label_smoothing = 1.0, 0.5, 0.1
        check(kit, objective(kit.images, kit.texts, kit.batch).total, golden["total"])  # evaluation is never smoothed
        smoothed = objective.train()(kit.images, kit.texts, kit.batch)
        check(kit, smoothed.total, golden["total_label_smoothing_0.1"])


def images_of(kit, view):
    return ImageFeatures(kit.images.pooled[view::2], kit.images.regions[view::2])


def texts_of(kit, text):
    chosen = {f.name: getattr(kit.texts, f.name) for f in dataclasses.fields(kit.texts)}
    return replace(kit.texts, **{name: value[text::2] for name, value in chosen.items() if value is not None})


@needs_golden
def test_gradients(kit):
    kit.model.zero_grad()
    kit.model(kit.batch).total.backward()
    parameters = dict(kit.model.named_parameters())
    try:
        for theirs, expected in kit.golden["gradient_l2"].items():
            prefix = next(prefix for prefix in TITLES if theirs.startswith(prefix))
            name = TITLES[prefix] + theirs.removeprefix(prefix)
            for old, new in RENAMED.items() if name.startswith("image_encoder.") and kit.swin else ():
                name = name.replace(old, new)
            check(kit, parameters[name].grad.norm(), expected, "gradient_l2")
        assert all(parameter.grad is not None for parameter in parameters.values())
    finally:
        kit.model.zero_grad()


@needs_golden
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
        check_vectors(kit, unit(vectors[0::2]), golden["image"], "embedding")
        check_vectors(kit, unit(vectors[1::2]), golden["image_view"], "embedding")
        check(kit, again.objective.similarity(images, kit.texts)[0::2, 0::2], golden["cosine_image_text"], "cosine")
        check(kit, again.objective(images, kit.texts, kit.batch).total, golden["total"])


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
        for stage, depth in enumerate((2, 2, 6, 2)):
            for block in range(depth):
                shapes[f"{root}encoder.layers.{stage}.blocks.{block}.attention.self.query.weight"] = (96, 96)
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


CGMH = {"data_train": {"cgmh": {"name": "cgmh", "data_type": "imagetext"}}}


def test_settings_of_the_file():
    stored = {
        "loss": {"cxr_clip": {"i2i_weight": 0.0, "t2t_weight": 0.25, "label_smoothing": 0.1}},
        "model": {"text_encoder": {"pooling": "bos", "name": "some/bert"}, "projection_head": {"name": "linear"}},
        "base": {"image_size": 256, "text_max_length": 77},
    }
    config = cxr_clip.translate(names_of("resnet"), stored).config
    assert config.objective_options == {
        "icl_weight": 0.0,
        "tcl_weight": 0.25,
        "label_smoothing": 0.1,
        "projection_dim": 512,
        "text_pooling": "cls",
    }
    assert (config.crop, config.max_tokens, config.text_encoder) == (256, 77, "some/bert")
    assert config.image_encoder == "resnet18"
    assert cxr_clip.translate(names_of("resnet"), {}).config.objective_options["tcl_weight"] == 0.5


def test_pooling_of_the_fork_is_told_from_its_data():
    swin = names_of("swin")
    assert cxr_clip.translate(swin, {}).config.image_pooling == "first_token"
    assert cxr_clip.translate(swin, {"data_train": {"c": {"name": "chexpert"}}}).config.image_pooling == "first_token"
    assert cxr_clip.translate(swin, CGMH).config.image_pooling == "mean"
    assert cxr_clip.translate(swin, {"data_valid": CGMH["data_train"]}).config.image_pooling == "mean"
    assert cxr_clip.translate(names_of("resnet"), CGMH).config.image_pooling == "default"


def test_our_own_file_keeps_bert_without_its_pooler(tmp_path):
    """Published weights with one layer have a pooler elsewhere; here it would be a tensor that no loss reaches."""
    translation = cxr_clip.translate(names_of("resnet"), {})
    config = replace(translation.config, image_encoder="resnet_tiny")
    model = assemble(config, translation.text, None).eval()
    again = native.load(native.save(tmp_path / "model.pt", model))
    assert model.text_encoder.bert.pooler is None
    assert again.text_encoder.bert.pooler is None
    assert again.config == config
    assert torch.equal(again.objective.logit_scale, model.objective.logit_scale)


def test_what_is_not_supported():
    with pytest.raises(ConfigError, match="'mlp'; only linear"):
        cxr_clip.translate(names_of("swin"), {"model": {"projection_head": {"name": "mlp"}}})
    deeper = names_of("swin") | {"image_encoder.image_encoder.encoder.layers.2.blocks.6.x": torch.zeros(1)}
    with pytest.raises(ConfigError, match="Swin-Tiny"):
        cxr_clip.translate(deeper, {})
    other = {name: value for name, value in names_of("resnet").items() if not name.startswith("image_encoder.")}
    with pytest.raises(ConfigError, match="neither a ResNet nor a Swin"):
        cxr_clip.translate(other, {})


def test_files_of_other_methods_are_not_recognised():
    shapes = {name: tuple(value.shape) for name, value in names_of("swin").items()}
    assert cxr_clip.recognise(shapes, {})
    assert cxr_clip.recognise({f"module.{name}": shape for name, shape in shapes.items()}, {})
    for name in ("logit_scale", "image_projection.projection.weight", "text_projection.projection.weight"):
        assert not cxr_clip.recognise({key: shape for key, shape in shapes.items() if key != name}, {})
