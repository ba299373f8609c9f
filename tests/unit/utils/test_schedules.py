import pytest

from ijepa.utils.schedules import half_cosine


def test_half_cosine_falls_from_one_to_zero():
    assert half_cosine(0) == 1
    assert half_cosine(1 / 3) == pytest.approx(0.75)
    assert half_cosine(0.5) == pytest.approx(0.5)
    assert half_cosine(1) == pytest.approx(0, abs=1e-12)
    values = [half_cosine(step / 100) for step in range(101)]
    assert values == sorted(values, reverse=True)
