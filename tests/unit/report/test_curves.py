import re
from pathlib import Path

import numpy as np
import pytest

from ijepa.report.curves import MOST_POINTS, Line, Panel, running_mean, training_panels
from ijepa.report.drawing import tick
from ijepa.report.run_data import read_record


def slow_mean(values: list[float], window: int) -> list[float]:
    means = []
    for place in range(len(values)):
        near = values[max(0, place - window // 2) : place + (window + 1) // 2]
        known = [value for value in near if value == value]
        means.append(sum(known) / len(known) if known else float("nan"))
    return means


@pytest.mark.parametrize("window", [1, 2, 5, 12, 100])
def test_running_mean_agrees_with_the_slow_one(window: int) -> None:
    values = np.sin(np.arange(40.0)) + np.arange(40.0) ** 2 / 99
    values[[0, 7, 8, 9, 39]] = np.nan
    np.testing.assert_allclose(running_mean(values, window), slow_mean(values.tolist(), window))


def panel(count: int, **more: bool) -> Panel:
    x = np.arange(1.0, count + 1)
    return Panel("Title", "A caption.", (Line("value", x, np.cos(x) + 2),), **more)


def test_drawing_takes_the_page_s_colours_and_letters() -> None:
    svg = panel(300, noisy=True, log=True).svg()
    assert svg.startswith("<svg viewBox=") and svg.endswith("</svg>")
    assert "var(--c1)" in svg and "var(--soft)" in svg
    assert not re.search(r": ?#[0-9a-f]{6}", svg) and "font-family" not in svg and "DejaVu" not in svg
    assert "http" not in svg and "<style" not in svg


def test_drawing_is_the_same_every_time_and_its_ids_its_own() -> None:
    first, again, other = panel(50).svg(), panel(50).svg(), panel(51).svg()
    assert first == again
    ids = [set(re.findall(r'id="([^"]*)"', svg)) for svg in (first, other)]
    assert ids[0] and not ids[0] & ids[1]


@pytest.mark.parametrize("noisy", [False, True])
def test_long_curve_is_no_larger_than_a_short_one(noisy: bool) -> None:
    assert len(panel(200_000, noisy=noisy).svg()) < 2.5 * len(panel(MOST_POINTS, noisy=noisy).svg())


def test_spike_of_one_step_survives_thinning() -> None:
    x = np.arange(1.0, 100_001)
    y = np.ones(100_000)
    flat, y[54_321] = Panel("T", "", (Line("v", x, np.ones(100_000)),), noisy=True).svg(), 50.0
    spiked = Panel("T", "", (Line("v", x, y),), noisy=True).svg()
    assert "highest 50" in spiked and "highest 1" in flat
    drawn = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", spiked)]
    assert min(drawn) < 15  # near the top of a drawing 137 high


def test_gaps_are_left_out_and_the_last_value_is_shown() -> None:
    x = np.arange(1.0, 6)
    line = Line("v", x, np.array([1, np.nan, 3, 4.5678, np.nan]))
    assert line.last == 4.5678 and len(line.known[0]) == 3
    html = Panel("T", "Read <this>.", (line,)).html()
    assert "<b>4.568</b>" in html and "Read &lt;this&gt;." in html and "1 at step 1, 4.568 at step 4" in html


def test_panels_are_those_that_files_fill(whole_run: Path, run: Path) -> None:
    groups = training_panels(read_record(whole_run))
    titles = {panel.title for panels in groups.values() for panel in panels}
    assert {"Loss", "Skill", "RankMe", "kNN on the way", "novelty", "Learning rates", "Images per second"} <= titles
    assert not titles & {"Weight decay", "Waiting for data", "Explained by position"}
    (run / "metrics.jsonl").unlink()
    assert set(training_panels(read_record(run))) == {"Health of the features", "Speed"}


def test_weight_decay_that_moves_is_drawn(run: Path) -> None:
    file = run / "metrics.jsonl"
    file.write_text(file.read_text().replace('"weight_decay": 0.05', '"weight_decay": 0.04', 1))
    assert "Weight decay" in {panel.title for panel in training_panels(read_record(run))["Schedules"]}


def test_no_files_no_groups(run: Path) -> None:
    for name in ("metrics", "timings", "diagnostics"):
        (run / f"{name}.jsonl").unlink()
    assert training_panels(read_record(run)) == {}


@pytest.mark.parametrize(
    ("value", "label"),
    [(0, "0"), (0.25, "0.25"), (5e-4, "5e-4"), (1500, "1.5k"), (2e6, "2M"), (-0.5, "−0.5"), (1.5e-6, "1.5e-6")],
)
def test_ticks_are_short(value: float, label: str) -> None:
    assert tick(value) == label
