"""Checkpoints as the original code writes them, made here key by key, and damaged or malicious files."""

import collections
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from ijepa.config.recipe import EncoderSection, PredictorSection
from ijepa.interop.exchange import export_weights, import_weights
from ijepa.interop.weights import load_encoder, resolve_weights
from ijepa.utils.errors import UserError
from tests.helpers.libraries import PARTS, eager, features_of_library, pixels
from tests.reference.dense import positions

ENCODER = {
    "pos_embed": (1, 36, 384),
    "patch_embed.proj.weight": (384, 3, 16, 16),
    "patch_embed.proj.bias": (384,),
    "norm.weight": (384,),
    "norm.bias": (384,),
}
ENCODER_BLOCK = {
    "norm1.weight": (384,),
    "norm1.bias": (384,),
    "attn.qkv.weight": (1152, 384),
    "attn.qkv.bias": (1152,),
    "attn.proj.weight": (384, 384),
    "attn.proj.bias": (384,),
    "norm2.weight": (384,),
    "norm2.bias": (384,),
    "mlp.fc1.weight": (1536, 384),
    "mlp.fc1.bias": (1536,),
    "mlp.fc2.weight": (384, 1536),
    "mlp.fc2.bias": (384,),
}
PREDICTOR = {
    "mask_token": (1, 1, 96),
    "predictor_pos_embed": (1, 36, 96),
    "predictor_embed.weight": (96, 384),
    "predictor_embed.bias": (96,),
    "predictor_norm.weight": (96,),
    "predictor_norm.bias": (96,),
    "predictor_proj.weight": (384, 96),
    "predictor_proj.bias": (384,),
}
PREDICTOR_BLOCK = {
    "norm1.weight": (96,),
    "norm1.bias": (96,),
    "attn.qkv.weight": (288, 96),
    "attn.qkv.bias": (288,),
    "attn.proj.weight": (96, 96),
    "attn.proj.bias": (96,),
    "norm2.weight": (96,),
    "norm2.bias": (96,),
    "mlp.fc1.weight": (384, 96),
    "mlp.fc1.bias": (384,),
    "mlp.fc2.weight": (96, 384),
    "mlp.fc2.bias": (96,),
}


def state_of(shapes: dict, block: dict, name: str, depth: int, seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    every = {**shapes, **{f"{name}.{n}.{key}": shape for n in range(depth) for key, shape in block.items()}}
    state = {key: 0.1 * torch.randn(shape, generator=draw) for key, shape in every.items()}
    for key in state:
        if key.endswith("pos_embed"):
            state[key] = positions(shapes[key][-1], (6, 6)).float()[None]
    return state


def states() -> dict[str, dict[str, torch.Tensor]]:
    return {
        "encoder": state_of(ENCODER, ENCODER_BLOCK, "blocks", 3, 0),
        "target_encoder": state_of(ENCODER, ENCODER_BLOCK, "blocks", 3, 1),
        "predictor": state_of(PREDICTOR, PREDICTOR_BLOCK, "predictor_blocks", 2, 2),
    }


MORE = {"opt": {"state": {}, "param_groups": [{"lr": 1e-3}]}, "scaler": None, "epoch": 300, "loss": 0.14}


def original_file(path: Path, *, prefix: str = "module.", predictor: bool = True, **more) -> Path:
    """Write a checkpoint as the original code does, of a small ViT with patches of 16 at 96 pixels."""
    content = {name: {prefix + key: value for key, value in state.items()} for name, state in states().items()}
    if not predictor:
        del content["predictor"]
    torch.save({**content, **MORE, "batch_size": 128, "world_size": 16, "lr": 1e-3, **more}, path)
    return path


@pytest.mark.parametrize(("prefix", "predictor"), [("module.", True), ("", True), ("module.", False)])
def test_read_official_gives_encoders_and_predictor(tmp_path, prefix, predictor):
    file = original_file(tmp_path / "vits.16.pth.tar", prefix=prefix, predictor=predictor)
    found = resolve_weights(file)
    assert found.parts == sorted(PARTS if predictor else PARTS[:2])
    assert found.recipe.model.encoder == EncoderSection(width=384, depth=3, heads=6)
    assert found.recipe.model.image_size == (96, 96) and found.recipe.model.patch_size == 16
    if predictor:
        assert found.recipe.model.predictor == PredictorSection(width=96, depth=2, heads=6)
    for which, name in (("target", "target_encoder"), ("context", "encoder")):
        encoder = load_encoder(file, which)
        raw, normalized = pixels(encoder)
        wanted = eager(states()[name], 6, normalized, "transformers")
        torch.testing.assert_close(encoder(raw), wanted, rtol=1e-5, atol=2e-5)
        out = export_weights(file, tmp_path / which, "transformers", which=which)
        assert torch.equal(features_of_library(out, "transformers", normalized), wanted)


def test_write_official_gives_the_original_file_back(tmp_path):
    """The same keys and bits, after a weights folder of this package."""
    import_weights(original_file(tmp_path / "first.pth.tar"), tmp_path / "ours")
    file = export_weights(tmp_path / "ours", tmp_path / "again.pth.tar", "official")
    content = torch.load(file, weights_only=True)
    for name, state in states().items():
        assert set(content[name]) == {f"module.{key}" for key in state}
        for key, value in state.items():
            if key.endswith("pos_embed"):
                torch.testing.assert_close(content[name][f"module.{key}"], value, rtol=0, atol=1e-6)
            else:
                assert torch.equal(content[name][f"module.{key}"], value)


@pytest.mark.parametrize("loss", [np.float64(0.3), np.float32(0.3), np.int64(3), np.float16(1), np.bool_(True)])
def test_read_official_accepts_numbers_of_numpy(tmp_path, loss):
    assert resolve_weights(original_file(tmp_path / "a.pth.tar", loss=loss, epoch=np.int64(3))).parts == sorted(PARTS)


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_read_official_does_not_run_code_and_prints_nothing(tmp_path, capfd):
    mark = tmp_path / "run"
    torch.save({"encoder": Malicious(mark)}, tmp_path / "bad.pth.tar")
    for protocol in (0, 2, 4):
        (tmp_path / f"old{protocol}.pth").write_bytes(pickle.dumps({"encoder": Malicious(mark)}, protocol=protocol))
    for name, word in (("bad.pth.tar", "code"), ("old2.pth", "code"), ("old0.pth", "torch"), ("old4.pth", "torch")):
        with warnings.catch_warnings(record=True) as warned, pytest.raises(UserError) as err:
            warnings.simplefilter("always")
            import_weights(tmp_path / name, tmp_path / "out")
        assert err.value.where == str(tmp_path / name) and word in err.value.problem and not warned
    assert not mark.exists() and not (tmp_path / "out").exists()
    assert capfd.readouterr().err == ""


def test_read_official_names_a_forbidden_object(tmp_path):
    file = original_file(tmp_path / "a.pth.tar", opt=collections.defaultdict(dict))
    with pytest.raises(UserError) as err:
        resolve_weights(file)
    assert "collections.defaultdict" in err.value.problem and "state dicts" in err.value.hint


def _changed(path: Path, part: str, key: str, value: object) -> Path:
    content = states()
    content[part][key] = value
    torch.save({**content, **MORE}, path)
    return path


ONE = torch.tensor(1.0)
TABLE = positions(384, (6, 6)).float()[None]


@pytest.mark.parametrize(
    ("part", "key", "value", "word"),
    [
        ("predictor", "predictor_embed.weight", torch.ones(384), "predictor_embed.weight"),
        ("encoder", "blocks.0.mlp.fc1.weight", ONE, "fc1.weight"),
        ("target_encoder", "blocks.0.mlp.fc1.weight", ONE, "fc1.weight"),
        ("encoder", "patch_embed.proj.weight", torch.ones(34, 3, 8, 8), "width 34"),
        ("target_encoder", "patch_embed.proj.weight", torch.ones(34, 3, 8, 8), "(34, 3, 8, 8)"),
        ("encoder", "patch_embed.proj.weight", torch.ones(384, 3), "(384, 3)"),
        ("target_encoder", "pos_embed", torch.zeros(1, 0, 384), "(1, 0, 384)"),
        ("target_encoder", "pos_embed", ONE, "pos_embed"),
        ("encoder", "pos_embed", TABLE * torch.nan, "sin-cos table of 36"),
        ("encoder", "pos_embed", -TABLE, "sin-cos table of 36"),
        ("encoder", "pos_embed", torch.randn(1, 36, 384), "sin-cos table of 36"),
        ("target_encoder", "pos_embed", TABLE * torch.nan, "sin-cos table of 6 x 6"),
        ("target_encoder", "pos_embed", TABLE + 0.01 * torch.randn(1, 36, 384), "sin-cos table of 6 x 6"),
        ("target_encoder", "pos_embed", TABLE / 2, "different positions"),
        ("encoder", "pos_embed", 1.01 * TABLE, "different positions"),
        ("predictor", "predictor_pos_embed", torch.randn(1, 36, 96), "predictor_pos_embed"),
        ("predictor", "predictor_pos_embed", torch.randn(1, 25, 96), "25 positions"),
        ("target_encoder", "norm.bias", torch.ones(384).to(torch.float8_e4m3fn), "norm.bias of target_encoder"),
        ("target_encoder", "blocks.0.pos_embed", TABLE, "blocks.0.pos_embed"),
        ("encoder", "norm.bias", torch.ones(385), "(385,)"),
    ],
)
def test_read_official_refuses_damaged_checkpoints(tmp_path, part, key, value, word):
    file = _changed(tmp_path / "a.pth.tar", part, key, value)
    with pytest.raises(UserError) as err:
        import_weights(file, tmp_path / "out")
    assert err.value.where == str(file) and word in err.value.problem and list(tmp_path.iterdir()) == [file]
