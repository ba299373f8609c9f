"""float8 linear layers in the blocks of both encoders; the narrow predictor and everything else stay as they are.

Every product has its operands scaled to float8's range by the largest magnitude of a whole tensor (`tensorwise`) or of
each row (`rowwise`), found anew each time; it is summed in float32 and leaves in the compute dtype. Values and weights
are e4m3 (4 bits of exponent, 3 of mantissa), gradients under tensor-wide scales e5m2 (Micikevicius et al., arXiv
2209.05433). The context encoder's layers are torchao's. The target encoder has no gradient and its weights move once a
step, so its layers are our own: they keep a float8 copy of their weights, cast when the average has moved and not at
every forward pass, as torchao would.

Parameters stay float32, the same objects under the same names: optimiser, average and checkpoints see nothing of it.
Convert after `.to(device)`, or on the meta device, before anything is recomputed, compiled or sharded. The units want
widths, and for the weights' gradient the number of tokens, to be multiples of 16 (`TOKENS`): layers of other widths are
left alone, tokens are padded by the packer's budget.
"""

import importlib.util
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ijepa.model.ijepa import IJEPA
from ijepa.model.linear import Linear
from ijepa.model.vision_transformer import VisionTransformer
from ijepa.utils.errors import UserError

Scaling = Literal["tensorwise", "rowwise"]
WeightGradient = Literal["fp8", "bf16"]

TOKENS = 16
"""What the number of tokens must be a multiple of, where gradients are computed in float8."""
_E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_E4M3).max
_SMALLEST = 1e-12
"""Largest magnitudes are taken to be no smaller, so that a tensor of zeros has a finite scale."""


def check_float8(device: torch.device, scaling: Scaling = "tensorwise", *, autocast: bool = True) -> None:
    """Refuse float8 where it cannot be had; a CPU computes it in software, slowly, which is how it is tested.

    Raises:
        UserError: a GPU without float8 units (compute capability below 8.9), or no torchao; scales by row in float32 on
            a GPU, whose units then give bfloat16 only; scales by row on a CPU with a torch that lacks them there.
    """
    key = "precision.fp8"
    if device.type == "cuda":
        if scaling == "rowwise" and not autocast:
            raise UserError(f"{key} = rowwise", "gives bfloat16 only on a GPU", "add --precision.autocast bf16")
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            major, minor = capability
            name = torch.cuda.get_device_name(device)
            problem = f"{name} has no float8 units (compute capability {major}.{minor}, 8.9 is needed)"
            raise UserError(key, problem, f"add --{key} none")
    elif device.type == "cpu" and scaling == "rowwise" and not cpu_scales_rows():
        problem = f"torch {torch.__version__} computes it on a GPU only"
        raise UserError(f"{key} = rowwise", problem, f"add --{key} tensorwise, or install a later torch")
    if importlib.util.find_spec("torchao") is None:
        raise UserError(key, "torchao is not installed", f"pip install 'ijepa-pretrain[fp8]', or add --{key} none")


def cpu_scales_rows() -> bool:
    """Return whether this torch multiplies float8 matrices with a scale for each row on a CPU; torch 2.11 does not."""
    x, scale = torch.zeros(16, 16, dtype=_E4M3), torch.ones(16, 1)
    try:
        torch._scaled_mm(x, x.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


def to_float8(model: IJEPA, scaling: Scaling = "tensorwise", weight_gradient: WeightGradient = "fp8") -> None:
    """Make the linear layers of both encoders' blocks compute in float8, in place.

    Args:
        model: the model, on its device or on meta.
        scaling: one scale a tensor, or one a row.
        weight_gradient: `bf16` computes the weights' gradient in the compute dtype, from unrounded operands.
    """
    from torchao.float8 import convert_to_float8_training

    config = _config(scaling, weight_gradient)
    for parent, name, layer in _layers(model.context_encoder):
        trained = convert_to_float8_training(layer, config=config)
        trained.register_forward_pre_hook(_as_autocast)
        setattr(parent, name, trained)
    for parent, name, layer in _layers(model.target_encoder):
        setattr(parent, name, FrozenLinear(layer, scaling))
    model.target_encoder.register_forward_pre_hook(_refresh_before)


class FrozenLinear(nn.Module):
    """A linear layer without gradients whose weights' float8 copy is cast by `refresh` and used until the next.

    Shares `weight` (N, K) and `bias` (N,) with the layer it is made from.
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
        """Whether the weights, or those rows that are in this process's memory, were written to since the last cast."""
        weight: Any = self.weight
        held: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
        return held._version != self.version

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the weights anew if they have moved. Where several processes share them, those do it together before."""
        if not self.moved:
            return
        cast, scale = to_e4m3(self.weight, self.scaling)
        self.weight8.copy_(cast)
        self.scale.copy_(scale.view_as(self.scale))
        self.version = self.weight._version

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(T, K) -> (T, N), in autocast's dtype where it is enabled, else in x's."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        cast, scale = to_e4m3(x.to(dtype), self.scaling)
        bias = self.bias.to(dtype)
        fused = dtype != torch.float32  # the units add a bias of 16 bits only
        y = torch._scaled_mm(
            cast,
            self.weight8.t(),
            scale_a=scale,
            scale_b=self.scale,
            bias=bias if fused else None,
            out_dtype=dtype,
            use_fast_accum=True,
        )
        return y if fused else y + bias


def to_e4m3(x: Tensor, scaling: Scaling, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return x (R, K) as e4m3 and the float32 factor that undoes the scaling: () or, rowwise, (R, 1).

    `largest` () is the greatest magnitude where x is a part of a tensor with one scale.
    """
    if largest is None:
        magnitude = x.abs()
        largest = magnitude.amax(1, keepdim=True) if scaling == "rowwise" else magnitude.amax()
    largest = largest.float().clamp(min=_SMALLEST)
    scaled = x.float() * (_LARGEST / largest)
    return scaled.clamp(-_LARGEST, _LARGEST).to(_E4M3), largest / _LARGEST


def frozen_layers(encoder: VisionTransformer) -> list[FrozenLinear]:
    """Return the encoder's float8 layers without gradients, in the order of its layers; none before `to_float8`."""
    return [module for module in encoder.modules() if isinstance(module, FrozenLinear)]


def refresh_float8(encoder: VisionTransformer) -> None:
    """Cast anew the weights of every `FrozenLinear` that have moved; the encoder's forward does so by itself."""
    for layer in frozen_layers(encoder):
        layer.refresh()


def _refresh_before(module: nn.Module, arguments: Any) -> None:
    refresh_float8(module)  # type: ignore[arg-type]


def _layers(encoder: VisionTransformer) -> list[tuple[nn.Module, str, Linear]]:
    """The linear layers of the encoder's blocks whose widths float8 can take, with their parents and names there."""
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
    """Bring a float8 layer's input into autocast's dtype: torchao does so for a GPU's autocast alone."""
    (x,) = arguments
    device = x.device.type
    return (x.to(torch.get_autocast_dtype(device)),) if torch.is_autocast_enabled(device) else (x,)
