"""Every loss as a function."""

from __future__ import annotations

from .losses.batch_triplet import (
    batch_all_triplet,
    batch_hard_soft_margin_triplet,
    batch_hard_triplet,
    batch_semi_hard_triplet,
)
from .losses.clip import clip
from .losses.clip_distill import clip_distill
from .losses.contrastive_tension import contrastive_tension_in_batch
from .losses.cross_entropy import cross_entropy
from .losses.gist import gist_embed
from .losses.info_nce import info_nce
from .losses.margins import in_batch_margin_ranking, mega_batch_margin
from .losses.matryoshka import matryoshka
from .losses.metric_learning import circle, multi_similarity
from .losses.multiple_negatives_ranking import multiple_negatives_ranking
from .losses.nt_xent import decoupled_contrastive, nt_xent
from .losses.orthogonal import global_orthogonal_regularization
from .losses.siglip import siglip
from .losses.softmax_pair import softmax_pair
from .losses.sup_con import sup_con

__all__ = [
    "batch_all_triplet",
    "batch_hard_soft_margin_triplet",
    "batch_hard_triplet",
    "batch_semi_hard_triplet",
    "circle",
    "clip",
    "clip_distill",
    "contrastive_tension_in_batch",
    "cross_entropy",
    "decoupled_contrastive",
    "gist_embed",
    "global_orthogonal_regularization",
    "in_batch_margin_ranking",
    "info_nce",
    "matryoshka",
    "mega_batch_margin",
    "multi_similarity",
    "multiple_negatives_ranking",
    "nt_xent",
    "siglip",
    "softmax_pair",
    "sup_con",
]
