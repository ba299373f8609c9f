"""Position tables, which other libraries store and this one computes: reads what a table was made from.

A table holds the sin-cos positions of a grid times a factor. The grid may be that of another resolution, stretched over
this one, if pretraining continued at another resolution. The numbers determine all of it, the shape of the grid too.
Any other table is refused.

The target encoder's table in a checkpoint of the original code is not exact. That code applies the moving average to
the fixed table at every step, p = m p + (1 - m) p in float32. Each step rounds, so that the table drifts. Such a table
is accepted, and the exact one is used.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ijepa.interop.tensors import LazyTensor, Tensors
from ijepa.model.vision_transformer import sincos_positions
from ijepa.utils.errors import UserError

POSITIONS, PREDICTOR_POSITIONS = "pos_embed", "predictor_pos_embed"

TOLERANCE = 2e-3
"""Largest accepted error of a table, relative to its factor. Rounding in the moving average reaches 1.4e-4 in the
187,500 steps of the published schedule and 1.8e-4 in 300,000; a learned table differs far more."""
_ROUNDING = 1e-6
"""Error of a float32 table whose sine and cosine were computed with other rounding; this is not drift."""


@dataclass(frozen=True)
class Positions:
    """What a table was made from.

    Attributes:
        grid: Rows and columns of patches.
        native: The grid whose positions are stretched over `grid`; None: the same grid.
        scale: The factor.
        drift: Largest error of the table, relative to the factor; 0 if rounding explains it.
    """

    grid: tuple[int, int]
    native: tuple[int, int] | None = None
    scale: float = 1.0
    drift: float = field(default=0.0, compare=False)

    def table(self, width: int) -> Tensor:
        """Return the exact table (1, N, width), float32."""
        return self.scale * sincos_positions(width, self.grid, self.native)[None]


def read_positions(
    tensors: Tensors, width: int, where: object, *, name: str = POSITIONS, grid: tuple[int, int] | None = None
) -> Positions:
    """Return what the table `name` (1, N, width) was made from; without a table, the plain positions of `grid`.

    Args:
        tensors: Tensors, which may include the table.
        width: Number of channels, D.
        where: The file, for errors.
        name: Name of the table.
        grid: Rows and columns, if known.

    Raises:
        UserError: There is neither a table nor a grid, or the table does not hold sin-cos positions.
    """
    if name not in tensors:
        if grid is None:
            raise UserError(where, f"{name} is missing", "the file is incomplete or belongs to a different model")
        return Positions(grid)
    shape = tensors[name].shape
    count = shape[-2] if len(shape) in (2, 3) and shape[-1] == width and shape[:-2] in ((), (1,)) else 0
    if not count:
        raise UserError(where, f"{name} has shape {shape}", f"expected (1, patches, {width})")
    if grid is not None and count != grid[0] * grid[1]:
        raise UserError(where, f"{name} has {count} positions", f"expected a grid of {grid[0]} x {grid[1]}")
    table = tensors[name].load().double().reshape(count, width)
    rounding = max(_ROUNDING, torch.finfo(tensors[name].dtype).eps)
    for candidate in [grid] if grid is not None else _grids(count):
        if (found := _fit(table, candidate, rounding)) is not None:
            return found
    patches = f"{grid[0]} x {grid[1]}" if grid else count
    raise UserError(
        where, f"{name} is not the sin-cos table of {patches} patches", "learned positions are not supported"
    )


def without_positions(tensors: Tensors) -> dict[str, LazyTensor]:
    """Return the tensors without position tables, which are computed."""
    return {name: tensor for name, tensor in tensors.items() if name not in (POSITIONS, PREDICTOR_POSITIONS)}


def _grids(count: int) -> Iterator[tuple[int, int]]:
    """Yield every grid of `count` patches, the most square one first."""
    for rows in range(math.isqrt(count), 0, -1):
        if count % rows == 0:
            yield rows, count // rows
            if rows * rows != count:
                yield count // rows, rows


def _fit(table: Tensor, grid: tuple[int, int], rounding: float) -> Positions | None:
    """Return what made a table (N, D) float64 if it is one of `grid`; `rounding` is the relative error of its type."""
    native = _native_grid(table, grid)
    if native is None:
        return None
    exact = sincos_positions(table.shape[1], grid, native).double()
    factor = float((table * exact).sum() / exact.square().sum())  # least squares
    if not 0 <= factor < math.inf:
        return None
    # A factor is known up to the error of the table, and of float32.
    error = max(float((table - factor * exact).abs().max()), torch.finfo(torch.float32).eps * factor)
    scale = _shortest(factor, error)  # .25, not .24999994
    off = float((table - scale * exact).abs().max())
    if not off <= max(TOLERANCE, rounding) * scale:  # also refuses NaN
        return None
    return Positions(grid, None if native == grid else native, scale, off / scale if off > rounding * scale else 0.0)


def _shortest(value: float, error: float) -> float:
    """Return the number with the fewest significant digits, at most nine, within `error` of `value`."""
    rounded = [float(f"{value:.{digits}g}") for digits in range(1, 10)]
    return next((each for each in rounded if abs(each - value) <= error), rounded[-1])


def _native_grid(table: Tensor, grid: tuple[int, int]) -> tuple[int, int] | None:
    """Return the grid that is stretched over `grid`, from the angles of the first patch.

    The first frequency is 1, so that sine and cosine give the patch's coordinate, (native / size - 1) / 2 per axis.
    """
    quarter = table.shape[1] // 4
    column, row = (torch.atan2(table[0, at], table[0, at + quarter]).item() for at in (0, 2 * quarter))
    if not (math.isfinite(row) and math.isfinite(column)):
        return None
    rows, columns = (round(size * (2 * first + 1)) for size, first in zip(grid, (row, column), strict=True))
    return (rows, columns) if min(rows, columns) > 0 else None
