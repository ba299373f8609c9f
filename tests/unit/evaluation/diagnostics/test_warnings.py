"""Synthetic curves for each rule, and measured curves (in `curves`) for the limits."""

import json
from pathlib import Path
from typing import Any

import pytest

from ijepa.evaluation.diagnostics.warnings import RECENT, TREND, find_warnings, new_training_warnings, training_warnings

CURVES = Path(__file__).parent / "curves"
STEPS = [{"loss": 1 - step / 100, "target_std": 1.0} for step in range(50)]


def diagnoses(*ranks: float, **fixed: float) -> list[dict[str, float]]:
    return [{"rankme_centred": rank, "std": 1.0, "mean_cosine": 0.3, **fixed} for rank in ranks]


def along(key: str, *values: float) -> list[dict[str, float]]:
    return [{**row, key: value} for row, value in zip(diagnoses(*[30.0] * len(values)), values, strict=True)]


def found(rows: list[dict[str, float]], steps: list[dict[str, float]] = STEPS) -> list[tuple[str, str]]:
    return [(finding.level, finding.topic) for finding in find_warnings(steps, rows)]


def test_find_warnings_accepts_a_rank_that_recovers() -> None:
    assert found(diagnoses(40, 20, 14, 13, 14, 15, 15, 16)) == []
    assert found(diagnoses(40, 20, 14, 14, 14, 14, 14, 14)) == [], "it has stopped falling"


FALLING = (40.0, 36.0, 30.0, 26.0, 22.0, 16.0, 12.0, 8.0)


def test_find_warnings_watches_a_rank_that_keeps_falling() -> None:
    assert found(diagnoses(*FALLING)) == [("watch", "rank falls")]
    assert found(diagnoses(*FALLING[: TREND - 1])) == [], "too few for a trend"
    assert "from 22.0 to 8.0" in find_warnings(STEPS, diagnoses(*FALLING))[0].text


def with_accuracy(*values: float) -> list[dict[str, float]]:
    return [{**row, "knn": value} for row, value in zip(diagnoses(*FALLING), values, strict=True)]


def test_find_warnings_prefers_accuracy_to_rank() -> None:
    assert found(with_accuracy(0.4, 0.4, 0.5, 0.6, 0.6, 0.7, 0.7, 0.7)) == []
    assert found(with_accuracy(0.4, 0.4, 0.4, 0.4, 0.4, 0.2, 0.2, 0.2)) == [("watch", "accuracy falls")]
    for length, level in ((TREND, "watch"), (TREND + RECENT, "collapse")):
        low = [{**row, "knn": 0.2 if place > 2 else 0.4} for place, row in enumerate(diagnoses(*[30.0] * length))]
        assert found(low) == [(level, "accuracy falls")]
    noise = with_accuracy(0.03, 0.04, 0.02, 0.03, 0.02, 0.02, 0.01, 0.02)
    assert found(noise) == [("watch", "rank falls")], "accuracies near zero say nothing"


def test_find_warnings_watches_images_that_grow_alike() -> None:
    assert found(along("std", 1.0, 1.0, 1.0, 1.0, 0.9, 0.5, 0.2, 0.03)) == [("watch", "images become similar")]
    assert found(along("std", 1.0, 0.5, 0.3, 0.25, 0.25, 0.25, 0.25, 0.25)) == []
    assert found(along("mean_cosine", 0.2, 0.6, 0.95, 0.96, 0.96, 0.96, 0.95, 0.93)) == []
    assert found(along("mean_cosine", 0.2, 0.6, 0.9, 0.97, 0.98, 0.985, 0.99, 0.99)) == [
        ("watch", "all images point in one direction")
    ]


def test_find_warnings_of_levels_need_no_trend() -> None:
    assert found(diagnoses(1.0, 1.0, 1.0)) == [("collapse", "features have one direction")]
    assert found(along("std", 1e-5, 1e-5, 1e-5)) == [("collapse", "all images have the same features")]
    constant = [{**step, "target_std": 1e-4} for step in STEPS]
    assert found(diagnoses(30, 30, 30), constant) == [("collapse", "targets are constant")]
    position = diagnoses(30, 30, 30, position_r2=0.99)
    assert found(position) == [("watch", "position explains the features")]
    assert found([*position[:2], *diagnoses(30, position_r2=0.3)]) == [], "one value below the limit"
    assert found(diagnoses(1.0, 1.0)) == [], "two measurements say nothing"


def write(run: Path, rows: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in STEPS) + '{"loss": 0.')
    (run / "diagnostics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_new_training_warnings_do_not_repeat(tmp_path: Path) -> None:
    fresh = new_training_warnings(tmp_path)
    assert fresh() == [] and training_warnings(tmp_path) == []
    rows = diagnoses(*FALLING)
    write(tmp_path, rows)
    (line,) = fresh()
    assert line.startswith("watch: rank falls: centered RankMe went from 22.0 to 8.0")
    assert training_warnings(tmp_path) == [line]
    rows += diagnoses(5)
    write(tmp_path, rows)
    assert fresh() == [], "the same warning, with other numbers"
    rows += diagnoses(1.2, 1.1, 1.0)
    write(tmp_path, rows)
    assert [line.partition(": features")[0] for line in fresh()] == ["collapse"]


def curve(name: str, *, labels: bool) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (CURVES / f"{name}.jsonl").read_text().splitlines()]
    return rows if labels else [{key: value for key, value in row.items() if key != "knn"} for row in rows]


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("name", ["photographs-healthy", "scenes-healthy"])
def test_measured_healthy_runs_give_no_warning(name: str, labels: bool) -> None:
    rows = curve(name, labels=labels)
    assert min(row["rankme_centred"] for row in rows) < 0.5 * rows[0]["rankme_centred"], "the rank does fall"
    for length in range(1, len(rows) + 1):
        assert found(rows[:length]) == []


@pytest.mark.parametrize("name", ["scenes-small-weights", "scenes-no-average"])
def test_measured_collapsed_runs_give_watch_and_then_collapse(name: str) -> None:
    rows = curve(name, labels=True)
    levels = [level for length in range(1, len(rows) + 1) for level, _ in found(rows[:length])]
    assert levels[0] == "watch" and levels[-1] == "collapse"
    assert levels == sorted(levels, reverse=True), "a collapse stays a collapse"
    unlabeled = curve(name, labels=False)
    assert any(found(unlabeled[:length]) for length in range(len(rows))), "without labels there is a warning too"
