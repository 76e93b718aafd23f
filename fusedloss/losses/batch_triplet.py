"""Triplets mined in a labelled batch: all, the hardest, and the semi-hard ones."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from ..core import checks
from ..core.numerics import constant, stats_dtype
from ..core.problem import Fold
from ..core.rows import row_chunks
from ..core.softmax import softplus
from ..rowwise.pairs import DISTANCES, of_pairs
from ._folded import fold_loss, fold_problem, opposed
from ._options import Call, SweepOptions, WorkspaceOptions, expanded
from ._softmax import of_rows, over


@expanded
def batch_all_triplet(
    embeddings: Tensor,
    labels: Tensor,
    *,
    margin: float = 5.0,
    distance: str = "euclidean",
    **options: Unpack[WorkspaceOptions],
) -> Tensor:
    """Batch-all triplet loss: the mean over the valid triplets with a loss above 0 (Hermans et al. 2017;
    sentence-transformers).

        loss = sum over (a, p, n) of relu(d_ap - d_an + margin) / (number of those above 0 + 1e-16)
               p != a, labels_p == labels_a != labels_n

    Each row's positives and negatives are sorted, and sums follow from the order: O(N log N) a row, no tensor of
    triplets. Without a triplet the loss is 0.

    Args:
        embeddings: `[N, D]`. labels: int64 `[N]`, any values.
        margin: in the unit of the distance.
        distance: "euclidean" (gradient 0 at distance 0), "squared" (its square) or "cosine" (1 - cosine).
        workspace_bytes: the most that one chunk of distances may take; see `info_nce`. Sorting a chunk takes two to
            three times that in addition.

    Returns:
        A 0-dim tensor, float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> fusedloss.batch_all_triplet(encoder(x), y, margin=0.2, distance="cosine").backward()
    """
    loss, count = _folded("batch_all", embeddings, labels, margin, distance, Call(**options))
    return loss / (count + 1e-16)


@expanded
def batch_semi_hard_triplet(
    embeddings: Tensor,
    labels: Tensor,
    *,
    margin: float = 5.0,
    distance: str = "euclidean",
    **options: Unpack[WorkspaceOptions],
) -> Tensor:
    """Semi-hard triplet loss: each pair against the nearest negative that is farther (Schroff et al. 2015;
    sentence-transformers).

        neg(i, j) = min{d_ik > d_ij : labels_k != labels_i}, or where there is none max{d_ik : labels_k != labels_i}
        loss      = mean over ordered pairs (i, j), labels_i == labels_j, of relu(d_ij - neg(i, j) + margin)

    If all labels are equal, neg is the row's smallest distance, as in sentence-transformers. Parameters, result and
    errors are `batch_all_triplet`'s.

    Example:
        >>> fusedloss.batch_semi_hard_triplet(encoder(x), y, margin=5.0).backward()
    """
    loss, count = _folded("semi_hard", embeddings, labels, margin, distance, Call(**options))
    return over(loss, count)


@expanded
def batch_hard_triplet(
    embeddings: Tensor,
    labels: Tensor,
    *,
    margin: float = 5.0,
    distance: str = "euclidean",
    **options: Unpack[SweepOptions],
) -> Tensor:
    """Each row's farthest positive against its nearest negative (Hermans et al. 2017; sentence-transformers).

        hp_i   = max(0, max{d_ij : j != i, labels_j == labels_i}),  hn_i = min{d_ij : labels_j != labels_i}
        loss_i = relu(hp_i - hn_i + margin)

    All rows count in the mean. A row without a positive has hp = 0; in a batch of one label hn = hp, so its rows have
    loss `margin` and no gradient, as in sentence-transformers. On ties the first index takes the gradient. Rows and
    columns are searched tile by tile; the gradient is that of 2 N pairs.

    Args:
        embeddings: `[N, D]`. labels: int64 `[N]`, any values.
        margin: in the unit of the distance.
        distance: "euclidean" (gradient 0 at distance 0), "squared" (its square) or "cosine" (1 - cosine).
        reduction: "mean", "sum" or "none" (`[N]`).
        workspace_bytes: accepted as in the other losses; nothing is stored that it could bound.

    Returns:
        A 0-dim tensor (`[N]` for "none"), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> fusedloss.batch_hard_triplet(encoder(x), y, margin=0.3, distance="cosine").backward()
    """
    checks.number("margin", margin)
    call = Call(**options)
    difference = _hardest(embeddings, labels, distance, call)
    return of_rows((difference + margin).clamp(min=0), call.reduction)


@expanded
def batch_hard_soft_margin_triplet(
    embeddings: Tensor,
    labels: Tensor,
    *,
    distance: str = "euclidean",
    **options: Unpack[SweepOptions],
) -> Tensor:
    """`batch_hard_triplet` with `log(1 + exp(hp_i - hn_i))` instead of the hinge: no margin (Hermans et al. 2017).

    Parameters, result and errors are `batch_hard_triplet`'s.

    Example:
        >>> fusedloss.batch_hard_soft_margin_triplet(encoder(x), y).backward()
    """
    call = Call(**options)
    difference = _hardest(embeddings, labels, distance, call)
    return of_rows(softplus(difference), call.reduction)


def _check(embeddings: Tensor, labels: Tensor, distance: str) -> None:
    checks.embeddings(embeddings=embeddings)
    checks.integers("labels", labels, (embeddings.shape[0],), embeddings)
    checks.choice("distance", distance, checks.DISTANCES)


def _folded(
    name: str,
    embeddings: Tensor,
    labels: Tensor,
    margin: float,
    distance: str,
    call: Call,
) -> tuple[Tensor, Tensor]:
    """Returns the sum, and the number that the fold counted."""
    _check(embeddings, labels, distance)
    checks.number("margin", margin)
    one = constant(1.0, stats_dtype(embeddings.dtype), embeddings.device)
    weight = one.expand(embeddings.shape[0]).contiguous()
    fold = Fold(name, (float(margin),), labels=(labels, labels), itself=True, distance=distance)
    loss, count = fold_loss(fold_problem([embeddings], one, weight, fold, call, cosine=distance == "cosine"), call)
    return loss, torch.zeros_like(loss) if count is None else count


def _hardest(embeddings: Tensor, labels: Tensor, distance: str, call: Call) -> Tensor:
    """Returns hp - hn of each row."""
    _check(embeddings, labels, distance)
    cosine = distance == "cosine"
    # |x - y|^2 = |x|^2 + |y|^2 - 2 <x, y>: the order of the distances of a row does not need |x|^2.
    scale, squares = (1.0, None) if cosine else (2.0, _squares(embeddings))
    nearest, farthest = opposed(
        embeddings, labels, scale, call, cosine=cosine, bias=None if squares is None else -squares
    )
    distance_of = DISTANCES[distance]
    positive = of_pairs(distance_of, embeddings, embeddings, farthest).clamp(min=0)
    negative = of_pairs(distance_of, embeddings, embeddings, nearest)
    # A row with a NaN finds no pair, because comparisons with NaN are False; its loss is set to NaN here.
    shown = embeddings.detach().sum(1, dtype=stats_dtype(embeddings.dtype)) * 0
    return (positive - negative).masked_fill(nearest < 0, 0) + shown


def _squares(x: Tensor) -> Tensor:
    parts = [x[chunk].detach().to(stats_dtype(x.dtype)).square().sum(1) for chunk in row_chunks(x)]
    return torch.cat(parts) if parts else x.new_empty(0, dtype=stats_dtype(x.dtype))
