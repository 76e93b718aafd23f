"""Drop-ins for open_clip's losses: same constructors, same results, no [B, B] logits.

    from fusedloss.integrations import open_clip as fused

    fused.patch()       # before open_clip_train.main runs, or before your own `ClipLoss(...)`

With `world_size > 1` open_clip's code exchanges the features, and each rank's computation is fused: ClipLoss with and
without `local_loss`, every exchange of SigLipLoss, DistillClipLoss without `local_loss`. Logits are accumulated in
fp32, while open_clip rounds them to the autocast dtype, and the loss is fp32.

Keyword arguments of other versions of open_clip (`use_horovod`, `chunk_size`) are accepted, as are model outputs that a
loss does not use, as in `loss(**model(...), output_dict=True)`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .. import masks
from ..core import checks
from ..core.numerics import stats_dtype
from ..functional import clip, clip_distill, cross_entropy, info_nce, siglip
from ._drop_in import Patch, counted, library, library_is_faster, runs_fused
from ._fits import a_class_is_outside, alike, overridden, plain, refusal, scalar_fits

library("open_clip", "open_clip_torch", "3.3.0")

from open_clip import loss as _upstream  # noqa: E402
from open_clip.loss import ClipLoss as _ClipLoss  # noqa: E402
from open_clip.loss import CoCaLoss as _CoCaLoss  # noqa: E402
from open_clip.loss import DistillClipLoss as _DistillClipLoss  # noqa: E402
from open_clip.loss import SigLipLoss as _SigLipLoss  # noqa: E402

Scale = float | Tensor
OTHER_VERSIONS = ("use_horovod", "chunk_size")
criterion_fits = plain(nn.CrossEntropyLoss, "ignore_index")


def _known(upstream: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Drops keyword arguments that only another version of this class takes."""
    taken = inspect.signature(upstream).parameters
    return {name: value for name, value in arguments.items() if name in taken or name not in OTHER_VERSIONS}


def _why_not(image: Tensor, text: Tensor, scale: Scale, bias: Scale | None = None) -> str | None:
    same = alike(image, text)
    reason = None if same else refusal(checks.embeddings, image_features=image, text_features=text)
    reason = reason or scalar_fits("logit_scale", scale, image)
    if bias is not None:
        reason = reason or scalar_fits("logit_bias", bias, image)
    if reason or same:
        return reason
    if image.shape[0] != text.shape[0]:
        return "image_features and text_features have different numbers of rows"
    return None if image.shape[0] else "the batch is empty"


class ClipLoss(_ClipLoss):
    """open_clip's ClipLoss in one sweep for both directions, in O(B D) memory."""

    _drop_in = "open_clip.ClipLoss"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **_known(_ClipLoss, kwargs))

    @counted
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Scale,
        logit_bias: Scale | None = None,
        output_dict: bool = False,
        **unused: Any,
    ) -> Any:
        # Ranks may hold batches of different sizes, but have to gather alike.
        if (self.world_size == 1 and library_is_faster("open_clip.ClipLoss", image_features)) or not runs_fused(
            self._drop_in, self._why_not(image_features, text_features, logit_scale, logit_bias)
        ):
            return super().forward(image_features, text_features, logit_scale, logit_bias, output_dict)
        loss = self._contrastive(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _why_not(self, image: Tensor, text: Tensor, scale: Scale, bias: Scale | None = None) -> str | None:
        reason = overridden(self, ClipLoss, "get_logits", "get_ground_truth") or _why_not(image, text, scale, bias)
        if reason is None and self.world_size > 1 and self.local_loss:
            reason = refusal(checks.scalar, "logit_scale", scale, image, positive=True)
        return reason

    def _gathered(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        if self.world_size == 1:
            return image, text
        options = {"use_horovod": self.use_horovod} if hasattr(self, "use_horovod") else {}
        return _upstream.gather_features(
            image,
            text,
            local_loss=self.local_loss,
            gather_with_grad=self.gather_with_grad,
            rank=self.rank,
            world_size=self.world_size,
            **options,
        )

    def _contrastive(self, image: Tensor, text: Tensor, scale: Scale, bias: Scale | None = None) -> Tensor:
        all_image, all_text = self._gathered(image, text)
        if self.world_size == 1 or not self.local_loss:
            if self.cache_labels:  # fills open_clip's cache
                self.get_ground_truth(image.device, len(all_image))
            return clip(all_image, all_text, scale, bias)
        labels = self.get_ground_truth(image.device, len(image))
        by_image = info_nce(image, all_text, labels, temperature=1 / scale)
        by_text = info_nce(text, all_image, labels, temperature=1 / scale)
        loss = (by_image + by_text) / 2
        # The loss does not depend on the bias, but DistributedDataParallel stops at a parameter without a gradient.
        return loss + 0 * bias.reshape(()).to(loss.dtype) if isinstance(bias, Tensor) else loss


# mypy does not know open_clip: it sees ClipLoss above as the only base, and its forward as super()'s.
class CoCaLoss(_CoCaLoss, ClipLoss):
    """open_clip's CoCaLoss: ClipLoss as above, and the caption's cross-entropy in one pass over its logits."""

    _drop_in = "open_clip.CoCaLoss"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **_known(_CoCaLoss, kwargs))

    @counted
    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: Scale,
        output_dict: bool = False,
        **unused: Any,
    ) -> Any:
        if not runs_fused("open_clip.CoCaLoss.caption_loss", self._why_not_caption(logits, labels)):
            forward: Any = super().forward
            return forward(image_features, text_features, logits, labels, logit_scale, output_dict)
        if self.clip_loss_weight:
            # The contrastive part is that of ClipLoss above.
            contrastive = super(_CoCaLoss, self).forward(image_features, text_features, logit_scale)
            contrastive = self.clip_loss_weight * contrastive
        else:
            contrastive = torch.zeros((), dtype=torch.int64, device=logits.device)  # made on the device, without a copy
        ignored = self.caption_loss.ignore_index
        caption = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=ignored)
        caption = caption * self.caption_loss_weight
        return {"contrastive_loss": contrastive, "caption_loss": caption} if output_dict else (contrastive, caption)

    def _why_not_caption(self, logits: Tensor, labels: Tensor) -> str | None:
        criterion = self.caption_loss
        if criterion_fits(criterion):
            return "caption_loss is not the CrossEntropyLoss of the constructor"
        if logits.dim() != 3 or not logits.numel() or labels.shape != logits.shape[:2] or labels.dtype != torch.int64:
            return "logits and labels do not have the shapes [B, T, V] and int64 [B, T]"
        if checks.reads_values(labels) and a_class_is_outside(labels, logits.shape[2], criterion.ignore_index):
            return "a label is not in the vocabulary"
        same = logits.device == labels.device and logits.dtype in checks.FLOATING
        return None if same else "logits and labels are on different devices, or logits are not floating"


class DistillClipLoss(_DistillClipLoss, ClipLoss):
    """open_clip's DistillClipLoss: neither the student's logits nor the teacher's are materialised."""

    _drop_in = "open_clip.DistillClipLoss"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **_known(_DistillClipLoss, kwargs))

    @counted
    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Scale,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Scale,
        output_dict: bool = False,
        **unused: Any,
    ) -> Any:
        student = (image_features, text_features, logit_scale)
        teacher = (dist_image_features, dist_text_features, dist_logit_scale)
        small = self.world_size == 1 and library_is_faster(self._drop_in, image_features)
        if small or not runs_fused(self._drop_in, self._why_not_distilled(student, teacher)):
            forward: Any = super().forward
            return forward(*student, *teacher, output_dict)
        image, text = self._gathered(image_features, text_features)
        teachers = self._gathered(dist_image_features, dist_text_features)
        if self.cache_labels:
            self.get_ground_truth(image.device, len(image))  # fills open_clip's cache
        contrastive = clip(image, text, logit_scale)
        distill = clip_distill(image, text, logit_scale, *teachers, dist_logit_scale)
        distill = distill + _entropy(*teachers, dist_logit_scale)
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distill}
        return contrastive, distill

    def _why_not_distilled(
        self, student: tuple[Tensor, Tensor, Scale], teacher: tuple[Tensor, Tensor, Scale]
    ) -> str | None:
        reason = overridden(self, DistillClipLoss, "dist_loss") or self._why_not(*student) or _why_not(*teacher)
        if reason:
            return reason
        if self.world_size > 1 and self.local_loss:
            return "local_loss makes the teacher's softmax rectangular"
        image, text, scale = teacher
        if image.requires_grad or text.requires_grad or (isinstance(scale, Tensor) and scale.requires_grad):
            return "the teacher requires gradients"
        same = image.shape[0] == student[0].shape[0] and image.device == student[0].device
        return None if same else "student and teacher have different batches"


@torch.no_grad()
def _entropy(image: Tensor, text: Tensor, scale: Scale) -> Tensor:
    """Returns the mean entropy of the teacher's softmaxes in both directions, by which open_clip's loss exceeds the
    divergence.

    H(p) = log Z - E_p[z], and E_p[z] is the scale times the derivative of log Z by the scale. It is taken from CLIP's
    loss, whose diagonal cancels.
    """
    dtype = stats_dtype(image.dtype)
    if isinstance(scale, Tensor):
        scale = scale.detach().to(image.device, dtype).requires_grad_()
    else:
        scale = torch.full((), scale, dtype=dtype, device=image.device, requires_grad=True)
    with torch.enable_grad():
        loss = clip(image.detach(), text.detach(), scale)
        (slope,) = torch.autograd.grad(loss, scale)
    return loss.detach() - (scale * slope).reshape(())


class SigLipLoss(_SigLipLoss):
    """open_clip's SigLipLoss in O(B D) memory; between ranks, each exchanged block of texts is one sweep."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **_known(_SigLipLoss, kwargs))

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Scale,
        logit_bias: Scale | None,
        output_dict: bool = False,
        **unused: Any,
    ) -> Any:
        return super().forward(image_features, text_features, logit_scale, logit_bias, output_dict)

    @counted
    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Scale,
        logit_bias: Scale | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        if library_is_faster("open_clip.SigLipLoss", image_features) or not runs_fused(
            "open_clip.SigLipLoss",
            overridden(self, SigLipLoss, "get_logits", "get_ground_truth")
            or _why_not(image_features, text_features, logit_scale, logit_bias),
        ):
            return super()._loss(image_features, text_features, logit_scale, logit_bias, negative_only)
        target = None
        if negative_only:  # no pair has equal ids, so none is positive
            ids = torch.zeros(len(image_features), dtype=torch.int64, device=image_features.device)
            target = masks.same_id(ids, ids + 1)
        return siglip(image_features, text_features, logit_scale, logit_bias, target=target)


def patch() -> Patch:
    """Replaces open_clip's classes by these, wherever they are imported; `undo()` or `with` reverts it."""
    return Patch({_ClipLoss: ClipLoss, _CoCaLoss: CoCaLoss, _DistillClipLoss: DistillClipLoss, _SigLipLoss: SigLipLoss})
