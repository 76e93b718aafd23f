"""The loss of scores against the order of their labels, over all pairs at once (CoSENT)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import select_rowwise
from ..core import checks
from ..core.numerics import savable, wide_dtype
from ..core.softmax import softplus


def ordered_pairs(z: Tensor, label: Tensor, backend: str = "auto") -> Tensor:
    """Returns `log(1 + sum over label_i < label_j of exp(z_i - z_j))`, 0-dim; z, label: `[B]`.

    The formula takes B^2 memory; sorted by label it takes O(B), and O(B log B) time. A NaN anywhere makes it NaN.
    """
    label = savable(label)
    name = select_rowwise(backend, z, None)
    if name == "reference":
        return _formula(z, label)
    checks.untransformed(name)
    return _OrderedPairs.apply(z, label)


def _formula(z: Tensor, label: Tensor) -> Tensor:
    pairs = (z[:, None] - z).masked_fill(~(label[:, None] < label), -torch.inf)
    # Not one logsumexp with 0 among the pairs, which leaves a loss of 1e-5 two digits.
    loss = softplus(pairs.flatten().logsumexp(0))
    return loss * torch.where((z.isnan() | label.isnan()).any(), torch.nan, 1.0)


class _OrderedPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, label: Tensor) -> Tensor:
        # O(B) work: in fp64, where exp(z_i - z_j - loss) keeps its digits at |z| = 1e4.
        wide, rows = wide_dtype(z.device, z.dtype), len(z)
        levels, order = label.sort()
        x = z[order].to(wide)
        # Indexed by the number of rows: the log of the sum of exp(x) over the first rows, and of exp(-x) over the last.
        sums = torch.stack([x, -x.flip(0)]).logcumsumexp(1)
        sums = torch.cat([x.new_full((2, 1), -torch.inf), sums], 1)
        lower = sums[0][torch.searchsorted(levels, levels)]
        higher = sums[1][rows - torch.searchsorted(levels, levels, right=True)]
        one = x.new_zeros(1)
        if rows and levels.is_floating_point():
            one = one.masked_fill(levels[-1:].isnan(), torch.nan)  # NaN is sorted to the end
        up, down = x + higher, lower - x
        loss = torch.logaddexp(up.logsumexp(0), one[0])
        gradient = torch.empty_like(z)
        gradient[order] = ((up - loss).exp_() - (down - loss).exp_()).to(z.dtype)
        ctx.save_for_backward(gradient, z, label)
        return loss.to(z.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        gradient, z, label = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return upstream * gradient, None
        with torch.enable_grad():  # create_graph=True: the formula, which autograd can differentiate again
            (found,) = torch.autograd.grad(_formula(z, label), z, upstream, create_graph=True)
        return found, None
