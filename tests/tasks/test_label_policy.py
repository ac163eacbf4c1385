import numpy as np
import pandas as pd
import pytest

from gloria_core.tasks.classification.label_policy import CHEXPERT_UNCERTAIN, binary_targets

FRAME = pd.DataFrame({"Edema": [1, 0, -1, np.nan], "Cardiomegaly": [-1, -1, 1, np.nan]})


@pytest.mark.parametrize(
    ("unmentioned", "uncertain", "expected"),
    [
        ("negative", "ignore", [1, 0, np.nan, 0]),
        ("ignore", "ignore", [1, 0, np.nan, np.nan]),
        ("negative", "positive", [1, 0, 1, 0]),
        ("ignore", "negative", [1, 0, 0, np.nan]),
    ],
)
def test_policies(unmentioned, uncertain, expected):
    found = binary_targets(FRAME, ["Edema"], unmentioned=unmentioned, uncertain=uncertain)
    np.testing.assert_array_equal(found["Edema"], expected)


def test_policy_by_label():
    found = binary_targets(FRAME, ["Edema", "Cardiomegaly"], uncertain=CHEXPERT_UNCERTAIN)
    np.testing.assert_array_equal(found, [[1, 0], [0, 0], [1, 1], [0, 0]])


def test_bad_input_is_refused():
    with pytest.raises(KeyError, match="Edemma"):
        binary_targets(FRAME, ["Edemma"])
    with pytest.raises(KeyError, match="positive"):
        binary_targets(FRAME, ["Edema"], unmentioned="positive")
    with pytest.raises(KeyError, match="ones"):
        binary_targets(FRAME, ["Edema"], uncertain="ones")
    with pytest.raises(ValueError, match="'Edema': 2"):
        binary_targets(pd.DataFrame({"Edema": [0.0, 2.0]}), ["Edema"])
