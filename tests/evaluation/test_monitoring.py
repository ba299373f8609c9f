from pathlib import Path

import pytest
import torch

from ijepa.data.sources import open_source
from ijepa.evaluation.monitoring import online_diagnosis
from ijepa.model.jepa import IJEPA
from ijepa.recipe import Recipe
from tests.conftest import TINY
from tests.evaluation.toys import block_mask, write_pairs

FIGURES = {"rankme", "rankme_centred", "std", "position_r2", "mean_cosine"}


@pytest.fixture(scope="module")
def model() -> IJEPA:
    return IJEPA(Recipe.read(TINY, "tiny").model, 0)


def test_figures_of_a_labelled_source_have_a_knn(scenes: Path, model: IJEPA) -> None:
    measured = online_diagnosis(open_source(scenes, split="train"), 48)(model)
    assert set(measured) == FIGURES | {"knn"}
    assert all(type(value) is float for value in measured.values())


def test_figures_of_an_unlabelled_source_have_none(tmp_path: Path, model: IJEPA) -> None:
    source = open_source(write_pairs(tmp_path, [block_mask(i, 48) for i in range(12)]))
    assert set(online_diagnosis(source, (48, 48))(model)) == FIGURES


def test_repeats_and_leaves_the_model_alone(scenes: Path, model: IJEPA) -> None:
    source = open_source(scenes, split="train")
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


def test_sees_a_collapse(scenes: Path) -> None:
    model = IJEPA(Recipe.read(TINY, "tiny").model, 0)
    measure = online_diagnosis(open_source(scenes, split="train"), 48)
    alive = measure(model)
    with torch.no_grad():
        model.target_encoder.norm.weight.zero_()
        model.target_encoder.norm.bias.fill_(1.0)
    dead = measure(model)
    assert dead["std"] < 1e-6 < alive["std"]
    assert dead["mean_cosine"] == pytest.approx(1)
    assert dead["rankme"] < 1.01 < alive["rankme"]
