"""Damage on disk between two starts of a run: it is refused or named, and what is whole goes on to the same bits."""

import json
import os
import shutil
from pathlib import Path

import pytest

from ijepa.checkpoint.format import list_checkpoints
from ijepa.interop.weights import load_encoder
from ijepa.prepare.scenes.scenes import write_scenes
from ijepa.training.loop import Callback, pretrain
from ijepa.utils.errors import UserError
from tests.helpers.runs import Kill, bytes_of, recipe, source
from tests.unit.checkpoint.test_format import as_format_1, flip


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A finished run of 8 steps, with checkpoints after 6 and 8."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def files_of(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in sorted(run.rglob("*")) if file.is_file()}


def refusal(scenes: Path, run: Path, **how) -> str:
    """The line in which a start is refused, which leaves every file as it was."""
    before = files_of(run)
    with pytest.raises(UserError) as caught:
        pretrain(recipe(scenes), source(scenes), run, quiet=True, **how)
    assert files_of(run) == before and "\n" not in str(caught.value)
    return str(caught.value)


def said(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if not line.startswith("step ")]


def test_a_damaged_checkpoint_is_refused_and_the_last_good_one_goes_on(scenes, whole, run, capsys):
    newest = run / "checkpoints/step-00000008"
    (run / "checkpoints/damaged-step-00000008").touch()  # of an earlier time
    flip(newest / "optimizer.safetensors", -1)
    assert refusal(scenes, run) == (
        f"{newest}/optimizer.safetensors: is damaged: its content does not match its checksum in state.json; "
        "use an earlier checkpoint, in pretraining by --resume last-good"
    )
    pretrain(recipe(scenes), source(scenes), run, resume="last-good")
    assert said(capsys) == [
        "skipped step-00000008, which is now damaged-step-00000008: optimizer.safetensors is damaged: its content does "
        "not match its checksum in state.json",
        f"resuming {run} after step 6",
    ]
    assert bytes_of(run) == bytes_of(whole)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["damaged-step-00000008", "step-00000006", "step-00000008"]
    pretrain(recipe(scenes), source(scenes), run, quiet=True)  # and is whole again for the next start


def replaced_by_a_file(checkpoints: Path) -> str:
    shutil.rmtree(checkpoints / "step-00000008")
    (checkpoints / "step-00000008").write_bytes(b"")
    return "step-00000008: is not a folder"


def stray(checkpoints: Path) -> str:
    (checkpoints / "step-99999999").mkdir()
    return "step-99999999/state.json: does not exist"


def a_file_is_lost(checkpoints: Path) -> str:
    (checkpoints / "step-00000008/predictor.safetensors").unlink()
    return "predictor.safetensors: does not exist; the checkpoint is not whole"


def a_file_is_cut(checkpoints: Path) -> str:
    file = checkpoints / "step-00000008/predictor.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    return f"predictor.safetensors: has {file.stat().st_size} bytes, not {file.stat().st_size + 4}"


def another_step(checkpoints: Path) -> str:
    shutil.rmtree(checkpoints / "step-00000008")
    shutil.copytree(checkpoints / "step-00000006", checkpoints / "step-00000008")
    return "state.json: is of step 6, not of the folder's"


@pytest.mark.parametrize("harm", [replaced_by_a_file, stray, a_file_is_lost, a_file_is_cut, another_step])
def test_whatever_is_wrong_with_the_newest_last_good_goes_on(scenes, whole, run, harm):
    problem = harm(run / "checkpoints")
    line = refusal(scenes, run)
    assert problem in line and line.endswith("--resume last-good")
    pretrain(recipe(scenes), source(scenes), run, quiet=True, resume="last-good")
    assert bytes_of(run) == bytes_of(whole)
    names = [path.name for path in list_checkpoints(run / "checkpoints")]
    assert names == ["step-00000006", "step-00000008"]  # what was skipped is no longer among those that are kept


def test_a_checkpoint_of_another_run_is_refused(scenes, run, tmp_path):
    pretrain(recipe(scenes, seed=1), source(scenes), tmp_path / "other", quiet=True)
    shutil.rmtree(run / "checkpoints/step-00000008")
    shutil.copytree(tmp_path / "other/checkpoints/step-00000008", run / "checkpoints/step-00000008")
    assert "state.json: is of a run with seed = 1, not 0; use an earlier checkpoint" in refusal(scenes, run)


def test_without_a_whole_checkpoint_nothing_goes_on(scenes, run):
    for path in list_checkpoints(run / "checkpoints"):
        flip(path / "state.json", 30)
    line = refusal(scenes, run, resume="last-good")
    assert line.startswith(f"{run}/checkpoints: holds no whole checkpoint: in step-00000008, state.json ")


def test_checkpoints_without_checksums_are_read_with_a_word(scenes, whole, run, capsys):
    shutil.rmtree(run / "checkpoints/step-00000008")
    path = as_format_1(run / "checkpoints/step-00000006")
    pretrain(recipe(scenes), source(scenes), run)
    assert said(capsys) == [f"{path}: has no checksums, not verified", f"resuming {run} after step 6"]
    assert bytes_of(run) == bytes_of(whole)


def test_weights_of_a_damaged_checkpoint_are_not_loaded(run):
    flip(run / "checkpoints/step-00000008/context_encoder.safetensors", -1)
    load_encoder(run)
    with pytest.raises(UserError, match=r"context_encoder.safetensors: is damaged"):
        load_encoder(run, "context")


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_a_run_that_has_lost_its_checkpoints_does_not_begin_again(scenes, run, left):
    shutil.rmtree(run / "checkpoints")
    if left == "an empty folder":
        (run / "checkpoints").mkdir()
    for resume in ("auto", "last-good"):
        line = refusal(scenes, run, resume=resume)
        assert line.startswith(
            f"{run}/checkpoints: holds no checkpoint, but the run has saved some, the first after step 3"
        )


def test_a_run_killed_before_its_first_checkpoint_begins_again(scenes, whole, tmp_path):
    def killed(model):
        killed.calls += 1
        if killed.calls == 3:
            raise Kill
        return {}

    killed.calls = 0
    with pytest.raises(Kill):
        pretrain(recipe(scenes), source(scenes), tmp_path / "run", callbacks=[Callback(1, killed)], quiet=True)
    assert (tmp_path / "run/metrics.jsonl").read_text().count("\n") == 2
    pretrain(recipe(scenes), source(scenes), tmp_path / "run", quiet=True)
    assert bytes_of(tmp_path / "run") == bytes_of(whole)


def unfinished(run: Path) -> Path:
    """A run that was killed after step 7."""
    shutil.rmtree(run / "checkpoints/step-00000008")
    for name in ("metrics", "timings"):
        lines = (run / f"{name}.jsonl").read_bytes().splitlines(keepends=True)
        (run / f"{name}.jsonl").write_bytes(b"".join(lines[:-1]))
    return run


@pytest.mark.parametrize(
    ("lines", "told"),
    [([0, 1, 2], "steps 4 to 6 are missing"), ([], "steps 1 to 6 are missing"), (None, "steps 1 to 6")],
)
def test_rows_missing_from_the_metrics_are_named_and_the_run_goes_on(scenes, whole, run, capsys, lines, told):
    metrics = unfinished(run) / "metrics.jsonl"
    there = metrics.read_bytes().splitlines(keepends=True)
    if lines is None:
        metrics.unlink()
    else:
        metrics.write_bytes(b"".join(there[n] for n in lines))
    pretrain(recipe(scenes), source(scenes), run)
    first, last = said(capsys)
    assert first == f"resuming {run} after step 6" and last.startswith(f"{metrics}: {told}")
    kept = b"".join(there[n] for n in lines or [])
    assert metrics.read_bytes() == kept + b"".join((whole / "metrics.jsonl").read_bytes().splitlines(keepends=True)[6:])


@pytest.mark.parametrize("damage", [b'{"step": 2, "a": "\xe9"}\n', b"7\n", b"[1]\n", b"{}\n", b'{"step": null}\n'])
@pytest.mark.parametrize("name", ["metrics", "timings", "diagnostics"])
def test_a_damaged_line_in_a_log_does_not_stop_the_run(scenes, whole, run, capsys, name, damage):
    log = unfinished(run) / f"{name}.jsonl"
    if name == "diagnostics":
        log.write_bytes(b'{"step": 0, "a": 1}\n{"step": 4, "a": 1}\n')
    there = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([there[0], damage, *there[1:]]))
    pretrain(recipe(scenes), source(scenes), run)
    assert said(capsys)[1:] == [f"{log}: 1 damaged or misplaced line taken out"]
    assert bytes_of(run) == bytes_of(whole)
    kept = log.read_bytes().splitlines(keepends=True)
    assert kept[: len(there)] == there if name != "timings" else kept[:3] == there[:3]


def test_logs_are_durable_before_the_checkpoint_of_their_step_is_complete(scenes, tmp_path, monkeypatch):
    synced: set[tuple[str, int]] = set()
    fsync, rename = os.fsync, Path.rename

    def fsynced(descriptor: int) -> None:
        fsync(descriptor)
        synced.add((Path(f"/proc/self/fd/{descriptor}").readlink().name, os.fstat(descriptor).st_size))

    def renamed(path: Path, target: Path) -> Path:
        if Path(target).name.startswith("step-"):
            for name in ("metrics.jsonl", "timings.jsonl"):
                assert (name, (tmp_path / "run" / name).stat().st_size) in synced
            renamed.steps.append(Path(target).name)
        return rename(path, target)

    renamed.steps = []
    monkeypatch.setattr(os, "fsync", fsynced)
    monkeypatch.setattr(Path, "rename", renamed)
    pretrain(recipe(scenes), source(scenes), tmp_path / "run", quiet=True)
    assert renamed.steps == ["step-00000003", "step-00000006", "step-00000008"]
    assert ("run", (tmp_path / "run").stat().st_size) in synced  # the names of the logs, too


def test_other_data_are_refused_and_a_copy_is_not(scenes, run, tmp_path):
    shutil.copytree(scenes, tmp_path / "copy", copy_function=shutil.copyfile)  # with times of its own
    pretrain(recipe(scenes), source(tmp_path / "copy"), run, quiet=True)
    other = tmp_path / "other"
    write_scenes(other, images=80, seed=2, size=48, val_share=0.25, shard_size=32)
    swapped = Path(shutil.copytree(scenes, tmp_path / "swapped"))
    one, two, *_ = sorted(swapped.glob("train-*.tar"))
    one.rename(tmp_path / "aside"), two.rename(one), (tmp_path / "aside").rename(two)
    for data in (other, swapped):
        assert len(source(data)) == len(source(scenes))
        before = files_of(run)
        with pytest.raises(
            UserError, match=r"run.json: the run was started on other data: .* are not those of data.path"
        ):
            pretrain(recipe(scenes), source(data), run, quiet=True)
        assert files_of(run) == before


def test_a_run_notes_its_data_and_its_first_checkpoint(scenes, whole):
    info = json.loads((whole / "run.json").read_text())
    assert info["fingerprint"] == source(scenes).fingerprint and info["first_checkpoint"] == 3
