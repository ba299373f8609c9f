"""The whole journey, small: the same calls, a few steps, a few scenes."""

import json

from ijepa.demo import run, summary


def test_the_journey_ends_in_a_table_and_a_page(tmp_path, capsys):
    small = {"steps": 6, "batch.global": 8, "checkpoint.every": 3, "data.workers": 0, "schedule.warmup": "1"}
    small |= {"model.encoder.width": 32, "model.encoder.depth": 1, "model.predictor.depth": 1, "log_every": 3}
    journey = run(tmp_path / "demo", images=240, overrides=small)
    assert journey.report == tmp_path / "demo" / "report.html" and journey.report.is_file()
    assert set(journey.results) == {"linear", "knn", "segmentation"}
    for kind, result in journey.results.items():
        names = [row["encoder"] for row in result["rows"]]
        assert names[0] == "trained" and names[-2:] == ["random", "pixels"]
        (file,) = (tmp_path / "demo" / "evaluations").glob(f"{kind}-*.json")
        assert json.loads(file.read_text())["rows"] == json.loads(json.dumps(result["rows"]))
    said = capsys.readouterr().out
    assert "Accuracy and mIoU in %" in said and "linear probe" in said and "random" in said
    assert summary(journey.results).row_count == len(names)
    again = run(tmp_path / "demo", images=240, overrides=small)  # nothing is trained twice
    assert again.results["linear"]["rows"] == journey.results["linear"]["rows"]
