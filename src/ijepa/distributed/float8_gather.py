"""The target encoder's float8 weights on several ranks: each holds its rows in float32, and all rows in float8.

`FrozenLinear` computes with the float8 copy only, so its float32 weights need never be gathered. They are sharded here
and not by FSDP, but in the same way. Only the moving average, checkpoints and the cast read them.

Once per step each rank casts its rows to float8, and the bytes are gathered. Gathering bfloat16 would send twice as
many bytes, and send them for every micro-batch. The price is one byte per weight on every device (630 MB for ViT-H).
With one scale per tensor, the scale is that of the largest magnitude over all ranks, found by one reduction for all
layers. So the copy has the bits that one process would have cast.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ijepa.distributed.local_tensors import shard_range, to_local
from ijepa.model.float8 import FrozenLinear, frozen_layers, to_e4m3
from ijepa.model.vision_transformer import VisionTransformer


def shard_frozen(encoder: VisionTransformer, mesh: Any) -> set[nn.Parameter]:
    """Shard the weights (N, K) of the encoder's float8 layers by rows over `mesh`; return the new parameters.

    The weights must still be on the meta device, because the new ones have no values. Before each forward pass the
    encoder then gathers the float8 copies, if the weights have changed.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    layers = frozen_layers(encoder)
    if not layers:
        return set()
    sharded: set[nn.Parameter] = set()
    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
    for layer in layers:
        weight = layer.weight
        start, stop = shard_range(len(weight), mesh)
        own = weight.new_empty(stop - start, *weight.shape[1:])
        whole = DTensor.from_local(own, mesh, placements, run_check=False, shape=weight.shape, stride=weight.stride())
        layer.weight = nn.Parameter(whole, requires_grad=False)
        sharded.add(layer.weight)
    group = mesh.get_group(mesh.ndim - 1)
    # `prepend`: the encoder's own hook comes after it and finds nothing to cast.
    encoder.register_forward_pre_hook(lambda module, arguments: gather_float8(layers, group), prepend=True)
    return sharded


@torch.no_grad()
def gather_float8(layers: list[FrozenLinear], group: Any) -> None:
    """If the weights have changed since the last call, cast this rank's rows to float8 and gather those of `group`."""
    if not any(layer.moved for layer in layers):
        return
    own = [to_local(layer.weight) for layer in layers]  # each (rows of this rank, K)
    largest: list[Tensor | None] = [None] * len(layers)
    if layers[0].scaling == "tensorwise":
        # A rank without rows of a layer contributes 0, which no magnitude is below.
        found = torch.stack([part.abs().amax() if len(part) else part.new_zeros(()) for part in own])
        dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
        largest = list(found)
    pending = []  # all gathers run at the same time
    for layer, part, most in zip(layers, own, largest, strict=True):
        cast, scale = to_e4m3(part, layer.scaling, most)
        pending.append(gather_rows(layer.weight8.view(torch.uint8), cast.view(torch.uint8), group))
        if most is None:
            pending.append(gather_rows(layer.scale.view(-1), scale.view(-1), group))
        else:
            layer.scale.copy_(scale)
        layer.version = part._version
    for work, out, rows in pending:
        work.wait()
        if rows is not out:
            out.copy_(rows[: len(out)])


def gather_rows(out: Tensor, part: Tensor, group: Any) -> tuple[Any, Tensor, Tensor]:
    """Start to gather all ranks' rows, and return the work, `out`, and the tensor that will hold the rows.

    That tensor is `out` itself if every rank has equally many rows. Otherwise the collective needs padding, and the
    first rows must be copied into `out` once the work is done.
    """
    ranks = dist.get_world_size(group)
    each = -(-len(out) // ranks)
    rows = out if each * ranks == len(out) else out.new_empty(each * ranks, *out.shape[1:])
    if len(part) < each:
        part = torch.cat([part, part.new_zeros(each - len(part), *part.shape[1:])])
    all_gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.13 renamed it
    return all_gather(rows, part.contiguous(), group=group, async_op=True), out, rows
