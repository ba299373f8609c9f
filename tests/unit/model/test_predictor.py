import numpy as np
import pytest
import torch

from ijepa.masking.masks import MaskRule, draw_masks
from ijepa.masking.packing import pack
from ijepa.model.config import EncoderConfig, ModelConfig, PredictorConfig
from ijepa.model.predictor import Predictor
from tests.reference.dense import predict

CONFIG = {"image_size": (64, 64), "patch_size": 8, "encoder": EncoderConfig(width=32, depth=1, heads=4)}


@pytest.mark.parametrize("depth", [1, 3])
def test_predictor_agrees_with_one_block_at_a_time(depth):
    config = ModelConfig(**CONFIG, predictor=PredictorConfig(width=16, depth=depth, heads=2))
    draw = torch.Generator().manual_seed(0)
    model = Predictor(config).double()
    torch.nn.init.normal_(model.mask_token, generator=draw)
    masks = draw_masks(MaskRule(min_context=4), config.grid, 0, np.arange(3))
    batch = pack(masks, torch.zeros(3, 3, 64, 64, dtype=torch.uint8), 3)
    context = torch.randn(len(batch.context.index), 32, dtype=torch.float64, generator=draw)
    wanted, start = [], 0
    with torch.no_grad():
        weights = dict(model.named_parameters())
        for seen, targets in zip(masks.context, masks.targets, strict=True):
            patches = seen.nonzero()[0].tolist()
            own = context[start : start + len(patches)]
            start += len(patches)
            for block in targets:
                asked = block.nonzero()[0].tolist()
                if asked:
                    sizes = {"grid": config.grid, "depth": depth, "heads": 2}
                    wanted.append(predict(weights, own, patches, asked, **sizes))
        torch.testing.assert_close(model(context, batch), torch.cat(wanted), rtol=1e-5, atol=1e-6)
