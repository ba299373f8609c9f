import pytest
from click.testing import CliRunner

from ijepa.cli import cli
from ijepa.utils.errors import RunError, UserError
from tests.helpers.images import jpeg, write_tree


def invoke(*words: object) -> str:
    done = CliRunner().invoke(cli, ["data", *map(str, words)], catch_exceptions=False, standalone_mode=False)
    return done.output


def test_scenes_index_and_check_agree_on_the_number_of_images(tmp_path):
    assert "20 train, 10 val" in invoke("scenes", tmp_path / "s", "--images", 30, "--size", 32, "--val-share", 1 / 3)
    assert "20 images, 7 classes, masks" in invoke("index", tmp_path / "s", "--split", "train")
    assert "10 images" in invoke("check", tmp_path / "s", "--split", "val")
    assert "shards: " in invoke("check", tmp_path / "s", "--checksums")


def test_check_fails_and_lists_bad_images_and_duplicates(tmp_path):
    write_tree(tmp_path / "set", {"a.jpg": jpeg(1), "b.jpg": jpeg(1), "c.jpg": b"damaged"})
    done = CliRunner().invoke(cli, ["data", "check", str(tmp_path / "set"), "--duplicates"])
    assert isinstance(done.exception, RunError) and done.exception.exit_code == 1
    assert "2 good, 1 bad" in done.output and "bad: c.jpg" in done.output
    assert "duplicate: b.jpg is identical to a.jpg" in done.output


def test_pack_refuses_an_output_inside_its_source_and_a_missing_one(tmp_path):
    write_tree(tmp_path / "set", {"a.jpg": jpeg(1)})
    with pytest.raises(UserError) as err:
        invoke("pack", "folder", tmp_path / "set", tmp_path / "set" / "out")
    assert err.value.where == str(tmp_path / "set" / "out")
    with pytest.raises(UserError) as err:
        invoke("pack", "folder", tmp_path / "set")
    assert err.value.where == "OUT"
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["a.jpg"]
