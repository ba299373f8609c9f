"""A whole ViT-H/14 with random weights through every exchange, and the memory that export needs.

    python benchmarks/roundtrip.py --folder DISK --output benchmarks/results/roundtrip.json

Three parts (1.26 B parameters in both encoders) are written as a weights folder, exported to every format, and read
again; and they are written as a run with one checkpoint, which is archived. Each export runs in its own process, whose
peak resident memory is recorded; it includes pages of the mapped weights. Needs 20 GB of disk and 12 GB of memory.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file

from ijepa.checkpoint.run_dir import Run, start_run
from ijepa.checkpoint.state import FORMAT, describe, seal
from ijepa.config.recipe import Recipe
from ijepa.interop.weights import load_encoder, resolve_weights
from ijepa.model.ijepa import IJEPA
from ijepa.utils.environment import machine

FORMS = {
    "transformers": "hf",
    "timm": "timm",
    "official": "jepa.pth.tar",
    "onnx": "encoder.onnx",
    "program": "encoder.pt2",
    "archive": "release",
}
PARTS = ("context_encoder", "target_encoder", "predictor")
EXPORT = """
import sys
from pathlib import Path
import torch, safetensors.torch
from ijepa.interop.exchange import export_weights
from ijepa.release.archive import write_archive
from ijepa.release.model_card import About
def peak():  # of this program: the system's peak of a process starts with the size of its parent
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
before = peak()
weights, out, form = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
if form == "archive":
    write_archive(weights, out, About())
else:
    export_weights(weights, out, form)
print(before, peak())
"""


def write_random(folder: Path, recipe: Recipe) -> int:
    """Write a model's three parts, every parameter random; return their bytes."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe.dump())
    model = IJEPA(recipe.model, recipe.seed)
    draw = torch.Generator().manual_seed(0)
    for part in PARTS:
        state = getattr(model, part).state_dict()
        for value in state.values():
            value.add_(0.02 * torch.randn(value.shape, generator=draw))
        save_file(state, folder / f"{part}.safetensors")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def as_run(folder: Path, weights: Path) -> Path:
    """Arrange weights as a finished run of one step, without a second copy of them."""
    step = folder / "checkpoints" / "step-00000001"
    step.mkdir(parents=True)
    for part in PARTS:
        (step / f"{part}.safetensors").hardlink_to(weights / f"{part}.safetensors")
    save_file({}, step / "optimizer.safetensors")
    files = {file.name: describe(file) for file in step.glob("*.safetensors")}
    (step / "state.json").write_text(seal({"format": FORMAT, "step": 1, "files": files}))
    start_run(
        Run(folder), Recipe.load(weights / "recipe.yaml", {"steps": "1", "schedule.warmup": "0 steps"}), {"images": 1}
    )
    (folder / "report.html").write_text("")
    return folder


@torch.no_grad()
def theirs(form: str, folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    """Return the features that another library computes from an export; transformers and timm with eager attention."""
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    normalized = (pixels / 255 - mean) / deviation
    if form == "transformers":
        from transformers import AutoModel

        model = AutoModel.from_pretrained(folder, attn_implementation="eager", add_pooling_layer=False)
        return model.eval()(normalized).last_hidden_state
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(folder), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {"pixel_values": normalized.numpy()})[0])
    if form == "program":
        return torch.export.load(folder).module()(normalized)
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval().forward_features(normalized)


@click.command()
@click.option("--recipe", "name", default="vit-huge-14-in1k", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path, exists=True), help="Where there is room.")
@click.option("--output", type=click.Path(path_type=Path), required=True)
def main(name: str, folder: Path | None, output: Path) -> None:
    """Send a random model through every exchange."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    import tests.conftest  # noqa: F401 - it defines the operators that torchvision lacks with a torch for CPUs

    recipe = Recipe.load(name)
    kept = Path(tempfile.mkdtemp(dir=folder))
    found: dict[str, Any] = {**machine(), "recipe": name, "exports": {}}
    try:
        ours = kept / "ours"
        found["bytes"] = write_random(ours, recipe)
        run = as_run(kept / "run", ours)
        pixels = torch.randint(0, 256, (1, 3, *recipe.model.image_size), dtype=torch.uint8)
        wanted = load_encoder(ours)(pixels)
        for form, place in FORMS.items():
            begun = time.monotonic()
            done = subprocess.run(
                [sys.executable, "-c", EXPORT, str(run if form == "archive" else ours), str(kept / place), form],
                check=True,
                capture_output=True,
                text=True,
            )
            before, peak = map(int, done.stdout.split())
            entry = {"seconds": round(time.monotonic() - begun, 1), "peak_bytes": peak, "imports_bytes": before}
            if form in ("official", "archive"):
                again, first = resolve_weights(kept / place), resolve_weights(ours)
                entry["equal_bits"] = all(
                    torch.equal(tensor.load(), again.tensors(part)[key].load())
                    for part in PARTS
                    for key, tensor in first.tensors(part).items()
                )
            else:
                entry["largest_difference"] = float((theirs(form, kept / place, pixels) - wanted).abs().max())
                if form in ("transformers", "timm"):
                    entry["read_again_equal_bits"] = torch.equal(load_encoder(kept / place)(pixels), wanted)
            found["exports"][form] = entry
            click.echo(f"{form}: {entry}")
            for path in kept.glob(f"{place}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally:
        shutil.rmtree(kept)
    found["largest_value"] = float(wanted.abs().max())
    output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
