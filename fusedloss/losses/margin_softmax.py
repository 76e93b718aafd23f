"""Softmax over classes in which the target must win by a margin: ArcFace and CosFace."""

from __future__ import annotations

import math
from typing import Unpack

from torch import Tensor

from ..core import checks
from ..core.problem import Block, Margin, Problem
from ._options import Call, SweepOptions, expanded
from ._softmax import as_scale, autocast, counted, distinct, mean_of


@expanded
def arcface(
    embeddings: Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    margin: float = 0.5,
    scale: float = 64.0,
    ignore_index: int = -100,
    **options: Unpack[SweepOptions],
) -> Tensor:
    """ArcFace (Deng et al. 2019), over the cosines of embeddings and class vectors, without a [B, C] matrix.

        z_ic   = scale cos(theta_ic), and scale cos(theta_it + margin) at the target t
        loss_i = logsumexp_c z_ic - z_it

    If theta + margin exceeds pi, the target has cos(theta) - margin sin(margin) instead, as in pytorch-metric-learning,
    whose margin is in degrees. Angles are computed in fp64 from sines, because the derivative of acos is infinite at 1.
    A row parallel to its class vector, to sqrt(eps) of the accumulator, has no direction to turn in; its gradient has
    only the cosine's part.

    Args:
        embeddings: `[B, D]`, normalised inside; float16, bfloat16, float32 or float64, any strides.
        target: int64 `[B]`, class indices.
        weight: `[C, D]`, a vector of each class, normalised inside: `W.T` of pytorch-metric-learning's `W`.
        margin: radians, from 0 to below pi; pytorch-metric-learning's 28.6 degrees are 0.4992.
        scale: a positive number.
        ignore_index: rows with this target are left out.
        reduction: "mean" (over the rows that count; 0 if none does), "sum", or "none" (`[B]`).

    Returns:
        A 0-dim tensor (`[B]` for "none"), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        IndexError: on a CPU, a target out of range. On a GPU values are not read back and the loss is NaN.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> weight = torch.nn.Parameter(torch.randn(people, 512))
        >>> fusedloss.arcface(encoder(faces), person, weight, margin=0.5, scale=64.0).backward()
    """
    checks.number("margin", margin)
    if not 0 <= margin < math.pi:
        raise ValueError(f"margin must be an angle in radians, from 0 to below pi, got {margin}")
    rule = Margin(angle=float(margin))
    return _margin_softmax(embeddings, target, weight, rule, scale, ignore_index, Call(**options))


@expanded
def cosface(
    embeddings: Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    margin: float = 0.35,
    scale: float = 64.0,
    ignore_index: int = -100,
    **options: Unpack[SweepOptions],
) -> Tensor:
    """CosFace, or AM-Softmax (Wang et al. 2018), over the cosines of embeddings and class vectors.

        z_ic   = scale cos(theta_ic), and scale (cos(theta_it) - margin) at the target t
        loss_i = logsumexp_c z_ic - z_it

    pytorch-metric-learning's CosFaceLoss, without a [B, C] matrix.

    Args:
        embeddings: `[B, D]`, normalised inside; float16, bfloat16, float32 or float64, any strides.
        target: int64 `[B]`, class indices.
        weight: `[C, D]`, a vector of each class, normalised inside: `W.T` of pytorch-metric-learning's `W`.
        margin: subtracted from the target's cosine.
        scale: a positive number.
        ignore_index: rows with this target are left out.
        reduction: "mean" (over the rows that count; 0 if none does), "sum", or "none" (`[B]`).

    Returns:
        A 0-dim tensor (`[B]` for "none"), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        IndexError: on a CPU, a target out of range. On a GPU values are not read back and the loss is NaN.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> weight = torch.nn.Parameter(torch.randn(people, 512))
        >>> fusedloss.cosface(encoder(faces), person, weight, margin=0.35, scale=64.0).backward()
    """
    checks.number("margin", margin)
    rule = Margin(cosine=float(margin))
    return _margin_softmax(embeddings, target, weight, rule, scale, ignore_index, Call(**options))


def _margin_softmax(
    embeddings: Tensor,
    target: Tensor,
    weight: Tensor,
    margin: Margin,
    scale: float,
    ignore_index: int,
    call: Call,
) -> Tensor:
    checks.embeddings(embeddings=embeddings, weight=weight)
    rows, classes = embeddings.shape[0], weight.shape[0]
    checks.index("ignore_index", ignore_index)
    checks.target("target", target, rows, classes, ignore_index, embeddings)
    if rows and not classes:
        raise ValueError("weight must have at least one row, one per class, got none")
    checks.number("scale", scale)
    checks.scalar("scale", scale, embeddings, positive=True)
    multiplier, scale_bound = as_scale(scale, embeddings, inverse=False)
    matrices, (query, key) = distinct(embeddings, weight)
    operands, block = autocast(*matrices), Block(query, key)
    problem = Problem(
        operands=operands,
        blocks=(block,),
        scale=multiplier,
        **counted(operands, block, multiplier, target, ignore_index=ignore_index),
        cosine=True,
        scale_bound=scale_bound,
        workspace_bytes=call.workspace_bytes,
        margin=margin,
    )
    return mean_of([problem], call)
