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
    weight, phi = problem.weight, problem.transform
    # A left-out row stays left out whatever its private columns hold. Rows that count are weighted afterwards.
    counts = torch.where(weight == 0, 0, torch.ones_like(weight))
    loss = mean_of([replace(problem, weight=counts, transform=None)], replace(call, reduction="none"))
    if columns:
        block = problem.blocks[0]
        x, y = problem.operands[block.query], problem.operands[block.key]
        backend = "auto" if call.backend in ("cuda", "dense") else call.backend  # which take no pairs of rows
        sim = scores("cos" if problem.cosine else "dot", x, *autocast(*columns), backend=backend)
        z = sim * problem.scale
        if penalty:
            z = z + penalty * sim.detach()
        if real is not None:
            z = z.masked_fill(~savable(real), FAR)  # second derivatives of a log-sum-exp of nothing but -inf are NaN
        own = of_pairs(cosine if problem.cosine else dot, x, y, problem.target) * problem.scale
        if block.bias is not None and problem.bias_on_target:
            own = own + block.bias.to(own.dtype)[problem.target]
        own = own.masked_fill(weight == 0, 0)
        loss = loss + softplus(torch.logsumexp(z, dim=1) - own - loss)
        if teacher is not None:
            theirs = savable(teacher.detach()).to(own.dtype).masked_fill((weight == 0)[:, None], 0)
            if real is not None:
                absent = ~savable(real)
                theirs = torch.cat([theirs[:, :1], theirs[:, 1:].masked_fill(absent, -torch.inf)], 1)
                z = z.masked_fill(absent, 0)
            loss = loss + (theirs.softmax(1)[:, 1:] * (own[:, None] - z)).sum(1)
    loss = transformed(loss, phi)
    loss = torch.where(weight == 0, 0, weight * loss).to(stats_dtype(problem.dtype))
    if call.reduction == "none":
        return loss
    return over(loss.sum(), weight.sum()) if call.reduction == "mean" else loss.sum()
