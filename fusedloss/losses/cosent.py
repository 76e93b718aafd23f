"""Pairs ranked by their gold scores, all against all: CoSENT, and AnglE."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from ..core import checks
from ..rowwise.ordered import ordered_pairs
from ._options import Call, RowBackendOptions, expanded
from ._pairs import SIMILARITIES, check_numbers, check_rows, similarities
from ._softmax import as_scale


@expanded
def cosent(
    a: Tensor,
    b: Tensor,
    score: Tensor,
    *,
    scale: float | Tensor = 20.0,
    similarity: str = "cos",
    **options: Unpack[RowBackendOptions],
) -> Tensor:
    """CoSENT (Huang et al. 2024), as in sentence-transformers: a pair with a higher score should be more similar.

        loss = log(1 + sum over score_i < score_j of exp(scale (s_i - s_j)))

    Pairs are sorted by score: O(B log B) time, and O(B) memory beside the embeddings. Sums are kept as logarithms, in
    fp64. Equal scores are not compared; if all are equal the loss is 0.

    Args:
        a, b: `[B, D]`, float16, bfloat16, float32 or float64, any strides.
        score: `[B]`, any real dtype; only its order matters. A NaN makes the loss NaN.
        scale: a positive number, or a tensor of one element, which receives a gradient.
        similarity: "cos" (norms of at least 1e-12), "dot", "angle", or the negative of a distance, "euclidean" or
            "manhattan".
        backend: {rows} (B^2 memory).

    Returns:
        A 0-dim tensor, float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> gold = torch.tensor([1.0, 0.3, 0.7])
        >>> fusedloss.cosent(encoder(a), encoder(b), gold).backward()
    """
    check_rows(a=a, b=b)
    score = check_numbers("score", score, [(a.shape[0],)], a)
    checks.choice("similarity", similarity, SIMILARITIES)
    return _ordered(a, (b,), score, scale, similarity, Call(**options))


@expanded
def angle(
    a: Tensor,
    b: Tensor,
    score: Tensor | None = None,
    *negatives: Tensor,
    label: Tensor | None = None,
    scale: float | Tensor = 20.0,
    **options: Unpack[RowBackendOptions],
) -> Tensor:
    """AnglE (Li & Li 2024), as in sentence-transformers: `cosent` with similarity "angle".

        angle(a, b, score)                                  pairs
        angle(anchor, positive, *negatives, label=None)     an anchor with one positive and negatives

    s = |Re + Im| of the sum of x conj(y), where a unit row's dims i and i + ceil(D / 2) are one complex number.

    Args:
        a, b: `[B, D]`, the pairs; or the anchors and their positives.
        score: `[B]`, any real dtype, of the pairs; or the first of the negatives, `[B, D]`.
        negatives: `[B, D]` each. They make pairs with the anchors, too.
        label: `[B]`, the positives' score if there are negatives, whose score is then `1 - label`. Default 1.
        scale: as in `cosent`, as are the result and errors.

    Example:
        >>> fusedloss.angle(encoder(a), encoder(b), gold).backward()
    """
    call = Call(**options)
    if not isinstance(score, Tensor) or score.dim() != 2:
        check_rows(a=a, b=b)
        if negatives or (score is not None and label is not None):
            got = f"shape {list(score.shape)}" if isinstance(score, Tensor) else checks.a(score)
            raise ValueError(
                f"score must be the first of the negatives, {list(a.shape)}, with negatives or label given, got {got}; "
                "pass the pairs' score as label"
            )
        gold = label if score is None else score
        if gold is None:
            raise ValueError("score must be a tensor [B] unless negatives are given, got None")
        gold = check_numbers("score", gold, [(a.shape[0],)], a)
        return _ordered(a, (b,), gold, scale, "angle", call)
    negatives = (score, *negatives)
    if not checks.alike(a, b, *negatives):
        check_rows(a=a, b=b, **{f"negatives[{i}]": x for i, x in enumerate(negatives)})
    label = torch.ones(a.shape[0], device=a.device) if label is None else label
    label = check_numbers("label", label, [(a.shape[0],)], a)
    label = label if label.dtype.is_floating_point else label.long()
    gold = torch.cat([label, (1 - label).repeat(len(negatives))])
    return _ordered(a, (b, *negatives), gold, scale, "angle", call)


def _ordered(
    query: Tensor, others: tuple[Tensor, ...], score: Tensor, scale: float | Tensor, similarity: str, call: Call
) -> Tensor:
    checks.scalar("scale", scale, query, positive=True)
    factor = as_scale(scale, query, inverse=False)[0] if isinstance(scale, Tensor) else scale
    columns = similarities(similarity, query, *others, backend=call.backend)
    found = columns[0] if len(columns) == 1 else torch.cat(columns)
    gold = score.detach()  # only compared
    return ordered_pairs(found * factor, gold.byte() if gold.dtype == torch.bool else gold, call.backend)
