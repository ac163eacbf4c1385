"""Simulated studies as the owner of each dataset ships them: folders, tables, reports, DICOM, boxes, masks.

`write("nih", root)` fills `root` with a small copy of the dataset in its owner's own format, its well-known oddities
included, so that every path from a raw folder to a table can be tried without patient data. What is drawn is the
phantom; the formats are those that the cards in `data_manifests/` describe.

The function of a dataset writes images and yields (name of a file, row) for its tables: a dict is a row of a CSV, text
is a line of a text file.
"""

from collections import defaultdict
from inspect import isgeneratorfunction
from pathlib import Path

from gloria_core.phantom.raw_folders import boxes, files, labels, masks, reports

# Name of a dataset, as in `gloria_core.data.sources` -> the function of that name which writes its folder
_PUBLIC = {name: value for module in (boxes, labels, masks, reports) for name, value in vars(module).items()}
WRITERS = {name: value for name, value in _PUBLIC.items() if isgeneratorfunction(value) and not name.startswith("_")}


def write(dataset: str, root: Path | str, *, n_studies: int = 60, size: int = 96, seed: int = 0) -> Path:
    """Write `n_studies` simulated studies, images of (size, size), into `root` as the dataset's owner ships them.

    Returns `root`. Raises ValueError for a dataset without a writer, FileExistsError where `root` is not empty.
    """
    if dataset not in WRITERS:
        raise ValueError(f"no raw folder is simulated for {dataset!r}; available: {', '.join(sorted(WRITERS))}")
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    if any(root.iterdir()):
        raise FileExistsError(f"{root} is not empty; give a new folder")
    tables = defaultdict(list)
    for name, row in WRITERS[dataset](root, n_studies=n_studies, size=size, seed=seed):
        tables[name].append(row)
    for name, rows in tables.items():
        files.write_rows(root / name, rows)
    return root
