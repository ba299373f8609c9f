"""The size of the main recipe, and operations compared with those that torch counts."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from ijepa.config.recipe import Recipe
from ijepa.model.flops import batch_flops
from ijepa.model.ijepa import IJEPA
from ijepa.planning.size import measure_recipe
from tests.helpers.plans import batch, model


def test_measure_recipe_of_the_mission():
    size = measure_recipe(Recipe.load("vit-huge-16-in22k"))
    assert 2 * size.parameters.encoder == pytest.approx(1.26e9, rel=0.005)
    assert size.plain.total == pytest.approx(664e9, rel=0.005)
    assert size.full.total == pytest.approx(659e9, rel=0.002)
    assert size.executed.total == pytest.approx(593.5e9, rel=0.005)
    assert size.lengths is not None and size.lengths.total * 2048 == pytest.approx(460 * 14_146_391, rel=1e-6)


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_batch_flops_agree_with_torch_to_one_percent(drop_path):
    shape = model(drop_path)
    built, (packed, _) = IJEPA(shape), batch(shape, drop_path)
    with FlopCounterMode(display=False) as counter:
        built(packed).loss.backward()
    assert batch_flops(shape, packed).total == pytest.approx(counter.get_total_flops(), rel=0.01)
