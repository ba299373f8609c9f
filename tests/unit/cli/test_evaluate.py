import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from ijepa.cli import cli
from ijepa.evaluation.protocols import DEFAULTS
from ijepa.evaluation.results.schema import EvaluationResult
from ijepa.utils.errors import UserError
from tests.helpers.results import write_result


@pytest.mark.parametrize("kind", DEFAULTS)
def test_evaluate_help_names_the_default_protocol(kind):
    text = " ".join(CliRunner().invoke(cli, ["evaluate", kind, "--help"]).output.split())
    assert re.search(rf"default protocol(,| is) {DEFAULTS[kind]}\b", text)


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("linear", ["--train-list", "a", "--devkit", "d"], {"train_list": "a", "test_list": None, "devkit": "d"}),
        ("knn", ["--test-list", "b"], {"train_list": None, "test_list": "b", "devkit": None}),
        ("segmentation", ["--labels", "voc"], {"train_list": None, "test_list": None, "labels": "voc"}),
    ],
)
def test_evaluate_passes_data_options_on(kind, given, expected, monkeypatch):
    from ijepa.evaluation import run

    seen = {}

    def evaluate(*words, **options):
        seen.update(options, words=words)
        return EvaluationResult(kind="knn", rows=[{"encoder": "a", "top1": 0.5}]), Path("result.json")

    monkeypatch.setattr(run, "evaluate", evaluate)
    found = CliRunner().invoke(cli, ["evaluate", kind, "W", "--train", "x", "--test", "y", *given])
    assert found.exit_code == 0, found.output
    assert seen["words"] == (kind, "W", "x", "y")
    assert {key: seen[key] for key in expected} == expected
    assert ("devkit" in seen) == (kind != "segmentation") and ("labels" in seen) == (kind == "segmentation")


@pytest.mark.parametrize("words", [["compare"], ["--compare"], ["--no-published", "--compare"]])
def test_evaluate_compare_prints_the_table(tmp_path: Path, words: list[str]) -> None:
    files = [str(write_result(tmp_path / f"{top}.json", [{"encoder": "mine", "top1": top}])) for top in (0.25, 0.75)]
    done = CliRunner().invoke(cli, ["evaluate", *words, *files])
    assert done.exit_code == 0, done.output
    assert "25.00" in done.output and "75.00" in done.output
    assert ("I-JEPA ViT-H/14" in done.output) == (len(words) == 1)


def test_evaluate_compare_is_in_the_help_and_needs_files() -> None:
    assert "--compare" in CliRunner().invoke(cli, ["evaluate", "--help"]).output
    with pytest.raises(UserError) as err:
        CliRunner().invoke(cli, ["evaluate", "--compare"], catch_exceptions=False)
    assert err.value.where == "compare"
