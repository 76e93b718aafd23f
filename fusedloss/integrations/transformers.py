"""The losses of transformers' image-text models, fused: CLIP and those like it, and SigLIP.

    from fusedloss.integrations import transformers as fused

    fused.patch()       # before `CLIPModel.from_pretrained(...)` or `AutoModel.from_pretrained(...)`

`model(..., return_loss=True)` runs the library's forward without its loss, and computes the loss from the embeddings
that it returns: logits are accumulated in fp32, and neither their softmax nor their gradient is stored. The logits in
the output are the library's. Models made before `patch()` keep the library's loss. Tested with 5.23.0.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import checks
from ..functional import clip, siglip
from ._drop_in import Patch, counted, disabled, library, runs_fused
from ._fits import alike, refusal, scalar_fits

library("transformers", "transformers", "5.23.0")

from transformers.models.altclip.modeling_altclip import AltCLIPModel as _AltCLIPModel  # noqa: E402
from transformers.models.blip.modeling_blip import BlipModel as _BlipModel  # noqa: E402
from transformers.models.chinese_clip.modeling_chinese_clip import ChineseCLIPModel as _ChineseCLIPModel  # noqa: E402
from transformers.models.clip.modeling_clip import CLIPModel as _CLIPModel  # noqa: E402
from transformers.models.clipseg.modeling_clipseg import CLIPSegModel as _CLIPSegModel  # noqa: E402
from transformers.models.metaclip_2.modeling_metaclip_2 import MetaClip2Model as _MetaClip2Model  # noqa: E402
from transformers.models.siglip.modeling_siglip import SiglipModel as _SiglipModel  # noqa: E402
from transformers.models.siglip2.modeling_siglip2 import Siglip2Model as _Siglip2Model  # noqa: E402
from transformers.models.vision_text_dual_encoder.modeling_vision_text_dual_encoder import (  # noqa: E402
    VisionTextDualEncoderModel as _VisionTextDualEncoderModel,
)

Loss = Callable[[Any, Tensor, Tensor], Tensor]
Stock = Callable[[Tensor], Tensor]


def _clip(model: Any, image: Tensor, text: Tensor) -> Tensor:
    return clip(image, text, model.logit_scale.exp())


def _siglip(model: Any, image: Tensor, text: Tensor) -> Tensor:
    return siglip(image, text, model.logit_scale.exp(), model.logit_bias)


def _sigmoid_of(logits: Tensor) -> Tensor:
    """Returns SigLIP's loss of the library's logits: it has no function for it."""
    sign = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(sign * logits).sum(-1).mean()


def _stock(upstream: Any, loss: Loss) -> Stock | None:
    """Returns the library's loss of its logits; None: this version has it under another name."""
    if loss is _siglip:
        return _sigmoid_of
    found: Stock | None = getattr(sys.modules[upstream.__module__], "image_text_contrastive_loss", None)
    return found


def _why_not(model: Any, image: Any, text: Any) -> str | None:
    if not alike(image, text):
        return refusal(checks.embeddings, image_embeds=image, text_embeds=text) or "its batches are not alike"
    reason = scalar_fits("logit_scale", model.logit_scale, image)
    bias = getattr(model, "logit_bias", None)
    return reason if bias is None else reason or scalar_fits("logit_bias", bias, image)


def _forward(upstream: Any, loss: Loss) -> Callable[..., Any]:
    """Returns the library's forward with the loss of its embeddings, or of its logits: towers run once."""
    library_forward = upstream.forward
    signature = inspect.signature(library_forward)
    place = list(signature.parameters).index("return_loss") - 1
    stock = _stock(upstream, loss)

    @functools.wraps(library_forward)
    @counted
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        by_place = len(args) > place
        wanted = args[place] if by_place else kwargs.get("return_loss")
        as_dict = kwargs.get("return_dict")
        if not wanted or disabled():
            return library_forward(self, *args, **kwargs)
        name = f"transformers.{upstream.__name__}"
        if not (self.config.return_dict if as_dict is None else as_dict):
            runs_fused(name, "return_dict is False")
            return library_forward(self, *args, **kwargs)
        if by_place:
            output = library_forward(self, *args[:place], False, *args[place + 1 :], **kwargs)
        else:
            output = library_forward(self, *args, **kwargs | {"return_loss": False})
        image, text = output.image_embeds, output.text_embeds
        if runs_fused(name, _why_not(self, image, text)):
            output.loss = loss(self, image, text)
        elif stock is None or len(image) != len(text):  # the library's error
            return library_forward(self, *args, **kwargs)
        else:
            output.loss = stock(output.logits_per_text)
        output.move_to_end("loss", last=False)  # where the library has it
        return output

    forward.__signature__ = signature  # type: ignore[attr-defined]  # the Trainer drops inputs that are not in it
    return forward


class CLIPModel(_CLIPModel):
    """transformers' model of this name, whose loss is `fusedloss.clip`."""

    forward = _forward(_CLIPModel, _clip)


class AltCLIPModel(_AltCLIPModel):
    """transformers' model of this name, whose loss is `fusedloss.clip`."""

    forward = _forward(_AltCLIPModel, _clip)


class BlipModel(_BlipModel):
    """transformers' model of this name, whose loss is `fusedloss.clip`."""

    forward = _forward(_BlipModel, _clip)


class ChineseCLIPModel(_ChineseCLIPModel):
    """transformers' model of this name, whose loss is `fusedloss.clip`."""

    forward = _forward(_ChineseCLIPModel, _clip)


class CLIPSegModel(_CLIPSegModel):
    """transformers' model of this name, whose loss is `fusedloss.clip`."""

    forward = _forward(_CLIPSegModel, _clip)


class MetaClip2Model(_MetaClip2Model):
    """transformers' model of this name, whose loss is `fusedloss.clip`."""

    forward = _forward(_MetaClip2Model, _clip)


class VisionTextDualEncoderModel(_VisionTextDualEncoderModel):
    """transformers' model of this name, whose loss is `fusedloss.clip`."""

    forward = _forward(_VisionTextDualEncoderModel, _clip)


class SiglipModel(_SiglipModel):
    """transformers' model of this name, whose loss is `fusedloss.siglip`."""

    forward = _forward(_SiglipModel, _siglip)


class Siglip2Model(_Siglip2Model):
    """transformers' model of this name, whose loss is `fusedloss.siglip`."""

    forward = _forward(_Siglip2Model, _siglip)


def patch() -> Patch:
    """Replaces the library's classes by these, wherever they are imported; `undo()` or `with` reverts it.

    Example:
        >>> fused.patch()
        >>> AutoModel.from_pretrained("openai/clip-vit-base-patch32")(**batch, return_loss=True).loss.backward()
    """
    return Patch(
        {
            _AltCLIPModel: AltCLIPModel,
            _BlipModel: BlipModel,
            _CLIPModel: CLIPModel,
            _CLIPSegModel: CLIPSegModel,
            _ChineseCLIPModel: ChineseCLIPModel,
            _MetaClip2Model: MetaClip2Model,
            _Siglip2Model: Siglip2Model,
            _SiglipModel: SiglipModel,
            _VisionTextDualEncoderModel: VisionTextDualEncoderModel,
        }
    )
