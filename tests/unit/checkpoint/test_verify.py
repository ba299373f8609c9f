"""Damage in a checkpoint is noticed, and so are other steps and runs."""

from pathlib import Path

import pytest

from ijepa.checkpoint.format import (
    save_checkpoint,
)
from ijepa.checkpoint.verify import verify_checkpoint
from ijepa.distributed.process_group import World
from ijepa.utils.errors import UserError
from tests.helpers.checkpoints import built, flip


def refusal(path: Path, settings: dict | None = None) -> str:
    """Return the line with which a checkpoint is refused."""
    with pytest.raises(UserError) as caught:
        verify_checkpoint(path, settings or {}, World())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_verify_checkpoint_refuses_a_flipped_bit(tmp_path):
    """In the length of the header, in the header, and in the first and last byte of the data."""
    path = save_checkpoint(tmp_path, 3, *built(), {"counts": {"seen": 3}}, keep=1)
    assert verify_checkpoint(path, {}, World())["step"] == 3
    for file in sorted(path.glob("*.safetensors")):
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        for byte in (0, 20, header, file.stat().st_size - 1):
            flip(file, byte)
            assert refusal(path).startswith(f"{file}: is damaged: its content does not match its checksum")
            flip(file, byte)
    assert verify_checkpoint(path, {}, World())["step"] == 3


def test_verify_checkpoint_refuses_another_step_or_run(tmp_path):
    path = save_checkpoint(tmp_path, 3, *built(), {"recipe": {"seed": 1, "gone": 2}}, keep=1)
    verify_checkpoint(path, {"seed": 1, "new": 3}, World())  # versions add and remove keys
    assert "state.json: has seed = 1, not 0" in refusal(path, {"seed": 0})
    other = path.rename(tmp_path / "step-00000009")
    assert "state.json: has step 3" in refusal(other)
