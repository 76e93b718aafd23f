"""Losses of a row that are a function of its targets' logits and of the sum over its negatives.

The plain softmax has one target: `log(1 + S / exp(z_t))`. The losses here have several, or bend that one. Each is a
function of `n = log S` and of the targets' logits `v`, both relative to the row's shift. Its derivatives are all that a
sweep needs: the exponentials of the negatives are multiplied by `by_negatives / S`, and the targets' entries, which are
no part of the sums, are written beside them. So no product is computed again.
"""

# maths.md: Several targets; Debiased

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .problem import Problem
from .softmax import safe_log, softplus
from .strips import Patch, RowSums, Settled
from .transforms import Transform, with_slope


class Slopes(NamedTuple):
    """A row's loss, and its derivatives."""

    loss: Tensor  # [R]
    by_negatives: Tensor  # [R], by the log-sum-exp of the negatives
    by_targets: Tensor  # [R, P], by the targets' logits
    by_scale: Tensor | None = None  # [R], by the scale, where that is no factor of a logit


Law = Callable[[Tensor, Tensor], Slopes]  # of n [R] and v [R, P]


def of_several(here: Tensor, form: str) -> Law:
    """Returns the law of several targets p, of which `here` are there.

    each:   l = mean_p log(1 + S / exp(z_p))
    joint:  l = log(1 + S / sum_p exp(z_p))
    """

    def each(n: Tensor, v: Tensor) -> Slopes:
        x = n[:, None] - torch.where(here, v, 0)
        share = here.to(x.dtype) / here.sum(1, keepdim=True)
        slope = torch.where(here, share * torch.sigmoid(x), 0)
        return Slopes(torch.where(here, share * softplus(x), 0).sum(1), slope.sum(1), -slope)

    def joint(n: Tensor, v: Tensor) -> Slopes:
        v = torch.where(here, v, -math.inf)
        x = n - v.logsumexp(1)
        slope = torch.sigmoid(x)
        return Slopes(softplus(x), slope, -slope[:, None] * v.softmax(1))

    return {"each": each, "joint": joint}[form]


def debiased(score: Tensor, count: Tensor | int, scale: Tensor, share: float) -> Law:
    """Returns the law of one target under the debiased loss (Chuang et al. 2020).

        g = max((S - share N exp(z_t)) / (1 - share), N exp(-scale)),   l = log(1 + g / exp(z_t))

    With the plain loss p, the first is `p + log(1 - share (N + 1) exp(-p)) - log(1 - share)`. score: [R], z_t itself.
    count: N, of each row or of all.
    """

    def law(n: Tensor, v: Tensor) -> Slopes:
        x = n - v[:, 0]
        plain = softplus(x)
        less = share * (count + 1) * torch.exp(-plain)
        below = less >= 1
        less = torch.where(below, 0, less)
        free = plain + torch.log1p(-less) - math.log1p(-share)
        many = count if isinstance(count, Tensor) else torch.full_like(score, count)
        bound = (many.log() - scale - score).to(n.dtype)
        least = softplus(bound)
        clamped = below | (free < least)  # False for NaN, which `free` keeps
        slope = torch.sigmoid(x) / (1 - less)
        of_bound = torch.where(clamped, -torch.sigmoid(bound), 0)
        slope = torch.where(clamped, 0, slope)
        return Slopes(torch.where(clamped, least, free), slope, (of_bound - slope)[:, None], of_bound)

    return law


def law_of(problem: Problem, here: Tensor, score: Tensor, count: Tensor | int | None) -> Law:
    """Returns the law of a problem that `bends`, of some rows.

    here: [R, P], the targets that are there. score: [R], the first one's logit. count: of each row's negatives, if they
    were counted.
    """
    if problem.targets is not None:
        return of_several(here, problem.targets.form)
    count = problem.negatives if count is None else count
    assert count is not None, "a tally has counted them"
    return debiased(score, count, problem.scale, problem.debiased)


class FromLogits(NamedTuple):
    """Rows of logits apart: the targets', and the others with -inf in the targets' places."""

    here: Tensor  # [M, P]
    places: Tensor  # [M, P]
    scores: Tensor  # [M, P]
    negatives: Tensor  # [M, N]
    law: Law


def from_logits(problem: Problem, z: Tensor) -> FromLogits:
    """z: [M, N]; those of a symmetric problem's columns, transposed, have their targets in the same places."""
    columns = problem.all_targets
    here = columns >= 0
    places = torch.where(here, columns, columns[:, :1])
    scores = finite(z.gather(1, places), z.dtype)
    negatives = z.scatter(1, places, -torch.inf)
    counts = problem.debiased and problem.negatives is None
    count = (negatives > -torch.inf).sum(1).to(z.dtype) if counts else None
    return FromLogits(here, places, scores, negatives, law_of(problem, here, scores[:, 0], count))


def loss_of(parts: FromLogits) -> Tensor:
    """Returns each row's loss; autograd differentiates it any number of times."""
    negatives = parts.negatives
    if not negatives.shape[0]:
        return negatives.sum(1)
    shift = negatives.detach().amax(1)
    shift = torch.where(shift == -torch.inf, 0, shift)
    total = torch.exp(negatives - shift[:, None]).sum(1)
    return parts.law(safe_log(total), parts.scores - shift[:, None]).loss


def finite(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns NaN for a target's logit of infinity, as torch's cross-entropy does: inf - inf."""
    return scores.masked_fill(scores.to(dtype) == torch.inf, torch.nan)


def settle(
    sums: RowSums,
    scores: Tensor,
    weight: Tensor,
    law: Law,
    transform: Transform | None,
    *,
    wanted: bool = True,
    patch: Patch | None = None,
    scaled: Sequence[Tensor] = (),
    dtype: torch.dtype | None = None,
) -> tuple[Settled, Tensor, Tensor | None]:
    """Returns what `rows.settle` does, and the weighted losses' derivatives by the targets' logits and by the scale.

    scores: [R, P]. With `patch`, whose target is [R, P], the rows of its workspace are multiplied by `weight / l`
    later, so that entries are relative to it. Where the negatives' own derivative is far smaller than an entry, or 0,
    they get a factor of `eps^1.5` of that entry instead: far below its rounding.
    """
    total, left_out = sums.total, weight == 0
    scores = finite(scores, total.dtype)
    shift = torch.where((total == 0) & ~left_out, scores[:, 0].to(total.dtype), sums.shift)
    v = (scores - shift[:, None]).to(total.dtype)
    loss, by_negatives, by_targets, by_scale = law(safe_log(total), v)
    if transform is not None:
        loss, slope = with_slope(loss, transform, wanted)
        by_negatives, by_targets = by_negatives * slope, by_targets * slope[:, None]
        by_scale = None if by_scale is None else by_scale * slope
    out = left_out[:, None]
    entries = (weight[:, None] * by_targets).masked_fill(out, 0)
    by_scale = None if by_scale is None else (weight * by_scale).masked_fill(left_out, 0)
    whole = torch.where(total == 0, 1, total)
    if patch is None:
        over_l = by_negatives * (weight / whole)
    else:
        least = torch.finfo(total.dtype).eps ** 1.5 * by_targets.abs().amax(1)
        factor = torch.maximum(by_negatives.abs(), least).copysign(by_negatives)
        over_l = factor * (weight / whole)
        # Entries first: `whole / factor` would be infinite for entries of 1e-30, which a row at the debiased bound has.
        relative = by_targets / torch.where(factor == 0, 1, factor)[:, None] * whole[:, None]
        add_entries(patch, relative.masked_fill(out, 0))
    over_l = over_l.masked_fill(left_out, 0)
    loss = (weight * loss).masked_fill(left_out, 0)
    operands = [(x * over_l[:, None]).to(dtype) for x in scaled]
    first = entries[:, 0].contiguous()  # kernels take no stride
    return Settled(loss, shift, over_l, first, operands, entries[:, 1:]), entries, by_scale


def scale_terms(entries: Tensor, by_scale: Tensor | None, sims: Tensor, here: Tensor) -> Tensor:
    """Returns `[R]`, the terms of the scale's gradient besides the negatives' `sum_j dz_j (sim_j - sim_first)`."""
    terms = torch.where(here, entries * (sims - sims[:, :1]), 0).sum(1)
    return terms if by_scale is None else terms + by_scale * (sims[:, 0] + 1)


def add_entries(patch: Patch, entries: Tensor) -> None:
    """Adds the entries of targets `[R, P]` to a workspace that holds 0 there; a target of -1 is none."""
    out, target, row_factor, col_factor = patch
    none, target = target < 0, target.clamp(min=0)
    if row_factor is not None and col_factor is not None:
        entries = entries * row_factor[:, None] * col_factor[target]
    out.scatter_add_(1, target, entries.masked_fill(none, 0).to(out.dtype))
