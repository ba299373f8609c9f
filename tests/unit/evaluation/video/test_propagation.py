from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ijepa.evaluation.metrics import region_contour
from ijepa.evaluation.video import propagation as p
from ijepa.evaluation.video.dataset import Video, find_videos, fingerprint
from ijepa.evaluation.video.protocol import PropagationProtocol
from ijepa.utils.errors import RunError, UserError
from tests.helpers.encoders import PALETTE, MeanColour, Noise, png
from tests.reference.videos import contour_f, take

RULE = PropagationProtocol(name="p", short_side=32, memory=2, neighbours=3, radius=2, temperature=0.05)


class Signed(MeanColour):
    """Colours about grey, so that unlike ones point apart."""

    def __call__(self, pixels: Tensor) -> Tensor:
        return super().__call__(pixels) - 75


def blob(height: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), bool)
    for _ in range(3):
        y, x = rng.integers(0, height), rng.integers(0, width)
        mask[y : y + rng.integers(1, height), x : x + rng.integers(1, width)] ^= True
    return mask


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tolerance", [0.008, 0.1])
def test_contours_against_every_pair_of_pixels(seed: int, tolerance: float) -> None:
    ours, theirs = blob(17, 23, seed), blob(17, 23, seed + 100)
    assert region_contour.contour(ours, theirs, tolerance) == pytest.approx(
        contour_f(ours, theirs, tolerance), abs=1e-12
    )
    assert region_contour.contour(ours, ours) == region_contour.region(ours, ours) == 1


def test_empty_masks_agree_with_themselves_alone() -> None:
    empty, some = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    some[2:5, 3:6] = True
    assert region_contour.region(empty, empty) == region_contour.contour(empty, empty) == 1
    assert (
        region_contour.region(empty, some)
        == region_contour.contour(empty, some)
        == region_contour.contour(some, empty)
        == 0
    )
    other = np.zeros((8, 8), bool)
    other[2:5, 4:7] = True
    assert region_contour.region(other, some) == 0.5


@pytest.mark.parametrize("frames", [1, 3])
def test_labels_taken_against_one_patch_at_a_time(frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(p, "QUERIES", 7)
    draw, grid = torch.Generator().manual_seed(frames), (4, 5)
    queries = normalize(torch.randn(20, 6, generator=draw), dim=1)
    keys = normalize(torch.randn(frames, 20, 6, generator=draw), dim=2)
    labels = torch.rand(frames, 20, 3, generator=draw)
    rule = PropagationProtocol(name="p", neighbours=4, radius=1, temperature=0.1)
    found = p.taken(queries, keys.flatten(0, 1), labels.flatten(0, 1), p.within(grid, 1), rule)
    slow = take(queries.numpy(), keys.numpy(), labels.numpy(), grid, 4, 1, 0.1)
    np.testing.assert_allclose(found, slow, atol=1e-5)


def write_video(
    root: Path, name: str, *, frames: int = 6, labelled: int | None = None, labels: tuple[int, ...] = (0, 1, 2)
) -> None:
    """A square of class 1 goes right and one of class 2 goes down, 8 pixels a frame, over ground of 32 x 56."""
    images, masks = root / "images" / name, root / "masks" / name
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    for number in range(frames):
        mask = np.zeros((32, 56), np.uint8)
        mask[8:16, 8 * number : 8 * number + 8] = 1
        mask[8 * (number % 2) + 16 : 8 * (number % 2) + 24, 48:56] = 2
        noise = np.random.default_rng(number).normal(0, 4, (*mask.shape, 3))
        image = (PALETTE[mask] + noise).clip(0, 255).astype(np.uint8)
        (images / f"{number:05d}.png").write_bytes(png(image))
        if labelled is None or number < labelled:
            (masks / f"{number:05d}.png").write_bytes(png(np.array(labels, np.uint8)[mask]))


@pytest.fixture
def videos(tmp_path: Path) -> tuple[Video, ...]:
    for name in ("a", "b"):
        write_video(tmp_path, name)
    return find_videos(tmp_path)


def evaluate(videos: tuple[Video, ...], encoder: Any) -> dict[str, Any]:
    return p.evaluate_propagation({"toy": encoder}, videos, RULE, seed=0)


def test_objects_that_move_are_followed(videos: tuple[Video, ...]) -> None:
    result = evaluate(videos, Signed())
    (row,) = result["rows"]
    assert row["j"] > 0.7 and row["f"] > 0.8 and row["j_recall"] == 1, row
    assert row["jf"] == pytest.approx((row["j"] + row["f"]) / 2)
    assert row["ci"][0] <= row["jf"] <= row["ci"][1]
    assert row["objects"] == 4 and result["data"]["test"]["n"] == 2
    assert result["chance"] < 0.5 < row["jf"], "left where they were"
    again = evaluate(videos, Signed())
    again["seconds"] = result["seconds"]
    assert again == result


def test_features_that_know_nothing_lose_them(videos: tuple[Video, ...]) -> None:
    (row,) = evaluate(videos, Noise())["rows"]
    assert row["j"] < 0.35


def test_objects_may_bear_any_numbers(videos: tuple[Video, ...], tmp_path: Path) -> None:
    """Numbers that no pixel has are no objects, and would score 1 for being nowhere in either mask."""
    for name in ("a", "b"):
        write_video(tmp_path / "other", name, labels=(0, 70, 200))
    (plain,), (other,) = (evaluate(some, Signed())["rows"] for some in (videos, find_videos(tmp_path / "other")))
    assert other == plain and plain["objects"] == 4
    empty = [np.asarray(videos[0].mask(0, (32, 56))) * 70, *[np.zeros((32, 56), np.uint8)] * 5]
    assert len(p.score(videos[0], empty)) == 2


def test_the_first_and_the_last_frame_are_not_scored(videos: tuple[Video, ...]) -> None:
    truth = [np.asarray(videos[0].mask(number, (32, 56))) for number in range(6)]
    assert p.score(videos[0], truth) == [(1, 1), (1, 1)]
    spoilt = [truth[0], *truth[1:5], np.zeros_like(truth[5])]
    assert p.score(videos[0], spoilt) == [(1, 1), (1, 1)]
    spoilt[3] = np.zeros_like(truth[3])
    assert p.score(videos[0], spoilt)[0][0] == 0.75


def test_frames_are_cut_down_to_whole_patches() -> None:
    assert p.patch_size_of((480, 854), 480, 16) == (480, 848)
    assert p.patch_size_of((1080, 1920), 480, 14) == (476, 840)
    assert p.patch_size_of((64, 32), 32, 8) == (64, 32)


def test_a_davis_tree_is_read_by_its_list(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_video(tmp_path / "plain", name, frames=3)
    root = tmp_path / "davis"
    for new, old in (("JPEGImages", "images"), ("Annotations", "masks")):
        (root / new).mkdir(parents=True)
        (tmp_path / "plain" / old).rename(root / new / "480p")
    assert [video.name for video in find_videos(root)] == ["a", "b", "c"]
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("c\na\n")
    chosen = find_videos(root)
    assert [video.name for video in chosen] == ["a", "c"]
    assert fingerprint(chosen) != fingerprint(chosen[:1])
    (root / "ImageSets" / "2017" / "val.txt").write_text("c\nz\n")
    with pytest.raises(UserError, match="lists z, which"):
        find_videos(root)


def test_bad_videos_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data: .* holds no labelled videos"):
        find_videos(tmp_path)
    write_video(tmp_path / "one", "a", labelled=1)
    with pytest.raises(UserError, match="a has no mask to score but its first"):
        find_videos(tmp_path / "one")
    write_video(tmp_path / "none", "a", labelled=0)
    with pytest.raises(UserError, match="the first frame of a has no mask"):
        find_videos(tmp_path / "none")
    write_video(tmp_path / "wrong", "a")
    (tmp_path / "wrong/masks/a/00002.png").write_bytes(png(np.zeros((32, 32), np.uint8)))
    with pytest.raises(UserError, match=r"00002\.png: has 32 x 32 pixels, its frame 56 x 32"):
        evaluate(find_videos(tmp_path / "wrong"), Signed())
    write_video(tmp_path / "broken", "a")
    (tmp_path / "broken/images/a/00001.png").write_bytes(b"no image")
    with pytest.raises(RunError, match=r"00001\.png: "):
        evaluate(find_videos(tmp_path / "broken"), Signed())
    write_video(tmp_path / "empty", "a")
    (tmp_path / "empty/masks/a/00000.png").write_bytes(png(np.zeros((32, 56), np.uint8)))
    with pytest.raises(UserError, match="the mask of its first frame holds no object"):
        evaluate(find_videos(tmp_path / "empty"), Signed())
