"""Loaders of features for heads; test_linear_probe trains with them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ijepa.evaluation.classification.compare import Origin, Split
from ijepa.evaluation.features.loaders import AugmentedLoader, CachedLoader, PatchLoader
from ijepa.evaluation.protocols import LinearProtocol
from tests.helpers.feature_clouds import clouds, color_sets

PROTOCOL = LinearProtocol(
    name="toy", blocks=(1,), lrs=(1e-3,), weight_decays=(0.0,), augment=True, standardize=False, forward_batch=8
)


class MeanColor:
    """Mean color of each patch; counts the images that it encodes."""

    embed_dim, patch_size, grid = 3, 16, (2, 2)

    def __init__(self) -> None:
        self.images = 0

    def forward_blocks(self, pixels: torch.Tensor, last: int) -> list[torch.Tensor]:
        self.images += len(pixels)
        return [torch.nn.functional.avg_pool2d(pixels.float() / 255, 16).flatten(2).transpose(1, 2)] * last

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.forward_blocks(pixels, 1)[0]


@pytest.fixture
def split(tmp_path: Path) -> Split:
    train, test = color_sets(tmp_path)
    origin = Origin(MeanColor(), train, test, np.arange(len(train)), np.arange(len(test)), (32, 32))
    return replace(clouds(n=len(train), m=len(test), classes=3), origin=origin)


def test_cached_loader_returns_the_features_of_the_given_images():
    split = clouds(n=30, m=20)
    loader, numbers = CachedLoader(split), np.array([3, 0, 3])
    assert torch.equal(loader.train_batch(np.arange(3), numbers), split.train_x[[3, 0, 3]])
    assert torch.equal(torch.cat(list(loader.center_crops("test", numbers))), split.test_x[[3, 0, 3]])


@pytest.mark.parametrize("loader_class", [AugmentedLoader, PatchLoader])
def test_random_crops_depend_on_seed_and_position_only(split, loader_class):
    loader, numbers = loader_class(split, PROTOCOL, seed=0), np.array([4, 9, 4, 21])
    first = loader.train_batch(np.arange(4), numbers)
    assert first.dtype == torch.float32 and len(first) == 4
    torch.testing.assert_close(loader.train_batch(np.arange(2, 4), numbers[2:]), first[2:])
    assert not torch.equal(first[0], first[2]), "the same image at two positions has two crops"
    assert not torch.equal(loader_class(split, PROTOCOL, seed=1).train_batch(np.arange(4), numbers), first)


def test_augmented_loader_scores_cached_features(split):
    loader = AugmentedLoader(split, PROTOCOL, seed=0)
    (found,) = loader.center_crops("test", np.arange(5))
    assert torch.equal(found, split.test_x[:5]) and split.origin.encoder.images == 0


def test_patch_loader_without_augmentation_reads_center_crops(split):
    loader = PatchLoader(split, PROTOCOL.model_copy(update={"augment": False}), seed=0)
    numbers = np.array([4, 9, 30])
    found = loader.train_batch(np.arange(3), numbers)
    assert found.shape == (3, 4, 3)
    assert torch.equal(found, torch.cat(list(loader.center_crops("train", numbers))))
    assert split.origin.encoder.images == 6
