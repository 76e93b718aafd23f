"""A teacher's margins between a positive and its negatives."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import checks
from ._options import Call, RowOptions, expanded
from ._pairs import SIMILARITIES, check_columns, check_numbers, similarities, squares
from ._softmax import of_rows


@expanded
def margin_mse(
    query: Tensor,
    positive: Tensor,
    *negatives: Tensor,
    label: Tensor,
    similarity: str = "dot",
    **options: Unpack[RowOptions],
) -> Tensor:
    """MarginMSE (Hofstätter et al. 2021), as in sentence-transformers.

        loss_i = mean over k of (s(query_i, positive_i) - s(query_i, negative_ik) - margin_ik)^2

    Args:
        query, positive, negatives: `[B, D]` each, K negatives, float16, bfloat16, float32 or float64, any strides.
        label: the teacher's margins, `[B, K]`, or `[B]` for one negative; or its scores `[B, K + 1]`, the positive's
            first. Any real dtype; without a gradient.
        similarity: "dot", "cos" (norms of at least 1e-12), "angle", or the negative of a distance, "euclidean" or
            "manhattan".
        reduction: "mean", "sum" or "none" (`[B]`).

    Returns:
        A 0-dim tensor (`[B]` for "none"), float32, or float64 for float64 inputs. An empty batch gives 0.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> margins = teacher_scores[:, 0] - teacher_scores[:, 1]
        >>> fusedloss.margin_mse(query, positive, negative, label=margins).backward()
    """
    call = Call(**options)
    check_columns(query, positive, negatives)
    rows, count = query.shape[0], len(negatives)
    # For a single negative [B] and [B, 1] are the same. K + 1 scores are recognised before K margins.
    shapes = [(rows, count + 1), (rows, count), *([(rows,)] if count == 1 else [])]
    label = check_numbers("label", label, shapes, query)
    checks.choice("similarity", similarity, SIMILARITIES)
    near, *far = similarities(similarity, query, positive, *negatives, backend=call.backend)
    margins = label.detach().to(near.dtype)
    if label.shape == shapes[0]:
        margins = margins[:, :1] - margins[:, 1:]
    if count == 1:
        return squares(near - far[0], margins.reshape(rows), call.reduction)
    difference = near[:, None] - torch.stack(far, dim=1)
    return of_rows(F.mse_loss(difference, margins, reduction="none").mean(1), call.reduction)
