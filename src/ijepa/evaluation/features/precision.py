"""The precision in which encoders compute features: what `autocast` of a protocol means on a device.

It concerns the forward pass of the encoder only. Its output is float32, and heads train in float32.
"""

from typing import Literal

import torch

Autocast = Literal["auto", "none", "bf16"]
"""none: float32. bf16: bfloat16 in linear layers and attention. auto: bf16 on a GPU that supports it, else none."""


def resolved(autocast: Autocast, device: torch.device) -> torch.dtype:
    """Return the dtype of autocast on a device, float32 if there is no autocast."""
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if autocast == "bf16" or (autocast == "auto" and on_gpu) else torch.float32


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype in results: `bfloat16` or `float32`."""
    return str(dtype).removeprefix("torch.")
