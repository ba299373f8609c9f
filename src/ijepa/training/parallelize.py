"""A model on several ranks: which part of it each rank holds, and when gradients are exchanged.

FSDP2's `fully_shard` shards every parameter by rows. ZeRO-2 keeps the gathered weights between forward and backward
(`reshard_after_forward` false); ZeRO-3 frees them after each block's forward (Rajbhandari et al., arXiv 1910.02054).
The target encoder has no backward, so both free its blocks at once.

The linear layers of a block are one unit. They are gathered before the block and not inside it, so what `setup_model`
made of the block's forward (float8, checkpointed, compiled) contains no hook of FSDP. The encoder's unit has all else:
norms, embeddings, the biases of float8's frozen layers. The predictor is one unit, because it calls the layers of its
blocks and not the blocks.

Gradients are summed over ranks and not averaged, because each image has the weight 1 / global batch already. They are
exchanged with the last micro-batch of a step.
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
from ijepa.distributed.local_tensors import local_rows, to_local
from ijepa.distributed.process_group import World
from ijepa.masking.batch import Batch
from ijepa.model.ijepa import IJEPA, IJEPAOutput
from ijepa.model.init import initial_rows
from ijepa.model.vision_transformer import Block
from ijepa.training.model_setup import compiles, setup_model
from ijepa.training.runtime import DEFAULT_NUMERICS, Numerics


@dataclass
class DistributedModel:
    """A model on the ranks of a world. `model` is this rank's, with its own part of the weights."""

    model: IJEPA
    world: World
    wrapper: DistributedDataParallel | None = None

    def backward(self, batch: Batch, forward: AbstractContextManager[Any], *, last: bool) -> IJEPAOutput:
        """Add one micro-batch's gradients.

        Args:
            batch: a micro-batch on the device.
            forward: context of the forward pass.
            last: whether it is the step's last micro-batch, with which gradients are summed over ranks.
        """
        if self.world.mesh is not None:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        with nullcontext() if last or self.wrapper is None else self.wrapper.no_sync():
            with forward:
                output: IJEPAOutput = (self.wrapper or self.model)(batch)
            output.loss.backward()
        return output


def parallelize(
    recipe: Recipe, device: torch.device, world: World, *, autocast: bool, numerics: Numerics = DEFAULT_NUMERICS
) -> DistributedModel:
    """Build a recipe's model and distribute it; its initial weights do not depend on the number of ranks.

    Args:
        recipe: what is trained.
        device: where this rank computes.
        world: the ranks.
        autocast: whether linear layers compute in bfloat16; then their weights are gathered in bfloat16.
        numerics: dtype of the weights and backend of torch.compile.

    Raises:
        UserError: a switch that the device does not support.
    """
    dtype, backend = numerics.dtype, numerics.compile_backend
    if world.mesh is None:
        model = IJEPA(recipe.model, recipe.seed).to(device=device, dtype=dtype)
        setup_model(model, recipe, device, autocast=autocast, compile_backend=backend)
        if world.strategy == "ddp" and compiles(recipe, device):
            from torch._dynamo import config

            # Each graph is one block already, and cutting graphs at gradient buckets fails with recomputation.
            config.optimize_ddp = False
        return DistributedModel(model, world, _replicate(model) if world.strategy == "ddp" else None)
    with torch.device("meta"):
        model = IJEPA(recipe.model, recipe.seed).to(dtype=dtype)
    setup_model(model, recipe, device, autocast=autocast, compile_backend=backend)
    shard(model, world, autocast)
    # `to_empty` would also drop the values of constants, which are not on the meta device.
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    _initialize(model, recipe)
    return DistributedModel(model, world)


def _replicate(model: IJEPA) -> DistributedDataParallel:
    with warnings.catch_warnings():
        # torch 2.13 asks for another argument, which 2.11 does not have.
        warnings.simplefilter("ignore", FutureWarning)
        wrapper = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    # DistributedDataParallel checks that the annotations are exactly these.
    def add(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        work: Any = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    wrapper.register_comm_hook(None, add)  # its default divides by the number of ranks
    return wrapper


def shard(model: IJEPA, world: World, autocast: bool) -> None:
    """Shard a model on the meta device, in place."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # The predictor returns a view of its padded rows, and nothing writes into it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    free = world.strategy == "zero3"
    # Inputs keep their dtype, because the residual stream, norms and embeddings stay in float32.
    narrow = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if autocast else None,
        reduce_dtype=torch.float32 if autocast else None,
        cast_forward_inputs=False,
    )
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    for encoder, freed in ((model.context_encoder, free), (model.target_encoder, True)):
        frozen = shard_frozen(encoder, world.mesh)
        linear = [set(_linear_parameters(block)) for block in encoder.blocks]
        options: dict[str, Any] = {"mesh": world.mesh, "reshard_after_forward": freed}
        # The outer module first: it would not take parameters of an inner module that is sharded already.
        fully_shard(encoder, **options, mp_policy=whole, ignored_params=frozen.union(*linear))
        for block, own in zip(encoder.blocks, linear, strict=True):
            if own:
                fully_shard(block, **options, mp_policy=narrow, ignored_params=set(block.parameters()) - own)
    fully_shard(model.predictor, mesh=world.mesh, reshard_after_forward=free, mp_policy=whole)
    fully_shard(model, mesh=world.mesh, reshard_after_forward=free, mp_policy=whole)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "encode_targets")  # diagnostics call it and not the model's forward


def _linear_parameters(block: Block) -> Iterator[nn.Parameter]:
    for layer in block.modules():
        if isinstance(layer, nn.Linear):
            yield from layer.parameters()


@torch.no_grad()
def _initialize(model: IJEPA, recipe: Recipe) -> None:
    """Draw this rank's rows of every weight, as `IJEPA` draws all rows; the target encoder is a copy."""
    shape = recipe.model
    parts = (
        (model.context_encoder, "encoder.", shape.encoder.initial),
        (model.predictor, "predictor.", shape.predictor.initial),
    )
    for part, prefix, scheme in parts:
        for name, parameter in part.named_parameters():
            rows = initial_rows(
                name, tuple(parameter.shape), local_rows(parameter), recipe.seed, prefix=prefix, scheme=scheme
            )
            to_local(parameter).copy_(rows)
    for copy, source in zip(model.target_encoder.parameters(), model.context_encoder.parameters(), strict=True):
        to_local(copy).copy_(to_local(source))
