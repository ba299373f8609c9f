import logging

from ijepa.cli.log import log_to_terminal


def test_log_to_terminal_splits_lines_by_level(capsys):
    logger = logging.getLogger("ijepa.some.module")
    with log_to_terminal():
        logger.info("12 images at 100 % of the speed")
        logger.warning("loss is rising")
        logger.debug("not shown")
    logger.info("not shown")
    found = capsys.readouterr()
    assert (found.out, found.err) == ("12 images at 100 % of the speed\n", "loss is rising\n")
    assert logging.getLogger("ijepa").propagate
