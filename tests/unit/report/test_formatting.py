import pytest

from ijepa.report.formatting import format_number, format_tick, format_value


@pytest.mark.parametrize(
    ("value", "label"),
    [(0, "0"), (0.25, "0.25"), (5e-4, "5e-4"), (1500, "1.5k"), (2e6, "2M"), (-0.5, "−0.5"), (1.5e-6, "1.5e-6")],
)
def test_format_tick_is_short(value: float, label: str) -> None:
    assert format_tick(value) == label


@pytest.mark.parametrize(
    ("value", "text"), [(1234567, "1,234,567"), (60.0, "60"), (0.123456, "0.1235"), (float("nan"), "–")]
)
def test_format_number_has_four_digits_and_complete_integers(value: float, text: str) -> None:
    assert format_number(value) == text


def test_format_value_leaves_texts_and_truth_values_as_they_are() -> None:
    assert (format_value("a"), format_value(True), format_value(0.5)) == ("a", "True", "0.5")
