"""The whole journey, small: the same calls, a few steps, a few scenes."""

import json

import pytest

from ijepa import demo
from ijepa.demo import draw, run, summary
from ijepa.utils.errors import UserError


def test_the_journey_ends_in_a_table_and_a_page(tmp_path, capsys):
    small = {"steps": 6, "batch.global": 8, "checkpoint.every": 3, "data.workers": 0, "schedule.warmup": "1"}
    small |= {"model.encoder.width": 32, "model.encoder.depth": 1, "model.predictor.depth": 1, "log_every": 3}
    journey = run(tmp_path / "demo", images=240, overrides=small)
    assert journey.report == tmp_path / "demo" / "report.html" and journey.report.is_file()
    assert set(journey.results) == {"linear", "knn", "segmentation"}
    for kind, result in journey.results.items():
        names = [row.encoder for row in result.rows]
        assert names[0] == "trained" and names[-2:] == ["random", "pixels"]
        (file,) = (tmp_path / "demo" / "evaluations").glob(f"{kind}-*.json")
        assert json.loads(file.read_text()) == result.to_json()
    said = capsys.readouterr().out
    assert "Accuracy and mIoU in %" in said and "linear probe" in said and "random" in said
    assert summary(journey.results).row_count == len(names)
    times = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert list(times["parts"]) == ["scenes", "pretraining", "linear", "knn", "segmentation", "report"]
    assert all(seconds > 0 for seconds in times["parts"].values())
    assert sum(times["parts"].values()) <= times["seconds"] + 0.1
    again = run(tmp_path / "demo", images=240, overrides=small)  # nothing is trained twice
    assert again.results["linear"].rows == journey.results["linear"].rows
    assert json.loads((tmp_path / "demo" / "demo.json").read_text()) == times  # what it took the first time


def test_scenes_are_drawn_whole_or_not_at_all(tmp_path, monkeypatch):
    """A demo interrupted while it draws begins anew; what is drawn is not drawn again."""

    def interrupted(out, **options):
        out.mkdir()
        (out / "train-0000.tar").write_bytes(b"half")
        raise KeyboardInterrupt

    folder = tmp_path / "demo-scenes"
    with monkeypatch.context() as patched:
        patched.setattr(demo, "write_scenes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            draw(folder, images=24, seed=0)
    assert not folder.exists()
    draw(folder, images=24, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["demo-scenes"] and (folder / "manifest.json").is_file()
    monkeypatch.setattr(demo, "write_scenes", interrupted)
    draw(folder, images=24, seed=0)


@pytest.mark.parametrize(
    ("changed", "words"),
    [({"seed": 1}, "seed 0, not 1"), ({"images": 30}, "images 24, not 30"), ({}, rf"version {demo.VERSION}, not 99")],
    ids=str,
)
def test_other_scenes_are_refused_not_reused(tmp_path, monkeypatch, changed, words):
    draw(tmp_path / "scenes", images=24, seed=0)
    if not changed:
        monkeypatch.setattr(demo, "VERSION", 99)
    with pytest.raises(UserError, match=f"scenes: holds scenes of {words}; give another --output"):
        draw(tmp_path / "scenes", **{"images": 24, "seed": 0, **changed})


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no scenes"):
        draw(tmp_path, images=24, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
