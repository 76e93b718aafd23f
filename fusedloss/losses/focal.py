"""Focal loss: cross-entropy with less weight on well-classified examples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import checks
from ..core.numerics import stats_dtype
from ..rowwise.classes import focal_classes
from ..rowwise.pointwise import Focal, loss, transformed
from ._options import documented


@documented
def focal(
    input: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    alpha: float | Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor:
    """Focal loss (Lin et al. 2017) of independent labels or of classes, by the target's dtype.

        loss = alpha_t * (1 - p_t)^gamma * -log(p_t)

    Labels: a floating target of input's shape with values from 0 to 1, p = sigmoid(input), as in
    torchvision.ops.sigmoid_focal_loss: p_t = p t + (1 - p) (1 - t), alpha_t = alpha t + (1 - alpha) (1 - t), and the
    cross-entropy in place of -log(p_t). Classes: an int64 target, p = softmax(input) over dimension 1, and p_t, alpha_t
    are those of the target's class.

    Value and gradient are finite and exact for logits of any size and every gamma >= 0: 1 - p_t is computed from the
    small side. The derivative is computed in the same pass, and only it is kept for the backward pass.

    Args:
        input: logits; `[M, C]` or `[M, C, d1, ...]` for classes, any shape for labels.
        target: labels, floating and of input's shape, or classes, int64 `[M]` or `[M, d1, ...]`.
        gamma: at least 0; 0 is cross-entropy.
        alpha: None, or for labels a number from 0 to 1, the weight of a label of 1; for classes a tensor `[C]`.
        reduction: "mean" (labels: over all elements, 0 if there are none; classes: over the rows that are not
            ignored), "sum" or "none".
        ignore_index: classes only: rows with this target are left out.
        backend: {rows}; second derivatives need "reference".

    Returns:
        0-dim, or for "none" of the target's shape; float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        IndexError: a class out of range, on a CPU. On a GPU, where values are not read, the loss is NaN.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> loss = fusedloss.focal(detector(images), labels, gamma=2.0, alpha=0.25)
        >>> loss.backward()
    """
    for name, x in (("input", input), ("target", target)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {checks.a(x)}{checks.remedy(x)}")
        checks.dense(name, x)
    if input.dtype not in checks.FLOATING:
        raise TypeError(f"input must be float16, bfloat16, float32 or float64, got {input.dtype}")
    checks.same_device("target", target, "input", input)
    checks.number("gamma", gamma, least=0)
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    checks.index("ignore_index", ignore_index)
    if target.dtype == torch.int64:
        return _multiclass(input, target, gamma, alpha, ignore_index, reduction, backend)
    return _binary(input, target, gamma, alpha, ignore_index, reduction, backend)


def _binary(
    input: Tensor, target: Tensor, gamma: float, alpha: Any, ignore_index: int, reduction: str, backend: str
) -> Tensor:
    if target.dtype not in checks.FLOATING:
        raise TypeError(
            f"target must be floating labels or int64 classes, got {target.dtype}; call .float() or .long()"
        )
    if target.shape != input.shape:
        raise ValueError(f"target must have input's shape, {list(input.shape)}, got {list(target.shape)}")
    if alpha is not None:
        if isinstance(alpha, Tensor):
            raise TypeError(
                "alpha must be a number from 0 to 1 or None if target holds labels, got a tensor, which is for classes"
            )
        checks.share("alpha", alpha)
        alpha = float(alpha)
    if ignore_index != -100:
        raise ValueError(f"ignore_index must be -100, the default, if target holds floating labels, got {ignore_index}")
    if checks.reads_values(target) and target.numel() and not transformed():
        low, high = (float(end) for end in target.detach().aminmax())
        if low < 0 or high > 1:  # a NaN shows in the loss
            raise ValueError(f"target must hold labels from 0 to 1, got {low if low < 0 else high:g}")
    if reduction == "mean" and not input.numel():
        reduction = "sum"
    dtype = stats_dtype(torch.promote_types(input.dtype, target.dtype))
    return loss(Focal(float(gamma), alpha), input, target, reduction=reduction, dtype=dtype, backend=backend)


def _multiclass(
    input: Tensor, target: Tensor, gamma: float, alpha: Any, ignore_index: int, reduction: str, backend: str
) -> Tensor:
    if input.dim() < 2:
        raise ValueError(
            f"input must be [M, C] or [M, C, d1, ...] if target holds classes, got shape {list(input.shape)}"
        )
    checks.integers("target", target, tuple(input.shape[:1] + input.shape[2:]), input)
    if alpha is not None:
        checks.vector("alpha", alpha, input.shape[1], "class", input)
    return focal_classes(input, target, gamma, alpha, ignore_index, reduction, backend)
