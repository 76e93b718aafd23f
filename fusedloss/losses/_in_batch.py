"""What the in-batch softmax losses share: autocast, the scale as a tensor, left-out rows, and the reduction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks
from ..backends import select
from ..op import loss_rows_or_sum
from ..problem import Block, Problem, stats_dtype


def autocast(*embeddings: Tensor) -> tuple[Tensor, ...]:
    """Under torch.autocast, embeddings take its dtype, as a matmul's operands would; fp64 stays."""
    device = embeddings[0].device.type
    if not checks.autocasts(embeddings[0]):
        return embeddings
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in embeddings)


def as_scale(value: float | Tensor, like: Tensor, *, inverse: bool) -> tuple[Tensor, float | None]:
    """The multiplier of the logits as a 0-dim tensor in the statistics dtype, and as a number where it is one."""
    dtype = stats_dtype(like.dtype)
    if isinstance(value, Tensor):
        scale = value.reshape(()).to(dtype)
        return (scale.reciprocal() if inverse else scale), None
    number = 1.0 / value if inverse else float(value)
    return torch.full((), number, dtype=dtype, device=like.device), number


def softmax_loss(
    operands: Sequence[Tensor],
    blocks: Sequence[Block],
    target: Tensor | None,
    scale: Tensor,
    *,
    scale_bound: float | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    cosine: bool = False,
    label_smoothing: float = 0.0,
    symmetric: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> Tensor:
    """Builds the problem, picks the backend, reduces. A weighted mean divides by the weight of the rows that count."""
    query, bias = operands[blocks[0].query], blocks[0].bias
    rows, columns = query.shape[0], operands[blocks[0].key].shape[0]
    row_weight = query.new_ones(rows, dtype=scale.dtype) if weight is None else weight.detach().to(scale.dtype)
    plain = target is None and weight is None and bias is None
    if target is None:
        target = torch.arange(rows, device=query.device)
    else:
        ignored = target == ignore_index
        outside = ~ignored & ((target < 0) | (target >= columns))
        target = target.masked_fill(ignored | outside, 0)
        row_weight = row_weight.masked_fill(ignored, 0).masked_fill(outside, torch.nan)
    if bias is not None:
        row_weight = row_weight.masked_fill(bias.detach()[target] == -torch.inf, 0)
    problem = Problem(
        tuple(operands),
        tuple(blocks),
        scale,
        target,
        row_weight,
        cosine,
        label_smoothing,
        symmetric,
        scale_bound,
        workspace_bytes,
    )
    loss = loss_rows_or_sum(problem, select(problem, backend), per_row=reduction == "none")
    if reduction != "mean":
        return loss
    if plain:
        return loss / max(rows, 1)
    total = row_weight.sum()
    return torch.where(total == 0, 0, loss / total.masked_fill(total == 0, 1))
