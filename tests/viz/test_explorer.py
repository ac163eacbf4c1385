"""The explorer's Python side: the scene holds the maps and scores of the grounding task, and the page is closed."""

import base64
import json
from dataclasses import replace

import numpy as np
import pytest

from gloria_core.checkpoints.model import ModelConfig, build_model
from gloria_core.data.dataset import save_dataset
from gloria_core.data.geometry import Geometry
from gloria_core.data.images import ImageError
from gloria_core.data.reports import ReportError
from gloria_core.data.sources import prepare
from gloria_core.data.tokenizer import train_wordpiece
from gloria_core.tasks.grounding import score_phrases
from gloria_core.tasks.maps import original_maps
from gloria_core.tasks.phrases import phrases_from_masks
from gloria_core.viz.explorer.form import study_page, with_own_study
from gloria_core.viz.explorer.page import export_page
from gloria_core.viz.explorer.scene import SceneMaker, formula, outlines, unit_map, units
from gloria_core.viz.explorer.subject import Subject, Text, Truth, own_subject, study_subject
from gloria_core.viz.explorer.widget import Explorer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explorer")
    frame = prepare("phantom", folder / "raw", {"n_patients": 8, "size": 64, "workers": 1, "progress": False})
    return save_dataset(folder, frame, name="phantom", root=folder / "raw", size=64)


@pytest.fixture(scope="module")
def make_model(data):
    texts = [*data.frame["impression"], *data.frame["findings"]]
    tokenizer = train_wordpiece([text for text in texts if text], vocab_size=300)

    def make(objective="gloria", seed=0, **options):
        options = {"image_encoder": "resnet_tiny", "image_size": 64, "crop": 56, "seed": seed} | options
        return build_model(ModelConfig(objective=objective, **options), tokenizer).eval()

    return make


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.fixture(scope="module")
def study(data):
    """A study whose masks name words that exclude punctuation, and a side."""
    phrases = phrases_from_masks(data.frame.reset_index(drop=True))
    row = next(p.row for p in phrases if "left" in p.words or "right" in p.words)
    return str(data.frame["study_id"].iloc[row])


def grids_of(maker, key):
    return np.frombuffer(maker.maps[key], "<f4").reshape(maker.shapes[key])


def test_scene_is_json_and_complete(model, data, study):
    maker = SceneMaker({"a": model, "b": model}, study_subject(data, study))
    scene = maker.scene()
    assert json.loads(json.dumps(scene, allow_nan=False)) == scene
    assert {key.split("/")[0] for key in maker.maps} == {"0", "1"}
    for text in scene["texts"]:
        assert all(text["text"][s:e].strip() == text["text"][s:e] != "" for s, e, _ in text["words"])
        assert not any(text["text"][s:e] in ".,;" for s, e, _ in text["words"])
        for side, described in enumerate(scene["models"]):
            shape = scene["shapes"][f"{side}/{text['id']}"]
            assert shape[:2] == [len(described["kinds"]), len(text["words"])]
            assert len(maker.maps[f"{side}/{text['id']}"]) == 4 * np.prod(shape)
    assert [kind["signed"] for kind in scene["models"][0]["kinds"]] == [False, False, True]
    assert all(kind["formula"].startswith("<svg") for kind in scene["models"][0]["kinds"])


def test_a_study_without_a_report_shows_the_given_text(model, data, study):
    silent = replace(data, frame=data.frame.assign(findings="", impression=""))
    with pytest.raises(ReportError, match="no text"):
        study_subject(silent, study)
    assert [text.text for text in study_subject(silent, study, "Edema.").texts] == ["Edema."]
    assert "Edema." not in [text.text for text in study_subject(data, study, "Edema.").texts]
    assert Explorer(model, data=silent, study=study, report="Edema.").scene["texts"][0]["text"] == "Edema."


def test_maps_and_scores_are_those_of_grounding(model, data, study, monkeypatch):
    monkeypatch.setattr("gloria_core.training.precision.cpu_multiplies_bfloat16", bool)
    maker = SceneMaker({"gloria": model}, study_subject(data, study))
    frame = data.frame[data.frame["study_id"] == study].reset_index(drop=True)
    phrases = phrases_from_masks(frame)
    rows = score_phrases(model, frame, data.cache, data.root, phrases)
    drawn = original_maps(model, frame, data.cache, phrases)
    text = next(entry for entry in maker.texts if entry["id"] == "impression")
    side, grids = maker.encoded["gloria"], grids_of(maker, "0/impression")
    assert phrases
    for phrase, by_kind in zip(phrases, drawn, strict=True):
        number = next(i for i, p in enumerate(text["phrases"]) if _span(text, p) == (phrase.spans[0][0], phrase.words))
        chosen = text["phrases"][number]
        place = len(text["words"]) + text["sentences"] + number
        assert units(text)[place] == chosen["words"]
        for kind, name in enumerate(side.kinds):
            grid = unit_map(grids, kind, chosen["words"])
            np.testing.assert_allclose(side.geometry.map_to_original(grid, crop=56), by_kind[name], atol=1e-5)
            row = rows[(rows["phrase"] == phrase.words) & (rows["kind"] == name) & (rows["control"] == "")].iloc[0]
            contrast, hit = maker.scores["0/impression"][kind][chosen["truth"]][place]
            assert contrast == pytest.approx(row["cnr"], abs=2e-3)
            assert hit == row["pointing_game"]


def _span(text, phrase):
    first, last = text["words"][phrase["words"][0]], text["words"][phrase["words"][-1]]
    return first[0], text["text"][first[0] : last[1]]


def test_swapped_text_is_encoded_anew(model, data, study):
    maker = SceneMaker({"gloria": model}, study_subject(data, study))
    pairs = [(entry, entry["swap"]) for entry in maker.texts if entry["swap"]]
    assert pairs
    for entry, name in pairs:
        other = next(item for item in maker.texts if item["id"] == name)
        words = [[item["text"][s:e].lower() for s, e, _ in item["words"]] for item in (entry, other)]
        exchange = {"left": "right", "right": "left"}
        assert [exchange.get(word, word) for word in words[0]] == words[1] != words[0]
        assert other["hidden"] and other["phrases"] == entry["phrases"]
        assert np.abs(grids_of(maker, f"0/{entry['id']}") - grids_of(maker, f"0/{name}")).max() > 1e-6


def test_frame_is_the_inverse_of_the_preprocessing(model):
    image = np.full((90, 60), 100, np.uint8)
    maker = SceneMaker({"m": model}, Subject(image, (Text("t", "T", "small effusion"),)))
    x, y, width, height = maker.scene()["models"][0]["frame"]
    # 90 x 60 in a square of 64: scale 64/90, 10.5 columns of padding (10 left), a crop of 56 that begins at 4
    np.testing.assert_allclose([x, y], [(4 - 10) / (43 / 60), 4 * 90 / 64], rtol=1e-6)
    np.testing.assert_allclose([width, height], [56 / (43 / 60), 56 * 90 / 64], rtol=1e-6)
    geometry = Geometry.fit(90, 60, 64)
    seen = ~np.isnan(geometry.map_to_original(np.ones((2, 2)), crop=56))
    rows, columns = np.mgrid[:90, :60] + 0.5
    np.testing.assert_array_equal(seen, (columns >= x) & (columns < x + width) & (rows >= y) & (rows < y + height))


def test_words_beyond_the_limit_have_no_map(make_model):
    short = make_model(max_tokens=6)
    text = "No pleural effusion . Small left effusion and more words than fit ."
    subject = Subject(np.zeros((64, 64), np.uint8), (Text("t", "T", text),))
    maker = SceneMaker({"a": make_model(), "short": short}, subject)
    assert not np.isnan(grids_of(maker, "0/t")).any()
    missing = np.isnan(grids_of(maker, "1/t")).all(axis=(0, 2, 3))
    assert not missing[:2].any() and missing[-3:].all()
    only = SceneMaker({"short": short}, subject)
    assert 0 < only.texts[0]["end"] < len(text)


@pytest.mark.parametrize("objective, unit, norm", [("mgca", "word", "softmax"), ("prior", "sentence", "sigmoid")])
def test_rows_are_said(make_model, data, study, objective, unit, norm):
    maker = SceneMaker({objective: make_model(objective)}, study_subject(data, study))
    kinds = {kind["name"]: kind for kind in maker.scene()["models"][0]["kinds"]}
    assert kinds["attention"]["unit"] == unit
    assert unit in kinds["attention"]["rows"] and norm in kinds["attention"]["rows"]


def test_truth_outside_the_crop_has_no_score(model):
    mask = np.zeros((64, 64), bool)
    mask[:2] = True
    subject = Subject(np.zeros((64, 64), np.uint8), (Text("t", "T", "effusion"),), (Truth("Edge", mask),))
    maker = SceneMaker({"m": model}, subject)
    assert maker.scores["0/t"][0][0][0] == [None, None]


def test_outlines_lie_on_the_mask():
    mask = np.zeros((10, 12), bool)
    mask[3:6, 0:4] = True
    (line,) = outlines(mask)
    xy = np.array(line).reshape(-1, 2)
    assert (xy[0] == xy[-1]).all()
    np.testing.assert_allclose([xy.min(axis=0), xy.max(axis=0)], [[0, 3], [4, 6]])
    assert outlines(np.zeros((4, 4), bool)) == []


def test_formulas_of_all_objectives_can_be_drawn():
    from gloria_core import objectives

    for name in objectives.available():
        latex = objectives.objective_class(name).attention_formula
        assert not latex or "NaN" not in formula(latex)
    with pytest.raises(ValueError):
        formula(r"\nosuchthing{x}")


def test_widget_sends_one_message_a_change(model, data, study):
    explorer = Explorer(model, data=data, study=study)
    assert explorer.scene["start"]["type"] == "phrase"
    before, changed = explorer.revision, []
    explorer.observe(lambda change: changed.append(change["name"]))
    explorer.add_phrase("large right effusion")
    assert explorer.revision == before + 1 and sorted(changed) == ["maps", "revision", "scene"]
    own = explorer.scene["texts"][-2]
    assert own["own"] and own["swap"] == explorer.scene["texts"][-1]["id"]
    assert explorer.maps[f"0/{own['id']}"] != explorer.maps[f"0/{own['swap']}"]
    with pytest.raises(ReportError):
        explorer.add_phrase(" ")


def test_first_word_can_be_asked(model, data, study):
    text = data.frame[data.frame["study_id"] == study]["impression"].iloc[0]
    side = "left" if "left" in text.lower().split() else "right"
    scene = Explorer({"x": model}, data=data, study=study, word=side.upper()).scene
    start, entry = scene["start"], next(entry for entry in scene["texts"] if entry["id"] == "impression")
    first, last, _ = entry["words"][start["index"]]
    assert (start["text"], start["type"], entry["text"][first:last].lower()) == ("impression", "word", side)


def test_faults_are_said_on_the_page(model, data, study, monkeypatch):
    explorer, said = Explorer(model, data=data, study=study), []
    monkeypatch.setattr(explorer, "send", lambda content, buffers=None: said.append(content))
    explorer._on_message(None, {"type": "study", "id": "nobody"}, [])
    assert said[-1]["type"] == "error" and "nobody" in said[-1]["text"]
    explorer._on_message(None, {"type": "export"}, [])
    assert said[-1]["name"] == f"explorer_{study}.html" and said[-1]["html"] == explorer.page()


def test_static_figure_where_no_widget_runs(model, data, study):
    bundle, _ = Explorer(model, data=data, study=study)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert study in bundle["text/plain"]


def test_own_image_and_report(model, tmp_path):
    from PIL import Image

    path = tmp_path / "mine.png"
    Image.fromarray(np.arange(64 * 48, dtype=np.uint8).reshape(64, 48)).save(path)
    report = "FINDINGS: Clear lungs. IMPRESSION: No effusion."
    explorer = Explorer(model, image=path, report=report)
    assert [text["name"] for text in explorer.scene["texts"]] == ["Findings", "Impression"]
    assert explorer.scene["truths"] == [] and explorer.scene["title"] == "mine.png"
    assert explorer.figure() is not None
    explorer.show_own(path.read_bytes(), "Small left effusion.", name="upload.png")
    assert explorer.scene["title"] == "upload.png"
    with pytest.raises(ReportError):
        explorer.show_own(path, "  ")
    with pytest.raises(ImageError):
        explorer.show_own(b"nothing", "text", name="bad.png")
    with pytest.raises(ValueError, match="one of them"):
        Explorer(model)
    box = with_own_study(explorer)
    row, said = box.children[1].children[0].children
    row.children[-1].click()
    assert "Choose a file" in said.value


def test_page_is_closed_and_safe(model):
    evil = "No </script><script>alert(1)</script> effusion & <b>left</b>"
    maker = SceneMaker({"m": model}, own_subject(np.zeros((64, 64), np.uint8), evil, name="</title>"))
    page = export_page(maker.scene(), maker.maps)
    assert page.count("</script>") == 3 and "<b>left" not in page and "</title></title>" not in page
    assert "default-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")


def test_model_without_maps_is_refused(model, data, study):
    with pytest.raises(ValueError, match="at least one"):
        SceneMaker({}, study_subject(data, study))
    with pytest.raises(KeyError, match="not in the manifest"):
        study_subject(data, "nobody")


def test_page_without_a_study_says_what_to_do(tmp_path):
    assert "make study" in study_page(tmp_path).value
