"""CheXpert (Irvin et al. 2019, https://arxiv.org/abs/1901.07031): 223,414 training and 234 validation radiographs.

Reads the original release, the small one (`CheXpert-v1.0-small`) and the four batch folders as they are unpacked.
There are labels and no reports; for reports use `chexpert_plus`. `impression` is empty: texts can be made from labels
by the prompt set "chexpert".

The tables of CheXpert (Irvin et al. 2019, https://arxiv.org/abs/1901.07031), read and checked; its 5x200 set.

`train.csv` and `valid.csv` have an image a row; blank labels are unknown, -1.0 uncertain. The 5x200 rule is that of the
released code of GLoRIA (`preprocess_datasets.py`) and MGCA (`chexpert.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from gloria_core.data.manifest import CHEXPERT_LABELS, COMPETITION_LABELS, Failure, ManifestError, OnError
from gloria_core.data.raw_folder import (
    UNITS,
    VIEW_RULES,
    Unit,
    ViewRule,
    absent,
    check_cells,
    check_options,
    check_unique,
    existing,
    finish,
    group_studies,
    patient_leaks,
    read_table,
    require,
    settle,
    unseen_studies,
    wanted_views,
)
from gloria_core.data.splits import assign_splits, exclusive_test_set

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


VALID_SHARE = 0.02
"""Share of the training table that validates by default; near the 5,000 images of GLoRIA and MGCA."""
PUBLISHED_VALID = 5000
_ALLOWED = {
    "split_rule": ("patient", "published"),
    "paper": PAPERS,
    "unit": UNITS,
    "views": VIEW_RULES,
    "on_error": ("raise", "exclude"),
}


def prepare(
    root: Path | str,
    *,
    split_rule: Literal["patient", "published"] = "patient",
    paper: Paper = "gloria",
    unit: Unit = "study",
    views: ViewRule = "frontal",
    hold_out: str | Path = "5x200",
    seed: int = 0,
    on_error: OnError = "raise",
    check_images: bool = True,
) -> pd.DataFrame:
    """The checked manifest of the folder that holds train.csv, valid.csv, train/ and valid/.

    split_rule: "patient": the official valid.csv is test; 2 % of the training patients, stratified, are valid.
        "published": the rule of `paper`, a study an image. gloria and mgca: the 5x200 images left out, 5,000 random
        images valid, the rest train, valid.csv test. They part images and not patients: `attrs["leaks"]` counts that
        (and what the released code's mix-up of positions and labels did besides, which is not rebuilt); `patient_id`
        is then the image, the patient is in `meta_patient`. cxr_clip: all patients of the 5x200 set left out of
        train, valid.csv is valid, the 5x200 images are test.
    unit: "study" joins the images of a study; "image" makes each image a study.
    views: "frontal", "AP", "PA", "lateral" or "all"; studies without such an image are listed as excluded.
    hold_out: the 5x200 set: "5x200" (the one that `chexpert_5x200` builds with the same seed; with
        split_rule="published", the one that the paper's code draws), or the path of a list (csv with Path, PRIOR's
        json). With split_rule="patient" its patients are left out of train and valid; "" keeps everybody.
    on_error: "exclude" leaves out images that are not there, and lists them in `attrs["excluded"]`.
    check_images: False skips the look at the image files (when only the tables are there).
    Raises ManifestError naming file, row, column and remedy; ValueError for an unknown option value.
    """
    root = Path(root)
    given = {"split_rule": split_rule, "paper": paper, "unit": unit, "views": views, "on_error": on_error}
    check_options(_ALLOWED, given)
    tables = find_tables(root)
    train, valid = (read_images(tables[name]) for name in ("train", "valid"))
    if split_rule == "published":
        parts, left, leaks = published_parts(train, valid, paper, hold_out)
        unit = "image"
    else:
        gone = train["patient"].isin(held_out(train, hold_out, seed=seed))
        left = _left_out(train, gone, "its patient is held out for the 5x200 test set")
        parts, leaks = {"train": train[~gone], "test": valid}, {}
    frame, failures = _gather(parts, tables, root, unit=unit, views=views, on_error=on_error, check=check_images)
    left += failures
    if split_rule == "patient":
        frame = _with_valid(frame, seed=seed)
        leaks = patient_leaks(frame["patient_id"], frame["split"])
    elif paper != "cxr_clip":
        leaks = patient_leaks(frame["patient_id"], frame["split"]) | leaks
        frame = frame.assign(meta_patient=frame["patient_id"], patient_id=frame["study_id"])
    return finish(frame, source=f"manifest of {root}", seed=seed, failures=left, leaks=leaks)


def _gather(
    parts: dict[str, pd.DataFrame],
    tables: dict[str, Path],
    root: Path,
    *,
    unit: Unit,
    views: ViewRule,
    on_error: OnError,
    check: bool,
) -> tuple[pd.DataFrame, list[Failure]]:
    """The studies of all splits with their images, and what is left out for a missing file or view."""
    frames, left = [], []
    for split, table in parts.items():
        path = tables["valid" if table["file"].str.startswith("valid/").all() else "train"]
        table, failures = _with_images(table, tables["train"], root, check=check)
        settle(failures, source=str(path), on_error=on_error, left=len(table))
        kept = wanted_views(table["view"], views)
        left += failures + unseen_studies(table, kept, column="path", reason=f"no image of view {views!r}")
        frames.append(_frame(table[kept], unit).assign(split=split))
    frame = pd.concat(frames, ignore_index=True)
    if frame.empty:
        raise ManifestError(f"{tables['train']}: no image of view {views!r}; use views='all'")
    return frame, left


def _with_valid(frame: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """The frame with a share of the training patients in valid."""
    learn = frame[frame["split"] == "train"]
    cut = assign_splits(learn, fractions={"train": 1 - VALID_SHARE, "valid": VALID_SHARE}, seed=seed)
    frame.loc[learn.index, "split"] = cut["split"]
    return frame


def published_parts(
    train: pd.DataFrame, official: pd.DataFrame, paper: Paper, hold_out: str | Path
) -> tuple[dict[str, pd.DataFrame], list[Failure], dict[str, int]]:
    """The tables of the splits, what is left out, and the counted leaks beyond shared patients of the splits."""
    if str(hold_out) in ("", "5x200"):
        paths, random = published_5x200(train, paper)
        chosen = train["path"].isin(paths)
    else:
        random = np.random.RandomState(6)
        chosen = path_key(Path(hold_out), train["path"]).isin(read_list(Path(hold_out))["key"])
    if paper == "cxr_clip":
        patients = train["patient"].isin(set(train.loc[chosen, "patient"]))
        left = _left_out(train, patients & ~chosen, "its patient is in the 5x200 test set")
        return {"train": train[~patients], "valid": official, "test": train[chosen]}, left, {}
    rest = train[~chosen]
    if len(rest) <= PUBLISHED_VALID:
        raise ManifestError(
            f"the training table has {len(train)} images; the published rule draws {PUBLISHED_VALID} of them for "
            "validation: use the whole table, or split_rule='patient'"
        )
    if paper == "mgca":
        random = np.random.RandomState(0)
    positions = random.choice(len(rest), PUBLISHED_VALID, replace=False)
    valid = rest.iloc[np.sort(positions)]
    learn = rest.drop(valid.index)
    # the released code takes valid by position and removes from train by row label
    removed = rest.index.isin(positions)
    still = ~valid.index.isin(positions)
    leaks = {
        "patients of the 5x200 set in train": len(set(train.loc[chosen, "patient"]) & set(learn["patient"])),
        "validation images still in train, released code (not rebuilt)": int(still.sum()),
        "images in neither, released code (not rebuilt)": int((removed & ~rest.index.isin(valid.index)).sum()),
    }
    left = _left_out(train, chosen, "in the 5x200 test set")
    return {"train": learn, "valid": valid, "test": official}, left, leaks


def _left_out(table: pd.DataFrame, gone: pd.Series, reason: str) -> list[Failure]:
    rows = table[gone]
    return [
        Failure(name, int(index) + 2, "Path", repr(path), reason)
        for index, name, path in zip(rows.index, rows["image_id"], rows["path"], strict=True)
    ]


def _with_images(
    table: pd.DataFrame, train_csv: Path, root: Path, *, check: bool
) -> tuple[pd.DataFrame, list[Failure]]:
    """The rows whose image is there, with its path below the root in `image`, and a failure for each of the others."""
    place = locate(root, train_csv.parent)
    table = table.assign(image=place(table))
    if not check:
        return table, []
    found = existing(root, table["image"].tolist())
    there = table["image"].isin(found)
    failures = absent(table, there, key="image_id", value="path", column="Path", reason="listed, but no such file")
    return table[there], failures


def locate(root: Path, folder: Path) -> Callable[[pd.DataFrame], pd.Series]:
    """A function that gives the path below `root` of each row (patient, file: "train/patient.../view1_frontal.jpg").

    Images lie in `folder`/train, or in the folders "... batch 2 (train 1)" ... of the original release.
    """
    base = folder.relative_to(root).as_posix()
    prefix = "" if base == "." else f"{base}/"
    home: dict[str, str] = {}
    batches = [path for path in sorted(root.glob("*batch*(train*)")) if path.is_dir()]
    for batch in batches:
        with os.scandir(batch) as entries:
            home |= {entry.name: f"{batch.name}/" for entry in entries}

    def place(table: pd.DataFrame) -> pd.Series:
        paths = prefix + table["file"]
        if not home:
            return paths
        batch = table["patient"].map(home)
        inside = batch + table["file"].str.split("/", n=1).str[1]
        return paths.where(batch.isna() | ~table["file"].str.startswith("train/"), inside)

    return place


def _frame(table: pd.DataFrame, unit: Unit) -> pd.DataFrame:
    """The manifest without ranks; the images grouped by study, or each on its own."""
    images = pd.DataFrame(
        {
            "study": table["study"] if unit == "study" else table["image_id"],
            "patient": table["patient"],
            "image": table["image"],
            "view": table["view"],
            **{name: table[name] for name in CHEXPERT_LABELS},
            "is_ap_view": table["view"].map({"AP": 1.0, "PA": 0.0}).astype(float),
            "is_male": table["sex"].map({"Male": 1.0, "Female": 0.0}).astype(float),
            "meta_age": table["age"],
            "meta_sex": table["sex"],
        }
    )
    return group_studies(images, keep=[*CHEXPERT_LABELS, "is_ap_view", "is_male", "meta_age", "meta_sex"])
