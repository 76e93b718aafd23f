"""Losses that are a sum over a row's columns: one similarity at a time."""

# maths.md: Folds
from __future__ import annotations

import torch
from torch import Tensor

from ..softmax import softplus
from .parts import (
    Folded,
    Options,
    Part,
    Scalars,
    added,
    counted,
    is_column,
    left_in,
    put_,
    relations,
    sets_of,
    weigh_,
    weighted,
)


@torch.no_grad()
def sigmoid(values: Tensor, part: Part, scalars: Scalars, options: Options, gradient: bool) -> Folded:
    """SigLIP: `sum_j log(1 + exp(-y_ij z_ij))`, `z = scale values + bias`, y = 1 for positives and -1 for negatives."""
    scale, bias = scalars
    positive, _ = sets_of(values, part)
    z = (values * scale).add_(bias)
    other = z.neg()
    torch.where(positive, other, z, out=z)
    put_(z, part.own, -torch.inf)
    torch.logaddexp(z, z.new_zeros(()), out=other)
    loss = weighted(other.sum(dim=1), part)
    if not gradient:
        return Folded(loss, None)
    torch.sigmoid(z, out=z)
    torch.neg(z, out=other)
    torch.where(positive, other, z, out=z)
    weigh_(z, part)
    torch.mul(z, values, out=other).masked_fill_((part.weight == 0)[:, None], 0)
    torch.mul(z, scale, out=values)
    return Folded(loss, None, (added(other), added(z)))


def sigmoid_formula(values: Tensor, part: Part, scalars: Scalars, options: Options) -> tuple[Tensor, Tensor | None]:
    scale, bias = scalars
    positive, negative = relations(values, part)
    sign = positive.to(values.dtype) - negative.to(values.dtype)
    terms = softplus(-sign * (scale * values + bias))
    return left_in(torch.where(positive | negative, terms, 0).sum(dim=1), part), None


@torch.no_grad()
def margin_ranking(values: Tensor, part: Part, scalars: Scalars, options: Options, gradient: bool) -> Folded:
    """`sum_{j != t} max(0, margin - v_it + v_ij)`; `options` are the margin and whether to divide by the negatives."""
    margin, mean = options
    target = part.target
    assert target is not None, "margin_ranking needs a target"
    index = target[:, None]
    values.sub_(values.gather(1, index)).add_(margin).clamp_min_(0)
    values.scatter_(1, index, 0)
    put_(values, part.own, 0.0)
    share = torch.ones_like(part.weight)
    if mean:
        own = torch.zeros_like(target) if part.own is None else (part.own >= 0) & (part.own != target)
        share /= (values.shape[1] - 1 - own.to(share.dtype)).clamp_min(1)
    loss = weighted(values.sum(dim=1).mul_(share), part)
    if gradient:
        values.sign_()
        values.scatter_(1, index, -values.sum(dim=1, keepdim=True))
        weigh_(values, part, share)
    return Folded(loss, None)


def margin_ranking_formula(
    values: Tensor, part: Part, scalars: Scalars, options: Options
) -> tuple[Tensor, Tensor | None]:
    margin, mean = options
    assert part.target is not None
    negative = ~is_column(values, part.target) & ~is_column(values, part.own)
    hinge = torch.relu(margin - values.gather(1, part.target[:, None]) + values)
    loss = (hinge * negative).sum(dim=1)
    return left_in(loss / negative.sum(dim=1).clamp_min(1) if mean else loss, part), None


@torch.no_grad()
def pair_hinge(values: Tensor, part: Part, scalars: Scalars, options: Options, gradient: bool) -> Folded:
    """`sum max(0, sign (v - margin))` over a row's positives or negatives, and the number of terms above 0.

    options: margin, sign, and whether the sum is over the positives.
    """
    margin, sign, pulls = options
    hinge = values.sub_(margin).mul_(sign).clamp_min_(0)
    hinge.masked_fill_(~sets_of(values, part)[0 if pulls else 1], 0)
    loss, count = hinge.sum(dim=1), (hinge > 0).sum(dim=1)
    if gradient:
        weigh_(values.sign_(), part, sign)
    return Folded(weighted(loss, part), counted(count, values, part))


def pair_hinge_formula(values: Tensor, part: Part, scalars: Scalars, options: Options) -> tuple[Tensor, Tensor | None]:
    margin, sign, pulls = options
    hinge = torch.relu(sign * (values - margin)) * relations(values, part)[0 if pulls else 1]
    return left_in(hinge.sum(dim=1), part), counted((hinge > 0).sum(dim=1), values, part)
