"""The whole test suite under several versions of torch and Python, each in its own virtual environment.

    python benchmarks/matrix.py --environments FOLDER [--combination TORCH,TORCHVISION,PYTHON ...]

Each environment has the pins of constraints.txt, except those of torch and torchvision; an existing one is used again.
PYTHON is an executable. Without --combination, all of DEFAULTS are tested. After each combination its results are
written to benchmarks/results/matrix.json, next to those of other combinations, each with its commit, and to
docs/compatibility.md. The exit code is 1 if a test failed or the suite did not finish.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click

from ijepa.utils.environment import commit
from ijepa.utils.files import read_json, write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/matrix.json"
PAGE = ROOT / "docs/compatibility.md"

MACHINE = """
import json, platform, torch
from importlib.metadata import version
from pathlib import Path
file = Path("/proc/cpuinfo")
lines = file.read_text().splitlines() if file.exists() else []
info = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
flags = [f for f in ("avx512_bf16", "avx512_fp16", "amx_bf16") if f in info.get("flags", "").split()]
print(json.dumps({
    "versions": {"python": platform.python_version(), "torch": torch.__version__}
    | {name: version(name) for name in ("torchvision", "torchao", "numpy")},
    "cpu": info.get("model name") or platform.processor() or platform.machine(),
    "instruction_sets": " ".join([torch.backends.cpu.get_cpu_capability(), *flags]),
    "cuda_build": torch.version.cuda,
    "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
}))
"""
"""Program that prints the versions and the machine, for the Python of an environment."""


@dataclass(frozen=True)
class Combination:
    """Versions that are tested together, and the Python executable for which they are installed."""

    torch: str
    torchvision: str
    python: str

    @classmethod
    def parse(cls, text: str) -> "Combination":
        """Read TORCH,TORCHVISION,PYTHON."""
        parts = text.split(",")
        if len(parts) != 3 or not all(parts):
            raise click.BadParameter(f"{text} is not of the form TORCH,TORCHVISION,PYTHON")
        return cls(*parts)

    def name(self) -> str:
        """Return the name of its virtual environment, by the versions of torch and Python.

        Raises:
            click.UsageError: PYTHON does not start.
        """
        ask = [self.python, "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"]
        try:
            version = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            raise click.UsageError(f"{self.python} does not start; give the executable with --combination") from None
        return f"torch-{self.torch}-python-{version}"


DEFAULTS = (
    Combination("2.13.0", "0.28.0", "python3.11"),
    Combination("2.14.1", "0.29.1", "python3.11"),
    Combination("2.11.0", "0.26.0", "python3.12"),
    Combination("2.14.1", "0.29.1", "python3.13"),
)


def make_environment(combination: Combination, folder: Path) -> Path:
    """Install a combination, or what is missing of it, into `folder`, and return its Python."""
    python = folder / "bin/python"
    if not python.exists():
        subprocess.run([combination.python, "-m", "venv", str(folder)], check=True)
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    others = [line for line in pins if not line.startswith(("torch==", "torchvision=="))]
    ours = [f"torch=={combination.torch}", f"torchvision=={combination.torchvision}"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join([*others, *ours]) + "\n")
        constraints.flush()
        pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
        install = [*pip, "install", "--quiet", "-c", constraints.name]
        subprocess.run([*install, ours[0]], check=True)
        subprocess.run([*install, "-e", f"{ROOT}[dev]"], check=True)
    return python


def test(python: Path, arguments: Iterable[str]) -> dict[str, Any]:
    """Run the suite with the Python of an environment; return the machine and the outcome of each test."""
    environment = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    told = subprocess.run([str(python), "-c", MACHINE], check=True, capture_output=True, text=True, env=environment)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
        begun = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, env=environment)
        seconds = time.monotonic() - begun
        outcome = read_report(report.read_text()) if report.exists() else None
    if outcome is None:
        outcome = {"passed": 0, "failed": {"the suite": f"ended with code {done.returncode}, no report"}, "skipped": {}}
    elif done.returncode not in (0, 1):
        outcome["failed"]["the suite"] = f"ended with code {done.returncode}"
    return {**json.loads(told.stdout), **outcome, "seconds": round(seconds)}


def read_report(xml: str) -> dict[str, Any]:
    """Read pytest's JUnit XML: how many tests passed, and the failed and skipped ones by name, each with its reason."""
    found: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}}
    for case in ElementTree.fromstring(xml).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        ends = {end.tag: " ".join((end.get("message") or "").split()) for end in case}
        wrong = ends.get("failure", ends.get("error"))
        if wrong is not None:
            found["failed"][name] = wrong
        elif "skipped" in ends:
            found["skipped"][name] = ends["skipped"]
        elif name not in found["failed"]:
            found["passed"] += 1
    return found


COLUMNS = (
    *("Python", "torch", "torchvision", "torchao", "NumPy", "CUDA build", "device"),
    *("passed", "failed", "skipped", "minutes", "commit"),
)


def page(results: dict[str, Any]) -> str:
    """Return docs/compatibility.md for the results."""
    lines = [
        "# Compatibility",
        "",
        "The whole test suite, slow tests included, under several versions of torch and Python (`make matrix`,",
        "[matrix.json](../benchmarks/results/matrix.json)). A CUDA build without a device runs on the CPU.",
        "",
        _row(COLUMNS),
        _row(["---"] * len(COLUMNS)),
    ]
    for run in results["runs"].values():
        cells = [run["versions"][name] for name in ("python", "torch", "torchvision", "torchao", "numpy")]
        cells += [run["cuda_build"] or "no", ", ".join(run["devices"]) or "no", run["passed"]]
        cells += [len(run["failed"]), len(run["skipped"]), round(run["seconds"] / 60)]
        cells.append((run["commit"] or "unknown")[:10])
        lines.append(_row(cells))
    machines = sorted({f"{run['cpu']} ({run['instruction_sets']})" for run in results["runs"].values()})
    lines += ["", f"Measured on: {'; '.join(machines)}."]
    for title, key in (("Failed", "failed"), ("Skipped", "skipped")):
        lines += ["", f"## {title} tests"]
        for run in results["runs"].values():
            versions = run["versions"]
            lines += ["", f"Python {versions['python']}, torch {versions['torch']}:", ""]
            lines += [f"- `{name}`: {_short(reason)}" for name, reason in run[key].items()] or ["- none"]
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[object]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def _short(reason: str, most: int = 200) -> str:
    """A reason as one line of Markdown."""
    text = reason.replace(str(ROOT), ".").replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= most else text[:most] + " ..."


@click.command()
@click.option(
    "--environments",
    type=click.Path(path_type=Path),
    default=ROOT / ".cache/environments",
    help="Where the virtual environments are, or are to be; 6 GB for each CUDA build of torch.",
)
@click.option("--combination", "texts", multiple=True, metavar="TORCH,TORCHVISION,PYTHON", help="Test these only.")
@click.option("--prepare", is_flag=True, help="Only make the environments.")
@click.argument("arguments", nargs=-1)
def main(environments: Path, texts: tuple[str, ...], prepare: bool, arguments: tuple[str, ...]) -> None:
    """Test combinations and write results and page. With ARGUMENTS for pytest, after --, nothing is written."""
    combinations = {each.name(): each for each in [Combination.parse(text) for text in texts] or DEFAULTS}
    earlier = read_json(RESULTS) if RESULTS.exists() else {}
    runs: dict[str, Any] = earlier.get("runs", {})
    for name, each in combinations.items():
        click.echo(f"{name}, torchvision {each.torchvision}")
        python = make_environment(each, (environments / name).absolute())
        if prepare:
            continue
        runs[name] = {"commit": commit(), **test(python, arguments)}
        results = {"runs": dict(sorted(runs.items()))}
        if arguments:
            click.echo(page(results))
        else:
            write_json(RESULTS, results)
            write_text(PAGE, page(results))
    sys.exit(not prepare and any(runs[name]["failed"] for name in combinations))


if __name__ == "__main__":
    main()
