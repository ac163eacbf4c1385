"""NIH ChestX-ray14 (Wang et al. 2017, https://arxiv.org/abs/1705.02315): 112,120 frontal images of 30,805 patients.

Reads the official layout (`Data_Entry_2017*.csv`, `BBox_List_2017.csv`, `images/` or `images_001/images/` ...) and
smaller copies of it whose images have another suffix and size. NIH publishes labels and no reports, so text is made
from labels by prompts, in the way of CXR-CLIP (You et al. 2023, https://arxiv.org/abs/2310.13292):
`impression` says the findings, `findings` holds one sentence on the projection and nothing else.

The tables of NIH ChestX-ray14, read and checked: entries, boxes, official lists, and the optional extras.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from PIL import Image

from gloria_core.data.manifest import ExcludedRows, Failure, ManifestError, OnError, raise_failures, validate
from gloria_core.data.prompts import PromptSet, load_prompts, report_from_labels, zero_shot_prompts
from gloria_core.data.splits import assign_label_ranks, assign_splits

NIH_LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
NO_FINDING = "No Finding"

_ENTRY = {
    "Image Index": "image",
    "Finding Labels": "labels",
    "Follow-up #": "follow_up",
    "Patient ID": "patient",
    "Patient Age": "age",
    "Patient Gender": "sex",
    "View Position": "view",
}
# the header's "Bbox [x,y,w,h]" holds commas, so it is read as four columns
_BOX = {"Image Index": "image", "Finding Label": "label", "Bbox [x": "x", "y": "y", "w": "w", "h]": "h"}
_BOX_LABELS = {"Infiltrate": "Infiltration"}


def find_table(root: Path, pattern: str) -> Path:
    """The one file of `root` that matches; ManifestError where there is none or where there are several."""
    found = sorted(root.glob(pattern))
    if len(found) != 1:
        what = "no file" if not found else "several files: " + ", ".join(path.name for path in found) + ";"
        raise ManifestError(f"{root}: {what} {pattern}; the root must hold exactly one, as NIH distributes it")
    return found[0]


def read_columns(path: Path, names: dict[str, str]) -> pd.DataFrame:
    """Columns `names` (theirs -> ours) of a CSV as text; ManifestError naming a column that is not there."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig")
    except (ValueError, OSError) as error:
        raise ManifestError(f"{path}: cannot be read as a table ({error})") from error
    for name in names:
        if name not in table.columns:
            near = difflib.get_close_matches(name, [str(column) for column in table.columns], 1)
            hint = f"is it {near[0]!r} now? " if near else ""
            raise ManifestError(
                f"{path}: row 1 (the header) lacks column {name!r}; {hint}It has: {', '.join(table.columns)}. "
                "Give the table the names of the 2017 release"
            )
    return table[list(names)].rename(columns=names).fillna("")


def require(path: Path, column: str, values: pd.Series, good: pd.Series, remedy: str) -> None:
    """Raise ManifestError naming the first rows of `values` that are not `good`, and how many there are."""
    bad = values[~good.to_numpy(bool)]
    if len(bad):
        rows = ", ".join(f"row {index + 2}: {value!r}" for index, value in bad.iloc[:5].items())
        raise ManifestError(f"{path}, column {column!r}: {len(bad)} bad values ({rows}); {remedy}")


def read_entries(path: Path) -> pd.DataFrame:
    """One row an image: study (the stem), patient, labels (a set), age (years), sex, view; index + 2 is its row."""
    table = read_columns(path, _ENTRY)
    require(path, "Image Index", table["image"], ~table["image"].duplicated(), "an image is listed twice; keep one row")
    table["study"] = table["image"].str.rsplit(".", n=1).str[0]
    require(path, "Patient ID", table["patient"], table["patient"].str.strip() != "", "give every image its patient")
    table["labels"] = table["labels"].str.split("|").map(frozenset)
    known = table["labels"].map(lambda names: names <= {*NIH_LABELS, NO_FINDING})
    shown = table["labels"].map(lambda names: "|".join(sorted(names)))
    require(path, "Finding Labels", shown, known, f"labels are {', '.join(NIH_LABELS)}, {NO_FINDING}, joined by |")
    alone = table["labels"].map(lambda names: NO_FINDING not in names or len(names) == 1)
    require(path, "Finding Labels", shown, alone, f"{NO_FINDING!r} must stand alone")
    require(path, "View Position", table["view"], table["view"].isin(["PA", "AP"]), "a view is PA or AP")
    require(path, "Patient Gender", table["sex"], table["sex"].isin(["M", "F"]), "a sex is M or F")
    parts = table["age"].str.extract(r"^0*(\d+)([YMD]?)$")
    require(
        path, "Patient Age", table["age"], parts[0].notna(), "an age is a number of years, or like 058Y, 011M, 020D"
    )
    per_year = parts[1].map({"": 1, "Y": 1, "M": 12, "D": 365})
    table["age"] = (parts[0].astype(int) // per_year).astype(str)
    return table


def read_boxes(path: Path) -> pd.DataFrame:
    """One row a box: image, label (with NIH's 'Infiltrate' spelt as in the entries), x, y, w, h in original pixels."""
    table = read_columns(path, _BOX)
    table["label"] = table["label"].replace(_BOX_LABELS)
    require(path, "Finding Label", table["label"], table["label"].isin(NIH_LABELS), "use the labels of the entries")
    for name in ("x", "y", "w", "h"):
        numbers = pd.to_numeric(table[name], errors="coerce")
        good = numbers.notna() & (numbers > 0 if name in "wh" else numbers >= 0)
        require(path, f"Bbox {name}", table[name], good, "a box is x, y >= 0 and w, h > 0 in pixels")
        table[name] = numbers
    return table


def published_split(root: Path, images: Sequence[str]) -> pd.Series:
    """ "train" or "test" for each image by the lists of NIH; ManifestError where a list or an image is missing."""
    parts = {}
    for name, split in (("train_val_list.txt", "train"), ("test_list.txt", "test")):
        path = root / name
        if not path.is_file():
            raise ManifestError(f"{path} is missing; split_rule='published' needs it: add NIH's list or use 'patient'")
        parts |= dict.fromkeys(path.read_text(encoding="utf-8").split(), split)
    split = pd.Series([parts.get(image, "") for image in images])
    absent = [image for image, part in zip(images, split, strict=True) if not part]
    if absent:
        raise ManifestError(
            f"{root}: {len(absent)} images are in neither train_val_list.txt nor test_list.txt "
            f"({', '.join(absent[:5])}); get the complete lists or use split_rule='patient'"
        )
    return split


def read_extra(path: Path, key: str, value: str) -> dict[str, str]:
    """An optional table, image -> value; empty if the file is not there."""
    if not path.is_file():
        return {}
    table = read_columns(path, {key: "key", value: "value"})
    return dict(zip(table["key"], table["value"], strict=True))


BOX_PIXELS = 1024
"""Side of the original PNG files, whose pixels the box table counts."""

SUFFIXES = (".png", ".jpg", ".jpeg")

SplitRule = Literal["patient", "published"]


def prepare(
    root: Path | str,
    *,
    split_rule: SplitRule = "patient",
    seed: int = 0,
    on_error: OnError = "raise",
    prompts: PromptSet | None = None,
    text_seed: int = 0,
    n_negative: int = 3,
) -> pd.DataFrame:
    """The checked manifest of the dataset under `root`, with splits, label ranks and texts; one study an image.

    split_rule: "patient" draws 70/10/20 % of the images, patient-disjoint and stratified, with `seed`, and then puts
        every patient who has boxes into test (1 % of the patients; the owner's lists have them there, too); "published"
        takes test_list.txt as test and draws an eighth of train_val_list.txt as valid, patient-disjoint.
    on_error: "exclude" leaves out listed images that are not there (and boxes that cannot be placed) and lists them
        in `attrs["excluded"]` by the row of their table; "raise" counts and names them.
    prompts: sentences to make texts from; the package's "nih" by default. Training texts are drawn with `text_seed`,
        each study's on its own, with `n_negative` absent findings (3 in CXR-CLIP's runs); valid and test texts are
        the first sentences, without negatives.
    Boxes are in pixels of the image file that is there: the table's numbers (1024-pixel originals) times width / 1024
        and height / 1024.
    Raises ManifestError naming file, row, column and remedy.
    """
    root = Path(root)
    if split_rule not in ("patient", "published"):
        raise ValueError(f"split_rule must be 'patient' or 'published', not {split_rule!r}")
    if on_error not in ("raise", "exclude"):
        raise ValueError(f"on_error must be 'raise' or 'exclude', not {on_error!r}")
    if not root.is_dir():
        raise ManifestError(
            f"the dataset's root {root} is not a folder; give the folder that holds Data_Entry_2017*.csv"
        )
    path = find_table(root, "Data_Entry_2017*.csv")
    entries, missing = _with_files(read_entries(path), root)
    if on_error == "raise":
        raise_failures(
            missing, source=f"{path} (an incomplete copy? on_error='exclude' keeps the images that are there)"
        )
    if entries.empty:
        raise_failures(missing, source=f"{path}: no listed image is under {root}; check the root")
    frame = _labelled(entries, root)
    frame["boxes"], unplaced = _boxes(entries, root, known={failure.study_id for failure in missing})
    if on_error == "raise":
        raise_failures(unplaced, source=str(root / "BBox_List_2017.csv"))
    frame = _split(frame, entries["image"].tolist(), root, split_rule=split_rule, seed=seed)
    frame = assign_label_ranks(frame, seed=seed)
    frame = add_texts(frame, prompts or load_prompts("nih"), seed=text_seed, n_negative=n_negative)
    frame = validate(frame, source=f"manifest of {root}")
    frame.attrs["excluded"] = ExcludedRows([*ExcludedRows.of(missing), *ExcludedRows.of(unplaced)])
    return frame


def add_texts(frame: pd.DataFrame, prompts: PromptSet, *, seed: int, n_negative: int) -> pd.DataFrame:
    """A copy of `frame` whose `impression` says its labels and whose `findings` says its view.

    Drawn for each training study from its own generator (seed, study_id), so neither the order of the rows nor
    other studies matter; fixed for valid and test.
    """
    columns = [*NIH_LABELS, NO_FINDING]
    values = frame[columns].to_numpy(float).tolist()
    views = {
        True: zero_shot_prompts(prompts, "is_ap_view"),
        False: zero_shot_prompts(prompts, "is_ap_view", kind="neg"),
    }
    findings, impressions = [], []
    for study, split, ap, row in zip(frame["study_id"], frame["split"], frame["is_ap_view"], values, strict=True):
        labels = dict(zip(columns, row, strict=True))
        choices = views[ap == 1]
        if split == "train":
            key = hashlib.blake2b(f"{seed}|{study}".encode(), digest_size=8).digest()
            rng = np.random.default_rng(int.from_bytes(key))
            impressions.append(report_from_labels(labels, prompts, rng=rng, n_negative=n_negative))
            findings.append(choices[int(rng.integers(len(choices)))])
        else:
            impressions.append(report_from_labels(labels, prompts, deterministic=True))
            findings.append(choices[0])
    return frame.assign(findings=findings, impression=impressions)


def _image_files(root: Path) -> dict[str, str]:
    """Stem -> path relative to `root`, of every image in images*/ and images*/images/."""
    folders = [f for f in sorted(root.glob("images*")) if f.is_dir()]
    folders += [folder / "images" for folder in folders if (folder / "images").is_dir()]
    files: dict[str, str] = {}
    for folder in folders:
        with os.scandir(folder) as scan:
            names = sorted(entry.name for entry in scan if entry.name.lower().endswith(SUFFIXES) and entry.is_file())
        for name in names:
            stem, relative = name.rpartition(".")[0], f"{folder.relative_to(root).as_posix()}/{name}"
            if stem in files:
                raise ManifestError(f"{root}: image {stem!r} is there twice, {files[stem]} and {relative}; remove one")
            files[stem] = relative
    return files


def _with_files(entries: pd.DataFrame, root: Path) -> tuple[pd.DataFrame, list[Failure]]:
    """The entries whose image is there, with its path in `file`, and a failure for each of the others."""
    files = _image_files(root)
    entries["file"] = entries["study"].map(files)
    gone = entries[entries["file"].isna()]
    failures = [
        Failure(study, int(index) + 2, "Image Index", repr(image), "listed, but no such image in images*/")
        for index, study, image in zip(gone.index, gone["study"], gone["image"], strict=True)
    ]
    return entries[entries["file"].notna()].reset_index(drop=True), failures


def _labelled(entries: pd.DataFrame, root: Path) -> pd.DataFrame:
    """The manifest without splits, ranks, texts and boxes."""
    frame = pd.DataFrame(
        {
            "study_id": entries["study"],
            "patient_id": entries["patient"],
            "images": entries["file"],
            "views": entries["view"],
            "masks": "",
        }
    )
    for name in (*NIH_LABELS, NO_FINDING):
        frame[name] = entries["labels"].map(lambda names, name=name: float(name in names))
    frame["is_ap_view"] = (entries["view"] == "AP").astype(float)
    frame["is_male"] = (entries["sex"] == "M").astype(float)
    for name in ("age", "sex", "view", "follow_up"):
        frame[f"meta_{name}"] = entries[name]
    extras = {
        "meta_source": read_extra(root / "image_source.csv", "image_index", "source"),
        "meta_rsna_class": read_extra(root / "rsna_to_nih.csv", "image_index", "rsna_class"),
    }
    for name, values in extras.items():
        if values:
            frame[name] = [values.get(image, "") for image in entries["image"]]
    return frame


def _boxes(entries: pd.DataFrame, root: Path, *, known: set[str]) -> tuple[list[str], list[Failure]]:
    """A JSON cell for each entry, boxes scaled to its file, and a failure for each box that has no place.

    Boxes of the studies in `known` are passed over: their images are missing and reported already.
    """
    path = root / "BBox_List_2017.csv"
    if not path.is_file():
        return [""] * len(entries), []
    table = read_boxes(path)
    table["study"] = table["image"].str.rsplit(".", n=1).str[0]
    table = table[~table["study"].isin(known)]
    files = dict(zip(entries["study"], entries["file"], strict=True))
    wanted = sorted(set(table["study"]) & set(files))
    with ThreadPoolExecutor(8) as pool:
        sizes = dict(zip(wanted, pool.map(lambda study: _size(root / files[study]), wanted), strict=True))
    cells: dict[str, list[dict]] = {}
    failures = []
    for index, box in zip(table.index, table.itertuples(index=False), strict=True):
        size = sizes.get(box.study)
        if size is None:
            reason = "its image cannot be read" if box.study in files else "its image is not in the table of entries"
            failures.append(
                Failure(box.study, int(index) + 2, "Image Index", repr(box.image), f"{reason}; remove the box")
            )
            continue
        across, down = size[0] / BOX_PIXELS, size[1] / BOX_PIXELS
        xywh = [round(box.x * across, 3), round(box.y * down, 3), round(box.w * across, 3), round(box.h * down, 3)]
        cells.setdefault(box.study, []).append({"label": box.label, "image": 0, "xywh": xywh})
    return [json.dumps(cells[study]) if study in cells else "" for study in entries["study"]], failures


def _size(path: Path) -> tuple[int, int] | None:
    """Width and height from the file's header, None if it has none."""
    try:
        with Image.open(path) as image:
            return image.size
    except OSError:
        return None


def _split(frame: pd.DataFrame, images: list[str], root: Path, *, split_rule: SplitRule, seed: int) -> pd.DataFrame:
    if split_rule == "patient":
        frame = assign_splits(frame, seed=seed)
        # a box is truth for maps and detectors, and truth is for testing; the owner's list does the same
        boxed = frame.loc[frame["boxes"] != "", "patient_id"]
        return frame.assign(split=frame["split"].mask(frame["patient_id"].isin(boxed), "test"))
    frame = frame.assign(split=published_split(root, images).to_numpy())
    learn = frame["split"] == "train"
    if learn.any():
        parts = assign_splits(frame[learn], fractions={"train": 7 / 8, "valid": 1 / 8}, seed=seed)
        frame.loc[learn, "split"] = parts["split"]
    return frame
