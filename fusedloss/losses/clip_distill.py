"""CLIP distillation: the student's softmax over the whole batch learns the teacher's, neither materialised."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from ..core import checks
from ..core.mask import NO_MASK
from ..core.problem import Fold
from . import _straight as straight
from ._options import Call, SweepOptions, expanded
from ._softmax import as_scale, mean_of
from .info_nce_distill import Embeddings, distill_problem


@expanded
def clip_distill(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    teacher_logit_scale: float | Tensor,
    *,
    normalize: bool = False,
    **options: Unpack[SweepOptions],
) -> Tensor:
    """CLIP distillation over the full batch: KL(teacher || student) of the two softmaxes, the mean of both directions.

        p_i    = softmax_j(teacher_logit_scale * <teacher_image_i, teacher_text_j>)
        loss_i = KL(p_i || softmax_j(logit_scale * <image_i, text_j>)) / 2  +  the same from text to image

    open_clip's DistillClipLoss is the cross-entropy of the same distributions: it differs by the teacher's entropy,
    a constant, and has the same gradient. Both matrices are computed by row chunks, once for each direction.

    Args:
        image_features, text_features: `[B, D]`, used as given unless `normalize`.
        logit_scale: the multiplier itself: a number, or a tensor of one element, which receives a gradient.
        teacher_image_features, teacher_text_features: `[B, T]`, of the teacher, of any dimension, used as given; they
            receive no gradient.
        teacher_logit_scale: a number, or a tensor of one element without gradient.
        normalize: divide each of the student's rows by `max(|row|, 1e-12)` first.
        reduction: "mean", "sum", or "none" (`[B]`: `(row_i + column_i) / 2`).

    Returns:
        A 0-dim tensor (`[B]` for "none"), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> with torch.no_grad():
        ...     teacher_image, teacher_text = teacher(pixels, tokens)
        >>> fusedloss.clip_distill(image, text, scale, teacher_image, teacher_text, 100.0).backward()
    """
    teacher = teacher_image_features, teacher_text_features, teacher_logit_scale
    x, y = image_features, text_features
    found = straight.divergence(x, y, logit_scale, teacher, options, (), cosine=normalize, symmetric=True)
    if found is not None:
        return found
    call = Call(**options)
    checks.embeddings(image_features=image_features, text_features=text_features)
    checks.embeddings(teacher_image_features=teacher_image_features, teacher_text_features=teacher_text_features)
    rows = image_features.shape[0]
    for name, x in (
        ("text_features", text_features),
        ("teacher_image_features", teacher_image_features),
        ("teacher_text_features", teacher_text_features),
    ):
        if x.shape[0] != rows:
            raise ValueError(f"{name} must have {rows} rows, like image_features, got {x.shape[0]}")
        checks.same_device(name, x, "image_features", image_features)
    checks.scalar("logit_scale", logit_scale, image_features, positive=False)
    checks.scalar("teacher_logit_scale", teacher_logit_scale, image_features, positive=False)
    scale, _ = as_scale(logit_scale, image_features, inverse=False)
    teacher_scale, _ = as_scale(teacher_logit_scale, image_features, inverse=False)
    fold = Fold("distill", teacher_scale=teacher_scale.detach())
    student = Embeddings(image_features, text_features).cast()
    taught = Embeddings(teacher_image_features, teacher_text_features)
    pairs = ((student, taught), (student.turned(), taught.turned()))
    return mean_of([distill_problem(*pair, [NO_MASK], fold, scale, normalize, call) for pair in pairs], call)
