"""Folds of one matrix against itself, from the tiles on and above the diagonal: two log-sum-exps, or extremes."""

# maths.md: Half of the tiles
from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.folds import SIDED, Part
from ...core.numerics import SAFE_SCALE
from ...core.problem import Problem
from ...core.rows import fold_scalars
from ...core.strips import Extremes, RowSums, Softmax, Strip, Tile
from ..shared import LOWEST_EXPONENT
from .half import half_buffers
from .softmax import accumulate, exp_, flush_
from .tiles import Rows, factors_, rows_of, similarity, view

FEW_POSITIVES = 32  # up to this share of a tile's pairs of one label are taken one by one
LEAST = 2.0**-110  # smaller entries of a gradient would make products denormal, which takes a CPU 2 to 5 times as long


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
        exp_(out.sub_(side.shift))
    return slope


def half_sides(problem: Problem, strip: Strip, tiles: list[Tile], part: Part, sums: Sequence[RowSums]) -> None:
    x, buffers = rows_of(strip), half_buffers(strip, 3)
    for tile in tiles:
        values, u, scratch = (view(buffer, len(strip.x), tile.columns) for buffer in buffers)
        values = values if tile.room is None else tile.room
        similarity(strip, x, tile.columns, values)
        for side in _sides(problem, tile, part):
            maximum, total = sums[side.number]
            assert isinstance(maximum, Tensor)
            _side_logits(problem, side, values, u)
            for span, dim in tile.directions:
                if side.shift is not None:
                    total[span] += u.sum(dim)
                else:
                    maximum[span], total[span] = accumulate(maximum[span], total[span], u, dim, scratch)


def half_sides_grad(
    problem: Problem,
    strip: Strip,
    tiles: list[Tile],
    part: Part,
    sides: Sequence[Softmax],
    q: Tensor | None = None,
) -> Iterator[Tensor]:
    x, buffers = rows_of(strip), half_buffers(strip, 5)
    for tile in tiles:
        values, dz, *more = (view(buffer, len(strip.x), tile.columns) for buffer in buffers)
        if tile.room is None:
            similarity(strip, x, tile.columns, values)
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
                flush_(exp_(torch.sub(u, by_row.shift, out=p))).mul_(by_row.weight)
                flush_(exp_(torch.sub(u, by_column.shift, out=other))).mul_(by_column.weight)
                torch.add(p, other, out=u)
            u.mul_(slope)
            if not empty:
                dz.add_(u)
            empty = False
        torch.ops.aten.hardshrink.out(dz, LEAST, out=dz)
        if q is not None:  # both places of a pair are in a tile on the diagonal
            q[tile.rows] += torch.mul(dz, values, out=more[0]).sum(1).mul_(1 / (3 - len(tile.directions)))
        factors_(dz, strip, tile.columns)
        yield dz


def half_tops(problem: Problem, strip: Strip, tiles: list[Tile], nearest: Extremes, farthest: Extremes) -> None:
    assert strip.mask is not None
    (compare,) = strip.mask.compare
    x, buffers = Rows(rows_of(strip).x * strip.scale), half_buffers(strip, 2)
    for tile in tiles:
        sim, z = (view(buffer, len(strip.x), tile.columns) for buffer in buffers)
        similarity(strip, x, tile.columns, sim)
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
