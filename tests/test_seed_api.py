"""The usage snippets of GLoRIA's README, and what its functions give, with `import gloria_core as gloria`."""

import inspect
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import lightning_file
import numpy as np
import pandas as pd
import pytest
import seeded
import torch
from parity_kit import golden_params, read_json
from PIL import Image

import gloria_core as gloria
from gloria_core.data.reports import ReportError
from gloria_core.data.tokenizer import TokenizerError

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]

README_MODELS = """
import torch
import gloria_core as gloria

device = "cuda" if torch.cuda.is_available() else "cpu"
num_class = 5
freeze = True
model = gloria.load_img_classification_model(num_cls=num_class, freeze_encoder=freeze, device=device)
seg_model = gloria.load_img_segmentation_model(device=device)
"""
README_ZERO_SHOT = """
import torch
import gloria_core as gloria
import pandas as pd

df = pd.read_csv(gloria.constants.CHEXPERT_5x200)
device = "cuda" if torch.cuda.is_available() else "cpu"
gloria_model = gloria.load_gloria(device=device)
cls_prompts = gloria.generate_chexpert_class_prompts()
processed_txt = gloria_model.process_class_prompts(cls_prompts, device)
processed_imgs = gloria_model.process_img(df['Path'].tolist(), device)
similarities = gloria.zero_shot_classification(
    gloria_model, processed_imgs, processed_txt)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with `pretrained/chexpert_resnet50.ckpt` (a small one), a vocabulary, and a 5x200 set of six images."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    config = json.loads(json.dumps(lightning_file.CONFIG))
    config["model"]["text"]["bert_type"] = str(folder / "bert")
    (folder / "pretrained").mkdir()
    state = lightning_file.small_gloria(vocabulary=len(VOCABULARY))
    lightning_file.write(folder / "pretrained" / "chexpert_resnet50.ckpt", state, config)
    rng, rows = np.random.default_rng(0), []
    for number in range(6):
        path = folder / f"{number}.png"
        picture = np.kron(rng.integers(0, 255, (8, 7)), np.ones((10, 10))).astype(np.uint8)
        Image.fromarray(picture).save(path)
        rows.append({"Path": str(path), "Edema": 1})
    (folder / "chexpert").mkdir()
    pd.DataFrame(rows).to_csv(folder / "chexpert" / "chexpert_8x200.csv", index=False)
    return folder


@pytest.fixture
def there(home, monkeypatch) -> Path:
    """The working directory of somebody who followed the README."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("CHEXPERT_DATA_DIR", str(home / "chexpert"))
    monkeypatch.delenv("GLORIA_PRETRAINED", raising=False)
    return home


@pytest.fixture(scope="module")
def model(home):
    return gloria.load_gloria(home / "pretrained" / "chexpert_resnet50.ckpt", "cpu")


@pytest.fixture(scope="module")
def images(home, model) -> torch.Tensor:
    return model.process_img([home / f"{number}.png" for number in range(6)])


def test_readme_models(there):
    found: dict = {}
    exec(README_MODELS, found)
    classifier, unet = found["model"], found["seg_model"]
    assert not classifier.training
    assert not unet.training
    with torch.no_grad():
        assert classifier(torch.zeros(2, 3, 56, 56)).shape == (2, 5)
        assert unet(torch.zeros(1, 3, 64, 64)).shape == (1, 1, 64, 64)
    trainable = [name for name, value in classifier.named_parameters() if value.requires_grad]
    assert trainable == ["classifier.weight", "classifier.bias"]
    assert classifier.img_encoder.resize_to == 299
    assert classifier.classifier.in_features == 512  # before the projection
    stored = lightning_file.small_gloria(vocabulary=len(VOCABULARY))
    for name in ("conv1.weight", "layer4.1.bn2.bias", "layer3.0.downsample.1.running_var"):
        theirs = stored[f"gloria.img_encoder.model.{name}"]
        assert torch.equal(unet.encoder.state_dict()[name], theirs)
        assert torch.equal(classifier.img_encoder.trunk.state_dict()[name], theirs)


def test_readme_zero_shot(there):
    found: dict = {}
    exec(README_ZERO_SHOT, found)
    table = found["similarities"]
    assert isinstance(table, pd.DataFrame)
    assert list(table.columns) == gloria.constants.CHEXPERT_COMPETITION_TASKS
    assert list(table.index) == list(range(6))
    np.testing.assert_allclose(table.mean(), 0, atol=1e-6)
    np.testing.assert_allclose(table.std(ddof=0), 1, atol=1e-6)
    assert not any(module.training for module in found["gloria_model"].modules())


def test_names_order_and_defaults_are_the_original_s():
    wanted = {
        "load_gloria": ["name='gloria_resnet50'", "device"],
        "load_img_classification_model": ["name='gloria_resnet50'", "device", "num_cls=1", "freeze_encoder=True"],
        "load_img_segmentation_model": ["name='gloria_resnet50'", "device"],
        "get_similarities": ["gloria_model", "imgs", "txts", "similarity_type='both'"],
        "zero_shot_classification": ["gloria_model", "imgs", "cls_txt_mapping"],
        "generate_chexpert_class_prompts": ["n=5"],
    }
    for name, parameters in wanted.items():
        found = inspect.signature(getattr(gloria, name)).parameters.values()
        positional = [value for value in found if value.kind is value.POSITIONAL_OR_KEYWORD]
        assert [value.name for value in positional] == [text.partition("=")[0] for text in parameters]
        for value, text in zip(positional, parameters, strict=True):
            if "=" in text:
                assert repr(value.default) == text.partition("=")[2]
    assert gloria.available_models() == ["gloria_resnet50", "gloria_resnet18"]
    assert gloria.available_segmentation_models() == ["gloria_resnet50"]
    assert set(gloria.__all__) <= set(dir(gloria))


def test_importing_the_package_loads_no_deep_learning_library():
    code = "import sys, gloria_core; assert 'torch' not in sys.modules and hasattr(gloria_core, 'constants')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_texts(model, images, home):
    texts = model.process_text(["Edema", "no edema.\n2. Heart, large"])
    assert texts["caption_ids"].shape == texts["attention_mask"].shape == texts["token_type_ids"].shape == (2, 97)
    assert texts["cap_lens"] == [1, 5]  # no, edema, 2, heart, large
    assert texts["attention_mask"].sum(dim=1).tolist() == [7, 20]
    assert model.process_text("one text")["caption_ids"].shape == (1, 97)
    with pytest.raises(ReportError, match=r"'\.\.\.' has no word"):
        model.process_text(["fine text", "..."])
    published = gloria.load_gloria(home / "pretrained" / "chexpert_resnet50.ckpt", "cpu", behavior="published")
    texts = published.process_text(["Edema", "no edema.\n2. Heart, large"])
    assert texts["cap_lens"] == [5, 25]  # characters
    assert np.isfinite(gloria.get_similarities(published, images, texts)).all()
    assert texts["attention_mask"].sum(dim=1).tolist() == [2, 19]  # an empty text; the number is gone


def test_local_similarity_is_the_released_loop(model):
    """Attention and cosine of one image and one text at a time, as gloria_model.py writes them."""
    generator = torch.Generator().manual_seed(0)
    regions = torch.randn(2, 8, 3, 3, generator=generator)
    words = torch.randn(3, 8, 20, generator=generator)
    words[1, :, 3:] = 0  # fewer words than the window: columns of zeros take part
    lengths = [1, 4, 25]
    found = model.get_local_similarities(regions, words, lengths)
    for b in range(2):
        for n in range(3):
            query, context = words[n, :, 1 : lengths[n] + 1], regions[b].flatten(1)
            weights = (context.T @ query).softmax(dim=1)
            weights = (4.0 * weights.T).softmax(dim=1)
            seen = context @ weights.T
            cosine = (query * seen).sum(0) / (query.norm(dim=0) * seen.norm(dim=0)).clamp(min=1e-8)
            assert found[b, n].item() == pytest.approx(math.log(math.exp(5.0 * cosine.max())), abs=1e-5)


def test_similarities(model, images, capsys):
    texts = model.process_text(["small left effusion", "edema", "no finding at all"])
    both = gloria.get_similarities(model, images, texts)
    assert isinstance(both, np.ndarray)
    assert both.shape == (6, 3)
    local, whole = (gloria.get_similarities(model, images, texts, kind) for kind in ("local", "global"))
    np.testing.assert_allclose(both, (local + whole) / 2, atol=1e-6)
    assert np.ptp(both) > 1e-4
    np.testing.assert_allclose(gloria.get_similarities(model, images, texts, batch_size=2), both, atol=1e-5)
    # the words of a text, neither [CLS] nor [SEP] nor padding: what our own objective compares
    ids = [texts[name] for name in ("caption_ids", "attention_mask", "token_type_ids")]
    words, _, sents = model.text_encoder_forward(*ids)
    assert words.shape == (3, 64, 97)
    assert sents[1] == ["[CLS]", "edema", "[SEP]", *["[PAD]"] * 94]
    assert not capsys.readouterr().err
    gloria.get_similarities(model, images, texts, batch_size=2, progress=True)
    assert "6/6" in capsys.readouterr().err


def test_zero_shot_is_best_prompt_of_each_class(model, images, monkeypatch):
    prompts = {"Edema": ["edema", "small edema"], "Normal": "no finding"}
    texts = model.process_class_prompts(prompts)
    plain = gloria.zero_shot_classification(model, images, texts, normalise="none")
    for name in prompts:
        best = gloria.get_similarities(model, images, texts[name]).max(axis=1)
        np.testing.assert_allclose(plain[name], best, atol=1e-6)
    scaled = gloria.zero_shot_classification(model, images, texts)
    np.testing.assert_allclose(scaled, (plain - plain.mean()) / plain.std(ddof=0), atol=1e-4)
    one = gloria.zero_shot_classification(model, images[:1], texts)
    np.testing.assert_allclose(one, plain[:1], atol=1e-5)
    seen = []
    encode = model.model.encode_images
    monkeypatch.setattr(model.model, "encode_images", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    gloria.zero_shot_classification(model, images, texts, batch_size=4)
    assert seen == [4, 2]  # each image once, whatever the number of classes


def test_batch_statistics_only_when_asked_for(home, model, images):
    texts = model.process_text(["edema", "no finding"])
    before = model.img_encoder.trunk.bn1.running_mean.clone()
    alone = gloria.get_similarities(model, images[:1], texts)
    together = gloria.get_similarities(model, images, texts)
    np.testing.assert_allclose(alone[0], together[0], atol=1e-5)
    assert torch.equal(model.img_encoder.trunk.bn1.running_mean, before)
    legacy = gloria.load_gloria(home / "pretrained" / "chexpert_resnet50.ckpt", "cpu", batch_statistics=True)
    assert legacy.img_encoder.training
    assert not legacy.text_encoder.training
    alone = gloria.get_similarities(legacy, images[:2], texts)
    together = gloria.get_similarities(legacy, images, texts, batch_size=2)  # all at once nevertheless
    assert np.abs(alone[0] - together[0]).max() > 1e-3
    assert not torch.equal(legacy.img_encoder.trunk.bn1.running_mean, before)


def test_frozen_classifier(home):
    path = home / "pretrained" / "chexpert_resnet50.ckpt"
    frozen = gloria.load_img_classification_model(path, "cpu", 3).train()
    assert not frozen.img_encoder.training
    legacy = gloria.load_img_classification_model(path, "cpu", 3, batch_statistics=True).train()
    assert legacy.img_encoder.training
    whole = gloria.load_img_classification_model(path, "cpu", 3, False).train()
    whole(torch.rand(2, 3, 56, 56)).sum().backward()
    assert whole.img_encoder.trunk.conv1.weight.grad is not None
    with pytest.raises(ValueError, match="at least one class"):
        gloria.load_img_classification_model(path, "cpu", 0)


def test_attention_maps_are_those_of_training(model, images):
    texts = model.process_text(["small left effusion", "edema"])
    ids = {name: texts[name] for name in ("caption_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        regions, whole, words, sentence, sents = model({"imgs": images[:2], **ids})
        maps = model.get_attn_maps(regions, words, sents)
        tokens = model.model.tokenizer
        assert tokens is None  # none came with the checkpoint: the folder that it names was read
        assert [tuple(one.shape) for one in maps] == [(1, 4, 19, 19), (1, 2, 19, 19)]
        assert whole.shape == sentence.shape == (2, 64)
    for one in maps:
        torch.testing.assert_close(one.sum(dim=(2, 3)), torch.ones(one.shape[:2]))
    with pytest.raises(ValueError, match="got 1 images and 2 texts"):
        model.get_attn_maps(regions[:1], words, sents)


def test_images(model, home, tmp_path):
    assert model.process_img(str(home / "0.png")).shape == (1, 3, 56, 56)
    assert model.process_img(home / f"{number}.png" for number in range(2)).shape == (2, 3, 56, 56)
    pixels = model.process_img([home / "0.png", home / "1.png"], "cpu")
    assert pixels.dtype == torch.float32
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    with pytest.raises(ValueError, match=r"none\.png: no such file"):
        model.process_img([tmp_path / "none.png"])
    with pytest.raises(ValueError, match="no image"):
        model.process_img([])


def test_squares_that_lose_a_line(model, home, tmp_path):
    """The released rounding makes 63 of 64 lines of some squares; ours does not."""
    published = gloria.load_gloria(home / "pretrained" / "chexpert_resnet50.ckpt", "cpu", behavior="published")
    sides = [side for side in range(65, 400) if int(side * (64 / side)) == 63]
    for side, same in ((sides[0], False), (128, True)):
        picture = np.random.default_rng(0).integers(0, 255, (side, side)).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / "square.png")
        found = [one.process_img(tmp_path / "square.png") for one in (model, published)]
        assert torch.equal(*found) is same


def test_prompts(monkeypatch):
    first = gloria.generate_chexpert_class_prompts()
    assert first["Edema"][0] == " pulmonary edema "
    assert gloria.generate_chexpert_class_prompts() == first
    random.seed(6)
    assert gloria.generate_chexpert_class_prompts(seed=None) == first
    assert gloria.generate_chexpert_class_prompts(seed=None) != first
    for seed in (6, None):
        with pytest.raises(ValueError, match="Cardiomegaly has 15 prompts, 16"):
            gloria.generate_chexpert_class_prompts(16, seed=seed)
    assert list(gloria.constants.CHEXPERT_CLASS_PROMPTS["Pleural Effusion"]) == ["severity", "location", "subtype"]


def test_constants(monkeypatch, tmp_path):
    monkeypatch.setenv("CHEXPERT_DATA_DIR", str(tmp_path))
    assert tmp_path / "chexpert_8x200.csv" == gloria.constants.CHEXPERT_5x200
    with pytest.raises(
        FileNotFoundError, match=r'no such list; .*prepare\("chexpert_5x200".* builds it.*chexpert_8x200'
    ):
        pd.read_csv(gloria.constants.CHEXPERT_5x200)
    assert not gloria.constants.CHEXPERT_5x200.exists()
    (tmp_path / "chexpert_5x200.csv").write_text("Path\na.png\n")
    assert len(pd.read_csv(gloria.constants.CHEXPERT_5x200)) == 1
    assert tmp_path / "chexpert_5x200.csv" == gloria.constants.CHEXPERT_5x200
    assert tmp_path / "valid.csv" == gloria.constants.CHEXPERT_TEST_CSV
    assert len(gloria.constants.CHEXPERT_TASKS) == len(set(gloria.constants.CHEXPERT_TASKS)) == 14
    for name in dir(gloria.constants):
        getattr(gloria.constants, name)
    with pytest.raises(AttributeError, match="CHEXPERT_6x200"):
        _ = gloria.constants.CHEXPERT_6x200


def test_missing_weights_say_what_to_download(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GLORIA_PRETRAINED", raising=False)
    for load in (gloria.load_gloria, gloria.load_img_classification_model, gloria.load_img_segmentation_model):
        with pytest.raises(
            RuntimeError, match=r"pretrained.chexpert_resnet50\.ckpt.*https://stanfordmedicine\.box"
        ) as error:
            load()
        assert str(tmp_path.resolve() / "pretrained") in str(error.value)  # an absolute path
        with pytest.raises(RuntimeError, match=r"'RN50': no file .*RN50\. Available models: gloria_resnet50"):
            load("RN50")
    monkeypatch.setenv("GLORIA_PRETRAINED", str(tmp_path / "elsewhere"))
    with pytest.raises(RuntimeError, match=r"elsewhere.chexpert_resnet18\.ckpt"):
        gloria.load_gloria("gloria_resnet18")


def test_wrong_files_and_inputs(model, images, home, tmp_path):
    texts = model.process_text("edema")
    with pytest.raises(RuntimeError, match=r"use gloria_model\.process_text"):
        gloria.get_similarities(model, images, ["edema"])
    with pytest.raises(RuntimeError, match=r"use gloria_model\.process_img"):
        gloria.get_similarities(model, [home / "0.png"], texts)
    with pytest.raises(RuntimeError, match=r"got a tensor \(3, 56, 56\)"):
        gloria.get_similarities(model, images[0], texts)
    with pytest.raises(RuntimeError, match=r"'Edema' are not processed: use gloria_model\.process_class_prompts"):
        gloria.zero_shot_classification(model, images, {"Edema": ["edema"]})
    for wrong in (model.model, "gloria_resnet50"):
        with pytest.raises(RuntimeError, match=r"must be what load_gloria returns, got a (VisionLanguageModel|str)"):
            gloria.get_similarities(wrong, images, texts)
    for wrong in (torch.zeros(1, 1, 56, 56), torch.zeros(1, 3, 56, 56, dtype=torch.uint8), images.numpy()):
        with pytest.raises(RuntimeError, match=r"got a (tensor \(1, .*|ndarray): use gloria_model\.process_img"):
            gloria.get_similarities(model, wrong, texts)
    for wrong in (["edema"], "edema", images):
        with pytest.raises(RuntimeError, match=r"must be a dict, .*: use gloria_model\.process_class_prompts"):
            gloria.zero_shot_classification(model, images, wrong)
    for wrong in (None, 3, images, Image.open(home / "0.png"), [Image.open(home / "0.png")], np.zeros((4, 4))):
        with pytest.raises(TypeError, match=r"process_img takes the path .*, got a (NoneType|int|tensor|Png|ndarray)"):
            model.process_img(wrong)
    for wrong in (None, [1, 2], ["a", float("nan")], []):
        with pytest.raises(TypeError, match=r"process_text takes a text or a list of texts, got a (NoneType|list)"):
            model.process_text(wrong)
    with pytest.raises(TypeError, match="class_prompts must be a dict, class -> texts, got a list of str"):
        model.process_class_prompts(["edema"])
    with pytest.raises(RuntimeError, match="similarity type should be"):
        gloria.get_similarities(model, images, texts, "mean")
    with pytest.raises(ValueError, match="no class"):
        gloria.zero_shot_classification(model, images, {})
    encoder = {f"{name}": value for name, value in model.img_encoder.trunk.state_dict().items()}
    torch.save(encoder, tmp_path / "encoder.pth")
    with pytest.raises(RuntimeError, match="holds no published GLoRIA"):
        gloria.load_gloria(tmp_path / "encoder.pth")
    classifier = gloria.load_img_classification_model(tmp_path / "encoder.pth", "cpu", 2)
    assert classifier.img_encoder.resize_to is None
    assert gloria.load_img_segmentation_model(tmp_path / "encoder.pth", "cpu")(images[:1, :, :32, :32]).shape[1] == 1
    with pytest.raises(ValueError, match="behavior must be"):
        gloria.load_gloria(home / "pretrained" / "chexpert_resnet50.ckpt", behavior="legacy")


def test_tokenizer_is_asked_for_when_needed(home, tmp_path):
    config = json.loads(json.dumps(lightning_file.CONFIG))
    config["model"]["text"]["bert_type"] = str(tmp_path / "none")
    state = lightning_file.small_gloria(vocabulary=len(VOCABULARY))
    path = lightning_file.write(tmp_path / "a.ckpt", state, config)
    model = gloria.load_gloria(path, "cpu")
    assert model.process_img(home / "0.png").shape[0] == 1
    with pytest.raises(TokenizerError, match=r"none'.*tokenizer=<folder or vocab\.txt>"):
        model.process_text("edema")
    given = gloria.load_gloria(path, "cpu", tokenizer=home / "bert" / "vocab.txt")
    assert given.process_text("edema")["cap_lens"] == [1]
    assert given.ixtoword[2] == "[CLS]"


# ------------------------------------------------------------------------------------------- the released numbers


@pytest.mark.parametrize("path", golden_params("gloria"))
def test_zero_shot_from_text_gives_the_released_numbers(path, tmp_path):
    golden, layout = json.loads(path.read_text()), read_json("gloria", "layout")
    state = seeded.state_dict("gloria", golden["seed"])
    file = lightning_file.write(tmp_path / "chexpert_resnet50.ckpt", state, layout["config"]["value"])
    (tmp_path / "vocab.txt").write_text("\n".join(seeded.vocabulary()) + "\n")
    model = gloria.load_gloria(file, "cpu", tokenizer=tmp_path / "vocab.txt", behavior="published")
    file.unlink()
    expected = golden["zero_shot_text"]
    texts = model.process_class_prompts(expected["prompts"], "cpu")
    for name, processed in texts.items():
        assert processed["cap_lens"] == expected["cap_lens"][name]
        for row, ids in zip(processed["caption_ids"].tolist(), expected["ids"][name], strict=True):
            assert [value for value in row if value != seeded.PAD] == ids
    pixels = torch.from_numpy(seeded.images(4, 224, golden["seed"]))
    plain = gloria.zero_shot_classification(model, pixels, texts, normalise="none")
    table = gloria.zero_shot_classification(model, pixels, texts)
    assert list(table.columns) == expected["columns"]
    recommended = golden["tolerance"]["recommended"]
    best = np.stack([np.max(expected["both"][name], axis=1) for name in expected["columns"]], axis=1)
    for found, wanted, key in ((plain, best, "default"), (table, expected["values"], "zero_shot values (z-scores)")):
        limit = recommended.get(key, recommended["default"])
        allowed = limit["atol"] + limit["rtol"] * np.abs(wanted).max()
        np.testing.assert_allclose(found, wanted, rtol=0, atol=allowed)
