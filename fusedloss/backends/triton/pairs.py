"""Launchers of `kernels/pairs.py`; `rowwise/pairs.py` has the same functions in torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...core.numerics import cdiv
from .launching import divisor, launch
from .rows import row_options


def forward(kind: str, eps: float, query: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Returns scores [K, M] (with AnglE's sign), and for cosines the norms [1 + K, M]."""
    M, K = query.shape[0], len(others)
    value = query.new_empty((K, M), dtype=torch.float32)
    norm = query.new_empty((1 + K, M), dtype=torch.float32) if kind in ("cos", "angle") else None
    query, *others = (_operand(x) for x in (query, *others))
    _launch("score_kernel", kind, eps, query, others, (query, tuple(others), value, norm), ())
    return value, norm


def backward(
    kind: str,
    eps: float,
    upstream: Tensor,  # [M, K]
    matrices: Sequence[Tensor],
    value: Tensor | None,
    norm: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    gradients = [x.new_empty(x.shape) if want else None for x, want in zip(matrices, wanted, strict=True)]
    query, *others = (_operand(x) for x in matrices)
    tensors = (upstream, query, tuple(others), value, norm, gradients[0], tuple(gradients[1:]))
    _launch("score_backward_kernel", kind, eps, query, others, tensors, upstream.stride())
    return gradients


def _operand(x: Tensor) -> Tensor:
    """Returns `x` with rows of unit stride."""
    return x if x.stride(1) == 1 else x.contiguous()


def _launch(
    name: str,
    kind: str,
    eps: float,
    query: Tensor,
    others: Sequence[Tensor],
    tensors: tuple[Any, ...],
    strides: tuple[int, ...],
) -> None:
    M, D = query.shape
    if not M:
        return
    options = row_options(name, query.device.type == "cpu")
    half, by_row = (D + 1) // 2, (query.stride(0), tuple(x.stride(0) for x in others))
    launch(
        getattr(_pairs(), name),
        (cdiv(M, options["BLOCK_R"]),),
        query.device,
        *tensors,
        M,
        D,
        half,
        float(eps),
        *strides,
        *by_row,
        KIND=kind,
        WIDE=divisor(D, half if kind == "angle" else 0, by_row[0], *by_row[1]),
        **options,
    )


@functools.cache
def _pairs() -> ModuleType:
    from ...kernels import pairs

    return pairs
