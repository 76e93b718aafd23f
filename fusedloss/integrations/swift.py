"""The InfoNCE of ms-swift's embedding trainer, `--loss_type infonce`, without a matrix of similarities.

    from fusedloss.integrations import swift as fused

    fused.patch()       # before `sft_main(...)`; or in a file that `--external_plugins` names

The environment variables are the library's: INFONCE_TEMPERATURE, INFONCE_HARD_NEGATIVES, INFONCE_MASK_FAKE_NEGATIVE,
INFONCE_FAKE_NEG_MARGIN, INFONCE_INCLUDE_QQ and INFONCE_INCLUDE_DD. Samples with different numbers of hard negatives,
for which the library multiplies once a sample, are one product here. Tested with 4.6.0.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import masks
from ..core import checks
from ..functional import info_nce, multiple_negatives_ranking
from ._drop_in import Patch, counted, library, runs_fused
from ._fits import alike, refusal, scalar_fits

_embedding: ModuleType = library("swift.loss.embedding", "ms-swift", "4.6.0")

from swift.loss.mapping import loss_map  # noqa: E402
from swift.utils import get_dist_setting  # noqa: E402
from transformers.utils import strtobool  # noqa: E402

_InfonceLoss: Any = loss_map["infonce"]


class Setting(NamedTuple):
    """What the library reads from the environment at every call."""

    temperature: float
    use_batch: bool
    hard_negatives: int | None
    masks: bool
    margin: float
    queries: bool
    documents: bool

    @classmethod
    def read(cls) -> Setting:
        def flag(name: str, default: str) -> bool:
            return bool(strtobool(os.environ.get(f"INFONCE_{name}", default)))

        count = os.environ.get("INFONCE_HARD_NEGATIVES")
        return cls(
            float(os.environ.get("INFONCE_TEMPERATURE", "0.1")),
            flag("USE_BATCH", "True"),
            None if count is None else int(count),
            flag("MASK_FAKE_NEGATIVE", "False"),
            float(os.environ.get("INFONCE_FAKE_NEG_MARGIN", "0.1")),
            flag("INCLUDE_QQ", "False"),
            flag("INCLUDE_DD", "False"),
        )


def _why_not(loss: Any, x: Any, labels: Any, setting: Setting) -> str | None:
    if not alike(x):
        return refusal(checks.embeddings, sentences=x) or "its sentences are no matrix"
    if type(labels) is not Tensor or labels.dim() != 1:
        return "its labels are no vector"
    if not setting.use_batch:
        return "INFONCE_USE_BATCH is false: a query is compared with its own documents alone"
    if getattr(loss, "is_megatron", False) or get_dist_setting()[2] > 1:
        return "its negatives are those of several processes"
    if setting.masks and setting.margin < 0:
        return "INFONCE_FAKE_NEG_MARGIN is negative, which masks the positive"
    if setting.documents and setting.queries and setting.masks:
        return "INFONCE_MASK_FAKE_NEGATIVE masks queries, but no documents of INFONCE_INCLUDE_DD"
    return scalar_fits("temperature", setting.temperature, x, positive=True)


class InfonceLoss(_InfonceLoss):
    """ms-swift's InfoNCE, by `fusedloss.info_nce`; with INFONCE_INCLUDE_DD by `multiple_negatives_ranking`."""

    @counted
    def __call__(self, outputs: Any, labels: Tensor, **kwargs: Any) -> Tensor:
        setting, x = Setting.read(), outputs["last_hidden_state"]
        why_not, samples = _why_not(self, x, labels, setting), []
        if why_not is None and setting.hard_negatives is None:
            samples = _embedding._parse_multi_negative_sentences(x, labels, None)
            if not samples or min(map(len, samples)) < 2:
                why_not = "a sample has no positive"
            elif setting.documents and max(map(len, samples)) > 2:
                why_not = "INFONCE_INCLUDE_DD compares a positive with its own hard negatives"
        elif why_not is None and setting.documents:
            why_not = "INFONCE_INCLUDE_DD compares a positive with its own hard negatives"
        if not runs_fused("swift.InfonceLoss", why_not):
            found: Tensor = super().__call__(outputs, labels, **kwargs)
            return found
        if setting.hard_negatives is not None:  # drawn at random, once
            samples = _embedding._parse_multi_negative_sentences(x, labels, setting.hard_negatives)
        return _fused(samples, setting)


def _fused(samples: Sequence[Tensor], setting: Setting) -> Tensor:
    query = torch.stack([sample[0] for sample in samples])
    mask = masks.score_margin(setting.margin) if setting.masks else None
    if setting.documents:
        document = torch.stack([sample[1] for sample in samples])
        directions = ("query_to_doc", *(("query_to_query",) if setting.queries else ()), "doc_to_doc")
        scale = 1 / setting.temperature
        return multiple_negatives_ranking(
            query, document, scale=scale, similarity="dot", directions=directions, mask=mask
        )
    key, starts = torch.cat([sample[1:] for sample in samples]), [0]
    for sample in samples[:-1]:
        starts.append(starts[-1] + len(sample) - 1)
    if setting.queries:  # a query's own column is behind the documents
        own = masks.not_self(len(key))
        key, mask = torch.cat([key, query]), own if mask is None else mask & own
    target = torch.tensor(starts, device=key.device)
    return info_nce(query, key, target, temperature=setting.temperature, mask=mask)


class _InMap(Patch):
    """Also replaces the class in `loss_map`, by which trainers find it."""

    def __init__(self) -> None:
        super().__init__({_InfonceLoss: InfonceLoss})
        self._follow()

    def undo(self) -> None:
        super().undo()
        self._follow()

    @staticmethod
    def _follow() -> None:
        """Has the map hold what the module does, which knows of other patches."""
        loss_map["infonce"] = getattr(_embedding, _InfonceLoss.__name__)


def patch() -> Patch:
    """Replaces the library's class by this one, wherever it is imported and in `loss_map`; `undo()` reverts it.

    Example:
        >>> fused.patch()
        >>> sft_main(SftArguments(model=model, task_type="embedding", loss_type="infonce", dataset=dataset))
    """
    return _InMap()
