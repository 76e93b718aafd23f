"""The losses of sentence-transformers' SparseEncoder. Sparse layouts run the library's own code."""

from __future__ import annotations

from typing import Any

from sentence_transformers.sparse_encoder.losses import CachedSpladeLoss as CachedSpladeLoss
from sentence_transformers.sparse_encoder.losses import CSRLoss as _CSRLoss
from sentence_transformers.sparse_encoder.losses import CSRReconstructionLoss as CSRReconstructionLoss
from sentence_transformers.sparse_encoder.losses import FlopsLoss as FlopsLoss
from sentence_transformers.sparse_encoder.losses import SparseAnglELoss as _SparseAnglELoss
from sentence_transformers.sparse_encoder.losses import SparseCoSENTLoss as _SparseCoSENTLoss
from sentence_transformers.sparse_encoder.losses import SparseCosineSimilarityLoss as _SparseCosineSimilarityLoss
from sentence_transformers.sparse_encoder.losses import SparseDistillKLDivLoss as _SparseDistillKLDivLoss
from sentence_transformers.sparse_encoder.losses import SparseMarginMSELoss as _SparseMarginMSELoss
from sentence_transformers.sparse_encoder.losses import SparseMSELoss as _SparseMSELoss
from sentence_transformers.sparse_encoder.losses import (
    SparseMultipleNegativesRankingLoss as _SparseMultipleNegativesRankingLoss,
)
from sentence_transformers.sparse_encoder.losses import SparseTripletLoss as _SparseTripletLoss
from sentence_transformers.sparse_encoder.losses import SpladeLoss as SpladeLoss
from torch import nn

from ._pairs import CoSENTLoss, CosineSimilarityLoss, DistillKLDivLoss, MarginMSELoss, MSELoss, TripletLoss
from ._ranking import MultipleNegativesRankingLoss


class SparseMultipleNegativesRankingLoss(_SparseMultipleNegativesRankingLoss, MultipleNegativesRankingLoss):
    """sentence-transformers' loss of this name, as `MultipleNegativesRankingLoss`."""


class SparseMarginMSELoss(_SparseMarginMSELoss, MarginMSELoss):
    """sentence-transformers' loss of this name, as `MarginMSELoss`."""


class SparseDistillKLDivLoss(_SparseDistillKLDivLoss, DistillKLDivLoss):
    """sentence-transformers' loss of this name, as `DistillKLDivLoss`."""


class SparseTripletLoss(_SparseTripletLoss, TripletLoss):
    """sentence-transformers' loss of this name, as `TripletLoss`."""


class SparseCoSENTLoss(_SparseCoSENTLoss, CoSENTLoss):
    """sentence-transformers' loss of this name, as `CoSENTLoss`."""


class SparseAnglELoss(_SparseAnglELoss, SparseCoSENTLoss):
    """sentence-transformers' loss of this name, as `SparseCoSENTLoss`."""


class SparseCosineSimilarityLoss(_SparseCosineSimilarityLoss, CosineSimilarityLoss):
    """sentence-transformers' loss of this name, as `CosineSimilarityLoss`."""


class SparseMSELoss(_SparseMSELoss, MSELoss):
    """sentence-transformers' loss of this name, as `MSELoss`."""


class CSRLoss(_CSRLoss):
    """sentence-transformers' loss of this name, whose default ranking loss is ours."""

    def __init__(self, model: Any, loss: nn.Module | None = None, beta: float = 0.1, gamma: float = 1.0):
        super().__init__(model, SparseMultipleNegativesRankingLoss(model) if loss is None else loss, beta, gamma)
