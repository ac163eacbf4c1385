"""Tables in the form of CXR-CLIP-CGMH (https://github.com/porterlin/cxr-clip-cgmh), a fork of CXR-CLIP for devices.

- Training (and validation): `image`, a Python list of paths, and `text_label`, a list of the labels that are present;
  what is not listed is absent.
- Test: `image`, one 0/1 column for each label, and `text`, the report.
- Both may have `index`, or the number column without a name that pandas writes, and `patient_id`.

A list is read as data (`ast.literal_eval`) and never run. The images are Chang Gung Memorial Hospital's and are not
public: everybody brings tables of their own, and with `tasks` labels of their own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from gloria_core.data.manifest import ManifestError, OnError, validate
from gloria_core.data.manifest_files import file_failures
from gloria_core.data.manifest_rules import ExcludedRows, Failure, raise_failures
from gloria_core.data.prompts import (
    KINDS,
    PromptError,
    PromptSet,
    available_prompts,
    load_prompts,
    report_from_labels,
)
from gloria_core.data.sources.cgmh_tables import CGMH_LABELS, OTHER_SPELLINGS, read_studies
from gloria_core.data.splits import assign_label_ranks, assign_splits


def prepare(
    root: Path | str,
    *,
    train: str = "train.csv",
    valid: str = "",
    test: str = "test.csv",
    tasks: Sequence[str] = CGMH_LABELS,
    prompts: str | PromptSet = "cgmh",
    n_negative: int = 0,
    path_prefix: str = "",
    seed: int = 0,
    on_error: OnError = "raise",
) -> pd.DataFrame:
    """The checked manifest of the tables under `root`, one study a row; study ids are "<table>-<index>".

    train, valid, test: tables, relative to `root`; "" for one that is not there. Without a validation table a tenth of
        the training studies becomes it, patient-disjoint and stratified, drawn with `seed`. Without `patient_id` every
        study is a patient of its own: then only the makers of the tables can keep patients apart.
    tasks: the labels; each is a column of the test table.
    prompts: sentences to write the `impression` of studies without a report from: a set of the package, a JSON file
        (ours, or the fork's {label: {"pos", "neg", "unc"}}) relative to `root` or absolute. Training texts are drawn
        once with `seed`, with sentences on `n_negative` absent labels that have one; validation texts are fixed. ""
        leaves them empty, for `StudyDataset(prompts=...)` to draw anew in every epoch, as the released code does.
    path_prefix: the beginning of the tables' image paths that is to be cut off, such as the folder on another machine.
    on_error: "exclude" leaves out studies whose image files are not there and lists them in `attrs["excluded"]`.
    The tables do not name projections, so every view is "FRONTAL".
    Raises ManifestError naming file, row, column and remedy; PromptError naming study or file.
    """
    root, tasks = Path(root), [OTHER_SPELLINGS.get(name, name) for name in tasks]
    if on_error not in ("raise", "exclude"):
        raise ValueError(f"on_error must be 'raise' or 'exclude', not {on_error!r}")
    if not root.is_dir():
        raise ManifestError(f"the dataset's root {root} is not a folder; give the folder that the tables lie in")
    if len(set(tasks)) != len(tasks) or not tasks:
        raise ValueError(f"tasks must name each label once, they are {tasks}")
    tables = {"train": train, "valid": valid, "test": test}
    parts, missing = [], []
    for split, name in tables.items():
        if name:
            part = read_studies(root / name, root, split, tasks, path_prefix)
            part, failures = _with_files(part, root, name, on_error)
            parts.append(part)
            missing += failures
    if not parts:
        raise ValueError("give at least one of train, valid and test")
    frame = pd.concat(parts, ignore_index=True)
    learn = frame["split"] == "train"
    if learn.any() and not valid:
        drawn = assign_splits(frame[learn], fractions={"train": 0.9, "valid": 0.1}, seed=seed)
        frame.loc[learn, "split"] = drawn["split"]
    frame = assign_label_ranks(frame, seed=seed)
    if prompts:
        frame = _with_texts(frame, _prompts(prompts, root), tasks, seed=seed, n_negative=n_negative)
    frame = validate(frame, source=f"manifest of {root} ({', '.join(filter(None, tables.values()))}, in this order)")
    frame.attrs["excluded"] = ExcludedRows.of(missing)
    return frame


def _with_files(frame: pd.DataFrame, root: Path, name: str, on_error: OnError) -> tuple[pd.DataFrame, list[Failure]]:
    """The studies whose images are there, and a failure for each missing file, by the rows of the table."""
    failures = file_failures(frame, root, skip=set())
    gone = frame["study_id"].isin({failure.study_id for failure in failures})
    if on_error == "raise" or gone.all():
        raise_failures(failures, source=f"{root / name} (an incomplete copy? on_error='exclude' keeps what is there)")
    return frame[~gone], failures


def _prompts(given: str | PromptSet, root: Path) -> PromptSet:
    """A prompt set by name, or from a file in our form or in the fork's, where an empty sentence stands for none."""
    if isinstance(given, PromptSet):
        return given
    if given in available_prompts():
        return load_prompts(given)
    path = root / given
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        names = ", ".join(available_prompts())
        raise PromptError(f"prompts {given!r}: {path} cannot be read ({error}); names of sets: {names}") from error
    if isinstance(content, dict) and "classes" in content:
        return load_prompts(path)
    return PromptSet(path.stem, _fork_classes(content, path))


def _fork_classes(content: object, path: Path) -> dict[str, dict[str, list[str]]]:
    remedy = 'a prompt file is {label: {"pos": [...], "neg": [...], "unc": [...]}}'
    classes: dict[str, dict[str, list[str]]] = {}
    for label, kinds in content.items() if isinstance(content, dict) else [("", content)]:
        lists = [kinds.get(kind, []) for kind in KINDS] if isinstance(kinds, dict) and set(kinds) <= set(KINDS) else [0]
        if not all(isinstance(v, list) and all(isinstance(s, str) for s in v) for v in lists):
            raise PromptError(f"{path}: label {label!r} holds {kinds!r:.60}; {remedy}")
        kept = ([sentence for sentence in values if sentence.strip()] for values in lists)
        classes[OTHER_SPELLINGS.get(label, label)] = dict(zip(KINDS, kept, strict=True))
    return classes


def _with_texts(
    frame: pd.DataFrame, prompts: PromptSet, tasks: list[str], *, seed: int, n_negative: int
) -> pd.DataFrame:
    """A copy whose empty impressions say the labels. Every training study has its own generator (seed, study_id)."""
    silent = [name for name in tasks if not prompts.classes.get(name, {}).get("neg")]
    texts = []
    for row in frame[["study_id", "split", "impression", *tasks]].to_dict("records"):
        # an absent label without a negative sentence is passed over, as its empty sentence is in the released code
        labels = {name: np.nan if row[name] == 0 and name in silent else row[name] for name in tasks}
        text = row["impression"]
        try:
            if not text.strip() and row["split"] == "train":
                key = hashlib.blake2b(f"{seed}|{row['study_id']}".encode(), digest_size=8).digest()
                rng = np.random.default_rng(int.from_bytes(key))
                text = report_from_labels(labels, prompts, rng=rng, n_negative=n_negative)
            elif not text.strip():
                text = report_from_labels(labels, prompts, deterministic=True)
        except PromptError as error:
            raise PromptError(f"study {row['study_id']}: {error}") from error
        texts.append(text)
    return frame.assign(impression=texts)
