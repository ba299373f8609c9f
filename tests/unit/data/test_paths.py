import pytest

from ijepa.data.paths import Folder, Shards, expand_braces, find_files
from ijepa.utils.errors import UserError
from tests.helpers.images import jpeg, write_shards, write_tree


def names(found: object) -> list[str]:
    assert isinstance(found, Shards)
    return [path.name for path in found.paths]


def refusal(path: object, **options: str) -> str:
    with pytest.raises(UserError) as error:
        find_files(path, "data.path", **options)
    line = str(error.value)
    assert line.startswith("data.path: ") and "\n" not in line
    return line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", ["a"]),
        ("a{0..2}", ["a0", "a1", "a2"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{10..08}", ["10", "09", "08"]),
        ("{0..10..5}", ["0..10..5"]),
        ("{10..9}", ["10", "9"]),
        ("{10..0}", [str(i) for i in range(10, -1, -1)]),
        ("{8..010}", ["008", "009", "010"]),
        ("{3..3}", ["3"]),
        ("x{a,bc}y", ["xay", "xbcy"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
    ],
)
def test_expand_braces(text, expected):
    assert expand_braces(text) == expected


def test_find_files_shards_by_folder_pattern_glob_and_file(tmp_path, monkeypatch):
    write_shards(tmp_path, [1, 1, 1])
    every = ["train-0000.tar", "train-0001.tar", "train-0002.tar"]
    assert names(find_files(tmp_path, "")) == every
    assert names(find_files(f"{tmp_path}/train-{{0000..0001}}.tar", "")) == every[:2]
    assert names(find_files(f"{tmp_path}/train-{{0002..0000}}.tar", "")) == every[::-1]
    assert names(find_files(f"{tmp_path}/*-000[12].tar", "")) == every[1:]
    assert names(find_files(tmp_path / "train-0001.tar", "")) == every[1:2]
    monkeypatch.chdir(tmp_path)
    assert find_files("train-{0000..0001}.tar", "") == find_files(f"{tmp_path}/train-{{0000..0001}}.tar", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names(find_files("~", "")) == every


def test_find_files_refuses_missing_files(tmp_path):
    write_shards(tmp_path, [1])
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("hello")
    assert "no path given" in refusal("")
    assert "nowhere does not exist; give" in refusal(tmp_path / "nowhere")
    assert "train-0001.tar does not exist; 2 of 3 files" in refusal(f"{tmp_path}/train-{{0000..0002}}.tar")
    assert "train-9.tar does not exist; 10 of 10 files" in refusal(f"{tmp_path}/train-{{9..0}}.tar")
    assert "matches nothing" in refusal(f"{tmp_path}/*.tgz")
    assert "is empty" in refusal(tmp_path / "empty")
    assert "a.txt is not a tar" in refusal(tmp_path / "a.txt")
    assert "a.txt is not a tar" in refusal(f"{tmp_path}/*.t*")


def test_find_files_splits_of_shards(tmp_path):
    write_shards(tmp_path, [1, 1], prefix="train")
    assert len(names(find_files(tmp_path, ""))) == 2  # one split needs no choice
    write_shards(tmp_path, [1], prefix="val")
    line = refusal(tmp_path)
    assert "train, val" in line and f"give one of them, for example {tmp_path}/train-*.tar" in line
    assert names(find_files(tmp_path, "", "val")) == ["val-0000.tar"]
    assert names(find_files(tmp_path, "", "validation")) == ["val-0000.tar"]
    assert names(find_files(f"{tmp_path}/train-*.tar", "", "val")) == [
        "train-0000.tar",
        "train-0001.tar",
    ]  # as it was typed
    assert "has no split test, only train, val" in refusal(tmp_path, split="test")


def test_find_files_names_without_a_split(tmp_path):
    write_shards(tmp_path, [1], prefix="valley")
    write_shards(tmp_path, [1], prefix="trainee")
    assert len(names(find_files(tmp_path, ""))) == 2
    assert len(names(find_files(tmp_path, "", "train"))) == 2


def test_find_files_splits_of_folders(tmp_path):
    write_tree(tmp_path, {"train2017/c/a.jpg": b"", "val2017/c/a.jpg": b"", "notes/x.txt": b""})
    assert "several splits: train, val" in refusal(tmp_path)
    assert find_files(tmp_path, "", "train") == Folder(tmp_path / "train2017")
    assert find_files(tmp_path, "", "val") == Folder(tmp_path / "val2017")
    write_tree(tmp_path, {"train2014/c/a.jpg": b""})
    assert "train2014, train2017; give one" in refusal(tmp_path, split="train")


def test_find_files_splits_of_images_and_masks(tmp_path):
    write_tree(tmp_path, {f"{s}/{kind}/a.png": b"" for s in ("train", "val") for kind in ("images", "masks")})
    assert find_files(tmp_path, "", "val") == Folder(tmp_path / "val/images", tmp_path / "val/masks")


def test_find_files_class_called_train(tmp_path):
    write_tree(tmp_path, {"train/a.jpg": b"", "bus/a.jpg": b"", "valley/a.jpg": b""})
    assert find_files(tmp_path, "") == Folder(tmp_path) == find_files(tmp_path, "", "train")
    only = write_tree(tmp_path / "only", {"train/c/a.jpg": b""})
    assert find_files(only, "") == Folder(only / "train")


def test_find_files_refuses_tars_next_to_split_folders(tmp_path):
    write_shards(tmp_path, [1])
    write_tree(tmp_path, {"train/c/a.jpg": jpeg(0), "val/c/a.jpg": jpeg(1)})
    assert "both tar files and the folders train, val" in refusal(tmp_path)


def test_find_files_links_and_hidden_entries(tmp_path):
    write_tree(tmp_path / "real", {"a.jpg": b"", ".train/b.jpg": b"", ".val/b.jpg": b""})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert find_files(tmp_path / "link", "") == Folder(tmp_path / "link")
