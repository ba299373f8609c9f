from pathlib import Path

import pytest
import torch

from ijepa.config.recipe import Recipe
from ijepa.data.open import open_dataset
from ijepa.evaluation.diagnostics.online import online_diagnosis
from ijepa.model.ijepa import IJEPA
from tests.conftest import TINY
from tests.helpers.encoders import block_mask, write_pairs

METRICS = {"rankme", "rankme_centred", "std", "position_r2", "mean_cosine", "alpha_req", "patch_spread"}
METRICS |= {"std_before_norm"}


@pytest.fixture(scope="module")
def model() -> IJEPA:
    return IJEPA(Recipe.read(TINY, "tiny").model, 0)


def test_online_diagnosis_of_a_labeled_source_has_knn(scenes: Path, model: IJEPA) -> None:
    measured = online_diagnosis(open_dataset(scenes, split="train"), 48)(model)
    assert set(measured) == METRICS | {"knn"}
    assert all(type(value) is float for value in measured.values())


def test_online_diagnosis_of_an_unlabeled_source_has_no_knn(tmp_path: Path, model: IJEPA) -> None:
    source = open_dataset(write_pairs(tmp_path, [block_mask(i, 48) for i in range(12)]))
    assert set(online_diagnosis(source, (48, 48))(model)) == METRICS


def test_online_diagnosis_is_repeatable_and_does_not_change_the_model(scenes: Path, model: IJEPA) -> None:
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


def test_online_diagnosis_shows_a_collapse(scenes: Path) -> None:
    model = IJEPA(Recipe.read(TINY, "tiny").model, 0)
    measure = online_diagnosis(open_dataset(scenes, split="train"), 48)
    alive = measure(model)
    with torch.no_grad():
        model.target_encoder.norm.weight.zero_()
        model.target_encoder.norm.bias.fill_(1.0)
    dead = measure(model)
    assert dead["std_before_norm"] == pytest.approx(alive["std_before_norm"]), "only the norm has collapsed"
    assert "alpha_req" not in dead and dead["patch_spread"] == 0, "alpha_req is undefined"
    assert dead["std"] < 1e-6 < alive["std"]
    assert dead["mean_cosine"] == pytest.approx(1)
    assert dead["rankme"] < 1.01 < alive["rankme"]
