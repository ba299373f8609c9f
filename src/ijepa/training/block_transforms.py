"""Changes how a model's blocks compute, and not their results: attention kernel, activation checkpointing, compilation.

Each acts on every block separately, in place, and keeps parameters and their names. The order is
`checkpoint_activations`, then `compile_blocks`, then sharding. A compiled block is one graph for all layers of a width:
numbers that differ between layers are passed as tensors, the number of tokens is a symbol, and lengths of sequences are
not passed. So nothing is compiled again after the first steps, if batches are padded to a budget.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ijepa.masking.batch import Sequences
from ijepa.model.attention import Backend
from ijepa.model.ijepa import IJEPA
from ijepa.model.vision_transformer import Attention, Block

ActivationCheckpointing = Literal["none", "selective", "full"]

_KEPT = ("mm", "addmm", "_scaled_mm", "_linear_pointwise", "_scaled_dot_product_", "_varlen_attn")
"""Operations whose results selective checkpointing keeps: matrix products and attention, most of the work."""
_MOST_GRAPHS = 64
"""Graphs per function; torch's default of 8 may be too few for all widths and methods of a model."""


def set_attention(model: torch.nn.Module, backend: Backend) -> None:
    """Set the backend of every attention in `model`; see `ijepa.model.attention.attention`."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.backend = backend


def checkpoint_activations(model: IJEPA, mode: ActivationCheckpointing) -> None:
    """Keep fewer activations of the context encoder's and the predictor's blocks, and recompute the others."""
    if mode == "none":
        return
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    keywords: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        keywords["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    # The target encoder has no backward pass, so it saves nothing.
    for block, name in _parts(model, target=False):
        setattr(block, name, partial(checkpoint, getattr(block, name), **keywords))


def compile_blocks(model: IJEPA, backend: str | Callable[..., Any] = "inductor", dynamic: bool | None = None) -> None:
    """Compile every block of all three parts; batches should be padded to a budget, see the module."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
    for block, name in _parts(model, target=True):
        compiled = torch.compile(getattr(block, name), backend=backend, dynamic=dynamic)
        setattr(block, name, partial(call_compiled, compiled, {}))


def _parts(model: IJEPA, *, target: bool) -> Iterator[tuple[Block, str]]:
    """Yield every block with the name of the method that its part calls."""
    encoders = [model.target_encoder, model.context_encoder] if target else [model.context_encoder]
    for encoder in encoders:
        for block in encoder.blocks:
            yield block, "forward"
    blocks = model.predictor.predictor_blocks
    for number, block in enumerate(blocks):
        yield block, "forward" if 0 < number < len(blocks) - 1 else "attend_and_mlp"


def call_compiled(compiled: Callable[..., Tensor], numbers: dict[Any, Tensor], *arguments: Any) -> Tensor:
    """Call with numbers as tensors on the device, constant widths, and no lengths of sequences.

    The lengths differ at every step. With selective checkpointing, torch 2.11 compiles again for each new length, and
    nothing needs them if `limit` bounds them.
    """
    device = arguments[0].device
    given = []
    for argument in arguments:
        if isinstance(argument, float):
            if (argument, device) not in numbers:
                numbers[argument, device] = torch.tensor(argument, device=device)
            argument = numbers[argument, device]
        elif isinstance(argument, Sequences) and argument.limit:
            argument = replace(argument, lengths=())
        elif isinstance(argument, Tensor) and argument.dim() == 2:  # tokens (T, D): T is a symbol, D a constant
            torch._dynamo.mark_static(argument, 1)
        given.append(argument)
    return compiled(*given)


def _policy(context: Any, operation: Any, *arguments: Any, **keywords: Any) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy

    name = getattr(operation, "__name__", str(operation)).split(".")[0]
    kept = any(name == each or (each.endswith("_") and name.startswith(each)) for each in _KEPT)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
