"""The page that `ijepa plan` prints: tables with their units, and in words what they rest on."""

from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ijepa.planning.hardware import grids
from ijepa.planning.memory import USABLE, Fit, Memory

if TYPE_CHECKING:
    from ijepa.planning.outlook import Outlook, Row

_GB = 1e9


def show(found: "Outlook", console: Console | None = None) -> None:
    """Print the page; a terminal's width is kept to, a file or pipe gets 120 columns."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=120, file=console.file)
    console.print(page(found), highlight=False)


def page(found: "Outlook") -> RenderableType:
    """Return the whole page."""
    parts = (_head(found), _operations(found), _memory(found), _run(found), _comparison(found), _basis(found))
    return Group(*(piece for part in parts for piece in (part, Text())))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", vertical="bottom", no_wrap=not number)
    return table


def _pairs(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for row in rows:
        table.add_row(*row)
    return table


def _head(found: "Outlook") -> Table:
    size, recipe = found.found, found.recipe
    rows, columns = recipe.model.grid
    return _pairs(
        f"{recipe.name} on {found.devices} x {found.row.gpu.name}",
        [
            (
                "parameters",
                f"{_count(2 * size.encoder)} in both encoders ({size.encoder / 1e6:.1f} M each), "
                f"{size.predictor / 1e6:.1f} M in the predictor",
            ),
            (
                "an image",
                f"{rows} x {columns} patches; on average {size.context_tokens:.1f} of them context, "
                f"{size.target_tokens:.1f} in a target block",
            ),
            ("a step", f"{recipe.batch.total} images, {recipe.batch.total // found.devices} a GPU"),
        ],
    )


def _operations(found: "Outlook") -> Table:
    size = found.found
    table = _table("Operations of an image and step, GFLOP", "", "as written", "computed", "executed", "share")
    for name, part in (
        ("target encoder, forward", "target"),
        ("context encoder, forward and backward", "context"),
        ("predictor, forward and backward", "predictor"),
        ("all", "total"),
    ):
        figures = [getattr(flops, part) for flops in (size.plain, size.full, size.executed)]
        share = figures[2] / size.executed.total
        table.add_row(name, *(f"{figure / 1e9:.1f}" for figure in figures), f"{share:.0%}")
    table.caption = (
        "as written: every predictor layer on every token; computed: without what is shared or never read; "
        "executed: without the layers that stochastic depth drops"
    )
    table.caption_justify = "left"
    return table


def _memory(found: "Outlook") -> Table:
    row = found.row
    table = _table(
        f"Memory of one GPU, GB; the largest micro-batch that fits into {USABLE:.0%} of {row.gpu.memory_gb:.0f} GB",
        "strategy",
        "weights",
        "target",
        "gradients",
        "moments",
        "gathered",
        "whole\ngradients",
        *(f"checkpointing\n{fit.checkpointing}" for fit in row.memory[0].fits),
    )
    for one in row.memory:
        held = one.state
        figures = (held.weights, held.target, held.gradients, held.moments, held.gathered)
        mark = " *" if one is row.chosen and len(row.memory) > 1 else ""
        table.add_row(
            _label(one) + mark,
            *(f"{figure / _GB:.2f}" for figure in figures),
            f"{held.added / _GB:.2f}" if one.shards > 1 else "",
            *(_fit(fit) for fit in one.fits),
        )
    again = (found.found.executed.context + found.found.executed.predictor) / 3e9
    each = ", ".join(f"{fit.checkpointing} {fit.an_image / 1e6:.0f} MB" for fit in row.memory[0].fits)
    table.caption = (
        f"micro-batch x micro-batches a step, with the peak; whole gradients are held where a step has several. "
        f"Activations of an image by checkpointing: {each}; full computes about {again:.3g} GFLOP of it again"
        + (". * the recipe's strategy" if len(row.memory) > 1 else "")
    )
    table.caption_justify = "left"
    return table


def _label(one: Memory) -> str:
    beside = {"none": " (one GPU)", "hsdp": f" ({one.shards} a copy)"}
    return one.strategy + beside.get(one.strategy, "")


def _fit(fit: Fit) -> str:
    return f"{fit.micro} x {fit.micro_batches}, {fit.peak / _GB:.1f}" if fit.micro else f"none: {fit.peak / _GB:.1f}"


def _run(found: "Outlook") -> Table:
    run, gpu = found.row.course, found.row.gpu
    length = found.found.lengths
    rows = [
        (
            "speed" if found.given else f"at {run.share_of_peak:.0%} of peak",
            f"{run.images_per_second:,.0f} images/s, {run.images_per_second / found.devices:,.0f} a GPU; "
            f"{1e3 * run.step_seconds:,.3g} ms a step",
        ),
        (
            "each GPU",
            f"{run.tflops_plain:.0f} TFLOP/s of the method as written, {run.tflops_executed:.0f} executed: "
            f"{run.share_of_peak:.1%} of the dense bf16 peak, {gpu.bf16_tflops:g}",
        ),
    ]
    if length is None or found.images is None or run.days is None:
        rows.append(("the run", "length unknown without the data: add --data.images"))
        return _pairs("The run", rows)
    recipe = found.recipe
    by_epochs = recipe.epochs and recipe.steps is None and recipe.images is None  # else they do not count
    epochs = f", {recipe.epochs:g} epochs" if by_epochs else ""
    rows += [
        ("the run", f"{length.total:,} steps, {found.images / 1e6:,.4g} M images{epochs}"),
        ("time", f"{_time(run.days)}, {run.device_hours:,.0f} GPU-hours"),
        (
            "energy, at most",
            f"{_energy(run.gpus_mwh)} by the GPUs at {gpu.tdp_w:g} W; {_energy(run.site_mwh)} with their servers "
            f"({gpu.server_w:g} W a GPU) and PUE {found.pue:g}",
        ),
        (
            "CO2, at most",
            f"{_mass(run.tonnes)} at {found.grid.grams:g} g/kWh ({found.country}, {found.grid.year})",
        ),
    ]
    return _pairs("The run", rows)


def _comparison(found: "Outlook") -> Table:
    many = f"{found.devices} GPU{'s' if found.devices > 1 else ''} of each kind"
    table = _table(
        f"{many} at {found.row.course.share_of_peak:.1%} of the bf16 peak",
        "GPU",
        "bf16\nTFLOP/s",
        "FP8\nTFLOP/s",
        "GB",
        "images/s",
        "time",
        "GPU-hours",
        "energy",
        "CO2",
        f"micro-batch\n({found.row.chosen.strategy})",
    )
    for row in found.rows:
        table.add_row(*_compared(row))
    return table


def _compared(row: "Row") -> tuple[str, ...]:
    run, gpu, best = row.course, row.gpu, row.chosen.best
    kind = "" if best.checkpointing == "none" else f", {best.checkpointing}"
    return (
        gpu.name,
        f"{gpu.bf16_tflops:g}",
        f"{gpu.fp8_tflops:g}" if gpu.fp8_tflops else "none",
        f"{gpu.memory_gb:g}",
        f"{run.images_per_second:,.0f}",
        _time(run.days),
        "" if run.device_hours is None else f"{run.device_hours:,.0f}",
        _energy(run.site_mwh),
        _mass(run.tonnes),
        f"{best.micro} x {best.micro_batches}{kind}" if best.micro else "does not fit",
    )


def _basis(found: "Outlook") -> Table:
    tables = grids()
    return _pairs(
        "What this rests on",
        [
            (
                "speed",
                "your figure"
                if found.given
                else "an assumption, --share-of-peak; `ijepa bench step` measures a machine",
            ),
            (
                "memory",
                "counted from what layers save, with FlashAttention, plus 4 standard deviations of the masks' tokens; "
                f"{1 - USABLE:.0%} is left for CUDA, NCCL and fragmentation",
            ),
            ("GPU", found.row.gpu.source),
            ("electricity", tables.source),
            ("PUE", tables.pue_source),
        ],
    )


def _count(parameters: float) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def _time(days: float | None) -> str:
    if days is None:
        return ""
    return f"{days:.1f} days" if days >= 1 else f"{24 * days:.1f} hours" if days >= 1 / 24 else f"{1440 * days:.1f} min"


def _energy(mwh: float | None) -> str:
    return "" if mwh is None else f"{mwh:.1f} MWh" if mwh >= 1 else f"{1e3 * mwh:.1f} kWh"


def _mass(tonnes: float | None) -> str:
    return "" if tonnes is None else f"{tonnes:.1f} t" if tonnes >= 1 else f"{1e3 * tonnes:.1f} kg"
