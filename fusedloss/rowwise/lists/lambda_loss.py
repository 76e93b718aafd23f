"""RankNet and LambdaLoss: a weight for every pair of documents."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...backends import select_rowwise
from ...core import checks
from .common import entered, reduced, row_blocks, wants_gradient, without_gradient
from .walk import pairs

LN2 = math.log(2)
Weighting = str | Callable[[Tensor, Tensor, Tensor], Tensor] | None


class Ranked(NamedTuple):
    """Every query's documents, the highest score first (equal ones in input order) and padding last."""

    score: Tensor  # [Q, n], times sigma
    label: Tensor  # [Q, n]
    order: Tensor  # int64 [Q, n]: their places in the input
    length: Tensor | int  # [Q], documents of each query


def ranked(scores: Tensor, labels: Tensor, mask: Tensor | None, sigma: float) -> Ranked:
    z, y = entered(scores, labels, mask, sigma)
    z, order = z.sort(dim=1, descending=True, stable=True)
    return Ranked(z, y.gather(1, order), order, z.shape[1] if mask is None else mask.sum(1))


def in_input_order(by_rank: Tensor, order: Tensor, left_out: Tensor) -> Tensor:
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
        return reduced(scores, sums, None, reduction, count.sum(), unit=unit)
    checks.untransformed(name)
    wanted = wants_gradient(scores)
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
            gradient = in_input_order(found.gradient, by_rank.order, without_gradient(scores, mask) | none[:, None])
    return reduced(scores, sums, gradient, reduction, count.sum(), unit=unit, scale=sigma)


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
        left_out = without_gradient(scores, mask) | (count == 0)[:, None]
        gradient, curvature = (in_input_order(t, by_rank.order, left_out) for t in (found.gradient, found.curvature))
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
        walk(z, top, Weigher(weighting, gain, inverse, mu), found)
        return found
    assert inverse is not None
    # A user's weights are one per pair, so they are made for a few queries at a time.
    for queries in row_blocks(Q, n * n, device):
        few = by_rank._replace(score=z[queries], label=by_rank.label[queries])
        weight = _expanded(weighting, few, gain[queries], inverse)
        if weight.requires_grad:
            raise RuntimeError(
                "weighting must return a tensor without a gradient, got one that requires grad; detach it, "
                "or pass backend='reference'"
            )
        part = Lambdas(found.loss[queries], *(None if t is None else t[queries] for t in found[1:]))
        walk(few.score, top, Weigher(weight, few.label, None, mu), part)
    return found


class Weigher:
    """Writes a block's `weight`, w_ij + w_ji (one is 0 except for ndcg_loss1), and `wrong`, -w_ji.

    value: gains, gain / discount for ndcg_loss1, or labels for None and given weights.
    """

    def __init__(self, weighting: str | Tensor | None, value: Tensor, inverse: Tensor | None, mu: float):
        self.weighting, self.value, self.inverse, self.mu = weighting, value, inverse, mu
        self.by_position: Tensor | None = None  # of the current rows and columns, the same for all queries

    def __call__(self, queries: slice, rows: slice, columns: slice, weight: Tensor, wrong: Tensor) -> None:
        upper, lower = self.value[queries, rows, None], self.value[queries, None, columns]
        if isinstance(self.weighting, Tensor):
            given = self.weighting[queries, columns, rows].transpose(1, 2).where(upper < lower, 0)
            torch.add(given, self.weighting[queries, rows, columns].where(upper > lower, 0), out=weight)
            torch.neg(given, out=wrong)
            return
        if self.weighting == "ndcg_loss1":
            torch.add(upper, lower, out=weight)
            wrong.copy_(lower).neg_()
            return
        torch.sub(upper, lower, out=wrong)
        if self.inverse is None:
            wrong.sign_()
        torch.abs(wrong, out=weight)
        wrong.clamp_(max=0)
        if self.inverse is not None:
            if queries.start == 0 or self.by_position is None:
                factor = _by_position(str(self.weighting), self.inverse, self.mu, rows, columns)
                self.by_position = factor.to(self.value.dtype)
            weight.mul_(self.by_position)
            wrong.mul_(self.by_position)


def _by_position(weighting: str, inverse: Tensor, mu: float, rows: slice, columns: slice) -> Tensor:
    """Returns the factor of |gain_i - gain_j|, fp64 [rows, columns]; undefined for j <= i."""
    far = torch.sub(inverse[rows, None], inverse[columns])
    if weighting == "lambda_rank":
        return far
    height, width = far.shape
    by_distance = torch.cat([inverse.new_zeros(height), inverse[: width - 1] - inverse[1:width]])
    near = by_distance.unfold(0, width, 1).flip(0)  # at j - i
    return near if weighting == "ndcg_loss2" else far.add_(near, alpha=mu)


def walk(z: Tensor, top: int, weigh: Callable[[slice, slice, slice, Tensor, Tensor], None], found: Lambdas) -> None:
    """Adds every pair to the sums and gradients. Padding adds nothing: it ranks last, infinitely far below."""
    for block in pairs(z, top, 5):
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
    from ...backends.triton import lists as triton_lists

    z = by_rank.score
    inverse = _discounts(z.shape[1], z.device)
    value = by_rank.label if weighting is None else _gains(by_rank, top, eps, ascending, inverse)
    if weighting == "ndcg_loss1":
        value = value * inverse.to(z.dtype)
    length = by_rank.length if isinstance(by_rank.length, Tensor) else None
    z, value = z.contiguous(), value.contiguous()
    return Lambdas(*triton_lists.lambdas(z, value, length, weighting, top, inverse, mu, gradient=gradient))
