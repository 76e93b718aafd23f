"""Batch-all and semi-hard triplets, which compare every positive of a row with its negatives."""

# maths.md: Folds
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import slices
from .parts import TILE, Folded, Options, Part, Scalars, counted, left_in, relations, sets_of, weigh_, weighted, wide_of

FEW = 64  # columns for each positive of a row, from which positives are compared one by one


class Few(NamedTuple):
    """The positives of rows that have at most `most` of them."""

    most: int
    row: Tensor
    column: Tensor
    place: Tensor  # among its row's

    def packed(self, values: Tensor, fill: float) -> Tensor:
        """Returns their values, `[R, most]`."""
        out = values.new_full((values.shape[0], self.most), fill)
        return out.index_put_((self.row, self.place), values[self.row, self.column])


def _few(positive: Tensor) -> Few | None:
    """Returns the positives if rows have few of them: a pass over the row for each then costs less than to sort it.

    On a CPU, where counting them is no wait.
    """
    if positive.device.type != "cpu" or not positive.numel() or positive.shape[1] < FEW:
        return None
    number = positive.sum(dim=1)
    most = int(number.max())
    if most * FEW > positive.shape[1]:
        return None
    row, column = positive.nonzero(as_tuple=True)
    return Few(most, row, column, torch.arange(len(row)) - (number.cumsum(0) - number)[row])


@torch.no_grad()
def batch_all(values: Tensor, part: Part, scalars: Scalars, options: Options, gradient: bool) -> Folded:
    """`sum_{p, n} max(0, v_p - v_n + margin)` over distances, and the number of triplets with a loss above 0.

    The gradient by a positive's distance v_p is the number of negatives below v_p + margin. The gradient by a
    negative's distance v_n is minus the number of positives above v_n - margin. Two sorts and two searches count both.
    The loss is piecewise linear, so it is `<gradient, values> + margin count`.
    """
    (margin,) = options
    positive, negative = sets_of(values, part)
    few = _few(positive)
    if few is not None:
        reach = few.packed(values, -torch.inf).add_(margin)
        slope, counts = torch.zeros_like(values, dtype=torch.int32), torch.zeros_like(reach, dtype=torch.int32)
        for k in range(few.most):
            below = (values < reach[:, k, None]).logical_and_(negative)
            counts[:, k] = below.sum(dim=1)
            slope.sub_(below.view(torch.uint8))
        slope.index_put_((few.row, few.column), counts[few.row, few.place])
        count = counts.sum(dim=1)
    else:
        values_ = values.contiguous()  # searchsorted warns about other strides
        reach = values_ + margin
        ascending = values_.masked_fill(~negative, torch.inf).sort(dim=1).values
        slope = torch.searchsorted(ascending, reach, out_int32=True).mul_(positive)
        count = slope.sum(dim=1)
        ascending = reach.masked_fill_(~positive, -torch.inf).sort(dim=1).values
        reached = torch.searchsorted(ascending, values_, right=True, out_int32=True).sub_(values.shape[1])
        slope.add_(reached.mul_(negative))
    wide = wide_of(values)  # the losses are small differences of distances
    loss = margin * count.to(wide)
    for tile in slices(values.shape[1], TILE):
        loss += torch.linalg.vecdot(values[:, tile].to(wide), slope[:, tile].to(wide))
    loss = weighted(loss.to(values.dtype), part)
    if gradient:
        weigh_(values.copy_(slope), part)
    return Folded(loss, counted(count, values, part))


def batch_all_formula(values: Tensor, part: Part, scalars: Scalars, options: Options) -> tuple[Tensor, Tensor | None]:
    (margin,) = options
    positive, negative = relations(values, part)
    hinge = torch.relu(values[:, :, None] - values[:, None, :] + margin)
    hinge = hinge * (positive[:, :, None] & negative[:, None, :])
    count = (hinge > 1e-16).sum(dim=(1, 2)).to(values.dtype)
    return left_in(hinge.sum(dim=(1, 2)), part), torch.where(part.weight == 0, 0, count)


@torch.no_grad()
def semi_hard(values: Tensor, part: Part, scalars: Scalars, options: Options, gradient: bool) -> Folded:
    """`sum_p max(0, v_p - v_n(p) + margin)` over distances, n(p) the nearest negative farther than p; counts the pairs.

    If no negative is farther, n(p) is the farthest negative. If the row has no negative, n(p) is the row's nearest
    column, its own included, as in sentence-transformers (and tensorflow-addons before it).
    """
    (margin,) = options
    positive, negative = sets_of(values, part)
    few = _few(positive)
    if few is not None:
        return _semi_hard_of_few(values, part, few, negative, margin, gradient)
    ascending, order = values.masked_fill(~negative, torch.inf).sort(dim=1)
    last = negative.sum(dim=1, keepdim=True) - 1
    nearest = values.argmin(dim=1, keepdim=True)
    loss = values.new_zeros(values.shape[0])
    slope = torch.zeros_like(values)
    for tile in slices(values.shape[1], TILE):
        distance = values[:, tile].contiguous()
        place = torch.minimum(torch.searchsorted(ascending, distance, right=True), last).clamp_min_(0)
        column = torch.where(last < 0, nearest, order.gather(1, place))
        hinge = (distance - values.gather(1, column)).add_(margin).clamp_min_(0).mul_(positive[:, tile])
        loss += hinge.sum(dim=1)
        active = hinge.sign_()
        slope[:, tile] += active
        slope.scatter_add_(1, column, active.neg_())  # integers: their sum does not depend on the order of atomics
    if gradient:
        weigh_(values.copy_(slope), part)
    return Folded(weighted(loss, part), counted(positive.sum(dim=1), values, part))


def _semi_hard_of_few(values: Tensor, part: Part, few: Few, negative: Tensor, margin: float, gradient: bool) -> Folded:
    """`semi_hard`, one positive of each row at a time; the first of equal negatives, as the formula."""
    distance, none = few.packed(values, torch.nan), ~negative.any(dim=1)
    others = values.masked_fill(~negative, torch.inf)
    chosen = torch.zeros_like(distance, dtype=torch.int64)
    for k in range(few.most):
        farther = others.masked_fill(others <= distance[:, k, None], torch.inf)
        chosen[:, k] = farther.argmin(dim=1)
    nearest = others.gather(1, chosen)
    (rest,) = ((nearest == torch.inf) | ~(nearest > distance)).any(dim=1).nonzero(as_tuple=True)
    if len(rest):
        farthest = values[rest].masked_fill(~negative[rest], -torch.inf).argmax(dim=1)
        other = torch.where(none[rest], values[rest].argmin(dim=1), farthest)
        missing = (nearest[rest] == torch.inf) | ~(nearest[rest] > distance[rest])
        chosen[rest] = torch.where(missing, other[:, None], chosen[rest])
    hinge = (distance - values.gather(1, chosen)).add_(margin).clamp_min_(0)
    row, place = few.row, few.place
    hinge = hinge[row, place]
    loss = values.new_zeros(values.shape[0]).index_add_(0, row, hinge)
    if gradient:
        active = hinge.sign()
        slope = torch.zeros_like(values).index_put_((row, few.column), active)
        slope.index_put_((row, chosen[row, place]), active.neg(), accumulate=True)
        weigh_(values.copy_(slope), part)
    count = torch.zeros_like(part.rows).index_add_(0, row, torch.ones_like(row))
    return Folded(weighted(loss, part), counted(count, values, part))


def semi_hard_formula(values: Tensor, part: Part, scalars: Scalars, options: Options) -> tuple[Tensor, Tensor | None]:
    (margin,) = options
    if values.shape[1] == 0:  # min() raises without columns
        loss = left_in(values.sum(dim=1), part)
        return loss, torch.zeros_like(loss)
    positive, negative = relations(values, part)
    farther = negative[:, None, :] & (values[:, None, :] > values[:, :, None])  # [row, positive, negative]
    semi_hard = torch.where(farther, values[:, None, :], torch.inf).min(dim=2).values
    farthest = torch.where(negative, values, -torch.inf).max(dim=1, keepdim=True).values
    fallback = torch.where(negative.any(dim=1, keepdim=True), farthest, values.min(dim=1, keepdim=True).values)
    hinge = torch.relu(values - torch.where(farther.any(dim=2), semi_hard, fallback) + margin)
    count = positive.sum(dim=1).to(values.dtype)
    return left_in((hinge * positive).sum(dim=1), part), torch.where(part.weight == 0, 0, count)
