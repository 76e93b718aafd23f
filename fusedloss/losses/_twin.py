"""Shared by the twins of torch.nn.functional: their checks."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import _reduction

from ..backends import few
from ..core import checks
from ..core.numerics import autocasting

PLAIN = (Tensor, nn.Parameter)
WIDE = (torch.float32, torch.float64)


def reduction_of(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """Returns the reduction as torch does: the deprecated pair overrides `reduction`, and warns."""
    if size_average is not None or reduce is not None:
        return _reduction.legacy_get_string(size_average, reduce)
    if reduction not in checks.REDUCTIONS:
        _reduction.get_enum(reduction)  # raises torch's ValueError, or warns of elementwise_mean
        return "mean"
    return reduction


def ordinary(input: Tensor, target: Tensor) -> bool:
    """Whether a kernel takes these: dense floating tensors on one device. Everything else is left to torch."""
    return (
        type(input) in PLAIN
        and type(target) in PLAIN
        and input.dtype in checks.FLOATING
        and target.dtype in checks.FLOATING
        and input.layout is torch.strided is target.layout
        and input.device == target.device
        and not (input.is_nested or target.is_nested)
    )


def by_operator(input: Tensor, target: Tensor, backend: str, what: str) -> bool:
    """Whether torch's own operator has the same digits in less time: few elements, nothing to widen or to broadcast."""
    return (
        type(input) in PLAIN
        and type(target) in PLAIN
        and few(backend, input, what)
        and input.dtype is target.dtype
        and input.dtype in WIDE
        and not (input.is_nested or target.is_nested)
        and input.layout is torch.strided is target.layout
        and input.shape == target.shape
        and target.is_cpu
        and not (input.is_inference() or target.is_inference())
    )


def tensors(input: object, target: object) -> None:
    """Checks that both are tensors, because torch's error would not say which is not."""
    for name, x, need in (("input", input, "a tensor"), ("target", target, "a tensor of input's shape")):
        if not isinstance(x, Tensor):
            shape = f", {list(input.shape)}" if x is target and isinstance(input, Tensor) else ""
            raise TypeError(f"{name} must be {need}{shape}, got {checks.a(x)}{checks.remedy(x)}")


def same_shape(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Broadcasts both to one shape, with torch's warning if they differ."""
    if input.shape == target.shape:
        return input, target
    warnings.warn(
        f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
        "This will likely lead to incorrect results due to broadcasting. "
        "Please ensure they have the same size.",
        stacklevel=4,
    )
    first, second = torch.broadcast_tensors(input, target)
    return first, second


def check_weight(name: str, weight: object, like: Tensor) -> None:
    """Checks that a weight is real and broadcasts to the loss."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {checks.a(weight)}")
    if weight.dtype.is_complex:
        raise TypeError(f"{name} must be a tensor of real numbers or None, got {weight.dtype}")
    checks.same_device(name, weight, "input", like)
    if weight.shape != like.shape:
        sizes = zip(reversed(weight.shape), reversed(like.shape), strict=False)
        if weight.dim() > like.dim() or any(own not in (1, size) for own, size in sizes):
            raise ValueError(
                f"{name} must have a shape that broadcasts to {list(like.shape)}, got {list(weight.shape)}"
            )


def promoted(x: Tensor, y: Tensor) -> torch.dtype:
    """Returns the dtype of a product of these. Under autocast torch's losses run in fp32."""
    dtype = x.dtype if x.dtype == y.dtype else torch.promote_types(x.dtype, y.dtype)
    return torch.float32 if dtype.itemsize == 2 and autocasting(x) else dtype
