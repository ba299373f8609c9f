"""`python -m ijepa` and the `ijepa` command: run it, and end with one line and an exit code when it fails."""

import os
import sys
from io import TextIOWrapper

import click

from ijepa.errors import Failed


def main() -> None:
    """Run the command line; 0 done, 1 failed in running, 2 refused, 130/143 stopped by a signal."""
    from ijepa.cli import cli

    if isinstance(sys.stdout, TextIOWrapper):  # a character that the terminal does not know must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = cli.main(standalone_mode=False)
    except Failed as error:
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
    except BrokenPipeError:
        sys.stderr.close()
        code = 1
    except Exception as error:  # a defect of ours, or a machine that gave out: still one line
        if "--debug" in sys.argv:
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())
        _complain(f"{what}; run again with --debug for the traceback, and please report it")
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _complain(line: str) -> None:
    """Say one line; of several ranks that would say it only one does."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        from ijepa.training.watch import first_to_say

        if not first_to_say(line):
            return
    print(f"ijepa: {line}", file=sys.stderr)


if __name__ == "__main__":
    main()
