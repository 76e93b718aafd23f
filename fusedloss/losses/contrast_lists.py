"""InfoNCE and circle loss of given scores: each query's documents, of which some are relevant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from ..backends import select_rowwise
from ..core import checks
from ..core.numerics import savable, stats_dtype
from ..core.softmax import softplus
from ..rowwise.lists import PADDING
from ._options import Call, RowOptions, expanded
from ._softmax import over
from .lists import _padded

POSITIVES = ("each", "joint")


@expanded
def list_info_nce(
    scores: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    positives: str = "each",
    **options: Unpack[RowOptions],
) -> Tensor:
    """InfoNCE of a reranker's scores: a query's relevant documents against its other ones.

        z       = scores / temperature,   P: documents with a label above 0,   N: the others
        each:   loss_q = mean over p in P of log(1 + sum_(n in N) exp(z_n - z_p))
        joint:  loss_q = log(1 + sum_(n in N) exp(z_n) / sum_(p in P) exp(z_p))

    "each" has the positives not compete with each other (L_out of Khosla et al. 2020 without positives in the
    normaliser); "joint" wants any of them at the top. With one positive a query both are InfoNCE (van den Oord et al.
    2018) over the list. The formula on [Q, n] numbers in plain torch, with any derivative.

    Args:
        scores, labels, mask: see `lambda_loss`; NaN likewise.
        temperature: a positive number, or a tensor of one element, which receives a gradient.
        positives: "each" or "joint".
        reduction: "mean" over the queries with a positive (0 without one), "sum", or "none": `[Q]`, 0 for the others.
        backend: {rows}; not "triton", which has no kernel for it.

    Returns, Raises: see `lambda_loss`.

    Example:
        >>> scores = reranker(queries, documents)  # [Q, n]
        >>> fusedloss.list_info_nce(scores, relevance, mask=is_document, temperature=0.5).backward()
    """
    call = Call(**options)
    checks.choice("positives", positives, POSITIVES)
    found = _sides(scores, labels, mask, call)
    checks.scalar("temperature", temperature, found.score, positive=True)
    if isinstance(temperature, Tensor):
        temperature = savable(temperature).reshape(()).to(found.score.dtype)
    z = found.score / temperature
    negative = _lse(z, found.negative)
    if positives == "joint":
        rows = softplus(negative - _lse(z, found.positive))
    else:
        terms = softplus(negative[:, None] - z.where(found.positive, 0)).where(found.positive, 0)
        rows = terms.sum(1) / found.positive.sum(1).clamp(min=1)
    return _reduced(rows, found.positive.any(1), found.score, call)


@expanded
def list_circle(
    scores: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    m: float = 0.4,
    gamma: float = 80.0,
    **options: Unpack[RowOptions],
) -> Tensor:
    """Circle loss (Sun et al. 2020) of given similarities s, such as a sigmoid of a reranker's logits.

        loss_q = log(1 + sum_(n in N) exp( gamma relu(s_n + m) (s_n - m))
                       * sum_(p in P) exp(-gamma relu(1 + m - s_p) (s_p - 1 + m)))
        P: documents with a label above 0,   N: the others

    The factors relu(.) are constants to the gradient. The formula on [Q, n] numbers in plain torch, with any
    derivative.

    Args:
        scores, labels, mask: see `lambda_loss`; NaN likewise. Scores lie between -1 and 1.
        m: the relaxation margin. gamma: the scale, positive.
        reduction: "mean" over the queries with a positive and a negative (0 without one), "sum", or "none": `[Q]`, 0
            for the others.
        backend: {rows}; not "triton", which has no kernel for it.

    Returns, Raises: see `lambda_loss`.

    Example:
        >>> similarity = reranker(queries, documents).sigmoid()  # [Q, n]
        >>> fusedloss.list_circle(similarity, relevance, mask=is_document, m=0.25, gamma=32).backward()
    """
    call = Call(**options)
    checks.number("m", m)
    checks.scalar("gamma", gamma, None, positive=True)
    found = _sides(scores, labels, mask, call)
    s, constant = found.score, found.score.detach()
    pull = _lse(-gamma * torch.relu(1 + m - constant) * (s - (1 - m)), found.positive)
    push = _lse(gamma * torch.relu(constant + m) * (s - m), found.negative)
    both = found.positive.any(1) & found.negative.any(1)
    return _reduced(softplus(torch.where(both, pull + push, PADDING)), both, s, call)


class _Sides(NamedTuple):
    score: Tensor  # [Q, n], fp32 or fp64; 0 in padding
    positive: Tensor  # bool [Q, n]
    negative: Tensor


def _sides(
    scores: Tensor | Sequence[Tensor], labels: Tensor | Sequence[Tensor], mask: Tensor | None, call: Call
) -> _Sides:
    scores, labels, mask = _padded(scores, labels, mask)
    select_rowwise(call.backend, scores, None, unsupported="this loss is ordinary operators of torch")
    dtype = stats_dtype(scores.dtype)
    score = torch.add(scores.to(dtype), labels.detach().to(dtype), alpha=0)  # a NaN label makes the loss NaN
    positive = labels > 0
    negative = ~positive
    if mask is not None:
        score, positive, negative = score.where(mask, 0), positive & mask, negative & mask
    return _Sides(score, positive, negative)


def _lse(z: Tensor, chosen: Tensor) -> Tensor:
    """Returns the log-sum-exp of the chosen, [Q]; PADDING, which is finite and has no gradient, where there are none.

    torch's derivative of a log-sum-exp of nothing but -inf is NaN.
    """
    if not z.shape[1]:
        return z.sum(1) + PADDING
    return z.where(chosen, PADDING).logsumexp(1)


def _reduced(rows: Tensor, counts: Tensor, score: Tensor, call: Call) -> Tensor:
    # A NaN label is no positive: a query that does not count without it may have one. The square has a NaN gradient.
    rows = rows.where(counts, 0) + score.where(score.isnan(), 0).square().sum(1)
    if call.reduction == "none":
        return rows
    return over(rows.sum(), counts.sum().to(rows.dtype)) if call.reduction == "mean" else rows.sum()
