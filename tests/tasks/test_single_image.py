"""One radiograph: the score of the cohort's table, calibration by hand, and words that say what the table says."""

import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from gloria_core.data.images import ImageError
from gloria_core.tasks.classification.label_policy import binary_targets
from gloria_core.tasks.single_image import CAUTION, MIN_STUDIES, Cohort, explain_image, plain_answer, validation_cohort
from gloria_core.tasks.zero_shot import scores

PROMPTS = {
    "Pleural Effusion": {"pos": ["left effusion", "small effusion"], "neg": ["no effusion"]},
    "Lung Opacity": {"pos": ["right opacity"], "neg": ["no opacity"]},
    "No Finding": {"pos": ["no acute finding"], "neg": ["opacity"]},
}


@pytest.fixture
def targets(labelled):
    return binary_targets(labelled.set_index("study_id"), list(PROMPTS))


@pytest.fixture
def labelled(frame):
    return frame.assign(**{"No Finding": 1.0 - frame[["Pleural Effusion", "Lung Opacity"]].max(axis=1)})


def made(scores_a, targets_a):
    index = [f"s{i}" for i in range(len(scores_a))]
    one, two = pd.DataFrame({"A": scores_a}, index=index), pd.DataFrame({"A": targets_a}, index=index)
    return Cohort({"A": ["a"]}, "max", one.astype(float), two.astype(float))


@pytest.mark.parametrize("scoring", ["max", "mean", "pair", "contrast", "against_normal"])
def test_a_file_has_the_score_of_its_study(model, labelled, cache, root, scoring):
    table = scores(model, labelled, cache, PROMPTS, scoring=scoring)
    for number in (0, 3):  # a square image, and one that is padded
        answer = explain_image(model, root / f"images/{number}.png", PROMPTS, scoring=scoring)
        np.testing.assert_allclose(answer.table["score"][list(PROMPTS)], table.loc[f"s{number}"], atol=1e-5)


def test_every_kind_of_file_gives_the_same_answer(model, root, tmp_path):
    pixels = np.asarray(Image.open(root / "images/2.png"))
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(tmp_path / "x.dcm"), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Rows, data.Columns = pixels.shape
    data.PhotometricInterpretation, data.SamplesPerPixel, data.PixelRepresentation = "MONOCHROME2", 1, 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 8, 8, 7
    data.WindowCenter, data.WindowWidth = 128, 256  # the identity, so that both files hold the same gray values
    data.PixelData = pixels.tobytes()
    pydicom.dcmwrite(tmp_path / "x.dcm", data, enforce_file_format=True)
    from_png, from_dicom, from_array = (
        explain_image(model, source, PROMPTS) for source in (root / "images/2.png", tmp_path / "x.dcm", pixels)
    )
    np.testing.assert_allclose(from_array.table["score"], from_png.table["score"], atol=1e-6)
    np.testing.assert_allclose(from_dicom.table["score"].sort_index(), from_png.table["score"].sort_index(), atol=0.02)
    with pytest.raises(ImageError, match="no such file"):
        explain_image(model, tmp_path / "none.png", PROMPTS)


def test_the_map_lies_on_the_pixels_of_the_file(model, labelled, targets, cache, root):
    cohort = validation_cohort(model, labelled, cache, PROMPTS, targets)
    answer = explain_image(model, root / "images/1.png", PROMPTS, cohort=cohort)
    assert answer.image.shape == (80, 60) and answer.map_kind == "cosine"
    ((label, values),) = answer.maps.items()
    assert label == next(name for name in answer.table.index if name != "No Finding")
    assert values.shape == (80, 60) and np.isfinite(values).any() and np.isnan(values).any()
    assert np.nanmax(np.abs(values)) <= 1 + 1e-6
    only = explain_image(model, root / "images/1.png", {"No Finding": ["No acute finding."]})
    assert not only.maps and list(only.table.index) == ["No Finding"]


def test_an_objective_without_regions_has_no_map(make_model, root):
    answer = explain_image(make_model("convirt"), root / "images/1.png", PROMPTS)
    assert not answer.maps and answer.map_kind == "" and "Without a validation" in answer.text


def test_a_cohort_of_other_prompts_is_refused(model, labelled, targets, cache, root):
    cohort = validation_cohort(model, labelled, cache, PROMPTS, targets, scoring="max")
    for change in ({"scoring": "mean"}, {"prompts": {"Lung Opacity": ["opacity"]}, "scoring": "max"}):
        options = {"prompts": PROMPTS, "scoring": "max"} | change
        with pytest.raises(ValueError, match="other prompts"):
            explain_image(model, root / "images/1.png", cohort=cohort, **options)


def test_percentile_counts_those_without_the_finding():
    cohort = made([1, 2, 2, 3, 9, 9], [0, 0, 0, 0, 1, np.nan])
    assert [cohort.percentile("A", value) for value in (0, 2, 5)] == [0, 0.5, 1]
    assert np.isnan(made([1.0], [1.0]).percentile("A", 0.0))


def test_probabilities_follow_the_frequency():
    rng = np.random.default_rng(0)
    score = rng.normal(size=4000)
    y = (rng.random(4000) < 1 / (1 + np.exp(-(2 * score - 1)))).astype(float)
    cohort = made(5 + 0.1 * score, y)  # Platt's curve does not care about scale and offset
    at = np.array([-1.0, 0, 0.5, 2])
    found = cohort.probabilities(pd.DataFrame({"A": 5 + 0.1 * at}))["A"]
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-(2 * at - 1))), atol=0.03)


def test_a_score_that_is_no_evidence_gives_the_prevalence():
    y = np.array([1.0] * 10 + [0.0] * 30)
    falling = made(np.concatenate([np.zeros(10), np.ones(30)]), y)  # higher where the finding is not
    assert falling.probabilities(pd.DataFrame({"A": [0.0, 1.0]}))["A"].tolist() == [0.25, 0.25]
    constant = made(np.ones(40), y).probabilities(pd.DataFrame({"A": [1.0]}))["A"]
    np.testing.assert_allclose(constant, 0.25, atol=0.03)
    few = made(np.arange(40.0), [1.0] * (MIN_STUDIES - 1) + [0.0] * (41 - MIN_STUDIES))
    assert few.probabilities(pd.DataFrame({"A": [1.0]}))["A"].isna().all()
    assert "A" not in few.probability_thresholds and few.thresholds["A"] == 0


def test_a_perfect_score_has_finite_probabilities():
    cohort = made(np.arange(40.0), [0.0] * 20 + [1.0] * 20)
    low, high = cohort.probabilities(pd.DataFrame({"A": [0.0, 39.0]}))["A"]
    assert 0 < low < 0.1 and 0.9 < high < 1
    assert cohort.thresholds == {"A": 20.0}
    chosen = cohort.probability_thresholds["A"]
    assert chosen == cohort.probabilities(pd.DataFrame({"A": [20.0]}))["A"].item()


def table(**columns):
    base = {"score": [0.5, 0.1], "percentile": [0.97, 0.3], "probability": [0.6, 0.05], "prevalence": [0.2, 0.1]}
    base |= {"stands_out": [True, False]}
    return pd.DataFrame(base | columns, index=["Edema", "Fracture"])


def cohort_of(names):
    targets = pd.DataFrame(0.0, index=range(50), columns=names)
    return Cohort({name: ["x"] for name in names}, "max", targets, targets)


def test_plain_words():
    cohort = cohort_of(["Edema", "Fracture"])
    text = plain_answer(table(), cohort)
    assert text.startswith("Edema stands out: its score exceeds 97 % of the 50 validation studies without it")
    assert "probability 60 %, where 20 % have it" in text and text.endswith(CAUTION)
    both = plain_answer(table(stands_out=[True, True]), cohort)
    assert "So does, less: Fracture." in both
    nothing = plain_answer(table(stands_out=[False, False]), cohort)
    assert nothing.startswith("Nothing stands out. The nearest finding is Edema")
    uncalibrated = plain_answer(table(probability=[np.nan, np.nan]), cohort)
    assert "; no probability: validation has fewer than 5 studies with it" in uncalibrated
    normal = table(stands_out=[True, False]).rename(index={"Edema": "No Finding"})
    all_sick = Cohort({"Edema": ["x"]}, "max", pd.DataFrame({"Edema": [1.0]}), pd.DataFrame({"Edema": [1.0]}))
    assert "no validation study without it" in plain_answer(table(percentile=[np.nan] * 2), all_sick)
    assert "like the sentences for a normal study" in plain_answer(normal, cohort_of(["No Finding", "Fracture"]))


def test_there_is_no_cohort_without_validation_studies(model, labelled, targets, cache):
    assert validation_cohort(model, labelled.iloc[:0], cache, PROMPTS, targets) is None


def test_decisions_are_those_at_the_thresholds_of_validation(model, labelled, targets, cache):
    cohort = validation_cohort(model, labelled, cache, PROMPTS, targets)
    assert list(cohort.decide(cohort.scores, targets, labelled, macro=[], n_bootstrap=0)["metric"].unique()) == [
        f"{name}_at_threshold" for name in ("accuracy", "f1", "sensitivity", "specificity")
    ]
    perfect = made([0.0] * 6 + [1.0] * 6, [0.0] * 6 + [1.0] * 6)
    frame = pd.DataFrame(
        {"study_id": perfect.scores.index, "patient_id": perfect.scores.index, "A": [0.0] * 6 + [1] * 6}
    )
    rows = perfect.decide(perfect.scores, perfect.targets, frame.iloc[::-1], macro=["A"], n_bootstrap=5)
    assert (rows["value"] == 1).all() and set(rows["target"]) == {"A", "macro"}
    few = made([0.0, 1.0], [0.0, 1.0])
    frame = pd.DataFrame({"study_id": few.scores.index, "patient_id": few.scores.index})
    rows = few.decide(few.scores, few.targets, frame, macro=[], n_bootstrap=5)
    assert rows["value"].isna().all() and set(rows["note"]) == {
        "no probability: validation has fewer than 5 studies with it, or without it"
    }
