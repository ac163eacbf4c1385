"""COVIDx (Wang, Lin, Wong 2020, https://doi.org/10.1038/s41598-020-76550-z): normal, pneumonia, COVID-19 radiographs.

Read is the folder that the scripts of COVID-Net or Kaggle's covidx-cxr2 give: `train/`, `test/` (and `val/`),
and lists `train_COVIDx9A.txt`, `test_COVIDx9A.txt` of any version: patient, file, class and, in later ones, source,
with spaces between. Versions "A" and up to 5 have normal, pneumonia and COVID-19; "B" has negative and positive.
"""

import re
from pathlib import Path

import pandas as pd

from gloria_core.data import raw_folder as raw
from gloria_core.data.manifest import ManifestError, OnError
from gloria_core.data.sources import vocabulary
from gloria_core.data.splits import random_split

# Class of the list -> its labels
CLASSES = vocabulary("covidx", "classes")
HOW = "github.com/lindawangg/COVID-Net, docs/COVIDx.md, or Kaggle, andyczhao/covidx-cxr2"
# Split -> how its list and its folder are called
LISTS = {"train": "train", "test": "test", "valid": "val"}
_LINE = re.compile(rf"(\S+)\s+(.+?)\s+({'|'.join(CLASSES)})(?:\s+(\S+))?")


def prepare(
    root: Path, *, version: str = "", split_rule: raw.SplitRule = "patient", seed: int = 0, on_error: OnError = "raise"
) -> pd.DataFrame:
    """The checked manifest: one study an image, labels "Normal", "Pneumonia" (no COVID-19) and "COVID-19", or the last.

    version: as in the lists' names, "9A" for train_COVIDx9A.txt, "CXR-3A" for train_COVIDx_CXR-3A.txt; needed where the
        root has several. Without a version in the names (`train.txt`, `test.txt`) it is "".
    split_rule: test is the owner's list. "patient" draws an eighth of the other patients as valid (of the owner's
        `val.txt`, if it is there, all) and leaves training images out whose patient is in test; "published" is MGCA's
        (Wang et al. 2022): a fifth of the training rows as valid by scikit-learn; patients on both sides are counted in
        `attrs["leaks"]`. A patient is source and number: sources number theirs independently.
    on_error="exclude" leaves out images that are not there. What is left out is in `attrs["excluded"]`.

    """
    folder = raw.RawFolder(root, "covidx")
    table = pd.concat([_read(path, split) for split, path in _lists(folder, version).items()])
    twice = table["study_id"].duplicated().to_numpy()
    if twice.any():
        path, line, name = table.loc[twice, ["list", "line", "study_id"]].iloc[0]
        raise ManifestError(f"{path}, line {line}: file {name!r} is listed twice; keep it in one list")
    leaks: dict[str, int] = {}
    if split_rule == "published":
        learn = (table["split"] == "train").to_numpy()
        table.loc[learn, "split"] = random_split(int(learn.sum()), held_out=0.2)
        table["patient_id"], leaks = raw.tear(table["patient_id"], table["split"], rows="images", unit="patient")
    # in the folder of its list, or below data/, where COVID-Net's scripts put it
    table["images"] = folder.first_existing([home + table["place"] for home in ("", "data/")])
    rows = raw.Rows(table, source=f"{root}: lists of COVIDx", cell=("file", "study_id"))
    rows.exclude_missing(table["images"] != "", on_error)
    if split_rule == "patient":
        patients = rows.table.groupby("split")["patient_id"].agg(set)
        tested = rows.table["patient_id"].isin(patients.get("test", ())) & (rows.table["split"] != "test")
        rows.exclude(tested, "its patient is in the test list")
        if "valid" in patients:
            held = (rows.table["split"] == "train") & rows.table["patient_id"].isin(patients["valid"])
            rows.table["split"] = rows.table["split"].mask(held, "valid")
    labels = [name for name in CLASSES["normal"] if rows.table[name].notna().any()]
    undrawn = split_rule == "patient" and not (rows.table["split"] == "valid").any()
    return raw.finish(folder, rows, labels, seed=seed, draw="valid" if undrawn else "", leaks=leaks)


def _lists(folder: raw.RawFolder, version: str) -> dict[str, Path]:
    """Split -> list file, of one version."""
    ends = [f"_COVIDx{version}", f"_COVIDx_{version}"] if version else ["", "_COVIDx*"]
    pattern = "|".join(f"{home}train{end}.txt" for home in ("", "labels/") for end in ends)
    (train,) = folder.require({pattern: f"the training list; option version names another; {HOW}"})
    name = re.sub(r"(\.gz|\.zip)$", "", train.relative_to(folder.root).as_posix())
    other = {word: re.sub("train", word, name, flags=re.IGNORECASE) for word in ("test", "val")}
    (test,) = folder.require({other["test"]: f"the test list; it belongs to {train.name}; {HOW}"})
    valid = folder.optional(other["val"])
    return {"train": train, "test": test} | ({"valid": valid} if valid else {})


def _read(path: Path, split: str) -> pd.DataFrame:
    """One row an image; the index + 2 is the line of the list."""
    rows = []
    for number, line in enumerate(raw.read_text(path)[0].splitlines(), start=1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise ManifestError(
                f"{path}, line {number}: {line.strip()[:80]!r} is not 'patient file class source' with a class of "
                f"{', '.join(CLASSES)}; get the list again"
            )
        patient, name, kind, source = match.groups(default="")
        patient = f"{source}-{patient}" if source else patient
        rows.append([name, patient, kind, source, number])
    if not rows:
        raise ManifestError(f"{path}: the list is empty; get it again; {HOW}")
    table = pd.DataFrame(rows, columns=["study_id", "patient_id", "meta_class", "meta_source", "line"])
    table.index = table["line"] - 2
    raw.check_paths(path, "file", table["study_id"])
    for label in CLASSES["normal"]:
        table[label] = table["meta_class"].map({kind: labels.get(label) for kind, labels in CLASSES.items()})
    return table.assign(list=str(path), split=split, place=f"{LISTS[split]}/" + table["study_id"])
