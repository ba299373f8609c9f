"""The two ways a command ends badly on purpose, and what it warns of, each as one line for the person who typed it.

`UserError` is bad input, found before anything was written: exit code 2. `RunError` is something that went wrong
in running (a full disk, too many unreadable images): exit code 1. Everything else is a defect of ours:
one line too, exit code 1, and `--debug` shows its traceback. `Notice` is a warning: the command goes on.
"""

from collections.abc import Iterable
from difflib import get_close_matches

from ijepa.utils.names import printable


class RunError(Exception):
    """Something went wrong in running; `str()` is one printable line. Exit code 1."""

    exit_code = 1

    def __init__(self, line: str) -> None:
        super().__init__(printable(line))


class UserError(RunError):
    """Bad input; `str()` is one line of the form `where: problem; hint`. Exit code 2.

    `where` names the file, key or flag at fault, `problem` says what is wrong with its value, and `hint`
    what to do about it.
    """

    exit_code = 2

    def __init__(self, where: object, problem: str, hint: str = "") -> None:
        self.where, self.problem, self.hint = map(printable, (str(where), problem, hint))
        line = f"{where}: {problem}" + (f"; {hint}" if hint else "")
        super().__init__(" ".join(line.split()))

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, str, str]]:
        """Rebuild from the three parts, not from the line: errors cross process borders."""
        return type(self), (self.where, self.problem, self.hint)


class Notice(UserWarning):
    """Something that the user should know about a result; `str()` is one line. The command line prints it once."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `did you mean X?` for the closest known word, or the whole list where none is close."""
    known = list(known)
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else "known: " + ", ".join(known)
