"""Supervised contrastive learning: every other row of the same label is a positive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..distributed import World, agreed, averaged, everywhere, loss_across, scaled, summed_across
from ..masks import itself
from ..problem import Block, Fold, Mask, stats_dtype, unit_rows
from ._fold import fold_loss, fold_problem
from ._in_batch import Objective, as_scale, asked, autocast, objective, over, reduced
from ._module import LossModule

FORMS = ("out", "in")


def sup_con(
    embeddings: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    form: str = "out",
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    group: Any = None,
    strategy: str = "gather",
    grad_scale: str = "ddp",
) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020), over unit rows u and z_ij = <u_i, u_j> / temperature.

        P(i)   = {j != i: labels_j == labels_i}
        out:  loss_i = -1/|P(i)| sum_{p in P(i)} (z_ip - logsumexp_{j != i} z_ij)
        in:   loss_i = -log(1/|P(i)| sum_{p in P(i)} exp(z_ip - logsumexp_{j != i} z_ij))

    Rows without a positive are left out: 0 under "none", not in the mean. "out" is pytorch-metric-learning's
    SupConLoss. Its positive part is a product with the class sums, so one sweep is all it needs.

    Args:
        embeddings: `[N, D]`, normalised inside. Two views of a batch: concatenate them, and their labels.
        labels: int64 `[N]`, any values.
        temperature: a positive number, or a tensor of one element, which receives a gradient.
        form: "out" (the paper's recommendation) or "in".
        reduction: "mean" over the rows that have a positive, "sum", or "none" (`[N]`).
        backend: "auto", "triton", "chunked" or "reference".
        workspace_bytes: the most that the workspace for one chunk of similarities may take; see `info_nce`.
        group: a ProcessGroup whose other ranks' columns compete, too. The result is the mean (or sum) over all ranks'
            rows, on every rank; "none" gives this rank's. See `fusedloss.distributed`.
        strategy: how columns travel: "gather", all at once, or "ring", a shard at a time.
        grad_scale: "ddp" (right after DistributedDataParallel's average), "sum" (this rank's share) or
            "match:<library>".

    Returns:
        A 0-dim tensor (`[N]` for "none"), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        UnsupportedError: the backend asked for cannot run this.

    Example:
        >>> embeddings = torch.cat([encoder(augment(x)), encoder(augment(x))])
        >>> fusedloss.sup_con(embeddings, torch.cat([y, y]), temperature=0.1).backward()
    """
    checks.embeddings(embeddings=embeddings)
    checks.integers("labels", labels, (embeddings.shape[0],), embeddings)
    checks.scalar("temperature", temperature, embeddings, positive=True)
    checks.choice("form", form, FORMS)
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    checks.count("workspace_bytes", workspace_bytes)
    scale, scale_bound = as_scale(temperature, embeddings, inverse=True)
    (x,) = autocast(embeddings)
    ranks = asked(group, strategy, grad_scale)
    if ranks is not None:
        return _across(ranks, x, labels, scale, scale_bound, form, reduction, backend, workspace_bytes)
    classes = groups(labels)
    size = torch.zeros_like(classes).index_add_(0, classes, torch.ones_like(classes))[classes]
    counts = (size > 1).to(scale.dtype)
    if form == "in":
        fold = Fold("sup_con_in", labels=(labels, labels), itself=True)
        rows, _ = fold_loss([x], scale, counts, fold, True, reduction != "none", backend, workspace_bytes)
        return reduced(rows, counts, reduction)
    share = counts / (size - 1).clamp(min=1)
    one = _log_sum_exp(x, counts, scale, scale_bound, reduction, backend, workspace_bytes)
    lse = one.result()
    assert isinstance(lse, Tensor)
    positive = scale * share * _others(x, classes)
    return reduced(lse - (positive if reduction == "none" else positive.sum()), counts, reduction)


def _log_sum_exp(
    x: Tensor,
    counts: Tensor,
    scale: Tensor,
    scale_bound: float | None,
    reduction: str,
    backend: str,
    workspace_bytes: int | None,
) -> Objective:
    """Of each row that counts, over all others."""
    return objective(
        [x],
        [Block(0, 0, mask=Mask(skip=itself(len(x), x)))],
        torch.full((len(x),), -1, device=x.device),
        scale,
        scale_bound=scale_bound,
        weight=counts,
        cosine=True,
        decoupled=True,
        reduction="none" if reduction == "none" else "sum",
        backend=backend,
        workspace_bytes=workspace_bytes,
    )


def _across(
    around: World,
    x: Tensor,
    labels: Tensor,
    scale: Tensor,
    scale_bound: float | None,
    form: str,
    reduction: str,
    backend: str,
    workspace_bytes: int | None,
) -> Tensor:
    """Positives are the rows of all ranks that have the label. Labels are gathered, 8 bytes each, also for a ring."""
    (rows,) = agreed(around, f"sup_con {form}, scale {scale_bound}, reduction {reduction}", x)
    columns = everywhere(labels, rows)
    classes = groups(columns)
    size = torch.zeros_like(classes).index_add_(0, classes, torch.ones_like(classes))[classes][: len(x)]
    counts = (size > 1).to(scale.dtype)
    if form == "in":
        if around.strategy == "ring":
            raise ValueError("form='in' with strategy='ring': its two sums are one pass over whole rows; take 'gather'")
        fold = Fold("sup_con_in", labels=(labels, labels), itself=True)
        problem = fold_problem([x], scale, counts, fold, True, workspace_bytes)
        return loss_across(problem, backend, reduction, around, "sup_con in")
    one = _log_sum_exp(x, counts, scale, scale_bound, reduction, backend, workspace_bytes)
    lse = loss_across(one.problem, one.backend, one.reduction, around, "sup_con out")
    by_rows, by_parameters = (around.of_rows() if reduction == "none" else around).factors
    weight = scaled(scale, by_parameters) * counts / (size - 1).clamp(min=1)
    with torch.autocast(x.device.type, enabled=False):
        u = unit_rows(scaled(x, by_rows).to(stats_dtype(x.dtype)))
        same = summed_across(_same_label, u, (labels,), rows, around.strategy) - u.square().sum(1)
    positive = weight * same
    if reduction == "none":
        return lse - positive
    count = counts.sum()
    loss = lse - averaged(positive.sum(), count, rows, "sum")
    return over(loss, averaged(count, count, rows, "sum")) if reduction == "mean" else loss


def _same_label(u: Tensor, v: Tensor, labels: Tensor, others: Tensor) -> Tensor:
    """`<u_i, sum of the rows v_j of i's label>`, `[M]`, O((M + N) D)."""
    classes = groups(torch.cat([labels, others]))
    mine, theirs = classes[: len(labels)], classes[len(labels) :]
    sums = v.new_zeros(len(classes), v.shape[1]).index_add(0, theirs, v)
    return (u * sums[mine]).sum(1)


def groups(labels: Tensor) -> Tensor:
    """Labels as numbers from 0 up to at most N - 1, without reading one back."""
    ordered, order = labels.sort()
    changes = torch.ones_like(ordered).index_fill_(0, itself(len(labels), labels)[:1], 0)
    changes[1:] = (ordered[1:] != ordered[:-1]).long()
    return torch.empty_like(labels).scatter_(0, order, changes.cumsum(0))


def _others(x: Tensor, group: Tensor) -> Tensor:
    """`<u_i, sum of the other unit rows of i's group>`, O(N D)."""
    with torch.autocast(x.device.type, enabled=False):
        u = unit_rows(x.to(stats_dtype(x.dtype)))
        sums = torch.zeros_like(u).index_add(0, group, u)
        return (u * (sums[group] - u)).sum(1)


class SupConLoss(LossModule, function=sup_con):
    """`sup_con` with its options in the constructor and `forward(embeddings, labels)`."""
