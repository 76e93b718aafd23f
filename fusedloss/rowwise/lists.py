"""Losses of lists: the scores of a query's documents `[Q, n]`, and labels that say how relevant each is.

    pairwise   RankNet, LambdaLoss, ADR-MSE: n^2 pairs a query, visited in blocks, none of them kept
    listwise   ListNet, ListMLE, PListMLE: one pass over each row

The pairwise losses sort the documents by score first. With i ranked above j, `s_j - s_i` is never positive:
exponentials cannot overflow, every pair is visited once, and its gradient by document j is minus that by document i, so
a block's gradient is its row sums minus its column sums. Every function computes its gradient with its value. Only that
gradient is saved for backward, in fp32, so that no pair's share underflows in 16 bits before upstream enlarges it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import select_rowwise
from ..core import checks
from ..core.numerics import slices, stats_dtype
from . import classes
from .pointwise import once_only

LN2 = math.log(2)
LARGEST = 1e8  # scores are clamped to this: -inf ranks last and gives finite numbers
PADDING = -1e30  # the score and the label of a place without a document: below all others, and finite
BLOCK = {"cpu": 1 << 17, "cuda": 1 << 24}  # pairs or elements at once: five buffers of them stay in two cores' caches
ROWS = 32, 128  # of a block, least and most: larger blocks waste more pairs below the diagonal
ONE_BLOCK = 64  # documents of a query that always form one block

Weighting = str | Callable[[Tensor, Tensor, Tensor], Tensor] | None
RankWeight = str | Callable[[Tensor], Tensor] | None


# Value and gradient ---------------------------------------------------------------------------------------------------


class _Known(torch.autograd.Function):
    """`loss`, with a gradient by the scores that is already computed: `factor * gradient`."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, loss: Tensor, gradient: Tensor, factor: Tensor | float) -> Tensor:
        ctx.save_for_backward(gradient, *((factor,) if isinstance(factor, Tensor) else ()))
        ctx.dtype, ctx.factor = scores.dtype, None if isinstance(factor, Tensor) else factor
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        once_only()
        gradient, *factor = ctx.saved_tensors
        upstream = upstream * (factor[0] if factor else ctx.factor)
        return (gradient * (upstream if upstream.dim() == 0 else upstream[:, None])).to(ctx.dtype), None, None, None


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
    """Reduces the queries' sums, in `unit`s. gradient: of their sum by `scale * scores`, or None.

    In fp64, rounded once: three fp32 roundings of a mean exceed the error of the pairs, which averages out.
    """
    sums = sums.double()
    over: Tensor | float = unit
    if reduction == "mean":
        count = count.clamp(min=1).to(sums.dtype) if isinstance(count, Tensor) else max(count, 1)
        over = unit * count
    loss = ((sums if reduction == "none" else sums.sum()) / over).to(stats_dtype(scores.dtype))
    return loss if gradient is None else _Known.apply(scores, loss, gradient, scale / over)


def _wants_gradient(scores: Tensor) -> bool:
    return torch.is_grad_enabled() and scores.requires_grad


def _row_blocks(Q: int, n: int, device: torch.device) -> Iterator[slice]:
    rows = max(1, BLOCK.get(device.type, BLOCK["cuda"]) // max(n, 1))
    return slices(Q, rows)


# Pairs of documents ---------------------------------------------------------------------------------------------------


def _entered(scores: Tensor, labels: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Prepares the pairwise losses' inputs: fp32 or fp64, scores clamped and times the scale, padding marked."""
    dtype = stats_dtype(scores.dtype)
    y = labels.to(dtype)
    # Adds 0 times the label, so that a NaN or infinite label makes the query's loss NaN.
    z = torch.add(scores.to(dtype).clamp(-LARGEST, LARGEST), y, alpha=0)
    if mask is not None:
        z, y = z.where(mask, PADDING), y.where(mask, PADDING)
    return (z if scale == 1 else z * scale), y


def _left_out(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the places without a gradient: padding, and clamped scores."""
    clamped = scores.abs() > LARGEST
    return clamped if mask is None else clamped.logical_or_(~mask)


class Pairs(NamedTuple):
    """A block of pairs (i, j): i in `rows`, and j in `columns`, the rows and all documents after them."""

    queries: slice
    rows: slice
    columns: slice
    workspace: Sequence[Tensor]  # [queries, rows, columns] each
    whole: bool  # whether the block has all pairs

    def difference(self, x: Tensor, out: Tensor) -> Tensor:
        """x_j - x_i"""
        if self.whole:
            return torch.sub(x.unsqueeze(1), x.unsqueeze(2), out=out)  # takes a third of the time of slices
        return torch.sub(x[self.queries, None, self.columns], x[self.queries, self.rows, None], out=out)

    def square(self, block: Tensor) -> Tensor:
        return block[..., : block.shape[1]]

    def add_odd(self, total: Tensor, value: Tensor) -> None:
        """Adds value_ij to total_i and subtracts it from total_j. The square holds value_ji = -value_ij, too."""
        if self.whole:
            total.add_(value.sum(2))
            return
        total[self.queries, self.rows].add_(value.sum(2))
        if self.columns.stop > self.rows.stop:
            total[self.queries, self.rows.stop :].sub_(value[..., value.shape[1] :].sum(1))


def _pairs(z: Tensor, top: int, buffers: int) -> Iterator[Pairs]:
    """Yields blocks that together have every pair i < j with i among the `top`."""
    Q, n = z.shape
    block = BLOCK.get(z.device.type, BLOCK["cuda"])
    if n <= ONE_BLOCK and Q * n * n <= block:
        room = z.new_empty(buffers, Q, top, n)
        yield Pairs(slice(0, Q), slice(0, top), slice(0, n), room.unbind(), top == n)
        return
    height = n if n <= ONE_BLOCK else min(n, max(ROWS[0], min(ROWS[1], block // max(Q * n, 1))))
    batch = max(1, block // max(height * n, 1))
    room = z.new_empty(buffers, min(batch, Q) * min(height, top) * n)
    for rows in slices(top, height):
        start = rows.start
        for queries in slices(Q, batch):
            shape = queries.stop - queries.start, rows.stop - start, n - start
            workspace = [flat[: math.prod(shape)].view(shape) for flat in room]
            yield Pairs(queries, rows, slice(start, n), workspace, False)


# RankNet and LambdaLoss -----------------------------------------------------------------------------------------------


class Ranked(NamedTuple):
    """Every query's documents, the highest score first (equal ones in input order) and padding last."""

    score: Tensor  # [Q, n], times sigma
    label: Tensor  # [Q, n]
    order: Tensor  # int64 [Q, n]: their places in the input
    length: Tensor | int  # [Q], documents of each query


def ranked(scores: Tensor, labels: Tensor, mask: Tensor | None, sigma: float) -> Ranked:
    z, y = _entered(scores, labels, mask, sigma)
    z, order = z.sort(dim=1, descending=True, stable=True)
    return Ranked(z, y.gather(1, order), order, z.shape[1] if mask is None else mask.sum(1))


def _in_input_order(by_rank: Tensor, order: Tensor, left_out: Tensor) -> Tensor:
    return torch.empty_like(by_rank).scatter_(1, order, by_rank).masked_fill_(left_out, 0)


def _discounts(n: int, device: torch.device) -> Tensor:
    """Returns 1 / log2(1 + position) [n] in fp64: neighbours' differences cancel, in fp32 by 3e-4 at the thousandth."""
    return torch.arange(2, n + 2, dtype=torch.float64, device=device).log2_().reciprocal_()


def _unequal(labels: Tensor, length: Tensor | int) -> tuple[Tensor, Tensor]:
    """Returns the number of pairs with different labels, int64 [Q], and the labels in ascending order."""
    ascending = labels.sort(1).values
    lower = torch.searchsorted(ascending, ascending).sum(1)
    return lower - length * (labels.shape[1] - length), ascending  # padding is below all labels


def _gains(by_rank: Ranked, k: int, eps: float, ascending: Tensor, inverse: Tensor) -> Tensor:
    """Returns (2^label - 1) / max(DCG@k of the best order, eps) [Q, n], negative labels as 0; computed in fp64."""
    best = torch.expm1(ascending[:, ascending.shape[1] - k :].double().clamp(min=0) * LN2)
    ideal = (best * inverse[:k].flip(0)).sum(1).clamp(min=eps)
    gain = torch.expm1(by_rank.label.double().clamp(min=0) * LN2) / ideal[:, None]
    return gain.to(by_rank.label.dtype)


def _selected(by_rank: Ranked, weighting: Weighting, k: int) -> tuple[Tensor, Tensor]:
    """Returns the number of ordered pairs that count, int64 [Q], and the labels in ascending order."""
    n = by_rank.label.shape[1]
    count, ascending = _unequal(by_rank.label, by_rank.length)
    if k < n:  # minus those outside the top
        rest = by_rank.length - k
        rest = rest.clamp(min=0) if isinstance(rest, Tensor) else rest
        count = count - _unequal(by_rank.label[:, k:].contiguous(), rest)[0]
    if weighting == "ndcg_loss1":  # all pairs of documents, and each with itself
        length = by_rank.length if isinstance(by_rank.length, Tensor) else torch.full_like(count, by_rank.length)
        count = length**2 - (length - k).clamp(min=0) ** 2
    return count, ascending


def _expanded(weighting: Callable[..., Tensor], by_rank: Ranked, gain: Tensor, inverse: Tensor) -> Tensor:
    """Calls a user's function as sentence-transformers calls its schemes; returns weights `[Q, n, n]`."""
    Q, n = gain.shape
    discount = inverse.reciprocal()[None].to(gain.dtype)
    with torch.enable_grad():
        weight = weighting(gain, discount, by_rank.label.clamp(min=0))
    if not isinstance(weight, Tensor):
        raise TypeError(f"weighting must return a tensor, got {checks.a(weight)}")
    try:
        return weight.to(gain.dtype).expand(Q, n, n)
    except RuntimeError:
        raise ValueError(
            f"weighting must return a shape that broadcasts to {[Q, n, n]}, got {list(weight.shape)}"
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
    """Returns `-sum w_ij log sigmoid(sigma (s_i - s_j))` over the pairs that count, divided by their number under
    "mean"."""
    reason = "a function as weighting gives weights that no kernel knows" if callable(weighting) else None
    name = select_rowwise(backend, scores, "lists", unsupported=reason)
    top = min(k or scores.shape[1], scores.shape[1])
    if name == "reference" or torch.compiler.is_compiling() or labels.requires_grad or _trains(weighting):
        by_rank = ranked(scores, labels, mask, sigma)
        count, ascending = _selected(by_rank, weighting, top)
        sums = _lambda_formula(by_rank, weighting, top, eps, mu, ascending).masked_fill(count == 0, 0)
        return _reduced(scores, sums, None, reduction, count.sum(), unit=unit)
    checks.untransformed(name)
    wanted = _wants_gradient(scores)
    with torch.no_grad():
        by_rank = ranked(scores, labels, mask, sigma)
        count, ascending = _selected(by_rank, weighting, top)
        lambdas = _lambda_kernel if name == "triton" else _lambdas
        found = lambdas(by_rank, weighting, top, eps, mu, ascending, gradient=wanted)
        # If no pair counts, gains that overflowed (inf / inf) are ignored.
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
    """Returns first and second derivatives of the sum of pair losses by each score, with weights held fixed."""
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
    length = by_rank.length.reshape(-1, 1) if isinstance(by_rank.length, Tensor) else by_rank.length
    real = (place < length).reshape(-1, n)
    counts = real[:, :, None] & real[:, None, :] & ((place < top)[:, None] | (place < top))
    if weighting != "ndcg_loss1":
        counts = counts & ~(y[:, :, None] <= y[:, None, :])
    weight = z.new_ones(())
    if weighting is not None:
        inverse = _discounts(n, z.device)
        gain = _gains(by_rank, top, eps, ascending, inverse)
        delta = torch.cat([inverse.new_zeros(1), inverse[:-1] - inverse[1:]]).to(z.dtype)
        near = delta[(place[:, None] - place).abs()]
        far = (inverse[:, None] - inverse).abs().to(z.dtype)
        difference = (gain[:, :, None] - gain[:, None, :]).abs()
        if callable(weighting):
            weight = _expanded(weighting, by_rank, gain, inverse)
        elif weighting == "ndcg_loss1":
            weight = (gain * inverse.to(z.dtype))[:, :, None]
        else:
            weight = difference * {"ndcg_loss2": near, "lambda_rank": far, "ndcg_loss2pp": mu * near + far}[weighting]
    losses = nn.functional.logsigmoid(z[:, :, None] - z[:, None, :])
    return -(weight.where(counts, 0) * losses).sum((1, 2))


class Lambdas(NamedTuple):
    loss: Tensor  # fp64 [Q]: the sum over the query's pairs
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
    inverse = _discounts(n, device) if weighting is not None else None
    gain = by_rank.label if inverse is None else _gains(by_rank, top, eps, ascending, inverse)
    by_score = torch.zeros_like(z) if gradient else None
    found = Lambdas(z.new_zeros(Q, dtype=torch.float64), by_score, torch.zeros_like(z) if curvature else None)
    if not callable(weighting):
        if weighting == "ndcg_loss1":
            assert inverse is not None
            # The pair of a document with itself has loss log 2 and no gradient.
            gain = gain * inverse.to(z.dtype)
            found.loss.add_(gain[:, :top].sum(1), alpha=LN2)
        _walk(z, top, _weigher(weighting, gain, inverse, mu), found)
        return found
    assert inverse is not None
    # A user's weights are one per pair, so they are made for a few queries at a time.
    for queries in _row_blocks(Q, n * n, device):
        few = by_rank._replace(score=z[queries], label=by_rank.label[queries])
        weight = _expanded(weighting, few, gain[queries], inverse)
        if weight.requires_grad:
            raise RuntimeError(
                "weighting must return a tensor without a gradient, got one that requires grad; detach it, "
                "or pass backend='reference'"
            )
        part = Lambdas(found.loss[queries], *(None if t is None else t[queries] for t in found[1:]))
        _walk(few.score, top, _weigher(weight, few.label, None, mu), part)
    return found


Weigher = Callable[[slice, slice, slice, Tensor, Tensor], None]


def _weigher(weighting: str | Tensor | None, value: Tensor, inverse: Tensor | None, mu: float) -> Weigher:
    """Returns a function that writes a block's `weight`, w_ij + w_ji (one is 0 except for ndcg_loss1), and `wrong`,
    -w_ji.

    value: gains, gain / discount for ndcg_loss1, or labels for None and given weights.
    """
    positions: list[Tensor] = []  # of the current rows and columns, the same for all queries

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
        if inverse is None:
            wrong.sign_()
        torch.abs(wrong, out=weight)
        wrong.clamp_(max=0)
        if inverse is not None:
            if queries.start == 0:
                positions[:] = [_by_position(str(weighting), inverse, mu, rows, columns).to(value.dtype)]
            weight.mul_(positions[0])
            wrong.mul_(positions[0])

    return weigh


def _by_position(weighting: str, inverse: Tensor, mu: float, rows: slice, columns: slice) -> Tensor:
    """Returns the factor of |gain_i - gain_j|, fp64 [rows, columns]; undefined for j <= i."""
    far = torch.sub(inverse[rows, None], inverse[columns])
    if weighting == "lambda_rank":
        return far
    height, width = far.shape
    by_distance = torch.cat([inverse.new_zeros(height), inverse[: width - 1] - inverse[1:width]])
    near = by_distance.unfold(0, width, 1).flip(0)  # at j - i
    return near if weighting == "ndcg_loss2" else far.add_(near, alpha=mu)


def _walk(z: Tensor, top: int, weigh: Weigher, found: Lambdas) -> None:
    """Adds every pair to the sums and gradients. Padding adds nothing: it ranks last, infinitely far below."""
    for block in _pairs(z, top, 5):
        queries, rows, columns, (below, weight, wrong, loss, room), _ = block
        block.difference(z, out=below)
        block.square(below).clamp_(max=0)
        weigh(queries, rows, columns, weight, wrong)
        for half in (weight, wrong):  # i < j
            block.square(half).triu_(1)
        # i is ranked above j. If that is right, the loss is log(1 + exp(z_j - z_i)), otherwise that plus z_i - z_j.
        torch.mul(wrong, below, out=loss)
        share = below.sigmoid_()  # at most 1/2
        loss.addcmul_(weight, torch.neg(share, out=room).log1p_(), value=-1)
        found.loss[queries].add_(loss.sum((1, 2)))
        if found.curvature is not None:
            torch.addcmul(share, share, share, value=-1, out=room).mul_(weight)
            found.curvature[queries, rows].add_(room.sum(2))
            found.curvature[queries, columns].add_(room.sum(1))
        if found.gradient is not None:
            pull = wrong.addcmul_(weight, share)
            found.gradient[queries, rows].sub_(pull.sum(2))
            found.gradient[queries, columns].add_(pull.sum(1))


def _lambda_kernel(
    by_rank: Ranked, weighting: Any, top: int, eps: float, mu: float, ascending: Tensor, *, gradient: bool
) -> Lambdas:
    from ..backends.triton import lists as triton_lists

    z = by_rank.score
    inverse = _discounts(z.shape[1], z.device)
    value = by_rank.label if weighting is None else _gains(by_rank, top, eps, ascending, inverse)
    if weighting == "ndcg_loss1":
        value = value * inverse.to(z.dtype)
    length = by_rank.length if isinstance(by_rank.length, Tensor) else None
    z, value = z.contiguous(), value.contiguous()
    return Lambdas(*triton_lists.lambdas(z, value, length, weighting, top, inverse, mu, gradient=gradient))


# ADR-MSE --------------------------------------------------------------------------------------------------------------


def adr_mse(
    scores: Tensor, labels: Tensor, mask: Tensor | None, *, alpha: float, reduction: str, backend: str
) -> Tensor:
    """(true rank - soft rank)^2 / log2(1 + true rank), soft rank 1 + sum_j sigmoid(alpha (s_j - s_i))."""
    name = select_rowwise(backend, scores, "lists")
    count = scores.numel() if mask is None else mask.sum()
    if name == "reference" or torch.compiler.is_compiling() or labels.requires_grad:
        sums = _adr_formula(*_entered(scores, labels, mask, alpha / 2))
        return _reduced(scores, sums, None, reduction, count, unit=4)
    checks.untransformed(name)
    wanted = _wants_gradient(scores)
    with torch.no_grad():
        if name == "triton":
            from ..backends.triton import lists as triton_lists

            sums, gradient = triton_lists.adr(scores, labels, mask, alpha, LARGEST, gradient=wanted)
        else:
            sums, gradient = _adr(*_entered(scores, labels, mask, alpha / 2), gradient=wanted)
            if gradient is not None:
                gradient.masked_fill_(_left_out(scores, mask), 0)
    return _reduced(scores, sums, gradient, reduction, count, unit=4, scale=alpha)


def _adr_rows(leads: Tensor, excess: Tensor) -> tuple[Tensor, Tensor]:
    """Returns four times the loss as the queries' sums, and the loss's derivative by the soft rank.

    The true rank is (n + 1 + leads) / 2. excess: twice the soft rank minus the true rank.
    """
    slope = excess / (leads + (leads.shape[1] + 3)).log2_().sub_(1)  # over log2(1 + true rank)
    return (slope * excess).sum(1), slope


def _adr_formula(z: Tensor, y: Tensor) -> Tensor:
    """The formula with 2 sigmoid(2x) = 1 + tanh(x): a pair's part of the ranks is odd, and 0 at equal scores."""
    above = (y[:, None, :] - y[:, :, None]).sign()
    leads = above.sum(2)
    excess = ((z[:, None, :] - z[:, :, None]).tanh() - above).sum(2)
    return (excess.square() / ((leads + (leads.shape[1] + 3)).log2() - 1)).sum(1)


def _adr(z: Tensor, y: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
    n = z.shape[1]
    leads, excess = torch.zeros_like(z), torch.zeros_like(z)
    for block in _pairs(z, n, 2):
        above, pull = block.workspace
        block.difference(y, out=above).sign_()
        block.add_odd(leads, above)
        block.add_odd(excess, block.difference(z, out=pull).tanh_().sub_(above))
    sums, slope = _adr_rows(leads, excess)
    if not gradient:
        return sums, None
    one = z.new_ones(())
    by_score = torch.zeros_like(z)
    for block in _pairs(z, n, 2):
        leak, pull = block.workspace
        block.difference(z, out=leak).tanh_()
        torch.addcmul(one, leak, leak, value=-1, out=leak)
        block.add_odd(by_score, block.difference(slope, out=pull).mul_(leak))
    return sums, by_score


# ListNet --------------------------------------------------------------------------------------------------------------


def list_net(scores: Tensor, labels: Tensor, mask: Tensor | None, *, reduction: str, backend: str) -> Tensor:
    """Computes the cross-entropy of softmax(scores) from softmax(labels), one query a row; 0 without documents."""
    name = select_rowwise(backend, scores, "classes")
    Q = scores.shape[0]
    if name == "reference" or torch.compiler.is_compiling() or labels.requires_grad:
        sums = _list_net_terms(scores, labels, mask)[0]
        return _reduced(scores, sums, None, reduction, Q, unit=-1)
    if name == "triton":
        return _reduced(scores, classes.soft_cross_entropy_rows(scores, labels, mask, name), None, reduction, Q)
    checks.untransformed(name)
    wanted = _wants_gradient(scores)
    with torch.no_grad():
        sums, gradient = _list_net(scores, labels, mask, gradient=wanted)
    return _reduced(scores, sums, gradient, reduction, Q, unit=-1, scale=-1)


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
    for rows in _row_blocks(Q, n, scores.device):
        part = None if mask is None else mask[rows]
        sums[rows], log_share, target = _list_net_terms(scores[rows], labels[rows], part)
        if by_score is not None:
            torch.sub(log_share.exp_(), target, out=by_score[rows])
            if part is not None:  # in a row without documents both are 1 / n, rounded
                by_score[rows].masked_fill_(~part, 0)
    return sums, by_score


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
        return _reduced(scores, sums, None, reduction, Q)
    checks.untransformed(name)
    wanted = _wants_gradient(scores)
    with torch.no_grad():
        z = _listed(scores, labels, mask, order)
        if name == "triton":
            from ..backends.triton import lists as triton_lists

            weight = None if weight is None else weight.to(z.dtype)
            sums, gradient = triton_lists.list_mle(z, weight, gradient=wanted)
        else:
            sums, gradient = _list_mle(z, weight, gradient=wanted, signed=callable(lambda_weight))
        if gradient is not None and order is not None:
            gradient = torch.empty_like(gradient).scatter_(1, order, gradient)
    return _reduced(scores, sums, gradient, reduction, Q)


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
    for rows in _row_blocks(Q, n, z.device):
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
