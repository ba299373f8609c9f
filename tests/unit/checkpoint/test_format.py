import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ijepa.checkpoint import format as checkpoint
from ijepa.checkpoint.format import (
    list_checkpoints,
    load_checkpoint,
    load_part,
    save_checkpoint,
    verify_checkpoint,
)
from ijepa.checkpoint.reader import read_state, seal
from ijepa.config.recipe import EncoderSection, ModelSection, OptimizerSection, PredictorSection
from ijepa.distributed.process_group import World
from ijepa.model.ijepa import IJEPA
from ijepa.training.optimizer import apply_step, make_optimizer
from ijepa.utils.errors import RunError, UserError
from tests.helpers.runs import Kill


def built(width: int = 16, seed: int = 0):
    shape = ModelSection(
        image_size=48,
        patch_size=8,
        encoder=EncoderSection(width=width, depth=1, heads=2),
        predictor=PredictorSection(width=16, depth=1, heads=2),
    )
    model = IJEPA(shape, seed)
    optimizer = make_optimizer(model, OptimizerSection())
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
        real, calls = checkpoint.write_text, iter([4])
        monkeypatch.setattr(checkpoint, "write_text", full)
    with pytest.raises(RunError, match="No space left on device; the last good checkpoint is step-00000001") as caught:
        save_checkpoint(tmp_path, 2, model, optimizer, {}, keep=1)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    load_checkpoint(tmp_path / "step-00000001", *built(seed=9))


def test_other_shapes_are_refused_in_one_line(tmp_path):
    path = save_checkpoint(tmp_path, 1, *built(width=16), {}, keep=1)
    with pytest.raises(UserError, match=r"context_encoder.*has shape .*\(16,\).*the recipe's model \(32,\)"):
        load_checkpoint(path, *built(width=32))


def test_missing_damaged_and_unknown_parts_are_refused(tmp_path):
    path = as_format_1(save_checkpoint(tmp_path, 1, *built(), {}, keep=1))  # with checksums, none of it would be read
    file = path / "predictor.safetensors"
    whole = load_file(file)
    save_file({**whole, "extra": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="extra is unknown"):
        load_checkpoint(path, *built())
    save_file({k: v for k, v in whole.items() if k != "mask_token"}, file)
    with pytest.raises(UserError, match="mask_token is missing"):
        load_checkpoint(path, *built())
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_checkpoint(path, *built())
    file.unlink()
    with pytest.raises(UserError, match="does not exist"):
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
    path = as_format_1(save_checkpoint(tmp_path, 3, *built(), {}, keep=1))
    assert load_checkpoint(path, *built(seed=5))["step"] == 3  # the earlier format is read
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        load_checkpoint(path, *built())
    (path / "state.json").write_text(json.dumps({**state, "step": None}))
    with pytest.raises(UserError, match=r"state.json: step is missing; use an earlier checkpoint"):
        load_checkpoint(path, *built())


def as_format_1(path: Path) -> Path:
    """Turn a checkpoint's state into what it was before there were checksums."""
    state = json.loads((path / "state.json").read_text())
    kept = {key: value for key, value in state.items() if key not in ("files", "sha256")}
    (path / "state.json").write_text(json.dumps({**kept, "format": 1}))
    return path


def flip(file: Path, byte: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    data = bytearray(file.read_bytes())
    data[byte] ^= 1 << bit
    file.write_bytes(data)


def refusal(path: Path, settings: dict | None = None) -> str:
    """The line in which a checkpoint is refused."""
    with pytest.raises(UserError) as caught:
        verify_checkpoint(path, settings or {}, World())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_flipped_bit_in_any_file_is_refused(tmp_path):
    """In the length of a header, in the header, and in the first and last byte of the data."""
    path = save_checkpoint(tmp_path, 3, *built(), {"counts": {"seen": 3}}, keep=1)
    assert verify_checkpoint(path, {}, World())["step"] == 3
    for file in sorted(path.glob("*.safetensors")):
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        for byte in (0, 20, header, file.stat().st_size - 1):
            flip(file, byte)
            assert refusal(path).startswith(f"{file}: is damaged: its content does not match its checksum")
            flip(file, byte)
    assert verify_checkpoint(path, {}, World())["step"] == 3


def test_a_flipped_bit_anywhere_in_the_state_is_refused(tmp_path):
    """Each bit of the text, also of its spaces, line ends and of the checksum itself."""
    path = tmp_path / "step-00000003"
    path.mkdir()
    file = path / "state.json"
    whole = seal({"format": 2, "step": 3, "share": 1e-05, "files": {}}).encode()
    for place in range(len(whole)):
        for bit in range(8):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            file.write_bytes(data)
            with pytest.raises(UserError, match=r"^[^\n]*state\.json: "):
                read_state(path)
    file.write_bytes(whole)
    assert read_state(path)["step"] == 3


def test_a_checkpoint_of_another_step_or_run_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 3, *built(), {"recipe": {"seed": 1, "gone": 2}}, keep=1)
    verify_checkpoint(path, {"seed": 1, "new": 3}, World())  # keys come and go with versions
    assert "state.json: is of a run with seed = 1, not 0; use an earlier checkpoint" in refusal(path, {"seed": 0})
    other = path.rename(tmp_path / "step-00000009")
    assert "state.json: is of step 3, not of the folder's; use an earlier checkpoint" in refusal(other)


def test_weights_are_read_from_a_checkpoint_only_if_their_checksum_is_right(tmp_path):
    path = save_checkpoint(tmp_path, 3, *built(), {}, keep=1)
    flip(path / "predictor.safetensors", -1)
    module = built(seed=5)[0]
    load_part(module.target_encoder, path, "target_encoder")
    with pytest.raises(UserError, match=r"predictor.safetensors: is damaged"):
        load_part(module.predictor, path, "predictor")


def test_steps_of_nine_digits_and_more_are_checkpoints(tmp_path):
    model, optimizer = built()
    for step in (99_999_999, 100_000_000, 1_000_000_000):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-100000000", "step-1000000000"]
    assert load_checkpoint(list_checkpoints(tmp_path)[-1], *built(seed=5))["step"] == 1_000_000_000
    (tmp_path / "step-000000007").mkdir()  # not what step 7 is called
    assert len(list_checkpoints(tmp_path)) == 2
