"""The target encoder's float8 weights over several ranks: each holds its rows in float32, and all rows in float8.

`FrozenLinear` computes with the float8 copy alone, so its float32 weights need never be gathered: this rank's rows are
cut by hand, out of FSDP's sight, as FSDP would cut them, and only the moving average, checkpoints and the cast read
them. Once a step each rank casts its rows and the bytes are gathered: half as many as bfloat16 would send, once and not
at every micro-batch, for one byte a weight kept on every device (630 MB for ViT-H). The scale of a whole tensor is
that of its largest magnitude over all ranks, by one reduction for all layers, so the copy has the bits that one
process would have cast.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ijepa.distributed.local_tensors import local, share
from ijepa.model.float8 import FrozenLinear, frozen_layers, to_e4m3
from ijepa.model.vision_transformer import VisionTransformer

_GATHER: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""torch 2.13's name for it, and the one before."""


def shard_frozen(encoder: VisionTransformer, mesh: Any) -> set[nn.Parameter]:
    """Cut the weights (N, K) of the encoder's float8 layers by rows over `mesh`; return what they have become.

    They must still be on the meta device: rows have no values yet. The encoder gathers its copies before its forward.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    layers = frozen_layers(encoder)
    if not layers:
        return set()
    cut: set[nn.Parameter] = set()
    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
    for layer in layers:
        weight = layer.weight
        start, stop = share(len(weight), mesh)
        own = weight.new_empty(stop - start, *weight.shape[1:])
        whole = DTensor.from_local(own, mesh, placements, run_check=False, shape=weight.shape, stride=weight.stride())
        layer.weight = nn.Parameter(whole, requires_grad=False)
        cut.add(layer.weight)
    group = mesh.get_group(mesh.ndim - 1)
    # Before the encoder's own hook, which then finds nothing to cast.
    encoder.register_forward_pre_hook(lambda module, arguments: gather_float8(layers, group), prepend=True)
    return cut


@torch.no_grad()
def gather_float8(layers: list[FrozenLinear], group: Any) -> None:
    """If weights have moved since the last time, cast on every rank its rows of all, and gather them in `group`."""
    if not any(layer.moved for layer in layers):
        return
    own = [local(layer.weight) for layer in layers]
    largest: list[Tensor | None] = [None] * len(layers)
    if layers[0].scaling == "tensorwise":
        found = torch.stack([part.abs().amax() if len(part) else part.new_zeros(()) for part in own])
        dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
        largest = list(found)
    waiting = []
    for layer, part, most in zip(layers, own, largest, strict=True):
        cast, scale = to_e4m3(part, layer.scaling, most)
        waiting.append(_gather(layer.weight8.view(torch.uint8), cast.view(torch.uint8), group))
        if most is None:
            waiting.append(_gather(layer.scale.view(-1), scale.view(-1), group))
        else:
            layer.scale.copy_(scale)
        layer.version = part._version
    for work, out, rows in waiting:
        work.wait()
        if rows is not out:
            out.copy_(rows[: len(out)])


def _gather(out: Tensor, part: Tensor, group: Any) -> tuple[Any, Tensor, Tensor]:
    """Begin to gather all ranks' rows into `out`, or where they are not as many on each, into rows to be copied."""
    ranks = dist.get_world_size(group)
    each = -(-len(out) // ranks)
    rows = out if each * ranks == len(out) else out.new_empty(each * ranks, *out.shape[1:])
    if len(part) < each:
        part = torch.cat([part, part.new_zeros(each - len(part), *part.shape[1:])])
    return _GATHER(rows, part.contiguous(), group=group, async_op=True), out, rows
