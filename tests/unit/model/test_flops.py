"""Counted operations against torch's own counter, on a model whose every layer runs."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ijepa.config.recipe import Encoder, Model, Predictor
from ijepa.masking.masks import MaskRule
from ijepa.masking.packing import Packer
from ijepa.model.flops import batch_flops
from ijepa.model.ijepa import IJEPA


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_operations_are_those_that_torch_counts(drop_path):
    shape = Model(
        image_size=96,
        patch_size=8,
        encoder=Encoder(width=192, depth=3, heads=3, drop_path=drop_path),
        predictor=Predictor(width=96, depth=3, heads=3),
    )
    model = IJEPA(shape)
    packer = Packer(MaskRule(), shape.grid, 0, 8, 3, drop_path)
    batch = packer(np.arange(8), torch.zeros(8, 3, 96, 96, dtype=torch.uint8))
    with FlopCounterMode(display=False) as counter:
        model(batch).loss.backward()
    counted = counter.get_total_flops()
    # What torch counts above ours is padding within buckets of attention; below it, the patch embedding's gradient
    # with respect to pixels, which nobody needs.
    assert batch_flops(shape, batch).total == pytest.approx(counted, rel=0.04)
