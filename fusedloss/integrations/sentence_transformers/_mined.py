"""Triplets mined in a batch with class labels: no matrix of distances, and no tensor of triplets, is stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sentence_transformers.sentence_transformer.losses import BatchAllTripletLoss as _BatchAllTripletLoss
from sentence_transformers.sentence_transformer.losses import (
    BatchHardSoftMarginTripletLoss as _BatchHardSoftMarginTripletLoss,
)
from sentence_transformers.sentence_transformer.losses import BatchHardTripletLoss as _BatchHardTripletLoss
from sentence_transformers.sentence_transformer.losses import BatchHardTripletLossDistanceFunction as _Distances
from sentence_transformers.sentence_transformer.losses import BatchSemiHardTripletLoss as _BatchSemiHardTripletLoss
from torch import Tensor, nn

import fusedloss
from fusedloss.core.numerics import stats_dtype

from .._drop_in import counted, library_is_faster, runs_fused
from . import _fits

DISTANCES = {_Distances.euclidean_distance: "euclidean", _Distances.cosine_distance: "cosine"}

CLASSES = (*_fits.INTEGERS, torch.bool)


@counted
def _mined(
    function: Callable[..., Tensor], loss: nn.Module, labels: Any, embeddings: Tensor, **options: float
) -> Tensor | None:
    """Returns the loss, or None if the library's code has to run."""
    name = f"sentence_transformers.{type(loss).__name__}"
    if library_is_faster(name, embeddings):
        return None
    metric: Any = loss.distance_metric
    distance = next((name for own, name in DISTANCES.items() if own is metric), None)
    why_not = None if distance else "its distance is not one of the library's"
    for value in options.values():
        why_not = why_not or _fits.number_fits("margin", value)
    why_not = why_not or _fits.embeddings_fit(embeddings) or _fits.labels_fit(labels, embeddings.shape[0], CLASSES)
    if not runs_fused(name, why_not):
        return None
    labels = _fits.flat(labels)
    if labels.dtype is not torch.int64:
        labels = labels.long()
    if not torch.is_autocast_enabled(embeddings.device.type) and embeddings.dtype.itemsize > 2:
        return function(embeddings, labels, distance=distance, **options)
    # Widens 16 bits as the library does: distances of long vectors are differences of large products.
    embeddings = embeddings.to(stats_dtype(embeddings.dtype))
    with _fits.autocast_off(embeddings):
        return function(embeddings, labels, distance=distance, **options)


class BatchAllTripletLoss(_BatchAllTripletLoss):
    """sentence-transformers' loss of this name, in the memory of the embeddings."""

    def batch_all_triplet_loss(self, labels: Tensor, embeddings: Tensor) -> Tensor:
        loss = _mined(fusedloss.batch_all_triplet, self, labels, embeddings, margin=self.triplet_margin)
        return super().batch_all_triplet_loss(labels, embeddings) if loss is None else loss


class BatchHardTripletLoss(_BatchHardTripletLoss):
    """sentence-transformers' loss of this name, in the memory of the embeddings."""

    def batch_hard_triplet_loss(self, labels: Tensor, embeddings: Tensor) -> Tensor:
        loss = _mined(fusedloss.batch_hard_triplet, self, labels, embeddings, margin=self.triplet_margin)
        return super().batch_hard_triplet_loss(labels, embeddings) if loss is None else loss


class BatchHardSoftMarginTripletLoss(_BatchHardSoftMarginTripletLoss, BatchHardTripletLoss):
    """sentence-transformers' loss of this name, in the memory of the embeddings."""

    def batch_hard_triplet_soft_margin_loss(self, labels: Tensor, embeddings: Tensor) -> Tensor:
        loss = _mined(fusedloss.batch_hard_soft_margin_triplet, self, labels, embeddings)
        return super().batch_hard_triplet_soft_margin_loss(labels, embeddings) if loss is None else loss


class BatchSemiHardTripletLoss(_BatchSemiHardTripletLoss):
    """sentence-transformers' loss of this name, in the memory of the embeddings."""

    def batch_semi_hard_triplet_loss(self, labels: Tensor, embeddings: Tensor) -> Tensor:
        loss = _mined(fusedloss.batch_semi_hard_triplet, self, labels, embeddings, margin=self.margin)
        return super().batch_semi_hard_triplet_loss(labels, embeddings) if loss is None else loss
