"""Evaluations of simple encoders on small public data sets: the tables of docs/evaluation.md.

    python benchmarks/tables.py camvid FOLDER --output benchmarks/results/camvid.json
    python benchmarks/tables.py tiny-imagenet FOLDER --output benchmarks/results/tiny-imagenet-100.json

FOLDER has `train` and `val`, or their shards. The encoder that is part of the package (pretrained for an hour on drawn
scenes of 64 pixels) is compared with an initial, untrained ViT-S and with raw pixels. The frames of CamVid are squares
of 224 pixels here, and label 11 (void) is not scored.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import click
from safetensors.torch import save_file

from ijepa.config.recipe import Recipe
from ijepa.evaluation.run import evaluate
from ijepa.model.encoder import FrozenEncoder
from ijepa.utils.environment import machine

HERE = Path(__file__).parent
SETS = {
    "camvid": {
        kind: ("segmentation", str(HERE / "protocols" / f"camvid-{kind}.yaml"), "miou")
        for kind in ("kmeans", "capi", "hummingbird", "linear")
    },
    "tiny-imagenet": {
        kind: (kind, str(HERE / "protocols" / f"tiny-imagenet-{kind}.yaml"), "top1") for kind in ("linear", "knn")
    },
}
SMALL = {"camvid": (224, 16), "tiny-imagenet": (64, 8)}
"""Image and patch size of the ViT-S in pixels."""


def initial_small(folder: Path, image_size: int, patch_size: int) -> Path:
    """Write a ViT-S with its initial weights as a weights folder."""
    sizes = {"model.image_size": str(image_size), "model.patch_size": str(patch_size)}
    recipe = Recipe.load("vit-small-16", sizes)
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe.dump())
    vit = FrozenEncoder.initial(recipe.model, recipe.seed).vit
    save_file(dict(vit.state_dict()), folder / "target_encoder.safetensors")
    return folder


def parts(data: Path) -> tuple[str, str]:
    """Return the paths of the train and the test set."""
    if (data / "train").is_dir():
        return str(data / "train"), str(data / "val")
    return f"{data}/train-*.tar", f"{data}/val-*.tar"


def kept_protocols(file: Path) -> dict[str, Any]:
    """Return the protocols that a file has already, each with the command, commit and versions of its measurement.

    Those that do not say it themselves are left out: another run's must not stand above them.
    """
    protocols = json.loads(file.read_text())["protocols"] if file.exists() else {}
    return {title: entry for title, entry in protocols.items() if {"command", "commit", "versions"} <= entry.keys()}


@click.command()
@click.argument("name", type=click.Choice(sorted(SETS)))
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--only", multiple=True, help="Protocols to run; all if not given.")
@click.option("--output", type=click.Path(path_type=Path), required=True)
def main(name: str, data: Path, only: tuple[str, ...], output: Path) -> None:
    """Evaluate on the data set NAME in the folder DATA."""
    found: dict[str, Any] = {"set": name, "protocols": kept_protocols(output)}
    with tempfile.TemporaryDirectory() as kept:
        weights = {"scenes": "scenes", "random ViT-S": str(initial_small(Path(kept) / "small", *SMALL[name]))}
        for title, (kind, protocol, figure) in SETS[name].items():
            if only and title not in only:
                continue
            result, _ = evaluate(kind, weights, *parts(data), protocol=protocol, output=Path(kept), progress=click.echo)
            shown = {
                row["encoder"]: {key: value for key, value in row.items() if key != "per_class"}
                for row in result.to_json()["rows"]
            }
            shown.pop("random")  # the small architecture of the demo is not part of the table
            found["protocols"][title] = {
                **machine(),
                "figure": figure,
                "level": result.level,
                "chance": result.chance,
                "protocol": result.protocol,
                "rows": shown,
            }
            output.write_text(json.dumps(found, indent=1) + "\n")
            click.echo(f"{title}: " + ", ".join(f"{row} {100 * values[figure]:.1f}" for row, values in shown.items()))


if __name__ == "__main__":
    main()
