"""The folds that kernels compute in their tile, on `cuda` and on `triton`: what each is told, and what becomes of its
tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..core.folds import FOLDS as IN_TORCH
from ..core.folds import (
    Folded,
    LogSum,
    Part,
    Sides,
    circle_row,
    multi_similarity_row,
    proxy_anchor_row,
    sup_con_in_row,
)
from ..core.numerics import stats_dtype
from ..core.problem import Fold, Problem
from ..core.rows import fold_scalars, patch_target
from ..core.strips import Patch, RowSums, Strip


class Kernel(Protocol):
    """One launch over a strip. csrc/similarity_fields.h says what the fields are."""

    def row_table(self) -> Tensor:
        """Returns room for one number per tile and row, [n_tiles, R]."""

    def __call__(self, fields: dict[str, Any], out: Tensor | None = None) -> None: ...


class Kernels(NamedTuple):
    """What a backend brings. The kernels are those of FOLDS: a sum's is named as its fold, and sides have two, `_stats`
    and `_grad`."""

    of: Callable[[str, Strip], Kernel]  # by name
    merge: Callable[[RowSums, RowSums], RowSums]


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


def can_fold(problem: Problem) -> bool:
    """True for sums over a row's similarities. fp16 lacks the range for their smallest derivatives."""
    fold = problem.fold
    known = fold is not None and fold.name in FOLDS and not fold.distance
    return known and problem.dtype != torch.float16


def workspace_copies(problem: Problem, in_tile: bool) -> float:
    fold = problem.fold
    return IN_TORCH[fold.name].copies if fold is not None and not in_tile else 1


def workspace_dtype(problem: Problem, in_tile: bool) -> torch.dtype:
    """Returns the workspace's dtype; folds in torch take similarities in fp32."""
    return stats_dtype(problem.dtype) if problem.fold is not None and not in_tile else problem.dtype


def fold_rows(
    kernels: Kernels, problem: Problem, strip: Strip, out: Tensor | None, part: Part, score: Tensor
) -> Folded:
    """A fold's loss, and its gradient by the similarities times both factors in `out`: nothing in between is stored."""
    fold = problem.fold
    assert fold is not None
    how = FOLDS[fold.name]
    relations = {"row_labels": part.row_labels, "key_labels": part.key_labels, "own": part.own}
    if isinstance(how, _Sides):
        return _two_sides(kernels, problem, strip, out, part.weight, relations | how.fields(*fold.options), how)
    run = kernels.of(fold.name, strip)
    fields = {"weight": part.weight} | relations | how.fields(fold, strip, part, score)
    tables = {name: run.row_table() for name in ("loss", *how.tables)}
    run(fields | tables, out)
    weight = fields["weight"]
    loss = (weight * tables["loss"].sum(0)).masked_fill(part.weight == 0, 0)
    return Folded(loss, *how.finish(tables, weight, strip, out, part))


def _two_sides(
    kernels: Kernels,
    problem: Problem,
    strip: Strip,
    out: Tensor | None,
    weight: Tensor,
    fields: dict[str, Any],
    how: _Sides,
) -> Folded:
    """Statistics of both sides, the row's loss in torch, then the gradient."""
    assert problem.fold is not None
    run = kernels.of(f"{how.kernel}_stats", strip)
    pull, push = (RowSums(run.row_table(), run.row_table()) for _ in range(2))
    count = run.row_table()
    tables = {"pull_max": pull.shift, "pull_sum": pull.total, "push_max": push.shift, "push_sum": push.total}
    run(fields | tables | {"count": count})
    pull, push = (kernels.merge(RowSums.empty(len(weight), weight), tables) for tables in (pull, push))
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
    run = kernels.of(f"{how.kernel}_grad", strip)
    q = run.row_table()
    given = {"pull_shift": logs[0].shift, "push_shift": logs[1].shift, "pull_weight": weights[0]}
    run(fields | given | {"push_weight": weights[1], "q": q}, out)
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
