"""Which run makes the file that another one reads. A convention in place of paths in study files.

| parameter left blank | is the file           | of the run of        | with the same            |
|----------------------|-----------------------|----------------------|--------------------------|
| `manifest`           | manifest.csv          | 01_data_preparation  | dataset                  |
| `checkpoint`         | checkpoints/best.pt   | 02_pretraining       | objective, seed          |

"The same" holds for parameters that both notebooks have; a `dataset` left blank agrees with any. When several runs are
left, every further parameter in which they differ must agree, too. 09_paper_tables reads every other run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gloria_core.study.yaml_strict import StudyError

FILLED = ("out", "study", "run_id")
"""Parameters that the runner fills, never a study file."""
COLLECTOR = "09_paper_tables"


@dataclass(frozen=True)
class Draft:
    """A run that has no name yet: `values` are all parameters of its notebook."""

    notebook: str
    values: Mapping[str, Any]
    resources: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """`file` in the folder of the run of `notebook` that agrees in the parameters `same`."""

    notebook: str
    file: str
    same: tuple[str, ...]


PATHS = {
    "manifest": Source("01_data_preparation", "manifest.csv", ("dataset",)),
    "checkpoint": Source("02_pretraining", "checkpoints/best.pt", ("objective", "seed")),
    "data_root": Source("", "", ()),  # comes from outside: a folder of radiographs
}
"""Parameters that hold paths, and who makes them."""


def needs_of(index: int, drafts: Sequence[Draft]) -> dict[str, int]:
    """For each file that draft `index` reads, the index of the draft that makes it. Raises `StudyError`.

    Keys are parameter names; the collector, which reads folders and not one file, has a key for each other run.
    """
    draft = drafts[index]
    if draft.notebook == COLLECTOR:
        return {f"run {other}": other for other in range(len(drafts)) if drafts[other].notebook != COLLECTOR}
    wanted = [key for key, source in PATHS.items() if source.notebook and draft.values.get(key) == ""]
    return {key: _maker(key, draft, drafts) for key in wanted if draft.notebook != PATHS[key].notebook}


def _maker(key: str, draft: Draft, drafts: Sequence[Draft]) -> int:
    source = PATHS[key]
    makers = [index for index, other in enumerate(drafts) if other.notebook == source.notebook]
    if not makers:
        raise StudyError(f"{draft.notebook} reads a {key}, but no stage runs {source.notebook}; add it or give `{key}`")
    agreed: list[str] = []
    left = makers
    names = [*source.same, *_differing([drafts[index] for index in makers])]
    for name in dict.fromkeys(names):
        if name in source.same or len(left) > 1:
            matching = [index for index in left if _agree(name, draft, drafts[index])]
            if not matching:
                there = sorted({repr(drafts[index].values[name]) for index in left})
                have = " and ".join([f"{name} {draft.values[name]!r}", *agreed])
                raise StudyError(
                    f"{draft.notebook} reads the {key} of {have}, but {source.notebook} is run for "
                    f"{name} {', '.join(there)}; add that run to its grid"
                )
            left = matching
            if name in draft.values and name in drafts[left[0]].values:
                agreed.append(f"{name} {draft.values[name]!r}")
    if len(left) > 1:
        raise StudyError(
            f"{draft.notebook} could read the {key} of {len(left)} runs of {source.notebook}, which differ in "
            f"{', '.join(_differing([drafts[index] for index in left]))}; give `{key}`, or one run for each"
        )
    return left[0]


def _agree(name: str, draft: Draft, other: Draft) -> bool:
    if name not in draft.values or name not in other.values:
        return True
    return draft.values[name] == other.values[name] or (name == "dataset" and draft.values[name] == "")


def _differing(drafts: Sequence[Draft]) -> list[str]:
    first = drafts[0].values
    return [name for name in first if any(other.values.get(name) != first[name] for other in drafts[1:])]
