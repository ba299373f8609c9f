"""The scripts under benchmarks/ do what their first lines say, on a demo of seconds."""

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from ijepa import load_encoder
from ijepa.demo import run
from ijepa.report.sections.curves import longer_panels

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(name: str, *arguments: object) -> str:
    command = [sys.executable, str(BENCHMARKS / name), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demos") / "one"
    small = {"steps": 4, "batch.global": 8, "checkpoint.every": 2, "data.workers": 0, "schedule.warmup": "1"}
    small |= {"model.encoder.width": 32, "model.encoder.depth": 1, "model.predictor.depth": 1, "log_every": 1}
    run(folder, images=160, overrides=small)
    return folder


def test_seeds_gathers_margins(demo: Path, tmp_path: Path) -> None:
    script("seeds.py", demo, demo, "--output", tmp_path / "seeds.json")
    found = json.loads((tmp_path / "seeds.json").read_text())
    assert found["runs"][0]["seed"] == 0
    assert found["runs"][0]["wall"] == json.loads((demo / "demo.json").read_text())
    for kind, figure in (("linear", "top1"), ("knn", "top1"), ("segmentation", "miou")):
        rows = json.loads((demo / "evaluations" / f"{kind}-demo.json").read_text())["rows"]
        value = {row["encoder"]: 100 * row[figure] for row in rows}
        margin = value["trained"] - max(value["random"], value["pixels"])
        assert found[kind]["least_margin"] == pytest.approx(margin, abs=0.02)
        assert found[kind]["margin"] == [found[kind]["least_margin"]] * 2


@pytest.mark.slow
def test_kills_compares_bit_for_bit(scenes: Path, tmp_path: Path) -> None:
    small = ["--model.encoder.width", 16, "--model.encoder.heads", 2, "--model.encoder.depth", 1]
    small += ["--model.predictor.depth", 1, "--batch.global", 4, "--kills", 1, "--workers", 0, "--checkpoint.every", 9]
    out = tmp_path / "kills.json"
    said = script("kills.py", scenes, "--steps", 20, "--run", tmp_path / "runs", "--output", out, *small)
    (row,) = json.loads(out.read_text())["runs"]
    assert "the same bits" in said and row["workers"] == 0 and row["differ"] == [] and len(row["killed_at"]) == 1
    spec = spec_from_file_location("kills", BENCHMARKS / "kills.py")
    assert spec and spec.loader
    kills = module_from_spec(spec)
    spec.loader.exec_module(kills)
    (tmp_path / "runs" / "workers-0" / "metrics.jsonl").write_text("{}\n")
    assert kills.differing(tmp_path / "runs" / "workers-0", tmp_path / "runs" / "straight") == ["metrics.jsonl"]


def test_ship_makes_weights_with_their_curves(demo: Path, tmp_path: Path) -> None:
    scenes = demo.with_name("one-scenes")
    out = tmp_path / "shipped"
    sets = ["--train", f"{scenes}/train-*.tar", "--test", f"{scenes}/val-*.tar"]
    script("ship.py", demo, *sets, "--output", out, "--every", 2)
    assert load_encoder(out).embed_dim == 32
    assert str(scenes) not in (out / "recipe.yaml").read_text()
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [2, 4]
    curve = [json.loads(line) for line in (out / "accuracy.jsonl").read_text().splitlines()]
    assert [row["step"] for row in curve] == [0, 2, 4] and all(0 <= row["knn"] <= 1 for row in curve)
    assert json.loads((out / "about.json").read_text())["images"] == 133
    assert [panel.title for panel in longer_panels(out)] == ["Accuracy", "Skill", "Standard deviation of targets"]
