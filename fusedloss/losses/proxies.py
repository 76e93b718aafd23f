"""Losses against one learnt vector per class: Proxy-NCA and Proxy-Anchor."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from ..core import checks
from ..core.numerics import NORM_EPS, constant, stats_dtype
from ..core.problem import Block, Fold, Problem
from ._folded import fold_loss, fold_problem
from ._options import Call, SweepOptions, expanded
from ._softmax import as_scale, autocast, counted, distinct, mean_of, of_rows


@expanded
def proxy_nca(
    embeddings: Tensor,
    target: Tensor,
    proxies: Tensor,
    *,
    scale: float | Tensor = 1.0,
    decoupled: bool = False,
    ignore_index: int = -100,
    **options: Unpack[SweepOptions],
) -> Tensor:
    """Proxy-NCA (Movshovitz-Attias et al. 2017), over distances of unit rows and unit proxies.

        z_ic   = -scale |u_i - p_c|^2 = 2 scale <u_i, p_c> + a constant
        loss_i = logsumexp_c z_ic - z_i,target        decoupled: without c = target in the sum, as in the paper

    By default this is pytorch-metric-learning's ProxyNCALoss with its softmax_scale, without a [B, C] matrix. That
    class drops rows whose probability underflows to 0; here they keep their loss.

    Args:
        embeddings: `[B, D]`, normalised inside; float16, bfloat16, float32 or float64, any strides.
        target: int64 `[B]`, class indices.
        proxies: `[C, D]`, a vector of each class, normalised inside.
        scale: a positive number, or a tensor of one element, which receives a gradient. The paper's is 1;
            ProxyNCA++ (Teh et al. 2020) has 9.
        decoupled: leave the target's proxy out of a row's sum.
        ignore_index: rows with this target are left out.
        reduction: "mean" (over the rows that count; 0 if none does), "sum", or "none" (`[B]`).

    Returns:
        A 0-dim tensor (`[B]` for "none"), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        IndexError: on a CPU, a target out of range. On a GPU values are not read back and the loss is NaN.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> proxies = torch.nn.Parameter(torch.randn(classes, 128))
        >>> fusedloss.proxy_nca(encoder(x), y, proxies, scale=9.0).backward()
    """
    call = Call(**options)
    checks.index("ignore_index", ignore_index)
    _check(embeddings, target, proxies, ignore_index)
    checks.scalar("scale", scale, embeddings, positive=True)
    half, bound = as_scale(scale, embeddings, inverse=False)
    matrices, (query, key) = distinct(embeddings, proxies)
    operands, block = autocast(*matrices), Block(query, key, _of_short(proxies, half))
    problem = Problem(
        operands=operands,
        blocks=(block,),
        scale=2 * half,
        **counted(operands, block, half, target, ignore_index=ignore_index),
        cosine=True,
        scale_bound=None if bound is None else 2 * bound,
        workspace_bytes=call.workspace_bytes,
        decoupled=decoupled,
    )
    return mean_of([problem], call)


@expanded
def proxy_anchor(
    embeddings: Tensor,
    target: Tensor,
    proxies: Tensor,
    *,
    margin: float = 0.1,
    alpha: float = 32.0,
    **options: Unpack[SweepOptions],
) -> Tensor:
    """Proxy-Anchor (Kim et al. 2020), over the cosines s_ci of proxies and embeddings.

        loss_c = C / |P+| log(1 + sum_{i: target_i  = c} exp(-alpha (s_ci - margin)))
                        + log(1 + sum_{i: target_i != c} exp( alpha (s_ci + margin)))

    The rows are the C proxies; |P+| is the number of proxies with an embedding in the batch. The mean is
    pytorch-metric-learning's ProxyAnchorLoss, without a [B, C] matrix; sums are shifted by their largest term.

    Args:
        embeddings: `[B, D]`, normalised inside; float16, bfloat16, float32 or float64, any strides.
        target: int64 `[B]`, class indices.
        proxies: `[C, D]`, a vector of each class, normalised inside.
        margin: in the unit of the cosine. alpha: the scale, positive.
        reduction: "mean" over the proxies, "sum", or "none" (`[C]`).

    Returns:
        A 0-dim tensor (`[C]` for "none"), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        IndexError: on a CPU, a target out of range. On a GPU values are not read back and the loss is NaN.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> proxies = torch.nn.Parameter(torch.randn(classes, 128))
        >>> fusedloss.proxy_anchor(encoder(x), y, proxies, margin=0.1, alpha=32.0).backward()
    """
    call = Call(**options)
    _check(embeddings, target, proxies, None)
    checks.number("margin", margin)
    checks.number("alpha", alpha)
    checks.scalar("alpha", alpha, embeddings, positive=True)
    classes = proxies.shape[0]
    one = constant(1.0, stats_dtype(embeddings.dtype), embeddings.device)
    outside = (target < 0) | (target >= classes)
    index = target.masked_fill(outside, 0)
    if not len(target):  # log(1 + 0) each
        return of_rows(0 * proxies.to(one.dtype).sum(1) + 0 * embeddings.sum(), call.reduction)
    present = one.new_zeros(classes).index_fill(0, index, 1).sum()
    # A target out of range makes the loss NaN, because it is part of every proxy's loss.
    weight = one.expand(classes).masked_fill(outside.any(), torch.nan)
    labels = (torch.arange(classes, device=target.device), index)
    fold = Fold("proxy_anchor", (float(margin), float(alpha)), labels, scalars=(classes / present.clamp_min(1),))
    operands = autocast(proxies, embeddings)
    return fold_loss(fold_problem(operands, one, weight, fold, call, cosine=True), call, over=classes)[0]


def _of_short(proxies: Tensor, scale: Tensor) -> Tensor | None:
    """Returns `[C]`, the terms of -scale |e - p|^2 besides 2 scale e p, minus their value for unit rows: 0, except for
    zero proxies.

    None where nobody has to ask on a GPU, which would wait for the answer: there a bias costs a second sweep at most.
    """
    norm = torch.linalg.vector_norm(proxies.detach(), dim=1, dtype=scale.dtype)
    if checks.reads_values(norm) and not bool((norm < NORM_EPS).any()):
        return None
    return scale * (1 - (norm / NORM_EPS).clamp(max=1).square())


def _check(embeddings: Tensor, target: Tensor, proxies: Tensor, ignore_index: int | None) -> None:
    checks.embeddings(embeddings=embeddings, proxies=proxies)
    rows, classes = embeddings.shape[0], proxies.shape[0]
    checks.target("target", target, rows, classes, ignore_index, embeddings)
    if rows and not classes:
        raise ValueError("proxies must have at least one row, one per class, got none")
