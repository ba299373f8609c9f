"""Two processes by the real command: the demo's own recipe, in float32, has one process's losses."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ijepa.config.recipe import Recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("processes")


@pytest.mark.slow
@pytest.mark.distributed
def test_the_demos_losses_under_torchrun_are_those_of_one_process(scenes, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    file = tmp_path / "losses.json"
    script = [sys.executable, str(ROOT / "benchmarks" / "processes.py"), "losses", str(scenes)]
    subprocess.run([*script, "--steps", "4", "--output", str(file)], check=True, stdout=subprocess.DEVNULL)
    found = json.loads(file.read_text())
    one, two = found["one_process"], found["two_processes"]
    assert len(one) == len(two) == 4 and len(set(one)) == 4 and one != two  # shared out, so rounded elsewhere
    assert found["largest_gap"] == max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-4


def test_end_figures_stand_beside_the_same_seed_and_the_spread(processes):
    seeds = {"runs": [{"seed": 1}, {"seed": 0}, {"seed": 2}], "knn": {"trained": [68.5, 78.3, 77.4]}}
    found = processes.beside_seeds(70.0, "knn", seeds)
    assert found["one_process_same_seed"] == 78.3 and (found["least"], found["most"]) == (68.5, 78.3)
    assert found["within_spread"] and not processes.beside_seeds(80.0, "knn", seeds)["within_spread"]
    assert Recipe.load("scenes").seed == processes.SEED
    assert {"linear", "knn"} == processes.KINDS.keys() <= json.loads(processes.SEEDS.read_text()).keys()
