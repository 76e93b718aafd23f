"""The softmax of one matrix against itself: each tile on or above the diagonal serves its rows and its columns."""

# maths.md: Half of the tiles
from __future__ import annotations

import math
import operator
from collections.abc import Iterator

import torch
from torch import Tensor

from ...core.numerics import FLUSH, LOG2E, SAFE_SCALE
from ...core.problem import Problem
from ...core.strips import RowSums, Softmax, Strip, Tally, Tile
from ..shared import exp_shift
from .masks import admit_, count_
from .softmax import finite, flush_
from .tiles import factors_, hits, rows_of, rows_times, similarity, view


def half_start(problem: Problem) -> RowSums:
    known, rows = _exponent(problem), problem.weight
    return RowSums(torch.full_like(rows, -math.inf if known is None else known), torch.zeros_like(rows))


def _exponent(problem: Problem) -> float | None:
    """Returns the power of two that is a safe shift for all rows, if the host knows one."""
    if problem.bound is None or problem.bound > SAFE_SCALE:
        return None
    return 0.0 if problem.unshifted else float(round(exp_shift(problem) * LOG2E))


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
    x, buffers = rows_times(strip, unit), half_buffers(strip, 2)
    for tile in tiles:
        z, scratch = (view(buffer, len(strip.x), tile.columns) for buffer in buffers)
        z = z if tile.room is None else tile.room
        similarity(strip, x, tile.columns, z)
        admit_(z, strip, tile.columns, unit)
        if tally is not None and score is not None:
            for part, dim in tile.directions:
                count_(Tally(*(t[part] for t in tally)), strip, z if dim else z.T, None, score[part])
            z.mul_(LOG2E)
        if known is not None:
            _powers_(z, known)
        for part, dim in tile.directions:
            if known is not None:
                total[part] += z.sum(dim)
                continue
            largest = torch.maximum(exponent[part], z.amax(dim))
            torch.sub(z, finite(largest).unsqueeze(dim), out=scratch)
            grown = torch.exp2(exponent[part] - finite(largest))  # 0 at the first tile
            total[part] = total[part] * grown + scratch.exp2_().sum(dim)
            exponent[part] = largest


def _powers_(z: Tensor, shift: float) -> Tensor:
    return (z.sub_(shift) if shift else z).exp2_()


def half_buffers(strip: Strip, count: int) -> list[Tensor]:
    rows = len(strip.x)
    return [strip.scale.new_empty(rows * rows) for _ in range(count)]


def half_grad(
    problem: Problem, strip: Strip, tiles: list[Tile], rows: Softmax, entry: Tensor, q: Tensor | None = None
) -> Iterator[Tensor]:
    known = _exponent(problem) if q is None else None
    x = rows_times(strip, LOG2E) if q is None else rows_of(strip)
    buffers = half_buffers(strip, 4 if q is not None else 3 if known is None else 2)
    # Products of smaller entries would be denormal; where no shift was subtracted, there are none.
    least = FLUSH * float(problem.weight.abs().nan_to_num(0, 0, 0).amax()) if known else 0.0
    for tile in tiles:
        sim, dz, *more = (view(buffer, len(strip.x), tile.columns) for buffer in buffers)
        z = sim if tile.room is None else tile.room
        if tile.room is None:
            similarity(strip, x, tile.columns, sim)
            if q is not None:
                z = torch.mul(sim, strip.scale * LOG2E, out=more[1])
            admit_(z, strip, tile.columns, LOG2E)
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
                flush_(torch.sub(z, side.shift, out=p).exp2_()).mul_(side.weight)
                if q is not None and side.target_sim is not None and number < len(tile.directions):
                    part, dim = tile.directions[number]
                    q[part] += (p * (sim - side.target_sim)).sum(dim)
            dz.add_(more[0])
        inside, index = hits(strip.target, tile.columns)
        dz.scatter_(1, index, torch.where(inside, entry[tile.rows, None], dz.gather(1, index)))
        factors_(dz, strip, tile.columns)
        yield dz
