"""The InfoNCE of ms-swift's embedding trainer, `--loss_type infonce`, without a matrix of similarities.

    from fusedloss.integrations import swift as fused

    fused.patch()       # before `sft_main(...)`; or in a file that `--external_plugins` names

The environment variables are the library's: INFONCE_TEMPERATURE, INFONCE_HARD_NEGATIVES, INFONCE_MASK_FAKE_NEGATIVE,
INFONCE_FAKE_NEG_MARGIN, INFONCE_INCLUDE_QQ and INFONCE_INCLUDE_DD. Samples with different numbers of hard negatives,
for which the library multiplies once a sample, are one product here. Across processes each computes its own queries'
rows against the texts of all, and not the rows of all. Tested with 4.6.0.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import masks
from ..core import checks
from ..functional import info_nce, multiple_negatives_ranking
from ._drop_in import Patch, counted, library, runs_fused
from ._fits import alike, refusal, scalar_fits

_embedding: ModuleType = library("swift.loss.embedding", "ms-swift", "4.6.0")

from swift.loss.mapping import loss_map  # noqa: E402
from swift.sequence_parallel import sequence_parallel  # noqa: E402
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
    if not _of_the_default_group(loss):
        return "its processes are Megatron's, or those of a parallel sequence"
    if setting.masks and setting.margin < 0:
        return "INFONCE_FAKE_NEG_MARGIN is negative, which masks the positive"
    if setting.documents and setting.queries and setting.masks:
        return "INFONCE_MASK_FAKE_NEGATIVE masks queries, but no documents of INFONCE_INCLUDE_DD"
    return scalar_fits("temperature", setting.temperature, x, positive=True)


def _why_not_samples(samples: Sequence[Tensor], setting: Setting, across: bool) -> str | None:
    """Of the texts of each sample: its query, its positive and its hard negatives."""
    numbers, kept = [len(sample) - 2 for sample in samples], setting.hard_negatives
    if kept is not None:
        if setting.documents:
            return "INFONCE_INCLUDE_DD compares a positive with its own hard negatives"
        if across and min(numbers, default=0) < kept:
            return "INFONCE_HARD_NEGATIVES draws texts again, on each process those of all"
        return None
    if not samples or min(numbers) < 0:
        return "a sample has no positive"
    if setting.documents and max(numbers) > 0:
        return "INFONCE_INCLUDE_DD compares a positive with its own hard negatives"
    return None


def _of_the_default_group(loss: Any) -> bool:
    """Whether the processes that share a batch, if there are several, are all of torch's."""
    if getattr(loss, "is_megatron", False) or getattr(sequence_parallel, "dp_group", None) is not None:
        return False
    return get_dist_setting()[2] <= 1 or (dist.is_available() and dist.is_initialized())


def _why_not_anywhere(why_not: str | None, x: Any) -> str | None:
    """Returns the reason of this process, or that another has one: all run the library's code, or none."""
    against = torch.tensor(why_not is not None, dtype=torch.int32, device=getattr(x, "device", "cpu"))
    dist.all_reduce(against, dist.ReduceOp.MAX)
    return why_not or ("another process runs it" if int(against) else None)


class InfonceLoss(_InfonceLoss):
    """ms-swift's InfoNCE, by `fusedloss.info_nce`; with INFONCE_INCLUDE_DD by `multiple_negatives_ranking`."""

    @counted
    def __call__(self, outputs: Any, labels: Tensor, **kwargs: Any) -> Tensor:
        setting, x = Setting.read(), outputs["last_hidden_state"]
        across = get_dist_setting()[2] > 1 and setting.use_batch and _of_the_default_group(self)
        why_not, samples = _why_not(self, x, labels, setting), []
        if why_not is None:
            samples = _embedding._parse_multi_negative_sentences(x, labels, None)
            why_not = _why_not_samples(samples, setting, across)
        if across:
            why_not = _why_not_anywhere(why_not, x)
        if not runs_fused("swift.InfonceLoss", why_not):
            found: Tensor = super().__call__(outputs, labels, **kwargs)
            return found
        if setting.hard_negatives is not None:  # drawn at random, once
            samples = _embedding._parse_multi_negative_sentences(x, labels, setting.hard_negatives)
        return _fused(samples, setting, {"group": "world"} if across else {})


def _fused(samples: Sequence[Tensor], setting: Setting, across: dict[str, Any]) -> Tensor:
    """across: the options by which the texts of all processes compete; the gradient is then the library's, too."""
    query, positive = (torch.stack([sample[i] for sample in samples]) for i in (0, 1))
    mask = masks.score_margin(setting.margin) if setting.masks else None
    if setting.documents:
        directions = ("query_to_doc", *(("query_to_query",) if setting.queries else ()), "doc_to_doc")
        options: dict[str, Any] = {"scale": 1 / setting.temperature, "similarity": "dot", "directions": directions}
        return multiple_negatives_ranking(query, positive, mask=mask, **options, **across)
    key = torch.cat([positive, *(sample[2:] for sample in samples)])
    if setting.queries:  # all queries compete but the row's own, which has its number
        first = dist.get_rank() << 32 if across else 0
        own = torch.arange(len(query), device=query.device) + first
        others = masks.same_id(own, torch.cat([torch.full((len(key),), -1, device=query.device), own]))
        key, mask = torch.cat([key, query]), others if mask is None else mask & others
    return info_nce(query, key, temperature=setting.temperature, mask=mask, **across)


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
