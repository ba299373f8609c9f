from dataclasses import fields, is_dataclass
from inspect import get_annotations

import pytest

from ijepa.config.files import RECIPES, preset_names
from ijepa.config.recipe import EncoderSection, MaskSection, ModelSection, PredictorSection, Recipe
from ijepa.utils.errors import UserError

MISSION = "vit-huge-16-in22k"


@pytest.mark.parametrize("name", preset_names(RECIPES))
def test_load_of_a_dump_gives_an_equal_recipe(name, tmp_path):
    recipe = Recipe.load(name)
    assert recipe.name == name
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe
    assert Recipe.load(tmp_path) == recipe  # a run folder


def test_the_preset_of_the_mission():
    r = Recipe.load(MISSION)
    assert r.model.grid == (14, 14)
    encoder, predictor = r.model.encoder, r.model.predictor
    assert (encoder.width, encoder.depth, encoder.heads, encoder.drop_path) == (1280, 32, 16, 0.4)
    assert (predictor.width, predictor.depth, predictor.heads) == (384, 12, 16)
    assert (r.mask.targets, r.mask.target_scale, r.mask.target_aspect) == (4, (0.15, 0.2), (0.75, 1.5))
    assert (r.mask.context_scale, r.mask.context_aspect) == ((0.85, 1.0), (1.0, 1.0))
    assert r.data.crop_scale == (0.3, 1.0)
    assert (r.batch.total, r.data.images, r.epochs) == (2048, 14_146_391, 460)
    o = r.optimizer
    assert (o.betas, o.weight_decay, o.weight_decay_end) == ((0.9, 0.95), 0.05, None)
    assert (o.lr_encoder, o.lr_predictor) == (6e-4, 1.5e-3)
    s = r.schedule
    assert (str(s.warmup), s.decay, s.lr_end, s.momentum_start, s.momentum_end) == (
        "40 epochs",
        "cosine",
        1e-6,
        0.996,
        1,
    )
    assert (r.precision.fp8, r.precision.autocast, r.parallel.strategy) == ("tensorwise", "bf16", "zero2")
    lengths = r.lengths(r.data.images)
    assert (lengths.total, lengths.warmup) == (3_177_412, 276_297)


@pytest.mark.parametrize(
    ("overrides", "where", "word"),
    [
        ({"optimizer.lr_encodr": "1"}, "optimizer.lr_encodr", "lr_encoder?"),
        ({"optimizr.lr_encoder": "1"}, "optimizr", "optimizer?"),
        ({"precision.autocast": "bf61"}, "precision.autocast = 'bf61'", "bf16?"),
        ({"precision.autocast": 16}, "precision.autocast = 16", "'auto', 'none' or 'bf16'"),
        ({"optimizer.lr_encoder": "fast"}, "optimizer.lr_encoder = 'fast'", "a number"),
        ({"optimizer.lr_encoder": "nan"}, "optimizer.lr_encoder = 'nan'", "a number"),
        ({"optimizer.betas": ".9"}, "optimizer.betas = '.9'", "two numbers"),
        ({"optimizer.betas": ".9,1.5"}, "optimizer.betas = '1.5'", "less than 1"),
        ({"optimizer.betas": [-0.1, 0.9]}, "optimizer.betas = -0.1", "0 or more"),
        ({"data.crop_ratio": "0,1"}, "data.crop_ratio = '0'", "more than 0"),
        ({"data.crop_scale": "0.5,5"}, "data.crop_scale = '5'", "at most 1"),
        ({"data.crop_scale": [0.5, None]}, "data.crop_scale = None", "a number"),
        ({"deterministic": "maybe"}, "deterministic = 'maybe'", "true or false"),
        ({"checkpoint.every": "0"}, "checkpoint.every = '0'", "1 or more"),
        ({"data.workers": "many"}, "data.workers = 'many'", "a whole number or 'auto'"),
        ({"data.workers": "-1"}, "data.workers = '-1'", "0 or more or 'auto'"),
        ({"parallel.shard": "0"}, "parallel.shard = '0'", "1 or more or 'auto'"),
        ({"mask.target_scale": ".2,.1"}, "mask.target_scale = '.2,.1'", "above"),
        ({"mask.target_scale": ".2,x"}, "mask.target_scale = 'x'", "a number"),
        ({"model.image_size": "230"}, "model.image_size = 230", "224"),
        ({"model.encoder.heads": "7"}, "model.encoder.heads = 7", "1280"),
        ({"model.encoder": "wide"}, "model.encoder = 'wide'", ""),
        ({"model.patch_size": "56"}, "mask.target_scale = 0.15,0.2", "4x4"),
        ({"mask.min_context": "150"}, "mask.min_context = 150", "largest possible"),
        ({"batch.micro": "3"}, "batch.micro = 3", "2048"),
        ({"batch.micro": "0"}, "batch.micro = '0'", "1 or more or 'auto'"),
        ({"data.crops_per_decode": "3"}, "data.crops_per_decode = 3", "2048"),
        ({"schedule.warmup": "900 epochs"}, "schedule.warmup = 900 epochs", "3177412"),
        ({"steps": "100"}, "schedule.warmup = 40 epochs", "276297"),
        ({"schedule.warmup": "3 parsecs"}, "schedule.warmup = 'parsecs'", "epochs"),
        ({"epochs": None}, "epochs", "steps"),
        ({"randomness": "7"}, "randomness = 7", "1"),
        ({"seed": "-1"}, "seed = '-1'", "0 or more"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_load_names_file_key_and_value_of_a_bad_value(overrides, where, word):
    with pytest.raises(UserError) as caught:
        Recipe.load(MISSION, overrides)
    assert caught.value.where == f"recipe {MISSION}: {where}"
    assert word in f"{caught.value.problem}; {caught.value.hint}" and "\n" not in str(caught.value)


@pytest.mark.parametrize("section", [EncoderSection, PredictorSection, ModelSection, MaskSection])
def test_sections_check_and_describe_every_field_of_the_plain_class(section):
    (plain,) = (base for base in section.__bases__ if is_dataclass(base))
    assert [field.name for field in fields(plain)] == list(section.model_fields)
    assert {field.name for field in fields(plain)} <= set(get_annotations(section))
    assert all(text for _, _, text, _ in section.iter_fields())


@pytest.mark.parametrize(("grid", "least"), [((4, 4), 1), ((4, 4), 10), ((3, 3), 1), ((6, 6), 30)])
def test_check_grid_refuses_grids_without_room(grid, least):
    with pytest.raises(UserError) as caught:
        MaskSection(min_context=least).check_grid(grid)
    assert caught.value.where.startswith("mask.")


def test_check_grid_accepts_all_grids_from_6_to_32():
    for height in range(6, 33):
        for width in range(6, 33):
            MaskSection(min_context=4).check_grid((height, width))


@pytest.mark.parametrize("text", [".8,.9", "[.8, .9]", ".8 .9", [0.8, 0.9]])
def test_load_reads_pairs_in_every_notation(text):
    recipe = Recipe.load("scenes", {"optimizer.betas": text, "data.crop_scale": text, "data.crop_ratio": text})
    assert recipe.optimizer.betas == recipe.data.crop_scale == recipe.data.crop_ratio == (0.8, 0.9)


def test_load_accepts_betas_in_any_order():
    assert Recipe.load("scenes", {"optimizer.betas": ".9,0"}).optimizer.betas == (0.9, 0.0)


def test_lengths_of_steps_override_images_and_images_override_epochs():
    base = {"epochs": 3, "schedule.warmup": "1 %", "batch.global": 10, "schedule.decay": "cosine", "steps": None}
    assert Recipe.load("scenes", base).lengths(100).total == 30
    assert Recipe.load("scenes", {**base, "images": 200}).lengths(100).total == 20
    assert Recipe.load("scenes", {**base, "images": 200, "steps": 7}).lengths(100).total == 7


def test_recipe_is_frozen():
    recipe = Recipe.load("scenes")
    with pytest.raises(Exception, match="frozen"):
        recipe.seed = 3
