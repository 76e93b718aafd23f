"""ListNet, ListMLE and PListMLE: one pass over each list."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...backends import few, select_rowwise
from ...core import checks
from ...core.numerics import stats_dtype
from .. import classes
from .common import PADDING, reduced, row_blocks, wants_gradient

RankWeight = str | Callable[[Tensor], Tensor] | None


def list_net(scores: Tensor, labels: Tensor, mask: Tensor | None, *, reduction: str, backend: str) -> Tensor:
    """Computes the cross-entropy of softmax(scores) from softmax(labels), one query a row; 0 without documents."""
    if mask is None and few(backend, scores, "lists"):
        dtype = stats_dtype(scores.dtype)
        z, y = (x if x.dtype is dtype else x.to(dtype) for x in (scores, labels))
        return checks.OPERATORS.cross_entropy_loss(z, y.softmax(1), None, checks.CODES[reduction], -100, 0.0)
    name = select_rowwise(backend, scores, "classes")
    Q = scores.shape[0]
    if name == "reference" or torch.compiler.is_compiling() or labels.requires_grad:
        sums = _list_net_terms(scores, labels, mask)[0]
        return reduced(scores, sums, None, reduction, Q, unit=-1)
    if name == "triton":
        return reduced(scores, classes.soft_cross_entropy_rows(scores, labels, mask, name), None, reduction, Q)
    checks.untransformed(name)
    wanted = wants_gradient(scores)
    with torch.no_grad():
        sums, gradient = _list_net(scores, labels, mask, gradient=wanted)
    return reduced(scores, sums, gradient, reduction, Q, unit=-1, scale=-1)


def _list_net_terms(scores: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    dtype = stats_dtype(scores.dtype)
    z, y = scores.to(dtype), labels.to(dtype)
    if mask is not None:
        z, y = z.where(mask, PADDING), y.where(mask, PADDING)
    log_share, target = z.log_softmax(1), y.softmax(1)
    sums = (target * log_share).sum(1)
    return (sums if mask is None else sums.where(mask.any(1), 0)), log_share, target


def _list_net(scores: Tensor, labels: Tensor, mask: Tensor | None, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
    Q, n = scores.shape
    sums = torch.empty(Q, dtype=stats_dtype(scores.dtype), device=scores.device)
    by_score = sums.new_empty(Q, n) if gradient else None
    for rows in row_blocks(Q, n, scores.device):
        part = None if mask is None else mask[rows]
        sums[rows], log_share, target = _list_net_terms(scores[rows], labels[rows], part)
        if by_score is not None:
            torch.sub(log_share.exp_(), target, out=by_score[rows])
            if part is not None:  # in a row without documents both are 1 / n, rounded
                by_score[rows].masked_fill_(~part, 0)
    return sums, by_score


def list_mle(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    *,
    lambda_weight: RankWeight,
    respect_input_order: bool,
    reduction: str,
    backend: str,
) -> Tensor:
    """Computes `sum_i w_i (logsumexp_{j >= i} s_j - s_i)`, in the input's order or the labels'."""
    Q, n = scores.shape
    name = select_rowwise(backend, scores, "lists")
    if name == "triton" and n > 4096:
        name = select_rowwise(backend, scores, "lists", unsupported="its lists have more than 4096 documents")
    order = None if respect_input_order else _by_label(labels, mask, stats_dtype(scores.dtype))
    listed = mask if mask is None or order is None else mask.gather(1, order)
    weight = _rank_weights(lambda_weight, listed, scores)
    if name == "reference" or torch.compiler.is_compiling() or (weight is not None and weight.requires_grad):
        sums = _list_mle_formula(_listed(scores, labels, mask, order), weight)
        return reduced(scores, sums, None, reduction, Q)
    checks.untransformed(name)
    wanted = wants_gradient(scores)
    with torch.no_grad():
        z = _listed(scores, labels, mask, order)
        if name == "triton":
            from ...backends.triton import lists as triton_lists

            weight = None if weight is None else weight.to(z.dtype)
            sums, gradient = triton_lists.list_mle(z, weight, gradient=wanted)
        else:
            sums, gradient = _list_mle(z, weight, gradient=wanted, signed=callable(lambda_weight))
        if gradient is not None and order is not None:
            gradient = torch.empty_like(gradient).scatter_(1, order, gradient)
    return reduced(scores, sums, gradient, reduction, Q)


def _by_label(labels: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns the order of the labels, the highest first, padding last."""
    labels = labels.detach().to(dtype)
    if mask is not None:
        labels = labels.where(mask, PADDING)
    return labels.sort(dim=1, descending=True, stable=True).indices


def _listed(scores: Tensor, labels: Tensor, mask: Tensor | None, order: Tensor | None) -> Tensor:
    """Returns the scores in the list's order; padding is PADDING."""
    z = scores.to(stats_dtype(scores.dtype))
    if order is not None:
        z = torch.add(z, labels.detach(), alpha=0).to(z.dtype)  # a NaN label makes the loss NaN
    if mask is not None:
        z = z.where(mask, PADDING)
    return z if order is None else z.gather(1, order)


def _rank_weights(lambda_weight: RankWeight, mask: Tensor | None, scores: Tensor) -> Tensor | None:
    """Returns weights [Q, n] or [1, n] in the list's order, 0 for padding, normalised in fp64; None: all are 1."""
    dtype = torch.float64
    Q, n = scores.shape
    if lambda_weight is None:
        return None if mask is None else mask.to(stats_dtype(scores.dtype))
    if callable(lambda_weight):
        whole = torch.ones(Q, n, dtype=torch.bool, device=scores.device) if mask is None else mask
        weight = lambda_weight(whole)
        if not isinstance(weight, Tensor) or weight.shape != (Q, n):
            got = f"shape {list(weight.shape)}" if isinstance(weight, Tensor) else checks.a(weight)
            raise ValueError(f"lambda_weight must return a tensor {[Q, n]}, got {got}")
        weight = weight.to(dtype)
    else:
        if mask is None:
            rank = torch.arange(1, n + 1, dtype=dtype, device=scores.device)[None]
            length = rank[:, -1:]
        else:
            rank = mask.cumsum(1)
            length = rank[:, -1:]
        # 2^(n - rank) - 1; divided by 2^(n - 127) for more than 127 documents, so that the sum stays finite.
        excess = (length - 127).clamp(min=0)
        weight = torch.exp2((length - rank - excess).to(dtype)) - torch.exp2(-excess.to(dtype))
    if mask is not None:
        weight = weight.where(mask, 0)
    return weight / (weight.sum(1, keepdim=True) + 1e-10)


def _suffix_lse(z: Tensor) -> Tensor:
    return z.flip(1).logcumsumexp(1).flip(1)


def _suffix_lse_twice_differentiable(z: Tensor) -> Tensor:
    """The same by doubling the reach, because the second derivative of logcumsumexp is NaN."""
    reach = 1
    while reach < z.shape[1]:
        later = nn.functional.pad(z[:, reach:], (0, reach), value=PADDING)
        difference = z - later
        soft = nn.functional.logsigmoid
        z = torch.where(
            difference > 0, z - soft(difference), later - soft(-difference)
        )  # from the larger: padding loses all digits
        reach *= 2
    return z


def _list_mle_formula(z: Tensor, weight: Tensor | None) -> Tensor:
    """The formula in fp64: the rounding error of a log-probability is proportional to the scores."""
    wide = z.double()
    # A compiler does not need the doubling: compiled code is not differentiated twice.
    suffix_lse = _suffix_lse if torch.compiler.is_compiling() else _suffix_lse_twice_differentiable
    terms = suffix_lse(wide) - wide
    return (terms if weight is None else terms * weight).sum(1)


def _list_mle(z: Tensor, weight: Tensor | None, *, gradient: bool, signed: bool) -> tuple[Tensor, Tensor | None]:
    """Computes loss and gradient in fp64, too; a scan takes as long in fp32."""
    Q, n = z.shape
    sums = z.new_empty(Q, dtype=torch.float64)
    by_score = torch.empty_like(z) if gradient else None
    for rows in row_blocks(Q, n, z.device):
        part = z[rows].double()
        lse = _suffix_lse(part)
        w = None if weight is None else weight if weight.shape[0] == 1 else weight[rows]
        terms = lse - part
        sums[rows] = (terms if w is None else terms.mul_(w)).sum(1)
        if by_score is not None:
            # sum_{i <= k} w_i exp(s_k - lse_i) - w_k, in logarithms
            if w is None:
                torch.sub(_chosen(part, lse.neg_()), 1, out=by_score[rows])
                continue
            torch.sub(_chosen(part, w.clamp(min=0).log_() - lse), w, out=by_score[rows])
            if signed:
                by_score[rows] -= _chosen(part, (-w).clamp_(min=0).log_() - lse)
    return sums, by_score


def _chosen(z: Tensor, log_weight: Tensor) -> Tensor:
    return log_weight.logcumsumexp(1).add_(z).exp_()
