"""Shared by the in-batch losses: autocast, the scale as a tensor, left-out rows, statistics, and the reduction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypedDict

import torch
from torch import Tensor

from ..backends import select
from ..core import checks
from ..core.numerics import constant, filled, row_numbers, savable, stats_dtype
from ..core.problem import Block, Problem, Stats
from ..core.rows import columns_and_weights, without_target
from ..distributed import Request, loss_across
from ..sweep.autograd import loss_mean, loss_rows_or_sum
from ._options import AcrossOptions, Call, ranks

Loss = Tensor | tuple[Tensor, Stats]  # functional.pyi says which


def autocast(*embeddings: Tensor) -> tuple[Tensor, ...]:
    """Casts embeddings to autocast's dtype under torch.autocast, as a matmul would; fp64 stays."""
    device = embeddings[0].device.type
    if not checks.autocasts(embeddings[0]):
        return embeddings
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in embeddings)


def as_scale(value: float | Tensor, like: Tensor, *, inverse: bool) -> tuple[Tensor, float | None]:
    """Returns the multiplier of the logits as a 0-dim tensor in the statistics dtype, and as a number if it was one."""
    dtype = stats_dtype(like.dtype)
    if isinstance(value, Tensor):
        scale = savable(value).reshape(()).to(dtype)
        return (scale.reciprocal() if inverse else scale), None
    number = 1.0 / value if inverse else float(value)
    return constant(number, dtype, like.device), number


def distinct(*tensors: Tensor) -> tuple[list[Tensor], list[int]]:
    """Returns each tensor once, and every argument's index: a matrix on both sides is one operand."""
    operands: list[Tensor] = []
    places = []
    for x in tensors:
        place = next((i for i, known in enumerate(operands) if known is x), len(operands))
        operands += [x] if place == len(operands) else []
        places.append(place)
    return operands, places


def mean_of(problems: Sequence[Problem], call: Call) -> Tensor:
    """Returns the mean of several losses."""
    return _mean(problems, call)[0]


def counting_mean_of(problems: Sequence[Problem], call: Call) -> Loss:
    """Returns the mean of several losses, with the statistics of the first under `return_stats`."""
    loss, counted = _mean(problems, call)
    return (loss, _stats(problems[0], counted)) if call.return_stats else loss


def both_ways(problem: Problem) -> list[Problem]:
    """Splits a loss of both directions into one for each, whose mean it is; any other is returned alone."""
    if not problem.symmetric:
        return [problem]
    (block,) = problem.blocks
    forth = replace(problem, symmetric=False)
    return [forth, replace(forth, blocks=(Block(block.key, block.query, mask=block.mask.turned()),))]


def _mean(problems: Sequence[Problem], call: Call) -> tuple[Tensor, list[Tensor]]:
    """Returns the mean of several losses, and what the first of them counted."""
    found = [_reduced(problem, call) for problem in problems]
    loss = torch.stack([loss for loss, _ in found]).mean(0) if len(found) > 1 else found[0][0]
    return loss, found[0][1]


def _reduced(problem: Problem, call: Call) -> tuple[Tensor, list[Tensor]]:
    backend = select(problem, call.backend)
    if call.reduction != "mean":
        return loss_rows_or_sum(problem, backend, call.reduction == "none")
    return loss_mean(problem, backend, max(problem.rows, 1) if problem.every_row else divisor(problem.weight.sum()))


def _stats(problem: Problem, counted: list[Tensor]) -> Stats:
    count, above, maximum, score = (t.detach() for t in counted[:4])
    rows = problem.weight != 0
    scale = problem.scale.detach()
    has_negative = rows & (maximum != -torch.inf)
    above = above.masked_fill(score.isnan() | maximum.isnan(), torch.nan)  # a NaN has no rank
    negatives = rows.sum() * max(problem.columns - problem.copies, 0)

    def mean(values: Tensor, over_rows: Tensor) -> Tensor:
        return over(values.masked_fill(~over_rows, 0).sum(), over_rows.sum().to(values.dtype))

    return Stats(
        mean((above == 0).to(count.dtype).where(above == above, above), rows),
        mean(1 / (1 + above), rows),
        mean(score / scale, rows),
        mean(maximum / scale, has_negative),
        over((negatives - count.masked_fill(~rows, 0).sum()).to(count.dtype), negatives.to(count.dtype)),
    )


def result_of(options: AcrossOptions, ask: Callable[[Call], Request]) -> Loss:
    """Runs the problems that `ask` checks and builds, here or across ranks, which all raise what `ask` raises."""
    world = ranks(options)
    if world is not None:
        return loss_across(world, lambda: ask(Call(**options)))
    call = Call(**options)
    return counting_mean_of(ask(call).problems, call)


def reduced(loss: Tensor, counts: Tensor, reduction: str) -> Tensor:
    """Reduces a sum of losses: the mean divides it by the sum of `counts` [M]."""
    return over(loss, counts.sum()) if reduction == "mean" else loss


def of_rows(loss: Tensor, reduction: str) -> Tensor:
    """Reduces `[M]` losses of rows that all count."""
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" and loss.numel() else loss.sum()  # len() of a tensor is Python code


def over(total: Tensor, count: Tensor) -> Tensor:
    """Returns `total / count`; for a count of 0, 0 without a gradient. A NaN total stays NaN."""
    return total / divisor(count)


def divisor(count: Tensor) -> Tensor:
    """Returns `count` with infinity for 0: dividing by that gives 0 and no gradient."""
    return count.masked_fill(count == 0, torch.inf)


class Rows(TypedDict):
    """The fields of a Problem that describe its rows."""

    target: Tensor
    weight: Tensor
    every_row: bool


def counted(
    operands: Sequence[Tensor],
    block: Block,
    scale: Tensor,
    target: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    elsewhere: bool = False,
) -> Rows:
    """Returns each row's target, the diagonal by default, and its weight: 0 if the first block lacks that target.

    elsewhere: `target` counts the columns of all ranks, so only their common problem can tell which rows it leaves out.
    """
    query, bias, skip = operands[block.query], block.bias, block.mask.skip
    rows, columns = query.shape[0], operands[block.key].shape[0]
    row_weight = filled(rows, 1.0, scale.dtype, query.device) if weight is None else weight.detach().to(scale.dtype)
    every_row = target is None and weight is None and bias is None and skip is None
    if target is None:
        target = row_numbers(rows, query)
    elif not elsewhere:
        target, row_weight = columns_and_weights(target, row_weight, columns, ignore_index)
    if not elsewhere:
        row_weight = without_target(row_weight, target, bias, skip)
    return Rows(target=target, weight=row_weight, every_row=every_row)
