"""The precision in which encoders compute features: a protocol's `autocast`, resolved once by the device.

Only the encoder's forward pass is concerned. Features are float32 from there on, and heads train in float32.
"""

from typing import Literal

import torch

Autocast = Literal["auto", "none", "bf16"]
"""none: float32. bf16: bfloat16 in linear layers and attention. auto: bf16 on a GPU that has it, else none."""


def resolved(autocast: Autocast, device: torch.device) -> torch.dtype:
    """Return the dtype of autocast on a device, float32 where there is none."""
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if autocast == "bf16" or (autocast == "auto" and on_gpu) else torch.float32


def name_of(dtype: torch.dtype) -> str:
    """Return what a result calls a dtype: `bfloat16`, `float32`."""
    return str(dtype).removeprefix("torch.")
