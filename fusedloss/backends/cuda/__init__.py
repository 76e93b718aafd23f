"""The sweep's primitives as CUDA C++ kernels: launchers for `fusedloss._C`, which is built from csrc/ by nvcc.

The extension does not use torch: it takes pointers, sizes, strides and a stream.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core import environment
from ...core.folds import (
    Folded,
    LogSum,
    Part,
    Sides,
    circle_row,
    multi_similarity_row,
    proxy_anchor_row,
    sup_con_in_row,
)
from ...core.numerics import stats_dtype
from ...core.problem import Fold, GuideRule, Mask, Problem
from ...core.rows import fold_scalars, guide_threshold, patch_target, tf32
from ...core.strips import Patch, RowSums, Softmax, Strip, StripMask, Tally
from ..shared import can_exp as can_exp
from ..shared import exp_shift
from .rows import call, extension, number_format, struct
from .rows import finish as finish
from .rows import inverse_norms as inverse_norms
from .rows import merge as merge
from .rows import prepare as prepare
from .rows import settle as settle
from .rows import weigh as weigh

NOT_BUILT = (
    "not built: there was no nvcc or no GPU at installation; install with FUSEDLOSS_CUDA=1, which takes nvcc alone"
)
ALIGNMENT = 16  # bytes: the size of one cp.async, and TMA's alignment of rows
MAX_COMPARES, MAX_EXEMPT = 4, 8  # csrc/similarity.h
LARGEST = 2**31 - 256  # indices up to a tile beyond the last row, column or feature must fit 32 bits
FOLD_COPIES = 12  # see chunked


def build_info() -> Mapping[str, object] | None:
    """Returns what fusedloss._C was built with, or None if it was not built."""
    try:
        return extension().build_info()
    except ImportError:
        return None


def why_not(problem: Problem) -> str | None:
    if problem.prefixes:
        return "no kernel sums several prefixes in one sweep yet; matryoshka takes them one after the other here"
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


@environment.constant
def why_not_on(dtype: torch.dtype, device: torch.device) -> str | None:
    """Returns the reason why no kernel runs for such tensors, or None."""
    return _why_not(dtype, device, extension)


def _why_not_mask(mask: Mask) -> str | None:
    for keep in (False, True):
        count = sum(compare.keep == keep for compare in mask.compare)
        if count > MAX_COMPARES:
            return f"the mask compares {count} numbers of one kind: the kernels take {MAX_COMPARES}"
    if mask.exempt is not None and mask.exempt.shape[1] > MAX_EXEMPT:
        return f"score_margin exempts {mask.exempt.shape[1]} columns a row: the kernels take {MAX_EXEMPT}"
    return None


@functools.cache
def _why_not(dtype: torch.dtype, device: torch.device, load: Any) -> str | None:
    """Cached per dtype, device and extension."""
    info = build_info()
    if info is None:
        return f"the extension fusedloss._C was {NOT_BUILT}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"no kernel for {dtype}"
    archs = info["archs"]
    assert isinstance(archs, list)
    if archs == ["host"]:
        return None if device.type == "cpu" else f"built for the host; the operands are on {device}"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"needs an NVIDIA GPU; the operands are on {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"needs compute capability 8.0 or newer, not {'.'.join(map(str, capability))}"
    if not runs_on(archs, capability):
        return f"fusedloss._C was built for {', '.join(archs)}, the GPU is sm_{capability[0]}{capability[1]}"
    return old_driver(info, capability)


def old_driver(info: Mapping[str, object], capability: tuple[int, int]) -> str | None:
    """Returns the reason why the driver cannot run fusedloss._C, by CUDA's rules of compatibility, or None.

    A runtime needs a driver of its major version, whatever the minor one; the driver compiles PTX of its own version or
    of an older one.
    """
    built, driver, archs = info["cuda_version"], info.get("driver_version"), info["archs"]
    assert isinstance(built, str) and isinstance(archs, list)
    if not isinstance(driver, str) or not driver:
        return None
    here, needed = (tuple(map(int, version.split("."))) for version in (driver, built))
    gpu = f"{capability[0]}{capability[1]}"
    if here[0] < needed[0]:
        return (
            f"the driver runs CUDA up to {driver}, and fusedloss._C was built with {built}: update the driver to one "
            f"of CUDA {needed[0]}.0 or newer, or install fusedloss again with an nvcc of CUDA {here[0]} (CUDA_HOME)"
        )
    if here < needed and not runs_on([arch for arch in archs if arch.startswith("sm_")], capability):
        return (
            f"fusedloss._C has no machine code for the GPU, an sm_{gpu}, but PTX of CUDA {built}, and the driver "
            f"compiles PTX up to {driver}: update it, or install fusedloss again with FUSEDLOSS_CUDA_ARCHS={gpu}"
        )
    return None


# Machine code of these does not run on other architectures, nor theirs on these.
INTEGRATED = {(8, 7), (10, 1), (11, 0)}


def runs_on(archs: list[str], capability: tuple[int, int]) -> bool:
    """By CUDA's rules, machine code runs on its major version from its minor on, PTX on everything newer.

    With an "a", both run on exactly that architecture; with an "f", both on its major version from its minor on.
    """
    for arch in archs:
        kind, _, number = arch.partition("_")
        built = divmod(int(number.rstrip("af")), 10)
        if built == capability:
            return True
        if number.endswith("a") or built > capability:
            continue
        if kind == "compute" and number.isdigit():
            return True
        if built[0] == capability[0] and not INTEGRATED & {built, capability}:
            return True
    return False


def takes_units(problem: Problem) -> bool:
    return False  # factors act on the accumulator


def workspace_copies(problem: Problem) -> float:
    return FOLD_COPIES if problem.fold is not None and not can_fold(problem) else 1


def workspace_dtype(problem: Problem) -> torch.dtype:
    """Returns the workspace's dtype; folds in torch take similarities in fp32."""
    return stats_dtype(problem.dtype) if problem.fold is not None and not can_fold(problem) else problem.dtype


def can_store(problem: Problem) -> bool:
    return can_exp(problem)


def can_fold(problem: Problem) -> bool:
    """True for sums over a row's similarities. fp16 lacks the range for their smallest derivatives."""
    fold = problem.fold
    known = fold is not None and fold.name in FOLDS and not fold.distance
    return known and problem.dtype != torch.float16


def operand(x: Tensor) -> Tensor:
    """Returns `x` itself if the kernels can copy 16 bytes at a time, by row or by column, else a padded copy.

    TMA takes only rows.
    """
    by_row = _aligned(x)
    if by_row or (_aligned(x.T) and capability_of(x.device) != 90):
        return x
    wide = ALIGNMENT // x.itemsize
    padded = x.new_empty((x.shape[0], -(-x.shape[1] // wide) * wide))
    return padded[:, : x.shape[1]].copy_(x)


def _aligned(x: Tensor) -> bool:
    lines, length = x.shape
    starts = lines <= 1 or (x.stride(0) >= length and x.stride(0) * x.itemsize % ALIGNMENT == 0)
    return (x.stride(1) == 1 or length == 1) and starts and x.data_ptr() % ALIGNMENT == 0


# The similarity GEMM --------------------------------------------------------------------------------------------------


@functools.cache
def capability_of(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.lru_cache(maxsize=256)
def _plan(load: Any, capability: int, tensor_cores: bool, aligned: bool, narrow: bool) -> Any:
    return load().plan(capability, tensor_cores, aligned, narrow)


class _Launch:
    """One strip's launch: its plan, its tables, and the call."""

    def __init__(self, strip: Strip, *, narrow: bool = False):
        """narrow: the epilogue needs the narrow tile, whatever the strip (`NARROW` in csrc/epilogues/)."""
        self.strip = strip
        narrow = narrow or strip.x.dtype == torch.float32 or bool(strip.softcap) or strip.own is not None
        if strip.mask is not None and not narrow:
            mask = strip.mask
            parts = (mask.compare, mask.dense, mask.threshold, mask.skip, mask.dropped)
            narrow = any(part is not None and part != () for part in parts)
        self.tensor_cores = strip.x.dtype != torch.float32 or tf32()
        aligned = _aligned(strip.x) and _aligned(strip.y)
        self.plan = _plan(extension, capability_of(strip.x.device), self.tensor_cores, aligned, narrow)

    def row_table(self) -> Tensor:
        lines = -(-self.strip.y.shape[0] // self.plan.BLOCK_N)
        return self.strip.scale.new_empty((lines, self.strip.x.shape[0]))

    def column_table(self) -> Tensor:
        lines = -(-self.strip.x.shape[0] // self.plan.BLOCK_M)
        return self.strip.scale.new_empty((lines, self.strip.y.shape[0]))

    def __call__(self, name: str, args: Any, out: Tensor | None = None) -> None:
        strip, x, y = self.strip, self.strip.x, self.strip.y
        if not x.shape[0] or not y.shape[0]:
            return
        given = struct(
            "Strip",
            x=x,
            y=y,
            out=out,
            M=x.shape[0],
            N=y.shape[0],
            D=x.shape[1],
            stride_xm=x.stride(0),
            stride_xd=x.stride(1),
            stride_yn=y.stride(0),
            stride_yd=y.stride(1),
            stride_om=0 if out is None else out.stride(0),
            scale=strip.scale,
            row_factor=strip.row_factor,
            col_factor=strip.col_factor,
            bias=strip.bias,
            softcap=strip.softcap,
            target=strip.target,
            tensor_cores=self.tensor_cores,
            **({} if strip.mask is None and strip.own is None else {"masks": self._masks()}),
        )
        call(name, x.device, given, number_format(x.dtype), args, self.plan)

    def _masks(self) -> Any:
        mask = self.strip.mask or StripMask()
        drops, keeps = ([c for c in mask.compare if c.keep == keep] for keep in (False, True))
        dense, bits = mask.dense, mask.dropped
        exempt = () if mask.exempt is None else mask.exempt.unbind(1)
        ids = [[c.contiguous() for c in columns] for columns in (
            [c.rows for c in drops], [c.keys for c in drops], [c.rows for c in keeps], [c.keys for c in keeps], exempt
        )]  # fmt: skip
        self.kept = ids  # keeps copies of contiguous() until the launch
        return struct(
            "Masks",
            **dict(zip(("drop_rows", "drop_keys", "keep_rows", "keep_keys", "exempt"), ids, strict=True)),
            dense=dense,
            bits=bits,
            threshold=mask.threshold,
            skip=mask.skip,
            own=self.strip.own,
            own_scale=self.strip.own_scale,
            stride_dm=0 if dense is None else dense.stride(0),
            stride_dn=0 if dense is None else dense.stride(1),
            stride_bm=0 if bits is None else bits.stride(0),
        )


class _Counts:
    """Tables of counts, and the tensors that they are added to."""

    def __init__(self, run: _Launch, tally: Tally | None, score: Tensor | None):
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
    run = _Launch(strip, narrow=tally is not None)
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
    run = _Launch(strip, narrow=tally is not None)
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
        run = _Launch(strip, narrow=smooth is not None or (wants_q and columns is not None))
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
    run = _Launch(strip, narrow=True)
    top = run.row_table()
    column = torch.empty_like(top, dtype=torch.int64)
    run("top", struct("TopArgs", top=top, column=column))
    largest = top.amax(0)
    first = column.masked_fill(top != largest, strip.y.shape[0]).amin(0)
    return largest, first.masked_fill(largest == -torch.inf, -1)


def similarities(strip: Strip, out: Tensor) -> None:
    """Writes `out = row_factor * col_factor * <x, y>`, nothing else."""
    bare = strip._replace(bias=None, target=None, mask=None, own=None, own_scale=None, softcap=0.0)
    _Launch(bare)("store", struct("StoreArgs"), out)


def guide_room(strip: Strip) -> tuple[int, int]:
    return 0, 0  # only bits are stored


def guide_rows(strips: list[Strip], rule: GuideRule, room: Tensor, own: Tensor | None = None) -> list[Tensor]:
    """Returns the columns of each block that the guide drops, one bit a column."""
    threshold = guide_threshold(guide_scores(strips[0], room) if own is None else own, rule, strips[0].x.shape[1])
    dropped = []
    for strip in strips:
        words = -(-strip.y.shape[0] // 32)
        bits = torch.empty((strip.x.shape[0], words), dtype=torch.int32, device=strip.x.device)
        args = struct("BitsArgs", threshold=threshold, bits=bits, words=words)
        _Launch(strip)("guide", args)
        dropped.append(bits)
    return dropped


def guide_scores(strip: Strip, room: Tensor) -> Tensor:
    own = strip.scale.new_empty(strip.x.shape[0])
    _Launch(strip)("pick", struct("PickArgs", picked=own))
    return own


# Folds ----------------------------------------------------------------------------------------------------------------


class _Sums(NamedTuple):
    """A fold of one pass: sums over a row."""

    # Of FoldArgs, beside what all folds have: by the fold's options and scalars.
    fields: Callable[[Fold, Strip, Part, Tensor], dict[str, Any]]
    tables: tuple[str, ...]  # of FoldArgs, beside "loss"
    # `Folded` less the loss: from the tables and the rows' weights.
    finish: Callable[[dict[str, Tensor], Tensor, Strip, Tensor | None, Part], tuple[Tensor | None, tuple[Tensor, ...]]]


class _Sides(NamedTuple):
    """A fold of two passes: log-sum-exps of a row's positives and of its negatives, then the gradient."""

    row: Callable[[LogSum, LogSum, tuple[Tensor, ...], tuple[float, ...]], Sides]  # the loss, from both
    fields: Callable[..., dict[str, float]]  # of SidesArgs, by the fold's options
    kernel: str = "sides"
    counts: bool = False  # rows of which the loss is not 0
    mean: bool = False  # of the positives, inside the logarithm: rows need one, and the scale has a gradient


def fold_rows(problem: Problem, strip: Strip, out: Tensor | None, part: Part, score: Tensor) -> Folded:
    """A fold's loss, and its gradient by the similarities times both factors in `out`: nothing in between is stored."""
    fold = problem.fold
    assert fold is not None
    how = FOLDS[fold.name]
    relations = {"row_labels": part.row_labels, "key_labels": part.key_labels, "own": part.own}
    if isinstance(how, _Sides):
        return _two_sides(problem, strip, out, part.weight, relations | how.fields(*fold.options), how)
    run = _Launch(strip, narrow=True)
    fields = {"weight": part.weight} | relations | how.fields(fold, strip, part, score)
    tables = {name: run.row_table() for name in ("loss", *how.tables)}
    run(fold.name, struct("FoldArgs", **fields, **tables), out)
    weight = fields["weight"]
    loss = (weight * tables["loss"].sum(0)).masked_fill(part.weight == 0, 0)
    return Folded(loss, *how.finish(tables, weight, strip, out, part))


def _two_sides(
    problem: Problem, strip: Strip, out: Tensor | None, weight: Tensor, fields: dict[str, Any], how: _Sides
) -> Folded:
    """Statistics of both sides, the row's loss in torch, then the gradient."""
    assert problem.fold is not None
    run = _Launch(strip, narrow=True)
    pull, push = (RowSums(run.row_table(), run.row_table()) for _ in range(2))
    count = run.row_table()
    tables = {"pull_max": pull.shift, "pull_sum": pull.total, "push_max": push.shift, "push_sum": push.total}
    run(f"{how.kernel}_stats", struct("SidesArgs", **fields, **tables, count=count))
    pull, push = (merge(RowSums.empty(len(weight), weight), tables) for tables in (pull, push))
    logs = [LogSum(torch.where(side.total == 0, 0, side.shift), side.total.log()) for side in (pull, push)]
    found = how.row(logs[0], logs[1], fold_scalars(problem), problem.fold.options)
    loss, number = found.loss, count.sum(0)
    if how.mean:
        weight = weight.masked_fill(number == 0, 0)
        loss = loss + number.log()
    left_out = weight == 0
    loss = (weight * loss).masked_fill(left_out, 0)
    folded = Folded(loss, (loss > 0).to(loss.dtype) if how.counts else None)
    if out is None:
        return folded
    weights = [
        (weight * slope / side.total).masked_fill(left_out | (side.total == 0), 0)
        for slope, side in ((found.pull, pull), (found.push, push))
    ]
    q = run.row_table()
    given = {"pull_shift": logs[0].shift, "push_shift": logs[1].shift, "pull_weight": weights[0]}
    run(f"{how.kernel}_grad", struct("SidesArgs", **fields, **given, push_weight=weights[1], q=q), out)
    return folded._replace(scalars=(q.sum(),)) if how.mean else folded


def _margin_ranking(fold: Fold, strip: Strip, part: Part, score: Tensor) -> dict[str, Any]:
    (margin, mean), weight = fold.options, part.weight
    if mean:
        assert part.target is not None
        own = torch.zeros_like(part.target) if part.own is None else (part.own >= 0) & (part.own != part.target)
        weight = weight / (strip.y.shape[0] - 1 - own.to(weight.dtype)).clamp_min(1)
    return {"weight": weight, "margin": margin, "target_value": score.to(strip.scale.dtype)}


def _pair_hinge(fold: Fold, *_: Any) -> dict[str, Any]:
    margin, sign, pulls = fold.options
    return {"margin": margin, "sign": sign, "pulls": bool(pulls)}


def _by_scalars(tables: dict[str, Tensor], *_: Any) -> tuple[None, tuple[Tensor, ...]]:
    return None, (tables["scale_grad"].sum(), tables["bias_grad"].sum(0).sum())


def _patched(
    tables: dict[str, Tensor], weight: Tensor, strip: Strip, out: Tensor | None, part: Part
) -> tuple[None, tuple[Tensor, ...]]:
    """The target's entry is what its row's hinges add up to, which is known now."""
    if out is not None:
        assert part.target is not None
        entry = (-weight * tables["count"].sum(0)).masked_fill(part.weight == 0, 0)
        patch_target(Patch(out, part.target, strip.row_factor, strip.col_factor), entry)
    return None, ()


def _counted(
    tables: dict[str, Tensor], weight: Tensor, strip: Strip, out: Tensor | None, part: Part
) -> tuple[Tensor, tuple[Tensor, ...]]:
    return tables["count"].sum(0).masked_fill(part.weight == 0, 0), ()


# By the names of folds.FOLDS; csrc/similarity_fields.h says what the fields are.
FOLDS: dict[str, _Sums | _Sides] = {
    "sigmoid": _Sums(lambda fold, *_: {"sigmoid_bias": fold.scalars[0]}, ("scale_grad", "bias_grad"), _by_scalars),
    "margin_ranking": _Sums(_margin_ranking, ("count",), _patched),
    "pair_hinge": _Sums(_pair_hinge, ("count",), _counted),
    "multi_similarity": _Sides(
        multi_similarity_row,
        lambda alpha, beta, base: {"pull": -alpha, "push": beta, "pull_base": base, "push_base": base},
    ),
    "proxy_anchor": _Sides(
        proxy_anchor_row,
        lambda margin, alpha: {"pull": -alpha, "push": alpha, "pull_base": margin, "push_base": -margin},
    ),
    "circle": _Sides(
        circle_row, lambda margin, gamma: {"margin": margin, "gamma": gamma}, kernel="circle", counts=True
    ),
    "sup_con_in": _Sides(sup_con_in_row, lambda *_: {"pull": 1.0, "push": 1.0}, mean=True),
}


def _stacked(tables: list[Tensor]) -> Tensor:
    return tables[0] if len(tables) == 1 else torch.cat(tables)
