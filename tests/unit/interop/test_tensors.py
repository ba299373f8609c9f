"""Safetensors files: written one tensor at a time, in one file or several."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ijepa.interop.tensors import LazyTensor, open_tensors, write_tensors
from ijepa.interop.weights import resolve_weights
from ijepa.utils.errors import UserError


def test_write_tensors_splits_large_models(tiny, tmp_path):
    tensors = resolve_weights(tiny).tensors("target_encoder")
    size = sum(tensor.nbytes for tensor in tensors.values())
    names = write_tensors(tmp_path, "model", tensors, shard=size // 3)
    assert names[-1] == "model.safetensors.index.json" and len(names) >= 4
    again = open_tensors(tmp_path / names[-1])
    assert all(torch.equal(again[name].load(), tensor.load()) for name, tensor in tensors.items())
    listed = json.loads((tmp_path / names[-1]).read_text())
    assert listed["metadata"]["total_size"] == size
    (tmp_path / names[0]).unlink()
    with pytest.raises(UserError) as err:
        open_tensors(tmp_path / names[-1])
    assert err.value.where == str(tmp_path / names[0])


def test_write_tensors_depends_on_names_and_values_only(tmp_path):
    values = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([1.5], dtype=torch.bfloat16)}
    for name in ("one", "two"):
        write_tensors(tmp_path, name, {key: LazyTensor.of(value) for key, value in values.items()})
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    found = load_file(tmp_path / "one.safetensors")
    assert all(torch.equal(found[key], value) for key, value in values.items())
