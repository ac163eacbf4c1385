"""Released whole models and bare image encoders through the notebooks, on one owner's folder.

The files are small ones in the published formats (`small_files`); a whole model is converted by the line of the README,
a bare encoder is where notebook 02 starts. Some prompts and reports have one word only.
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import small_files
import timm
import torch
import torchvision
from notebook_cells import CellError, run_notebook
from test_every_dataset import SMALL

from gloria_core import load_pretrained, save
from gloria_core.data.tokenizer import train_wordpiece
from gloria_core.phantom.raw_folders import write
from gloria_core.study.record import NotApplicable

NOTEBOOKS = ("03_attention_maps", "04_finetune_classification", "05_segmentation", "07_zero_shot", "08_retrieval")
# After it is converted, a file of gloria-Extended is GLoRIA's; the ConVIRT baseline has no word of a text.
CELLS = [(kind, notebook) for kind in small_files.MODELS for notebook in NOTEBOOKS if kind != "gloria_extended"]
CELLS += [("gloria_extended", "07_zero_shot")]
NO_MAPS = ("mgca_convirt", "03_attention_maps")
ENCODERS = {
    "one_channel": ("resnet18", lambda: torchvision.models.resnet18().state_dict()),  # as PRIOR's prior_resnet50.pt
    "timm": ("vit_tiny_patch16", lambda: timm.create_model("vit_tiny_patch16_224").state_dict()),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """COVID image-text pairs: reports, labels, masks. `01` is prepared; `words.json` holds prompts of one word."""
    folder = tmp_path_factory.mktemp("covid_pairs")
    write("covid_pairs", folder / "raw", n_studies=24, size=64)
    given = {"dataset": "covid_pairs", "data_root": str(folder / "raw"), "image_size": 256}
    frame = run_notebook("01_data_preparation", given, folder / "01")["data"].frame
    short = frame.index[(frame["split"] == "test") & (frame["masks"] == "")].append(frame.index[:2])[:2]
    frame.loc[short, ["findings", "impression"]] = [["", "Normal."], ["", "Edema"]][: len(short)]
    frame.to_csv(folder / "01" / "manifest.csv", index=False)
    classes = {name: {"pos": [name.split()[-1]], "neg": ["Normal."]} for name in ("Pneumonia", "COVID-19")}
    (folder / "words.json").write_text(json.dumps({"classes": classes}))
    return folder


@pytest.fixture(scope="module")
def released(prepared) -> dict[str, Path]:
    """Each kind of published file, as our own checkpoint."""
    frame = pd.read_csv(prepared / "01" / "manifest.csv", keep_default_na=False)
    tokenizer = train_wordpiece([*frame["impression"], *frame["findings"]])
    files = {}
    for kind in small_files.MODELS:
        path = small_files.write(kind, prepared / f"{kind}.ckpt", vocabulary=len(tokenizer))
        files[kind] = save(prepared / f"{kind}.pt", load_pretrained(path, tokenizer))
    return files


def run(notebook: str, prepared: Path, out: Path, **given: object) -> None:
    given = {"manifest": str(prepared / "01" / "manifest.csv"), **SMALL[notebook], **given}
    if notebook == "04_finetune_classification":
        given |= {"fractions": [1.0], "finetune_fractions": []}
    if notebook == "07_zero_shot":
        given["prompt_set"] = str(prepared / "words.json")
    run_notebook(notebook, given, out)
    assert len(pd.read_csv(out / "metrics.csv"))


@pytest.mark.parametrize(("kind", "notebook"), CELLS)
def test_released_models(prepared, released, kind, notebook):
    given = {"checkpoint": str(released[kind])}
    if notebook == "05_segmentation" and kind in ("mgca_vit", "cxr_clip_swin"):
        given["channels"] = [8] * 4  # SETR's decoder
    if (kind, notebook) == NO_MAPS:
        with pytest.raises(CellError) as caught:
            run(notebook, prepared, prepared / kind / notebook, **given)
        assert isinstance(caught.value.__cause__, NotApplicable)
        return
    run(notebook, prepared, prepared / kind / notebook, **given)


@pytest.mark.parametrize("kind", ENCODERS)
def test_bare_encoders(prepared, kind):
    name, state = ENCODERS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tensors = state()
    if kind == "one_channel":
        tensors["conv1.weight"] = tensors["conv1.weight"].sum(dim=1, keepdim=True)
    torch.save(tensors, prepared / f"{kind}.pth")
    out = prepared / kind
    given = {
        "image_encoder": name,
        "image_weights": str(prepared / f"{kind}.pth"),
        "crop": 64,
        "text_encoder": "phantom",
    }
    run("02_pretraining", prepared, out / "02", **given)
    given = {"checkpoint": str(out / "02" / "checkpoints" / "best.pt")}
    run("04_finetune_classification", prepared, out / "04", **given)
    run("05_segmentation", prepared, out / "05", **given, channels=[8] * (4 if kind == "timm" else 5))
    if kind != "timm":
        run("06_detection", prepared, out / "06", **given)
        return
    with pytest.raises(CellError, match="detectors need the stages of a convolutional encoder") as caught:
        run("06_detection", prepared, out / "06", **given)
    assert isinstance(caught.value.__cause__, NotApplicable)
