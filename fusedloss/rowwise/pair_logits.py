"""Logits of a linear layer on pairs of embeddings, [u; v; |u - v|; u v], without the concatenation.

The logits are the sum of each part's product with its own columns of the weight. u, v and the weight are kept for
backward, where |u - v| and u v are formed again, a block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..backends import select_rowwise
from ..backends.triton import classes as triton_classes
from ..core.numerics import savable, slices, stats_dtype
from .pointwise import once_only, transformed

BLOCK = {"cpu": 1 << 19, "cuda": 1 << 26}  # elements of u at a time
SMALL = 1 << 15  # elements up to which a CPU is faster with the concatenation, which keeps 100 KiB a part
PARTS = {"rep": 2, "difference": 1, "multiplication": 1}  # in this order, with the number of D columns that each takes


def pair_logits(
    u: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None, parts: tuple[str, ...], backend: str = "auto"
) -> Tensor:
    """Returns `[B, C]`, fp32 or fp64; weight `[C, k D]`."""
    u, v, weight = savable(u), savable(v), savable(weight)
    widest = torch.promote_types(u.dtype, weight.dtype)
    backend = select_rowwise(backend, weight if weight.dtype == widest else u, "pair_logits")
    # Not in 16 bits: the formula would keep everything in fp32, which is too much memory for its speed.
    small = u.numel() <= SMALL and u.device.type == "cpu" and u.dtype == weight.dtype == stats_dtype(widest)
    if backend == "reference" or transformed() or (small and backend == "chunked"):
        return formula(u, v, weight, bias, parts)
    return _PairLogits.apply(u, v, weight, bias, parts, backend)


def formula(u: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None, parts: tuple[str, ...]) -> Tensor:
    dtype = _dtype(u, weight)
    u, v = u.to(dtype), v.to(dtype)
    made = {"rep": [u, v], "difference": [(u - v).abs()], "multiplication": [u * v]}
    features = torch.cat([x for part in PARTS if part in parts for x in made[part]], dim=1)
    return torch.nn.functional.linear(features, weight.to(dtype), None if bias is None else bias.to(dtype))


class _PairLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None, parts: tuple[str, ...], backend: str
    ) -> Tensor:
        ctx.save_for_backward(u, v, weight)
        ctx.parts, ctx.bias_dtype = parts, None if bias is None else bias.dtype
        if backend == "triton":
            return triton_classes.pair_logits(u, v, weight, bias, parts)
        dtype = _dtype(u, weight)
        logits = torch.zeros((u.shape[0], weight.shape[0]), dtype=dtype, device=u.device)
        if bias is not None:
            logits += bias
        slices = _slices(weight.to(dtype), parts)
        for rows in _blocks(u):
            out, x, y = logits[rows], u[rows].to(dtype), v[rows].to(dtype)
            if "rep" in slices:
                out.addmm_(x, slices["rep"][0].T).addmm_(y, slices["rep"][1].T)
            if "difference" in slices:
                out.addmm_((x - y).abs_(), slices["difference"][0].T)
            if "multiplication" in slices:
                out.addmm_(x * y, slices["multiplication"][0].T)
        return logits

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        once_only()
        u, v, weight = ctx.saved_tensors
        wants_u, wants_v, wants_weight, wants_bias = ctx.needs_input_grad[:4]
        dtype = _dtype(u, weight)
        du = torch.empty_like(u, dtype=dtype) if wants_u else None
        dv = torch.empty_like(v, dtype=dtype) if wants_v else None
        dweight = torch.zeros_like(weight, dtype=dtype) if wants_weight else None
        slices = _slices(weight.to(dtype), ctx.parts)
        dslices = {} if dweight is None else _slices(dweight, ctx.parts)
        for rows in _blocks(u):
            dz, x, y = upstream[rows], u[rows].to(dtype), v[rows].to(dtype)
            own, other = (None if d is None else d[rows] for d in (du, dv))
            for d, place in ((own, 0), (other, 1)):
                if d is not None and "rep" in slices:
                    torch.mm(dz, slices["rep"][place], out=d)
                elif d is not None:
                    d.zero_()
            if "rep" in dslices:
                for dw, z in zip(dslices["rep"], (x, y), strict=True):
                    dw.addmm_(dz.T, z)
            if "difference" in slices:
                difference = x - y
                if own is not None or other is not None:
                    by_difference = torch.mm(dz, slices["difference"][0]).mul_(difference.sign())
                    if own is not None:
                        own.add_(by_difference)
                    if other is not None:
                        other.sub_(by_difference)
                if dslices:
                    dslices["difference"][0].addmm_(dz.T, difference.abs_())
            if "multiplication" in slices:
                if own is not None or other is not None:
                    by_product = torch.mm(dz, slices["multiplication"][0])
                    if own is not None:
                        own.addcmul_(by_product, y)
                    if other is not None:
                        other.addcmul_(by_product, x)
                if dslices:
                    dslices["multiplication"][0].addmm_(dz.T, x * y)
        given = [None if d is None else d.to(like.dtype) for d, like in ((du, u), (dv, v), (dweight, weight))]
        return (*given, upstream.sum(0).to(ctx.bias_dtype) if wants_bias else None, None, None)


def _dtype(u: Tensor, weight: Tensor) -> torch.dtype:
    return stats_dtype(torch.promote_types(u.dtype, weight.dtype))


def _slices(weight: Tensor, parts: tuple[str, ...]) -> dict[str, list[Tensor]]:
    """Yields the columns of each part."""
    D = weight.shape[1] // sum(PARTS[part] for part in parts)
    columns = iter(weight.split(D, dim=1))
    return {part: [next(columns) for _ in range(count)] for part, count in PARTS.items() if part in parts}


def _blocks(u: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK.get(u.device.type, 1 << 26) // u.shape[1])
    return slices(u.shape[0], step)
