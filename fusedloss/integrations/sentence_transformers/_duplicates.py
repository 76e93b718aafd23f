"""The option `duplicates` of the ranking losses, which the library lacks: a text that the batch holds twice is no
negative of its own pair.

`forward` numbers the texts before the model may change their features, and hands the numbers on as the labels, which
these losses do not read otherwise.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedloss import masks
from fusedloss.core import checks

CHOICES = ("texts", "labels")
# Features beside the tokens that say nothing which the tokens do not, and what a model adds.
OF_TEXTS = frozenset(
    "input_ids attention_mask token_type_ids position_ids prompt_length "
    "sentence_embedding token_embeddings all_layer_embeddings".split()
)


class TextIds(tuple[Tensor, ...]):
    """A number for each text, int64 `[B]` for each column."""


def takes_duplicates(upstream: type) -> Callable[..., None]:
    """Returns the constructor of the library's class with the option `duplicates`, which is None by default."""
    theirs: Any = upstream.__init__  # type: ignore[misc]
    signature = inspect.signature(theirs)
    option = inspect.Parameter("duplicates", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="str | None")

    @functools.wraps(theirs)
    def __init__(self: Any, *args: Any, duplicates: str | None = None, **kwargs: Any) -> None:
        if duplicates is not None:
            checks.choice("duplicates", duplicates, CHOICES)
        theirs(self, *args, **kwargs)
        self.duplicates = duplicates

    parameters = [*signature.parameters.values(), option]
    __init__.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return __init__


class LeavesOutDuplicates:
    """Numbers the texts in `forward`.

    duplicates: "texts" for texts of equal tokens, which are the same text; "labels" for the data set's labels, int64
    `[B]`, equal for rows that are no negatives of each other, or `[B, columns]`, equal for equal texts.
    """

    duplicates: str | None = None  # of objects that the library's constructor has made

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Any = None) -> Tensor:
        columns = list(sentence_features)
        given = text_ids(columns) if self.duplicates == "texts" else labels
        loss: Tensor = super().forward(columns, given)  # type: ignore[misc]
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config_dict()  # type: ignore[misc]
        return config if self.duplicates is None else config | {"duplicates": self.duplicates}


def text_ids(columns: Sequence[dict[str, Any]]) -> TextIds:
    for column in columns:
        others = [name for name, x in column.items() if isinstance(x, Tensor) and name not in OF_TEXTS]
        tokens = column.get("input_ids")
        padded = isinstance(tokens, Tensor) and tokens.dim() == 2 and not tokens.is_floating_point()
        if others or not padded:
            got = ", ".join(others) or "no padded input_ids"
            raise ValueError(
                f"duplicates must be 'labels' for columns that are not padded tokens alone, got 'texts' and {got}; "
                "give the data set a label column of ids"
            )
    return TextIds(masks.text_ids(column["input_ids"], column.get("attention_mask")) for column in columns)


def ids_of(loss: Any, labels: Any, columns: Sequence[Tensor]) -> list[Tensor] | None:
    """Returns the numbers of the texts of each column of embeddings, or None without the option."""
    if loss.duplicates is None:
        return None
    if isinstance(labels, TextIds):
        return list(labels)
    if loss.duplicates != "labels":
        raise ValueError(
            f"duplicates must be 'labels' where the loss sees embeddings instead of texts, got {loss.duplicates!r}; "
            "give the data set a label column of ids"
        )
    rows = len(columns[0])
    whole = isinstance(labels, Tensor) and labels.dtype in (torch.int64, torch.int32)
    if whole and tuple(labels.shape) == (rows, len(columns)):
        return list(labels.long().unbind(1))
    if whole and labels.numel() == rows:  # of pairs: no hard negative is the row's own positive
        own = labels.reshape(-1).long()
        return [own, own, *(torch.full_like(own, torch.iinfo(torch.int64).min) for _ in columns[2:])]
    got = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else checks.a(labels)
    raise ValueError(
        f"labels must be int64 [{rows}], an id for each row, or [{rows}, {len(columns)}], an id for each text, with "
        f"duplicates='labels', got {got}; name the column of the data set 'label'"
    )
