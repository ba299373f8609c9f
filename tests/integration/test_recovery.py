"""Damage on disk between two starts of a run is refused or reported, and the resumed run is identical."""

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
from tests.helpers.checkpoints import flip
from tests.helpers.runs import Kill, bytes_of, recipe, source


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """Return a finished run of 8 steps with checkpoints after steps 6 and 8."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def files_of(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in sorted(run.rglob("*")) if file.is_file()}


def refusal(scenes: Path, run: Path, **how) -> str:
    """Return the line with which a start is refused; every file is unchanged."""
    before = files_of(run)
    with pytest.raises(UserError) as caught:
        pretrain(recipe(scenes), source(scenes), run, quiet=True, **how)
    assert files_of(run) == before and "\n" not in str(caught.value)
    return str(caught.value)


def messages(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if not line.startswith("step ")]


def test_damaged_checkpoint_is_refused_and_last_good_resumes(scenes, whole, run, capsys):
    newest = run / "checkpoints/step-00000008"
    (run / "checkpoints/damaged-step-00000008").touch()  # from an earlier resume
    flip(newest / "optimizer.safetensors", -1)
    assert refusal(scenes, run) == (
        f"{newest}/optimizer.safetensors: is damaged: its content does not match its checksum in state.json; "
        "use an earlier checkpoint; `ijepa pretrain --resume last-good` does so"
    )
    pretrain(recipe(scenes), source(scenes), run, resume="last-good")
    assert messages(capsys) == [
        "skipped step-00000008, renamed to damaged-step-00000008: optimizer.safetensors is damaged: its content does "
        "not match its checksum in state.json",
        f"resuming {run} after step 6",
    ]
    assert bytes_of(run) == bytes_of(whole)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["damaged-step-00000008", "step-00000006", "step-00000008"]
    pretrain(recipe(scenes), source(scenes), run, quiet=True)  # nothing is damaged any more


def replaced_by_a_file(checkpoints: Path) -> str:
    shutil.rmtree(checkpoints / "step-00000008")
    (checkpoints / "step-00000008").write_bytes(b"")
    return "step-00000008: is not a folder"


def stray(checkpoints: Path) -> str:
    (checkpoints / "step-99999999").mkdir()
    return "step-99999999/state.json: does not exist"


def a_file_is_lost(checkpoints: Path) -> str:
    (checkpoints / "step-00000008/predictor.safetensors").unlink()
    return "predictor.safetensors: does not exist; the checkpoint is incomplete"


def a_file_is_cut(checkpoints: Path) -> str:
    file = checkpoints / "step-00000008/predictor.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    return f"predictor.safetensors: has {file.stat().st_size} bytes, not {file.stat().st_size + 4}"


def another_step(checkpoints: Path) -> str:
    shutil.rmtree(checkpoints / "step-00000008")
    shutil.copytree(checkpoints / "step-00000006", checkpoints / "step-00000008")
    return "state.json: has step 6, but the folder's name has a different step"


@pytest.mark.parametrize("harm", [replaced_by_a_file, stray, a_file_is_lost, a_file_is_cut, another_step])
def test_last_good_skips_any_damaged_checkpoint(scenes, whole, run, harm):
    problem = harm(run / "checkpoints")
    line = refusal(scenes, run)
    assert problem in line and "--resume last-good" in line
    pretrain(recipe(scenes), source(scenes), run, quiet=True, resume="last-good")
    assert bytes_of(run) == bytes_of(whole)
    names = [path.name for path in list_checkpoints(run / "checkpoints")]
    assert names == ["step-00000006", "step-00000008"]  # skipped checkpoints do not count


def test_checkpoint_of_another_run_is_refused(scenes, run, tmp_path):
    pretrain(recipe(scenes, seed=1), source(scenes), tmp_path / "other", quiet=True)
    shutil.rmtree(run / "checkpoints/step-00000008")
    shutil.copytree(tmp_path / "other/checkpoints/step-00000008", run / "checkpoints/step-00000008")
    assert "state.json: has seed = 1, not 0; use an earlier checkpoint" in refusal(scenes, run)


def test_last_good_without_a_complete_checkpoint_is_refused(scenes, run):
    for path in list_checkpoints(run / "checkpoints"):
        flip(path / "state.json", 30)
    line = refusal(scenes, run, resume="last-good")
    assert line.startswith(f"{run}/checkpoints: contains no complete checkpoint: in step-00000008, state.json ")


def test_load_encoder_refuses_a_damaged_checkpoint(run):
    flip(run / "checkpoints/step-00000008/context_encoder.safetensors", -1)
    load_encoder(run)
    with pytest.raises(UserError, match="damaged"):
        load_encoder(run, "context")


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_run_without_its_checkpoints_is_refused(scenes, run, left):
    shutil.rmtree(run / "checkpoints")
    if left == "an empty folder":
        (run / "checkpoints").mkdir()
    for resume in ("auto", "last-good"):
        line = refusal(scenes, run, resume=resume)
        assert line.startswith(
            f"{run}/checkpoints: contains no checkpoint, but the run has saved some, the first after step 3"
        )


def test_run_killed_before_its_first_checkpoint_starts_again(scenes, whole, tmp_path):
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
    """Return a run as it is if it was killed after step 7."""
    shutil.rmtree(run / "checkpoints/step-00000008")
    for name in ("metrics", "timings"):
        lines = (run / f"{name}.jsonl").read_bytes().splitlines(keepends=True)
        (run / f"{name}.jsonl").write_bytes(b"".join(lines[:-1]))
    return run


@pytest.mark.parametrize(
    ("lines", "problem"),
    [([0, 1, 2], "steps 4 to 6 are missing"), ([], "steps 1 to 6 are missing"), (None, "steps 1 to 6")],
)
def test_missing_rows_of_metrics_are_reported_on_resume(scenes, whole, run, capsys, lines, problem):
    metrics = unfinished(run) / "metrics.jsonl"
    there = metrics.read_bytes().splitlines(keepends=True)
    if lines is None:
        metrics.unlink()
    else:
        metrics.write_bytes(b"".join(there[n] for n in lines))
    pretrain(recipe(scenes), source(scenes), run)
    first, last = messages(capsys)
    assert first == f"resuming {run} after step 6" and last.startswith(f"{metrics}: {problem}")
    kept = b"".join(there[n] for n in lines or [])
    assert metrics.read_bytes() == kept + b"".join((whole / "metrics.jsonl").read_bytes().splitlines(keepends=True)[6:])


@pytest.mark.parametrize("damage", [b'{"step": 2, "a": "\xe9"}\n', b"7\n", b"[1]\n", b"{}\n", b'{"step": null}\n'])
@pytest.mark.parametrize("name", ["metrics", "timings", "diagnostics"])
def test_damaged_line_of_a_log_is_removed_on_resume(scenes, whole, run, capsys, name, damage):
    log = unfinished(run) / f"{name}.jsonl"
    if name == "diagnostics":
        log.write_bytes(b'{"step": 0, "a": 1}\n{"step": 4, "a": 1}\n')
    there = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([there[0], damage, *there[1:]]))
    pretrain(recipe(scenes), source(scenes), run)
    assert messages(capsys)[1:] == [f"{log}: 1 damaged or misplaced line removed"]
    assert bytes_of(run) == bytes_of(whole)
    kept = log.read_bytes().splitlines(keepends=True)
    assert kept[: len(there)] == there if name != "timings" else kept[:3] == there[:3]


def test_logs_are_flushed_before_the_checkpoint_is_renamed(scenes, tmp_path, monkeypatch):
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
    assert ("run", (tmp_path / "run").stat().st_size) in synced  # the folder too, for the names of the logs


def test_resume_refuses_other_data_and_accepts_a_copy(scenes, run, tmp_path):
    shutil.copytree(scenes, tmp_path / "copy", copy_function=shutil.copyfile)  # with other times of change
    pretrain(recipe(scenes), source(tmp_path / "copy"), run, quiet=True)
    other = tmp_path / "other"
    write_scenes(other, images=80, seed=2, size=48, val_share=0.25, shard_size=32)
    swapped = Path(shutil.copytree(scenes, tmp_path / "swapped"))
    one, two, *_ = sorted(swapped.glob("train-*.tar"))
    one.rename(tmp_path / "aside"), two.rename(one), (tmp_path / "aside").rename(two)
    for data in (other, swapped):
        assert len(source(data)) == len(source(scenes))
        before = files_of(run)
        with pytest.raises(UserError) as caught:
            pretrain(recipe(scenes), source(data), run, quiet=True)
        assert caught.value.where == str(run / "run.json")
        assert files_of(run) == before


def test_run_json_has_the_fingerprint_and_first_checkpoint(scenes, whole):
    info = json.loads((whole / "run.json").read_text())
    assert info["fingerprint"] == source(scenes).fingerprint and info["first_checkpoint"] == 3
