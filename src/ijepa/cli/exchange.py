"""`ijepa export` and `ijepa import`: weights out and in."""

from pathlib import Path
from typing import Any

import click

from ijepa.cli.options import PATH, WEIGHTS_HELP, debug_option, heads_option

_FORMATS = ("transformers", "timm", "official", "safetensors", "onnx", "program")


@click.command("export", epilog=WEIGHTS_HELP)
@click.argument("weights")
@click.argument("out", type=PATH)
@click.option("--format", "form", type=click.Choice(_FORMATS), required=True, help="Output format.")
@click.option(
    "--which",
    "--weights",
    "which",
    type=click.Choice(["target", "context"]),
    default="target",
    help="Which encoder to export.",
)
@click.option(
    "--head",
    type=PATH,
    help="Linear head to export as the classifier: a file that `ijepa evaluate linear --save-head` wrote.",
)
@heads_option
@debug_option
def export(weights: str, out: Path, form: Any, which: Any, head: Path | None, heads: int | None) -> None:
    """Export an encoder to another format.

    The encoder of WEIGHTS is written to OUT for transformers, timm, the original I-JEPA code, ONNX or torch.export.
    """
    from ijepa.interop.exchange import export_weights

    click.echo(f"{form}: {export_weights(weights, out, form, which=which, head=head, heads=heads)}")


@click.command("import", epilog=WEIGHTS_HELP.replace("WEIGHTS", "FILE"))
@click.argument("file")
@click.argument("out", type=PATH)
@heads_option
@debug_option
def import_(file: str, out: Path, heads: int | None) -> None:
    """Import weights from another format.

    FILE is converted to a weights folder OUT, which other commands accept as WEIGHTS.
    """
    from ijepa.interop.exchange import import_weights

    found = import_weights(file, out, heads=heads)
    model = found.recipe.model
    encoder = model.encoder
    parts = ", ".join(part.replace("_", " ") for part in found.parts)
    click.echo(
        f"{out}: {parts}; {encoder.width} wide, {encoder.depth} layers, {encoder.heads} heads, "
        f"patches of {model.patch_size} at {model.image_size[0]} x {model.image_size[1]}"
    )
