"""CLIP: InfoNCE in both directions over one similarity matrix."""

from __future__ import annotations

from torch import Tensor, nn

from .. import checks
from ..problem import Block
from ._in_batch import as_scale, autocast, softmax_loss


def clip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> Tensor:
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
        normalize: divide each row of both by `max(|row|, 1e-12)` first. The norms act on the fp32 accumulator, so unit
            vectors are never rounded to 16 bits; and where `logit_scale` is a number, the logits' bound is known.
        reduction: "mean", "sum", or "none" (`[B]`: `(row_i + column_i) / 2`).
        backend: "auto", "triton", "chunked" or "reference".
        workspace_bytes: the most that the workspace for one chunk of similarities may take; None is the environment's
            FUSEDLOSS_WORKSPACE_BYTES, or else the device's default: 64 MiB on a CPU, about 900 MiB on a GPU. Less
            memory takes longer; results are the same to rounding.

    Returns:
        A 0-dim tensor (`[B]` for "none"), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        UnsupportedError: the backend asked for cannot run this.

    Example:
        >>> image, text = F.normalize(vision(pixels), dim=1), F.normalize(language(tokens), dim=1)
        >>> fusedloss.clip(image, text, log_scale.exp()).backward()
    """
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
    scale, scale_bound = as_scale(logit_scale, image_features, inverse=False)
    operands = [image_features] if text_features is image_features else [image_features, text_features]
    loss = softmax_loss(
        autocast(*operands),
        [Block(0, len(operands) - 1)],
        None,
        scale,
        scale_bound=scale_bound,
        cosine=normalize,
        symmetric=True,
        reduction=reduction,
        backend=backend,
        workspace_bytes=workspace_bytes,
    )
    return loss + 0.0 * logit_bias.reshape(()).to(loss.dtype) if isinstance(logit_bias, Tensor) else loss


class ClipLoss(nn.Module):
    """`clip` with its options in the constructor and tensors in `forward(image_features, text_features, ...)`."""

    def __init__(
        self,
        normalize: bool = False,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
    ):
        super().__init__()
        checks.options_not_modules(normalize=normalize)
        checks.choice("reduction", reduction, checks.REDUCTIONS)
        checks.backend(backend)
        checks.count("workspace_bytes", workspace_bytes)
        self.normalize, self.reduction = normalize, reduction
        self.backend, self.workspace_bytes = backend, workspace_bytes

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> Tensor:
        return clip(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            normalize=self.normalize,
            reduction=self.reduction,
            backend=self.backend,
            workspace_bytes=self.workspace_bytes,
        )

    def extra_repr(self) -> str:
        return checks.options(self, normalize=False, reduction="mean", backend="auto", workspace_bytes=None)
