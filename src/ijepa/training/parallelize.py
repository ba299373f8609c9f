"""A model over several ranks: which part of it each one holds, and when gradients travel.

FSDP2's `fully_shard` cuts every parameter by rows. Kept whole between forward and backward (`reshard_after_forward`
false) that is ZeRO-2, dropped after each block's forward ZeRO-3 (Rajbhandari et al., arXiv 1910.02054). The target
encoder has no backward, so its blocks are dropped at once with either.

A block's linear layers are one unit, gathered before the block and not inside it: what `prepare` made of the block's
forward (float8, recomputed, compiled) runs between FSDP's hooks and holds none. The encoder's unit has all else: norms,
embeddings, the biases of float8's frozen layers. The predictor is one unit, because it calls into its blocks' layers
and not the blocks.

Gradients are summed over ranks and not averaged: each image weighs 1 / global batch already. They travel with the
last micro-batch of a step.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ijepa.config.recipe import Recipe
from ijepa.distributed.float8_gather import shard_frozen
from ijepa.distributed.local_tensors import local, rows_of
from ijepa.distributed.process_group import World
from ijepa.masking.batch import Batch
from ijepa.model.ijepa import IJEPA, IJEPAOutput
from ijepa.model.init import initial_rows
from ijepa.model.vision_transformer import Block
from ijepa.training.model_setup import compiles, prepare


@dataclass
class DistributedModel:
    """A model over the ranks of a world. `model` is this rank's, with its own part of the weights."""

    model: IJEPA
    world: World
    wrapper: DistributedDataParallel | None = None

    def backward(self, batch: Batch, forward: AbstractContextManager[Any], *, last: bool) -> IJEPAOutput:
        """Add one micro-batch's gradients; with the step's `last`, sum them over ranks. `forward` is its context."""
        if self.world.mesh is not None:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        wait = nullcontext() if last or self.wrapper is None else self.wrapper.no_sync()
        with wait:
            with forward:
                outcome: IJEPAOutput = (self.wrapper or self.model)(batch)
            outcome.loss.backward()
        return outcome


def build(
    recipe: Recipe, device: torch.device, world: World, *, autocast: bool, dtype: torch.dtype | None = None
) -> DistributedModel:
    """Build a recipe's model with its initial weights, the same whatever the world, and spread it over the ranks.

    With `autocast` the weights of linear layers travel in bfloat16, in which they are used. `dtype` is that of the
    weights that are kept, float32 if None.

    Raises:
        UserError: a switch that the device does not have.
    """
    if world.mesh is None:
        model = IJEPA(recipe.model, recipe.seed).to(device=device, dtype=dtype)
        prepare(model, recipe, device, autocast=autocast)
        if world.strategy == "ddp" and compiles(recipe, device):
            from torch._dynamo import config

            # Graphs are of a block each already; cutting them at gradient buckets fails on recomputation.
            config.optimize_ddp = False
        return DistributedModel(model, world, _replicate(model) if world.strategy == "ddp" else None)
    with torch.device("meta"):
        model = IJEPA(recipe.model, recipe.seed).to(dtype=dtype)
    prepare(model, recipe, device, autocast=autocast)
    _shard(model, world, autocast)
    # `to_empty` would empty the constants too.
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    _initialize(model, recipe)
    return DistributedModel(model, world)


def _replicate(model: IJEPA) -> DistributedDataParallel:
    with warnings.catch_warnings():
        # torch 2.13 asks for another argument, which 2.11 does not have.
        warnings.simplefilter("ignore", FutureWarning)
        wrapper = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    # DistributedDataParallel checks these very annotations.
    def add(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        work: Any = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    wrapper.register_comm_hook(None, add)
    return wrapper


def _shard(model: IJEPA, world: World, autocast: bool) -> None:
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # The predictor returns a view of its padded rows; nothing writes into it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    drop = world.strategy == "zero3"
    # Inputs keep their dtype: the residual stream stays in float32, and so do norms and embeddings.
    narrow = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if autocast else None,
        reduce_dtype=torch.float32 if autocast else None,
        cast_forward_inputs=False,
    )
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    for encoder, dropped in ((model.context_encoder, drop), (model.target_encoder, True)):
        frozen = shard_frozen(encoder, world.mesh)
        linear = [set(_linear_parameters(block)) for block in encoder.blocks]
        how: dict[str, Any] = {"mesh": world.mesh, "reshard_after_forward": dropped}
        # From outside inwards: a module takes no parameters of another inside that was sharded before it.
        fully_shard(encoder, **how, mp_policy=whole, ignored_params=frozen.union(*linear))
        for block, own in zip(encoder.blocks, linear, strict=True):
            if own:
                fully_shard(block, **how, mp_policy=narrow, ignored_params=set(block.parameters()) - own)
    fully_shard(model.predictor, mesh=world.mesh, reshard_after_forward=drop, mp_policy=whole)
    fully_shard(model, mesh=world.mesh, reshard_after_forward=drop, mp_policy=whole)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "encode_targets")  # diagnosis calls it from outside


def _linear_parameters(block: Block) -> Iterator[nn.Parameter]:
    for layer in block.modules():
        if isinstance(layer, nn.Linear):
            yield from layer.parameters()


@torch.no_grad()
def _initialize(model: IJEPA, recipe: Recipe) -> None:
    """Draw this rank's rows of every weight, as `IJEPA` draws all of them; the target encoder is a copy."""
    shape = recipe.model
    parts = (
        (model.context_encoder, "encoder.", shape.encoder.initial),
        (model.predictor, "predictor.", shape.predictor.initial),
    )
    for part, prefix, scheme in parts:
        for name, parameter in part.named_parameters():
            rows = initial_rows(
                name, tuple(parameter.shape), rows_of(parameter), recipe.seed, prefix=prefix, scheme=scheme
            )
            local(parameter).copy_(rows)
    for copy, source in zip(model.target_encoder.parameters(), model.context_encoder.parameters(), strict=True):
        local(copy).copy_(local(source))
