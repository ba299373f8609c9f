"""Position tables: what they were made from, in every format."""

import pytest
import torch

from ijepa.interop.exchange import export_weights, import_weights
from ijepa.interop.positions import Positions, read_positions
from ijepa.interop.tensors import LazyTensor
from ijepa.interop.weights import load_encoder, resolve_weights
from ijepa.utils.errors import UserError
from tests.helpers.libraries import averaged, recipe, write_weights
from tests.reference.dense import positions

FORMS = {"transformers": "hf", "timm": "timm", "official": "jepa.pth.tar", "safetensors": "one.safetensors"}


def read(table: torch.Tensor, **more) -> Positions:
    return read_positions({"pos_embed": LazyTensor.of(table)}, table.shape[-1], "file", **more)


@pytest.mark.parametrize("grid", [(6, 6), (3, 12), (12, 3), (4, 9), (1, 5), (16, 16)])
@pytest.mark.parametrize("scale", [1.0, 0.25, 0.3])
def test_read_positions_finds_grid_and_factor(grid, scale):
    """The table is that of the slow reference."""
    assert read(scale * positions(32, grid).float()[None]) == Positions(grid, None, scale)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_read_positions_accepts_every_type(kind):
    assert read((0.25 * positions(32, (6, 6)))[None].to(kind)) == Positions((6, 6), None, 0.25)


@pytest.mark.parametrize(
    ("grid", "native"), [((8, 8), (6, 6)), ((4, 4), (14, 14)), ((28, 28), (14, 14)), ((6, 8), (6, 6))]
)
def test_read_positions_finds_the_native_grid_of_a_stretched_table(grid, native):
    made = Positions(grid, native, 0.5)
    assert read(made.table(64), grid=grid) == made
    if grid[0] == grid[1]:
        assert read(made.table(64)) == made


def test_read_positions_of_zeros_has_factor_zero():
    assert read(torch.zeros(1, 36, 32)) == Positions((6, 6), None, 0.0)


@pytest.mark.parametrize("noise", [1e-3, 1.0])
def test_read_positions_refuses_learned_positions_of_any_size(noise):
    draw = torch.Generator().manual_seed(0)
    table = 1e-5 * (positions(32, (6, 6)).float() + noise * torch.randn(36, 32, generator=draw))
    with pytest.raises(UserError) as err:
        read(table[None])
    assert err.value.where == "file" and "sin-cos" in err.value.problem


@pytest.mark.parametrize(("steps", "drift"), [(187_500, 1.4e-4), (300_000, 1.8e-4)])
def test_read_positions_gives_the_exact_table_of_one_that_drifted(steps, drift):
    """The published schedule, 300 epochs of ImageNet-1k in batches of 2,048, has 187,500 steps."""
    exact = Positions((14, 14)).table(32)
    table = averaged(exact, steps)
    assert (table - exact).abs().max().item() == pytest.approx(drift, rel=0.1)
    for scale in (1.0, 0.25, 0.3):
        found = read(scale * table)
        assert found == Positions((14, 14), None, scale)
        assert found.drift == pytest.approx(drift, rel=0.1)
        assert torch.equal(found.table(32), scale * exact)


@pytest.mark.parametrize(("off", "accepted"), [(1.9e-3, True), (2.1e-3, False)])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_read_positions_accepts_errors_up_to_the_tolerance(off, accepted, scale):
    table = Positions((14, 14), None, scale).table(32)
    table[0, 5, 3] += off * scale
    if accepted:
        found = read(table)
        assert found.scale == scale and found.drift == pytest.approx(off, rel=1e-3)
    else:
        with pytest.raises(UserError):
            read(table)


@pytest.mark.parametrize("scale", [1.0, 0.25, 1 / 3, 0.123456789])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rounding_of_a_type_is_not_drift(scale, kind):
    found = read((scale * positions(32, (14, 14)))[None].to(kind))
    assert found.drift == 0
    assert found.scale == pytest.approx(scale, rel=1e-6 if kind.itemsize >= 4 else 4e-3)


CHANGES = {
    "factors": {"encoder": {"position_scale": 0.25}, "predictor": {"position_scale": 0.5}},
    "oblong": {"image_size": [48, 96]},
    "upright": {"image_size": [96, 40]},
    "stretched": {"position_grid": [5, 5]},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", FORMS)
def test_positions_survive_export_and_import(tmp_path, form, change):
    chosen = recipe("tiny", **CHANGES[change])
    ours = write_weights(tmp_path / "ours", chosen)
    out = export_weights(ours, tmp_path / FORMS[form], form)
    found = resolve_weights(out, heads=4).recipe.model
    parts = {"image_size", "patch_size", "position_grid", "encoder"} | ({"predictor"} if form == "official" else set())
    assert found.model_dump(include=parts) == chosen.model.model_dump(include=parts)
    again = import_weights(out, tmp_path / "again", heads=4)
    raw = torch.randint(0, 256, (1, 3, *chosen.model.image_size), dtype=torch.uint8)
    for pixels in (raw, raw[:, :, :40, :40]):
        assert torch.equal(load_encoder(again.folder)(pixels), load_encoder(ours)(pixels))
