"""The sweep's primitives in plain torch, on any device: a GEMM into a tile, then in-place passes while it is in cache.

Exponentials are powers of two: on CPUs torch.exp2 takes a quarter of exp's time (0.08 against 0.32 ns an element, two
Zen 5 cores). log2(e) multiplies after the maximum is subtracted, so that its rounding is not magnified by the logits.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator

import torch
from torch import Tensor

from ..problem import Patch, Problem, RowSums, Softmax, Strip, inverse_norms, stats_dtype
from ..rows import finish, merge, operand, patch_target, prepare, settle

__all__ = ["finish", "inverse_norms", "merge", "operand", "prepare", "settle"]  # torch has no faster way to these

LOG2E = math.log2(math.e)
# Columns a GEMM computes at once: the passes that follow find [1024, 1024] fp32, 4 MiB, in a CPU's caches. At 4096 a
# step took 4 % longer.
TILE_COLUMNS = 1024
# Exponentials below this share of the row's largest are 0. Smaller ones turn products into denormals, which made the
# GEMMs 2 to 5 times slower at cold temperatures. 2**-100 leaves 26 bits above the denormals for the other factor.
FLUSH = 2.0**-100


def why_not(problem: Problem) -> str | None:
    return None


def can_exp(problem: Problem) -> bool:
    return True  # exp_rows finds each row's maximum before it exponentiates


def can_store(problem: Problem) -> bool:
    return False  # rows and columns have shifts of their own


def workspace_dtype(problem: Problem) -> torch.dtype:
    return stats_dtype(problem.dtype)


def _tiles(strip: Strip) -> Iterator[slice]:
    for start in range(0, strip.y.shape[0], TILE_COLUMNS):
        yield slice(start, min(start + TILE_COLUMNS, strip.y.shape[0]))


def _rows(strip: Strip) -> Tensor:
    x = strip.x.to(strip.scale.dtype)
    return x if strip.row_factor is None else x * strip.row_factor[:, None]


def _matmul_into(out: Tensor, x: Tensor, y: Tensor, narrow: bool) -> None:
    """`out = x @ y.T` in fp32 arithmetic. `narrow`: the inputs of the loss are 16-bit.

    For those, oneDNN's fp32 GEMM is used where torch has it: its accumulation is fp32 like MKL's, and on CPUs where MKL
    runs at half rate it more than doubles the speed of this step (465 against 200 GFLOP/s on two Zen 5 cores). fp32
    inputs stay with torch.mm, so that they follow torch.set_float32_matmul_precision.
    """
    if narrow and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        out.copy_(torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], ""))
    else:
        torch.mm(x, y.T, out=out)


def _similarity(strip: Strip, x: Tensor, tile: slice, out: Tensor) -> None:
    y = strip.y[tile].to(x.dtype)
    if strip.col_factor is not None:
        y = y * strip.col_factor[tile, None]
    _matmul_into(out, x, y, narrow=strip.y.element_size() == 2)


def _add_bias_(z: Tensor, strip: Strip, tile: slice) -> Tensor:
    """Adds the bias; a removed column is -inf whatever its logits are, NaN included."""
    if strip.bias is None:
        return z
    bias = strip.bias[tile]
    return z.add_(bias).masked_fill_(bias == -math.inf, -math.inf)


def _logits(sim: Tensor, strip: Strip, tile: slice, out: Tensor) -> Tensor:
    """Similarities to logits; -inf at the target, which the sums leave out."""
    _add_bias_(torch.mul(sim, strip.scale, out=out), strip, tile)
    return _fill_target_(out, _hits(strip, tile), -math.inf)


def _hits(strip: Strip, tile: slice) -> tuple[Tensor, Tensor] | None:
    """Rows whose target lies in the tile, and where in it; as (mask, index), so that no shape depends on values."""
    if strip.target is None:
        return None
    index = strip.target - tile.start
    inside = (index >= 0) & (index < tile.stop - tile.start)
    return inside[:, None], index.clamp(0, tile.stop - tile.start - 1)[:, None]


def _fill_target_(values: Tensor, hits: tuple[Tensor, Tensor] | None, value: float) -> Tensor:
    if hits is not None:
        inside, index = hits
        values.scatter_(1, index, torch.where(inside, value, values.gather(1, index)))
    return values


def _exp_(values: Tensor) -> Tensor:
    return values.mul_(LOG2E).exp2_()


def _finite(maximum: Tensor) -> Tensor:
    return torch.where(maximum == -math.inf, 0, maximum)


def _flush_(exponentials: Tensor) -> Tensor:
    if exponentials.device.type == "cpu" and exponentials.dtype == torch.float32:
        torch.ops.aten.hardshrink.out(exponentials, FLUSH, out=exponentials)
    return exponentials


def _accumulate(maximum: Tensor, total: Tensor, z: Tensor, dim: int, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Fold the tile `z` into the running (maximum, sum of exponentials relative to it) along `dim`."""
    new = torch.maximum(maximum, z.amax(dim))
    torch.sub(z, _finite(new).unsqueeze(dim), out=scratch)
    # Where nothing came before, the old maximum is -inf and its total 0: exp(-inf - ...) keeps it 0.
    return new, total * torch.exp(maximum - _finite(new)) + _exp_(scratch).sum(dim)


def _empty_sums(strip: Strip, size: int) -> tuple[Tensor, Tensor]:
    return strip.scale.new_full((size,), -math.inf), strip.scale.new_zeros(size)


def _sums(maximum: Tensor, total: Tensor) -> RowSums:
    return RowSums(_finite(maximum), total)


def _tile_buffer(strips: list[Strip]) -> Tensor:
    columns = min(TILE_COLUMNS, max(strip.y.shape[0] for strip in strips))
    return strips[0].scale.new_empty(strips[0].x.shape[0] * columns)


def _view(buffer: Tensor, rows: int, tile: slice) -> Tensor:
    columns = tile.stop - tile.start
    return buffer[: rows * columns].view(rows, columns)


def stats_rows(strips: list[Strip]) -> RowSums:
    rows = strips[0].x.shape[0]
    maximum, total = _empty_sums(strips[0], rows)
    buffers = _tile_buffer(strips), _tile_buffer(strips)
    for strip in strips:
        x = _rows(strip)
        for tile in _tiles(strip):
            z, scratch = (_view(buffer, rows, tile) for buffer in buffers)
            _similarity(strip, x, tile, z)
            _logits(z, strip, tile, out=z)
            maximum, total = _accumulate(maximum, total, z, 1, scratch)
    return _sums(maximum, total)


def stats_rows_and_columns(strip: Strip) -> tuple[RowSums, RowSums]:
    rows, columns = strip.x.shape[0], strip.y.shape[0]
    maximum, total = _empty_sums(strip, rows)
    column_maximum, column_total = _empty_sums(strip, columns)
    buffers = _tile_buffer([strip]), _tile_buffer([strip])
    x = _rows(strip)
    for tile in _tiles(strip):
        z, scratch = (_view(buffer, rows, tile) for buffer in buffers)
        _similarity(strip, x, tile, z)
        _logits(z, strip, tile, out=z)
        maximum, total = _accumulate(maximum, total, z, 1, scratch)
        column_maximum[tile], column_total[tile] = _accumulate(column_maximum[tile], column_total[tile], z, 0, scratch)
    return _sums(maximum, total), _sums(column_maximum, column_total)


def exp_rows(
    problem: Problem, strips: list[Strip], outs: list[Tensor], target_sim: Tensor | None
) -> tuple[RowSums, Tensor | None]:
    """Write `exp(z - max)` with the row's own maximum over all strips; `q_i = sum_{j != t} E_ij (sim_ij - sim_it)`."""
    rows = strips[0].x.shape[0]
    maximum, total = _empty_sums(strips[0], rows)
    # Where q is wanted the workspace holds similarities until the second pass, else logits right away.
    q = None if target_sim is None else torch.zeros_like(total)
    buffer = _tile_buffer(strips) if q is not None else total
    for strip, out in zip(strips, outs, strict=True):
        x = _rows(strip) if q is not None else _rows(strip) * strip.scale
        for tile in _tiles(strip):
            z = out[:, tile]
            _similarity(strip, x, tile, z)
            if q is not None:
                z = torch.mul(z, strip.scale, out=_view(buffer, rows, tile))
            _add_bias_(z, strip, tile)
            _fill_target_(z, _hits(strip, tile), -math.inf)
            maximum = torch.maximum(maximum, z.amax(1))
    shift = _finite(maximum)[:, None]
    for strip, out in zip(strips, outs, strict=True):
        for tile in _tiles(strip):
            e = out[:, tile]
            if target_sim is not None:
                apart = torch.sub(e, target_sim[:, None], out=_view(buffer, rows, tile))
                _add_bias_(e.mul_(strip.scale), strip, tile)
                _fill_target_(e, _hits(strip, tile), -math.inf)
            _exp_(e.sub_(shift))
            total += e.sum(1)
            _flush_(e)
            if q is not None:
                q += apart.mul_(e).sum(1)
            _factors_(e, strip, tile)
    return _sums(maximum, total), q


def grad_rows(
    strips: list[Strip],
    outs: list[Tensor],
    rows: Softmax,
    columns: Softmax | None,
    entry: Tensor,
    gain: Tensor | None,
) -> Tensor | None:
    """Write `dz * gain`, at the target `entry * gain`.

    Returns `sum_{j != t} dz_ij (sim_ij - target's)` where the scale's gradient is wanted."""
    count = strips[0].x.shape[0]
    q = None if rows.target_sim is None else torch.zeros_like(rows.shift)
    buffers = [_tile_buffer(strips) for _ in range(3)]
    for strip, out in zip(strips, outs, strict=True):
        x = _rows(strip)
        for tile in _tiles(strip):
            dz = out[:, tile]
            sim, z, scratch = (_view(buffer, count, tile) for buffer in buffers)
            _similarity(strip, x, tile, sim)
            _logits(sim, strip, tile, out=z)
            directions = [rows.map(lambda v: v[:, None])]
            if columns is not None:
                directions.append(columns.map(operator.itemgetter(tile)))
            for number, softmax in enumerate(directions):
                p = scratch if number else dz
                torch.sub(z, softmax.shift, out=p)
                _flush_(_exp_(p)).mul_(softmax.weight)
                if number:
                    dz.add_(p)
                if q is not None and softmax.target_sim is not None:
                    q += (p * (sim - softmax.target_sim)).sum(1)
            if gain is not None:
                dz.mul_(gain)
            _factors_(dz, strip, tile)
    if strips[0].target is not None:
        patch = Patch(outs[0], strips[0].target, strips[0].row_factor, strips[0].col_factor)
        patch_target(patch, entry if gain is None else entry * gain)
    return q


def _factors_(values: Tensor, strip: Strip, tile: slice) -> None:
    if strip.row_factor is not None:
        values.mul_(strip.row_factor[:, None])
    if strip.col_factor is not None:
        values.mul_(strip.col_factor[tile])
