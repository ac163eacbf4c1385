"""Label efficiency: train on 1, 10 and 100 % of the training labels, score the whole test split each time.

The protocol is that of ConVIRT, GLoRIA and MGCA. Several subsets of a fraction are drawn, because at 1 % the choice of
the subset matters as much as the method; they are the same for every model.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from gloria_core.data.splits import label_subset

Fitted = TypeVar("Fitted")
# What was fitted and row numbers of test studies -> metric rows.
Score = Callable[[Fitted, np.ndarray], pd.DataFrame]


@dataclass(frozen=True)
class LabelEfficiency:
    """Which training subsets are used, and how the test split is scored.

    `subsets`: different subsets at each fraction below 1 (`label_subset` with seed 0, 1, ...); at 1 there is only one.
    `repeats`: train on the first so many of them, all by default. `seed`: that of the checkpoint; the column `seed` of
    the rows is subset + subsets * seed, so that subsets of different checkpoints have different numbers.
    `macro`: labels that the macro averages. `test_sets`: name -> frame, see `PreparedDataset.test_sets`; every fit is
    scored on each of them, and the rows have a column `dataset`. Without it: on split `test`.
    """

    fractions: Sequence[float] = (0.01, 0.1, 1.0)
    subsets: int = 1
    repeats: int | None = None
    seed: int = 0
    macro: Sequence[str] = ()
    n_bootstrap: int = 1000
    test_sets: Mapping[str, pd.DataFrame] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What every table of metrics is made with."""
        return {"macro": list(self.macro), "n_bootstrap": self.n_bootstrap}

    def run(
        self,
        frame: pd.DataFrame,
        fit: Callable[[np.ndarray, int], Fitted],
        *,
        targets: pd.DataFrame,
        score: Score | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> tuple[pd.DataFrame, dict[tuple[float, int], Fitted]]:
        """Call `fit(train, subset)` for every subset, and `score(fitted, rows)` on every test set (see `score`).

        `train` and `rows` are row numbers of `frame`; `targets` (n, K) are 1 where a study is positive. Returns the
        metric rows with the columns label_fraction, seed, split, and the subset's own size: n_train studies and
        train_positives (of macro: studies with one of its labels), and what was fitted by (fraction, subset). A subset
        without a study is left out with a warning; where none has one, both are empty. Raises ValueError for a fraction
        outside (0, 1] or an empty test set.
        """
        frame, tables, fits = frame.reset_index(drop=True), [], {}
        for fraction in self.fractions:
            for subset in range(self.subsets if fraction < 1 else 1)[: self.repeats]:
                train = label_subset(frame, fraction, subset).index.to_numpy()
                if not len(train):
                    left_out = f"fraction {fraction:g}, subset {subset} is left out: it has no training study"
                    warnings.warn(f"{left_out}; use a larger fraction", stacklevel=2)
                    continue
                if progress is not None:
                    progress(f"{100 * fraction:g} % of the labels, subset {subset}: {len(train)} studies")
                fits[float(fraction), subset] = fitted = fit(train, subset)
                table, positive = self.score(frame, fitted, score), targets.iloc[train] == 1
                counts = {**positive.sum(), "macro": positive[list(self.macro) or list(targets)].any(axis=1).sum()}
                table = table.assign(n_train=len(train), train_positives=table["target"].map(counts))
                tables.append(table.assign(**self.columns(fraction, subset)))
        return (pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()), fits

    def score(self, frame: pd.DataFrame, fitted: Fitted, score: Score | None = None) -> pd.DataFrame:
        """Metric rows of what was fitted on every test set; `score`: by default its own method of that name.

        Raises ValueError for an empty test set.
        """
        test, tables = (frame["split"] == "test").to_numpy(), []
        for name, part in ({"": frame} if self.test_sets is None else self.test_sets).items():
            rows = np.flatnonzero(test & frame["study_id"].isin(part["study_id"]))
            if not len(rows):
                raise ValueError(f"no study to test on {name and f'in {name!r}'}: split 'test' is empty")
            table = score(fitted, rows) if score else fitted.score(rows, **self.options)
            tables.append(table.assign(dataset=name) if name else table)
        return pd.concat(tables, ignore_index=True)

    def sizes(self, frame: pd.DataFrame, targets: pd.DataFrame) -> pd.DataFrame:
        """Studies, patients and positives of each label in the first subset of each fraction; `targets` as `frame`."""
        subsets = {fraction: label_subset(frame, fraction) for fraction in self.fractions}
        rows = {
            f"{100 * fraction:g} %": {"studies": len(part), "patients": part["patient_id"].nunique()}
            | (targets.loc[part.index] == 1).sum().to_dict()
            for fraction, part in subsets.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index")

    def columns(self, fraction: float, subset: int = 0) -> dict[str, object]:
        """The columns label_fraction, seed and split of the rows of a subset."""
        return {"label_fraction": fraction, "seed": subset + self.subsets * self.seed, "split": "test"}
