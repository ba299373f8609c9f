"""The GPU's command, small and on a CPU: every part ends, agrees with float32, and compiles nothing anew."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_part_that_a_cpu_can_run_ends(tmp_path):
    pytest.importorskip("torchao")
    file = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu/run.py", "--device", "cpu", "--tiny", "--output", str(file)]
    command += ["--official", str(tmp_path)]  # no checkout: its parts fail in one line, and no other does
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    parts = json.loads(file.read_text())["parts"]
    for name, part in parts.items():
        assert ("error" in part) == name.startswith("original"), (name, part)
    assert "holds no src/models" in parts["original: equal tokens"]["error"]
    assert all(each.get("agrees") for each in parts["correctness"].values()), parts["correctness"]
    for name, part in parts.items():
        if name.startswith("step"):
            warm, final = part["graphs_warm_and_at_the_end"]
            assert warm == final and (warm > 0) == part["choice"]["compile"], name
            assert sum(part["parts"].values()) == pytest.approx(part["seconds"])
