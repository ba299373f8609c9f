"""What WEIGHTS may be, and the encoder that it gives."""

import shutil

import pytest
import torch

from ijepa.config.recipe import Recipe
from ijepa.data.open import open_dataset
from ijepa.interop.exchange import export_weights
from ijepa.interop.weights import load_encoder, resolve_weights, shipped_weights
from ijepa.model.encoder import FrozenEncoder
from ijepa.training.loop import pretrain
from ijepa.utils.errors import UserError
from tests.conftest import TINY


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "run"
    values = {**TINY, "data": {**TINY["data"], "path": str(scenes)}}
    model = pretrain(Recipe.read(values, "test"), open_dataset(scenes, split="train"), folder, quiet=True)
    return folder, model


def test_load_encoder_of_a_run_a_checkpoint_and_a_plain_folder(run, tmp_path):
    folder, model = run
    checkpoint = folder / "checkpoints" / "step-00000008"
    plain = tmp_path / "plain"
    plain.mkdir()
    shutil.copy(checkpoint / "target_encoder.safetensors", plain)
    shutil.copy(folder / "recipe.yaml", plain)
    pixels = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    wanted = FrozenEncoder(model.target_encoder)(pixels)
    for weights in (folder, checkpoint, plain, str(folder)):
        assert torch.equal(load_encoder(weights)(pixels), wanted)
    context = load_encoder(folder, "context")(pixels)
    assert not torch.equal(context, wanted)
    assert torch.equal(context, FrozenEncoder(model.context_encoder)(pixels))
    assert resolve_weights(checkpoint).run == folder and resolve_weights(plain).run is None


def test_features_do_not_depend_on_the_alignment_of_weights_in_their_file(run, tmp_path):
    """A longer header moves the tensors that are mapped from the file; a single patch is the most sensitive input."""
    checkpoint = run[0] / "checkpoints" / "step-00000008"
    pixels = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    content = (checkpoint / "target_encoder.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    shutil.copy(run[0] / "recipe.yaml", tmp_path)
    found = []
    for more in range(0, 64, 8):
        header = content[8:start] + b" " * more
        whole = len(header).to_bytes(8, "little") + header + content[start:]
        (tmp_path / "target_encoder.safetensors").write_bytes(whole)
        found.append(load_encoder(tmp_path)(pixels))
    assert all(torch.equal(each, found[0]) for each in found)


def test_exported_weights_are_aligned_in_their_file(run, tmp_path):
    export_weights(run[0], tmp_path / "out", "safetensors")
    (file,) = (tmp_path / "out").rglob("*.safetensors")
    encoder = load_encoder(file.parent)
    assert all(parameter.data_ptr() % 64 == 0 for parameter in encoder.parameters())
    content = file.read_bytes()
    assert int.from_bytes(content[:8], "little") % 64 == 56  # with the eight bytes before it


def test_load_encoder_has_attributes_and_accepts_other_sizes(run):
    encoder = load_encoder(run[0])
    assert (encoder.embed_dim, encoder.patch_size, encoder.grid) == (32, 8, (6, 6))
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    assert encoder(torch.zeros(1, 3, 64, 96, dtype=torch.uint8)).shape == (1, 96, 32)
    with pytest.raises(ValueError):
        encoder(torch.zeros(1, 3, 50, 48, dtype=torch.uint8))
    blocks = encoder.forward_blocks(torch.zeros(1, 3, 48, 48, dtype=torch.uint8), last=2)
    assert len(blocks) == 2 and torch.equal(blocks[-1], encoder(torch.zeros(1, 3, 48, 48, dtype=torch.uint8)))


def test_resolve_weights_refuses_everything_else(run, tmp_path):
    file = tmp_path / "weights.bin"
    file.write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    young = tmp_path / "young"
    young.mkdir()
    shutil.copy(run[0] / "recipe.yaml", young)
    shutil.copy(run[0] / "run.json", young)
    for weights in ("nowhere", file, tmp_path / "empty", young):
        with pytest.raises(UserError) as err:
            resolve_weights(weights)
        assert err.value.where == str(weights)


def test_load_encoder_refuses_weights_of_another_shape(run, tmp_path):
    shutil.copy(run[0] / "checkpoints/step-00000008/target_encoder.safetensors", tmp_path)
    (tmp_path / "recipe.yaml").write_text(Recipe.load(run[0], {"model.encoder.width": "64"}).dump())
    with pytest.raises(UserError) as err:
        load_encoder(tmp_path)
    assert err.value.where == str(tmp_path / "target_encoder.safetensors") and "shape" in err.value.problem


@pytest.mark.parametrize("name", shipped_weights())
def test_shipped_weights_load(name):
    encoder = load_encoder(name)
    recipe = resolve_weights(name).recipe
    features = encoder(torch.zeros(1, 3, *recipe.model.image_size, dtype=torch.uint8))
    assert features.shape == (1, encoder.grid[0] * encoder.grid[1], recipe.model.encoder.width)
    assert features.isfinite().all()
