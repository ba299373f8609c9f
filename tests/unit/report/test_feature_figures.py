from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa.data.open import open_dataset
from ijepa.evaluation.segmentation.label_map import load_label_map
from ijepa.report.feature_figures import SegmentationSettings, own_palette, pca_rgb, segment
from tests.helpers.encoders import PALETTE, MeanColor, block_mask, png, write_pairs
from tests.helpers.images import encoded


def objects_on_background(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features of four images, 6 x 6 patches, with an object in the middle, and the mask of the objects."""
    generator = torch.Generator().manual_seed(seed)
    obj = torch.zeros(4, 6, 6, dtype=torch.bool)
    obj[:, 2:4, 1:5] = True
    features = 0.1 * torch.randn(4, 36, 10, generator=generator)
    features[..., 0] += 5 * obj.flatten(1)
    features += 0.5 * obj.flatten(1)[..., None] * torch.randn(4, 36, 10, generator=generator)
    return features, obj


def test_pca_rgb_is_black_on_the_background_for_both_signs() -> None:
    features, obj = objects_on_background()
    for given in (features, -features):
        colors = pca_rgb(given, (6, 6))
        assert colors.shape == (4, 6, 6, 3)
        assert colors.min() == 0
        assert colors.max() == 1
        np.testing.assert_array_equal(colors.any(-1), obj)


def test_pca_rgb_is_the_same_for_the_same_features() -> None:
    features, _ = objects_on_background()
    np.testing.assert_array_equal(pca_rgb(features, (6, 6)), pca_rgb(features.clone(), (6, 6)))


def test_pca_rgb_does_not_depend_on_the_eigensolver(monkeypatch: pytest.MonkeyPatch) -> None:
    """One channel is the negative of another, so that their loadings differ by rounding only; signs are arbitrary."""
    features, _ = objects_on_background()
    features[..., 1] = -features[..., 0]
    expected = pca_rgb(features, (6, 6))
    real, draw = torch.linalg.eigh, torch.Generator().manual_seed(0)

    def eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = real(matrix)
        signs = torch.randint(0, 2, values.shape, generator=draw) * 2 - 1
        noise = torch.randn(vectors.shape, generator=draw, dtype=vectors.dtype)
        return values, signs * vectors + 1e-14 * noise

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    for _ in range(10):
        np.testing.assert_allclose(pca_rgb(features, (6, 6)), expected, atol=1e-6)


def test_pca_rgb_of_constant_or_narrow_features_is_finite() -> None:
    assert np.isfinite(pca_rgb(torch.ones(2, 36, 10), (6, 6))).all()
    assert np.isfinite(pca_rgb(torch.randn(2, 36, 2), (6, 6))).all()


def test_segment_finds_classes_that_differ_by_color(tmp_path: Path) -> None:
    train = open_dataset(write_pairs(tmp_path / "train", [block_mask(i) for i in range(12)]))
    test = open_dataset(write_pairs(tmp_path / "test", [block_mask(100 + i) for i in range(8)]))
    found = segment(MeanColor(), train, test, [5, 2], SegmentationSettings(32, k=3))
    assert found.images.shape == (2, 32, 32, 3)
    np.testing.assert_array_equal(found.truth, np.stack([block_mask(105), block_mask(102)]))
    np.testing.assert_array_equal(found.retrieved, found.truth)
    np.testing.assert_array_equal(found.clustered, found.truth)
    assert found.classes == ("0", "1", "2", "3")
    assert found.palette == (), "gray masks have no colors"


def test_segment_returns_the_palette_of_the_masks_or_of_the_label_map(tmp_path: Path) -> None:
    mask = Image.fromarray(block_mask(0), mode="P")
    mask.putpalette(PALETTE.tobytes() + bytes(756))
    own = tuple(map(tuple, PALETTE.tolist()))
    assert own_palette(encoded(mask, "PNG"), 4) == own
    assert own_palette(encoded(mask, "PNG"), 6) == (), "the fifth and sixth color are both black"
    assert own_palette(png(block_mask(0)), 4) == own_palette(None, 4) == ()
    test = write_pairs(tmp_path / "test", [block_mask(100 + i) for i in range(3)])
    for file in (test / "masks").iterdir():
        image = Image.open(file).convert("P")
        image.putdata(np.asarray(Image.open(file)).ravel().tolist())
        image.putpalette(PALETTE.tobytes() + bytes(756))
        image.save(file)
    train = open_dataset(write_pairs(tmp_path / "train", [block_mask(i) for i in range(4)]))
    assert segment(MeanColor(), train, open_dataset(test), [0], SegmentationSettings(32, k=1)).palette == own
    (tmp_path / "map.yaml").write_text(
        'name: m\nclasses: {a: [0, "#010203"], b: [1, 2], c: 3}\ncolors: {b: "#FF0000", c: "#00000a"}\n'
    )
    settings = SegmentationSettings(32, k=1, labels=str(tmp_path / "map.yaml"))
    mapped = segment(MeanColor(), train, open_dataset(test), [0], settings)
    assert mapped.palette == ((1, 2, 3), (255, 0, 0), (0, 0, 10))


def test_label_maps_have_the_colors_of_their_data_sets() -> None:
    """Colors of Pascal VOC are the bits of the label in reverse; the others are as published."""
    assert load_label_map("voc").palette[:5] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128))
    assert load_label_map("voc").palette[20] == (0, 64, 128)
    assert load_label_map("cityscapes").palette[0] == (128, 64, 128)
    assert load_label_map("camvid").palette[:2] == ((128, 128, 128), (128, 0, 0))
    assert load_label_map("ade20k").palette == ()
    for name, count in (("voc", 21), ("cityscapes", 19), ("camvid", 11)):
        assert len(set(load_label_map(name).palette)) == count
