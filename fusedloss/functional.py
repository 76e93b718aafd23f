"""Every loss as a function; docs/support.md says what works with what."""

from __future__ import annotations

from .losses.adaptive_layer import adaptive_layer, matryoshka_2d
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
from .losses.cosent import angle, cosent
from .losses.cross_entropy import cross_entropy
from .losses.distill import distill_kl_div
from .losses.embed_distill import embed_distill
from .losses.focal import focal
from .losses.gist import gist_embed
from .losses.info_nce import info_nce
from .losses.linear_cross_entropy import linear_cross_entropy
from .losses.lists import adr_mse, lambda_loss, list_mle, list_net, plist_mle, rank_net
from .losses.margin_mse import margin_mse
from .losses.margin_softmax import arcface, cosface
from .losses.margins import in_batch_margin_ranking, mega_batch_margin
from .losses.matryoshka import matryoshka
from .losses.metric_learning import circle, multi_similarity
from .losses.multiple_negatives_ranking import multiple_negatives_ranking
from .losses.nt_xent import decoupled_contrastive, nt_xent
from .losses.orthogonal import global_orthogonal_regularization
from .losses.pair import contrastive, contrastive_tension, cosine_similarity, online_contrastive
from .losses.proxies import proxy_anchor, proxy_nca
from .losses.regression import huber, huber_loss, l1, l1_loss, mse, mse_loss, smooth_l1, smooth_l1_loss
from .losses.siglip import siglip
from .losses.softmax_pair import softmax_pair
from .losses.sup_con import sup_con
from .losses.triplet import triplet

__all__ = [
    "adaptive_layer",
    "adr_mse",
    "angle",
    "arcface",
    "batch_all_triplet",
    "batch_hard_soft_margin_triplet",
    "batch_hard_triplet",
    "batch_semi_hard_triplet",
    "binary_cross_entropy_with_logits",
    "circle",
    "clip",
    "clip_distill",
    "contrastive",
    "contrastive_tension",
    "contrastive_tension_in_batch",
    "cosent",
    "cosface",
    "cosine_similarity",
    "cross_entropy",
    "decoupled_contrastive",
    "distill_kl_div",
    "embed_distill",
    "focal",
    "gist_embed",
    "global_orthogonal_regularization",
    "huber",
    "huber_loss",
    "in_batch_margin_ranking",
    "info_nce",
    "l1",
    "l1_loss",
    "lambda_loss",
    "linear_cross_entropy",
    "list_mle",
    "list_net",
    "margin_mse",
    "matryoshka",
    "matryoshka_2d",
    "mega_batch_margin",
    "mse",
    "mse_loss",
    "multi_similarity",
    "multiple_negatives_ranking",
    "nt_xent",
    "online_contrastive",
    "plist_mle",
    "proxy_anchor",
    "proxy_nca",
    "rank_net",
    "siglip",
    "smooth_l1",
    "smooth_l1_loss",
    "softmax_pair",
    "sup_con",
    "triplet",
]
