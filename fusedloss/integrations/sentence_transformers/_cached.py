"""Gradient-cached losses: the library's engine embeds and replays; the loss stage is one sweep over the whole batch.

`mini_batch_size` is only the number of texts embedded at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss as _CachedGISTEmbedLoss
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss as _CachedMultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesSymmetricRankingLoss as _CachedMultipleNegativesSymmetricRankingLoss,
)
from sentence_transformers.sentence_transformer.losses import (
    cached_gist_embed as _cached_gist_embed,
)
from sentence_transformers.sentence_transformer.losses import (
    cached_multiple_negatives_ranking as _cached_ranking,
)
from torch import Tensor
from typing_extensions import deprecated

from fusedloss.core import checks

from .._drop_in import counted
from ._duplicates import LeavesOutDuplicates, takes_duplicates, text_ids
from ._fits import fused
from ._ranking import gist, gist_fits, gist_is_plain, ranking, ranking_fits, settled


class CachedMultipleNegativesRankingLoss(LeavesOutDuplicates, _CachedMultipleNegativesRankingLoss):
    """sentence-transformers' loss of this name. With `gather_across_devices` a step has one gather, not one a chunk.

    It also takes `duplicates`, as `MultipleNegativesRankingLoss`.
    """

    __init__ = takes_duplicates(_CachedMultipleNegativesRankingLoss)

    @counted
    def calculate_loss(self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False) -> Tensor:
        columns = [torch.cat(column) for column in reps]
        if not fused(self, ranking_fits(self, columns)):
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        loss = settled(ranking(self, _cached_ranking, columns, labels), with_backward)
        # Under autocast the result has its dtype, by which callers (the library's tests, for one) see that it was on.
        return loss.to(torch.get_autocast_dtype(loss.device.type)) if checks.autocasts(columns[0]) else loss


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # the warning is for the library's users

    @deprecated(_CachedMultipleNegativesSymmetricRankingLoss.__deprecated__)
    class CachedMultipleNegativesSymmetricRankingLoss(
        _CachedMultipleNegativesSymmetricRankingLoss, CachedMultipleNegativesRankingLoss
    ):
        """sentence-transformers' loss of this name, as `CachedMultipleNegativesRankingLoss`."""


class CachedGISTEmbedLoss(LeavesOutDuplicates, _CachedGISTEmbedLoss):
    """sentence-transformers' loss of this name, in the memory of the embeddings; see `GISTEmbedLoss`."""

    __init__ = takes_duplicates(_CachedGISTEmbedLoss)
    _labels: Any = None  # while `forward` runs: the library does not hand them on to `calculate_loss`

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Any = None) -> Tensor:
        columns = list(sentence_features)
        if self.duplicates is not None:
            self._labels = text_ids(columns) if self.duplicates == "texts" else labels
        try:
            return _CachedGISTEmbedLoss.forward(self, columns, labels)
        finally:
            self._labels = None

    @counted
    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        columns = [torch.cat(column) for column in reps]
        guides = [torch.cat(column) for column in reps_guided]
        if not fused(self, gist_is_plain(self, _CachedGISTEmbedLoss) or gist_fits(columns, guides)):
            return super().calculate_loss(reps, reps_guided, with_backward=with_backward)
        return settled(gist(self, _cached_gist_embed, columns, guides, self._labels), with_backward)
