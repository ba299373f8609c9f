"""The splits of a data set, and the names that data sets give them."""

import re
from collections.abc import Sequence
from enum import StrEnum

from ijepa.utils.errors import UserError


class Split(StrEnum):
    """A part of a data set."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"

    @property
    def aliases(self) -> tuple[str, ...]:
        """The names of folders and files for this split."""
        return _ALIASES[self]

    @classmethod
    def of(cls, name: str | None) -> "Split | None":
        """Return the split that a name begins with (`train-0000.tar`, `val2017`), or None: `trainee` names no split."""
        match = _PREFIX.match(name or "")
        return None if match is None else next(split for split in cls if match[1] in split.aliases)


_ALIASES = {
    Split.TRAIN: ("train", "training"),
    Split.VAL: ("val", "valid", "validation"),
    Split.TEST: ("test", "testing"),
}
_PREFIX = re.compile(f"({'|'.join(alias for aliases in _ALIASES.values() for alias in aliases)})(?![A-Za-z])")


def choose_split(root: object, present: Sequence[Split], where: str, wanted: str | None, hint: str) -> Split:
    """Return the split to read: the wanted one, or the only one.

    Args:
        root: the data set, for the error.
        present: the splits that it has, at least one.
        where: the key or flag of the data set, for the error.
        wanted: a name of a split, or None if the user gave none.
        hint: how to choose one.

    Raises:
        UserError: the wanted split is not present, or several are and none is wanted.
    """
    if wanted is not None:
        split = Split.of(wanted)
        if split is None or split not in present:
            raise UserError(where, f"{root} has no split {wanted}, only {', '.join(present)}")
        return split
    if len(present) > 1:
        raise UserError(where, f"{root} contains several splits: {', '.join(present)}", hint)
    return present[0]
