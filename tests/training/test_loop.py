"""The promises of the loop: exact resume, signals, unreadable images, void steps, steady memory."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from ijepa.data.sources import TarSource, open_source
from ijepa.errors import Failed, Refused
from ijepa.recipe import Recipe
from ijepa.training.checkpoint import list_checkpoints
from ijepa.training.loop import Callback, Stopped, pretrain
from tests.conftest import TINY

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
    for _ in range(1200):
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") >= steps:
            return
        time.sleep(0.05)
    raise AssertionError("the run did not get going")


def test_sigkill_loses_nothing(scenes, tmp_path):
    """Killed twice at whatever step it has reached, then run to its end: equal to the uninterrupted run."""
    quick = ["--steps", "40", "--data.workers", "1"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    subprocess.run(command(scenes, straight, *quick), check=True, capture_output=True)
    for steps in (7, 22):
        process = subprocess.Popen(
            command(scenes, killed, *quick), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for_steps(killed, steps)
        process.kill()
        process.wait()
    subprocess.run(command(scenes, killed, *quick), check=True, capture_output=True)
    assert bytes_of(killed) == bytes_of(straight)


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
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000002"]


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
        Failed, match=r"2 steps in a row had a non-finite gradient .*step \d with .*train-.* and \d+ more|with"
    ):
        pretrain(chosen, source(scenes), tmp_path, callbacks=[Callback(100, poison)], quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(row["void"] and row["loss"] is None for row in rows)


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


def test_memory_does_not_grow(scenes, tmp_path):
    """Resident memory over 500 steps, after the first hundred."""
    seen: list[int] = []

    def measure(model):
        seen.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        return {}

    chosen = recipe(scenes, steps=500, checkpoint__every=250, batch={"global": 2})
    pretrain(chosen, source(scenes), tmp_path, callbacks=[Callback(20, measure)], quiet=True)
    settled, last = max(seen[5:10]), max(seen[-3:])
    assert last - settled < 8 * 2**20, [m >> 20 for m in seen]


def test_callbacks_are_written_and_cut(scenes, tmp_path):
    rows = [Callback(4, lambda model: {"answer": 42.0})]
    pretrain(recipe(scenes), source(scenes), tmp_path, callbacks=rows, quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "diagnostics.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "answer": 42.0} for step in (0, 4, 8)]


def test_remarks_of_a_callback_are_shown_after_its_figures_are_written(scenes, tmp_path, capsys):
    """A rank that falls beneath a falling loss is told in words, and once."""
    from ijepa.evaluation.trends import new_warnings

    ranks = iter(range(100, 0, -20))
    call = Callback(2, lambda model: {"rankme_centred": float(next(ranks, 1))}, new_warnings(tmp_path))
    pretrain(recipe(scenes, steps=8), source(scenes), tmp_path, callbacks=[call])
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1 and "rank falls: centred RankMe went from 100.0 to" in warned[0]
