"""Packing keeps all image bytes, resumes after kills, and reads archives as downloaded."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ijepa.cli import cli
from ijepa.data.open import open_dataset
from ijepa.data.sources.base import FolderSource
from ijepa.prepare import pack_state
from ijepa.prepare.archives import open_archives
from ijepa.prepare.file_lists import list_index
from ijepa.prepare.pack import Settings, pack
from ijepa.utils.errors import RunError, UserError
from tests.helpers.images import encoded, jpeg, picture, write_shards, write_tar, write_tree

CLASSES = ("n01440764", "n01443537", "n01484850")


def tar_bytes(members: list[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def images(each: int) -> dict[str, dict[str, bytes]]:
    """Small JPEGs by class and name."""
    return {
        wnid: {f"{wnid}_{n}.JPEG": jpeg(100 * place + n, 24, 30) for n in range(each)}
        for place, wnid in enumerate(CLASSES)
    }


def nested(path: Path, each: int = 5, folder: str = "") -> Path:
    made = [(f"{folder}{wnid}.tar", tar_bytes(list(files.items()))) for wnid, files in images(each).items()]
    return write_tar(path, made)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def run(*words: object) -> str:
    done = CliRunner().invoke(cli, ["data", "pack", *map(str, words)], catch_exceptions=False, standalone_mode=False)
    return done.output


def held(folder: Path, split: str = "train") -> dict[str, tuple[bytes, str]]:
    """Image bytes and class by the original's name."""
    source = open_dataset(folder, split=split)
    return {
        source.name(i).partition("-")[2].partition("-")[2].rpartition(".")[0]: (
            source.image(i),
            source.classes[source.label(i)],
        )
        for i in range(len(source))
    }


@pytest.mark.parametrize("form", ["tar of tars", "gz of tars in a folder", "gz of folders"])
def test_pack_imagenet22k_as_downloaded(form, tmp_path):
    if form == "tar of tars":
        archive = nested(tmp_path / "fall11_whole.tar")
    elif form == "gz of tars in a folder":
        plain = nested(tmp_path / "plain.tar", folder="winter21_whole/")
        archive = tmp_path / "winter21_whole.tar.gz"
        archive.write_bytes(gzip.compress(plain.read_bytes()))
    else:
        members = [
            (f"winter21/{wnid}/{name}", data) for wnid, files in images(5).items() for name, data in files.items()
        ]
        archive = tmp_path / "winter21_whole.tar.gz"
        archive.write_bytes(gzip.compress(tar_bytes(members)))
    said = run("imagenet22k", archive, tmp_path / "out", "--shard-size", 4, "--hold-out", 1)
    assert "12 train in 3, 3 val in 1 shards; 0 bad" in said
    out = tmp_path / "out"
    tars = {"train-0000.tar", "train-0001.tar", "train-0002.tar", "val-0000.tar"}
    assert {p.name for p in out.iterdir()} == tars | {"classes.txt", "bad.jsonl", "manifest.json"}
    found = held(out) | held(out, "val")
    wanted = {
        name.rpartition(".")[0]: (data, wnid) for wnid, files in images(5).items() for name, data in files.items()
    }
    assert found == wanted
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["classes"] == list(CLASSES) and manifest["splits"]["val"]["images_per_class"] == dict.fromkeys(
        CLASSES, 1
    )
    assert [shard["images"] for shard in manifest["splits"]["train"]["shards"]] == [4, 4, 4]


def test_pack_imagenet1k_with_its_validation_archive(tmp_path):
    train = nested(tmp_path / "ILSVRC2012_img_train.tar")
    val = write_tar(
        tmp_path / "ILSVRC2012_img_val.tar", [(f"ILSVRC2012_val_{n:08d}.JPEG", jpeg(n, 20, 20)) for n in range(1, 5)]
    )
    truth = {f"ILSVRC2012_val_{n:08d}": CLASSES[n % 3] for n in range(1, 5)}
    table = tmp_path / "LOC_val_solution.csv"
    table.write_text("ImageId,PredictionString\n" + "".join(f"{name},{wnid} 1 2 3 4\n" for name, wnid in truth.items()))
    run("imagenet1k", train, val, tmp_path / "out", "--devkit", table)
    assert {name: wnid for name, (_, wnid) in held(tmp_path / "out", "val").items()} == truth
    assert len(held(tmp_path / "out")) == 15


def tree(root: Path) -> Path:
    return write_tree(root, {f"{'abc'[n % 3]}/i{n}.jpg": jpeg(n, 24, 20 + n) for n in range(30)})


def test_pack_list_of_paths_and_labels(tmp_path):
    tree(tmp_path / "tree")
    (tmp_path / "list.csv").write_text("path,label\ntree/a/i0.jpg,10\ntree/b/i1.jpg,9\ntree/c/i2.jpg,10\n")
    run("list", tmp_path / "list.csv", tmp_path / "out")
    assert {name: kind for name, (_, kind) in held(tmp_path / "out").items()} == {"i0": "10", "i1": "9", "i2": "10"}
    assert (tmp_path / "out/classes.txt").read_text() == "9\n10\n"
    for text, message in (
        ("tree/a/i0.jpg\n", "line 1"),
        ("path,label\n\ntree/a/none.jpg,1\n", "line 3"),
        ("", "images"),
    ):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            list_index(tmp_path / "bad.csv")


def test_pack_bytes_depend_on_the_seed_only(tmp_path):
    source = {"train": open_dataset(tree(tmp_path / "tree"))}
    for name, seed, processes in (("one", 0, 1), ("two", 0, 2), ("other", 1, 1)):
        pack(source, tmp_path / name, Settings(seed=seed, shard_size=7), processes=processes)
    one, two, other = (content(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two and one["train-0000.tar"] != other["train-0000.tar"]
    sizes = [entry["images"] for entry in json.loads(one["manifest.json"])["splits"]["train"]["shards"]]
    assert sizes == [6, 6, 6, 6, 6]
    # Shuffled: neighbors in the folder are not neighbors in a shard.
    keys = [int(open_dataset(tmp_path / "one").name(i).rpartition("/")[2][:9]) for i in range(30)]
    assert sorted(keys) == list(range(30)) and np.abs(np.diff(keys)).mean() > 4


KILLED = """
import os, signal, sys
from pathlib import Path
from ijepa.data.open import open_dataset
from ijepa.data.sources.base import FolderSource
from ijepa.prepare.pack import Settings, pack
left = int(sys.argv[3])
class Mortal(FolderSource):
    def _image(self, index):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._image(index)
source = Mortal(open_dataset(sys.argv[1]).index)
pack({"train": source}, Path(sys.argv[2]), Settings(shard_size=4, hold_out=2))
"""


@pytest.mark.slow
def test_pack_after_five_kills_has_the_same_bytes(tmp_path):
    root = tree(tmp_path / "tree")
    pack({"train": open_dataset(root)}, tmp_path / "whole", Settings(shard_size=4, hold_out=2))
    kills = np.random.default_rng(7).integers(3, 7, size=5)
    for reads in kills.tolist():
        done = subprocess.run([sys.executable, "-c", KILLED, str(root), str(tmp_path / "out"), str(reads)], check=False)
        assert done.returncode == -signal.SIGKILL
        assert not (tmp_path / "out/manifest.json").exists()
    pack({"train": open_dataset(root)}, tmp_path / "out", Settings(shard_size=4, hold_out=2))
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not (tmp_path / "out" / pack_state.WORK).exists()


class Interrupted(FolderSource):
    """A folder whose images can be read `reads` times, and then raise RunError."""

    def __init__(self, source: FolderSource, reads: int) -> None:
        super().__init__(source.index)
        self.reads = reads

    def _image(self, index: int) -> bytes:
        self.reads -= 1
        if self.reads < 0:
            raise RunError("stopped")
        return super()._image(index)


def test_pack_keeps_finished_shards_and_writes_missing_ones_again(tmp_path):
    source = {"train": open_dataset(tree(tmp_path / "tree"))}
    pack(source, tmp_path / "whole", Settings(shard_size=6))
    with pytest.raises(RunError, match="stopped"):
        pack({"train": Interrupted(source["train"], 25)}, tmp_path / "out", Settings(shard_size=6))
    there = [tmp_path / f"out/train-000{number}.tar" for number in range(4)]
    there[0].unlink()
    there[1].write_bytes(there[1].read_bytes()[:1024])
    before = [path.stat() for path in there[2:]]
    lines = []
    pack(source, tmp_path / "out", Settings(shard_size=6), progress=lines.append)
    after = [path.stat() for path in there[2:]]
    assert [(s.st_ino, s.st_mtime_ns) for s in before] == [(s.st_ino, s.st_mtime_ns) for s in after]
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert "12 of 30" in lines[0] and "30 of 30" in lines[-1]


def test_pack_checks_class_names_before_it_writes(tmp_path):
    far = write_shards(tmp_path / "shards", [4])
    (far / "classes.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match="label 2"):
        pack({"train": open_dataset(far)}, tmp_path / "out", Settings())
    lines = write_tree(tmp_path / "lines", {"a\nb/i.jpg": jpeg(1)})
    with pytest.raises(UserError, match="classes.txt"):
        pack({"train": open_dataset(lines)}, tmp_path / "out", Settings())
    assert not (tmp_path / "out").exists()
    odd = os.fsdecode(b"caf\xe9")
    latin = write_tree(tmp_path / "latin", {f"{odd}/i.jpg": jpeg(1), "b/i.jpg": jpeg(2)})
    pack({"train": open_dataset(latin)}, tmp_path / "out", Settings())
    assert (tmp_path / "out/classes.txt").read_text() == "b\ncaf\\xe9\n"
    assert open_dataset(tmp_path / "out").classes == open_dataset(latin).classes == ("b", "caf\\xe9")


def test_pack_splits_with_different_class_numbers(tmp_path):
    sources = {
        "train": open_dataset(write_tree(tmp_path / "train", {f"{c}/i.jpg": jpeg(n) for n, c in enumerate("abc")})),
        "val": open_dataset(write_tree(tmp_path / "val", {"c/j.jpg": jpeg(7)})),
    }
    pack(sources, tmp_path / "out", Settings())
    assert held(tmp_path / "out", "val") == {"j": (jpeg(7), "c")}


def test_hold_out_leaves_one_image_of_each_class(tmp_path):
    files = (
        {f"a/{n}.jpg": jpeg(n) for n in range(5)} | {f"b/{n}.jpg": jpeg(9 + n) for n in range(2)} | {"c/1.jpg": jpeg(8)}
    )
    said = run("folder", write_tree(tmp_path / "tree", files), tmp_path / "out", "--hold-out", 3)
    assert "2 of 3 classes have 3 images or fewer" in said
    splits = json.loads((tmp_path / "out/manifest.json").read_text())["splits"]
    assert splits["train"]["images_per_class"] == {"a": 2, "b": 1, "c": 1}
    assert splits["val"]["images_per_class"] == {"a": 3, "b": 1}


def test_pack_lists_bad_images_and_leaves_them_out(tmp_path):
    gif = encoded(Image.fromarray(picture(1)), "GIF")
    root = write_tree(
        tmp_path / "tree",
        {
            "a/good.jpg": jpeg(1),
            "a/cut.jpg": jpeg(2)[:300],
            "a/empty.jpg": b"",
            "a/text.jpg": b"no image",
            "a/moving.jpg": gif,
            "b/really.jpg": encoded(picture(3), "PNG"),
        },
    )
    manifest = pack({"train": open_dataset(root)}, tmp_path / "out", Settings())
    bad = [json.loads(line) for line in (tmp_path / "out/bad.jsonl").read_text().splitlines()]
    assert {each["name"] for each in bad} == {"a/cut.jpg", "a/empty.jpg", "a/moving.jpg", "a/text.jpg"} and manifest[
        "bad"
    ] == 4
    assert {each["why"] for each in bad if each["name"] == "a/text.jpg"} == {"cannot identify image file"}
    assert manifest["splits"]["train"]["images_per_class"] == {"a": 1, "b": 1}
    names = [open_dataset(tmp_path / "out").name(i) for i in range(2)]
    assert any(name.endswith("really.png") for name in names)  # its bytes say what it is


def test_pack_resizes_large_images_only_with_max_side(tmp_path):
    root = write_tree(tmp_path / "tree", {"a/large.jpg": jpeg(1, 80, 60), "a/small.jpg": jpeg(2, 30, 20)})
    pack({"train": open_dataset(root)}, tmp_path / "out", Settings(max_side=40))
    found = {name: Image.open(io.BytesIO(data)) for name, (data, _) in held(tmp_path / "out").items()}
    assert found["large"].size == (30, 40) and held(tmp_path / "out")["small"][0] == jpeg(2, 30, 20)


def test_pack_command_with_bad_input(tmp_path):
    root = tree(tmp_path / "tree")
    source = {"train": open_dataset(root)}
    pack(source, tmp_path / "done", Settings())
    single = write_tree(tmp_path / "single", {"a/i.jpg": jpeg(1), "b/i.jpg": jpeg(2)})
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy/file").write_text("x")
    (tmp_path / "cut.tar.gz").write_bytes(gzip.compress(os.urandom(9000))[:4000])
    for words, message in (
        (("folder", root, tmp_path / "done"), "packed"),
        (("folder", root, tmp_path / "busy"), "empty"),
        (("folder", root), "OUT"),
        (("folder", tmp_path / "nowhere", tmp_path / "x"), "does not exist"),
        (("folder", single, tmp_path / "x", "--hold-out", 1), "--hold-out 1"),
        (("folder", root, root / "a/shards"), "outside"),
        (("imagenet22k", tmp_path / "cut.tar.gz", tmp_path / "x"), "damaged"),
    ):
        with pytest.raises(UserError, match=message):
            run(*words)
    assert not (tmp_path / "x").exists() and not (root / "a/shards").exists()


def test_pack_with_other_settings_does_not_resume(tmp_path):
    source = {"train": open_dataset(tree(tmp_path / "tree"))}
    with pytest.raises(RunError):
        pack({"train": Interrupted(source["train"], 0)}, tmp_path / "out", Settings(shard_size=4))
    with pytest.raises(UserError, match="shard_size"):
        pack(source, tmp_path / "out", Settings(shard_size=5))
    pack(source, tmp_path / "out", Settings(shard_size=4))


def test_expanded_archive_is_kept(tmp_path):
    plain = nested(tmp_path / "plain.tar")
    archive = tmp_path / "whole.tar.gz"
    archive.write_bytes(gzip.compress(plain.read_bytes()))
    for _ in range(2):
        opened = open_archives("imagenet22k", [archive], tmp_path / "spool", None, lambda line: None)
        assert len(opened["train"]) == 15
    (file,) = (tmp_path / "spool").iterdir()
    assert file.read_bytes() == plain.read_bytes()


def test_max_side_with_masks_is_an_error(tmp_path, scenes):
    with pytest.raises(UserError, match="--max-side"):
        pack({"train": open_dataset(scenes, split="train")}, tmp_path / "out", Settings(max_side=24))
    pack({"train": open_dataset(scenes, split="train")}, tmp_path / "out", Settings())
    again, first = open_dataset(tmp_path / "out"), open_dataset(scenes, split="train")
    number = int(again.name(0).rpartition("/")[2][:9])
    assert again.mask(0) == first.mask(number) and again.label(0) == first.label(number)


def test_pack_cuts_long_names_and_keeps_them_unique(tmp_path):
    root = write_tree(tmp_path / "tree", {f"a/{'é' * 60}{n}.jpg": jpeg(n) for n in range(3)})
    pack({"train": open_dataset(root)}, tmp_path / "out", Settings())
    source = open_dataset(tmp_path / "out")
    assert sorted(source.image(i) for i in range(3)) == sorted(jpeg(n) for n in range(3))
