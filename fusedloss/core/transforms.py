"""A function of each row's own loss, in place of that loss: `sum_i w_i phi(l_i)`.

Its gradient is `phi'(l_i)` times that of `l_i`. A sweep multiplies the row's weight by `phi'` once the row's sums are
known, so that no further pass over the columns is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .strips import Settled

# maths.md: Transforms


class Transform(NamedTuple):
    """phi: one of FORMULAS with its number, or `function`. detach: phi's factor of the loss receives no gradient."""

    name: str
    value: float = 0.0
    detach: bool = False
    function: Callable[[Tensor], Tensor] | None = None


Formula = Callable[[Tensor, Transform], Tensor]
Slope = Callable[[Tensor, Transform], Tensor]


def _focal(loss: Tensor, transform: Transform) -> Tensor:
    missed = -torch.expm1(-loss)
    if transform.detach:
        missed = missed.detach()
    if transform.value == 1:
        return missed * loss
    # The power's own derivative is infinite at 0 for gamma < 1, where its product with the loss has slope 0.
    none = missed == 0
    return torch.where(none, 0, torch.where(none, 1, missed) ** transform.value) * loss


def _focal_slope(loss: Tensor, transform: Transform) -> Tensor:
    gamma, missed = transform.value, -torch.expm1(-loss)
    factor = missed**gamma
    if transform.detach:
        return factor
    # gamma (1 - p)^(gamma - 1) p l, where l / (1 - p) tends to 1 at 0, and p l to 0 at infinity.
    ratio = torch.where(missed == 0, 1, loss / missed)
    chance = torch.exp(-loss)
    return factor * (1 + gamma * torch.where(chance == 0, 0, ratio * chance))


def _generalised(loss: Tensor, transform: Transform) -> Tensor:
    return -torch.expm1(-transform.value * loss) / transform.value


def _generalised_slope(loss: Tensor, transform: Transform) -> Tensor:
    return torch.exp(-transform.value * loss)


def _clipped(loss: Tensor, transform: Transform) -> Tensor:
    return loss.clamp(max=transform.value)


def _clipped_slope(loss: Tensor, transform: Transform) -> Tensor:
    return (loss <= transform.value).to(loss.dtype)  # torch's clamp passes the gradient at the bound


FORMULAS: dict[str, tuple[Formula, Slope]] = {
    "focal": (_focal, _focal_slope),
    "generalised": (_generalised, _generalised_slope),
    "clipped": (_clipped, _clipped_slope),
}


def transformed(loss: Tensor, transform: Transform | None) -> Tensor:
    """Returns `phi(loss)` `[M]`, differentiable any number of times."""
    if transform is None:
        return loss
    if transform.function is None:
        return FORMULAS[transform.name][0](loss, transform)
    found = transform.function(loss)
    if not isinstance(found, Tensor) or found.shape != loss.shape:
        got = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"transform must return a tensor {list(loss.shape)}, a number per row, got {got}")
    if not found.dtype.is_floating_point:
        raise TypeError(f"transform must return a floating tensor, got {found.dtype}; call .to(loss.dtype)")
    return found.to(loss.dtype)


def with_slope(loss: Tensor, transform: Transform, wanted: bool = True) -> tuple[Tensor, Tensor]:
    """Returns `phi(loss)` and, if it is wanted, `phi'(loss)` `[M]`; 1 otherwise."""
    if not wanted:
        return transformed(loss, transform), torch.ones_like(loss)
    if transform.function is None:
        formula, slope = FORMULAS[transform.name]
        return formula(loss, transform), slope(loss, transform)
    with torch.enable_grad():
        own = loss.detach().requires_grad_()
        value = transformed(own, transform)
        if not value.requires_grad:
            raise ValueError(
                "transform must return a tensor that autograd can differentiate by the losses, got one without a "
                'graph; pass reduction="none" and apply it to the result'
            )
        if _reads_others(value, own):
            raise ValueError(
                "transform must be a function of the losses alone, got one of another tensor that requires a "
                'gradient, too; detach that, or pass reduction="none" and apply it to the result'
            )
        (by_loss,) = torch.autograd.grad(value.sum(), own)
    return value.detach(), by_loss


def _reads_others(value: Tensor, own: Tensor) -> bool:
    """Whether another leaf than `own` would receive a gradient from `value`."""
    nodes, seen = [value.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", own) is not own:
            return True
        nodes += [following for following, _ in node.next_functions]
    return False


def settled(
    transform: Transform, weight: Tensor, settle: Callable[..., Settled], wanted: bool, **options: Any
) -> Settled:
    """Returns what `settle` does, of the transformed losses. Rows of weight 0 stay out.

    settle: takes the rows' weights, and `options`, which write to the workspace. wanted: whether gradients are.
    """
    left_out = weight == 0
    loss, slope = with_slope(settle((~left_out).to(weight.dtype)).loss, transform, wanted)
    found = settle((weight * slope).masked_fill(left_out, 0), **options)
    return found._replace(loss=(weight * loss).masked_fill(left_out, 0))
