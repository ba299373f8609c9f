import numpy as np

from ijepa.report.maps import heat


def test_cosines_brighten_and_what_is_unknown_is_grey() -> None:
    painted = heat(np.array([[-0.5, 0.0, 0.5], [1.0, 2.0, np.nan]])).astype(int)
    brightness = painted.sum(2)
    assert brightness[0, 0] == brightness[0, 1] < brightness[0, 2] < brightness[1, 0] == brightness[1, 1]
    assert painted[1, 2].tolist() == [128, 128, 128]
