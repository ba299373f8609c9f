"""The file of a linear head."""

import errno

import pytest
import torch
from safetensors.torch import save_file

from ijepa.interop.heads import Head
from ijepa.utils.errors import RunError, UserError
from tests.helpers.libraries import recipe


@pytest.mark.parametrize(
    ("weight", "classes", "word"),
    [
        (torch.zeros(3), '["a", "b", "c"]', "(3,)"),
        (torch.zeros(3, 32), "3", "list"),
        (torch.zeros(3, 32), '"abc"', "list"),
        (torch.zeros(3, 32), '["a"]', "1 classes"),
        (torch.zeros(4, 32), '["a", "b", "c"]', "(4, 32)"),
        (torch.zeros(3, 8), '["a", "b", "c"]', "8 channels"),
    ],
)
def test_head_read_refuses_other_files(tmp_path, weight, classes, word):
    file = tmp_path / "head"
    save_file({"weight": weight, "bias": torch.zeros(3)}, file, {"classes": classes})
    with pytest.raises(UserError) as err:
        Head.read(file, recipe("tiny").model)
    assert err.value.where == f"--head {file}" and word in err.value.problem


def test_head_write_is_complete_or_absent(tmp_path, monkeypatch):
    head = Head(torch.ones(2, 32), torch.zeros(2), ("a", "b"))
    head.write(tmp_path / "head.safetensors")
    found = Head.read(tmp_path / "head.safetensors", recipe("tiny").model)
    assert torch.equal(found.weight, head.weight) and found.classes == ("a", "b")
    assert [path.name for path in tmp_path.iterdir()] == ["head.safetensors"]

    def full(descriptor):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr("ijepa.utils.files.os.fsync", full)
    with pytest.raises(RunError, match="no space left"):
        head.write(tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["head.safetensors"]
