"""Maps of words over radiographs, with the truth outlined and the scores written, and their controls side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from gloria_core.viz.plots import new_figure, reaches, wrapped

TRUTH = "#00e5ff"
"""Colour of outlines: in no colour map used here, and bright on dark lungs and on white bone."""
FLAT = 1e-4
"""A map that varies by less than this share of its largest value says nothing: colours would show rounding errors."""


@dataclass(frozen=True)
class MapPanel:
    """One map on the pixels of the original image, (H, W), NaN where the model saw nothing.

    `signed` maps (cosine) are shown with colours that part at zero; others (attention) from their lowest to their
    highest value. `unit` is written at the colour bar.
    """

    values: np.ndarray
    title: str
    signed: bool = False
    unit: str = "weight"


def map_panels(
    maps: Mapping[str, np.ndarray | None], scores: Mapping[str, str] | None = None, *, kind: str = ""
) -> list[MapPanel]:
    """Panels of named maps, each with the colours that fit its kind; a map that is None (words cut off) is left out.

    `maps`: name -> (H, W). The name is the kind ("attention", "word_softmax", "cosine") unless `kind` says it for all.
    `scores`: name -> text under the name.
    """
    panels = []
    for name, values in maps.items():
        if values is not None:
            signed = (kind or name) == "cosine"
            title = name.replace("_", " ") + (f"\n{scores[name]}" if scores and name in scores else "")
            panels.append(MapPanel(values, title, signed=signed, unit="cosine" if signed else "weight"))
    return panels


def attention_row(
    image: np.ndarray,
    panels: Sequence[MapPanel],
    *,
    title: str,
    outlines: Sequence[np.ndarray] = (),
    boxes: Sequence[Sequence[float]] = (),
) -> Figure:
    """The image alone, then each map over it, all with the truth outlined; one colour bar a map, which states its sign.

    image: (H, W) uint8, the original pixels; outlines: (H, W) bool masks; boxes: (x, y, width, height) in pixels.
    Raises ValueError where a map or a mask has other pixels than the image.
    """
    for name, array in [(f"map {panel.title!r}", panel.values) for panel in panels] + [
        ("outline", o) for o in outlines
    ]:
        if np.shape(array) != image.shape:
            raise ValueError(f"{name} has {np.shape(array)} pixels, the image {image.shape}")
    titles = ["image" + ("\ntruth outlined" if len(outlines) or len(boxes) else "")]
    titles = [wrapped(text, 34) for text in [*titles, *(panel.title for panel in panels)]]
    lines = max(text.count("\n") for text in titles)
    height = np.clip(2.9 * image.shape[0] / image.shape[1], 1.8, 5.0)
    figure, (axes,) = new_figure(1, 1 + len(panels), width=3.1 * (1 + len(panels)), height=height + 1.7 + 0.16 * lines)
    for axis, text in zip(axes, titles, strict=True):
        picture = axis.imshow(image, cmap="gray", vmin=0, vmax=255)
        axis.set_xticks([])
        axis.set_yticks([])
        # titles of equal height, and a bar under the bare image too: so all images come out in one line
        axis.set_title(text + "\n" * (lines - text.count("\n")), fontsize=9)
        if axis is axes[0]:
            _draw_bar(figure, axis, picture, "gray value\n(of the file)")
    for axis, panel in zip(axes[1:], panels, strict=True):
        _draw_map(figure, axis, panel)
    for axis in axes:
        _draw_truth(axis, outlines, boxes)
    figure.suptitle(wrapped(f"{title} (n = 1 image, {len(panels)} maps)", 30 * (1 + len(panels))), fontsize=10)
    return figure


def snapshot_strip(
    images: Sequence[np.ndarray],
    epochs: Sequence[int],
    maps: Sequence[Sequence[np.ndarray]],
    *,
    titles: Sequence[str],
    outlines: Sequence[np.ndarray] = (),
    title: str = "Maps while training",
) -> Figure:
    """One row a study, one column an epoch: signed maps over the image, on one scale for the whole figure.

    images: (H, W) uint8 each; maps[e][i]: (H, W) of image i after epochs[e], NaN outside the crop; outlines: the truth.
    Raises ValueError where the numbers of images, titles and maps differ.
    """
    fits = len(maps) == len(epochs) and all(len(row) == len(images) == len(titles) for row in maps)
    if not epochs or not fits:
        raise ValueError("snapshot_strip takes one title an image, and for every epoch one map an image")
    figure, axes = new_figure(len(images), len(epochs), width=1.9 * len(epochs) + 1.6, height=1.9 * len(images) + 0.9)
    known = np.concatenate([values[np.isfinite(values)] for row in maps for values in row])
    reach = max(float(np.abs(known).max()) if len(known) else 0.0, 1e-12)
    for i, (image, name) in enumerate(zip(images, titles, strict=True)):
        for e, epoch in enumerate(epochs):
            axis = axes[i, e]
            axis.imshow(image, cmap="gray", vmin=0, vmax=255)
            values = np.ma.masked_invalid(maps[e][i])
            picture = axis.imshow(values, cmap="PuOr_r", vmin=-reach, vmax=reach, alpha=0.55)
            axis.set(xticks=[], yticks=[])
            if i == 0:
                axis.set_title(f"epoch {epoch}", fontsize=9)
            if e == 0:
                axis.set_ylabel(wrapped(name, 24), fontsize=8)
            _draw_truth(axis, outlines[i : i + 1], ())
    figure.colorbar(picture, ax=axes[:, -1], shrink=0.7, pad=0.02).set_label("cosine, one scale for all", fontsize=8)
    figure.suptitle(f"{title} (n = {len(images)} images, {len(epochs)} epochs)", fontsize=10)
    return figure


def control_bars(
    rows: pd.DataFrame, *, title: str = "Grounding", metrics: Sequence[str] = ("cnr", "pointing_game")
) -> Figure:
    """Each map beside its controls, with intervals: one axis a metric, one bar a map or control.

    `rows`: one target of `grounding.summarise` (kind, control, metric, value, ci_low, ci_high, n, chance).
    Lines: 0 for the contrast-to-noise ratio, the mean area share for the pointing game and the mass.
    """
    if rows.empty or rows["target"].nunique() != 1:
        raise ValueError("control_bars takes the rows of one target, for example rows[rows['target'] == 'macro']")
    figure, (axes,) = new_figure(
        1, len(metrics), width=4.6 * len(metrics) + 1.2, height=0.27 * len(rows) / len(metrics) + 1.6
    )
    kinds = list(dict.fromkeys(rows["kind"]))
    for axis, metric in zip(axes, metrics, strict=True):
        part = rows[[name.startswith(f"{metric}_") for name in rows["metric"]]]
        value, low, high = (part[name].to_numpy(dtype=float) for name in ("value", "ci_low", "ci_high"))
        place = np.arange(len(part))
        colours = [
            to_rgba(sns.color_palette("colorblind")[kinds.index(kind)], 0.35 if control else 1.0)
            for kind, control in zip(part["kind"], part["control"], strict=True)
        ]
        axis.barh(place, value, color=colours)
        axis.errorbar(value, place, xerr=reaches(value, low, high), fmt="none", color="black", capsize=2, linewidth=1)
        reference = 0.0 if metric == "cnr" else float(part["chance"].mean())
        axis.axvline(reference, color="black", linestyle="--", linewidth=1)
        names = [
            f"{kind}: {control}" if control else kind
            for kind, control in zip(part["kind"], part["control"], strict=True)
        ]
        axis.set_yticks(place, [name.replace("_", " ") for name in names] if axis is axes[0] else [""] * len(names))
        axis.invert_yaxis()
        axis.set_xlabel(
            f"{metric.replace('_', ' ')}; dashed: {'no contrast' if metric == 'cnr' else 'mean area, chance'}"
        )
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title}, target {rows['target'].iloc[0]} (n = {int(rows['n'].max())} phrases)")
    return figure


def _draw_map(figure: Figure, axis: Axes, panel: MapPanel) -> None:
    known = panel.values[np.isfinite(panel.values)]
    if not len(known):
        axis.text(
            0.5, 0.5, "outside what\nthe model saw", transform=axis.transAxes, ha="center", va="center", color="white"
        )
        return
    low, high = float(known.min()), float(known.max())
    meaning = "lowest to highest of this map"
    reach = max(abs(low), abs(high), 1e-12)
    if panel.signed:
        low, high, meaning = -reach, reach, "0 in the middle: the sign counts"
    elif high - low < FLAT * reach:
        low, high, meaning = low - reach / 2, low + reach / 2, "the same everywhere"
    picture = axis.imshow(
        np.ma.masked_invalid(panel.values),
        cmap="PuOr_r" if panel.signed else "viridis",
        vmin=low,
        vmax=high,
        alpha=0.55,
    )
    _draw_bar(figure, axis, picture, f"{panel.unit}\n({meaning})")


def _draw_bar(figure: Figure, axis: Axes, picture: AxesImage, label: str) -> None:
    low, high = picture.get_clim()
    ticks = [low, (low + high) / 2, high]
    bar = figure.colorbar(picture, ax=axis, orientation="horizontal", shrink=0.85, pad=0.02)
    bar.set_label(label, fontsize=8)
    bar.set_ticks(
        ticks, labels=[f"{0.0 if abs(v) < 1e-3 * max(map(abs, ticks)) else v:.3g}" for v in ticks], fontsize=7
    )


def _draw_truth(axis: Axes, outlines: Sequence[np.ndarray], boxes: Sequence[Sequence[float]]) -> None:
    limits = axis.axis()
    for mask in outlines:
        if np.any(mask):
            # a frame of background closes the line of a region that touches the border of the image
            padded = np.pad(np.asarray(mask, dtype=float), 1)
            height, width = padded.shape
            axis.contour(
                np.arange(width) - 1, np.arange(height) - 1, padded, levels=[0.5], colors=TRUTH, linewidths=1.4
            )
    for x, y, width, height in boxes:
        # pixel 0 is drawn from -0.5 to 0.5, while a box counts from the outer corner of pixel 0
        axis.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=TRUTH, linewidth=1.4))
    axis.axis(limits)  # contours widen the axes, and the image would no longer fill them
