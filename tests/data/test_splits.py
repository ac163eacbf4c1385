"""Splits, label subsets and the exclusive test set: disjoint, stratified, nested, and blind to the order of rows."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from gloria_core.data.manifest import COMPETITION_LABELS, validate
from gloria_core.data.splits import (
    assign_label_ranks,
    assign_splits,
    count_leaks,
    exclusive_test_set,
    label_subset,
    split_counts,
    split_warnings,
)

PREVALENCE = {"No Finding": 0.4, "Edema": 0.2, "Atelectasis": 0.1, "Fracture": 0.02, "Hernia": 0.004, "is_male": 0.5}


def make_frame(n_patients: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Patients with 1 to 40 studies, labels of very different prevalence, some uncertain and blank."""
    rng = np.random.default_rng(seed)
    sizes = np.minimum(rng.geometric(0.4, n_patients), 40)
    patient = np.repeat(np.arange(n_patients), sizes)
    n = len(patient)
    frame = pd.DataFrame({"study_id": [f"s{i}" for i in range(n)], "patient_id": [f"p{i:05d}" for i in patient]})
    for name, share in PREVALENCE.items():
        frame[name] = (rng.random(n) < share).astype(float)
    frame.loc[rng.random(n) < 0.05, "Edema"] = -1
    frame.loc[rng.random(n) < 0.05, "Atelectasis"] = np.nan
    frame["images"] = [f"images/{i}.png" for i in range(n)]
    frame["views"] = "PA"
    for name in ("findings", "impression", "boxes", "masks"):
        frame[name] = ""
    return frame


@pytest.fixture(scope="module")
def split() -> pd.DataFrame:
    return assign_label_ranks(assign_splits(make_frame(), seed=3), seed=3)


def test_patients_are_disjoint_and_the_manifest_accepts_it(split):
    assert (split.groupby("patient_id")["split"].nunique() == 1).all()
    assert (split.groupby("patient_id")["label_rank"].nunique() == 1).all()
    validate(split, source="frame")


def test_shares_and_prevalences_of_the_splits(split):
    shares = split["split"].value_counts(normalize=True)
    for name, share in {"train": 0.7, "valid": 0.1, "test": 0.2}.items():
        assert abs(shares[name] - share) < 0.005
        rows = split[split["split"] == name]
        for label in PREVALENCE:
            expected = (split[label] == 1).sum() * share
            assert abs((rows[label] == 1).sum() - expected) <= max(2.0, 0.03 * expected), (name, label)


def test_uncertain_labels_are_stratified_too(split):
    uncertain = (split["Edema"] == -1).groupby(split["split"]).mean()
    assert uncertain.max() - uncertain.min() < 0.01


@pytest.mark.parametrize("seed", range(5))
def test_ten_holders_of_a_label_are_shared_out(seed):
    frame = make_frame(300).drop(columns="Hernia")
    frame["Rare"] = 0.0
    frame.loc[frame.groupby("patient_id").head(1).index[:10], "Rare"] = 1.0
    result = assign_splits(frame, fractions={"train": 0.5, "test": 0.5}, seed=seed)
    assert 4 <= (result.loc[result["Rare"] == 1, "split"] == "test").sum() <= 6


def test_order_of_rows_does_not_matter_and_the_seed_does(split):
    frame = make_frame()
    shuffled = frame.sample(frac=1, random_state=1)
    again = assign_label_ranks(assign_splits(shuffled, seed=3), seed=3).sort_index()
    pd.testing.assert_frame_equal(again, split)
    other = assign_splits(frame, seed=4)
    assert 0.2 < (other["split"] != split["split"]).mean() < 0.8
    assert (assign_label_ranks(split, seed=4)["label_rank"] != split["label_rank"]).mean() > 0.9


def test_splits_are_the_same_on_every_machine():
    """Written down once: a change here changes everybody's numbers."""
    frame = assign_label_ranks(assign_splits(make_frame(12), seed=0), seed=0)
    assert "".join(frame.groupby("patient_id")["split"].first().str[1]) == GOLDEN_SPLITS


GOLDEN_SPLITS = "rererrararer"


def test_arguments_are_left_alone():
    frame = make_frame(20)
    before = frame.copy(deep=True)
    assign_splits(frame, seed=0)
    pd.testing.assert_frame_equal(frame, before)


def test_two_splits_only():
    result = assign_splits(make_frame(100), fractions={"train": 0.8, "test": 0.2}, seed=0)
    assert set(result["split"]) == {"train", "test"}


@pytest.mark.parametrize(
    "fractions", [{"train": 0.5}, {"train": 0.5, "dev": 0.5}, {"train": 1.5, "test": -0.5}, {}], ids=str
)
def test_bad_fractions(fractions):
    with pytest.raises(ValueError, match="fractions"):
        assign_splits(make_frame(10), fractions=fractions, seed=0)


# --- label ranks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 1.0])
def test_subset_has_its_share_of_the_training_studies(split, fraction):
    train = split[split["split"] == "train"]
    subset = label_subset(split, fraction)
    assert set(subset["split"]) == {"train"}
    assert abs(len(subset) - fraction * len(train)) <= 5


def test_subsets_are_nested(split):
    last: set = set()
    for fraction in (0.001, 0.01, 0.033, 0.1, 0.5, 1.0):
        now = set(label_subset(split, fraction)["study_id"])
        assert last <= now
        last = now


@pytest.mark.parametrize("seed", range(5))
def test_prevalences_of_small_subsets(seed):
    """A tenth of the data has each label's count to within a few; random patients would be off by 2 sigma often."""
    frame = assign_label_ranks(make_frame(seed=seed).assign(split="train"), seed=seed)
    for fraction in (0.01, 0.1):
        subset = label_subset(frame, fraction)
        for label in PREVALENCE:
            expected = (frame[label] == 1).sum() * fraction
            found = (subset[label] == 1).sum()
            assert abs(found - expected) <= max(4.0, 0.1 * expected), (fraction, label)


@pytest.mark.parametrize("seed", range(8))
def test_one_per_cent_has_a_positive_of_every_label(seed):
    frame = assign_label_ranks(make_frame(seed=seed).assign(split="train"), seed=seed)
    subset = label_subset(frame, 0.01)
    assert len(frame) * 0.01 > 40
    for label in PREVALENCE:
        assert (subset[label] == 1).any(), label


def test_large_patients_do_not_crowd_any_end(split):
    """Ranks must not sort patients by how many studies they have."""
    train = (
        split[split["split"] == "train"].groupby("patient_id").agg(size=("study_id", "size"), r=("label_rank", "first"))
    )
    assert abs(np.corrcoef(train["size"], train["r"])[0, 1]) < 0.1


def test_ranks_need_splits():
    with pytest.raises(ValueError, match="assign_splits"):
        assign_label_ranks(make_frame(10), seed=0)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, 10])
def test_bad_label_fraction(split, fraction):
    with pytest.raises(ValueError, match=r"0\.01 for one per cent"):
        label_subset(split, fraction)


# --- exclusive test set ----------------------------------------------------------------------------------------------


def hand_made() -> pd.DataFrame:
    columns = [*COMPETITION_LABELS, "Fracture", "No Finding", "is_male"]
    rows = {
        "only": {"Edema": 1.0},
        "with_blank": {"Edema": 1.0, "Fracture": np.nan},
        "two": {"Edema": 1.0, "Atelectasis": 1.0},
        "uncertain": {"Edema": 1.0, "Consolidation": -1.0},
        "other_positive": {"Edema": 1.0, "Fracture": 1.0},
        "other_uncertain": {"Edema": 1.0, "Fracture": -1.0},
        "no_finding_blank": {"Edema": 1.0, "No Finding": 1.0},
        "man": {"Edema": 1.0, "is_male": 1.0},
        "unsure": {"Edema": -1.0},
        "none": {},
    }
    frame = pd.DataFrame([{**dict.fromkeys(columns, 0.0), **row} for row in rows.values()])
    frame.insert(0, "study_id", list(rows))
    return frame


def test_exclusive_rule_by_hand():
    chosen = exclusive_test_set(hand_made(), labels=["Edema"], per_class=None, seed=0)
    assert list(chosen["study_id"]) == ["only", "with_blank", "no_finding_blank", "man"]
    assert list(chosen.index) == [0, 1, 6, 7]


def test_too_few_names_class_and_count():
    with pytest.raises(ValueError, match=r"Edema: 4 studies .* 200 are needed"):
        exclusive_test_set(hand_made(), labels=["Edema"], seed=0)
    with pytest.raises(ValueError, match="Atelectasis: 0 studies"):
        exclusive_test_set(hand_made(), per_class=1, seed=0)


def test_unknown_label():
    with pytest.raises(ValueError, match=r"'Oedema'.*Edema"):
        exclusive_test_set(hand_made(), labels=["Oedema"], seed=0)


def test_five_by_some_is_balanced_seeded_and_blind_to_order():
    rng = np.random.default_rng(0)
    n = 3000
    which = rng.integers(0, 8, n)
    frame = pd.DataFrame({"study_id": [f"s{i}" for i in range(n)]})
    for k, name in enumerate(COMPETITION_LABELS):
        frame[name] = (which == k).astype(float)
    chosen = exclusive_test_set(frame, per_class=200, seed=1)
    assert (chosen[list(COMPETITION_LABELS)].sum() == 200).all() and len(chosen) == 1000
    again = exclusive_test_set(frame.sample(frac=1, random_state=0), per_class=200, seed=1)
    assert set(again["study_id"]) == set(chosen["study_id"])
    other = exclusive_test_set(frame, per_class=200, seed=2)
    assert set(other["study_id"]) != set(chosen["study_id"])


def test_counts_are_metrics_rows(split):
    split = split.assign(meta_source=["A", "B"] * (len(split) // 2) + ["A"] * (len(split) % 2))
    split.attrs["leaks"] = {"patients in train and test": 7}
    rows = split_counts(split).set_index(["split", "target", "metric"])
    train = split[split["split"] == "train"]
    assert rows.loc[("train", "all", "patients")].tolist() == [train["patient_id"].nunique(), len(train)]
    known = train["Atelectasis"].notna().sum()
    assert rows.loc[("train", "Atelectasis", "positives")].tolist() == [(train["Atelectasis"] == 1).sum(), known]
    assert known < len(train)
    n = (train["meta_source"] == "B").sum()
    assert rows.loc[("train", "source B", "studies")].tolist() == [n, n]
    assert rows.loc[("all", "leak patients in train and test", "studies")].tolist() == [7, len(split)]


def warned(n, split="train", label_rank=0.005, **columns):
    """Warnings of n studies, half of which are positive."""
    table = {"split": split, "label_rank": label_rank, "Edema": [i % 2 for i in range(n)]}
    return split_warnings(pd.DataFrame(table | columns, index=range(n)))


def sizes(train, valid, test):
    return ["train"] * train + ["valid"] * valid + ["test"] * test


THIRDS = sizes(40, 5, 5)
EVERYWHERE = ["In the 1%.*: Mass", "In the 10%.*: Mass", "In train .n = 40.*learned there: Mass", "In test.*scored"]


def test_splits_that_work_give_no_warning(split):
    assert split_warnings(split[["split", "label_rank", "Edema"]]) == []
    assert warned(50, THIRDS) == []
    assert warned(50, THIRDS, boxes=["a"] * 45 + [""] * 5, masks="") == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"split": sizes(40, 0, 10)}, ["No validation study.*split_rule"]),
        ({"split": sizes(45, 5, 0)}, ["No test study: nothing can be scored on it"]),
        ({"split": sizes(0, 40, 10)}, ["No training study: nothing can be trained on it"]),
        ({"split": "test"}, ["No training study.*score the checkpoint of another"]),
        (
            {"n": 8, "split": sizes(6, 0, 2)},
            ["No validation.*prepare more studies", "6 training studies"],
        ),
        ({"n": 9, "split": "test"}, ["No training study: nothing"]),  # an owner's set for testing: not "prepare more"
        ({"split": sizes(31, 9, 10)}, ["31 training studies fill no batch of 32"]),
        ({"split": sizes(40, 3, 7)}, ["3 validation studies"]),
        ({"label_rank": 0.05}, ["The 1% label subset has no study: take a larger"]),
        ({"label_rank": 0.5}, ["The 1% label subset has no study", "The 10% label subset has no study"]),
        (
            {"label_rank": [0.5, 0.005] * 25, "Edema": [1, 0] * 25},
            [
                r"In the 1% label subset \(n = 20\) 1 of 1 labels.*learned there; take a larger label fraction: Edema",
                "10%",
            ],
        ),
        (
            {"Mass": 0},
            EVERYWHERE,
        ),
        (
            {"Mass": 1},
            EVERYWHERE,
        ),
        ({"boxes": [""] * 47 + ["a"] * 3}, ["All 3 studies with boxes are in test: .*not learned from"]),
        ({"masks": [""] * 40 + ["a"] * 10}, ["All 10 studies with masks are in test and valid"]),
    ],
    ids=lambda value: "|".join(value)[:60] if isinstance(value, list) else "",
)
def test_warnings_name_what_the_splits_cannot_do_with_a_remedy_that_fits(given, said):
    lines = warned(**({"n": 50, "split": THIRDS} | given))
    assert len(lines) == len(said), lines
    for line, pattern in zip(lines, said, strict=True):
        assert re.search(pattern, line), line


def test_patients_that_were_moved_to_test_are_counted(split):
    split.attrs["moved_to_test"] = 3
    assert split_warnings(split)[0].startswith("3 patients were moved to test, because they have boxes")


def test_leaks_are_counted_by_pairs():
    patients, split = pd.Series(list("aabbc"), index=[7, 7, 8, 9, 9]), ["train", "test", "train", "train", "test"]
    assert count_leaks(patients, split) == {"patients in train and test": 1}
    assert count_leaks(patients, split, rows="images") == {
        "patients in train and test": 1,
        "test images": 2,
        "test images whose patient is in train": 1,
    }
    assert count_leaks(pd.Series(list("ab")), ["train", "train"]) == {}
