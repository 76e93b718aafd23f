"""The formulas of the softmax epilogue: sums over a row of logits, and the loss that follows from them.

The row sum leaves out the target, because `lse - z_t` and `p_t - 1` cancel for well-fitted pairs: in fp32 a loss of
2.7e-7 would be 78 % wrong.
"""

# maths.md: The softmax row; Softcap; Margin

from __future__ import annotations

import math

import torch
from torch import Tensor

from .problem import Margin

LIKELY = math.log(0.9)  # up to this probability torch's loss and gradient lose less than one digit, to 1 - p


def softmax_rows(
    z: Tensor, target: Tensor, label_smoothing: float = 0.0, decoupled: bool = False, copies: int = 1
) -> Tensor:
    """Returns the cross-entropy of each row of `z` [M, N] with column `target` [M]; autograd differentiates it.

    A logit of -inf removes its column, and a target of -1 means none. decoupled: leave the target out of the
    normaliser. copies: the number of times the target appears in the normaliser.
    """
    if z.shape[0] == 0:
        return z.sum(dim=1)
    none, index = target < 0, target.clamp(min=0)[:, None]
    entry = z.gather(1, index)
    z_target = entry[:, 0].masked_fill(none, 0)
    z_target = z_target.masked_fill(z_target == torch.inf, torch.nan)  # torch's cross-entropy gives NaN, inf - inf
    negatives = z.scatter(1, index, torch.where(none[:, None], entry, -torch.inf))
    maximum = negatives.detach().amax(dim=1)
    shift = torch.where(maximum == -torch.inf, 0, maximum)
    total = torch.exp(negatives - shift[:, None]).sum(dim=1)
    loss = decoupled_loss(shift, total, z_target) if decoupled else softmax_loss(shift, total, z_target, copies)
    if label_smoothing:
        admissible = z > -torch.inf
        mean = z.masked_fill(~admissible, 0).sum(dim=1) / admissible.sum(dim=1).clamp_min(1)
        loss = loss + label_smoothing * (z_target - mean)
    return loss


def softmax_loss(shift: Tensor, total: Tensor, z_target: Tensor, copies: int = 1) -> Tensor:
    """Returns `log(copies + total exp(shift - z_t))`, where `total exp(shift)` is the sum over the negatives.

    The result is never negative. With one copy and no negatives it is exactly 0.
    """
    least = math.log(copies)
    return softplus(safe_log(total) - (z_target - shift).to(total.dtype) - least) + least


def softplus(x: Tensor) -> Tensor:
    """Returns `log(1 + exp(x))`. Its derivatives are accurate at any `x`, -inf included.

    F.softplus becomes the identity at 20, which is 2e-9 off; at 40 the error is 4e-18. The second derivative of
    logaddexp is NaN where exp(-x) overflows: below -88 in fp32, and at -inf.
    """
    return torch.nn.functional.softplus(x, threshold=40.0)


def decoupled_loss(shift: Tensor, total: Tensor, z_target: Tensor) -> Tensor:
    """Returns `log(total) + shift - z_t`, or 0 for a row without negatives."""
    return torch.where(total == 0, 0, safe_log(total) - (z_target - shift).to(total.dtype))


def bent(z: Tensor, softcap: float) -> Tensor:
    """Returns `softcap * tanh(z / softcap)`. Its derivative is `1 - (bent / softcap)^2`."""
    return torch.tanh(z / softcap) * softcap


def marginal(cosine: Tensor, margin: Margin, eps: float) -> tuple[Tensor, Tensor]:
    """Returns `cos(theta + angle) - margin.cosine`, the target's cosine less its margin, and its derivative by cosine.

    For theta above pi - angle, where cos(theta + angle) would rise again, the value is
    `cosine - angle sin(angle) - margin.cosine`, pytorch-metric-learning's rule. The code uses the sine instead of acos,
    whose derivative is infinite at 1. If a row is closer to its class vector than sqrt(eps), or than the rounding of
    the cosine, its direction is only the rounding of its products: the derivative is then `cos(angle)` alone.
    """
    sin, cos = math.sin(margin.angle), math.cos(margin.angle)
    square = (1 - cosine) * (1 + cosine)
    apart = square > max(eps, 64 * torch.finfo(cosine.dtype).eps)
    sine = torch.where(apart, square, 1).sqrt()
    nearly = square.detach().clamp(min=0).sqrt()
    beyond = cosine < -cos
    value = torch.where(beyond, cosine - margin.angle * sin, cosine * cos - torch.where(apart, sine, nearly) * sin)
    slope = torch.where(beyond, 1, cos + torch.where(apart, cosine / sine, 0) * sin)
    return value - margin.cosine, slope


def safe_log(total: Tensor) -> Tensor:
    """Returns log(total), -inf for 0. Plain torch.log would put 0 * inf into the gradient of the reference."""
    return torch.where(total == 0, -torch.inf, torch.log(torch.where(total == 0, 1, total)))
