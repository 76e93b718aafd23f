"""Softmax cross-entropy of logits with classes or class probabilities."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import _reduction as legacy
from torch.nn import functional as F

from ..backends import few
from ..core import checks
from ..core.numerics import stats_dtype
from ..rowwise import classes
from ._options import documented

# From this label smoothing on torch's own operator loses no digits: neither the loss nor the target's entry of the
# gradient is near 0 where the target is certain.
SMOOTH = 0.01


@documented
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy, a twin of `torch.nn.functional.cross_entropy`, with its arguments, result dtype and shape.

        loss_i = weight_t (log sum_j exp(z_ij) - z_it),   t = target_i
               = -sum_j weight_j target_ij log softmax(z_i)_j    for class probabilities
        smoothed: (1 - label_smoothing) loss_i - label_smoothing / C sum_j weight_j log softmax(z_i)_j

    The loss of a class index is log(1 + sum_{j != t} exp(z_ij - z_it)), and the target's entry of the gradient is minus
    the sum of the other probabilities. Both keep their digits if the target is certain, where log_softmax gives 0.
    Logits of +-1e4 do not overflow. Everything is computed in fp32 (fp64 for fp64). Only the gradient is kept for
    backward, of the input's size and dtype; a second derivative needs backend="reference". On a CPU "auto"
    runs torch's own operator up to 2^17 logits where it loses no digits: for class probabilities, from
    label_smoothing = 0.01 on, and for batches in which no class has a probability above 0.9.

    Args:
        input: logits `[C]`, `[N, C]` or `[N, C, d1, ...]`, float16, bfloat16, float32 or float64, any strides.
        target: int64 (or uint8) classes, `input`'s shape without C; or floating class probabilities of its shape.
        weight: `[C]`, one number per class; the mean of class indices is divided by the sum of their weights. If it or
            the class probabilities require a gradient, the loss runs as the formula of "reference".
        size_average, reduce: deprecated, as in torch.
        ignore_index: rows of this class are left out, also of the gradient. Not for probabilities.
        reduction: "mean", "sum" or "none" (`target`'s shape, or without C).
        label_smoothing: from 0 to 1, the share of the target that is spread evenly over the classes.
        z_loss: this many times (log sum_j exp(z_ij))^2 is added to each row that counts, without class weight (PaLM;
            Liger's lse_square_scale). Its mean is over the rows that count.
        softcap: logits become softcap * tanh(input / softcap) first (Gemma 2).
        backend: {rows}.

    Returns:
        0-dim, or rows for "none", in `input`'s dtype (float32 under autocast). A mean over nothing is NaN, as in torch.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        IndexError: on a CPU, a class out of range. On a GPU values are not read back and the loss is NaN.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> logits = model(tokens)
        >>> fusedloss.cross_entropy(logits, labels, label_smoothing=0.1, z_loss=1e-4).backward()
    """
    if size_average is not None or reduce is not None:
        reduction = legacy.legacy_get_string(size_average, reduce)
    if weight is None and softcap is None and type(z_loss) is type(label_smoothing) is float and not z_loss:
        found = _shortly(input, target, ignore_index, reduction, label_smoothing, backend)
        if found is not None:
            return found
    _check_options(ignore_index, reduction, label_smoothing, z_loss, softcap, backend)
    dtype = _check_tensors(input, target, weight)
    shares = target.dtype.is_floating_point
    if shares and ignore_index >= 0:
        raise ValueError(f"ignore_index must be negative if target holds class probabilities, got {ignore_index}")
    if not input.numel():  # no elements: torch's result
        return F.cross_entropy(input, target, weight, None, ignore_index, None, reduction, label_smoothing)
    x = input if input.dim() == 2 else input[None] if input.dim() == 1 else input.flatten(2)
    if dtype == torch.float64 and x.dtype != dtype:
        x = x.to(dtype)
    if shares:
        target = target if x is input else target.reshape(x.shape)
    else:
        target = target if target.dtype == torch.int64 else target.long()
        target = target if x is input else target.reshape(x.shape[:1] + x.shape[2:])
    loss = classes.cross_entropy(
        x,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        backend=backend,
    )
    if reduction == "none" and input.dim() != 2:
        loss = loss.reshape(input.shape[:1] + input.shape[2:] if input.dim() > 1 else ())
    return loss if loss.dtype == dtype else loss.to(dtype)


def _shortly(
    input: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float, backend: str
) -> Tensor | None:
    """The loss of ordinary arguments in few calls; None for all others, and where they are wrong."""
    if not (
        not torch.compiler.is_compiling()
        and type(input) is Tensor is type(target)
        and input.dtype in checks.FLOATING
        and input.dtype is stats_dtype(input.dtype)
        and input.is_cpu
        and target.is_cpu
        and input.layout is torch.strided is target.layout
        and not (input.is_nested or target.is_nested or input.is_inference() or target.is_inference())
        and type(ignore_index) is int
        and reduction in checks.CODES
        and input.dim() == 2
        and input.numel()
    ):
        return None
    shares = target.dtype is input.dtype and target.shape == input.shape and ignore_index < 0
    if not shares and (target.dtype is not torch.int64 or target.shape != input.shape[:1]):
        return None
    if not shares and not label_smoothing:
        return classes.certain(input, target, ignore_index, reduction, backend)
    if not (shares or SMOOTH <= label_smoothing) or not 0 <= label_smoothing <= 1 or not few(backend, input, "classes"):
        return None
    try:
        code = checks.CODES[reduction]
        return checks.OPERATORS.cross_entropy_loss(input, target, None, code, ignore_index, label_smoothing)
    except IndexError:  # the long way's says which row
        return None


def _check_options(
    ignore_index: int, reduction: str, label_smoothing: float, z_loss: float, softcap: float | None, backend: str
) -> None:
    checks.index("ignore_index", ignore_index)
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    checks.share("label_smoothing", label_smoothing)
    checks.number("z_loss", z_loss, least=0)
    checks.softcap(softcap)
    checks.backend(backend)


def _check_tensors(input: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype:
    """Checks the tensors; returns the dtype of the result."""
    if isinstance(input, nn.Module):
        checks.options_not_modules(input=input)
    if not isinstance(input, Tensor) or input.dtype not in checks.FLOATING:
        got = input.dtype if isinstance(input, Tensor) else checks.a(input)
        raise TypeError(f"input must be logits in float16, bfloat16, float32 or float64, got {got}")
    checks.dense("input", input)
    if not input.dim():
        raise ValueError("input must be logits [C], [N, C] or [N, C, d1, ...], got shape []")
    dtype = torch.float32 if checks.autocasts(input) else input.dtype
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor of classes or of class probabilities, got {checks.a(target)}")
    checks.dense("target", target)
    shape = input.shape
    rows = shape[:-1] if len(shape) < 3 else shape[:1] + shape[2:]
    if target.dtype.is_floating_point:
        if target.shape != input.shape:
            raise ValueError(
                f"target must be class probabilities of input's shape, {list(input.shape)}, or int64 classes "
                f"{list(rows)}, got {target.dtype} {list(target.shape)}"
            )
        dtype = torch.promote_types(dtype, target.dtype)
        dtype = dtype if weight is None else torch.promote_types(dtype, weight.dtype)
    elif target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"target must be int64 (or uint8) classes, got {target.dtype}; call .long()")
    elif target.shape != rows and not (input.dim() == 1 and target.shape == (1,)):
        raise ValueError(
            f"target must be one class per row of input, {list(rows)}, or floating class probabilities "
            f"{list(input.shape)}, got shape {list(target.shape)}"
        )
    checks.same_device("target", target, "input", input)
    if weight is not None:
        checks.vector("weight", weight, shape[0 if len(shape) == 1 else 1], "class", input)
    return dtype
