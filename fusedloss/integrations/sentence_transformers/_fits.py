"""The questions before each call of the library's losses: are the embeddings, the similarity and the hooks known?

Each function returns None, or a reason worded to follow "because". Then the library's code runs, and raises its own
errors.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sentence_transformers import util
from sentence_transformers.base.losses.merged_forward import column_merging_disabled
from torch import Tensor, nn

from fusedloss.core import checks

from .._drop_in import library_is_faster, runs_fused
from .._fits import alike, refusal, untouched

MATRICES = {util.cos_sim: "cos", util.pytorch_cos_sim: "cos", util.dot_score: "dot"}
PAIRS = {
    util.pairwise_cos_sim: "cos",
    util.pairwise_dot_score: "dot",
    util.pairwise_euclidean_sim: "euclidean",
    util.pairwise_manhattan_sim: "manhattan",
    util.pairwise_angle_sim: "angle",
}


def fused(loss: nn.Module, why_not: str | None) -> bool:
    """Whether this call of `loss` runs fused code. Counts it, or warns of the reason once.

    Raises where only the library's code could run and the loss has an option that the library lacks.
    """
    if runs_fused(f"sentence_transformers.{type(loss).__name__}", why_not):
        return True
    duplicates = getattr(loss, "duplicates", None)
    if duplicates is not None:
        raise ValueError(
            f"duplicates must be None where the library's own code runs, because {why_not or 'FUSEDLOSS_DISABLE=1'}, "
            f"got {duplicates!r}; leave it out or remove the reason"
        )
    return False


def few(loss: nn.Module, columns: Sequence[Any], *, rows: bool = False) -> bool:
    """Whether the columns are so small that the library's code is the faster: by their elements, or `rows` squared."""
    x = columns[0] if columns else None
    number = None if rows or not isinstance(x, Tensor) else x.numel()
    return library_is_faster(f"sentence_transformers.{type(loss).__name__}", x, number)


def similarity(function: Any, known: dict[Any, str]) -> str | None:
    """Returns the name of a similarity that is one of the library's functions, or a model's method that calls one."""
    model = getattr(function, "__self__", None)
    if isinstance(model, nn.Module) and type(function.__func__).__name__ == "function":
        method = function.__func__
        if method.__module__.startswith("sentence_transformers.") and method.__name__ in (
            "similarity",
            "similarity_pairwise",
        ):
            model.similarity_fn_name  # noqa: B018  # the library sets the function when this is first read
            function = getattr(model, f"_{method.__name__}")
    for own, name in known.items():  # not known.get: a function of the user's may have any __eq__
        if own is function:
            return name
    return None


def similarity_is_known(function: Any, known: dict[Any, str]) -> str | None:
    if similarity(function, known) is None:
        return f"its similarity is none of {', '.join(sorted({own.__name__ for own in known}))}"
    return None


def embeddings_fit(*embeddings: Tensor, same_rows: bool = True) -> str | None:
    """Checks for dense matrices [rows, D] of one dtype, device and D, with at least one row; no subclass of Tensor."""
    if alike(*embeddings, same_rows=same_rows):
        return None
    for x in embeddings:
        if type(x) not in (Tensor, nn.Parameter):
            return f"an embedding is a {type(x).__name__}"
    reason = refusal(checks.embeddings, **{f"embeddings[{number}]": x for number, x in enumerate(embeddings)})
    if reason is not None:
        return reason
    if not all(x.numel() for x in embeddings):
        return "there are no embeddings"
    if len({x.dtype for x in embeddings}) > 1:  # which autocast would cast to one
        return "the embeddings are of different dtypes"
    if same_rows and len({len(x) for x in embeddings}) > 1:
        return "the embeddings have different numbers of rows"
    return None


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
NUMBERS = (*checks.FLOATING, *INTEGERS)


def labels_fit(labels: Any, rows: int, dtypes: tuple[torch.dtype, ...] = (*NUMBERS, torch.bool)) -> str | None:
    """Checks for one label per row."""
    if not isinstance(labels, Tensor) or labels.layout != torch.strided:
        return "the labels are not a dense tensor"
    if labels.numel() != rows:
        return "there is not one label for each row"
    if labels.dtype not in dtypes:
        return f"the labels are {labels.dtype}"
    return None


def flat(labels: Tensor) -> Tensor:
    """Returns labels of which there is one per row, `[rows]`; a view takes 2 us, a question none."""
    return labels if labels.dim() == 1 else labels.reshape(-1)


def number_fits(name: str, value: Any, *, positive: bool = False, tensor: bool = False) -> str | None:
    """Checks for a finite number; `tensor`: or a learnable one, which is positive."""
    if (type(value) is float or type(value) is int) and (0 if positive else -math.inf) < value < math.inf:
        return None
    if tensor and isinstance(value, Tensor):
        return refusal(checks.scalar, name, value, None, positive=True)
    reason = refusal(checks.number, name, value)
    return reason or (f"{name} is not positive" if positive and not value > 0 else None)


def linear_fits(module: Any, name: str) -> str | None:
    """Checks that a layer whose parameters the fused code reads is torch's, with plain parameters and without hooks."""
    if not untouched(module, nn.Linear):
        return f"its {name} is not torch's nn.Linear, or has hooks"
    if any(type(p) not in (Tensor, nn.Parameter) for p in (module.weight, module.bias) if p is not None):
        return f"its {name} is a {type(module.weight).__name__}"
    return None


def autocast_off(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Disables autocast, for losses that the library computes in the embeddings' dtype or in fp32."""
    if not torch.is_autocast_enabled(x.device.type):  # entering and leaving it takes 15 us
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def replay(
    loss: nn.Module,
    forward: Callable[..., Any],
    models: dict[str, list[Tensor]],
    labels: Any,
    **attributes: Any,
) -> Any:
    """Runs the library's `forward` on computed embeddings: `models[attribute]` holds those of one model.

    For losses whose score stage is not a separate method. The twin has all that the loss has, but finds the embeddings
    where it looks for a model: an entry of __dict__ is found before a module. copy.copy of a module, and a module in
    the model's place, would take 50 us more.
    """
    twin = object.__new__(type(loss))
    given = {name: functools.partial(_given, name) for name in models}
    vars(twin).update(vars(loss) | given | attributes)
    columns = [dict(zip(models, row, strict=True)) for row in zip(*models.values(), strict=True)]
    with column_merging_disabled():
        return forward(twin, columns, labels)


def _given(name: str, features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stands in for a model whose embeddings are there."""
    return {"sentence_embedding": features[name]}
