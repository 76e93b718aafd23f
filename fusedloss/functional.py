"""Every loss as a function."""

from __future__ import annotations

from .losses.batch_triplet import (
    batch_all_triplet,
    batch_hard_soft_margin_triplet,
    batch_hard_triplet,
    batch_semi_hard_triplet,
)
from .losses.binary import binary_cross_entropy_with_logits
from .losses.clip import clip
from .losses.clip_distill import clip_distill
from .losses.contrastive_tension import contrastive_tension_in_batch
from .losses.focal import focal
from .losses.gist import gist_embed
from .losses.info_nce import info_nce
from .losses.margins import in_batch_margin_ranking, mega_batch_margin
from .losses.matryoshka import matryoshka
from .losses.metric_learning import circle, multi_similarity
from .losses.multiple_negatives_ranking import multiple_negatives_ranking
from .losses.nt_xent import decoupled_contrastive, nt_xent
from .losses.orthogonal import global_orthogonal_regularization
from .losses.regression import huber, huber_loss, l1, l1_loss, mse, mse_loss, smooth_l1, smooth_l1_loss
from .losses.siglip import siglip
from .losses.sup_con import sup_con

__all__ = [
    "batch_all_triplet",
    "batch_hard_soft_margin_triplet",
    "batch_hard_triplet",
    "batch_semi_hard_triplet",
    "binary_cross_entropy_with_logits",
    "circle",
    "clip",
    "clip_distill",
    "contrastive_tension_in_batch",
    "decoupled_contrastive",
    "focal",
    "gist_embed",
    "global_orthogonal_regularization",
    "huber",
    "huber_loss",
    "in_batch_margin_ranking",
    "info_nce",
    "l1",
    "l1_loss",
    "matryoshka",
    "mega_batch_margin",
    "mse",
    "mse_loss",
    "multi_similarity",
    "multiple_negatives_ranking",
    "nt_xent",
    "siglip",
    "smooth_l1",
    "smooth_l1_loss",
    "sup_con",
]
