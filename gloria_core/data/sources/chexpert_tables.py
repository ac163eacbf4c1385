"""The tables of CheXpert (Irvin et al. 2019, https://arxiv.org/abs/1901.07031), read and checked; its 5x200 set.

`train.csv` and `valid.csv` have an image a row; blank labels are unknown, -1.0 uncertain. The 5x200 rule is that of the
released code of GLoRIA (`preprocess_datasets.py`) and MGCA (`chexpert.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from gloria_core.data.manifest import CHEXPERT_LABELS, COMPETITION_LABELS, ManifestError
from gloria_core.data.owner_folder import check_cells, check_unique, read_table, require
from gloria_core.data.splits import exclusive_test_set

WHERE = "from https://stanfordaimi.azurewebsites.net (CheXpert; log in, accept the agreement)"
TRAIN = "train.csv|CheXpert-v1.0*/train.csv|*batch 1*/train.csv"
VALID = "valid.csv|CheXpert-v1.0*/valid.csv|*batch 1*/valid.csv"
_COLUMNS = {"Path": "path", "Sex": "sex", "Age": "age", "Frontal/Lateral": "side", "AP/PA": "projection"}
_LABEL = {"": np.nan, "1.0": 1.0, "0.0": 0.0, "-1.0": -1.0, "1": 1.0, "0": 0.0, "-1": -1.0}
_PATH = r"^(?:.+/)?((?:train|valid|test)/(patient\d+)/(study\d+)/(view\d+_[a-z]+)\.(?:jpg|png))$"

Paper = Literal["gloria", "mgca", "cxr_clip"]
PAPERS = ("gloria", "mgca", "cxr_clip")


def find_tables(root: Path, *, valid: bool = True) -> dict[str, Path]:
    """The paths of "train" and "valid"; ManifestError that says what is missing and where it comes from."""
    needs = {TRAIN: f"the labels of the 223,414 training images, {WHERE}"}
    if valid:
        needs[VALID] = f"the labels of the 234 validation images, {WHERE}"
    found = require(root, needs, "CheXpert")
    return {"train": found[TRAIN]} | ({"valid": found[VALID]} if valid else {})


def read_images(path: Path) -> pd.DataFrame:
    """One row an image, index + 2 its row in the file.

    Columns: path (as written), file (from train/ or valid/ on), study, patient, image_id, view, sex, age, the labels.
    """
    table = read_table(path, {**_COLUMNS, **{name: name for name in CHEXPERT_LABELS}})
    check_unique(path, "Path", table["path"])
    parts = table["path"].str.extract(_PATH)
    remedy = "a path is <folder>/train/patient00001/study1/view1_frontal.jpg"
    check_cells(path, "Path", table["path"], parts[0].notna() & ~table["path"].str.contains("..", regex=False), remedy)
    table["file"], table["patient"] = parts[0], parts[1]
    table["study"] = parts[1] + "_" + parts[2]
    table["image_id"] = table["study"] + "_" + parts[3]
    table["view"] = views_of(path, table["side"], table["projection"], names=("Frontal/Lateral", "AP/PA"))
    for name in CHEXPERT_LABELS:
        check_cells(path, name, table[name], table[name].isin(list(_LABEL)), "a label is 1.0, 0.0, -1.0 or blank")
        table[name] = table[name].map(_LABEL).astype(float)
    return table


def views_of(path: Path, side: pd.Series, projection: pd.Series, *, names: tuple[str, str]) -> pd.Series:
    """Manifest views; 17 frontal images of the training table have the projection LL or RL and count as FRONTAL."""
    check_cells(path, names[0], side, side.isin(["Frontal", "Lateral"]), "it is Frontal or Lateral")
    good = projection.isin(["AP", "PA", "LL", "RL", ""])
    check_cells(path, names[1], projection, good, "a projection is AP, PA, LL, RL or blank")
    frontal = projection.where(projection.isin(["AP", "PA"]), "FRONTAL")
    return frontal.where(side == "Frontal", "LATERAL")


def published_5x200(table: pd.DataFrame, paper: Paper) -> tuple[pd.Series, np.random.RandomState]:
    """Image paths, class by class, of the 5x200 set as the released code draws it, and the generator it leaves.

    The draw follows the code, not the files of the authors, which are private or differ (GLoRIA's holds 966 patients,
    this draw 979): where you have a published list, give it.

    gloria: NumPy's global generator, seeded with 6 when its package is imported, draws all five classes in turn (and
    the CXR-CLIP authors took GLoRIA's file); mgca: `random_state=0` for each class, then `np.random.seed(0)`.
    An image that has one competition finding alone is in one class, so no image is drawn twice.
    """
    frontal = table[table["side"] == "Frontal"]
    findings = [name for name in CHEXPERT_LABELS if name != "No Finding"]
    present = (frontal[findings] == 1).sum(axis=1)
    unsure = (frontal[findings] == -1).any(axis=1)
    random = np.random.RandomState(0 if paper == "mgca" else 6)
    drawn = []
    for name in COMPETITION_LABELS:
        pool = frontal[(frontal[name] == 1) & (present == 1) & ~unsure]
        if len(pool) < 200:
            raise ManifestError(f"{name}: {len(pool)} frontal images have this finding alone, the 5x200 set needs 200")
        drawn.append(pool["path"].sample(n=200, random_state=0 if paper == "mgca" else random))
    return pd.concat(drawn), random


def ruled_5x200(table: pd.DataFrame, *, seed: int, per_class: int = 200) -> pd.DataFrame:
    """Rows of `table`: `per_class` studies a finding, one frontal image each, by our rule and seed (any row order)."""
    frontal = table[table["side"] == "Frontal"].sort_values("path", kind="stable").drop_duplicates("study")
    labels = frontal[list(CHEXPERT_LABELS)].assign(study_id=frontal["study"])
    try:
        kept = exclusive_test_set(labels, per_class=per_class, seed=seed)
    except ValueError as error:
        raise ManifestError(f"CheXpert 5x200: {error}") from error
    return frontal.loc[kept.index].sort_values("image_id")


def read_list(path: Path) -> pd.DataFrame:
    """A given 5x200 list: path, the five labels where it has them (NaN otherwise), impression where it has it.

    A csv with the column Path (GLoRIA's chexpert_5x200.csv: labels, `Report Impression`), or PRIOR's
    chexpert_5x200.json: {row: {image_path, label: [five 0/1]}}. index + 2 is the row of a csv.
    """
    path = Path(path)
    if not path.is_file():
        raise ManifestError(f"{path}: no such list; give a csv with the column Path, or PRIOR's chexpert_5x200.json")
    if path.suffix != ".json":
        optional = {"Report Impression": "impression", **{name: name for name in COMPETITION_LABELS}}
        table = read_table(path, {"Path": "path"}, optional=optional)
        for name in COMPETITION_LABELS:
            check_cells(path, name, table[name], table[name].isin(list(_LABEL)), "a label is 1.0, 0.0 or blank")
            table[name] = table[name].map(_LABEL).astype(float)
    else:
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            rows = [[item["image_path"], *(float(value) for value in item["label"])] for item in entries.values()]
            table = pd.DataFrame(rows, columns=["path", *COMPETITION_LABELS]).assign(impression="")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ManifestError(
                f"{path}: not PRIOR's list ({error!r}); it is {{row: {{image_path, label: [five 0/1]}}}}"
            ) from error
    check_unique(path, "Path", table["path"])
    table["key"] = path_key(path, table["path"])
    return table


def path_key(path: Path, values: pd.Series) -> pd.Series:
    """train/patient.../view1_frontal of each path, whatever stands before it and whatever suffix it has."""
    parts = values.str.extract(_PATH)[0]
    check_cells(path, "Path", values, parts.notna(), "a path ends in train/patient00001/study1/view1_frontal.jpg")
    return parts.str.rsplit(".", n=1).str[0]


def held_out(table: pd.DataFrame, hold_out: str | Path, *, seed: int) -> set[str]:
    """Patients that may not be trained on: those of the 5x200 set by our rule ("5x200"), or of a list at a path."""
    if str(hold_out) == "":
        return set()
    if str(hold_out) == "5x200":
        return set(ruled_5x200(table, seed=seed)["patient"])
    return set(read_list(Path(hold_out))["key"].str.split("/").str[1])


def read_reports(path: Path) -> dict[str, str]:
    """Impressions by path key, from a CheXpert Plus table (path_to_image, section_impression)."""
    table = read_table(path, {"path_to_image": "path", "section_impression": "impression"})
    return dict(zip(path_key(path, table["path"]), table["impression"].str.strip(), strict=True))
