"""The phantom: determinism, truth masks, anatomy. What the reports say is in test_phantom_reports.py."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from scipy.ndimage import binary_dilation, distance_transform_edt

from gloria_core import phantom
from gloria_core.data.manifest import CHEXPERT_LABELS, COMPETITION_LABELS
from gloria_core.phantom import frontal
from gloria_core.phantom.canvas import AnatomyChange
from gloria_core.phantom.disease import course
from gloria_core.phantom.study import draw, exposure_of

SEED, SIZE = 11, 96


@pytest.fixture(scope="module")
def keys() -> list[tuple[int, int]]:
    return [(p.patient, k) for p in phantom.patients(SEED, 130) for k in range(1, p.studies + 1)]


@pytest.fixture(scope="module")
def studies(keys) -> list[phantom.PhantomStudy]:
    return [phantom.study(SEED, *key, size=SIZE) for key in keys]


def digest(study: phantom.PhantomStudy) -> str:
    content = hashlib.sha256((study.findings + study.impression + repr(study.labels)).encode())
    for view in sorted(study.images):
        content.update(study.images[view].tobytes())
    for region in study.regions:
        content.update(region.mask.tobytes() + repr(region.spans).encode())
    return content.hexdigest()


def test_labels_are_those_of_chexpert():
    names = "No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,Consolidation,Pneumonia"
    names += ",Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
    assert ",".join(phantom.LABELS) == ",".join(CHEXPERT_LABELS) == names
    assert COMPETITION_LABELS == ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")


def test_the_same_arguments_give_the_same_study_in_another_process(keys):
    chosen = keys[:4]
    here = [digest(phantom.study(SEED, *key, size=64, views=phantom.VIEWS)) for key in reversed(chosen)][::-1]
    code = (
        "import sys, pathlib; sys.path.insert(0, str(pathlib.Path(sys.argv[1]).parent))\n"
        "from test_phantom import SEED, digest, phantom\n"
        f"print(*[digest(phantom.study(SEED, *key, size=64, views=phantom.VIEWS)) for key in {chosen}])"
    )
    there = subprocess.run([sys.executable, "-c", code, __file__], capture_output=True, text=True, check=True)
    assert there.stdout.split() == here
    assert len(set(here)) == len(here)


def test_seed_changes_everything():
    one, other = phantom.study(0, 3, 1, size=64), phantom.study(1, 3, 1, size=64)
    assert not np.array_equal(one.images["frontal"], other.images["frontal"])


@pytest.mark.parametrize("size", [64, 100, 512])
@pytest.mark.parametrize("view", phantom.VIEWS)
def test_any_size(size, view, keys):
    study = phantom.study(SEED, *keys[0], size=size, views=(view,))
    image = study.images[view]
    assert image.shape == (size, size)
    assert image.dtype == np.uint8
    assert image.std() > 30
    assert all(region.mask.shape == (size, size) and region.mask.dtype == bool for region in study.regions)


def test_a_study_is_the_same_picture_at_every_size(keys):
    small = phantom.study(SEED, *keys[5], size=64).images["frontal"].astype(float)
    large = phantom.study(SEED, *keys[5], size=256).images["frontal"].astype(float)
    shrunk = large.reshape(64, 4, 64, 4).mean(axis=(1, 3))
    assert np.corrcoef(small.ravel(), shrunk.ravel())[0, 1] > 0.98


def test_views_share_report_and_order_does_not_matter(keys):
    both = phantom.study(SEED, *keys[1], size=64, views=("lateral", "frontal"))
    alone = phantom.study(SEED, *keys[1], size=64)
    assert np.array_equal(both.images["frontal"], alone.images["frontal"])
    assert (both.findings, both.impression) == (alone.findings, alone.impression)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"size": 63}, "size"),
        ({"size": 513}, "size"),
        ({"views": ("oblique",)}, "views"),
        ({"views": ()}, "views"),
        ({"number": 0}, "studies 1 to"),
        ({"number": 9}, "studies 1 to"),
        ({"patient": -1}, "count from 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, word):
    given = {"patient": 0, "number": 1, **arguments}
    with pytest.raises(ValueError, match=word):
        phantom.study(SEED, given.pop("patient"), given.pop("number"), **given)


def test_masks_lie_on_the_side_that_is_named(studies):
    seen = {"left": 0, "right": 0}
    for study in studies:
        for region in study.regions:
            if region.side not in seen or region.label == "Support Devices":
                continue
            columns = np.nonzero(region.mask)[1].mean() / SIZE
            # the patient's right is on the image's left; a pose shifts the midline by at most 0.05 of the width
            assert columns < 0.52 if region.side == "right" else columns > 0.48, (study.patient.patient, region.label)
            seen[region.side] += 1
    assert min(seen.values()) > 15


def test_both_sides_have_mask_when_bilateral(studies):
    regions = [region for study in studies for region in study.regions if region.side == "bilateral"]
    assert len(regions) > 10
    for region in regions:
        assert region.mask[:, : int(0.45 * SIZE)].any()
        assert region.mask[:, int(0.55 * SIZE) :].any()


def test_zones_are_ordered_from_above(studies):
    rows = {zone: [] for zone in ("upper", "mid", "lower")}
    for study in studies:
        for region in study.regions:
            if region.zone:
                rows[region.zone].append(np.nonzero(region.mask)[0].mean() / SIZE)
    assert max(rows["upper"]) < np.mean(rows["lower"])
    assert np.mean(rows["upper"]) + 0.08 < np.mean(rows["mid"]) < np.mean(rows["lower"]) - 0.06


def test_findings_lie_in_the_chest(studies, keys):
    """Lung, heart, mediastinum and a rim of chest wall hold every finding but devices and clavicles."""
    for study, key in zip(studies, keys, strict=True):
        change = AnatomyChange(())
        change.heart, change.mediastinum = 1.5, 0.15
        scene = frontal.start(SIZE, study.patient, exposure_of(SEED, *key), change)
        chest = (scene.lung["left"] + scene.lung["right"] > 0.5) | (scene.cardiac > 0) | (scene.mediastinum > 0)
        chest = binary_dilation(chest, iterations=SIZE // 14)
        for region in study.regions:
            assert region.mask.any()
            if region.label not in ("Support Devices", "Fracture"):
                assert (region.mask & ~chest).sum() <= 0.02 * region.mask.sum(), (key, region.label)


def test_box_is_the_tight_frame_of_the_mask(studies):
    region = next(region for study in studies for region in study.regions)
    x, y, width, height = region.box
    inside = np.zeros_like(region.mask)
    inside[y : y + height, x : x + width] = True
    assert not (region.mask & ~inside).any()
    assert region.mask[y].any()
    assert region.mask[y + height - 1].any()
    assert region.mask[:, x].any()
    assert region.mask[:, x + width - 1].any()


def test_without_a_finding_the_picture_changes_inside_its_mask(studies, keys):
    ratios: dict[str, list[float]] = {}
    for study, key in zip(studies, keys, strict=True):
        for region in study.regions:
            if study.labels[region.label] != 1 or len(ratios.setdefault(region.label, [])) >= 4:
                continue
            mask = np.any([r.mask for r in study.regions if r.label == region.label], axis=0)
            rest = [finding for finding in course(SEED, key[0])[key[1] - 1] if finding.label != region.label]
            exposure = exposure_of(SEED, *key)
            other, _ = draw(SEED, study.patient, key[1], exposure, rest, size=SIZE, view="frontal")
            change = np.abs(study.images["frontal"].astype(float) - other)
            outside = change[distance_transform_edt(~mask) > 3]
            ratios[region.label].append(change[mask].mean() / max(outside.mean(), 0.1))
    ratios.pop("Lung Opacity", None)  # shares its mask with the pneumonia that it describes
    assert set(COMPETITION_LABELS) | {"Pneumothorax", "Lung Lesion", "Fracture", "Support Devices"} <= set(ratios)
    for label, found in ratios.items():
        assert np.median(found) > 3.5, (label, found)


def test_a_patient_keeps_their_anatomy():
    """Without findings, and in one pose, two studies of a patient differ less than two patients do."""
    people = phantom.patients(SEED, 8)
    exposure = exposure_of(SEED, 0, 1)

    def normal(person, number):
        return draw(SEED, person, number, exposure, (), size=64, view="frontal")[0].astype(float)

    first, again = [normal(p, 1) for p in people], [normal(p, 2) for p in people]
    for i, image in enumerate(first):
        distance = [np.abs(image - other).mean() for other in again]
        assert int(np.argmin(distance)) == i
        assert sorted(distance)[1] > 1.4 * distance[i]


def test_findings_go_on_from_study_to_study():
    changes = [f.change for p in range(60) for visit in course(SEED, p)[1:] for f in visit]
    assert {"unchanged", "improved", "increased", "new"} <= set(changes)
    assert all(f.change == "" for p in range(60) for f in course(SEED, p)[0])
    counts = [len(course(SEED, p.patient)) for p in phantom.patients(SEED, 60)]
    assert counts == [p.studies for p in phantom.patients(SEED, 60)]
    assert set(counts) == {1, 2, 3, 4}


def test_cardiomegaly_is_a_wide_heart(studies):
    wide = [r.box[2] for s in studies for r in s.regions if r.label == "Cardiomegaly" and s.labels["Cardiomegaly"] == 1]
    assert min(wide) > 0.33 * SIZE
