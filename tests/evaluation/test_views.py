from pathlib import Path

import numpy as np
import torch

from ijepa.data.sources import open_source
from ijepa.evaluation.views import nearest, pca_rgb, segment
from tests.evaluation.toys import MeanColour, block_mask, write_pairs


def things_on_ground(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of four images, 6 x 6 patches, a thing in the middle of each; (features, where the things are)."""
    generator = torch.Generator().manual_seed(seed)
    thing = torch.zeros(4, 6, 6, dtype=torch.bool)
    thing[:, 2:4, 1:5] = True
    features = 0.1 * torch.randn(4, 36, 10, generator=generator)
    features[..., 0] += 5 * thing.flatten(1)
    features += 0.5 * thing.flatten(1)[..., None] * torch.randn(4, 36, 10, generator=generator)
    return features, thing


def test_ground_is_black_and_things_are_coloured_whatever_the_sign() -> None:
    features, thing = things_on_ground()
    for given in (features, -features):
        colours = pca_rgb(given, (6, 6))
        assert colours.shape == (4, 6, 6, 3)
        assert colours.min() == 0
        assert colours.max() == 1
        np.testing.assert_array_equal(colours.any(-1), thing)


def test_the_same_features_give_the_same_colours() -> None:
    features, _ = things_on_ground()
    np.testing.assert_array_equal(pca_rgb(features, (6, 6)), pca_rgb(features.clone(), (6, 6)))


def test_colours_of_constant_or_narrow_features_are_finite() -> None:
    assert np.isfinite(pca_rgb(torch.ones(2, 36, 10), (6, 6))).all()
    assert np.isfinite(pca_rgb(torch.randn(2, 36, 2), (6, 6))).all()


def test_nearest_are_most_similar_first() -> None:
    train = torch.tensor([[1.0, 0], [0, 1], [5, 5]])
    assert nearest(train, torch.tensor([[2.0, 0.1]]), 3).tolist() == [[0, 2, 1]]


def test_panels_of_easy_classes_show_the_truth(tmp_path: Path) -> None:
    train = open_source(write_pairs(tmp_path / "train", [block_mask(i) for i in range(12)]))
    test = open_source(write_pairs(tmp_path / "test", [block_mask(100 + i) for i in range(8)]))
    panels = segment(MeanColour(), train, test, [5, 2], image_size=32, k=3)
    assert panels.images.shape == (2, 32, 32, 3)
    np.testing.assert_array_equal(panels.truth, np.stack([block_mask(105), block_mask(102)]))
    np.testing.assert_array_equal(panels.retrieval, panels.truth)
    np.testing.assert_array_equal(panels.clusters, panels.truth)
    assert panels.classes == ("0", "1", "2", "3")
