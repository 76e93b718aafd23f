"""Shared by the losses whose rows are not one softmax: the fold's problem, its result, and row maxima."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import select
from ..core.mask import Compare, Mask
from ..core.numerics import constant, filled, row_numbers, stats_dtype
from ..core.problem import Block, Fold, Problem
from ..sweep import autograd
from ._options import Call


def fold_loss(problem: Problem, call: Call, over: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Returns the weighted losses, or their sum, and the sum of the rows that the fold counted.

    over: the number that the mean divides the sum by; None: the caller divides.
    """
    backend = select(problem, call.backend)
    if over is not None and call.reduction == "mean":
        loss, counted = autograd.loss_mean(problem, backend, max(over, 1))
    else:
        loss, counted = autograd.loss_rows_or_sum(problem, backend, per_row=call.reduction == "none")
    return loss, counted[0].sum() if counted else None


def fold_problem(
    operands: Sequence[Tensor],
    scale: Tensor,
    weight: Tensor,
    fold: Fold,
    call: Call,
    *,
    cosine: bool = False,
    target: Tensor | None = None,
) -> Problem:
    return Problem(
        operands=tuple(operands),
        blocks=(Block(0, len(operands) - 1),),
        scale=scale,
        target=filled(len(weight), -1, torch.int64, weight.device) if target is None else target,
        weight=weight,
        cosine=cosine,
        workspace_bytes=call.workspace_bytes,
        fold=fold,
        mirrored=len(operands) == 1 and fold.itself and fold.labels is not None and fold.labels[0] is fold.labels[1],
    )


def top(
    operands: Sequence[Tensor],
    scale: float,
    mask: Mask,
    call: Call,
    *,
    cosine: bool,
    bias: Tensor | None = None,
) -> Tensor:
    """Returns the column of each row's largest `scale * sim + bias` among those that the mask admits; -1 for none."""
    problem = _top_problem(operands, scale, mask, call, cosine, bias)
    return autograd.top_rows(problem, select(problem, call.backend))[1]


def opposed(
    x: Tensor, labels: Tensor, scale: float, call: Call, *, cosine: bool, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the column of each row's largest `scale * sim + bias` among other labels, and of its smallest among its
    own, itself left out."""
    others = Mask((Compare(labels, labels, False),))
    problem = _top_problem([x], scale, others, call, cosine, bias)
    found = autograd.opposed_rows(problem, select(problem, call.backend))
    if found is not None:
        return found
    same = Mask((Compare(labels, labels, True),), skip=row_numbers(len(labels), labels))
    less = None if bias is None else -bias
    return (
        top([x], scale, others, call, cosine=cosine, bias=bias),
        top([x], -scale, same, call, cosine=cosine, bias=less),
    )


def _top_problem(
    operands: Sequence[Tensor], scale: float, mask: Mask, call: Call, cosine: bool, bias: Tensor | None
) -> Problem:
    operands = [x.detach() for x in operands]
    rows, device = operands[0].shape[0], operands[0].device
    multiplier = constant(scale, stats_dtype(operands[0].dtype), device)
    return Problem(
        operands=tuple(operands),
        blocks=(Block(0, len(operands) - 1, bias, mask),),
        scale=multiplier,
        target=filled(rows, -1, torch.int64, device),
        weight=filled(rows, 1.0, multiplier.dtype, device),
        cosine=cosine,
        workspace_bytes=call.workspace_bytes,
        top=True,
    )
