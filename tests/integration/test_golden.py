"""Results that must not change: hashes of short runs and evaluations, compared with those in golden.json.

Bits depend on the processor and on torch, so golden.json holds one set of hashes for each environment. The tests of
runs and evaluations are skipped in an environment without hashes; `python -m tests.integration.test_golden --record`
adds the current one. The random draws are integers that do not depend on the environment, so their test always runs.

The runs and evaluations use the command line only, so that this file does not depend on internal names.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from ijepa.data.loading.crop import WORDS, random_resized_crop_box
from ijepa.data.loading.shuffle import sample_indices
from ijepa.masking.masks import MaskRule
from ijepa.masking.packing import Packer
from ijepa.utils.random import Stream, random_bits

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("golden.json")
RECORD = "python -m tests.integration.test_golden --record"

STEPS = 6
TRAIN = [
    *f"--steps {STEPS} --batch.global 16 --log_every 2 --checkpoint.every 4 --precision.autocast none".split(),
    *("--model.encoder.drop_path", "0.2"),
    *("--schedule.warmup", "2 steps"),
]
"""Options of every run."""

MODULE = ["-m", "ijepa"]
TWO_RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *MODULE]
RUNS = {
    "workers-0": (MODULE, "--data.workers 0"),
    "workers-2": (MODULE, "--data.workers 2 --batch.micro 4"),
    "ranks-2": (TWO_RANKS, "--data.workers 0"),
}
BASE = "workers-0"
"""The run whose weights are evaluated."""

EVALUATIONS = {
    "linear": ("linear", "demo"),
    "knn": ("knn", "demo"),
    "segmentation": ("segmentation", "demo"),
    "segmentation-kmeans": ("segmentation", "demo-kmeans"),
    "propagation": ("propagation", "demo"),
}

NOT_RESULTS = {"seconds", "commit", "versions", "cpu", "devices", "path", "command", "date", "description", "notes"}
"""Keys of an evaluation's JSON that the seed does not determine, and keys that hold text for people."""


def environment() -> str:
    """Name what the bits of a result depend on: the processor, torch and Python."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    name = about.get("model name") or platform.processor() or platform.machine()
    # Virtual machines hide the model's name; the family and model numbers tell processors apart.
    numbers = f"family {about.get('cpu family', '?')} model {about.get('model', '?')}"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"{name} {numbers} {torch.backends.cpu.get_cpu_capability()} | torch {torch.__version__} | python {python}"


def sha256(data: bytes) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def run_python(folder: Path, *arguments: str) -> None:
    """Run a Python command in a process with one thread and no GPU; it must succeed."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    settings = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "IJEPA_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | threads | settings | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}\n{done.stderr}"


def write_videos(out: Path) -> None:
    """Write two videos of 6 frames in which a square of class 1 and a square of class 2 move."""
    for name, shift in (("a", 8), ("b", 5)):
        images, masks = out / "images" / name, out / "masks" / name
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for frame in range(6):
            mask = np.zeros((64, 96), np.uint8)
            mask[8:24, shift * frame : shift * frame + 16] = 1
            mask[shift * frame : shift * frame + 16, 72:88] = 2
            texture = np.arange(64)[:, None] * 3 % 32 + np.arange(96) * (5 + shift) % 32
            image = np.stack([texture + 90 * (mask == label) for label in range(3)], axis=2).astype(np.uint8)
            Image.fromarray(image).save(images / f"{frame:05d}.png")
            Image.fromarray(mask).save(masks / f"{frame:05d}.png")


def write_data(folder: Path) -> None:
    """Write the scenes and the videos that all runs and evaluations use."""
    options = ["--images", "160", "--val-share", "0.25"]
    run_python(folder, *MODULE, "data", "scenes", str(folder / "scenes"), *options)
    write_videos(folder / "videos")


def pretrain(folder: Path, name: str) -> dict[str, str]:
    """Train the run `name` and return a hash of each of its results."""
    python, options = RUNS[name]
    run = folder / name
    paths = ["--data.path", str(folder / "scenes"), "--output", str(run)]
    run_python(folder, *python, "pretrain", "scenes", *paths, *TRAIN, *options.split())
    hashes = {file.name: sha256(file.read_bytes()) for file in run.glob("*.jsonl") if file.name != "timings.jsonl"}
    weights = (run / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors")
    return hashes | {file.name: tensors_sha256(file) for file in weights}


def tensors_sha256(file: Path) -> str:
    """Return a hash of the names, types, shapes and bytes of all tensors of a file; not of its metadata."""
    digest = hashlib.sha256()
    with safe_open(file, "pt") as tensors:
        for name in sorted(tensors.keys()):
            tensor = tensors.get_tensor(name).contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def evaluate(folder: Path, name: str) -> str:
    """Evaluate the weights of the base run and return the result as canonical JSON."""
    kind, protocol = EVALUATIONS[name]
    scenes, out = str(folder / "scenes"), folder / f"evaluation-{name}"
    data = ["--data", str(folder / "videos")] if kind == "propagation" else ["--train", scenes, "--test", scenes]
    options = ["--protocol", protocol, "--autocast", "none", "--output", str(out)]
    run_python(folder, *MODULE, "evaluate", kind, str(folder / BASE), *data, *options)
    (file,) = out.glob("*.json")
    return json.dumps(_results(json.loads(file.read_text(encoding="utf-8"))), sort_keys=True, indent=1)


def _results(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _results(of) for key, of in value.items() if key not in NOT_RESULTS}
    return [_results(of) for of in value] if isinstance(value, list) else value


def draws_sha256() -> str:
    """Return a hash of the integers drawn for the first 4 steps of 16 images: order, crops, masks and kept rows."""
    seed, positions = 3, np.arange(64)
    # 50 images: an epoch ends within a step. 1,000,000 images: the order of a large data set is drawn in another way.
    drawn = [sample_indices(seed, positions, images) for images in (50, 1_000_000)]
    for draw in random_bits(seed, Stream.CROP, positions, WORDS):
        drawn.append(np.array(random_resized_crop_box(draw, 96, 80, (0.3, 1.0), (3 / 4, 4 / 3))))
    pack = Packer(MaskRule(min_context=12), (8, 8), seed, global_batch=16, depth=6, drop_path=0.2)
    for step in positions.reshape(4, 16):
        batch = pack(step, torch.zeros(16, 3, 8, 8, dtype=torch.uint8))
        for part in (batch.context, batch.targets, batch.predictor, batch.queries, *batch.drop_path_rows):
            if part is not None:  # None: stochastic depth keeps all images of this layer
                drawn += [part.index.numpy(), part.cu_seqlens.numpy()]
    return sha256(b"".join(repr(part.shape).encode() + part.astype("<i8").tobytes() for part in drawn))


def record() -> None:
    """Write the hashes of the current code in the current environment to golden.json."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        runs = {run: pretrain(folder, run) for run in RUNS}
        evaluations = {each: sha256(evaluate(folder, each).encode()) for each in EVALUATIONS}
    golden = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
    known = golden.get("environments", {}) | {environment(): {"runs": runs, "evaluations": evaluations}}
    text = json.dumps({"draws": draws_sha256(), "environments": known}, indent=1, sort_keys=True)
    GOLDEN.write_text(text + "\n", encoding="utf-8")
    print(f"recorded: {environment()}")


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    """The hashes of this environment; skips the test where there are none."""
    known = json.loads(GOLDEN.read_text(encoding="utf-8"))["environments"]
    if environment() not in known:
        pytest.skip(f"{GOLDEN.name} has no results of this environment ({environment()}); to add them, run `{RECORD}`")
    return known[environment()]


@pytest.fixture(scope="module")
def folder(golden: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data."""
    path = tmp_path_factory.mktemp("golden")
    write_data(path)
    return path


@pytest.fixture(scope="module")
def base(folder: Path) -> dict[str, str]:
    """The hashes of the base run, whose weights are then in the folder."""
    return pretrain(folder, BASE)


def test_draws_do_not_change() -> None:
    assert draws_sha256() == json.loads(GOLDEN.read_text(encoding="utf-8"))["draws"]


@pytest.mark.slow
def test_run_without_workers_does_not_change(base: dict[str, str], golden: dict[str, Any]) -> None:
    assert base == golden["runs"][BASE]


@pytest.mark.slow
def test_run_with_workers_and_micro_batches_does_not_change(folder: Path, golden: dict[str, Any]) -> None:
    assert pretrain(folder, "workers-2") == golden["runs"]["workers-2"]


@pytest.mark.slow
@pytest.mark.distributed
def test_run_on_two_ranks_does_not_change(folder: Path, golden: dict[str, Any]) -> None:
    assert pretrain(folder, "ranks-2") == golden["runs"]["ranks-2"]


@pytest.mark.slow
@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluation_does_not_change(folder: Path, base: dict[str, str], golden: dict[str, Any], name: str) -> None:
    result = evaluate(folder, name)
    assert sha256(result.encode()) == golden["evaluations"][name], result


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit(f"usage: {RECORD}")
    record()
