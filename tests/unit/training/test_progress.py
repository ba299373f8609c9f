"""What a run shows."""

import logging

import pytest

from ijepa.cli.log import log_to_terminal
from ijepa.training.progress import describe, open_display

ROW = {"step": 3, "loss": 0.5, "skill": None, "grad_norm": 1.25, "lr_encoder": 6e-4}
TIMING = {"images_per_second": 120.4, "tflops": 0.5, "memory": 2**30, "data_wait": 0.02}


def test_describe_shows_missing_values_as_a_dash():
    assert describe(ROW, TIMING, 8, 65).split("  ") == [
        "step 3/8",
        "loss 0.5000",
        "skill -",
        "grad 1.25",
        "lr 6.00e-04",
        "120 img/s",
        "0.50 TFLOP/s",
        "1.0 GiB",
        "data 2%",
        "left 1m 5s",
    ]


@pytest.mark.parametrize(("rank", "shown"), [(0, "100 % done\n"), (2, "rank 2: 100 % done\n")])
def test_open_display_shows_messages_once(capsys, rank, shown):
    logger = logging.getLogger("ijepa.training.some_module")
    with log_to_terminal():  # the command line has a handler too
        display = open_display(rank, total=8, start=0)
        logger.info("100 % done")
        display.close()
    logger.info("not shown")
    assert capsys.readouterr().out == shown
    assert logging.getLogger("ijepa.training").propagate
