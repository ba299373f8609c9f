"""The lock and the state of an unfinished packing."""

import os

import pytest

from ijepa.data.open import open_dataset
from ijepa.prepare import pack_state
from ijepa.prepare.pack import Settings, pack
from ijepa.utils.errors import RunError, UserError
from tests.unit.prepare.test_pack import run, tree


@pytest.mark.parametrize("kept", [["plan.json", "train-0000.tar.json"], []])
def test_pack_killed_after_the_manifest_only_removes_its_state(tmp_path, monkeypatch, kept):
    root = tree(tmp_path / "tree")

    def killed(out):
        for file in (out / pack_state.WORK).iterdir():
            if file.name not in kept:
                file.unlink()
        raise RunError("killed")

    monkeypatch.setattr(pack_state, "remove_state", killed)
    with pytest.raises(RunError, match="killed"):
        run("folder", root, tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(UserError, match="settings"):
        run("folder", root, tmp_path / "out", "--seed", 3)
    assert "30 train in 1 shards" in run("folder", root, tmp_path / "out")
    assert not (tmp_path / "out" / pack_state.WORK).exists()


def test_pack_locks_its_folder(tmp_path):
    source = {"train": open_dataset(tree(tmp_path / "tree"))}
    with (
        pack_state.lock(tmp_path / "out"),
        pytest.raises(UserError, match=str(os.getpid())),
    ):
        pack(source, tmp_path / "out", Settings())
    assert not (tmp_path / "out").exists()
    pack(source, tmp_path / "out", Settings())


def test_pack_removes_partial_files_of_a_killed_packing_first(tmp_path):
    source = {"train": open_dataset(tree(tmp_path / "tree"))}
    folders = [tmp_path / "out", tmp_path / "out/.packing", tmp_path / "out/.packing/archives"]
    folders[-1].mkdir(parents=True)
    for folder in folders:
        (folder / ".half.tar.77.part").write_bytes(b"half")

    def opened(spool):
        assert spool == folders[-1] and not list((tmp_path / "out").rglob("*.part"))
        return source

    pack(opened, tmp_path / "out", Settings())
    assert (tmp_path / "out/manifest.json").is_file()
