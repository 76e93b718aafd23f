"""Regression: squared, absolute, Huber and smooth L1 errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import checks
from ..core.numerics import stats_dtype
from ..rowwise.pointwise import Difference, loss
from ._options import documented
from ._twin import by_operator, check_weight, ordinary, promoted, reduction_of, same_shape, tensors


@documented
def mse(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
    *,
    under: float = 1.0,
    over: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """The squared error, a drop-in twin of `torch.nn.functional.mse_loss`.

        loss_i = weight_i * side_i * (input_i - target_i)^2        side = under where input < target, else over

    The derivative is computed in the same pass, and only it is kept for the backward pass: half of what torch keeps.
    Inputs of 16 bits are computed in fp32. On a CPU "auto" runs torch's own operator, without options that torch
    lacks, up to 2^17 elements of fp32 or fp64, and up to 2^22 for "none", `huber` and `smooth_l1`.

    Args:
        input: the prediction, any shape and strides.
        target: the same shape; shapes that differ broadcast, with torch's warning.
        size_average, reduce: deprecated, as in torch.
        reduction: "mean" (NaN of nothing, as in torch), "sum" or "none".
        weight: one for each element. It may have any shape that broadcasts to the loss, such as `[C]` by column or `[M,
            1]` by row; torch needs `input`'s shape. A weighted mean is `sum(weight * loss) / sum(weight)`, as in torch.
        under, over: factors of the losses of predictions below and above their target.
        backend: {rows}; second derivatives need "reference".

    `input`, `target` and `weight` receive gradients. Integers, complex numbers and tensor subclasses are left to torch.

    Returns:
        0-dim, or the losses for "none", in the dtype that torch returns.

    Raises:
        ValueError, TypeError, RuntimeError: where torch raises; options that do not fit.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> loss = fusedloss.mse(model(features), price, under=2.0)
        >>> loss.backward()
    """
    reduction = reduction_of(size_average, reduce, reduction)
    return _difference(F.mse_loss, math.inf, 2.0, input, target, reduction, weight, under, over, backend)


def l1(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
    *,
    under: float = 1.0,
    over: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """The absolute error, a twin of `torch.nn.functional.l1_loss`.

        loss_i = weight_i * side_i * |input_i - target_i|        side = under where input < target, else over

    With under = q and over = 1 - q it is the pinball loss of the quantile q. All else as in `mse`.

    Example:
        >>> loss = fusedloss.l1(model(features), demand, under=0.9, over=0.1)
        >>> loss.backward()
    """
    reduction = reduction_of(size_average, reduce, reduction)
    return _difference(F.l1_loss, 0.0, 1.0, input, target, reduction, weight, under, over, backend)


def huber(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
    *,
    under: float = 1.0,
    over: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Huber's error, a twin of `torch.nn.functional.huber_loss`: squared up to delta, absolute beyond.

        d = input - target
        loss_i = weight_i * side_i * (d^2 / 2 where |d| <= delta, else delta * (|d| - delta / 2))

    side is under where input < target, else over. A weighted mean is divided by the number of elements, as in torch,
    which divides by the sum of the weights for mse and l1 only. The result has the dtype of `input`. All else as in
    `mse`.

    Example:
        >>> loss = fusedloss.huber(model(features), price, delta=0.5)
        >>> loss.backward()
    """
    reduction = reduction_of(None, None, reduction)
    if type(delta) is not float:
        delta = _number("delta", delta)
    if not delta > 0:
        raise ValueError(f"delta must be a positive number, got {delta}")
    return _difference(F.huber_loss, delta, 1.0, input, target, reduction, weight, under, over, backend)


def smooth_l1(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
    *,
    weight: Tensor | None = None,
    under: float = 1.0,
    over: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """The smooth absolute error, a twin of `torch.nn.functional.smooth_l1_loss`: squared up to beta, absolute beyond.

        d = input - target
        loss_i = weight_i * side_i * (d^2 / (2 beta) where |d| < beta, else |d| - beta / 2)

    side is under where input < target, else over. beta = 0 is l1. `weight`, which torch does not have, is as in `l1`
    and `mse`: a weighted mean is divided by the sum of the weights. All else as in `mse`.

    Example:
        >>> loss = fusedloss.smooth_l1(boxes, anchors, reduction="sum", beta=0.1)
        >>> loss.backward()
    """
    reduction = reduction_of(size_average, reduce, reduction)
    if type(beta) is not float:
        beta = _number("beta", beta)
    if not beta >= 0:
        raise ValueError(f"beta must be a number of at least 0, got {beta}")
    factor = 1.0 / beta if beta else 1.0
    return _difference(F.smooth_l1_loss, beta, factor, input, target, reduction, weight, under, over, backend)


mse_loss, l1_loss, huber_loss, smooth_l1_loss = mse, l1, huber, smooth_l1


def _number(name: str, value: Any) -> float:
    """Converts whatever torch takes as a float: any number, or a tensor of one element."""
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise TypeError(f"{name} must be a number, got {checks.a(value)}")


def _difference(
    twin: Callable[..., Tensor],
    delta: float,
    factor: float,
    input: Tensor,
    target: Tensor,
    reduction: str,
    weight: Tensor | None,
    under: float,
    over: float,
    backend: str,
) -> Tensor:
    plain = under == 1.0 == over
    what = "longer" if reduction == "none" else {0: "operator", math.inf: "squares"}.get(delta, "longer")
    if plain and weight is None and reduction in checks.CODES and by_operator(input, target, backend, what):
        return _operator(delta, twin, input, target, checks.CODES[reduction])
    if not plain:
        for name, value in (("under", under), ("over", over)):
            checks.number(name, value, least=0)
    by_input = twin is F.huber_loss  # its result has input's dtype, its weighted mean divides by all elements
    if not ordinary(input, target) or (by_input and input.dtype != target.dtype):
        return _left_to_torch(twin, delta, input, target, reduction, weight, under, over, backend)
    x, t = same_shape(input, target)
    dtype = promoted(x, t)
    weight_sum = None
    if weight is not None:
        check_weight("weight", weight, x)
        dtype = torch.promote_types(dtype, weight.dtype)
        if reduction == "mean" and not by_input:
            weight_sum = weight.sum(dtype=stats_dtype(dtype))
            if weight.shape != input.shape:
                weight_sum = weight_sum * (x.numel() / max(weight.numel(), 1))
    formula = Difference(delta, factor, under, over)
    return loss(formula, x, t, weight, reduction=reduction, dtype=dtype, weight_sum=weight_sum, backend=backend)


def _operator(delta: float, twin: Callable[..., Tensor], input: Tensor, target: Tensor, reduction: int) -> Tensor:
    """Calls what `twin` calls once it has checked and broadcast its arguments, which takes as long again."""
    own = checks.OPERATORS
    if twin is F.mse_loss:
        return own.mse_loss(input, target, reduction)
    if delta == 0:
        return own.l1_loss(input, target, reduction)
    return (own.huber_loss if twin is F.huber_loss else own.smooth_l1_loss)(input, target, reduction, delta)


def _left_to_torch(
    twin: Callable[..., Tensor],
    delta: float,
    input: Tensor,
    target: Tensor,
    reduction: str,
    weight: Tensor | None,
    under: float,
    over: float,
    backend: str,
) -> Tensor:
    """Calls torch for integers, complex numbers, subclasses, and mistakes, for which torch raises."""
    checks.backend(backend)
    tensors(input, target)
    if not under == over == 1.0 or (weight is not None and twin is F.smooth_l1_loss):
        raise TypeError(
            "input and target must be floating tensors of one dtype on one device with `weight`, `under` or `over`, "
            f"got {_kind(input)} and {_kind(target)}; without these options torch's own loss runs"
        )
    options: dict[str, Any] = {"reduction": reduction}
    if twin is F.huber_loss:
        options["delta"] = delta
    if twin is F.smooth_l1_loss:
        options["beta"] = delta
    if weight is not None:
        options["weight"] = weight
    return twin(input, target, **options)


def _kind(x: object) -> str:
    return f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
