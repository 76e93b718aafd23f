"""The losses of sentence-transformers' CrossEncoder: scores of pairs, or of a query's documents.

    from fusedloss.integrations.sentence_transformers import cross_encoder as losses

    loss = losses.LambdaLoss(model)
    trainer = CrossEncoderTrainer(model=model, train_dataset=dataset, loss=loss)

The model takes nearly all the time of a step here: the drop-ins save launches, and in the pairwise losses (LambdaLoss,
RankNetLoss, ADRMSELoss) the n x n matrices of each query. Everything else runs the library's code.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from sentence_transformers.cross_encoder.losses import ADRMSELoss as _ADRMSELoss
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss as _BinaryCrossEntropyLoss
from sentence_transformers.cross_encoder.losses import (
    CachedMultipleNegativesRankingLoss as _CachedMultipleNegativesRankingLoss,
)
from sentence_transformers.cross_encoder.losses import CrossEntropyLoss as _CrossEntropyLoss
from sentence_transformers.cross_encoder.losses import LambdaLoss as _LambdaLoss
from sentence_transformers.cross_encoder.losses import LambdaRankScheme as LambdaRankScheme
from sentence_transformers.cross_encoder.losses import ListMLELoss as _ListMLELoss
from sentence_transformers.cross_encoder.losses import ListNetLoss as _ListNetLoss
from sentence_transformers.cross_encoder.losses import MarginMSELoss as _MarginMSELoss
from sentence_transformers.cross_encoder.losses import MSELoss as _MSELoss
from sentence_transformers.cross_encoder.losses import MultipleNegativesRankingLoss as _MultipleNegativesRankingLoss
from sentence_transformers.cross_encoder.losses import NDCGLoss1Scheme as NDCGLoss1Scheme
from sentence_transformers.cross_encoder.losses import NDCGLoss2PPScheme as NDCGLoss2PPScheme
from sentence_transformers.cross_encoder.losses import NDCGLoss2Scheme as NDCGLoss2Scheme
from sentence_transformers.cross_encoder.losses import NoWeightingScheme as NoWeightingScheme
from sentence_transformers.cross_encoder.losses import PListMLELambdaWeight as PListMLELambdaWeight
from sentence_transformers.cross_encoder.losses import PListMLELoss as _PListMLELoss
from sentence_transformers.cross_encoder.losses import RankNetLoss as _RankNetLoss
from torch import Tensor, nn

import fusedloss
from fusedloss.core.checks import FLOATING, reads_values

from .._drop_in import Patch, counted, library_is_faster, runs_fused
from .._fits import a_class_is_outside, overridden, untouched
from . import _fits, drop_ins


def patch() -> Patch:
    """Replaces the library's classes by these drop-ins; the package's `patch()` does so for all kinds of models."""
    return Patch(drop_ins(sys.modules[__name__]))


def name_of(loss: nn.Module) -> str:
    return f"sentence_transformers.cross_encoder.{type(loss).__name__}"


class standing_in:
    """Makes the library's code find `other` as the loss's module `name`: an entry of __dict__ is found first."""

    def __init__(self, loss: nn.Module, name: str, other: Callable[..., Tensor]):
        self.own, self.name, self.other = vars(loss), name, other

    def __enter__(self) -> None:  # a generator would take 4 us more
        self.before = self.own.get(self.name, self)
        self.own[self.name] = self.other

    def __exit__(self, *error: object) -> None:
        del self.own[self.name]
        if self.before is not self:
            self.own[self.name] = self.before


def no_type_error(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Turns a TypeError into a RuntimeError: at a TypeError the trainer silently calls the loss without prompts."""
    try:
        return function(*args)
    except TypeError as error:
        raise RuntimeError(str(error)) from error


def scores_fit(scores: Any) -> str | None:
    if type(scores) is not Tensor or scores.layout != torch.strided or scores.dtype not in FLOATING:
        return "the scores are not a dense floating tensor"
    return None if scores.numel() else "there are no scores"


# Losses whose last step is a criterion of torch -----------------------------------------------------------------------


def _broadcasts(weight: Tensor | None, like: Tensor) -> bool:
    if weight is None:
        return True
    sizes = zip(reversed(weight.shape), reversed(like.shape), strict=False)
    return (
        weight.device == like.device
        and weight.dtype in FLOATING
        and weight.dim() <= like.dim()
        and all(own in (1, size) for own, size in sizes)
    )


def binary_cross_entropy(criterion: Any, scores: Tensor, labels: Tensor) -> Tensor:
    return fusedloss.binary_cross_entropy_with_logits(
        scores, labels, criterion.weight, reduction=criterion.reduction, pos_weight=criterion.pos_weight
    )


def binary_cross_entropy_fits(criterion: Any, scores: Tensor, labels: Tensor) -> str | None:
    fit = _broadcasts(criterion.weight, scores) and _broadcasts(criterion.pos_weight, scores)
    return squared_error_fits(criterion, scores, labels) or (
        None if fit else "its weights do not broadcast to the scores"
    )


def squared_error(criterion: Any, scores: Tensor, labels: Tensor) -> Tensor:
    return fusedloss.mse(scores, labels, reduction=criterion.reduction)


def squared_error_fits(criterion: Any, scores: Tensor, labels: Tensor) -> str | None:
    alike = labels.shape == scores.shape and labels.device == scores.device and labels.dtype in FLOATING
    return None if alike else "the labels do not have the shape, dtype or device of the scores"


def cross_entropy(criterion: Any, scores: Tensor, labels: Tensor) -> Tensor:
    return fusedloss.cross_entropy(
        scores if scores.dtype.itemsize > 2 else scores.float(),
        labels,
        criterion.weight,
        ignore_index=criterion.ignore_index,
        reduction=criterion.reduction,
        label_smoothing=criterion.label_smoothing,
    )


def cross_entropy_fits(criterion: Any, scores: Tensor, labels: Tensor) -> str | None:
    if scores.dim() != 2 or not isinstance(labels, Tensor) or labels.device != scores.device:
        return "the scores are not a matrix with one label per row"
    shares = labels.dtype in FLOATING
    if labels.shape != (scores.shape if shares else scores.shape[:1]) or not (shares or labels.dtype == torch.int64):
        return "the labels are neither classes nor shares of them"
    if shares and criterion.ignore_index >= 0:
        return "its ignore_index is a class"
    if not shares and reads_values(labels) and a_class_is_outside(labels, scores.shape[1], criterion.ignore_index):
        return "a label is not a class"
    if criterion.weight is not None and (
        criterion.weight.dtype != scores.dtype
        or criterion.weight.shape != scores.shape[1:]
        or criterion.weight.device != scores.device
    ):
        return "its weight does not have one number for each class"
    return None


class Criterion:
    """A torch module at the end of a loss, and its twin here.

    The library's code before it, with its checks and messages, stays; the twin replaces the call.
    """

    def __init__(self, name: str, kind: type[nn.Module], twin: Callable[..., Tensor], fits: Callable[..., str | None]):
        self.name, self.kind, self.twin, self.fits = name, kind, twin, fits

    def of(self, loss: nn.Module) -> standing_in:
        twin = functools.partial(self._in_place_of, getattr(loss, self.name), loss)
        return standing_in(loss, self.name, twin)

    @counted
    def _in_place_of(self, criterion: Any, loss: nn.Module, scores: Tensor, labels: Tensor) -> Tensor:
        name = name_of(loss)
        if type(scores) is Tensor and library_is_faster(name, scores, scores.numel()):
            return criterion(scores, labels)
        known = untouched(criterion, self.kind)
        why_not = (None if known else f"its {self.name} is not torch's {self.kind.__name__}") or scores_fit(scores)
        if not runs_fused(name, why_not or self.fits(criterion, scores, labels)):
            return criterion(scores, labels)
        return no_type_error(self.twin, criterion, scores, labels)


class _WithCriterion(nn.Module):
    _criterion: ClassVar[Criterion]

    def forward(self, inputs: Any, labels: Any, prompt: str | None = None, task: str | None = None) -> Tensor:
        with self._criterion.of(self):
            return super().forward(inputs, labels, prompt=prompt, task=task)


class BinaryCrossEntropyLoss(_WithCriterion, _BinaryCrossEntropyLoss):
    """sentence-transformers' loss of this name; value and derivative in one pass. An infinite score that is wrong gives
    an infinite loss; torch's formula gives NaN."""

    _criterion = Criterion(
        "bce_with_logits_loss", nn.BCEWithLogitsLoss, binary_cross_entropy, binary_cross_entropy_fits
    )


class CrossEntropyLoss(_WithCriterion, _CrossEntropyLoss):
    """sentence-transformers' loss of this name; value and derivative in one pass."""

    _criterion = Criterion("ce_loss", nn.CrossEntropyLoss, cross_entropy, cross_entropy_fits)


class MSELoss(_WithCriterion, _MSELoss):
    """sentence-transformers' loss of this name; value and derivative in one pass."""

    _criterion = Criterion("loss_fct", nn.MSELoss, squared_error, squared_error_fits)


class MarginMSELoss(_WithCriterion, _MarginMSELoss):
    """sentence-transformers' loss of this name; value and derivative of the margins' errors in one pass."""

    _criterion = Criterion("loss_fct", nn.MSELoss, squared_error, squared_error_fits)


class ListNetLoss(_WithCriterion, _ListNetLoss):
    """sentence-transformers' loss of this name; value and derivative in one pass."""

    _criterion = Criterion("cross_entropy_loss", nn.CrossEntropyLoss, cross_entropy, cross_entropy_fits)


class MultipleNegativesRankingLoss(_MultipleNegativesRankingLoss):
    """sentence-transformers' loss of this name; value and derivative of the scores in one pass."""

    _criterion: ClassVar[Criterion] = ListNetLoss._criterion

    def calculate_loss(self, logits: Any, batch_size: int) -> Tensor:
        with self._criterion.of(self):
            return super().calculate_loss(logits, batch_size)


class CachedMultipleNegativesRankingLoss(_CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss):
    """sentence-transformers' loss of this name, as `MultipleNegativesRankingLoss`."""


# Losses of lists ------------------------------------------------------------------------------------------------------

LARGEST = 5e7  # of a score: beyond this both sides clamp, each differently
LARGEST_GRADE = 100.0  # of a label whose gain is 2^label


class _Scored(Exception):
    """Leaves the library's forward with its scores, because what follows is not a separate method."""

    def __init__(self, scores: Tensor, labels: Tensor):
        super().__init__()
        self.scores, self.labels = scores, labels  # one number for each document


class _OfLists(nn.Module):
    """Base of the list losses: the library checks, tokenises and scores; the loss of the scores is ours."""

    activation_fn: Callable[[Tensor], Tensor]
    model: Any
    _largest_label: ClassVar[float] = LARGEST

    @counted
    def forward(self, inputs: Any, labels: Any, prompt: str | None = None, task: str | None = None) -> Tensor:
        activation = self.activation_fn

        def at_scores(logits: Tensor) -> Tensor:
            scores = activation(logits)
            why_not = self._why_not() or self._lists_fit(scores, labels)
            if why_not is None:
                joined = torch.cat(list(labels)).float()
                why_not = self._values_fit(scores, joined)
            if not runs_fused(name_of(self), why_not):
                return scores
            raise _Scored(scores, joined)

        try:
            with standing_in(self, "activation_fn", at_scores):
                return super().forward(inputs, labels, prompt=prompt, task=task)
        except _Scored as found:
            scores, joined = found.scores, found.labels
        return no_type_error(self._of_scores, *padded(scores, joined, [x.shape[0] for x in labels]))

    def _why_not(self) -> str | None:
        """Returns the reason, among the options, against fused code."""
        raise NotImplementedError

    def _of_scores(self, scores: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _lists_fit(self, scores: Any, labels: Sequence[Any]) -> str | None:
        if (why_not := scores_fit(scores)) is not None:
            return why_not
        for x in labels:
            if type(x) is not Tensor or x.dim() != 1 or x.dtype not in (*_fits.NUMBERS, torch.bool):
                return "the labels are not one tensor of numbers for each query"
            if x.device != scores.device or x.requires_grad:
                return "the labels are on another device, or require gradients"
        if scores.shape != (sum(x.shape[0] for x in labels),) or scores.device.type != self.model.device.type:
            return "the scores are not one for each document"
        if scores.dtype != torch.get_default_dtype():
            return "the scores have another dtype than the library's matrix of them"
        return None

    def _values_fit(self, scores: Tensor, labels: Tensor) -> str | None:
        # Reading values back is no extra cost: the library does so, too.
        score, label = torch.stack([scores.detach().abs().amax(), labels.abs().amax()]).tolist()
        fit = score <= LARGEST and label <= self._largest_label
        return None if fit else "a score or a label is NaN, infinite or too large"


def padded(scores: Tensor, labels: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns scores and labels `[queries, documents]`, and a mask of documents if not all are."""
    Q, n = len(lengths), max(lengths)
    if Q * n == len(scores):
        return scores.view(Q, n), labels.view(Q, n), None
    index = torch.cat([torch.arange(q * n, q * n + length) for q, length in enumerate(lengths)]).to(scores.device)
    mask = torch.zeros(Q * n, dtype=torch.bool, device=scores.device).index_fill(0, index, True)
    scores, labels = (x.new_zeros(Q * n).index_copy(0, index, x) for x in (scores, labels))
    return scores.view(Q, n), labels.view(Q, n), mask.view(Q, n)


SCHEMES: dict[type[nn.Module], str | None] = {
    NoWeightingScheme: None,
    NDCGLoss1Scheme: "ndcg_loss1",
    NDCGLoss2Scheme: "ndcg_loss2",
    LambdaRankScheme: "lambda_rank",
    NDCGLoss2PPScheme: "ndcg_loss2pp",
}


def scheme_is_known(scheme: Any) -> str | None:
    parts = [(scheme, type(scheme))]
    if type(scheme) is NDCGLoss2PPScheme:
        parts += [(scheme.ndcg_loss2, NDCGLoss2Scheme), (scheme.lambda_rank, LambdaRankScheme)]
        if (why_not := _fits.number_fits("mu", scheme.mu)) is not None:
            return why_not
    if type(scheme) not in SCHEMES or not all(untouched(module, kind) for module, kind in parts):
        return "its weighting_scheme is not one of the library's"
    return None


class LambdaLoss(_OfLists, _LambdaLoss):
    """sentence-transformers' loss of this name. No n x n matrix is made for a query of n documents.

    Gains of labels near 0 and discounts of far positions keep digits that float32 differences lose. A weighting scheme
    of your own runs the library's code.
    """

    weighting_scheme: Any
    k: Any
    sigma: Any
    eps: Any
    _largest_label = LARGEST_GRADE

    def _why_not(self) -> str | None:
        k = self.k
        return (
            scheme_is_known(self.weighting_scheme)
            or (None if k is None or (type(k) is int and k >= 0) else "its k is not a number of documents")
            or _fits.number_fits("sigma", self.sigma, positive=True)
            or _fits.number_fits("eps", self.eps)
        )

    def _of_scores(self, scores: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        return fusedloss.lambda_loss(
            scores,
            labels,
            mask=mask,
            weighting=SCHEMES[self.weighting_scheme.__class__],
            k=self.k or None,
            sigma=self.sigma,
            eps=self.eps,
            reduction_log="binary" if self.reduction_log == "binary" else "natural",
            mu=getattr(self.weighting_scheme, "mu", 0.0),
        )


class RankNetLoss(_RankNetLoss, LambdaLoss):
    """sentence-transformers' loss of this name, as `LambdaLoss`."""


class ADRMSELoss(_OfLists, _ADRMSELoss):
    """sentence-transformers' loss of this name. No n x n matrix is made for a query of n documents."""

    alpha: Any

    def _why_not(self) -> str | None:
        return overridden(self, _ADRMSELoss, "approximate_ranks") or _fits.number_fits(
            "alpha", self.alpha, positive=True
        )

    def _of_scores(self, scores: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        return fusedloss.adr_mse(scores, labels, mask=mask, alpha=self.alpha)


class PListMLELoss(_OfLists, _PListMLELoss):
    """sentence-transformers' loss of this name, its logarithms in float64. Weights by a `rank_discount_fn` of your own
    run the library's code."""

    lambda_weight: Any

    def _why_not(self) -> str | None:
        weight = self.lambda_weight
        if weight is None:
            return None
        if not untouched(weight, PListMLELambdaWeight) or weight.rank_discount_fn is not None:
            return "its lambda_weight is not the library's default"
        return None if self.eps == 1e-10 else "its eps is not 1e-10"

    def _of_scores(self, scores: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        losses = fusedloss.plist_mle(
            scores,
            labels,
            mask=mask,
            lambda_weight=None if self.lambda_weight is None else "default",
            respect_input_order=bool(self.respect_input_order),
            reduction="none",
        )
        if not torch.any(
            losses
        ):  # single documents: as in the library, no gradient; a gradient of 0 would let weights decay
            return torch.zeros((), device=self.model.device, requires_grad=True)
        return losses.mean()


class ListMLELoss(_ListMLELoss, PListMLELoss):
    """sentence-transformers' loss of this name, as `PListMLELoss`."""
