"""The losses of NVIDIA NeMo Automodel's retrieval recipes, without a matrix of similarities.

    from fusedloss.integrations import nemo_automodel as fused

    fused.patch()       # before the recipe makes its losses

`InfoNCELoss` and `InfoNCEDistillLoss` also take the negatives of all processes: loss and gradient, after
DistributedDataParallel's average, are the library's. `TrainBiEncoderRecipe` has no loss to replace: it multiplies
inside of its step. Tested with 0.7.0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from ..core import checks
from ..core.numerics import stats_dtype
from ..functional import clip, info_nce, info_nce_distill
from ._drop_in import Patch, counted, library, runs_fused
from ._fits import alike, refusal, scalar_fits

library("nemo_automodel.components.loss.infonce", "nemo-automodel", "0.7.0")

from nemo_automodel.components.loss.embedding_distill import ScoreDistillLoss as _ScoreDistillLoss  # noqa: E402
from nemo_automodel.components.loss.infonce import InfoNCEDistillLoss as _InfoNCEDistillLoss  # noqa: E402
from nemo_automodel.components.loss.infonce import InfoNCELoss as _InfoNCELoss  # noqa: E402

DIRECTIONS = {"q2d": ("query_to_key",), "d2q": ("key_to_query",), "symmetric": ("query_to_key", "key_to_query")}


def _across(loss: Any) -> dict[str, Any]:
    """Returns the options of a call over the batches of all processes, where the library gathers them."""
    gathers = loss.cross_device_negatives and distributed.is_available() and distributed.is_initialized()
    return {"group": "world"} if gathers and distributed.get_world_size() > 1 else {}


def _setting(loss: Any) -> str | None:
    if loss.direction not in DIRECTIONS:
        return "its direction is unknown"
    return None if loss.use_in_batch_negatives else "it compares a query with its own documents alone"


def _alike(**embeddings: Any) -> str | None:
    if alike(*embeddings.values()):
        return None
    return refusal(checks.embeddings, **embeddings) or "its embeddings are not alike"


def _negatives_fit(query: Tensor, negatives: Any, mask: Any) -> str | None:
    """Why hard negatives [B, K, D], if there are any, or their mask [B, K] do not fit."""
    if negatives is None:
        return None
    if type(negatives) is not Tensor or negatives.dim() != 3 or negatives.shape[::2] != query.shape:
        return "its hard negatives are not [B, K, D]"
    if negatives.dtype is not query.dtype or negatives.device != query.device or not negatives.shape[1]:
        return "its hard negatives are none, or not like its queries"
    if mask is not None and (type(mask) is not Tensor or mask.shape != negatives.shape[:2]):
        return "the mask of its hard negatives is not [B, K]"
    return None


def _admitted(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask != 0


class InfoNCELoss(_InfoNCELoss):
    """NeMo Automodel's loss of this name, by `fusedloss.info_nce` and `fusedloss.clip`."""

    @counted
    def forward(
        self,
        queries: Tensor,
        documents: Tensor,
        hard_negatives: Tensor | None = None,
        hard_negatives_mask: Tensor | None = None,
    ) -> Tensor:
        across, temperature = _across(self), self.current_temperature()
        why_not = _setting(self) or _alike(queries=queries, documents=documents)
        why_not = why_not or _negatives_fit(queries, hard_negatives, hard_negatives_mask)
        if across and temperature.requires_grad:
            why_not = why_not or "its temperature learns on each process"
        why_not = why_not or scalar_fits("temperature", temperature, queries, positive=True)
        if not runs_fused("nemo_automodel.InfoNCELoss", why_not):
            return super().forward(queries, documents, hard_negatives, hard_negatives_mask)
        shared: dict[str, Any] = {"normalize": self.normalize, **across}
        if self.direction == "symmetric" and hard_negatives is None:
            scale = 1 / temperature.to(stats_dtype(queries.dtype))  # of a float32 temperature beside float64 embeddings
            return clip(queries, documents, scale, **shared)
        shared["temperature"] = temperature
        own = None if self.direction == "d2q" else hard_negatives
        more: dict[str, Any] = {}
        if own is not None:
            more = {"negatives": own, "negatives_mask": _admitted(hard_negatives_mask)}
        first, second = (documents, queries) if self.direction == "d2q" else (queries, documents)
        loss = info_nce(first, second, **more, **shared)
        return loss if self.direction != "symmetric" else (loss + info_nce(second, first, **shared)) / 2


class InfoNCEDistillLoss(_InfoNCEDistillLoss):
    """NeMo Automodel's loss of this name, by `fusedloss.info_nce_distill`."""

    @counted
    def forward(
        self,
        student_queries: Tensor,
        student_documents: Tensor,
        teacher_queries: Tensor,
        teacher_documents: Tensor,
        student_hard_negatives: Tensor | None = None,
        teacher_hard_negatives: Tensor | None = None,
        hard_negatives_mask: Tensor | None = None,
    ) -> Tensor:
        student, teacher = (student_queries, student_documents), (teacher_queries, teacher_documents)
        negatives = student_hard_negatives, teacher_hard_negatives
        why_not = _setting(self) or _alike(student_queries=student[0], student_documents=student[1])
        why_not = why_not or _alike(teacher_queries=teacher[0], teacher_documents=teacher[1])
        why_not = why_not or self._rows_fit(student[0], teacher[0])
        for query, own in zip((student[0], teacher[0]), negatives, strict=True):
            why_not = why_not or _negatives_fit(query, own, hard_negatives_mask)
        if (negatives[0] is None) != (negatives[1] is None):
            why_not = why_not or "only one of the models has hard negatives"
        why_not = why_not or scalar_fits("temperature", self.temperature, student[0], positive=True)
        if not runs_fused("nemo_automodel.InfoNCEDistillLoss", why_not):
            return super().forward(*student, *teacher, *negatives, hard_negatives_mask)
        more: dict[str, Any] = {}
        if negatives[0] is not None and self.direction != "d2q":
            more = {"negatives": negatives[0], "teacher_negatives": negatives[1]}
            more["negatives_mask"] = _admitted(hard_negatives_mask)
        loss = info_nce_distill(
            student_queries,
            student_documents,
            teacher_queries,
            teacher_documents,
            temperature=self.temperature,
            teacher_temperature=self.temperature,
            form=self.divergence,
            directions=DIRECTIONS[self.direction],
            normalize=self.normalize,
            **more,
            **_across(self),
        )
        assert isinstance(loss, Tensor)
        return loss

    def _rows_fit(self, student: Tensor, teacher: Tensor) -> str | None:
        if student.shape[0] != teacher.shape[0] or student.device != teacher.device:
            return "the teacher's batch is not the student's"
        if self.divergence not in ("kl", "ce", "mse"):
            return "its divergence is unknown"
        return "its embeddings are float64, of which it takes 24 bits" if student.dtype is torch.float64 else None


class ScoreDistillLoss(_ScoreDistillLoss):
    """NeMo Automodel's loss of this name, by `fusedloss.info_nce_distill` of queries, and of documents."""

    @counted
    def forward(self, s_q: Tensor, t_q: Tensor, s_d: Tensor, t_d: Tensor) -> Tensor:
        why_not = scalar_fits("temperature", self.temperature, s_q, positive=True) if type(s_q) is Tensor else None
        for student, teacher in ((s_q, t_q), (s_d, t_d)):
            why_not = why_not or _alike(student=student) or _alike(teacher=teacher)
            if why_not is None and (student.shape[0] != teacher.shape[0] or student.device != teacher.device):
                why_not = "the teacher's batch is not the student's"
        if not runs_fused("nemo_automodel.ScoreDistillLoss", why_not):
            return super().forward(s_q, t_q, s_d, t_d)
        return self._side(s_q, t_q) + self._side(s_d, t_d)

    def _side(self, x: Tensor, y: Tensor) -> Tensor:
        t = self.temperature
        loss = info_nce_distill(x, x, y, y, temperature=t, teacher_temperature=t, form="mse", normalize=True)
        assert isinstance(loss, Tensor)
        return loss


def patch() -> Patch:
    """Replaces the library's classes by these, wherever they are imported; `undo()` or `with` reverts it.

    Example:
        >>> fused.patch()
        >>> EmbeddingDistillRecipe(cfg).setup()
    """
    return Patch(
        {
            _InfoNCEDistillLoss: InfoNCEDistillLoss,
            _InfoNCELoss: InfoNCELoss,
            _ScoreDistillLoss: ScoreDistillLoss,
        }
    )
