# Written by tools/stubs.py from the signatures of the functions.
# ruff: noqa: I001

from collections.abc import Callable
from collections.abc import Sequence
from fusedloss.core.problem import Stats
from fusedloss.core.problem import TokenStats
from fusedloss.core.transforms import Transform
from fusedloss.losses._module import LossModule
from fusedloss.losses.lists import Lists
from torch import Tensor
from typing import Any
from typing import Generic
from typing import Literal
from typing import overload
from typing_extensions import TypeVar
import fusedloss.masks as masks
import torch.distributed as dist
import torch.nn

R = TypeVar("R", default=Tensor)

class InfoNCELoss(LossModule, Generic[R]):
    @overload
    def __init__(
        self: InfoNCELoss[Tensor],
        temperature: float | Tensor = 0.05,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        normalize: bool = False,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
        return_stats: Literal[False] = False,
        group: dist.ProcessGroup | str | None = None,
        strategy: str = "gather",
        grad_scale: str = "ddp",
        *,
        bank_across: bool = False,
        bias_on_target: bool = True,
        margin: float = 0.0,
        decoupled: bool = False,
        transform: Transform | Callable[[Tensor], Tensor] | None = None,
        debiased: float = 0.0,
        positives: str = "each",
    ) -> None: ...
    @overload
    def __init__(
        self: InfoNCELoss[tuple[Tensor, Stats]],
        *,
        temperature: float | Tensor = 0.05,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        normalize: bool = False,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
        return_stats: Literal[True],
        group: dist.ProcessGroup | str | None = None,
        strategy: str = "gather",
        grad_scale: str = "ddp",
        bank_across: bool = False,
        bias_on_target: bool = True,
        margin: float = 0.0,
        decoupled: bool = False,
        transform: Transform | Callable[[Tensor], Tensor] | None = None,
        debiased: float = 0.0,
        positives: str = "each",
    ) -> None: ...
    @overload
    def __init__(
        self: InfoNCELoss[Tensor | tuple[Tensor, Stats]],
        *,
        temperature: float | Tensor = 0.05,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        normalize: bool = False,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
        return_stats: bool,
        group: dist.ProcessGroup | str | None = None,
        strategy: str = "gather",
        grad_scale: str = "ddp",
        bank_across: bool = False,
        bias_on_target: bool = True,
        margin: float = 0.0,
        decoupled: bool = False,
        transform: Transform | Callable[[Tensor], Tensor] | None = None,
        debiased: float = 0.0,
        positives: str = "each",
    ) -> None: ...
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        target: Tensor | None = None,
        *,
        negatives: Tensor | None = None,
        bank: Tensor | None = None,
        key_bias: Tensor | None = None,
        mask: masks.Mask | Tensor | None = None,
        weight: Tensor | None = None,
        negatives_mask: Tensor | None = None,
        teacher_scores: Tensor | None = None,
    ) -> R: ...
    __call__ = forward

class ClipLoss(LossModule, Generic[R]):
    @overload
    def __init__(
        self: ClipLoss[Tensor],
        normalize: bool = False,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
        return_stats: Literal[False] = False,
        group: dist.ProcessGroup | str | None = None,
        strategy: str = "gather",
        grad_scale: str = "ddp",
        *,
        decoupled: bool = False,
        transform: Transform | Callable[[Tensor], Tensor] | None = None,
        debiased: float = 0.0,
    ) -> None: ...
    @overload
    def __init__(
        self: ClipLoss[tuple[Tensor, Stats]],
        *,
        normalize: bool = False,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
        return_stats: Literal[True],
        group: dist.ProcessGroup | str | None = None,
        strategy: str = "gather",
        grad_scale: str = "ddp",
        decoupled: bool = False,
        transform: Transform | Callable[[Tensor], Tensor] | None = None,
        debiased: float = 0.0,
    ) -> None: ...
    @overload
    def __init__(
        self: ClipLoss[Tensor | tuple[Tensor, Stats]],
        *,
        normalize: bool = False,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
        return_stats: bool,
        group: dist.ProcessGroup | str | None = None,
        strategy: str = "gather",
        grad_scale: str = "ddp",
        decoupled: bool = False,
        transform: Transform | Callable[[Tensor], Tensor] | None = None,
        debiased: float = 0.0,
    ) -> None: ...
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        *,
        mask: masks.Mask | Tensor | None = None,
    ) -> R: ...
    __call__ = forward

class SigLipLoss(LossModule):
    def __init__(
        self,
        normalize: bool = False,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
        group: dist.ProcessGroup | str | None = None,
        strategy: str = "gather",
        grad_scale: str = "ddp",
    ) -> None: ...
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        *,
        target: Tensor | masks.Mask | None = None,
    ) -> Tensor: ...
    __call__ = forward

class ClipDistillLoss(LossModule):
    def __init__(
        self,
        normalize: bool = False,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
    ) -> None: ...
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        teacher_image_features: Tensor,
        teacher_text_features: Tensor,
        teacher_logit_scale: float | Tensor,
    ) -> Tensor: ...
    __call__ = forward

class InfoNCEDistillLoss(LossModule):
    def __init__(
        self,
        temperature: float | Tensor = 0.05,
        teacher_temperature: float | Tensor = 0.05,
        form: str = "kl",
        directions: Sequence[str] = ("query_to_key",),
        normalize: bool = False,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
        group: dist.ProcessGroup | str | None = None,
        grad_scale: str = "ddp",
    ) -> None: ...
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        teacher_query: Tensor,
        teacher_key: Tensor,
        *,
        negatives: Tensor | None = None,
        teacher_negatives: Tensor | None = None,
        negatives_mask: Tensor | None = None,
        bank: Tensor | None = None,
        teacher_bank: Tensor | None = None,
        mask: masks.Mask | Tensor | None = None,
    ) -> Tensor: ...
    __call__ = forward

class MultipleNegativesRankingLoss(LossModule, Generic[R]):
    @overload
    def __init__(
        self: MultipleNegativesRankingLoss[Tensor],
        scale: float | Tensor = 20.0,
        similarity: str = "cos",
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
        return_stats: Literal[False] = False,
        group: dist.ProcessGroup | str | None = None,
        strategy: str = "gather",
        grad_scale: str = "ddp",
        *,
        decoupled: bool = False,
        transform: Transform | Callable[[Tensor], Tensor] | None = None,
        own_negatives: bool = False,
        debiased: float = 0.0,
    ) -> None: ...
    @overload
    def __init__(
        self: MultipleNegativesRankingLoss[tuple[Tensor, Stats]],
        *,
        scale: float | Tensor = 20.0,
        similarity: str = "cos",
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
        return_stats: Literal[True],
        group: dist.ProcessGroup | str | None = None,
        strategy: str = "gather",
        grad_scale: str = "ddp",
        decoupled: bool = False,
        transform: Transform | Callable[[Tensor], Tensor] | None = None,
        own_negatives: bool = False,
        debiased: float = 0.0,
    ) -> None: ...
    @overload
    def __init__(
        self: MultipleNegativesRankingLoss[Tensor | tuple[Tensor, Stats]],
        *,
        scale: float | Tensor = 20.0,
        similarity: str = "cos",
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
        return_stats: bool,
        group: dist.ProcessGroup | str | None = None,
        strategy: str = "gather",
        grad_scale: str = "ddp",
        decoupled: bool = False,
        transform: Transform | Callable[[Tensor], Tensor] | None = None,
        own_negatives: bool = False,
        debiased: float = 0.0,
    ) -> None: ...
    def forward(
        self,
        anchor: Tensor,
        positive: Tensor,
        *negatives: Tensor,
        mask: masks.Mask | Tensor | None = None,
        anchors: Tensor | None = None,
        ids: Sequence[Tensor] | None = None,
        negatives_mask: Tensor | None = None,
    ) -> R: ...
    __call__ = forward

class GISTEmbedLoss(LossModule, Generic[R]):
    @overload
    def __init__(
        self: GISTEmbedLoss[Tensor],
        temperature: float | Tensor = 0.01,
        margin_strategy: str = "absolute",
        margin: float = 0.0,
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
        return_stats: Literal[False] = False,
        group: dist.ProcessGroup | str | None = None,
        strategy: str = "gather",
        grad_scale: str = "ddp",
        *,
        decoupled: bool = False,
        transform: Transform | Callable[[Tensor], Tensor] | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self: GISTEmbedLoss[tuple[Tensor, Stats]],
        *,
        temperature: float | Tensor = 0.01,
        margin_strategy: str = "absolute",
        margin: float = 0.0,
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
        return_stats: Literal[True],
        group: dist.ProcessGroup | str | None = None,
        strategy: str = "gather",
        grad_scale: str = "ddp",
        decoupled: bool = False,
        transform: Transform | Callable[[Tensor], Tensor] | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self: GISTEmbedLoss[Tensor | tuple[Tensor, Stats]],
        *,
        temperature: float | Tensor = 0.01,
        margin_strategy: str = "absolute",
        margin: float = 0.0,
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
        return_stats: bool,
        group: dist.ProcessGroup | str | None = None,
        strategy: str = "gather",
        grad_scale: str = "ddp",
        decoupled: bool = False,
        transform: Transform | Callable[[Tensor], Tensor] | None = None,
    ) -> None: ...
    def forward(
        self,
        anchor: Tensor,
        positive: Tensor,
        *negatives: Tensor,
        guide: Sequence[Tensor],
        ids: Sequence[Tensor] | None = None,
    ) -> R: ...
    __call__ = forward

class ContrastiveTensionInBatchLoss(LossModule):
    def __init__(self, reduction: str = "mean", backend: str = "auto", workspace_bytes: int | None = None) -> None: ...
    def forward(self, a: Tensor, b: Tensor, logit_scale: float | Tensor = 20.0) -> Tensor: ...
    __call__ = forward

class NTXentLoss(LossModule, Generic[R]):
    @overload
    def __init__(
        self: NTXentLoss[Tensor],
        temperature: float | Tensor = 0.5,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
        return_stats: Literal[False] = False,
        group: dist.ProcessGroup | str | None = None,
        strategy: str = "gather",
        grad_scale: str = "ddp",
        *,
        transform: Transform | Callable[[Tensor], Tensor] | None = None,
        debiased: float = 0.0,
    ) -> None: ...
    @overload
    def __init__(
        self: NTXentLoss[tuple[Tensor, Stats]],
        *,
        temperature: float | Tensor = 0.5,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
        return_stats: Literal[True],
        group: dist.ProcessGroup | str | None = None,
        strategy: str = "gather",
        grad_scale: str = "ddp",
        transform: Transform | Callable[[Tensor], Tensor] | None = None,
        debiased: float = 0.0,
    ) -> None: ...
    @overload
    def __init__(
        self: NTXentLoss[Tensor | tuple[Tensor, Stats]],
        *,
        temperature: float | Tensor = 0.5,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
        return_stats: bool,
        group: dist.ProcessGroup | str | None = None,
        strategy: str = "gather",
        grad_scale: str = "ddp",
        transform: Transform | Callable[[Tensor], Tensor] | None = None,
        debiased: float = 0.0,
    ) -> None: ...
    def forward(self, z1: Tensor, z2: Tensor) -> R: ...
    __call__ = forward

class DCLLoss(LossModule, Generic[R]):
    @overload
    def __init__(
        self: DCLLoss[Tensor],
        temperature: float | Tensor = 0.1,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
        return_stats: Literal[False] = False,
    ) -> None: ...
    @overload
    def __init__(
        self: DCLLoss[tuple[Tensor, Stats]],
        *,
        temperature: float | Tensor = 0.1,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
        return_stats: Literal[True],
    ) -> None: ...
    @overload
    def __init__(
        self: DCLLoss[Tensor | tuple[Tensor, Stats]],
        *,
        temperature: float | Tensor = 0.1,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
        return_stats: bool,
    ) -> None: ...
    def forward(self, z1: Tensor, z2: Tensor) -> R: ...
    __call__ = forward

class SupConLoss(LossModule):
    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        form: str = "out",
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
        group: dist.ProcessGroup | str | None = None,
        strategy: str = "gather",
        grad_scale: str = "ddp",
        *,
        transform: Transform | Callable[[Tensor], Tensor] | None = None,
    ) -> None: ...
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor: ...
    __call__ = forward

class MultiSimilarityLoss(LossModule):
    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 50.0,
        base: float = 0.5,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
    ) -> None: ...
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor: ...
    __call__ = forward

class CircleLoss(LossModule):
    def __init__(
        self,
        m: float = 0.4,
        gamma: float = 80.0,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
    ) -> None: ...
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor: ...
    __call__ = forward

class BatchAllTripletLoss(LossModule):
    def __init__(
        self,
        margin: float = 5.0,
        distance: str = "euclidean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
    ) -> None: ...
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor: ...
    __call__ = forward

class BatchHardTripletLoss(LossModule):
    def __init__(
        self,
        margin: float = 5.0,
        distance: str = "euclidean",
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
    ) -> None: ...
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor: ...
    __call__ = forward

class BatchHardSoftMarginTripletLoss(LossModule):
    def __init__(
        self,
        distance: str = "euclidean",
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
    ) -> None: ...
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor: ...
    __call__ = forward

class BatchSemiHardTripletLoss(LossModule):
    def __init__(
        self,
        margin: float = 5.0,
        distance: str = "euclidean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
    ) -> None: ...
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor: ...
    __call__ = forward

class MegaBatchMarginLoss(LossModule):
    def __init__(
        self,
        positive_margin: float = 0.8,
        negative_margin: float = 0.3,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
    ) -> None: ...
    def forward(self, anchor: Tensor, positive: Tensor) -> Tensor: ...
    __call__ = forward

class InBatchMarginRankingLoss(LossModule):
    def __init__(
        self,
        margin: float = 0.5,
        similarity: str = "cos",
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
    ) -> None: ...
    def forward(self, anchor: Tensor, positive: Tensor) -> Tensor: ...
    __call__ = forward

class ArcFaceLoss(LossModule):
    def __init__(
        self,
        margin: float = 0.5,
        scale: float = 64.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
    ) -> None: ...
    def forward(self, embeddings: Tensor, target: Tensor, weight: Tensor) -> Tensor: ...
    __call__ = forward

class CosFaceLoss(LossModule):
    def __init__(
        self,
        margin: float = 0.35,
        scale: float = 64.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
    ) -> None: ...
    def forward(self, embeddings: Tensor, target: Tensor, weight: Tensor) -> Tensor: ...
    __call__ = forward

class ProxyNCALoss(LossModule):
    def __init__(
        self,
        scale: float | Tensor = 1.0,
        decoupled: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
    ) -> None: ...
    def forward(self, embeddings: Tensor, target: Tensor, proxies: Tensor) -> Tensor: ...
    __call__ = forward

class ProxyAnchorLoss(LossModule):
    def __init__(
        self,
        margin: float = 0.1,
        alpha: float = 32.0,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
    ) -> None: ...
    def forward(self, embeddings: Tensor, target: Tensor, proxies: Tensor) -> Tensor: ...
    __call__ = forward

class LinearCrossEntropyLoss(LossModule, Generic[R]):
    @overload
    def __init__(
        self: LinearCrossEntropyLoss[Tensor],
        reduction: str = "mean",
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        softcap: float | None = None,
        z_loss: float = 0.0,
        compact: bool | None = None,
        backend: str = "auto",
        workspace_bytes: int | None = None,
        *,
        transform: Transform | Callable[[Tensor], Tensor] | None = None,
        temperature: float = 1.0,
        return_stats: Literal[False] = False,
        entropy_gradient: bool = False,
    ) -> None: ...
    @overload
    def __init__(
        self: LinearCrossEntropyLoss[tuple[Tensor, TokenStats]],
        reduction: str = "mean",
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        softcap: float | None = None,
        z_loss: float = 0.0,
        compact: bool | None = None,
        backend: str = "auto",
        workspace_bytes: int | None = None,
        *,
        transform: Transform | Callable[[Tensor], Tensor] | None = None,
        temperature: float = 1.0,
        return_stats: Literal[True],
        entropy_gradient: bool = False,
    ) -> None: ...
    @overload
    def __init__(
        self: LinearCrossEntropyLoss[Tensor | tuple[Tensor, TokenStats]],
        reduction: str = "mean",
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        softcap: float | None = None,
        z_loss: float = 0.0,
        compact: bool | None = None,
        backend: str = "auto",
        workspace_bytes: int | None = None,
        *,
        transform: Transform | Callable[[Tensor], Tensor] | None = None,
        temperature: float = 1.0,
        return_stats: bool,
        entropy_gradient: bool = False,
    ) -> None: ...
    def forward(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *,
        linear_bias: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> R: ...
    __call__ = forward

class CrossEntropyLoss(LossModule, torch.nn.CrossEntropyLoss):
    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        backend: str = "auto",
    ) -> None: ...
    def forward(self, input: Tensor, target: Tensor) -> Tensor: ...
    __call__ = forward

class FocalLoss(LossModule):
    def __init__(
        self,
        gamma: float = 2.0,
        alpha: float | Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        backend: str = "auto",
    ) -> None: ...
    def forward(self, input: Tensor, target: Tensor) -> Tensor: ...
    __call__ = forward

class SoftmaxLoss(LossModule):
    def __init__(
        self,
        concatenation: tuple[str, ...] = ("rep", "difference"),
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None: ...
    def forward(
        self,
        u: Tensor,
        v: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor | None,
        *,
        class_weight: Tensor | None = None,
    ) -> Tensor: ...
    __call__ = forward

class ContrastiveLoss(LossModule):
    def __init__(
        self, distance: str = "cosine", margin: float = 0.5, reduction: str = "mean", backend: str = "auto"
    ) -> None: ...
    def forward(self, a: Tensor, b: Tensor, label: Tensor) -> Tensor: ...
    __call__ = forward

class OnlineContrastiveLoss(LossModule):
    def __init__(self, distance: str = "cosine", margin: float = 0.5, backend: str = "auto") -> None: ...
    def forward(self, a: Tensor, b: Tensor, label: Tensor) -> Tensor: ...
    __call__ = forward

class CosineSimilarityLoss(LossModule):
    def __init__(
        self,
        loss: str | Callable[[Tensor, Tensor], Tensor] = "mse",
        transform: Callable[[Tensor], Tensor] | None = None,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None: ...
    def forward(self, a: Tensor, b: Tensor, score: Tensor) -> Tensor: ...
    __call__ = forward

class ContrastiveTensionLoss(LossModule):
    def __init__(self, reduction: str = "sum", backend: str = "auto") -> None: ...
    def forward(self, a: Tensor, b: Tensor, label: Tensor) -> Tensor: ...
    __call__ = forward

class TripletLoss(LossModule):
    def __init__(
        self, distance: str = "euclidean", margin: float = 5.0, reduction: str = "mean", backend: str = "auto"
    ) -> None: ...
    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor: ...
    __call__ = forward

class CoSENTLoss(LossModule):
    def __init__(self, scale: float | Tensor = 20.0, similarity: str = "cos", backend: str = "auto") -> None: ...
    def forward(self, a: Tensor, b: Tensor, score: Tensor) -> Tensor: ...
    __call__ = forward

class AnglELoss(LossModule):
    def __init__(self, scale: float | Tensor = 20.0, backend: str = "auto") -> None: ...
    def forward(
        self, a: Tensor, b: Tensor, score: Tensor | None = None, *negatives: Tensor, label: Tensor | None = None
    ) -> Tensor: ...
    __call__ = forward

class MarginMSELoss(LossModule):
    def __init__(self, similarity: str = "dot", reduction: str = "mean", backend: str = "auto") -> None: ...
    def forward(self, query: Tensor, positive: Tensor, *negatives: Tensor, label: Tensor) -> Tensor: ...
    __call__ = forward

class DistillKLDivLoss(LossModule):
    def __init__(
        self,
        similarity: str = "dot",
        temperature: float | Tensor = 1.0,
        student_temperature: float | Tensor | None = None,
        teacher_temperature: float | Tensor | None = None,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None: ...
    def forward(self, query: Tensor, positive: Tensor, *negatives: Tensor, label: Tensor) -> Tensor: ...
    __call__ = forward

class EmbedDistillLoss(LossModule):
    def __init__(
        self,
        distance: str = "cosine",
        projection: Tensor | Callable[[Tensor], Tensor] | None = None,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None: ...
    def forward(self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]) -> Tensor: ...
    __call__ = forward

class GlobalOrthogonalRegularizationLoss(LossModule):
    def __init__(
        self,
        similarity: str = "cos",
        mean_weight: float = 1.0,
        second_moment_weight: float = 1.0,
        aggregation: str = "mean",
    ) -> None: ...
    def forward(self, *embeddings: Tensor) -> Tensor: ...
    __call__ = forward

class LambdaLoss(LossModule):
    def __init__(
        self,
        weighting: str | Callable[[Tensor, Tensor, Tensor], Tensor] | None = "ndcg_loss2pp",
        k: int | None = None,
        sigma: float = 1.0,
        eps: float = 1e-10,
        reduction_log: str = "binary",
        mu: float = 10.0,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None: ...
    def forward(self, scores: Lists, labels: Lists, *, mask: Tensor | None = None) -> Tensor: ...
    __call__ = forward

class RankNetLoss(LossModule):
    def __init__(
        self,
        k: int | None = None,
        sigma: float = 1.0,
        eps: float = 1e-10,
        reduction_log: str = "binary",
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None: ...
    def forward(
        self,
        scores: Lists,
        labels: Lists | None = None,
        *,
        mask: Tensor | None = None,
        soft: Tensor | None = None,
        reference: Lists | None = None,
    ) -> Tensor: ...
    __call__ = forward

class ListInfoNCELoss(LossModule):
    def __init__(
        self, temperature: float | Tensor = 1.0, positives: str = "each", reduction: str = "mean", backend: str = "auto"
    ) -> None: ...
    def forward(
        self, scores: Tensor | Sequence[Tensor], labels: Tensor | Sequence[Tensor], *, mask: Tensor | None = None
    ) -> Tensor: ...
    __call__ = forward

class ListCircleLoss(LossModule):
    def __init__(self, m: float = 0.4, gamma: float = 80.0, reduction: str = "mean", backend: str = "auto") -> None: ...
    def forward(
        self, scores: Tensor | Sequence[Tensor], labels: Tensor | Sequence[Tensor], *, mask: Tensor | None = None
    ) -> Tensor: ...
    __call__ = forward

class ListNetLoss(LossModule):
    def __init__(self, reduction: str = "mean", backend: str = "auto") -> None: ...
    def forward(self, scores: Lists, labels: Lists, *, mask: Tensor | None = None) -> Tensor: ...
    __call__ = forward

class ListMLELoss(LossModule):
    def __init__(self, respect_input_order: bool = True, reduction: str = "mean", backend: str = "auto") -> None: ...
    def forward(self, scores: Lists, labels: Lists, *, mask: Tensor | None = None) -> Tensor: ...
    __call__ = forward

class PListMLELoss(LossModule):
    def __init__(
        self,
        lambda_weight: str | Callable[[Tensor], Tensor] | None = "default",
        respect_input_order: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None: ...
    def forward(self, scores: Lists, labels: Lists, *, mask: Tensor | None = None) -> Tensor: ...
    __call__ = forward

class ADRMSELoss(LossModule):
    def __init__(self, alpha: float = 1.0, reduction: str = "mean", backend: str = "auto") -> None: ...
    def forward(self, scores: Lists, labels: Lists, *, mask: Tensor | None = None) -> Tensor: ...
    __call__ = forward

class BCEWithLogitsLoss(LossModule):
    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
        *,
        backend: str = "auto",
    ) -> None: ...
    def forward(self, input: Tensor, target: Tensor) -> Tensor: ...
    __call__ = forward

BinaryCrossEntropyLoss = BCEWithLogitsLoss

class MSELoss(LossModule):
    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        under: float = 1.0,
        over: float = 1.0,
        backend: str = "auto",
    ) -> None: ...
    def forward(self, input: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor: ...
    __call__ = forward

class L1Loss(LossModule):
    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        under: float = 1.0,
        over: float = 1.0,
        backend: str = "auto",
    ) -> None: ...
    def forward(self, input: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor: ...
    __call__ = forward

class HuberLoss(LossModule):
    def __init__(
        self,
        reduction: str = "mean",
        delta: float = 1.0,
        *,
        under: float = 1.0,
        over: float = 1.0,
        backend: str = "auto",
    ) -> None: ...
    def forward(self, input: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor: ...
    __call__ = forward

class SmoothL1Loss(LossModule):
    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        beta: float = 1.0,
        *,
        under: float = 1.0,
        over: float = 1.0,
        backend: str = "auto",
    ) -> None: ...
    def forward(self, input: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor: ...
    __call__ = forward
