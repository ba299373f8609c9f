from dataclasses import replace
from pathlib import Path

import pytest

from ijepa.evaluation.results.schema import EvaluationResult
from ijepa.report.page import Section, render_page
from ijepa.report.run_data import read_run_data
from ijepa.report.sections.evaluations import evaluation_section
from ijepa.report.sections.summary import summary_section
from tests.helpers.html import Page
from tests.unit.report.conftest import results


@pytest.fixture
def page(whole_run: Path, scenes: Path) -> Page:
    """The two sections of a run with every kind of evaluation, all with chance and intervals, and a diagnosis."""
    kinds = [{**values, "chance": 0.1357} for values in results(scenes).values()]
    kinds[2]["rows"] = [{**row, "ci": [0.1, 0.2]} for row in kinds[2]["rows"]]
    row = {"encoder": "trained", "jf": 0.5, "ci": [0.4, 0.6], "j": 0.5, "f": 0.5, "objects": 9}
    data = {"test": {"n": 30, "path": "videos"}}
    kinds.append({"kind": "propagation", "level": 1, "chance": 0.2468, "data": data, "rows": [row]})
    kinds.append({"kind": "diagnosis", "numbers": {"rankme": 12.3456}, "verdict": "good <enough>"})
    run = replace(read_run_data(whole_run), results=tuple(map(EvaluationResult.from_json, kinds)))
    sections = [
        Section("summary", "Summary", summary_section(run)),
        Section("evaluations", "Evaluations", evaluation_section(run)),
    ]
    return Page(render_page(run, sections))


def test_summary_has_the_main_metric_of_each_evaluation_and_marks_the_best(page: Page) -> None:
    assert page.text("#summary", "strong") == ["43.2", "24.7", "50.0", "44.4"]
    cells = page.text("#summary", "td")
    assert cells[:4] == ["43.2", "33.3", "24.7", "50.0"] and cells[4:8] == ["23.4", "44.4", "13.6", "–"]


def test_chance_depends_on_the_kind(page: Page) -> None:
    cells = page.text("#summary", "td")
    assert cells[-8::2] == ["13.6", "13.6", "13.6", "24.7"]
    assert len(set(cells[-7::2])) == 3, "the same for both kinds of classification"
    words = page.words("#evaluations")
    assert words.count("most frequent class: 13.6") == 3 and words.count("J&F of the first mask") == 1


def test_intervals_and_data_say_images_or_videos(page: Page) -> None:
    words = page.words("#evaluations")
    assert words.count("interval over test images") == 3 and words.count("interval over test videos") == 1
    assert "test 30 videos (videos)" in words and "train 60 images" in words


def test_diagnosis_has_its_numbers_and_its_verdict(page: Page) -> None:
    assert "12.35" in page.text("#evaluations", "dd") and "good <enough>" in page.text("#evaluations", "p")


def test_metrics_are_in_percent_with_their_intervals(page: Page) -> None:
    cells = page.text("#evaluations", "td")
    assert cells[:3] == ["43.21", "42.1 to 45.4", "98.76"]
    assert "objects 9" in cells
