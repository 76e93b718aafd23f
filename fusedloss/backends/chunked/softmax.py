"""The exponentials of a chunk of rows: their sums, what the products need of them, and the gradient by the logits.

Exponentials are powers of two: on CPUs torch.exp2 takes a quarter of exp's time (0.08 against 0.32 ns an element, two
Zen 5 cores). log2(e) multiplies after the maximum is subtracted, so that its rounding is not magnified by the logits.
A tile's passes end with a copy into the workspace where that is of 16 bits.
"""

# maths.md: Logits; Online log-sum-exp; Gradient of the logits; Gradient by the scale
from __future__ import annotations

import math
import operator

import torch
from torch import Tensor

from ...core.numerics import FLUSH, LOG2E, SAFE_SCALE
from ...core.problem import Problem
from ...core.rows import patch_target
from ...core.strips import Patch, RowSums, Softmax, Strip, Tally
from ..shared import exp_shift
from .masks import admit_, count_, logits, shrink_, softcap_slope
from .tiles import Rows, factors_, fill_, rows_of, rows_times, similarity, tile_buffer, tiles, view, wide_of

BENT_FAR = -1e15  # its tanh is -1
FAR = -1e30  # below every logit; its exponential is 0


def exp_(values: Tensor) -> Tensor:
    return values.mul_(LOG2E).exp2_()


def finite(maximum: Tensor) -> Tensor:
    return torch.where(maximum == -math.inf, 0, maximum)


def flush_(exponentials: Tensor) -> Tensor:
    if exponentials.device.type == "cpu" and exponentials.dtype == torch.float32:
        torch.ops.aten.hardshrink.out(exponentials, FLUSH, out=exponentials)
    return exponentials


def accumulate(maximum: Tensor, total: Tensor, z: Tensor, dim: int, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Folds the tile `z` into the running (maximum, sum of exponentials relative to it) along `dim`."""
    new = torch.maximum(maximum, z.amax(dim))
    torch.sub(z, finite(new).unsqueeze(dim), out=scratch)
    # At the first tile the old maximum is -inf and its total 0: exp(-inf - ...) keeps it 0.
    return new, total * torch.exp(maximum - finite(new)) + exp_(scratch).sum(dim)


def empty_sums(strip: Strip, size: int) -> tuple[Tensor, Tensor]:
    return strip.scale.new_full((size,), -math.inf), strip.scale.new_zeros(size)


def row_sums(maximum: Tensor, total: Tensor) -> RowSums:
    return RowSums(finite(maximum), total)


def stats_rows(strips: list[Strip], tally: Tally | None = None, score: Tensor | None = None) -> RowSums:
    rows = strips[0].x.shape[0]
    maximum, total = empty_sums(strips[0], rows)
    buffers = [tile_buffer(strips) for _ in range(2 if tally is None else 3)]
    for strip in strips:
        x = rows_of(strip)
        for tile in tiles(strip):
            sim, scratch, z = (view(buffer, rows, tile) for buffer in (buffers[0], buffers[1], buffers[-1]))
            z = sim if tally is None else z
            similarity(strip, x, tile, sim)
            shrink_(sim, strip, tile)
            logits(sim, strip, tile, out=z)
            if tally is not None and score is not None:
                count_(tally, strip, z, sim, score)
            maximum, total = accumulate(maximum, total, z, 1, scratch)
    return row_sums(maximum, total)


def stats_rows_and_columns(
    strip: Strip, tally: Tally | None = None, score: Tensor | None = None
) -> tuple[RowSums, RowSums]:
    rows, columns = strip.x.shape[0], strip.y.shape[0]
    maximum, total = empty_sums(strip, rows)
    column_maximum, column_total = empty_sums(strip, columns)
    buffers = tile_buffer([strip]), tile_buffer([strip])
    x = rows_of(strip)
    for tile in tiles(strip):
        z, scratch = (view(buffer, rows, tile) for buffer in buffers)
        similarity(strip, x, tile, z)
        logits(z, strip, tile, out=z)
        if tally is not None and score is not None:
            count_(tally, strip, z, None, score)
        maximum, total = accumulate(maximum, total, z, 1, scratch)
        column_maximum[tile], column_total[tile] = accumulate(column_maximum[tile], column_total[tile], z, 0, scratch)
    return row_sums(maximum, total), row_sums(column_maximum, column_total)


def top_rows(strips: list[Strip]) -> tuple[Tensor, Tensor]:
    """Returns each row's largest logit and its column, the first on ties; -inf and -1 if no column competes."""
    (strip,) = strips
    rows = strip.x.shape[0]
    maximum, column = strip.scale.new_full((rows,), -math.inf), torch.full((rows,), -1, device=strip.x.device)
    buffer, x = tile_buffer(strips), rows_of(strip)
    for tile in tiles(strip):
        z = view(buffer, rows, tile)
        similarity(strip, x, tile, z)
        largest, index = logits(z, strip, tile, out=z).max(1)
        column = torch.where(largest > maximum, index + tile.start, column)
        maximum = torch.maximum(maximum, largest)
    return maximum, column


def exp_rows(
    problem: Problem,
    strips: list[Strip],
    outs: list[Tensor],
    target_sim: Tensor | None,
    tally: Tally | None = None,
    score: Tensor | None = None,
) -> tuple[RowSums, Tensor | None]:
    """Writes `exp(z - shift)`, times the slope under a softcap; `q_i = sum_{j != t} E_ij (sim_ij - sim_it)`.

    The shift is the row's maximum over all strips, or 0 if the host knows that nothing can overflow.
    """
    if outs[0].dtype != strips[0].scale.dtype:
        return _exp_rows_narrow(problem, strips, outs, target_sim, tally, score)
    safe = problem.unshifted
    if problem.softcap and safe and tally is None and not problem.masked:
        return _exp_rows_bent(strips, outs), None
    if target_sim is not None or tally is not None or problem.softcap:
        return _exp_rows_in_steps(strips, outs, target_sim, tally, score)
    rows = strips[0].x.shape[0]
    maximum, total = empty_sums(strips[0], rows)
    guided = any(strip.mask is not None and strip.mask.dropped is not None for strip in strips)
    at_once = 2 if safe and not guided else 1  # few passes: fewer calls are faster
    for strip, out in zip(strips, outs, strict=True):
        x = rows_times(strip, LOG2E)
        for tile in tiles(strip, at_once):
            z = out[:, tile]
            similarity(strip, x, tile, z)
            shrunk = shrink_(z, strip, tile, strip.scale * LOG2E)
            admit_(z, strip, tile, LOG2E, FAR)
            if safe:
                total += z.exp2_().sum(1)
                if shrunk is not None:
                    z.mul_(shrunk)
                factors_(z, strip, tile)
            else:
                maximum = torch.maximum(maximum, z.amax(1))
    if safe:
        return RowSums(torch.zeros_like(total), total), None
    # For rows without a column left by the guide: with a shift of 0, exp2(FAR) is 0.
    shift = finite(maximum.masked_fill(maximum < FAR / 2, -math.inf))
    for strip, out in zip(strips, outs, strict=True):
        for tile in tiles(strip):
            e = out[:, tile]
            total += e.sub_(shift[:, None]).exp2_().sum(1)
            factors_(flush_(e), strip, tile)
    # In fp64, if the device has it: rounded, it would differ from the shift that was subtracted.
    return RowSums(shift.to(wide_of(shift)) / LOG2E, total), None


def _exp_rows_narrow(
    problem: Problem,
    strips: list[Strip],
    outs: list[Tensor],
    target_sim: Tensor | None,
    tally: Tally | None,
    score: Tensor | None,
) -> tuple[RowSums, Tensor | None]:
    """`exp_rows` for a bf16 workspace, which cannot hold logits: each tile is written as exponentials.

    They are relative to a power of two, at least the row's largest so far. If that grows, earlier tiles are multiplied
    by powers of two, which rounds nothing. A power that the host knows to be safe saves a pass.
    """
    rows = strips[0].x.shape[0]
    exponent, total = empty_sums(strips[0], rows)
    known = problem.bound is not None and problem.bound <= SAFE_SCALE
    if known:
        exponent.fill_(round(exp_shift(problem) * LOG2E))
    q = None if target_sim is None else torch.zeros_like(total)
    # Counts and the softcap need logits in natural units, in which a power of two is a shift by a multiple of ln 2.
    unit, shift_unit = (1.0, 1 / LOG2E) if tally is not None or strips[0].softcap else (LOG2E, 1.0)
    buffers = [tile_buffer(strips), total if q is None else tile_buffer(strips)]
    buffers.append(tile_buffer(strips) if strips[0].softcap else total)
    written: list[tuple[Tensor, Tensor]] = []
    for strip, out in zip(strips, outs, strict=True):
        x = rows_of(strip) if q is not None else rows_times(strip, unit)
        for tile in tiles(strip):
            e = view(buffers[0], rows, tile)
            similarity(strip, x, tile, e)
            if target_sim is not None:
                difference = torch.sub(e, target_sim[:, None], out=view(buffers[1], rows, tile))
                e.mul_(strip.scale * unit)
            admit_(e, strip, tile, unit)
            if tally is not None and score is not None:
                count_(tally, strip, e, None, score)
            if strip.softcap:
                slope = softcap_slope(e, strip.softcap, view(buffers[2], rows, tile))
            if not known:
                before, exponent = exponent, torch.maximum(exponent, torch.ceil(e.amax(1) / shift_unit))
                grown = torch.exp2(before - finite(exponent))
                total *= grown
                if q is not None:
                    q *= grown
            e.sub_((finite(exponent) * shift_unit)[:, None])
            flush_(e.exp2_() if unit == LOG2E else exp_(e))
            total += e.sum(1)
            if strip.softcap:
                e.mul_(slope)
            if q is not None:
                q += difference.mul_(e).sum(1)
            factors_(e, strip, tile)
            out[:, tile] = e
            written.append((out[:, tile], exponent))
    shift = finite(exponent)
    if not known:
        for values, then in written[:-1]:
            values.mul_(torch.exp2(then - shift)[:, None].to(values.dtype))
    # The shift that was subtracted, see exp_rows.
    return RowSums(shift.to(wide_of(shift)) / LOG2E if unit == LOG2E else shift * shift_unit, total), q


def _exp_rows_bent(strips: list[Strip], outs: list[Tensor]) -> RowSums:
    """`exp_rows` under a softcap that bounds the exponents: a tile's slopes are computed while it is in cache."""
    rows = strips[0].x.shape[0]
    total, buffer = strips[0].scale.new_zeros(rows), tile_buffer(strips)
    for strip, out in zip(strips, outs, strict=True):
        x = rows_times(strip, 1 / strip.softcap)
        for tile in tiles(strip):
            tanh = view(buffer, rows, tile)
            similarity(strip, x, tile, tanh)
            bias = None if strip.bias is None else strip.bias[tile] / strip.softcap
            if bias is not None:
                tanh.add_(bias)
            tanh.tanh_()
            # For dropped columns: its exponential is 0, and its square is finite.
            if bias is not None:
                tanh.masked_fill_(bias == -math.inf, BENT_FAR)
            if strip.target is not None:
                fill_(tanh, strip.target, tile, BENT_FAR)
            e = torch.mul(tanh, strip.softcap * LOG2E, out=out[:, tile]).exp2_()
            total += e.sum(1)
            e.addcmul_(e, tanh.square_(), value=-1)
            factors_(e, strip, tile)
    return RowSums(torch.zeros_like(total), total)


def _exp_rows_in_steps(
    strips: list[Strip],
    outs: list[Tensor],
    target_sim: Tensor | None,
    tally: Tally | None,
    score: Tensor | None,
) -> tuple[RowSums, Tensor | None]:
    """`exp_rows` with counts, q or a softcap: logits in natural units, and similarities or slopes as well."""
    rows = strips[0].x.shape[0]
    maximum, total = empty_sums(strips[0], rows)
    # If q is wanted, the workspace holds similarities until the second pass, else logits.
    q = None if target_sim is None else torch.zeros_like(total)
    buffer = tile_buffer(strips) if q is not None or strips[0].softcap else total
    for strip, out in zip(strips, outs, strict=True):
        x = rows_of(strip) if q is not None else Rows(rows_of(strip).x * strip.scale)
        for tile in tiles(strip):
            z = out[:, tile]
            similarity(strip, x, tile, z)
            if q is not None:
                z = torch.mul(z, strip.scale, out=view(buffer, rows, tile))
            admit_(z, strip, tile)
            if tally is not None and score is not None:
                count_(tally, strip, z, None, score)
            maximum = torch.maximum(maximum, z.amax(1))
    shift = finite(maximum)[:, None]
    for strip, out in zip(strips, outs, strict=True):
        for tile in tiles(strip):
            e = out[:, tile]
            if target_sim is not None:
                difference = torch.sub(e, target_sim[:, None], out=view(buffer, rows, tile))
                admit_(e.mul_(strip.scale), strip, tile)
            if strip.softcap:
                slope = softcap_slope(e, strip.softcap, view(buffer, rows, tile))
            exp_(e.sub_(shift))
            total += e.sum(1)
            flush_(e)
            if strip.softcap:
                e.mul_(slope)
            if q is not None:
                q += difference.mul_(e).sum(1)
            factors_(e, strip, tile)
    return row_sums(maximum, total), q


def grad_rows(
    strips: list[Strip],
    outs: list[Tensor],
    rows: Softmax,
    columns: Softmax | None,
    entry: Tensor,
    gain: Tensor | None,
    smooth: Tensor | None = None,
) -> Tensor | None:
    """Writes `dz * gain`, and `entry * gain` at the target; `smooth` is subtracted from every admissible column's dz.

    Returns `sum_{j != t} dz_ij (sim_ij - target's)` if the scale's gradient is wanted, without `smooth`.
    """
    count = strips[0].x.shape[0]
    q = None if rows.target_sim is None else torch.zeros_like(rows.shift)
    # A 16-bit workspace takes only finished values.
    wide = outs[0].dtype == strips[0].scale.dtype
    buffers = [tile_buffer(strips) for _ in range(3 if wide else 4)]
    for strip, out in zip(strips, outs, strict=True):
        x = rows_of(strip)
        for tile in tiles(strip):
            sim, z, scratch, *more = (view(buffer, count, tile) for buffer in buffers)
            dz = out[:, tile] if wide else more[0]
            similarity(strip, x, tile, sim)
            factors = shrink_(sim, strip, tile)
            logits(sim, strip, tile, out=z)
            directions = [rows.map(lambda v: v[:, None])]
            if columns is not None:
                directions.append(columns.map(operator.itemgetter(tile)))
            for number, softmax in enumerate(directions):
                p = scratch if number else dz
                torch.sub(z, softmax.shift, out=p)
                flush_(exp_(p)).mul_(softmax.weight)
                if number:
                    dz.add_(p)
                if q is not None and softmax.target_sim is not None:
                    q += (p * (sim - softmax.target_sim)).sum(1)
            if smooth is not None:
                dz.sub_(torch.mul(z > -math.inf, smooth[:, None], out=scratch))
            if strip.softcap:
                dz.mul_(softcap_slope(z, strip.softcap, scratch))
            if factors is not None:
                dz.mul_(factors)
            if gain is not None:
                dz.mul_(gain)
            factors_(dz, strip, tile)
            if not wide:
                out[:, tile] = dz
    if strips[0].target is not None:
        patch = Patch(outs[0], strips[0].target, strips[0].row_factor, strips[0].col_factor)
        patch_target(patch, entry if gain is None else entry * gain)
    return q
