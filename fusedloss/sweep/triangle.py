"""One matrix against itself: half of the tiles, each for its rows and for its columns.

`S = X X^T` is symmetric. A tile `S_IJ` on or above the diagonal adds to the sums of the rows I, and by its columns to
those of the rows J. Its gradient is that of both places, `W_IJ = dz_IJ + dz_JI^T`: `dX_I += W_IJ X_J` and
`dX_J += W_IJ^T X_I`. That is 4 MND instead of 6.

`Triangle` walks square tiles that stay in a CPU's caches, by primitives of their own. `Staircase` walks chunks of rows,
each against itself and against all rows behind it, by the primitives that kernels have for rows and columns: 3 MND
where the exponentials are stored until all sums are known, or where a fold needs no sum for its gradient.
"""

# maths.md: Half of the tiles

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..backends.protocol import Halves, HalvesFolds, HalvesTops, Result, Stores, Sweeps
from ..core.folds import SIDED, LogSum
from ..core.mask import Mask
from ..core.numerics import LOG2E, group_numbers, group_sizes, row_numbers, slices, wide_dtype
from ..core.problem import Problem
from ..core.rows import fold_part, fold_scalars
from ..core.strips import Extremes, Patch, RowSums, Softmax, Strip, Tile
from . import chunks
from .admission import Admission
from .inputs import Inputs

if TYPE_CHECKING:
    from . import _Sweep


def halved(problem: Problem, backend: Sweeps) -> Problem | None:
    """Returns the problem whose sweep takes half of the tiles, or None: the one place that decides it.

    The logits must be symmetric, with their masks, and the targets of rows that count mutual: row i is the target of
    its target. A margin and a guide have a threshold by row, and smoothing over masked rows a share by row. Values are
    read to find that out by backends that halve tiles, on a CPU. For the others the host has to know it beforehand.
    """
    block, *others = problem.blocks
    if others or block.query != block.key or problem.rows == 0:
        return None
    if block.bias is not None or block.penalty or block.own_penalty or problem.softcap or any(problem.margin):
        return None
    if problem.symmetric or problem.ranks is not None or problem.prefixes or problem.top or problem.smooths_by_row:
        return None
    if problem.targets is not None:
        return None
    if not backend.can_halve(problem):
        strips = problem.mirrored and backend.can_halve_rows(problem) and chunks.strip_rows(problem, backend) > 0
        return problem if strips else None
    if problem.fold is not None:
        labels = problem.fold.labels
        plain = problem.fold.itself and not problem.fold.distance
        return problem if plain and labels is not None and _same(*labels) else None
    if problem.mirrored:
        return problem
    own = row_numbers(problem.rows, problem.target)
    target = problem.target.masked_fill(problem.weight == 0, -1)
    mutual = (target < 0) | (target[target.clamp(min=0)] == own)
    if not bool(mutual.all()) or not _symmetric(block.mask, own):
        return None
    return replace(problem, target=target)


def _symmetric(mask: Mask, own: Tensor) -> bool:
    if mask.margin is not None or mask.guide is not None:
        return False
    if mask.skip is not None and not torch.equal(mask.skip, own):
        return False
    if not all(_same(c.rows, c.keys) for c in mask.compare):
        return False
    if mask.dense is None:
        return True
    parts = list(slices(len(own), chunks.CPU_ROWS))
    return all(torch.equal(mask.dense[a, b], mask.dense[b, a].T) for i, a in enumerate(parts) for b in parts[i:])


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or torch.equal(a, b)


def _of_both_places(entry: Tensor, target: Tensor) -> Tensor:
    """Returns the targets' entries, each with that of its other place; of a row without a target, any number."""
    return entry + entry[target.clamp(min=0)]


def ordered(problem: Problem) -> tuple[Problem, Tensor]:
    """Returns a halved fold's problem with rows sorted by label, and their numbers: positives meet in few tiles.

    Labels come in the order of their first rows, so that the order of sums does not depend on what labels are called.
    """
    fold = problem.fold
    assert fold is not None and fold.labels is not None
    classes = group_numbers(fold.labels[0])
    first = torch.full_like(classes, len(classes)).scatter_reduce_(0, classes, torch.arange(len(classes)), "amin")
    labels, order = first[classes].sort(stable=True)
    fold = replace(fold, labels=(labels, labels))
    operands = (problem.operands[0][order],)
    return replace(problem, operands=operands, weight=problem.weight[order], fold=fold), order


def disordered(result: Result, order: Tensor) -> Result:
    """Returns the result of the rows as they were."""

    def back(x: Tensor) -> Tensor:
        return torch.empty_like(x).index_copy_(0, order, x)

    operands = tuple(None if g is None else back(g) for g in result.operands)
    return result._replace(rows=back(result.rows), operands=operands, counted=[back(x) for x in result.counted])


def tops(problem: Problem, backend: Sweeps) -> tuple[Tensor, Tensor] | None:
    """Returns the columns of each row's largest logit of another label and of its smallest one of its own; -1: none.

    problem: one matrix against itself, of which a mask drops equal labels. None: the backend does not halve.
    """
    squares = backend.can_halve(problem)
    if not problem.rows or not (squares or backend.can_halve_rows(problem)):
        return None
    admission, halves = Admission(Inputs(problem, backend, False)), cast(HalvesTops, backend)
    nearest, farthest = (Extremes.empty(problem.rows, problem.weight) for _ in range(2))
    grid = list(slices(problem.rows, chunks.stats_rows(problem.device) if squares else chunks.STRIP_STATS_ROWS))
    for i, rows in enumerate(grid):
        tiles = [Tile(rows, columns) for columns in grid[i:]] if squares else tiles_of(rows, problem.rows)
        halves.half_tops(problem, admission.strips(rows)[0], tiles, nearest, farthest)
    return nearest.column, farthest.column


def tiles_of(rows: slice, count: int) -> list[Tile]:
    """Returns a chunk of `count` rows against itself and, unless it is the last, against the rows behind it."""
    behind = slice(rows.stop, count)
    return [Tile(rows, rows), *([Tile(rows, behind)] if behind.stop > behind.start else [])]


class Triangle:
    """The tiles on and above the diagonal, and the walk over them."""

    def __init__(self, sweep: _Sweep):
        self.sweep, self.problem, self.inputs = sweep, sweep.problem, sweep.inputs
        self.backend = cast(Halves, sweep.backend)
        self.tiles = self._tiles()

    def _tiles(self) -> list[list[Tile]]:
        """Returns each chunk's row of tiles. The last tiles keep their logits, as many as the workspace holds."""
        problem, rows = self.problem, self.problem.rows
        chunks.workspace_shape(problem, self.backend)  # raises if the budget does not allow a row
        side, most = chunks.half_sides(problem, self.backend)
        grid = list(slices(rows, side))
        count = len(grid) * (len(grid) + 1) // 2
        keeps = any(self.sweep.wants.operands) and (problem.fold is not None or not self.sweep.wants.scale)
        most = min(most, count) if keeps else 0
        rooms = chunks.rooms(problem, self.backend, most, side)
        tiles: list[list[Tile]] = []
        skipped = count - most
        for i, chunk in enumerate(grid):
            tiles.append([])
            for columns in grid[i:]:
                room = next(rooms) if skipped <= 0 else None
                skipped -= 1
                if room is not None:
                    shape = chunk.stop - chunk.start, columns.stop - columns.start
                    room = room[: shape[0] * shape[1]].view(shape)
                tiles[-1].append(Tile(chunk, columns, room))
        return tiles

    def _strips(self) -> Iterator[tuple[list[Tile], Strip]]:
        for tiles in self.tiles:
            yield tiles, self.sweep.admission.strips(tiles[0].rows)[0]

    def _terms(self) -> Tensor:
        """Returns the rows' terms of the gradient by the scale, of no tiles."""
        weight = self.problem.weight
        return torch.zeros_like(weight, dtype=wide_dtype(weight.device, weight.dtype))

    def softmax(self) -> Tensor:
        """Returns the losses of a softmax over each row, and adds the gradients."""
        problem, backend, inputs, sweep = self.problem, self.backend, self.inputs, self.sweep
        sums = backend.half_start(problem)
        counts = sweep.counts(slice(0, problem.rows))
        for tiles, strip in self._strips():
            backend.half_stats(problem, strip, tiles, sums, *counts)
        exponent, total = cast(Tensor, sums.shift), sums.total
        exponent = exponent.masked_fill(exponent == -torch.inf, 0)
        # In fp64, where the device has it: rounded, it would differ from the shift that was subtracted.
        shift = exponent.to(wide_dtype(exponent.device, exponent.dtype)) / LOG2E
        rows = inputs.settle(slice(0, problem.rows), RowSums(shift, total))
        if not sweep.wants.any:
            return rows.loss
        entry = _of_both_places(rows.entry, problem.target)
        softmax = Softmax(exponent, rows.weight, inputs.target_sim)
        q = self._terms() if inputs.target_sim is not None else None
        for tiles, strip in self._strips():
            for tile, values in zip(tiles, backend.half_grad(problem, strip, tiles, softmax, entry, q), strict=True):
                sweep.gradients.add_tile(tile, values)
        sweep.gradients.add_scale(q)
        return rows.loss

    def fold(self) -> tuple[Tensor, list[Tensor]]:
        """Returns the losses of two log-sum-exps of each row, and what they count; adds the gradients."""
        problem, backend, sweep, fold = self.problem, self.backend, self.sweep, self.problem.fold
        assert fold is not None and fold.labels is not None
        part, scalars = fold_part(problem, slice(0, problem.rows)), fold_scalars(problem)
        sums = backend.half_sides_start(problem)
        for tiles, strip in self._strips():
            backend.half_sides(problem, strip, tiles, part, sums)
        found = [cast(Tensor, shift) for shift, _ in sums]
        shifts = [shift.masked_fill(shift == -torch.inf, 0) for shift in found]
        pull, push = (LogSum(shift, total.log()) for shift, (_, total) in zip(shifts, sums, strict=True))
        number = group_sizes(group_numbers(fold.labels[0])) - 1
        rows = SIDED[fold.name].rows(pull, push, number, part, scalars, fold.options)
        if sweep.wants.any:
            totals = [total.masked_fill(total == 0, 1) for _, total in sums]
            sides = [Softmax(s, w / t, None) for s, w, t in zip(shifts, (rows.pull, rows.push), totals, strict=True)]
            q = self._terms() if sweep.wants.scale else None
            for tiles, strip in self._strips():
                gradients = backend.half_sides_grad(problem, strip, tiles, part, sides, q)
                for tile, values in zip(tiles, gradients, strict=True):
                    sweep.gradients.add_tile(tile, values)
            if q is not None:
                q /= problem.scale  # dz is the gradient by a similarity
            sweep.gradients.add_scale(q)
        return rows.folded.loss, [] if rows.folded.count is None else [rows.folded.count]


class Staircase:
    """Chunks of rows, each against itself and against all rows behind it: two tiles, or one of the last chunk."""

    def __init__(self, sweep: _Sweep):
        self.sweep, self.problem, self.backend = sweep, sweep.problem, sweep.backend
        self.side = chunks.strip_rows(sweep.problem, sweep.backend)

    def _tiles(self, side: int) -> Iterator[tuple[Tile, Strip]]:
        count = self.problem.rows
        for rows in slices(count, side):
            strip = self.sweep.admission.strips(rows)[0]
            on_diagonal, *others = tiles_of(rows, count)
            yield on_diagonal, strip.columns(rows)
            for behind in others:
                # No row skips itself there, and without a mask the kernels have larger tiles. Mirrored masks have
                # nothing else but comparisons.
                mask = strip.mask
                mask = mask._replace(skip=None) if mask is not None and mask.compare else None
                yield behind, strip._replace(mask=mask).columns(behind.columns)

    def softmax(self) -> Tensor:
        """Returns the losses of a softmax over each row, and adds the gradients."""
        problem, backend, sweep = self.problem, self.backend, self.sweep
        rooms: list[Tensor] = []
        stored = False
        if sweep.wants.any:
            rooms, stored = chunks.tile_rooms(problem, backend, [tile for tile, _ in self._tiles(self.side)])
        rows = sweep.inputs.settle(slice(0, problem.rows), self._stored(rooms) if stored else self._sums())
        if not sweep.wants.any:
            return rows.loss
        softmax = rows.softmax(sweep.inputs.target_sim)
        entry = _of_both_places(rows.entry, problem.target)
        for (tile, strip), out in zip(self._tiles(self.side), rooms, strict=True):
            by_row, by_column = (softmax.map(operator.itemgetter(part)) for part in (tile.rows, tile.columns))
            own_entry, q = entry[tile.rows], None
            if stored:
                assert strip.target is not None
                patch = Patch(out, strip.target, strip.row_factor, strip.col_factor)
                cast(Stores, backend).weigh(patch, by_row.weight, by_column.weight, own_entry)
            else:
                q = backend.grad_rows([strip], [out], by_row, by_column, own_entry, sweep.gradients.gain)
            self._add_tile(tile, out, q)
        return rows.loss

    def fold(self) -> tuple[Tensor, list[Tensor]]:
        """Returns the losses of a fold of each row, and what they count; adds the gradients."""
        problem, backend, sweep = self.problem, cast(HalvesFolds, self.backend), self.sweep
        fold = backend.half_fold(problem, fold_part(problem, slice(0, problem.rows)))
        if fold.sums_first or not sweep.wants.any:
            for tile, strip in self._tiles(min(self.side, chunks.STRIP_STATS_ROWS)):
                fold.add(strip, tile)
        folded = fold.settle()
        if sweep.wants.any:
            rooms, _ = chunks.tile_rooms(problem, backend, [tile for tile, _ in self._tiles(self.side)])
            for (tile, strip), out in zip(self._tiles(self.side), rooms, strict=True):
                self._add_tile(tile, out, fold.write(strip, out, tile))
            folded = folded if fold.sums_first else fold.settle()
        return folded.loss, [] if folded.count is None else [folded.count]

    def _add_tile(self, tile: Tile, out: Tensor, by_scale: Tensor | None) -> None:
        gradients = self.sweep.gradients
        gradients.add_tile(tile, out)
        if by_scale is not None:
            # A tile on the diagonal has both places of each of its pairs.
            gradients.add_scale(by_scale / 2 if tile.rows == tile.columns else by_scale)

    def _stored(self, rooms: list[Tensor]) -> RowSums:
        """Writes the exponentials of all tiles, and returns the rows' sums. One shift serves all of them."""
        backend, total, shift = cast(Stores, self.backend), torch.zeros_like(self.problem.weight), 0.0
        for (tile, strip), out in zip(self._tiles(self.side), rooms, strict=True):
            found = backend.exp_rows_and_columns(self.problem, strip, out)
            for (part, _), more in zip(tile.directions, found, strict=False):
                total[part] += more.total.sum(0) if more.total.dim() == 2 else more.total  # of tiles, or of the strip
                shift = cast(float, more.shift)
        return RowSums(shift, total)

    def _sums(self) -> RowSums:
        sums = RowSums.empty(self.problem.rows, self.problem.weight)
        for tile, strip in self._tiles(min(self.side, chunks.STRIP_STATS_ROWS)):
            square = tile.rows == tile.columns
            found = (self.backend.stats_rows([strip]),) if square else self.backend.stats_rows_and_columns(strip)
            for (part, _), more in zip(tile.directions, found, strict=True):
                self._add(sums, part, more)
        return sums

    def _add(self, sums: RowSums, part: slice, more: RowSums) -> None:
        running = RowSums(cast(Tensor, sums.shift)[part], sums.total[part])
        merged = self.backend.merge(running, more)
        if merged is not running:  # kernels merge in place
            cast(Tensor, running.shift).copy_(cast(Tensor, merged.shift))
            running.total.copy_(merged.total)
