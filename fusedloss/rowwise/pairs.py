"""Similarities and distances of one chosen pair a row, differentiable, in chunks: nothing of M x D is kept or copied.

What a sweep over all pairs has found (the hardest positive, the hardest negative) is computed again here, where its
gradient is two rows and not a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..problem import stats_dtype, unit_rows
from ..rows import row_chunks


def dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(1)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return (unit_rows(x) * unit_rows(y)).sum(1)


def cosine_distance(x: Tensor, y: Tensor) -> Tensor:
    return 1 - cosine(x, y)


def squared_distance(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().sum(1)


def euclidean_distance(x: Tensor, y: Tensor) -> Tensor:
    """The root of 0 has gradient 0 here, not infinity."""
    squared = squared_distance(x, y)
    zero = squared == 0
    return squared.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


DISTANCES = {"euclidean": euclidean_distance, "squared": squared_distance, "cosine": cosine_distance}


def of_pairs(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, column: Tensor) -> Tensor:
    """`function(x_i, y_column_i)` for each row i, `[M]`, fp32 or fp64; 0 where `column_i` is -1."""
    none = column < 0
    column = column.clamp(min=0)
    if torch.compiler.is_compiling():  # fused by the compiler, where a loop over chunks would be unrolled
        values = function(*_wide(x, y[column]))
    else:
        values = _OfPairs.apply(function, x, y, column)
    return values.masked_fill(none, 0)


def _wide(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    dtype = stats_dtype(x.dtype)
    return x.to(dtype), y.to(dtype)


class _OfPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, column: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x, y, column)
        parts = [function(*_wide(x[chunk], y[column[chunk]])) for chunk in row_chunks(column)]
        return torch.cat(parts) if parts else x.new_empty(0, dtype=stats_dtype(x.dtype))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        x, y, column = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: once more, as a formula
            with torch.enable_grad():
                # Apart, where both are one tensor: else each would get the gradient of both.
                x, y = x.view_as(x), y.view_as(y)
                values = ctx.function(*_wide(x, y[column]))
                inputs = [t for t, want in zip((x, y), ctx.needs_input_grad[1:3], strict=True) if want]
                found = iter(torch.autograd.grad(values, inputs, upstream, create_graph=True))
            return (None, *(next(found) if want else None for want in ctx.needs_input_grad[1:3]), None)
        dtype = stats_dtype(x.dtype)
        dx = torch.zeros_like(x, dtype=dtype) if ctx.needs_input_grad[1] else None
        dy = torch.zeros_like(y, dtype=dtype) if ctx.needs_input_grad[2] else None
        for chunk in row_chunks(column):
            with torch.enable_grad():
                own, other = (t.detach().requires_grad_() for t in _wide(x[chunk], y[column[chunk]]))
                values = ctx.function(own, other)
            by_own, by_other = torch.autograd.grad(values, (own, other), upstream[chunk])
            if dx is not None:
                dx[chunk] += by_own
            if dy is not None:
                dy.index_add_(0, column[chunk], by_other)
        return None, None if dx is None else dx.to(x.dtype), None if dy is None else dy.to(y.dtype), None


def angle(x: Tensor, y: Tensor) -> Tensor:
    """AnglE's: unit rows read as complex numbers (dims i and i + ceil(D / 2)), the absolute sum of x times conj(y)."""
    x, y = unit_rows(x), unit_rows(y)
    if x.shape[1] % 2:
        x, y = (torch.nn.functional.pad(t, (0, 1)) for t in (x, y))
    (a, b), (c, d) = x.chunk(2, dim=1), y.chunk(2, dim=1)
    return ((a * c + b * d).sum(1) + (b * c - a * d).sum(1)).abs()


def manhattan_distance(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).abs().sum(1)


KINDS = {
    "dot": dot,
    "cos": cosine,
    "angle": angle,
    "euclidean": euclidean_distance,
    "manhattan": manhattan_distance,
}


def scores(kind: str, query: Tensor, *others: Tensor, backend: str = "auto") -> Tensor:
    """`[M, K]`, of query's rows and those of the K others, differentiable in all; fp32, or fp64 for fp64 inputs."""
    return torch.stack([KINDS[kind](*_wide(query, other)) for other in others], dim=1)
