import pytest

from ijepa.prepare.file_lists import list_index
from ijepa.utils.errors import UserError
from tests.helpers.images import jpeg
from tests.unit.prepare.test_pack import tree


def test_list_index_finds_columns_by_name(tmp_path):
    tree(tmp_path / "tree")
    for text, classes in (
        ("\ufefffilename,class\ntree/a/i0.jpg,x\ntree/b/i1.jpg,w\n", ["w", "x"]),
        ("label,size,path\nx,1,tree/a/i0.jpg\nw,2,tree/b/i1.jpg\n", ["w", "x"]),
        ("path\ntree/a/i0.jpg\ntree/b/i1.jpg\n", None),
    ):
        (tmp_path / "list.csv").write_text(text, encoding="utf-8")
        index = list_index(tmp_path / "list.csv")
        assert index.header["classes"] == classes and len(index.arrays["ends"]) == 2
        assert classes is None or index.arrays["label"].tolist() == [1, 0]
    for text, message in (
        ('path,label\n"' + "x" * 200_000 + '",1\n', "line 2"),
        ("path,label\n" + "x" * 5000 + ",1\n", "line 2"),
        ("path,label\ntree/a/i0.jpg,\n", "line 2 .*label"),
        ("path\na,b\n", "columns"),
    ):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            list_index(tmp_path / "bad.csv")


def test_list_index_of_parquet_equals_that_of_csv(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    tree(tmp_path / "tree")
    paths = ["tree/a/i0.jpg", "tree/b/i1.jpg", "tree/c/i2.jpg"]
    (tmp_path / "list.csv").write_text(
        "path,label\n" + "".join(f"{p},{n}\n" for p, n in zip(paths, (10, 9, 10), strict=True))
    )
    for columns in ({"path": paths, "label": [10, 9, 10]}, {"Label": ["10", "9", "10"], "n": [1, 2, 3], "File": paths}):
        pq.write_table(pa.table(columns), tmp_path / "list.parquet")
        index, same = list_index(tmp_path / "list.parquet"), list_index(tmp_path / "list.csv")
        assert index.header == same.header
        assert {k: v.tolist() for k, v in index.arrays.items()} == {k: v.tolist() for k, v in same.arrays.items()}
    for columns, message in (
        ({"image": [jpeg(1)]}, "ijepa data pack folder"),
        ({"path": paths, "label": [1, None, 2]}, "row 2 .*label"),
        ({"path": ["a", None]}, "row 1"),
        ({"a": [1]}, "path"),
    ):
        pq.write_table(pa.table(columns), tmp_path / "bad.parquet")
        with pytest.raises(UserError, match=message):
            list_index(tmp_path / "bad.parquet")


def test_list_index_of_damaged_parquet(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"path": [f"{number:04d}.jpg" for number in range(4000)]}
    file = tmp_path / "list.parquet"
    pq.write_table(pa.table(columns), file, use_dictionary=False, compression="snappy")
    data = bytearray(file.read_bytes())
    data[40:400] = b"\xff" * 360
    file.write_bytes(data)
    with pytest.raises(UserError, match="list.parquet") as refused:
        list_index(file)
    assert "\n" not in str(refused.value)
