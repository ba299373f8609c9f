import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ijepa.errors import Failed, Refused
from ijepa.model.jepa import IJEPA
from ijepa.recipe import Encoder, Model, Optimizer, Predictor
from ijepa.training import checkpoint
from ijepa.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from ijepa.training.optimizer import apply_step, make_optimizer
from tests.training.runs import Kill


def built(width: int = 16, seed: int = 0):
    shape = Model(
        image_size=48,
        patch_size=8,
        encoder=Encoder(width=width, depth=1, heads=2),
        predictor=Predictor(width=16, depth=1, heads=2),
    )
    model = IJEPA(shape, seed)
    optimizer = make_optimizer(model, Optimizer())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    apply_step(model, optimizer, 0.9, None)
    model.position_mean.fill_(0.5)
    return model, optimizer


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path):
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


def test_only_the_latest_are_kept(tmp_path):
    model, optimizer = built()
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000010"]


def test_no_file_is_a_pickle(tmp_path):
    model, optimizer = built()
    path = save_checkpoint(tmp_path, 1, model, optimizer, {}, keep=1)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("call", range(5))
def test_a_full_disk_leaves_the_last_checkpoint_good(tmp_path, monkeypatch, call):
    """Whichever of the five files meets the full disk."""
    model, optimizer = built()
    save_checkpoint(tmp_path, 1, model, optimizer, {}, keep=1)
    calls = iter(range(5))

    def full(*args, **kwargs):
        if next(calls) == call:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    if call < 4:
        real = checkpoint.save_file
        monkeypatch.setattr(checkpoint, "save_file", full)
    else:
        real, calls = checkpoint.write_json, iter([4])
        monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(Failed, match="No space left on device; the last good checkpoint is step-00000001") as caught:
        save_checkpoint(tmp_path, 2, model, optimizer, {}, keep=1)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    load_checkpoint(tmp_path / "step-00000001", *built(seed=9))


def test_other_shapes_are_refused_in_one_line(tmp_path):
    path = save_checkpoint(tmp_path, 1, *built(width=16), {}, keep=1)
    with pytest.raises(Refused, match=r"context_encoder.*has shape .*\(16,\).*the recipe's model \(32,\)"):
        load_checkpoint(path, *built(width=32))


def test_missing_damaged_and_unknown_parts_are_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, *built(), {}, keep=1)
    file = path / "predictor.safetensors"
    whole = load_file(file)
    save_file({**whole, "extra": torch.zeros(1)}, file)
    with pytest.raises(Refused, match="extra is unknown"):
        load_checkpoint(path, *built())
    save_file({k: v for k, v in whole.items() if k != "mask_token"}, file)
    with pytest.raises(Refused, match="mask_token is missing"):
        load_checkpoint(path, *built())
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(Refused, match="not a whole safetensors file"):
        load_checkpoint(path, *built())
    file.unlink()
    with pytest.raises(Refused, match="does not exist"):
        load_checkpoint(path, *built())


def test_a_partial_folder_is_no_checkpoint(tmp_path):
    path = save_checkpoint(tmp_path, 3, *built(), {}, keep=1)
    for left in (".step-00000009.partial", ".step-00000937.partial"):  # a signal saves at any step; a resume goes back
        shutil.copytree(path, tmp_path / left)
    assert list_checkpoints(tmp_path) == [path]
    save_checkpoint(tmp_path, 9, *built(), {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000009"]


def test_a_kill_while_old_checkpoints_are_removed_leaves_whole_ones(tmp_path, monkeypatch):
    def killed(folder, **how):
        next(folder.glob("*.safetensors")).unlink()
        raise Kill

    model, optimizer = built()
    for step in (1, 2):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep=2)
    with monkeypatch.context() as patched, pytest.raises(Kill):
        patched.setattr(checkpoint.shutil, "rmtree", killed)
        save_checkpoint(tmp_path, 3, model, optimizer, {}, keep=1)
    there = list_checkpoints(tmp_path)
    assert [path.name for path in there] == ["step-00000002", "step-00000003"]
    assert all(load_checkpoint(path, *built(seed=9))["step"] for path in there)
    save_checkpoint(tmp_path, 3, model, optimizer, {}, keep=1)  # once more in its own place
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_state_of_another_format_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 3, *built(), {}, keep=1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(Refused, match="format 99"):
        load_checkpoint(path, *built())
    (path / "state.json").write_text(json.dumps({**state, "step": None}))
    with pytest.raises(Refused, match=r"state.json: step is missing; use an earlier checkpoint"):
        load_checkpoint(path, *built())
