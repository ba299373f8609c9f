"""The command line: help, exit codes, and short runs. Error lines are in messages.txt."""

import json
import subprocess
import sys

from ijepa.data.open import open_dataset
from tests.helpers.commands import SMALL, ijepa, is_user_error


def test_help_does_not_import_torch():
    code = "import sys; from ijepa.cli import cli; cli.main(['pretrain', '-h'], standalone_mode=False)"
    code += "; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "click" in loaded and "torch" not in loaded


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
