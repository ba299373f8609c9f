"""The two kinds of deliberate errors of a command, and warnings, each as one line for the user.

`UserError` is bad input, found before anything was written: exit code 2. `RunError` is a failure while running, such as
a full disk or too many unreadable images: exit code 1. Every other exception is a bug in ijepa: also one line and exit
code 1, and `--debug` shows its traceback. `Notice` is a warning: the command continues.
"""

from collections.abc import Iterable
from difflib import get_close_matches

from ijepa.utils.names import printable


class RunError(Exception):
    """A failure while running; `str()` is one printable line. Exit code 1."""

    exit_code = 1

    def __init__(self, line: str) -> None:
        super().__init__(printable(line))


class UserError(RunError):
    """Bad input; `str()` is one line of the form `where: problem; hint`. Exit code 2.

    Attributes:
        where: the file, key or flag with the error.
        problem: what is wrong with its value.
        hint: what to do about it; may be empty.
    """

    exit_code = 2

    def __init__(self, where: object, problem: str, hint: str = "") -> None:
        self.where, self.problem, self.hint = map(printable, (str(where), problem, hint))
        line = f"{where}: {problem}" + (f"; {hint}" if hint else "")
        super().__init__(" ".join(line.split()))

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, str, str]]:
        """Pickle the three parts, not the line: errors are sent between processes."""
        return type(self), (self.where, self.problem, self.hint)


class Notice(UserWarning):
    """A warning about a result; `str()` is one line. The command line prints it once."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `did you mean X?` with the closest known word, or a list of all known words if none is close."""
    known = list(known)
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else "known: " + ", ".join(known)
