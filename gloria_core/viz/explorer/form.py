"""Around the explorer: a form for a radiograph and a report of one's own, and the page that `make explore` serves."""

import html
import os
from pathlib import Path

import ipywidgets

from gloria_core.checkpoints import native
from gloria_core.data.dataset import open_dataset
from gloria_core.viz.explorer.subject import known_studies
from gloria_core.viz.explorer.widget import Explorer

RUNS = "GLORIA_EXPLORE"  # environment variable: folder of a finished study's runs, for the page of `make explore`
CHOICES = 60  # test studies that can be chosen on the page


def with_own_study(explorer: Explorer) -> ipywidgets.VBox:
    """The explorer above a form that takes one's own image (upload, or a path on the kernel's machine) and report."""
    upload = ipywidgets.FileUpload(
        accept=".png,.jpg,.jpeg,.dcm,.dicom",
        multiple=False,
        description="Image: PNG, JPEG or DICOM",
        layout={"width": "230px"},
    )
    path = ipywidgets.Text(placeholder="or a path on the kernel's machine", layout={"width": "260px"})
    report = ipywidgets.Textarea(
        placeholder="Its report, with or without headings", rows=2, layout={"flex": "1 1 260px"}
    )
    button = ipywidgets.Button(description="Show", button_style="primary", layout={"width": "90px"})
    message = ipywidgets.HTML()

    def show(_: object) -> None:
        message.value = ""
        try:
            if upload.value:
                explorer.show_own(bytes(upload.value[0].content), report.value, name=upload.value[0].name)
            elif path.value.strip():
                explorer.show_own(path.value.strip(), report.value)
            else:
                raise ValueError("Choose a file or give a path.")
        except (ValueError, OSError) as error:
            message.value = f"<p role='alert' style='color:#b3261e'>{html.escape(str(error))}</p>"

    button.on_click(show)
    row = ipywidgets.HBox([upload, path, report, button], layout={"flex_flow": "row wrap", "align_items": "center"})
    form = ipywidgets.Accordion([ipywidgets.VBox([row, message])], titles=("Your own radiograph and report",))
    return ipywidgets.VBox([explorer, form])


def study_page(folder: str | Path | None = None) -> ipywidgets.Widget:
    """The explorer on a finished study: its dataset, and every checkpoint of notebook 02 in `folder`.

    `folder` is by default what the environment variable GLORIA_EXPLORE names. Says what to do where nothing is there.
    """
    folder = Path(folder or os.environ.get(RUNS, ""))
    manifests = sorted(folder.glob("01_data_preparation*/manifest.csv"))
    checkpoints = sorted(folder.glob("02_pretraining*/checkpoints/best.pt"))
    if not manifests or not checkpoints:
        return ipywidgets.HTML(
            f"<p>No finished study in <code>{html.escape(str(folder))}</code>. Run <code>make study</code> first "
            "(about ten minutes), or open <code>results/examples/explorer_phantom.html</code>, which needs nothing.</p>"
        )
    data = open_dataset(manifests[0])
    # an untrained or ImageNet baseline is saved with the objective it is compared with: its run says which it is
    runs = {path.parent.parent.name.removeprefix("02_pretraining-"): path for path in reversed(checkpoints)}
    models = {name.split("-")[0]: native.load(path) for name, path in runs.items()}
    order = sorted(models, key=lambda name: (name in ("random", "imagenet"), name))
    studies = known_studies(data)[:CHOICES]
    explorer = Explorer({name: models[name] for name in order}, data=data, study=studies[0], studies=studies)
    return with_own_study(explorer)
