"""The GPU's command, small and on a CPU: every part ends, agrees with float32, and compiles nothing again."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]


def command(*more: object) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "benchmarks/gpu/run.py", "--device", "cpu", "--tiny", *map(str, more)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(whole, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    """Import one of the command's files by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.mark.slow
def test_every_part_that_a_cpu_can_run_ends(tmp_path):
    pytest.importorskip("torchao")
    file = tmp_path / "gpu.json"
    done = command("--output", file)
    assert done.returncode == 0, done.stderr
    parts = json.loads(file.read_text())["parts"]
    assert len(parts) == 6 and [file] == list(tmp_path.iterdir())
    assert not any("error" in part for part in parts.values()), parts
    assert all(each.get("agrees") for each in parts["correctness"].values()), parts["correctness"]
    for name, part in parts.items():
        if name.startswith("step"):
            warm, final = part["graphs_warm_and_at_the_end"]
            assert warm == final and (warm > 0) == part["choice"]["compile"], name
            assert sum(part["parts"].values()) == pytest.approx(part["seconds"])


def test_a_folder_that_is_no_checkout_is_refused_before_anything_runs(tmp_path):
    done = command("--output", tmp_path / "gpu.json", "--official", tmp_path)
    assert done.returncode == 2 and "holds no src/models/vision_transformer.py" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_the_minutes_hold_by_killing(tmp_path):
    file = tmp_path / "gpu.json"
    assert command("--output", file, "--minutes", 0.01).returncode == 0  # less than it takes to import torch
    first, *others = json.loads(file.read_text())["parts"].values()
    assert first == {"error": "killed after 1 seconds"} and len(others) == 5
    assert all(other == {"left out": "0.01 minutes had passed"} for other in others)


@pytest.mark.parametrize(
    ("ending", "error"),
    [("os.abort()", "its process ended with -6"), ("time.sleep(60)", "killed after 2 seconds")],
)
def test_a_part_that_dies_or_hangs_leaves_what_it_had_found(tmp_path, module, monkeypatch, ending, error):
    """As an error of the device does, after which nothing can be asked of it, nor synchronized with it."""
    part = tmp_path / "part.py"
    part.write_text(f"import os, sys, time\nopen(sys.argv[-1], 'w').write('{{\"copy\": 1}}')\n{ending}\n")
    run = module("run")
    monkeypatch.setattr(run, "__file__", str(part))
    monkeypatch.setattr(sys, "argv", ["run.py"])
    arguments = argparse.Namespace(output=tmp_path / "gpu.json")
    assert run.run_beside("ceilings", arguments, 2) == {"copy": 1, "error": error}
    assert list(tmp_path.iterdir()) == [part]


def test_the_original_is_measured_before_what_may_take_long(module):
    arguments = argparse.Namespace(device="cuda", tiny=False, images=None, official=Path())
    names = list(module("run").parts_of(arguments, print))
    assert len(names) == 14 and names.index("original: its own settings") < names.index("correctness")


@pytest.mark.parametrize("fp8", ["none", "tensorwise", "rowwise"])
def test_nothing_of_a_model_is_left_off_the_device(module, fp8):
    """The meta device stands in for a GPU: constants that were left on the host would stop its first step."""
    pytest.importorskip("torchao")
    step, device = module("step"), torch.device("meta")
    choice = step.Choice(fp8=fp8)
    model = step.build(choice.recipe(4, tiny=True), choice, device)
    off = [name for name, each in [*model.named_parameters(), *model.named_buffers()] if not each.is_meta]
    assert not off and len(list(model.buffers())) >= 6
