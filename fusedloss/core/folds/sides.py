"""Losses of two log-sum-exps, of a row's positives and of its negatives."""

# maths.md: Folds
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..softmax import softplus
from .parts import (
    FAR,
    Folded,
    LogSum,
    Options,
    Part,
    Scalars,
    added,
    counted,
    left_in,
    logsumexp,
    relations,
    sets_of,
    softmax_,
    weigh_,
    weighted,
)


class Sides(NamedTuple):
    """A loss of the log-sum-exps of a row's positives and negatives, and its derivatives by the two."""

    loss: Tensor  # [R]
    pull: Tensor
    push: Tensor


def multi_similarity_row(pull: LogSum, push: LogSum, scalars: Scalars, options: Options) -> Sides:
    alpha, beta, _ = options
    pulled, pushed = pull.value, push.value
    loss = softplus(pulled) / alpha + softplus(pushed) / beta
    return Sides(loss, torch.sigmoid(pulled) / alpha, torch.sigmoid(pushed) / beta)


def proxy_anchor_row(pull: LogSum, push: LogSum, scalars: Scalars, options: Options) -> Sides:
    _, share = scalars
    pulled, pushed = pull.value, push.value
    return Sides(share * softplus(pulled) + softplus(pushed), share * torch.sigmoid(pulled), torch.sigmoid(pushed))


def circle_row(pull: LogSum, push: LogSum, scalars: Scalars, options: Options) -> Sides:
    z = (pull.shift + push.shift) + (pull.log + push.log)
    slope = torch.sigmoid(z)
    return Sides(softplus(z), slope, slope)


def sup_con_in_row(pull: LogSum, push: LogSum, scalars: Scalars, options: Options) -> Sides:
    """Returns the sides without the logarithm of the number of positives, which the caller adds."""
    z = (push.shift - pull.shift) + (push.log - pull.log)
    slope = torch.sigmoid(z)
    return Sides(softplus(z), -slope, slope)


class Weighed(NamedTuple):
    """Rows of a loss of two log-sum-exps; pull and push `[R]` multiply a softmax and its logit's derivative."""

    folded: Folded
    pull: Tensor
    push: Tensor


class Sided(NamedTuple):
    """A loss of two log-sum-exps in pieces, for tiles that hold no whole row. `pulls`: positives, or negatives."""

    logits: Callable[[Tensor, Scalars, Options, bool, Tensor], Tensor | float]  # writes them; returns the derivative
    ends: Callable[[Options, float | None, bool], tuple[float, float] | None]  # of logits of cosines, with their scale
    rows: Callable[[LogSum, LogSum, Tensor, Part, Scalars, Options], Weighed]  # of the numbers of positives, too


def _weighed(sides: Sides, part: Part, count: Tensor | None) -> Weighed:
    pull, push = (weighted(side, part) for side in (sides.pull, sides.push))
    return Weighed(Folded(weighted(sides.loss, part), count), pull, push)


@torch.no_grad()
def multi_similarity(values: Tensor, part: Part, scalars: Scalars, options: Options, gradient: bool) -> Folded:
    """`log(1 + sum_pos exp(-alpha (v - base))) / alpha + log(1 + sum_neg exp(beta (v - base))) / beta`."""
    alpha, beta, base = options
    positive, negative = sets_of(values, part)
    pulled = values.sub_(base) * -alpha
    pushed = values.mul_(beta)
    sides = multi_similarity_row(softmax_(pulled, positive), softmax_(pushed, negative), scalars, options)
    if gradient:
        pushed.mul_((beta * sides.push)[:, None]).addcmul_(pulled, (alpha * sides.pull)[:, None], value=-1)
        weigh_(pushed, part)
    return Folded(weighted(sides.loss, part), None)


def multi_similarity_logits(
    values: Tensor, scalars: Scalars, options: Options, pulls: bool, out: Tensor
) -> Tensor | float:
    alpha, beta, base = options
    slope = -alpha if pulls else beta
    torch.sub(values, base, out=out).mul_(slope)
    return slope


def multi_similarity_ends(options: Options, scale: float | None, pulls: bool) -> tuple[float, float]:
    alpha, beta, base = options
    return (-alpha * (1 - base), alpha * (1 + base)) if pulls else (-beta * (1 + base), beta * (1 - base))


def multi_similarity_rows(
    pull: LogSum, push: LogSum, number: Tensor, part: Part, scalars: Scalars, options: Options
) -> Weighed:
    return _weighed(multi_similarity_row(pull, push, scalars, options), part, None)


def multi_similarity_formula(
    values: Tensor, part: Part, scalars: Scalars, options: Options
) -> tuple[Tensor, Tensor | None]:
    alpha, beta, base = options
    positive, negative = relations(values, part)
    pull = softplus(logsumexp(-alpha * (values - base), positive)) / alpha
    push = softplus(logsumexp(beta * (values - base), negative)) / beta
    return left_in(pull + push, part), None


@torch.no_grad()
def proxy_anchor(values: Tensor, part: Part, scalars: Scalars, options: Options, gradient: bool) -> Folded:
    """`share log(1 + sum_pos exp(-alpha (v - margin))) + log(1 + sum_neg exp(alpha (v + margin)))`."""
    margin, alpha = options
    positive, negative = sets_of(values, part)
    pulled = (values - margin).mul_(-alpha)
    pushed = values.add_(margin).mul_(alpha)
    sides = proxy_anchor_row(softmax_(pulled, positive), softmax_(pushed, negative), scalars, options)
    if gradient:
        pushed.mul_(sides.push[:, None]).addcmul_(pulled, sides.pull[:, None], value=-1)
        weigh_(pushed, part, alpha)
    return Folded(weighted(sides.loss, part), None)


def proxy_anchor_formula(
    values: Tensor, part: Part, scalars: Scalars, options: Options
) -> tuple[Tensor, Tensor | None]:
    _, share = scalars
    margin, alpha = options
    positive, negative = relations(values, part)
    pull = softplus(logsumexp(-alpha * (values - margin), positive))
    push = softplus(logsumexp(alpha * (values + margin), negative))
    return left_in(share * pull + push, part), None


@torch.no_grad()
def circle(values: Tensor, part: Part, scalars: Scalars, options: Options, gradient: bool) -> Folded:
    """`log(1 + sum_pos exp(-gamma a_p (v_p - 1 + m)) sum_neg exp(gamma a_n (v_n - m)))`.

    `a_p = max(0, 1 + m - v_p)` and `a_n = max(0, v_n + m)` are constants to the gradient. A row without a positive or
    without a negative has an empty sum: its loss is 0. The count is 1 for rows with a loss above 0.
    """
    m, gamma = options
    positive, negative = sets_of(values, part)
    attract = (1 + m - values).clamp_min_(0).mul_(gamma)
    repel = (values + m).clamp_min_(0).mul_(gamma)
    pulled = (1 - m - values).mul_(attract)
    pushed = values.sub_(m).mul_(repel)
    sides = circle_row(softmax_(pulled, positive), softmax_(pushed, negative), scalars, options)
    loss = weighted(sides.loss, part)
    if gradient:
        pushed.mul_(repel).addcmul_(pulled, attract, value=-1)
        weigh_(pushed, part, sides.push)
    return Folded(loss, counted(loss > 0, values, part))


def circle_logits(values: Tensor, scalars: Scalars, options: Options, pulls: bool, out: Tensor) -> Tensor | float:
    m, gamma = options
    if pulls:
        slope = (values - (1 + m)).clamp_max_(0).mul_(gamma)
        torch.sub(values, 1 - m, out=out).mul_(slope)
    else:
        slope = (values + m).clamp_min_(0).mul_(gamma)
        torch.sub(values, m, out=out).mul_(slope)
    return slope


def circle_ends(options: Options, scale: float | None, pulls: bool) -> tuple[float, float]:
    """The least is at a parabola's vertex; the largest is at one of the cosines -1 and 1."""
    m, gamma = options
    ends = [max(0.0, 1 + m - v) * (1 - m - v) if pulls else max(0.0, v + m) * (v - m) for v in (-1.0, 1.0)]
    return -gamma * m * m, gamma * max(0.0, *ends)


def circle_rows(pull: LogSum, push: LogSum, number: Tensor, part: Part, scalars: Scalars, options: Options) -> Weighed:
    found = _weighed(circle_row(pull, push, scalars, options), part, None)
    loss = found.folded.loss
    return found._replace(folded=Folded(loss, counted(loss > 0, loss, part)))


def circle_formula(values: Tensor, part: Part, scalars: Scalars, options: Options) -> tuple[Tensor, Tensor | None]:
    m, gamma = options
    positive, negative = relations(values, part)
    constant = values.detach()
    pull = logsumexp(-gamma * torch.relu(1 + m - constant) * (values - (1 - m)), positive)
    push = logsumexp(gamma * torch.relu(constant + m) * (values - m), negative)
    both = positive.any(dim=1) & negative.any(dim=1)
    loss = left_in(softplus(torch.where(both, pull + push, FAR)), part)
    return loss, counted(loss > 0, values, part)


@torch.no_grad()
def sup_con_in(values: Tensor, part: Part, scalars: Scalars, options: Options, gradient: bool) -> Folded:
    """Khosla et al.'s L_in: `-log(mean_pos exp(z) / sum_{j != own} exp(z))`, `z = scale values`; 0 without positives.

    Computed as `log(1 + sum_neg exp(z) / sum_pos exp(z)) + log |P|`, in which nothing cancels for a well-fitted row.
    """
    (scale,) = scalars
    positive, negative = sets_of(values, part)
    pulled = values * scale
    pushed = pulled.clone()
    sides = sup_con_in_row(softmax_(pulled, positive), softmax_(pushed, negative), scalars, options)
    number = positive.sum(dim=1)
    part = part._replace(weight=part.weight.masked_fill(number == 0, 0))
    loss = weighted(sides.loss + number.to(sides.loss.dtype).log_(), part)
    if not gradient:
        return Folded(loss, None)
    dz = weigh_(pushed.sub_(pulled), part, sides.push)
    torch.mul(dz, values, out=pulled).masked_fill_((part.weight == 0)[:, None], 0)
    torch.mul(dz, scale, out=values)
    return Folded(loss, None, (added(pulled),))


def sup_con_in_logits(values: Tensor, scalars: Scalars, options: Options, pulls: bool, out: Tensor) -> Tensor | float:
    torch.mul(values, scalars[0], out=out)
    return scalars[0]


def sup_con_in_ends(options: Options, scale: float | None, pulls: bool) -> tuple[float, float] | None:
    return None if scale is None else (-scale, scale)


def sup_con_in_rows(
    pull: LogSum, push: LogSum, number: Tensor, part: Part, scalars: Scalars, options: Options
) -> Weighed:
    part = part._replace(weight=part.weight.masked_fill(number == 0, 0))
    sides = sup_con_in_row(pull, push, scalars, options)
    return _weighed(sides._replace(loss=sides.loss + number.to(sides.loss.dtype).log_()), part, None)


def sup_con_in_formula(values: Tensor, part: Part, scalars: Scalars, options: Options) -> tuple[Tensor, Tensor | None]:
    z = scalars[0] * values
    positive, negative = relations(values, part)
    number = positive.sum(dim=1)
    loss = logsumexp(z, positive | negative) - logsumexp(z, positive) + number.clamp_min(1).to(z.dtype).log()
    return left_in(torch.where(number > 0, loss, 0), part), None


# Those that a tile can be a part of, for one matrix against itself.
SIDED: dict[str, Sided] = {
    "multi_similarity": Sided(multi_similarity_logits, multi_similarity_ends, multi_similarity_rows),
    "circle": Sided(circle_logits, circle_ends, circle_rows),
    "sup_con_in": Sided(sup_con_in_logits, sup_con_in_ends, sup_con_in_rows),
}
