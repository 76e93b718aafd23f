# Written by tools/stubs.py from the signatures of the functions.
# ruff: noqa: I001

from collections.abc import Callable
from collections.abc import Sequence
from fusedloss.core.problem import Stats
from fusedloss.core.problem import TokenStats
from fusedloss.core.transforms import Transform
from fusedloss.losses.adaptive_layer import adaptive_layer as adaptive_layer
from fusedloss.losses.adaptive_layer import matryoshka_2d as matryoshka_2d
from fusedloss.losses.batch_triplet import batch_all_triplet as batch_all_triplet
from fusedloss.losses.batch_triplet import batch_hard_soft_margin_triplet as batch_hard_soft_margin_triplet
from fusedloss.losses.batch_triplet import batch_hard_triplet as batch_hard_triplet
from fusedloss.losses.batch_triplet import batch_semi_hard_triplet as batch_semi_hard_triplet
from fusedloss.losses.binary import binary_cross_entropy_with_logits as binary_cross_entropy_with_logits
from fusedloss.losses.clip_distill import clip_distill as clip_distill
from fusedloss.losses.contrast_lists import list_circle as list_circle
from fusedloss.losses.contrast_lists import list_info_nce as list_info_nce
from fusedloss.losses.contrastive_tension import contrastive_tension_in_batch as contrastive_tension_in_batch
from fusedloss.losses.cosent import angle as angle
from fusedloss.losses.cosent import cosent as cosent
from fusedloss.losses.cross_entropy import cross_entropy as cross_entropy
from fusedloss.losses.distill import distill_kl_div as distill_kl_div
from fusedloss.losses.embed_distill import embed_distill as embed_distill
from fusedloss.losses.focal import focal as focal
from fusedloss.losses.info_nce_distill import info_nce_distill as info_nce_distill
from fusedloss.losses.lists import adr_mse as adr_mse
from fusedloss.losses.lists import lambda_loss as lambda_loss
from fusedloss.losses.lists import list_mle as list_mle
from fusedloss.losses.lists import list_net as list_net
from fusedloss.losses.lists import plist_mle as plist_mle
from fusedloss.losses.lists import rank_net as rank_net
from fusedloss.losses.margin_mse import margin_mse as margin_mse
from fusedloss.losses.margin_softmax import arcface as arcface
from fusedloss.losses.margin_softmax import cosface as cosface
from fusedloss.losses.margins import in_batch_margin_ranking as in_batch_margin_ranking
from fusedloss.losses.margins import mega_batch_margin as mega_batch_margin
from fusedloss.losses.matryoshka import matryoshka as matryoshka
from fusedloss.losses.metric_learning import circle as circle
from fusedloss.losses.metric_learning import multi_similarity as multi_similarity
from fusedloss.losses.orthogonal import global_orthogonal_regularization as global_orthogonal_regularization
from fusedloss.losses.pair import contrastive as contrastive
from fusedloss.losses.pair import contrastive_tension as contrastive_tension
from fusedloss.losses.pair import cosine_similarity as cosine_similarity
from fusedloss.losses.pair import online_contrastive as online_contrastive
from fusedloss.losses.proxies import proxy_anchor as proxy_anchor
from fusedloss.losses.proxies import proxy_nca as proxy_nca
from fusedloss.losses.regression import huber as huber
from fusedloss.losses.regression import huber_loss as huber_loss
from fusedloss.losses.regression import l1 as l1
from fusedloss.losses.regression import l1_loss as l1_loss
from fusedloss.losses.regression import mse as mse
from fusedloss.losses.regression import mse_loss as mse_loss
from fusedloss.losses.regression import smooth_l1 as smooth_l1
from fusedloss.losses.regression import smooth_l1_loss as smooth_l1_loss
from fusedloss.losses.siglip import siglip as siglip
from fusedloss.losses.softmax_pair import softmax_pair as softmax_pair
from fusedloss.losses.sup_con import sup_con as sup_con
from fusedloss.losses.triplet import triplet as triplet
from torch import Tensor
from typing import Any
from typing import Literal
from typing import overload
import fusedloss.masks as masks
import torch.distributed as dist

@overload
def clip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    mask: masks.Mask | Tensor | None = None,
    normalize: bool = False,
    decoupled: bool = False,
    transform: Transform | Callable[[Tensor], Tensor] | None = None,
    debiased: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    return_stats: Literal[False] = False,
    group: dist.ProcessGroup | str | None = None,
    strategy: str = "gather",
    grad_scale: str = "ddp",
) -> Tensor: ...
@overload
def clip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    mask: masks.Mask | Tensor | None = None,
    normalize: bool = False,
    decoupled: bool = False,
    transform: Transform | Callable[[Tensor], Tensor] | None = None,
    debiased: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    return_stats: Literal[True],
    group: dist.ProcessGroup | str | None = None,
    strategy: str = "gather",
    grad_scale: str = "ddp",
) -> tuple[Tensor, Stats]: ...
@overload
def clip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    mask: masks.Mask | Tensor | None = None,
    normalize: bool = False,
    decoupled: bool = False,
    transform: Transform | Callable[[Tensor], Tensor] | None = None,
    debiased: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    return_stats: bool,
    group: dist.ProcessGroup | str | None = None,
    strategy: str = "gather",
    grad_scale: str = "ddp",
) -> Tensor | tuple[Tensor, Stats]: ...
@overload
def decoupled_contrastive(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    return_stats: Literal[False] = False,
) -> Tensor: ...
@overload
def decoupled_contrastive(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    return_stats: Literal[True],
) -> tuple[Tensor, Stats]: ...
@overload
def decoupled_contrastive(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    return_stats: bool,
) -> Tensor | tuple[Tensor, Stats]: ...
@overload
def gist_embed(
    anchor: Tensor,
    positive: Tensor,
    *negatives: Tensor,
    guide: Sequence[Tensor],
    temperature: float | Tensor = 0.01,
    margin_strategy: str = "absolute",
    margin: float = 0.0,
    contrast_anchors: bool = True,
    contrast_positives: bool = True,
    ids: Sequence[Tensor] | None = None,
    decoupled: bool = False,
    transform: Transform | Callable[[Tensor], Tensor] | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    return_stats: Literal[False] = False,
    group: dist.ProcessGroup | str | None = None,
    strategy: str = "gather",
    grad_scale: str = "ddp",
) -> Tensor: ...
@overload
def gist_embed(
    anchor: Tensor,
    positive: Tensor,
    *negatives: Tensor,
    guide: Sequence[Tensor],
    temperature: float | Tensor = 0.01,
    margin_strategy: str = "absolute",
    margin: float = 0.0,
    contrast_anchors: bool = True,
    contrast_positives: bool = True,
    ids: Sequence[Tensor] | None = None,
    decoupled: bool = False,
    transform: Transform | Callable[[Tensor], Tensor] | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    return_stats: Literal[True],
    group: dist.ProcessGroup | str | None = None,
    strategy: str = "gather",
    grad_scale: str = "ddp",
) -> tuple[Tensor, Stats]: ...
@overload
def gist_embed(
    anchor: Tensor,
    positive: Tensor,
    *negatives: Tensor,
    guide: Sequence[Tensor],
    temperature: float | Tensor = 0.01,
    margin_strategy: str = "absolute",
    margin: float = 0.0,
    contrast_anchors: bool = True,
    contrast_positives: bool = True,
    ids: Sequence[Tensor] | None = None,
    decoupled: bool = False,
    transform: Transform | Callable[[Tensor], Tensor] | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    return_stats: bool,
    group: dist.ProcessGroup | str | None = None,
    strategy: str = "gather",
    grad_scale: str = "ddp",
) -> Tensor | tuple[Tensor, Stats]: ...
@overload
def info_nce(
    query: Tensor,
    key: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.05,
    negatives: Tensor | None = None,
    bank: Tensor | None = None,
    bank_across: bool = False,
    key_bias: Tensor | None = None,
    mask: masks.Mask | Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    normalize: bool = False,
    bias_on_target: bool = True,
    margin: float = 0.0,
    decoupled: bool = False,
    transform: Transform | Callable[[Tensor], Tensor] | None = None,
    negatives_mask: Tensor | None = None,
    debiased: float = 0.0,
    positives: str = "each",
    teacher_scores: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    return_stats: Literal[False] = False,
    group: dist.ProcessGroup | str | None = None,
    strategy: str = "gather",
    grad_scale: str = "ddp",
) -> Tensor: ...
@overload
def info_nce(
    query: Tensor,
    key: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.05,
    negatives: Tensor | None = None,
    bank: Tensor | None = None,
    bank_across: bool = False,
    key_bias: Tensor | None = None,
    mask: masks.Mask | Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    normalize: bool = False,
    bias_on_target: bool = True,
    margin: float = 0.0,
    decoupled: bool = False,
    transform: Transform | Callable[[Tensor], Tensor] | None = None,
    negatives_mask: Tensor | None = None,
    debiased: float = 0.0,
    positives: str = "each",
    teacher_scores: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    return_stats: Literal[True],
    group: dist.ProcessGroup | str | None = None,
    strategy: str = "gather",
    grad_scale: str = "ddp",
) -> tuple[Tensor, Stats]: ...
@overload
def info_nce(
    query: Tensor,
    key: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.05,
    negatives: Tensor | None = None,
    bank: Tensor | None = None,
    bank_across: bool = False,
    key_bias: Tensor | None = None,
    mask: masks.Mask | Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    normalize: bool = False,
    bias_on_target: bool = True,
    margin: float = 0.0,
    decoupled: bool = False,
    transform: Transform | Callable[[Tensor], Tensor] | None = None,
    negatives_mask: Tensor | None = None,
    debiased: float = 0.0,
    positives: str = "each",
    teacher_scores: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    return_stats: bool,
    group: dist.ProcessGroup | str | None = None,
    strategy: str = "gather",
    grad_scale: str = "ddp",
) -> Tensor | tuple[Tensor, Stats]: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    compact: bool | None = None,
    transform: Transform | Callable[[Tensor], Tensor] | None = None,
    temperature: float = 1.0,
    return_stats: Literal[False] = False,
    entropy_gradient: bool = False,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    compact: bool | None = None,
    transform: Transform | Callable[[Tensor], Tensor] | None = None,
    temperature: float = 1.0,
    return_stats: Literal[True],
    entropy_gradient: bool = False,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> tuple[Tensor, TokenStats]: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    compact: bool | None = None,
    transform: Transform | Callable[[Tensor], Tensor] | None = None,
    temperature: float = 1.0,
    return_stats: bool,
    entropy_gradient: bool = False,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> Tensor | tuple[Tensor, TokenStats]: ...
@overload
def multiple_negatives_ranking(
    anchor: Tensor,
    positive: Tensor,
    *negatives: Tensor,
    scale: float | Tensor = 20.0,
    similarity: str = "cos",
    directions: Sequence[str] = ("query_to_doc",),
    partition_mode: str = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
    mask: masks.Mask | Tensor | None = None,
    anchors: Tensor | None = None,
    ids: Sequence[Tensor] | None = None,
    decoupled: bool = False,
    transform: Transform | Callable[[Tensor], Tensor] | None = None,
    negatives_mask: Tensor | None = None,
    own_negatives: bool = False,
    debiased: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    return_stats: Literal[False] = False,
    group: dist.ProcessGroup | str | None = None,
    strategy: str = "gather",
    grad_scale: str = "ddp",
) -> Tensor: ...
@overload
def multiple_negatives_ranking(
    anchor: Tensor,
    positive: Tensor,
    *negatives: Tensor,
    scale: float | Tensor = 20.0,
    similarity: str = "cos",
    directions: Sequence[str] = ("query_to_doc",),
    partition_mode: str = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
    mask: masks.Mask | Tensor | None = None,
    anchors: Tensor | None = None,
    ids: Sequence[Tensor] | None = None,
    decoupled: bool = False,
    transform: Transform | Callable[[Tensor], Tensor] | None = None,
    negatives_mask: Tensor | None = None,
    own_negatives: bool = False,
    debiased: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    return_stats: Literal[True],
    group: dist.ProcessGroup | str | None = None,
    strategy: str = "gather",
    grad_scale: str = "ddp",
) -> tuple[Tensor, Stats]: ...
@overload
def multiple_negatives_ranking(
    anchor: Tensor,
    positive: Tensor,
    *negatives: Tensor,
    scale: float | Tensor = 20.0,
    similarity: str = "cos",
    directions: Sequence[str] = ("query_to_doc",),
    partition_mode: str = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
    mask: masks.Mask | Tensor | None = None,
    anchors: Tensor | None = None,
    ids: Sequence[Tensor] | None = None,
    decoupled: bool = False,
    transform: Transform | Callable[[Tensor], Tensor] | None = None,
    negatives_mask: Tensor | None = None,
    own_negatives: bool = False,
    debiased: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    return_stats: bool,
    group: dist.ProcessGroup | str | None = None,
    strategy: str = "gather",
    grad_scale: str = "ddp",
) -> Tensor | tuple[Tensor, Stats]: ...
@overload
def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    transform: Transform | Callable[[Tensor], Tensor] | None = None,
    debiased: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    return_stats: Literal[False] = False,
    group: dist.ProcessGroup | str | None = None,
    strategy: str = "gather",
    grad_scale: str = "ddp",
) -> Tensor: ...
@overload
def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    transform: Transform | Callable[[Tensor], Tensor] | None = None,
    debiased: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    return_stats: Literal[True],
    group: dist.ProcessGroup | str | None = None,
    strategy: str = "gather",
    grad_scale: str = "ddp",
) -> tuple[Tensor, Stats]: ...
@overload
def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    transform: Transform | Callable[[Tensor], Tensor] | None = None,
    debiased: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    return_stats: bool,
    group: dist.ProcessGroup | str | None = None,
    strategy: str = "gather",
    grad_scale: str = "ddp",
) -> Tensor | tuple[Tensor, Stats]: ...
