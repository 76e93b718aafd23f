"""Triplet loss: an anchor must be nearer to its positive than to its negative by a margin."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from ..core import checks
from ..rowwise.pairs import columns
from ._options import Call, RowOptions, expanded
from ._pairs import check_rows
from ._softmax import of_rows

DISTANCES = ("euclidean", "cosine", "manhattan")


@expanded
def triplet(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    distance: str = "euclidean",
    margin: float = 5.0,
    **options: Unpack[RowOptions],
) -> Tensor:
    """Triplet loss (Schroff et al. 2015; Hermans et al. 2017), as in sentence-transformers.

        loss_i = relu(d(anchor_i, positive_i) - d(anchor_i, negative_i) + margin)

    Args:
        anchor, positive, negative: `[B, D]`, float16, bfloat16, float32 or float64, any strides.
        distance: "euclidean" (gradient 0 at distance 0), "cosine" (1 - cosine, norms of at least 1e-12) or
            "manhattan".
        margin: in the unit of the distance.
        reduction: "mean", "sum" or "none" (`[B]`).

    Returns:
        A 0-dim tensor (`[B]` for "none"), float32, or float64 for float64 inputs. An empty batch gives 0.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> query, answer, other = encode(questions), encode(answers), encode(others)
        >>> fusedloss.triplet(query, answer, other, distance="cosine", margin=0.3).backward()
    """
    call = Call(**options)
    check_rows(anchor=anchor, positive=positive, negative=negative)
    checks.choice("distance", distance, DISTANCES)
    checks.number("margin", margin)
    if distance == "cosine":
        near, far = columns("cos", anchor, positive, negative, backend=call.backend)
        difference = far - near  # (1 - near) - (1 - far) would round twice more
    else:
        near, far = columns(distance, anchor, positive, negative, backend=call.backend)
        difference = near - far
    return of_rows((difference + margin).relu(), call.reduction)
