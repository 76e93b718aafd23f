"""Distillation where kernels fold both models' similarities in one tile: what each launch is told, and what becomes of
its sums.

    statistics of the student, statistics of the teacher      one product each, by the kernel of the softmax losses
    both tiles -> losses, the scale's gradient, dz            one product each
    "mse" needs the row's sum of q (q - p) before its dz      both tiles once more
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.folds import FAR, FOLDS, TEACHER, Folded, Part
from ..core.numerics import wide_dtype
from ..core.problem import Beside, Problem
from ..core.strips import RowSums, Strip


class Side(NamedTuple):
    """One model's rows: exponents are `scale times similarity - shift`."""

    scale: Tensor  # 0-dim
    shift: Tensor  # [R], the largest logit
    total: Tensor  # [R], sums of the exponentials
    inverse: Tensor  # 1 / total; 0 without columns

    @property
    def log(self) -> Tensor:
        return self.total.to(wide_dtype(self.total.device, self.total.dtype)).log()


class Rows(NamedTuple):
    """What a launch needs of its rows. weight: multiplies what is stored, `[R]`. mean: `[R]`, of the second launch of
    "mse"."""

    form: str  # the fold's name
    student: Side
    teacher: Side
    weight: Tensor | None = None
    mean: Tensor | None = None


class Kernels(NamedTuple):
    """What a backend brings."""

    stats: Callable[[list[Strip]], RowSums]
    merge: Callable[[RowSums, RowSums], RowSums]
    # Writes dz to a tensor, if it is given one, and returns sums by tiles: [n_tiles, R] of the losses and of Q.
    both: Callable[[Strip, Strip, Tensor | None, Rows], tuple[Tensor, Tensor]]


def can_distill(problem: Problem) -> bool:
    """True for folds with a teacher, in fp16 as well: the largest derivative is known before the first chunk."""
    fold = problem.fold
    return fold is not None and FOLDS[fold.name].sums == TEACHER and not fold.distance and not fold.itself


def workspace_copies(problem: Problem) -> float:
    """Returns the memory of a chunk in multiples of its workspace: masks are bool matrices beside it."""
    return 1 + problem.masked / problem.dtype.itemsize


def distill_rows(
    kernels: Kernels,
    problem: Problem,
    strips: list[Strip],
    taught: list[Strip],
    outs: Sequence[Tensor] | None,
    part: Part,
    beside: Beside | None,
    gain: Tensor | None,
) -> Folded:
    """A chunk's losses, and the gradient by the student's similarities times both factors and the gain in `outs`.

    strips, taught: of each block, the masks of both in the student's. beside: the rows of `Fold.beside`.
    """
    fold = problem.fold
    assert fold is not None and fold.teacher_scale is not None
    taught = [other._replace(mask=strip.mask) for strip, other in zip(strips, taught, strict=True)]
    own = [None, None] if beside is None else [(beside.values, beside.admitted), (beside.teacher, beside.admitted)]
    student, teacher = (
        _side(kernels, some, scale, part.weight, columns)
        for some, scale, columns in zip((strips, taught), (problem.scale, fold.teacher_scale), own, strict=True)
    )
    weight = part.weight.masked_fill((part.weight == 0) | (student.total == 0), 0)
    left_out = weight == 0
    row_factor = strips[0].row_factor
    rows = Rows(fold.name, student, teacher)

    def walk(outs: Sequence[Tensor] | None, rows: Rows) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns sums over all columns of the losses and of Q, whose u has both factors, and own columns' gradient."""
        targets = [None] * len(strips) if outs is None else outs
        sums = [kernels.both(*given, rows) for given in zip(strips, taught, targets, strict=True)]
        loss, q = (torch.stack([tables.sum(0) for tables in side]).sum(0) for side in zip(*sums, strict=True))
        if row_factor is not None and not (rows.form == "distill_mse" and rows.mean is None):
            q = q * row_factor
        if beside is None:
            return loss, q, None
        terms, more, gradient = _beside(beside, rows)
        return loss + terms, q + more, gradient

    if outs is not None:
        factors = [problem.scale, *(x for x in (row_factor, gain) if x is not None)]
        rows = rows._replace(weight=functools.reduce(torch.mul, factors, weight))
    if fold.name != "distill_mse":
        loss, q, gradient = walk(outs, rows)
        log_q = student.log
        loss = (loss + (log_q - teacher.log)).clamp_min(0) if fold.name == "distill" else loss + log_q
    else:
        loss, mean, gradient = walk(None, rows)
        if outs is not None:
            _, q, gradient = walk(outs, rows._replace(mean=mean))
    loss = (weight * loss).to(weight.dtype).masked_fill(left_out, 0)
    if outs is None:
        return Folded(loss, None)
    by_scale = (weight * q).masked_fill(left_out, 0).sum(dtype=wide_dtype(q.device, q.dtype))
    if gradient is not None:
        gradient = (gradient * (weight * problem.scale)[:, None]).masked_fill(left_out[:, None], 0)
    return Folded(loss, None, (by_scale,), gradient)


def _side(
    kernels: Kernels,
    strips: list[Strip],
    scale: Tensor,
    like: Tensor,
    beside: tuple[Tensor, Tensor | None] | None,
) -> Side:
    """Returns the sums over all columns, a row's own among them."""
    sums = kernels.merge(RowSums.empty(len(like), like), kernels.stats(strips))
    if beside is not None:
        values, admitted = beside
        z = (values * scale).to(like.dtype)
        z = z if admitted is None else z.masked_fill(~admitted, -torch.inf)
        largest = z.amax(1)
        total = (z - largest.masked_fill(largest == -torch.inf, 0)[:, None]).exp().sum(1)
        sums = kernels.merge(sums, RowSums(largest[None], total[None]))
    assert isinstance(sums.shift, Tensor)  # merged, of rows
    return Side(scale, sums.shift, sums.total, (1 / sums.total).masked_fill(sums.total == 0, 0))


def _beside(beside: Beside, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what a tile's fold does of the rows' own columns, [R, K]: the sums of the losses and of Q, and dz."""
    admitted = beside.admitted
    values = beside.values if admitted is None else beside.values.masked_fill(~admitted, 0)

    def softmax(values: Tensor, side: Side) -> tuple[Tensor, Tensor]:
        a = (values * side.scale).to(side.shift.dtype) - side.shift[:, None]
        a = a if admitted is None else a.masked_fill(~admitted, FAR)
        return a, a.exp() * side.inverse[:, None]

    (a, q), (b, p) = softmax(values, rows.student), softmax(beside.teacher, rows.teacher)
    d = q - p
    if rows.form == "distill_mse" and rows.mean is None:
        return (d * d).sum(1), (q * d).sum(1), d
    dz = d if rows.mean is None else 2 * q * (d - rows.mean[:, None])
    terms = p * (b - a) + d if rows.form == "distill" else -p * a
    return terms.sum(1), (dz * values).sum(1), dz
