"""Everything that needs a GPU to be measured or checked: `python benchmarks/gpu/run.py --output FILE`.

Ten minutes on one H200 with torch 2.11 or later. Every part runs in its own process, which is killed when its time is
over: an error of the device, which no later call in the same process survives, or a kernel that hangs affects only that
part. The file is written after every part. For a part that fails, it has the first line of the error and the results
until then. `--device cpu --tiny` runs every part that a CPU can run, with small sizes.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ceilings import ceilings
from correctness import correctness
from original import original
from step import Choice, measure

from ijepa.utils.environment import machine
from ijepa.utils.files import read_json, write_json

CHOICES = {
    "fp8 compiled": Choice(fp8="tensorwise", compile=True),
    "bf16 compiled": Choice(compile=True),
    "bf16": Choice(),
    "fp8": Choice(fp8="tensorwise"),
    "fp8 compiled, bf16 weight gradients": Choice(fp8="tensorwise", weight_gradient="bf16", compile=True),
    "fp8 rowwise compiled": Choice(fp8="rowwise", compile=True),
    "fp8 compiled, selective": Choice(fp8="tensorwise", compile=True, activation_checkpointing="selective"),
    "bf16 compiled, cudnn": Choice(compile=True, attention="cudnn"),
    "bf16 compiled, efficient": Choice(compile=True, attention="efficient"),
    "bf16 compiled, math": Choice(compile=True, attention="math"),
}
"""Most wanted first: what does not fit into the time is left out at the end."""
ON_A_CPU = ("fp8 compiled", "bf16", "fp8", "bf16 compiled, math")
EXACT = {
    "float32 padded": Choice(autocast=False),
    "float32 compiled": Choice(autocast=False, compile=True, attention="math"),
    "float32 math": Choice(autocast=False, attention="math"),
    "float32 recomputed": Choice(autocast=False, activation_checkpointing="full"),
}


PART_SECONDS = 180.0
"""No part runs longer; what is left of the whole command's minutes may be less."""

Keep = Callable[[dict[str, Any]], None]
"""Writes what a part has found so far."""


def parts_of(arguments: argparse.Namespace, keep: Keep) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every part by name, in order."""
    device = torch.device(arguments.device)
    tiny = arguments.tiny
    images, steps = arguments.images or (4 if tiny else 256), 2 if tiny else 6
    choices = CHOICES
    if device.type == "cpu":
        # The buckets of a CPU have another shape at every step, so a compiled block attends by plain products.
        choices = {
            name: replace(choice, attention="math" if choice.compile else "auto")
            for name, choice in CHOICES.items()
            if name in ON_A_CPU
        }
    found: dict[str, Callable[[], Any]] = {"ceilings": lambda: ceilings(device, tiny=tiny)}
    first = list(choices)[:3]

    def step(name: str) -> Callable[[], Any]:
        return lambda: measure(choices[name], device, images=images, steps=steps, tiny=tiny)

    found |= {f"step: {name}": step(name) for name in first}
    if arguments.official:
        for name, equal in (("original: equal tokens", True), ("original: its own settings", False)):
            found[name] = lambda equal=equal: original(  # type: ignore[misc]
                arguments.official, device, equal=equal, images=images, steps=steps, tiny=tiny
            )
    found["correctness"] = lambda: correctness({**EXACT, **choices}, device, tiny=tiny, keep=keep)
    found |= {f"step: {name}": step(name) for name in choices if name not in first}
    return found


def run_here(name: str, arguments: argparse.Namespace) -> None:
    """Run one part in this process and write what it found, or its error, into the output file."""

    def keep(found: dict[str, Any]) -> None:
        write_json(arguments.output, found)

    try:
        outcome = parts_of(arguments, keep)[name]()
    except Exception as error:
        outcome = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    keep(outcome)


def run_beside(name: str, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run one part in its own process for at most `seconds`, and return its results."""
    file = arguments.output.with_name(f".{arguments.output.name}.part")
    file.unlink(missing_ok=True)
    command = [sys.executable, __file__, *sys.argv[1:], "--part", name, "--output", str(file)]
    child = subprocess.Popen(command, start_new_session=True)  # its own group, so that compilers end with it
    try:
        code = child.wait(seconds)
        trouble = {"error": f"its process ended with {code}"} if code else {}
    except subprocess.TimeoutExpired:
        trouble = {"error": f"killed after {seconds:.0f} seconds"}
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    found = read_json(file) if file.exists() else {}
    file.unlink(missing_ok=True)
    return {**found, **trouble}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the JSON file")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a small model and few images, to exercise every part")
    parser.add_argument("--official", type=Path, help="a checkout of the original code, to be measured too")
    parser.add_argument("--only", action="append", help="parts whose names start so; may be given several times")
    parser.add_argument("--images", type=int, help="images a step; 256, or 4 with --tiny")
    parser.add_argument("--minutes", type=float, default=9.5, help="all parts' time")
    parser.add_argument("--part", help="run this part alone and write nothing else")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --tiny exercises the command")
    if arguments.official and not (arguments.official / "src" / "models" / "vision_transformer.py").is_file():
        parser.error(f"--official {arguments.official}: holds no src/models/vision_transformer.py; give the checkout")
    if arguments.part:
        run_here(arguments.part, arguments)
        return 0
    result: dict[str, Any] = {**machine(), "device": arguments.device, "tiny": arguments.tiny, "parts": {}, "took": {}}
    begun = time.perf_counter()
    for name in parts_of(arguments, lambda found: None):
        if arguments.only and not any(name.startswith(each) for each in arguments.only):
            continue
        start = time.perf_counter()
        left = begun + 60 * arguments.minutes - start
        if left > 0:
            outcome = run_beside(name, arguments, min(left, PART_SECONDS))
        else:
            outcome = {"left out": f"{arguments.minutes} minutes had passed"}
        result["parts"][name] = outcome
        result["took"][name] = time.perf_counter() - start
        write_json(arguments.output, result)
        print(f"{name}: {describe(outcome)}", flush=True)
    return 0


def describe(outcome: dict[str, Any]) -> str:
    if "images_per_second" in outcome:
        share = outcome.get("share_of_bf16_peak")
        return f"{outcome['images_per_second']:.0f} images/s" + (f", {100 * share:.0f} % of peak" if share else "")
    return next((f"{key}: {value}" for key, value in outcome.items() if key in ("error", "left out")), "done")


if __name__ == "__main__":
    raise SystemExit(main())
