"""Global orthogonal regularisation: unrelated embeddings should be as orthogonal as random ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks
from ..core.numerics import stats_dtype, unit_rows

AGGREGATIONS = ("mean", "sum")
LEAST_ROWS = 256  # of a block: in smaller ones overhead dominates


def global_orthogonal_regularization(
    *embeddings: Tensor,
    similarity: str = "cos",
    mean_weight: float = 1.0,
    second_moment_weight: float = 1.0,
    aggregation: str = "mean",
) -> Tensor:
    """Global orthogonal regularisation (Zhang et al. 2017) as in sentence-transformers, in O(B D^2).

        M1   = mean_{i != j} s_ij,   M2 = mean_{i != j} s_ij^2         over the similarities of a column with itself
        loss = mean_weight * M1^2 + second_moment_weight * relu(M2 - 1/D)

    Computed from sum_ij s_ij = <sum_i x_i, sum_j y_j> and sum_ij s_ij^2 = <X^T X, Y^T Y> of two sets of rows, without a
    [B, B] matrix.

    Args:
        embeddings: columns `[B, D]`, each regularised on its own.
        similarity: "cos" (rows divided by `max(|row|, 1e-12)`) or "dot".
        mean_weight, second_moment_weight: weights of the two terms.
        aggregation: "mean" or "sum" over the columns.

    Returns:
        A 0-dim tensor, float32, or float64 for float64 inputs. A column of one row has loss 0.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.

    Example:
        >>> loss = ranking + fusedloss.global_orthogonal_regularization(anchor, positive)
    """
    if not embeddings:
        raise ValueError("embeddings must hold at least one column [B, D], got none")
    for i, x in enumerate(embeddings):
        checks.embeddings(**{f"embeddings[{i}]": x})
    checks.choice("similarity", similarity, checks.SIMILARITIES)
    checks.number("mean_weight", mean_weight)
    checks.number("second_moment_weight", second_moment_weight)
    checks.choice("aggregation", aggregation, AGGREGATIONS)
    terms = torch.stack(
        [
            (mean_weight * mean + second_moment_weight * second).to(stats_dtype(x.dtype))
            for x in embeddings
            for mean, second in [moments(x, similarity == "cos")]
        ]
    )
    return terms.mean() if aggregation == "mean" else terms.sum()


def moments(x: Tensor, cosine: bool) -> tuple[Tensor, Tensor]:
    """Returns a column's `M1^2` and `relu(M2 - 1/D)`, in float64."""
    mean, second = means(x, cosine)
    if x.shape[0] < 2:
        return mean, second
    # Not clamp: its slope is 1 at M2 = 1/D, which rows of +-1 have.
    return mean.square(), torch.relu(second - 1 / x.shape[1])


def means(x: Tensor, cosine: bool) -> tuple[Tensor, Tensor]:
    """Returns `M1` and `M2` in float64, 0 for fewer than two rows."""
    with torch.autocast(x.device.type, enabled=False):
        # fp64, because M2 - 1/D cancels most of the sum for spread-out embeddings.
        rows = unit_rows(x.to(torch.float64)) if cosine else x.to(torch.float64)
        pairs = x.shape[0] * (x.shape[0] - 1)
        if pairs == 0:  # otherwise the rounding of the two sums would remain
            zero = rows.sum() * 0
            return zero, zero
        total, squares = _off_diagonal(rows)
        return total / pairs, squares / pairs


def _off_diagonal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sum of s_ij over i != j, and of its square, in O(B D^2).

    Each block of rows is taken with itself and with all rows before it. Subtracting the diagonal from the sums over all
    i and j would cancel: with one row 1000 times longer than the others, it was 1e12 times the rest.
    """
    D = rows.shape[1]
    total = squares = rows.new_zeros(())
    before, products = rows.new_zeros(D), rows.new_zeros(D, D)
    for part in rows.split(max(D, LEAST_ROWS)):
        above = (part @ part.T).triu(1)
        total, squares = total + above.sum(), squares + above.square().sum()
        if len(part) < len(rows):
            own, both = part.T @ part, part.sum(0)
            total, squares = total + before @ both, squares + (products * own).sum()
            before, products = before + both, products + own
    return 2 * total, 2 * squares
