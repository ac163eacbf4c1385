"""The figures that several tasks share: image grids, bars with intervals, label efficiency, training curves.

Every function takes arrays or a table and returns a matplotlib Figure whose title says what it shows and of how many.
Colours are safe for colour-blind readers, and an objective has the same colour everywhere. A figure is closed in pyplot
before it is returned: a notebook shows it once, as the value of its cell. A value that does not apply is written "-".
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

_OBJECTIVES = {"": 0, "gloria": 0, "convirt": 1, "mgca": 2, "prior": 4, "cxr_clip": 9, "imagenet": 8, "random": 7}
_GRAYS = {"empty": "0.85", "centre_prior": "0.6"}
_CHANCE = {"auroc": 0.5}

Colour = tuple[float, float, float]


def new_figure(count: int = 1, *, width: float, height: float, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure, closed in pyplot, with `count` axes of `width` x `height` inches in rows of at most `columns`."""
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (width * columns, height * rows + (0.6 if count > 1 else 0.0))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    plt.close(figure)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    sns.despine(figure)
    return figure, list(axes.flat[:count])


def colour_of(objective: str) -> Colour:
    """The colour of an objective or baseline; unknown names share one that no known objective has."""
    if objective in _GRAYS:
        return to_rgb(_GRAYS[objective])
    return sns.color_palette("colorblind")[_OBJECTIVES.get(objective, 6)]


def name_of(metric: str) -> str:
    """A metric's name as it is written in a figure."""
    return "AUROC" if metric == "auroc" else metric.replace("_", " ")


def wrapped(text: object, width: int) -> str:
    """Text in lines of at most `width` characters; its own line breaks stay."""
    return "\n".join(textwrap.fill(line, width, break_long_words=False) for line in str(text).splitlines())


# ------------------------------------------------------------------------------------------------------------ images


@dataclass(frozen=True)
class Mark:
    """What is marked on an image under one label: a mask (H, W) or a box (x, y, width, height), in pixels.

    `text` is written in the box. `fill`: opacity of the colour inside a mask.
    """

    label: str
    mask: np.ndarray | None = None
    box: Sequence[float] | None = None
    dashed: bool = False
    text: str = ""
    fill: float = 0.0


def image_grid(
    images: Sequence[np.ndarray | None],
    titles: Sequence[str] = (),
    marks: Sequence[Sequence[Mark]] = (),
    *,
    colours: Mapping[str, str | Colour] | None = None,
    row_labels: Sequence[str] = (),
    columns: int = 5,
    side: float = 2.4,
    title: str = "Studies",
) -> Figure:
    """Gray images (H, W) side by side, uint8 as 0..255 and floats over their own range; None leaves a place blank.

    `titles` and `marks` are one an image, `side` is the width of an image in inches. A label of the marks has one
    colour in all images, which the legend names; `colours` fixes them. Raises ValueError for no image, other numbers of
    titles or marks, or a mask of other pixels.
    """
    images = list(images)
    shapes = [np.shape(image) for image in images if image is not None]
    if not shapes:
        raise ValueError("an image grid needs at least one image")
    if len(titles) not in (0, len(images)) or len(marks) not in (0, len(images)):
        raise ValueError(f"{len(titles)} titles and {len(marks)} lists of marks for {len(images)} images")
    labels = sorted({mark.label for several in marks for mark in several})
    legend = {"facecolor": "0.25", "edgecolor": "0.25", "labelcolor": "white"} if colours else {"frameon": False}
    colours = colours or dict(zip(labels, _distinct_colours(len(labels)), strict=True))
    texts = [wrapped(text, 30) for text in titles]
    # a constrained layout makes room for the legend, but lets one that is too wide run over the edges
    across = min(max(int(side * min(columns, len(images)) / (0.6 + 0.075 * max(map(len, labels), default=1))), 1), 4)
    tall = side * np.clip(max(h / w for h, w in shapes), 0.6, 1.5)
    height = tall + 0.14 * max((len(text.splitlines()) for text in texts), default=0)
    figure, axes = new_figure(len(images), columns=columns, width=side, height=height)
    figure.set_figheight(figure.get_figheight() + 0.3 + 0.19 * -(-len(labels) // across))
    for axis in axes:
        axis.set(xticks=[], yticks=[], frame_on=False)
    for axis, label in zip(axes[::columns], row_labels, strict=False):
        axis.set_ylabel(wrapped(label, 30), fontsize=9)
    for number, (axis, image) in enumerate(zip(axes, images, strict=True)):
        if image is not None:
            show_image(axis, image)
            axis.set_title(texts[number] if texts else "", fontsize=8)
            for mark in marks[number] if marks else ():
                draw_mark(axis, mark, colours[mark.label])
    every = [mark for several in marks for mark in several]
    styles = {label: "--" if all(mark.dashed for mark in every if mark.label == label) else "-" for label in labels}
    handles = [Line2D([], [], color=colours[label], linestyle=styles[label], label=label) for label in labels]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=across, fontsize=8, **legend)
    figure.suptitle(f"{title} (n = {len(shapes)})", fontsize=10)
    return figure


def annotated_images(
    cases: Sequence[tuple[np.ndarray, Mapping[str, np.ndarray], Mapping[str, Sequence[Sequence[float]]], str]],
    *,
    columns: int = 5,
    fill: float = 0.3,
    title: str = "Annotations",
) -> Figure:
    """Images with their masks filled and outlined and their boxes as frames.

    A case is (image (H, W) uint8, label -> mask (H, W) bool, label -> boxes (x, y, width, height), its title), all in
    pixels of the image. `fill`: opacity of a mask's colour; where masks overlap, both cover the image.
    """
    marks = [
        [Mark(label, mask=mask, fill=fill) for label, mask in masks.items()]
        + [Mark(label, box=box) for label, several in boxes.items() for box in several]
        for _, masks, boxes, _ in cases
    ]
    images, titles = [case[0] for case in cases], [case[3] for case in cases]
    return image_grid(images, titles, marks, columns=columns, title=title)


def show_image(axis: Axes, image: np.ndarray) -> None:
    """Gray pixels, uint8 from 0 to 255, without ticks."""
    limits = {"vmin": 0, "vmax": 255} if np.asarray(image).dtype == np.uint8 else {}
    axis.imshow(image, cmap="gray", **limits)
    axis.set(xticks=[], yticks=[])


def draw_mark(axis: Axes, mark: Mark, colour: str | Colour) -> None:
    """A mark on an axis that shows an image. Raises ValueError for a mask with other pixels than the image."""
    style = "dashed" if mark.dashed else "solid"
    if mark.box is not None:
        # pixel 0 is drawn from -0.5 to 0.5, while a box counts from the outer corner of pixel 0
        x, y, width, height = mark.box[0] - 0.5, mark.box[1] - 0.5, mark.box[2], mark.box[3]
        axis.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=colour, linestyle=style, linewidth=1.6))
        if mark.text:
            plate = {"facecolor": "black", "alpha": 0.6, "pad": 0.8, "edgecolor": "none"}
            axis.text(x + 1, y + 1, mark.text, color="white", fontsize=7, va="top", bbox=plate)
    if mark.mask is None:
        return
    mask, shape = np.asarray(mark.mask, bool), axis.images[0].get_array().shape
    if mask.shape != shape:
        raise ValueError(f"a mask of {mask.shape} pixels on an image of {shape}")
    if mark.fill:
        axis.imshow(np.where(mask[..., None], (*to_rgb(colour), mark.fill), 0.0))
    if mask.any():
        # a frame of background closes the line of a region that touches the border of the image
        down, across = (np.arange(size + 2) - 1 for size in shape)
        limits = axis.axis()
        axis.contour(across, down, np.pad(mask, 1).astype(float), levels=[0.5], colors=[colour], linestyles=[style])
        axis.axis(limits)  # a contour widens the axes, and the image would no longer fill them


def _distinct_colours(n: int) -> list[Colour]:
    """n colours that differ from each other and from gray: the colour-blind ones while they last."""
    safe = [colour for colour in sns.color_palette("colorblind") if max(colour) - min(colour) > 0.05]
    return safe[:n] if n <= len(safe) else sns.color_palette("husl", n)


# ----------------------------------------------------------------------------------------------- metrics' intervals


def intervals(rows: pd.DataFrame) -> np.ndarray:
    """(2, n) lengths of the error bars below and above `value`, at least zero; NaN (not drawn) without an interval.

    A percentile interval need not contain its point: the bootstrap of a biased statistic lies beside it. The bar then
    ends at the point on that side.
    """
    value, low, high = (rows[name].to_numpy(dtype=float) for name in ("value", "ci_low", "ci_high"))
    return np.maximum([value - low, high - value], 0.0)


def metric_bars(
    rows: pd.DataFrame, *, metric: str = "auroc", by: str = "objective", count: str = "n", title: str = ""
) -> Figure:
    """One group of bars a target, one bar a value of the column `by`, with intervals; bars of AUROC begin at chance.

    `rows`: metric rows (target, metric, value, ci_low, ci_high, n), and a column `chance` for a black tick at each bar.
    With `by="metric"` all metrics of the rows are drawn. `count`: the column that is written at the targets.
    Raises ValueError for no row, or two of one bar.
    """
    rows = rows if by == "metric" else rows[rows["metric"] == metric]
    # not "": pandas leaves out a level of that name
    rows = rows.assign(**{by: rows[by].replace("", " ") if by in rows else " "})
    names, start = list(rows[by].unique()), _CHANCE.get(metric, 0.0)
    if rows.empty or rows.duplicated(["target", by]).any():
        raise ValueError(f"metric_bars takes one row per target and {by} of metric {metric!r}, and at least one")
    table = rows.pivot(index="target", columns=by).loc[rows["target"].unique()]
    value, errors = table["value"][names], [intervals(table.xs(name, axis=1, level=1)) for name in names]
    figure, (axis,) = new_figure(width=8, height=(0.22 * len(names) + 0.16) * len(table) + 1.3)
    palette = [colour_of(name) for name in names] if by == "objective" else sns.color_palette("colorblind", len(names))
    look = {"left": start, "color": palette, "width": 0.8, "capsize": 2, "error_kw": {"linewidth": 1}}
    (value - start).plot.barh(ax=axis, xerr=np.array(errors), legend=False, **look)
    for name, bars in zip(names, [group for group in axis.containers if isinstance(group, BarContainer)], strict=True):
        bars.set_label(name.replace("_", " "))
        texts = value[name].map("{:.2f}".format).mask(table["ci_low"][name].isna(), lambda text: text + " (-)")
        texts = texts.mask(value[name].isna(), "-")
        axis.bar_label(bars, texts, padding=2, fontsize=8)
        if "chance" in table:
            places = [bar.get_y() + bar.get_height() / 2 for bar in bars]
            axis.scatter(table["chance"][name], places, marker="|", color="black", s=90, zorder=3)
    counts, unit = table[count].max(axis=1).astype(int), count.replace("_", " ")
    axis.set_yticks(range(len(table)), [f"{target} ({unit} = {number})" for target, number in counts.items()])
    axis.set(ylim=(len(table) - 0.5, -0.5), ylabel="")
    axis.axvline(start, color="black", linewidth=1)
    low = min(start - 0.1, np.nanmin(rows["ci_low"].to_numpy(dtype=float), initial=start) - 0.07) if start else 0.0
    axis.set_xlim(low, 1.08)
    hint = f"; {start:g} is chance" if start else "; black tick: chance" if "chance" in rows else ""
    axis.set_xlabel(f"{name_of(metric)}, 95 % interval{hint}")
    axis.set_title(f"{title or name_of(metric)} (n = {int(rows['n'].max())})")
    if names != [" "]:
        figure.legend(loc="outside lower center", ncols=len(names), frameon=False)
    return figure


def label_efficiency(
    rows: pd.DataFrame,
    metrics: Mapping[str, Mapping[str, float | str]] | None = None,
    *,
    target: str = "macro",
    title: str = "Linear probe",
) -> Figure:
    """Metrics of one target against the label fraction (log axis): the mean over seeds, their range, and each seed.

    `rows`: metric rows with label_fraction, seed and, for several lines, objective. One objective alone has the
    interval of every seed. `metrics`: metric -> its baselines by name, each a value or the metric that holds it; by
    default every metric of the rows, with chance for AUROC. Raises ValueError where a metric has no row.
    """
    rows = rows[rows["target"] == target]
    rows = rows if "objective" in rows else rows.assign(objective="")
    if metrics is None:
        metrics = {name: {"chance": _CHANCE[name]} if name in _CHANCE else {} for name in rows["metric"].unique()}
    missing = [metric for metric in metrics if metric not in set(rows["metric"])]
    if missing or not metrics:
        raise ValueError(f"no row of metric {', '.join(missing) or 'any'!r} for target {target!r}")
    figure, axes = new_figure(len(metrics), width=5.2, height=3.7)
    for axis, (metric, baselines) in zip(axes, metrics.items(), strict=True):
        part = rows[rows["metric"] == metric]
        for objective, one in part.groupby("objective", sort=False):
            seeds, colour = one.groupby("label_fraction"), colour_of(objective)
            mean, low, high = (seeds["value"].agg(how) for how in ("mean", "min", "max"))
            axis.plot(mean.index, mean, color=colour, label=objective.replace("_", " ") or "mean")
            axis.fill_between(mean.index, low, high, color=colour, alpha=0.2, linewidth=0)
            # seeds side by side, so that their intervals can be told apart
            shift = 1.06 ** (seeds.cumcount() - (seeds["value"].transform("size") - 1) / 2)
            bars = intervals(one) if part["objective"].nunique() == 1 else None
            place = one["label_fraction"] * shift
            axis.errorbar(place, one["value"], yerr=bars, fmt="o", color=colour, capsize=2, markersize=4, alpha=0.7)
        for (name, value), style in zip(baselines.items(), ("--", ":", "-."), strict=False):
            if isinstance(value, str):
                base = rows[rows["metric"] == value].groupby("label_fraction")["value"].mean()
                axis.plot(base.index, base, color="0.35", linestyle=style, linewidth=1, label=name)
            else:
                label = f"{name.replace('_', ' ')} ({value:.3g})"
                axis.axhline(value, color="0.35", linestyle=style, linewidth=1, label=label)
        fractions = sorted(part["label_fraction"].unique())
        axis.set(xscale="log", xlabel="share of training labels", ylabel=f"{name_of(metric)} ({target})")
        axis.set_xticks(fractions, [f"{100 * fraction:g} %" for fraction in fractions])
        axis.minorticks_off()
        if metric not in _CHANCE:
            axis.set_ylim(bottom=-0.01)
        axis.legend(frameon=False, fontsize=8)
    n = rows.loc[rows["metric"].isin(metrics), "n"].max()
    figure.suptitle(f"{title} (n = {int(n)} test studies, {rows['seed'].nunique()} seeds)")
    return figure


# ---------------------------------------------------------------------------------------------- training and data


def training_curves(
    histories: Mapping[str, pd.DataFrame], columns: Mapping[str, str], *, x: str, kept: Mapping[str, float], title: str
) -> Figure:
    """One axis a column (name -> title), one line a history over the column `x`; a ring marks where `kept` says."""
    figure, axes = new_figure(len(columns), width=3.7, height=2.6)
    palette = sns.color_palette("colorblind", len(histories))
    for axis, (column, text) in zip(axes, columns.items(), strict=True):
        for (name, history), colour in zip(histories.items(), palette, strict=True):
            if column not in history:
                continue
            axis.plot(history[x], history[column], color=colour, marker="o", markersize=3.5, label=name)
            point = history[history[x] == kept.get(name)]
            axis.scatter(point[x], point[column], s=90, facecolors="none", edgecolors=[colour], zorder=3)
        axis.set_title(text, fontsize=10)
        axis.set_xlabel(x)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title + ("; ring: kept" if kept else ""))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def loss_history(history: pd.DataFrame, *, title: str = "Pretraining") -> Figure:
    """Loss terms over epochs, training and validation; the epoch of the lowest validation total is the kept one.

    `history` has the columns epoch, train_<term> and valid_<term>, one row an epoch.
    """
    terms = [name.removeprefix("train_") for name in history if name.startswith("train_")]
    if not terms or history.empty:
        raise ValueError("a history needs at least one row and one column train_<term>")
    sides = {
        side: history.set_index("epoch").filter(like=f"{side}_").rename(columns=lambda name: name[6:]).reset_index()
        for side in ("train", "valid")
    }
    kept = {}
    if "valid_total" in history and history["valid_total"].notna().any():
        kept = dict.fromkeys(sides, history.loc[history["valid_total"].idxmin(), "epoch"])
    titles = {term: term.replace("_", " ") for term in terms}
    return training_curves(sides, titles, x="epoch", kept=kept, title=f"{title} (n = {len(history)} epochs)")


def label_prevalence(frame: pd.DataFrame, labels: Sequence[str], *, title: str = "Labels") -> Figure:
    """Share of studies with each label positive, uncertain, negative and blank; the number of positives is written."""
    values = frame[list(labels)].apply(pd.to_numeric)
    palette = sns.color_palette("colorblind")
    kinds = {"positive": values == 1, "uncertain": values == -1, "negative": values == 0, "blank": values.isna()}
    share = pd.DataFrame({name: mask.mean() for name, mask in kinds.items()}).fillna(0.0)
    figure, (axis,) = new_figure(width=8, height=0.28 * len(labels) + 1.3)
    colours = [palette[0], palette[1], "0.75", "white"]
    share.plot.barh(stacked=True, ax=axis, color=colours, width=0.8, edgecolor="0.4", linewidth=0.4, legend=False)
    for row, count in enumerate((values == 1).sum()):
        axis.text(1.01, row, f"{count} positive", va="center", fontsize=8)
    axis.invert_yaxis()
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set(xlim=(0, 1), xlabel="share of studies", title=f"{title} (n = {len(frame)} studies)")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def report_lengths(frame: pd.DataFrame, *, title: str = "Report length") -> Figure:
    """Histogram of the words in findings and impression; empty sections are counted in the axis title, not drawn."""
    figure, axes = new_figure(2, width=4.5, height=2.6)
    for axis, section in zip(axes, ("findings", "impression"), strict=True):
        words = frame[section].fillna("").astype(str).str.split().str.len()
        used = words[words > 0]
        text = f"{section}: {len(used)} with text, {(words == 0).sum()} empty"
        if len(used):
            step = max(1, -(-int(np.ptp(used)) // 40))  # whole words a bin, so that no bin has two numbers by rounding
            sns.histplot(used, discrete=step == 1, binwidth=step, color=colour_of(""), alpha=1, ax=axis)
            axis.axvline(used.median(), color="black", linestyle="--", linewidth=1)
            text += f"\ndashed: median {used.median():g} words"
        axis.set_title(text, fontsize=10)
        axis.set(xlabel="words", ylabel="studies")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(f"{title} (n = {len(frame)} studies)")
    return figure
