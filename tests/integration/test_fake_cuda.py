"""The CUDA path without a GPU: a whole forward pass on fake tensors, whose device is CUDA.

torch's fake tensors have a shape, dtype and device, and compute nothing. They refuse operands on different devices, and
every value that the host would have to wait for: `float()` and `item()` raise DataDependentOutputException. Kernels and
the backward pass can only be tested on a GPU.
"""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ijepa.config.recipe import Recipe
from ijepa.masking.batch import Batch, Sequences
from ijepa.masking.packing import Packer
from ijepa.model.attention import attention
from ijepa.model.ijepa import IJEPA
from ijepa.training.model_setup import setup_model, token_budget

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _indexing(monkeypatch):
    """Indexing and `~` without the device guard, which a torch built for CPUs has only for CPUs."""

    def part(self: Tensor, key: Any) -> Tensor:
        keys = list(key) if isinstance(key, tuple) else [key]
        if Ellipsis in keys:
            at, named = keys.index(Ellipsis), sum(each is not None for each in keys) - 1
            keys[at : at + 1] = [slice(None)] * (self.dim() - named)
        dim = 0
        for each in keys:
            if each is None:
                self = self.unsqueeze(dim)
            elif isinstance(each, int):
                self, dim = self.select(dim, each), dim - 1
            else:
                begin, end, _ = each.indices(self.shape[dim])
                self = self.narrow(dim, begin, max(end - begin, 0))
            dim += 1
        return self

    monkeypatch.setattr(FakeTensor, "__getitem__", part, raising=False)
    monkeypatch.setattr(FakeTensor, "__setitem__", lambda self, key, value: part(self, key).fill_(value), raising=False)
    monkeypatch.setattr(FakeTensor, "__invert__", lambda x: torch.ops.aten.bitwise_not.default(x), raising=False)


class Operations(TorchDispatchMode):
    """Counts operations, and asserts that all their results except numbers are on the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        self.count[str(function)] += 1
        for each in result if isinstance(result, tuple | list) else [result]:
            assert not isinstance(each, Tensor) or each.is_cuda or each.dim() == 0, function
        return result


def fake(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape on the GPU; floating-point ones in bfloat16, because autocast needs a GPU."""
    return torch.empty(tensor.shape, dtype=torch.bfloat16 if tensor.is_floating_point() else tensor.dtype, device=CUDA)


def prepared(kernel: str) -> tuple[IJEPA, Batch]:
    values = {"model.image_size": 64, "model.patch_size": 8, "mask.min_context": 4, "precision.attention": kernel}
    values |= {"precision.autocast": "bf16", "batch.global": 4, "model.encoder.drop_path": 0.4}
    values["compile"] = False  # Inductor needs a driver if torch is built for CUDA
    for part, heads in (("encoder", 1), ("predictor", 1)):
        values |= {f"model.{part}.depth": 3, f"model.{part}.heads": heads}
    recipe = Recipe.load("vit-small-16", {**values, "model.encoder.width": 80, "model.predictor.width": 24})
    model, encoder = IJEPA(recipe.model), recipe.model.encoder
    setup_model(model, recipe, CUDA, autocast=True)
    budget = token_budget(recipe, 4, CUDA)
    packer = Packer(recipe.mask, recipe.model.grid, 0, 4, encoder.depth, encoder.drop_path, budget=budget)
    return model, packer(np.arange(4), torch.zeros(4, 3, 64, 64, dtype=torch.uint8))


needs_driver = pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="this build of torch asks the CUDA driver whether it has the kernel, and there is no driver",
)


@pytest.mark.parametrize(
    "kernel",
    [
        "auto",
        "flash",
        pytest.param("cudnn", marks=needs_driver),
        pytest.param("efficient", marks=needs_driver),
        "math",
    ],
)
def test_forward_stays_on_the_device_without_synchronization(kernel):
    model, batch = prepared(kernel)
    with torch.no_grad(), FakeTensorMode():
        model._apply(fake)
        batch = batch.map(fake)
        with Operations() as operations:
            output = model(batch)
    assert output.loss.is_cuda and output.loss.shape == () and output.position_sums.shape == (64, 80)
    flash = sum(count for name, count in operations.count.items() if "_varlen_attn" in name)
    assert flash == (9 if kernel in ("auto", "flash") else 0)  # three layers in each of three parts


@pytest.mark.parametrize("name", ["position_mean", "pixel_norm.mean", "context_encoder.pos_embed"])
def test_forward_fails_if_a_constant_is_on_the_host(name):
    model, batch = prepared("auto")
    with torch.no_grad(), FakeTensorMode():
        model._apply(fake)
        module, _, buffer = name.rpartition(".")
        kept = model.get_submodule(module)
        setattr(kept, buffer, torch.empty(kept.get_buffer(buffer).shape))
        with pytest.raises(RuntimeError, match="device"):
            model(batch.map(fake))


def attended(width: int, asked: int | None, backend: str) -> tuple[torch.Tensor, list[str]]:
    """Return the attention for `asked` of 100 tokens, or for all, on a fake GPU, and the operations called."""
    with torch.no_grad(), FakeTensorMode():
        qkv = torch.empty(100, 3, 4, width, dtype=torch.bfloat16, device=CUDA)
        starts = torch.empty(5, dtype=torch.int32, device=CUDA)
        keys = Sequences(torch.empty(100, dtype=torch.int64, device=CUDA), starts, (20, 30, 25), limit=40)
        rows = None if asked is None else torch.empty(asked, dtype=torch.int64, device=CUDA)
        with Operations() as operations:
            out = attention(qkv, keys, keys, rows, backend)
    return out, list(operations.count)


@pytest.mark.parametrize("width", [80, 24])
@pytest.mark.parametrize("asked", [None, 12])
def test_flash_attention_takes_the_head_widths_of_the_mission(width, asked):
    """80 in the encoders, 24 in the predictor, with rows as in the last layer of the predictor."""
    out, called = attended(width, asked, "flash")
    assert out.shape == (asked or 100, 4, width) and out.dtype == torch.bfloat16 and out.is_cuda
    assert [name for name in called if "_varlen_attn" in name]


@pytest.mark.parametrize("width", [12, 264])
@pytest.mark.parametrize("asked", [None, 12])
def test_attention_without_flash_for_other_head_widths(width, asked):
    out, called = attended(width, asked, "auto")
    assert out.shape == (asked or 100, 4, width) and out.is_cuda
    assert not [name for name in called if "_varlen_attn" in name or "_flash_attention" in name]


def test_flash_attention_refuses_float32():
    with FakeTensorMode(), pytest.raises(ValueError, match="torch.float32"):
        keys = Sequences(torch.empty(4), torch.empty(2), (4,))
        attention(torch.empty(4, 3, 1, 8, device=CUDA), keys, keys, None, "flash")
