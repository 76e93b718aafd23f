"""What the losses of lists share: how they are reduced, and what stands for padding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...core.numerics import slices, stats_dtype
from ..pointwise import once_only

LARGEST = 1e8  # scores are clamped to this: -inf ranks last and gives finite numbers
PADDING = -1e30  # the score and the label of a place without a document: below all others, and finite
BLOCK = {"cpu": 1 << 17, "cuda": 1 << 24}  # pairs or elements at once: five buffers of them stay in two cores' caches


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


def reduced(
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
        count = count.masked_fill(count == 0, 1).to(sums.dtype) if isinstance(count, Tensor) else max(count, 1)
        over = unit * count
    loss = ((sums if reduction == "none" else sums.sum()) / over).to(stats_dtype(scores.dtype))
    return loss if gradient is None else _Known.apply(scores, loss, gradient, scale / over)


def wants_gradient(scores: Tensor) -> bool:
    return torch.is_grad_enabled() and scores.requires_grad


def row_blocks(Q: int, n: int, device: torch.device) -> Iterator[slice]:
    rows = max(1, BLOCK.get(device.type, BLOCK["cuda"]) // max(n, 1))
    return slices(Q, rows)


def entered(scores: Tensor, labels: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Prepares the pairwise losses' inputs: fp32 or fp64, scores clamped and times the scale, padding marked."""
    dtype = stats_dtype(scores.dtype)
    y = labels.to(dtype)
    # Adds 0 times the label, so that a NaN or infinite label makes the query's loss NaN.
    z = torch.add(scores.to(dtype).clamp(-LARGEST, LARGEST), y, alpha=0)
    if mask is not None:
        z, y = z.where(mask, PADDING), y.where(mask, PADDING)
    return (z if scale == 1 else z * scale), y


def without_gradient(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the places without a gradient: padding, and clamped scores."""
    clamped = scores.abs() > LARGEST
    return clamped if mask is None else clamped.logical_or_(~mask)
