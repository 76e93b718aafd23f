"""Reasons why a call cannot be fused: errors of the losses' checks, overridden methods, criteria that are not stock.

Every reason is asked at every call, because users reassign attributes between calls. What does not change, as a
criterion's defaults, is found once, when a library's drop-ins are imported. The usual case is asked first, and without
what costs microseconds: a generator or a context of contextlib, a view of a tensor, a conversion to its own dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks

TINY, LARGE = 2.0**-100, 2.0**100  # numbers between are finite in every dtype of a loss, and so are their inverses


def refusal(check: Callable[..., None], *args: Any, **kwargs: Any) -> str | None:
    """What one of core.checks has against these arguments. The library's code then says it in its own words."""
    try:
        check(*args, **kwargs)
    except (TypeError, ValueError, IndexError) as error:
        return str(error)
    return None


def scalar_fits(name: str, value: Any, like: Tensor, *, positive: bool = False) -> str | None:
    """What checks.scalar has against `value`. What most calls pass is settled in 1 us; the check takes 5."""
    if type(value) is float:
        number = value
    elif (
        (type(value) is Tensor or type(value) is nn.Parameter)
        and value.dtype is torch.float32
        and value.is_cpu
        and like.is_cpu
        and not value.dim()
        and checks.reads_values(value)
    ):
        number = value.item()
    else:
        number = 0.0
    if TINY < number < LARGE or (not positive and TINY < -number < LARGE):
        return None
    return refusal(checks.scalar, name, value, like, positive=positive)


def alike(first: Any, *others: Any, same_rows: bool = True) -> bool:
    """Whether these are plain matrices with elements, of one floating dtype, one device and one width.

    Asked first: 2 us for two matrices. checks.embeddings, which words what is wrong, takes 5.
    """
    if type(first) is not Tensor or first.layout is not torch.strided or first.is_nested:
        return False
    dtype, device, shape = first.dtype, first.device, first.shape
    if dtype not in checks.FLOATING or len(shape) != 2 or not first.numel():
        return False
    for x in others:
        if type(x) is not Tensor or x.dtype is not dtype or x.layout is not torch.strided or x.is_nested:
            return False
        if x.device != device:
            return False
        own = x.shape
        if own != shape and (same_rows or len(own) != 2 or own[1] != shape[1] or not own[0]):
            return False
    return True


def overridden(module: nn.Module, ours: type, *methods: str) -> str | None:
    """Returns a reason if a subclass of `ours`, or the object itself, has replaced one of these methods."""
    kind, own = type(module), vars(module)
    for name in methods:
        if name in own or (kind is not ours and getattr(kind, name) is not getattr(ours, name)):
            return f"{name} is overridden"
    return None


def a_class_is_outside(labels: Tensor, classes: int, ignore_index: int) -> bool:
    """Whether an int64 label is neither a class nor `ignore_index`. Reads values; there is at least one label."""
    least, most = labels.aminmax()
    if int(least) >= 0 and int(most) < classes:  # one pass where the comparison below takes six
        return False
    return bool(((labels != ignore_index) & ((labels < 0) | (labels >= classes))).any())


def only(module: Any, kind: type, **attributes: Any) -> bool:
    """Whether `module` is of exactly this class, with these attributes."""
    if type(module) is not kind:
        return False
    for name, value in attributes.items():
        if getattr(module, name) != value:
            return False
    return True


def untouched(module: Any, kind: type[nn.Module]) -> bool:
    """Whether `module` computes what its class does: it is no subclass, and has no hooks, which would not run."""
    if type(module) is not kind:
        return False
    own = vars(module)
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def plain(kind: type[nn.Module], *free: str, **options: Any) -> Callable[[Any], str | None]:
    """Returns the check that a criterion is torch's class, as the library builds it with these options.

    free: attributes that may have any value. A criterion takes 40 us to build, so the default is built once.
    """
    default = kind(**options)
    fixed = [(name, value) for name, value in vars(default).items() if not name.startswith("_")]
    fixed = [(name, value) for name, value in fixed if name not in ("training", *free)]
    why_not = f"its criterion is not {default}"

    def check(criterion: Any) -> str | None:
        if not untouched(criterion, kind):
            return why_not
        own = vars(criterion)
        if own["_modules"] or own["_parameters"]:
            return why_not
        for x in own["_buffers"].values():
            if x is not None:
                return why_not
        for name, value in fixed:
            found = own[name] if name in own else getattr(criterion, name)
            if found is not value and found != value:
                return why_not
        return None

    return check
