"""A release holds what it promises, the same bytes for the same run, and notices every change."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

from ijepa.cli import cli
from ijepa.data.sources import open_source
from ijepa.errors import Failed, Refused
from ijepa.evaluation.run import evaluate
from ijepa.interop import tensors as lazy
from ijepa.interop.weights import load_encoder
from ijepa.recipe import Recipe
from ijepa.release.archive import verify_archive, write_archive
from ijepa.release.card import About
from ijepa.training.loop import pretrain
from tests.conftest import TINY


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "tiny-run"
    recipe = Recipe.read({**TINY, "data": {**TINY["data"], "path": str(scenes)}}, "test")
    source = open_source(scenes, split="train")
    info = {"data": {"path": str(scenes), "fingerprint": source.fingerprint}}
    pretrain(recipe, source, folder, quiet=True, info=info)
    (folder / "small.yaml").write_text("base: demo\nname: small\nneighbours: [5]\nk: 5\n")
    evaluate("knn", str(folder), f"{scenes}/train-*.tar", f"{scenes}/val-*.tar", protocol=str(folder / "small.yaml"))
    return folder


@pytest.fixture
def archive(run, tmp_path) -> Path:
    return write_archive(run, tmp_path / "release", About(country="Sweden", watts=65.0))


def test_it_holds_what_it_promises_and_loads(run, archive):
    names = {path.relative_to(archive).as_posix() for path in archive.rglob("*") if path.is_file()}
    assert names == {
        "context_encoder.safetensors",
        "target_encoder.safetensors",
        "predictor.safetensors",
        "recipe.yaml",
        "run.json",
        "metrics.jsonl",
        "timings.jsonl",
        "diagnostics.jsonl",
        "evaluations/knn-small.json",
        "README.md",
        "SHA256SUMS",
    }
    pixels = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    for which in ("target", "context"):
        assert torch.equal(load_encoder(archive, which)(pixels), load_encoder(run, which)(pixels))
    assert verify_archive(archive) == len(names) - 1
    done = subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=archive, check=False)
    assert done.returncode == 0


def test_the_same_run_gives_the_same_bytes(run, archive, tmp_path):
    again = write_archive(run, tmp_path / "again", About(country="Sweden", watts=65.0))
    assert (again / "SHA256SUMS").read_bytes() == (archive / "SHA256SUMS").read_bytes()


def test_the_card_is_one_for_the_hub(run, archive):
    text = (archive / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    values = yaml.safe_load(header)
    assert values["license"] == "apache-2.0" and values["library_name"] == "ijepa"
    result = json.loads((run / "evaluations/knn-small.json").read_text())["rows"][0]
    (entry,) = values["model-index"][0]["results"]
    figures = {metric["type"]: metric["value"] for metric in entry["metrics"]}
    assert figures["accuracy"] == round(100 * result["top1"], 2)
    for word in ("Training", "CO2", "Sweden", "65 W (stated)", "Intended use", "protocol `small`", "random", "pixels"):
        assert word in body, word
    from huggingface_hub import ModelCard

    checked = ModelCard(text, ignore_metadata_errors=False)
    assert checked.data.eval_results[0].metric_value == figures["accuracy"]
    assert checked.data.pipeline_tag == "image-feature-extraction"


def test_unknown_power_is_said_and_not_guessed(run, tmp_path):
    folder = write_archive(run, tmp_path / "release", About())
    assert "Not estimated" in (folder / "README.md").read_text()


def _change(archive: Path) -> str:
    file = archive / "predictor.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return "predictor.safetensors: has changed"


def _lose(archive: Path) -> str:
    (archive / "evaluations/knn-small.json").unlink()
    return "knn-small.json: is missing"


def _add(archive: Path) -> str:
    (archive / "evil.py").write_text("print()")
    return "evil.py: is not in SHA256SUMS"


def _garble(archive: Path) -> str:
    (archive / "SHA256SUMS").write_text("abc  README.md\n")
    return "is not a list of checksums"


@pytest.mark.parametrize("damage", [_change, _lose, _add, _garble])
def test_every_change_is_noticed_in_one_line(archive, damage):
    message = damage(archive)
    with pytest.raises(Failed, match=message) as error:
        verify_archive(archive)
    assert error.value.exit_code == 1 and "\n" not in str(error.value)


def test_an_unfinished_run_is_released_only_when_asked(run, tmp_path, scenes):
    recipe = Recipe.load(run, {"steps": "16"})
    from ijepa.training.loop import Callback, Stopped

    def stop(model):
        import os
        import signal

        if stop.calls == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        stop.calls += 1
        return {}

    stop.calls = 0
    with pytest.raises(Stopped):
        pretrain(
            recipe, open_source(scenes, split="train"), tmp_path / "run", quiet=True, callbacks=[Callback(1, stop)]
        )
    with pytest.raises(Refused, match=r"has come to step 3 of 16; .*--unfinished"):
        write_archive(tmp_path / "run", tmp_path / "out", About())
    out = write_archive(tmp_path / "run", tmp_path / "out", About(), unfinished=True)
    text = (out / "README.md").read_text()
    assert "step 3 of 16" in text and "None was made of this run" in text


def test_a_full_disk_leaves_nothing(run, tmp_path, monkeypatch):
    def full(file, tensors):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lazy, "_write", full)
    with pytest.raises(Failed, match="No space left"):
        write_archive(run, tmp_path / "out", About())
    assert not list(tmp_path.iterdir())


def test_the_command_writes_and_verifies(run, tmp_path):
    out = str(tmp_path / "release")
    for words, said in (([str(run), out], "archive: "), (["--verify", out], "whole, 10 files")):
        done = CliRunner().invoke(cli, ["archive", *words], catch_exceptions=False)
        assert done.exit_code == 0 and said in done.output
    for words, message in (
        ([str(run)], "OUT: is missing"),
        ([str(run), out], "exists already"),
        (["scenes", str(tmp_path / "x")], "is no run"),
        (["--verify", str(run)], "holds no SHA256SUMS"),
        ([str(run), str(tmp_path / "y"), "--country", "Swedn"], "did you mean Sweden?"),
    ):
        with pytest.raises(Refused, match=message.replace("?", r"\?")):
            CliRunner().invoke(cli, ["archive", *words], catch_exceptions=False, standalone_mode=False)
