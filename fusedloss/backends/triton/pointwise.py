"""Launches of `kernels/pointwise.py`: losses of elements.

Triton is imported on first use: the package works without it.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...core.numerics import cdiv
from .launching import launch

BLOCK = 1024  # elements a program, 8 a thread; more under the interpreter, whose time does not depend on them
INTERPRETED_BLOCK = 1 << 14


def evaluate(
    formula: Any,
    x: Tensor,
    t: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    kept: Tensor | None,
    gain: float,
    losses: Tensor | None,
    columns: int,
) -> Tensor:
    """Returns the sum of the losses over the formula's `value_factor`, in fp64; writes `losses` if given.

    x, t: of one shape. Weights: `[rows, columns]`, any strides, also 0.
    """
    n, block = x.numel(), _block(x.device)
    programs = cdiv(n, block)
    partial = torch.empty(programs, dtype=torch.float32, device=x.device)
    if programs:
        function, numbers = _formula(formula)
        launch(
            _kernels().pointwise_kernel,
            (programs,),
            x.device,
            x.contiguous(),
            t.contiguous(),
            weight,
            pos_weight,
            kept,
            losses,
            partial if losses is None else None,
            n,
            max(columns, 1),
            *((0, 0) if weight is None else weight.stride()),
            *((0, 0) if pos_weight is None else pos_weight.stride()),
            float(formula.value_factor),
            float(gain),
            numbers,
            FORMULA=function,
            BLOCK=block,
        )
    return partial.sum(dtype=torch.float64) if losses is None else losses


def times(kept: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """Writes `out = kept * factor`, rounded once; factor is 0-dim fp32. `out` may be `kept`."""
    block = _block(kept.device)
    if kept.numel():
        grid = (cdiv(kept.numel(), block),)
        launch(_kernels().times_kernel, grid, kept.device, kept, factor, out, kept.numel(), BLOCK=block)
    return out


def _formula(formula: Any) -> tuple[Any, tuple[float, ...]]:
    """Returns the device function and its numbers."""
    kernels = _kernels()
    match type(formula).__name__:
        case "Difference":
            function = {0.0: kernels.absolute, math.inf: kernels.squared}.get(formula.delta, kernels.clamped)
            delta = formula.delta if function is kernels.clamped else 0.0
            return function, (float(formula.under), float(formula.over), float(delta))
        case "BinaryCrossEntropy":
            return kernels.binary_cross_entropy, ()
        case _:
            alpha = formula.alpha
            weights = (1.0, 1.0) if alpha is None else (float(alpha), 1.0 - alpha)
            return kernels.focal, (float(formula.gamma), *weights)


def _block(device: torch.device) -> int:
    return INTERPRETED_BLOCK if device.type == "cpu" else BLOCK


@functools.cache
def _kernels() -> ModuleType:
    from ...kernels import pointwise

    return pointwise
