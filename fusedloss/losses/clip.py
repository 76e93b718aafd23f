"""CLIP: InfoNCE in both directions over one similarity matrix."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import checks, masks
from ..problem import Block
from ._in_batch import Loss, Objective, as_scale, asked, autocast, distinct, objective, result_of
from ._module import LossModule


@checks.explained
def clip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    mask: masks.Mask | Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    return_stats: bool = False,
    group: Any = None,
    strategy: str = "gather",
    grad_scale: str = "ddp",
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
        logit_bias: shifts all logits alike, so the loss does not depend on it; accepted for open_clip's sake, and
            given its gradient, 0.
        mask: which pairs may compete, in both directions: `masks.same_id`, `masks.same_group`, or bool `[B, B]`. The
            pairs of the batch themselves always may.
        normalize: divide each row of both by `max(|row|, 1e-12)` first. The norms act on the fp32 accumulator, so unit
            vectors are never rounded to 16 bits; and where `logit_scale` is a number, the logits' bound is known.
        reduction: "mean", "sum", or "none" (`[B]`: `(row_i + column_i) / 2`).
        backend: "auto", "triton", "chunked" or "reference".
        workspace_bytes: the most that the workspace for one chunk of similarities may take; None is the environment's
            FUSEDLOSS_WORKSPACE_BYTES, or else the device's default: 64 MiB on a CPU, about 900 MiB on a GPU. Less
            memory takes longer; results are the same to rounding.
        return_stats: return `(loss, Stats)`, where the statistics are those of image to text.
        group: a ProcessGroup whose other ranks' columns compete, too. The result is the mean (or sum) over all ranks'
            rows, on every rank; "none" gives this rank's. See `fusedloss.distributed`.
        strategy: how columns travel: "gather", all at once, or "ring", a shard at a time.
        grad_scale: "ddp" (right after DistributedDataParallel's average), "sum" (this rank's share) or
            "match:<library>".

    Returns:
        A 0-dim tensor (`[B]` for "none"), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        UnsupportedError: the backend asked for cannot run this.

    Example:
        >>> image, text = F.normalize(vision(pixels), dim=1), F.normalize(language(tokens), dim=1)
        >>> fusedloss.clip(image, text, log_scale.exp()).backward()
    """

    def ask() -> tuple[str, list[Objective]]:
        one = clip_objective(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            mask=mask,
            normalize=normalize,
            reduction=reduction,
            backend=backend,
            workspace_bytes=workspace_bytes,
            return_stats=return_stats,
        )
        return "clip", [one]

    result = result_of(ask, asked(group, strategy, grad_scale))
    if not isinstance(logit_bias, Tensor):
        return result
    loss, *stats = result if isinstance(result, tuple) else (result,)
    loss = loss + 0.0 * logit_bias.reshape(()).to(loss.dtype)
    return (loss, stats[0]) if stats else loss


def clip_objective(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    mask: masks.Mask | Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    return_stats: bool = False,
) -> Objective:
    checks.embeddings(image_features=image_features, text_features=text_features)
    if image_features.shape[0] != text_features.shape[0]:
        raise ValueError(
            f"text_features has {text_features.shape[0]} rows and image_features {image_features.shape[0]}: "
            "pairs need one text per image"
        )
    checks.scalar("logit_scale", logit_scale, image_features, positive=False)
    if logit_bias is not None:
        checks.scalar("logit_bias", logit_bias, image_features, positive=False)
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    checks.count("workspace_bytes", workspace_bytes)
    rows = image_features.shape[0]
    (bound,) = masks.bind(mask, rows, [rows], image_features)
    if bound.margin is not None or bound.guide is not None or bound.skip is not None:
        raise ValueError(
            "mask has a part that belongs to rows, a margin, a guide or not_self, and clip has two directions: pass "
            "masks.same_id, masks.same_group or a bool matrix, or take the mean of info_nce both ways"
        )
    scale, scale_bound = as_scale(logit_scale, image_features, inverse=False)
    operands, (x, y) = distinct(image_features, text_features)
    return objective(
        autocast(*operands),
        [Block(x, y, mask=bound)],
        None,
        scale,
        scale_bound=scale_bound,
        cosine=normalize,
        symmetric=True,
        reduction=reduction,
        backend=backend,
        workspace_bytes=workspace_bytes,
        return_stats=return_stats,
    )


class ClipLoss(LossModule, function=clip, tensors=("mask",)):
    """`clip` with its options in the constructor and tensors in `forward(image_features, text_features, ...)`."""
