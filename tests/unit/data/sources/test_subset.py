import pickle
from pathlib import Path

import pytest

from ijepa.data.open import open_dataset
from ijepa.data.sources.subset import select
from ijepa.utils.errors import UserError
from tests.helpers.images import encoded, picture, write_tar, write_tree

FILES = {f"n{c}/n{c}_{i}.JPEG": f"{c}{i}".encode() for c in (1, 2) for i in range(3)}


@pytest.mark.parametrize("form", ["name", "path", "stem", "slash", "words", "above"])
def test_select_forms_of_names(tmp_path: Path, form: str) -> None:
    source = open_dataset(write_tree(tmp_path / "train", FILES))
    line = {"name": "n{0}_{1}.JPEG", "path": "n{0}/n{0}_{1}.JPEG", "stem": "n{0}_{1}"}
    line |= {"slash": "/n{0}/n{0}_{1}.JPEG", "words": "n{0}_{1}.JPEG 17", "above": "x/train/n{0}/n{0}_{1}.JPEG"}
    file = tmp_path / "list.txt"
    file.write_text("\n".join(line[form].format(*pair) for pair in ((2, 1), (1, 0), (2, 1))) + "\n\n")
    part = select(source, file, "--train-list")
    assert [part.name(i) for i in range(len(part))] == ["n1/n1_0.JPEG", "n2/n2_1.JPEG"], "in the set's own order"
    assert [part.image(i) for i in range(2)] == [b"10", b"21"]
    assert part.require_labels("--train").tolist() == [0, 1]
    assert part.classes == ("n1", "n2")
    copy = pickle.loads(pickle.dumps(part))
    assert copy[1] == part[1] and copy.fingerprint == part.fingerprint != source.fingerprint


def test_select_from_shards_with_masks(tmp_path: Path) -> None:
    mask = encoded(picture(0)[..., 0], "PNG")
    write_tar(tmp_path / "a.tar", [("x.jpg", b"1"), ("x.mask.png", mask), ("y.jpg", b"2"), ("z.jpg", b"3")])
    (tmp_path / "list").write_text("z.jpg\nx.jpg\n")
    part = open_dataset(str(tmp_path / "a.tar"), where="--train", split="train", names=str(tmp_path / "list"))
    assert [part[i].mask for i in range(2)] == [mask, None]
    with pytest.raises(UserError, match=r"1 of 2 .*a.tar/z.jpg"):
        part.require_masks("--train")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\n \n", r"--train-list: .*lists no images"),
        ("n1_0.JPEG\nn1_9.JPEG\nn2/n1_1.JPEG\n", r"2 lines .*line 2: n1_9.JPEG"),
        ("same.png\n", r"line 1: same.png .*n1/same.png and n2/same.png"),
    ],
)
def test_select_refuses_lists_that_do_not_fit(tmp_path: Path, text: str, words: str) -> None:
    root = write_tree(tmp_path / "train", {**FILES, "n1/same.png": b"", "n2/same.png": b""})
    (tmp_path / "list").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        open_dataset(str(root), where="--train", split="train", names=str(tmp_path / "list"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"nothing"):
        open_dataset(str(root), where="--train", split="train", names=str(tmp_path / "nothing"))
