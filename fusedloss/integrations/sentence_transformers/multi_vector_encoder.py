"""The MaxSim losses of multi-vector encoders, scored by an installed kernel package: late-interaction-kernels or
flash-maxsim.

The library's score functions materialise all similarities of query and document tokens; the kernels store none. The
kernels compute in 16 bits, so they score float32 tokens only under autocast. The library scores the rest: score
functions other than the six of MaxSim, masks that are not bool, and tokens that are not on a GPU. Without either
package the library's code runs. Tested with stand-ins for late-interaction-kernels 0.4.5 and flash-maxsim 0.3.0.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from sentence_transformers.multi_vector_encoder import scoring
from sentence_transformers.multi_vector_encoder.losses import (
    CachedMultiVectorMultipleNegativesRankingLoss as _CachedMultiVectorMultipleNegativesRankingLoss,
)
from sentence_transformers.multi_vector_encoder.losses import (
    MultiVectorDistillKLDivLoss as _MultiVectorDistillKLDivLoss,
)
from sentence_transformers.multi_vector_encoder.losses import MultiVectorMarginMSELoss as _MultiVectorMarginMSELoss
from sentence_transformers.multi_vector_encoder.losses import (
    MultiVectorMultipleNegativesRankingLoss as _MultiVectorMultipleNegativesRankingLoss,
)
from torch import Tensor

from .._drop_in import counted, disabled, runs_fused

# For each score function: what it compares, and whether it divides by the number of query tokens.
KNOWN: dict[Any, tuple[str, bool]] = {
    scoring.colbert_scores: ("all", False),
    scoring.colbert_kd_scores: ("own", False),
    scoring.colbert_scores_pairwise: ("pairs", False),
    scoring.mean_colbert_scores: ("all", True),
    scoring.mean_colbert_kd_scores: ("own", True),
    scoring.mean_colbert_scores_pairwise: ("pairs", True),
}
DEVICE = "cuda"
EMPTY = -1e9  # the library's score of a document without tokens


def _late_interaction_kernels(query: Tensor, documents: Tensor, query_mask: Tensor, document_mask: Tensor) -> Tensor:
    kernels = importlib.import_module("late_interaction_kernels")
    return kernels.maxsim(query, documents, q_mask=query_mask, d_mask=document_mask)


def _flash_maxsim(query: Tensor, documents: Tensor, query_mask: Tensor, document_mask: Tensor) -> Tensor:
    """Takes lengths instead of masks, so masked-in tokens are moved to the front; their order does not matter."""
    kernels = importlib.import_module("flash_maxsim")
    (query, query_lengths), (documents, lengths) = _counted(query, query_mask), _counted(documents, document_mask)
    return kernels.flash_maxsim_batched_train(
        query, documents, shared_docs=documents.dim() == 3, doc_lengths=lengths.flatten(), query_lengths=query_lengths
    )


PACKAGES = {"late_interaction_kernels": _late_interaction_kernels, "flash_maxsim": _flash_maxsim}


def _counted(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    order = mask.int().argsort(dim=-1, descending=True, stable=True)
    return tokens.gather(-2, order[..., None].expand_as(tokens)), mask.sum(-1)


@functools.cache
def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None  # searches sys.path, 50 us or more


def _package() -> Callable[..., Tensor] | None:
    return next((score for name, score in PACKAGES.items() if sys.modules.get(name) or _installed(name)), None)


def _tokens_fit(query: Tensor, documents: Tensor, query_mask: Any, document_mask: Any, dimensions: int) -> str | None:
    for x, dims, mask in ((query, 3, query_mask), (documents, dimensions, document_mask)):
        if type(x) is not Tensor or x.dim() != dims or not x.numel():
            return "the token embeddings are not padded tensors"
        if x.device.type != DEVICE:
            return "the token embeddings are not on a GPU"
        if _dtype(x) not in (torch.float16, torch.bfloat16) or _dtype(x) != _dtype(query):
            return f"the token embeddings are {x.dtype}, and the kernels compute in 16 bits"
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != x.shape[:-1]:
            return "there is no bool mask for each token"
    return None


def _dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype in which the library would multiply the tokens."""
    on = x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if on else x.dtype


@counted
def _scores(
    name: str,
    function: Callable[..., Tensor],
    queries: Tensor,
    documents: Tensor,
    queries_mask: Any = None,
    documents_mask: Any = None,
) -> Tensor:
    """Returns the scores of `function`, from the kernels if the tensors fit."""
    compared, mean = KNOWN[function]
    why_not = _tokens_fit(queries, documents, queries_mask, documents_mask, 3 if compared == "pairs" else 4)
    package = _package()
    if package is None or not runs_fused(name, why_not):
        return function(queries, documents, queries_mask=queries_mask, documents_mask=documents_mask)
    x, y, mask = queries.to(_dtype(queries)), documents.to(_dtype(documents)), documents_mask
    if compared == "all":
        y, mask = y.flatten(0, 1), mask.flatten(0, 1)
    elif compared == "pairs":
        y, mask = y[:, None], mask[:, None]
    scores = package(x, y, queries_mask, mask).float()
    empty = ~mask.any(-1)
    scores = torch.where(empty[None] if compared == "all" else empty, EMPTY, scores)
    if mean:
        scores = scores / queries_mask.sum(-1, keepdim=True).clamp(min=1)
    return scores[:, 0] if compared == "pairs" else scores


def _routed(loss: Any, method: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Runs the library's `method` on a copy of `loss` with its score function replaced."""
    if disabled():
        return method(loss, *args, **kwargs)
    name = f"sentence_transformers.{type(loss).__name__}"
    function = next((known for known in KNOWN if known is loss.similarity_fct), None)
    why_not = "its score function is not one of MaxSim's" if function is None else None
    if _package() is None:
        why_not = "neither late-interaction-kernels nor flash-maxsim is installed"
    if function is None or why_not is not None:
        runs_fused(name, why_not)
        return method(loss, *args, **kwargs)
    twin = copy.copy(loss)
    vars(twin)["similarity_fct"] = functools.partial(_scores, name, function)
    try:
        return method(twin, *args, **kwargs)
    finally:  # attributes that the call sets are kept
        vars(loss).update({key: value for key, value in vars(twin).items() if key != "similarity_fct"})


class MultiVectorMultipleNegativesRankingLoss(_MultiVectorMultipleNegativesRankingLoss):
    """The library's, without the similarities of all tokens where a kernel package is installed."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return _routed(self, _MultiVectorMultipleNegativesRankingLoss.forward, *args, **kwargs)


class CachedMultiVectorMultipleNegativesRankingLoss(_CachedMultiVectorMultipleNegativesRankingLoss):
    """The library's, without the similarities of all tokens where a kernel package is installed."""

    def calculate_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        method = _CachedMultiVectorMultipleNegativesRankingLoss.calculate_loss
        return _routed(self, method, *args, **kwargs)


class MultiVectorDistillKLDivLoss(_MultiVectorDistillKLDivLoss):
    """The library's, without the similarities of all tokens where a kernel package is installed."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return _routed(self, _MultiVectorDistillKLDivLoss.forward, *args, **kwargs)


class MultiVectorMarginMSELoss(_MultiVectorMarginMSELoss):
    """The library's, without the similarities of all tokens where a kernel package is installed."""

    def _score(self, *args: Any, **kwargs: Any) -> Tensor:
        return _routed(self, _MultiVectorMarginMSELoss._score, *args, **kwargs)
