"""Reasons why a call cannot be fused: errors of the losses' checks, and overridden methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def refusal(check: Callable[..., None], *args: Any, **kwargs: Any) -> str | None:
    """What one of core.checks has against these arguments. The library's code then says it in its own words."""
    try:
        check(*args, **kwargs)
    except (TypeError, ValueError, IndexError) as error:
        return str(error)
    return None


def overridden(module: nn.Module, ours: type, *methods: str) -> str | None:
    """Returns a reason if a subclass of `ours`, or the object itself, has replaced one of these methods."""
    for name in methods:
        if name in vars(module) or getattr(type(module), name) is not getattr(ours, name):
            return f"{name} is overridden"
    return None


def only(module: Any, kind: type, **attributes: Any) -> bool:
    """Whether `module` is of exactly this class, with these attributes."""
    return type(module) is kind and all(getattr(module, name) == value for name, value in attributes.items())
