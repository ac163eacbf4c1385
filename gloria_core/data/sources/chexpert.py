"""CheXpert (Irvin et al. 2019, https://arxiv.org/abs/1901.07031): 223,414 training and 234 validation radiographs.

Reads the original release, the small one (`CheXpert-v1.0-small`) and the four batch folders as they are unpacked.
There are labels and no reports; for reports use `chexpert_plus`. `impression` is empty: texts can be made from labels
by the prompt set "chexpert".
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from gloria_core.data.manifest import CHEXPERT_LABELS, ManifestError, OnError
from gloria_core.data.manifest_rules import Failure
from gloria_core.data.owner_folder import absent, check_options, existing, finish, patient_leaks, settle
from gloria_core.data.owner_studies import (
    UNITS,
    VIEW_RULES,
    Unit,
    ViewRule,
    group_studies,
    unseen_studies,
    wanted_views,
)
from gloria_core.data.sources.chexpert_tables import (
    PAPERS,
    Paper,
    find_tables,
    held_out,
    path_key,
    published_5x200,
    read_images,
    read_list,
)
from gloria_core.data.splits import assign_splits

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
