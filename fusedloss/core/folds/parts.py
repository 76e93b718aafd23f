"""What folds are handed and return, and the steps that several of them take."""

# maths.md: Folds
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import FLUSH, wide_dtype

TILE = 1024  # columns at a time in steps that need a wider dtype than the values'
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


class LogSum(NamedTuple):
    """A row's log-sum-exp, `shift + log`, in two parts because the difference of two rows' shifts is nearly exact."""

    shift: Tensor  # [R]
    log: Tensor  # -inf without columns

    @property
    def value(self) -> Tensor:
        return self.shift + self.log


Scalars = tuple[Tensor, ...]
Options = tuple[float, ...]
Formula = Callable[[Tensor, Part, Scalars, Options], tuple[Tensor, Tensor | None]]
Fold = Callable[[Tensor, Part, Scalars, Options, bool], Folded]


def put_(x: Tensor, column: Tensor | None, fill: float | bool) -> Tensor:
    """Sets `x[i, column[i]] = fill` in place, except where `column[i]` is -1."""
    if column is not None:
        index = column.clamp_min(0)[:, None]
        x.scatter_(1, index, torch.where(column[:, None] < 0, x.gather(1, index), fill))
    return x


def sets_of(values: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """Returns masks [R, N] of each row's positives and negatives."""
    if part.row_labels is not None and part.key_labels is not None:
        positive = part.row_labels[:, None] == part.key_labels
    else:
        assert part.target is not None, "either labels or a target"
        positive = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
        positive.scatter_(1, part.target[:, None], True)
    negative = put_(~positive, part.own, False)
    return put_(positive, part.own, False), negative


def weighted(loss: Tensor, part: Part) -> Tensor:
    return (part.weight * loss).to(loss.dtype).masked_fill_(part.weight == 0, 0)


def weigh_(slope: Tensor, part: Part, factor: Tensor | float = 1.0) -> Tensor:
    """Multiplies `slope` [R, N] by `weight * factor` [R] in place; a row of weight 0 becomes 0, even from NaN."""
    return slope.mul_((part.weight * factor)[:, None]).masked_fill_((part.weight == 0)[:, None], 0)


def counted(count: Tensor, values: Tensor, part: Part) -> Tensor:
    return count.to(values.dtype).masked_fill_(part.weight == 0, 0)


def added(terms: Tensor) -> Tensor:
    """Returns the sum of terms [R, N] that cancel. It sums rows in their dtype, and the rows' sums in fp64."""
    return terms.sum(dim=1).sum(dtype=wide_of(terms))


def shift_of(x: Tensor) -> Tensor:
    shift = x.amax(dim=1, keepdim=True)
    return shift.masked_fill_(shift == -torch.inf, 0)


def softmax_(x: Tensor, mask: Tensor) -> LogSum:
    """Overwrites `x` with each row's softmax over the columns in `mask`, 0 elsewhere; returns the log-sum-exp.

    The shift of a row without columns is 0.
    """
    shift = shift_of(x.masked_fill_(~mask, -torch.inf))
    total = torch.threshold_(x.sub_(shift).exp_(), FLUSH, 0.0).sum(dim=1, keepdim=True)
    x.div_(total.masked_fill(total == 0, 1))
    return LogSum(shift[:, 0], total.log_()[:, 0])


def probabilities_(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the softmax of each row and its normaliser [R, 1]; subtracts each row's maximum from `x` in place."""
    p = x.sub_(shift_of(x)).exp()
    total = p.sum(dim=1, keepdim=True)
    total.masked_fill_(total == 0, 1)
    return torch.threshold_(p.div_(total), FLUSH, 0.0), total


def wide_of(values: Tensor) -> torch.dtype:
    return wide_dtype(values.device, values.dtype)


def is_column(values: Tensor, column: Tensor | None) -> Tensor:
    if column is None:
        return torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    return torch.arange(values.shape[1], device=values.device) == column[:, None]


def relations(values: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    own = is_column(values, part.own)
    if part.row_labels is not None and part.key_labels is not None:
        related = part.row_labels[:, None] == part.key_labels[None, :]
    else:
        related = is_column(values, part.target)
    return related & ~own, ~related & ~own


def logsumexp(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, FAR).logsumexp(dim=1)


def left_in(loss: Tensor, part: Part) -> Tensor:
    return torch.where(part.weight == 0, 0, part.weight * loss)
