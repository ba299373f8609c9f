import json

import pytest
from click.testing import CliRunner

from ijepa.bench import masks
from ijepa.cli import cli
from ijepa.utils.errors import RunError

RESULT = {"grid": [14, 14], "images": 256, "masks_ms": 12.34, "goal_ms": 30, "packing_ms": 5.0}


def invoke(*words: object) -> str:
    done = CliRunner().invoke(cli, ["bench", *map(str, words)], catch_exceptions=False, standalone_mode=False)
    return done.output


def test_bench_prints_the_result_and_writes_it_with_the_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(masks, "bench_masks", lambda: RESULT)
    output = tmp_path / "new" / "masks.json"
    said = invoke("masks", "--output", output)
    assert "256 images, 14 x 14 patches" in said and "12.3 ms" in said and str(output) in said
    written = json.loads(output.read_text())
    assert written.items() >= RESULT.items() and len(written) > len(RESULT)


def test_bench_without_an_output_writes_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(masks, "bench_masks", lambda: RESULT)
    monkeypatch.chdir(tmp_path)
    assert "result:" not in invoke("masks")
    assert not list(tmp_path.iterdir())


def test_bench_raises_run_error_if_the_output_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr(masks, "bench_masks", lambda: RESULT)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file"):
        invoke("masks", "--output", tmp_path / "file" / "masks.json")
