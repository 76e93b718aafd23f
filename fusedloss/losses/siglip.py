"""SigLIP: a sigmoid for every pair of the batch, without a normaliser."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from .. import masks
from ..core import checks
from ..core.numerics import filled, row_numbers
from ..core.problem import Fold
from ..distributed import Request, loss_across
from . import _straight as straight
from ._folded import fold_loss, fold_problem
from ._options import AcrossOptions, Call, expanded, ranks
from ._softmax import as_scale, autocast, distinct


@expanded
def siglip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    target: Tensor | masks.Mask | None = None,
    normalize: bool = False,
    **options: Unpack[AcrossOptions],
) -> Tensor:
    """SigLIP loss (Zhai et al. 2023); argument names and order are open_clip's.

        z_ij   = logit_scale * <image_i, text_j> + logit_bias;   y_ij = 1 for positives, else -1
        loss_i = sum_j log(1 + exp(-y_ij z_ij));                 the mean is over rows, as in open_clip

    Args:
        image_features: `[M, D]`, used as given: normalise them first, or pass `normalize=True`.
        text_features: `[N, D]`, the dtype and device of `image_features`.
        logit_scale: the multiplier itself (already exponentiated): a number, or a tensor of one element, which
            receives a gradient.
        logit_bias: a number, or a tensor of one element, which receives a gradient; None is 0.
        target: the positive pairs: None, pair i with i (needs N >= M); int64 `[M]`, each row's column; or
            `masks.same_id(image_ids, text_ids)`, every pair of equal ids.
        normalize: divide each row of both by `max(|row|, 1e-12)` first.
        reduction: "mean" (the sum over all pairs, divided by M), "sum", or "none" (`[M]`).

    Returns:
        A 0-dim tensor (`[M]` for "none"), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        IndexError: on a CPU, a target outside `text_features`.
        UnsupportedError: the backend asked for cannot run this.

    Example:
        >>> image, text = F.normalize(vision(pixels), dim=1), F.normalize(language(tokens), dim=1)
        >>> fusedloss.siglip(image, text, log_scale.exp(), bias).backward()
    """
    x, y = image_features, text_features
    found = straight.sigmoid(x, y, logit_scale, options, (target,), bias=logit_bias, cosine=normalize)
    if found is not None:
        return found
    world = ranks(options)

    def ask(call: Call) -> Request:
        checks.embeddings(image_features=image_features, text_features=text_features)
        M, N = image_features.shape[0], text_features.shape[0]
        checks.scalar("logit_scale", logit_scale, image_features, positive=False)
        if logit_bias is not None:
            checks.scalar("logit_bias", logit_bias, image_features, positive=False)
        if world is not None and isinstance(target, Tensor):
            raise ValueError("target must be None or masks.same_id if group is given, got a tensor")
        labels, column = _positives(target, M, N, image_features)
        operands = autocast(*distinct(image_features, text_features)[0])
        scale, written = as_scale(logit_scale, image_features, inverse=False)
        bias, written_bias = as_scale(0.0 if logit_bias is None else logit_bias, image_features, inverse=False)
        weight = filled(M, 1.0, scale.dtype, scale.device)
        what = f"siglip{' with ids' if labels else ''}, scale {written}, bias {written_bias}"
        if world is not None and labels is None:  # number the pairs of all ranks
            first = world.rank << 40
            labels = row_numbers(M, image_features) + first, row_numbers(N, image_features) + first
            column = None
        elif column is not None:
            # If values are not read back, a target out of range makes the loss NaN.
            outside = (column < 0) | (column >= N)
            weight, column = weight.masked_fill(outside, torch.nan), column.masked_fill(outside, 0)
        fold = Fold("sigmoid", labels=labels, scalars=(bias,))
        problem = fold_problem(operands, scale, weight, fold, call, cosine=normalize, target=column)
        return call.request(what, problem)

    if world is not None:
        return loss_across(world, lambda: ask(Call(**options)))
    call = Call(**options)
    (problem,) = ask(call).problems
    return fold_loss(problem, call, over=problem.rows)[0]


def _positives(
    target: Tensor | masks.Mask | None, M: int, N: int, like: Tensor
) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
    """Returns either labels of both sides, or a column for each row."""
    if isinstance(target, masks.Mask):
        (bound,) = masks.bind(target, M, [N], like)
        if len(target.compare) != 1 or target.compare[0][0] != "same_id" or bound._replace(compare=()).given:
            raise ValueError("target must be masks.same_id alone if it is a mask, got another one or several joined")
        return (bound.compare[0].rows, bound.compare[0].keys), None
    if target is not None:
        checks.target("target", target, M, N, None, like)
        return None, target
    if N < M:
        raise ValueError(
            f"text_features must have at least {M} rows, one per image, for the default target, got {N}; pass target"
        )
    return None, row_numbers(M, like)
