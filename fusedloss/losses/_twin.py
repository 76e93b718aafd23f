"""Twins of torch.nn.functional: what they share with each other, and their modules."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import _reduction

from ..core import checks
from ..core.numerics import autocasting
from ._module import LossModule

PLAIN = (Tensor, nn.Parameter)


def reduction_of(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """Torch's: the deprecated pair goes before `reduction`, and warns."""
    if size_average is not None or reduce is not None:
        return _reduction.legacy_get_string(size_average, reduce)
    if reduction not in checks.REDUCTIONS:
        _reduction.get_enum(reduction)  # raises torch's ValueError, or warns of elementwise_mean
        return "mean"
    return reduction


def ordinary(input: Tensor, target: Tensor) -> bool:
    """Whether these are what a kernel takes: dense floating tensors on one device. All else is left to torch."""
    return (
        type(input) in PLAIN
        and type(target) in PLAIN
        and input.dtype in checks.FLOATING
        and target.dtype in checks.FLOATING
        and input.layout is torch.strided is target.layout
        and input.device == target.device
        and not (input.is_nested or target.is_nested)
    )


def tensors(input: object, target: object) -> None:
    """What torch would meet without a word on which of them it is."""
    for name, x, need in (("input", input, "a tensor"), ("target", target, "a tensor of input's shape")):
        if not isinstance(x, Tensor):
            shape = f", {list(input.shape)}" if x is target and isinstance(input, Tensor) else ""
            raise TypeError(f"{name} must be {need}{shape}, got {checks.a(x)}{checks.remedy(x)}")


def same_shape(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both broadcast to each other, with torch's warning where they differ."""
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
    """A tensor of real numbers that broadcasts to the loss."""
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
    """The dtype of a product of these, as autocast leaves it: torch's losses run in fp32 under it."""
    dtype = x.dtype if x.dtype == y.dtype else torch.promote_types(x.dtype, y.dtype)
    return torch.float32 if dtype.itemsize == 2 and autocasting(x) else dtype


class TwinModule(LossModule, function=lambda: None):
    """Takes the constructor of torch's class `like`, and then, by name, what `function` has beside it."""

    like: ClassVar[type[nn.Module]]
    size_average: bool | None
    reduce: bool | None

    def __init_subclass__(cls, *, function: Any, like: type[nn.Module], tensors: tuple[str, ...] = ()) -> None:
        super().__init_subclass__(function=function, tensors=tensors)
        cls.like = like
        theirs = inspect.signature(like).parameters
        ours = [p.replace(kind=p.KEYWORD_ONLY) for name, p in cls.signature.parameters.items() if name not in theirs]
        cls.signature = inspect.Signature([*theirs.values(), *ours])
        cls._set_inputs()

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if "reduce" in self.signature.parameters and (self.size_average is not None or self.reduce is not None):
            self.reduction = _reduction.legacy_get_string(self.size_average, self.reduce)
            self.size_average = self.reduce = None
        for name, value in [(name, getattr(self, name)) for name in self.signature.parameters]:
            if isinstance(value, Tensor):  # as torch: it moves with the module and is part of its state
                delattr(self, name)
                self.register_buffer(name, value)

    def extra_repr(self) -> str:
        shown = {
            name: p.default
            for name, p in self.signature.parameters.items()
            if not isinstance(getattr(self, name), Tensor)
        }
        return checks.options(self, **shown)
