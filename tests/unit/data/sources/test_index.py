import os
import pickle
import threading
import time

import numpy as np
import pytest

from ijepa.data.paths import Folder, find_files
from ijepa.data.sources import index as module
from ijepa.data.sources.index import Index, build, cache_root, load
from ijepa.utils.errors import UserError
from tests.helpers.images import jpeg, write_shards, write_tar, write_tree


@pytest.fixture
def scans(monkeypatch):
    """Paths of the shards that were scanned."""
    seen = []
    scan = module.scan_tar
    monkeypatch.setattr(module, "scan_tar", lambda path: seen.append(path.name) or scan(path))
    return seen


def of(path, **options) -> Index:
    return build(find_files(path, "data.path", **options), "data.path")


def same(one: Index, other: Index) -> bool:
    return one.arrays.keys() == other.arrays.keys() and all(
        np.array_equal(a, other.arrays[name]) and a.dtype == other.arrays[name].dtype for name, a in one.arrays.items()
    )


def test_build_once_then_load(tmp_path, scans):
    write_shards(tmp_path, [3, 2])
    first, second = of(tmp_path), of(tmp_path)
    assert scans == ["train-0000.tar", "train-0001.tar"]
    assert same(first, second) and first.directory == second.directory
    assert not second.arrays["block"].flags["W"]
    assert first.arrays["first"].tolist() == [0, 3, 5]
    assert first.arrays["label"].tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("change", ["content", "time", "new", "gone", "classes"])
def test_build_again_after_a_file_changes(tmp_path, change):
    write_shards(tmp_path, [3, 2])
    before = of(tmp_path).header
    second = tmp_path / "train-0001.tar"
    if change == "content":
        stat = second.stat()
        write_tar(second, [(f"x{i}.jpg", jpeg(i)) for i in range(9)])
        os.utime(second, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "time":
        os.utime(second, ns=(0, 12345))
    elif change == "new":
        write_tar(tmp_path / "train-0002.tar", [("y.jpg", jpeg(0))])
    elif change == "gone":
        second.unlink()
    else:
        (tmp_path / "classes.txt").write_text("cat\ndog\nowl\n")
    after = of(tmp_path)
    assert after.header["stamp"] != before["stamp"]
    assert (after.header["fingerprint"] == before["fingerprint"]) == (change == "time")
    assert len(after.arrays["block"]) == {"content": 12, "new": 6, "gone": 3}.get(change, 5)


def test_build_notices_changes_in_folders(tmp_path):
    write_tree(tmp_path, {"a/1.jpg": b"1", "a/2.jpg": b"2", "b/3.jpg": b"3"})
    before = of(tmp_path)
    (tmp_path / "a/2.jpg").write_bytes(b"22")
    after = of(tmp_path)
    assert before.header["fingerprint"] != after.header["fingerprint"]
    assert same(before, after)
    (tmp_path / "a/notes.txt").write_text("not an image")
    assert of(tmp_path).header["fingerprint"] == after.header["fingerprint"]


def test_build_without_a_cache(tmp_path, monkeypatch):
    write_shards(tmp_path / "data", [2])
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IJEPA_CACHE", str(tmp_path / "file"))  # no folder can be created below a file
    index = of(tmp_path / "data")
    assert index.directory is None
    assert same(pickle.loads(pickle.dumps(index)), index)


def test_build_on_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    write_shards(tmp_path, [2])

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.np, "save", full)
    assert of(tmp_path).directory is None
    assert not [path for path in cache_root().rglob("*") if path.is_file()]


def test_index_is_pickled_as_its_directory(tmp_path):
    write_shards(tmp_path, [40, 60])
    index = of(tmp_path)
    data = pickle.dumps(index)
    assert len(data) < 400
    assert same(pickle.loads(data), index)


def test_build_replaces_an_incomplete_copy(tmp_path, scans):
    write_shards(tmp_path, [3])
    index = of(tmp_path)
    (index.directory / "block.npy").unlink()  # not truncated in place, because this process has it mapped
    (index.directory / "block.npy").write_bytes(b"")
    again = of(tmp_path)
    assert again.arrays["block"].tolist() == index.arrays["block"].tolist()
    (index.directory / "index.json").unlink()
    of(tmp_path)
    assert len(scans) == 3
    assert load(index.directory).arrays.keys() == index.arrays.keys()


def test_build_in_parallel_scans_once(tmp_path, scans):
    write_shards(tmp_path, [3, 3])
    files, found = find_files(tmp_path, ""), []
    threads = [threading.Thread(target=lambda: found.append(build(files, ""))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(same(found[0], other) for other in found)
    assert scans == ["train-0000.tar", "train-0001.tar"]
    (family,) = cache_root().iterdir()
    assert [path.name for path in family.iterdir()] == [found[0].header["stamp"]]


def test_build_removes_indexes_unused_for_a_month(tmp_path):
    write_shards(tmp_path, [1])
    old = of(tmp_path).directory
    os.utime(tmp_path / "train-0000.tar", ns=(1, 1))
    recent = of(tmp_path).directory
    long_ago = time.time() - 40 * 86400
    os.utime(old, (long_ago, long_ago))
    os.utime(tmp_path / "train-0000.tar", ns=(2, 2))
    new = of(tmp_path).directory
    assert not old.exists() and recent.exists() and new.exists()
    os.utime(recent, (long_ago, long_ago))
    os.utime(tmp_path / "train-0000.tar", ns=(1, 1))
    assert (
        of(tmp_path).directory == recent and time.time() - recent.stat().st_mtime < 3600
    )  # opening an index counts as use


def test_index_takes_12_bytes_per_sample(tmp_path):
    """So 14 million samples with labels take 170 MB."""
    write_shards(tmp_path, [100])
    index = of(tmp_path)
    assert sum(array.nbytes for name, array in index.arrays.items() if name != "first") == 12 * 100


def test_index_text(tmp_path):
    files = {"ä/ö.jpg": b"1", "ä/.hidden.jpg": b"", "b/long name here.JPEG": b"2", "b/x.png": b"3"}
    index = of(write_tree(tmp_path, files))
    names = [index.text("names", i) for i in range(3)]
    assert names == ["b/long name here.JPEG", "b/x.png", "ä/ö.jpg"]


def refusal(path) -> str:
    with pytest.raises(UserError) as error:
        of(path)
    assert "\n" not in str(error.value) and str(error.value).startswith("data.path: ")
    return str(error.value)


def test_build_refuses_a_truncated_tar(tmp_path):
    write_shards(tmp_path, [3, 3])
    path = tmp_path / "train-0001.tar"
    path.write_bytes(path.read_bytes()[:2000])
    line = refusal(tmp_path)
    assert str(path) in line and "cut short" in line and "byte 2000" in line and "copy" in line
    assert not cache_root().exists()


def test_build_refuses_data_without_images(tmp_path):
    text = write_tree(tmp_path / "text", {"a.txt": b"a", "b.txt": b"b", "c.csv": b"c"})
    assert "text contains no images (found 2 .txt, 1 .csv); images are .jpg" in refusal(text)
    assert "(found 1 without a suffix)" in refusal(write_tree(tmp_path / "bare", {"README": b"a"}))
    (tmp_path / "nested/empty").mkdir(parents=True)
    assert "nested contains no images;" in refusal(tmp_path / "nested")
    write_tar(tmp_path / "a.tar", [("a.txt", b"a")])
    assert "a.tar contains no images (found .txt)" in refusal(tmp_path / "a.tar")
    write_tar(tmp_path / "b.tar", [("n01.tar", b"a")])
    assert "ijepa data pack" in refusal(tmp_path / "b.tar")


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_build_refuses_unreadable_folders(tmp_path):
    write_tree(tmp_path, {"a/1.jpg": b"1"})
    (tmp_path / "a").chmod(0)
    assert "cannot be read" in refusal(tmp_path)


def test_build_broken_and_circular_links(tmp_path):
    write_tree(tmp_path, {"a/1.jpg": b"1"})
    (tmp_path / "a/circle").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")  # the same images in two classes are not a circle
    assert of(tmp_path).texts("names") == ["a/1.jpg", "b/1.jpg"]
    (tmp_path / "a/2.jpg").symlink_to(tmp_path / "nowhere")
    assert "2.jpg cannot be read: No such file" in refusal(tmp_path)


def test_build_masks_do_not_change_the_images(tmp_path):
    write_tree(tmp_path, {"images/x/1.jpg": b"1", "images/2.png": b"2", "masks/x/1.png": b"m", "masks/2.txt": b""})
    index = build(Folder(tmp_path / "images", tmp_path / "masks"), "")
    assert index.texts("names") == ["2.png", "x/1.jpg"]
    assert index.texts("mask_names") == ["", "x/1.png"]


def test_build_with_several_processes(tmp_path, monkeypatch):
    from benchmarks.index import write_shards as write_many

    from ijepa.data.open import open_dataset

    write_many(tmp_path / "shards", 200, shard=3)
    found = {}
    for many in (1000, 8):
        monkeypatch.setattr(module, "_PARALLEL_SHARDS", many)
        monkeypatch.setenv("IJEPA_CACHE", str(tmp_path / f"cache-{many}"))
        found[many] = open_dataset(tmp_path / "shards")
    one, several = found.values()
    assert len(one) == 200 and one.fingerprint == several.fingerprint
    assert [one.name(i) for i in range(200)] == [several.name(i) for i in range(200)]
    assert (one.labels == several.labels).all() and one.labels[:5].tolist() == [0, 1, 2, 3, 4]
    (tmp_path / "shards" / "train-00040.tar").write_bytes(b"x" * 700)
    monkeypatch.setenv("IJEPA_CACHE", str(tmp_path / "cache-broken"))
    with pytest.raises(UserError, match="train-00040.tar"):
        open_dataset(tmp_path / "shards")
