"""Standard output that may end before the command: a full disk, or a pipe whose reader has ended."""

import errno
import os
from contextlib import suppress
from typing import Any, TextIO

from ijepa.utils.errors import RunError


class OutputLost(RunError):
    """Standard output can no longer be written. `number` is the errno."""

    def __init__(self, number: int) -> None:
        super().__init__(f"standard output cannot be written: {os.strerror(number)}")
        self.number = number


class Output:
    """A text stream that writes everything until a write fails, and drops everything after that.

    Attributes:
        lost: the errno of the failed write; 0 before.
    """

    def __init__(self, stream: TextIO | None, *, raises: bool = False) -> None:
        """Write to `stream`, or nowhere if it is None. With `raises`, the failing write raises `OutputLost`."""
        self._stream: Any = stream if stream is not None else open(os.devnull, "w")  # noqa: SIM115, PTH123
        self._raises, self.lost = raises, 0

    def write(self, text: str) -> int:
        """Write, as a text stream does."""
        if not self.lost:
            try:
                self._stream.write(text)
            except (OSError, OutputLost) as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Flush, as a text stream does."""
        if not self.lost:
            try:
                self._stream.flush()
            except (OSError, OutputLost) as error:
                self._lose(error)

    def finish(self) -> None:
        """Flush.

        Raises:
            OutputLost: this or an earlier write failed.
        """
        self.flush()
        if self.lost:
            raise OutputLost(self.lost)

    def __getattr__(self, name: str) -> Any:
        """Delegate everything else to the stream."""
        return getattr(self._stream, name)

    def _lose(self, error: OSError | OutputLost) -> None:
        self.lost = error.number if isinstance(error, OutputLost) else error.errno or errno.EIO
        # The rest of the stream's buffer would fail again when Python exits, which would change the exit code.
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        if self._raises:
            raise OutputLost(self.lost) from None
