"""Montgomery County and Shenzhen tuberculosis radiographs with lung masks (Jaeger et al. 2014).

https://doi.org/10.3978/j.issn.2223-4292.2014.11.20. Read is the owner's folder: `MontgomerySet/CXR_png/*.png` with
`ManualMask/leftMask` and `rightMask`, and `ChinaSet_AllFiles/CXR_png/*.png`, whose masks (Stirenko et al. 2018, 566 of
662 images) are files `*_mask.png` in `mask/` or `masks/`. Either set may be there alone. The last digit of a name says
whether tuberculosis is seen; `ClinicalReadings/*.txt` has sex, age and a short reading.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
from pydantic import Field

from gloria_core.data import raw_folder as raw
from gloria_core.data.manifest import ManifestError, OnError
from gloria_core.data.splits import assign_splits

LABEL, MASK = "Tuberculosis", "Lungs"
HOW = "National Library of Medicine, https://data.lhncbc.nlm.nih.gov/public/Tuberculosis-Chest-X-ray-Datasets"
SETS = {"montgomery": ("MontgomerySet", r"MCUCXR_\d{4}_[01]"), "shenzhen": ("ChinaSet_AllFiles", r"CHNCXR_\d{4}_[01]")}
# Side -> what its files' names end in, and the folders they may be in
MASKS = {
    "left": ("", ["MontgomerySet/ManualMask/leftMask"]),
    "right": ("", ["MontgomerySet/ManualMask/rightMask"]),
    "both": ("_mask", ["mask", "masks", "mask/mask", "ChinaSet_AllFiles/mask", "ChinaSet_AllFiles/masks"]),
}


def prepare(
    root: Path,
    *,
    sets: Annotated[Sequence[Literal["montgomery", "shenzhen"]], Field(min_length=1)] = ("montgomery", "shenzhen"),
    masked_only: bool = False,
    split_rule: Literal["patient", "test"] = "patient",
    seed: int = 0,
    on_error: OnError = "raise",
) -> pd.DataFrame:
    """The checked manifest: one study an image, label "Tuberculosis", masks "Lungs" (Montgomery: one for each side).

    sets: which of the two to take; those that are not under the root are an error.
    masked_only: only images with a mask.
    split_rule: "patient" draws 70/10/20 %, stratified by label and set; "test" puts everything there, for models that
        were trained elsewhere. Each image is of its own patient.
    on_error="exclude" leaves out images of Montgomery that lack a side's mask. What is left out is in
    `attrs["excluded"]`.
    """
    folder = raw.RawFolder(root, "montgomery_shenzhen")
    table = pd.concat([_images(folder, name) for name in sets], ignore_index=True)
    folder.named.update(table["images"])
    names = table["study_id"]
    masks = {side: folder.locate(names + end, homes, [".png"]) for side, (end, homes) in MASKS.items()}
    rows = raw.Rows(table.assign(**masks), source=root, cell=("masks", "images"))
    complete = (table["meta_source"] == "shenzhen") | ((masks["left"] != "") & (masks["right"] != ""))
    rows.exclude_missing(complete, on_error, reason="a side's mask is missing")
    rows.table["masks"] = [_mask_cell(row) for row in rows.table.to_dict("records")]
    if masked_only:
        rows.exclude(rows.table["masks"] == "", "no mask is drawn for it")
        rows.check_rest("add the masks, or masked_only=False")
    table = _with_readings(rows.table, root)
    table["views"] = table["meta_source"].map({"montgomery": "PA", "shenzhen": "FRONTAL"})
    frame = raw.manifest_frame(table, [LABEL, "is_male"])
    first = (frame["meta_source"] == sets[0]).astype(float)
    drawn = assign_splits(frame.assign(is_first_set=first), seed=seed)["split"]
    rows.table = frame.assign(split=drawn if split_rule == "patient" else "test")
    return raw.finish(folder, rows, [LABEL, "is_male"], seed=seed)


def _images(folder: raw.RawFolder, name: str) -> pd.DataFrame:
    """study_id, images, label and meta_source of one set, by name."""
    home, pattern = SETS[name]
    place = f"{home}/CXR_png"
    folder.require({f"{place}/": f"the images of {name} ({HOW}), or leave it out of sets"})
    files = folder.by_stem([place], [".png"])
    for study in files:
        if not re.fullmatch(pattern, study):
            raise ManifestError(f"{folder.root / place / study}.png: names are like {pattern}.png; rename or remove it")
    if not files:
        raise ManifestError(f"{folder.root / place}: no image (.png); unpack the archive again ({HOW})")
    table = pd.DataFrame({"study_id": list(files), "images": [paths[0] for paths in files.values()]})
    return table.assign(meta_source=name, **{LABEL: table["study_id"].str[-1].astype(float)})


def _mask_cell(row: dict[str, str]) -> str:
    if row["meta_source"] == "shenzhen":
        return raw.cell([{"label": MASK, "path": row["both"]}] if row["both"] else [])
    return raw.cell([{"label": MASK, "path": row[side], "side": side} for side in ("left", "right")])


def _with_readings(table: pd.DataFrame, root: Path) -> pd.DataFrame:
    """The table with sex, age in years and the words of the reading, blank for what is not there."""
    readings = []
    for image in table["images"]:
        path = root / image.replace("CXR_png", "ClinicalReadings").replace(".png", ".txt")
        text = raw.read_text(path)[0] if path.is_file() else ""
        readings.append(" ".join(text.split()))
    words = pd.Series(readings, index=table.index, dtype=str)
    sex = words.str.extract(r"(?i)\b(?:(m)(?:ale)?|(f)(?:emale)?)\b").bfill(axis=1)[0].str.upper()
    age = words.str.extract(r"(?i)\b0*(\d+) ?(?:Y|yrs?|years?)\b")[0].fillna("")
    words = words.str.replace(r"(?i)Patient'?s (?:Sex|Age) ?:", " ", regex=True)
    for pattern in (r"(?i)\b(?:m|male|f|female)\b", r"(?i)\b0*\d+ ?(?:Y|yrs?|years?)\b"):
        words = words.str.replace(pattern, " ", n=1, regex=True)
    reading = words.str.split(" ").map(" ".join).str.strip(" ,")
    return table.assign(is_male=raw.male(sex), meta_age=age, meta_reading=reading)
