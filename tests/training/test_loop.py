"""The promises of the loop: exact resume, signals, unreadable images, void steps, steady memory."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml

from ijepa import files
from ijepa.data.opening import open_source
from ijepa.data.sources import TarSource
from ijepa.errors import Failed, Refused
from ijepa.model.jepa import IJEPA
from ijepa.recipe import Recipe
from ijepa.training import loop
from ijepa.training import run as training_run
from ijepa.training.checkpoint import list_checkpoints, load_checkpoint
from ijepa.training.loop import Callback, Stopped, pretrain
from ijepa.training.monitor import VALUES, Monitor, StepRecord, cut_back
from ijepa.training.optimizer import make_optimizer
from ijepa.training.run import Run
from ijepa.training.schedules import Rates
from tests.conftest import TINY
from tests.reference.dense import goal_of, normalised, smooth_l1

FILES = ("context_encoder", "target_encoder", "predictor", "optimizer")


def recipe(scenes: Path, **overrides) -> Recipe:
    values = {**TINY, "data": {**TINY["data"], "path": str(scenes)}}
    for key, value in overrides.items():
        section, _, field = key.partition("__")
        values[section] = {**values[section], field: value} if field else value
    return Recipe.read(values, "test")


def source(scenes: Path):
    return open_source(scenes, split="train")


def bytes_of(run: Path) -> dict[str, bytes]:
    last = list_checkpoints(run / "checkpoints")[-1]
    return {name: (last / f"{name}.safetensors").read_bytes() for name in FILES} | {
        "metrics": (run / "metrics.jsonl").read_bytes()
    }


@pytest.fixture(scope="module")
def whole(scenes, tmp_path_factory) -> Path:
    """The uninterrupted run that others must equal."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    pretrain(recipe(scenes), source(scenes), out, quiet=True)
    return out


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


def test_skill_of_a_row_is_what_its_batch_gives_by_hand(scenes, tmp_path, monkeypatch):
    """1 - loss / the loss of each position's mean target so far: of the first step's batch for the second step."""
    batches = []

    def count(self, batch):
        batches.append(batch.map(torch.clone))
        real(self, batch)

    real = loop._Loop._count
    monkeypatch.setattr(loop._Loop, "_count", count)
    chosen = recipe(scenes, steps=2, checkpoint__every=1, schedule={"warmup": "1 steps"})
    pretrain(chosen, source(scenes), tmp_path, quiet=True)
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


class Kill(Exception):
    pass


@pytest.mark.parametrize("at", [1, 4, 7])
def test_a_crash_anywhere_resumes_to_the_same_bits(scenes, whole, tmp_path, at):
    def crash(model):
        crash.count += 1
        if crash.count == at + 1:  # the first call is before the first step
            raise Kill
        return {}

    crash.count = 0
    with pytest.raises(Kill):
        pretrain(recipe(scenes), source(scenes), tmp_path, callbacks=[Callback(1, crash)], quiet=True)
    pretrain(recipe(scenes), source(scenes), tmp_path, quiet=True)
    assert bytes_of(tmp_path) == bytes_of(whole)


def test_metrics_torn_in_the_middle_of_a_line_are_cut(scenes, whole, tmp_path):
    run = tmp_path / "run"
    pretrain(recipe(scenes), source(scenes), run, quiet=True)
    for late in list_checkpoints(run / "checkpoints")[1:]:
        for file in late.iterdir():
            file.unlink()
        late.rmdir()
    metrics = run / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-37])
    pretrain(recipe(scenes), source(scenes), run, quiet=True)
    assert bytes_of(run) == bytes_of(whole)


def command(scenes: Path, run: Path, *more: str) -> list[str]:
    file = run.parent / f"{run.name}.yaml"
    file.write_text(recipe(scenes, steps=400, checkpoint__every=5).dump())
    return [sys.executable, "-m", "ijepa", "pretrain", str(file), "--output", str(run), *more]


def wait_for_steps(run: Path, steps: int) -> None:
    for _ in range(6000):
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") >= steps:
            return
        time.sleep(0.01)
    raise AssertionError("the run did not get going")


def go_on(scenes: Path, run: Path, workers: int) -> None:
    chosen = recipe(scenes, steps=27, checkpoint__every=9, log_every=1, data__workers=workers)
    with patch("os.fsync"):  # half of the time, and what SIGKILL takes is no page of the kernel's
        pretrain(chosen, source(scenes), run, quiet=True)


@pytest.fixture(scope="module")
def never_killed(scenes, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "never-killed"
    go_on(scenes, run, 0)
    return run


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_sigkill_loses_nothing(scenes, never_killed, tmp_path, workers):
    """Killed three times at random steps, then run to its end: equal to the uninterrupted run."""
    context = multiprocessing.get_context("forkserver")  # processes that need not import torch again
    context.set_forkserver_preload(["ijepa.training.loop"])
    run = tmp_path / "run"
    for steps in sorted(random.Random(workers).sample(range(1, 22), 3)):
        process = context.Process(target=go_on, args=(scenes, run, workers))
        process.start()
        wait_for_steps(run, steps)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    go_on(scenes, run, workers)
    assert bytes_of(run) == bytes_of(never_killed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_says_so(scenes, tmp_path, number, code):
    run = tmp_path / "run"
    process = subprocess.Popen(command(scenes, run), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_steps(run, 6)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert len(stderr.strip().splitlines()) == 1 and "state saved" in stderr
    last = list_checkpoints(run / "checkpoints")[-1]
    rows = (run / "metrics.jsonl").read_text().splitlines()
    assert f"after step {len(rows)}," in stderr and last.name == f"step-{len(rows):08d}"


def test_a_signal_in_process(scenes, tmp_path):
    def stop(model):
        stop.count += 1
        if stop.count == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    stop.count = 0
    with pytest.raises(Stopped) as caught:
        pretrain(recipe(scenes), source(scenes), tmp_path, callbacks=[Callback(1, stop)], quiet=True)
    assert caught.value.exit_code == 143
    # The callback of step 2 comes after it is done and saved: the signal is heeded after the next.
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000003"]


def folder_of_images(scenes: Path, out: Path, broken: int) -> Path:
    data = source(scenes)
    out.mkdir()
    for index in range(40):
        image = data[index].image
        (out / f"{index:03d}.jpg").write_bytes(image[: len(image) // 2] if index < broken else image)
    return out


def test_an_unreadable_image_is_replaced_counted_and_named(scenes, tmp_path, capsys):
    images = folder_of_images(scenes, tmp_path / "images", broken=1)
    chosen = recipe(images, data__replaced_limit=0.2)
    pretrain(chosen, open_source(images), tmp_path / "run")
    assert capsys.readouterr().out.count("unreadable, replaced by the next image of its epoch: 000.jpg") == 1
    state = json.loads((list_checkpoints(tmp_path / "run/checkpoints")[-1] / "state.json").read_text())
    assert state["counts"]["replaced_names"] == ["000.jpg"] and 1 <= state["counts"]["replaced"] <= 3
    pretrain(chosen, open_source(images), tmp_path / "again", quiet=True)
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "run")


def test_every_unreadable_image_is_named_once_however_many_there_are(scenes, tmp_path, capsys):
    small = source(scenes)[0].image
    (tmp_path / "images").mkdir()
    for index in range(250):
        (tmp_path / "images" / f"{index:03d}.jpg").write_bytes(small[:99] if index < 110 else small)
    images = open_source(tmp_path / "images")
    chosen = recipe(tmp_path / "images", data__replaced_limit=1.0, batch={"global": 25}, steps=20)
    pretrain(chosen, images, tmp_path / "run")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("unreadable")]
    assert len(lines) == len(set(lines)) == 110
    state = json.loads((list_checkpoints(tmp_path / "run/checkpoints")[-1] / "state.json").read_text())
    assert len(state["counts"]["replaced_names"]) == 100


def test_too_many_unreadable_images_stop_the_run(scenes, tmp_path):
    images = folder_of_images(scenes, tmp_path / "images", broken=12)
    with pytest.raises(
        Failed, match=r"images are unreadable, more than data.replaced_limit = 0.01; the first: 0\d\d.jpg"
    ):
        pretrain(recipe(images), open_source(images), tmp_path / "run", quiet=True)


def test_void_steps_in_a_row_stop_the_run_and_name_samples(scenes, tmp_path):
    def poison(model):
        with torch.no_grad():
            model.predictor.mask_token.fill_(float("nan"))
        return {}

    chosen = recipe(scenes, optimizer={"nonfinite_limit": 1}, checkpoint__every=100)
    with pytest.raises(
        Failed, match=r"^2 steps in a row had a non-finite gradient .*the last is step 2 with \S*train-\d+.*; lower the"
    ):
        pretrain(chosen, source(scenes), tmp_path, callbacks=[Callback(100, poison)], quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(row["void"] and row["loss"] is None for row in rows)


@pytest.mark.parametrize(
    ("every", "log_every", "diagnosed"), [(100, 10, False), (1, 10, False), (3, 7, False), (100, 10, True)]
)
def test_void_steps_are_counted_in_a_row_however_they_are_read(
    scenes, tmp_path, monkeypatch, every, log_every, diagnosed
):
    """Whether a reading, a checkpoint or a measurement had the values read from the device."""
    void: set[int] = set()

    def poisoned(model, optimizer):
        poisoned.step += 1
        if poisoned.step in void:
            model.predictor.mask_token.grad.fill_(float("nan"))
        return real(model, optimizer)

    def go(run: str) -> None:
        poisoned.step = 0
        callbacks = [Callback(2, lambda model: {})] if diagnosed else []
        pretrain(chosen, source(scenes), tmp_path / run, callbacks=callbacks, quiet=True)

    real = loop.gradient_norm
    monkeypatch.setattr(loop, "gradient_norm", poisoned)
    small = {"steps": 21, "batch": {"global": 2}, "optimizer": {"nonfinite_limit": 2}}
    chosen = recipe(scenes, **small, checkpoint__every=every, log_every=log_every)
    void |= {1, 2, 4, 5, 7, 10, 14, 20, 21}  # never three in a row
    go("some")
    state = json.loads((list_checkpoints(tmp_path / "some/checkpoints")[-1] / "state.json").read_text())
    assert state["counts"]["void_in_a_row"] == 2
    void |= {6}
    with pytest.raises(Failed, match=r"^3 steps in a row .* the last is step 6 "):
        go("many")
    assert poisoned.step <= 6 + log_every


def test_refusals_write_nothing(scenes, tmp_path, whole):
    with pytest.raises(Refused, match="started with optimizer.lr_encoder = 0.0006, not 0.1"):
        pretrain(recipe(scenes, optimizer={"lr_encoder": 0.1}), source(scenes), whole, quiet=True)
    with pytest.raises(Refused, match="already holds a run"):
        pretrain(recipe(scenes), source(scenes), whole, resume=False, quiet=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(Refused, match="is not empty and holds no run"):
        pretrain(recipe(scenes), source(scenes), tmp_path, quiet=True)
    with pytest.raises(Refused, match="schedule.warmup"):
        pretrain(recipe(scenes, schedule={"warmup": "9 epochs"}), source(scenes), tmp_path / "new", quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_start_that_was_cut_short_is_begun_anew(scenes, tmp_path, monkeypatch):
    """Between run.json and the recipe; whatever recipe it was, nothing of it had been done."""

    def killed(path, text):
        path.with_name(f".{path.name}.123").write_text(text[:50])
        raise Kill

    run = tmp_path / "run"
    with monkeypatch.context() as patched, pytest.raises(Kill):
        patched.setattr(training_run, "write_text", killed)
        pretrain(recipe(scenes, seed=1), source(scenes), run, quiet=True)
    assert {file.name for file in run.iterdir()} == {"run.json", ".recipe.yaml.123"}
    pretrain(recipe(scenes, steps=3), source(scenes), run, resume=False, quiet=True)
    assert Run(run).recipe() == recipe(scenes, steps=3) and list_checkpoints(run / "checkpoints")
    assert not list(run.glob(".*"))


def test_a_recipe_of_somebody_is_not_written_over(scenes, tmp_path):
    (tmp_path / "recipe.yaml").write_text("base: vit-tiny-64")
    with pytest.raises(Refused, match="is not empty and holds no run"):
        pretrain(recipe(scenes), source(scenes), tmp_path, quiet=True)


def test_a_damaged_run_json_is_refused(scenes, tmp_path):
    run = tmp_path / "run"
    pretrain(recipe(scenes, steps=3), source(scenes), run, quiet=True)
    (run / "run.json").write_text("{}")
    with pytest.raises(Refused, match=r"run.json: is not what a run writes there"):
        pretrain(recipe(scenes, steps=3), source(scenes), run, quiet=True)


def test_a_disk_that_fills_up_under_the_metrics_ends_in_one_line(tmp_path):
    """Linux's /dev/full stands for it: every byte written there meets a full disk, closing included."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    monitor = Monitor(Run(tmp_path / "run"), total=4, start=0, log_every=1, quiet=True)
    rates = Rates(lr_encoder=1.0, lr_predictor=1.0, weight_decay=0.0, momentum=1.0)
    monitor.add(StepRecord(1, 0.1, rates, torch.ones(len(VALUES)), 8, 1.0, 0.0))
    with pytest.raises(Failed, match=r"metrics.jsonl: cannot be written: No space left on device"):
        monitor.flush()
    with pytest.raises(Failed, match=r"No space left on device"):
        monitor.close()


def test_a_full_disk_leaves_the_metrics_it_cannot_cut(whole, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    (tmp_path / "metrics.jsonl").write_bytes((whole / "metrics.jsonl").read_bytes())
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(Failed, match=r"metrics.jsonl: cannot be cut back to step 3: No space left on device"):
        cut_back(Run(tmp_path), 3)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


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


GROWTH = 8 * 2**20


def test_callbacks_are_written_and_cut(scenes, tmp_path):
    rows = [Callback(4, lambda model: {"answer": 42.0})]
    pretrain(recipe(scenes), source(scenes), tmp_path, callbacks=rows, quiet=True)
    assert answers(tmp_path) == [{"step": step, "answer": 42.0} for step in (0, 4, 8)]


def answers(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "diagnostics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("at", [0, 3, 6, 8])
def test_a_measurement_that_fails_costs_no_step_and_is_made_on_resuming(scenes, whole, tmp_path, at):
    """At the start, at two checkpoints, and at the end; the second of two callbacks, so that one row is there."""

    def counted(model):
        return {"mean": float(model.position_mean.mean())}

    def failing(model):
        if len(answers(tmp_path / "run")) == 2 * rows.index(at) + 1:
            raise Failed("cannot be measured")
        return {"std": float(model.position_mean.std())}

    rows = [0, 3, 6, 8]
    straight = [Callback(3, counted), Callback(3, lambda model: {"std": float(model.position_mean.std())})]
    pretrain(recipe(scenes), source(scenes), tmp_path / "straight", callbacks=straight, quiet=True)
    with pytest.raises(Failed, match="cannot be measured"):
        broken = [straight[0], Callback(3, failing)]
        pretrain(recipe(scenes), source(scenes), tmp_path / "run", callbacks=broken, quiet=True)
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert (int(saved[-1].name[-8:]) if saved else 0) == at
    pretrain(recipe(scenes), source(scenes), tmp_path / "run", callbacks=straight, quiet=True)
    assert [row["step"] for row in answers(tmp_path / "run")] == [0, 0, 3, 3, 6, 6, 8, 8]
    assert (tmp_path / "run/diagnostics.jsonl").read_bytes() == (tmp_path / "straight/diagnostics.jsonl").read_bytes()
    assert bytes_of(tmp_path / "run") == bytes_of(whole)


def test_remarks_of_a_callback_are_shown_after_its_figures_are_written(scenes, tmp_path, capsys):
    """A rank that falls beneath a falling loss is told in words, and once."""
    from ijepa.evaluation.trends import new_warnings

    ranks = iter(range(100, 0, -20))
    call = Callback(2, lambda model: {"rankme_centred": float(next(ranks, 1))}, new_warnings(tmp_path))
    pretrain(recipe(scenes, steps=8), source(scenes), tmp_path, callbacks=[call])
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1 and "rank falls: centred RankMe went from 100.0 to" in warned[0]
