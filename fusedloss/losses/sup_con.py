"""Supervised contrastive learning: every other row of the same label is a positive."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor

from .. import sweep, transforms
from ..backends import select
from ..core import checks
from ..core.mask import Mask
from ..core.numerics import (
    NORM_EPS,
    filled,
    group_numbers,
    group_sizes,
    row_numbers,
    savable,
    slices,
    stats_dtype,
    unit_rows,
    without_autocast,
)
from ..core.problem import Block, Fold, Problem
from ..core.rows import finish
from ..core.transforms import Transform, transformed
from ..distributed import Request, World, agree, averaged, everywhere, part_across, scaled, summed_across
from ..sweep import autograd
from . import _straight as straight
from ._folded import fold_problem
from ._options import AcrossOptions, Call, expanded, ranks
from ._softmax import as_scale, autocast, over, reduced

FORMS = ("out", "in")
PIECES = 5  # matrices [N, some of D] that class sums and their gradient need at once


@expanded
def sup_con(
    embeddings: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    form: str = "out",
    transform: Transform | Callable[[Tensor], Tensor] | None = None,
    **options: Unpack[AcrossOptions],
) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020), over unit rows u and z_ij = <u_i, u_j> / temperature.

        P(i)   = {j != i: labels_j == labels_i}
        out:  loss_i = -1/|P(i)| sum_{p in P(i)} (z_ip - logsumexp_{j != i} z_ij)
        in:   loss_i = -log(1/|P(i)| sum_{p in P(i)} exp(z_ip - logsumexp_{j != i} z_ij))

    Rows without a positive are left out: 0 under "none", not in the mean. "out" is pytorch-metric-learning's
    SupConLoss. Its positive part is a product with the class sums, so it needs only one sweep.

    Args:
        embeddings: `[N, D]`, normalised inside. Two views of a batch: concatenate them, and their labels.
        labels: int64 `[N]`, any values.
        temperature: a positive number, or a tensor of one element, which receives a gradient.
        form: "out" (the paper's recommendation) or "in".
        transform: with "out", a function of each row's own loss: one of `fusedloss.transforms`, or a function of a
            tensor `[N]`. The rows' losses are then known before their gradient, which takes a fourth product.
        reduction: "mean" over the rows that have a positive, "sum", or "none" (`[N]`).

    Returns:
        A 0-dim tensor (`[N]` for "none"), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        UnsupportedError: the backend asked for cannot run this.

    Example:
        >>> embeddings = torch.cat([encoder(augment(x)), encoder(augment(x))])
        >>> fusedloss.sup_con(embeddings, torch.cat([y, y]), temperature=0.1).backward()
    """
    found = straight.supervised(embeddings, labels, temperature, options, (form != FORMS[0], transform))
    if found is not None:
        return found
    world = ranks(options)
    phi = transforms.bind(transform)

    def ask(call: Call) -> Request:
        checks.embeddings(embeddings=embeddings)
        checks.integers("labels", labels, (embeddings.shape[0],), embeddings)
        checks.scalar("temperature", temperature, embeddings, positive=True)
        checks.choice("form", form, FORMS)
        if phi is not None and form == "in":
            raise ValueError("transform must be None with form='in', got one; pass form='out'")
        if world is not None and form == "in" and call.strategy == "ring":
            raise ValueError("strategy must be 'gather' with form='in', which sums whole rows in one pass, got 'ring'")
        scale, scale_bound = as_scale(temperature, embeddings, inverse=True)
        (x,) = autocast(embeddings)
        others = group_sizes(group_numbers(labels)) - 1
        counts = (others > 0).to(scale.dtype)
        if form == "in":
            fold = Fold("sup_con_in", labels=(labels, labels), itself=True)
            problem = replace(fold_problem([x], scale, counts, fold, call, cosine=True), scale_bound=scale_bound)
        else:
            problem = _log_sum_exp(x, counts, scale, scale_bound, call)
        # Compiled, where there is no group, a number may be a symbol that has no words.
        named = "" if phi is None or world is None else f", transform {phi.name} {phi.value} {phi.detach}"
        return call.request(f"sup_con {form}, scale {scale_bound}{named}", problem)

    if world is not None:
        return _across(world, lambda: ask(Call(**options)), labels, form, phi)
    call = Call(**options)
    (problem,) = ask(call).problems
    counts = problem.weight
    name = select(problem, call.backend)
    per_row = call.reduction == "none" or phi is not None
    rows, _ = autograd.loss_rows_or_sum(problem, name, per_row=per_row)
    if form == "out":
        classes = group_numbers(labels)
        weight = problem.scale * counts / (group_sizes(classes) - 1).clamp(min=1)
        positive = weight * _sums_of_others(problem.operands[0], classes, name, call.workspace_bytes)
        rows = rows - (positive if per_row else positive.sum())
    if phi is not None:
        rows = transformed(rows, phi).masked_fill(counts == 0, 0)
        rows = rows if call.reduction == "none" else rows.sum()
    return reduced(rows, counts, call.reduction)


def _log_sum_exp(x: Tensor, counts: Tensor, scale: Tensor, scale_bound: float | None, call: Call) -> Problem:
    """Returns the log-sum-exp over all other rows, of each row that counts."""
    return Problem(
        operands=(x,),
        blocks=(Block(0, 0, mask=Mask(skip=row_numbers(len(x), x))),),
        scale=scale,
        target=filled(len(x), -1, torch.int64, x.device),
        weight=counts,
        cosine=True,
        scale_bound=scale_bound,
        workspace_bytes=call.workspace_bytes,
        decoupled=True,
        mirrored=True,
    )


def _across(world: World, ask: Callable[[], Request], labels: Tensor, form: str, phi: Transform | None) -> Tensor:
    """Runs across ranks: positives are of all ranks. Labels are gathered, 8 bytes each, also for a ring."""
    agreed, labels = agree(world, ask), savable(labels)
    (part,), reduction = agreed.parts, agreed.call.reduction
    (x,), scale, rows = part.problem.operands, part.problem.scale, part.rows
    others = group_sizes(group_numbers(everywhere(labels, rows)))[: len(x)] - 1
    counts = (others > 0).to(scale.dtype)
    part = part._replace(problem=replace(part.problem, weight=counts))
    if form == "in":
        return part_across(agreed, part)
    per_row = reduction == "none" or phi is not None
    called = agreed.call._replace(reduction="none" if per_row else "sum")
    lse = part_across(agreed._replace(call=called), part)
    by_rows, by_parameters = agreed.world.factors
    weight = scaled(scale, by_parameters) * counts / others.clamp(min=1)
    with without_autocast(x):
        u = unit_rows(scaled(x, by_rows).to(stats_dtype(x.dtype)))
        same = summed_across(_same_label, u, (labels,), rows, world.strategy) - u.square().sum(1)
    positive = weight * same
    found = lse - positive if per_row else positive
    if phi is not None:
        found = transformed(found, phi).masked_fill(counts == 0, 0)
    if reduction == "none":
        return found
    count, total = counts.sum(), averaged(found.sum(), counts.sum(), rows, "sum")
    loss = total if per_row else lse - total
    return over(loss, averaged(count, count, rows, "sum")) if reduction == "mean" else loss


def _same_label(u: Tensor, v: Tensor, labels: Tensor, others: Tensor) -> Tensor:
    """Returns `<u_i, sum of the rows v_j of i's label>`, `[M]`, in O((M + N) D)."""
    classes = group_numbers(torch.cat([labels, others]))
    mine, theirs = classes[: len(labels)], classes[len(labels) :]
    sums = v.new_zeros(len(classes), v.shape[1]).index_add(0, theirs, v)
    return (u * sums[mine]).sum(1)


def _sums_of_others(x: Tensor, classes: Tensor, backend: str, workspace_bytes: int | None) -> Tensor:
    """Chooses the formula under torch.compile, which would unroll the loop over dimensions, and under torch.func."""
    if backend == "reference" or torch.compiler.is_compiling():
        return _others(x, classes)
    return _Others.apply(x, classes, checks.budget(workspace_bytes)[1] or sweep.chunks.CPU_BYTES)


def _others(x: Tensor, classes: Tensor) -> Tensor:
    """The formula of `<u_i, sum of the other unit rows of i's class>`, in O(N D)."""
    with without_autocast(x):
        u = unit_rows(x.to(stats_dtype(x.dtype)))
        sums = torch.zeros_like(u).index_add(0, classes, u)
        return (u * (sums[classes] - u)).sum(1)


class _Others(torch.autograd.Function):
    """`_others`, some dimensions at a time: class sums are as large as the embeddings. Only inputs are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, classes: Tensor, budget: int) -> Tensor:
        ctx.save_for_backward(x, classes)
        ctx.budget = budget
        factor = _inverse_norms(x)
        found = torch.zeros_like(factor)
        for part in _dimensions(x, budget):
            u = x[:, part].to(factor.dtype) * factor[:, None]
            found += _class_sums(u, classes).sub_(u).mul_(u).sum(1)
        return found

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None]:
        x, classes = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the formula, which autograd can differentiate again
            (gradient,) = torch.autograd.grad(_others(x, classes), x, upstream, create_graph=True)
            return gradient, None, None
        factor = _inverse_norms(x)
        total = torch.empty_like(x, dtype=factor.dtype, memory_format=torch.contiguous_format)
        for part in _dimensions(x, ctx.budget):
            u = x[:, part].to(factor.dtype) * factor[:, None]
            weighted = u * upstream[:, None]
            sums = _class_sums(u, classes).sub_(u).mul_(upstream[:, None])
            total[:, part] = sums.add_(_class_sums(weighted, classes)).sub_(weighted)
        finish(total, factor, factor.new_ones(()), None, x, factor, total)
        return total.to(x.dtype), None, None


def _inverse_norms(x: Tensor) -> Tensor:
    """Nothing here is in fp16, where a row of zeros would need another."""
    norms = torch.linalg.vector_norm(x, dim=1, dtype=stats_dtype(x.dtype))
    return norms.clamp_min(NORM_EPS).reciprocal()


def _class_sums(u: Tensor, classes: Tensor) -> Tensor:
    """Returns the sum of each row's class."""
    return torch.zeros_like(u).index_add_(0, classes, u)[classes]


def _dimensions(x: Tensor, budget: int) -> Iterator[slice]:
    """Returns the number of dimensions of which PIECES matrices fit the workspace."""
    width = max(1, budget // max(1, PIECES * len(x) * stats_dtype(x.dtype).itemsize))
    return slices(x.shape[1], width)
