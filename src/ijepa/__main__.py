"""`python -m ijepa` and the `ijepa` command: an error ends it with one line and an exit code."""

import os
import sys
import warnings
from contextlib import redirect_stdout, suppress
from io import TextIOWrapper
from typing import TextIO

import click

from ijepa.utils.errors import Notice, RunError
from ijepa.utils.output import Output, OutputLost


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed while running, 2 bad input, 130/143 stopped by a signal."""
    from ijepa.cli import cli

    warnings.showwarning = _show_warning
    if isinstance(sys.stdout, TextIOWrapper):  # a character that the terminal cannot show must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    output = Output(sys.stdout, raises=True)
    try:
        with redirect_stdout(output):
            code = cli.main(prog_name="ijepa", standalone_mode=False)
        output.finish()
    except RunError as error:
        if "--debug" in sys.argv:
            raise
        _complain(str(error))
        code = error.exit_code
    except click.UsageError as error:
        known = f"; see `{error.ctx.command_path} --help`" if error.ctx else ""
        _complain(" ".join(error.format_message().rstrip(".").split()) + known)
        code = 2
    except (click.Abort, KeyboardInterrupt):
        _complain("interrupted")
        code = 130
    except Exception as error:  # a bug, or a failure of the machine: also one line
        if "--debug" in sys.argv:
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())
        _complain(f"{what}; run again with --debug for the traceback, and please report it")
        code = 1
    with suppress(OutputLost):  # the error that was printed came first
        output.flush()
    sys.exit(code if isinstance(code, int) else 0)


_python_shows = warnings.showwarning


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a notice as one line, on the first rank only; show other warnings as Python does."""
    if not issubclass(category, Notice):
        _python_shows(message, category, filename, lineno, file, line)
    elif os.environ.get("RANK", "0") == "0":
        print(f"ijepa: {message}", file=sys.stderr)


def _complain(line: str) -> None:
    """Print one line on the error stream; if several ranks would print it, only one does."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        from ijepa.distributed.watchdog import first_to_print

        if not first_to_print(line):
            return
    print(f"ijepa: {line}", file=Output(sys.stderr), flush=True)


if __name__ == "__main__":
    main()
