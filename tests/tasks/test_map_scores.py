import numpy as np
import pytest

from gloria_core.tasks.grounding import area_share, centre_prior, cnr, inverted, iou, mass_inside, pointing_hit

MASK = np.zeros((4, 5), dtype=bool)
MASK[1:3, 1:3] = True  # 4 of 20 pixels


def test_cnr_by_hand_and_its_sign():
    values = np.zeros((2, 2))
    values[0] = [3.0, 5.0]  # inside: mean 4, variance 1
    values[1] = [0.0, 2.0]  # outside: mean 1, variance 1
    mask = np.array([[True, True], [False, False]])
    assert cnr(values, mask) == pytest.approx(3 / np.sqrt(2))
    assert cnr(-values, mask) == pytest.approx(-3 / np.sqrt(2))
    assert cnr(inverted(values), mask) == pytest.approx(-3 / np.sqrt(2))
    assert cnr(7 * values + 11, mask) == pytest.approx(3 / np.sqrt(2))  # neither scale nor offset matter


def test_cnr_of_constants():
    assert cnr(np.full((4, 5), 0.1), MASK) == 0.0
    assert cnr(MASK.astype(float), MASK) == np.inf
    assert cnr(-MASK.astype(float), MASK) == -np.inf


def test_rounding_noise_is_no_signal():
    noisy = np.float32(0.7) + np.where(MASK, np.float32(6e-8), 0).astype(np.float32)
    assert np.ptp(noisy) > 0
    assert cnr(noisy, MASK) == 0.0
    assert pointing_hit(noisy, MASK) == mass_inside(noisy, MASK) == pytest.approx(0.2)
    np.testing.assert_allclose(iou(noisy, MASK), 0.2)
    assert cnr(np.where(MASK, 0.7001, 0.7) + np.arange(20).reshape(4, 5) * 1e-6, MASK) > 5


def test_pointing_and_its_ties():
    values = np.zeros((4, 5))
    assert pointing_hit(values, MASK) == pytest.approx(4 / 20) == area_share(values, MASK)
    values[1, 1] = 1
    assert pointing_hit(values, MASK) == 1.0
    values[0, 0] = 1
    assert pointing_hit(values, MASK) == 0.5
    values[0, 0] = 2
    assert pointing_hit(values, MASK) == 0.0


def test_mass():
    assert mass_inside(np.ones((4, 5)), MASK) == pytest.approx(0.2)
    values = np.where(MASK, 3.0, -100.0)
    assert mass_inside(values, MASK) == 1.0
    assert np.isnan(mass_inside(-np.ones((4, 5)), MASK))


def test_iou_by_hand():
    values = np.where(MASK, 1.0, 0.0)
    values[0, 0] = 0.25
    np.testing.assert_allclose(iou(values, MASK, (0.2, 0.3, 1.0)), [4 / 5, 1.0, 1.0])
    np.testing.assert_allclose(iou(5 * values - 2, MASK, (0.2, 0.3)), [4 / 5, 1.0])
    np.testing.assert_allclose(iou(np.full((4, 5), 3.0), MASK), 0.2)
    np.testing.assert_allclose(iou(inverted(values), MASK, (0.8,)), 0.0)


@pytest.mark.parametrize("mask", [np.zeros((4, 5), dtype=bool), np.ones((4, 5), dtype=bool)])
def test_empty_and_full_masks_are_nan(mask):
    values = np.arange(20.0).reshape(4, 5)
    assert np.isnan([cnr(values, mask), pointing_hit(values, mask), mass_inside(values, mask)]).all()
    assert np.isnan(iou(values, mask)).all()


def test_pixels_that_were_not_seen_do_not_count():
    values = np.arange(20.0).reshape(4, 5)
    cut = np.where(np.arange(5) < 4, values, np.nan)
    for score in (cnr, pointing_hit, mass_inside, area_share):
        assert score(cut, MASK) == score(values[:, :4], MASK[:, :4])
    np.testing.assert_array_equal(iou(cut, MASK), iou(values[:, :4], MASK[:, :4]))
    assert np.isnan(area_share(np.full((4, 5), np.nan), MASK))
    assert np.isnan(inverted(cut)[:, 4]).all() and np.nanmax(inverted(cut)) == np.nanmax(cut)


def test_centre_prior_peaks_at_the_centre_of_any_shape():
    prior = centre_prior(4, 6)
    np.testing.assert_array_equal(prior, prior[::-1, ::-1])
    assert prior.max() == prior[1, 2] == prior[2, 3]
    assert centre_prior(5, 5)[2, 2] == 1.0


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="same pixels"):
        cnr(np.zeros((4, 4)), MASK)
    with pytest.raises(ValueError, match="boolean"):
        cnr(np.zeros((4, 5)), MASK.astype(int))
