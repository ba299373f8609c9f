from pathlib import Path

import pytest

from ijepa.checkpoint.format import (
    load_checkpoint,
    save_checkpoint,
)
from ijepa.checkpoint.state import checkpoint_name, read_state, seal, step_of
from ijepa.utils.errors import UserError
from tests.helpers.checkpoints import built, reseal


def test_read_state_refuses_another_format(tmp_path):
    path = save_checkpoint(tmp_path, 3, *built(), {}, keep=1)
    for changed, word in (({"format": 99}, "format 99"), ({"format": 2, "step": None}, "step is missing")):
        reseal(path, **changed)
        with pytest.raises(UserError, match=word) as caught:
            load_checkpoint(path, *built())
        assert caught.value.where == str(path / "state.json")


def test_read_state_refuses_any_flipped_bit(tmp_path):
    """Each bit of the text, including spaces, line ends and the checksum itself."""
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


def test_step_of_accepts_only_the_name_of_a_step():
    for step in (0, 7, 99_999_999, 1_000_000_000):
        assert step_of(Path("run") / checkpoint_name(step)) == step
    for name in ("step-7", "step-000000007", ".step-00000009.partial", "step-0000000x"):
        assert step_of(Path(name)) is None
