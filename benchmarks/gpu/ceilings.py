"""Upper limits of the device: copying memory, and the matrix products of the encoder in bf16 and float8."""

from typing import Any

import torch
from timing import median_seconds

from ijepa.model.float8 import to_e4m3


def ceilings(device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Measure bytes per second (read and written) of a copy, and operations per second of (M, K) x (K, N) by sizes."""
    size = 1 << (20 if tiny else 30)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found: dict[str, Any] = {"copy": 2 * size / median_seconds(device, lambda: target.copy_(source))}
    rows, width = (256, 64) if tiny else (24576, 1280)
    shapes = {"qkv": (width, 3 * width), "proj": (width, width), "fc1": (width, 4 * width), "fc2": (4 * width, width)}
    if not tiny:
        shapes["square 8192"] = (8192, 8192)
    for name, (k, n) in shapes.items():
        m = 8192 if name.startswith("square") else rows
        x, w = (torch.randn(*s, device=device, dtype=torch.bfloat16) for s in ((m, k), (n, k)))
        work = 2.0 * m * k * n
        found[f"bf16 {name}"] = work / median_seconds(device, lambda x=x, w=w: x @ w.t())
        for scaling in ("tensorwise", "rowwise"):
            try:
                (a, a_scale), (b, b_scale) = to_e4m3(x, scaling), to_e4m3(w, scaling)
                b_scale = b_scale if scaling == "tensorwise" else b_scale.t().contiguous()

                def product(a=a, b=b, a_scale=a_scale, b_scale=b_scale) -> torch.Tensor:
                    return torch._scaled_mm(
                        a, b.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=torch.bfloat16, use_fast_accum=True
                    )

                found[f"fp8 {scaling} {name}"] = work / median_seconds(device, product)
            except RuntimeError as error:
                found[f"fp8 {scaling} {name}"] = f"error: {str(error).splitlines()[0]}"
    return found
