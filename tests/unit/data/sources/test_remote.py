"""Shards from an HTTP server and from an S3 server."""

import os
import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ijepa.data.open import open_dataset
from ijepa.data.overlap import refuse_overlap
from ijepa.data.sources import remote
from ijepa.utils.errors import RunError, UserError
from tests.helpers.images import jpeg, write_shards, write_tar

pytest.importorskip("aiohttp")


class Quiet(SimpleHTTPRequestHandler):
    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *words):
        pass


@pytest.fixture
def server(tmp_path):
    write_shards(tmp_path / "far", [5, 4, 3])
    (tmp_path / "far/classes.txt").write_text("a\nb\nc\n")
    handler = type("Handler", (Quiet,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path / "far"))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}", handler.asked, tmp_path / "far"
        running.shutdown()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IJEPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    return tmp_path / "cache/shards"


def test_download_once(server, cache):
    url, asked, far = server
    path = url + "/train-{0000..0002}.tar"
    source, near = open_dataset(path), open_dataset(far, split="train")
    assert len(source) == 12 and source.classes == ("a", "b", "c")
    assert [source.image(i) for i in range(12)] == [near.image(i) for i in range(12)]
    tars = [name for name in asked if name.endswith(".tar")]
    asked.clear()
    assert len(open_dataset(path)) == 12
    assert sorted(set(tars)) == ["/train-0000.tar", "/train-0001.tar", "/train-0002.tar"]
    assert not [name for name in asked if name.endswith(".tar")]  # no second download


def test_download_again_after_a_change(server, cache):
    url, _, far = server
    open_dataset(url + "/train-{0000..0002}.tar")
    write_shards(far, [5, 4, 6])
    assert len(open_dataset(url + "/train-{0000..0002}.tar")) == 15


def test_download_again_after_a_change_of_equal_size(server, cache):
    url, _, far = server
    before = open_dataset(url + "/train-0002.tar").image(0)
    tar = far / "train-0002.tar"
    data, stat = tar.read_bytes(), tar.stat()
    tar.write_bytes(data.replace(before, before[::-1]))
    (far / "classes.txt").write_text("x\ny\nz\n")
    for name in ("train-0002.tar", "classes.txt"):
        os.utime(far / name, (stat.st_atime, stat.st_mtime + 10))  # servers report whole seconds
    source = open_dataset(url + "/train-0002.tar")
    assert source.image(0) == before[::-1] and source.classes == ("x", "y", "z")
    (far / "classes.txt").unlink()
    assert open_dataset(url + "/train-0002.tar").classes is None


def test_download_fails_if_the_server_cannot_describe_the_classes(server, cache, monkeypatch):
    url, _, _ = server
    assert open_dataset(url + "/train-0000.tar").classes == ("a", "b", "c")
    head = Quiet.do_HEAD

    def busy(self):
        self.send_error(503) if self.path.endswith(".txt") else head(self)

    monkeypatch.setattr(Quiet, "do_HEAD", busy)
    monkeypatch.setattr(Quiet, "do_GET", busy)
    with pytest.raises(UserError, match="503"):
        open_dataset(url + "/train-0000.tar")
    monkeypatch.undo()
    assert list(cache.rglob("classes.txt"))


def test_find_remote_splits_of_a_folder(server, cache):
    url, _, far = server
    write_shards(far, [2, 2], prefix="val")
    assert len(open_dataset(url + "/", split="train")) == 12 and len(open_dataset(url + "/", split="val")) == 4
    with pytest.raises(UserError, match="several splits"):
        open_dataset(url + "/")


def test_download_shards_of_one_name_in_several_folders(server, cache, monkeypatch):
    url, asked, far = server
    for number, name in enumerate(("a", "b")):
        write_tar(far / f"{name}.tar", [(f"{name}{n}.jpg", jpeg(10 * number + n)) for n in range(3)])
        (far / name).mkdir()
        (far / f"{name}.tar").rename(far / name / "train-0.tar")
    (far / "a/classes.txt").write_text("x\ny\n")
    wanted = [jpeg(n) for n in (0, 1, 2, 10, 11, 12)]
    for path in (url + "/{a,b}/train-0.tar", url + "/*/train-0.tar"):
        source = pickle.loads(pickle.dumps(open_dataset(path)))
        assert [source.image(i) for i in range(len(source))] == wanted and source.classes == ("x", "y")
    assert [open_dataset(f"{url}/b/train-0.tar").image(i) for i in range(3)] == wanted[3:]
    assert len([name for name in asked if name.endswith(".tar")]) == 2  # each is downloaded once, for all three
    with pytest.raises(UserError, match="3 of its 3"):
        refuse_overlap(open_dataset(url + "/{a,b}/train-0.tar"), open_dataset(url + "/b/train-0.tar"))


def test_download_once_if_named_twice(server, cache):
    url, asked, _ = server
    assert len(open_dataset(url + "/{train-0000,train-0000}.tar")) == 10
    assert asked.count("/train-0000.tar") == 1


def test_find_remote_descending_range(server, cache):
    url, _, _ = server
    assert open_dataset(url + "/train-{0001..0000}.tar").name(0).startswith("train-0001.tar/")


def test_find_remote_describes_shards_in_parallel(server, cache, monkeypatch):
    url, _, _ = server
    system = remote._file_system(url, "")
    together = threading.Barrier(3, timeout=10)
    info = type(system).info
    monkeypatch.setattr(
        type(system), "info", lambda self, url: (url.endswith(".tar") and together.wait(), info(self, url))[1]
    )
    assert len(open_dataset(url + "/train-{0000..0002}.tar")) == 12  # sequential requests would break the barrier


def test_find_remote_and_download_refuse_in_one_line(server, cache, monkeypatch):
    url, _, _ = server
    with pytest.raises(UserError, match=r"train-0003\.tar") as err:
        open_dataset(url + "/train-{0000..0003}.tar")
    assert err.value.where == "data.path"
    with pytest.raises(UserError, match="train-0000.tar .*127.0.0.1:9"):
        open_dataset("http://127.0.0.1:9/train-0000.tar")
    with pytest.raises(UserError, match="nosuch://"):
        open_dataset("nosuch://host/a.tar")
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match="free space"):
        open_dataset(url + "/train-0000.tar")


def test_download_failure_leaves_no_file(server, cache, monkeypatch):
    url, _, _ = server

    def broken(source, out, size):
        out.write(b"half")
        raise ConnectionResetError("gone")

    monkeypatch.setattr(remote.shutil, "copyfileobj", broken)
    with pytest.raises(RunError, match="gone"):
        open_dataset(url + "/train-0000.tar")
    assert not [path for path in cache.rglob("*") if path.is_file() and path.name != ".lock"]


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A local S3 server (moto) with splits and classes in a bucket."""
    pytest.importorskip("s3fs", reason="needs s3fs")
    moto = pytest.importorskip("moto.server", reason="needs 'moto[s3]' and flask")
    import s3fs

    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    url = "http://{}:{}".format(*running.get_host_and_port())
    for name, value in (
        ("AWS_ENDPOINT_URL", url),
        ("AWS_ACCESS_KEY_ID", "any"),
        ("AWS_SECRET_ACCESS_KEY", "any"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ):
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    system.mkdir("bucket")
    write_shards(tmp_path / "far", [5, 4])
    write_shards(tmp_path / "far", [3], prefix="val")
    (tmp_path / "far/classes.txt").write_text("a\nb\nc\n")
    for file in (tmp_path / "far").iterdir():
        system.put_file(str(file), f"bucket/shards/{file.name}")
    yield system, tmp_path / "far"
    system.rm("bucket", recursive=True)  # the server keeps objects in this process
    running.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("path", ["s3://bucket/shards/", "s3://bucket/shards", "s3://bucket/shards/train-*.tar"])
def test_download_from_a_bucket_once(bucket, cache, capsys, path):
    _, far = bucket
    source, near = open_dataset(path, split="train"), open_dataset(far, split="train")
    assert len(source) == 9 and source.classes == ("a", "b", "c")
    assert [source.image(i) for i in range(9)] == [near.image(i) for i in range(9)]
    assert capsys.readouterr().err.count("fetched train-") == 2
    assert len(open_dataset(path, split="train")) == 9 and not capsys.readouterr().err
    if "*" not in path:
        assert len(open_dataset(path, split="val")) == 3
        with pytest.raises(UserError, match="several splits"):
            open_dataset(path)


def test_download_from_a_bucket_again_after_a_change_of_equal_size(bucket, cache):
    system, far = bucket
    before = open_dataset("s3://bucket/shards/train-{0000..0001}.tar").image(0)
    data = (far / "train-0000.tar").read_bytes().replace(before, before[::-1])
    system.pipe_file("bucket/shards/train-0000.tar", data)
    assert open_dataset("s3://bucket/shards/train-{0000..0001}.tar").image(0) == before[::-1]
    with pytest.raises(UserError, match=r"train-0002.tar .*1 of 3"):
        open_dataset("s3://bucket/shards/train-{0000..0002}.tar")
    with pytest.raises(UserError, match="s3://bucket/nothing/") as err:
        open_dataset("s3://bucket/nothing/")
    assert err.value.where == "data.path"
