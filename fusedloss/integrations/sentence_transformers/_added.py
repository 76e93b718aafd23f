"""Losses that sentence-transformers does not have, with the constructors of those that it has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fusedloss
from fusedloss.core import checks


class SupConLoss(nn.Module):
    """Supervised contrastive loss (Khosla et al. 2020) for texts with labels, as `fusedloss.sup_con` has it.

    The data set has one text column and an integer label. Each row's positives are the other rows of its label, so that
    batches need several rows a label: `BatchSamplers.GROUP_BY_LABEL`.

    Args:
        model: the SentenceTransformer.
        temperature: a positive number.
        form: "out" (the paper's recommendation) or "in".

    Raises:
        ValueError, TypeError: a temperature or a form that does not fit.

    Example:
        >>> loss = losses.SupConLoss(model, temperature=0.1)
        >>> SentenceTransformerTrainer(model=model, train_dataset=dataset, loss=loss).train()
    """

    def __init__(self, model: Any, temperature: float = 0.1, form: str = "out"):
        super().__init__()
        checks.scalar("temperature", temperature, None, positive=True)
        checks.choice("form", form, ("out", "in"))
        self.model, self.temperature, self.form = model, temperature, form

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        return self.compute_loss_from_embeddings(_embedded(self.model, sentence_features), labels)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor) -> Tensor:
        if len(embeddings) != 1:
            raise ValueError(
                f"sentence_features must hold one column of texts, got {len(embeddings)}; labels tell pairs"
            )
        return fusedloss.sup_con(embeddings[0], labels.reshape(-1).long(), temperature=self.temperature, form=self.form)

    def get_config_dict(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "form": self.form}


class SigLIPLoss(nn.Module):
    """Sigmoid loss (Zhai et al. 2023, SigLIP) of pairs of texts or of texts and images, as `fusedloss.siglip` has it.

    The data set has two columns: row i of one belongs to row i of the other. There is no normaliser over the batch, so
    small batches and duplicates harm it less than a softmax.

    Args:
        model: the SentenceTransformer.
        scale, bias: of the logits `scale * cos + bias`; the paper starts at 10 and -10.
        learnable: whether both are trained with the model.

    Raises:
        ValueError, TypeError: a scale or a bias that does not fit.

    Example:
        >>> loss = losses.SigLIPLoss(model)
        >>> SentenceTransformerTrainer(model=model, train_dataset=dataset, loss=loss).train()
    """

    def __init__(self, model: Any, scale: float = 10.0, bias: float = -10.0, learnable: bool = True):
        super().__init__()
        checks.scalar("scale", scale, None, positive=True)
        checks.number("bias", bias)
        self.model, self.learnable = model, learnable
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learnable)
        self.bias = nn.Parameter(torch.tensor(float(bias)), requires_grad=learnable)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        return self.compute_loss_from_embeddings(_embedded(self.model, sentence_features), labels)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        if len(embeddings) != 2:
            raise ValueError(f"sentence_features must hold two columns, got {len(embeddings)}; name the two to pair")
        x, y = embeddings
        return fusedloss.siglip(x, y, self.log_scale.exp(), self.bias, normalize=True)

    def get_config_dict(self) -> dict[str, Any]:
        return {"scale": self.log_scale.exp().item(), "bias": self.bias.item(), "learnable": self.learnable}


def _embedded(model: Any, sentence_features: Iterable[dict[str, Tensor]]) -> list[Tensor]:
    return [model(features)["sentence_embedding"] for features in sentence_features]
