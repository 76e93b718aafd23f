"""CLIP: InfoNCE in both directions over one similarity matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

from torch import Tensor

from .. import masks, transforms
from ..core import checks
from ..core.problem import Block, Problem
from ..core.transforms import Transform
from ..distributed import Request
from . import _straight as straight
from ._options import Call, CountingAcrossOptions, expanded
from ._softmax import Loss, as_scale, autocast, both_ways, counted, distinct, result_of
from ._targets import check_debiased, counts


@expanded
def clip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    mask: masks.Mask | Tensor | None = None,
    normalize: bool = False,
    decoupled: bool = False,
    transform: Transform | Callable[[Tensor], Tensor] | None = None,
    debiased: float = 0.0,
    **options: Unpack[CountingAcrossOptions],
) -> Loss:
    """CLIP loss (Radford et al. 2021), the mean of both directions; argument names and order are open_clip's.

        z_ij   = logit_scale * <image_i, text_j> + logit_bias
        loss_i = (logsumexp_j z_ij + logsumexp_j z_ji) / 2 - z_ii

    The matrix z is never stored, and both directions share one statistics sweep and one gradient sweep.

    Args:
        image_features: `[B, D]`, used as given: normalise them first, as CLIP models do, or pass `normalize=True`.
        text_features: `[B, D]`, the dtype and device of `image_features`.
        logit_scale: the multiplier itself (already exponentiated): a number, or a tensor of one element, which
            receives a gradient.
        logit_bias: shifts all logits alike, so the loss does not depend on it and its gradient is 0; accepted because
            open_clip has it.
        mask: the pairs that may compete, in both directions: `masks.same_id`, `masks.same_group`, or bool `[B, B]`. A
            positive pair always may.
        normalize: divide each row of both by `max(|row|, 1e-12)` first. The norms act on the fp32 accumulator, so unit
            vectors are never rounded to 16 bits; and where `logit_scale` is a number, the logits' bound is known.
        decoupled: leave the pair itself out of both normalisers (DCL, Yeh et al. 2022): see `info_nce`.
        transform: a function of each direction's own loss of a pair, before their mean: one of
            `fusedloss.transforms`, or a function of a tensor `[B]`.
        debiased: the share of the negatives that are none in truth (Chuang et al. 2020), in each direction: see
            `info_nce`. With a `mask` each direction takes a sweep of its own. `decoupled` cannot be given with it.
        reduction: "mean", "sum", or "none" (`[B]`: `(row_i + column_i) / 2`).
        return_stats: return `(loss, Stats)`, where the statistics are those of image to text.

    Returns:
        A 0-dim tensor (`[B]` for "none"), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> image, text = F.normalize(vision(pixels), dim=1), F.normalize(language(tokens), dim=1)
        >>> fusedloss.clip(image, text, log_scale.exp()).backward()
    """

    off, x, y = (logit_bias, mask, decoupled, transform, debiased), image_features, text_features
    found = straight.mean(x, y, logit_scale, options, off, cosine=normalize, symmetric=True)
    if found is not None:
        return found

    def ask(call: Call) -> Request:
        problems = clip_problems(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            mask=mask,
            normalize=normalize,
            decoupled=decoupled,
            transform=transform,
            debiased=debiased,
            call=call,
        )
        return call.request("clip", *problems)

    result = result_of(options, ask)
    loss, *stats = result if isinstance(result, tuple) else (result,)
    loss = with_bias(loss, logit_bias)
    return (loss, stats[0]) if stats else loss


def with_bias(loss: Tensor, logit_bias: float | Tensor | None) -> Tensor:
    """The loss, of which a tensor `logit_bias` has a gradient of 0, and not none."""
    return loss + 0.0 * logit_bias.reshape(()).to(loss.dtype) if isinstance(logit_bias, Tensor) else loss


def clip_problems(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    mask: masks.Mask | Tensor | None,
    normalize: bool,
    decoupled: bool,
    transform: Transform | Callable[[Tensor], Tensor] | None,
    debiased: float = 0.0,
    call: Call,
) -> list[Problem]:
    checks.embeddings(image_features=image_features, text_features=text_features)
    if image_features.shape[0] != text_features.shape[0]:
        raise ValueError(
            f"text_features must have {image_features.shape[0]} rows, one text per image of image_features, "
            f"got {text_features.shape[0]}"
        )
    checks.scalar("logit_scale", logit_scale, image_features, positive=False)
    if logit_bias is not None:
        checks.scalar("logit_bias", logit_bias, image_features, positive=False)
    rows = image_features.shape[0]
    (bound,) = masks.bind(mask, rows, [rows], image_features)
    if bound.margin is not None or bound.guide is not None or bound.skip is not None:
        raise ValueError(
            "mask must be masks.same_id, masks.same_group or a bool matrix, which serve both directions of clip, got "
            "one for rows alone (score_margin, guide or not_self); for those average info_nce in both directions"
        )
    check_debiased(debiased, decoupled=decoupled)
    scale, scale_bound = as_scale(logit_scale, image_features, inverse=False)
    matrices, (x, y) = distinct(image_features, text_features)
    operands, block = autocast(*matrices), Block(x, y, mask=bound)
    problem = Problem(
        operands=operands,
        blocks=(block,),
        scale=scale,
        **counted(operands, block, scale),
        cosine=normalize,
        symmetric=True,
        scale_bound=scale_bound,
        workspace_bytes=call.workspace_bytes,
        wants_tally=call.return_stats or counts(debiased, (block,)),
        decoupled=decoupled,
        transform=transforms.bind(transform, decoupled),
        debiased=float(debiased),
    )
    # Negatives are counted by sweeps of one direction.
    return both_ways(problem) if counts(debiased, (block,)) else [problem]
