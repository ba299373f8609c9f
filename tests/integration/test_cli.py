"""The command line: help, exit codes, and short runs. Error lines are in messages.txt."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ijepa.__main__ import main
from ijepa.cli import cli
from ijepa.config.recipe import Recipe
from ijepa.data.open import open_dataset
from ijepa.evaluation.protocols import DEFAULTS


def ijepa(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ijepa", *arguments], capture_output=True, text=True, cwd=cwd)


SMALL = [
    *("--output", "run", "--batch.global", "8", "--data.workers", "0", "--log_every", "1", "--schedule.warmup", "1"),
    *("--model.encoder.width", "32", "--model.encoder.depth", "1", "--model.predictor.depth", "1"),
    *("--model.encoder.heads", "2"),
]
"""Flags of a run of seconds into `run`."""


def is_user_error(found: subprocess.CompletedProcess[str], *words: str) -> None:
    lines = found.stderr.strip().splitlines()
    assert found.returncode == 2, found.stderr
    assert len(lines) == 1 and lines[0].startswith("ijepa: "), found.stderr
    for word in words:
        assert word in lines[0], lines[0]


def test_help_does_not_import_torch():
    code = "import sys; from ijepa.cli import cli; cli.main(['pretrain', '-h'], standalone_mode=False)"
    code += "; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "click" in loaded and "torch" not in loaded


def test_pretrain_help_lists_every_field():
    text = CliRunner().invoke(cli, ["pretrain", "--help"]).output
    for key, _, meaning, _ in Recipe.iter_fields():
        assert f"--{key} " in text and meaning.split()[0] in text
    assert "Recipe: optimizer" in text


@pytest.mark.parametrize("kind", DEFAULTS)
def test_evaluate_help_names_the_default_protocol(kind):
    text = " ".join(CliRunner().invoke(cli, ["evaluate", kind, "--help"]).output.split())
    assert re.search(rf"default protocol(,| is) {DEFAULTS[kind]}\b", text)


@pytest.mark.parametrize(
    ("flag", "words", "default"),
    [
        ("precision.fp8", "none|tensorwise|rowwise", "none"),
        ("precision.attention", "auto|flash|cudnn|efficient|math", "auto"),
        ("model.encoder.initial", "normal|xavier", "normal"),
        ("batch.pad_to_budget", "BOOL|auto", "auto"),
        ("data.workers", "N|auto", "auto"),
        ("model.image_size", "HEIGHT,WIDTH", "224,224"),
        ("optimizer.betas", "LOW,HIGH", "0.9,0.95"),
        ("schedule.warmup", "LENGTH", "40 epochs"),
        ("epochs", "X", None),
    ],
)
def test_pretrain_help_states_type_and_default(flag, words, default):
    text = CliRunner().invoke(cli, ["pretrain", "--help"]).output
    mine, _, rest = text.partition(f"  --{flag} {words}")[2].partition("\n  --")
    assert rest and (f"[default: {default}]" in " ".join(mine.split()) if default else "default" not in mine)


def test_debug_shows_the_traceback():
    found = ijepa("pretrain", "vit-smal-16", "--debug")
    assert found.returncode != 0 and "Traceback" in found.stderr


def test_unexpected_error_is_one_line(monkeypatch, capsys):
    def broken(*arguments, **options):
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(sys, "argv", ["ijepa", "pretrain", "vit-tiny-64"])
    monkeypatch.setattr(Recipe, "load", broken)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    found = capsys.readouterr().err.splitlines()
    assert len(found) == 1 and found[0].startswith("ijepa: ZeroDivisionError: division by zero; run again with --debug")
    monkeypatch.setattr(sys, "argv", ["ijepa", "pretrain", "vit-tiny-64", "--debug"])
    with pytest.raises(ZeroDivisionError):
        main()


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    found = ijepa("pretrain", "vit-huge-16-in22k", "--dry-run", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    for words in (
        "630.7 M context + 630.7 M target encoder, 22.3 M predictor",
        "3177412 steps (276297 of warm-up)",
        "14 x 14",
    ):
        assert words in found.stdout
    assert not list(tmp_path.iterdir())


def test_pretrain_resume_diagnose_and_evaluate(tmp_path, scenes):
    flags = [*SMALL, "--data.path", str(scenes), "--steps", "3"]
    first = ijepa("pretrain", "vit-tiny-64", *flags, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "step 3/3  loss" in first.stdout and "done: run" in first.stdout
    again = ijepa("pretrain", "vit-tiny-64", *flags, "--model.encoder.heads", "4", cwd=tmp_path)
    is_user_error(again, "model.encoder.heads")
    never = ijepa("pretrain", "vit-tiny-64", *flags, "--resume", "never", cwd=tmp_path)
    is_user_error(never, "--resume")
    diagnosis = ijepa("diagnose", "run", "--data", str(scenes), "--images", "16", cwd=tmp_path)
    assert diagnosis.returncode == 0 and "verdict" in diagnosis.stdout, diagnosis.stderr
    sets = ["--train", f"{scenes}/train-*.tar", "--test", f"{scenes}/val-*.tar", "--protocol", "demo"]
    knn = ijepa("evaluate", "knn", "run", *sets, cwd=tmp_path)
    assert knn.returncode == 0, knn.stderr
    assert "run/evaluations/knn-demo.json" in knn.stdout and "random" in knn.stdout
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("width: 32", "width: 64"))
    is_user_error(ijepa("diagnose", "run", "--data", str(scenes), cwd=tmp_path), ".safetensors")
    assert "knn: trained: " in knn.stderr and "\r" not in knn.stderr  # plain lines without a terminal


def test_pretrain_with_a_damaged_validation_split(tmp_path, scenes):
    for shard in scenes.glob("train-*.tar"):
        (tmp_path / shard.name).symlink_to(shard)
    (tmp_path / "val-00000.tar").write_bytes(b"damaged")
    found = ijepa("pretrain", "vit-tiny-64", *SMALL, "--data.path", str(tmp_path), "--steps", "2", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    (line,) = (line for line in found.stdout.splitlines() if "training images" in line)
    assert line.startswith("diagnostics are measured on training images: data.path: ") and "val-00000.tar" in line
    damaged = ["--data.path", str(tmp_path), "--diagnose-data", str(tmp_path)]
    is_user_error(ijepa("pretrain", "vit-tiny-64", *SMALL, *damaged, cwd=tmp_path), "--diagnose-data", "val-00000.tar")


def test_pretrain_with_a_truncated_image(tmp_path, scenes):
    """Neither training nor the diagnosis of the training images stops."""
    source = open_dataset(scenes, split="train")
    (tmp_path / "images").mkdir()
    for index in range(40):
        image = source[index].image
        (tmp_path / "images" / f"{index:02d}.jpg").write_bytes(image[: len(image) // 2] if index == 7 else image)
    found = ijepa("pretrain", "vit-tiny-64", *SMALL, "--data.path", "images", "--steps", "5", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "unreadable image, replaced by the next image of its epoch: 07.jpg" in found.stdout
    rows = [json.loads(line) for line in (tmp_path / "run" / "diagnostics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 5] and all(row["rankme"] > 1 for row in rows)


def test_plan_writes_json(tmp_path):
    flags = ["--gpu", "H200", "--gpus", "4", "--country", "sweden", "--batch.global", "1024", "--json", "plan.json"]
    found = ijepa("plan", "vit-large-16-in1k", *flags, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "4 x NVIDIA H200" in found.stdout and "(Sweden, " in found.stdout and "256 per GPU" in found.stdout
    values = json.loads((tmp_path / "plan.json").read_text())
    assert values["recipe"]["batch"]["global"] == 1024 and values["devices"] == 4


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("linear", ["--train-list", "a", "--devkit", "d"], {"train_list": "a", "test_list": None, "devkit": "d"}),
        ("knn", ["--test-list", "b"], {"train_list": None, "test_list": "b", "devkit": None}),
        ("segmentation", ["--labels", "voc"], {"train_list": None, "test_list": None, "labels": "voc"}),
    ],
)
def test_evaluate_passes_data_options_on(kind, given, expected, monkeypatch):
    from ijepa.evaluation import run
    from ijepa.evaluation.results.schema import EvaluationResult

    seen = {}

    def evaluate(*words, **options):
        seen.update(options, words=words)
        return EvaluationResult(kind="knn", rows=[{"encoder": "a", "top1": 0.5}]), Path("result.json")

    monkeypatch.setattr(run, "evaluate", evaluate)
    found = CliRunner().invoke(cli, ["evaluate", kind, "W", "--train", "x", "--test", "y", *given])
    assert found.exit_code == 0, found.output
    assert seen["words"] == (kind, "W", "x", "y")
    assert {key: seen[key] for key in expected} == expected
    assert ("devkit" in seen) == (kind != "segmentation") and ("labels" in seen) == (kind == "segmentation")
