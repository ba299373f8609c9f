"""What can be done to a model's layers without changing what they compute: attend by another kernel, compute
activations again in the backward pass instead of keeping them, and compile.

All three act on each block alone, in place, and leave parameters and their names as they are. The order is
`recompute_blocks`, then `compile_blocks`, then whatever shards the model. A compiled block is one graph for all layers
of a width: numbers that differ between layers reach it as tensors, the number of tokens as a symbol, and lengths of
sequences not at all. So nothing is compiled again after the first steps, provided batches are padded to a budget.
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

Recompute = Literal["none", "selective", "full"]

_KEPT = ("mm", "addmm", "_scaled_mm", "_linear_pointwise", "_scaled_dot_product_", "_varlen_attn")
"""Selective recomputation keeps the results of these: matrix products and attention, most of the work."""
_MOST_GRAPHS = 64


def set_attention(model: torch.nn.Module, backend: Backend) -> None:
    """Let every attention in `model` use this backend; see `ijepa.model.attention.attention`."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.backend = backend


def recompute_blocks(model: IJEPA, what: Recompute) -> None:
    """Keep less of the context encoder's and the predictor's blocks for the backward pass."""
    if what == "none":
        return
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    keywords: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if what == "selective":
        keywords["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for block, name in _parts(model, target=False):
        setattr(block, name, partial(checkpoint, getattr(block, name), **keywords))


def compile_blocks(model: IJEPA, backend: str | Callable[..., Any] = "inductor", dynamic: bool | None = None) -> None:
    """Compile every block of all three parts; see the module for what that asks of batches."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
    for block, name in _parts(model, target=True):
        compiled = torch.compile(getattr(block, name), backend=backend, dynamic=dynamic)
        setattr(block, name, partial(_call, compiled, {}))


def _parts(model: IJEPA, *, target: bool) -> Iterator[tuple[Block, str]]:
    """Every block with the name of its method that is called."""
    encoders = [model.target_encoder, model.context_encoder] if target else [model.context_encoder]
    for encoder in encoders:
        for block in encoder.blocks:
            yield block, "forward"
    guessing = model.predictor.predictor_blocks
    for number, block in enumerate(guessing):
        yield block, "forward" if 0 < number < len(guessing) - 1 else "attend_and_mlp"


def _call(compiled: Callable[..., Tensor], numbers: dict[Any, Tensor], *arguments: Any) -> Tensor:
    """Call with numbers as tensors on the device, made once, every width a constant, and no lengths of sequences.

    The lengths differ at every step. Nothing needs them where `limit` bounds them, and torch 2.11 compiles again for
    each that it has not seen, if activations are recomputed selectively.
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
        elif isinstance(argument, Tensor) and argument.dim() == 2:
            torch._dynamo.mark_static(argument, 1)
        given.append(argument)
    return compiled(*given)


def _policy(context: Any, operation: Any, *arguments: Any, **keywords: Any) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy

    name = getattr(operation, "__name__", str(operation)).split(".")[0]
    kept = any(name == each or (each.endswith("_") and name.startswith(each)) for each in _KEPT)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
