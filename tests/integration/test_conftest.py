"""The shared set-up of the tests leaves the libraries that it prepares for as they are."""

import os
import subprocess
import sys

from tests.helpers.paths import ROOT

TORCHVISION = """
import torch
operators = torch.library.Library("torchvision", "DEF")
operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def test_a_torchvision_that_loads_keeps_its_operators(tmp_path):
    """torchvision registers its operators when it is imported; a name that exists already would end the process."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text(TORCHVISION)
    check = "import tests.conftest, torchvision; print(torchvision.operators.ns)"
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "src")])
    done = subprocess.run(
        [sys.executable, "-c", check], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "torchvision\n"), done.stderr
