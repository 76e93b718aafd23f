"""Contrastive and ranking losses that never materialise the similarity matrix, exact and differentiable."""

from __future__ import annotations

from .errors import UnsupportedError as UnsupportedError
from .functional import clip as clip
from .functional import info_nce as info_nce
from .functional import multiple_negatives_ranking as multiple_negatives_ranking
from .losses.clip import ClipLoss as ClipLoss
from .losses.info_nce import InfoNCELoss as InfoNCELoss
from .losses.multiple_negatives_ranking import MultipleNegativesRankingLoss as MultipleNegativesRankingLoss

__version__ = "0.1.0"
