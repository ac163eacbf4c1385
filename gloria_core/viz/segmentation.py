"""Figures of segmentation: predicted masks over radiographs, and how the fits went."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from gloria_core.viz.plots import Mark, image_grid, training_curves

# Cyan and amber differ in every form of colour blindness, and so do solid and dashed.
COLOURS = {"truth": "#00e5ff", "prediction": "#ffb000"}


def overlays(
    cases: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, str]]], *, title: str = "Segmentation"
) -> Figure:
    """One row a group ("best", "median", "worst"), one image a case: truth solid, prediction dashed.

    A case is (image (H, W) uint8, truth (H, W) bool, prediction (H, W) bool, its title). An empty mask has no outline.
    Raises ValueError for no case at all, or where a mask has other pixels than its image.
    """
    groups = {name: list(members) for name, members in cases.items() if len(members)}
    columns = max((len(members) for members in groups.values()), default=1)
    images, titles, marks = [], [], []
    for members in groups.values():
        blank = columns - len(members)
        images += [image for image, *_ in members] + [None] * blank
        titles += [name for *_, name in members] + [""] * blank
        marks += [[Mark("truth", truth), Mark("prediction", guess, dashed=True)] for _, truth, guess, _ in members]
        marks += [[]] * blank
    return image_grid(images, titles, marks, colours=COLOURS, row_labels=list(groups), columns=columns, title=title)


def fit_curves(histories: Mapping[str, pd.DataFrame], *, title: str = "Training") -> Figure:
    """Training loss and validation Dice over steps, one line a fit; the ring is at the step that was kept.

    Each history has the columns step, train_loss and valid_dice.
    """
    if not histories:
        raise ValueError("fit_curves needs at least one history")
    columns = {"train_loss": "training loss", "valid_dice": "pooled Dice on validation"}
    # all scores are NaN without a validation mask; the last step is kept then
    scores = {name: history["valid_dice"].fillna(history["step"]) for name, history in histories.items()}
    kept = {name: histories[name].loc[score.idxmax(), "step"] for name, score in scores.items()}
    return training_curves(histories, columns, x="step", kept=kept, title=f"{title} (n = {len(histories)} fits)")
