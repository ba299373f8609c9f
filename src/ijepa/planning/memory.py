"""Memory of one device in a training step, by strategy: what lies there always, what is gathered, what passes.

Weights, moments, target encoder and gradients are float32, as training keeps them. Over n devices that share them
(1 with none and ddp, all with zero2 and zero3, those of a group with hsdp) each holds one n-th. On top, under bfloat16
autocast:

* none, ddp: bfloat16 copies of the linear layers' weights from the first forward pass to the end of the backward pass.
* zero2, hsdp: the context encoder and the predictor gathered whole for as long; the blocks' linear layers in bfloat16,
  all else in float32, and autocast's own bfloat16 copies of the predictor. Two blocks of the target encoder.
* zero3: the same of two blocks of each encoder, beside what is not in blocks.
* In float8, under every strategy: a copy of the target encoder's linear layers, one byte a weight.
* Gradients: with several micro-batches a step they are added up whole, in float32, on every device, whatever the
  strategy, and sharded with the last one. With one micro-batch a step, sharded strategies hold two blocks' whole
  gradients at a time, in bfloat16 and, to be summed, in float32. ddp keeps its buckets from step to step.

The most is in use either where activations are all there or where gradients are: as the backward pass goes through
the layers, one grows as the other shrinks. Temporaries inside kernels, NCCL's buffers, the CUDA context and
fragmentation are not counted: of a device's memory `USABLE` is planned with.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ijepa.model.config import ModelConfig
from ijepa.planning.activations import CHECKPOINTING, Activations, Checkpointing, activations
from ijepa.planning.size import Parameters, Plan

Strategy = Literal["none", "ddp", "zero2", "zero3", "hsdp"]
STRATEGIES: tuple[Strategy, ...] = ("none", "ddp", "zero2", "zero3", "hsdp")

USABLE = 0.92
"""Share of a device's memory that a plan fills."""

_WIDE, _NARROW = 4, 2
_SHARDED: tuple[Strategy, ...] = ("zero2", "zero3", "hsdp")


@dataclass(frozen=True)
class State:
    """Bytes on one device that do not depend on the micro-batch.

    Attributes:
        weights, target, gradients, moments: this device's share, float32.
        gathered: copies to compute with.
        added: gradients that lie there while activations do, where a step has several micro-batches.
        added_once: the same where it has one.
        ended: gradients at the end of a backward pass, with several micro-batches; with one, `ended_once`.
    """

    weights: int
    target: int
    gradients: int
    moments: int
    gathered: int
    added: int
    added_once: int
    ended: int
    ended_once: int

    @property
    def kept(self) -> int:
        """What a device keeps from step to step, with its share of gradients."""
        return self.weights + self.target + self.gradients + self.moments

    def peak(self, passing: float, *, several: bool) -> float:
        """Most bytes in use, given those of activations and whether a step has several micro-batches."""
        added, ended = (self.added, self.ended) if several else (self.added_once, self.ended_once)
        return self.weights + self.target + self.moments + self.gathered + max(passing + added, ended)


def state(
    parameters: Parameters, strategy: Strategy, shards: int, *, autocast: bool = True, float8: bool = False
) -> State:
    """Bytes that one of `shards` devices, which share one copy of the model, holds under a strategy."""
    sharded = strategy in _SHARDED and shards > 1
    n = shards if sharded else 1
    trained, encoder = parameters.trained, parameters.encoder
    whole = _WIDE * trained
    block = parameters.block * (_NARROW if autocast else _WIDE)
    copies = _NARROW * parameters.autocast if autocast else 0
    outside = _WIDE * (trained - parameters.encoder_blocks)  # of context encoder and predictor, not in blocks
    if not sharded:
        gathered = copies + (_NARROW * (parameters.encoder_blocks + parameters.block) if autocast else 0)
    else:
        own = parameters.encoder_blocks * (_NARROW if autocast else _WIDE) if strategy != "zero3" else 2 * block
        beside = 2 * block + _WIDE * (encoder - parameters.encoder_blocks)  # of the target encoder
        gathered = own + outside + copies + beside
    gathered += parameters.encoder_blocks if float8 else 0
    share = -(-whole // n)
    in_flight = 2 * (block + _WIDE * parameters.block) if sharded else 0
    return State(
        weights=share,
        target=-(-_WIDE * encoder // n),
        gradients=share,
        moments=2 * share,
        gathered=gathered,
        added=whole,
        added_once=whole if strategy == "ddp" else 0,
        ended=whole + (share if sharded else 0),
        ended_once=share + in_flight,
    )


@dataclass(frozen=True)
class Fit:
    """The largest micro-batch that fits, with one kind of checkpointing.

    Attributes:
        checkpointing: what is kept of a block's activations.
        micro: images a device and micro-batch; 0 where not even one fits.
        micro_batches: how many a step has; 0 where none fits.
        peak: bytes in use at most with it, or with one image where none fits.
        an_image: mean bytes of an image.
    """

    checkpointing: Checkpointing
    micro: int
    micro_batches: int
    peak: float
    an_image: float


@dataclass(frozen=True)
class Memory:
    """One strategy on one kind of device: what it holds, and what fits beside it for each kind of checkpointing."""

    strategy: Strategy
    shards: int
    state: State
    fits: tuple[Fit, ...]

    @property
    def best(self) -> Fit:
        """The least checkpointing that fits, since several micro-batches cost less than computing anew."""
        return next((fit for fit in self.fits if fit.micro), self.fits[-1])


def memories(
    found: Plan,
    shape: ModelConfig,
    *,
    share: int,
    devices: int,
    group: int,
    capacity: float,
    autocast: bool = True,
    float8: bool = False,
) -> tuple[Memory, ...]:
    """Plan the memory of every strategy; `none` is one device alone, which takes the whole batch.

    Args:
        found: the recipe's size.
        shape: the model's.
        share: images a device and step.
        devices: how many there are.
        group: those that share one copy of the model with hsdp.
        capacity: bytes of a device.
        autocast: linear layers compute in bfloat16.
        float8: those of the encoders' blocks in float8.
    """
    kinds = {kind: activations(shape, found.tokens, kind, autocast=autocast) for kind in CHECKPOINTING}
    rows = []
    for strategy in STRATEGIES if devices > 1 else STRATEGIES[:1]:
        images = share * devices if strategy == "none" else share
        shards = {"zero2": devices, "zero3": devices, "hsdp": group}.get(strategy, 1)
        held = state(found.parameters, strategy, shards, autocast=autocast, float8=float8)
        fits = tuple(fit(held, kind, each, images, USABLE * capacity) for kind, each in kinds.items())
        rows.append(Memory(strategy, shards, held, fits))
    return tuple(rows)


def fit(held: State, kind: Checkpointing, each: Activations, share: int, usable: float) -> Fit:
    """Find the largest divisor of a device's `share` of the batch that fits into `usable` bytes."""

    def peak(micro: int) -> float:
        return held.peak(each.peak(micro), several=micro < share)

    fitting = [micro for micro in divisors(share) if peak(micro) <= usable]
    micro = max(fitting, default=0)
    mean = float((each.saved + each.passing).mean())
    return Fit(kind, micro, share // micro if micro else 0, peak(micro or 1), mean)


def divisors(number: int) -> Iterable[int]:
    """Yield every divisor of a positive number, in no order."""
    for low in range(1, int(number**0.5) + 1):
        if number % low == 0:
            yield low
            if low * low != number:
                yield number // low
