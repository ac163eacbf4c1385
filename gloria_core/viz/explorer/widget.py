"""Click a word, see where it points: the attention explorer, a widget for JupyterLab, VS Code and Voila.

    Explorer(native.load(checkpoint), data=open_dataset(manifest), study="p00006_s3")
    Explorer({"gloria": a, "random": b}, image="mine.dcm", report="Small left effusion.")

Where nobody runs widgets (papermill's executed copies, a plain viewer) the same display is a static figure with a text.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn

from gloria_core.data.dataset import PreparedDataset
from gloria_core.data.files import atomic_write
from gloria_core.viz.attention import attention_row
from gloria_core.viz.explorer.page import PROGRAM, STYLE, export_page
from gloria_core.viz.explorer.scene import SceneMaker, base64, unit_map
from gloria_core.viz.explorer.subject import Subject, Text, known_studies, own_subject, study_subject


class Explorer(anywidget.AnyWidget):
    """A radiograph beside its report; every word draws its region map.

    `models`: one model, or name -> model (two can stand side by side). Either `data` and `study` (a study_id; the first
    test study with a known region by default), or `image` (a PNG, JPEG or DICOM file, its bytes, or (H, W) uint8) and
    `report`; with `data`, `report` is shown for studies without one. `studies`: study_ids to choose from on screen.
    `word`: the word that is chosen at first.
    `selection` (read by anyone): what is chosen now, as `text`, `type`, `index` and `words`; empty for nothing.
    Raises ValueError for a model without maps or for too little or too much of the above, ImageError, ReportError,
    KeyError for an unknown study.
    """

    _esm = PROGRAM
    _css = STYLE
    scene = traitlets.Dict().tag(sync=True)
    maps = traitlets.Dict().tag(sync=True)
    revision = traitlets.Int(0).tag(sync=True)
    selection = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        models: nn.Module | Mapping[str, nn.Module],
        *,
        data: PreparedDataset | None = None,
        study: str = "",
        studies: Sequence[str] = (),
        image: NDArray[np.uint8] | str | Path | bytes | None = None,
        report: str = "",
        word: str = "",
    ) -> None:
        super().__init__()
        self._models = {models.config.objective: models} if isinstance(models, nn.Module) else dict(models)
        self._data, self._studies, self._word, self._text = data, [str(one) for one in studies], word, report
        if (data is None) == (image is None):
            raise ValueError("the explorer shows a study of `data`, or an `image` with its `report`: give one of them")
        if data is None:
            self.show_own(image, report)
        else:
            self.show_study(study or known_studies(data)[0])
        self.on_msg(self._on_message)

    def show_study(self, study: str) -> None:
        """Go to another study of the dataset. Raises ValueError without a dataset, KeyError for an unknown study."""
        if self._data is None:
            raise ValueError("this explorer was made for one image; give it `data` to go from study to study")
        self._show(study_subject(self._data, study, self._text), study)

    def show_own(self, image: NDArray[np.uint8] | str | Path | bytes, report: str, *, name: str = "") -> None:
        """Go to a radiograph and a report of one's own. Raises ImageError, ReportError."""
        self._show(own_subject(image, report, name=name), "")

    def add_phrase(self, text: str) -> None:
        """Encode a phrase of one's own and show it under the report. Raises ReportError for one without a word."""
        number = 1 + sum(entry["own"] and not entry["hidden"] for entry in self._maker.texts)
        self._maker.add([Text(f"own-{number}", "Your phrase", text, own=True)])
        self._send_scene()

    def page(self) -> str:
        """The explorer as one HTML page that needs neither kernel nor network."""
        return export_page(self.scene, self.maps)

    def save_html(self, path: str | Path) -> Path:
        """Write `page` to a file."""
        atomic_write(path, self.page())
        return Path(path)

    def figure(self) -> Figure:
        """What is chosen at first as a static figure: the attention and the cosine of each model."""
        start = self._start()
        entry = next(entry for entry in self._maker.texts if entry["id"] == start["text"])
        words = [start["index"]] if start["type"] == "word" else entry["phrases"][start["index"]]["words"]
        first, last = entry["words"][words[0]], entry["words"][words[-1]]
        maps = {}
        for number, (name, image) in enumerate(self._maker.encoded.items()):
            key = f"{number}/{entry['id']}"
            grids = np.frombuffer(self.maps[key], "<f4").reshape(self.scene["shapes"][key])
            for index, kind in enumerate(image.kinds):
                grid = unit_map(grids, index, words)
                if kind in ("attention", "cosine") and grid is not None:
                    maps[f"{name}\n{kind}"] = image.geometry.map_to_original(grid, crop=image.crop)
        subject = self._maker.subject
        title = f"{subject.title}: “{entry['text'][first[0] : last[1]]}”"
        masks = [truth.mask for truth in subject.truths if not truth.boxes]
        boxes = [box for truth in subject.truths for box in truth.boxes]
        return attention_row(subject.image, maps, title=title, outlines=masks, boxes=boxes)

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict, dict] | None:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is None:
            return None
        buffer = BytesIO()
        self.figure().savefig(buffer, format="png", dpi=110)
        text = f"Attention explorer: {self.scene['title']}. Run the notebook, or open the exported page, to click."
        return {**bundle[0], "text/plain": text, "image/png": base64(buffer.getvalue())}, bundle[1]

    def _show(self, subject: Subject, study: str) -> None:
        self._maker, self._study = SceneMaker(self._models, subject), study
        self._send_scene()

    def _send_scene(self) -> None:
        chosen = {"study": self._study, "studies": self._studies, "start": self._start()}
        with self.hold_sync():
            self.scene, self.maps = self._maker.scene() | chosen, dict(self._maker.maps)
            self.revision += 1

    def _start(self) -> dict[str, Any]:
        """What is chosen at first, as `selection`: the given word, else a phrase with a known region."""
        texts = [entry for entry in self._maker.texts if not entry["hidden"] and entry["words"]]
        section = next(iter(self._models.values())).config.text_section
        texts.sort(key=lambda entry: (entry["own"], entry["id"] != section))
        for entry in texts:
            for number, (start, end, _) in enumerate(entry["words"]):
                if entry["text"][start:end].lower() == self._word.lower():
                    return {"text": entry["id"], "type": "word", "index": number}
        named = [entry["id"] for entry in texts if entry["phrases"]]
        return {"text": (named or [texts[0]["id"]])[0], "type": "phrase" if named else "word", "index": 0}

    def _on_message(self, _: object, content: dict[str, Any], __: object) -> None:
        """Requests of the page. An error is shown on the page."""
        try:
            match content.get("type"):
                case "phrase":
                    self.add_phrase(str(content["text"]))
                case "study":
                    self.show_study(str(content["id"]))
                case "export":
                    name = f"explorer_{self._study or 'own'}.html"
                    self.send({"type": "page", "name": name, "html": self.page()})
        except Exception as error:
            self.send({"type": "error", "text": str(error.args[0] if error.args else error)})
            if not isinstance(error, ValueError | KeyError | OSError):
                raise
