import pytest
import yaml

from ijepa.config.files import RECIPES, preset_names, read_yaml, set_by_path
from ijepa.config.recipe import Recipe
from ijepa.utils.errors import UserError


def read(path):
    return read_yaml(path, RECIPES, "recipe")


def test_preset_names_are_those_promised():
    promised = {
        "vit-huge-16-in22k", "vit-huge-14-in1k", "vit-huge-16-448-in1k", "vit-large-16-in1k",
        "vit-base-16-in1k", "vit-small-16", "vit-tiny-64", "scenes",
    }  # fmt: skip
    assert set(preset_names(RECIPES)) == promised


def test_read_yaml_merges_a_file_over_a_chain_of_bases(tmp_path):
    below, middle, top = (tmp_path / f"{name}.yaml" for name in ("below", "middle", "top"))
    below.write_text(yaml.safe_dump({"a": {"x": 1, "y": {"u": 1, "v": 2}}, "b": [1, 2], "c": 3}))
    middle.write_text(yaml.safe_dump({"base": str(below), "a": {"y": {"v": 5}}, "b": [9]}))
    top.write_text(yaml.safe_dump({"base": str(middle), "a": {"x": None}, "c": {"z": 1}}))
    file = read(top)
    assert file.values == {"a": {"x": None, "y": {"u": 1, "v": 5}}, "b": [9], "c": {"z": 1}}
    assert file.own == {"a": {"x": None}, "c": {"z": 1}}
    assert (file.base, file.where) == (str(middle), str(top))


def test_read_yaml_of_a_preset_names_the_kind():
    file = read("scenes")
    assert file.base is None and file.own == file.values and file.where == "recipe scenes"


def test_read_yaml_takes_a_run_folder(tmp_path):
    (tmp_path / "recipe.yaml").write_text("seed: 3")
    assert read(tmp_path).values == {"seed": 3}


def test_read_yaml_of_an_empty_file_gives_no_values(tmp_path):
    (tmp_path / "mine.yaml").write_text("")
    assert read(tmp_path / "mine.yaml").values == {}


@pytest.mark.parametrize("content", [b"a: [", b"- 1", b"\xff\xd8\xff\xe0 a photo"])
def test_read_yaml_refuses_a_file_that_is_not_a_mapping(tmp_path, content):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(file)
    assert caught.value.where == str(file) and "\n" not in str(caught.value)


def test_read_yaml_refuses_a_file_that_is_its_own_base(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"base: {file}")
    with pytest.raises(UserError, match="base"):
        read(file)


@pytest.mark.parametrize("name", ["vit-smal-16", "vit-smal-16.yaml"])
def test_read_yaml_suggests_the_closest_preset(name):
    with pytest.raises(UserError) as caught:
        read(name)
    assert caught.value.where == f"recipe {name}" and "vit-small-16" in caught.value.hint


def test_overrides_are_merged_over_file_and_base(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"base": "vit-small-16", "model": {"encoder": {"depth": 6}}, "epochs": 10}))
    recipe = Recipe.load(file, {"batch.global": "64", "model.encoder.drop_path": "0.1", "data.crop_scale": ".5"})
    assert (recipe.model.encoder.depth, recipe.model.encoder.width, recipe.model.encoder.drop_path) == (6, 384, 0.1)
    assert (recipe.batch.total, recipe.epochs, recipe.data.crop_scale) == (64, 10, (0.5, 0.5))


def test_set_by_path_creates_missing_levels():
    values = {"a": {"x": 1}, "b": 2}
    for path, value in ((["a", "y"], 3), (["b", "z"], 4), (["c"], 5)):
        set_by_path(values, path, value)
    assert values == {"a": {"x": 1, "y": 3}, "b": {"z": 4}, "c": 5}
