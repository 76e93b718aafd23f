"""RankNet with a target for every pair: the probability that one document is more relevant than the other."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from ...backends import select_rowwise
from ...core import checks
from .common import reduced, row_blocks, wants_gradient, without_gradient
from .lambda_loss import Lambdas, Ranked, in_input_order, ranked, walk


def soft_pairs(
    scores: Tensor,
    soft: Tensor,
    mask: Tensor | None,
    *,
    k: int | None,
    sigma: float,
    unit: float,
    reduction: str,
    backend: str,
) -> Tensor:
    """Returns `-sum_(i != j) p_ij log sigmoid(sigma (s_i - s_j))`, divided by the sum of p under "mean"."""
    name = select_rowwise(backend, scores, "lists", unsupported="no kernel reads a target for each pair")
    n = scores.shape[1]
    top = min(k or n, n)
    labels = torch.zeros_like(scores)
    if name == "reference" or torch.compiler.is_compiling():
        by_rank = ranked(scores, labels, mask, sigma)
        weight = _at_top(_by_rank(soft, by_rank, slice(None)), top)
        losses = nn.functional.logsigmoid(by_rank.score[:, :, None] - by_rank.score[:, None, :])
        sums = -(weight * losses).sum((1, 2))
        return reduced(scores, sums, None, reduction, weight.sum(dtype=torch.float64), unit=unit)
    checks.untransformed(name)
    wanted = wants_gradient(scores)
    with torch.no_grad():
        by_rank = ranked(scores, labels, mask, sigma)
        z = by_rank.score
        by_score = torch.zeros_like(z) if wanted else None
        found = Lambdas(z.new_zeros(len(z), dtype=torch.float64), by_score)
        count = found.loss.new_zeros(len(z))
        for queries in row_blocks(len(z), n * n, z.device):  # one matrix of weights exists for a few queries at once
            weight = _at_top(_by_rank(soft, by_rank, queries), top)
            count[queries] = weight.sum((1, 2), dtype=torch.float64)
            part = Lambdas(found.loss[queries], None if by_score is None else by_score[queries])
            walk(z[queries], top, functools.partial(_weigh, weight), part)
        gradient = None
        if found.gradient is not None:
            gradient = in_input_order(found.gradient, by_rank.order, without_gradient(scores, mask))
    return reduced(scores, found.loss, gradient, reduction, count.sum(), unit=unit, scale=sigma)


def _by_rank(soft: Tensor, by_rank: Ranked, queries: slice) -> Tensor:
    """Returns the targets of some queries [q, n, n] in ranked order, 0 on the diagonal and in padding."""
    order, length = by_rank.order[queries], by_rank.length
    q, n = order.shape
    place = torch.arange(n, device=order.device)
    pair = place[:, None] != place
    if isinstance(length, Tensor):
        real = place < length[queries, None]
        pair = pair & real[:, :, None] & real[:, None, :]
    weight = soft[queries].gather(1, order[:, :, None].expand(q, n, n)).gather(2, order[:, None, :].expand(q, n, n))
    return weight.to(by_rank.score.dtype).where(pair, 0)


def _at_top(weight: Tensor, top: int) -> Tensor:
    """Returns the weights of pairs of which a document is among the best `top`."""
    place = torch.arange(weight.shape[1], device=weight.device)
    return weight if top == len(place) else weight.where((place[:, None] < top) | (place < top), 0)


def _weigh(given: Tensor, queries: slice, rows: slice, columns: slice, weight: Tensor, wrong: Tensor) -> None:
    """Writes a block's weights, as `lambda_loss.Weigher`; here both orders of a pair have one."""
    below = given[queries, columns, rows].transpose(1, 2)
    torch.add(given[queries, rows, columns], below, out=weight)
    torch.neg(below, out=wrong)
