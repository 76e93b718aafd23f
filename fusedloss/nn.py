"""Every loss as a module: options in the constructor, tensors in `forward`."""

from __future__ import annotations

from typing import Any

from torch import nn

from . import functional as F
from .losses import _pairs, embed_distill, pair, triplet
from .losses._module import LossModule
from .losses.info_nce_distill import check_form
from .losses.multiple_negatives_ranking import check_directions, check_hardness

# Softmax over a batch -------------------------------------------------------------------------------------------------


class InfoNCELoss(
    LossModule,
    function=F.info_nce,
    tensors=("negatives", "bank", "key_bias", "mask", "weight", "negatives_mask", "teacher_scores"),
    named=("bank_across", "bias_on_target", "margin", "decoupled", "transform", "debiased", "positives"),
): ...


class ClipLoss(LossModule, function=F.clip, tensors=("mask",), named=("decoupled", "transform", "debiased")): ...


class SigLipLoss(LossModule, function=F.siglip, tensors=("target",)): ...


class ClipDistillLoss(LossModule, function=F.clip_distill): ...


class InfoNCEDistillLoss(
    LossModule,
    function=F.info_nce_distill,
    tensors=("negatives", "teacher_negatives", "negatives_mask", "bank", "teacher_bank", "mask"),
):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_form(self.form, self.directions)


class MultipleNegativesRankingLoss(
    LossModule,
    function=F.multiple_negatives_ranking,
    tensors=("mask", "anchors", "ids", "negatives_mask"),
    named=("decoupled", "transform", "own_negatives", "debiased"),
):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_directions(self.directions, self.partition_mode)
        check_hardness(self.hardness_mode, self.hardness_strength)


class GISTEmbedLoss(LossModule, function=F.gist_embed, tensors=("guide", "ids"), named=("decoupled", "transform")): ...


class ContrastiveTensionInBatchLoss(LossModule, function=F.contrastive_tension_in_batch): ...


class NTXentLoss(LossModule, function=F.nt_xent, named=("transform", "debiased")): ...


class DCLLoss(LossModule, function=F.decoupled_contrastive): ...


class SupConLoss(LossModule, function=F.sup_con, named=("transform",)): ...


# Mined pairs and triplets ---------------------------------------------------------------------------------------------


class MultiSimilarityLoss(LossModule, function=F.multi_similarity): ...


class CircleLoss(LossModule, function=F.circle): ...


class BatchAllTripletLoss(LossModule, function=F.batch_all_triplet): ...


class BatchHardTripletLoss(LossModule, function=F.batch_hard_triplet): ...


class BatchHardSoftMarginTripletLoss(LossModule, function=F.batch_hard_soft_margin_triplet): ...


class BatchSemiHardTripletLoss(LossModule, function=F.batch_semi_hard_triplet): ...


class MegaBatchMarginLoss(LossModule, function=F.mega_batch_margin): ...


class InBatchMarginRankingLoss(LossModule, function=F.in_batch_margin_ranking): ...


# Classes --------------------------------------------------------------------------------------------------------------


class ArcFaceLoss(LossModule, function=F.arcface): ...


class CosFaceLoss(LossModule, function=F.cosface): ...


class ProxyNCALoss(LossModule, function=F.proxy_nca): ...


class ProxyAnchorLoss(LossModule, function=F.proxy_anchor): ...


# The layer's own parameters stay the model's: torch's module of this name holds a layer of its own.
class LinearCrossEntropyLoss(
    LossModule,
    function=F.linear_cross_entropy,
    tensors=("linear_bias", "weight"),
    named=("transform", "temperature", "return_stats", "entropy_gradient"),
): ...


class CrossEntropyLoss(
    LossModule, nn.CrossEntropyLoss, function=F.cross_entropy, like=nn.CrossEntropyLoss, buffered=("weight",)
): ...


class FocalLoss(LossModule, function=F.focal, buffered=("alpha",)): ...


class SoftmaxLoss(LossModule, function=F.softmax_pair, tensors=("class_weight",)): ...


# Pairs and teachers ---------------------------------------------------------------------------------------------------


class ContrastiveLoss(LossModule, function=F.contrastive, choices={"distance": pair.DISTANCES}): ...


class OnlineContrastiveLoss(LossModule, function=F.online_contrastive, choices={"distance": pair.DISTANCES}): ...


class CosineSimilarityLoss(LossModule, function=F.cosine_similarity, learnt=("loss", "transform")): ...


class ContrastiveTensionLoss(LossModule, function=F.contrastive_tension): ...


class TripletLoss(LossModule, function=F.triplet, choices={"distance": triplet.DISTANCES}): ...


class CoSENTLoss(LossModule, function=F.cosent, choices={"similarity": _pairs.SIMILARITIES}): ...


class AnglELoss(LossModule, function=F.angle, tensors=("label",)): ...


class MarginMSELoss(
    LossModule, function=F.margin_mse, tensors=("label",), choices={"similarity": _pairs.SIMILARITIES}
): ...


class DistillKLDivLoss(
    LossModule, function=F.distill_kl_div, tensors=("label",), choices={"similarity": _pairs.SIMILARITIES}
): ...


class EmbedDistillLoss(
    LossModule, function=F.embed_distill, choices={"distance": embed_distill.DISTANCES}, learnt=("projection",)
): ...


class GlobalOrthogonalRegularizationLoss(LossModule, function=F.global_orthogonal_regularization): ...


# Lists ----------------------------------------------------------------------------------------------------------------


class LambdaLoss(LossModule, function=F.lambda_loss, tensors=("mask",), learnt=("weighting",)): ...


class RankNetLoss(LossModule, function=F.rank_net, tensors=("mask", "soft", "reference")): ...


class ListInfoNCELoss(LossModule, function=F.list_info_nce, tensors=("mask",)): ...


class ListCircleLoss(LossModule, function=F.list_circle, tensors=("mask",)): ...


class ListNetLoss(LossModule, function=F.list_net, tensors=("mask",)): ...


class ListMLELoss(LossModule, function=F.list_mle, tensors=("mask",)): ...


class PListMLELoss(LossModule, function=F.plist_mle, tensors=("mask",), learnt=("lambda_weight",)): ...


class ADRMSELoss(LossModule, function=F.adr_mse, tensors=("mask",)): ...


# Elements -------------------------------------------------------------------------------------------------------------


class BCEWithLogitsLoss(
    LossModule,
    function=F.binary_cross_entropy_with_logits,
    like=nn.BCEWithLogitsLoss,
    buffered=("weight", "pos_weight"),
): ...


BinaryCrossEntropyLoss = BCEWithLogitsLoss  # as sentence-transformers' cross-encoders call it


class MSELoss(LossModule, function=F.mse, like=nn.MSELoss): ...


class L1Loss(LossModule, function=F.l1, like=nn.L1Loss): ...


class HuberLoss(LossModule, function=F.huber, like=nn.HuberLoss): ...


class SmoothL1Loss(LossModule, function=F.smooth_l1, like=nn.SmoothL1Loss, tensors=("weight",)): ...
