"""Pretraining from existing weights: which parts are loaded, at which resolution, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ijepa.config.recipe import Recipe
from ijepa.data.open import open_dataset
from ijepa.interop.exchange import export_weights
from ijepa.interop.init_from import initial_weights
from ijepa.interop.weights import load_encoder
from ijepa.model.encoder import FrozenEncoder
from ijepa.model.ijepa import IJEPA
from ijepa.model.vision_transformer import VisionTransformer, sincos_positions
from ijepa.training.loop import Callback, pretrain
from ijepa.utils.errors import UserError
from tests.conftest import TINY


@pytest.fixture(scope="module")
def first(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "run"
    values = {**TINY, "steps": 3, "data": {**TINY["data"], "path": str(scenes)}}
    pretrain(Recipe.read(values, "test"), open_dataset(scenes, split="train"), folder, quiet=True)
    return folder


def recipe(scenes, start, **changes) -> Recipe:
    values = {**TINY, "seed": 9, "steps": 3, "data": {**TINY["data"], "path": str(scenes)}}
    return Recipe.read({**values, "init": {"from": str(start), **changes.pop("init", {})}, **changes}, "test")


def run_from(recipe: Recipe, scenes, output) -> dict[str, torch.Tensor]:
    """Train, and return the weights before the first step."""
    seen: dict[str, torch.Tensor] = {}

    def look(model: IJEPA) -> dict[str, float]:
        if not seen:
            seen.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {}

    source = open_dataset(scenes, split="train")
    pretrain(
        recipe, source, output, quiet=True, callbacks=[Callback(99, look)], initial=initial_weights(recipe).tensors
    )
    return seen


def part(first, name: str) -> dict[str, torch.Tensor]:
    return load_file(first / "checkpoints/step-00000003" / f"{name}.safetensors")


def test_an_encoder_initializes_both_and_the_predictor_is_random(first, scenes, tmp_path):
    chosen = recipe(scenes, first)
    began = run_from(chosen, scenes, tmp_path / "run")
    drawn = IJEPA(chosen.model, chosen.seed).state_dict()
    for name, value in part(first, "target_encoder").items():
        assert torch.equal(began[f"context_encoder.{name}"], value)
        assert torch.equal(began[f"target_encoder.{name}"], value)
    assert all(torch.equal(value, drawn[name]) for name, value in began.items() if name.startswith("predictor."))


def test_init_parts_all_loads_all_three_parts(first, scenes, tmp_path):
    began = run_from(recipe(scenes, first, init={"parts": "all"}), scenes, tmp_path / "run")
    for name in ("context_encoder", "target_encoder", "predictor"):
        assert all(torch.equal(began[f"{name}.{key}"], value) for key, value in part(first, name).items())
    differ = part(first, "context_encoder")["blocks.0.mlp.fc1.weight"]
    assert not torch.equal(began["target_encoder.blocks.0.mlp.fc1.weight"], differ)


def test_weights_of_another_library_at_another_resolution(first, scenes, tmp_path):
    folder = export_weights(first, tmp_path / "hf", "transformers")
    larger = {**TINY["model"], "image_size": 64}
    chosen = initial_weights(recipe(scenes, folder, model=larger)).recipe
    began = run_from(chosen, scenes, tmp_path / "run")
    for name, value in part(first, "target_encoder").items():
        assert torch.equal(began[f"context_encoder.{name}"], value)
    assert chosen.model.position_grid == (6, 6)
    # A patch has the position of its place in the image, stretched in the same way as in evaluation.
    model, native = IJEPA(chosen.model), load_encoder(first)
    stretched = native.vit.positions((8, 8))
    assert torch.equal(model.context_encoder.pos_embed, stretched)
    assert torch.equal(model.target_encoder.pos_embed, stretched)
    assert torch.equal(model.predictor.predictor_pos_embed, sincos_positions(16, (8, 8), (6, 6)))
    # The first encoder of the run gives the features that evaluation computes at this size.
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    vit = VisionTransformer(chosen.model)
    vit.load_state_dict(part(first, "target_encoder"))
    assert torch.equal(FrozenEncoder(vit)(pixels), native(pixels))


def test_a_recipe_keeps_its_own_position_grid(first, scenes):
    other = {**TINY["model"], "image_size": 64, "position_grid": 8}
    assert initial_weights(recipe(scenes, first, model=other)).recipe.model.position_grid == (8, 8)
    assert initial_weights(recipe(scenes, first)).recipe.model.position_grid is None


def test_a_third_run_keeps_the_position_grid_of_the_first(first, scenes, tmp_path):
    second = initial_weights(recipe(scenes, first, model={**TINY["model"], "image_size": 64})).recipe
    run_from(second, scenes, tmp_path / "second")
    larger = {**TINY["model"], "image_size": 96}
    third = initial_weights(recipe(scenes, tmp_path / "second", model=larger)).recipe
    assert third.model.position_grid == (6, 6)


def test_init_parts_all_refuses_weights_without_a_predictor(first, scenes, tmp_path):
    folder = export_weights(first, tmp_path / "hf", "transformers")
    with pytest.raises(UserError) as err:
        initial_weights(recipe(scenes, folder, init={"parts": "all"}))
    assert err.value.where == f"init.from = {folder}" and "--init.parts encoder" in err.value.hint


def test_a_resumed_run_keeps_its_own_weights(first, scenes, tmp_path):
    run_from(recipe(scenes, first), scenes, tmp_path / "whole")
    short = recipe(scenes, first, checkpoint={"every": 2, "keep": 3})
    run_from(short, scenes, tmp_path / "again")
    run = tmp_path / "again"
    (run / "checkpoints/step-00000003").rename(tmp_path / "lost")
    source = open_dataset(scenes, split="train")
    pretrain(short, source, run, quiet=True, initial=initial_weights(short).tensors)
    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_other_shapes_are_refused_with_the_flag_to_change(first, scenes):
    deep = {**TINY["model"], "encoder": {**TINY["model"]["encoder"], "depth": 3}}
    with pytest.raises(UserError) as err:
        initial_weights(recipe(scenes, first, model=deep))
    assert err.value.where == f"init.from = {first}" and err.value.hint == "add --model.encoder.depth 2"
    with pytest.raises(UserError) as err:
        initial_weights(recipe(scenes, first, model={**TINY["model"], "patch_size": 4}))
    assert "--model.patch_size 8" in err.value.hint
    with pytest.raises(UserError) as err:
        initial_weights(recipe(scenes, "nowhere"))
    assert err.value.where == "nowhere"


def test_the_command_records_the_source_of_initial_weights(first, scenes, tmp_path):
    from click.testing import CliRunner

    from ijepa.cli import cli

    (tmp_path / "tiny.yaml").write_text(json.dumps({**TINY, "steps": 3}))
    words = ["pretrain", str(tmp_path / "tiny.yaml"), "--data.path", str(scenes), "--output", str(tmp_path / "run")]
    words += ["--init.from", str(first), "--model.image_size", "64"]
    for _ in range(2):  # the second time it resumes with the recipe that it recorded
        assert CliRunner().invoke(cli, words, catch_exceptions=False).exit_code == 0
    assert Recipe.load(tmp_path / "run/recipe.yaml").model.position_grid == (6, 6)
    info = json.loads((tmp_path / "run/run.json").read_text())
    assert info["init"] == "run (step-00000003)"
