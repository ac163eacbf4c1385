import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest


@pytest.fixture(autouse=True)
def no_figure_is_left_open():
    before = plt.get_fignums()
    yield
    assert plt.get_fignums() == before
