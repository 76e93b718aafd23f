"""Losses that need more of a row than a softmax over its columns, in plain torch. A fold computes a chunk of rows.

A fold takes `values` [R, N], the similarities or distances of R rows to all N columns. It returns the rows' losses and
overwrites `values` with `weight_i dloss_i/dvalues_ij`. Each fold has a formula: the same loss, differentiated by
autograd, without a bound on its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .numerics import FLUSH, FOLD_COPIES, slices, wide_dtype
from .softmax import softplus

# maths.md: Folds
TILE = 1024  # columns at a time in steps that need a wider dtype than the values'
FEW = 64  # columns for each positive of a row, from which positives are compared one by one
FAR = -1e30  # the logit of a column that a formula leaves out; autograd would make NaN of -inf


class Part(NamedTuple):
    """What a fold knows about its rows. A row's positives are the columns of its label, or without labels `target`."""

    rows: Tensor  # [R] int64, the global number of each row
    weight: Tensor  # [R], multiplies each row's loss; 0: the row is left out (loss, count and gradient are 0)
    target: Tensor | None = None  # [R] int64, column of the row's positive
    row_labels: Tensor | None = None  # [R] int64
    key_labels: Tensor | None = None  # [N] int64
    own: Tensor | None = None  # [R] int64, the row's own column, neither positive nor negative (-1: none)
    teacher: Tensor | None = None  # [R, N], a teacher's logits, or its similarities if there is a `teacher_scale`
    teacher_scale: Tensor | None = None  # 0-dim
    admitted: Tensor | None = None  # [R, N] bool, the columns that may compete; None: all

    def of_rows(self, rows: slice) -> Part:
        """Returns the part of some rows."""
        kept = ("key_labels", "teacher_scale")
        return Part(*(x if x is None or name in kept else x[rows] for name, x in self._asdict().items()))


class Folded(NamedTuple):
    loss: Tensor  # [R], weighted
    # [R] in the values' dtype; the sum of losses is divided by the sum of counts. None: the loss has no counts.
    count: Tensor | None  # type: ignore[assignment]  # hides tuple.count, which has no caller
    scalars: tuple[Tensor, ...] = ()  # 0-dim, the gradient by each of the fold's scalars
    beside: Tensor | None = None  # [R, K], by the columns beside the blocks, if the values have none of theirs


Scalars = tuple[Tensor, ...]
Options = tuple[float, ...]
Formula = Callable[[Tensor, Part, Scalars, Options], tuple[Tensor, Tensor | None]]
Fold = Callable[[Tensor, Part, Scalars, Options, bool], Folded]


# What folds share -----------------------------------------------------------------------------------------------------


def _put_(x: Tensor, column: Tensor | None, fill: float | bool) -> Tensor:
    """Sets `x[i, column[i]] = fill` in place, except where `column[i]` is -1."""
    if column is not None:
        index = column.clamp_min(0)[:, None]
        x.scatter_(1, index, torch.where(column[:, None] < 0, x.gather(1, index), fill))
    return x


def _sets(values: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """Returns masks [R, N] of each row's positives and negatives."""
    if part.row_labels is not None and part.key_labels is not None:
        positive = part.row_labels[:, None] == part.key_labels
    else:
        assert part.target is not None, "either labels or a target"
        positive = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
        positive.scatter_(1, part.target[:, None], True)
    negative = _put_(~positive, part.own, False)
    return _put_(positive, part.own, False), negative


def _weighted(loss: Tensor, part: Part) -> Tensor:
    return (part.weight * loss).to(loss.dtype).masked_fill_(part.weight == 0, 0)


def _weigh_(slope: Tensor, part: Part, factor: Tensor | float = 1.0) -> Tensor:
    """Multiplies `slope` [R, N] by `weight * factor` [R] in place; a row of weight 0 becomes 0, even from NaN."""
    return slope.mul_((part.weight * factor)[:, None]).masked_fill_((part.weight == 0)[:, None], 0)


def _counted(count: Tensor, values: Tensor, part: Part) -> Tensor:
    return count.to(values.dtype).masked_fill_(part.weight == 0, 0)


def _added(terms: Tensor) -> Tensor:
    """Returns the sum of terms [R, N] that cancel. It sums rows in their dtype, and the rows' sums in fp64."""
    return terms.sum(dim=1).sum(dtype=_wide(terms))


def _shift(x: Tensor) -> Tensor:
    shift = x.amax(dim=1, keepdim=True)
    return shift.masked_fill_(shift == -torch.inf, 0)


def _softmax_(x: Tensor, mask: Tensor) -> LogSum:
    """Overwrites `x` with each row's softmax over the columns in `mask`, 0 elsewhere; returns the log-sum-exp.

    The shift of a row without columns is 0.
    """
    shift = _shift(x.masked_fill_(~mask, -torch.inf))
    total = torch.threshold_(x.sub_(shift).exp_(), FLUSH, 0.0).sum(dim=1, keepdim=True)
    x.div_(total.masked_fill(total == 0, 1))
    return LogSum(shift[:, 0], total.log_()[:, 0])


def _probabilities_(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the softmax of each row and its normaliser [R, 1]; subtracts each row's maximum from `x` in place."""
    p = x.sub_(_shift(x)).exp()
    total = p.sum(dim=1, keepdim=True)
    total.masked_fill_(total == 0, 1)
    return torch.threshold_(p.div_(total), FLUSH, 0.0), total


def _wide(values: Tensor) -> torch.dtype:
    return wide_dtype(values.device, values.dtype)


# What formulas share --------------------------------------------------------------------------------------------------


def _is_column(values: Tensor, column: Tensor | None) -> Tensor:
    if column is None:
        return torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    return torch.arange(values.shape[1], device=values.device) == column[:, None]


def _relations(values: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    own = _is_column(values, part.own)
    if part.row_labels is not None and part.key_labels is not None:
        related = part.row_labels[:, None] == part.key_labels[None, :]
    else:
        related = _is_column(values, part.target)
    return related & ~own, ~related & ~own


def _logsumexp(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, FAR).logsumexp(dim=1)


def _left_in(loss: Tensor, part: Part) -> Tensor:
    return torch.where(part.weight == 0, 0, part.weight * loss)


# Sigmoid --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sigmoid(values: Tensor, part: Part, scalars: Scalars, options: Options, gradient: bool) -> Folded:
    """SigLIP: `sum_j log(1 + exp(-y_ij z_ij))`, `z = scale values + bias`, y = 1 for positives and -1 for negatives."""
    scale, bias = scalars
    positive, _ = _sets(values, part)
    z = (values * scale).add_(bias)
    other = z.neg()
    torch.where(positive, other, z, out=z)
    _put_(z, part.own, -torch.inf)
    torch.logaddexp(z, z.new_zeros(()), out=other)
    loss = _weighted(other.sum(dim=1), part)
    if not gradient:
        return Folded(loss, None)
    torch.sigmoid(z, out=z)
    torch.neg(z, out=other)
    torch.where(positive, other, z, out=z)
    _weigh_(z, part)
    torch.mul(z, values, out=other).masked_fill_((part.weight == 0)[:, None], 0)
    torch.mul(z, scale, out=values)
    return Folded(loss, None, (_added(other), _added(z)))


def sigmoid_formula(values: Tensor, part: Part, scalars: Scalars, options: Options) -> tuple[Tensor, Tensor | None]:
    scale, bias = scalars
    positive, negative = _relations(values, part)
    sign = positive.to(values.dtype) - negative.to(values.dtype)
    terms = softplus(-sign * (scale * values + bias))
    return _left_in(torch.where(positive | negative, terms, 0).sum(dim=1), part), None


# Margin ranking -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def margin_ranking(values: Tensor, part: Part, scalars: Scalars, options: Options, gradient: bool) -> Folded:
    """`sum_{j != t} max(0, margin - v_it + v_ij)`; `options` are the margin and whether to divide by the negatives."""
    margin, mean = options
    target = part.target
    assert target is not None, "margin_ranking needs a target"
    index = target[:, None]
    values.sub_(values.gather(1, index)).add_(margin).clamp_min_(0)
    values.scatter_(1, index, 0)
    _put_(values, part.own, 0.0)
    share = torch.ones_like(part.weight)
    if mean:
        own = torch.zeros_like(target) if part.own is None else (part.own >= 0) & (part.own != target)
        share /= (values.shape[1] - 1 - own.to(share.dtype)).clamp_min(1)
    loss = _weighted(values.sum(dim=1).mul_(share), part)
    if gradient:
        values.sign_()
        values.scatter_(1, index, -values.sum(dim=1, keepdim=True))
        _weigh_(values, part, share)
    return Folded(loss, None)


def margin_ranking_formula(
    values: Tensor, part: Part, scalars: Scalars, options: Options
) -> tuple[Tensor, Tensor | None]:
    margin, mean = options
    assert part.target is not None
    negative = ~_is_column(values, part.target) & ~_is_column(values, part.own)
    hinge = torch.relu(margin - values.gather(1, part.target[:, None]) + values)
    loss = (hinge * negative).sum(dim=1)
    return _left_in(loss / negative.sum(dim=1).clamp_min(1) if mean else loss, part), None


# Hinges of pairs ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def pair_hinge(values: Tensor, part: Part, scalars: Scalars, options: Options, gradient: bool) -> Folded:
    """`sum max(0, sign (v - margin))` over a row's positives or negatives, and the number of terms above 0.

    options: margin, sign, and whether the sum is over the positives.
    """
    margin, sign, pulls = options
    hinge = values.sub_(margin).mul_(sign).clamp_min_(0)
    hinge.masked_fill_(~_sets(values, part)[0 if pulls else 1], 0)
    loss, count = hinge.sum(dim=1), (hinge > 0).sum(dim=1)
    if gradient:
        _weigh_(values.sign_(), part, sign)
    return Folded(_weighted(loss, part), _counted(count, values, part))


def pair_hinge_formula(values: Tensor, part: Part, scalars: Scalars, options: Options) -> tuple[Tensor, Tensor | None]:
    margin, sign, pulls = options
    hinge = torch.relu(sign * (values - margin)) * _relations(values, part)[0 if pulls else 1]
    return _left_in(hinge.sum(dim=1), part), _counted((hinge > 0).sum(dim=1), values, part)


# Two log-sum-exps -----------------------------------------------------------------------------------------------------


class LogSum(NamedTuple):
    """A row's log-sum-exp, `shift + log`, in two parts because the difference of two rows' shifts is nearly exact."""

    shift: Tensor  # [R]
    log: Tensor  # -inf without columns

    @property
    def value(self) -> Tensor:
        return self.shift + self.log


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
    pull, push = (_weighted(side, part) for side in (sides.pull, sides.push))
    return Weighed(Folded(_weighted(sides.loss, part), count), pull, push)


# Multi-similarity -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def multi_similarity(values: Tensor, part: Part, scalars: Scalars, options: Options, gradient: bool) -> Folded:
    """`log(1 + sum_pos exp(-alpha (v - base))) / alpha + log(1 + sum_neg exp(beta (v - base))) / beta`."""
    alpha, beta, base = options
    positive, negative = _sets(values, part)
    pulled = values.sub_(base) * -alpha
    pushed = values.mul_(beta)
    sides = multi_similarity_row(_softmax_(pulled, positive), _softmax_(pushed, negative), scalars, options)
    if gradient:
        pushed.mul_((beta * sides.push)[:, None]).addcmul_(pulled, (alpha * sides.pull)[:, None], value=-1)
        _weigh_(pushed, part)
    return Folded(_weighted(sides.loss, part), None)


def _multi_similarity_logits(
    values: Tensor, scalars: Scalars, options: Options, pulls: bool, out: Tensor
) -> Tensor | float:
    alpha, beta, base = options
    slope = -alpha if pulls else beta
    torch.sub(values, base, out=out).mul_(slope)
    return slope


def _multi_similarity_ends(options: Options, scale: float | None, pulls: bool) -> tuple[float, float]:
    alpha, beta, base = options
    return (-alpha * (1 - base), alpha * (1 + base)) if pulls else (-beta * (1 + base), beta * (1 - base))


def _multi_similarity_rows(
    pull: LogSum, push: LogSum, number: Tensor, part: Part, scalars: Scalars, options: Options
) -> Weighed:
    return _weighed(multi_similarity_row(pull, push, scalars, options), part, None)


def multi_similarity_formula(
    values: Tensor, part: Part, scalars: Scalars, options: Options
) -> tuple[Tensor, Tensor | None]:
    alpha, beta, base = options
    positive, negative = _relations(values, part)
    pull = softplus(_logsumexp(-alpha * (values - base), positive)) / alpha
    push = softplus(_logsumexp(beta * (values - base), negative)) / beta
    return _left_in(pull + push, part), None


@torch.no_grad()
def proxy_anchor(values: Tensor, part: Part, scalars: Scalars, options: Options, gradient: bool) -> Folded:
    """`share log(1 + sum_pos exp(-alpha (v - margin))) + log(1 + sum_neg exp(alpha (v + margin)))`."""
    margin, alpha = options
    positive, negative = _sets(values, part)
    pulled = (values - margin).mul_(-alpha)
    pushed = values.add_(margin).mul_(alpha)
    sides = proxy_anchor_row(_softmax_(pulled, positive), _softmax_(pushed, negative), scalars, options)
    if gradient:
        pushed.mul_(sides.push[:, None]).addcmul_(pulled, sides.pull[:, None], value=-1)
        _weigh_(pushed, part, alpha)
    return Folded(_weighted(sides.loss, part), None)


def proxy_anchor_formula(
    values: Tensor, part: Part, scalars: Scalars, options: Options
) -> tuple[Tensor, Tensor | None]:
    _, share = scalars
    margin, alpha = options
    positive, negative = _relations(values, part)
    pull = softplus(_logsumexp(-alpha * (values - margin), positive))
    push = softplus(_logsumexp(alpha * (values + margin), negative))
    return _left_in(share * pull + push, part), None


# Circle ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def circle(values: Tensor, part: Part, scalars: Scalars, options: Options, gradient: bool) -> Folded:
    """`log(1 + sum_pos exp(-gamma a_p (v_p - 1 + m)) sum_neg exp(gamma a_n (v_n - m)))`.

    `a_p = max(0, 1 + m - v_p)` and `a_n = max(0, v_n + m)` are constants to the gradient. A row without a positive or
    without a negative has an empty sum: its loss is 0. The count is 1 for rows with a loss above 0.
    """
    m, gamma = options
    positive, negative = _sets(values, part)
    attract = (1 + m - values).clamp_min_(0).mul_(gamma)
    repel = (values + m).clamp_min_(0).mul_(gamma)
    pulled = (1 - m - values).mul_(attract)
    pushed = values.sub_(m).mul_(repel)
    sides = circle_row(_softmax_(pulled, positive), _softmax_(pushed, negative), scalars, options)
    loss = _weighted(sides.loss, part)
    if gradient:
        pushed.mul_(repel).addcmul_(pulled, attract, value=-1)
        _weigh_(pushed, part, sides.push)
    return Folded(loss, _counted(loss > 0, values, part))


def _circle_logits(values: Tensor, scalars: Scalars, options: Options, pulls: bool, out: Tensor) -> Tensor | float:
    m, gamma = options
    if pulls:
        slope = (values - (1 + m)).clamp_max_(0).mul_(gamma)
        torch.sub(values, 1 - m, out=out).mul_(slope)
    else:
        slope = (values + m).clamp_min_(0).mul_(gamma)
        torch.sub(values, m, out=out).mul_(slope)
    return slope


def _circle_ends(options: Options, scale: float | None, pulls: bool) -> tuple[float, float]:
    """The least is at a parabola's vertex; the largest is at one of the cosines -1 and 1."""
    m, gamma = options
    ends = [max(0.0, 1 + m - v) * (1 - m - v) if pulls else max(0.0, v + m) * (v - m) for v in (-1.0, 1.0)]
    return -gamma * m * m, gamma * max(0.0, *ends)


def _circle_rows(pull: LogSum, push: LogSum, number: Tensor, part: Part, scalars: Scalars, options: Options) -> Weighed:
    found = _weighed(circle_row(pull, push, scalars, options), part, None)
    loss = found.folded.loss
    return found._replace(folded=Folded(loss, _counted(loss > 0, loss, part)))


def circle_formula(values: Tensor, part: Part, scalars: Scalars, options: Options) -> tuple[Tensor, Tensor | None]:
    m, gamma = options
    positive, negative = _relations(values, part)
    constant = values.detach()
    pull = _logsumexp(-gamma * torch.relu(1 + m - constant) * (values - (1 - m)), positive)
    push = _logsumexp(gamma * torch.relu(constant + m) * (values - m), negative)
    both = positive.any(dim=1) & negative.any(dim=1)
    loss = _left_in(softplus(torch.where(both, pull + push, FAR)), part)
    return loss, _counted(loss > 0, values, part)


# Supervised contrastive, the mean inside the logarithm ----------------------------------------------------------------


@torch.no_grad()
def sup_con_in(values: Tensor, part: Part, scalars: Scalars, options: Options, gradient: bool) -> Folded:
    """Khosla et al.'s L_in: `-log(mean_pos exp(z) / sum_{j != own} exp(z))`, `z = scale values`; 0 without positives.

    Computed as `log(1 + sum_neg exp(z) / sum_pos exp(z)) + log |P|`, in which nothing cancels for a well-fitted row.
    """
    (scale,) = scalars
    positive, negative = _sets(values, part)
    pulled = values * scale
    pushed = pulled.clone()
    sides = sup_con_in_row(_softmax_(pulled, positive), _softmax_(pushed, negative), scalars, options)
    number = positive.sum(dim=1)
    part = part._replace(weight=part.weight.masked_fill(number == 0, 0))
    loss = _weighted(sides.loss + number.to(sides.loss.dtype).log_(), part)
    if not gradient:
        return Folded(loss, None)
    dz = _weigh_(pushed.sub_(pulled), part, sides.push)
    torch.mul(dz, values, out=pulled).masked_fill_((part.weight == 0)[:, None], 0)
    torch.mul(dz, scale, out=values)
    return Folded(loss, None, (_added(pulled),))


def _sup_con_in_logits(values: Tensor, scalars: Scalars, options: Options, pulls: bool, out: Tensor) -> Tensor | float:
    torch.mul(values, scalars[0], out=out)
    return scalars[0]


def _sup_con_in_ends(options: Options, scale: float | None, pulls: bool) -> tuple[float, float] | None:
    return None if scale is None else (-scale, scale)


def _sup_con_in_rows(
    pull: LogSum, push: LogSum, number: Tensor, part: Part, scalars: Scalars, options: Options
) -> Weighed:
    part = part._replace(weight=part.weight.masked_fill(number == 0, 0))
    sides = sup_con_in_row(pull, push, scalars, options)
    return _weighed(sides._replace(loss=sides.loss + number.to(sides.loss.dtype).log_()), part, None)


def sup_con_in_formula(values: Tensor, part: Part, scalars: Scalars, options: Options) -> tuple[Tensor, Tensor | None]:
    z = scalars[0] * values
    positive, negative = _relations(values, part)
    number = positive.sum(dim=1)
    loss = _logsumexp(z, positive | negative) - _logsumexp(z, positive) + number.clamp_min(1).to(z.dtype).log()
    return _left_in(torch.where(number > 0, loss, 0), part), None


# Triplets -------------------------------------------------------------------------------------------------------------


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
    positive, negative = _sets(values, part)
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
    wide = _wide(values)  # the losses are small differences of distances
    loss = margin * count.to(wide)
    for tile in slices(values.shape[1], TILE):
        loss += torch.linalg.vecdot(values[:, tile].to(wide), slope[:, tile].to(wide))
    loss = _weighted(loss.to(values.dtype), part)
    if gradient:
        _weigh_(values.copy_(slope), part)
    return Folded(loss, _counted(count, values, part))


def batch_all_formula(values: Tensor, part: Part, scalars: Scalars, options: Options) -> tuple[Tensor, Tensor | None]:
    (margin,) = options
    positive, negative = _relations(values, part)
    hinge = torch.relu(values[:, :, None] - values[:, None, :] + margin)
    hinge = hinge * (positive[:, :, None] & negative[:, None, :])
    count = (hinge > 1e-16).sum(dim=(1, 2)).to(values.dtype)
    return _left_in(hinge.sum(dim=(1, 2)), part), torch.where(part.weight == 0, 0, count)


@torch.no_grad()
def semi_hard(values: Tensor, part: Part, scalars: Scalars, options: Options, gradient: bool) -> Folded:
    """`sum_p max(0, v_p - v_n(p) + margin)` over distances, n(p) the nearest negative farther than p; counts the pairs.

    If no negative is farther, n(p) is the farthest negative. If the row has no negative, n(p) is the row's nearest
    column, its own included, as in sentence-transformers (and tensorflow-addons before it).
    """
    (margin,) = options
    positive, negative = _sets(values, part)
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
        _weigh_(values.copy_(slope), part)
    return Folded(_weighted(loss, part), _counted(positive.sum(dim=1), values, part))


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
        _weigh_(values.copy_(slope), part)
    count = torch.zeros_like(part.rows).index_add_(0, row, torch.ones_like(row))
    return Folded(_weighted(loss, part), _counted(count, values, part))


def semi_hard_formula(values: Tensor, part: Part, scalars: Scalars, options: Options) -> tuple[Tensor, Tensor | None]:
    (margin,) = options
    if values.shape[1] == 0:  # min() raises without columns
        loss = _left_in(values.sum(dim=1), part)
        return loss, torch.zeros_like(loss)
    positive, negative = _relations(values, part)
    farther = negative[:, None, :] & (values[:, None, :] > values[:, :, None])  # [row, positive, negative]
    semi_hard = torch.where(farther, values[:, None, :], torch.inf).min(dim=2).values
    farthest = torch.where(negative, values, -torch.inf).max(dim=1, keepdim=True).values
    fallback = torch.where(negative.any(dim=1, keepdim=True), farthest, values.min(dim=1, keepdim=True).values)
    hinge = torch.relu(values - torch.where(farther.any(dim=2), semi_hard, fallback) + margin)
    count = positive.sum(dim=1).to(values.dtype)
    return _left_in((hinge * positive).sum(dim=1), part), torch.where(part.weight == 0, 0, count)


# Distillation ---------------------------------------------------------------------------------------------------------

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
        loss, total = torch.empty_like(part.weight, dtype=values.dtype), values.new_zeros((), dtype=_wide(values))
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
        admitted = _put_(every, part.own, False)
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
    (p, total_p), (q, total_q) = _probabilities_(teacher), _probabilities_(z)
    logs = [total[:, 0].to(_wide(values)).log_() for total in (total_p, total_q)]
    loss, dz = divergence(p, q, teacher, z, *logs)
    loss = _weighted(loss.to(values.dtype), part)
    if gradient:
        terms = _weighted(torch.linalg.vecdot(dz, values), part)
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
        own = _is_column(values, part.own)
        teacher = part.teacher.to(values.dtype)
        if part.teacher_scale is not None:
            teacher = teacher * part.teacher_scale
        if part.admitted is not None:
            own = own | ~part.admitted
            values = torch.where(part.admitted, values, 0)
        p = teacher.masked_fill(own, FAR).softmax(dim=1)
        log_q = (scalars[0] * values).masked_fill(own, FAR).log_softmax(dim=1)
        loss = torch.where(own.all(dim=1), 0, divergence(p, log_q).sum(dim=1))
        return _left_in(loss, part), None

    return formula


distill_formula = _formula_of(lambda p, log_q: torch.xlogy(p, p) - p * log_q)
distill_ce_formula = _formula_of(lambda p, log_q: -p * log_q)
distill_mse_formula = _formula_of(lambda p, log_q: (log_q.exp() - p).square())


# How a fold reads a row: one similarity at a time; two log-sum-exps and then similarities; the whole row at once.
SUM, SIDES, TEACHER, ROW = (
    "loss; count, or gradients by the scalars",
    "log-sum-exps of positives and of negatives",
    "log-sum-exps of student and teacher; loss, gradient by the scale",
    "the whole row",
)


class Forms(NamedTuple):
    """A fold as the registry (`epilogues.py`) holds it."""

    torch: Fold
    formula: Formula
    sums: str  # ROW: the fold needs the whole row; the others a kernel can compute in its tile
    copies: int = FOLD_COPIES  # matrices of a chunk that it needs at most, its values included


FOLDS: dict[str, Forms] = {
    "sigmoid": Forms(sigmoid, sigmoid_formula, SUM),
    "margin_ranking": Forms(margin_ranking, margin_ranking_formula, SUM),
    "pair_hinge": Forms(pair_hinge, pair_hinge_formula, SUM),
    "multi_similarity": Forms(multi_similarity, multi_similarity_formula, SIDES),
    "proxy_anchor": Forms(proxy_anchor, proxy_anchor_formula, SIDES),
    "circle": Forms(circle, circle_formula, SIDES),
    "sup_con_in": Forms(sup_con_in, sup_con_in_formula, SIDES),
    "batch_all": Forms(batch_all, batch_all_formula, ROW),
    "semi_hard": Forms(semi_hard, semi_hard_formula, ROW),
    "distill": Forms(distill, distill_formula, TEACHER, DISTILL_COPIES),
    "distill_ce": Forms(distill_ce, distill_ce_formula, TEACHER, DISTILL_COPIES),
    "distill_mse": Forms(distill_mse, distill_mse_formula, TEACHER, DISTILL_COPIES),
}


# Those that a tile can be a part of, for one matrix against itself.
SIDED: dict[str, Sided] = {
    "multi_similarity": Sided(_multi_similarity_logits, _multi_similarity_ends, _multi_similarity_rows),
    "circle": Sided(_circle_logits, _circle_ends, _circle_rows),
    "sup_con_in": Sided(_sup_con_in_logits, _sup_con_in_ends, _sup_con_in_rows),
}
