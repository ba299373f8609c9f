from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, interpolate

from ijepa.data.open import open_dataset
from ijepa.evaluation.segmentation.dataset import Classes, SegmentationDataset
from ijepa.evaluation.segmentation.linear import loss_of, train_layer
from ijepa.evaluation.segmentation.protocol import LinearHead
from tests.helpers.encoders import MeanColor, block_mask, write_pairs


def test_loss_of_is_the_mean_over_scored_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, masks = torch.randn(2, 4, 3, generator=generator), torch.randint(3, (2, 8, 8), generator=generator)
    masks[0, :5] = -100
    maps = interpolate(logits.transpose(1, 2).reshape(2, 3, 2, 2), (8, 8), mode="bilinear")
    assert float(loss_of(logits, masks)) == pytest.approx(float(cross_entropy(maps, masks)), rel=1e-5)
    assert float(loss_of(logits, torch.full_like(masks, -100))) == 0


def test_train_layer_never_predicts_an_ignored_class_and_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_dataset(write_pairs(tmp_path / "train", [block_mask(i) for i in range(8)]))
    classes = Classes(4, ("a", "b", "c", "d"), (2, 255))
    train = SegmentationDataset(source, np.arange(8), "--train", classes, 32, 32)
    rule = LinearHead(steps=30, lr=0.05, batch=4)
    layer = train_layer(MeanColor(), train, rule, seed=0)
    patches = torch.rand(3, 16, 3, generator=torch.Generator().manual_seed(0)) * 255
    assert 2 not in layer.masks(patches, 32)
    again = train_layer(MeanColor(), train, rule, seed=0)
    torch.testing.assert_close(layer.state_dict(), again.state_dict(), atol=0, rtol=0)
    monkeypatch.setattr("ijepa.evaluation.segmentation.linear.CACHE_BYTES", 0)
    without_cache = train_layer(MeanColor(), train, rule, seed=0)
    torch.testing.assert_close(layer.linear.weight, without_cache.linear.weight, atol=1e-4, rtol=0)
