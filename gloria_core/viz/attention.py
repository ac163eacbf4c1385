"""Maps of words over radiographs, with the true region outlined, and their scores beside those of the controls."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import nn

from gloria_core.data.dataset import PreparedDataset
from gloria_core.data.images import read_gray
from gloria_core.tasks.maps import Kind, original_maps
from gloria_core.tasks.phrases import Phrase, region
from gloria_core.tasks.snapshots import MapSnapshots
from gloria_core.viz.plots import Mark, colour_of, image_grid, intervals, new_figure, wrapped

TRUTH = "#00e5ff"  # of outlines: in no colour map used here, and bright on dark lungs and on white bone
FLAT = 1e-4  # a map whose values differ by less than this part of the largest has one colour: the rest is rounding


def draw_map(axis: Axes, values: np.ndarray, *, signed: bool, reach: float | None = None) -> tuple[AxesImage, str]:
    """A map (H, W) over an image, NaN transparent; returns it and what its colours mean.

    `signed` maps have zero in the middle of the colours, and `reach` at their ends (the largest absolute value by
    default); others go from their lowest to their highest value.
    """
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
    largest = max(abs(low), abs(high), 1e-12)
    meaning = "lowest to highest of this map"
    if signed:
        low, high, meaning = -(reach or largest), reach or largest, "0 in the middle: the sign counts"
    elif high - low < FLAT * largest:
        low, high, meaning = low - largest / 2, low + largest / 2, "the same everywhere"
    colours = "PuOr_r" if signed else "viridis"
    drawn = axis.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=low, vmax=high, alpha=0.55)
    return drawn, f"{'cosine' if signed else 'weight'}\n({meaning})"


def attention_row(
    image: np.ndarray,
    maps: Mapping[str, np.ndarray | None],
    *,
    title: str,
    kind: str = "",
    scores: Mapping[str, str] | None = None,
    outlines: Sequence[np.ndarray] = (),
    boxes: Sequence[Sequence[float]] = (),
) -> Figure:
    """The image alone, then each map over it, all with the true region outlined; one colour bar a map.

    image: (H, W) uint8, the original pixels. maps: name -> (H, W), NaN where the model saw nothing; None (the words
    were cut off) is left out. `kind` ("attention", "word_softmax", "cosine") of all maps; by default the last word of
    each name. A cosine has a sign. scores: name -> text under the name. outlines: (H, W) bool; boxes: (x, y, width,
    height). Raises ValueError where a map or an outline has other pixels than the image.
    """
    maps = {name: values for name, values in maps.items() if values is not None}
    for name, values in maps.items():
        if np.shape(values) != image.shape:
            raise ValueError(f"map {name!r} has {np.shape(values)} pixels, the image {image.shape}")
    marks = [Mark("truth", mask=mask) for mask in outlines] + [Mark("truth", box=box) for box in boxes]
    names = [f"{name.replace('_', ' ')}\n{(scores or {}).get(name, '')}".strip() for name in maps]
    titles = [wrapped(text, 30) for text in ("image" + "\ntrue region outlined" * bool(marks), *names)]
    lines = max(text.count("\n") for text in titles)
    # titles of equal height, and a bar under the bare image too: so all images come out in one line
    titles = [text + "\n" * (lines - text.count("\n")) for text in titles]
    figure = image_grid(
        [image] * len(titles), titles, [marks] * len(titles), colours={"truth": TRUTH}, columns=len(titles), side=3.1
    )
    axes = figure.axes
    figure.set_figheight(figure.get_figheight() + 0.5)  # for the colour bars
    _colour_bar(figure, axes[0], axes[0].images[0], "gray value\n(of the file)")
    for axis, (name, values) in zip(axes[1:], maps.items(), strict=True):
        if np.isfinite(values).any():
            _colour_bar(figure, axis, *draw_map(axis, values, signed=(kind or name.split()[-1]) == "cosine"))
        else:
            text = "outside what\nthe model saw"
            axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color="white")
    figure.suptitle(wrapped(f"{title} (n = 1 image, {len(maps)} maps)", 30 * len(titles)), fontsize=10)
    return figure


def phrase_figure(
    model: nn.Module, data: PreparedDataset, frame: pd.DataFrame, phrase: Phrase, *, scores: pd.DataFrame | None = None
) -> Figure:
    """`attention_row` of all maps of a phrase on its original image; `frame`: the studies that `phrase.row` counts.

    `scores`: the phrase's rows of `grounding.score_phrases`, of which CNR and pointing game are written.
    """
    maps, texts = original_maps(model, frame, data.cache, [phrase])[0], None
    if scores is not None:
        plain = scores[scores["control"] == ""].set_index("kind")
        texts = {kind: f"CNR {plain['cnr'][kind]:.2f}, hit {plain['pointing_game'][kind]:.0f}" for kind in maps}
    outlines = [region(phrase, data.cache.geometry(phrase.image), data.root)] if phrase.known else []
    title = f"{frame['study_id'].iloc[phrase.row]}, {phrase.label}: “{phrase.words}”"
    return attention_row(read_gray(data.root / phrase.image), maps, title=title, scores=texts, outlines=outlines)


def word_figure(
    model: nn.Module, data: PreparedDataset, frame: pd.DataFrame, phrase: Phrase, *, kind: Kind = "cosine"
) -> Figure:
    """`attention_row` of the map of each word of a phrase's text, the first eight."""
    spans = [match.span() for match in re.finditer(r"[^\W\d_]+", phrase.text)][:8]
    words = [replace(phrase, spans=(span,)) for span in spans]
    found = original_maps(model, frame, data.cache, words, kinds=(kind,))
    maps = {word.words: by_kind[kind] for word, by_kind in zip(words, found, strict=True)}
    return attention_row(read_gray(data.root / phrase.image), maps, kind=kind, title=f"{kind} map of each word")


def snapshot_figure(snapshots: MapSnapshots, root: Path) -> Figure:
    """Saved training snapshots, one row a phrase and one column an epoch, the truth outlined; `root`: of the images.

    The maps are signed and on one scale for the whole figure. Raises ValueError where nothing was saved.
    """
    phrases, saved = snapshots.phrases, snapshots.load()
    if not saved:
        raise ValueError(f"{snapshots.folder} holds no snapshot: no epoch has ended yet, or the model has no such map")
    images = [read_gray(root / phrase.image) for phrase in phrases]
    outlines = [region(phrase, snapshots.cache.geometry(phrase.image), root) for phrase in phrases]
    figure = image_grid(
        [image for image in images for _ in saved],
        [f"epoch {epoch}" if row == 0 else "" for row in range(len(images)) for epoch in saved],
        [[Mark("truth", mask=mask)] for mask in outlines for _ in saved],
        colours={"truth": TRUTH},
        row_labels=[f"{phrase.label}: “{phrase.words}”" for phrase in phrases],
        columns=len(saved),
    )
    axes, maps = figure.axes, [values[row] for row in range(len(images)) for values in saved.values()]
    figure.set_figwidth(figure.get_figwidth() + 1.3)  # for the colour bar
    reach = max(float(np.abs(values[np.isfinite(values)]).max(initial=0.0)) for values in maps)
    for axis, values in zip(axes, maps, strict=True):
        drawn, _ = draw_map(axis, values, signed=True, reach=reach)
    figure.colorbar(drawn, ax=axes, shrink=0.7, pad=0.02).set_label("cosine, one scale for all", fontsize=8)
    figure.suptitle(f"Maps while training (n = {len(images)} images, {len(saved)} epochs)", fontsize=10)
    return figure


def control_bars(
    rows: pd.DataFrame, *, title: str = "Grounding", metrics: Sequence[str] = ("cnr", "pointing_game")
) -> Figure:
    """Each map beside its controls, with intervals: one axis a metric, one bar a map or control.

    `rows`: one target of `grounding.summarise`.
    Lines: 0 for the contrast-to-noise ratio, the mean area share for the pointing game and the mass.
    """
    if rows.empty or rows["target"].nunique() != 1:
        raise ValueError("control_bars takes the rows of one target, for example rows[rows['target'] == 'macro']")
    figure, axes = new_figure(len(metrics), width=5.2, height=0.27 * len(rows) / len(metrics) + 1.0)
    colours = dict(zip(dict.fromkeys(rows["kind"]), ("gloria", "convirt", "mgca", "prior"), strict=False))
    for axis, metric in zip(axes, metrics, strict=True):
        part = rows[rows["score"] == metric]
        pairs = list(zip(part["kind"], part["control"], strict=True))
        shades = [to_rgba(colour_of(colours[kind]), 0.35 if control else 1.0) for kind, control in pairs]
        bars = {"xerr": intervals(part), "capsize": 2, "error_kw": {"linewidth": 1}}
        axis.barh(np.arange(len(part)), part["value"], color=shades, **bars)
        axis.axvline(0.0 if metric == "cnr" else part["chance"].mean(), color="black", linestyle="--", linewidth=1)
        names = [(f"{kind}: {control}" if control else kind).replace("_", " ") for kind, control in pairs]
        axis.set_yticks(np.arange(len(part)), names if axis is axes[0] else [""] * len(names))
        axis.invert_yaxis()
        meaning = "no contrast" if metric == "cnr" else "mean area, chance"
        axis.set_xlabel(f"{metric.replace('_', ' ')}; dashed: {meaning}")
    figure.suptitle(f"{title}, target {rows['target'].iloc[0]} (n = {int(rows['n'].max())} phrases)")
    return figure


def _colour_bar(figure: Figure, axis: Axes, drawn: AxesImage, label: str) -> None:
    low, high = drawn.get_clim()
    ticks = [low, (low + high) / 2, high]
    texts = [f"{0.0 if abs(value) < 1e-3 * max(map(abs, ticks)) else value:.3g}" for value in ticks]
    bar = figure.colorbar(drawn, ax=axis, orientation="horizontal", shrink=0.85, pad=0.02)
    bar.set_label(label, fontsize=8)
    bar.set_ticks(ticks, labels=texts, fontsize=7)
