"""The sweep's primitives in plain torch, on any device: a GEMM into a tile, then in-place passes while it is in cache.

Exponentials are powers of two: on CPUs torch.exp2 takes a quarter of exp's time (0.08 against 0.32 ns an element, two
Zen 5 cores). log2(e) multiplies after the maximum is subtracted, so that its rounding is not magnified by the logits.

If the device multiplies 16-bit matrices into fp32 (`products.narrow`), rows and keys are multiplied as they are, and
norms, scale and log2(e) act on the fp32 tile. A tile's passes end with a copy into the 16-bit workspace.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import checks, products
from ..core.folds import FOLDS, SIDED, Part
from ..core.mask import GuideRule, StripMask
from ..core.numerics import FLUSH, LOG2E, SAFE_SCALE, UNSHIFTED_SCALE, slices, stats_dtype, wide_dtype
from ..core.numerics import inverse_norms as inverse_norms
from ..core.problem import Problem
from ..core.rows import finish as finish  # torch has no faster form of these, which are used as they are
from ..core.rows import fold_scalars, guide_threshold, patch_target
from ..core.rows import merge as merge
from ..core.rows import operand as operand
from ..core.rows import prepare as prepare
from ..core.rows import settle as settle
from ..core.strips import Extremes, Patch, RowSums, Softmax, Strip, Tally, Tile
from .shared import LOWEST_EXPONENT, exp_shift

# maths.md: Logits; Masks and thresholds; Softcap; Online log-sum-exp; Gradient of the logits; Gradient by the scale
# maths.md: Half of the tiles
BIT_ROWS = 128  # at a time in fp64: 768 KiB at D = 768
# Columns of one GEMM: for the passes that follow, [1024, 1024] in fp32, 4 MiB, stay in a CPU's caches. At 4096 a step
# took 4 % longer.
TILE_COLUMNS = 1024
BENT_FAR = -1e15  # its tanh is -1
FAR = -1e30  # below every logit; its exponential is 0
# Most bytes of unit copies of the embeddings, which save two passes over every tile and one over the keys for every
# chunk. They take no more than a bounded workspace does.
UNIT_BYTES = 32 << 20
FEW_POSITIVES = 32  # up to this share of a tile's pairs of one label are taken one by one
LEAST = 2.0**-110  # smaller entries of a gradient would make products denormal, which takes a CPU 2 to 5 times as long


def why_not(problem: Problem) -> str | None:
    return None


def can_exp(problem: Problem) -> bool:
    """Whether `exp_rows` may run. It computes a row's maximum itself, but smoothing with a mask needs sums first.

    fp16 lacks the range for exponentials relative to a maximum that may still grow; it holds only dz and its gain.
    """
    if any(block.mask.factor is not None for block in problem.blocks):
        return False  # the gradient of a shrunk column is no multiple of its exponential's row
    return not problem.smooths_by_row and workspace_dtype(problem) != torch.float16


def can_store(problem: Problem) -> bool:
    return False  # rows and columns have shifts of their own


def takes_units(problem: Problem) -> bool:
    """Whether the sweep passes unit rows instead of factors: fp32 copies, so never of 16-bit embeddings."""
    size = sum(x.numel() * x.element_size() for x in problem.operands)
    wide = problem.dtype == stats_dtype(problem.dtype)
    if not problem.cosine or not wide or problem.label_smoothing:
        return False
    _, budget = checks.budget(problem.workspace_bytes)
    return size <= min(UNIT_BYTES, budget or UNIT_BYTES)


def can_fold(problem: Problem) -> bool:
    return False  # folds are in torch


def can_halve(problem: Problem) -> bool:
    """Its tiles stay in a CPU's caches. On a GPU, and where 16-bit matrices are multiplied as they are, they were not
    measured."""
    if problem.device.type != "cpu" or products.narrow(problem.dtype, problem.device):
        return False
    return problem.fold is None or problem.fold.name in SIDED


def can_halve_rows(problem: Problem) -> bool:
    """On a GPU the passes over half of the logits, for rows and for columns, are as many as those over all for rows."""
    return False


def workspace_copies(problem: Problem) -> float:
    """Returns a chunk's memory in matrices of its size; a guide's fp32 similarities of block 0 are one more."""
    if problem.fold is not None:
        return FOLDS[problem.fold.name].copies
    guide = problem.blocks[0].mask.guide
    if guide is None:
        return 1
    share = problem.operands[problem.blocks[0].key].shape[0] / max(1, problem.columns)
    return 1 + share * stats_dtype(guide.key.dtype).itemsize / workspace_dtype(problem).itemsize


def workspace_dtype(problem: Problem) -> torch.dtype:
    """Folds see the similarities."""
    narrow = problem.fold is None and products.narrow(problem.dtype, problem.device)
    return problem.dtype if narrow else stats_dtype(problem.dtype)


def _tiles(strip: Strip, columns: int | None = None) -> Iterator[slice]:
    return slices(strip.y.shape[0], columns or TILE_COLUMNS)


class Rows(NamedTuple):
    """The left side of a product."""

    x: Tensor  # [R, D]
    factor: Tensor | None = None  # [R, 1], applied to the product, because 16-bit rows are multiplied as they are


def _narrow(strip: Strip) -> bool:
    return products.narrow(strip.y.dtype, strip.y.device)


def _rows(strip: Strip) -> Rows:
    factor = None if strip.row_factor is None else strip.row_factor[:, None]
    if _narrow(strip):
        return Rows(strip.x, factor)
    x = strip.x.to(strip.scale.dtype)
    return Rows(x if factor is None else x * factor)


def _similarity(strip: Strip, rows: Rows, tile: slice, out: Tensor) -> None:
    x = rows.x
    if _narrow(strip):
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


def _shrink_(sim: Tensor, strip: Strip, tile: slice) -> Tensor | None:
    """Multiplies similarities above the mask's threshold by its factor; returns the multipliers, None if all are 1."""
    if strip.mask is None or strip.mask.factor is None or strip.mask.threshold is None:
        return None
    factors = torch.where(_above(sim, strip.mask, strip.mask.threshold, tile), strip.mask.factor, sim.new_ones(()))
    sim.mul_(factors)
    return factors


def _above(values: Tensor, mask: StripMask, threshold: Tensor, tile: slice) -> Tensor:
    above = values > threshold[:, None]
    for column in mask.exempt.unbind(1) if mask.exempt is not None else ():
        _fill_(above, column, tile, False)
    return above


def _logits(sim: Tensor, strip: Strip, tile: slice, out: Tensor) -> Tensor:
    return _admit_(torch.mul(sim, strip.scale, out=out), strip, tile)


def _admit_(z: Tensor, strip: Strip, tile: slice, unit: float = 1.0, far: float | None = None) -> Tensor:
    """Turns `unit * scale * sim` into logits, with softcap, and -inf for columns that may not compete, even NaN.

    The target gets -inf, too, because the sums leave it out. `far`: added to columns that a guide drops, instead of
    -inf, in a tenth of `masked_fill_`'s time.
    """
    dropped = [] if strip.mask is None else list(_dropped(z, strip.mask, strip.scale * unit, tile))
    if strip.own_scale is not None:
        inside, index = _hits(strip.own, tile)
        entry = z.gather(1, index)
        z.scatter_(1, index, torch.where(inside, entry * (strip.own_scale / strip.scale), entry))
    removed = None
    if strip.bias is not None:
        bias = strip.bias[tile]
        z.add_(bias if unit == 1 else (bias.to(_wide(z)) * unit).to(z.dtype))
        removed = bias == -math.inf
    if strip.softcap:
        z.div_(strip.softcap).tanh_().mul_(strip.softcap)
    if removed is not None and (z.device.type != "cpu" or bool(removed.any())):
        z.masked_fill_(removed, -math.inf)
    for mask in dropped:
        z.masked_fill_(mask, -math.inf)
    if strip.mask is not None and strip.mask.dropped is not None:
        dropped_by_guide = _drops(strip.mask.dropped, tile)
        if far is None:
            z.masked_fill_(dropped_by_guide > 0, -math.inf)
        else:
            z.add_(dropped_by_guide, alpha=far)
    if strip.mask is not None and strip.mask.skip is not None:
        _fill_(z, strip.mask.skip, tile, -math.inf)
    if strip.target is not None:
        _fill_(z, strip.target, tile, -math.inf)
    if strip.mask is not None and strip.mask.without is not None:
        _leave_out_(z, strip.mask.without, tile)
    return z


def _slope(z: Tensor, softcap: float, out: Tensor) -> Tensor:
    """Returns the softcap's derivative from its value z; 0 for the -inf of a dropped column."""
    return torch.addcmul(z.new_ones(()), z, z, value=-(softcap**-2), out=out).clamp_(min=0)


def _dropped(z: Tensor, mask: StripMask, scale: Tensor | None, tile: slice) -> Iterator[Tensor]:
    """Yields a bool matrix of dropped columns of the tile `z = scale * sim` for each mask except the guide's."""
    for compare in mask.compare:
        test = torch.ne if compare.keep else torch.eq
        yield test(compare.rows[:, None], compare.keys[tile])
    if mask.dense is not None:
        yield ~mask.dense[:, tile]
    if mask.threshold is not None and mask.factor is None and scale is not None:
        yield _above(z, mask, mask.threshold * scale, tile)


def admitted(mask: StripMask, tile: slice, target: Tensor | None = None) -> Tensor:
    """Returns True for columns that no part of a mask drops, for masks that do not depend on similarities.

    target: `[R]`, columns that only `skip` drops.
    """
    drops = None if mask.dropped is None else _drops(mask.dropped, tile)
    like = next(t for t in (*(c.rows for c in mask.compare), mask.dense, mask.skip, drops) if t is not None)
    z = torch.zeros(like.shape[0], tile.stop - tile.start, device=like.device)
    for dropped in _dropped(z, mask, None, tile):
        z.masked_fill_(dropped, 1)
    if target is not None:
        _fill_(z, target, tile, 0)
    if mask.skip is not None:
        _fill_(z, mask.skip, tile, 1)
    return z == 0 if drops is None else (z == 0) & (drops == 0)


def _hits(columns: Tensor | None, tile: slice) -> tuple[Tensor, Tensor]:
    """Returns the rows whose column is in the tile, and its place, as (mask, index): no shape depends on values."""
    assert columns is not None
    index = columns - tile.start
    inside = (index >= 0) & (index < tile.stop - tile.start)
    return inside[:, None], index.clamp(0, tile.stop - tile.start - 1)[:, None]


def _fill_(values: Tensor, columns: Tensor, tile: slice, value: float) -> Tensor:
    """Sets `values[i, columns[i]] = value` if that is in the tile."""
    inside, index = _hits(columns, tile)
    return values.scatter_(1, index, torch.where(inside, value, values.gather(1, index)))


def _leave_out_(z: Tensor, columns: Tensor, tile: slice) -> None:
    """Sets `z[i, columns[i, e]] = -inf` for those in the tile. Added, since others would overwrite at the edges."""
    index = columns - tile.start
    inside = (index >= 0) & (index < z.shape[1])
    z.scatter_add_(1, index.clamp_(0, z.shape[1] - 1), torch.where(inside, -math.inf, z.new_zeros(())))


def _count_(tally: Tally | None, strip: Strip, z: Tensor, sim: Tensor | None, score: Tensor) -> None:
    """Adds the tile to the tally. `sim` None: it is `z / scale`, and its sum is not wanted."""
    if tally is None:
        return
    admitted = z > -math.inf
    tally.admitted.add_(admitted.sum(1))
    tally.above.add_((z > score[:, None]).sum(1))
    torch.maximum(tally.maximum, z.amax(1), out=tally.maximum)
    if sim is not None:
        tally.z.add_(z.masked_fill(~admitted, 0).sum(1))
        tally.sim.add_(sim.masked_fill(~admitted, 0).sum(1))


def _exp_(values: Tensor) -> Tensor:
    return values.mul_(LOG2E).exp2_()


def _finite(maximum: Tensor) -> Tensor:
    return torch.where(maximum == -math.inf, 0, maximum)


def _flush_(exponentials: Tensor) -> Tensor:
    if exponentials.device.type == "cpu" and exponentials.dtype == torch.float32:
        torch.ops.aten.hardshrink.out(exponentials, FLUSH, out=exponentials)
    return exponentials


def _accumulate(maximum: Tensor, total: Tensor, z: Tensor, dim: int, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Folds the tile `z` into the running (maximum, sum of exponentials relative to it) along `dim`."""
    new = torch.maximum(maximum, z.amax(dim))
    torch.sub(z, _finite(new).unsqueeze(dim), out=scratch)
    # At the first tile the old maximum is -inf and its total 0: exp(-inf - ...) keeps it 0.
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


def stats_rows(strips: list[Strip], tally: Tally | None = None, score: Tensor | None = None) -> RowSums:
    rows = strips[0].x.shape[0]
    maximum, total = _empty_sums(strips[0], rows)
    buffers = [_tile_buffer(strips) for _ in range(2 if tally is None else 3)]
    for strip in strips:
        x = _rows(strip)
        for tile in _tiles(strip):
            sim, scratch, z = (_view(buffer, rows, tile) for buffer in (buffers[0], buffers[1], buffers[-1]))
            z = sim if tally is None else z
            _similarity(strip, x, tile, sim)
            _shrink_(sim, strip, tile)
            _logits(sim, strip, tile, out=z)
            if tally is not None and score is not None:
                _count_(tally, strip, z, sim, score)
            maximum, total = _accumulate(maximum, total, z, 1, scratch)
    return _sums(maximum, total)


def top_rows(strips: list[Strip]) -> tuple[Tensor, Tensor]:
    """Returns each row's largest logit and its column, the first on ties; -inf and -1 if no column competes."""
    (strip,) = strips
    rows = strip.x.shape[0]
    maximum, column = strip.scale.new_full((rows,), -math.inf), torch.full((rows,), -1, device=strip.x.device)
    buffer, x = _tile_buffer(strips), _rows(strip)
    for tile in _tiles(strip):
        z = _view(buffer, rows, tile)
        _similarity(strip, x, tile, z)
        largest, index = _logits(z, strip, tile, out=z).max(1)
        column = torch.where(largest > maximum, index + tile.start, column)
        maximum = torch.maximum(maximum, largest)
    return maximum, column


def similarities(strip: Strip, out: Tensor) -> None:
    """Writes `out = row_factor * col_factor * <x, y>`, nothing else."""
    x = _rows(strip)
    for tile in _tiles(strip):
        _similarity(strip, x, tile, out[:, tile])


class Drops(NamedTuple):
    """The columns of a block that a guide drops: 1, else 0."""

    stored: Tensor | None  # block 0's, from which the threshold was read; others are computed tile by tile
    strip: Strip
    x: Rows
    threshold: Tensor
    buffer: Tensor


def guide_room(strip: Strip) -> tuple[int, int]:
    return strip.x.shape[0], strip.y.shape[0]


def guide_rows(strips: list[Strip], rule: GuideRule, room: Tensor, own: Tensor | None = None) -> list[Drops]:
    """Returns the guide's drops of each block of a chunk. `strips` hold its embeddings; `room` is for block 0.

    The threshold is read from the product that contains the target: a separate dot product would round differently, and
    half the positives would exceed their own threshold. own: `[R]`, the values read earlier, if no block has the
    target.
    """
    first = strips[0]
    stored = room[: first.x.shape[0], : first.y.shape[0]]
    similarities(first, stored)
    own = _at_target(stored, first.target) if own is None else own
    threshold = guide_threshold(own, rule, first.x.shape[1])[:, None]
    for tile in _tiles(first):
        stored[:, tile].gt_(threshold)
    buffer = _tile_buffer(strips) if len(strips) > 1 else threshold
    known = {id(first.x): _rows(first)}
    for strip in strips:
        if id(strip.x) not in known:
            known[id(strip.x)] = _rows(strip)
    return [Drops(stored if s is first else None, s, known[id(s.x)], threshold, buffer) for s in strips]


def guide_scores(strip: Strip, room: Tensor) -> Tensor:
    """Returns `[R]`, the guide's similarities of the rows' targets, as `guide_rows` reads them."""
    stored = room[: strip.x.shape[0], : strip.y.shape[0]]
    similarities(strip, stored)
    return _at_target(stored, strip.target)


def _at_target(values: Tensor, target: Tensor | None) -> Tensor:
    assert target is not None
    return values.gather(1, target.clamp(min=0)[:, None])[:, 0]


def _drops(drops: Drops, tile: slice) -> Tensor:
    if drops.stored is not None:
        return drops.stored[:, tile]
    out = _view(drops.buffer, drops.x.x.shape[0], tile)
    _similarity(drops.strip, drops.x, tile, out)
    return out.gt_(drops.threshold)


def stats_rows_and_columns(
    strip: Strip, tally: Tally | None = None, score: Tensor | None = None
) -> tuple[RowSums, RowSums]:
    rows, columns = strip.x.shape[0], strip.y.shape[0]
    maximum, total = _empty_sums(strip, rows)
    column_maximum, column_total = _empty_sums(strip, columns)
    buffers = _tile_buffer([strip]), _tile_buffer([strip])
    x = _rows(strip)
    for tile in _tiles(strip):
        z, scratch = (_view(buffer, rows, tile) for buffer in buffers)
        _similarity(strip, x, tile, z)
        _logits(z, strip, tile, out=z)
        if tally is not None and score is not None:
            _count_(tally, strip, z, None, score)
        maximum, total = _accumulate(maximum, total, z, 1, scratch)
        column_maximum[tile], column_total[tile] = _accumulate(column_maximum[tile], column_total[tile], z, 0, scratch)
    return _sums(maximum, total), _sums(column_maximum, column_total)


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
    safe = problem.bound is not None and problem.bound <= UNSHIFTED_SCALE
    if problem.softcap and safe and tally is None and not problem.masked:
        return _exp_rows_bent(strips, outs), None
    if target_sim is not None or tally is not None or problem.softcap:
        return _exp_rows_in_steps(strips, outs, target_sim, tally, score)
    rows = strips[0].x.shape[0]
    maximum, total = _empty_sums(strips[0], rows)
    guided = any(strip.mask is not None and strip.mask.dropped is not None for strip in strips)
    columns = 2 * TILE_COLUMNS if safe and not guided else TILE_COLUMNS  # few passes: fewer calls are faster
    for strip, out in zip(strips, outs, strict=True):
        x = _rows_times(strip, LOG2E)
        for tile in _tiles(strip, columns):
            z = out[:, tile]
            _similarity(strip, x, tile, z)
            _admit_(z, strip, tile, LOG2E, FAR)
            if safe:
                total += z.exp2_().sum(1)
                _factors_(z, strip, tile)
            else:
                maximum = torch.maximum(maximum, z.amax(1))
    if safe:
        return RowSums(torch.zeros_like(total), total), None
    # For rows without a column left by the guide: with a shift of 0, exp2(FAR) is 0.
    shift = _finite(maximum.masked_fill(maximum < FAR / 2, -math.inf))
    for strip, out in zip(strips, outs, strict=True):
        for tile in _tiles(strip):
            e = out[:, tile]
            total += e.sub_(shift[:, None]).exp2_().sum(1)
            _factors_(_flush_(e), strip, tile)
    # In fp64, if the device has it: rounded, it would differ from the shift that was subtracted.
    return RowSums(shift.to(_wide(shift)) / LOG2E, total), None


def _wide(x: Tensor) -> torch.dtype:
    return wide_dtype(x.device, x.dtype)


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
    exponent, total = _empty_sums(strips[0], rows)
    known = problem.bound is not None and problem.bound <= SAFE_SCALE
    if known:
        exponent.fill_(round(exp_shift(problem) * LOG2E))
    q = None if target_sim is None else torch.zeros_like(total)
    # Counts and the softcap need logits in natural units, in which a power of two is a shift by a multiple of ln 2.
    unit, shift_unit = (1.0, 1 / LOG2E) if tally is not None or strips[0].softcap else (LOG2E, 1.0)
    buffers = [_tile_buffer(strips), total if q is None else _tile_buffer(strips)]
    buffers.append(_tile_buffer(strips) if strips[0].softcap else total)
    written: list[tuple[Tensor, Tensor]] = []
    for strip, out in zip(strips, outs, strict=True):
        x = _rows(strip) if q is not None else _rows_times(strip, unit)
        for tile in _tiles(strip):
            e = _view(buffers[0], rows, tile)
            _similarity(strip, x, tile, e)
            if target_sim is not None:
                difference = torch.sub(e, target_sim[:, None], out=_view(buffers[1], rows, tile))
                e.mul_(strip.scale * unit)
            _admit_(e, strip, tile, unit)
            if tally is not None and score is not None:
                _count_(tally, strip, e, None, score)
            if strip.softcap:
                slope = _slope(e, strip.softcap, _view(buffers[2], rows, tile))
            if not known:
                before, exponent = exponent, torch.maximum(exponent, torch.ceil(e.amax(1) / shift_unit))
                grown = torch.exp2(before - _finite(exponent))
                total *= grown
                if q is not None:
                    q *= grown
            e.sub_((_finite(exponent) * shift_unit)[:, None])
            _flush_(e.exp2_() if unit == LOG2E else _exp_(e))
            total += e.sum(1)
            if strip.softcap:
                e.mul_(slope)
            if q is not None:
                q += difference.mul_(e).sum(1)
            _factors_(e, strip, tile)
            out[:, tile] = e
            written.append((out[:, tile], exponent))
    shift = _finite(exponent)
    if not known:
        for values, then in written[:-1]:
            values.mul_(torch.exp2(then - shift)[:, None].to(values.dtype))
    # The shift that was subtracted, see exp_rows.
    return RowSums(shift.to(_wide(shift)) / LOG2E if unit == LOG2E else shift * shift_unit, total), q


def _rows_times(strip: Strip, unit: float) -> Rows:
    """Returns rows whose products with the keys are `unit` times the logits. With log2(e), exponentials are powers of
    two.

    Rounded once: a separate factor log2(e) would have its rounding magnified by the logits.
    """
    wide = _wide(strip.scale)
    factor = (strip.scale.to(wide) * unit).expand(strip.x.shape[0])
    if strip.row_factor is not None:
        factor = factor * strip.row_factor
    if _narrow(strip):
        return Rows(strip.x, factor.to(strip.scale.dtype)[:, None])
    out = strip.scale.new_empty(strip.x.shape)
    for part in slices(strip.x.shape[0], BIT_ROWS):
        out[part] = strip.x[part].to(wide) * factor[part, None]
    return Rows(out)


def _exp_rows_bent(strips: list[Strip], outs: list[Tensor]) -> RowSums:
    """`exp_rows` under a softcap that bounds the exponents: a tile's slopes are computed while it is in cache."""
    rows = strips[0].x.shape[0]
    total, buffer = strips[0].scale.new_zeros(rows), _tile_buffer(strips)
    for strip, out in zip(strips, outs, strict=True):
        x = _rows_times(strip, 1 / strip.softcap)
        for tile in _tiles(strip):
            tanh = _view(buffer, rows, tile)
            _similarity(strip, x, tile, tanh)
            bias = None if strip.bias is None else strip.bias[tile] / strip.softcap
            if bias is not None:
                tanh.add_(bias)
            tanh.tanh_()
            # For dropped columns: its exponential is 0, and its square is finite.
            if bias is not None:
                tanh.masked_fill_(bias == -math.inf, BENT_FAR)
            if strip.target is not None:
                _fill_(tanh, strip.target, tile, BENT_FAR)
            e = torch.mul(tanh, strip.softcap * LOG2E, out=out[:, tile]).exp2_()
            total += e.sum(1)
            e.addcmul_(e, tanh.square_(), value=-1)
            _factors_(e, strip, tile)
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
    maximum, total = _empty_sums(strips[0], rows)
    # If q is wanted, the workspace holds similarities until the second pass, else logits.
    q = None if target_sim is None else torch.zeros_like(total)
    buffer = _tile_buffer(strips) if q is not None or strips[0].softcap else total
    for strip, out in zip(strips, outs, strict=True):
        x = _rows(strip) if q is not None else Rows(_rows(strip).x * strip.scale)
        for tile in _tiles(strip):
            z = out[:, tile]
            _similarity(strip, x, tile, z)
            if q is not None:
                z = torch.mul(z, strip.scale, out=_view(buffer, rows, tile))
            _admit_(z, strip, tile)
            if tally is not None and score is not None:
                _count_(tally, strip, z, None, score)
            maximum = torch.maximum(maximum, z.amax(1))
    shift = _finite(maximum)[:, None]
    for strip, out in zip(strips, outs, strict=True):
        for tile in _tiles(strip):
            e = out[:, tile]
            if target_sim is not None:
                difference = torch.sub(e, target_sim[:, None], out=_view(buffer, rows, tile))
                _admit_(e.mul_(strip.scale), strip, tile)
            if strip.softcap:
                slope = _slope(e, strip.softcap, _view(buffer, rows, tile))
            _exp_(e.sub_(shift))
            total += e.sum(1)
            _flush_(e)
            if strip.softcap:
                e.mul_(slope)
            if q is not None:
                q += difference.mul_(e).sum(1)
            _factors_(e, strip, tile)
    return _sums(maximum, total), q


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
    buffers = [_tile_buffer(strips) for _ in range(3 if wide else 4)]
    for strip, out in zip(strips, outs, strict=True):
        x = _rows(strip)
        for tile in _tiles(strip):
            sim, z, scratch, *more = (_view(buffer, count, tile) for buffer in buffers)
            dz = out[:, tile] if wide else more[0]
            _similarity(strip, x, tile, sim)
            factors = _shrink_(sim, strip, tile)
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
            if smooth is not None:
                dz.sub_(torch.mul(z > -math.inf, smooth[:, None], out=scratch))
            if strip.softcap:
                dz.mul_(_slope(z, strip.softcap, scratch))
            if factors is not None:
                dz.mul_(factors)
            if gain is not None:
                dz.mul_(gain)
            _factors_(dz, strip, tile)
            if not wide:
                out[:, tile] = dz
    if strips[0].target is not None:
        patch = Patch(outs[0], strips[0].target, strips[0].row_factor, strips[0].col_factor)
        patch_target(patch, entry if gain is None else entry * gain)
    return q


def _factors_(values: Tensor, strip: Strip, tile: slice) -> None:
    if strip.row_factor is not None:
        values.mul_(strip.row_factor[:, None])
    if strip.col_factor is not None:
        values.mul_(strip.col_factor[tile])


# One matrix against itself: tiles on and above the diagonal -----------------------------------------------------------


def half_start(problem: Problem) -> RowSums:
    known, rows = _exponent(problem), problem.weight
    return RowSums(torch.full_like(rows, -math.inf if known is None else known), torch.zeros_like(rows))


def _exponent(problem: Problem) -> float | None:
    """Returns the power of two that is a safe shift for all rows, if the host knows one."""
    if problem.bound is None or problem.bound > SAFE_SCALE:
        return None
    return 0.0 if problem.bound <= UNSHIFTED_SCALE else float(round(exp_shift(problem) * LOG2E))


def half_stats(
    problem: Problem,
    strip: Strip,
    tiles: list[Tile],
    sums: RowSums,
    tally: Tally | None = None,
    score: Tensor | None = None,
) -> None:
    known, (exponent, total) = _exponent(problem), sums
    assert isinstance(exponent, Tensor)
    unit = LOG2E if tally is None else 1.0  # counts need logits in natural units
    x, buffers = _rows_times(strip, unit), _half_buffers(strip, 2)
    for tile in tiles:
        z, scratch = (_view(buffer, len(strip.x), tile.columns) for buffer in buffers)
        z = z if tile.room is None else tile.room
        _similarity(strip, x, tile.columns, z)
        _admit_(z, strip, tile.columns, unit)
        if tally is not None and score is not None:
            for part, dim in tile.directions:
                _count_(Tally(*(t[part] for t in tally)), strip, z if dim else z.T, None, score[part])
            z.mul_(LOG2E)
        if known is not None:
            _powers_(z, known)
        for part, dim in tile.directions:
            if known is not None:
                total[part] += z.sum(dim)
                continue
            largest = torch.maximum(exponent[part], z.amax(dim))
            torch.sub(z, _finite(largest).unsqueeze(dim), out=scratch)
            grown = torch.exp2(exponent[part] - _finite(largest))  # 0 at the first tile
            total[part] = total[part] * grown + scratch.exp2_().sum(dim)
            exponent[part] = largest


def _powers_(z: Tensor, shift: float) -> Tensor:
    return (z.sub_(shift) if shift else z).exp2_()


def _half_buffers(strip: Strip, count: int) -> list[Tensor]:
    rows = len(strip.x)
    return [strip.scale.new_empty(rows * rows) for _ in range(count)]


def half_grad(
    problem: Problem, strip: Strip, tiles: list[Tile], rows: Softmax, entry: Tensor, q: Tensor | None = None
) -> Iterator[Tensor]:
    known = _exponent(problem) if q is None else None
    x = _rows_times(strip, LOG2E) if q is None else _rows(strip)
    buffers = _half_buffers(strip, 4 if q is not None else 3 if known is None else 2)
    # Products of smaller entries would be denormal; where no shift was subtracted, there are none.
    least = FLUSH * float(problem.weight.abs().nan_to_num(0, 0, 0).amax()) if known else 0.0
    for tile in tiles:
        sim, dz, *more = (_view(buffer, len(strip.x), tile.columns) for buffer in buffers)
        z = sim if tile.room is None else tile.room
        if tile.room is None:
            _similarity(strip, x, tile.columns, sim)
            if q is not None:
                z = torch.mul(sim, strip.scale * LOG2E, out=more[1])
            _admit_(z, strip, tile.columns, LOG2E)
            if known is not None:
                _powers_(z, known)
        by_row = rows.map(operator.itemgetter((tile.rows, None)))
        by_column = rows.map(operator.itemgetter(tile.columns))
        if known is not None:
            dz = z.mul_(torch.add(by_row.weight, by_column.weight, out=dz))
            if least:
                torch.ops.aten.hardshrink.out(dz, least, out=dz)
        else:
            for number, side in enumerate((by_row, by_column)):
                p = more[0] if number else dz
                _flush_(torch.sub(z, side.shift, out=p).exp2_()).mul_(side.weight)
                if q is not None and side.target_sim is not None and number < len(tile.directions):
                    part, dim = tile.directions[number]
                    q[part] += (p * (sim - side.target_sim)).sum(dim)
            dz.add_(more[0])
        inside, index = _hits(strip.target, tile.columns)
        dz.scatter_(1, index, torch.where(inside, entry[tile.rows, None], dz.gather(1, index)))
        _factors_(dz, strip, tile.columns)
        yield dz


class _Side(NamedTuple):
    """One log-sum-exp of a fold of two, in a tile."""

    number: int
    pulls: bool
    shift: float | None  # of all rows, if it is known to be safe
    others: Tensor | None  # the columns of a row that are not in it; None: all are


def _sides(problem: Problem, tile: Tile, part: Part) -> Iterator[_Side]:
    """Yields the log-sum-exps that the tile has columns for. Labels are sorted: most tiles hold no positives."""
    rows, keys = part.row_labels, part.key_labels
    assert rows is not None and keys is not None
    rows, keys = rows[tile.rows], keys[tile.columns]
    diagonal = tile.rows == tile.columns
    if not diagonal and bool(rows[-1] < keys[0]):
        yield _Side(1, False, _side_shift(problem, False), None)
        return
    positive = rows[:, None] == keys
    others = positive.logical_not()
    for number, mask in enumerate((others, positive)):
        pulls = number == 0
        yield _Side(number, pulls, _side_shift(problem, pulls), mask.fill_diagonal_(True) if diagonal else mask)


def _side_shift(problem: Problem, pulls: bool) -> float | None:
    """Returns a shift that leaves exponents within [-69, 49], as `exp_shift`."""
    fold = problem.fold
    assert fold is not None
    ends = SIDED[fold.name].ends(fold.options, problem.scale_bound, pulls)
    if not problem.cosine or ends is None or ends[1] - ends[0] > 2 * SAFE_SCALE:
        return None
    return min(ends[1], ends[0] + LOWEST_EXPONENT)


def half_sides_start(problem: Problem) -> list[RowSums]:
    shifts, rows = [_side_shift(problem, pulls) for pulls in (True, False)], problem.weight
    return [RowSums(torch.full_like(rows, -math.inf if s is None else s), torch.zeros_like(rows)) for s in shifts]


def _side_logits(problem: Problem, side: _Side, values: Tensor, out: Tensor) -> Tensor | float:
    """Writes them, or with a known shift their exponentials; returns their derivative."""
    fold = problem.fold
    assert fold is not None
    slope = SIDED[fold.name].logits(values, fold_scalars(problem), fold.options, side.pulls, out)
    if side.others is not None:
        out.masked_fill_(side.others, -math.inf)
    if side.shift is not None:
        _exp_(out.sub_(side.shift))
    return slope


def half_sides(problem: Problem, strip: Strip, tiles: list[Tile], part: Part, sums: Sequence[RowSums]) -> None:
    x, buffers = _rows(strip), _half_buffers(strip, 3)
    for tile in tiles:
        values, u, scratch = (_view(buffer, len(strip.x), tile.columns) for buffer in buffers)
        values = values if tile.room is None else tile.room
        _similarity(strip, x, tile.columns, values)
        for side in _sides(problem, tile, part):
            maximum, total = sums[side.number]
            assert isinstance(maximum, Tensor)
            _side_logits(problem, side, values, u)
            for span, dim in tile.directions:
                if side.shift is not None:
                    total[span] += u.sum(dim)
                else:
                    maximum[span], total[span] = _accumulate(maximum[span], total[span], u, dim, scratch)


def half_sides_grad(
    problem: Problem,
    strip: Strip,
    tiles: list[Tile],
    part: Part,
    sides: Sequence[Softmax],
    q: Tensor | None = None,
) -> Iterator[Tensor]:
    x, buffers = _rows(strip), _half_buffers(strip, 5)
    for tile in tiles:
        values, dz, *more = (_view(buffer, len(strip.x), tile.columns) for buffer in buffers)
        if tile.room is None:
            _similarity(strip, x, tile.columns, values)
        else:
            values = tile.room
        empty = True
        for side in _sides(problem, tile, part):
            u, p, other = dz if empty else more[0], more[1], more[2]
            slope = _side_logits(problem, side, values, u)
            by_row = sides[side.number].map(operator.itemgetter((tile.rows, None)))
            by_column = sides[side.number].map(operator.itemgetter(tile.columns))
            if side.shift is not None:
                u.mul_(torch.add(by_row.weight, by_column.weight, out=p))
            else:
                _flush_(_exp_(torch.sub(u, by_row.shift, out=p))).mul_(by_row.weight)
                _flush_(_exp_(torch.sub(u, by_column.shift, out=other))).mul_(by_column.weight)
                torch.add(p, other, out=u)
            u.mul_(slope)
            if not empty:
                dz.add_(u)
            empty = False
        torch.ops.aten.hardshrink.out(dz, LEAST, out=dz)
        if q is not None:  # both places of a pair are in a tile on the diagonal
            q[tile.rows] += torch.mul(dz, values, out=more[0]).sum(1).mul_(1 / (3 - len(tile.directions)))
        _factors_(dz, strip, tile.columns)
        yield dz


def half_tops(problem: Problem, strip: Strip, tiles: list[Tile], nearest: Extremes, farthest: Extremes) -> None:
    assert strip.mask is not None
    (compare,) = strip.mask.compare
    x, buffers = Rows(_rows(strip).x * strip.scale), _half_buffers(strip, 2)
    for tile in tiles:
        sim, z = (_view(buffer, len(strip.x), tile.columns) for buffer in buffers)
        _similarity(strip, x, tile.columns, sim)
        same = compare.rows[:, None] == compare.keys[tile.columns]
        few = int(same.sum()) <= same.numel() // FEW_POSITIVES
        places = same.view(-1).nonzero()[:, 0] if few else None
        row, column = (0, 0) if places is None else (places // same.shape[1], places % same.shape[1])
        for span, dim in tile.directions:
            first = tile.columns.start if dim else tile.rows.start
            if strip.bias is None:
                z.copy_(sim)
            else:
                torch.add(sim, strip.bias[tile.columns] if dim else strip.bias[tile.rows, None], out=z)
            if places is not None:
                i, j = row + tile.rows.start, column + tile.columns.start
                other, values = i != j, z.view(-1)[places].neg_()
                i, j = i[other], j[other]
                farthest.take_few(values[other], *((i, j) if dim else (j, i)))
                nearest.take(z.view(-1).index_fill_(0, places, -math.inf).view_as(z), span, dim, first)
                continue
            nearest.take(torch.where(same, -math.inf, z), span, dim, first)
            z.neg_().masked_fill_(same.logical_not(), -math.inf)
            if tile.rows == tile.columns:
                z.fill_diagonal_(-math.inf)
            farthest.take(z, span, dim, first)
