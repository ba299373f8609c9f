from pathlib import Path

import pytest

from ijepa.evaluation.video.dataset import find_videos, fingerprint
from ijepa.utils.errors import UserError
from tests.helpers.videos import write_video


def test_find_videos_reads_the_list_of_a_davis_tree(tmp_path: Path) -> None:
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
    with pytest.raises(UserError) as err:
        find_videos(root)
    assert err.value.where.endswith("val.txt") and "lists z" in err.value.problem


def test_find_videos_refuses_folders_without_the_masks_that_are_needed(tmp_path: Path) -> None:
    write_video(tmp_path / "one", "a", labeled=1)
    write_video(tmp_path / "none", "a", labeled=0)
    for folder, word in (("empty", "videos"), ("one", "first frame"), ("none", "first frame")):
        with pytest.raises(UserError) as err:
            find_videos(tmp_path / folder)
        assert err.value.where == "--data" and word in err.value.problem
