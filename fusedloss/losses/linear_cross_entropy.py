"""Cross-entropy of a linear layer, a vocabulary's or classifier's head, without materialised logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor

from .. import transforms
from ..backends import select
from ..core import checks
from ..core.numerics import savable
from ..core.problem import Block, Problem, TokenStats
from ..core.transforms import Transform
from ..sweep import entropy
from ..sweep.autograd import loss_mean, loss_rows_or_sum
from . import _straight as straight
from ._options import Call, WorkspaceOptions, expanded
from ._softmax import as_scale, autocast, columns_and_weights, distinct

IGNORE_INDEX = -100
INSTEAD = "torch.nn.functional.linear_cross_entropy takes"


@expanded
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    compact: bool | None = None,
    transform: Transform | Callable[[Tensor], Tensor] | None = None,
    temperature: float = 1.0,
    return_stats: bool = False,
    entropy_gradient: bool = False,
    **shared: Unpack[WorkspaceOptions],
) -> Tensor | tuple[Tensor, TokenStats]:
    """`torch.nn.functional.linear_cross_entropy` of class indices, with neither logits nor their gradient in memory.

        z      = (input @ linear_weight.T + linear_bias) / temperature
                 softcap: z = softcap * tanh((input @ linear_weight.T + linear_bias) / softcap) / temperature
        loss_i = weight_target (logsumexp_c z_ic - z_i,target)    z_loss:  + weight_target z_loss logsumexp_c(z_ic)^2

    Memory is O((N + C) D) plus a bounded workspace. In 16 bits the logits are fp32 from the accumulator to the
    exponential. Only torch's function takes class probabilities and K-dimensional weights.

    Args:
        input: `[N, D]`, or `[D]`, or `[..., D]`; float16, bfloat16, float32 or float64, any strides.
        linear_weight: `[C, D]`, the dtype and device of `input`. Receives a gradient, as `input` and `linear_bias` do.
        target: int64 of `input`'s shape without D: class indices.
        linear_bias: `[C]`. -inf removes a class, also from what smoothing is spread over.
        weight: `[C]`, one per class: multiplies the loss of the rows with that target; the mean divides by the sum over
            the rows. Receives no gradient.
        reduction: "mean" (NaN without a row that counts, as in torch), "sum", or "none" (`target`'s shape).
        ignore_index: rows with this target are left out; None is -100.
        label_smoothing: share of the target mass spread over all classes, in proportion to `weight` if given. With
            `weight`, neither softcap nor z_loss can be given.
        options: torch's LinearCrossEntropyOptions, accepted without effect: chunks follow from `workspace_bytes`.
        softcap: limits logits to +-softcap by tanh (Gemma 2), after the bias.
        z_loss: weight of the squared log-normaliser (PaLM).
        compact: remove left-out rows before the products. This reads their number back: None is True on a CPU, where
            that costs nothing, and False on a GPU, where it waits for the device.
        transform: a function of each row's own loss, before `weight`: one of `fusedloss.transforms`, or a function of a
            tensor of a loss per row. `label_smoothing` and `z_loss` must be 0 with it.
        temperature: a positive number.
        return_stats: return `(loss, TokenStats)`: whether each row's target has the largest logit, counted in the same
            sweep, and the entropy of its softmax, which takes one more product.
        entropy_gradient: whether that entropy may receive a gradient, which takes three more products. Second
            derivatives of it need backend "reference".

    Returns:
        A 0-dim tensor (`target`'s shape for "none"), float32, or float64 for float64 inputs; with `return_stats` also
        TokenStats `(correct, entropy)`, both of `target`'s shape.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        IndexError: on a CPU, a target out of range. On a GPU values are not read back and the loss is NaN.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> hidden = decoder(tokens)                                                     # [B, T, D]
        >>> fusedloss.linear_cross_entropy(hidden, head.weight, tokens_after, ignore_index=pad_id).backward()

        With a bonus for entropy, as in reinforcement learning:

        >>> loss, stats = fusedloss.linear_cross_entropy(
        ...     hidden, head.weight, tokens_after, temperature=0.7, return_stats=True, entropy_gradient=True
        ... )
        >>> (loss - 0.01 * stats.entropy.mean()).backward()
    """
    off: tuple[object, ...] = (target is None, linear_bias, weight, reduction != "mean", return_stats, entropy_gradient)
    off += (ignore_index, label_smoothing, z_loss, softcap, transform, type(temperature) is not float, compact)
    found = straight.mean(input, linear_weight, temperature, shared, off, inverse=True, target=target)
    if found is not None:
        return found
    call = Call(reduction=reduction, **shared)
    if compact is not None:
        checks.flag("compact", compact)
    ignore_index = IGNORE_INDEX if ignore_index is None else ignore_index
    x, index = _rows(input, linear_weight, target)
    classes = linear_weight.shape[0]
    checks.index("ignore_index", ignore_index)
    checks.target("target", index, x.shape[0], classes, ignore_index, x)
    if x.shape[0] and not classes:
        raise ValueError("linear_weight must have at least one row, one per class, got none")
    if linear_bias is not None:
        checks.vector("linear_bias", linear_bias, classes, "class", x)
    if weight is not None:
        checks.vector("weight", weight, classes, "class", x)
    checks.share("label_smoothing", label_smoothing)
    checks.number("z_loss", z_loss, least=0)
    checks.softcap(softcap)
    checks.number("temperature", temperature)
    if temperature <= 0:
        raise ValueError(f"temperature must be a positive number, got {temperature}")
    if entropy_gradient and not return_stats:
        raise ValueError("return_stats must be True with entropy_gradient=True, got False; pass return_stats=True")
    phi = transforms.bind(transform)
    for name, value in {"label_smoothing": label_smoothing, "z_loss": z_loss}.items():
        if phi is not None and value:
            raise ValueError(f"{name} must be 0 with transform, got {value}; leave one of them out")
    if weight is not None and label_smoothing and (softcap is not None or z_loss):
        other = "softcap" if softcap is not None else "z_loss"
        raise ValueError(
            f"{other} must not be given together with weight and label_smoothing, got all three; pass at most two"
        )

    x, y = autocast(savable(x), savable(linear_weight))
    if compact is None:
        compact = x.device.type == "cpu" and checks.reads_values(index)
    kept = (index != ignore_index).nonzero()[:, 0] if compact else None
    if kept is not None and len(kept) < len(index):
        x, index = x.index_select(0, kept), index.index_select(0, kept)
    scale, scale_bound = as_scale(temperature, x, inverse=True)
    number = 1.0 / temperature
    softcap = None if softcap is None else softcap * number  # of logits that are divided before they are bent
    if linear_bias is not None and temperature != 1:
        linear_bias = savable(linear_bias).to(scale.dtype) * number
    index, counts = columns_and_weights(index, torch.ones_like(index, dtype=scale.dtype), classes, ignore_index)
    share, row_weight, smoothed = counts, counts, None
    if weight is not None:
        weight = savable(weight).detach().to(scale.dtype)
        row_weight = share = counts * weight[index]
        if label_smoothing:
            # eps / C sum_c w_c (lse - z_c) is a multiple of the cross-entropy plus a difference that is linear in x.
            row_weight = (1 - label_smoothing) * share + label_smoothing * weight.mean() * counts
            smoothed = label_smoothing * _mean_difference(x, y, linear_bias, index, weight, number).masked_fill(
                counts == 0, 0
            )
            label_smoothing = 0.0
    operands, (query, key) = distinct(x, y)
    problem = Problem(
        operands=tuple(operands),
        blocks=(Block(query, key, linear_bias),),
        scale=scale,
        target=index,
        weight=row_weight,
        label_smoothing=label_smoothing,
        scale_bound=scale_bound,
        workspace_bytes=call.workspace_bytes,
        softcap=float(softcap or 0.0),
        z_loss=float(z_loss),
        transform=phi,
        wants_tally=return_stats,
    )
    chosen, total = select(problem, call.backend), share.sum()
    if reduction == "mean":
        divisor = total.masked_fill(total == 0, 1)
        loss, tally = loss_mean(problem, chosen, divisor)
        if smoothed is not None:
            loss = loss + smoothed.sum() / divisor
        loss = torch.where(total == 0, torch.nan, loss)  # the gradients of a mean over no rows are 0, as in torch
    else:
        loss, tally = loss_rows_or_sum(problem, chosen, reduction == "none")
        if smoothed is not None:
            loss = loss + (smoothed if reduction == "none" else smoothed.sum())
        if reduction == "none":
            loss = _of_all(loss, kept, target)
    if not return_stats:
        return loss
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        found = _entropy(problem, chosen, linear_bias).masked_fill(counts == 0, 0)
        by_row = _of_all(found, kept, target)
    _, above, maximum, score = tally[:4]
    correct = (above == 0) & (counts != 0) & ~(maximum.isnan() | score.isnan())  # above a NaN there is nothing
    return loss, TokenStats(_of_all(correct, kept, target), by_row)


def _of_all(found: Tensor, kept: Tensor | None, target: Tensor) -> Tensor:
    """Returns a value for each row, of those that were kept, in the target's shape; 0 for the others."""
    if kept is not None and len(kept) < target.numel():
        found = found.new_zeros(target.numel()).index_copy(0, kept, found)
    return found.reshape(target.shape)


def _entropy(problem: Problem, backend: str, bias: Tensor | None) -> Tensor:
    block, scale = problem.blocks[0], problem.scale_bound
    assert scale is not None
    given = problem.operands[block.query], problem.operands[block.key], bias, scale, problem.softcap
    with torch.autocast(problem.device.type, enabled=False):
        if backend == "reference" or torch.compiler.is_compiling():
            return entropy.formula(*given)
        return entropy.entropies(*given, problem.workspace_bytes)


def _rows(input: Tensor, linear_weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `input` as `[N, D]` and `target` as `[N]`."""
    if not isinstance(input, Tensor) or input.dim() == 0:
        got = f"shape {list(input.shape)}" if isinstance(input, Tensor) else checks.a(input)
        raise TypeError(f"input must be a floating tensor [..., D], got {got}")
    checks.dense("input", input)
    if not input.shape[-1]:
        raise ValueError(f"input must be [..., D] with D of at least 1, got shape {list(input.shape)}")
    if isinstance(linear_weight, Tensor) and linear_weight.dim() > 2:
        shape = list(linear_weight.shape)
        raise ValueError(f"linear_weight must be [C, D], got shape {shape}; {INSTEAD} K dimensions")
    if isinstance(target, Tensor) and target.dtype.is_floating_point:
        raise TypeError(f"target must be int64 class indices, got {target.dtype}; {INSTEAD} class probabilities")
    x = savable(input).reshape(-1, input.shape[-1])  # a view of an inference tensor has no gradient
    checks.embeddings(input=x, linear_weight=linear_weight)
    if isinstance(target, Tensor) and target.shape != input.shape[:-1]:
        wanted = list(input.shape[:-1])
        raise ValueError(f"target must have shape {wanted}, one class for each row of input, got {list(target.shape)}")
    return x, target.reshape(-1) if isinstance(target, Tensor) else target


def _mean_difference(x: Tensor, y: Tensor, bias: Tensor | None, index: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Returns `1/C sum_c weight_c (z_i,target - z_ic)` of a row in O((N + C) D), `z_ic = scale <x_i, y_c> + bias_c`."""
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.to(weight.dtype), y.to(weight.dtype)
        difference = weight.sum() * (x * y.index_select(0, index)).sum(1) - x @ (weight @ y)
        difference = scale * difference
        if bias is not None:
            bias = bias.to(weight.dtype)
            difference = difference + weight.sum() * bias[index] - weight @ bias
        return difference / len(weight)
