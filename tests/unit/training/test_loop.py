"""What a run writes, and what changes no bit of it: workers, logging, waiting; memory stands still."""

import json
import multiprocessing
import os
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import yaml

from ijepa.checkpoint.format import list_checkpoints, load_checkpoint
from ijepa.config.recipe import Recipe
from ijepa.data.loading.shuffle import Order
from ijepa.data.sources.base import TarSource
from ijepa.distributed.process_group import SINGLE_PROCESS
from ijepa.model.ijepa import IJEPA
from ijepa.training.loop import Callback, make_loader, pretrain
from ijepa.training.optimizer import make_optimizer
from ijepa.training.runtime import resolve
from tests.conftest import TINY
from tests.helpers.runs import bytes_of, recipe, source
from tests.reference.dense import goal_of, normalised, smooth_l1

GROWTH = 8 * 2**20


def test_a_run_writes_what_design_promises(whole):
    assert {p.name for p in whole.iterdir()} >= {
        "recipe.yaml",
        "run.json",
        "metrics.jsonl",
        "timings.jsonl",
        "checkpoints",
    }
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    keys = [
        "step",
        "epoch",
        "loss",
        "skill",
        "lr_encoder",
        "lr_predictor",
        "weight_decay",
        "momentum",
        "grad_norm",
        "target_std",
    ]
    assert all(list(row) == keys for row in rows)
    assert rows[-1]["epoch"] == pytest.approx(8 * 8 / 60)
    timings = [json.loads(line) for line in (whole / "timings.jsonl").read_text().splitlines()]
    assert [t["step"] for t in timings] == [2, 3, 4, 6, 8]  # 3 and 6: checkpoints
    assert all(t["images_per_second"] > 0 and t["memory"] > 0 for t in timings)
    assert [p.name for p in list_checkpoints(whole / "checkpoints")] == ["step-00000006", "step-00000008"]
    assert Recipe.load(whole / "recipe.yaml") == recipe(
        Path(yaml.safe_load((whole / "recipe.yaml").read_text())["data"]["path"])
    )


def test_skill_in_metrics_equals_its_definition(scenes, tmp_path):
    """1 - loss / the loss of each position's mean target so far: for step 2, that of the first step's batch."""
    chosen = recipe(scenes, steps=2, checkpoint__every=1, schedule={"warmup": "1 steps"})
    images = source(scenes)
    pretrain(chosen, images, tmp_path, quiet=True)
    order = Order(chosen.seed, len(images), chosen.data.order, chosen.data.block, chosen.data.window)
    batches = list(make_loader(chosen, images, order, resolve(chosen), SINGLE_PROCESS).iterate(0, 2))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    def goals(model, batch):
        weights = dict(model.target_encoder.named_parameters())
        return torch.cat([goal_of(weights, chosen.model, normalised(image).float()) for image in batch.pixels])

    model = IJEPA(chosen.model, chosen.seed)
    mean = torch.zeros_like(model.position_mean)
    for row, saved, micros in zip(
        rows, [None, list_checkpoints(tmp_path / "checkpoints")[0]], [batches[:2], batches[2:]], strict=True
    ):
        if saved:
            load_checkpoint(saved, model, make_optimizer(model, chosen.optimizer))
            torch.testing.assert_close(model.position_mean, mean, rtol=1e-4, atol=1e-5)
        loss = sum(model(batch).loss.item() for batch in micros)
        baseline = 0.0
        for batch in micros:
            gap = smooth_l1(mean[batch.targets.index % len(mean)], goals(model, batch)[batch.targets.index]).mean(1)
            baseline += float(gap @ batch.loss_weight)
        assert row["loss"] == pytest.approx(loss, rel=1e-4)
        assert row["skill"] == pytest.approx(1 - loss / baseline, abs=1e-4)
        mean = torch.cat([goals(model, batch) for batch in micros]).unflatten(0, (8, -1)).mean(0)


@pytest.mark.parametrize("change", [{"data__workers": 1}, {"data__workers": 3}, {"log_every": 5}], ids=str)
def test_workers_and_logging_change_no_bit(scenes, whole, tmp_path, change):
    pretrain(recipe(scenes, **change), source(scenes), tmp_path / "run", quiet=True)
    assert bytes_of(tmp_path / "run") == bytes_of(whole)


class _Slow(TarSource):
    """Images that take their time."""

    def _image(self, index: int) -> bytes:
        time.sleep(0.05)
        return super()._image(index)


def test_waiting_for_data_is_told(scenes, whole, tmp_path):
    """Eight images a step are a wait of .4 s at the least, within steps of whatever length: not one may be missing."""
    slow = _Slow(source(scenes).index)
    pretrain(recipe(scenes, data__workers=0), slow, tmp_path / "run", quiet=True)
    waited = []
    for run in (whole, tmp_path / "run"):
        rows = [json.loads(line) for line in (run / "timings.jsonl").read_text().splitlines()]
        assert all(0 <= row["data_wait"] <= 1 for row in rows)
        waited.append(sum(row["data_wait"] * row["seconds"] for row in rows))
    assert waited[1] > 8 * 8 * 0.05 * 0.99  # 8 steps of 8 images; the shares are rounded
    assert bytes_of(tmp_path / "run") == bytes_of(whole)


def test_another_seed_changes_everything(scenes, whole, tmp_path):
    pretrain(recipe(scenes, seed=1), source(scenes), tmp_path / "run", quiet=True)
    assert bytes_of(tmp_path / "run")["metrics"] != bytes_of(whole)["metrics"]


def test_micro_batches_change_rounding_only(scenes, whole, tmp_path):
    pretrain(recipe(scenes, batch__micro=8), source(scenes), tmp_path / "run", quiet=True)
    for ours, theirs in zip((tmp_path / "run" / "metrics.jsonl").open(), (whole / "metrics.jsonl").open(), strict=True):
        a, b = json.loads(ours), json.loads(theirs)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-3
        )


@pytest.mark.slow
def test_memory_does_not_grow(scenes, tmp_path):
    """Resident memory over 500 steps, after the first two hundred, of this process and of the loader's, in bfloat16."""
    seen: dict[int, list[int]] = defaultdict(list)

    def measure(model):
        for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
            seen[pid].append(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        return {}

    bf16 = {"precision": {"autocast": "bf16"}}
    shape = {part: {**TINY["model"][part], "depth": 1} for part in ("encoder", "predictor")}
    small = {"model": {**TINY["model"], **shape}, "batch": {"global": 8, "micro": 8}, "checkpoint__every": 500}
    chosen = recipe(scenes, steps=500, data__workers=1, **small, **bf16)
    batches = 300 * chosen.batch.total * 3 * 48 * 48
    assert batches > 1.5 * GROWTH  # to keep every batch would be seen
    pretrain(chosen, source(scenes), tmp_path, callbacks=[Callback(20, measure)], quiet=True)
    watched = {pid: sizes for pid, sizes in seen.items() if len(sizes) > 20}
    assert len(watched) == 2
    for sizes in watched.values():
        assert max(sizes[-3:]) - max(sizes[8:13]) < GROWTH, [m >> 20 for m in sizes]
