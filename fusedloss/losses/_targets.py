"""What info_nce's further options of a row's loss may be: several targets, and the debiased loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..core import checks
from ..core.numerics import filled
from ..core.problem import Block, Targets
from ..core.rows import several_targets
from ._softmax import Rows


def check_debiased(share: float, **others: bool) -> None:
    """others: whether options are given that do not go with it."""
    checks.number("debiased", share)
    if not 0 <= share < 1:
        raise ValueError(f"debiased must be at least 0 and below 1, the share of false negatives, got {share}")
    if share:
        alone("debiased", **others)


def alone(name: str, **others: bool) -> None:
    """Raises if an option is given together with one of the others."""
    for other, given in others.items():
        if given:
            raise ValueError(f"{name} must not be given together with {other}, got both; leave one of them out")


def counts(share: float, blocks: Sequence[Block]) -> bool:
    """Whether the debiased loss needs the number of each row's negatives counted."""
    return share != 0 and any(block.mask.given or block.bias is not None for block in blocks)


class RowsOfSeveral(Rows):
    """The fields of a Problem that describe its rows, which may have several targets."""

    targets: Targets


def rows_of_several(
    operands: Sequence[Tensor],
    block: Block,
    scale: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *,
    ignore_index: int,
    elsewhere: bool,
    form: str,
) -> RowsOfSeveral:
    """Returns what `counted` does, of a target [M, P]."""
    query, columns = operands[block.query], operands[block.key].shape[0]
    row_weight = filled(len(query), 1.0, scale.dtype, query.device) if weight is None else weight.detach()
    row_weight = row_weight.to(scale.dtype)
    if not target.shape[1]:
        target = target.new_full((len(target), 1), ignore_index)
    if not elsewhere:
        target, row_weight = several_targets(target, row_weight, columns, ignore_index, block.bias, block.mask.skip)
    return RowsOfSeveral(target=target[:, 0], weight=row_weight, every_row=False, targets=Targets(target, form))
