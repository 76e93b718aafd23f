"""Every loss as a function."""

from __future__ import annotations

from .losses.clip import clip
from .losses.info_nce import info_nce
from .losses.multiple_negatives_ranking import multiple_negatives_ranking

__all__ = ["clip", "info_nce", "multiple_negatives_ranking"]
