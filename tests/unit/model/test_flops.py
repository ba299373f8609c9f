"""Counted operations against those of torch's own counter."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ijepa.masking.masks import MaskRule
from ijepa.masking.packing import Packer
from ijepa.model.config import EncoderConfig, ModelConfig, PredictorConfig
from ijepa.model.flops import batch_flops
from ijepa.model.ijepa import IJEPA


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_batch_flops_agree_with_torch(drop_path):
    shape = ModelConfig(
        image_size=(96, 96),
        patch_size=8,
        encoder=EncoderConfig(width=192, depth=3, heads=3, drop_path=drop_path),
        predictor=PredictorConfig(width=96, depth=3, heads=3),
    )
    model = IJEPA(shape)
    packer = Packer(MaskRule(), shape.grid, 0, 8, 3, drop_path)
    batch = packer(np.arange(8), torch.zeros(8, 3, 96, 96, dtype=torch.uint8))
    with FlopCounterMode(display=False) as counter:
        model(batch).loss.backward()
    counted = counter.get_total_flops()
    # torch counts padding within attention buckets as well. Ours counts the gradient of the patch embedding with
    # respect to pixels, which is not computed.
    assert batch_flops(shape, batch).total == pytest.approx(counted, rel=0.04)
