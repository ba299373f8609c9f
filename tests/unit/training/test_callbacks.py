"""What a run measures on its way: written with the step, cut back and made again on resuming."""

import json
from pathlib import Path

import pytest

from ijepa.checkpoint.format import list_checkpoints
from ijepa.training.loop import Callback, pretrain
from ijepa.utils.errors import RunError
from tests.helpers.runs import bytes_of, recipe, source


def test_callbacks_are_written_and_cut(scenes, tmp_path):
    rows = [Callback(4, lambda model: {"answer": 42.0})]
    pretrain(recipe(scenes), source(scenes), tmp_path, callbacks=rows, quiet=True)
    assert answers(tmp_path) == [{"step": step, "answer": 42.0} for step in (0, 4, 8)]


def answers(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "diagnostics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("at", [0, 3, 6, 8])
def test_a_measurement_that_fails_costs_no_step_and_is_made_on_resuming(scenes, whole, tmp_path, at):
    """At the start, at two checkpoints, and at the end; the second of two callbacks, so that one row is there."""

    def counted(model):
        return {"mean": float(model.position_mean.mean())}

    def failing(model):
        if len(answers(tmp_path / "run")) == 2 * rows.index(at) + 1:
            raise RunError("cannot be measured")
        return {"std": float(model.position_mean.std())}

    rows = [0, 3, 6, 8]
    straight = [Callback(3, counted), Callback(3, lambda model: {"std": float(model.position_mean.std())})]
    pretrain(recipe(scenes), source(scenes), tmp_path / "straight", callbacks=straight, quiet=True)
    with pytest.raises(RunError, match="cannot be measured"):
        broken = [straight[0], Callback(3, failing)]
        pretrain(recipe(scenes), source(scenes), tmp_path / "run", callbacks=broken, quiet=True)
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert (int(saved[-1].name[-8:]) if saved else 0) == at
    pretrain(recipe(scenes), source(scenes), tmp_path / "run", callbacks=straight, quiet=True)
    assert [row["step"] for row in answers(tmp_path / "run")] == [0, 0, 3, 3, 6, 6, 8, 8]
    assert (tmp_path / "run/diagnostics.jsonl").read_bytes() == (tmp_path / "straight/diagnostics.jsonl").read_bytes()
    assert bytes_of(tmp_path / "run") == bytes_of(whole)


def test_remarks_of_a_callback_are_shown_after_its_figures_are_written(scenes, tmp_path, capsys):
    """A rank that falls all the time is reported once."""
    from ijepa.evaluation.diagnostics.warnings import new_training_warnings

    ranks = iter(range(100, 0, -10))
    call = Callback(1, lambda model: {"rankme_centred": float(next(ranks, 1))}, new_training_warnings(tmp_path))
    pretrain(recipe(scenes, steps=8), source(scenes), tmp_path, callbacks=[call])
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("watch: ")]
    assert len(warned) == 1 and "rank falls: centered RankMe went from 60.0 to 30.0" in warned[0]
