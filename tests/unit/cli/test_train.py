import json
from pathlib import Path

import pytest

from ijepa.cli.train import _diagnosis
from ijepa.config.recipe import Recipe
from tests.conftest import TINY
from tests.helpers.commands import ijepa


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    found = ijepa("pretrain", "vit-huge-16-in22k", "--dry-run", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    for words in (
        "630.7 M context + 630.7 M target encoder, 22.3 M predictor",
        "3177412 steps (276297 of warm-up)",
        "14 x 14",
    ):
        assert words in found.stdout
    assert not list(tmp_path.iterdir())


def test_plan_writes_json(tmp_path):
    flags = ["--gpu", "H200", "--gpus", "4", "--country", "sweden", "--batch.global", "1024", "--json", "plan.json"]
    found = ijepa("plan", "vit-large-16-in1k", *flags, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "4 x NVIDIA H200" in found.stdout and "(Sweden, " in found.stdout and "256 per GPU" in found.stdout
    values = json.loads((tmp_path / "plan.json").read_text())
    assert values["recipe"]["batch"]["global"] == 1024 and values["devices"] == 4


@pytest.mark.parametrize(("steps", "expected"), [(4000, 400), (300, 50), (20, 20)])
@pytest.mark.parametrize("asked", [None, 0, 7])
def test_default_interval_measures_a_run_ten_times(scenes: Path, steps: int, expected: int, asked: int | None) -> None:
    """Warnings need three measurements, and measuring must not be a large part of a short run."""
    recipe = Recipe.read({**TINY, "steps": steps, "data": {"path": f"{scenes}/train-*.tar"}}, "tiny")
    (callback,) = _diagnosis(recipe, 160, asked, None, Path())
    assert callback.every == {None: expected, 0: steps, 7: 7}[asked]
