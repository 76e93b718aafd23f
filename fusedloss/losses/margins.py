"""Margins between a pair and the batch's other pairs: to the hardest of them, or to all."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from ..core import checks
from ..core.mask import Mask
from ..core.numerics import constant, row_numbers, stats_dtype
from ..core.problem import Fold
from ..rowwise.pairs import cosine, of_pairs
from ._folded import fold_loss, fold_problem, top
from ._options import Call, SweepOptions, expanded
from ._softmax import autocast, distinct, of_rows


@expanded
def mega_batch_margin(
    anchor: Tensor,
    positive: Tensor,
    *,
    positive_margin: float = 0.8,
    negative_margin: float = 0.3,
    **options: Unpack[SweepOptions],
) -> Tensor:
    """Mega-batch margin loss (Wieting & Gimpel 2018) as in sentence-transformers, over cosines s.

        loss_i = relu(positive_margin - s_ii) + relu(max_{j != i} s_ij - negative_margin)

    A batch of one has no second term. On ties the first index takes the gradient.

    Args:
        anchor, positive: `[B, D]`, normalised inside.
        positive_margin, negative_margin: thresholds of the cosine.
        reduction: "mean", "sum" or "none" (`[B]`).
        workspace_bytes: accepted as in the other losses; nothing is stored that it could bound.

    Returns:
        A 0-dim tensor (`[B]` for "none"), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> fusedloss.mega_batch_margin(encoder(a), encoder(b), positive_margin=0.8).backward()
    """
    call = Call(**options)
    rows = _pairs(anchor, positive)
    checks.number("positive_margin", positive_margin)
    checks.number("negative_margin", negative_margin)
    operands, _ = distinct(anchor, positive)
    hardest = top(operands, 1.0, Mask(skip=rows), call, cosine=True)
    own = of_pairs(cosine, anchor, positive, rows)
    other = of_pairs(cosine, anchor, positive, hardest).masked_fill(hardest < 0, -torch.inf)
    loss = (positive_margin - own).clamp(min=0) + (other - negative_margin).clamp(min=0)
    return of_rows(loss, call.reduction)


@expanded
def in_batch_margin_ranking(
    anchor: Tensor,
    positive: Tensor,
    *,
    margin: float = 0.5,
    similarity: str = "cos",
    **options: Unpack[SweepOptions],
) -> Tensor:
    """Margin ranking against every other positive of the batch: a ranking SVM's hinge over all negatives.

        loss_i = 1/(N - 1) sum_{j != i} relu(margin - s(anchor_i, positive_i) + s(anchor_i, positive_j))

    Args:
        anchor: `[B, D]`. positive: `[N, D]` with N >= B: row i belongs to anchor i.
        margin: in the unit of the similarity.
        similarity: "cos" (rows divided by `max(|row|, 1e-12)`) or "dot".
        reduction: "mean", "sum" or "none" (`[B]`).

    Returns:
        A 0-dim tensor (`[B]` for "none"), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> fusedloss.in_batch_margin_ranking(encoder(questions), encoder(answers), margin=0.3).backward()
    """
    call = Call(**options)
    rows = _pairs(anchor, positive, more_positives=True)
    checks.number("margin", margin)
    checks.choice("similarity", similarity, checks.SIMILARITIES)
    operands = autocast(*distinct(anchor, positive)[0])
    one = constant(1.0, stats_dtype(operands[0].dtype), anchor.device)
    weight = one.expand(len(rows)).contiguous()
    fold = Fold("margin_ranking", (float(margin), 1.0))
    problem = fold_problem(operands, one, weight, fold, call, cosine=similarity == "cos", target=rows)
    return fold_loss(problem, call, over=len(rows))[0]


def _pairs(anchor: Tensor, positive: Tensor, more_positives: bool = False) -> Tensor:
    """Each row's own column."""
    checks.embeddings(anchor=anchor, positive=positive)
    rows, columns = anchor.shape[0], positive.shape[0]
    if columns < rows or (columns > rows and not more_positives):
        raise ValueError(f"positive must have at least {rows} rows, one per row of anchor, got {columns}")
    return row_numbers(rows, anchor)
