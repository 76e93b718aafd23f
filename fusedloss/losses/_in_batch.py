"""What the in-batch losses share: autocast, the scale as a tensor, left-out rows, statistics, and the reduction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..backends import select
from ..distributed import Call, World, loss_across, world
from ..op import loss_mean, loss_rows_or_sum
from ..problem import NO_MARGIN, Block, GuideRule, Margin, Problem, savable, stats_dtype
from ..rows import columns_and_weights, without_target


class Stats(NamedTuple):
    """What a batch looks like to its loss, over the rows that count; 0-dim tensors without gradient.

    Scores are logits divided by the scale: similarities, where there is no bias.
    """

    accuracy: Tensor  # share of rows whose target has the largest logit; ties count for it: `masks.score_margin`
    mean_reciprocal_rank: Tensor  # of the target among the row's admissible columns
    positive_score: Tensor  # mean of the targets'
    hardest_negative_score: Tensor  # mean of each row's largest, over the rows that have a negative
    masked: Tensor  # share of the negatives that masks and biases of -inf drop


# Tensor, or (Tensor, Stats) under return_stats=True: a union would make every caller's type checker ask which.
Loss = Any


def autocast(*embeddings: Tensor) -> tuple[Tensor, ...]:
    """Under torch.autocast, embeddings take its dtype, as a matmul's operands would; fp64 stays."""
    device = embeddings[0].device.type
    if not checks.autocasts(embeddings[0]):
        return embeddings
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in embeddings)


def as_scale(value: float | Tensor, like: Tensor, *, inverse: bool) -> tuple[Tensor, float | None]:
    """The multiplier of the logits as a 0-dim tensor in the statistics dtype, and as a number where it is one."""
    dtype = stats_dtype(like.dtype)
    if isinstance(value, Tensor):
        scale = savable(value).reshape(()).to(dtype)
        return (scale.reciprocal() if inverse else scale), None
    number = 1.0 / value if inverse else float(value)
    return torch.full((), number, dtype=dtype, device=like.device), number


def distinct(*tensors: Tensor) -> tuple[list[Tensor], list[int]]:
    """Each tensor once, and the places of all: one matrix on both sides is one operand, with one gradient."""
    operands: list[Tensor] = []
    places = []
    for x in tensors:
        place = next((i for i, known in enumerate(operands) if known is x), len(operands))
        operands += [x] if place == len(operands) else []
        places.append(place)
    return operands, places


class Objective(NamedTuple):
    """A softmax loss before it is computed."""

    problem: Problem
    backend: str
    reduction: str
    every_row: bool  # with weight 1
    ignore_index: int | None = None  # where the target is among the columns of all ranks, which are not here

    def result(self) -> Loss:
        """The loss, and what its sweep counted where that was asked for."""
        return mean_of([self])

    def _reduced(self) -> tuple[Tensor, list[Tensor]]:
        problem, backend = self.problem, select(self.problem, self.backend)
        if self.reduction != "mean":
            return loss_rows_or_sum(problem, backend, self.reduction == "none")
        return loss_mean(problem, backend, max(problem.rows, 1) if self.every_row else divisor(problem.weight.sum()))

    def _stats(self, counted: list[Tensor]) -> Stats:
        problem = self.problem
        count, above, maximum, score = (t.detach() for t in counted[:4])
        rows = problem.weight != 0
        scale = problem.scale.detach()
        has_negative = rows & (maximum != -torch.inf)
        above = above.masked_fill(score.isnan() | maximum.isnan(), torch.nan)  # of which nothing is known
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


def mean_of(objectives: Sequence[Objective]) -> Loss:
    """The mean of several losses, with the statistics of the first."""
    found = [one._reduced() for one in objectives]
    loss = torch.stack([loss for loss, _ in found]).mean(0) if len(found) > 1 else found[0][0]
    first = objectives[0]
    return (loss, first._stats(found[0][1])) if first.problem.wants_tally else loss


def result_of(ask: Callable[[], tuple[str, list[Objective]]], around: World | None) -> Loss:
    """The mean of the losses that `ask` builds, here or over the ranks, which are told what it raises.

    ask: checks the arguments; gives the loss and its options, the same on all ranks, and the objectives.
    """
    if around is None:
        return mean_of(ask()[1])

    def call() -> Call:
        what, objectives = ask()
        first = objectives[0]
        return Call(what, tuple(one.problem for one in objectives), first.backend, first.reduction, first.ignore_index)

    return loss_across(around, call)


def asked(group: Any, strategy: str, grad_scale: str) -> World | None:
    """The ranks that share the batch, where a group is given; else the other two must be what they are by default."""
    if group is not None:
        return world(group, strategy, grad_scale)
    if (strategy, grad_scale) != ("gather", "ddp"):
        raise ValueError(
            f"strategy={strategy!r}, grad_scale={grad_scale!r} without group: pass a ProcessGroup with them, or 'world'"
        )
    return None


def reduced(loss: Tensor, counts: Tensor, reduction: str) -> Tensor:
    """A sum as what was asked for; `counts` [M] is what each row counts in the mean."""
    return over(loss, counts.sum()) if reduction == "mean" else loss


def of_rows(loss: Tensor, reduction: str) -> Tensor:
    """`[M]` losses of rows that all count, as what was asked for."""
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" and len(loss) else loss.sum()


def over(total: Tensor, count: Tensor) -> Tensor:
    """`total / count`; without a count 0, without a gradient, but a NaN stays: of NaN rows a loss may count none."""
    return total / divisor(count)


def divisor(count: Tensor) -> Tensor:
    """What gives 0 and no gradient where there is no count."""
    return count.masked_fill(count == 0, torch.inf)


def objective(
    operands: Sequence[Tensor],
    blocks: Sequence[Block],
    target: Tensor | None,
    scale: Tensor,
    *,
    scale_bound: float | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    cosine: bool = False,
    label_smoothing: float = 0.0,
    symmetric: bool = False,
    decoupled: bool = False,
    copies: int = 1,
    guide_rule: GuideRule | None = None,
    margin: Margin = NO_MARGIN,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    return_stats: bool = False,
    across: bool = False,
) -> Objective:
    """Builds the problem. A weighted mean divides by the weight of the rows that count.

    across: `target` is among the columns of all ranks: which rows it leaves out is known where those are.
    """
    query, bias, skip = operands[blocks[0].query], blocks[0].bias, blocks[0].mask.skip
    rows, columns = query.shape[0], operands[blocks[0].key].shape[0]
    row_weight = query.new_ones(rows, dtype=scale.dtype) if weight is None else weight.detach().to(scale.dtype)
    every_row = target is None and weight is None and bias is None and skip is None
    if target is None:
        target = torch.arange(rows, device=query.device)
    elif not decoupled and not across:
        target, row_weight = columns_and_weights(target, row_weight, columns, ignore_index)
    if not across:
        row_weight = without_target(row_weight, target, bias, skip)
    problem = Problem(
        tuple(operands),
        tuple(blocks),
        scale,
        target,
        row_weight,
        cosine,
        label_smoothing,
        symmetric,
        scale_bound,
        workspace_bytes,
        decoupled,
        copies,
        guide_rule or GuideRule(),
        return_stats,
        margin=margin,
    )
    return Objective(problem, backend, reduction, every_row, ignore_index if across else None)
