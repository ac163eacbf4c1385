"""Images with findings that are marked in them, by masks or boxes: what segmentation and detection share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from torch import Tensor, nn

from gloria_core.data.cache import ImageCache
from gloria_core.data.geometry import Geometry, center_crop
from gloria_core.data.images import Norm, to_tensor
from gloria_core.data.manifest import boxes_of, label_columns, masks_of
from gloria_core.tasks.features import frontal_image

Source = Literal["masks", "boxes"]


@dataclass(frozen=True)
class AnnotatedImages:
    """Frontal images of n studies by row number, with annotations of K labels.

    Attributes:
        frame: the studies, index 0..n-1.
        labels: names of the K classes.
        paths: of the images in `cache`.
        crop: side of the centre crop that the model receives, in pixels.
        channels, norm: format of the model's pixels, see `to_tensor`.
    """

    frame: pd.DataFrame
    labels: tuple[str, ...]
    paths: tuple[str, ...]
    cache: ImageCache
    crop: int
    channels: int
    norm: Norm

    def __len__(self) -> int:
        return len(self.paths)

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of a split; none where it is empty."""
        return np.flatnonzero(self.frame["split"] == split)

    def images(self, rows: Sequence[int]) -> np.ndarray:
        """The pixels that the model receives, not normalised. Shape: -> (b, crop, crop) uint8."""
        return center_crop(self.cache.rows([self.paths[row] for row in rows]), self.crop)

    def pixels(self, rows: Sequence[int]) -> Tensor:
        """Shape: -> (b, C, crop, crop) float32."""
        return to_tensor(self.images(rows), channels=self.channels, norm=self.norm)

    def cases(
        self, rows: Sequence[int], scores: np.ndarray, each: int, case: Callable[[int, int], tuple]
    ) -> dict[str, list[tuple]]:
        """`case(row, class)` of the pairs with the best, median and worst of `scores` (b, K), `each` of them."""
        places = best_median_worst(scores.ravel(), each)
        pairs = {name: [divmod(place, scores.shape[1]) for place in group] for name, group in places.items()}
        return {name: [case(rows[image], k) for image, k in group] for name, group in pairs.items() if group}


def frontal_images(
    model: nn.Module, frame: pd.DataFrame, cache: ImageCache, labels: Sequence[str], *, crop: int | None = None
) -> AnnotatedImages:
    """The frontal image of every study (all splits), in the format that `model.config` names.

    `crop`: by default that of the model.
    """
    paths, config = tuple(frontal_image(study)[1] for study in frame.to_dict("records")), model.config
    frame = frame.reset_index(drop=True)
    return AnnotatedImages(frame, tuple(labels), paths, cache, crop or config.crop, config.channels, config.norm)


@dataclass(frozen=True)
class Annotations:
    """Which annotations are learnt from.

    Attributes:
        source: masks or boxes.
        labels: the findings.
        counts: studies with an annotation, see `annotation_counts`.
        problem: one sentence that says why nothing can be learnt or scored, or "".
    """

    source: Source
    labels: list[str]
    counts: pd.DataFrame
    problem: str


def choose_annotations(
    frame: pd.DataFrame,
    sources: Sequence[Source],
    labels: Sequence[str] = (),
    *,
    preferred: Sequence[str] = (),
    train: bool = True,
) -> Annotations:
    """The first of `sources` that the frame has, and its labels.

    Without `labels`: those of `preferred` that are annotated in split train, else all, in the order of the columns.
    `train=False`: nothing is to be learnt, so that split test alone can be a problem.
    Raises ValueError for an unknown source.
    """
    unknown = [source for source in sources if source not in get_args(Source)]
    if unknown:
        raise ValueError(f"source must be one of {', '.join(get_args(Source))}, not {unknown[0]!r}")
    tables = {source: annotation_counts(frame, source) for source in sources}
    source = next((name for name, counts in tables.items() if len(counts)), sources[0])
    counts, problem = tables[source], ""
    named = [label for label in label_columns(frame) if label in counts.index]
    default = [
        label for label in preferred if label in counts.index and counts.loc[label, "train" if train else "test"]
    ]
    labels = list(labels) or default or [*named, *(label for label in counts.index if label not in named)]
    if counts.empty:
        problem = f"no study has {' or '.join(sources)}; choose a dataset that has, or notebook 04 for its labels"
    for split, use in (("test", "score"), ("train", "learn from"))[: 1 + train]:
        if not (frame["split"] == split).any():
            problem = f"no study is in split {split!r}, so there is nothing to {use}; choose a dataset with that split"
        elif len(counts) and not counts[split].reindex(labels).any():
            others = ", ".join(counts.index[counts[split] > 0])
            remedy = f"choose among the labels that have some ({others})" if others else "choose another dataset"
            problem = f"no study in split {split!r} has {source} of {', '.join(labels)} to {use}; {remedy}"
    return Annotations(source, labels, counts, problem)


def annotations_of(study: Mapping[str, Any], source: Source) -> list[dict]:
    """The masks or boxes of a study's frontal image, as dicts (see `manifest.masks_of`, `manifest.boxes_of`)."""
    entries = (masks_of if source == "masks" else boxes_of)(study)
    return [entry for entry in entries if entry["image"] == frontal_image(study)[0]]


def annotation_counts(frame: pd.DataFrame, source: Source) -> pd.DataFrame:
    """Studies with a mask or box on their frontal image: one row a label, one column a split.

    The last column, "positive without one", counts studies whose label is 1 although there is no mask or box.
    """
    studies = frame.to_dict("records")
    marked = {(entry["label"], row) for row, study in enumerate(studies) for entry in annotations_of(study, source)}
    table = pd.DataFrame(sorted(marked), columns=["label", "row"])
    table["split"] = [studies[row]["split"] for row in table["row"]]
    by_label = table.groupby("label")["row"]
    counts = pd.crosstab(table["label"], table["split"]).reindex(columns=["train", "valid", "test"], fill_value=0)
    unmarked = {name: is_positive(frame, name).sum() - is_positive(frame, name)[rows].sum() for name, rows in by_label}
    return counts.assign(**{"positive without one": pd.Series(unmarked, dtype=int)})


def is_positive(frame: pd.DataFrame, label: str) -> np.ndarray:
    """(n,) bool: where the label's column says 1; nowhere without such a column."""
    return (pd.to_numeric(frame.get(label, pd.Series(0, frame.index)), errors="coerce") == 1).to_numpy(bool)


def checked_box(study: Mapping[str, Any], entry: Mapping[str, Any], geometry: Geometry) -> np.ndarray:
    """x, y, width, height of a box in the pixels of its image file.

    Raises ValueError naming the study for a box that is degenerate or outside its image.
    """
    box = np.asarray(entry["xywh"], float)
    where = f"study {study['study_id']}: box {box.tolist()} of {entry['label']!r}"
    if not np.isfinite(box).all() or (box[2:] <= 0).any():
        raise ValueError(f"{where} is degenerate; width and height must be positive pixels")
    if (box[:2] + box[2:] <= 0).any() or box[0] >= geometry.width or box[1] >= geometry.height:
        size = f"{geometry.width} x {geometry.height}"
        raise ValueError(f"{where} lies outside its image of {size} pixels; are these pixels of another size?")
    return box


def best_median_worst(scores: Sequence[float], each: int = 1) -> dict[str, list[int]]:
    """Positions of the highest, middle and lowest scores, `each` of them; NaN is left out, ties go to the first.

    No position occurs twice; with fewer scores the later groups are shorter.
    """
    scores = np.asarray(scores, float)
    order = [int(place) for place in np.argsort(-scores, kind="stable") if np.isfinite(scores[place])]
    worst = max(len(order) - each, min(each, len(order)))
    middle = max((len(order) - each) // 2, each)
    return {"best": order[:each], "median": order[middle : min(middle + each, worst)], "worst": order[worst:]}
