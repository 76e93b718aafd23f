"""Which texts of a batch are the same: the option `ids` of the ranking losses, as a comparison for each block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..core import checks
from ..core.mask import Compare, Mask

NO_ID = torch.iinfo(torch.int64).min  # of a document without an anchor


def check_ids(ids: Sequence[Tensor] | None, columns: Mapping[str, Tensor]) -> None:
    """Checks for one id for each row of each of `columns`; the first may have one for the anchor of each positive."""
    if ids is None:
        return
    checks.sequence("ids", ids, "int64 tensors", "(anchor_ids, positive_ids)")
    if len(ids) != len(columns):
        raise ValueError(
            f"ids must hold {len(columns)} tensors, one for each of {', '.join(columns)}, got {len(ids)}; "
            "masks.text_ids makes them"
        )
    anchor, positive, *_ = columns.values()
    for number, (own, x) in enumerate(zip(ids, columns.values(), strict=True)):
        of_positives = not number and isinstance(own, Tensor) and tuple(own.shape) == (len(positive),)
        checks.integers(f"ids[{number}]", own, (len(positive if of_positives else x),), anchor)


def without_duplicates(ids: Sequence[Tensor] | None, rows: int, owners: int, columns: int) -> list[Mask]:
    """Returns what each row may compete with among the anchors, the positives, and each column of negatives.

    Anchors and positives are dropped if either text of their pair has the id of the row's; negatives with the id of the
    row's positive. Negatives of an equal anchor stay: they are negatives of both.

    owners: how many anchors there are, the rows' own first. columns: how many embeddings, and masks to return.
    """
    if ids is None:
        return [Mask()] * columns
    anchor, positive, *negatives = (x.detach() for x in ids)
    own_anchor, own_positive = anchor[:rows], positive[:rows]
    alone = anchor.new_full((max(len(positive) - len(anchor), 0),), NO_ID)
    owner = torch.cat([anchor, alone]) if len(alone) else anchor
    anchor, answer = anchor[:owners], positive[:owners]
    return [
        Mask((Compare(own_anchor, anchor, False), Compare(own_positive, answer, False))),
        Mask((Compare(own_anchor, owner, False), Compare(own_positive, positive, False))),
        *(Mask((Compare(own_positive, x, False),)) for x in negatives),
    ]
