"""Pairs of embeddings with a label, the same or not, or with a score of similarity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backends import few
from ..core import checks
from ..rowwise.pairs import columns
from ..rowwise.pointwise import signs, softplus_of_both, transformed
from ._options import Call, RowBackendOptions, RowOptions, expanded
from ._pairs import check_not_negative, check_numbers, check_rows, squares
from ._softmax import of_rows

DISTANCES = ("cosine", "euclidean", "manhattan")


@expanded
def contrastive(
    a: Tensor,
    b: Tensor,
    label: Tensor,
    *,
    distance: str = "cosine",
    margin: float = 0.5,
    **options: Unpack[RowOptions],
) -> Tensor:
    """Contrastive loss (Hadsell et al. 2006), as in sentence-transformers: pulls y = 1, pushes y = 0 beyond margin.

        loss_i = (y_i d_i^2 + (1 - y_i) relu(margin - d_i)^2) / 2

    Args:
        a, b: `[B, D]`, float16, bfloat16, float32 or float64, any strides.
        label: `[B]`, any real dtype; numbers between 0 and 1 weigh both terms. A label below 0, as of labels +1 and -1,
            has no meaning and is an error on a CPU, where values are read.
        distance: "cosine" (1 - cosine, norms of at least 1e-8, a constant to the gradient of a shorter row), or
            "euclidean" or "manhattan" of `a - b + 1e-6`, as torch.nn.functional.pairwise_distance has them: equal rows
            have a finite gradient.
        margin: in the unit of the distance.
        reduction: "mean", "sum" or "none" (`[B]`).

    Returns:
        A 0-dim tensor (`[B]` for "none"), float32, or float64 for float64 inputs. An empty batch gives 0.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> same = torch.tensor([1, 0, 1])
        >>> fusedloss.contrastive(encoder(a), encoder(b), same, margin=0.5).backward()
    """
    call = Call(**options)
    d = _distances(a, b, label, distance, margin, call)
    y = label.to(d.dtype)
    pulled, pushed = d.where(y != 0, 0).square(), (margin - d).relu().square()  # 0 times inf would be NaN
    return of_rows(0.5 * (y * pulled + (1 - y) * pushed), call.reduction)


@expanded
def online_contrastive(
    a: Tensor,
    b: Tensor,
    label: Tensor,
    *,
    distance: str = "cosine",
    margin: float = 0.5,
    **options: Unpack[RowBackendOptions],
) -> Tensor:
    """`contrastive` over the hard pairs of the batch only, summed and without the half, as in sentence-transformers.

        loss = sum over y_i = 1 with d_i > min{d_j : y_j = 0} of d_i^2
             + sum over y_i = 0 with d_i < max{d_j : y_j = 1} of relu(margin - d_i)^2

    If one class is missing, the threshold is the mean distance of the other. Pairs with any other label take no part,
    and labels below 0 are an error on a CPU. Nothing is read back from a GPU: pairs are masked, not selected. A NaN
    distance counts as hard, so that it shows. Parameters, except `reduction`, and errors are `contrastive`'s.

    Example:
        >>> fusedloss.online_contrastive(encoder(a), encoder(b), same, margin=0.5).backward()
    """
    d = _distances(a, b, label, distance, margin, Call(**options))
    if not d.shape[0]:
        return d.sum()
    with torch.no_grad():
        positive, negative = label == 1, label == 0
        far, near = d.masked_fill(~positive, -torch.inf).amax(), d.masked_fill(~negative, torch.inf).amin()
        far = torch.where(positive.any(), far, _mean(d, negative))
        near = torch.where(negative.any(), near, _mean(d, positive))
        # `~(above)` and `~(below)` instead of `below` and `above`, because a comparison with NaN is False.
        pulled, pushed = positive & ~(d <= near), negative & ~(d >= far)
    return d.where(pulled, (margin - d).relu().where(pushed, 0)).square().sum()


def _mean(d: Tensor, chosen: Tensor) -> Tensor:
    return d.masked_fill(~chosen, 0).sum() / chosen.sum()


def _distances(a: Tensor, b: Tensor, label: Tensor, distance: str, margin: float, call: Call) -> Tensor:
    check_rows(a=a, b=b)
    label = check_numbers("label", label, [(a.shape[0],)], a)
    check_not_negative("label", label)
    checks.choice("distance", distance, DISTANCES)
    checks.number("margin", margin)
    if distance == "cosine":
        return 1 - columns("cos", a, b, eps=1e-8, backend=call.backend)[0]
    return columns(distance, a, b, eps=1e-6, backend=call.backend)[0]


@expanded
def cosine_similarity(
    a: Tensor,
    b: Tensor,
    score: Tensor,
    *,
    loss: str | Callable[[Tensor, Tensor], Tensor] = "mse",
    transform: Callable[[Tensor], Tensor] | None = None,
    **options: Unpack[RowOptions],
) -> Tensor:
    """A loss between the cosine of each pair and its gold score, as sentence-transformers' CosineSimilarityLoss.

        loss_i = (transform(cos(a_i, b_i)) - score_i)^2

    Args:
        a, b: `[B, D]`; the cosine takes norms of at least 1e-8. The gradient of a shorter row is that of this value,
            with a constant norm and no projection; torch projects it.
        score: `[B]`, any real dtype, in the unit of what `transform` returns.
        loss: "mse", or a function (or module) of two tensors [B], such as `torch.nn.L1Loss()`, which reduces by itself.
        transform: applied to the cosines [B] first, such as `torch.nn.Sigmoid()`; None leaves them as they are.
        reduction: "mean", "sum" or "none" (`[B]`); of "mse".

    Returns:
        A 0-dim tensor (`[B]` for "none"), float32, or float64 for float64 inputs; or what `loss` returns.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> gold = torch.tensor([1.0, 0.3])
        >>> fusedloss.cosine_similarity(encoder(a), encoder(b), gold).backward()
    """
    check_rows(a=a, b=b)
    call = Call(**options)
    score = check_numbers("score", score, [(a.shape[0],)], a)
    if loss != "mse" and not callable(loss):
        raise ValueError(f"loss must be 'mse' or a function of two tensors [B], got {loss!r}")
    if transform is not None and not callable(transform):
        raise TypeError(f"transform must be a function of a tensor [B] or None, got {checks.a(transform)}")
    if callable(loss) and call.reduction != "mean":
        raise ValueError(
            f"reduction must be 'mean', the default, if loss is a function, got {call.reduction!r}; "
            "reduce in the function"
        )
    cosines = columns("cos", a, b, eps=1e-8, backend=call.backend)[0]
    target = score if score.dtype == cosines.dtype else score.to(cosines.dtype)
    if transform is not None:
        cosines = transform(cosines)
    return loss(cosines, target) if callable(loss) else squares(cosines, target, call.reduction)


@expanded
def contrastive_tension(
    a: Tensor, b: Tensor, label: Tensor, *, reduction: str = "sum", **options: Unpack[RowBackendOptions]
) -> Tensor:
    """Contrastive tension (Carlsson et al. 2021), as in sentence-transformers: is this the same sentence twice?

        loss_i = log(1 + exp(<a_i, b_i>)) - label_i <a_i, b_i>

    Args:
        a, b: `[B, D]`, each by its own encoder.
        label: `[B]`, any real dtype: 1 for the same sentence, 0 for another; one below 0 is an error on a CPU.
        reduction: "sum" (the paper's), "mean" or "none" (`[B]`).

    Returns:
        A 0-dim tensor (`[B]` for "none"), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> same = torch.tensor([1, 0, 0, 0, 0, 0, 0, 0])
        >>> fusedloss.contrastive_tension(encoder_1(x), encoder_2(y), same).backward()
    """
    check_rows(a=a, b=b)
    label = check_numbers("label", label, [(a.shape[0],)], a)
    check_not_negative("label", label)
    call = Call(reduction=reduction, **options)
    dots = columns("dot", a, b, backend=call.backend)[0]
    y = label.to(dots.dtype)
    if few(call.backend, dots, "pointwise") and not transformed() and (sign := signs(y)) is not None:
        return of_rows(F.softplus(dots * sign, threshold=50), call.reduction)
    # torch's binary cross-entropy would subtract dots of 5 from 5.008, which leaves a small loss half its digits.
    no, yes = softplus_of_both(dots)
    infinite = dots.isinf()  # 0 times an infinite term is 0
    no, yes = no.masked_fill((y == 1) & infinite, 0), yes.masked_fill((y == 0) & infinite, 0)
    return of_rows((1 - y) * no + y * yes, call.reduction)
