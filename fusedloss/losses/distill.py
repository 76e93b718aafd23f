"""A teacher's distribution over a query's candidates."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor

from ..backends import few
from ..core import checks
from ..core.numerics import savable, stats_dtype, wide_dtype
from ..rowwise.pointwise import transformed
from ._options import Call, RowOptions, expanded
from ._pairs import SIMILARITIES, check_columns, check_numbers, similarities
from ._softmax import of_rows


@expanded
def distill_kl_div(
    query: Tensor,
    positive: Tensor,
    *negatives: Tensor,
    label: Tensor,
    similarity: str = "dot",
    temperature: float | Tensor = 1.0,
    student_temperature: float | Tensor | None = None,
    teacher_temperature: float | Tensor | None = None,
    **options: Unpack[RowOptions],
) -> Tensor:
    """The Kullback-Leibler divergence from a teacher's softmax over candidates, as in sentence-transformers.

        p_i = softmax_k(s(query_i, candidate_ik) / t_student),  q_i = softmax_k(label_ik / t_teacher)
        loss_i = t_student^2 sum_k q_ik log(q_ik / p_ik)            (Hinton et al. 2015; Lin et al. 2020)

    Everything after the similarities is computed in fp64. A candidate with a teacher's probability of 0, from a score
    of -inf or by underflow, adds 0. A NaN score makes the loss NaN.

    Args:
        query, positive, negatives: `[B, D]` each, float16, bfloat16, float32 or float64, any strides. The candidates
            are the positive and the negatives, K in all and at least two.
        label: the teacher's scores `[B, K]`, any real dtype; without a gradient.
        similarity: "dot", "cos" (norms of at least 1e-12), "angle", or the negative of a distance, "euclidean" or
            "manhattan".
        temperature: a positive number, or a tensor of one element, which receives a gradient.
        student_temperature, teacher_temperature: replace `temperature` on one side.
        reduction: "mean", "sum" or "none" (`[B]`).

    Returns:
        A 0-dim tensor (`[B]` for "none"), float32, or float64 for float64 inputs. An empty batch gives 0.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> scores = cross_encoder(texts)  # [B, 2]
        >>> fusedloss.distill_kl_div(query, positive, negative, label=scores, temperature=2.0).backward()
    """
    call = Call(**options)
    check_columns(query, positive, negatives)
    label = check_numbers("label", label, [(query.shape[0], len(negatives) + 1)], query)
    checks.choice("similarity", similarity, SIMILARITIES)
    checks.scalar("temperature", temperature, query, positive=True)
    student = _or(temperature, "student_temperature", student_temperature, query)
    teacher = _or(temperature, "teacher_temperature", teacher_temperature, query)
    found = torch.stack(similarities(similarity, query, positive, *negatives, backend=call.backend), dim=1)
    # fp64 for these O(B K) numbers: the divergence is of second order, and in fp32 that of a well-fitted batch is
    # noise.
    wide = wide_dtype(found.device, found.dtype)
    z, t = found.to(wide) / student, label.detach().to(wide) / teacher
    factor = student * student
    if few(call.backend, found, "pointwise") and not (isinstance(teacher, Tensor) or transformed()):
        reduction = "none" if call.reduction == "none" else "sum"
        terms = torch.kl_div(z.log_softmax(1), t.softmax(1), checks.CODES[reduction])
        if not math.isnan(terms.detach().sum().item()):  # as 0 log 0 of a student that is infinitely sure
            per = factor / max(len(label), 1) if call.reduction == "mean" else factor
            return ((terms.sum(1) if terms.dim() else terms) * per).to(found.dtype)
    log_p, log_q = z.log_softmax(1), t.log_softmax(1)
    q = log_q.exp()
    terms = q * (log_q - log_p).masked_fill(q == 0, 0)
    return of_rows((terms.sum(1) * factor).to(found.dtype), call.reduction)


def _or(temperature: float | Tensor, name: str, value: float | Tensor | None, like: Tensor) -> float | Tensor:
    if value is None:
        value = temperature
    else:
        checks.scalar(name, value, like, positive=True)
    return savable(value).reshape(()).to(stats_dtype(like.dtype)) if isinstance(value, Tensor) else value
