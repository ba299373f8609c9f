"""A release holds what it promises, the same bytes for the same run, and notices every change."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from ijepa.cli import cli
from ijepa.config.recipe import Recipe
from ijepa.data.open import open_source
from ijepa.evaluation.run import evaluate
from ijepa.interop import tensors as lazy
from ijepa.interop.weights import load_encoder
from ijepa.planning.hardware import grids
from ijepa.release import model_card
from ijepa.release.archive import verify_archive, write_archive
from ijepa.release.model_card import About
from ijepa.report.page import write_report
from ijepa.training.loop import pretrain
from ijepa.utils.errors import RunError, UserError
from tests.conftest import TINY
from tests.helpers.images import write_tree


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "tiny-run"
    recipe = Recipe.read({**TINY, "data": {**TINY["data"], "path": str(scenes)}}, "test")
    source = open_source(scenes, split="train")
    info = {"data": {"path": str(scenes)}}
    pretrain(recipe, source, folder, quiet=True, info={**info, "init": "earlier (step-00000003)"})
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
        "report.html",
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

    assert values["datasets"] == ["scenes"]
    assert entry["dataset"]["name"] == "scenes"
    assert "| begun from | its encoder of earlier (step-00000003) |" in body
    assert "1 process |" in body and "| country | Sweden |" in body and "0.00 hours" not in body
    assert "\nPretrained by" in body
    emissions = values["co2_eq_emissions"]
    assert emissions["geographical_location"] == "Sweden" and emissions["training_type"] == "pre-training"
    assert "CPU" in emissions["hardware_used"]
    seconds = sum(json.loads(line)["seconds"] for line in (run / "timings.jsonl").read_text().splitlines())
    grams = seconds / 3600 * 65.0 / 1e3 * grids().pue * grids().countries["Sweden"].grams
    assert emissions["emissions"] == pytest.approx(grams, rel=0.01)
    checked = ModelCard(text, ignore_metadata_errors=False)
    assert checked.data.to_dict()["co2_eq_emissions"] == emissions
    assert checked.data.eval_results[0].metric_value == figures["accuracy"]
    assert checked.data.pipeline_tag == "image-feature-extraction"


def test_unknown_power_is_said_and_not_guessed_and_the_country_recorded(run, tmp_path):
    text = (write_archive(run, tmp_path / "release", About(country="norway")) / "README.md").read_text()
    assert "Not estimated" in text and "co2_eq_emissions" not in text and "| country | Norway |" in text
    text = (write_archive(run, tmp_path / "nowhere", About()) / "README.md").read_text()
    assert "| country | not stated |" in text


@pytest.fixture
def copied(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copied"))


def test_figures_of_other_weights_are_not_the_releases(copied, scenes, tmp_path):
    sets = (f"{scenes}/train-*.tar", f"{scenes}/val-*.tar")
    (copied / "other.yaml").write_text("base: demo\nname: other\nneighbours: [5]\nk: 5\n")
    protocol = {"protocol": str(copied / "other.yaml"), "output": copied / "evaluations", "baselines": False}
    earlier = min((copied / "checkpoints").iterdir())
    assert earlier.name != "step-00000008"
    evaluate("knn", str(earlier), *sets, **protocol)
    result, file = evaluate("knn", str(copied), *sets, which="context", **{**protocol, "protocol": "demo"})
    assert file.name == "knn-demo-context.json" and result["which"] == "context"
    text = (write_archive(copied, tmp_path / "out", About()) / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    assert body.index("protocol `small`") < body.index("| trained (context encoder) | ")
    assert "protocol `other`" not in body and "other weights than these: `knn-other.json`" in body
    (entry,) = yaml.safe_load(header)["model-index"][0]["results"]
    assert entry["task"]["name"] == "knn, protocol small"


def test_every_way_to_load_it_that_the_card_shows(archive, monkeypatch):
    monkeypatch.chdir(archive)
    section = (archive / "README.md").read_text().split("## How to load it")[1]
    blocks = re.findall(r"```(python|sh)\n(.*?)```", section, flags=re.S)
    names: dict = {}
    for language, block in blocks:
        for line in block.splitlines() if language == "sh" else ():
            words = shlex.split(line)
            assert words.pop(0) == "ijepa"
            CliRunner().invoke(cli, words, catch_exceptions=False, standalone_mode=False)
        if language == "python":
            with torch.no_grad():
                exec(block, names)
    wanted = names["patches"]
    assert wanted.shape == (2, 36, 32)
    for name in ("hidden", "features", "output", "result"):
        torch.testing.assert_close(torch.as_tensor(names[name]), wanted, rtol=1e-5, atol=2e-5)
    target = load_file(archive / "target_encoder.safetensors")
    for state in (names["state"], names["original"]):
        assert all(torch.equal(state[key], value) for key, value in target.items())
    verify_archive(archive)


def test_the_report_is_that_of_the_evaluations(copied, tmp_path):
    page = copied / "report.html"
    page.write_text("old")
    os.utime(page, (1, 1))
    out = write_archive(copied, tmp_path / "out", About())
    assert "<!doctype html>" in (out / "report.html").read_text()
    assert "report.html" in (out / "README.md").read_text()
    with pytest.raises(UserError, match="is an archive"):
        CliRunner().invoke(cli, ["report", str(out)], catch_exceptions=False, standalone_mode=False)
    verify_archive(out)


def test_without_a_report_none_is_claimed(copied, tmp_path, monkeypatch):
    def refuse(run):
        raise UserError("report", "needs matplotlib")

    (copied / "report.html").unlink(missing_ok=True)
    monkeypatch.setattr("ijepa.release.archive.write_report", refuse)
    told: list[str] = []
    out = write_archive(copied, tmp_path / "out", About(), progress=told.append)
    assert not (out / "report.html").exists() and "report.html" not in (out / "README.md").read_text()
    assert "without a new report: report: needs matplotlib" in told


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


def _not_text(archive: Path) -> str:
    file = archive / "SHA256SUMS"
    data = bytearray(file.read_bytes())
    data[70] ^= 0x80
    file.write_bytes(data)
    return "is not a list of checksums"


def _change_a_sum(archive: Path) -> str:
    file = archive / "SHA256SUMS"
    data = bytearray(file.read_bytes())
    data[0] = ord("0") if data[0] != ord("0") else ord("1")
    file.write_bytes(data)
    return "README.md: has changed"


def _change_a_name(archive: Path) -> str:
    file = archive / "SHA256SUMS"
    file.write_bytes(file.read_bytes().replace(b"run.json", b"ru\x01.json"))
    return "is missing|is not in SHA256SUMS"


def _change_an_end(archive: Path) -> str:
    file = archive / "SHA256SUMS"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\x0b", 1))
    return "is missing|is not in SHA256SUMS"


def _empty(archive: Path) -> str:
    (archive / "SHA256SUMS").write_bytes(b"")
    return "is not a list of checksums"


def _link_out(archive: Path) -> str:
    """To a file with the same content, which may be another one tomorrow."""
    file = archive / "predictor.safetensors"
    elsewhere = file.rename(archive.parent / "elsewhere")
    file.symlink_to(elsewhere)
    return "predictor.safetensors: is a link, and an archive holds regular files only"


def _link_within(archive: Path) -> str:
    (archive / "evaluations/again.json").symlink_to("knn-small.json")
    return "again.json: is a link"


def _link_nowhere(archive: Path) -> str:
    (archive / "nowhere").symlink_to("gone")
    return "nowhere: is a link"


def _link_to_a_folder(archive: Path) -> str:
    (archive / "more").symlink_to("/usr")
    return "more: is a link"


def _link_the_list(archive: Path) -> str:
    file = archive / "SHA256SUMS"
    file.symlink_to(file.rename(archive.parent / "elsewhere"))
    return "SHA256SUMS: is a link"


def _wait(archive: Path) -> str:
    os.mkfifo(archive / "queue")
    return "queue: is a FIFO"


def _list_twice(archive: Path) -> str:
    file = archive / "SHA256SUMS"
    file.write_text("0" * 64 + "  run.json\n" + file.read_text())
    return "SHA256SUMS: lists run.json 2 times"


DAMAGES = [_change, _lose, _add, _garble, _not_text, _change_a_sum, _change_a_name, _change_an_end, _empty]
DAMAGES += [_link_out, _link_within, _link_nowhere, _link_to_a_folder, _link_the_list, _wait, _list_twice]


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_change_is_noticed_in_one_line(archive, damage):
    message = damage(archive)
    with pytest.raises(RunError, match=message) as error:
        verify_archive(archive)
    assert error.value.exit_code == 1 and "\n" not in str(error.value)


def test_a_list_that_is_a_fifo_is_none(archive):
    (archive / "SHA256SUMS").unlink()
    os.mkfifo(archive / "SHA256SUMS")
    words = [sys.executable, "-m", "ijepa", "archive", "--verify", str(archive)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)  # to read it would hang
    assert done.returncode == 2 and "holds no SHA256SUMS" in done.stderr


@pytest.mark.parametrize("name", ["timings.jsonl", "report.html", "evaluations/knn-small.json", "evaluations"])
def test_nothing_is_published_through_a_link(copied, tmp_path, name):
    (copied / name).rename(tmp_path / "private")
    (copied / name).symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match=f"{name}: is a link, not a regular file"):
        write_archive(copied, tmp_path / "out", About())
    assert not (tmp_path / "out").exists()


def test_the_card_counts_parameters_whatever_the_warm_up():
    recipe = Recipe.load("vit-tiny-64", {"schedule.warmup": "1000 steps"})
    assert model_card._model(recipe) == model_card._model(Recipe.load("vit-tiny-64"))


def test_an_unfinished_run_is_released_only_when_asked(run, tmp_path, scenes):
    recipe = Recipe.load(run, {"steps": "16"})
    from ijepa.training.loop import Callback, Interrupted

    def stop(model):
        import os
        import signal

        if stop.calls == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        stop.calls += 1
        return {}

    stop.calls = 0
    with pytest.raises(Interrupted):
        pretrain(
            recipe, open_source(scenes, split="train"), tmp_path / "run", quiet=True, callbacks=[Callback(1, stop)]
        )
    with pytest.raises(UserError, match=r"has come to step 4 of 16; .*--unfinished"):
        write_archive(tmp_path / "run", tmp_path / "out", About())
    out = write_archive(tmp_path / "run", tmp_path / "out", About(), unfinished=True)
    text = (out / "README.md").read_text()
    assert "step 4 of 16" in text and "None was made of these weights" in text


def test_a_full_disk_leaves_nothing(run, tmp_path, monkeypatch):
    def full(file, tensors, about):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lazy, "write_safetensors", full)
    with pytest.raises(RunError, match="No space left"):
        write_archive(run, tmp_path / "out", About())
    assert not list(tmp_path.iterdir())


def test_the_command_writes_and_verifies(run, tmp_path):
    out = str(tmp_path / "release")
    for words, said in (([str(run), out], "archive: "), (["--verify", out], "whole, 11 files")):
        done = CliRunner().invoke(cli, ["archive", *words], catch_exceptions=False)
        assert done.exit_code == 0 and said in done.output
    for words, message in (
        ([str(run)], "OUT: is missing"),
        ([str(run), out], "exists already"),
        (["scenes", str(tmp_path / "x")], "is no run"),
        (["--verify", str(run)], "holds no SHA256SUMS"),
        ([str(run), str(tmp_path / "y"), "--country", "Swedn"], "did you mean Sweden?"),
    ):
        with pytest.raises(UserError, match=message.replace("?", r"\?")):
            CliRunner().invoke(cli, ["archive", *words], catch_exceptions=False, standalone_mode=False)


def test_names_that_are_not_utf8_are_printable(copied, scenes, tmp_path):
    """Names of data, classes and images, in results, the report and the card."""
    odd = os.fsdecode(b"caf\xe9")
    source = open_source(scenes, split="train")
    for split, start in (("train", 0), ("val", 12)):
        names = (f"{odd}-{split}/{(odd, 'b')[number % 2]}/{odd}{number}.png" for number in range(start, start + 12))
        write_tree(tmp_path, {name: source.image(start + place) for place, name in enumerate(names)})
    shutil.rmtree(copied / "evaluations")
    sets = (str(tmp_path / f"{odd}-{split}") for split in ("train", "val"))
    result, _ = evaluate("knn", str(copied), *sets, protocol=str(copied / "small.yaml"))
    assert result["data"]["classes"] == ["b", "caf\\xe9"]
    write_report(copied, data=str(tmp_path / f"{odd}-train"))
    assert "caf\\xe9" in (copied / "report.html").read_text(encoding="utf-8")
    model_card = (write_archive(copied, tmp_path / "out", About()) / "README.md").read_text(encoding="utf-8")
    (entry,) = yaml.safe_load(model_card.split("---\n")[1])["model-index"][0]["results"]
    assert entry["dataset"]["name"] == "caf\\xe9-val"
    verify_archive(tmp_path / "out")
