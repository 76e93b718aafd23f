"""The contrastive loss of FlagEmbedding's bi-encoders (BGE), fused, also with `negatives_cross_device`.

    from fusedloss.integrations import FlagEmbedding as fused

    fused.patch()       # before the runner, or `BiEncoderOnlyEmbedderModel(...)`, makes the model

Scores of queries against all passages are never stored; the library discards them after the loss. Distillation by
`kl_div` reads a query's own passages alone. Across processes the gradient is scaled as the library does (`1/W` of the
exact one): `grad_scale="match:flag_embedding"` of `fusedloss.distributed`. Tested with 1.4.2.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import fusedloss

from ..core import checks
from ..core.numerics import row_numbers
from ._drop_in import Patch, counted, library, runs_fused
from ._fits import alike, overridden, plain, refusal, scalar_fits

library("FlagEmbedding.finetune.embedder.encoder_only.base", "FlagEmbedding", "1.4.2")

from FlagEmbedding.finetune.embedder.decoder_only.base import (  # noqa: E402
    BiDecoderOnlyEmbedderModel as _BiDecoderOnlyEmbedderModel,
)
from FlagEmbedding.finetune.embedder.decoder_only.icl import (  # noqa: E402
    BiDecoderOnlyEmbedderICLModel as _BiDecoderOnlyEmbedderICLModel,
)
from FlagEmbedding.finetune.embedder.encoder_only.base import (  # noqa: E402
    BiEncoderOnlyEmbedderModel as _BiEncoderOnlyEmbedderModel,
)

criterion_fits = plain(nn.CrossEntropyLoss)
METHODS = "forward", "compute_score", "compute_loss", "_compute_similarity", "distill_loss"


class _InBatch:
    """The loss of queries [B, D] against passages [B * G, D], whose row i * G is query i's positive."""

    _drop_in: ClassVar[type]  # the class here of which users' classes derive

    @counted
    def _compute_in_batch_neg_loss(
        self, q_reps: Any, p_reps: Any, teacher_targets: Any = None, compute_score_func: Any = None, **kwargs: Any
    ) -> tuple[Any, Tensor]:
        if self._fuses(q_reps, p_reps, teacher_targets, compute_score_func):
            return None, self._fused(q_reps, p_reps, teacher_targets)
        upstream: Any = super()
        found: tuple[Any, Tensor] = upstream._compute_in_batch_neg_loss(
            q_reps, p_reps, teacher_targets, compute_score_func, **kwargs
        )
        return found

    @counted
    def _compute_cross_device_neg_loss(
        self, q_reps: Any, p_reps: Any, teacher_targets: Any = None, compute_score_func: Any = None, **kwargs: Any
    ) -> tuple[Any, Tensor]:
        if self._fuses(q_reps, p_reps, teacher_targets, compute_score_func):
            return None, self._fused(q_reps, p_reps, teacher_targets, group="world", grad_scale="match:flag_embedding")
        upstream: Any = super()
        found: tuple[Any, Tensor] = upstream._compute_cross_device_neg_loss(
            q_reps, p_reps, teacher_targets, compute_score_func, **kwargs
        )
        return found

    def _fuses(self, q: Any, p: Any, teacher: Any, function: Any) -> bool:
        model: Any = self
        why_not = overridden(model, type(self)._drop_in, *METHODS) or criterion_fits(model.cross_entropy)
        if function is not None:
            why_not = why_not or "its scores are a function's"
        elif teacher is not None and model.kd_loss_type != "kl_div":
            why_not = why_not or "it is not distilled by kl_div"
        elif not alike(q, p, same_rows=False):
            why_not = why_not or refusal(checks.embeddings, q_reps=q, p_reps=p) or "its embeddings are not alike"
        elif p.shape[0] % q.shape[0]:
            why_not = why_not or "queries have different numbers of passages"
        else:
            why_not = why_not or scalar_fits("temperature", model.temperature, q, positive=True)
        return runs_fused(f"FlagEmbedding.{type(self)._drop_in.__name__}", why_not)

    def _fused(self, q: Tensor, p: Tensor, teacher: Any, **across: Any) -> Tensor:
        model: Any = self
        size = p.shape[0] // q.shape[0]
        start = torch.distributed.get_rank() * p.shape[0] if across else 0  # targets count all processes' passages
        target = start + size * row_numbers(q.shape[0], q)
        loss = fusedloss.info_nce(q, p, target, temperature=model.temperature, **across)
        if teacher is None:
            return loss
        own = torch.einsum("bd,bgd->bg", q, p.view(q.shape[0], size, -1)) / model.temperature
        return loss + model.distill_loss("kl_div", teacher, own, size)


class BiEncoderOnlyEmbedderModel(_InBatch, _BiEncoderOnlyEmbedderModel):
    """FlagEmbedding's model of this name, without a matrix of scores."""


class BiDecoderOnlyEmbedderModel(_InBatch, _BiDecoderOnlyEmbedderModel):
    """FlagEmbedding's model of this name, without a matrix of scores."""


class BiDecoderOnlyEmbedderICLModel(_InBatch, _BiDecoderOnlyEmbedderICLModel):
    """FlagEmbedding's model of this name, without a matrix of scores."""


for _own in (BiEncoderOnlyEmbedderModel, BiDecoderOnlyEmbedderModel, BiDecoderOnlyEmbedderICLModel):
    _own._drop_in = _own


def patch() -> Patch:
    """Replaces the library's classes by these, wherever they are imported; `undo()` or `with` reverts it.

    Example:
        >>> fused.patch()
        >>> EncoderOnlyEmbedderRunner(model_args, data_args, training_args).run()
    """
    return Patch(
        {
            _BiEncoderOnlyEmbedderModel: BiEncoderOnlyEmbedderModel,
            _BiDecoderOnlyEmbedderModel: BiDecoderOnlyEmbedderModel,
            _BiDecoderOnlyEmbedderICLModel: BiDecoderOnlyEmbedderICLModel,
        }
    )
