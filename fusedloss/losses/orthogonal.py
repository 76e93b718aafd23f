"""Global orthogonal regularisation: unrelated embeddings should be as orthogonal as random ones."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..problem import stats_dtype, unit_rows
from ._module import LossModule

AGGREGATIONS = ("mean", "sum")


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

    From sum_ij s_ij = |sum_i x_i|^2 and sum_ij s_ij^2 = |X^T X|^2 (Frobenius), less the diagonal: no [B, B] matrix.

    Args:
        embeddings: columns `[B, D]`, each regularised on its own.
        similarity: "cos" (rows divided by `max(|row|, 1e-12)`) or "dot".
        mean_weight, second_moment_weight: of the two terms.
        aggregation: "mean" or "sum" over the columns.

    Returns:
        A 0-dim tensor, float32, or float64 for float64 inputs. A column of one row has loss 0.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.

    Example:
        >>> loss = ranking + fusedloss.global_orthogonal_regularization(anchor, positive)
    """
    if not embeddings:
        raise ValueError("embeddings is empty: needs at least one column [B, D]")
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
    """A column's `M1^2` and `relu(M2 - 1/D)`, in float64."""
    with torch.autocast(x.device.type, enabled=False):
        dtype = stats_dtype(x.dtype)
        rows = unit_rows(x.to(dtype)) if cosine else x.to(dtype)
        pairs = x.shape[0] * (x.shape[0] - 1)
        if pairs == 0:  # where the rounding of the two sums would be left
            zero = rows.sum(dtype=torch.float64) * 0
            return zero, zero
        # The diagonal cancels most of both sums on spread-out embeddings: sums in fp64, D x D of them.
        own = rows.square().sum(1, dtype=torch.float64)
        total = rows.sum(0, dtype=torch.float64).square().sum() - own.sum()
        squares = (rows.T @ rows).to(torch.float64).square().sum() - own.square().sum()
        mean, second = total / pairs, squares / pairs
        return mean.square(), (second - 1 / x.shape[1]).clamp(min=0)


class GlobalOrthogonalRegularizationLoss(LossModule, function=global_orthogonal_regularization):
    """`global_orthogonal_regularization` with its options in the constructor and `forward(*embeddings)`."""
