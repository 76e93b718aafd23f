"""Losses of rerankers: scores of a query's documents, against labels that say how relevant each is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Unpack

import torch
from torch import Tensor, nn

from ..core import checks
from ..core.numerics import savable, stats_dtype
from ..rowwise import lists
from ._options import Call, RowOptions, expanded

WEIGHTINGS = ("ndcg_loss2pp", "ndcg_loss2", "ndcg_loss1", "lambda_rank")
UNITS = {"binary": lists.LN2, "natural": 1.0}  # a loss in bits is the loss in nats / log 2

Lists = Tensor | Sequence[Tensor]


@expanded
def lambda_loss(
    scores: Lists,
    labels: Lists,
    *,
    mask: Tensor | None = None,
    weighting: str | Callable[[Tensor, Tensor, Tensor], Tensor] | None = "ndcg_loss2pp",
    k: int | None = None,
    sigma: float = 1.0,
    eps: float = 1e-10,
    reduction_log: str = "binary",
    mu: float = 10.0,
    **options: Unpack[RowOptions],
) -> Tensor:
    """LambdaLoss (Wang et al. 2018), as sentence-transformers' cross-encoder loss.

        loss = sum_(i, j) -w_ij log2 sigmoid(sigma (s_i - s_j)) / number of pairs
        over pairs of a query's documents with label_i > label_j, at least one of them among its k best scores

    With documents at positions 1.. by score, D_p = log2(1 + p) and gain G_i = (2^label_i - 1) / DCG@k of the best order
    (negative labels gain nothing), w_ij is

        "ndcg_loss2pp"   mu * "ndcg_loss2" + "lambda_rank"
        "ndcg_loss2"     |1 / D_|i-j| - 1 / D_(|i-j|+1)| |G_i - G_j|
        "lambda_rank"    |1 / D_i - 1 / D_j| |G_i - G_j|
        "ndcg_loss1"     G_i / D_i, over all pairs: equal labels and i = j, too
        None             1: RankNet

    No [Q, n, n] tensor is made: pairs are visited in blocks, and the gradient is computed in the same pass. Weights
    carry no gradient; equal scores keep their order. Scores are clamped to +-1e8, without gradient beyond
    (sentence-transformers clamps their differences), so an infinite score gives finite numbers. A NaN score or label
    makes the loss NaN (in sentence-transformers a NaN score counts as a tie). So does an infinite label, and a gain
    that overflows (a label over 1023), unless all of the query's labels are equal.

    Args:
        scores: `[Q, n]`, floating, any strides; or a list of 1-D tensors, one a query.
        labels: likewise, any real dtype: the higher, the more relevant.
        mask: bool `[Q, n]`, True for documents. Values in the padding are not read, NaN included.
        weighting: a name from the table, or a function (gain `[Q, n]`, discount D `[1, n]`, labels `[Q, n]`, both by
            score and padding 0) -> weights that broadcast to `[Q, n, n]`, as a scheme of sentence-transformers. It is
            called for a few queries at once, whose n x n weights exist; those without gradient on "reference" only.
        k: number of best scores that count as the top; None is all.
        sigma: multiplies the scores, above 0.
        eps: lower bound of the best DCG.
        reduction_log: "binary" (bits) or "natural".
        mu: of "ndcg_loss2pp".
        reduction: "mean" over all pairs that count (0 without one), "sum", or "none": `[Q]`, sums over each query.
        backend: {rows}; with a function not "triton".
            Second derivatives need "reference", because only the gradient is kept.

    Returns:
        A 0-dim tensor (`[Q]` for "none"), float32, or float64 for float64 scores.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> scores = reranker(queries, documents)  # [Q, n]
        >>> fusedloss.lambda_loss(scores, relevance, mask=is_document).backward()
    """
    call = Call(**options)
    scores, labels, mask = _padded(scores, labels, mask)
    check_lambda(weighting, k, sigma, eps, mu)
    checks.choice("reduction_log", reduction_log, tuple(UNITS))
    if not scores.numel():
        return _nothing(scores, call.reduction)
    return lists.lambda_loss(
        scores,
        labels,
        mask,
        weighting=weighting,
        k=k,
        sigma=sigma,
        eps=eps,
        mu=mu,
        unit=UNITS[reduction_log],
        reduction=call.reduction,
        backend=call.backend,
    )


@expanded
def rank_net(
    scores: Lists,
    labels: Lists | None = None,
    *,
    mask: Tensor | None = None,
    k: int | None = None,
    sigma: float = 1.0,
    eps: float = 1e-10,
    reduction_log: str = "binary",
    soft: Tensor | None = None,
    reference: Lists | None = None,
    **options: Unpack[RowOptions],
) -> Tensor:
    """RankNet (Burges et al. 2005), with labels, or with a target for every pair.

        labels:  loss = mean of -log2 sigmoid(sigma (s_i - s_j)) over pairs of a query's documents, label_i > label_j
        soft:    loss = sum_(i != j) p_ij -log2 sigmoid(sigma (s_i - s_j)) / sum_(i != j) p_ij

    With labels this is `lambda_loss` with weights of 1, whose result and errors it has. `soft` is the loss of zELO
    (arXiv 2509.12541): the binary cross-entropy of each pair, where p_ij + p_ji = 1. A pair that nobody judged has 0 in
    both places. With a `reference` model's scores r, s_i - s_j becomes (s_i - s_j) - (r_i - r_j), and `sigma` is the
    beta of direct preference optimisation (DPO, arXiv 2305.18290).

    Args:
        scores, labels, mask, k, sigma, eps, reduction_log: see `lambda_loss`. labels is None with soft.
        soft: `[Q, n, n]`, floating, from 0 to 1: the probability that document i is more relevant than j. Receives no
            gradient. The diagonal and the padding are not read. `scores` must be a tensor with it.
        reference: of the form of `scores`, which it is subtracted from. Receives no gradient.
        reduction: "mean" over all pairs that count (0 without one), "sum", or "none": `[Q]`, sums over each query.
        backend: {rows}; with soft not "triton".
            Second derivatives need "reference".

    Example:
        >>> fusedloss.rank_net(scores, labels, mask=is_document).backward()
        >>> fusedloss.rank_net(scores, soft=preference, reduction_log="natural").backward()
    """
    call = Call(**options)
    if (labels is None) == (soft is None):
        got = "neither" if labels is None else "both"
        raise ValueError(f"labels must be given, or soft in their place, got {got}; pass one of them")
    if reference is not None:
        scores = _above_reference(scores, reference)
    if labels is not None:
        return lambda_loss(
            scores,
            labels,
            mask=mask,
            weighting=None,
            k=k,
            sigma=sigma,
            eps=eps,
            reduction_log=reduction_log,
            **options,
        )
    assert soft is not None
    if not isinstance(scores, Tensor):
        raise TypeError(
            f"scores must be a tensor [Q, n] with soft, got {checks.a(scores)}; pad the lists, and pass mask"
        )
    scores, _, mask = _padded(scores, scores, mask)
    check_lambda(None, k, sigma, eps, 0.0)
    checks.choice("reduction_log", reduction_log, tuple(UNITS))
    soft = _targets_of_pairs(soft, scores, mask)
    if not scores.numel():
        return _nothing(scores, call.reduction)
    return lists.soft_pairs(
        scores,
        soft,
        mask,
        k=k,
        sigma=sigma,
        unit=UNITS[reduction_log],
        reduction=call.reduction,
        backend=call.backend,
    )


@expanded
def list_net(scores: Lists, labels: Lists, *, mask: Tensor | None = None, **options: Unpack[RowOptions]) -> Tensor:
    """ListNet (Cao et al. 2007), as sentence-transformers' cross-encoder loss.

        loss_q = -sum_i softmax(labels)_i log softmax(scores)_i

    A query without documents has loss 0 and counts in the mean (in sentence-transformers it is NaN).

    Args:
        scores, labels, mask: see `lambda_loss`. Labels that require grad receive it.
        reduction: "mean" over queries, "sum" or "none" (`[Q]`).
        backend: {rows}; second derivatives need "reference".

    Returns, Raises: see `lambda_loss`.

    Example:
        >>> fusedloss.list_net(scores, teacher_scores, mask=is_document).backward()
    """
    call = Call(**options)
    scores, labels, mask = _padded(scores, labels, mask)
    if not scores.numel():
        return _nothing(scores, call.reduction)
    return lists.list_net(scores, labels, mask, reduction=call.reduction, backend=call.backend)


@expanded
def list_mle(
    scores: Lists,
    labels: Lists,
    *,
    mask: Tensor | None = None,
    respect_input_order: bool = True,
    **options: Unpack[RowOptions],
) -> Tensor:
    """ListMLE (Xia et al. 2008): minus the log-likelihood of the right order under Plackett-Luce.

        loss_q = sum_i logsumexp_(j >= i) s_j - s_i

    This is `plist_mle` with weights of 1, whose parameters, result and errors it has.

    Example:
        >>> fusedloss.list_mle(scores, labels, respect_input_order=False).backward()
    """
    return plist_mle(
        scores,
        labels,
        mask=mask,
        lambda_weight=None,
        respect_input_order=respect_input_order,
        **options,
    )


@expanded
def plist_mle(
    scores: Lists,
    labels: Lists,
    *,
    mask: Tensor | None = None,
    lambda_weight: str | Callable[[Tensor], Tensor] | None = "default",
    respect_input_order: bool = True,
    **options: Unpack[RowOptions],
) -> Tensor:
    """Position-aware ListMLE (Lan et al. 2014), as sentence-transformers' cross-encoder loss.

        loss_q = sum_i w_i / (sum w + 1e-10) (logsumexp_(j >= i) s_j - s_i)
        w_i    = 2^(n - i) - 1 at the i-th place of n documents

    In lists of more than 127 documents, w is divided by 2^(n - 127) to stay finite. A query without documents has loss
    0 and counts in the mean.

    Args:
        scores, labels, mask: see `lambda_loss`. A place without a document is skipped, wherever it stands.
        lambda_weight: "default"; None for weights of 1, not divided by their sum; or a function of the mask, bool
            `[Q, n]` in the list's order, that returns weights of that shape.
        respect_input_order: documents are in the right order and the labels' values are not read. Otherwise they are
            sorted by label, the highest first; equal labels keep their order (sentence-transformers' sort is not stable
            from 17 documents on, so there the loss of equal labels depends on it).
        reduction: "mean" over queries, "sum" or "none" (`[Q]`).
        backend: {rows}; "triton" takes up to 4096
            documents. Second derivatives need "reference".

    Returns, Raises: see `lambda_loss`.

    Example:
        >>> fusedloss.plist_mle(scores, labels, mask=is_document, respect_input_order=False).backward()
    """
    call = Call(**options)
    scores, labels, mask = _padded(scores, labels, mask)
    if not callable(lambda_weight) and lambda_weight is not None:
        checks.choice("lambda_weight", lambda_weight, ("default",))
    if not scores.numel():
        return _nothing(scores, call.reduction)
    return lists.list_mle(
        scores,
        labels,
        mask,
        lambda_weight=lambda_weight,
        respect_input_order=respect_input_order,
        reduction=call.reduction,
        backend=call.backend,
    )


@expanded
def adr_mse(
    scores: Lists,
    labels: Lists,
    *,
    mask: Tensor | None = None,
    alpha: float = 1.0,
    **options: Unpack[RowOptions],
) -> Tensor:
    """Approximate discounted rank MSE (Schlatt et al. 2025), as sentence-transformers' cross-encoder loss.

        R_i    = 1 + sum_(j != i) sigmoid(alpha (s_j - s_i))                     the soft rank
        loss_i = (t_i - R_i)^2 / log2(1 + t_i)                                   t_i: the label's rank, ties averaged

    No [Q, n, n] tensor is made: pairs are visited in blocks, once for the ranks and once for the gradient.

    Args:
        scores, labels, mask: see `lambda_loss`; clamping and NaN likewise.
        alpha: above 0; the higher, the closer R is to the rank.
        reduction: "mean" over documents (0 without one), "sum", or "none": `[Q]`, sums over each query.
        backend: {rows}; second derivatives need "reference".

    Returns, Raises: see `lambda_loss`.

    Example:
        >>> fusedloss.adr_mse(scores, labels, mask=is_document).backward()
    """
    call = Call(**options)
    scores, labels, mask = _padded(scores, labels, mask)
    _positive("alpha", alpha)
    if not scores.numel():
        return _nothing(scores, call.reduction)
    return lists.adr_mse(scores, labels, mask, alpha=alpha, reduction=call.reduction, backend=call.backend)


# Arguments ------------------------------------------------------------------------------------------------------------


def _above_reference(scores: Lists, reference: Lists) -> Lists:
    """Returns the scores less the reference's, in fp32 or fp64."""
    _padded(scores, reference, None, "reference")
    if isinstance(scores, Tensor) and isinstance(reference, Tensor):
        return _less(scores, reference)
    return [_less(s, r) for s, r in zip(scores, reference, strict=True)]


def _less(scores: Tensor, reference: Tensor) -> Tensor:
    dtype = stats_dtype(scores.dtype)
    return savable(scores).to(dtype) - savable(reference).detach().to(dtype)


def _targets_of_pairs(soft: Tensor, scores: Tensor, mask: Tensor | None) -> Tensor:
    shape = [*scores.shape, scores.shape[1]]
    if not isinstance(soft, Tensor) or soft.dtype not in checks.FLOATING:
        got = soft.dtype if isinstance(soft, Tensor) else checks.a(soft)
        raise TypeError(f"soft must be a floating tensor {shape}, a probability for each pair of documents, got {got}")
    checks.dense("soft", soft)
    if list(soft.shape) != shape:
        raise ValueError(f"soft must have shape {shape}, a number for each pair of documents, got {list(soft.shape)}")
    checks.same_device("soft", soft, "scores", scores)
    soft = savable(soft).detach()
    if checks.reads_values(soft) and soft.numel():
        pair = ~torch.eye(shape[1], dtype=torch.bool, device=soft.device)
        if mask is not None:
            pair = pair & mask[:, :, None] & mask[:, None, :]
        low, high = (float(end) for end in soft.where(pair, 0).aminmax())
        if low < 0 or high > 1:
            raise ValueError(f"soft must hold numbers from 0 to 1, got {low if low < 0 else high}")
    return soft


def _padded(
    scores: Lists, labels: Lists, mask: Tensor | None, name: str = "labels"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns scores and labels, as errors call `name`, `[Q, n]`, and a mask of the documents."""
    if isinstance(scores, Tensor) and isinstance(labels, Tensor):
        if scores.dtype not in checks.FLOATING:
            raise TypeError(f"scores must be float16, bfloat16, float32 or float64, got {scores.dtype}")
        checks.dense("scores", scores)
        checks.dense(name, labels)
        if scores.dim() != 2:
            raise ValueError(
                f"scores must be [queries, documents] or a list of 1-D tensors, got shape {list(scores.shape)}"
            )
        if labels.shape != scores.shape:
            raise ValueError(f"{name} must have shape {list(scores.shape)}, like scores, got {list(labels.shape)}")
        if labels.is_complex():
            raise TypeError(f"{name} must be real numbers, got {labels.dtype}")
        if labels.device != scores.device:
            raise ValueError(f"{name} must be on {scores.device}, like scores, got {labels.device}; move one of them")
        if mask is not None:
            checks.boolean("mask", mask, tuple(scores.shape), scores)
        return savable(scores), savable(labels), None if mask is None else savable(mask)
    for own, given in (("scores", scores), (name, labels)):
        checks.options_not_modules(**{own: given})
        if isinstance(given, Tensor) or not isinstance(given, Sequence):
            raise TypeError(
                f"scores and {name} must both be [Q, n] tensors or both be lists of 1-D tensors, "
                f"got {checks.a(given)} as {own}"
            )
        for i, x in enumerate(given):
            if not isinstance(x, Tensor) or x.dim() != 1:
                got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else checks.a(x)
                raise ValueError(f"{own}[{i}] must be a 1-D tensor, one number per document, got {got}")
    if mask is not None:
        raise ValueError(
            "mask must be None if scores and labels are lists of tensors, which have no padding, got a mask"
        )
    lengths, found = ([len(x) for x in given] for given in (scores, labels))
    if lengths != found:
        raise ValueError(f"{name} must have lists of {lengths} documents, like scores, got {found}")
    if not lengths:
        return torch.zeros(0, 0), torch.zeros(0, 0), None
    padded, relevance = (nn.utils.rnn.pad_sequence(list(given), batch_first=True) for given in (scores, labels))
    real = None
    if any(n != lengths[0] for n in lengths):
        # Padded in the same way: copying lengths to a GPU would wait for it, and cannot be captured in a CUDA graph.
        ones = torch.ones(sum(lengths), dtype=torch.bool, device=padded.device)
        real = nn.utils.rnn.pad_sequence(ones.split(lengths), batch_first=True)
    return _padded(padded, relevance, real, name)


def check_lambda(weighting: object, k: int | None, sigma: float, eps: float, mu: float) -> None:
    if weighting is not None and not callable(weighting):
        checks.choice("weighting", weighting, WEIGHTINGS)
    checks.count("k", k)
    _positive("sigma", sigma)
    checks.number("eps", eps, least=0)
    checks.number("mu", mu, least=0)


def _positive(name: str, value: float) -> None:
    checks.number(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be a positive number, got {value}")


def _nothing(scores: Tensor, reduction: str) -> Tensor:
    """Returns zeros with a graph, for no documents."""
    sums = scores.to(stats_dtype(scores.dtype)).sum(1)
    return sums if reduction == "none" else sums.sum()
