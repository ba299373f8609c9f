from pathlib import Path

import pytest
import torch

from ijepa.cli.train import _diagnosis
from ijepa.config.recipe import Recipe
from ijepa.data.open import open_dataset
from ijepa.evaluation.diagnostics.online import online_diagnosis
from ijepa.model.ijepa import IJEPA
from tests.conftest import TINY
from tests.helpers.encoders import block_mask, write_pairs

FIGURES = {"rankme", "rankme_centred", "std", "position_r2", "mean_cosine", "alpha_req", "patch_spread"}
FIGURES |= {"std_before_norm"}


@pytest.fixture(scope="module")
def model() -> IJEPA:
    return IJEPA(Recipe.read(TINY, "tiny").model, 0)


def test_figures_of_a_labelled_source_have_a_knn(scenes: Path, model: IJEPA) -> None:
    measured = online_diagnosis(open_dataset(scenes, split="train"), 48)(model)
    assert set(measured) == FIGURES | {"knn"}
    assert all(type(value) is float for value in measured.values())


def test_figures_of_an_unlabelled_source_have_none(tmp_path: Path, model: IJEPA) -> None:
    source = open_dataset(write_pairs(tmp_path, [block_mask(i, 48) for i in range(12)]))
    assert set(online_diagnosis(source, (48, 48))(model)) == FIGURES


def test_repeats_and_leaves_the_model_alone(scenes: Path, model: IJEPA) -> None:
    source = open_dataset(scenes, split="train")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    measure = online_diagnosis(source, 48, seed=3)
    first = measure(model)
    assert measure(model) == first == online_diagnosis(source, 48, seed=3)(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(("steps", "expected"), [(4000, 400), (300, 50), (20, 20)])
@pytest.mark.parametrize("asked", [None, 0, 7])
def test_a_run_is_measured_ten_times_if_nothing_is_said(
    scenes: Path, steps: int, expected: int, asked: int | None
) -> None:
    """Often enough for warnings, which take three, and never a large part of a short run."""
    recipe = Recipe.read({**TINY, "steps": steps, "data": {"path": f"{scenes}/train-*.tar"}}, "tiny")
    (callback,) = _diagnosis(recipe, 160, asked, None, Path())
    assert callback.every == {None: expected, 0: steps, 7: 7}[asked]


def test_sees_a_collapse(scenes: Path) -> None:
    model = IJEPA(Recipe.read(TINY, "tiny").model, 0)
    measure = online_diagnosis(open_dataset(scenes, split="train"), 48)
    alive = measure(model)
    with torch.no_grad():
        model.target_encoder.norm.weight.zero_()
        model.target_encoder.norm.bias.fill_(1.0)
    dead = measure(model)
    assert dead["std_before_norm"] == pytest.approx(alive["std_before_norm"]), "the norm alone has died"
    assert "alpha_req" not in dead and dead["patch_spread"] == 0, "one is undefined"
    assert dead["std"] < 1e-6 < alive["std"]
    assert dead["mean_cosine"] == pytest.approx(1)
    assert dead["rankme"] < 1.01 < alive["rankme"]
