"""The sweep's primitives as CUDA C++ kernels: launchers for `fusedloss._C`, which is built from csrc/ by nvcc.

The extension does not use torch: it takes pointers, sizes, strides and a stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.mask import GuideRule, Mask
from ...core.numerics import cdiv, row_numbers
from ...core.problem import Problem
from ...core.rows import guide_threshold
from ...core.strips import Extremes, RowSums, Softmax, Strip, Tally, Tile
from .. import folds as in_tile
from ..folds import can_fold as can_fold
from ..shared import NO_FACTOR, exp_shift, half_softmax
from ..shared import can_exp as can_exp
from ..shared import shares_prefixes as shares_prefixes
from .folds import fold_rows as fold_rows
from .folds import half_fold as half_fold
from .launching import NOT_BUILT as NOT_BUILT
from .launching import Launch, struct
from .launching import build_info as build_info
from .launching import capability_of as capability_of
from .launching import old_driver as old_driver
from .launching import operand as operand
from .launching import runs_on as runs_on
from .launching import why_not_on as why_not_on
from .rows import finish as finish
from .rows import inverse_norms as inverse_norms
from .rows import merge as merge
from .rows import prepare as prepare
from .rows import settle as settle
from .rows import weigh as weigh

MAX_COMPARES, MAX_EXEMPT = 4, 8  # csrc/similarity.h
LARGEST = 2**31 - 256  # indices up to a tile beyond the last row, column or feature must fit 32 bits


def why_not(problem: Problem) -> str | None:
    for block in problem.blocks:
        if reason := _why_not_mask(block.mask):
            return reason
    if problem.columns > LARGEST:
        return f"{problem.columns} columns: the kernels count to {LARGEST}"
    dtypes = {problem.dtype: None}  # in order
    for block in problem.blocks:
        dtypes |= {x.dtype: None for x in block.mask.guide or ()}
    reasons = (why_not_on(dtype, problem.device) for dtype in dtypes)
    return next((reason for reason in reasons if reason), None)


def _why_not_mask(mask: Mask) -> str | None:
    if mask.factor is not None:
        return NO_FACTOR
    for keep in (False, True):
        count = sum(compare.keep == keep for compare in mask.compare)
        if count > MAX_COMPARES:
            return f"the mask compares {count} numbers of one kind: the kernels take {MAX_COMPARES}"
    if mask.exempt is not None and mask.exempt.shape[1] > MAX_EXEMPT:
        return f"score_margin exempts {mask.exempt.shape[1]} columns a row: the kernels take {MAX_EXEMPT}"
    return None


def takes_units(problem: Problem) -> bool:
    return False  # factors act on the accumulator


def workspace_copies(problem: Problem) -> float:
    return in_tile.workspace_copies(problem, can_fold(problem))


def workspace_dtype(problem: Problem) -> torch.dtype:
    return in_tile.workspace_dtype(problem, can_fold(problem))


def can_halve(problem: Problem) -> bool:
    return False  # no kernel keeps square tiles


def can_halve_rows(problem: Problem) -> bool:
    return problem.top or half_softmax(problem) or in_tile.can_halve(problem)


def can_store(problem: Problem) -> bool:
    return can_exp(problem)


def common_prefixes(problem: Problem) -> tuple[int, ...]:
    return ()  # each is a sweep of its own


# The similarity GEMM --------------------------------------------------------------------------------------------------


class _Counts:
    """Tables of counts, and the tensors that they are added to."""

    def __init__(self, run: Launch, tally: Tally | None, score: Tensor | None):
        self.tally = tally
        if tally is None:
            self.args = {}
            return
        self.tables = [run.row_table() for _ in tally]
        names = ("count", "above", "max", "z", "sim")
        self.args = {"tally": struct("TallyArgs", score=score, **dict(zip(names, self.tables, strict=True)))}

    def add(self) -> None:
        if self.tally is None:
            return
        for total, table in zip(self.tally, self.tables, strict=True):
            if total is self.tally.maximum:
                torch.maximum(total, table.amax(0), out=total)
            else:
                total.add_(table.sum(0))


def stats_rows(strips: list[Strip], tally: Tally | None = None, score: Tensor | None = None) -> RowSums:
    found = [_stats(strip, tally, score, False)[0] for strip in strips]
    return RowSums(*(_stacked(list(tables)) for tables in zip(*found, strict=True)))


def stats_rows_and_columns(
    strip: Strip, tally: Tally | None = None, score: Tensor | None = None
) -> tuple[RowSums, RowSums]:
    rows, columns = _stats(strip, tally, score, True)
    assert columns is not None
    return rows, columns


def _stats(strip: Strip, tally: Tally | None, score: Tensor | None, by_columns: bool) -> tuple[RowSums, RowSums | None]:
    run = Launch(strip, narrow=tally is not None)
    rows, columns = RowSums(run.row_table(), run.row_table()), None
    given = {"row_max": rows.shift, "row_sum": rows.total}
    if by_columns:
        columns = RowSums(run.column_table(), run.column_table())
        given |= {"col_max": columns.shift, "col_sum": columns.total}
    counts = _Counts(run, tally, score)
    run("stats", struct("StatsArgs", **given, **counts.args))
    counts.add()
    return rows, columns


def exp_rows(
    problem: Problem,
    strips: list[Strip],
    outs: list[Tensor],
    target_sim: Tensor | None,
    tally: Tally | None = None,
    score: Tensor | None = None,
) -> tuple[RowSums, None]:
    """Writes E = exp(z - shift). A scale that is known beforehand has no gradient, so there is no q."""
    if target_sim is not None:
        raise ValueError("q must be None in exp_rows, got one; a scale with a gradient has no bound known beforehand")
    sums = [_exp(problem, strip, out, tally, score, False)[0] for strip, out in zip(strips, outs, strict=True)]
    return RowSums(exp_shift(problem), _stacked(sums)), None


def exp_rows_and_columns(problem: Problem, strip: Strip, out: Tensor) -> tuple[RowSums, RowSums]:
    rows, columns = _exp(problem, strip, out, None, None, True)
    assert columns is not None
    return RowSums(exp_shift(problem), rows), RowSums(exp_shift(problem), columns)


def _exp(
    problem: Problem, strip: Strip, out: Tensor, tally: Tally | None, score: Tensor | None, by_columns: bool
) -> tuple[Tensor, Tensor | None]:
    run = Launch(strip, narrow=tally is not None)
    rows, columns = run.row_table(), run.column_table() if by_columns else None
    counts = _Counts(run, tally, score)
    args = {"shift": exp_shift(problem), "row_sum": rows, "col_sum": columns}
    run("exp", struct("ExpArgs", **args, **counts.args), out)
    counts.add()
    return rows, columns


def grad_rows(
    strips: list[Strip],
    outs: list[Tensor],
    rows: Softmax,
    columns: Softmax | None,
    entry: Tensor,
    gain: Tensor | None,
    smooth: Tensor | None = None,
) -> Tensor | None:
    """Writes gain * dz. q holds the tiles' sums of dz_ij (sim_ij - target's), j != t, if targets are given."""
    wants_q = rows.target_sim is not None
    by_column = columns or Softmax(None, None, None)  # type: ignore[arg-type]
    qs = []
    for strip, out in zip(strips, outs, strict=True):
        run = Launch(strip, narrow=smooth is not None)
        q = run.row_table() if wants_q else None
        if q is not None:
            qs.append(q)
        args = struct(
            "GradArgs",
            gain=gain,
            row_shift=rows.shift,
            row_weight=rows.weight,
            entry=None if strip.target is None else entry,
            row_target_sim=rows.target_sim,
            col_shift=by_column.shift,
            col_weight=by_column.weight,
            col_target_sim=by_column.target_sim,
            q=q,
            smooth=smooth,
        )
        run("grad", args, out)
    return _stacked(qs) if qs else None


def top_rows(strips: list[Strip]) -> tuple[Tensor, Tensor]:
    (strip,) = strips
    run = Launch(strip, narrow=True)
    top = run.row_table()
    column = torch.empty_like(top, dtype=torch.int64)
    run("top", struct("TopArgs", top=top, column=column))
    largest = top.amax(0)
    others = (top != largest) & (top == top)  # a tile's NaN is the largest, and equals nothing
    first = column.masked_fill(others, strip.y.shape[0]).amin(0)
    return largest, first.masked_fill(largest == -torch.inf, -1)


def half_tops(problem: Problem, strip: Strip, tiles: list[Tile], nearest: Extremes, farthest: Extremes) -> None:
    assert strip.mask is not None
    (labels,) = strip.mask.compare
    for tile in tiles:
        part = strip.columns(tile.columns)
        run = Launch(part._replace(bias=None, target=None, mask=None), narrow=True)
        args: dict[str, Tensor | None] = {
            "row_labels": labels.rows.contiguous(),
            "key_labels": labels.keys[tile.columns].contiguous(),
            "own": row_numbers(len(strip.x), strip.x) if tile.rows == tile.columns else None,
            "row_bias": None if strip.bias is None else strip.bias[tile.rows],
            "col_bias": part.bias,
        }
        found = []
        for (rows, dim), first in zip(tile.directions, (tile.columns.start, tile.rows.start), strict=False):
            table, names = (run.row_table, ("{}", "{}_column")) if dim else (run.column_table, ("col_{}", "col_{}_row"))
            for name, extremes in (("other", nearest), ("alike", farthest)):
                values = table()
                places = torch.empty_like(values, dtype=torch.int64)
                args |= {names[0].format(name): values, names[1].format(name): places}
                found.append((extremes, rows, values, places, first))
        run("opposed", struct("OpposedArgs", **args))
        for each in found:
            _take(*each)


def _take(extremes: Extremes, rows: slice, values: Tensor, places: Tensor, first: int) -> None:
    """Takes in tables of values and of their places, counted from `first`."""
    largest = values.amax(0)
    place = places.masked_fill(values != largest, torch.iinfo(torch.int64).max).amin(0) + first
    value, column = extremes.value[rows], extremes.column[rows]
    rises = largest > value
    column.copy_(torch.where(rises, place, column))
    value.copy_(torch.where(rises, largest, value))


def similarities(strip: Strip, out: Tensor) -> None:
    """Writes `out = row_factor * col_factor * <x, y>`, nothing else."""
    bare = strip._replace(bias=None, target=None, mask=None, own=None, own_scale=None, softcap=0.0)
    Launch(bare)("store", struct("StoreArgs"), out)


def guide_room(strip: Strip) -> tuple[int, int]:
    return 0, 0  # only bits are stored


def guide_rows(strips: list[Strip], rule: GuideRule, room: Tensor, own: Tensor | None = None) -> list[Tensor]:
    """Returns the columns of each block that the guide drops, one bit a column."""
    threshold = guide_threshold(guide_scores(strips[0], room) if own is None else own, rule, strips[0].x.shape[1])
    dropped = []
    for strip in strips:
        words = cdiv(strip.y.shape[0], 32)
        bits = torch.empty((strip.x.shape[0], words), dtype=torch.int32, device=strip.x.device)
        args = struct("BitsArgs", threshold=threshold, bits=bits, words=words)
        Launch(strip)("guide", args)
        dropped.append(bits)
    return dropped


def guide_scores(strip: Strip, room: Tensor) -> Tensor:
    own = strip.scale.new_empty(strip.x.shape[0])
    Launch(strip)("pick", struct("PickArgs", picked=own))
    return own


def _stacked(tables: list[Tensor]) -> Tensor:
    return tables[0] if len(tables) == 1 else torch.cat(tables)
