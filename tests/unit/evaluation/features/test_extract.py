import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from ijepa.config.recipe import ModelSection
from ijepa.data.open import open_dataset
from ijepa.evaluation.features import extract as extract_module
from ijepa.evaluation.features.extract import PixelEncoder, extract, image_features, weights_hash
from ijepa.model.encoder import FrozenEncoder
from ijepa.utils.errors import RunError
from tests.helpers.encoders import MeanColor
from tests.helpers.feature_clouds import color_sets

SHAPE = ModelSection(image_size=32, patch_size=8, encoder={"width": 32, "depth": 3, "heads": 2})
SETTING = {"image_size": (32, 32), "last": 2, "label": "toy", "crop_fraction": 1.0}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return color_sets(tmp_path_factory.mktemp("colors"))[0]


@pytest.fixture
def encoder():
    return FrozenEncoder.initial(SHAPE, seed=3)


def count_forwards(monkeypatch):
    calls = []
    compute = extract_module.image_features
    monkeypatch.setattr(extract_module, "image_features", lambda *args: calls.append(len(args[1])) or compute(*args))
    return calls


def test_extract_returns_mean_patches_of_blocks_in_order(source, encoder):
    found = extract(encoder, source, cache=None, batch_size=7, **SETTING)
    assert found.shape == (60, 2, 32)
    assert found.dtype == torch.float16
    image = torch.from_numpy(pixels_of(source, 11)).permute(2, 0, 1)[None]
    expected = torch.stack([block.mean(1) for block in encoder.forward_blocks(image, 2)], 1)[0]
    torch.testing.assert_close(found[11].float(), expected, atol=2e-3, rtol=2e-3)


def test_extract_keeps_the_order_of_indices(source, encoder):
    whole = extract(encoder, source, cache=None, **SETTING)
    some = extract(encoder, source, np.array([40, 3, 17]), cache=None, **SETTING)
    torch.testing.assert_close(some, whole[[40, 3, 17]])


def test_extract_takes_the_center_crop(source):
    found = extract(
        PixelEncoder((8, 8), 4), source, cache=None, **(SETTING | {"image_size": (8, 8), "crop_fraction": 0.25})
    )
    middle = pixels_of(source, 0)[12:20, 12:20].transpose(2, 0, 1).reshape(1, -1) / 255
    torch.testing.assert_close(found[0].double(), torch.from_numpy(middle), atol=1e-3, rtol=1e-3)


def test_extract_reads_the_cache(source, encoder, tmp_path, monkeypatch):
    calls = count_forwards(monkeypatch)
    first = extract(encoder, source, cache=tmp_path / "new", **SETTING)
    made = len(calls)
    again = extract(encoder, source, cache=tmp_path / "new", **SETTING)
    assert made
    assert len(calls) == made
    assert torch.equal(first, again)
    assert [file.suffix for file in (tmp_path / "new").iterdir()] == [".safetensors"], "no temporary file is left"


def test_extract_reads_fewer_blocks_from_a_cache_of_more(source, encoder, tmp_path, monkeypatch):
    calls = count_forwards(monkeypatch)
    more = extract(encoder, source, cache=tmp_path, **SETTING)
    made = len(calls)
    fewer = extract(encoder, source, cache=tmp_path, **(SETTING | {"last": 1}))
    assert len(calls) == made
    assert torch.equal(fewer, more[:, -1:])
    extract(encoder, source, cache=tmp_path, **(SETTING | {"last": 3}))
    assert len(calls) == 2 * made


@pytest.mark.parametrize("changed", ["weight", "setting", "buffer", "crop", "interpolation", "images", "data"])
def test_extract_recomputes_if_something_changes_the_features(source, encoder, tmp_path, monkeypatch, changed):
    extract(encoder, source, cache=tmp_path, **SETTING)
    calls = count_forwards(monkeypatch)
    setting, indices = dict(SETTING), None
    if changed == "weight":
        with torch.no_grad():
            encoder.vit.blocks[1].mlp.fc1.weight[0, 0] += 1e-3
    elif changed == "setting":
        encoder.vit.norm.eps *= 2
    elif changed == "buffer":
        encoder.vit.pos_embed *= 2
    elif changed == "crop":
        setting["crop_fraction"] = 0.875
    elif changed == "interpolation":
        setting["interpolation"] = "bicubic"
    elif changed == "images":
        indices = np.arange(60)[::-1]
    else:
        monkeypatch.setattr(source, "stamp", "another")
    extract(encoder, source, indices, cache=tmp_path, **setting)
    assert calls


def test_weights_hash_depends_on_weights_and_settings():
    assert weights_hash(FrozenEncoder.initial(SHAPE, 3)) == weights_hash(FrozenEncoder.initial(SHAPE, 3))
    assert weights_hash(FrozenEncoder.initial(SHAPE, 3)) != weights_hash(FrozenEncoder.initial(SHAPE, 4))
    heads = SHAPE.model_copy(update={"encoder": SHAPE.encoder.model_copy(update={"heads": 4})})
    assert weights_hash(FrozenEncoder.initial(SHAPE, 3)) != weights_hash(FrozenEncoder.initial(heads, 3)), (
        "not in the weights"
    )


def test_extract_does_not_cache_an_encoder_that_is_not_a_module(source, tmp_path):
    class Color(MeanColor):
        grid = (4, 4)

        def forward_blocks(self, pixels, last):
            return [self(pixels)]

    extract(Color(), source, cache=tmp_path, **SETTING)
    assert not list(tmp_path.iterdir())


def test_pixel_encoder_returns_patches_and_the_reduced_image():
    pixels = torch.randint(0, 256, (2, 3, 48, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    encoder = PixelEncoder((48, 32), 8)
    assert encoder.grid == (6, 4)
    (blocks,) = encoder.forward_blocks(pixels, 4)
    assert blocks.shape == (2, 24, 192)
    torch.testing.assert_close(blocks[1, 5], pixels[1, :, 8:16, 8:16].flatten() / 255)
    found = image_features(encoder, pixels, 4)
    expected = interpolate(pixels / 255, (32, 32), mode="area").flatten(1)
    torch.testing.assert_close(found[:, 0], expected)
    small = image_features(encoder, pixels[..., :24, :16], 4)
    torch.testing.assert_close(small[:, 0], pixels[..., :24, :16].flatten(1) / 255)
    assert weights_hash(encoder) != weights_hash(PixelEncoder((48, 32), 8, reduced=16)), "other features"


def test_extract_names_an_unreadable_image(tmp_path):
    color_sets(tmp_path)
    broken = tmp_path / "train" / "green" / "004.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(RunError, match="green/004"):
        extract(PixelEncoder((32, 32), 8), open_dataset(tmp_path / "train"), cache=tmp_path / "cache", **SETTING)
    assert not (tmp_path / "cache").exists()


def test_extract_refuses_a_broken_cache_and_infinite_features(source, encoder, tmp_path):
    extract(encoder, source, cache=tmp_path, **SETTING)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RunError, match="delete the file"):
        extract(encoder, source, cache=tmp_path, **SETTING)
    with torch.no_grad():
        encoder.vit.norm.weight.fill_(1e6)
    with pytest.raises(RunError, match="not finite"):
        extract(encoder, source, cache=tmp_path, **SETTING)
    file.unlink()
    assert not list(tmp_path.iterdir())


def pixels_of(source, index):
    return np.array(Image.open(io.BytesIO(source[index].image)))
