"""Results do not depend on the memory addresses of a batch's tensors."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from ijepa.data.loading.loader import Loader
from ijepa.masking.batch import Batch
from ijepa.model.ijepa import IJEPA, IJEPAOutput
from ijepa.training.loop import pretrain
from tests.helpers.runs import batch_of, bytes_of, recipe, source

SHIFTS = range(4, 64, 4)


def moved(tensor: Tensor, shift: int) -> Tensor:
    """Return a copy at an address `shift` bytes above a multiple of 64, rounded down to a multiple of the item size."""
    shift -= shift % tensor.element_size()
    memory = torch.empty(tensor.nbytes + 128, dtype=torch.uint8)
    start = -memory.data_ptr() % 64 + shift
    order = sorted(range(tensor.ndim), key=lambda axis: -tensor.stride(axis))  # keeps channels_last
    dense = tensor.permute(order)
    raw = np.frombuffer(memory.numpy().data, np.uint8, tensor.nbytes, start).view(dense.numpy().dtype)
    copy = torch.from_numpy(raw).view(dense.shape).copy_(dense).permute(np.argsort(order).tolist())
    assert copy.stride() == tensor.stride() and (not copy.numel() or copy.data_ptr() % 64 == shift)
    return copy


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_loss_and_gradients_do_not_depend_on_alignment(scenes, autocast):
    chosen = recipe(scenes)
    model, batch = IJEPA(chosen.model, seed=1), batch_of(chosen)

    def found(batch: Batch) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outcome: IJEPAOutput = model(batch)
        outcome.loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad()
        values = [outcome.loss.detach(), outcome.baseline, outcome.target_sums, outcome.position_sums]
        return [*values, *gradients]

    expected = found(batch.map(lambda tensor: moved(tensor, 0)))
    assert len(expected) > 50 and math.isfinite(expected[0].item())
    for shift in SHIFTS:
        for number, (one, other) in enumerate(
            zip(found(batch.map(lambda tensor, by=shift: moved(tensor, by))), expected, strict=True)
        ):
            assert torch.equal(one, other), f"value {number} differs at {shift} bytes"


def test_pretrain_does_not_depend_on_alignment(scenes, whole, tmp_path, monkeypatch):
    """Weights, moments and metrics, with every tensor of every batch at a random alignment."""
    places = np.random.default_rng(0)

    def scattered(self: Loader, start: int, end: int) -> Iterator[Batch]:
        for batch in iterate(self, start, end):
            yield batch.map(lambda tensor: moved(tensor, int(places.choice(SHIFTS))))

    iterate = Loader.iterate
    monkeypatch.setattr(Loader, "iterate", scattered)
    pretrain(recipe(scenes), source(scenes), tmp_path / "run", quiet=True)
    assert bytes_of(tmp_path / "run") == bytes_of(whole)
