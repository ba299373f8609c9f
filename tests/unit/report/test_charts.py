import base64
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from ijepa.report.charts import MAX_POINTS, Line, class_chart, line_chart, running_mean, spectrum_chart
from ijepa.report.images import Picture


def svg(chart: Picture) -> str:
    """Return the SVG of a chart; fails if it is not XML."""
    text = base64.b64decode(chart.uri.partition("base64,")[2]).decode()
    ElementTree.fromstring(text)
    return text


def chart(values: np.ndarray, **more: bool) -> Picture:
    return line_chart("Title", [Line("value", np.arange(1.0, len(values) + 1), values)], **more)


def slow_mean(values: list[float], window: int) -> list[float]:
    near = [values[max(0, place - window // 2) : place + (window + 1) // 2] for place in range(len(values))]
    return [sum(some) / len(some) for some in near]


@pytest.mark.parametrize("window", [1, 2, 5, 12, 100])
def test_running_mean_agrees_with_a_loop(window: int) -> None:
    values = np.sin(np.arange(40.0)) + np.arange(40.0) ** 2 / 99
    np.testing.assert_allclose(running_mean(values, window), slow_mean(values.tolist(), window))


def test_charts_are_the_same_every_time_and_depend_on_their_values() -> None:
    first, again, other = (chart(np.cos(np.arange(count))) for count in (50, 50, 51))
    assert first == again and first.uri != other.uri


def test_charts_keep_text_as_text() -> None:
    text = svg(chart(np.cos(np.arange(300.0)) + 2, smooth=True, log_scale=True))
    assert "<text" in text and "<script" not in text


@pytest.mark.parametrize("smooth", [False, True])
def test_line_chart_of_a_long_run_is_no_larger_than_of_a_short_one(smooth: bool) -> None:
    long, short = (svg(chart(np.cos(np.arange(count)), smooth=smooth)) for count in (200_000, MAX_POINTS))
    assert len(long) < 2.5 * len(short)


def test_line_chart_keeps_a_spike_of_one_step() -> None:
    values = np.ones(100_000)
    values[54_321] = 50.0
    spiked = chart(values, smooth=True)
    assert "maximum 50" in spiked.alt and "maximum 1" in chart(np.ones(100_000), smooth=True).alt
    heights = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", svg(spiked))]
    assert min(heights) < 15  # near the top of a chart with a height of 137


def test_alt_of_a_line_chart_has_the_ends_and_the_range() -> None:
    alt = line_chart("T", [Line("v", np.array([1.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.5678]))]).alt
    assert "1 at step 1, 2.568 at step 4, minimum 1, maximum 3" in alt


def test_class_chart_shortens_long_names_and_skips_unknown_shares_in_its_alt() -> None:
    shares = {"trained": np.array([0.5, np.nan]), "random": np.array([0.25, 0.75])}
    drawn = class_chart(["a" * 40, "b"], shares)
    assert "a" * 27 + "… 50.0" in drawn.alt and "nan" not in drawn.alt
    assert "random" in svg(drawn) and "a" * 28 not in svg(drawn)


def test_spectrum_chart_counts_large_singular_values() -> None:
    drawn = spectrum_chart({"trained": np.array([1.0, 0.6, 0.02, 1e-4])}, 1e-4)
    assert "2 of 4" in drawn.alt and "3 above 1 percent" in drawn.alt
