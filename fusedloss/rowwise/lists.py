"""Losses of lists: the scores of a query's documents `[Q, n]`, and labels that say how relevant each is.

    pairwise   RankNet, LambdaLoss, ADR-MSE: n^2 pairs a query, visited in blocks, none of them kept
    listwise   ListNet, ListMLE, PListMLE: one pass over each row

The pairwise ones sort the documents by score first. With i ranked above j, `s_j - s_i` is never positive: exponentials
cannot overflow, every pair is met once, and what it adds to document i it takes from document j, so that a block's
gradient is its row sums less its column sums. A function here knows its gradient when it knows its value; what is saved
for backward is that gradient, in fp32: no pair's share underflows in 16 bits before upstream enlarges it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import select_rowwise
from ..problem import stats_dtype

LN2 = math.log(2)
LARGEST = 1e8  # scores are clamped to this: -inf ranks last and gives finite numbers
PADDING = -1e30  # the score and the label of a place without a document: below all others, and 0 times it is 0
BLOCK = {"cpu": 1 << 17, "cuda": 1 << 24}  # pairs or elements at once: five buffers of them stay in two cores' caches
ROWS = 32, 128  # of a block, at least and at most: the more, the more pairs below the diagonal are computed for nothing
ONE_BLOCK = 64  # up to so many documents a block has all of them

Weighting = str | Callable[[Tensor, Tensor, Tensor], Tensor] | None
RankWeight = str | Callable[[Tensor], Tensor] | None


# Value and gradient ---------------------------------------------------------------------------------------------------


class _Known(torch.autograd.Function):
    """`loss`, whose gradient by the scores was found beside it."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = scores.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("this backend has no second derivatives (create_graph=True): use backend='reference'")
        (gradient,) = ctx.saved_tensors
        return (gradient * (upstream if upstream.dim() == 0 else upstream[:, None])).to(ctx.dtype), None, None


def _reduced(
    scores: Tensor,
    sums: Tensor,
    gradient: Tensor | None,
    reduction: str,
    count: Tensor | int,
    *,
    unit: float = 1.0,
    scale: float = 1.0,
) -> Tensor:
    """Sums of queries as what was asked for, in `unit`s. gradient: of their sum by `scale * scores`, or None."""
    over: Tensor | float = unit
    if reduction == "mean":
        count = count.clamp(min=1).to(sums.dtype) if isinstance(count, Tensor) else max(count, 1)
        over = unit * count
    loss = (sums if reduction == "none" else sums.sum()) / over
    if gradient is None:
        return loss
    return _Known.apply(scores, loss, gradient.mul_(scale / over))


def _wants_gradient(scores: Tensor) -> bool:
    return torch.is_grad_enabled() and scores.requires_grad


def _row_blocks(Q: int, n: int, device: torch.device) -> Iterator[slice]:
    rows = max(1, BLOCK.get(device.type, BLOCK["cuda"]) // max(n, 1))
    for start in range(0, Q, rows):
        yield slice(start, min(start + rows, Q))


# Documents by score ---------------------------------------------------------------------------------------------------


class Ranked(NamedTuple):
    """Every query's documents, the highest score first (equal ones as they came) and padding last."""

    score: Tensor  # [Q, n], times the scale
    label: Tensor  # [Q, n]
    order: Tensor  # int64 [Q, n]: their places in the input
    length: Tensor | int  # [Q], documents of each query


def ranked(scores: Tensor, labels: Tensor, mask: Tensor | None, scale: float) -> Ranked:
    dtype = stats_dtype(scores.dtype)
    labels = labels.to(dtype)
    # 0 times a label: one that is NaN or infinite makes the query's loss NaN.
    z = torch.add(scores.to(dtype).clamp(-LARGEST, LARGEST), labels, alpha=0)
    if mask is not None:
        z, labels = z.where(mask, PADDING), labels.where(mask, PADDING)
    z, order = z.sort(dim=1, descending=True, stable=True)
    length = z.shape[1] if mask is None else mask.sum(1)
    return Ranked(z if scale == 1 else z * scale, labels.gather(1, order), order, length)


def _in_input_order(by_rank: Tensor, order: Tensor, left_out: Tensor) -> Tensor:
    return torch.empty_like(by_rank).scatter_(1, order, by_rank).masked_fill_(left_out, 0)


def _left_out(scores: Tensor, mask: Tensor | None) -> Tensor:
    """What has no gradient: padding, and scores that were clamped."""
    clamped = scores.abs() > LARGEST
    return clamped if mask is None else clamped.logical_or_(~mask)


def _pairs(z: Tensor, top: int, buffers: int) -> Iterator[tuple[slice, slice, slice, list[Tensor]]]:
    """(queries, rows, columns, workspace): blocks that hold every pair i < j, i among the `top`, once.

    The workspace's first buffer holds z_j - z_i, [queries, rows, columns]; the others are free. Columns begin with the
    rows themselves: that square is meaningful above its diagonal, and 0 or below elsewhere.
    """
    Q, n = z.shape
    block = BLOCK.get(z.device.type, BLOCK["cuda"])
    height = n if n <= ONE_BLOCK else min(n, max(ROWS[0], min(ROWS[1], block // max(Q * n, 1))))
    batch = max(1, block // max(height * n, 1))
    room = z.new_empty(buffers, min(batch, Q) * min(height, top) * n)
    for start in range(0, top, height):
        rows, columns = slice(start, min(start + height, top)), slice(start, n)
        for first in range(0, Q, batch):
            queries = slice(first, min(first + batch, Q))
            shape = queries.stop - queries.start, rows.stop - start, n - start
            workspace = [flat[: math.prod(shape)].view(shape) for flat in room]
            below = torch.sub(z[queries, None, columns], z[queries, rows, None], out=workspace[0])
            below[..., : shape[1]].clamp_(max=0)
            yield queries, rows, columns, workspace


def _keep_upper(*blocks: Tensor) -> None:
    """Of the square that rows and columns share, only i < j counts."""
    for block in blocks:
        block[..., : block.shape[1]].triu_(1)


# RankNet and LambdaLoss -----------------------------------------------------------------------------------------------


class Tables(NamedTuple):
    """Of positions alone, fp64: neighbours' differences would cancel in fp32, by 3e-4 at the thousandth place."""

    inverse: Tensor  # [n]: 1 / log2(1 + position)
    delta: Tensor  # [n]: between distance d and d + 1, at d; 0 at 0


def tables(n: int, device: torch.device) -> Tables:
    inverse = torch.arange(2, n + 2, dtype=torch.float64, device=device).log2_().reciprocal_()
    return Tables(inverse, torch.cat([inverse.new_zeros(1), inverse[:-1] - inverse[1:]]))


def _unequal(labels: Tensor, length: Tensor | int) -> tuple[Tensor, Tensor]:
    """int64 [Q]: how many pairs of documents have different labels; and the labels in ascending order."""
    ascending = labels.sort(1).values
    lower = torch.searchsorted(ascending, ascending).sum(1)
    return lower - length * (labels.shape[1] - length), ascending  # padding is lower than all


def _gains(by_rank: Ranked, k: int, eps: float, ascending: Tensor, table: Tables) -> Tensor:
    """[Q, n]: (2^label - 1) / max(DCG@k of the best order, eps), negative labels as 0."""
    inverse = table.inverse[:k].to(ascending.dtype)
    best = torch.expm1(ascending[:, ascending.shape[1] - k :].clamp(min=0) * LN2)
    ideal = (best * inverse.flip(0)).sum(1).clamp(min=eps)
    return torch.expm1(by_rank.label.clamp(min=0) * LN2) / ideal[:, None]


def _selected(by_rank: Ranked, weighting: Weighting, k: int) -> tuple[Tensor, Tensor]:
    """int64 [Q]: the ordered pairs that count; and the labels in ascending order."""
    n = by_rank.label.shape[1]
    count, ascending = _unequal(by_rank.label, by_rank.length)
    if k < n:  # less those outside the top
        rest = by_rank.length - k
        rest = rest.clamp(min=0) if isinstance(rest, Tensor) else rest
        count = count - _unequal(by_rank.label[:, k:].contiguous(), rest)[0]
    if weighting == "ndcg_loss1":  # every two documents, and each with itself
        length = torch.as_tensor(by_rank.length, device=count.device).expand_as(count)
        count = length**2 - (length - k).clamp(min=0) ** 2
    return count, ascending


def _expanded(weighting: Callable[..., Tensor], by_rank: Ranked, gain: Tensor, table: Tables) -> Tensor:
    """What a user's function gives, `[Q, n, n]`; it is called as sentence-transformers calls its schemes."""
    Q, n = gain.shape
    discount = table.inverse.reciprocal()[None].to(gain.dtype)
    with torch.enable_grad():
        weight = weighting(gain, discount, by_rank.label.clamp(min=0))
    if not isinstance(weight, Tensor):
        raise TypeError(f"weighting returned a {type(weight).__name__}: needs a tensor")
    try:
        return weight.to(gain.dtype).expand(Q, n, n)
    except RuntimeError:
        raise ValueError(
            f"weighting returned the shape {list(weight.shape)}: needs one that broadcasts to {[Q, n, n]}"
        ) from None


def lambda_loss(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    *,
    weighting: Weighting,
    k: int | None,
    sigma: float,
    eps: float,
    mu: float,
    unit: float,
    reduction: str,
    backend: str,
) -> Tensor:
    """`-sum w_ij log sigmoid(sigma (s_i - s_j))` over the pairs that count, / their number under "mean"."""
    reason = "a function as weighting gives weights that no kernel knows" if callable(weighting) else None
    name = select_rowwise(backend, scores, unsupported=reason)
    top = min(k or scores.shape[1], scores.shape[1])
    if name == "reference" or torch.compiler.is_compiling() or labels.requires_grad or _trains(weighting):
        by_rank = ranked(scores, labels, mask, sigma)
        count, ascending = _selected(by_rank, weighting, top)
        sums = _lambda_formula(by_rank, weighting, top, eps, mu, ascending).masked_fill(count == 0, 0)
        return _reduced(scores, sums, None, reduction, count.sum(), unit=unit)
    wanted = _wants_gradient(scores)
    with torch.no_grad():
        by_rank = ranked(scores, labels, mask, sigma)
        count, ascending = _selected(by_rank, weighting, top)
        lambdas = _lambda_kernel if name == "triton" else _lambdas
        found = lambdas(by_rank, weighting, top, eps, mu, ascending, gradient=wanted)
        # Where no pair counts, gains that overflowed (inf / inf) do not, either.
        none = count == 0
        sums = found.loss.masked_fill_(none, 0)
        gradient = None
        if found.gradient is not None:
            gradient = _in_input_order(found.gradient, by_rank.order, _left_out(scores, mask) | none[:, None])
    return _reduced(scores, sums, gradient, reduction, count.sum(), unit=unit, scale=sigma)


def lambda_gradients(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    *,
    weighting: Weighting,
    k: int | None,
    sigma: float,
    eps: float,
    mu: float,
) -> tuple[Tensor, Tensor]:
    """Of the sum of pair losses, first and second derivatives by each score, weights held fixed."""
    with torch.no_grad():
        top = min(k or scores.shape[1], scores.shape[1])
        by_rank = ranked(scores, labels, mask, sigma)
        count, ascending = _selected(by_rank, weighting, top)
        found = _lambdas(by_rank, weighting, top, eps, mu, ascending, gradient=True, curvature=True)
        assert found.gradient is not None and found.curvature is not None
        left_out = _left_out(scores, mask) | (count == 0)[:, None]
        gradient, curvature = (_in_input_order(t, by_rank.order, left_out) for t in (found.gradient, found.curvature))
        return gradient.mul_(sigma), curvature.mul_(sigma * sigma)


def _trains(weighting: Any) -> bool:
    return isinstance(weighting, nn.Module) and any(p.requires_grad for p in weighting.parameters())


def _lambda_formula(
    by_rank: Ranked, weighting: Weighting, top: int, eps: float, mu: float, ascending: Tensor
) -> Tensor:
    z, y = by_rank.score, by_rank.label
    n = z.shape[1]
    place = torch.arange(n, device=z.device)
    length = torch.as_tensor(by_rank.length, device=z.device).reshape(-1, 1)
    real = place < length
    counts = real[:, :, None] & real[:, None, :] & ((place < top)[:, None] | (place < top))
    if weighting != "ndcg_loss1":
        counts = counts & ~(y[:, :, None] <= y[:, None, :])
    weight: Tensor | float = 1.0
    if weighting is not None:
        table = tables(n, z.device)
        gain = _gains(by_rank, top, eps, ascending, table)
        inverse, delta = (t.to(z.dtype) for t in table)
        far = (table.inverse[:, None] - table.inverse).abs().to(z.dtype)
        near = delta[(place[:, None] - place).abs()]
        apart = (gain[:, :, None] - gain[:, None, :]).abs()
        if callable(weighting):
            weight = _expanded(weighting, by_rank, gain, table)
        elif weighting == "ndcg_loss1":
            weight = (gain * inverse)[:, :, None]
        else:
            weight = apart * {"ndcg_loss2": near, "lambda_rank": far, "ndcg_loss2pp": mu * near + far}[weighting]
    losses = -weight * nn.functional.logsigmoid(z[:, :, None] - z[:, None, :])
    return losses.where(counts, 0).sum((1, 2)) + (z * 0).sum(1)  # a NaN shows, even of a document without a pair


class Lambdas(NamedTuple):
    loss: Tensor  # [Q]: the sum of the query's pairs
    gradient: Tensor | None  # [Q, n], in ranked order, by sigma * score
    curvature: Tensor | None = None


def _lambdas(
    by_rank: Ranked,
    weighting: Weighting,
    top: int,
    eps: float,
    mu: float,
    ascending: Tensor,
    *,
    gradient: bool,
    curvature: bool = False,
) -> Lambdas:
    z = by_rank.score
    (Q, n), device = z.shape, z.device
    table = tables(n, device) if weighting is not None else None
    gain = by_rank.label if table is None else _gains(by_rank, top, eps, ascending, table)
    found = Lambdas(z.new_zeros(Q), *(torch.zeros_like(z) if wanted else None for wanted in (gradient, curvature)))
    if not callable(weighting):
        if weighting == "ndcg_loss1":
            assert table is not None
            # A document with itself: log 2, and no gradient.
            gain = gain * table.inverse.to(z.dtype)
            found.loss.add_(gain[:, :top].sum(1), alpha=LN2)
        _walk(z, top, _weigher(weighting, gain, table, mu), found)
        return found
    assert table is not None
    # A user's weights are as many as the pairs: those of a few queries at once.
    for queries in _row_blocks(Q, n * n, device):
        few = by_rank._replace(score=z[queries], label=by_rank.label[queries])
        weight = _expanded(weighting, few, gain[queries], table)
        if weight.requires_grad:
            raise RuntimeError("weighting returned a tensor that requires grad: use backend='reference', or detach it")
        parts = Lambdas(*(t if t is None else t[queries] for t in found))
        _walk(few.score, top, _weigher(weight, few.label, None, mu), parts)
    return found


Weigher = Callable[[slice, slice, slice, Tensor, Tensor], None]


def _weigher(weighting: str | Tensor | None, value: Tensor, table: Tables | None, mu: float) -> Weigher:
    """Writes a block's `weight`, w_ij + w_ji (one of them is 0 but for ndcg_loss1), and `wrong`: -w_ji, j the better.

    value: gains, gain / discount for ndcg_loss1, labels for None or given weights.
    """
    positions: list[Tensor] = []  # of the present rows and columns, the same for all queries

    def weigh(queries: slice, rows: slice, columns: slice, weight: Tensor, wrong: Tensor) -> None:
        upper, lower = value[queries, rows, None], value[queries, None, columns]
        if isinstance(weighting, Tensor):
            given = weighting[queries, columns, rows].transpose(1, 2).where(upper < lower, 0)
            torch.add(given, weighting[queries, rows, columns].where(upper > lower, 0), out=weight)
            torch.neg(given, out=wrong)
            return
        if weighting == "ndcg_loss1":
            torch.add(upper, lower, out=weight)
            wrong.copy_(lower).neg_()
            return
        torch.sub(upper, lower, out=wrong)
        if table is None:
            wrong.sign_()
        torch.abs(wrong, out=weight)
        wrong.clamp_(max=0)
        if table is not None:
            if queries.start == 0:
                positions[:] = [_by_position(str(weighting), table, mu, rows, columns).to(value.dtype)]
            weight.mul_(positions[0])
            wrong.mul_(positions[0])

    return weigh


def _by_position(weighting: str, table: Tables, mu: float, rows: slice, columns: slice) -> Tensor:
    """fp64 [rows, columns]: what multiplies |gain_i - gain_j|; anything where j <= i."""
    inverse, delta = table
    total = inverse.new_zeros(())
    if weighting != "lambda_rank":
        height, width = rows.stop - rows.start, columns.stop - columns.start
        shifted = torch.cat([delta.new_zeros(height - 1), delta[:width]])
        total = shifted.unfold(0, width, 1).flip(0)  # delta[j - i]
    if weighting == "ndcg_loss2":
        return total
    return torch.sub(inverse[rows, None], inverse[columns]).add_(total, alpha=mu)


def _walk(z: Tensor, top: int, weigh: Weigher, found: Lambdas) -> None:
    """Adds every pair to what is wanted. Padding adds nothing: it is the worst, and infinitely far below."""
    for queries, rows, columns, (below, weight, wrong, loss, room) in _pairs(z, top, 5):
        weigh(queries, rows, columns, weight, wrong)
        _keep_upper(weight, wrong)
        # i is above j. If it should be: log(1 + exp(z_j - z_i)), and if not: that plus z_i - z_j.
        torch.mul(wrong, below, out=loss)
        share = below.sigmoid_()  # at most 1/2
        loss.addcmul_(weight, torch.neg(share, out=room).log1p_(), value=-1)
        found.loss[queries] += loss.sum((1, 2))
        if found.curvature is not None:
            torch.addcmul(share, share, share, value=-1, out=room).mul_(weight)
            found.curvature[queries, rows] += room.sum(2)
            found.curvature[queries, columns] += room.sum(1)
        if found.gradient is not None:
            pull = wrong.addcmul_(weight, share)
            found.gradient[queries, rows] -= pull.sum(2)
            found.gradient[queries, columns] += pull.sum(1)


def _lambda_kernel(
    by_rank: Ranked, weighting: Any, top: int, eps: float, mu: float, ascending: Tensor, *, gradient: bool
) -> Lambdas:
    from ..backends import triton_lists

    z = by_rank.score
    table = tables(z.shape[1], z.device)
    value = by_rank.label if weighting is None else _gains(by_rank, top, eps, ascending, table)
    if weighting == "ndcg_loss1":
        value = value * table.inverse.to(z.dtype)
    length = by_rank.length if isinstance(by_rank.length, Tensor) else None
    delta = table.delta if weighting == "ndcg_loss2" else table.delta * mu
    return Lambdas(*triton_lists.lambdas(z, value, length, weighting, top, table.inverse, delta, gradient=gradient))


# ADR-MSE --------------------------------------------------------------------------------------------------------------


def adr_mse(
    scores: Tensor, labels: Tensor, mask: Tensor | None, *, alpha: float, reduction: str, backend: str
) -> Tensor:
    """(true rank - soft rank)^2 / log2(1 + true rank), soft rank 1 + sum_j sigmoid(alpha (s_j - s_i))."""
    name = select_rowwise(backend, scores)
    count = scores.numel() if mask is None else mask.sum()
    if name == "reference" or torch.compiler.is_compiling() or labels.requires_grad:
        sums = _adr_formula(ranked(scores, labels, mask, alpha))
        return _reduced(scores, sums, None, reduction, count)
    wanted = _wants_gradient(scores)
    with torch.no_grad():
        if name == "triton":
            from ..backends import triton_lists

            sums, gradient = triton_lists.adr(scores, labels, mask, alpha, LARGEST, gradient=wanted)
        else:
            by_rank = ranked(scores, labels, mask, alpha)
            sums, gradient = _adr(by_rank, gradient=wanted)
            if gradient is not None:
                gradient = _in_input_order(gradient, by_rank.order, _left_out(scores, mask))
    return _reduced(scores, sums, gradient, reduction, count, scale=alpha)


def _true_ranks(labels: Tensor) -> Tensor:
    """From 1, the highest label first; equal ones share the mean of their places. Padding is below all."""
    ascending = labels.sort(1).values
    lower = torch.searchsorted(ascending, labels) + torch.searchsorted(ascending, labels, right=True)
    return (labels.shape[1] + 0.5) - lower.to(labels.dtype) / 2


def _adr_rows(by_rank: Ranked, soft: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(soft - true rank, 0 for padding; 1 / log2(1 + true rank); sums over documents)"""
    true = _true_ranks(by_rank.label)
    error = soft - true
    if isinstance(by_rank.length, Tensor):
        padding = torch.arange(soft.shape[1], device=soft.device) >= by_rank.length[:, None]
        error = error.masked_fill(padding, 0)
    discount = (true + 1).log2_().reciprocal_()
    return error, discount, (error.square() * discount).sum(1)


def _adr_formula(by_rank: Ranked) -> Tensor:
    z = by_rank.score
    above = (z[:, None, :] - z[:, :, None]).sigmoid()
    return _adr_rows(by_rank, 0.5 + above.sum(2))[2]  # with itself: 1/2


def _adr(by_rank: Ranked, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
    z = by_rank.score
    n = z.shape[1]
    # The soft rank is the place, plus what leaks up from below, less what leaks down.
    soft = torch.arange(1, n + 1, device=z.device) + z * 0
    for queries, rows, columns, (below,) in _pairs(z, n, 1):
        share = below.sigmoid_()
        _keep_upper(share)
        soft[queries, rows] += share.sum(2)
        soft[queries, columns] -= share.sum(1)
    error, discount, sums = _adr_rows(by_rank, soft)
    if not gradient:
        return sums, None
    by_soft = error.mul_(discount).mul_(2)
    by_score = torch.zeros_like(z)
    for queries, rows, columns, (below, slope) in _pairs(z, n, 2):
        share = below.sigmoid_()
        torch.addcmul(share, share, share, value=-1, out=slope)
        pull = slope.mul_(torch.sub(by_soft[queries, None, columns], by_soft[queries, rows, None], out=below))
        _keep_upper(pull)
        by_score[queries, rows] += pull.sum(2)
        by_score[queries, columns] -= pull.sum(1)
    return sums, by_score


# ListNet --------------------------------------------------------------------------------------------------------------


def list_net(scores: Tensor, labels: Tensor, mask: Tensor | None, *, reduction: str, backend: str) -> Tensor:
    """Cross-entropy of softmax(scores) from softmax(labels), a query a row; 0 for one without documents."""
    name = select_rowwise(backend, scores)
    Q, n = scores.shape
    dtype = stats_dtype(scores.dtype)
    if name == "reference" or torch.compiler.is_compiling() or labels.requires_grad:
        sums = _list_net_terms(scores.to(dtype), labels.to(dtype), mask)[0]
        return _reduced(scores, sums, None, reduction, Q)
    wanted = _wants_gradient(scores)
    with torch.no_grad():
        if name == "triton":
            from ..backends import triton_lists

            sums, gradient = triton_lists.list_net(scores, labels, mask, gradient=wanted)
        else:
            sums = torch.empty(Q, dtype=dtype, device=scores.device)
            gradient = sums.new_empty(Q, n) if wanted else None
            for rows in _row_blocks(Q, n, scores.device):
                part = None if mask is None else mask[rows]
                sums[rows], log_share, target = _list_net_terms(scores[rows].to(dtype), labels[rows].to(dtype), part)
                if gradient is not None:
                    torch.sub(log_share.exp_(), target, out=gradient[rows])
    return _reduced(scores, sums, gradient, reduction, Q)


def _list_net_terms(z: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if mask is not None:
        z, y = z.where(mask, PADDING), y.where(mask, PADDING)
    log_share, target = z.log_softmax(1), y.softmax(1)
    sums = -(target * log_share).sum(1)
    return (sums if mask is None else sums.where(mask.any(1), 0)), log_share, target


# ListMLE --------------------------------------------------------------------------------------------------------------


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
    """`sum_i w_i (logsumexp_{j >= i} s_j - s_i)`, in the input's order or the labels'."""
    Q, n = scores.shape
    name = select_rowwise(backend, scores)
    if name == "triton" and n > 4096:
        name = select_rowwise(backend, scores, unsupported=f"a list of {n} documents is longer than 4096")
    order = None if respect_input_order else _by_label(labels, mask, stats_dtype(scores.dtype))
    listed = mask if mask is None or order is None else mask.gather(1, order)
    weight = _rank_weights(lambda_weight, listed, scores)
    if name == "reference" or torch.compiler.is_compiling() or (weight is not None and weight.requires_grad):
        z = _listed(scores, labels, mask, order)
        sums = _list_mle_formula(z, weight)
        return _reduced(scores, sums, None, reduction, Q)
    wanted = _wants_gradient(scores)
    with torch.no_grad():
        z = _listed(scores, labels, mask, order)
        if name == "triton":
            from ..backends import triton_lists

            sums, gradient = triton_lists.list_mle(z, weight, gradient=wanted)
        else:
            sums, gradient = _list_mle(z, weight, gradient=wanted, signed=callable(lambda_weight))
        if gradient is not None and order is not None:
            gradient = torch.empty_like(gradient).scatter_(1, order, gradient)
    return _reduced(scores, sums, gradient, reduction, Q)


def _by_label(labels: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The highest first, padding last."""
    labels = labels.detach().to(dtype)
    if mask is not None:
        labels = labels.where(mask, PADDING)
    return labels.sort(dim=1, descending=True, stable=True).indices


def _listed(scores: Tensor, labels: Tensor, mask: Tensor | None, order: Tensor | None) -> Tensor:
    """Scores in the list's order; padding at PADDING."""
    z = scores.to(stats_dtype(scores.dtype))
    if order is not None:
        z = torch.add(z, labels.detach(), alpha=0).to(z.dtype)  # a label that is NaN shows
    if mask is not None:
        z = z.where(mask, PADDING)
    return z if order is None else z.gather(1, order)


def _rank_weights(lambda_weight: RankWeight, mask: Tensor | None, scores: Tensor) -> Tensor | None:
    """[Q, n] or [1, n], 0 for padding, in the list's order; None: all are 1."""
    dtype = stats_dtype(scores.dtype)
    Q, n = scores.shape
    if lambda_weight is None:
        return None if mask is None else mask.to(dtype)
    if callable(lambda_weight):
        whole = torch.ones(Q, n, dtype=torch.bool, device=scores.device) if mask is None else mask
        weight = lambda_weight(whole)
        if not isinstance(weight, Tensor) or weight.shape != (Q, n):
            got = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise ValueError(f"lambda_weight returned {got}: needs a tensor {[Q, n]}")
        weight = weight.to(dtype)
    else:
        if mask is None:
            rank = torch.arange(1, n + 1, dtype=dtype, device=scores.device)[None]
            length = rank[:, -1:]
        else:
            rank = mask.cumsum(1)
            length = rank[:, -1:]
        # 2^(n - rank) - 1; of more than 127 documents divided by 2^(n - 127), so that the sum stays finite.
        excess = (length - 127).clamp(min=0)
        weight = torch.exp2((length - rank - excess).to(dtype)) - torch.exp2(-excess.to(dtype))
    if mask is not None:
        weight = weight.where(mask, 0)
    return weight / (weight.sum(1, keepdim=True) + 1e-10)


def _suffix_lse(z: Tensor) -> Tensor:
    return z.flip(1).logcumsumexp(1).flip(1)


def _list_mle_formula(z: Tensor, weight: Tensor | None) -> Tensor:
    terms = _suffix_lse(z) - z
    return (terms if weight is None else terms * weight).sum(1)


def _list_mle(z: Tensor, weight: Tensor | None, *, gradient: bool, signed: bool) -> tuple[Tensor, Tensor | None]:
    Q, n = z.shape
    sums = z.new_empty(Q)
    by_score = torch.empty_like(z) if gradient else None
    for rows in _row_blocks(Q, n, z.device):
        part, lse = z[rows], _suffix_lse(z[rows])
        w = None if weight is None else weight if weight.shape[0] == 1 else weight[rows]
        terms = lse - part
        sums[rows] = (terms if w is None else terms.mul_(w)).sum(1)
        if by_score is not None:
            # sum_{i <= k} w_i exp(s_k - lse_i) - w_k, in logarithms
            if w is None:
                torch.sub(_chosen(part, -lse), 1, out=by_score[rows])
                continue
            out = torch.sub(_chosen(part, w.clamp(min=0).log_() - lse), w, out=by_score[rows])
            if signed:
                out -= _chosen(part, (-w).clamp_(min=0).log_() - lse)
    return sums, by_score


def _chosen(z: Tensor, log_weight: Tensor) -> Tensor:
    return log_weight.logcumsumexp(1).add_(z).exp_()
