from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ijepa.evaluation.results.schema import EvaluationResult
from ijepa.evaluation.video import propagation as p
from ijepa.evaluation.video.dataset import Video, find_videos
from ijepa.evaluation.video.protocol import PropagationProtocol
from ijepa.utils.errors import RunError, UserError
from tests.helpers.encoders import MeanColor, Noise, png
from tests.helpers.videos import write_video
from tests.reference.videos import take

RULE = PropagationProtocol(name="p", short_side=32, memory=2, neighbors=3, radius=2, temperature=0.05)


class Signed(MeanColor):
    """Colors minus gray, so that different colors have a low cosine."""

    def __call__(self, pixels: Tensor) -> Tensor:
        return super().__call__(pixels) - 75


@pytest.fixture
def videos(tmp_path: Path) -> tuple[Video, ...]:
    for name in ("a", "b"):
        write_video(tmp_path, name)
    return find_videos(tmp_path)


def evaluate(videos: tuple[Video, ...], encoder: MeanColor | Noise) -> EvaluationResult:
    return p.evaluate_propagation({"toy": encoder}, videos, RULE)


@pytest.mark.parametrize("frames", [1, 3])
def test_propagate_labels_agrees_with_a_slow_version(frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(p, "QUERIES", 7)
    draw, grid = torch.Generator().manual_seed(frames), (4, 5)
    queries = normalize(torch.randn(20, 6, generator=draw), dim=1)
    keys = normalize(torch.randn(frames, 20, 6, generator=draw), dim=2)
    labels = torch.rand(frames, 20, 3, generator=draw)
    rule = PropagationProtocol(name="p", neighbors=4, radius=1, temperature=0.1)
    found = p.propagate_labels(queries, keys.flatten(0, 1), labels.flatten(0, 1), p.within(grid, 1), rule)
    slow = take(queries.numpy(), keys.numpy(), labels.numpy(), grid, 4, 1, 0.1)
    np.testing.assert_allclose(found, slow, atol=1e-5)


def test_evaluate_propagation_follows_moving_objects_and_repeats(videos: tuple[Video, ...]) -> None:
    result = evaluate(videos, Signed())
    (row,) = result.rows
    assert row["j"] > 0.7 and row["f"] > 0.8 and row["j_recall"] == 1, row
    assert row["jf"] == pytest.approx((row["j"] + row["f"]) / 2)
    assert row["ci"][0] <= row["jf"] <= row["ci"][1]
    assert row["objects"] == 4 and result.data.test.n == 2
    assert result.chance is not None and result.chance < 0.5 < row["jf"]
    assert evaluate(videos, Signed()).model_copy(update={"seconds": result.seconds}) == result


def test_evaluate_propagation_of_random_features_loses_objects(videos: tuple[Video, ...]) -> None:
    (row,) = evaluate(videos, Noise()).rows
    assert row["j"] < 0.35


def test_objects_may_have_any_numbers(videos: tuple[Video, ...], tmp_path: Path) -> None:
    """Numbers that no pixel has are not objects; they would score 1, because they are in neither mask."""
    for name in ("a", "b"):
        write_video(tmp_path / "other", name, labels=(0, 70, 200))
    (plain,), (other,) = (evaluate(some, Signed()).rows for some in (videos, find_videos(tmp_path / "other")))
    assert other == plain and plain["objects"] == 4
    empty = [np.asarray(videos[0].mask(0, (32, 56))) * 70, *[np.zeros((32, 56), np.uint8)] * 5]
    assert len(p.score(videos[0], empty)) == 2


def test_score_leaves_out_the_first_and_the_last_frame(videos: tuple[Video, ...]) -> None:
    truth = [np.asarray(videos[0].mask(number, (32, 56))) for number in range(6)]
    assert p.score(videos[0], truth) == [(1, 1), (1, 1)]
    changed = [truth[0], *truth[1:5], np.zeros_like(truth[5])]
    assert p.score(videos[0], changed) == [(1, 1), (1, 1)]
    changed[3] = np.zeros_like(truth[3])
    assert p.score(videos[0], changed)[0][0] == 0.75


def test_input_size_is_a_multiple_of_the_patch() -> None:
    assert p.input_size((480, 854), 480, 16) == (480, 848)
    assert p.input_size((1080, 1920), 480, 14) == (476, 840)
    assert p.input_size((64, 32), 32, 8) == (64, 32)


def test_evaluate_propagation_refuses_damaged_videos(tmp_path: Path) -> None:
    write_video(tmp_path / "size", "a")
    (tmp_path / "size/masks/a/00002.png").write_bytes(png(np.zeros((32, 32), np.uint8)))
    with pytest.raises(UserError) as err:
        evaluate(find_videos(tmp_path / "size"), Signed())
    assert err.value.where.endswith("00002.png")
    write_video(tmp_path / "broken", "a")
    (tmp_path / "broken/images/a/00001.png").write_bytes(b"no image")
    with pytest.raises(RunError, match=r"00001\.png: "):
        evaluate(find_videos(tmp_path / "broken"), Signed())
    write_video(tmp_path / "empty", "a")
    (tmp_path / "empty/masks/a/00000.png").write_bytes(png(np.zeros((32, 56), np.uint8)))
    with pytest.raises(UserError) as err:
        evaluate(find_videos(tmp_path / "empty"), Signed())
    assert err.value.where == "a"
