"""Checkpoints are complete or absent, and damage is noticed."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ijepa.checkpoint.format import (
    list_checkpoints,
    load_checkpoint,
    load_part,
    save_checkpoint,
)
from ijepa.utils.errors import RunError, UserError
from tests.helpers.checkpoints import built, flip, reseal
from tests.helpers.runs import Kill


def test_load_checkpoint_restores_every_bit(tmp_path):
    model, optimizer = built()
    path = save_checkpoint(tmp_path, 7, model, optimizer, {"counts": {"seen": 3}}, keep=2)
    other, moments = built(seed=5)
    state = load_checkpoint(path, other, moments)
    assert state["step"] == 7 and state["counts"] == {"seen": 3}
    for (name, was), (_, now) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(was, now), name
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state.get(parameter, {}).items():
            assert torch.equal(value, moments.state[twin][key])


def test_save_checkpoint_keeps_the_latest(tmp_path):
    model, optimizer = built()
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000010"]


def test_save_checkpoint_writes_no_pickle(tmp_path):
    model, optimizer = built()
    path = save_checkpoint(tmp_path, 1, model, optimizer, {}, keep=1)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("call", range(5))
def test_save_checkpoint_on_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch, call):
    """The disk is full when the n-th of the five files is flushed."""
    model, optimizer = built()
    save_checkpoint(tmp_path, 1, model, optimizer, {}, keep=1)
    calls, fsync = iter(range(5)), os.fsync

    def full(descriptor: int) -> None:
        if next(calls) == call:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="step-00000001") as caught:
        save_checkpoint(tmp_path, 2, model, optimizer, {}, keep=1)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    load_checkpoint(tmp_path / "step-00000001", *built(seed=9))


def test_load_checkpoint_refuses_other_shapes(tmp_path):
    path = save_checkpoint(tmp_path, 1, *built(width=16), {}, keep=1)
    with pytest.raises(UserError, match="shape"):
        load_checkpoint(path, *built(width=32))


def test_load_checkpoint_refuses_missing_unknown_and_damaged_tensors(tmp_path):
    path = save_checkpoint(tmp_path, 1, *built(), {}, keep=1)
    file = path / "predictor.safetensors"
    whole = load_file(file)
    save_file({**whole, "extra": torch.zeros(1)}, file)
    reseal(path)  # otherwise the checksum would be refused first
    with pytest.raises(UserError, match="unknown") as err:
        load_checkpoint(path, *built())
    assert err.value.where == str(file)
    save_file({k: v for k, v in whole.items() if k != "mask_token"}, file)
    reseal(path)
    with pytest.raises(UserError, match="missing") as err:
        load_checkpoint(path, *built())
    assert err.value.where == str(file)
    file.write_bytes(file.read_bytes()[:100])
    reseal(path)
    with pytest.raises(UserError) as err:
        load_checkpoint(path, *built())
    assert err.value.where == str(file)
    file.unlink()
    with pytest.raises(UserError) as err:
        load_checkpoint(path, *built())
    assert err.value.where == str(file)


def test_list_checkpoints_ignores_partial_folders(tmp_path):
    path = save_checkpoint(tmp_path, 3, *built(), {}, keep=1)
    for left in (".step-00000009.partial", ".step-00000937.partial"):  # a run that a signal stops saves at any step
        shutil.copytree(path, tmp_path / left)
    assert list_checkpoints(tmp_path) == [path]
    save_checkpoint(tmp_path, 9, *built(), {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000009"]


def test_kill_while_old_checkpoints_are_removed_leaves_complete_ones(tmp_path, monkeypatch):
    def killed(folder, **how):
        next(folder.glob("*.safetensors")).unlink()
        raise Kill

    model, optimizer = built()
    for step in (1, 2):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep=2)
    with monkeypatch.context() as patched, pytest.raises(Kill):
        patched.setattr(shutil, "rmtree", killed)
        save_checkpoint(tmp_path, 3, model, optimizer, {}, keep=1)
    there = list_checkpoints(tmp_path)
    assert [path.name for path in there] == ["step-00000002", "step-00000003"]
    assert all(load_checkpoint(path, *built(seed=9))["step"] for path in there)
    save_checkpoint(tmp_path, 3, model, optimizer, {}, keep=1)  # replaces the checkpoint of the same step
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_load_part_verifies_the_checksum(tmp_path):
    path = save_checkpoint(tmp_path, 3, *built(), {}, keep=1)
    flip(path / "predictor.safetensors", -1)
    module = built(seed=5)[0]
    load_part(module.target_encoder, path, "target_encoder")
    with pytest.raises(UserError, match="damaged") as err:
        load_part(module.predictor, path, "predictor")
    assert err.value.where == str(path / "predictor.safetensors")


def test_checkpoints_of_steps_with_nine_and_more_digits(tmp_path):
    model, optimizer = built()
    for step in (99_999_999, 100_000_000, 1_000_000_000):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-100000000", "step-1000000000"]
    assert load_checkpoint(list_checkpoints(tmp_path)[-1], *built(seed=5))["step"] == 1_000_000_000
    (tmp_path / "step-000000007").mkdir()  # not the name of step 7
    assert len(list_checkpoints(tmp_path)) == 2
