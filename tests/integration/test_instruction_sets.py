"""Results that must be identical to the bit are identical on other CPUs, too.

ATen, oneDNN and MKL choose kernels by the CPU, and each has an environment variable that selects the kernels of other
CPUs. Bits are compared within one setting only, because they differ between settings.
"""

import os
import platform
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.runs import bytes_of, recipe

SETTINGS = {
    "": "ATen",
    "ATEN_CPU_CAPABILITY=default": "ATen DEFAULT",
    "ATEN_CPU_CAPABILITY=avx2": "ATen AVX2",
    "ONEDNN_MAX_CPU_ISA=AVX2": "isa:Intel AVX2",
    "MKL_CBWR=COMPATIBLE": "CNR:COMPATIBLE",
}
"""Settings, and the text with which the libraries confirm them; the first one is this CPU without a setting."""

EXACT = (
    "tests/integration/test_alignment.py",
    "tests/unit/training/test_loop.py::test_pretrain_is_identical_for_any_workers_and_log_interval",
    "tests/unit/training/test_resume.py::test_resume_after_a_crash_is_identical",
    "tests/unit/training/test_resume.py::test_resume_after_sigkill_is_identical",
    "tests/unit/interop/test_weights.py::test_features_do_not_depend_on_the_alignment_of_weights_in_their_file",
    "tests/unit/evaluation/segmentation/test_tokencut.py",
)
"""Tests that compare bits, or results that rounding must not change."""


@pytest.fixture(params=SETTINGS, ids=lambda setting: setting or "native")
def environment(request: pytest.FixtureRequest) -> dict[str, str]:
    """Return the environment of a process with one setting."""
    names = {setting.partition("=")[0] for setting in SETTINGS}
    name, _, value = request.param.partition("=")
    return {key: held for key, held in os.environ.items() if key not in names} | ({name: value} if name else {})


def run(environment: dict[str, str], *arguments: object) -> None:
    command = [sys.executable, "-m", *map(str, arguments)]
    found = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("autocast", "counts"), [("none", (0, 1, 3)), ("bf16", (0, 3))])
def test_workers_change_no_bit_on_other_instruction_sets(scenes, tmp_path, environment, autocast, counts):
    file, found = tmp_path / "recipe.yaml", []
    file.write_text(recipe(scenes, precision__autocast=autocast).dump())
    for workers in counts:
        output = tmp_path / f"workers-{workers}"
        run(environment, "ijepa", "pretrain", file, "--data.workers", workers, "--output", output)
        found.append(bytes_of(output))
    assert all(each == found[0] for each in found)


@pytest.mark.slow
def test_exact_tests_pass_on_other_instruction_sets(environment):
    run(environment, "pytest", "-m", "", "-p", "no:cacheprovider", *EXACT)  # including slow tests


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="these are settings for x86 CPUs")
def test_instruction_set_settings_take_effect(environment, request):
    """Otherwise the tests above would prove nothing about other CPUs."""
    code = (
        "import torch; print('ATen', torch.backends.cpu.get_cpu_capability());"
        "x = torch.ones(64, 64); x @ x; x = x.to_mkldnn(); x.relu()"
    )
    verbose = {"ONEDNN_VERBOSE": "1", "MKL_VERBOSE": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment | verbose, capture_output=True, text=True)
    assert SETTINGS[request.node.callspec.params["environment"]] in found.stdout
