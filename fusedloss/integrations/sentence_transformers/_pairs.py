"""Losses of a text and one or a few others: their similarities in one pass over the rows, forward and backward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer.losses import AnglELoss as _AnglELoss
from sentence_transformers.sentence_transformer.losses import ContrastiveLoss as _ContrastiveLoss
from sentence_transformers.sentence_transformer.losses import ContrastiveTensionLoss as _ContrastiveTensionLoss
from sentence_transformers.sentence_transformer.losses import CoSENTLoss as _CoSENTLoss
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss as _CosineSimilarityLoss
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss as _DistillKLDivLoss
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss as _EmbedDistillLoss
from sentence_transformers.sentence_transformer.losses import (
    GlobalOrthogonalRegularizationLoss as _GlobalOrthogonalRegularizationLoss,
)
from sentence_transformers.sentence_transformer.losses import MarginMSELoss as _MarginMSELoss
from sentence_transformers.sentence_transformer.losses import MSELoss as _MSELoss
from sentence_transformers.sentence_transformer.losses import OnlineContrastiveLoss as _OnlineContrastiveLoss
from sentence_transformers.sentence_transformer.losses import SiameseDistanceMetric as _Siamese
from sentence_transformers.sentence_transformer.losses import SoftmaxLoss as _SoftmaxLoss
from sentence_transformers.sentence_transformer.losses import TripletDistanceMetric as _Triplet
from sentence_transformers.sentence_transformer.losses import TripletLoss as _TripletLoss
from sentence_transformers.sentence_transformer.losses import distill_kl_div as _distill_kl_div
from torch import Tensor, nn

import fusedloss
from fusedloss.core import checks
from fusedloss.core.numerics import stats_dtype
from fusedloss.losses import check_not_negative
from fusedloss.losses.orthogonal import moments

from .._drop_in import counted, library_is_faster
from .._fits import plain, refusal
from . import _fits
from ._fits import MATRICES, PAIRS, fused

SIAMESE = {_Siamese.COSINE_DISTANCE: "cosine", _Siamese.EUCLIDEAN: "euclidean", _Siamese.MANHATTAN: "manhattan"}
TRIPLET = {_Triplet.COSINE: "cosine", _Triplet.EUCLIDEAN: "euclidean", _Triplet.MANHATTAN: "manhattan"}

criterion_fits, squares_fit = plain(nn.CrossEntropyLoss), plain(nn.MSELoss)
divergence_fits = plain(nn.KLDivLoss, reduction="batchmean")
binary_fits = plain(nn.BCEWithLogitsLoss, reduction="sum")


def distance(metric: Any, known: dict[Any, str]) -> str | None:
    for own, name in known.items():
        if own is metric:
            return name
    return None


def distance_is_known(metric: Any, known: dict[Any, str]) -> str | None:
    return None if distance(metric, known) else "its distance is not one of the library's"


def none_negative(labels: Tensor) -> str | None:
    """What check_not_negative has against these labels, of which there is at least one."""
    if not labels.dtype.is_signed or not checks.reads_values(labels):
        return None
    if labels.min().item() >= 0:  # one pass where the check, which names the row, takes three
        return None
    return refusal(check_not_negative, "label", _fits.flat(labels))


def _siamese_fits(loss: Any, embeddings: Sequence[Tensor], labels: Any) -> str | None:
    """Checks both contrastive losses. The first batch's labels are read, as in the library, for its warning."""
    if len(embeddings) != 2:
        return "there are not two columns"
    why_not = (
        distance_is_known(loss.distance_metric, SIAMESE)
        or _fits.number_fits("margin", loss.margin)
        or _fits.embeddings_fit(*embeddings)
        or _fits.labels_fit(labels, embeddings[0].shape[0], _fits.NUMBERS)
        or none_negative(labels)
    )
    if why_not is None and not loss._checked_labels:
        if bool((labels.ne(0) & labels.ne(1)).any()):
            return "the library warns of the first labels, which are not 0 or 1"
        loss._checked_labels = True
    return why_not


class ContrastiveLoss(_ContrastiveLoss):
    """sentence-transformers' loss of this name, its distances in one pass."""

    @counted
    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        if _fits.few(self, embeddings) or not fused(self, _siamese_fits(self, embeddings, labels)):
            return super().compute_loss_from_embeddings(embeddings, labels)
        a, b = embeddings
        return fusedloss.contrastive(
            a,
            b,
            _fits.flat(labels.float() if labels.dtype is torch.float64 else labels),
            distance=distance(self.distance_metric, SIAMESE) or "",
            margin=self.margin,
            reduction="mean" if self.size_average else "sum",
        )


class OnlineContrastiveLoss(_OnlineContrastiveLoss):
    """sentence-transformers' loss of this name, without waiting for a GPU.

    A NaN distance makes the loss NaN; the library drops it.
    """

    @counted
    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        if not fused(self, _siamese_fits(self, embeddings, labels)):
            return super().compute_loss_from_embeddings(embeddings, labels)
        a, b = embeddings
        return fusedloss.online_contrastive(
            a,
            b,
            _fits.flat(labels),
            distance=distance(self.distance_metric, SIAMESE) or "",
            margin=self.margin,
        )


class CosineSimilarityLoss(_CosineSimilarityLoss):
    """sentence-transformers' loss of this name: the cosines in one pass, then the loss's own two modules."""

    @counted
    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        if _fits.few(self, embeddings):
            return super().compute_loss_from_embeddings(embeddings, labels)
        why_not = (
            ("there are fewer than two columns" if len(embeddings) < 2 else None)
            or _fits.embeddings_fit(*embeddings[:2])
            or _fits.labels_fit(labels, embeddings[0].shape[0])
        )
        if not fused(self, why_not):
            return super().compute_loss_from_embeddings(embeddings, labels)
        a, b = embeddings[:2]
        return fusedloss.cosine_similarity(
            a, b, _fits.flat(labels.float()), loss=self.loss_fct, transform=self.cos_score_transformation
        )


class CoSENTLoss(_CoSENTLoss):
    """sentence-transformers' loss of this name: its sums in float64, its gradient beside its value."""

    @counted
    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        why_not = (
            ("there are fewer than two columns" if len(embeddings) < 2 else None)
            or _fits.similarity_is_known(self.similarity_fct, PAIRS)
            or _fits.number_fits("scale", self.scale, positive=True, tensor=True)
            or _fits.embeddings_fit(*embeddings[:2])
            or _fits.labels_fit(labels, embeddings[0].shape[0])
        )
        if not fused(self, why_not):
            return super().compute_loss_from_embeddings(embeddings, labels)
        a, b = embeddings[:2]
        return fusedloss.cosent(
            a,
            b,
            _fits.flat(labels),
            scale=self.scale,
            similarity=_fits.similarity(self.similarity_fct, PAIRS) or "",
        )


class AnglELoss(_AnglELoss, CoSENTLoss):
    """sentence-transformers' loss of this name, as `CoSENTLoss`."""


class TripletLoss(_TripletLoss):
    """sentence-transformers' loss of this name: both distances in one pass."""

    @counted
    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        why_not = (
            ("there are not three columns" if len(embeddings) != 3 else None)
            or distance_is_known(self.distance_metric, TRIPLET)
            or _fits.number_fits("triplet_margin", self.triplet_margin)
            or _fits.embeddings_fit(*embeddings)
        )
        if not fused(self, why_not):
            return super().compute_loss_from_embeddings(embeddings, labels)
        anchor, positive, negative = embeddings
        return fusedloss.triplet(
            anchor,
            positive,
            negative,
            distance=distance(self.distance_metric, TRIPLET) or "",
            margin=self.triplet_margin,
        )


class MarginMSELoss(_MarginMSELoss):
    """sentence-transformers' loss of this name: all similarities of a query in one pass."""

    @counted
    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        if _fits.few(self, embeddings):
            return super().compute_loss_from_embeddings(embeddings, labels)
        why_not = (
            ("there are fewer than three columns" if len(embeddings) < 3 else None)
            or _fits.similarity_is_known(self.similarity_fct, PAIRS)
            or squares_fit(self.loss_fct)
            or _fits.embeddings_fit(*embeddings)
            or self._labels_fit(embeddings[0].shape[0], len(embeddings) - 2, labels)
        )
        if not fused(self, why_not):
            return super().compute_loss_from_embeddings(embeddings, labels)
        query, positive, *negatives = embeddings
        similarity = _fits.similarity(self.similarity_fct, PAIRS) or ""
        return fusedloss.margin_mse(query, positive, *negatives, label=labels, similarity=similarity)

    @staticmethod
    def _labels_fit(rows: int, negatives: int, labels: Any) -> str | None:
        shapes = [(rows, negatives + 1), (rows, negatives), *([(rows,)] if negatives == 1 else [])]
        if not isinstance(labels, Tensor) or labels.shape not in shapes:
            return "the labels are neither margins nor scores"
        return _fits.labels_fit(labels, labels.numel())


class DistillKLDivLoss(_DistillKLDivLoss):
    """sentence-transformers' loss of this name: all similarities of a query in one pass, the divergence in float64."""

    _checked_teacher_scale: bool

    @counted
    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        if _fits.few(self, embeddings):
            return super().compute_loss_from_embeddings(embeddings, labels)
        why_not = (
            ("there are fewer than three columns" if len(embeddings) < 3 else None)
            or _fits.similarity_is_known(self.similarity_fct, PAIRS)
            or divergence_fits(self.loss_fct)
            or _fits.number_fits("student_temperature", self.student_temperature, positive=True)
            or _fits.number_fits("teacher_temperature", self.teacher_temperature, positive=True)
            or _fits.embeddings_fit(*embeddings)
            or (
                "the labels are not one score for each candidate"
                if not isinstance(labels, Tensor) or labels.shape != (embeddings[0].shape[0], len(embeddings) - 1)
                else _fits.labels_fit(labels, labels.numel())
            )
        )
        if not fused(self, why_not):
            return super().compute_loss_from_embeddings(embeddings, labels)
        if not self._checked_teacher_scale:
            self._checked_teacher_scale = True
            teacher = torch.softmax(labels.detach() / self.teacher_temperature, dim=1)
            _distill_kl_div.check_teacher_targets(teacher, labels, self.teacher_temperature, type(self).__name__)
        query, positive, *negatives = embeddings
        return fusedloss.distill_kl_div(
            query,
            positive,
            *negatives,
            label=labels,
            similarity=_fits.similarity(self.similarity_fct, PAIRS) or "",
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
        )


class EmbedDistillLoss(_EmbedDistillLoss):
    """sentence-transformers' loss of this name: the distances of all columns in one pass each."""

    @counted
    def compute_loss_from_embeddings(self, embeddings: list[Tensor], teacher_embeddings: list[Tensor]) -> Tensor:
        if _fits.few(self, embeddings) or not fused(self, self._fits(embeddings, teacher_embeddings)):
            return super().compute_loss_from_embeddings(embeddings, teacher_embeddings)
        like = embeddings[0]
        shared = all(teacher is teacher_embeddings[0] for teacher in teacher_embeddings)
        teachers = [x.to(like.device, like.dtype) for x in (teacher_embeddings[:1] if shared else teacher_embeddings)]
        students = embeddings if self.projection is None else [self.projection(x) for x in embeddings]
        return fusedloss.embed_distill(students, teachers[0] if shared else teachers, distance=self.distance_metric)

    def _fits(self, embeddings: Sequence[Tensor], teachers: Sequence[Tensor]) -> str | None:
        if not embeddings or len(embeddings) != len(teachers):
            return "the teacher has another number of columns"
        if self.distance_metric not in ("cosine", "mse", "l2"):
            return "its distance_metric is unknown"
        width = embeddings[0].shape[-1] if self.projection is None else self.projection.out_features
        if any(not isinstance(x, Tensor) or x.shape != (len(embeddings[0]), width) for x in teachers):
            return "the teacher's embeddings have another shape"
        return _fits.embeddings_fit(*embeddings)


class MSELoss(_MSELoss, EmbedDistillLoss):
    """sentence-transformers' loss of this name, as `EmbedDistillLoss`."""


class SoftmaxLoss(_SoftmaxLoss):
    """sentence-transformers' loss of this name; the concatenation of both embeddings is never built."""

    @counted
    def forward(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor
    ) -> Tensor | tuple[list[Tensor], Tensor]:
        embeddings = embed_columns(self.model, sentence_features)
        if _fits.few(self, embeddings) or not fused(self, self._fits(embeddings, labels)):
            return _fits.replay(self, _SoftmaxLoss.forward, {"model": list(embeddings)}, labels)
        parts = {
            "rep": self.concatenation_sent_rep,
            "difference": self.concatenation_sent_difference,
            "multiplication": self.concatenation_sent_multiplication,
        }
        u, v = embeddings
        return fusedloss.softmax_pair(
            u,
            v,
            self.classifier.weight,
            self.classifier.bias,
            _fits.flat(labels),
            concatenation=tuple(name for name, chosen in parts.items() if chosen),
        )

    def _fits(self, embeddings: Sequence[Tensor], labels: Any) -> str | None:
        parts = bool(self.concatenation_sent_rep) * 2 + bool(self.concatenation_sent_difference)
        parts += bool(self.concatenation_sent_multiplication)
        return (
            ("there are not two columns" if len(embeddings) != 2 else None)
            or _fits.embeddings_fit(*embeddings)
            or criterion_fits(self.loss_fct)
            or _fits.labels_fit(labels, embeddings[0].shape[0], (torch.int64,))
            or _fits.linear_fits(self.classifier, "classifier")
            or (
                "its classifier has another dtype or width"
                if self.classifier.weight.dtype != embeddings[0].dtype
                or self.classifier.in_features != parts * embeddings[0].shape[1]
                else None
            )
        )


class ContrastiveTensionLoss(_ContrastiveTensionLoss):
    """sentence-transformers' loss of this name: the products of the two models' embeddings in one pass."""

    @counted
    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        one, other = sentence_features
        a, b = self.model1(one)["sentence_embedding"], self.model2(other)["sentence_embedding"]
        labels = _same_tokens(one, other, a) if labels is None else labels
        why_not = (
            _fits.embeddings_fit(a, b)
            or _fits.labels_fit(labels, a.shape[0])
            or none_negative(labels)
            or binary_fits(self.criterion)
        )
        if not fused(self, why_not):
            twin = {"model1": [a, a], "model2": [b, b]}
            return _fits.replay(self, _ContrastiveTensionLoss.forward, twin, labels)
        return fusedloss.contrastive_tension(a, b, _fits.flat(labels))


def _same_tokens(one: dict[str, Tensor], other: dict[str, Tensor], like: Tensor) -> Tensor:
    """Returns 1 for pairs of the same text, with any padding."""
    if "attention_mask" not in one or "attention_mask" not in other:
        return (one["input_ids"] == other["input_ids"]).all(dim=1).float()
    texts = (
        [ids[mask] for ids, mask in zip(x["input_ids"], x["attention_mask"].bool(), strict=True)] for x in (one, other)
    )
    return torch.tensor([torch.equal(*pair) for pair in zip(*texts, strict=True)], device=like.device, dtype=like.dtype)


class GlobalOrthogonalRegularizationLoss(_GlobalOrthogonalRegularizationLoss):
    """sentence-transformers' loss of this name from D x D products instead of B x B similarities."""

    @counted
    def compute_gor(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        similarity = _fits.similarity(self.similarity_fct, MATRICES)
        if library_is_faster("sentence_transformers.GlobalOrthogonalRegularizationLoss", embeddings) or not fused(
            self,
            _fits.similarity_is_known(self.similarity_fct, MATRICES) or _fits.embeddings_fit(embeddings),
        ):
            return super().compute_gor(embeddings)
        mean, second = moments(embeddings, similarity == "cos")
        dtype = stats_dtype(embeddings.dtype)
        return mean.to(dtype), second.to(dtype)
