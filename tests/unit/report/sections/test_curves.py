from pathlib import Path

import pytest

from ijepa.report.run_data import MissingInput, read_run_data
from ijepa.report.sections.curves import curve_section, training_panels


def titles(run: Path) -> dict[str, list[str]]:
    return {group: [panel.title for panel in panels] for group, panels in training_panels(read_run_data(run)).items()}


def test_training_panels_are_those_that_the_logs_fill(whole_run: Path, run: Path) -> None:
    groups = titles(whole_run)
    assert groups["Learning"] == ["Loss", "Skill", "Gradient norm"]
    assert groups["Feature diagnostics"] == [
        "RankMe",
        "kNN during training",
        "Standard deviation of targets",
        "novelty",
    ]
    assert groups["Schedules"] == ["Learning rates", "EMA momentum"]  # the weight decay is constant
    assert groups["Speed"] == ["Images per second"]
    (run / "metrics.jsonl").unlink()
    assert set(titles(run)) == {"Feature diagnostics", "Speed"}


def test_training_panels_have_a_weight_decay_that_changes(run: Path) -> None:
    file = run / "metrics.jsonl"
    file.write_text(file.read_text().replace('"weight_decay": 0.05', '"weight_decay": 0.04', 1))
    assert "Weight decay" in titles(run)["Schedules"]


def test_panels_show_the_last_value_of_each_line(whole_run: Path) -> None:
    panels = {each.title: each for group in training_panels(read_run_data(whole_run)).values() for each in group}
    assert [value for _, _, value in panels["Loss"].last] == ["0.02067"]
    assert [(label, value) for _, label, value in panels["Learning rates"].last] == [
        ("encoder", "0.001"),
        ("predictor", "0.002"),
    ]


def test_curve_section_is_missing_without_logs(run: Path) -> None:
    for name in ("metrics", "timings", "diagnostics"):
        (run / f"{name}.jsonl").unlink()
    with pytest.raises(MissingInput):
        curve_section(read_run_data(run))
