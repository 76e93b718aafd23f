"""Every loss as a function; docs/support.md says what works with what."""

from __future__ import annotations

import types

from .losses.adaptive_layer import adaptive_layer as adaptive_layer
from .losses.adaptive_layer import matryoshka_2d as matryoshka_2d
from .losses.batch_triplet import batch_all_triplet as batch_all_triplet
from .losses.batch_triplet import batch_hard_soft_margin_triplet as batch_hard_soft_margin_triplet
from .losses.batch_triplet import batch_hard_triplet as batch_hard_triplet
from .losses.batch_triplet import batch_semi_hard_triplet as batch_semi_hard_triplet
from .losses.binary import binary_cross_entropy_with_logits as binary_cross_entropy_with_logits
from .losses.clip import clip as clip
from .losses.clip_distill import clip_distill as clip_distill
from .losses.contrast_lists import list_circle as list_circle
from .losses.contrast_lists import list_info_nce as list_info_nce
from .losses.contrastive_tension import contrastive_tension_in_batch as contrastive_tension_in_batch
from .losses.cosent import angle as angle
from .losses.cosent import cosent as cosent
from .losses.cross_entropy import cross_entropy as cross_entropy
from .losses.distill import distill_kl_div as distill_kl_div
from .losses.embed_distill import embed_distill as embed_distill
from .losses.focal import focal as focal
from .losses.gist import gist_embed as gist_embed
from .losses.info_nce import info_nce as info_nce
from .losses.info_nce_distill import info_nce_distill as info_nce_distill
from .losses.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from .losses.lists import adr_mse as adr_mse
from .losses.lists import lambda_loss as lambda_loss
from .losses.lists import list_mle as list_mle
from .losses.lists import list_net as list_net
from .losses.lists import plist_mle as plist_mle
from .losses.lists import rank_net as rank_net
from .losses.margin_mse import margin_mse as margin_mse
from .losses.margin_softmax import arcface as arcface
from .losses.margin_softmax import cosface as cosface
from .losses.margins import in_batch_margin_ranking as in_batch_margin_ranking
from .losses.margins import mega_batch_margin as mega_batch_margin
from .losses.matryoshka import matryoshka as matryoshka
from .losses.metric_learning import circle as circle
from .losses.metric_learning import multi_similarity as multi_similarity
from .losses.multiple_negatives_ranking import multiple_negatives_ranking as multiple_negatives_ranking
from .losses.nt_xent import decoupled_contrastive as decoupled_contrastive
from .losses.nt_xent import nt_xent as nt_xent
from .losses.orthogonal import global_orthogonal_regularization as global_orthogonal_regularization
from .losses.pair import contrastive as contrastive
from .losses.pair import contrastive_tension as contrastive_tension
from .losses.pair import cosine_similarity as cosine_similarity
from .losses.pair import online_contrastive as online_contrastive
from .losses.proxies import proxy_anchor as proxy_anchor
from .losses.proxies import proxy_nca as proxy_nca
from .losses.regression import huber as huber
from .losses.regression import huber_loss as huber_loss
from .losses.regression import l1 as l1
from .losses.regression import l1_loss as l1_loss
from .losses.regression import mse as mse
from .losses.regression import mse_loss as mse_loss
from .losses.regression import smooth_l1 as smooth_l1
from .losses.regression import smooth_l1_loss as smooth_l1_loss
from .losses.siglip import siglip as siglip
from .losses.softmax_pair import softmax_pair as softmax_pair
from .losses.sup_con import sup_con as sup_con
from .losses.triplet import triplet as triplet

__all__ = sorted(name for name, value in globals().items() if isinstance(value, types.FunctionType))
