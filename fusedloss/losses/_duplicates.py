"""Which texts of a batch are the same: the option `ids` of the ranking losses, as a comparison for each block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..core import checks
from ..core.mask import Compare, Mask

NO_ID = torch.iinfo(torch.int64).min  # of a document without an anchor


def check_ids(ids: Sequence[Tensor] | None, columns: Mapping[str, Tensor]) -> None:
    """Checks for one id for each row of each of `columns`."""
    if ids is None:
        return
    checks.sequence("ids", ids, "int64 tensors", "(anchor_ids, positive_ids)")
    if len(ids) != len(columns):
        raise ValueError(
            f"ids must hold {len(columns)} tensors, one for each of {', '.join(columns)}, got {len(ids)}; "
            "masks.text_ids makes them"
        )
    for number, (own, x) in enumerate(zip(ids, columns.values(), strict=True)):
        checks.integers(f"ids[{number}]", own, (len(x),), x)


def without_duplicates(ids: Sequence[Tensor] | None, rows: int, columns: int) -> list[Mask]:
    """Returns what each row may compete with among the anchors, the positives, and each column of negatives.

    Anchors and positives are dropped if either text of their pair has the id of the row's; negatives with the id of the
    row's positive. Negatives of an equal anchor stay: they are negatives of both.

    columns: of masks to return, as many as there are embeddings.
    """
    if ids is None:
        return [Mask()] * columns
    anchor, positive, *negatives = (x.detach() for x in ids)
    own_anchor, own_positive = anchor[:rows], positive[:rows]
    pairs = min(len(anchor), len(positive))
    alone = anchor.new_full((len(positive) - pairs,), NO_ID)
    owner = torch.cat([anchor[:pairs], alone]) if len(alone) else anchor[:pairs]
    return [
        Mask((Compare(own_anchor, anchor[:pairs], False), Compare(own_positive, positive[:pairs], False))),
        Mask((Compare(own_anchor, owner, False), Compare(own_positive, positive, False))),
        *(Mask((Compare(own_positive, x, False),)) for x in negatives),
    ]
