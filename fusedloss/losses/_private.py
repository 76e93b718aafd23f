"""Negatives that their own row alone sees, merged into the loss of a sweep: M K scores beside its M N."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..core.folds import FAR
from ..core.numerics import savable, stats_dtype
from ..core.problem import Problem
from ..core.softmax import softplus
from ..core.transforms import transformed
from ..distributed import Agreed, averaged, part_across, scaled
from ..rowwise.pairs import cosine, dot, of_pairs, scores
from ._options import Call
from ._softmax import autocast, mean_of, over


def refusal(problem: Problem) -> str | None:
    """Returns the option of the problem, as its value is told, with which no private negatives are merged."""
    if problem.label_smoothing:
        return "label_smoothing"
    if problem.decoupled:
        return "decoupled"
    if problem.bends:
        return "debiased" if problem.targets is None else "target [M, P]"
    return "return_stats=True" if problem.wants_tally else None


def with_private(
    problem: Problem,
    call: Call,
    columns: Sequence[Tensor],
    real: Tensor | None = None,
    penalty: float = 0.0,
    teacher: Tensor | None = None,
) -> Tensor:
    """Adds each row's private columns: `log(exp(loss) + sum_k exp(z_ik - z_it))`, exact for tiny losses, too.

    columns: K tensors `[M, D]`. real: bool `[M, K]`, False for padding. penalty: of their logits, as a block's.
    teacher: `[M, 1 + K]`, scores of the target and of these columns. Their softmax t is the target distribution, which
    adds `sum_k t_ik (z_it - z_ik)` to the loss.
    """
    bare = _bare(problem)
    loss = mean_of([bare], replace(call, reduction="none"))
    loss = _weighted(problem, _merged(problem, loss, columns, real, penalty, call.backend, teacher))
    if call.reduction == "none":
        return loss
    return over(loss.sum(), problem.weight.sum()) if call.reduction == "mean" else loss.sum()


def with_private_across(
    agreed: Agreed, columns: Sequence[Tensor], real: Tensor | None = None, teacher: Tensor | None = None
) -> Tensor:
    """The same over the columns of all ranks; private columns stay on their rank, and so must each row's target."""
    (part,), call, (by_rows, by_parameters) = agreed.parts, agreed.call, agreed.world.factors
    problem, rows = part.problem, agreed._replace(call=call._replace(reduction="none"))
    loss = part_across(rows, part._replace(problem=_bare(problem)))
    own = replace(
        problem,
        operands=tuple(scaled(x, by_rows) for x in problem.operands),
        blocks=tuple(replace(block, bias=scaled(block.bias, by_parameters)) for block in problem.blocks),
        scale=scaled(problem.scale, by_parameters),
    )
    columns = [scaled(x, by_rows) for x in columns]
    loss = _weighted(problem, _merged(own, loss, columns, real, 0.0, call.backend, teacher))
    return loss if call.reduction == "none" else averaged(loss.sum(), problem.weight.sum(), part.rows, call.reduction)


def _bare(problem: Problem) -> Problem:
    """Returns the problem of rows that are weighted and transformed afterwards.

    A left-out row stays left out whatever its private columns hold.
    """
    counts = torch.where(problem.weight == 0, 0, torch.ones_like(problem.weight))
    return replace(problem, weight=counts, transform=None)


def _merged(
    problem: Problem,
    loss: Tensor,
    columns: Sequence[Tensor],
    real: Tensor | None,
    penalty: float,
    backend: str,
    teacher: Tensor | None = None,
) -> Tensor:
    if not columns:
        return loss
    block = problem.blocks[0]
    x, y = problem.operands[block.query], problem.operands[block.key]
    backend = "auto" if backend in ("cuda", "dense") else backend  # which take no pairs of rows
    sim = scores("cos" if problem.cosine else "dot", x, *autocast(*columns), backend=backend)
    z = sim * problem.scale
    if penalty:
        z = z + penalty * sim.detach()
    if real is not None:
        z = z.masked_fill(~savable(real), FAR)  # second derivatives of a log-sum-exp of nothing but -inf are NaN
    own = of_pairs(cosine if problem.cosine else dot, x, y, problem.target) * problem.scale
    if block.bias is not None and problem.bias_on_target:
        own = own + block.bias.to(own.dtype)[problem.target]
    left_out = problem.weight == 0
    own = own.masked_fill(left_out, 0)
    loss = loss + softplus(torch.logsumexp(z, dim=1) - own - loss)
    if teacher is None:
        return loss
    theirs = savable(teacher.detach()).to(own.dtype).masked_fill(left_out[:, None], 0)
    if real is not None:
        absent = ~savable(real)
        theirs = torch.cat([theirs[:, :1], theirs[:, 1:].masked_fill(absent, -torch.inf)], 1)
        z = z.masked_fill(absent, 0)
    return loss + (theirs.softmax(1)[:, 1:] * (own[:, None] - z)).sum(1)


def _weighted(problem: Problem, loss: Tensor) -> Tensor:
    weight = problem.weight
    loss = torch.where(weight == 0, 0, weight * transformed(loss, problem.transform))
    return loss.to(stats_dtype(problem.dtype))
