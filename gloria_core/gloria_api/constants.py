"""GLoRIA's constants: where its data lay, the names of its tasks and columns, its prompts.

The original has its authors' folders in it. Here they come from the environment variables CHEXPERT_DATA_DIR,
PNEUMOTHORAX_DATA_DIR and PNEUMONIA_DATA_DIR when a constant is read, by default folders below `./data`.
"""

import errno
import json
import os
from pathlib import Path

from gloria_core.data.manifest import CHEXPERT_LABELS, COMPETITION_LABELS
from gloria_core.data.prompts import load_prompts

CHEXPERT_VALID_NUM = 5000
CHEXPERT_VIEW_COL = "Frontal/Lateral"
CHEXPERT_PATH_COL = "Path"
CHEXPERT_SPLIT_COL = "Split"
CHEXPERT_REPORT_COL = "Report Impression"
# the original's order: Lung Lesion before Lung Opacity
CHEXPERT_TASKS = [*CHEXPERT_LABELS[:3], "Lung Lesion", "Lung Opacity", *CHEXPERT_LABELS[5:]]
CHEXPERT_COMPETITION_TASKS = list(COMPETITION_LABELS)
CHEXPERT_UNCERTAIN_MAPPINGS = dict(zip(COMPETITION_LABELS, (1, 0, 0, 1, 1), strict=True))
PNEUMOTHORAX_IMG_SIZE = 1024
PNEUMOTHORAX_TRAIN_PCT = PNEUMONIA_TRAIN_PCT = 0.7

# The folders, and the files below the folder of the same prefix; the 5x200 set's file is named 8x200 in the original
_FOLDERS, _FILES = json.loads(Path(__file__).with_name("paths.json").read_text(encoding="utf-8")).values()


class _List(type(Path())):
    """The path of the 5x200 list, which is not public; to open it where it is not there says how it is made."""

    def __fspath__(self) -> str:
        if not os.path.lexists(str(self)):
            source = 'gloria_core.data.sources.prepare("chexpert_5x200", CHEXPERT_DATA_DIR)'
            told = f"no such list; {source} builds it from train.csv (its column images is Path below that folder)"
            raise FileNotFoundError(errno.ENOENT, told, str(self))
        return str(self)


def __getattr__(name: str) -> object:
    if name == "CHEXPERT_CLASS_PROMPTS":
        return load_prompts("chexpert_gloria").combinations
    if name in _FOLDERS:
        return Path(os.environ.get(name, _FOLDERS[name]))
    if name in _FILES:
        folder = __getattr__(f"{name.partition('_')[0]}_DATA_DIR")
        if name != "CHEXPERT_5x200":
            return folder / _FILES[name]
        correct = folder / "chexpert_5x200.csv"
        return _List(correct if correct.is_file() else folder / _FILES[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_FOLDERS, *_FILES, "CHEXPERT_CLASS_PROMPTS"])
