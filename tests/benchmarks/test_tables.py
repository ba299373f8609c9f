"""A table's figures each stand under the run that made them."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ijepa.evaluation.results.schema import EvaluationResult

FILE = Path(__file__).parents[2] / "benchmarks" / "tables.py"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("tables", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = [{"encoder": name, "top1": 0.5} for name in ("scenes", "random ViT-S", "random", "pixels")]
    result = EvaluationResult(kind="linear", chance=0.1, rows=rows)
    monkeypatch.setattr(module, "evaluate", lambda *given, **options: (result, None))
    monkeypatch.setattr(module, "initial_small", lambda *given: "small")
    return module


def test_what_is_kept_of_a_former_run_keeps_its_commit(tables: Any, tmp_path: Path, monkeypatch) -> None:
    output = tmp_path / "found.json"
    for commit, kind in (("aaa", "linear"), ("bbb", "knn")):
        monkeypatch.setattr(tables, "machine", lambda told=commit: {"command": [told], "commit": told, "versions": {}})
        command = ["tiny-imagenet", str(tmp_path), "--only", kind, "--output", str(output)]
        assert CliRunner().invoke(tables.main, command, catch_exceptions=False).exit_code == 0
    found = json.loads(output.read_text())
    assert {kind: (entry["commit"], entry["command"]) for kind, entry in found["protocols"].items()} == {
        "linear": ("aaa", ["aaa"]),
        "knn": ("bbb", ["bbb"]),
    }
    assert not {"commit", "command", "versions"} & found.keys(), "no run's word stands above all"


def test_figures_of_an_unknown_run_are_not_kept(tables: Any, tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    output.write_text(json.dumps({"commit": "new", "protocols": {"knn": {"rows": {}}}}))
    command = ["tiny-imagenet", str(tmp_path), "--only", "linear", "--output", str(output)]
    assert CliRunner().invoke(tables.main, command, catch_exceptions=False).exit_code == 0
    assert set(json.loads(output.read_text())["protocols"]) == {"linear"}
