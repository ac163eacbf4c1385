"""GLoRIA's constants: where its data lay, the names of its tasks and columns, its prompts.

The original has its authors' folders in it. Here they come from the environment variables CHEXPERT_DATA_DIR,
PNEUMOTHORAX_DATA_DIR and PNEUMONIA_DATA_DIR when a constant is read, by default folders below `./data`.
"""

from __future__ import annotations

import os
from pathlib import Path

from gloria_core.data.manifest import COMPETITION_LABELS
from gloria_core.data.prompts import load_prompts

CHEXPERT_VALID_NUM = 5000
CHEXPERT_VIEW_COL = "Frontal/Lateral"
CHEXPERT_PATH_COL = "Path"
CHEXPERT_SPLIT_COL = "Split"
CHEXPERT_REPORT_COL = "Report Impression"
CHEXPERT_TASKS = [  # in the original's order, which is not quite the dataset's
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Lesion",
    "Lung Opacity",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
]
CHEXPERT_COMPETITION_TASKS = list(COMPETITION_LABELS)
CHEXPERT_UNCERTAIN_MAPPINGS = {
    "Atelectasis": 1,
    "Cardiomegaly": 0,
    "Consolidation": 0,
    "Edema": 1,
    "Pleural Effusion": 1,
}
PNEUMOTHORAX_IMG_SIZE = 1024
PNEUMOTHORAX_TRAIN_PCT = PNEUMONIA_TRAIN_PCT = 0.7

_FOLDERS = {
    "CHEXPERT_DATA_DIR": "data/CheXpert-v1.0",
    "PNEUMOTHORAX_DATA_DIR": "data/siim",
    "PNEUMONIA_DATA_DIR": "data/rsna_pneumonia",
}
_FILES = {  # constant -> its folder and name; the file of the 5x200 set is named 8x200 in the original
    "CHEXPERT_ORIGINAL_TRAIN_CSV": ("CHEXPERT_DATA_DIR", "train.csv"),
    "CHEXPERT_TRAIN_CSV": ("CHEXPERT_DATA_DIR", "train_split.csv"),
    "CHEXPERT_VALID_CSV": ("CHEXPERT_DATA_DIR", "valid_split.csv"),
    "CHEXPERT_TEST_CSV": ("CHEXPERT_DATA_DIR", "valid.csv"),
    "CHEXPERT_MASTER_CSV": ("CHEXPERT_DATA_DIR", "master_updated.csv"),
    "CHEXPERT_TRAIN_DIR": ("CHEXPERT_DATA_DIR", "train"),
    "CHEXPERT_TEST_DIR": ("CHEXPERT_DATA_DIR", "valid"),
    "CHEXPERT_5x200": ("CHEXPERT_DATA_DIR", "chexpert_8x200.csv"),
    "PNEUMOTHORAX_ORIGINAL_TRAIN_CSV": ("PNEUMOTHORAX_DATA_DIR", "train-rle.csv"),
    "PNEUMOTHORAX_TRAIN_CSV": ("PNEUMOTHORAX_DATA_DIR", "train.csv"),
    "PNEUMOTHORAX_VALID_CSV": ("PNEUMOTHORAX_DATA_DIR", "valid.csv"),
    "PNEUMOTHORAX_TEST_CSV": ("PNEUMOTHORAX_DATA_DIR", "test.csv"),
    "PNEUMOTHORAX_IMG_DIR": ("PNEUMOTHORAX_DATA_DIR", "dicom-images-train"),
    "PNEUMONIA_ORIGINAL_TRAIN_CSV": ("PNEUMONIA_DATA_DIR", "stage_2_train_labels.csv"),
    "PNEUMONIA_TRAIN_CSV": ("PNEUMONIA_DATA_DIR", "train.csv"),
    "PNEUMONIA_VALID_CSV": ("PNEUMONIA_DATA_DIR", "val.csv"),
    "PNEUMONIA_TEST_CSV": ("PNEUMONIA_DATA_DIR", "test.csv"),
    "PNEUMONIA_IMG_DIR": ("PNEUMONIA_DATA_DIR", "stage_2_train_images"),
}


def __getattr__(name: str) -> object:
    if name == "CHEXPERT_CLASS_PROMPTS":
        return load_prompts("chexpert_gloria").combinations
    if name in _FOLDERS:
        return Path(os.environ.get(name, _FOLDERS[name]))
    if name == "CHEXPERT_5x200":  # under its right name too, where that file is
        folder = Path(__getattr__("CHEXPERT_DATA_DIR"))
        right = folder / "chexpert_5x200.csv"
        return right if right.is_file() else folder / _FILES[name][1]
    if name in _FILES:
        folder, file = _FILES[name]
        return Path(__getattr__(folder)) / file
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_FOLDERS, *_FILES, "CHEXPERT_CLASS_PROMPTS"])
