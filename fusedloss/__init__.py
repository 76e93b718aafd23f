"""Contrastive and ranking losses that never materialise the similarity matrix, exact and differentiable."""

from __future__ import annotations

from . import masks as masks
from .errors import UnsupportedError as UnsupportedError
from .functional import batch_all_triplet as batch_all_triplet
from .functional import batch_hard_soft_margin_triplet as batch_hard_soft_margin_triplet
from .functional import batch_hard_triplet as batch_hard_triplet
from .functional import batch_semi_hard_triplet as batch_semi_hard_triplet
from .functional import circle as circle
from .functional import clip as clip
from .functional import clip_distill as clip_distill
from .functional import contrastive_tension_in_batch as contrastive_tension_in_batch
from .functional import cross_entropy as cross_entropy
from .functional import decoupled_contrastive as decoupled_contrastive
from .functional import gist_embed as gist_embed
from .functional import global_orthogonal_regularization as global_orthogonal_regularization
from .functional import in_batch_margin_ranking as in_batch_margin_ranking
from .functional import info_nce as info_nce
from .functional import matryoshka as matryoshka
from .functional import mega_batch_margin as mega_batch_margin
from .functional import multi_similarity as multi_similarity
from .functional import multiple_negatives_ranking as multiple_negatives_ranking
from .functional import nt_xent as nt_xent
from .functional import siglip as siglip
from .functional import softmax_pair as softmax_pair
from .functional import sup_con as sup_con
from .losses._in_batch import Stats as Stats
from .losses.batch_triplet import BatchAllTripletLoss as BatchAllTripletLoss
from .losses.batch_triplet import BatchHardSoftMarginTripletLoss as BatchHardSoftMarginTripletLoss
from .losses.batch_triplet import BatchHardTripletLoss as BatchHardTripletLoss
from .losses.batch_triplet import BatchSemiHardTripletLoss as BatchSemiHardTripletLoss
from .losses.clip import ClipLoss as ClipLoss
from .losses.clip_distill import ClipDistillLoss as ClipDistillLoss
from .losses.contrastive_tension import ContrastiveTensionInBatchLoss as ContrastiveTensionInBatchLoss
from .losses.cross_entropy import CrossEntropyLoss as CrossEntropyLoss
from .losses.gist import GISTEmbedLoss as GISTEmbedLoss
from .losses.info_nce import InfoNCELoss as InfoNCELoss
from .losses.margins import InBatchMarginRankingLoss as InBatchMarginRankingLoss
from .losses.margins import MegaBatchMarginLoss as MegaBatchMarginLoss
from .losses.metric_learning import CircleLoss as CircleLoss
from .losses.metric_learning import MultiSimilarityLoss as MultiSimilarityLoss
from .losses.multiple_negatives_ranking import MultipleNegativesRankingLoss as MultipleNegativesRankingLoss
from .losses.nt_xent import DCLLoss as DCLLoss
from .losses.nt_xent import NTXentLoss as NTXentLoss
from .losses.orthogonal import GlobalOrthogonalRegularizationLoss as GlobalOrthogonalRegularizationLoss
from .losses.siglip import SigLipLoss as SigLipLoss
from .losses.softmax_pair import SoftmaxLoss as SoftmaxLoss
from .losses.sup_con import SupConLoss as SupConLoss

__version__ = "0.1.0"
