"""The entropy of each row's softmax, in chunks of rows: no matrix of all logits, forward or backward.

    H_i = log sum_j exp(z_ij) - sum_j p_ij z_ij        dH_i/dz_ij = -p_ij (log p_ij + H_i)

Ordinary torch on every device. It multiplies once more than the loss beside it, and three times in its backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..core import products
from ..core.errors import UnsupportedError
from ..core.numerics import slices, stats_dtype
from ..core.softmax import bent
from .chunks import chunk_rows

# maths.md: Entropy
TILE = 1024  # columns that are converted at a time, so that a copy in fp32 stays in a CPU's caches
MATRICES = 3  # of a chunk's size at once


def entropies(
    x: Tensor, y: Tensor, bias: Tensor | None, scale: float, softcap: float, workspace_bytes: int | None
) -> Tensor:
    """Returns `[M]`, of the softmax of `scale <x_i, y_j> + bias_j`, bent by the softcap; once differentiable."""
    found: Tensor = _Entropy.apply(x, y, bias, scale, softcap, workspace_bytes)
    return found


def formula(x: Tensor, y: Tensor, bias: Tensor | None, scale: float, softcap: float) -> Tensor:
    """The same with all logits in memory, differentiable any number of times."""
    dtype = stats_dtype(x.dtype)
    z = scale * (x.to(dtype) @ y.to(dtype).T)
    z = z if bias is None else z + bias.to(dtype)
    if softcap:
        removed = z == -torch.inf
        z = bent(z.masked_fill(removed, 0), softcap).masked_fill(removed, -torch.inf)
    log_p = z.log_softmax(1)
    log_p = log_p.masked_fill(log_p == -torch.inf, torch.finfo(dtype).min)  # 0 log 0 is 0
    return -(log_p.exp() * log_p).sum(1)


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, bias: Tensor | None, scale: float, softcap: float, workspace_bytes: int | None
    ) -> Tensor:
        found = x.new_empty(len(x), dtype=stats_dtype(x.dtype))
        for rows, z in _chunks(x, y, bias, scale, softcap, workspace_bytes):
            z.sub_(z.amax(1, keepdim=True))
            e = z.exp()
            total = e.sum(1)
            z.clamp_(min=torch.finfo(z.dtype).min)  # 0 times -inf, of a class that is removed, is 0
            found[rows] = total.log() - torch.linalg.vecdot(e, z) / total
        ctx.save_for_backward(x, y, bias, found)
        ctx.numbers = scale, softcap, workspace_bytes
        return found

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "backend must be 'reference' for second derivatives (create_graph=True) of an entropy, got one that "
                "keeps only the first"
            )
        x, y, bias, entropy = ctx.saved_tensors
        scale, softcap, _ = ctx.numbers
        dtype, wanted = entropy.dtype, ctx.needs_input_grad
        dx = torch.zeros_like(x, dtype=dtype) if wanted[0] else None
        dy = torch.zeros_like(y, dtype=dtype) if wanted[1] else None
        dbias = torch.zeros_like(bias, dtype=dtype) if wanted[2] else None
        for rows, z in _chunks(x, y, bias, *ctx.numbers):
            slope = (1 - (z / softcap).square_()).clamp_(min=0) if softcap else None
            z.sub_(z.logsumexp(1, keepdim=True))
            dz = z.exp()
            z.add_(entropy[rows, None])
            z.clamp_(min=torch.finfo(z.dtype).min)
            dz.mul_(z).mul_(-upstream[rows, None].to(dtype))
            if slope is not None:
                dz.mul_(slope)
            if dbias is not None:
                dbias += dz.sum(0)
            dz.mul_(scale)
            own = x[rows].to(dtype)
            for tile in slices(len(y), TILE):
                if dx is not None:
                    dx[rows].addmm_(dz[:, tile], y[tile].to(dtype))
                if dy is not None:
                    dy[tile].addmm_(dz[:, tile].T, own)
        gradients = [None if g is None else g.to(t.dtype) for g, t in zip((dx, dy, dbias), (x, y, bias), strict=True)]
        return *gradients, None, None, None


def _chunks(
    x: Tensor, y: Tensor, bias: Tensor | None, scale: float, softcap: float, workspace_bytes: int | None
) -> Iterator[tuple[slice, Tensor]]:
    """Yields chunks of rows and their logits, whose memory the next chunk takes."""
    (M, D), C, dtype = x.shape, len(y), stats_dtype(x.dtype)
    height = chunk_rows(M, MATRICES * C, D, dtype.itemsize, x.device, workspace_bytes)
    room = x.new_empty((min(height, M), C), dtype=dtype)
    narrow = products.narrow(x.dtype, x.device)
    for rows in slices(M, height):
        z, own = room[: rows.stop - rows.start], x[rows] if narrow else x[rows].to(dtype)
        for tile in slices(C, TILE):
            products.mm(z[:, tile], own, (y[tile] if narrow else y[tile].to(dtype)).T)
        if scale != 1:
            z.mul_(scale)
        if bias is not None:
            z.add_(bias.to(dtype))
        if softcap:
            removed = None if bias is None else z == -torch.inf
            z.div_(softcap).tanh_().mul_(softcap)
            if removed is not None:
                z.masked_fill_(removed, -torch.inf)
        yield rows, z
