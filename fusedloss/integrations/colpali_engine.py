"""The in-batch losses of colpali-engine's bi-encoders (BiPali, BiQwen2 and others), without a matrix of scores.

    from fusedloss.integrations import colpali_engine as fused

    fused.patch()       # before `BiEncoderLoss(...)` is made

The losses of late interaction (ColbertLoss and others) are the library's. Tested with 0.3.18.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..core import checks
from ..core.numerics import row_numbers
from ..functional import clip, info_nce
from ._drop_in import Patch, counted, library, runs_fused
from ._fits import alike, overridden, plain, refusal, scalar_fits

library("colpali_engine.loss", "colpali-engine", "0.3.18")

from colpali_engine.loss import BiEncoderLoss as _BiEncoderLoss  # noqa: E402
from colpali_engine.loss import BiNegativeCELoss as _BiNegativeCELoss  # noqa: E402
from colpali_engine.loss.bi_encoder_losses import BiPairedEncoderLoss as _BiPairedEncoderLoss  # noqa: E402

criterion_fits = plain(nn.CrossEntropyLoss)


def _why_not(loss: Any, ours: type, query: Any, doc: Any, offset: Any) -> str | None:
    if not alike(query, doc, same_rows=False):
        reason = refusal(checks.embeddings, query_embeddings=query, doc_embeddings=doc)
        return reason or "its embeddings are not alike"
    if loss.pos_aware_negative_filtering:
        return "pos_aware_negative_filtering scales similarities"
    rows = query.shape[0]
    if type(offset) is not int or not 0 <= offset <= doc.shape[0] - rows or rows > len(loss.idx_buffer):
        return "offset and max_batch_size do not fit the batch"
    return (
        overridden(loss, ours, "_get_idx")
        or criterion_fits(loss.ce_loss)
        or scalar_fits("temperature", loss.temperature, query, positive=True)
    )


class BiEncoderLoss(_BiEncoderLoss):
    """colpali-engine's loss of this name, by `fusedloss.info_nce`."""

    @counted
    def forward(self, query_embeddings: Tensor, doc_embeddings: Tensor, offset: int = 0) -> Tensor:
        why_not = _why_not(self, BiEncoderLoss, query_embeddings, doc_embeddings, offset)
        if not runs_fused("colpali_engine.BiEncoderLoss", why_not):
            return super().forward(query_embeddings, doc_embeddings, offset)
        target = offset + row_numbers(query_embeddings.shape[0], query_embeddings)
        return info_nce(query_embeddings, doc_embeddings, target, temperature=self.temperature)


class BiPairedEncoderLoss(_BiPairedEncoderLoss):
    """colpali-engine's loss of this name, by `fusedloss.clip`: one product of similarities for both directions."""

    @counted
    def forward(self, query_embeddings: Tensor, doc_embeddings: Tensor, offset: int = 0) -> Tensor:
        why_not = _why_not(self, BiPairedEncoderLoss, query_embeddings, doc_embeddings, offset)
        if why_not is None and query_embeddings.shape != doc_embeddings.shape:
            why_not = "there are more documents than queries"
        if not runs_fused("colpali_engine.BiPairedEncoderLoss", why_not):
            return super().forward(query_embeddings, doc_embeddings, offset)
        return clip(query_embeddings, doc_embeddings, 1 / self.temperature)


class BiNegativeCELoss(_BiNegativeCELoss):
    """colpali-engine's loss of this name, whose term of the batch is `BiEncoderLoss` as above."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        inner: Any = vars(self)["_modules"]["inner_loss"]
        if type(inner) is _BiEncoderLoss:  # made outside of `patch()`
            self.inner_loss = BiEncoderLoss(
                temperature=inner.temperature,
                pos_aware_negative_filtering=inner.pos_aware_negative_filtering,
                max_batch_size=len(inner.idx_buffer),
                filter_threshold=inner.filter_threshold,
                filter_factor=inner.filter_factor,
            )


def patch() -> Patch:
    """Replaces the library's classes by these, wherever they are imported; `undo()` or `with` reverts it."""
    return Patch(
        {
            _BiEncoderLoss: BiEncoderLoss,
            _BiNegativeCELoss: BiNegativeCELoss,
            _BiPairedEncoderLoss: BiPairedEncoderLoss,
        }
    )
