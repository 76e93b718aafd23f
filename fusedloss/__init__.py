"""Contrastive and ranking losses that never materialise the similarity matrix, exact and differentiable."""

from __future__ import annotations

from . import _ctrl_c

# isort: split

from . import boosting as boosting
from . import grad_cache as grad_cache
from . import masks as masks
from . import search as search
from .errors import UnsupportedError as UnsupportedError
from .functional import adaptive_layer as adaptive_layer
from .functional import adr_mse as adr_mse
from .functional import angle as angle
from .functional import arcface as arcface
from .functional import batch_all_triplet as batch_all_triplet
from .functional import batch_hard_soft_margin_triplet as batch_hard_soft_margin_triplet
from .functional import batch_hard_triplet as batch_hard_triplet
from .functional import batch_semi_hard_triplet as batch_semi_hard_triplet
from .functional import binary_cross_entropy_with_logits as binary_cross_entropy_with_logits
from .functional import circle as circle
from .functional import clip as clip
from .functional import clip_distill as clip_distill
from .functional import contrastive as contrastive
from .functional import contrastive_tension as contrastive_tension
from .functional import contrastive_tension_in_batch as contrastive_tension_in_batch
from .functional import cosent as cosent
from .functional import cosface as cosface
from .functional import cosine_similarity as cosine_similarity
from .functional import cross_entropy as cross_entropy
from .functional import decoupled_contrastive as decoupled_contrastive
from .functional import distill_kl_div as distill_kl_div
from .functional import embed_distill as embed_distill
from .functional import focal as focal
from .functional import gist_embed as gist_embed
from .functional import global_orthogonal_regularization as global_orthogonal_regularization
from .functional import huber as huber
from .functional import huber_loss as huber_loss
from .functional import in_batch_margin_ranking as in_batch_margin_ranking
from .functional import info_nce as info_nce
from .functional import l1 as l1
from .functional import l1_loss as l1_loss
from .functional import lambda_loss as lambda_loss
from .functional import linear_cross_entropy as linear_cross_entropy
from .functional import list_mle as list_mle
from .functional import list_net as list_net
from .functional import margin_mse as margin_mse
from .functional import matryoshka as matryoshka
from .functional import matryoshka_2d as matryoshka_2d
from .functional import mega_batch_margin as mega_batch_margin
from .functional import mse as mse
from .functional import mse_loss as mse_loss
from .functional import multi_similarity as multi_similarity
from .functional import multiple_negatives_ranking as multiple_negatives_ranking
from .functional import nt_xent as nt_xent
from .functional import online_contrastive as online_contrastive
from .functional import plist_mle as plist_mle
from .functional import proxy_anchor as proxy_anchor
from .functional import proxy_nca as proxy_nca
from .functional import rank_net as rank_net
from .functional import siglip as siglip
from .functional import smooth_l1 as smooth_l1
from .functional import smooth_l1_loss as smooth_l1_loss
from .functional import softmax_pair as softmax_pair
from .functional import sup_con as sup_con
from .functional import triplet as triplet
from .losses._in_batch import Stats as Stats
from .losses.batch_triplet import BatchAllTripletLoss as BatchAllTripletLoss
from .losses.batch_triplet import BatchHardSoftMarginTripletLoss as BatchHardSoftMarginTripletLoss
from .losses.batch_triplet import BatchHardTripletLoss as BatchHardTripletLoss
from .losses.batch_triplet import BatchSemiHardTripletLoss as BatchSemiHardTripletLoss
from .losses.binary import BCEWithLogitsLoss as BCEWithLogitsLoss
from .losses.binary import BinaryCrossEntropyLoss as BinaryCrossEntropyLoss
from .losses.clip import ClipLoss as ClipLoss
from .losses.clip_distill import ClipDistillLoss as ClipDistillLoss
from .losses.contrastive_tension import ContrastiveTensionInBatchLoss as ContrastiveTensionInBatchLoss
from .losses.cosent import AnglELoss as AnglELoss
from .losses.cosent import CoSENTLoss as CoSENTLoss
from .losses.cross_entropy import CrossEntropyLoss as CrossEntropyLoss
from .losses.distill import DistillKLDivLoss as DistillKLDivLoss
from .losses.embed_distill import EmbedDistillLoss as EmbedDistillLoss
from .losses.focal import FocalLoss as FocalLoss
from .losses.gist import GISTEmbedLoss as GISTEmbedLoss
from .losses.info_nce import InfoNCELoss as InfoNCELoss
from .losses.linear_cross_entropy import LinearCrossEntropyLoss as LinearCrossEntropyLoss
from .losses.lists import ADRMSELoss as ADRMSELoss
from .losses.lists import LambdaLoss as LambdaLoss
from .losses.lists import ListMLELoss as ListMLELoss
from .losses.lists import ListNetLoss as ListNetLoss
from .losses.lists import PListMLELoss as PListMLELoss
from .losses.lists import RankNetLoss as RankNetLoss
from .losses.margin_mse import MarginMSELoss as MarginMSELoss
from .losses.margin_softmax import ArcFaceLoss as ArcFaceLoss
from .losses.margin_softmax import CosFaceLoss as CosFaceLoss
from .losses.margins import InBatchMarginRankingLoss as InBatchMarginRankingLoss
from .losses.margins import MegaBatchMarginLoss as MegaBatchMarginLoss
from .losses.metric_learning import CircleLoss as CircleLoss
from .losses.metric_learning import MultiSimilarityLoss as MultiSimilarityLoss
from .losses.multiple_negatives_ranking import MultipleNegativesRankingLoss as MultipleNegativesRankingLoss
from .losses.nt_xent import DCLLoss as DCLLoss
from .losses.nt_xent import NTXentLoss as NTXentLoss
from .losses.orthogonal import GlobalOrthogonalRegularizationLoss as GlobalOrthogonalRegularizationLoss
from .losses.pair import ContrastiveLoss as ContrastiveLoss
from .losses.pair import ContrastiveTensionLoss as ContrastiveTensionLoss
from .losses.pair import CosineSimilarityLoss as CosineSimilarityLoss
from .losses.pair import OnlineContrastiveLoss as OnlineContrastiveLoss
from .losses.proxies import ProxyAnchorLoss as ProxyAnchorLoss
from .losses.proxies import ProxyNCALoss as ProxyNCALoss
from .losses.regression import HuberLoss as HuberLoss
from .losses.regression import L1Loss as L1Loss
from .losses.regression import MSELoss as MSELoss
from .losses.regression import SmoothL1Loss as SmoothL1Loss
from .losses.siglip import SigLipLoss as SigLipLoss
from .losses.softmax_pair import SoftmaxLoss as SoftmaxLoss
from .losses.sup_con import SupConLoss as SupConLoss
from .losses.triplet import TripletLoss as TripletLoss

_ctrl_c.imported()

__version__ = "0.1.0"
