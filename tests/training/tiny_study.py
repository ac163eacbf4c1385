"""A study small enough to train in a second: 28-pixel pictures, four kinds of report, the package's tiny encoders.

Not smaller: where a feature map has one pixel, oneDNN's bfloat16 weight gradient of a strided 3x3 convolution reads
memory that nobody wrote (torch 2.14, AVX512-BF16), and no two runs agree.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from gloria_core import objectives
from gloria_core.checkpoints.model import ModelConfig, VisionLanguageModel, build_model
from gloria_core.data.dataset import Collate, StudyDataset
from gloria_core.data.tokenizer import train_wordpiece
from gloria_core.training.config import PretrainConfig

REPORTS = (
    "No pneumothorax. Heart size is normal.",
    "Small left pleural effusion.",
    "Mild cardiomegaly. No edema. No effusion.",
    "Right basal atelectasis is unchanged.",
)


class Pictures:
    """Stands in for the image cache: each path has a bright spot that depends on its report, and noise of its own."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __getitem__(self, path: str) -> np.ndarray:
        number = int(path.split("_")[1])
        picture = np.random.default_rng(number).integers(0, 80, (self.size, self.size), dtype=np.uint8)
        top, left = divmod(number % 4, 2)
        half = self.size // 2
        picture[top * half : (top + 1) * half, left * half : (left + 1) * half] += 150
        return picture


def frame(studies: int, *, first: int = 0) -> pd.DataFrame:
    numbers = range(first, first + studies)
    return pd.DataFrame(
        {
            "study_id": [f"s{number}" for number in numbers],
            "patient_id": [f"p{number}" for number in numbers],
            "split": "train",
            "images": [f"image_{number}" for number in numbers],
            "views": "PA",
            "findings": "",
            "impression": [REPORTS[number % 4] for number in numbers],
            "label_rank": 0.5,
            "Edema": 0.0,
            "boxes": "",
            "masks": "",
        }
    )


def datasets(
    *, train: int = 24, valid: int = 10, size: int = 32, views: int = 1, texts: int = 1, sentence: str = "random"
) -> tuple[StudyDataset, StudyDataset]:
    pictures, common = Pictures(size), {"crop": size - 4, "labels": ["Edema"], "views": views, "texts": texts}
    return (
        StudyDataset(frame(train), pictures, sentence=sentence, augment=True, **common),
        StudyDataset(frame(valid, first=100), pictures, **common),
    )


TOKENIZER = train_wordpiece(REPORTS, vocab_size=80)


def model(objective: str = "gloria", *, seed: int = 0, dropout: float = 0.1) -> VisionLanguageModel:
    config = ModelConfig(
        objective=objective,
        image_encoder="resnet_tiny",
        text_encoder="bert_tiny",
        text_dropout=dropout,
        image_size=32,
        crop=28,
        seed=seed,
        # layer4 would have a single region, which nothing attends to more or less than to others
        **{"last_layers": 2, **objectives.objective_class(objective).encoders, "region_stage": "layer3"},
    )
    return build_model(config, TOKENIZER)


def collate() -> Collate:
    return Collate(TOKENIZER)


def config(**changes: object) -> PretrainConfig:
    settings = {
        "epochs": 2,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "precision": "float32",
        "checkpoint_steps": 0,
        **changes,
    }
    return PretrainConfig(**settings)
