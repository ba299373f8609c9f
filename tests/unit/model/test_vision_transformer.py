"""Positions, patches, and the encoder against the slow reference; `test_ijepa` compares the gradients."""

import pytest
import torch

from ijepa.model.config import EncoderConfig, ModelConfig, PredictorConfig
from ijepa.model.vision_transformer import VisionTransformer, patchify, sincos_positions
from tests.helpers.sequences import sequences
from tests.reference.dense import encode, positions

CONFIG = ModelConfig(
    image_size=(32, 48),
    patch_size=8,
    encoder=EncoderConfig(width=32, depth=3, heads=4),
    predictor=PredictorConfig(width=16, depth=1, heads=2),
)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 7)])
def test_sincos_positions_agree_with_the_reference(grid):
    torch.testing.assert_close(sincos_positions(24, grid), positions(24, grid).float())


def test_sincos_positions_of_a_finer_grid_are_at_the_same_places_in_the_image():
    """The center of a patch is that of the middle one of the 3 x 3 patches that it is cut into."""
    coarse = sincos_positions(16, (2, 4)).view(2, 4, 16)
    fine = sincos_positions(16, (6, 12), native=(2, 4)).view(6, 12, 16)
    torch.testing.assert_close(fine[1::3, 1::3], coarse)


def test_sincos_positions_have_values_on_the_meta_device():
    with torch.device("meta"):
        assert sincos_positions(16, (2, 2)).device.type == "cpu"


def test_patchify_goes_row_by_row_and_channels_first():
    pixels = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    found = patchify(pixels, 2)
    assert found.shape == (2 * 6, 12)
    for image in range(2):
        for row in range(2):
            for column in range(3):
                patch = pixels[image, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                assert torch.equal(found[image * 6 + row * 3 + column], patch.flatten())


def test_vision_transformer_of_chosen_patches_agrees_with_the_reference():
    model, images = VisionTransformer(CONFIG).double(), random(2, 3, 32, 48)
    kept = [[0, 5, 7, 23], [2, 3]]
    index = torch.tensor([image * 24 + patch for image, part in enumerate(kept) for patch in part])
    where = sequences([len(part) for part in kept])
    where = type(where)(index, where.cu_seqlens, where.lengths)
    with torch.no_grad():
        (found,) = model(patchify(images, 8)[index], where)
        weights = dict(model.named_parameters())
        wanted = [
            encode(weights, image, part, patch=8, depth=3, heads=4) for image, part in zip(images, kept, strict=True)
        ]
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-5, atol=1e-6)  # positions are in float32


def test_vision_transformer_returns_the_last_layers_earliest_first():
    model, patches, where = VisionTransformer(CONFIG), random(24, 192).float(), sequences((24,))
    with torch.no_grad():
        outputs = model(patches, where, last=2)
        model.blocks = model.blocks[:2]
        (earlier,) = model(patches, where)
    assert len(outputs) == 2
    torch.testing.assert_close(outputs[0], earlier)
    assert not torch.allclose(outputs[1], earlier)
