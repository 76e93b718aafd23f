"""Divergences of a student's softmax from a teacher's."""

# maths.md: Folds
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..numerics import slices
from .parts import (
    FAR,
    Fold,
    Folded,
    Formula,
    Options,
    Part,
    Scalars,
    is_column,
    left_in,
    probabilities_,
    put_,
    weighted,
    wide_of,
)

# Elements of a tile: the passes over the logits of both models stay in a CPU's caches. Over whole chunks a step took
# 1.33 times as long as its products at N = 4096, D = 384, T = 768; over tiles of 2^17 elements it takes 1.1.
DISTILL_TILE = 1 << 17
DISTILL_COPIES = 6  # values and the teacher's; of a tile, both logits and both softmaxes
Divergence = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _distillation(divergence: Divergence) -> Fold:
    """Returns the fold of a divergence of two softmaxes: p, the teacher's, and q, that of `scale values`.

    `divergence` takes p, q, the logits of both relative to each row's largest, and the logarithms of what their
    exponentials sum to, `[R]` in fp64. It overwrites the matrices, and returns the losses and their gradient by the
    student's logits.
    """

    @torch.no_grad()
    def fold(values: Tensor, part: Part, scalars: Scalars, options: Options, gradient: bool) -> Folded:
        size = max(1, DISTILL_TILE // max(1, values.shape[1])) if values.is_cpu else max(1, len(values))
        loss, total = torch.empty_like(part.weight, dtype=values.dtype), values.new_zeros((), dtype=wide_of(values))
        for rows in slices(len(values), size):
            loss[rows], terms = _distilled(divergence, values[rows], part.of_rows(rows), scalars[0], gradient)
            total += terms.sum(dtype=total.dtype)
        return Folded(loss, None, (total,) if gradient else ())

    return fold


def _distilled(
    divergence: Divergence, values: Tensor, part: Part, scale: Tensor, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Returns the losses of a tile of rows, and the terms of the gradient by the scale; overwrites `values`."""
    assert part.teacher is not None, "a distillation needs a teacher"
    admitted = part.admitted
    if part.own is not None:
        every = torch.ones_like(values, dtype=torch.bool) if admitted is None else admitted.clone()
        admitted = put_(every, part.own, False)
    # A copy: teacher and student then pass through the same arithmetic on equally aligned memory.
    teacher = part.teacher.to(values.dtype, copy=True)
    if part.teacher_scale is not None:
        teacher.mul_(part.teacher_scale)
    teacher.clamp_(min=FAR)  # of -inf, a difference of logits would be NaN
    z = values * scale
    if admitted is not None:
        part = part._replace(weight=part.weight.masked_fill(~admitted.any(dim=1), 0))
        for x, fill in ((values, 0.0), (teacher, FAR), (z, FAR)):
            x.masked_fill_(~admitted, fill)
    (p, total_p), (q, total_q) = probabilities_(teacher), probabilities_(z)
    logs = [total[:, 0].to(wide_of(values)).log_() for total in (total_p, total_q)]
    loss, dz = divergence(p, q, teacher, z, *logs)
    loss = weighted(loss.to(values.dtype), part)
    if gradient:
        terms = weighted(torch.linalg.vecdot(dz, values), part)
        torch.mul(dz, (part.weight * scale)[:, None], out=values)
        left_out = part.weight == 0
        if not values.is_cpu or bool(left_out.any()):
            values.masked_fill_(left_out[:, None], 0)
    return loss, terms if gradient else loss


def _kl(p: Tensor, q: Tensor, teacher: Tensor, z: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """`sum p (log p - log q)`.

    The loss of equal logits is exactly 0. The code adds `sum (q - p)`, which is 0 in exact arithmetic and cancels the
    rounding of the two normalisers. Without it a loss near 0 would be that rounding.
    """
    cross = torch.linalg.vecdot(p, teacher.sub_(z))
    dz = q.sub_(p)
    return (cross + (log_q - log_p) + dz.sum(dim=1)).clamp_min_(0), dz


def _ce(p: Tensor, q: Tensor, teacher: Tensor, z: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """`-sum p log q`."""
    return log_q - torch.linalg.vecdot(p, z), q.sub_(p)


def _mse(p: Tensor, q: Tensor, teacher: Tensor, z: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """`sum (q - p)^2`."""
    difference = torch.sub(q, p, out=p)
    mean = torch.linalg.vecdot(difference, q)[:, None]
    return torch.linalg.vecdot(difference, difference), difference.sub_(mean).mul_(q).mul_(2)


distill, distill_ce, distill_mse = (_distillation(divergence) for divergence in (_kl, _ce, _mse))


def _formula_of(divergence: Callable[[Tensor, Tensor], Tensor]) -> Formula:
    """Returns the formula of a divergence: a function of p and log q, `[R, N]`."""

    def formula(values: Tensor, part: Part, scalars: Scalars, options: Options) -> tuple[Tensor, Tensor | None]:
        assert part.teacher is not None
        own = is_column(values, part.own)
        teacher = part.teacher.to(values.dtype)
        if part.teacher_scale is not None:
            teacher = teacher * part.teacher_scale
        if part.admitted is not None:
            own = own | ~part.admitted
            values = torch.where(part.admitted, values, 0)
        p = teacher.masked_fill(own, FAR).softmax(dim=1)
        log_q = (scalars[0] * values).masked_fill(own, FAR).log_softmax(dim=1)
        loss = torch.where(own.all(dim=1), 0, divergence(p, log_q).sum(dim=1))
        return left_in(loss, part), None

    return formula


distill_formula = _formula_of(lambda p, log_q: torch.xlogy(p, p) - p * log_q)
distill_ce_formula = _formula_of(lambda p, log_q: -p * log_q)
distill_mse_formula = _formula_of(lambda p, log_q: (log_q.exp() - p).square())
