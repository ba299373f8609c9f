import json

import pytest

from ijepa import demo
from ijepa.demo import draw, run, summary
from ijepa.utils.errors import UserError


def test_run_of_a_small_demo_ends_with_a_table_and_a_report(tmp_path, capsys):
    small = {"steps": 6, "batch.global": 8, "checkpoint.every": 3, "data.workers": 0, "schedule.warmup": "1"}
    small |= {"model.encoder.width": 32, "model.encoder.depth": 1, "model.predictor.depth": 1, "log_every": 3}
    first = run(tmp_path / "demo", images=240, overrides=small)
    assert first.report == tmp_path / "demo" / "report.html" and first.report.is_file()
    assert set(first.results) == {"linear", "knn", "segmentation"}
    for kind, result in first.results.items():
        names = [row.encoder for row in result.rows]
        assert names[0] == "trained" and names[-2:] == ["random", "pixels"]
        (file,) = (tmp_path / "demo" / "evaluations").glob(f"{kind}-*.json")
        assert json.loads(file.read_text())["rows"] == result.to_json()["rows"]
    output = capsys.readouterr().out
    assert "Accuracy and mIoU in %" in output and "Linear probe" in output and "random" in output
    assert summary(first.results).row_count == len(names)
    times = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert list(times["parts"]) == ["scenes", "pretraining", "linear", "knn", "segmentation", "report"]
    assert all(seconds >= 0 for seconds in times["parts"].values())
    assert sum(times["parts"].values()) <= times["seconds"] + 0.1
    again = run(tmp_path / "demo", images=240, overrides=small)  # trains nothing
    assert again.results["linear"].rows == first.results["linear"].rows
    assert json.loads((tmp_path / "demo" / "demo.json").read_text()) == times  # the durations of the first run


def test_draw_leaves_no_incomplete_scenes_and_keeps_complete_ones(tmp_path, monkeypatch):
    def interrupted(out, **options):
        (out / "train-0000.tar").write_bytes(b"half")
        raise KeyboardInterrupt

    folder = tmp_path / "demo-scenes"
    with monkeypatch.context() as patched:
        patched.setattr(demo, "write_scenes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            draw(folder, images=24, seed=0)
    assert not list(tmp_path.iterdir())
    draw(folder, images=24, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["demo-scenes"] and (folder / "manifest.json").is_file()
    monkeypatch.setattr(demo, "write_scenes", interrupted)
    draw(folder, images=24, seed=0)


@pytest.mark.parametrize("changed", [{"seed": 1}, {"images": 30}, {}], ids=["seed", "images", "version"])
def test_draw_refuses_a_folder_with_different_scenes(tmp_path, monkeypatch, changed):
    draw(tmp_path / "scenes", images=24, seed=0)
    if not changed:
        monkeypatch.setattr(demo, "VERSION", 99)
    with pytest.raises(UserError, match=next(iter(changed), "version")) as err:
        draw(tmp_path / "scenes", **{"images": 24, "seed": 0, **changed})
    assert err.value.where == str(tmp_path / "scenes") and "--output" in err.value.hint


def test_draw_refuses_a_folder_with_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError) as err:
        draw(tmp_path, images=24, seed=0)
    assert err.value.where == str(tmp_path) and [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
