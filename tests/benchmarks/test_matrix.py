"""The matrix of versions: what is read from pytest's report, and what the page says of it."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "matrix.py"

TESTS = """
import pytest

@pytest.mark.parametrize("value", [1, 2])
def test_value(value):
    assert value == 1, "not one"

@pytest.mark.skip(reason="no driver")
def test_device():
    raise AssertionError

@pytest.fixture
def broken():
    raise RuntimeError("no fixture")

def test_setup(broken):
    pass

@pytest.fixture
def closing():
    yield
    raise RuntimeError("not closed")

def test_teardown(closing):
    pass
"""


@pytest.fixture(scope="module")
def matrix() -> Any:
    spec = importlib.util.spec_from_file_location("matrix", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["matrix"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def outcome(matrix: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is read from the report of a run of TESTS."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=report.xml", "test_some.py"]
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode == 1
    return matrix.read_report((folder / "report.xml").read_text())


def test_read_report_counts_tests_and_gives_reasons(outcome: dict[str, Any]) -> None:
    assert outcome["passed"] == 1
    assert outcome["skipped"] == {"test_some::test_device": "no driver"}
    reasons = {"test_value[2]": "not one", "test_setup": "no fixture", "test_teardown": "not closed"}
    assert outcome["failed"].keys() == {f"test_some::{name}" for name in reasons}
    for name, reason in reasons.items():
        assert reason in outcome["failed"][f"test_some::{name}"]


def test_page_names_versions_counts_and_every_test_that_did_not_pass(matrix: Any, outcome: dict[str, Any]) -> None:
    versions = {"python": "3.12.1", "torch": "2.11.0+cu130", "torchvision": "0.26.0", "torchao": "0.18.0"}
    about = {"versions": {**versions, "numpy": "2.4.6"}, "cpu": "Some CPU", "instruction_sets": "AVX512"}
    run = {"commit": "0123456789abcdef", **about, "cuda_build": "13.0", "devices": [], **outcome, "seconds": 120}
    page = matrix.page({"runs": {"one": run}})
    assert "| 3.12.1 | 2.11.0+cu130 | 0.26.0 | 0.18.0 | 2.4.6 | 13.0 | no | 1 | 3 | 1 | 2 | 0123456789 |" in page
    assert "Some CPU (AVX512)" in page and "- `test_some::test_device`: no driver" in page
    assert all(f"- `{name}`: " in page for name in outcome["failed"])


def test_a_suite_that_dies_without_a_report_has_failed(matrix: Any, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "pytest.py").write_text("import os\nos.abort()\n")  # python -m pytest finds it in the current folder
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    outcome = matrix.test(Path(sys.executable), [])
    assert outcome["failed"] == {"the suite": "ended with code -6, no report"} and outcome["passed"] == 0
    assert outcome["versions"].keys() == {"python", "torch", "torchvision", "torchao", "numpy"}


def test_combinations_are_read_and_a_python_that_does_not_start_is_refused(matrix: Any) -> None:
    here = matrix.Combination.parse(f"2.13.0,0.28.0,{sys.executable}")
    assert here.name() == f"torch-2.13.0-python-{sys.version_info[0]}.{sys.version_info[1]}"
    with pytest.raises(click.BadParameter, match="TORCH,TORCHVISION,PYTHON"):
        matrix.Combination.parse("2.13.0,python3")
    with pytest.raises(click.UsageError, match="does not start"):
        matrix.Combination.parse("2.13.0,0.28.0,/nowhere/python").name()
