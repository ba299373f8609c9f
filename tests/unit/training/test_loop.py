"""Files of a run, settings that must not change its results, memory, and callbacks."""

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
from ijepa.utils.errors import RunError
from tests.conftest import TINY
from tests.helpers.runs import bytes_of, recipe, source
from tests.reference.dense import normalized, smooth_l1, target_of

GROWTH = 8 * 2**20


def test_pretrain_writes_the_documented_files(whole):
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
    """1 - loss / the loss of each position's mean target so far, which at step 2 is that of the first batch."""
    chosen = recipe(scenes, steps=2, checkpoint__every=1, schedule={"warmup": "1 steps"})
    images = source(scenes)
    pretrain(chosen, images, tmp_path, quiet=True)
    order = Order(chosen.seed, len(images), chosen.data.order, chosen.data.block, chosen.data.window)
    batches = list(make_loader(chosen, images, order, resolve(chosen), SINGLE_PROCESS).iterate(0, 2))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    def targets(model, batch):
        weights = dict(model.target_encoder.named_parameters())
        return torch.cat([target_of(weights, chosen.model, normalized(image).float()) for image in batch.pixels])

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
            gap = smooth_l1(mean[batch.targets.index % len(mean)], targets(model, batch)[batch.targets.index]).mean(1)
            baseline += float(gap @ batch.loss_weight)
        assert row["loss"] == pytest.approx(loss, rel=1e-4)
        assert row["skill"] == pytest.approx(1 - loss / baseline, abs=1e-4)
        mean = torch.cat([targets(model, batch) for batch in micros]).unflatten(0, (8, -1)).mean(0)


@pytest.mark.parametrize("change", [{"data__workers": 1}, {"data__workers": 3}, {"log_every": 5}], ids=str)
def test_pretrain_is_identical_for_any_workers_and_log_interval(scenes, whole, tmp_path, change):
    pretrain(recipe(scenes, **change), source(scenes), tmp_path / "run", quiet=True)
    assert bytes_of(tmp_path / "run") == bytes_of(whole)


class _Slow(TarSource):
    """Reads images slowly."""

    def _image(self, index: int) -> bytes:
        time.sleep(0.05)
        return super()._image(index)


def test_timings_contain_the_wait_for_data(scenes, whole, tmp_path):
    """Eight images per step take at least 0.4 s, and the whole wait must be counted."""
    slow = _Slow(source(scenes).index)
    pretrain(recipe(scenes, data__workers=0), slow, tmp_path / "run", quiet=True)
    waited = []
    for run in (whole, tmp_path / "run"):
        rows = [json.loads(line) for line in (run / "timings.jsonl").read_text().splitlines()]
        assert all(0 <= row["data_wait"] <= 1 for row in rows)
        waited.append(sum(row["data_wait"] * row["seconds"] for row in rows))
    assert waited[1] > 8 * 8 * 0.05 * 0.99  # 8 steps of 8 images; the shares are rounded
    assert bytes_of(tmp_path / "run") == bytes_of(whole)


def test_pretrain_depends_on_the_seed(scenes, whole, tmp_path):
    pretrain(recipe(scenes, seed=1), source(scenes), tmp_path / "run", quiet=True)
    assert bytes_of(tmp_path / "run")["metrics"] != bytes_of(whole)["metrics"]


def test_micro_batch_size_changes_rounding_only(scenes, whole, tmp_path):
    pretrain(recipe(scenes, batch__micro=8), source(scenes), tmp_path / "run", quiet=True)
    for ours, theirs in zip((tmp_path / "run" / "metrics.jsonl").open(), (whole / "metrics.jsonl").open(), strict=True):
        a, b = json.loads(ours), json.loads(theirs)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-3
        )


@pytest.mark.slow
def test_pretrain_memory_does_not_grow(scenes, tmp_path):
    """Resident memory of this process and of the loader's over 500 steps, after the first 200, in bfloat16."""
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
    assert batches > 1.5 * GROWTH  # keeping every batch would be noticed
    pretrain(chosen, source(scenes), tmp_path, callbacks=[Callback(20, measure)], quiet=True)
    watched = {pid: sizes for pid, sizes in seen.items() if len(sizes) > 20}
    assert len(watched) == 2
    for sizes in watched.values():
        assert max(sizes[-3:]) - max(sizes[8:13]) < GROWTH, [m >> 20 for m in sizes]


def test_callbacks_are_written_at_start_interval_and_end(scenes, tmp_path):
    rows = [Callback(4, lambda model: {"answer": 42.0})]
    pretrain(recipe(scenes), source(scenes), tmp_path, callbacks=rows, quiet=True)
    assert answers(tmp_path) == [{"step": step, "answer": 42.0} for step in (0, 4, 8)]


def answers(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "diagnostics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("at", [0, 3, 6, 8])
def test_failed_callback_loses_no_step_and_is_repeated_on_resume(scenes, whole, tmp_path, at):
    """At the start, at two checkpoints and at the end; the second of two callbacks fails, so one row exists."""

    def counted(model):
        return {"mean": float(model.position_mean.mean())}

    def failing(model):
        if len(answers(tmp_path / "run")) == 2 * rows.index(at) + 1:
            raise RunError("cannot be measured")
        return {"std": float(model.position_mean.std())}

    rows = [0, 3, 6, 8]
    straight = [Callback(3, counted), Callback(3, lambda model: {"std": float(model.position_mean.std())})]
    pretrain(recipe(scenes), source(scenes), tmp_path / "straight", callbacks=straight, quiet=True)
    with pytest.raises(RunError, match="cannot be measured"):
        broken = [straight[0], Callback(3, failing)]
        pretrain(recipe(scenes), source(scenes), tmp_path / "run", callbacks=broken, quiet=True)
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert (int(saved[-1].name[-8:]) if saved else 0) == at
    pretrain(recipe(scenes), source(scenes), tmp_path / "run", callbacks=straight, quiet=True)
    assert [row["step"] for row in answers(tmp_path / "run")] == [0, 0, 3, 3, 6, 6, 8, 8]
    assert (tmp_path / "run/diagnostics.jsonl").read_bytes() == (tmp_path / "straight/diagnostics.jsonl").read_bytes()
    assert bytes_of(tmp_path / "run") == bytes_of(whole)


def test_callback_remarks_are_shown_after_the_measurement(scenes, tmp_path, capsys):
    """A RankMe that falls all the time is reported once."""
    from ijepa.evaluation.diagnostics.warnings import new_training_warnings

    ranks = iter(range(100, 0, -10))
    call = Callback(1, lambda model: {"rankme_centred": float(next(ranks, 1))}, new_training_warnings(tmp_path))
    pretrain(recipe(scenes, steps=8), source(scenes), tmp_path, callbacks=[call])
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("watch: ")]
    assert len(warned) == 1 and "rank falls: centered RankMe went from 60.0 to 30.0" in warned[0]
