"""Every dataset, in its owner's own format, through every notebook that makes sense for it.

The folders are simulated (`gloria_core.phantom.raw_folders`), the notebooks run in this process. `python
tests/test_every_dataset.py` writes the table of `MATRIX` into data_manifests/README.md.
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from notebook_cells import CellError, run_notebook

from gloria_core.data import source_files
from gloria_core.phantom.raw_folders import WRITERS, write
from gloria_core.study.record import NotApplicable

README = Path(__file__).resolve().parents[1] / "data_manifests" / "README.md"
OPTIONS = {"chexpert": {"hold_out": ""}, "chexpert_5x200": {"per_class": 2}, "own_csv": {"labels": ["Effusion"]}}
FEW = {"n_bootstrap": 20}
SMALL = {
    "02_pretraining": {"image_encoder": "resnet_tiny", "crop": 56, "epochs": 1, "batch_size": 8},
    "03_attention_maps": {"n_studies": 4, **FEW},
    "04_finetune_classification": {"subsets": 1, "fractions": [0.5, 1.0], "finetune_fractions": [0.5],
                                   "finetune_epochs": 1, **FEW},
    "05_segmentation": {"fractions": [0.5], "subsets": 1, "steps": 2, "validate_every": 1,
                        "channels": [8, 8, 8, 8, 8], **FEW},
    "06_detection": {"fractions": [0.5], "subsets": 1, "epochs": 0.1, "min_steps": 2, "width": 16, **FEW},
    "07_zero_shot": FEW,
    "08_retrieval": {"shortlist": 5, **FEW},
}  # fmt: skip
"""Notebooks after 01, and the parameters that make them small."""

TEST_ONLY = "all studies are test"
TEST_BOXES = "all boxes are in test"
NO_REPORT, NO_MASK, NO_BOX = "no reports", "neither masks nor boxes", "neither boxes nor masks"
WITHOUT_REPORTS = ("chexpert", "chexpert_5x200", "covidx", "kermany", "montgomery_shenzhen", "object_cxr", "oxford_pet",
                   "rsna_pneumonia", "rsna_sample", "siim_pneumothorax", "vindr_cxr")  # fmt: skip
WITHOUT_REGIONS = ("cgmh", "chexpert", "chexpert_5x200", "chexpert_plus", "covidx", "kermany", "mimic_cxr", "openi",
                   "own_csv", "padchest")  # fmt: skip
NOT_APPLICABLE = {
    **{(dataset, "08_retrieval"): NO_REPORT for dataset in WITHOUT_REPORTS},
    **{(dataset, "05_segmentation"): NO_MASK for dataset in WITHOUT_REGIONS},
    **{(dataset, "06_detection"): NO_BOX for dataset in WITHOUT_REGIONS},
    **{(dataset, "02_pretraining"): TEST_ONLY for dataset in ("chexpert_5x200", "ms_cxr")},
    **{(dataset, "04_finetune_classification"): TEST_ONLY for dataset in ("chexpert_5x200", "ms_cxr")},
    **{("ms_cxr", notebook): TEST_ONLY for notebook in ("05_segmentation", "06_detection")},
    **{("nih", notebook): TEST_BOXES for notebook in ("05_segmentation", "06_detection")},
}  # fmt: skip
"""Cells of the matrix that make no sense, and why."""


def table() -> str:
    """The matrix as Markdown: a row a dataset, a column a notebook, a reason where a notebook is not applicable."""
    notebooks = ["01_data_preparation", *SMALL]
    lines = ["| dataset | " + " | ".join(name[:2] for name in notebooks) + " |", "|---" * (len(notebooks) + 1) + "|"]
    for dataset in sorted(WRITERS):
        cells = [NOT_APPLICABLE.get((dataset, name), "yes") for name in notebooks]
        lines.append(f"| [{dataset}]({dataset}.md) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@pytest.fixture(scope="module", params=sorted(WRITERS))
def prepared(request, tmp_path_factory) -> tuple[str, Path]:
    """A dataset and its folder with `raw`, the manifest of notebook 01, and an untrained checkpoint of notebook 02."""
    folder = tmp_path_factory.mktemp(request.param)
    write(request.param, folder / "raw", n_studies=40, size=64)
    given = {"dataset": request.param, "data_root": str(folder / "raw"), "options": OPTIONS.get(request.param, {})}
    run_notebook("01_data_preparation", given | {"image_size": 64}, folder / "01")
    assert source_files.changes(folder / "01", folder / "raw", skip=folder) == []
    untrained = {"manifest": str(folder / "01/manifest.csv"), "objective": "random", **SMALL["02_pretraining"]}
    run_notebook("02_pretraining", untrained, folder / "untrained")
    return request.param, folder


@pytest.mark.parametrize("notebook", SMALL)
def test_every_dataset_through_every_notebook(prepared, notebook):
    dataset, folder = prepared
    given = {"manifest": str(folder / "01/manifest.csv"), **SMALL[notebook]}
    if notebook != "02_pretraining":
        given["checkpoint"] = str(folder / "untrained/checkpoints/best.pt")
    if (dataset, notebook) in NOT_APPLICABLE:
        with pytest.raises(CellError) as caught:
            run_notebook(notebook, given, folder / notebook)
        assert isinstance(caught.value.__cause__, NotApplicable), caught.value
        return
    run_notebook(notebook, given, folder / notebook)
    rows = pd.read_csv(folder / notebook / "metrics.csv")
    assert len(rows) or notebook == "03_attention_maps", "a notebook that ran records numbers"
    assert rows["n"].notna().all()


def test_the_table_of_the_cards_is_this_matrix():
    assert table() in README.read_text()


if __name__ == "__main__":
    before, rest = README.read_text().split("<!-- matrix -->\n")[0::2]
    README.write_text(f"{before}<!-- matrix -->\n{table()}\n<!-- matrix -->\n{rest}")
    print(json.dumps({"datasets": len(WRITERS), "cells": len(WRITERS) * (len(SMALL) + 1)}))
