"""Losses of lists as Triton kernels: launchers for `fusedloss.kernels.lists`, named as in rowwise/lists/."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...core.numerics import cdiv
from .launching import launch

TILE = 32  # documents on either side of a tile of pairs, at most: with 64 columns lambdas take 230 registers


def lambdas(
    z: Tensor,
    value: Tensor,
    length: Tensor | None,
    weighting: str | None,
    top: int,
    inverse: Tensor,
    mu: float,
    *,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Returns the queries' sums, and the gradient by z, in ranked order. inverse: fp64 [n], 1 / discount."""
    Q, n = z.shape
    high = low = near = None
    if weighting in ("lambda_rank", "ndcg_loss2pp"):
        high = inverse.to(torch.float32)
        low = (inverse - high).to(torch.float32)
    if weighting in ("ndcg_loss2", "ndcg_loss2pp"):
        by_distance = torch.cat([inverse.new_zeros(1), inverse[:-1] - inverse[1:]])
        near = (by_distance if weighting == "ndcg_loss2" else by_distance * mu).to(torch.float32)
    block = min(TILE, _power(n))
    loss = z.new_empty(Q, cdiv(n, block))
    by_score = torch.empty_like(z) if gradient else None
    own = weighting == "ndcg_loss1"
    launch(
        _lists().lambda_kernel,
        tuple(loss.shape),
        z.device,
        z,
        value,
        length,
        high,
        low,
        near,
        loss,
        by_score,
        n,
        top,
        OWN=own,
        BLOCK_I=block,
        BLOCK_J=block,
    )
    return loss.sum(1, dtype=torch.float64), by_score


def adr(
    scores: Tensor, labels: Tensor, mask: Tensor | None, alpha: float, largest: float, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns four times the loss as the queries' sums, and its gradient over alpha."""
    Q, n = scores.shape
    (scores, labels, mask), (stride_sq, stride_yq, stride_mq) = _operands(scores, labels, mask)
    block = min(TILE, _power(n))
    loss = torch.empty(Q, cdiv(n, block), dtype=torch.float32, device=scores.device)
    slope = loss.new_empty(Q, n)
    by_score = torch.empty_like(slope) if gradient else None
    grid, scale = tuple(loss.shape), float(alpha)
    options = {"LARGEST": largest, "BLOCK_I": block, "BLOCK_J": block}
    device, tables, found = scores.device, (scores, labels, mask, loss, slope), (scores, mask, slope, by_score)
    launch(_lists().adr_ranks_kernel, grid, device, *tables, scale, n, stride_sq, stride_yq, stride_mq, **options)
    if by_score is not None:
        launch(_lists().adr_gradient_kernel, grid, device, *found, scale, n, stride_sq, stride_mq, **options)
    return loss.sum(1, dtype=torch.float64), by_score


def list_mle(z: Tensor, weight: Tensor | None, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
    Q, n = z.shape
    z = z if z.stride(1) == 1 else z.contiguous()
    weight = weight if weight is None or weight.stride(1) == 1 else weight.contiguous()
    loss = z.new_empty(Q)
    by_score = z.new_empty(Q, n) if gradient else None
    stride = 0 if weight is None or weight.shape[0] == 1 else weight.stride(0)
    block = _power(n)
    launch(
        _lists().list_mle_kernel,
        (Q,),
        z.device,
        z,
        weight,
        loss,
        by_score,
        n,
        z.stride(0),
        stride,
        BLOCK_N=block,
        num_warps=max(1, min(16, block // 256)),
    )
    return loss, by_score


def _operands(scores: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Returns the operands with rows of unit stride, and their row strides."""
    labels = labels if labels.is_floating_point() else labels.to(torch.float32)
    found = [x if x is None or x.stride(1) == 1 else x.contiguous() for x in (scores, labels, mask)]
    strides = tuple(0 if x is None else x.stride(0) for x in found)
    return (found[0], found[1], None if found[2] is None else found[2].view(torch.uint8)), strides


def _power(n: int) -> int:
    """Returns the next power of 2 from n on, at least 16."""
    return max(16, 1 << (n - 1).bit_length())


@functools.cache
def _lists() -> ModuleType:
    from ...kernels import lists

    return lists
