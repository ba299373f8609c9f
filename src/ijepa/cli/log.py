"""Shows the package's log on the terminal: below the command line, modules log instead of printing."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import click


class _Lines(logging.Handler):
    """Prints each message as a line: up to INFO on standard output, warnings and errors on the error stream."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record. An error in printing is raised, as with `print`."""
        click.echo(record.getMessage(), err=record.levelno > logging.INFO)


@contextmanager
def log_to_terminal() -> Iterator[None]:
    """Show the messages of the logger "ijepa" and of the loggers below it as plain lines."""
    logger, handler = logging.getLogger("ijepa"), _Lines()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a library may have given the root logger a handler, which would print a second time
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
