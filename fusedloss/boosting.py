"""LambdaRank and its relatives as objectives of gradient boosting: first and second derivatives of `lambda_loss`.

    booster = lightgbm.train({"objective": fusedloss.boosting.lightgbm_objective(k=30)}, dataset)

This module does not import lightgbm or xgboost, which call the objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy
import torch
from torch import Tensor

from .core import checks
from .losses.lists import check_lambda
from .rowwise import lists

Array = TypeVar("Array", numpy.ndarray, Tensor)
PAIRS = 1 << 22  # computed at once, padding included; queries of similar sizes are padded together


def lambda_gradients(
    scores: Array,
    labels: Array,
    *,
    group: Sequence[int] | numpy.ndarray | Tensor | None = None,
    weighting: str | Callable[[Tensor, Tensor, Tensor], Tensor] | None = "lambda_rank",
    k: int | None = None,
    sigma: float = 1.0,
    eps: float = 1e-10,
    mu: float = 10.0,
) -> tuple[Array, Array]:
    """Returns the derivatives of the sum of `lambda_loss`'s pairs (in nats) by each score, weights w held fixed.

        p_ij        = sigmoid(-sigma (s_i - s_j))                         for pairs that want i above j
        gradient_i  = sum_j over pairs  -sigma w_ij p_ij + sigma w_ji p_ji
        hessian_i   = sum_j over pairs  sigma^2 w p (1 - p)

    The default is LambdaRank (Burges 2010), the lambdas of LambdaMART. With k = lambdarank_truncation_level they are
    LightGBM's without lambdarank_norm. Documents of equal score rank in their order.

    Args:
        scores: `[total]`, a numpy array or tensor, float32 or float64; each query's documents are adjacent.
        labels: `[total]`, the documents' relevance; higher is more relevant.
        group: the number of documents of each query, as in lightgbm and xgboost; None: one query.
        weighting, k, sigma, eps, mu: see `lambda_loss`.

    Returns:
        gradient and hessian `[total]`, arrays or tensors like `scores`, of its dtype.

    Raises:
        ValueError, TypeError: a shape or an option does not fit.

    Example:
        >>> gradient, hessian = fusedloss.boosting.lambda_gradients(scores, labels, group=[3, 5])
    """
    check_lambda(weighting, k, sigma, eps, mu)
    flat = torch.as_tensor(scores).detach()
    graded = torch.as_tensor(labels, device=flat.device).detach()
    if flat.dim() != 1 or not flat.is_floating_point():
        raise ValueError(f"scores must be floating numbers [total], got {flat.dtype} {list(flat.shape)}")
    if graded.shape != flat.shape:
        raise ValueError(f"labels must have shape {list(flat.shape)}, like scores, got {list(graded.shape)}")
    sizes = _sizes(group, len(flat))
    gradient, hessian = torch.zeros_like(flat), torch.zeros_like(flat)
    ends = sizes.cumsum(0)
    for queries in _like_sizes(sizes):
        place = torch.arange(int(sizes[queries[-1]]))
        mask = place < sizes[queries, None]
        index = ((ends - sizes)[queries, None] + place).where(mask, 0).to(flat.device)
        mask = mask.to(flat.device)
        found = lists.lambda_gradients(
            flat[index], graded[index], mask, weighting=weighting, k=k, sigma=sigma, eps=eps, mu=mu
        )
        for out, part in zip((gradient, hessian), found, strict=True):
            out[index[mask]] = part[mask].to(out.dtype)
    if isinstance(scores, Tensor):
        return gradient, hessian
    return gradient.numpy(), hessian.numpy()


def lightgbm_objective(
    *,
    weighting: str | Callable[[Tensor, Tensor, Tensor], Tensor] | None = "lambda_rank",
    k: int | None = None,
    sigma: float = 1.0,
    eps: float = 1e-10,
    mu: float = 10.0,
) -> Callable[[numpy.ndarray, Any], tuple[numpy.ndarray, numpy.ndarray]]:
    """Returns `lambda_gradients` as a custom objective of lightgbm, (scores, dataset) -> (gradient, hessian).

        lightgbm.train({"objective": lightgbm_objective(k=30)}, Dataset(x, label=y, group=sizes))

    The objective reads labels, groups and weights from the dataset (get_label, get_group, get_weight). A document's
    weight multiplies its gradient and hessian. Tested with lightgbm 4.7.
    """
    options = {"weighting": weighting, "k": k, "sigma": sigma, "eps": eps, "mu": mu}
    return _of_dataset(options, 1.0)


def xgboost_objective(
    *,
    weighting: str | Callable[[Tensor, Tensor, Tensor], Tensor] | None = "lambda_rank",
    k: int | None = None,
    sigma: float = 1.0,
    eps: float = 1e-10,
    mu: float = 10.0,
    hessian_factor: float = 2.0,
) -> Callable[[numpy.ndarray, Any], tuple[numpy.ndarray, numpy.ndarray]]:
    """Returns `lambda_gradients` as a custom objective of xgboost, (scores, dataset) -> (gradient, hessian).

        xgboost.train({}, DMatrix(x, label=y, qid=qid), obj=xgboost_objective(k=30))

    It differs from `lightgbm_objective` in two points: a query has one weight, and `hessian_factor` multiplies the
    hessian. xgboost's own rank:ndcg doubles the hessian, which halves the leaves. With the default factor the trees are
    those of rank:ndcg (lambdarank_pair_method="topk", without lambdarank_normalization and
    lambdarank_score_normalization, weights divided by their mean). With a factor of 1 a step is Newton's, as in
    lightgbm. Tested with xgboost 3.2.
    """
    checks.number("hessian_factor", hessian_factor)
    checks.scalar("hessian_factor", hessian_factor, None, positive=True)
    options = {"weighting": weighting, "k": k, "sigma": sigma, "eps": eps, "mu": mu}
    return _of_dataset(options, float(hessian_factor))


def _of_dataset(options: dict[str, Any], hessian_factor: float) -> Callable[[numpy.ndarray, Any], Any]:
    """Returns the objective for either library: both datasets have the same getters."""

    def objective(scores: numpy.ndarray, dataset: Any) -> tuple[numpy.ndarray, numpy.ndarray]:
        gradient, hessian = _weighted(scores, dataset.get_label(), dataset.get_weight(), dataset.get_group(), options)
        return gradient, hessian if hessian_factor == 1 else hessian * hessian_factor

    return objective


def sklearn_objective(
    *,
    weighting: str | Callable[[Tensor, Tensor, Tensor], Tensor] | None = "lambda_rank",
    k: int | None = None,
    sigma: float = 1.0,
    eps: float = 1e-10,
    mu: float = 10.0,
) -> Callable[..., tuple[numpy.ndarray, numpy.ndarray]]:
    """Returns the objective for `lightgbm.LGBMRanker(objective=sklearn_objective(k=30))`.

    Its arguments are (labels, scores, weight, group).
    """
    options = {"weighting": weighting, "k": k, "sigma": sigma, "eps": eps, "mu": mu}

    def objective(
        labels: numpy.ndarray, scores: numpy.ndarray, weight: Any, group: Any
    ) -> tuple[numpy.ndarray, numpy.ndarray]:
        return _weighted(scores, labels, weight, group, options)

    return objective


def _weighted(
    scores: numpy.ndarray, labels: numpy.ndarray, weight: Any, group: Any, options: dict[str, Any]
) -> tuple[numpy.ndarray, numpy.ndarray]:
    if group is None or not len(group):
        raise ValueError(
            "the dataset must have groups, the number of documents of each query, got none; call its set_group"
        )
    gradient, hessian = lambda_gradients(numpy.asarray(scores), numpy.asarray(labels), group=group, **options)
    if weight is None or not len(weight):
        return gradient, hessian
    weight = numpy.asarray(weight)
    if len(weight) == len(group) != len(scores):
        weight = numpy.repeat(weight, group)
    return gradient * weight, hessian * weight


def _sizes(group: Any, total: int) -> Tensor:
    sizes = torch.tensor([total]) if group is None else torch.as_tensor(numpy.asarray(group)).to("cpu", torch.int64)
    if sizes.dim() != 1 or bool((sizes < 0).any()) or int(sizes.sum()) != total:
        raise ValueError(f"group must be each query's number of documents, {total} in all, got {sizes.tolist()}")
    return sizes


def _like_sizes(sizes: Tensor) -> list[Tensor]:
    """Returns blocks of queries of at most PAIRS pairs each; a block's longest query is at most twice its shortest."""
    order = sizes.argsort(stable=True)
    blocks: list[Tensor] = []
    end = len(order)
    while end and int(sizes[order[end - 1]]):
        longest = int(sizes[order[end - 1]])
        start = max(0, end - max(1, PAIRS // longest**2))
        start = max(start, int(torch.searchsorted(sizes[order], longest // 2 + 1)))
        blocks.append(order[start:end])
        end = start
    return blocks
