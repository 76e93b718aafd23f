"""The sweep's primitives as Triton kernels: launchers for `kernels/similarity.py`; `rows.py` has those for a row each.

Triton is imported on first use: the package works without it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...core import products
from ...core.folds import Folded, Part
from ...core.mask import GuideRule, StripMask
from ...core.numerics import cdiv, row_numbers, rows_of
from ...core.problem import Beside, Problem
from ...core.rows import guide_threshold
from ...core.strips import Extremes, RowSums, Softmax, Strip, Tally, Tile
from ...core.waves import wave_columns
from .. import distill, folds
from ..shared import NO_FACTOR, can_exp, exp_shift, half_softmax
from ..shared import shares_prefixes as shares_prefixes
from .launching import (
    ALIGNMENT,
    capability_of,
    config_of,
    descriptor,
    divisor,
    has_registers_for_two_paths,
    launch,
    multiprocessors,
    out_wide,
    precision_of,
    whole,
)
from .launching import compiling as compiling
from .launching import why_not_on as why_not_on
from .rows import finish as finish
from .rows import inverse_norms as inverse_norms
from .rows import merge as merge
from .rows import prepare as prepare
from .rows import settle as settle
from .rows import weigh as weigh

if TYPE_CHECKING:
    from .config import Config

PANEL_BYTES = 32 << 20  # fp32 similarities of the vendor's GEMM, which fit an H200's L2 until the fold reads them
PREFIX_STEP = 16  # features: the least of a tensor core's product, in which rows stay aligned
SHARING = (8, 12)  # compute capabilities, by their first number


def why_not(problem: Problem) -> str | None:
    dtypes = {problem.dtype: None}  # in order
    for block in problem.blocks:
        if block.mask.factor is not None:
            return NO_FACTOR
        dtypes |= {x.dtype: None for x in block.mask.guide or ()}
    reasons = (why_not_on(dtype, problem.device) for dtype in dtypes)
    return next((reason for reason in reasons if reason), None)


def takes_units(problem: Problem) -> bool:
    return False  # factors act on the accumulator


def can_halve(problem: Problem) -> bool:
    return False  # no kernel keeps square tiles


def can_fold(problem: Problem) -> bool:
    return folds.can_fold(problem) or distill.can_distill(problem)


def workspace_copies(problem: Problem) -> float:
    if distill.can_distill(problem):
        return distill.workspace_copies(problem)
    return folds.workspace_copies(problem, can_fold(problem))


def workspace_dtype(problem: Problem) -> torch.dtype:
    return folds.workspace_dtype(problem, can_fold(problem))


def can_halve_rows(problem: Problem) -> bool:
    return problem.top or half_softmax(problem) or folds.can_halve(problem)


can_store = can_exp


# The similarity GEMM --------------------------------------------------------------------------------------------------


def stats_rows(strips: list[Strip], tally: Tally | None = None, score: Tensor | None = None) -> RowSums:
    maxima, sums = [], []
    for strip in strips:
        config = config_of(strip, _mode("stats", strip, tally))
        maxima.append(_row_table(strip, config))
        sums.append(_row_table(strip, config))
        counts = _tally_args(strip, config, tally, score)
        args = _softmax().StatsArgs(maxima[-1], sums[-1], Tally=counts)
        _similarities(_softmax().stats, strip, None, args, config)
        _add_tally(tally, counts)
    return RowSums(_stacked(maxima), _stacked(sums))


def stats_rows_and_columns(
    strip: Strip, tally: Tally | None = None, score: Tensor | None = None
) -> tuple[RowSums, RowSums]:
    config = config_of(strip, _mode("stats, columns", strip, tally))
    rows = RowSums(_row_table(strip, config), _row_table(strip, config))
    columns = RowSums(_column_table(strip, config), _column_table(strip, config))
    counts = _tally_args(strip, config, tally, score)
    _similarities(_softmax().stats, strip, None, _softmax().StatsArgs(*rows, *columns, counts), config)
    _add_tally(tally, counts)
    return rows, columns


def _tally_args(strip: Strip, config: Config, tally: Tally | None, score: Tensor | None) -> Any:
    if tally is None:
        return None
    return _softmax().TallyArgs(score, *(_row_table(strip, config) for _ in tally))


def _add_tally(tally: Tally | None, counts: Any) -> None:
    if tally is not None:
        for total, table in zip(tally, counts[1:], strict=True):
            if total is tally.maximum:
                torch.maximum(total, table.amax(0), out=total)
            else:
                total.add_(table.sum(0))


def top_rows(strips: list[Strip]) -> tuple[Tensor, Tensor]:
    (strip,) = strips
    config = config_of(strip, _mode("top", strip, None))
    top = _row_table(strip, config)
    column = torch.empty_like(top, dtype=torch.int64)
    _similarities(_epilogues().top, strip, None, _epilogues().TopArgs(top, column), config)
    largest = top.amax(0)
    first = column.masked_fill(top != largest, strip.y.shape[0]).amin(0)
    return largest, first.masked_fill(largest == -torch.inf, -1)


def half_tops(problem: Problem, strip: Strip, tiles: list[Tile], nearest: Extremes, farthest: Extremes) -> None:
    assert strip.mask is not None
    (labels,) = strip.mask.compare
    for tile in tiles:
        part = strip.columns(tile.columns)
        on_diagonal = tile.rows == tile.columns
        bare = part._replace(bias=None, target=None, mask=None)
        config = config_of(bare, "top, columns")
        tables = [(_row_table if dim else _column_table)(bare, config) for _, dim in tile.directions]
        values = [table.new_empty((2, *table.shape)) for table in tables]
        places = [torch.empty_like(value, dtype=torch.int64) for value in values]
        args = _epilogues().OpposedArgs(
            labels.rows,
            labels.keys[tile.columns],
            row_numbers(len(strip.x), strip.x) if on_diagonal else None,
            None if strip.bias is None else strip.bias[tile.rows],
            part.bias,
            *(x for value, place in zip(values, places, strict=True) for x in (value, place, value.stride(0))),
        )
        _similarities(_epilogues().opposed, bare, None, args, config)
        firsts = (tile.columns.start, tile.rows.start)
        for value, place, (rows, _), first in zip(values, places, tile.directions, firsts, strict=False):
            for side, extremes in enumerate((nearest, farthest)):
                _take(extremes, rows, value[side], place[side], first)


def _take(extremes: Extremes, rows: slice, values: Tensor, places: Tensor, first: int) -> None:
    """Takes in tables of values and of their places, counted from `first`."""
    largest = values.amax(0)
    place = places.masked_fill(values != largest, torch.iinfo(torch.int64).max).amin(0) + first
    value, column = extremes.value[rows], extremes.column[rows]
    rises = largest > value
    column.copy_(torch.where(rises, place, column))
    value.copy_(torch.where(rises, largest, value))


class _Fold:
    """A fold's launch: one epilogue serves both kinds of sides, which differ in what they are given."""

    def __init__(self, name: str, strip: Strip, columns: bool):
        self.strip, self.config = strip, config_of(strip, f"fold, {name}{', columns' if columns else ''}")
        self.epilogue = getattr(_folds(), name.replace("circle", "sides"))

    def row_table(self) -> Tensor:
        return _row_table(self.strip, self.config)

    def column_table(self) -> Tensor:
        return _column_table(self.strip, self.config)

    def __call__(self, fields: dict[str, Any], out: Tensor | None = None) -> None:
        given: dict[str, Any] = {"Scale": self.strip.scale}
        for name, x in fields.items():
            if x is None or isinstance(x, Tensor):
                given[name.title().replace("_", "")] = x
            else:
                given[name] = float(x)  # an int would be compiled into the kernel
        kind = _folds().FoldArgs if "weight" in fields else _folds().SidesArgs
        _similarities(self.epilogue, self.strip, out, kind(**given), self.config)


def fold_rows(problem: Problem, strip: Strip, out: Tensor | None, part: Part, score: Tensor) -> Folded:
    return folds.fold_rows(folds.Kernels(_Fold, merge), problem, strip, out, part, score)


def half_fold(problem: Problem, part: Part) -> folds.TwoSides | folds.HalfHinges:
    return folds.half_fold(folds.Kernels(_Fold, merge), problem, part)


def taught(problem: Problem) -> list[Strip]:
    """Returns a teacher's strips of all rows, in fp32 where no kernel takes its dtype."""
    fold = problem.fold
    assert fold is not None and fold.teacher_scale is not None

    def of(x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = operand(x if why_not_on(x.dtype, x.device) is None else x.to(problem.scale.dtype))
        return x, inverse_norms(x) if fold.teacher_cosine else None

    strips = []
    for teacher in fold.teachers:
        (x, row_factor), (y, col_factor) = of(teacher.query), of(teacher.key)
        strips.append(Strip(x, y, fold.teacher_scale, row_factor, col_factor, None, None))
    return strips


def distill_rows(
    problem: Problem,
    strips: list[Strip],
    taught: list[Strip],
    outs: Sequence[Tensor] | None,
    part: Part,
    beside: Beside | None = None,
    gain: Tensor | None = None,
) -> Folded:
    kernels = distill.Kernels(stats_rows, merge, _both)
    return distill.distill_rows(kernels, problem, strips, taught, outs, part, beside, gain)


def _both(strip: Strip, other: Strip, out: Tensor | None, rows: distill.Rows) -> tuple[Tensor, Tensor]:
    config = config_of(strip, _mode("distill", strip, None))
    if strip.x.dtype != other.x.dtype:
        config = config._replace(GEMM="library", SUBTILES=1)  # which multiplies each in its own dtype
    loss, q = _row_table(strip, config), _row_table(strip, config)
    student, teacher = (
        _distill().Model(_slope(some), side.shift, side.inverse, some.col_factor)
        for some, side in ((strip, rows.student), (other, rows.teacher))
    )
    args = _distill().DistillArgs(student, teacher, loss, q, None if out is None else rows.weight, rows.mean)
    multiply = _panels_of_both if config.GEMM == "library" else _tiles_of_both
    multiply(strip, other, out, args, rows.form, config)
    return loss, q


def _admit(strip: Strip) -> Tensor | None:
    return None if strip.mask is None or strip.mask.dense is None else strip.mask.dense.view(torch.uint8)


def _slope(strip: Strip) -> Tensor:
    rows = strip.scale.expand(strip.x.shape[0]) if strip.row_factor is None else strip.scale * strip.row_factor
    return rows.contiguous()


def similarities(strip: Strip, out: Tensor) -> None:
    """Writes `out = row_factor * col_factor * <x, y>`, nothing else."""
    # The writing kernels multiply by the factors again, so they are applied afterwards here.
    bare = strip._replace(row_factor=None, col_factor=None, bias=None, target=None, mask=None, own=None, softcap=0.0)
    _similarities(_epilogues().store, bare, out, (), config_of(strip, "store"))
    if strip.row_factor is not None and strip.col_factor is not None:
        out.mul_(strip.row_factor[:, None]).mul_(strip.col_factor)


def guide_room(strip: Strip) -> tuple[int, int]:
    return 0, 0  # only bits are stored


def guide_rows(strips: list[Strip], rule: GuideRule, room: Tensor, own: Tensor | None = None) -> list[Tensor]:
    """Returns the columns of each block that the guide drops, one bit a column."""
    threshold = guide_threshold(guide_scores(strips[0], room) if own is None else own, rule, strips[0].x.shape[1])
    dropped = []
    for strip in strips:
        bits = torch.empty((strip.x.shape[0], cdiv(strip.y.shape[0], 32)), dtype=torch.int32, device=strip.x.device)
        args = _epilogues().BitsArgs(threshold, bits)
        _similarities(_epilogues().bits, strip, None, args, config_of(strip, "guide"))
        dropped.append(bits)
    return dropped


def guide_scores(strip: Strip, room: Tensor) -> Tensor:
    own = strip.scale.new_empty(strip.x.shape[0])
    _similarities(_epilogues().pick, strip, None, _epilogues().PickArgs(own), config_of(strip, "guide"))
    return own


def _mode(name: str, strip: Strip, tally: Tally | None) -> str:
    more = {
        "tally": tally is not None,
        "several": strip.mask is not None and strip.mask.without is not None,
        "masked": _masked(strip),
        "softcap": bool(strip.softcap),
    }
    return ", ".join([name, *(option for option, given in more.items() if given)])


def _masked(strip: Strip) -> bool:
    return strip.own_scale is not None or (strip.mask is not None and strip.mask.given)


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
    shift = exp_shift(problem)
    sums = []
    for strip, out in zip(strips, outs, strict=True):
        config = config_of(strip, _mode("exp", strip, tally))
        sums.append(_row_table(strip, config))
        counts = _tally_args(strip, config, tally, score)
        _similarities(_softmax().exp, strip, out, _softmax().ExpArgs(shift, sums[-1], Tally=counts), config)
        _add_tally(tally, counts)
    return RowSums(shift, _stacked(sums)), None


def exp_rows_and_columns(problem: Problem, strip: Strip, out: Tensor) -> tuple[RowSums, RowSums]:
    config = config_of(strip, _mode("exp, columns", strip, None))
    shift, rows, columns = exp_shift(problem), _row_table(strip, config), _column_table(strip, config)
    _similarities(_softmax().exp, strip, out, _softmax().ExpArgs(shift, rows, columns), config)
    return RowSums(shift, rows), RowSums(shift, columns)


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
    qs = []
    for strip, out in zip(strips, outs, strict=True):
        mode = f"grad{', columns' if columns is not None else ''}{', q' if wants_q else ''}"
        config = config_of(strip, _mode(mode, strip, None))
        q = _row_table(strip, config) if wants_q else None
        if q is not None:
            qs.append(q)
        own_entry = None if strip.target is None else entry
        args = _softmax().GradArgs(
            gain, rows.shift, rows.weight, own_entry, rows.target_sim, *(columns or (None, None, None)), q, smooth
        )
        _similarities(_softmax().grad, strip, out, args, config)
    return _stacked(qs) if qs else None


def _stacked(tables: list[Tensor]) -> Tensor:
    return tables[0] if len(tables) == 1 else torch.cat(tables)


def _row_table(strip: Strip, config: Config) -> Tensor:
    n_tiles = cdiv(strip.y.shape[0], config.BLOCK_N) * config.SUBTILES
    return strip.scale.new_empty((n_tiles, strip.x.shape[0]))


def _column_table(strip: Strip, config: Config) -> Tensor:
    return strip.scale.new_empty((cdiv(strip.x.shape[0], config.BLOCK_M), strip.y.shape[0]))


def _similarities(epilogue: Callable[..., None], strip: Strip, out: Tensor | None, args: tuple, config: Config) -> None:
    if config.GEMM == "library":
        return _panels(epilogue, strip, out, args, config)
    x, y = strip.x, strip.y
    (M, D), N = x.shape, y.shape[0]
    D = min(whole(x), whole(y))  # operands end in zeros
    tiles = cdiv(M, config.BLOCK_M) * cdiv(N, config.BLOCK_N)
    if not tiles:
        return
    descriptors, precision = config.GEMM == "descriptors", precision_of(x.dtype, x.device)
    stride_om = 0 if out is None else out.stride(0)
    kernel_x, kernel_y, kernel_out = x, y, out
    if descriptors:
        kernel_x = descriptor(x, config.BLOCK_M, config.BLOCK_D, precision == "tf32")
        kernel_y = descriptor(y, config.BLOCK_N, config.BLOCK_D, precision == "tf32")
        if out is not None:
            kernel_out = descriptor(out, config.BLOCK_M, config.BLOCK_N // config.SUBTILES)
    launch(
        _similarity().similarity_kernel,
        (min(tiles, config.programs * multiprocessors(x.device)),),
        x.device,
        kernel_x,
        kernel_y,
        kernel_out,
        *_columns(strip),
        args,
        M,
        N,
        D,
        x.stride(0),
        y.stride(0),
        stride_om,
        EPILOGUE=epilogue,
        INNER=_has_inner(strip, epilogue),
        INPUT_PRECISION=precision,
        DESCRIPTORS=descriptors,
        WIDE=16 if descriptors else divisor(D, x.stride(0), y.stride(0)),
        OUT_WIDE=0 if descriptors else out_wide(out),
        SPECIALIZE=config.SPECIALIZE,
        **config.options(),
    )


def _has_inner(strip: Strip, epilogue: Callable[..., None]) -> bool:
    """Whether tiles inside of the matrix that hold no target have a path of their own; with a bias two paths spill."""
    if strip.bias is not None or _masked(strip) or not has_registers_for_two_paths(strip.x.device):
        return False
    kinds = _softmax()
    return epilogue in (kinds.stats, kinds.exp, kinds.grad, _folds().sigmoid)


def _panels(epilogue: Callable[..., None], strip: Strip, out: Tensor | None, args: tuple, config: Config) -> None:
    """Runs the vendor's GEMM into an fp32 panel of columns, and one pass over it while it is in L2."""
    x, y = strip.x, strip.y
    M, N = x.shape[0], y.shape[0]
    width = _panel_columns(strip, config)
    panel = strip.scale.new_empty((M, min(width, cdiv(N, 4) * 4)))
    for start in range(0, N if M else 0, width):
        part = rows_of(y, slice(start, min(start + width, N)))
        sim = panel if panel.shape[1] == part.shape[0] else panel[:, : part.shape[0]]
        _multiply(sim, x, part)
        if part.shape[0] % 4:  # up to there the kernel reads, and 0 times NaN is NaN
            panel[:, part.shape[0] : cdiv(part.shape[0], 4) * 4] = 0
        launch(
            _similarity().panel_kernel,
            (cdiv(M, config.BLOCK_M), cdiv(part.shape[0], config.BLOCK_N)),
            x.device,
            sim,
            out,
            *_columns(strip),
            args,
            M,
            N,
            panel.stride(0),
            0 if out is None else out.stride(0),
            start // config.BLOCK_N,
            EPILOGUE=epilogue,
            INNER=_has_inner(strip, epilogue),
            OUT_WIDE=out_wide(out),
            BLOCK_M=config.BLOCK_M,
            BLOCK_N=config.BLOCK_N,
            num_warps=config.num_warps,
        )


def _tiles_of_both(strip: Strip, other: Strip, out: Tensor | None, args: tuple, form: str, config: Config) -> None:
    matrices, admit = (strip.x, strip.y, other.x, other.y), _admit(strip)
    (M, N), D, T = (len(strip.x), len(strip.y)), *(min(whole(s.x), whole(s.y)) for s in (strip, other))
    tiles = cdiv(M, config.BLOCK_M) * cdiv(N, config.BLOCK_N)
    if not tiles:
        return
    descriptors, precision = config.GEMM == "descriptors", precision_of(strip.x.dtype, strip.x.device)
    given: Any = (*matrices, out)
    if descriptors:
        blocks = (config.BLOCK_M, config.BLOCK_N) * 2
        given = [
            descriptor(x, block, config.BLOCK_D, precision == "tf32") for x, block in zip(matrices, blocks, strict=True)
        ]
        given.append(None if out is None else descriptor(out, config.BLOCK_M, config.BLOCK_N // config.SUBTILES))
    strides = [x.stride(0) for x in matrices]
    launch(
        _distill().distill_kernel,
        (min(tiles, config.programs * multiprocessors(strip.x.device)),),
        strip.x.device,
        *given,
        admit,
        args,
        M,
        N,
        D,
        T,
        *strides,
        0 if out is None else out.stride(0),
        0 if admit is None else admit.stride(0),
        FORM=form,
        INPUT_PRECISION=precision,
        DESCRIPTORS=descriptors,
        WIDE=16 if descriptors else divisor(D, *strides[:2]),
        TEACHER_WIDE=16 if descriptors else divisor(T, *strides[2:]),
        OUT_WIDE=0 if descriptors else out_wide(out),
        **config.options(),
    )


def _panels_of_both(strip: Strip, other: Strip, out: Tensor | None, args: tuple, form: str, config: Config) -> None:
    """As `_panels`, with a panel of each model."""
    M, N, step, admit = len(strip.x), len(strip.y), config.BLOCK_N, _admit(strip)
    width = max(step, _panel_columns(strip, config) // 2 // step * step)  # both fit
    panels = strip.scale.new_empty((2, M, min(width, cdiv(N, 4) * 4)))
    for start in range(0, N if M else 0, width):
        columns = min(width, N - start)
        for panel, some in zip(panels[..., :columns], (strip, other), strict=True):
            _multiply(panel, some.x, some.y[start : start + columns])
        if columns % 4:
            panels[..., columns : cdiv(columns, 4) * 4] = 0
        launch(
            _distill().distill_panel_kernel,
            (cdiv(M, config.BLOCK_M), cdiv(columns, step)),
            strip.x.device,
            *panels[..., :columns],
            out,
            admit,
            args,
            M,
            N,
            panels.stride(1),
            0 if out is None else out.stride(0),
            0 if admit is None else admit.stride(0),
            start // step,
            FORM=form,
            OUT_WIDE=out_wide(out),
            BLOCK_M=config.BLOCK_M,
            BLOCK_N=step,
            num_warps=config.num_warps,
        )


def _panel_columns(strip: Strip, config: Config) -> int:
    """Returns a panel's columns: whole tiles, and whole waves of the vendor's GEMM."""
    rows = max(1, strip.x.shape[0])
    return wave_columns(rows, PANEL_BYTES // 4 // rows, config.BLOCK_N, multiprocessors(strip.x.device))


def _multiply(sim: Tensor, x: Tensor, y: Tensor) -> None:
    """Writes `sim = x @ y.T` in fp32."""
    if x.dtype == sim.dtype:
        torch.mm(x, y.T, out=sim)
    elif products.narrow(x.dtype, x.device):
        products.wide_mm(sim, x, y.T)
    else:
        torch.mm(x.to(sim.dtype), y.to(sim.dtype).T, out=sim)


# Prefixes that share a product. Lists are by prefix, ascending; the inner ones by block -------------------------------


def common_prefixes(problem: Problem) -> tuple[int, ...]:
    """Returns those that share a product: multiples of PREFIX_STEP, and the longest. The one place that decides it.

    Not on sm_90 and sm_100, where one prefix at a time has tiles of 256 columns, whose accumulators leave no registers
    for a fold beside them. Full precision of fp32 is the library's.
    """
    x = problem.operands[0]
    capability = capability_of(x.device)
    if capability is not None and capability[0] not in SHARING:
        return ()
    if capability is not None and x.dtype == torch.float32 and precision_of(x.dtype, x.device) == "ieee":
        return ()
    longest = max(problem.prefixes)
    fit = {dim for dim in problem.prefixes if dim % PREFIX_STEP == 0 or dim == longest}
    return tuple(sorted(fit)) if len(fit) > 1 else ()


def stats_prefixes(strips: list[list[Strip]]) -> list[RowSums]:
    found: list[list[RowSums]] = [[] for _ in strips]
    for of_block in zip(*strips, strict=True):
        config = _config_of_prefixes(of_block, "stats")
        sums = [RowSums(_row_table(strip, config), _row_table(strip, config)) for strip in of_block]
        _prefixes(_softmax().stats, of_block, None, tuple(_softmax().StatsArgs(*each) for each in sums), config)
        for blocks, each in zip(found, sums, strict=True):
            blocks.append(each)
    return [RowSums(*(_stacked(list(tables)) for tables in zip(*blocks, strict=True))) for blocks in found]


def exp_prefixes(problem: Problem, strips: list[list[Strip]], outs: list[list[Tensor]]) -> list[RowSums]:
    shift, found = exp_shift(problem), [[] for _ in strips]  # type: tuple[float, list[list[Tensor]]]
    for of_block, of_out in zip(zip(*strips, strict=True), zip(*outs, strict=True), strict=True):
        config = _config_of_prefixes(of_block, "exp")
        sums = [_row_table(strip, config) for strip in of_block]
        args = tuple(_softmax().ExpArgs(shift, each) for each in sums)
        _prefixes(_softmax().exp, of_block, of_out, args, config)
        for blocks, each in zip(found, sums, strict=True):
            blocks.append(each)
    return [RowSums(shift, _stacked(blocks)) for blocks in found]


def grad_prefixes(
    strips: list[list[Strip]],
    outs: list[list[Tensor]],
    rows: list[Softmax],
    entries: list[Tensor],
    gains: list[Tensor | None],
) -> list[Tensor | None]:
    wants_q = rows[0].target_sim is not None
    found: list[list[Tensor]] = [[] for _ in strips]
    for of_block, of_out in zip(zip(*strips, strict=True), zip(*outs, strict=True), strict=True):
        config = _config_of_prefixes(of_block, "grad, q" if wants_q else "grad")
        args = []
        for strip, softmax, entry, gain, blocks in zip(of_block, rows, entries, gains, found, strict=True):
            own = None if strip.target is None else entry
            q = _row_table(strip, config) if wants_q else None
            args.append(_softmax().GradArgs(gain, softmax.shift, softmax.weight, own, softmax.target_sim, Q=q))
            blocks += [] if q is None else [q]
        _prefixes(_softmax().grad, of_block, of_out, tuple(args), config)
    return [_stacked(blocks) if blocks else None for blocks in found]


def _config_of_prefixes(strips: Sequence[Strip], mode: str) -> Config:
    """Returns the tile, with a step along the features that divides all ends but the last."""
    config = config_of(strips[-1], _mode(f"prefixes, {mode}", strips[-1], None))
    ends = [strip.x.shape[1] for strip in strips[:-1]]
    return config._replace(BLOCK_D=math.gcd(config.BLOCK_D, *ends))


def _prefixes(
    epilogue: Callable[..., None], strips: Sequence[Strip], outs: Sequence[Tensor] | None, args: tuple, config: Config
) -> None:
    """Launches one product for a block of all prefixes, each with the factors, tables and output of its own."""
    longest = strips[-1]
    x, y = longest.x, longest.y
    M, N, D = x.shape[0], y.shape[0], min(whole(x), whole(y))
    tiles = cdiv(M, config.BLOCK_M) * cdiv(N, config.BLOCK_N)
    if not tiles:
        return
    descriptors, precision = config.GEMM == "descriptors", precision_of(x.dtype, x.device)
    kernel_x, kernel_y = x, y
    if descriptors:
        kernel_x = descriptor(x, config.BLOCK_M, config.BLOCK_D, precision == "tf32")
        kernel_y = descriptor(y, config.BLOCK_N, config.BLOCK_D, precision == "tf32")
    stride_om = outs[0].stride(0) if outs else 0
    launch(
        _similarity().prefixes_kernel,
        (min(tiles, config.programs * multiprocessors(x.device)),),
        x.device,
        kernel_x,
        kernel_y,
        tuple(outs) if outs else (None,) * len(strips),
        longest.scale,
        tuple(strip.row_factor for strip in strips),
        tuple(strip.col_factor for strip in strips),
        longest.bias,
        longest.softcap or None,
        longest.target,
        _mask_args(longest),
        args,
        (*(strip.x.shape[1] for strip in strips[:-1]), D),
        M,
        N,
        x.stride(0),
        y.stride(0),
        stride_om,
        EPILOGUE=epilogue,
        INNER=_has_inner(longest, epilogue),
        INPUT_PRECISION=precision,
        DESCRIPTORS=descriptors,
        WIDE=16 if descriptors else divisor(D, x.stride(0), y.stride(0)),
        OUT_WIDE=min((out_wide(out) for out in outs), default=16) if outs else 16,
        **config.options(),
    )


def _columns(strip: Strip) -> tuple[Any, ...]:
    softcap, targets = strip.softcap or None, (strip.target, _further_args(strip))
    return strip.scale, strip.row_factor, strip.col_factor, strip.bias, softcap, *targets, _mask_args(strip)


def _further_args(strip: Strip) -> Any:
    without = None if strip.mask is None else strip.mask.without
    return None if without is None else _softmax().FurtherArgs(without.T.contiguous(), without.shape[1])


def _mask_args(strip: Strip) -> Any:
    if not _masked(strip):
        return None
    mask = strip.mask or StripMask()
    drops, keeps = ([c for c in mask.compare if c.keep == keep] for keep in (False, True))
    dense, bits = mask.dense, mask.dropped
    exempt = () if mask.exempt is None else tuple(c.contiguous() for c in mask.exempt.unbind(1))
    stride_dm, stride_dn = (0, 0) if dense is None else dense.stride()
    return _masks().MaskArgs(
        DropRows=tuple(c.rows.contiguous() for c in drops),
        DropKeys=tuple(c.keys.contiguous() for c in drops),
        KeepRows=tuple(c.rows.contiguous() for c in keeps),
        KeepKeys=tuple(c.keys.contiguous() for c in keeps),
        Dense=None if dense is None else dense.view(torch.uint8),
        Bits=bits,
        Exempt=exempt,
        Own=strip.own,
        OwnScale=strip.own_scale,
        stride_dm=stride_dm,
        stride_dn=stride_dn,
        **{name.title().replace("_", ""): x for name, x in mask.vectors.items()},
    )


# Once per row ---------------------------------------------------------------------------------------------------------


def operand(x: Tensor) -> Tensor:
    """Returns rows of unit stride that start on 16-byte boundaries, do not overlap, and end in zeros up to the next 16
    bytes: `x` itself, or a padded copy.

    Rows that overlap or are expanded have no tensor map. The zeros are read by kernels that copy 16 bytes at a time:
    what stands behind the rows of a slice may be NaN.
    """
    starts = x.stride(0) >= x.shape[1] and x.stride(0) * x.itemsize % ALIGNMENT == 0
    ends = x.shape[1] * x.itemsize % ALIGNMENT == 0
    if x.stride(1) == 1 and starts and ends and x.data_ptr() % ALIGNMENT == 0:
        return x
    D, wide = x.shape[1], ALIGNMENT // x.itemsize
    padded = x.new_empty((x.shape[0], cdiv(D, wide) * wide))
    padded[:, D:] = 0
    return padded[:, :D].copy_(x)


@functools.cache
def _softmax() -> ModuleType:
    from ...kernels import softmax

    return softmax


@functools.cache
def _epilogues() -> ModuleType:
    from ...kernels import epilogues

    return epilogues


@functools.cache
def _folds() -> ModuleType:
    from ...kernels import folds

    return folds


@functools.cache
def _distill() -> ModuleType:
    from ...kernels import distill

    return distill


@functools.cache
def _masks() -> ModuleType:
    from ...kernels import masks

    return masks


@functools.cache
def _similarity() -> ModuleType:
    from ...kernels import similarity

    return similarity
