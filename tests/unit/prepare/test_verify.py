import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ijepa.cli import cli
from ijepa.data.open import open_dataset
from ijepa.prepare.scenes.scenes import write_scenes
from ijepa.prepare.verify import changed_shards, check
from ijepa.utils.errors import RunError, UserError
from tests.helpers.images import write_tar, write_tree


def _encoded(shape: tuple[int, int], form: str, mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((*shape, 3), 90, np.uint8)).convert(mode).save(out, form)
    return out.getvalue()


def _huge_png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    folder = tmp_path / "odd"
    folder.mkdir()
    jpeg = _encoded((70, 300), "JPEG")
    files = {
        "a.jpg": jpeg,
        "b.jpg": jpeg,
        "c.jpg": _encoded((300, 200), "PNG"),
        "d.jpg": _encoded((40, 40), "JPEG", "CMYK"),
        "e.jpg": b"",
        "f.jpg": jpeg[: len(jpeg) // 2],
        "g.png": _huge_png(),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_check_lists_bad_images_and_counts_good_ones(odd: Path) -> None:
    found = check(open_dataset(odd))
    assert found.images == 7
    assert [name for name, _ in found.bad] == ["e.jpg", "f.jpg", "g.png"]
    assert "more than 120 megapixels" in dict(found.bad)["g.png"]
    assert found.sides[:4] == [1, 2, 1, 0] and sum(found.sides) == 4
    assert found.bytes == sum(path.stat().st_size for path in odd.iterdir())
    assert not found.duplicates


def test_check_finds_duplicates_by_content(odd: Path) -> None:
    assert check(open_dataset(odd), duplicates=True).duplicates == [("b.jpg", "a.jpg")]


def test_check_does_not_depend_on_processes(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ijepa.prepare.verify._RUN", 8)  # several runs, so that the second process has work
    source = open_dataset(scenes, split="train")
    assert check(source, processes=1, duplicates=True) == check(source, processes=2, duplicates=True)
    with pytest.raises(UserError):
        check(source, processes=0)


def test_check_mask_of_different_size_is_bad(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(_encoded((32, 32), "JPEG"))
    (tmp_path / "a.mask.png").write_bytes(_encoded((16, 32), "PNG", "L"))
    assert check(open_dataset(tmp_path)).bad == [("a.jpg", "its mask is 32 x 16, but the image is 32 x 32")]


def test_data_check_command_fails_with_a_bad_image(odd: Path, scenes: Path) -> None:
    result = CliRunner().invoke(cli, ["data", "check", str(odd)])
    assert isinstance(result.exception, RunError) and not isinstance(result.exception, UserError)
    assert "7 images" in result.output and "bad: e.jpg: " in result.output
    result = CliRunner().invoke(cli, ["data", "check", str(scenes), "--split", "val"])
    assert result.exit_code == 0 and "20 good, 0 bad" in result.output


def test_changed_shards_compares_with_the_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "scenes"
    write_scenes(folder, images=24, seed=1, size=48, val_share=0.25, shard_size=6)
    result = CliRunner().invoke(cli, ["data", "check", str(folder), "--checksums", "--processes", "2"])
    assert result.exit_code == 0 and "4 shards: 4 match the manifest, 0 do not" in result.output
    data = bytearray((folder / "train-0001.tar").read_bytes())
    data[700] ^= 1
    (folder / "train-0001.tar").write_bytes(data)
    (folder / "train-0002.tar").unlink()
    result = CliRunner().invoke(cli, ["data", "check", str(folder), "--checksums"])
    assert isinstance(result.exception, RunError) and "2 of 4 shards" in str(result.exception)
    assert "train-0001.tar: " in result.output and "train-0002.tar: No such file" in result.output
    assert changed_shards(folder, "val") == (1, [])
    for place, split, message in (
        (tmp_path, None, "manifest.json"),
        (folder, "test", "test"),
    ):
        with pytest.raises(UserError, match=message):
            changed_shards(place, split)


@pytest.mark.parametrize("packed", [False, True])
def test_data_check_lists_a_name_that_is_not_utf8(tmp_path: Path, packed: bool) -> None:
    files = {"a.jpg": _encoded((32, 32), "JPEG"), os.fsdecode(b"caf\xe9.jpg"): b""}
    write_tree(tmp_path, files) if not packed else write_tar(tmp_path / "s.tar", files.items())
    done = CliRunner().invoke(cli, ["data", "check", str(tmp_path), "--duplicates"])
    assert isinstance(done.exception, RunError), done.exception
    shown = "s.tar/caf\\xe9.jpg" if packed else "caf\\xe9.jpg"
    assert f"bad: {shown}: " in done.output
