"""MS-CXR (Boecking et al. 2022, https://physionet.org/content/ms-cxr/): phrases and their boxes on MIMIC-CXR images.

1,162 phrase-region pairs of eight findings, chosen by radiologists. Reads `MS_CXR_Local_Alignment_v1.*.csv` and the JPG
of MIMIC-CXR-JPG. An image is a row: `impression` holds its phrases as sentences, `boxes` the boxes, and `masks` the
regions with the characters of the text that name them, which is what grounding is scored with.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from gloria_core.data import raw_folder as raw
from gloria_core.data.annotations import write_mask
from gloria_core.data.manifest import ManifestError, OnError
from gloria_core.data.sources import vocabulary

TABLE = "MS_CXR_Local_Alignment_v1.*.csv"
TABLES = f"{TABLE}|ms-cxr*/{TABLE}|*/{TABLE}"
WHERE = "from https://physionet.org/content/ms-cxr/ (credentialed access)"
LABELS = tuple(vocabulary("ms_cxr", "labels"))
MASKS = "ms_cxr_masks"
SPLITS = {"train": "train", "val": "valid", "valid": "valid", "validate": "valid", "test": "test"}
COLUMNS = {
    "category_name": raw.Column("label", values=LABELS),
    "label_text": raw.Column("phrase", filled=True, remedy="give the phrase"),
    "path": raw.Column("images", path=True, filled=True),
    "dicom_id": "study_id",
}
NUMBERS = {name: name for name in ("x", "y", "w", "h", "image_width", "image_height")}


def prepare(
    root: Path,
    *,
    table: str | Path = "",
    split_rule: raw.SplitRule = "patient",
    write_masks: bool = True,
    seed: int = 0,
    on_error: OnError = "raise",
    check_images: bool = True,
) -> pd.DataFrame:
    """The checked manifest of the MIMIC-CXR-JPG folder `root` (files/p10/...), with the table in it or at `table`.

    split_rule: "patient" puts everything in test; "published" takes the column split of version 1.1.0. Where MIMIC's
        split table is under the root, `attrs["leaks"]` counts the patients that its official training has, too: leave
        them out of pretraining with `mimic_cxr`'s option hold_out.
    write_masks: writes a 1-bit PNG for each phrase into root/ms_cxr_masks and lists it in `masks` with its spans;
        False leaves `masks` empty (boxes carry the spans, too).
    Boxes are scaled to the size of the image file that is there. Labels: 1 for a finding that has a phrase, else blank,
    for nobody looked for it.
    """
    folder = raw.RawFolder(root, "MS-CXR")
    path = Path(table) if table else folder.require({TABLES: f"phrases and boxes, {WHERE}"})[0]
    source = f"{path} (images of MIMIC-CXR-JPG under {root})"
    rows = raw.Rows(_read(path), source=source, cell=("path", "images"))
    if check_images:
        rows.exclude_missing(folder.complete(rows.table["images"]), on_error)
        rows.table = _scaled(rows.table, folder, path)
    if split_rule == "published":
        split, remedy = rows.table["split"], "it is train, val or test (version 1.1.0); or use 'patient'"
        rows.table["split"] = raw.Column("split", values=SPLITS, remedy=remedy).checked(path, "split", split)
    else:
        rows.table["split"] = "test"
    parts = rows.table.groupby("study_id", sort=True)
    rows.table = pd.DataFrame([_study(part, root, write_masks) for _, part in parts])
    return raw.finish(None, rows, LABELS, seed=seed, leaks=_seen_by_mimic(folder, rows.table))


def _read(path: Path) -> pd.DataFrame:
    """One row a box."""
    table = raw.read_table(path, {**COLUMNS, **NUMBERS}, optional={"split": "split"})
    table = raw.check_boxes(path, table, NUMBERS, remedy="a box is x, y >= 0 and w, h > 0 in pixels of the image")
    raw.check_inside(path, table, table["image_width"], table["image_height"])
    parts = table["images"].str.extract(r"(p\d{8})/(s\d{8})/[^/]+$")
    remedy = "a path is files/p10/p10000032/s50414267/<dicom_id>.jpg"
    raw.check_cells(path, "path", table["images"], parts[0].notna(), remedy)
    repeated = table.duplicated(["study_id", "label", "phrase", "x", "y", "w", "h"])
    raw.check_cells(path, "dicom_id", table["study_id"], ~repeated, "the same box of the same phrase occurs twice")
    return table.assign(patient_id=parts[0], meta_study=parts[1])


def _scaled(rows: pd.DataFrame, folder: raw.RawFolder, path: Path) -> pd.DataFrame:
    """Boxes in pixels of the files that are there."""
    size = rows["images"].map(folder.sizes(rows["images"]))
    raw.check_cells(path, "path", rows["images"], size.notna(), "the image file cannot be read; download it again")
    across, down = size.str[0] / rows["image_width"], size.str[1] / rows["image_height"]
    scaled = {name: rows[name] * (across if name in ("x", "w", "image_width") else down) for name in NUMBERS}
    return rows.assign(**{name: values.round(3) for name, values in scaled.items()})


def _study(rows: pd.DataFrame, root: Path, write_masks: bool) -> dict:
    """One image with all its phrases, in the order of the table."""
    first = rows.iloc[0]
    text, boxes, masks = "", [], []
    for number, ((label, phrase), part) in enumerate(rows.groupby(["label", "phrase"], sort=False)):
        words = " ".join(phrase.split())
        start = len(text) + bool(text)
        text += (" " if text else "") + words
        spans = [["impression", start, start + len(words)]]
        text += "" if words.endswith((".", "!", "?")) else "."
        corners = part[["x", "y", "w", "h"]].to_numpy(float).tolist()
        boxes += [{"label": label, "xywh": box, "spans": spans} for box in corners]
        if write_masks:
            name = f"{MASKS}/{first['study_id']}_{number}.png"
            shape = (round(first["image_height"]), round(first["image_width"]))
            write_mask(root, name, lambda corners=corners, shape=shape: _filled(corners, shape))
            masks.append({"label": label, "path": name, "spans": spans})
    return {
        **first[["study_id", "patient_id", "split", "images", "meta_study"]],
        "impression": text,
        "boxes": raw.cell(boxes),
        "masks": raw.cell(masks),
        **{name: 1.0 if (rows["label"] == name).any() else np.nan for name in LABELS},
    }


def _filled(boxes: list[list[float]], shape: tuple[int, int]) -> np.ndarray:
    """The pixels of boxes [x, y, w, h], at least one each. Shape: `shape` bool."""
    mask = np.zeros(shape, bool)
    for x, y, w, h in boxes:
        mask[round(y) : max(round(y + h), round(y) + 1), round(x) : max(round(x + w), round(x) + 1)] = True
    return mask


def _seen_by_mimic(folder: raw.RawFolder, frame: pd.DataFrame) -> dict[str, int]:
    """Patients of the frame in the official training split of MIMIC-CXR, where its table is under the root."""
    path = folder.optional("mimic-cxr-2*-split.csv")
    if path is None:
        return {}
    official = raw.read_table(path, {"subject_id": "subject", "split": "split"})
    seen = set("p" + official.loc[official["split"] == "train", "subject"])
    test = frame["patient_id"][frame["split"] == "test"]
    return {"test patients in the official MIMIC-CXR train": int(test.drop_duplicates().isin(seen).sum())}


def patients_of(path: Path) -> set[str]:
    """The patients (p10000032) of an MS-CXR table, or of any csv with a column `path`, `subject_id` or `patient_id`."""
    if not path.is_file():
        raise ManifestError(f"{path}: no such table; give a csv with the patients to hold out")
    for name in raw.columns_of(path, ["subject_id", "patient_id", "path"]):
        cells = raw.read_table(path, {name: "cell"})["cell"]
        patients = cells.str.extract(r"(?:^|/)p?(\d{8})(?:/|$)")[0]
        raw.check_cells(path, name, cells, patients.notna(), "a patient has eight digits")
        return set("p" + patients)
    raise ManifestError(f"{path}: row 1 (the header) lacks subject_id, patient_id and path; one must name the patients")
