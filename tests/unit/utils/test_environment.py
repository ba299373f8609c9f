import json
import platform
from pathlib import Path

import pytest
import torch

from ijepa.utils import environment


def test_commit_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs and evaluations also work if git is not installed."""
    (tmp_path / ".git").mkdir()
    (tmp_path / "src/ijepa").mkdir(parents=True)
    (tmp_path / "none").mkdir()
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "src/ijepa/utils/environment.py"))
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert environment.commit() is None


def test_machine_names_the_cpu() -> None:
    """By its model, not only by its architecture."""
    found = environment.machine()
    assert json.loads(json.dumps(found)) == found
    cpu = found["cpu"]
    assert cpu["name"] and cpu["name"] != platform.machine()
    assert found["devices"][0].startswith(cpu["name"]) or torch.cuda.is_available()
    assert cpu["torch"] == torch.backends.cpu.get_cpu_capability()
    if cpu["torch"] == "AVX512":
        assert {"avx2", "avx512_f"} <= set(cpu["instructions"])


def test_gemm_rates_are_measured_once_and_without_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rates = environment.cpu()["gemm"]
    assert set(rates) == {"float32", "bfloat16"} and min(rates.values()) > 0
    monkeypatch.setattr(environment, "_product_seconds", lambda dtype: pytest.fail("measured again"))
    assert environment.cpu()["gemm"] == rates
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "gemm" not in environment.cpu()


@pytest.mark.parametrize("ratio", [4.0, 0.5])
def test_measured_rates_are_the_best_of_several_rounds(ratio: float) -> None:
    """The first product of a dtype, which compiles, is left out, and a disturbed one does not matter."""
    seconds = [9e-3, 1e-3, 1e-3, 5e-3, 1e-3]
    left = {torch.float32: seconds, torch.bfloat16: [1e-6, *(each / ratio for each in (7e-3, 1e-3, 1e-3, 1e-3))]}
    assert environment.measured_rates(lambda dtype: left[dtype].pop(0)) == {
        "float32": 1208.0,
        "bfloat16": round(1207.96 * ratio, 1),
    }
    assert not any(left.values())


def test_measured_rates_of_a_slow_cpu_take_one_round() -> None:
    left = {torch.float32: [0.01, 0.01], torch.bfloat16: [0.5, 0.4]}
    assert environment.measured_rates(lambda dtype: left[dtype].pop(0)) == {"float32": 120.8, "bfloat16": 3.0}


INFO = "processor\t: 0\nmodel name\t: AMD EPYC\ncpu family\t: 26\nmodel\t\t: 2\n\nprocessor\t: 1\nmodel name\t: other\n"


@pytest.mark.parametrize(
    ("by_torch", "info", "name"),
    [
        ("AMD EPYC 9575F", INFO, "AMD EPYC 9575F (family 26, model 2)"),
        (None, INFO, "AMD EPYC (family 26, model 2)"),
        ("Neoverse-V2", "processor\t: 0\nCPU part\t: 0xd4f\n", "Neoverse-V2"),
        ("Apple M4", None, "Apple M4"),
        (None, None, platform.processor() or platform.machine()),
    ],
)
def test_cpu_name(by_torch: str | None, info: str | None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`info` is the content of /proc/cpuinfo on Linux; None on other systems."""

    def read(path: Path, **more: str) -> str:
        if info is None:
            raise FileNotFoundError(path)
        return info

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": by_torch, "avx2": True, "sse2": True})
    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(environment.sys, "platform", "linux" if info else "other")
    assert environment.cpu()["name"] == name
    assert environment.cpu()["instructions"] == ["avx2"]
