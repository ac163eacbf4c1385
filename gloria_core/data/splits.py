"""Patient-disjoint splits, nested label subsets, the exclusive test set, and splits as papers made them.

`assign_splits` and `assign_label_ranks` depend on (seed, patient or study id, labels) and never on the order of rows.

GLoRIA (Huang et al. 2021), MGCA (Wang et al. 2022) and CXR-CLIP (You et al. 2023) call scikit-learn's
`train_test_split` twice with `random_state=0`; the first part of the second call is the test set. What they give to it
differs: a list of patients, or, where an image has several rows, the rows.
"""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from sklearn.model_selection import train_test_split

from gloria_core.data.manifest import COMPETITION_LABELS, SPLIT_MARK, ManifestError, finding_columns, label_columns

DEFAULT_FRACTIONS = {"train": 0.7, "valid": 0.1, "test": 0.2}
SPLITS = tuple(DEFAULT_FRACTIONS)

# Label fractions at which the prevalences are balanced; between two edges the order is pseudo-random.
RANK_EDGES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)

SURE_EDGE = 0.01  # the subset of this fraction holds every label at least once where it has room for it

GOLDEN_RATIO = 0.6180339887498949

# What cannot be done without studies in a split, and what to do instead.
WITHOUT = {
    "train": "no training study: nothing can be trained on it; score the checkpoint of another dataset",
    "valid": "no validation study: pretraining keeps its last epoch; a split_rule that draws some may exist",
    "test": "no test study: nothing can be scored on it; score its checkpoints on the test split of another dataset",
}


def assign_splits(
    frame: pd.DataFrame, *, fractions: Mapping[str, float] = DEFAULT_FRACTIONS, seed: int
) -> pd.DataFrame:
    """A copy of `frame` with a `split` column: no patient in two splits, label counts near `fractions` in each.

    The smallest split is picked from all patients, the next from those left, and so on.
    Raises ValueError for unknown split names or fractions that do not sum to 1.
    """
    if not set(fractions) <= set(SPLITS) or not fractions:
        raise ValueError(f"fractions name {', '.join(fractions)}; splits are {', '.join(SPLITS)}")
    if any(value < 0 for value in fractions.values()) or abs(sum(fractions.values()) - 1) > 1e-6:
        raise ValueError(f"fractions must be positive and sum to 1, they are {dict(fractions)}")
    patients, table = _patients(frame, seed=seed, purpose="split")
    *small, largest = sorted((name for name in SPLITS if fractions.get(name, 0) > 0), key=fractions.get)
    split_of = dict.fromkeys(patients, largest)
    left = np.arange(len(patients))
    for name in small:
        taken = _pick(table[left], fractions[name] * table.sum(0))
        split_of |= dict.fromkeys(patients[left[taken]], name)
        left = left[~taken]
    return frame.assign(split=frame["patient_id"].map(split_of).astype(str))


def assign_label_ranks(frame: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """A copy of `frame` with `label_rank` in [0, 1), the same for all studies of a patient.

    `label_rank < p` keeps about the share p of each split's studies, with label prevalences near the whole split's;
    a smaller p is a subset of a larger one. The patients are stratified into the slices between `RANK_EDGES`.
    Raises ValueError where the splits are not assigned yet.
    """
    if "split" not in frame:
        raise ValueError("label ranks are spread within each split; call assign_splits first")
    ranks: dict[str, float] = {}
    for name in sorted(frame["split"].unique()):
        patients, table = _patients(frame[frame["split"] == name], seed=seed, purpose="rank")
        order = _nested_order(table)
        sizes = table[order, -1]
        before = (np.cumsum(sizes) - sizes) / sizes.sum()
        ranks |= dict(zip(patients[order], np.floor(before * 1e6) / 1e6, strict=True))
    return frame.assign(label_rank=frame["patient_id"].map(ranks).astype(float))


def label_subset(frame: pd.DataFrame, fraction: float, seed: int = 0) -> pd.DataFrame:
    """Training rows with `(label_rank + seed * golden ratio) mod 1 < fraction`; the index is kept.

    Seed 0 is the manifest's own subset, `label_rank < fraction`. Another seed shifts the ranks: within a seed 1 % lies
    inside 10 % inside 100 %, whole patients stay together, and multiples of the golden ratio keep small subsets of
    different seeds apart. Raises ValueError unless 0 < fraction <= 1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"the label fraction is {fraction}; it must be in (0, 1], 0.01 for one per cent")
    rank = (frame["label_rank"].to_numpy(dtype=float) + seed * GOLDEN_RATIO) % 1.0
    return frame[(frame["split"] == "train").to_numpy() & (rank < fraction)]


def split_counts(frame: pd.DataFrame) -> pd.DataFrame:
    """Metrics rows (split, target, metric, value, n) of how many studies and patients each split has.

    Also the positives of each label, among the n studies where it is known; the studies of each `meta_source`; and the
    patients or images that a published split has on both sides (target "leak ...", from `attrs["leaks"]`).
    """
    rows = []
    for split, part in frame.groupby("split"):
        rows.append((split, "all", "studies", len(part), len(part)))
        rows.append((split, "all", "patients", part["patient_id"].nunique(), len(part)))
        labels = part[label_columns(frame)].apply(pd.to_numeric)
        positives, known = (labels == 1).sum(), labels.notna().sum()
        rows += [(split, label, "positives", positives[label], known[label]) for label in labels]
        sources = part["meta_source"].value_counts(sort=False) if "meta_source" in part else {}
        rows += [(split, f"source {source}", "studies", n, n) for source, n in sources.items()]
    leaks = frame.attrs.get("leaks") or {}
    rows += [("all", f"leak {name}", "studies", n, len(frame)) for name, n in leaks.items()]
    return pd.DataFrame(rows, columns=["split", "target", "metric", "value", "n"])


def split_warnings(frame: pd.DataFrame, *, batch_size: int = 32) -> list[str]:
    """Sentences on what the splits of this manifest cannot do, each with what to do instead.

    Splits without studies, fewer training studies than a batch of notebook 02, very few validation studies, patients
    that were moved to test, boxes and masks that no training study has, label subsets without studies, and labels of
    which a split shows only one class.
    """
    parts = {name: frame[frame["split"] == name] for name in SPLITS}
    train, valid, test = (parts[name] for name in SPLITS)
    missing = [name for name in SPLITS if parts[name].empty and not (name == "valid" and train.empty)]
    too_few = "no validation study: pretraining keeps its last epoch; a tenth of so few is none, prepare more studies"
    remedies = WITHOUT | ({"valid": too_few} if len(frame) < 20 else {})
    warnings = [f"{remedies[name].capitalize()}." for name in missing]
    if 0 < len(train) < batch_size:
        remedy = "pretraining takes smaller ones, with fewer candidates; prepare more studies"
        warnings.append(f"{len(train)} training studies fill no batch of {batch_size}: {remedy}.")
    if 0 < len(valid) < 4:
        warnings.append(f"{len(valid)} validation studies: do not choose settings by a loss over so few.")
    if moved := frame.attrs.get("moved_to_test"):
        reason = "they have boxes and boxes are for testing; split_rule='published' keeps the owner's split"
        warnings.append(f"{moved} patients were moved to test, because {reason}.")
    for kind in ("boxes", "masks"):
        marked = frame["split"][frame[kind] != ""] if kind in frame else train["split"].iloc[:0]
        if len(marked) and "train" not in set(marked):
            where = f"All {len(marked)} studies with {kind} are in {' and '.join(sorted(set(marked)))}"
            warnings.append(f"{where}: they can be scored, not learned from; take another dataset to learn {kind}.")
    findings = finding_columns(frame)
    subsets = {f"the {p:.0%} label subset": label_subset(frame, p) for p in (0.01, 0.1)} if len(train) else {}
    for name, part in (subsets | {"train": train, "test": test}).items():
        if part.empty and name in subsets:
            warnings.append(f"{name.capitalize()} has no study: take a larger label fraction.")
        one_class = [label for label in findings if (part[label] == 1).sum() in (0, len(part))]
        if len(part) and one_class:
            some = ", ".join(one_class[:4]) + (", ..." if len(one_class) > 4 else "")
            use = "scored there" if name == "test" else "learned there"
            use += "; take a larger label fraction" if name in subsets else ""
            which = f"{len(one_class)} of {len(findings)} labels are positive in no study or in every one"
            warnings.append(f"In {name} (n = {len(part)}) {which}, and cannot be {use}: {some}.")
    return warnings


def exclusive_test_set(
    frame: pd.DataFrame, *, labels: Sequence[str] = COMPETITION_LABELS, per_class: int | None = 200, seed: int
) -> pd.DataFrame:
    """`per_class` studies of each label that have this finding alone; index and row order are kept.

    The rule of CheXpert 5x200 (GLoRIA, Huang et al. 2021, section 4.1): the label is 1, every other finding 0 or
    blank, never -1; "No Finding" and `is_...` columns are ignored. per_class=None takes all there are. Give only rows
    that no training sees. Raises ValueError naming a class that has too few, or a label that the frame does not have.
    """
    findings = [name for name in finding_columns(frame) if name != "No Finding"]
    unknown = [name for name in labels if name not in findings]
    if unknown:
        raise ValueError(f"no label column {unknown[0]!r}; the frame has: {', '.join(findings)}")
    values = frame[findings].to_numpy(float)
    negative = (values == 0) | np.isnan(values)
    alone = negative.sum(axis=1) == len(findings) - 1
    chosen = np.zeros(len(frame), bool)
    for name in labels:
        rows = np.flatnonzero(alone & (values[:, findings.index(name)] == 1))
        if len(rows) < (per_class or 0):
            few = f"{len(rows)} studies have this finding alone, {per_class} are needed"
            raise ValueError(f"{name}: {few}; lower per_class")
        keys = _keys(frame["study_id"].iloc[rows], seed=seed, purpose=f"exclusive {name}")
        chosen[rows[np.argsort(keys, kind="stable")][:per_class]] = True
    return frame[chosen]


def _keys(names: Sequence[str], *, seed: int, purpose: str) -> np.ndarray:
    """A pseudo-random 64-bit number for each name, the same on every machine and in every process."""
    salt = f"{seed}|{purpose}|".encode()
    digests = [hashlib.blake2b(salt + str(name).encode(), digest_size=8).digest() for name in names]
    return np.array([int.from_bytes(digest) for digest in digests], np.uint64)


def _patients(frame: pd.DataFrame, *, seed: int, purpose: str) -> tuple[np.ndarray, np.ndarray]:
    """Patient ids in pseudo-random order, and for each (P, C) its studies with each label, in the last column all.

    Present (1) and uncertain (-1) count as labels of their own.
    """
    values = frame[label_columns(frame)].to_numpy(float)
    marks = np.concatenate([values == 1, values == -1, np.ones((len(frame), 1), bool)], axis=1)
    marks = marks[:, marks.any(0)]
    codes, ids = pd.factorize(frame["patient_id"].to_numpy(object))
    table = np.column_stack([np.bincount(codes, weights=mark, minlength=len(ids)) for mark in marks.T])
    order = np.lexsort([ids.astype(str), _keys(ids, seed=seed, purpose=purpose)])
    return ids[order], table[order]


def _nested_order(table: np.ndarray) -> np.ndarray:
    """Patients (P,) in an order whose beginnings at `RANK_EDGES` have each label's share.

    From the largest edge down, each subset is picked from the one before.
    """
    total = table.sum(0)
    depth = np.zeros(len(table), int)
    # for each label, its holder with the fewest studies
    sizes = table[:, -1]
    first = np.unique([np.where(column > 0, sizes, np.inf).argmin() for column in table.T])
    sure = np.isin(np.arange(len(table)), first) & (SURE_EDGE * total[-1] >= sizes[first].sum())
    inside = np.arange(len(table))
    for edge in RANK_EDGES[::-1]:
        keep = sure[inside] & (edge >= SURE_EDGE)
        inside = inside[_pick(table[inside], edge * total, keep=keep)]
        depth[inside] += 1
    return np.lexsort([~sure, -depth])


def _pick(table: np.ndarray, target: np.ndarray, *, keep: np.ndarray | None = None) -> np.ndarray:
    """Which patients (P,) bool to take so that the sums of `table` (P, C) over them come near `target` (C,).

    One pass. `due` is what the taken patients lack of their share of all seen so far; a patient is taken if that
    brings it nearer to zero. A column counts by how rare it is, as in a chi-squared distance. Those in `keep` are
    taken in any case, and first; then patients with many studies, so that those with few can even out what they left.
    """
    keep = np.zeros(len(table), bool) if keep is None else keep
    total = np.maximum(table.sum(0), 1)
    share = np.minimum(target / total, 1)
    weighted = table / total
    # a little more than half, so that ties fall the same way whatever order a processor sums in
    half = (table * weighted).sum(1) / 2 + 1e-9
    due = np.zeros(table.shape[1])
    taken = keep.copy()
    for patient in np.lexsort([-table[:, -1], ~keep]).tolist():
        due += share * table[patient]
        if keep[patient] or due @ weighted[patient] > half[patient]:
            taken[patient] = True
            due -= table[patient]
    return taken


def random_split(n: int, *, held_out: float | int, test: bool = False, seed: int = 0) -> np.ndarray:
    """Split of each of n rows by `train_test_split`: "train", and "valid" for the `held_out` rows (share or number).

    With `test`, one half of the held-out rows is "test", the other "valid".

    Shape: (n,) text. Raises ManifestError where there are too few rows.
    """
    split = np.full(n, "train", dtype=object)
    try:
        _, rest = train_test_split(np.arange(n), test_size=held_out, random_state=seed)
        split[rest] = "valid"
        if test:
            split[train_test_split(rest, test_size=0.5, random_state=seed)[0]] = "test"
    except ValueError as error:
        raise ManifestError(f"the published split does not fit {n} rows ({error}); use split_rule='patient'") from None
    return split


def count_leaks(units: pd.Series, split: Sequence[str], *, unit: str = "patient", rows: str = "") -> dict[str, int]:
    """How many units are in both of two splits, {"patients in train and test": n}, by pairs of the splits there are.

    units, split: (n,) what belongs in one split (a patient, an image), and the split, of each row. With `rows` (what a
    row is, "images") also {"test images": n, "test images whose patient is in train": m}.
    """
    split = np.asarray(split, object)
    there = pd.crosstab(units.to_numpy(object), split) > 0
    pairs = combinations([name for name in SPLITS if name in there], 2)
    leaks = {f"{unit}s in {a} and {b}": int((there[a] & there[b]).sum()) for a, b in pairs}
    if rows:
        test, trained = units[split == "test"], units[split == "train"]
        leaks |= {f"test {rows}": len(test), f"test {rows} whose {unit} is in train": int(test.isin(trained).sum())}
    return leaks


def ids_by_split(ids: pd.Series, split: Sequence[str]) -> pd.Series:
    """Ids (of patients) for a published split that is not disjoint: "p" in two splits becomes "p (train)", "p (test)".

    A manifest has no patient in two splits; so such a patient gets two names, and the leak is counted instead. The
    manifest then accepts an image in two splits, too, where all its studies are of that patient.
    """
    split = pd.Series(np.asarray(split, object), index=ids.index)
    in_two = split.groupby(ids.to_numpy(object)).transform("nunique") > 1
    return ids.mask(in_two, ids + split.map(lambda name: SPLIT_MARK.format(split=name)))
