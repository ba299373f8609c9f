"""Plans as text: the page of `ijepa plan`, and the summary of `ijepa pretrain --dry-run`."""

from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ijepa.config.recipe import Recipe
from ijepa.planning.hardware import grids
from ijepa.planning.memory import USABLE, Fit
from ijepa.planning.plan import Plan
from ijepa.planning.size import measure_recipe

_GB = 1e9
_LAYOUT: dict[str, Any] = {
    "title_justify": "left",
    "title_style": "bold",
    "caption_justify": "left",
    "box": None,
    "pad_edge": False,
}


def render_size(recipe: Recipe, images: int | None = None) -> str:
    """Return the resolved recipe and its size as text.

    Args:
        recipe: The recipe.
        images: Size of the data set; None: the number that the recipe states.
    """
    size, batch, (rows, columns) = measure_recipe(recipe, images), recipe.batch.total, recipe.model.grid
    parameters, full, executed = size.parameters, size.full, size.executed.total
    encoder, predictor = f"{parameters.encoder / 1e6:.1f} M", f"{parameters.predictor / 1e6:.1f} M"
    length = "unknown without the data: add --data.path or --data.images"
    if size.lengths:
        images = size.lengths.total * batch
        length = (
            f"{size.lengths.total} steps ({size.lengths.warmup} of warm-up), {images / 1e6:.4g} M images, "
            f"{executed * images / 1e18:.4g} EFLOP"
        )
    lines = {
        "parameters": f"{encoder} context + {encoder} target encoder, {predictor} predictor",
        "patches": f"{rows} x {columns}; {size.context_tokens:.1f} context, {size.target_tokens:.1f} per target block",
        "per image": f"{full.total / 1e9:.4g} GFLOP (target {full.target / 1e9:.4g}, context {full.context / 1e9:.4g}, "
        f"predictor {full.predictor / 1e9:.4g}), {executed / 1e9:.4g} executed",
        "per step": f"{batch} images, {executed * batch / 1e12:.4g} TFLOP",
        "weights and state": f"{parameters.state_bytes / 2**30:.2f} GiB on one device, activations not counted",
        "run": length,
    }
    return "\n".join([recipe.dump().rstrip(), "", *(f"{name:18}{value}" for name, value in lines.items())])


def render_plan(plan: Plan, console: Console | None = None) -> str:
    """Return the page of a plan as text, styled for a terminal, or plain and 120 columns wide for a file or pipe.

    Args:
        plan: The plan.
        console: Where the text will be printed; None: standard output.
    """
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=120, file=console.file)
    parts = (_model(plan), _operations(plan), _memory(plan), _run(plan), _comparison(plan), _assumptions(plan))
    with console.capture() as capture:
        console.print(Group(*(piece for part in parts for piece in (part, Text()))), highlight=False)
    return capture.get()


def _table(title: str, *columns: str, caption: str = "") -> Table:
    table = Table(title=title, caption=caption or None, header_style="dim", **_LAYOUT)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", vertical="bottom", no_wrap=not number)
    return table


def _pairs(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, show_header=False, **_LAYOUT)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for row in rows.items():
        table.add_row(*row)
    return table


def _model(plan: Plan) -> Table:
    size, recipe = plan.size, plan.recipe
    (rows, columns), encoder = recipe.model.grid, size.parameters.encoder
    return _pairs(
        f"{recipe.name} on {plan.devices} x {plan.asked.gpu.name}",
        {
            "parameters": f"{_count(2 * encoder)} in both encoders ({encoder / 1e6:.1f} M each), "
            f"{size.parameters.predictor / 1e6:.1f} M in the predictor",
            "per image": f"{rows} x {columns} patches; on average {size.context_tokens:.1f} in the context block, "
            f"{size.target_tokens:.1f} in a target block",
            "per step": f"{recipe.batch.total} images, {recipe.batch.total // plan.devices} per GPU",
        },
    )


def _operations(plan: Plan) -> Table:
    size = plan.size
    table = _table(
        "GFLOP per image and step",
        *("", "as written", "computed", "executed", "share"),
        caption="as written: every predictor layer on every token; computed: without shared or unused results; "
        "executed: without the layers that stochastic depth drops",
    )
    for name, part in (
        ("target encoder, forward", "target"),
        ("context encoder, forward and backward", "context"),
        ("predictor, forward and backward", "predictor"),
        ("total", "total"),
    ):
        figures = [getattr(flops, part) for flops in (size.plain, size.full, size.executed)]
        share = figures[2] / size.executed.total
        table.add_row(name, *(f"{figure / 1e9:.1f}" for figure in figures), f"{share:.0%}")
    return table


def _memory(plan: Plan) -> Table:
    asked, executed = plan.asked, plan.size.executed
    fits = asked.memory[0].fits
    # The backward pass of context encoder and predictor is twice their forward pass, which `full` computes again.
    again = (executed.context + executed.predictor) / 3e9
    images = ", ".join(f"{fit.activation_checkpointing} {fit.bytes_per_image / 1e6:.0f} MB" for fit in fits)
    table = _table(
        f"Memory of one GPU, GB; the largest micro-batch that fits into {USABLE:.0%} of {asked.gpu.memory_gb:.0f} GB",
        *("strategy", "weights", "target", "gradients", "moments", "gathered", "full\ngradients"),
        *(f"checkpointing\n{fit.activation_checkpointing}" for fit in fits),
        caption="last three columns: micro-batch x micro-batches per step, and the peak, by activation_checkpointing; "
        "hsdp: number of GPUs that share a copy of the model; full gradients: if a step has several micro-batches. "
        f"Activations per image: {images}; full recomputes about {again:.3g} GFLOP of them"
        + (". * the strategy of the recipe" if len(asked.memory) > 1 else ""),
    )
    for memory in asked.memory:
        held = memory.state
        figures = (held.weights, held.target, held.gradients, held.moments, held.gathered)
        note = {"none": " (one GPU)", "hsdp": f" ({memory.shards} GPUs)"}.get(memory.strategy, "")
        mark = " *" if memory is asked.chosen and len(asked.memory) > 1 else ""
        table.add_row(
            memory.strategy + note + mark,
            *(f"{figure / _GB:.2f}" for figure in figures),
            f"{held.early_gradients / _GB:.2f}" if memory.shards > 1 else "",
            *(_micro_batch(fit) for fit in memory.fits),
        )
    return table


def _micro_batch(fit: Fit) -> str:
    peak = f"{fit.peak / _GB:.1f}"
    return f"{fit.micro} x {fit.micro_batches}, {peak}" if fit.micro else f"none: {peak}"


def _run(plan: Plan) -> Table:
    cost, gpu, recipe = plan.asked.cost, plan.asked.gpu, plan.recipe
    rows = {
        "speed" if plan.rate_given else f"at {cost.share_of_peak:.0%} of peak": (
            f"{cost.images_per_second:,.0f} images/s, {cost.images_per_second / plan.devices:,.0f} per GPU; "
            f"{1e3 * cost.step_seconds:,.3g} ms per step"
        ),
        "per GPU": f"{cost.tflops_plain:.0f} TFLOP/s of the method as written, {cost.tflops_executed:.0f} executed: "
        f"{cost.share_of_peak:.1%} of the dense bf16 peak, {gpu.bf16_tflops:g}",
    }
    if plan.size.lengths is None or plan.images is None or cost.days is None:
        return _pairs("Run", {**rows, "length": "unknown without the data: add --data.images"})
    by_epochs = recipe.epochs and recipe.steps is None and recipe.images is None  # steps and images override epochs
    modules, site = _scaled(cost.gpus_mwh, "MWh", "kWh"), _scaled(cost.site_mwh, "MWh", "kWh")
    co2 = _scaled(cost.tonnes, "t", "kg")
    epochs = f", {recipe.epochs:g} epochs" if by_epochs else ""
    rows |= {
        "length": f"{plan.size.lengths.total:,} steps, {plan.images / 1e6:,.4g} M images{epochs}",
        "time": f"{_time(cost.days)}, {cost.device_hours:,.0f} GPU-hours",
        "energy, at most": f"{modules} by the GPUs at {gpu.tdp_w:g} W; {site} with their servers "
        f"({gpu.server_w:g} W per GPU) and PUE {grids().pue:g}",
        "CO2, at most": f"{co2} at {plan.grid.grams:g} g/kWh ({plan.country}, {plan.grid.year})",
    }
    return _pairs("Run", rows)


def _comparison(plan: Plan) -> Table:
    table = _table(
        f"{plan.devices} GPU{'s' if plan.devices > 1 else ''} of each type "
        f"at {plan.asked.cost.share_of_peak:.1%} of the bf16 peak",
        *("GPU", "bf16\nTFLOP/s", "FP8\nTFLOP/s", "GB", "images/s", "time", "GPU-hours", "energy", "CO2"),
        f"micro-batch\n({plan.asked.chosen.strategy})",
    )
    for each in plan.comparison:
        cost, gpu, best = each.cost, each.gpu, each.chosen.best
        kind = "" if best.activation_checkpointing == "none" else f", {best.activation_checkpointing}"
        table.add_row(
            gpu.name,
            f"{gpu.bf16_tflops:g}",
            f"{gpu.fp8_tflops:g}" if gpu.fp8_tflops else "none",
            f"{gpu.memory_gb:g}",
            f"{cost.images_per_second:,.0f}",
            _time(cost.days),
            "" if cost.device_hours is None else f"{cost.device_hours:,.0f}",
            _scaled(cost.site_mwh, "MWh", "kWh"),
            _scaled(cost.tonnes, "t", "kg"),
            f"{best.micro} x {best.micro_batches}{kind}" if best.micro else "does not fit",
        )
    return table


def _assumptions(plan: Plan) -> Table:
    assumed = "an assumption, --share-of-peak; `ijepa bench step` measures a machine"
    return _pairs(
        "Assumptions and sources",
        {
            "speed": "your figure" if plan.rate_given else assumed,
            "memory": "counted from what layers save, with FlashAttention, plus 4 standard deviations of the tokens; "
            f"{1 - USABLE:.0%} is left for CUDA, NCCL and fragmentation",
            "GPU": plan.asked.gpu.source,
            "electricity": grids().source,
            "PUE": grids().pue_source,
        },
    )


def _count(parameters: float) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def _time(days: float | None) -> str:
    if days is None:
        return ""
    return f"{days:.1f} days" if days >= 1 else f"{24 * days:.1f} hours" if days >= 1 / 24 else f"{1440 * days:.1f} min"


def _scaled(value: float | None, unit: str, thousandth: str) -> str:
    return "" if value is None else f"{value:.1f} {unit}" if value >= 1 else f"{1e3 * value:.1f} {thousandth}"
