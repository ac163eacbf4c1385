"""Montgomery County and Shenzhen tuberculosis radiographs with lung masks (Jaeger et al. 2014).

https://doi.org/10.3978/j.issn.2223-4292.2014.11.20. Read is the owner's folder: `MontgomerySet/CXR_png/*.png` with
`ManualMask/leftMask` and `rightMask`, and `ChinaSet_AllFiles/CXR_png/*.png`, whose masks (Stirenko et al. 2018, 566 of
662 images) are files `*_mask.png` in `mask/` or `masks/`. Either set may be there alone. The last digit of a name says
whether tuberculosis is seen; `ClinicalReadings/*.txt` has sex, age and a short reading.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from gloria_core.data.manifest import ManifestError, OnError
from gloria_core.data.raw_folder import absent, check_option, finish, locate, settle
from gloria_core.data.splits import assign_splits

LABEL, MASK = "Tuberculosis", "Lungs"
HOW = "National Library of Medicine, https://data.lhncbc.nlm.nih.gov/public/Tuberculosis-Chest-X-ray-Datasets"
SETS = {
    "montgomery": ("MontgomerySet", r"MCUCXR_(\d{4})_([01])"),
    "shenzhen": ("ChinaSet_AllFiles", r"CHNCXR_(\d{4})_([01])"),
}
_SHENZHEN_MASKS = ("mask", "masks", "mask/mask", "ChinaSet_AllFiles/mask", "ChinaSet_AllFiles/masks")


def prepare(
    root: Path | str,
    *,
    sets: Sequence[str] = ("montgomery", "shenzhen"),
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
    `attrs["excluded"]`. Raises ManifestError naming folder, file and remedy.
    """
    check_option("split_rule", split_rule, ("patient", "test"))
    check_option("on_error", on_error, ("raise", "exclude"))
    for name in sets:
        check_option("an entry of sets", name, tuple(SETS))
    root = Path(root)
    if not sets:
        raise ValueError("sets is empty; name montgomery, shenzhen, or both")
    table = pd.concat([_images(root, name) for name in sets], ignore_index=True)
    table["masks"], table["complete"] = _masks(root, table)
    gone = absent(
        table, table["complete"], key="study", value="file", column="masks", reason="a side's mask is missing"
    )
    table = table[table["complete"]]
    settle(gone, source=str(root), on_error=on_error, left=len(table))
    if masked_only:
        has = table["masks"] != ""
        gone += absent(table, has, key="study", value="file", column="masks", reason="no mask is drawn for it")
        table = table[has]
        settle([], source=f"{root}: no image has a mask", on_error=on_error, left=max(len(table), 1))
        if table.empty:
            raise ManifestError(
                f"{root}: no image of {', '.join(sets)} has a mask; add the masks, or masked_only=False"
            )
    frame = _frame(table.reset_index(drop=True), root)
    if split_rule == "test":
        frame = frame.assign(split="test")
    else:
        mark = (frame["meta_source"] == sets[0]).astype(float)
        frame = frame.assign(split=assign_splits(frame.assign(is_first_set=mark), seed=seed)["split"])
    return finish(frame, source=f"manifest of {root}", seed=seed, failures=gone)


def _images(root: Path, name: str) -> pd.DataFrame:
    """study, file, label, set of one set, by name."""
    folder, pattern = SETS[name]
    place = root / folder / "CXR_png"
    if not place.is_dir():
        here = ", ".join(sorted(path.name for path in root.iterdir())[:12]) if root.is_dir() else "no such folder"
        raise ManifestError(
            f"montgomery_shenzhen: {root} lacks {folder}/CXR_png ({HOW}), or leave {name!r} out of sets; it has: {here}"
        )
    files = sorted(path.name for path in place.glob("*.png"))
    rows = []
    for file in files:
        match = re.fullmatch(pattern + r"\.png", file)
        if match is None:
            raise ManifestError(
                f"{place / file}: names are like {pattern}.png, 1 with tuberculosis; rename or remove it"
            )
        rows.append((file.removesuffix(".png"), f"{folder}/CXR_png/{file}", float(match.group(2)), name))
    if not rows:
        raise ManifestError(f"{place}: no image (.png); unpack the archive again ({HOW})")
    return pd.DataFrame(rows, columns=["study", "file", "label", "set"])


def _masks(root: Path, table: pd.DataFrame) -> tuple[list[str], np.ndarray]:
    """JSON cell of each image, and whether it is complete: a Montgomery image has both sides."""
    sides = {
        side: locate(root, table["study"], [f"MontgomerySet/ManualMask/{side}Mask"], [".png"])
        for side in ("left", "right")
    }
    both = locate(root, table["study"] + "_mask", _SHENZHEN_MASKS, [".png"])
    cells, complete = [], []
    for i, name in enumerate(table["set"]):
        if name == "shenzhen":
            entries = [{"label": MASK, "image": 0, "path": both[i]}] if both[i] else []
            complete.append(True)
        else:
            found = {side: paths[i] for side, paths in sides.items() if paths[i]}
            entries = [{"label": MASK, "image": 0, "path": path, "side": side} for side, path in found.items()]
            complete.append(len(found) == 2)
        cells.append(json.dumps(entries) if entries else "")
    return cells, np.array(complete)


def _frame(table: pd.DataFrame, root: Path) -> pd.DataFrame:
    readings = [
        _reading(root / path.replace("CXR_png", "ClinicalReadings").replace(".png", ".txt")) for path in table["file"]
    ]
    sex, age, text = (pd.Series(part, dtype=object) for part in zip(*readings, strict=True))
    return pd.DataFrame(
        {
            "study_id": table["study"],
            "patient_id": table["study"],
            "images": table["file"],
            "views": np.where(table["set"] == "montgomery", "PA", "FRONTAL"),
            LABEL: table["label"],
            "is_male": np.where(sex == "", np.nan, sex == "M"),
            "masks": table["masks"],
            "meta_source": table["set"],
            "meta_age": age,
            "meta_reading": text,
        }
    )


def _reading(path: Path) -> tuple[str, str, str]:
    """Sex, age in years and the words of the reading, "" for what is not there."""
    if not path.is_file():
        return "", "", ""
    text = " ".join(path.read_text(encoding="utf-8", errors="replace").split())
    sex = re.search(r"\b(?:(M|male)|(F|female))\b", text, re.IGNORECASE)
    age = re.search(r"\b0*(\d+) ?(?:Y|yrs?|years?)\b", text, re.IGNORECASE)
    words = re.sub(r"Patient'?s (?:Sex|Age) ?:", " ", text, flags=re.IGNORECASE)
    for match in (sex, age):
        words = words.replace(match.group(0), " ", 1) if match else words
    return (
        "" if sex is None else "M" if sex.group(1) else "F",
        age.group(1) if age else "",
        " ".join(words.split(" ")).strip(" ,"),
    )
