"""The folder of a run, written by hand: known numbers, and the checkpoint of a small untrained model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ijepa.checkpoint.format import save_checkpoint
from ijepa.config.recipe import Recipe
from ijepa.data.open import open_dataset
from ijepa.model.ijepa import IJEPA
from ijepa.training.optimizer import make_optimizer
from tests.conftest import TINY

STEPS = 60


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def metrics() -> list[dict[str, Any]]:
    rows = []
    for step in range(1, STEPS + 1):
        row = {"step": step, "epoch": step * 8 / 60, "loss": 0.5 / step + 0.01234, "skill": 0.3 - 1 / step}
        row |= {"lr_encoder": 1e-3 * step / STEPS, "lr_predictor": 2e-3 * step / STEPS, "weight_decay": 0.05}
        rows.append({**row, "momentum": 0.99 + step / 1e4, "grad_norm": 2.0 / step, "target_std": 0.9})
    rows[20] |= {"loss": None, "skill": None, "grad_norm": None, "void": True}
    return rows


def results(scenes: Path) -> dict[str, dict[str, Any]]:
    names = ["ground", "ring", "frame", "cross", "star", "crescent", "hourglass", "bars", "dots"]
    data = {
        "train": {"n": 60, "classes": 8, "path": f"{scenes}/train-*.tar"},
        "test": {"n": 20, "classes": 8, "path": f"{scenes}/val-*.tar"},
    }
    shared = {"seed": 0, "versions": {"torch": "9.8.7"}, "seconds": 1.5, "weights": {"trained": "run (step-00000060)"}}

    def top(name: str, top1: float, **more: Any) -> dict[str, Any]:
        return {"encoder": name, "top1": top1, "top5": 0.9876, "ci": [top1 - 0.0111, top1 + 0.0222], **more}

    def segmented(name: str, miou: float) -> dict[str, Any]:
        row = {"encoder": name, "miou": miou, "miou_absent_zero": miou / 2, "pixel_accuracy": 0.7531}
        return {**row, "per_class": [0.9, miou, None, *[0.1] * 6], "k": 3, "distance": "l2", "bank": {"patches": 77}}

    head = {"blocks": 4, "lr": 0.003, "weight_decay": 0.1}
    return {
        "linear-demo": {
            **shared,
            "kind": "linear",
            "level": None,
            "protocol": {"name": "demo", "description": "rates < 1 & decays"},
            "chance": 0.1357,
            "data": {**data, "classes": names[1:]},
            "rows": [top("trained", 0.4321, head=head), top("random", 0.2345, head=head), top("pixels", 0.1231)],
        },
        "knn-demo": {
            **shared,
            "kind": "knn",
            "level": None,
            "protocol": {"name": "demo", "standardize": True},
            "chance": 0.1357,
            "data": {**data, "classes": names[1:]},
            "rows": [top("trained", 0.3333, k=20, top1_by_k={"10": 0.2222}), top("random", 0.4444, k=20)],
            "notes": ["k = 200 is more than the 60 train images, all of which vote"],
        },
        "segmentation-demo": {
            **shared,
            "kind": "segmentation",
            "level": 1,
            "protocol": {"name": "demo", "image_size": 48, "ignore": [255]},
            "data": {**data, "classes": names},
            "rows": [segmented("trained", 0.2468), segmented("random", 0.1357)],
        },
    }


@pytest.fixture(scope="session")
def whole_run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every file; tests do not change it."""
    folder = tmp_path_factory.mktemp("report") / "run"
    (folder / "evaluations").mkdir(parents=True)
    values = {**TINY, "steps": STEPS, "data": {"path": str(scenes)}, "description": "For <tests> & nothing else."}
    recipe = Recipe.read(values, "tiny")
    (folder / "recipe.yaml").write_text(recipe.dump())
    fingerprint = open_dataset(scenes, split="train").fingerprint
    info = {"command": ["ijepa", "pretrain", "tiny"], "versions": {"ijepa": "0.1.0"}, "commit": "c0ffee", "seed": 0}
    info |= {"images": 60, "fingerprint": fingerprint, "resolved": {"autocast": False}, "data": {"path": str(scenes)}}
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "metrics.jsonl").write_text(lines(metrics()))
    times = [{"step": step, "seconds": 2.0, "images_per_second": 100.0 + step} for step in range(10, STEPS + 1, 10)]
    (folder / "timings.jsonl").write_text(lines(times))
    measured = [{"step": step, "rankme": 9.0 + step / 10, "knn": 0.2, "novelty": step / 7} for step in (0, 30, 60)]
    (folder / "diagnostics.jsonl").write_text(lines(measured))
    for name, result in results(scenes).items():
        (folder / "evaluations" / f"{name}.json").write_text(json.dumps(result))
    model = IJEPA(recipe.model, 7)
    save_checkpoint(folder / "checkpoints", STEPS, model, make_optimizer(model, recipe.optimizer), {}, 1)
    return folder


@pytest.fixture
def run(whole_run: Path, tmp_path: Path) -> Path:
    """A copy of the run, which tests may change."""
    return Path(shutil.copytree(whole_run, tmp_path / "run"))
