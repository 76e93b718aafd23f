"""`mine_hard_negatives` with an exact search that keeps only the best scores: the library's function with our search.

The library's function runs unchanged, with a model whose `similarity` returns a promise: `torch.topk` of the promise is
`fusedloss.search.top_k`. Any other operation computes the library's matrix. The result is a `_Ranked`, because the
library takes a second `torch.topk` of it, which must keep the order of equal scores.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from sentence_transformers import util
from sentence_transformers.util import mine_hard_negatives as library_mine_hard_negatives
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fusedloss.search import top_k

from .._drop_in import counted, disabled, runs_fused
from ._fits import MATRICES, embeddings_fit, similarity, similarity_is_known

NAME = "sentence_transformers.mine_hard_negatives"
KNOWN = {**MATRICES, util.euclidean_sim: "euclidean", util.manhattan_sim: "manhattan"}

P = ParamSpec("P")
R = TypeVar("R")


class _Ranked(Tensor):
    """Sorted scores. `torch.topk` of their rows takes the first of equal scores; torch's may take any. It returns plain
    tensors.
    """

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.topk and len(args) == 1 and set(kwargs) == {"k", "dim"} and kwargs["dim"] == 1:
            values, indices = args[0].as_subclass(Tensor).sort(dim=1, descending=True, stable=True)
            if kwargs["k"] <= values.shape[1]:
                return values[:, : kwargs["k"]], indices[:, : kwargs["k"]]
        return super().__torch_function__(function, types, args, kwargs)


class _Scores:
    """The promise of `model.similarity(query, corpus)`."""

    def __init__(self, query: Tensor, corpus: Tensor, kind: str, compute: Callable[[], Tensor]):
        self._query, self._corpus, self._kind, self._compute = query, corpus, kind, compute
        self._device = query.device

    def to(self, device: torch.device) -> _Scores:
        self._device = torch.device(device)
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._matrix(), name)

    def _matrix(self) -> Tensor:
        return self._compute().to(self._device)

    def _top_k(self, k: int) -> tuple[Tensor, Tensor]:
        """Searches on the model's device if that is a GPU; the library would search on the CPU, to which it encodes."""
        query = self._query.to(self._device) if self._device.type == "cuda" else self._query
        scores, indices = top_k(query, self._corpus, k, similarity=self._kind)
        return scores.to(self._device).as_subclass(_Ranked), indices.to(self._device)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.topk and len(args) == 1 and set(kwargs) == {"k", "dim"} and kwargs["dim"] == 1:
            if kwargs["k"] <= len(args[0]._corpus):
                return args[0]._top_k(kwargs["k"])
        args, kwargs = tree_map_only(cls, cls._matrix, (args, kwargs))
        return function(*args, **kwargs)


class _Model:
    """The model, except for `similarity`."""

    def __init__(self, model: Any):
        self._model = model
        self._runs: bool | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def similarity(self, query: Any, corpus: Any) -> Any:
        x, y = (torch.from_numpy(e) if isinstance(e, np.ndarray) and e.flags.writeable else e for e in (query, corpus))
        method = self._model.similarity
        autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        why_not = (
            similarity_is_known(method, KNOWN)
            or embeddings_fit(x, y, same_rows=False)
            or ("autocast is on" if autocast else None)
        )
        if self._runs is None or why_not is not None:  # logged, or counted once, although queries come in batches
            self._runs = runs_fused(NAME, why_not)
        if not self._runs:
            return method(query, corpus)
        kind = similarity(method, KNOWN)
        assert kind is not None
        return _Scores(x, y, kind, lambda: method(query, corpus))


def _searching(upstream: Callable[P, R]) -> Callable[P, R]:
    @counted
    def mine_hard_negatives(*args: P.args, **kwargs: P.kwargs) -> R:
        """The library's `mine_hard_negatives` with a search that keeps only the best scores, for any corpus.

        Arguments, checks, output and printing are the library's. Without FAISS it scores `faiss_batch_size` queries
        (16384) against the whole corpus at a time, a matrix of 61 GiB for a million passages; here scores are computed
        in tiles of 32 MiB, on the model's device if that is a GPU. Among equal scores the first of the corpus is mined;
        the library leaves the order open. Scores agree up to the rounding of the products. Among equal scores of a
        cross-encoder the one that the model finds nearer comes first. `corpus` may be any sequence of texts, such as a
        column of a `datasets.Dataset`; the library takes only a list.

        With `use_faiss=True` FAISS searches, as in the library. A similarity other than the library's four, or one that
        a model overrides, runs the library's search.
        """
        try:
            bound = inspect.signature(upstream).bind(*args, **kwargs)
        except TypeError:
            return upstream(*args, **kwargs)  # the library raises its own error
        if disabled():
            return upstream(*args, **kwargs)
        corpus = bound.arguments.get("corpus")
        if isinstance(corpus, Sequence) and not isinstance(corpus, str | bytes):
            bound.arguments["corpus"] = list(corpus)
        if bound.arguments.get("use_faiss"):
            runs_fused(NAME, "FAISS is asked for")
        else:
            bound.arguments["model"] = _Model(bound.arguments["model"])
        return upstream(*bound.args, **bound.kwargs)

    mine_hard_negatives.__signature__ = inspect.signature(upstream)  # type: ignore[attr-defined]
    return mine_hard_negatives


mine_hard_negatives = _searching(library_mine_hard_negatives)
