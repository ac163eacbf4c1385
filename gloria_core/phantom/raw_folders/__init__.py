"""Simulated studies as the owner of each dataset ships them: folders, tables, reports, DICOM, boxes, masks.

`write("nih", root)` fills `root` with a small copy of the dataset in its owner's own format, its well-known oddities
included, so that every path from a raw folder to a table can be tried without patient data. What is drawn is the
phantom; the formats are those that the cards in `data_manifests/` describe.
"""

from __future__ import annotations

from pathlib import Path

from gloria_core.phantom.raw_folders import with_boxes, with_labels, with_masks, with_reports

_FUNCTIONS = (
    with_reports.mimic_cxr, with_reports.chexpert_plus, with_reports.openi, with_reports.padchest,
    with_reports.covid_pairs, with_reports.cgmh, with_labels.chexpert, with_labels.chexpert_5x200, with_labels.nih,
    with_labels.covidx, with_labels.kermany, with_labels.own_csv, with_boxes.rsna_pneumonia, with_boxes.rsna_sample,
    with_boxes.vindr_cxr, with_boxes.object_cxr, with_boxes.ms_cxr, with_masks.siim_pneumothorax,
    with_masks.montgomery_shenzhen, with_masks.oxford_pet,
)  # fmt: skip
WRITERS = {function.__name__: function for function in _FUNCTIONS}
"""Name of a dataset, as in `gloria_core.data.sources` -> the function that writes its folder."""


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
    WRITERS[dataset](root, n_studies=n_studies, size=size, seed=seed)
    return root
