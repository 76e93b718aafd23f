"""ADR-MSE: the squared difference of true and soft ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import few, select_rowwise
from ...core import checks
from .common import LARGEST, entered, reduced, wants_gradient, without_gradient
from .walk import pairs


def adr_mse(
    scores: Tensor, labels: Tensor, mask: Tensor | None, *, alpha: float, reduction: str, backend: str
) -> Tensor:
    """(true rank - soft rank)^2 / log2(1 + true rank), soft rank 1 + sum_j sigmoid(alpha (s_j - s_i))."""
    name = "reference" if few(backend, scores, "lists", scores.shape[1]) else select_rowwise(backend, scores, "lists")
    count = scores.numel() if mask is None else mask.sum()
    if name == "reference" or torch.compiler.is_compiling() or labels.requires_grad:
        sums = _adr_formula(*entered(scores, labels, mask, alpha / 2))
        return reduced(scores, sums, None, reduction, count, unit=4)
    checks.untransformed(name)
    wanted = wants_gradient(scores)
    with torch.no_grad():
        if name == "triton":
            from ...backends.triton import lists as triton_lists

            sums, gradient = triton_lists.adr(scores, labels, mask, alpha, LARGEST, gradient=wanted)
        else:
            sums, gradient = _adr(*entered(scores, labels, mask, alpha), gradient=wanted)
            if gradient is not None:
                gradient.masked_fill_(without_gradient(scores, mask), 0)
    return reduced(scores, sums, gradient, reduction, count, unit=4, scale=alpha)


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
    """The formula with tanh(x / 2) = 2 sigmoid(x) - 1, because on a CPU tanh takes 3.5 times as long."""
    n = z.shape[1]
    leads, excess = torch.zeros_like(z), torch.zeros_like(z)
    for block in pairs(z, n, 2):
        above, pull = block.workspace
        block.difference(y, out=above).sign_()
        block.add_odd(leads, above)
        block.add_odd(excess, block.difference(z, out=pull).sigmoid_().sub_(0.5).sub_(above, alpha=0.5))
    excess.mul_(2)
    sums, slope = _adr_rows(leads, excess)
    if not gradient:
        return sums, None
    by_score = torch.zeros_like(z)
    for block in pairs(z, n, 2):
        leak, pull = block.workspace
        block.difference(z, out=leak).sigmoid_()
        torch.addcmul(leak, leak, leak, value=-1, out=leak)  # a fourth of 1 - tanh^2
        block.add_odd(by_score, block.difference(slope, out=pull).mul_(leak))
    return sums, by_score.mul_(4)
