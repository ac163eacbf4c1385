"""CheXpert (Irvin et al. 2019, https://arxiv.org/abs/1901.07031): 223,414 training and 234 validation radiographs.

Reads the original release, the small one (`CheXpert-v1.0-small`) and the four batch folders as they are unpacked.
There are labels and no reports; for reports use `chexpert_plus`. `impression` is empty: texts can be made from labels
by the prompt set "chexpert".

`train.csv` and `valid.csv` have an image a row; blank labels are unknown, -1.0 uncertain. The 5x200 rule is that of the
released code of GLoRIA (`preprocess_datasets.py`) and MGCA (`chexpert.py`).
"""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from gloria_core.data import raw_folder as raw
from gloria_core.data.manifest import CHEXPERT_LABELS, COMPETITION_LABELS, ManifestError, OnError
from gloria_core.data.splits import count_leaks, exclusive_test_set

WHERE = "from https://stanfordaimi.azurewebsites.net (CheXpert; log in, accept the agreement)"
TRAIN = "train.csv|CheXpert-v1.0*/train.csv|*batch 1*/train.csv"
VALID = "valid.csv|CheXpert-v1.0*/valid.csv|*batch 1*/valid.csv"
NEEDS = {
    TRAIN: f"the labels of the 223,414 training images, {WHERE}",
    VALID: f"the labels of the 234 validation images, {WHERE}",
}
REMEDY = "a path ends in train/patient00001/study1/view1_frontal.jpg"
SIDE = raw.Column("side", values=["Frontal", "Lateral"])
PROJECTION = raw.Column("projection", values=["AP", "PA", "LL", "RL", ""])
COLUMNS = {
    "Path": raw.Column("path", unique=True),
    "Age": "meta_age",
    "Sex": "meta_sex",
    "Frontal/Lateral": SIDE,
    "AP/PA": PROJECTION,
    **{name: raw.Column(name, **raw.LABEL) for name in CHEXPERT_LABELS},
}
KEY = r"^(?:.*/)?((?:train|valid|test)/(patient\d+)/(study\d+)/(view\d+_[a-z]+))\.(?:jpg|png)$"

Paper = Literal["gloria", "mgca", "cxr_clip"]


def read_images(path: Path) -> pd.DataFrame:
    """One row an image.

    Columns: path (as written), key (train/patient00001/study1/view1_frontal), study_id, patient_id, image_id, view,
    side, the labels, is_ap_view, is_male, meta_age, meta_sex.
    """
    table = named_images(path, "Path", raw.read_table(path, COLUMNS))
    raw.check_cells(path, "Path", table["path"], ~table["path"].str.contains("..", regex=False), REMEDY)
    return table


def named_images(path: Path, column: str, table: pd.DataFrame) -> pd.DataFrame:
    """The table with key, patient_id, study_id and image_id from its paths, and view, is_ap_view and is_male.

    17 frontal images of the training table have the projection LL or RL and count as FRONTAL.
    """
    parts = path_parts(path, column, table["path"])
    frontal = table["projection"].where(table["projection"].isin(["AP", "PA"]), "FRONTAL")
    view = frontal.where(table["side"] == "Frontal", "LATERAL")
    study = parts[1] + "_" + parts[2]
    return table.assign(
        key=parts[0],
        patient_id=parts[1],
        study_id=study,
        image_id=study + "_" + parts[3],
        view=view,
        is_ap_view=raw.ap_view(view),
        is_male=raw.male(table["meta_sex"]),
    )


def path_parts(path: Path, column: str, values: pd.Series) -> pd.DataFrame:
    """Of each path, whatever is before "train/" and whatever suffix it has: the key, patient, study and view."""
    parts = values.str.extract(KEY)
    raw.check_cells(path, column, values, parts[0].notna(), REMEDY)
    return parts


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
    frontal = table[table["side"] == "Frontal"].sort_values("path", kind="stable").drop_duplicates("study_id")
    labels = frontal[["study_id", *CHEXPERT_LABELS]]
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
        labels = {name: raw.Column(name, **raw.LABEL) for name in COMPETITION_LABELS}
        table = raw.read_table(path, {"Path": "path"}, optional={"Report Impression": "impression", **labels})
    else:
        try:
            entries = json.loads(raw.read_text(path)[0])
            rows = [[item["image_path"], *(float(value) for value in item["label"])] for item in entries.values()]
            table = pd.DataFrame(rows, columns=["path", *COMPETITION_LABELS]).assign(impression="")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            remedy = "it is {row: {image_path, label: [five 0/1]}}"
            raise ManifestError(f"{path}: not PRIOR's list ({error!r}); {remedy}") from error
    raw.Column("path", unique=True).checked(path, "Path", table["path"])
    return table.assign(key=path_parts(path, "Path", table["path"])[0])


def listed_patients(path: str | Path) -> set[str]:
    """The patients of a 5x200 list; none for the path ""."""
    return set(read_list(Path(path))["key"].str.split("/").str[1]) if str(path) else set()


# Fraction of the training patients that is valid by default; near the 5,000 images of GLoRIA and MGCA
VALID_FRACTION = 0.02
PUBLISHED_VALID = 5000


def prepare(
    root: Path,
    *,
    split_rule: raw.SplitRule = "patient",
    paper: Paper = "gloria",
    unit: raw.Unit = "study",
    views: raw.ViewRule = "frontal",
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
    """
    folder = raw.RawFolder(root, "CheXpert")
    paths = folder.require(NEEDS)
    learn, official = (
        raw.Rows(read_images(path), source=path, cell=("Path", "path"), key="image_id") for path in paths
    )
    leaks = {}
    for rows in (learn, official):
        rows.table["images"] = locate(root, paths[0].parent, rows.table)
        folder.named.update(rows.table["images"])
    if split_rule == "published":
        parts, leaks = published_parts(learn, official, paper, hold_out)
        unit = "image"
    else:
        train = learn.table
        own = str(hold_out) == "5x200"
        held = set(ruled_5x200(train, seed=seed)["patient_id"]) if own else listed_patients(hold_out)
        learn.exclude(train["patient_id"].isin(held), "its patient is held out for the 5x200 test set")
        parts = {"train": learn, "test": official}
    for split, rows in parts.items():
        if unit == "image":
            rows.table = rows.table.assign(study_id=rows.table["image_id"])
        if check_images:
            rows.exclude_missing(folder.complete(rows.table["images"]), on_error)
        rows.keep_views(views)
        rows.table = raw.group_studies(rows.table).assign(split=split)
    rows = raw.Rows.concat(list(parts.values()), source=root)
    rows.check_rest("use views='all'")
    if split_rule == "published" and paper != "cxr_clip":
        leaks = count_leaks(rows.table["patient_id"], rows.table["split"]) | leaks
        rows.table = rows.table.assign(meta_patient=rows.table["patient_id"], patient_id=rows.table["study_id"])
    draw = "valid" if split_rule == "patient" else ""
    labels = [*CHEXPERT_LABELS, "is_ap_view", "is_male"]
    return raw.finish(folder, rows, labels, seed=seed, draw=draw, fraction=VALID_FRACTION, leaks=leaks)


def published_parts(
    learn: raw.Rows, official: raw.Rows, paper: Paper, hold_out: str | Path
) -> tuple[dict[str, raw.Rows], dict[str, int]]:
    """The rows of each split, and the counted leaks beyond shared patients of the splits; `learn` becomes train."""
    train = learn.table
    if str(hold_out) in ("", "5x200"):
        paths, random = published_5x200(train, paper)
        chosen = train["path"].isin(paths)
    else:
        random = np.random.RandomState(6)
        chosen = train["key"].isin(read_list(Path(hold_out))["key"])

    def part(table: pd.DataFrame) -> raw.Rows:
        return raw.Rows(table, source=learn.source, cell=learn.cell, key=learn.key)

    if paper == "cxr_clip":
        patients = train["patient_id"].isin(set(train.loc[chosen, "patient_id"]))
        learn.exclude(patients & ~chosen, "its patient is in the 5x200 test set")
        learn.table = train[~patients]
        return {"train": learn, "valid": official, "test": part(train[chosen])}, {}
    learn.exclude(chosen, "in the 5x200 test set")
    rest = learn.table
    if len(rest) <= PUBLISHED_VALID:
        raise ManifestError(
            f"the training table has {len(train)} images; the published rule draws {PUBLISHED_VALID} of them for "
            "validation: use the whole table, or split_rule='patient'"
        )
    if paper == "mgca":
        random = np.random.RandomState(0)
    positions = random.choice(len(rest), PUBLISHED_VALID, replace=False)
    valid = rest.iloc[np.sort(positions)]
    learn.table = rest.drop(valid.index)
    # the released code takes valid by position and removes from train by row label
    removed = rest.index.isin(positions)
    still = ~valid.index.isin(positions)
    leaks = {
        "patients of the 5x200 set in train": len(
            set(train.loc[chosen, "patient_id"]) & set(learn.table["patient_id"])
        ),
        "validation images still in train, released code (not rebuilt)": int(still.sum()),
        "images in neither, released code (not rebuilt)": int((removed & ~rest.index.isin(valid.index)).sum()),
    }
    return {"train": learn, "valid": part(valid), "test": official}, leaks


def locate(root: Path, folder: Path, table: pd.DataFrame) -> pd.Series:
    """The path below `root` of each image: in `folder`/train, or in "... batch 2 (train 1)" of the original release."""
    base = folder.relative_to(root).as_posix()
    paths = table["path"].str.extract(r"((?:train|valid|test)/patient.*)$")[0]
    places = paths if base == "." else f"{base}/" + paths
    batches = [batch for batch in root.glob("*batch*(train*)") if batch.is_dir()]
    batch_of = {patient.name: batch.name for batch in batches for patient in batch.iterdir()}
    batch = table["patient_id"].map(batch_of)
    inside = batch + paths.str.removeprefix("train")
    return places.where(batch.isna() | ~paths.str.startswith("train/"), inside)
