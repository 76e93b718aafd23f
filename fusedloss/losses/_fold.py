"""What the losses share whose rows are folded otherwise than by one softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import op
from ..backends import select
from ..problem import Block, Fold, Mask, Problem, stats_dtype


def fold_loss(
    operands: Sequence[Tensor],
    scale: Tensor,
    weight: Tensor,
    fold: Fold,
    cosine: bool,
    summed: bool,
    backend: str,
    workspace_bytes: int | None,
    target: Tensor | None = None,
    over: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The weighted losses, or their sum, over that number where it is given; and the sum of what the fold counted."""
    problem = fold_problem(operands, scale, weight, fold, cosine, workspace_bytes, target)
    backend = select(problem, backend)
    if over is not None:
        loss, counted = op.loss_mean(problem, backend, max(over, 1))
    else:
        loss, counted = op.loss_rows_or_sum(problem, backend, per_row=not summed)
    return loss, counted[0].sum() if counted else None


def fold_problem(
    operands: Sequence[Tensor],
    scale: Tensor,
    weight: Tensor,
    fold: Fold,
    cosine: bool,
    workspace_bytes: int | None,
    target: Tensor | None = None,
) -> Problem:
    if target is None:
        target = torch.full(weight.shape, -1, device=weight.device)
    return Problem(
        tuple(operands),
        (Block(0, len(operands) - 1),),
        scale,
        target,
        weight,
        cosine,
        workspace_bytes=workspace_bytes,
        fold=fold,
    )


def top(
    operands: Sequence[Tensor],
    scale: float,
    mask: Mask,
    cosine: bool,
    backend: str,
    workspace_bytes: int | None,
    bias: Tensor | None = None,
) -> Tensor:
    """The column of each row's largest `scale * sim + bias` among those that the mask admits; -1 for none."""
    operands = [x.detach() for x in operands]
    rows, device = operands[0].shape[0], operands[0].device
    multiplier = torch.full((), scale, dtype=stats_dtype(operands[0].dtype), device=device)
    problem = Problem(
        tuple(operands),
        (Block(0, len(operands) - 1, bias, mask),),
        multiplier,
        torch.full((rows,), -1, device=device),
        torch.ones(rows, dtype=multiplier.dtype, device=device),
        cosine,
        workspace_bytes=workspace_bytes,
        top=True,
    )
    return op.top_rows(problem, select(problem, backend))[1]
