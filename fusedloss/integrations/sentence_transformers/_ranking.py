"""Losses against the other texts of the batch: one sweep over the similarities, which are never stored."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer.losses import (
    ContrastiveTensionLossInBatchNegatives as _ContrastiveTensionLossInBatchNegatives,
)
from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss as _GISTEmbedLoss
from sentence_transformers.sentence_transformer.losses import MegaBatchMarginLoss as _MegaBatchMarginLoss
from sentence_transformers.sentence_transformer.losses import (
    MultipleNegativesRankingLoss as _MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.losses import (
    MultipleNegativesSymmetricRankingLoss as _MultipleNegativesSymmetricRankingLoss,
)
from sentence_transformers.sentence_transformer.losses import gist_embed as _gist_embed
from sentence_transformers.sentence_transformer.losses import multiple_negatives_ranking as _ranking
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn
from typing_extensions import deprecated

import fusedloss
from fusedloss.core.numerics import stats_dtype
from fusedloss.losses.multiple_negatives_ranking import DIRECTIONS, HARDNESS_MODES

from .._drop_in import counted, library_is_faster
from .._fits import overridden, plain, untouched
from . import _fits
from ._duplicates import LeavesOutDuplicates, ids_of, takes_duplicates, text_ids
from ._fits import MATRICES, fused

criterion_fits = plain(nn.CrossEntropyLoss)


def gathered(loss: nn.Module, library: ModuleType, *columns: Tensor) -> list[Tensor]:
    """Returns the columns of all processes, this one's rows first. The order of the others does not matter to a loss.

    library: the module in which the library's loss looks up its names.
    """
    if not loss.gather_across_devices:
        return list(columns)
    offset = library.get_rank() * len(columns[0])
    everywhere = [library.all_gather_with_grad(x) for x in columns]
    return [x.roll(-offset, 0) for x in everywhere] if offset else everywhere


def ranking_fits(loss: Any, embeddings: Sequence[Tensor]) -> str | None:
    """Checks MultipleNegativesRankingLoss and its cached form."""
    directions = set(loss.directions)
    if len(embeddings) < 2:
        return "there are fewer than two columns"
    if not directions.issubset(DIRECTIONS) or "query_to_doc" not in directions:
        return "its directions are unknown"
    if loss.partition_mode not in ("joint", "per_direction"):
        return "its partition_mode is unknown"
    if loss.partition_mode == "per_direction" and {"query_to_query", "doc_to_doc"} & directions:
        return "its partition_mode does not go with its directions"
    if loss.hardness_mode not in (None, *HARDNESS_MODES):
        return "its hardness_mode is unknown"
    why_not = (
        _fits.similarity_is_known(loss.similarity_fct, MATRICES)
        or _fits.number_fits("scale", loss.scale, positive=True, tensor=True)
        or _fits.number_fits("hardness_strength", loss.hardness_strength)
    )
    if why_not:
        return why_not
    alone = len(directions) == 1 and _strength(loss) == 0
    return _fits.embeddings_fit(*embeddings, same_rows=not alone) or (
        "an anchor has no positive" if embeddings[1].shape[0] < embeddings[0].shape[0] else None
    )


def _strength(loss: Any) -> float:
    return float(loss.hardness_strength) if loss.hardness_mode is not None and loss.hardness_strength > 0 else 0.0


def ranking_options(loss: Any) -> dict[str, Any]:
    strength = _strength(loss)
    return {
        "scale": loss.scale,
        "similarity": _fits.similarity(loss.similarity_fct, MATRICES),
        "directions": tuple(loss.directions),
        "partition_mode": loss.partition_mode,
        "hardness_mode": loss.hardness_mode if strength else None,
        "hardness_strength": strength,
    }


def ranking_arguments(
    loss: Any, library: ModuleType, embeddings: Sequence[Tensor], labels: Any
) -> tuple[list[Tensor], dict[str, Any]]:
    """Returns what multiple_negatives_ranking takes: the embeddings, gathered where the loss gathers, and options."""
    anchor = embeddings[0]
    ids = ids_of(loss, labels, embeddings)
    anchors, *documents = gathered(loss, library, *embeddings)
    several = anchors.shape[0] > anchor.shape[0]
    own = anchors[: anchor.shape[0]] if several else anchors
    options = {
        **ranking_options(loss),
        "anchors": anchors if several else None,
        "ids": None if ids is None else gathered(loss, library, *ids),
    }
    return [own, *documents], options


def ranking(loss: Any, library: ModuleType, embeddings: Sequence[Tensor], labels: Any) -> Tensor:
    tensors, options = ranking_arguments(loss, library, embeddings, labels)
    return fusedloss.multiple_negatives_ranking(*tensors, **options)


class MultipleNegativesRankingLoss(LeavesOutDuplicates, _MultipleNegativesRankingLoss):
    """sentence-transformers' loss of this name. No score matrix is stored: memory is that of the embeddings.

    It also takes `duplicates`: "texts" leaves out negatives that are the same text as the row's own positive, or the
    positive of the same anchor; "labels" takes ids from the data set's label column.
    """

    __init__ = takes_duplicates(_MultipleNegativesRankingLoss)

    @counted
    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Any) -> Tensor:
        if not fused(self, ranking_fits(self, embeddings)):
            return super().compute_loss_from_embeddings(embeddings, labels)
        return ranking(self, _ranking, embeddings, labels)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # the warning is for the library's users

    @deprecated(_MultipleNegativesSymmetricRankingLoss.__deprecated__)
    class MultipleNegativesSymmetricRankingLoss(_MultipleNegativesSymmetricRankingLoss, MultipleNegativesRankingLoss):
        """sentence-transformers' loss of this name, as `MultipleNegativesRankingLoss`."""


def gist_fits(embeddings: Sequence[Tensor], guides: Sequence[Tensor]) -> str | None:
    """Checks the embeddings of GISTEmbedLoss and its cached form."""
    return (
        ("the guide has another number of columns" if len(embeddings) != len(guides) else None)
        or ("there are fewer than two columns" if len(embeddings) < 2 else None)
        or _fits.embeddings_fit(*embeddings)
        or _fits.embeddings_fit(*guides)
        or ("the guide has another number of rows" if len(guides[0]) != len(embeddings[0]) else None)
        or ("the guide is on another device" if guides[0].device != embeddings[0].device else None)
    )


def gist_is_plain(loss: Any, owner: type) -> str | None:
    """Checks the options of GISTEmbedLoss and its cached form."""
    cosine = loss.similarity_fct
    if not untouched(cosine, nn.CosineSimilarity) or cosine.dim not in (-1, 2) or cosine.eps != 1e-8:
        return "its similarity is not the library's CosineSimilarity"
    if loss.margin_strategy not in ("absolute", "relative"):
        return "its margin_strategy is unknown"
    return (
        overridden(loss, owner, "sim_matrix")
        or criterion_fits(loss.cross_entropy_loss)
        or _fits.number_fits("temperature", loss.temperature, positive=True)
        or _fits.number_fits("margin", loss.margin)
    )


def gist(loss: Any, library: ModuleType, embeddings: Sequence[Tensor], guides: Sequence[Tensor], labels: Any) -> Tensor:
    """Returns the loss. Anchors stay this process's own. A 16-bit guide is compared in fp32; the library rounds."""
    anchor, *candidates = embeddings
    guide, *guide_candidates = guides
    everywhere = gathered(loss, library, *candidates, *guide_candidates)
    candidates, guide_candidates = everywhere[: len(candidates)], everywhere[len(candidates) :]
    ids = ids_of(loss, labels, embeddings)
    with _fits.autocast_off(anchor):
        return fusedloss.gist_embed(
            anchor,
            *candidates,
            guide=[x.to(stats_dtype(x.dtype)) for x in (guide, *guide_candidates)],
            temperature=loss.temperature,
            margin_strategy=loss.margin_strategy,
            margin=loss.margin,
            contrast_anchors=bool(loss.contrast_anchors),
            contrast_positives=bool(loss.contrast_positives),
            ids=None if ids is None else gathered(loss, library, *ids),
        )


class GISTEmbedLoss(LeavesOutDuplicates, _GISTEmbedLoss):
    """sentence-transformers' loss of this name, in the memory of the embeddings instead of B x B x D.

    Rows shorter than 1e-8 are divided by their length, down to 1e-12, as `cos_sim` does. A guide's similarity within
    rounding of the threshold counts as equal, which stays. It also takes `duplicates`, as
    `MultipleNegativesRankingLoss`.
    """

    __init__ = takes_duplicates(_GISTEmbedLoss)

    @counted
    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Any = None) -> Tensor:
        columns = list(sentence_features)
        if self.duplicates == "texts":
            labels = text_ids(columns)
        why_not = gist_is_plain(self, _GISTEmbedLoss)
        if why_not is not None:
            fused(self, why_not)
            return super().forward(columns, labels)
        guided = [dict(column) for column in columns]
        embeddings = embed_columns(self.model, columns)
        with torch.no_grad():
            if self.must_retokenize:
                guided = [self._for_guide(column) for column in columns]
            guides = embed_columns(self.guide, guided)
        why_not = gist_fits(embeddings, guides)
        if len(embeddings) not in (2, 3) or not fused(self, why_not):
            models = {"model": list(embeddings), "guide": list(guides)}
            return _fits.replay(self, _GISTEmbedLoss.forward, models, labels, must_retokenize=False)
        return gist(self, _gist_embed, embeddings, guides, labels)

    def _for_guide(self, column: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns a column's texts in the guide's tokens."""
        ids: Any = column["input_ids"]
        if "cu_seq_lens_q" in column:  # several texts in one row
            ends = column["cu_seq_lens_q"].tolist()
            flat = ids[0].tolist()
            ids = [flat[start:end] for start, end in pairwise(ends)]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return batch_to_device(self.guide.preprocess(texts), self.guide.device)


class ContrastiveTensionLossInBatchNegatives(_ContrastiveTensionLossInBatchNegatives):
    """sentence-transformers' loss of this name; both directions and the scale's gradient out of one sweep."""

    @counted
    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        features = sentence_features[0]  # type: ignore[index]
        a = self.model1(features)["sentence_embedding"]
        b = self.model2(features)["sentence_embedding"]
        why_not = (
            _fits.similarity_is_known(self.similarity_fct, MATRICES)
            or criterion_fits(self.cross_entropy_loss)
            or _fits.embeddings_fit(a, b)
        )
        if _fits.few(self, [a], rows=True) or not fused(self, why_not):
            models = {"model1": [a], "model2": [b]}
            return _fits.replay(self, _ContrastiveTensionLossInBatchNegatives.forward, models, labels)
        cosine = _fits.similarity(self.similarity_fct, MATRICES) == "cos"
        return fusedloss.clip(a, b, self.logit_scale.exp(), normalize=cosine)


class MegaBatchMarginLoss(_MegaBatchMarginLoss):
    """sentence-transformers' loss of this name; the hardest negatives are found without a score matrix."""

    @counted
    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        rows = sum(x.shape[0] for x in reps[0])
        if library_is_faster("sentence_transformers.MegaBatchMarginLoss", reps[0][0], rows * rows):
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        anchors, positives = torch.cat(reps[0]), torch.cat(reps[1])
        why_not = (
            _fits.embeddings_fit(anchors, positives)
            or _fits.number_fits("positive_margin", self.positive_margin)
            or _fits.number_fits("negative_margin", self.negative_margin)
        )
        if not fused(self, why_not):
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        loss = fusedloss.mega_batch_margin(
            anchors, positives, positive_margin=self.positive_margin, negative_margin=self.negative_margin
        )
        return settled(loss, with_backward)


def settled(loss: Tensor, with_backward: bool) -> Tensor:
    """Returns a cached loss whose leaves already have their gradients, so that no graph outlives the call."""
    if not with_backward:
        return loss
    loss.backward()
    return loss.detach()
