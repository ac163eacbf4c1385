"""A handful of made studies and an untrained tiny model: enough to check shapes, order, pairing and modes."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from gloria_core.checkpoints.model import ModelConfig, build_model
from gloria_core.data.cache import ImageCache
from gloria_core.data.tokenizer import train_wordpiece

SIZE = 64
IMPRESSIONS = [
    "Small left effusion.",
    "Large right opacity, no effusion.",
    "No acute finding.",
    "Left opacity is stable.",
]


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """The precision "auto" is float32 on every machine."""
    monkeypatch.setattr("gloria_core.training.precision.cpu_multiplies_bfloat16", bool)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """Eight studies of four patients: a bright square in noise, and its mask."""
    folder = tmp_path_factory.mktemp("studies")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    for study in range(8):
        height, width = (80, 60) if study % 2 else (64, 64)
        image = rng.integers(0, 120, (height, width), dtype=np.uint8)
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[20:40, 10:30] = 255
        Image.fromarray(np.where(mask > 0, 250, image).astype(np.uint8)).save(folder / f"images/{study}.png")
        Image.fromarray(mask).save(folder / f"masks/{study}.png")
    return folder


@pytest.fixture(scope="session")
def frame():
    rows = []
    for study in range(8):
        text = IMPRESSIONS[study % 4]
        masks = []
        for label, phrase in (("Pleural Effusion", "left effusion"), ("Lung Opacity", "right opacity")):
            if phrase in text:
                start = text.index(phrase)
                span = ["impression", start, start + len(phrase)]
                masks.append({"label": label, "image": 0, "path": f"masks/{study}.png", "spans": [span]})
        rows.append(
            {
                "study_id": f"s{study}",
                "patient_id": f"p{study // 2}",
                "split": "test",
                "images": f"images/{study}.png",
                "views": "PA",
                "findings": "",
                "impression": text,
                "label_rank": study / 8,
                "Pleural Effusion": float(study % 4 == 0),
                "Lung Opacity": float(study % 2),
                "boxes": json.dumps([{"label": "Lung Opacity", "image": 0, "xywh": [10, 20, 20, 20]}]),
                "masks": json.dumps(masks) if masks else "",
            }
        )
    return pd.DataFrame(rows, index=range(10, 18))


@pytest.fixture(scope="session")
def cache(frame, root, tmp_path_factory):
    return ImageCache.build(frame, root, size=SIZE, folder=tmp_path_factory.mktemp("cache"), workers=1, progress=False)


@pytest.fixture(scope="session")
def make_model():
    tokenizer = train_wordpiece(IMPRESSIONS * 3 + ["right effusion", "no opacity"], vocab_size=200)

    def make(objective="gloria", **options):
        torch.manual_seed(0)
        config = ModelConfig(objective=objective, image_encoder="resnet_tiny", image_size=SIZE, crop=56, **options)
        return build_model(config, tokenizer)

    return make


@pytest.fixture
def model(make_model):
    return make_model()
