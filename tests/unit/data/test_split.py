import pytest

from ijepa.data.split import Split, choose_split
from ijepa.utils.errors import UserError


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", Split.TRAIN),
        ("training", Split.TRAIN),
        ("train-0000.tar", Split.TRAIN),
        ("train2017", Split.TRAIN),
        ("val", Split.VAL),
        ("valid", Split.VAL),
        ("validation-00000-of-00001.parquet", Split.VAL),
        ("test_batch", Split.TEST),
        ("testing", Split.TEST),
        ("trainee", None),
        ("valley", None),
        ("images", None),
        ("", None),
        (None, None),
    ],
)
def test_split_of(name: str | None, split: Split | None) -> None:
    assert Split.of(name) is split


def test_choose_split() -> None:
    both = [Split.TRAIN, Split.VAL]
    assert choose_split("set", both, "--x", "validation", "hint") is Split.VAL
    assert choose_split("set", [Split.TEST], "--x", None, "hint") is Split.TEST
    for wanted, word in ((None, "several"), ("test", "no split test"), ("other", "no split other")):
        with pytest.raises(UserError, match=word) as error:
            choose_split("set", both, "--x", wanted, "hint")
        assert error.value.where == "--x"
