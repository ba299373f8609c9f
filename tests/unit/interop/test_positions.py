"""Tables of positions are read for what made them, whatever form they come in."""

import pytest
import torch

from ijepa.interop.exchange import export_weights, import_weights
from ijepa.interop.positions import Positions, read_positions
from ijepa.interop.tensors import Lazy
from ijepa.interop.weights import load_encoder, resolve_weights
from ijepa.utils.errors import UserError
from tests.helpers.libraries import averaged, recipe, write_weights
from tests.reference.dense import positions

FORMS = {"transformers": "hf", "timm": "timm", "official": "jepa.pth.tar", "safetensors": "one.safetensors"}


def read(table: torch.Tensor, **more) -> Positions:
    return read_positions({"pos_embed": Lazy.of(table)}, table.shape[-1], "file", **more)


@pytest.mark.parametrize("grid", [(6, 6), (3, 12), (12, 3), (4, 9), (1, 5), (16, 16)])
@pytest.mark.parametrize("scale", [1.0, 0.25, 0.3])
def test_grid_and_factor_stand_in_the_table(grid, scale):
    """The table is the slow reference's."""
    assert read(scale * positions(32, grid).float()[None]) == Positions(grid, None, scale)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_of_every_type(kind):
    assert read((0.25 * positions(32, (6, 6)))[None].to(kind)) == Positions((6, 6), None, 0.25)


@pytest.mark.parametrize(
    ("grid", "native"), [((8, 8), (6, 6)), ((4, 4), (14, 14)), ((28, 28), (14, 14)), ((6, 8), (6, 6))]
)
def test_a_stretched_table_says_over_what(grid, native):
    made = Positions(grid, native, 0.5)
    assert read(made.table(64), grid=grid) == made
    if grid[0] == grid[1]:
        assert read(made.table(64)) == made


def test_no_positions_at_all_are_a_factor_of_nothing():
    assert read(torch.zeros(1, 36, 32)) == Positions((6, 6), None, 0.0)


@pytest.mark.parametrize("noise", [1e-3, 1.0])
def test_learned_ones_are_refused_however_small_they_are(noise):
    draw = torch.Generator().manual_seed(0)
    table = 1e-5 * (positions(32, (6, 6)).float() + noise * torch.randn(36, 32, generator=draw))
    with pytest.raises(UserError, match="not the sin-cos table of 36 patches; learned ones are not read"):
        read(table[None])


@pytest.mark.parametrize(("steps", "drift"), [(187_500, 1.4e-4), (300_000, 1.8e-4)])
def test_a_table_that_the_moving_average_has_rounded_is_read_as_the_exact_one(steps, drift):
    """187,500 steps are the published 300 epochs of ImageNet-1k in batches of 2,048."""
    exact = Positions((14, 14)).table(32)
    table = averaged(exact, steps)
    assert (table - exact).abs().max().item() == pytest.approx(drift, rel=0.1)
    for scale in (1.0, 0.25, 0.3):
        found = read(scale * table)
        assert found == Positions((14, 14), None, scale)
        assert found.drift == pytest.approx(drift, rel=0.1)
        assert torch.equal(found.table(32), scale * exact)


@pytest.mark.parametrize(("off", "read_"), [(1.9e-3, True), (2.1e-3, False)])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_how_far_a_table_may_be_off(off, read_, scale):
    table = Positions((14, 14), None, scale).table(32)
    table[0, 5, 3] += off * scale
    if read_:
        found = read(table)
        assert found.scale == scale and found.drift == pytest.approx(off, rel=1e-3)
    else:
        with pytest.raises(UserError, match="is not the sin-cos table"):
            read(table)


@pytest.mark.parametrize("scale", [1.0, 0.25, 1 / 3, 0.123456789])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_rounding_of_a_type_is_no_drift(scale, kind):
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
def test_every_form_says_what_its_positions_are(tmp_path, form, change):
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
