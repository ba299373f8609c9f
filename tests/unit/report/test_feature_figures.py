from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa.data.open import open_source
from ijepa.evaluation.segmentation.label_map import load_label_map
from ijepa.report.feature_figures import nearest, own_palette, pca_rgb, segment
from tests.helpers.encoders import PALETTE, MeanColour, block_mask, png, write_pairs
from tests.helpers.images import encoded


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


def test_colours_do_not_depend_on_the_eigensolver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two channels that are each other's negative have loadings that differ by rounding only; signs are arbitrary."""
    features, _ = things_on_ground()
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
    assert panels.palette == (), "grey masks have no colours"


def test_panels_are_in_the_set_s_own_colours(tmp_path: Path) -> None:
    mask = Image.fromarray(block_mask(0), mode="P")
    mask.putpalette(PALETTE.tobytes() + bytes(756))
    own = tuple(map(tuple, PALETTE.tolist()))
    assert own_palette(encoded(mask, "PNG"), 4) == own
    assert own_palette(encoded(mask, "PNG"), 6) == (), "the fifth and sixth colour are both black"
    assert own_palette(png(block_mask(0)), 4) == own_palette(None, 4) == ()
    test = write_pairs(tmp_path / "test", [block_mask(100 + i) for i in range(3)])
    for file in (test / "masks").iterdir():
        image = Image.open(file).convert("P")
        image.putdata(np.asarray(Image.open(file)).ravel().tolist())
        image.putpalette(PALETTE.tobytes() + bytes(756))
        image.save(file)
    train = open_source(write_pairs(tmp_path / "train", [block_mask(i) for i in range(4)]))
    assert segment(MeanColour(), train, open_source(test), [0], image_size=32, k=1).palette == own
    (tmp_path / "map.yaml").write_text(
        'name: m\nclasses: {a: [0, "#010203"], b: [1, 2], c: 3}\ncolours: {b: "#FF0000", c: "#00000a"}\n'
    )
    mapped = segment(MeanColour(), train, open_source(test), [0], image_size=32, k=1, labels=str(tmp_path / "map.yaml"))
    assert mapped.palette == ((1, 2, 3), (255, 0, 0), (0, 0, 10))


def test_presets_have_their_sets_colours() -> None:
    """Pascal VOC's are the bits of the number, turned; the others' as their makers publish them."""
    assert load_label_map("voc").palette[:5] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128))
    assert load_label_map("voc").palette[20] == (0, 64, 128)
    assert load_label_map("cityscapes").palette[0] == (128, 64, 128)
    assert load_label_map("camvid").palette[:2] == ((128, 128, 128), (128, 0, 0))
    assert load_label_map("ade20k").palette == ()
    for name, count in (("voc", 21), ("cityscapes", 19), ("camvid", 11)):
        assert len(set(load_label_map(name).palette)) == count
