"""`ijepa evaluate`, `ijepa diagnose` and `ijepa report`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ijepa.cli.options import (
    NOT_NEGATIVE,
    PATH,
    WEIGHTS_HELP,
    debug_option,
    first_process,
    heads_option,
    open_images,
    progress_lines,
)
from ijepa.utils.errors import UserError

if TYPE_CHECKING:
    from ijepa.evaluation.results.schema import EvaluationResult

_WEIGHTS = (
    click.argument("weights"),
    click.option("--protocol", help="Name of a protocol, or a YAML file with one."),
    click.option(
        "--output",
        type=PATH,
        help="Folder for the result. Default: evaluations/ in the run folder, or the current folder without a run.",
    ),
    click.option(
        "--which", type=click.Choice(["target", "context"]), default="target", help="Which encoder to evaluate."
    ),
    click.option(
        "--seed",
        type=int,
        default=0,
        help="Seed of the evaluation, for example of the held-out split and of the initial heads.",
    ),
    click.option(
        "--baselines/--no-baselines",
        default=True,
        help="Also evaluate the encoder with its initial, untrained weights, and raw pixels.",
    ),
    heads_option,
    click.option(
        "--autocast",
        type=click.Choice(["auto", "none", "bf16"]),
        help="Precision of the encoder. auto: bf16 on a GPU, else float32. none: float32. Default: the protocol's.",
    ),
    debug_option,
)
"""Options of every evaluation."""

_SETS = (
    click.option("--test", required=True, help="Labeled data to score."),
    click.option("--train-list", help="File of image names. Only these images of --train are used."),
    click.option("--test-list", help="File of image names. Only these images of --test are used."),
)
_TRAIN = click.option("--train", required=True, help="Labeled data to train on, or to find neighbors in.")
_DEVKIT = click.option(
    "--devkit",
    help="ImageNet development kit or Kaggle's table of validation classes, if it is not next to the images.",
)


def _options(*decorators: Callable[..., Any]) -> Callable[..., Any]:
    """Add options to a command, in the order in which its help lists them."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return add


class _Comparing(click.Group):
    """A group whose `--compare A B` is its command `compare A B`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--compare" in args:
            args = ["compare", *(word for word in args if word != "--compare")]
        return super().parse_args(ctx, args)


@click.group(cls=_Comparing)
@click.option("--compare", is_flag=True, expose_value=False, help="Same as the command `compare`.")
def evaluate() -> None:
    """Evaluate an encoder by a protocol.

    The result is a JSON file that includes the protocol.
    """


@evaluate.command("linear", epilog=WEIGHTS_HELP)
@click.option(
    "--save-head", type=PATH, help="File for the best linear head on the last block. `ijepa export --head` reads it."
)
@_options(_DEVKIT, *_WEIGHTS, *_SETS, _TRAIN)
def evaluate_linear(**options: Any) -> None:
    """Linear and attentive probes.

    Trains heads on frozen features. The protocol defines which data the best head is chosen on. The default protocol,
    heldout, chooses it on a held-out part of --train, and reads --test once.
    """
    _evaluate("linear", **options)


@evaluate.command("knn", epilog=WEIGHTS_HELP)
@_options(_DEVKIT, *_WEIGHTS, *_SETS, _TRAIN)
def evaluate_knn(**options: Any) -> None:
    """Nearest neighbors by cosine similarity.

    Classifies by the mean of the patch features. Nothing is trained. The default protocol is dino.
    """
    _evaluate("knn", **options)


@evaluate.command("segmentation", epilog=WEIGHTS_HELP)
@click.option("--labels", help="Label map of the masks: a name or a YAML file. Default: that of the data set.")
@_options(*_WEIGHTS, *_SETS)
@click.option("--train", help="Labeled data to train on, or to find neighbors in. Protocols of level 0 do not use it.")
def evaluate_segmentation(**options: Any) -> None:
    """Semantic segmentation.

    The result states the level of supervision. Level 0: labels are only used for scoring (k-means, TokenCut). Level 1:
    nearest neighbors in a bank of labeled patches. Level 2: a trained linear layer. The default protocol is capi.
    """
    _evaluate("segmentation", **options)


@evaluate.command("propagation", epilog=WEIGHTS_HELP)
@click.option(
    "--data",
    required=True,
    help="Labeled videos: a folder in the layout of DAVIS, or with images/NAME/* and masks/NAME/*.",
)
@_options(*_WEIGHTS)
def evaluate_propagation(weights: str, data: str, **options: Any) -> None:
    """Label propagation in videos.

    Propagates the labels of the first frame to the other frames, and reports J and F. Nothing is trained. The default
    protocol is davis.
    """
    from ijepa.evaluation.run import evaluate_videos as run

    with progress_lines() as progress:
        result, file = run(weights, data, progress=progress, **options)
    _show(result, file)


@evaluate.command("compare")
@click.argument("results", nargs=-1, type=PATH)
@click.option("--published/--no-published", default=True, help="Also show published results.")
@debug_option
def evaluate_compare(results: tuple[Path, ...], published: bool) -> None:
    """Compare results in one table.

    RESULTS are JSON files of evaluations. The table has one column per protocol and data set.
    """
    from ijepa.cli.tables import comparison_table
    from ijepa.evaluation.results.compare import compare_results

    click.echo(comparison_table(compare_results(results, with_published=published)))


def _evaluate(kind: str, weights: str, train: str | None, test: str, **options: Any) -> None:
    from ijepa.evaluation.run import evaluate as run

    with progress_lines() as progress:
        result, file = run(kind, weights, train, test, progress=progress, **options)
    _show(result, file)


def _show(result: "EvaluationResult", file: Path) -> None:
    """Print a result; of several processes, the first does."""
    from ijepa.cli.tables import result_table

    if first_process():
        click.echo(result_table(result))
        click.echo(f"result: {file}")


@click.command(epilog=WEIGHTS_HELP)
@click.argument("weights")
@click.option("--data", "path", required=True, help="Images to encode. Labels are not used.")
@click.option("--images", type=click.IntRange(min=16), default=512, help="Number of images.")
@click.option("--which", type=click.Choice(["target", "context"]), default="target", help="Which encoder to diagnose.")
@click.option("--seed", type=int, default=0, help="Seed that selects the images and draws their views.")
@click.option("--layers/--no-layers", default=False, help="Also report the figures of every block.")
@click.option(
    "--views",
    type=NOT_NEGATIVE,
    default=10,
    help="Number of masked views per image, to compute LiDAR. 0: do not compute it.",
)
@heads_option
@debug_option
def diagnose(
    weights: str, path: str, images: int, which: Any, seed: int, layers: bool, views: int, heads: int | None
) -> None:
    """Diagnose an encoder without labels.

    Prints JSON with the rank and spread of the features, the share of variance that position explains, and a verdict.
    If WEIGHTS is a run, its training metrics are checked too, and problems are listed under "warnings".
    """
    import json

    from ijepa.evaluation.diagnostics.per_layer import diagnose as run
    from ijepa.evaluation.diagnostics.warnings import training_warnings
    from ijepa.interop.weights import resolve_weights

    resolved = resolve_weights(weights, heads=heads)
    found = run(
        resolved.encoder(which),
        open_images(path, "--data"),
        images=images,
        image_size=resolved.recipe.model.image_size,
        seed=seed,
        rule=resolved.recipe.mask,
        views=views,
        layers=layers,
    )
    found["warnings"] = training_warnings(resolved.run) if resolved.run else []
    click.echo(json.dumps(found, indent=1))


@click.command()
@click.argument("run", type=PATH)
@click.option("--data", "path", help="Images for the pictures. Default: the data of the run.")
@debug_option
def report(run: Path, path: str | None) -> None:
    """Write the report of a run.

    RUN/report.html is one page with curves, pictures and tables. It needs no network.
    """
    from ijepa.release.archive import SUMS
    from ijepa.report.page import write_report

    if (run / SUMS).is_file():
        raise UserError(run, "is an archive, and a new report would change it", "give the run that it was made from")
    click.echo(f"report: {write_report(run, data=path)}")
