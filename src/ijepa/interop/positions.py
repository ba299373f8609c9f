"""Tables of positions, which others store and we compute: what made a table is read from it, and any other refused.

A table is sin-cos positions of a grid times a factor; it may be that of another grid, stretched over this one, where
pretraining went on at another resolution. All of it can be told from the numbers, the shape of the grid too.

The target encoder's table in a checkpoint of the original code is not exact. That code averages the fixed table with
itself at every step, p = m p + (1 - m) p in float32, and each step rounds: the table drifts. Such a table is accepted,
and the exact one is used in its place.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ijepa.interop.tensors import Lazy, Tensors
from ijepa.model.vision_transformer import sincos_positions
from ijepa.utils.errors import UserError

POSITIONS, PREDICTOR_POSITIONS = "pos_embed", "predictor_pos_embed"

TOLERANCE = 2e-3
"""How far a table may be from the exact one, relative to its factor. Rounding in the moving average reaches 1.4e-4 in
the 187,500 steps of the published schedule and 1.8e-4 in 300,000; a learned table is much farther away."""
_ROUNDING = 1e-6
"""What a float32 table may be off by because sine and cosine were computed in another way: no drift."""


@dataclass(frozen=True)
class Positions:
    """What a table was made by: rows and columns of patches, the grid stretched over them (None: that), the factor."""

    grid: tuple[int, int]
    native: tuple[int, int] | None = None
    scale: float = 1.0
    drift: float = field(default=0.0, compare=False)
    """Largest difference of the table from the exact one, relative to the factor; 0 if rounding explains it."""

    def table(self, width: int) -> Tensor:
        """(1, N, width) float32."""
        return self.scale * sincos_positions(width, self.grid, self.native)[None]


def read_positions(
    tensors: Tensors, width: int, where: object, *, name: str = POSITIONS, grid: tuple[int, int] | None = None
) -> Positions:
    """Return what the table `name` (1, N, width) was made by; the plain table of `grid`, where there is none.

    Args:
        tensors: where the table is.
        width: channels.
        where: the file, for errors.
        name: the table's.
        grid: rows and columns, where they are known.

    Raises:
        UserError: no table and no grid, or a table that is not one of sin-cos positions.
    """
    if name not in tensors:
        if grid is None:
            raise UserError(where, f"{name} is missing", "the file is of another model, or not whole")
        return Positions(grid)
    shape = tensors[name].shape
    count = shape[-2] if len(shape) in (2, 3) and shape[-1] == width and shape[:-2] in ((), (1,)) else 0
    if not count:
        raise UserError(where, f"{name} has shape {shape}", f"(1, patches, {width}) was expected")
    if grid is not None and count != grid[0] * grid[1]:
        raise UserError(where, f"{name} has {count} positions", f"a grid of {grid[0]} x {grid[1]} was expected")
    table = tensors[name].make().double().reshape(count, width)
    rounding = max(_ROUNDING, torch.finfo(tensors[name].dtype).eps)
    for candidate in [grid] if grid is not None else _grids(count):
        if (found := _fit(table, candidate, rounding)) is not None:
            return found
    told = f"of {grid[0]} x {grid[1]} patches" if grid else f"of {count} patches"
    raise UserError(where, f"{name} is not the sin-cos table {told}", "learned ones are not read")


def without_positions(tensors: Tensors) -> dict[str, Lazy]:
    """Return the tensors without tables of positions, which are computed."""
    return {name: tensor for name, tensor in tensors.items() if name not in (POSITIONS, PREDICTOR_POSITIONS)}


def _grids(count: int) -> Iterator[tuple[int, int]]:
    """Every grid of so many patches, the squarest first."""
    for rows in range(math.isqrt(count), 0, -1):
        if count % rows == 0:
            yield rows, count // rows
            if rows * rows != count:
                yield count // rows, rows


def _fit(table: Tensor, grid: tuple[int, int], rounding: float) -> Positions | None:
    """Return what made a table (N, D) float64 if it is one of `grid`; `rounding` is that of its type, relative."""
    native = _native(table, grid)
    if native is None:
        return None
    made = sincos_positions(table.shape[1], grid, native).double()
    fitted = float((table * made).sum() / made.square().sum())
    if not 0 <= fitted < math.inf:
        return None
    error = max(float((table - fitted * made).abs().max()), torch.finfo(torch.float32).eps * fitted)
    scale = _shortest(fitted, error)
    off = float((table - scale * made).abs().max())
    if not off <= max(TOLERANCE, rounding) * scale:
        return None
    drift = off / scale if off > rounding * scale else 0.0
    return Positions(grid, None if native == grid else native, scale, drift)


def _shortest(value: float, error: float) -> float:
    """Return the number with the fewest significant digits, nine at most, within `error` of `value`."""
    rounded = [float(f"{value:.{digits}g}") for digits in range(1, 10)]
    return next((each for each in rounded if abs(each - value) <= error), rounded[-1])


def _native(table: Tensor, grid: tuple[int, int]) -> tuple[int, int] | None:
    """Return the grid that is stretched over `grid`: the first patch's centre lies at (native / size - 1) / 2."""
    quarter = table.shape[1] // 4
    column, row = (torch.atan2(table[0, at], table[0, at + quarter]).item() for at in (0, 2 * quarter))
    if not (math.isfinite(row) and math.isfinite(column)):
        return None
    rows, columns = (round(size * (2 * first + 1)) for size, first in zip(grid, (row, column), strict=True))
    return (rows, columns) if min(rows, columns) > 0 else None
