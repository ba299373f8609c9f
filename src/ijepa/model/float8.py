"""float8 linear layers in the blocks of both encoders. The narrow predictor and everything else stay as they are.

The operands of each product are scaled to the range of float8 by the largest magnitude of the whole tensor
(`tensorwise`) or of each row (`rowwise`), which is measured at each product. The sum is in float32, the result in the
compute dtype. Activations and weights are e4m3 (4 bits of exponent, 3 of mantissa), gradients with scales per tensor
are e5m2 (Micikevicius et al., arXiv 2209.05433).

The layers of the context encoder are torchao's. The target encoder has no gradient and its weights change once per
step, so it has layers of its own (`FrozenLinear`): they keep a float8 copy of their weights, which is cast once per
update of the moving average. torchao would cast at every forward pass.

Parameters stay float32, the same objects under the same names, so optimizer, moving average and checkpoints do not
change. Convert after `.to(device)`, or on the meta device, before activation checkpointing, compilation and sharding.
The matrix units need widths, and for the gradient of the weights the number of tokens, to be multiples of 16
(`TOKENS`): layers of other widths are not converted, and tokens are padded by the packer's budget.
"""

import importlib.util
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ijepa.model.ijepa import IJEPA
from ijepa.model.linear import Linear
from ijepa.model.vision_transformer import VisionTransformer

Scaling = Literal["tensorwise", "rowwise"]
WeightGradient = Literal["fp8", "bf16"]

TOKENS = 16
"""The number of tokens must be a multiple of this if gradients are computed in float8."""
_E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_E4M3).max
_SMALLEST = 1e-12
"""Lower bound on largest magnitudes, so that a tensor of zeros has a finite scale."""


def why_no_float8(device: torch.device, scaling: Scaling = "tensorwise", *, autocast: bool = True) -> str | None:
    """Return why float8 cannot be computed on a device, or None if it can.

    A CPU computes float8 in software, slowly; tests use it.

    Args:
        device: the device.
        scaling: one scale per tensor or per row.
        autocast: whether linear layers compute in bfloat16; scales per row on a GPU give nothing else.
    """
    if device.type == "cuda":
        if scaling == "rowwise" and not autocast:
            return "scales per row need bfloat16 on a GPU"
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < (8, 9):
            name = torch.cuda.get_device_name(device)
            return f"{name} has no float8 units (compute capability {major}.{minor}, 8.9 is needed)"
    elif device.type == "cpu" and scaling == "rowwise" and not cpu_scales_rows():
        return f"torch {torch.__version__} computes scales per row on a GPU only"
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed (pip install 'ijepa-pretrain[fp8]')"
    return None


def cpu_scales_rows() -> bool:
    """Return whether this torch multiplies float8 matrices with scales per row on a CPU; torch 2.11 does not."""
    x, scale = torch.zeros(16, 16, dtype=_E4M3), torch.ones(16, 1)
    try:
        torch._scaled_mm(x, x.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


def to_float8(model: IJEPA, scaling: Scaling = "tensorwise", weight_gradient: WeightGradient = "fp8") -> None:
    """Make the linear layers in the blocks of both encoders compute in float8, in place.

    Args:
        model: the model, on its device or on meta.
        scaling: one scale per tensor or per row.
        weight_gradient: `bf16` computes the gradient of the weights in the compute dtype, from operands that are not
            rounded to float8.
    """
    from torchao.float8 import convert_to_float8_training

    config = _config(scaling, weight_gradient)
    for parent, name, layer in _layers(model.context_encoder):
        trained = convert_to_float8_training(layer, config=config)
        trained.register_forward_pre_hook(_as_autocast)
        setattr(parent, name, trained)
    for parent, name, layer in _layers(model.target_encoder):
        setattr(parent, name, FrozenLinear(layer, scaling))
    model.target_encoder.register_forward_pre_hook(_refresh)


class FrozenLinear(nn.Module):
    """A linear layer without gradients that keeps a float8 copy of its weights; `refresh` casts the copy.

    It shares `weight` (N, K) and `bias` (N,) with the layer that it is made from.
    """

    def __init__(self, layer: nn.Linear, scaling: Scaling = "tensorwise") -> None:
        super().__init__()
        self.weight, self.bias, self.scaling = layer.weight, layer.bias, scaling
        rows = (1, len(layer.weight)) if scaling == "rowwise" else ()
        device = layer.weight.device
        self.register_buffer("weight8", torch.zeros(layer.weight.shape, dtype=_E4M3, device=device), persistent=False)
        self.register_buffer("scale", torch.ones(rows, device=device), persistent=False)
        self.weight8: Tensor
        self.scale: Tensor
        self.version = -1
        if not layer.weight.is_meta:
            self.refresh()

    @property
    def moved(self) -> bool:
        """Whether the weights, or the rows in the memory of this process, were written to after the last cast."""
        weight: Any = self.weight
        held: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
        return held._version != self.version

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the weights if they have changed. For sharded weights the processes have done so together before."""
        if not self.moved:
            return
        cast, scale = to_e4m3(self.weight, self.scaling)
        self.weight8.copy_(cast)
        self.scale.copy_(scale.view_as(self.scale))
        self.version = self.weight._version

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(T, K) -> (T, N), in autocast's dtype if it is enabled, else in x's."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        cast, scale = to_e4m3(x.to(dtype), self.scaling)
        fused = None if dtype == torch.float32 else self.bias.to(dtype)  # the matrix units add a bias in 16 bits only
        y = torch._scaled_mm(cast, self.weight8.t(), scale, self.scale, fused, out_dtype=dtype, use_fast_accum=True)
        return y + self.bias if fused is None else y


def to_e4m3(x: Tensor, scaling: Scaling, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return x (R, K) in e4m3 and the float32 factor that undoes the scaling: () or, for `rowwise`, (R, 1).

    `largest` () is the largest magnitude of the whole tensor if x is only a part of it.
    """
    if largest is None:
        magnitude = x.abs()
        largest = magnitude.amax(1, keepdim=True) if scaling == "rowwise" else magnitude.amax()
    largest = largest.float().clamp(min=_SMALLEST)
    scaled = x.float() * (_LARGEST / largest)
    return scaled.clamp(-_LARGEST, _LARGEST).to(_E4M3), largest / _LARGEST


def frozen_layers(encoder: nn.Module) -> list[FrozenLinear]:
    """Return the `FrozenLinear` layers of the encoder, in the order of its layers; none before `to_float8`."""
    return [module for module in encoder.modules() if isinstance(module, FrozenLinear)]


def _refresh(encoder: nn.Module, _: Any) -> None:
    for layer in frozen_layers(encoder):
        layer.refresh()


def _layers(encoder: VisionTransformer) -> list[tuple[nn.Module, str, Linear]]:
    """Return (parent, name in it, layer) for each linear layer in the blocks whose widths are multiples of 16."""
    return [
        (parent, name, layer)
        for block in encoder.blocks
        for parent in block.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, Linear) and layer.in_features % 16 == 0 and layer.out_features % 16 == 0
    ]


def _config(scaling: Scaling, weight_gradient: WeightGradient) -> Any:
    from torchao.float8.config import CastConfig, Float8LinearConfig, ScalingType

    if scaling == "rowwise":
        return Float8LinearConfig.from_recipe_name("rowwise" if weight_gradient == "fp8" else "rowwise_with_gw_hp")
    if weight_gradient == "fp8":
        return Float8LinearConfig()
    e5m2 = torch.float8_e5m2
    return Float8LinearConfig(
        cast_config_grad_output=CastConfig(target_dtype=e5m2),
        cast_config_input_for_grad_weight=CastConfig(scaling_type=ScalingType.DISABLED),
        cast_config_grad_output_for_grad_weight=CastConfig(scaling_type=ScalingType.DISABLED, target_dtype=e5m2),
    )


def _as_autocast(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Cast the input of a float8 layer to autocast's dtype: torchao does so for autocast on a GPU only."""
    (x,) = arguments
    device = x.device.type
    return (x.to(torch.get_autocast_dtype(device)),) if torch.is_autocast_enabled(device) else (x,)
