"""Memory of one device in a training step, by parallel strategy.

Weights, moments, target encoder and gradients are float32. The n devices that share them hold 1/n each: n is 1 with
none and ddp, all devices with zero2 and zero3, those of a group with hsdp (ZeRO, arXiv 1910.02054). In addition, with
bfloat16 autocast:

* none, ddp: bfloat16 copies of the weights of linear layers, from the first forward pass to the end of the backward
  pass.
* zero2, hsdp: the gathered context encoder and predictor for the same time. Linear layers of blocks are in bfloat16,
  all else is in float32, and autocast has its own bfloat16 copies of the predictor. Two blocks of the target encoder.
* zero3: two blocks of each encoder, and the parameters outside blocks.
* In float8, with every strategy: a copy of the target encoder's linear layers, one byte per weight.
* Gradients: with several micro-batches per step, every strategy accumulates full float32 gradients on each device and
  shards them with the last micro-batch. With a single one, sharded strategies hold the full gradients of two blocks at
  a time, in bfloat16 and, for the sum, in float32. ddp keeps its buckets from step to step.

The peak is either where all activations are in memory or where all gradients are: as the backward pass proceeds, one
grows and the other shrinks. Temporary buffers of kernels and NCCL, the CUDA context and fragmentation are not counted:
a plan leaves them the rest of the memory, because it fills only the share `USABLE`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ijepa.config.recipe import Recipe
from ijepa.distributed.process_group import Strategy
from ijepa.planning.activations import ACTIVATION_CHECKPOINTING, ActivationCheckpointing, Activations, activations
from ijepa.planning.size import Parameters, RecipeSize

STRATEGIES: tuple[Strategy, ...] = ("none", "ddp", "zero2", "zero3", "hsdp")

USABLE = 0.92
"""Share of a device's memory that a plan fills."""

_FLOAT32, _BFLOAT16 = 4, 2
_SHARDED: tuple[Strategy, ...] = ("zero2", "zero3", "hsdp")


@dataclass(frozen=True)
class State:
    """Bytes on one device that do not depend on the micro-batch.

    Attributes:
        weights: This device's share of the trained weights, float32.
        target: Its share of the target encoder, float32.
        gradients: Its share of the gradients, float32.
        moments: Its share of AdamW's two moments, float32.
        gathered: Copies of weights to compute with.
        early_gradients: Full gradients while activations are in memory, in a step of several micro-batches.
        early_gradients_single: The same in a step of one micro-batch.
        late_gradients: Gradients at the end of a backward pass, in a step of several micro-batches.
        late_gradients_single: The same in a step of one micro-batch.
    """

    weights: int
    target: int
    gradients: int
    moments: int
    gathered: int
    early_gradients: int
    early_gradients_single: int
    late_gradients: int
    late_gradients_single: int

    @property
    def kept(self) -> int:
        """Bytes that a device keeps from step to step, its share of gradients included."""
        return self.weights + self.target + self.gradients + self.moments

    def peak(self, activation_bytes: float, *, several: bool) -> float:
        """Return the peak in bytes, given those of activations and whether a step has several micro-batches."""
        early = self.early_gradients if several else self.early_gradients_single
        late = self.late_gradients if several else self.late_gradients_single
        return self.weights + self.target + self.moments + self.gathered + max(activation_bytes + early, late)


def state(
    parameters: Parameters, strategy: Strategy, shards: int, *, autocast: bool = True, float8: bool = False
) -> State:
    """Return the bytes that one of `shards` devices, which share one copy of the model, holds."""
    sharded = strategy in _SHARDED and shards > 1
    full = _FLOAT32 * parameters.trained
    share = -(-full // shards) if sharded else full  # rounded up, as FSDP pads the last shard
    linear = _BFLOAT16 if autocast else _FLOAT32  # bytes per weight of a linear layer in an encoder's blocks
    gathered = _BFLOAT16 * parameters.autocast if autocast else 0
    if sharded:  # two blocks at a time: the next one is gathered while a block computes
        context_blocks = 2 * parameters.block if strategy == "zero3" else parameters.encoder_blocks
        outside_blocks = parameters.trained + parameters.encoder - 2 * parameters.encoder_blocks
        gathered += linear * (context_blocks + 2 * parameters.block) + _FLOAT32 * outside_blocks
    elif autocast:
        gathered += _BFLOAT16 * (parameters.encoder_blocks + parameters.block)
    if float8:  # one byte per weight
        gathered += parameters.encoder_blocks
    return State(
        weights=share,
        target=-(-_FLOAT32 * parameters.encoder // (shards if sharded else 1)),
        gradients=share,
        moments=2 * share,
        gathered=gathered,
        early_gradients=full,
        early_gradients_single=full if strategy == "ddp" else 0,
        late_gradients=full + (share if sharded else 0),
        late_gradients_single=share + (2 * (linear + _FLOAT32) * parameters.block if sharded else 0),
    )


@dataclass(frozen=True)
class Fit:
    """The largest micro-batch that fits, with one choice of activation checkpointing.

    Attributes:
        activation_checkpointing: The choice, as in the recipe.
        micro: Images per device and micro-batch; 0 if not even one fits.
        micro_batches: Micro-batches per step; 0 if not even one image fits.
        peak: Peak in bytes with it, or with one image if none fits.
        bytes_per_image: Mean bytes of activations per image.
    """

    activation_checkpointing: ActivationCheckpointing
    micro: int
    micro_batches: int
    peak: float
    bytes_per_image: float


@dataclass(frozen=True)
class Memory:
    """Memory of one strategy on one type of device; one fit per choice of activation checkpointing."""

    strategy: Strategy
    shards: int
    state: State
    fits: tuple[Fit, ...]

    @property
    def best(self) -> Fit:
        """The least checkpointing that fits: more micro-batches cost less than to compute activations again."""
        return next((fit for fit in self.fits if fit.micro), self.fits[-1])


def plan_memory(recipe: Recipe, size: RecipeSize, *, devices: int, group: int, capacity: float) -> tuple[Memory, ...]:
    """Plan the memory of every strategy; `none` is one device that takes the whole batch.

    Args:
        recipe: The recipe.
        size: Its size.
        devices: Number of devices.
        group: Number of devices that share one copy of the model with hsdp.
        capacity: Memory of a device in bytes.
    """
    autocast, float8 = recipe.precision.autocast != "none", recipe.precision.fp8 != "none"
    choices = {
        kind: activations(recipe.model, size.tokens, kind, autocast=autocast) for kind in ACTIVATION_CHECKPOINTING
    }
    plans = []
    for strategy in STRATEGIES if devices > 1 else STRATEGIES[:1]:
        share = recipe.batch.total // (1 if strategy == "none" else devices)
        shards = {"zero2": devices, "zero3": devices, "hsdp": group}.get(strategy, 1)
        held = state(size.parameters, strategy, shards, autocast=autocast, float8=float8)
        fits = tuple(fit(held, kind, each, share, USABLE * capacity) for kind, each in choices.items())
        plans.append(Memory(strategy, shards, held, fits))
    return tuple(plans)


def fit(held: State, kind: ActivationCheckpointing, each: Activations, share: int, usable: float) -> Fit:
    """Find the largest divisor of a device's `share` of the batch whose peak fits into `usable` bytes."""

    def peak(micro: int) -> float:
        return held.peak(each.peak(micro), several=micro < share)

    micro = max((size for size in divisors(share) if peak(size) <= usable), default=0)
    mean = float((each.saved + each.passing).mean())
    return Fit(kind, micro, share // micro if micro else 0, peak(micro or 1), mean)


def divisors(number: int) -> Iterator[int]:
    """Yield every divisor of a positive number, in ascending order."""
    return (candidate for candidate in range(1, number + 1) if number % candidate == 0)
