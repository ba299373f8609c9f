import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa.data.sources.tar_index import BLOCK, TarError, header_name, scan_tar
from tests.helpers.images import write_tar
from tests.reference.tars import samples

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def read(path: Path) -> list[dict[str, bytes]]:
    """The samples that a scan finds, read from the places that it returns, in the form of the reference."""
    shard, data, found = scan_tar(path), path.read_bytes(), []
    for i in range(len(shard.block)):
        start = int(shard.block[i]) * BLOCK
        own = header_name(data[start - BLOCK : start])
        sample = {"jpg": data[start : start + int(shard.size[i])], "name": shard.renamed.get(i, own)}
        if shard.label[i] >= 0:
            sample["cls"] = b"%d" % shard.label[i]
        if shard.mask_size[i]:
            start = int(shard.mask_block[i]) * BLOCK
            sample["mask.png"] = data[start : start + int(shard.mask_size[i])]
        found.append(sample)
    return found


_NAMES = st.text(alphabet="abyz019_- äß", min_size=1, max_size=12).map(lambda s: "k" + s)
_LONG = st.sampled_from(["", "d/", "sub/" * 20, "x" * 90 + "/", "y" * 120 + "/", "deep/" * 60])


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=40, deadline=None)
@given(
    keys=st.lists(st.tuples(_LONG, _NAMES), min_size=1, max_size=6, unique=True),
    fields=st.lists(st.sampled_from(["cls", "mask.png", "txt", "JPG"]), max_size=3, unique=True),
    seed=st.integers(0, 99),
    mixed=st.booleans(),
)
def test_scan_tar_agrees_with_tarfile(tmp_path_factory, format, keys, fields, seed, mixed):
    rng = np.random.default_rng(seed)
    members = []
    for folder, stem in keys:
        if format == "ustar":
            folder = "" if len(folder) > 90 else folder
        image = "jpg" if "JPG" not in fields else "JPG"
        members.append((f"{folder}{stem}.{image}", rng.bytes(int(rng.integers(1, 3000)))))
        for field in fields:
            if field != "JPG":
                data = b"%d\n" % rng.integers(1000) if field == "cls" else rng.bytes(int(rng.integers(1, 900)))
                members.append((f"{folder}{stem}.{field}", data))
    members = list({name: (name, data) for name, data in members}.values())
    if mixed:
        members = [members[i] for i in rng.permutation(len(members))]
    path = write_tar(tmp_path_factory.mktemp("tar") / "a.tar", members, format=FORMATS[format])
    expected = [{k: v.strip() if k == "cls" else v for k, v in s.items() if k != "txt"} for s in samples(path)]
    assert read(path) == expected


def label(sample: dict[str, bytes]) -> int:
    """The label of a sample of the reference."""
    described = json.loads(sample.get("json", b"{}")).get("label", -1)
    return int(sample["cls"]) if "cls" in sample else described


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=150, deadline=None)
@given(
    members=st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "d/a", "a_" + "x" * 120]),
            st.sampled_from(["jpg", "png", "cls", "json", "mask.png", "txt", "CLS"]),
        ),
        max_size=14,
    )
)
def test_scan_tar_repeated_keys_agree_with_tarfile(tmp_path_factory, format, members):
    """Keys and fields in any order and number, as in concatenated shards."""
    contents = []
    for number, (key, field) in enumerate(members):
        data = b'{"label": %d}' if field == "json" else b"%d"
        key = key[:80] if format == "ustar" else key
        contents.append((f"{key}.{field}", data % number))
    path = write_tar(tmp_path_factory.mktemp("tar") / "a.tar", contents, format=FORMATS[format])
    expected = samples(path)
    assert scan_tar(path).label.tolist() == [label(sample) for sample in expected]
    places = ("jpg", "name", "mask.png")
    assert [{k: s[k] for k in places if k in s} for s in read(path)] == [
        {k: s[k] for k in places if k in s} for s in expected
    ]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("field", "form"), [("cls", b"%d"), ("json", b'{"label": %d}')])
@pytest.mark.parametrize("image_first", [False, True])
def test_scan_tar_concatenated_shards(tmp_path, format, field, form, image_first):
    key = "k" * (80 if format == "ustar" else 120)  # too long for a header, so it is in an extra one
    members = []
    for number in range(3):
        two = [(f"{key}.{field}", form % number), (f"{key}.jpg", b"image %d" % number)]
        members += reversed(two) if image_first else two
    path = write_tar(tmp_path / "a.tar", members, format=FORMATS[format])
    found = [(s["jpg"], s["cls"], s["name"].decode()) for s in read(path)]
    assert found == [(b"image %d" % n, b"%d" % n, f"{key}.jpg") for n in range(3)]


def test_scan_tar_separate_labels(tmp_path):
    members = [("a.jpg", b"1"), ("b.jpg", b"2"), ("b.jpg", b"3"), ("a.cls", b"4"), ("b.cls", b"5")]
    assert scan_tar(write_tar(tmp_path / "a.tar", members)).label.tolist() == [4, -1, -1]
    members = [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"4"), ("b.cls", b"5"), ("a.cls", b"6")]
    assert scan_tar(write_tar(tmp_path / "b.tar", members)).label.tolist() == [4, 5]


def test_scan_tar_skips_links_and_folders(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for kind, name in [(tarfile.DIRTYPE, "d"), (tarfile.SYMTYPE, "d/l.jpg"), (tarfile.LNKTYPE, "d/h.jpg")]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "d/a.jpg"
            tar.addfile(info)
        info = tarfile.TarInfo("d/a.jpg")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"hello"))
    assert read(path) == [{"jpg": b"hello", "name": b"d/a.jpg"}]


def test_scan_tar_skips_hidden_files(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("d/._a.jpg", b"junk"), ("d/a.jpg", b"image")])
    assert [s["jpg"] for s in read(path)] == [b"image"]


def test_scan_tar_labels(tmp_path):
    members = []
    for key, field, text in [
        ("a", "cls", b"7"),
        ("b", "cls", b" 12\n"),
        ("c", "json", b'{"label": 3}'),
        ("d", "json", b'{"cls": 4, "other": 1}'),
        ("e", "cls", b"cat"),
        ("f", "json", b'{"label": "cat"}'),
        ("g", "json", b"{broken"),
        ("h", "json", b"[1]"),
        ("i", "json", b'{"label": true}'),
        ("j", "cls", b""),
    ]:
        members += [(f"{key}.jpg", b"image"), (f"{key}.{field}", text)]
    members += [("k.jpg", b"image"), ("k.cls", b"5"), ("k.json", b'{"label": 6}')]
    path = write_tar(tmp_path / "a.tar", members)
    assert scan_tar(path).label.tolist() == [7, 12, 3, 4, -1, -1, -1, -1, -1, -1, 5]


def test_scan_tar_repeated_key_is_a_new_sample(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.cls", b"1"), ("a.jpg", b"2"), ("a.cls", b"2")])
    assert [(s["jpg"], s["cls"]) for s in read(path)] == [(b"1", b"1"), (b"2", b"2")]


def test_scan_tar_reports_other_fields(tmp_path):
    assert scan_tar(write_tar(tmp_path / "a.tar", [("n01.tar", b"x"), ("r.txt", b"y")])).other_fields == ("tar", "txt")


def test_scan_tar_refuses_truncated_files(tmp_path):
    members = [(f"s{i}.{field}", b"1" * size) for i in range(3) for field, size in (("jpg", 700 * i), ("cls", 1))]
    whole = write_tar(tmp_path / "a.tar", members, format=tarfile.PAX_FORMAT).read_bytes()
    end = len(whole.rstrip(b"\0"))
    end = -(-end // BLOCK) * BLOCK  # with the padding of the last member; then comes the end mark
    cut = tmp_path / "cut.tar"
    for length in {*range(1, end, 97), *range(BLOCK, end + 1, BLOCK), end + 1, end + BLOCK - 1}:
        cut.write_bytes(whole[:length])
        with pytest.raises(TarError) as error:
            scan_tar(cut)
        if length >= BLOCK:
            assert "is cut short" in str(error.value) and f"ends at byte {length}" in str(error.value)
            assert "byte " in str(error.value) and "truncate" in error.value.hint
    cut.write_bytes(whole[: end + BLOCK])
    assert len(scan_tar(cut).block) == 3


def test_scan_tar_reports_the_place_of_damage(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", bytes(1000)), ("b.jpg", bytes(10))])
    data = bytearray(path.read_bytes())
    data[3 * BLOCK : 3 * BLOCK + 400] = b"\x5a" * 400
    path.write_bytes(data)
    with pytest.raises(TarError, match=f"byte {3 * BLOCK}"):
        scan_tar(path)


@pytest.mark.parametrize(
    ("start", "word"),
    [
        (b"\x1f\x8b\x08", "compressed"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"hello", "not a tar"),
        (b"\xff\xd8\xff", "not a"),
    ],
)
def test_scan_tar_refuses_other_files(tmp_path, start, word):
    (tmp_path / "a.tar").write_bytes(start + bytes(2000))
    with pytest.raises(TarError, match=word):
        scan_tar(tmp_path / "a.tar")


def test_scan_tar_old_headers_without_magic(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"image")])
    data = bytearray(path.read_bytes())
    data[257:265] = bytes(8)
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:BLOCK])
    path.write_bytes(data)
    assert [s["jpg"] for s in read(path)] == [b"image"]
    data[148] ^= 1
    path.write_bytes(data)
    with pytest.raises(TarError, match="not a tar"):
        scan_tar(path)


def test_scan_tar_binary_sizes(tmp_path):
    """GNU binary sizes: a sparse file of nine gigabytes between two samples."""
    size, path = 9 * 2**30, tmp_path / "a.tar"
    with path.open("wb") as file:
        for name, data_size in (("a.jpg", 3), ("big.bin", size), ("b.jpg", 4)):
            info = tarfile.TarInfo(name)
            info.size = data_size
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            place = file.tell()
            file.write(name[:4].encode()) if data_size < 10 else None
            file.seek(place + -(-data_size // BLOCK) * BLOCK)
        file.write(bytes(2 * BLOCK))
    shard = scan_tar(path)
    assert shard.size.tolist() == [3, 4]
    assert shard.block.tolist() == [1, 1 + 1 + 1 + size // BLOCK + 1]


@pytest.mark.parametrize("size", [b"abc", b"", b"-3072", b"1_0", b"9" * 5000])
def test_scan_tar_refuses_invalid_pax_sizes(tmp_path, size):
    """A negative size must not move the walk backwards."""
    info = tarfile.TarInfo("b.jpg")
    info.pax_headers = {"size": size.decode()}
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"image")])
    first, end = path.read_bytes()[: 2 * BLOCK], bytes(2 * BLOCK)
    path.write_bytes(first + info.tobuf(tarfile.PAX_FORMAT) + end)
    with pytest.raises(TarError, match=f"damaged.*byte {2 * BLOCK}"):
        scan_tar(path)


def test_scan_tar_ignores_invalid_pax_records(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"image")], format=tarfile.USTAR_FORMAT)
    info = tarfile.TarInfo("pax")
    data = b"9" * 5000 + b" size=1\n"
    info.size, info.type = len(data), tarfile.XHDTYPE
    header = info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)
    path.write_bytes(header + path.read_bytes())
    assert [s["jpg"] for s in read(path)] == [b"image"]
