"""What info_nce's further options of a row's loss may be: several targets, and the debiased loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import checks
from ..core.problem import Block
from ._options import Call


def check_debiased(share: float, call: Call, **others: bool) -> None:
    """others: whether options are given that do not go with it."""
    checks.number("debiased", share)
    if not 0 <= share < 1:
        raise ValueError(f"debiased must be at least 0 and below 1, the share of false negatives, got {share}")
    if not share:
        return
    alone("debiased", **others)
    if call.group is not None and call.strategy == "ring":
        raise ValueError("strategy must be 'gather' with debiased, which counts the columns of all ranks, got 'ring'")


def alone(name: str, **others: bool) -> None:
    """Raises if an option is given together with one of the others."""
    for other, given in others.items():
        if given:
            raise ValueError(f"{name} must not be given together with {other}, got both; leave one of them out")


def counts(share: float, blocks: Sequence[Block], *, across: bool, symmetric: bool = False) -> bool:
    """Whether the debiased loss needs the number of each row's negatives counted."""
    if not share or not any(block.mask.given or block.bias is not None for block in blocks):
        return False
    if across or symmetric:
        where = "group" if across else "both directions at once"
        raise ValueError(
            f"debiased must be 0 where columns are dropped, by a mask or a bias, with {where}, which does not count "
            f"the negatives, got {share}; leave the mask out"
        )
    return True


class Several(NamedTuple):
    """Targets of rows that may have several."""

    first: Tensor  # [M], as `counted` takes it: ignore_index where there is none
    columns: Tensor  # [M, P], as a problem has it


def several(target: Tensor, columns: int, ignore_index: int, bias: Tensor | None, skip: Tensor | None) -> Several:
    """Returns each row's targets in order. One that stands twice counts once; a bias of -inf or the mask removes some.

    target: int64 [M, P]. skip: [M], the column that a row leaves out.
    """
    if not target.shape[1]:
        target = target.new_full((len(target), 1), ignore_index)
    absent = target == ignore_index
    outside = ~absent & ((target < 0) | (target >= columns))
    inside = target.clamp(0, max(columns - 1, 0))
    if bias is not None:
        absent = absent | ((bias.detach()[inside] == -torch.inf) & ~outside)
    if skip is not None:
        absent = absent | (skip[:, None] == target)
    ordered = inside.masked_fill(absent | outside, columns).sort(1).values
    ordered[:, 1:] = ordered[:, 1:].masked_fill(ordered[:, 1:] == ordered[:, :-1], columns)
    ordered = ordered.masked_fill(ordered == columns, -1)
    first = ordered[:, 0].masked_fill(ordered[:, 0] < 0, ignore_index)
    first = first.masked_fill(outside.any(1), columns)  # `counted` makes the row NaN
    ordered[:, 0].clamp_(min=0)
    return Several(first, ordered)
