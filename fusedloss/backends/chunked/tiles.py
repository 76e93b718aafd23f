"""The similarities of a chunk's rows, a tile of columns at a time.

If the device multiplies 16-bit matrices into fp32 (`products.narrow`), rows and keys are multiplied as they are, and
norms, scale and log2(e) act on the fp32 tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...core import products
from ...core.numerics import slices, wide_dtype
from ...core.strips import Strip

BIT_ROWS = 128  # at a time in fp64: 768 KiB at D = 768
# Columns of one GEMM: for the passes that follow, [1024, 1024] in fp32, 4 MiB, stay in a CPU's caches. At 4096 a step
# took 4 % longer.
TILE_COLUMNS = 1024


def tiles(strip: Strip, at_once: int = 1) -> Iterator[slice]:
    return slices(strip.y.shape[0], at_once * TILE_COLUMNS)


class Rows(NamedTuple):
    """The left side of a product."""

    x: Tensor  # [R, D]
    factor: Tensor | None = None  # [R, 1], applied to the product, because 16-bit rows are multiplied as they are


def multiplies_narrow(strip: Strip) -> bool:
    return products.narrow(strip.y.dtype, strip.y.device)


def rows_of(strip: Strip) -> Rows:
    factor = None if strip.row_factor is None else strip.row_factor[:, None]
    if multiplies_narrow(strip):
        return Rows(strip.x, factor)
    x = strip.x.to(strip.scale.dtype)
    return Rows(x if factor is None else x * factor)


def rows_times(strip: Strip, unit: float) -> Rows:
    """Returns rows whose products with the keys are `unit` times the logits. With log2(e), exponentials are powers of
    two.

    Rounded once: a separate factor log2(e) would have its rounding magnified by the logits.
    """
    wide = wide_of(strip.scale)
    factor = (strip.scale.to(wide) * unit).expand(strip.x.shape[0])
    if strip.row_factor is not None:
        factor = factor * strip.row_factor
    if multiplies_narrow(strip):
        return Rows(strip.x, factor.to(strip.scale.dtype)[:, None])
    out = strip.scale.new_empty(strip.x.shape)
    for part in slices(strip.x.shape[0], BIT_ROWS):
        out[part] = strip.x[part].to(wide) * factor[part, None]
    return Rows(out)


def wide_of(x: Tensor) -> torch.dtype:
    return wide_dtype(x.device, x.dtype)


def similarity(strip: Strip, rows: Rows, tile: slice, out: Tensor) -> None:
    x = rows.x
    if multiplies_narrow(strip):
        products.mm(out, x, strip.y[tile].T)
        if rows.factor is not None:
            out.mul_(rows.factor)
        if strip.col_factor is not None:
            out.mul_(strip.col_factor[tile])
        return
    y = strip.y[tile].to(x.dtype)
    if strip.col_factor is not None:
        y = y * strip.col_factor[tile, None]
    products.mm(out, x, y.T, strip.onednn)


def similarities(strip: Strip, out: Tensor) -> None:
    """Writes `out = row_factor * col_factor * <x, y>`, nothing else."""
    x = rows_of(strip)
    for tile in tiles(strip):
        similarity(strip, x, tile, out[:, tile])


def factors_(values: Tensor, strip: Strip, tile: slice) -> None:
    if strip.row_factor is not None:
        values.mul_(strip.row_factor[:, None])
    if strip.col_factor is not None:
        values.mul_(strip.col_factor[tile])


def tile_buffer(strips: list[Strip]) -> Tensor:
    columns = min(TILE_COLUMNS, max(strip.y.shape[0] for strip in strips))
    return strips[0].scale.new_empty(strips[0].x.shape[0] * columns)


def view(buffer: Tensor, rows: int, tile: slice) -> Tensor:
    columns = tile.stop - tile.start
    return buffer[: rows * columns].view(rows, columns)


def hits(columns: Tensor | None, tile: slice) -> tuple[Tensor, Tensor]:
    """Returns the rows whose column is in the tile, and its place, as (mask, index): no shape depends on values."""
    assert columns is not None
    index = columns - tile.start
    inside = (index >= 0) & (index < tile.stop - tile.start)
    return inside[:, None], index.clamp(0, tile.stop - tile.start - 1)[:, None]


def fill_(values: Tensor, columns: Tensor, tile: slice, value: float) -> Tensor:
    """Sets `values[i, columns[i]] = value` if that is in the tile."""
    inside, index = hits(columns, tile)
    return values.scatter_(1, index, torch.where(inside, value, values.gather(1, index)))
