from typing import Literal

import pytest

from ijepa.utils.config import BaseConfig, Decays, Ratios, Shares, config_class
from ijepa.utils.errors import UserError


class Group(BaseConfig):
    rate: float = 0.5
    """Some rate."""
    kind: Literal["red", "green"] = "red"
    """Some kind."""


class Settings(BaseConfig):
    count: int
    """Some count."""
    scale: Shares = (0.1, 0.2)
    """Some shares."""
    ratio: Ratios = (0.5, 2.0)
    """Some ratios."""
    decays: Decays = (0.9, 0.95)
    """Some decays."""
    group: Group = Group()
    other: Group | None = None


@pytest.mark.parametrize(
    ("values", "where", "word"),
    [
        ({}, "count", "missing"),
        ({"count": 1, "cuont": 2}, "cuont", "count?"),
        ({"count": "many"}, "count = 'many'", "a whole number"),
        ({"count": 1, "group": {"kind": "gren"}}, "group.kind = 'gren'", "green?"),
        ({"count": 1, "group": {"rat": 1}}, "group.rat", "rate?"),
        ({"count": 1, "other": {"rate": "nan"}}, "other.rate = 'nan'", "a number"),
        ({"count": 1, "scale": ".2,.1"}, "scale = '.2,.1'", "above"),
        ({"count": 1, "scale": "0"}, "scale = '0'", "more than 0"),
        ({"count": 1, "decays": ".9"}, "decays = '.9'", "two numbers"),
        ({"count": 1, "decays": ".9,1"}, "decays = '1'", "less than 1"),
    ],
)
def test_read_names_the_key_and_a_hint(values, where, word):
    with pytest.raises(UserError) as err:
        Settings.read(values, "file")
    assert err.value.where == f"file: {where}"
    assert word in f"{err.value.problem}; {err.value.hint}"


def test_read_accepts_every_notation_of_a_pair():
    for text in (".5,.8", "[.5, .8]", ".5 .8", [0.5, 0.8]):
        found = Settings.read({"count": 1, "scale": text, "ratio": text, "decays": text}, "file")
        assert found.scale == found.ratio == found.decays == (0.5, 0.8)
    assert Settings.read({"count": 1, "scale": 0.3}, "file").scale == (0.3, 0.3)
    assert Settings.read({"count": 1, "decays": ".9,0"}, "file").decays == (0.9, 0)


def test_read_adds_the_source_to_an_error_of_a_validator():
    class Checked(Settings):
        def model_post_init(self, context):
            raise UserError("count", "is odd", "give an even count")

    with pytest.raises(UserError) as err:
        Checked.read({"count": 1}, "file")
    assert (err.value.where, err.value.hint) == ("file: count", "give an even count")


def test_iter_fields_gives_dotted_keys_with_help_and_default():
    found = {key: (text, default) for key, _, text, default in Settings.iter_fields()}
    assert list(found) == [
        *("count", "scale", "ratio", "decays"),
        *("group.rate", "group.kind", "other.rate", "other.kind"),
    ]
    assert found["group.rate"] == ("Some rate.", 0.5)


def test_config_class_of_an_annotation():
    assert config_class(Group) is config_class(Group | None) is Group
    assert config_class(int | None) is None
