"""Supervised contrastive learning: every other row of the same label is a positive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..distributed import everywhere, shared
from ..masks import itself
from ..problem import Block, Fold, Mask, stats_dtype, unit_rows
from ._fold import fold_loss
from ._in_batch import as_scale, asked, autocast, distinct, objective, reduced
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
        strategy: how columns travel: "gather".
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
    ranks, rows = asked(group, strategy, grad_scale), None
    y, columns = x, labels
    if ranks is not None:
        x, scale, (rows,) = shared(ranks, reduction, f"sup_con {form}, scale {scale_bound}", x, scale)
        y, columns = everywhere(x, rows), everywhere(labels, rows)
    operands, (query, key) = distinct(x, y)
    classes = groups(columns)
    size = torch.zeros_like(classes).index_add_(0, classes, torch.ones_like(classes))[classes][: len(x)]
    counts = (size > 1).to(scale.dtype)
    if form == "in":
        fold = Fold("sup_con_in", labels=(labels, columns), itself=True)
        loss, _ = fold_loss(operands, scale, counts, fold, True, reduction != "none", backend, workspace_bytes)
        return reduced(loss, counts, reduction, rows)
    share = counts / (size - 1).clamp(min=1)
    lse = objective(
        operands,
        [Block(query, key, mask=Mask(skip=itself(len(x), x)))],
        torch.full_like(labels, -1),
        scale,
        scale_bound=scale_bound,
        weight=counts,
        cosine=True,
        decoupled=True,
        reduction="none" if reduction == "none" else "sum",
        backend=backend,
        workspace_bytes=workspace_bytes,
    ).result()
    assert isinstance(lse, Tensor)
    positive = scale * share * _others(x, y, classes)
    return reduced(lse - (positive if reduction == "none" else positive.sum()), counts, reduction, rows)


def groups(labels: Tensor) -> Tensor:
    """Labels as numbers from 0 up to at most N - 1, without reading one back."""
    ordered, order = labels.sort()
    changes = torch.ones_like(ordered).index_fill_(0, itself(len(labels), labels)[:1], 0)
    changes[1:] = (ordered[1:] != ordered[:-1]).long()
    return torch.empty_like(labels).scatter_(0, order, changes.cumsum(0))


def _others(x: Tensor, y: Tensor, group: Tensor) -> Tensor:
    """`<u_i, sum of the other unit rows of i's group>`, O(N D); x: the first rows of y."""
    with torch.autocast(x.device.type, enabled=False):
        u = unit_rows(x.to(stats_dtype(x.dtype)))
        v = u if y is x else unit_rows(y.to(stats_dtype(y.dtype)))
        sums = torch.zeros_like(v).index_add(0, group, v)
        return (u * (sums[group[: len(u)]] - u)).sum(1)


class SupConLoss(LossModule, function=sup_con):
    """`sup_con` with its options in the constructor and `forward(embeddings, labels)`."""
