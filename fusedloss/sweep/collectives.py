"""What ranks hand each other: rows of all of them, sums of gradients, merged column sums. Plain torch.distributed.

Every rank sees the rows of all ranks in an order of its own: its own first, then those of the next rank and so on
around. The order of columns does not matter to a loss, and so row i's own column is column i on every rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.numerics import stats_dtype
from ..core.problem import Ranks
from ..core.strips import RowSums

# Their names since torch 2.13; before, the same functions had others.
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


def group_of(ranks: Ranks) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(ranks.group)  # type: ignore[arg-type]


def gather(x: Tensor, ranks: Ranks) -> Tensor:
    """Returns `[N, ...]`, the rows of all ranks, this one's first."""
    sizes = ranks.sizes
    if len(sizes) == 1:
        return x
    most = max(sizes)
    padded = x.contiguous() if len(x) == most else torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
    found = x.new_empty(len(sizes) * most, *x.shape[1:])
    _ALL_GATHER(found, padded, group=group_of(ranks))
    parts = [found[rank * most :][: sizes[rank]] for rank in ring_order(ranks)]
    return torch.cat(parts)


def scatter(x: Tensor, ranks: Ranks) -> Tensor:
    """The other way: `x` is `[N, ...]`, this rank's rows first; the sum over ranks of what each has for this rank.

    16-bit numbers are summed in fp32: a sum in 16 bits would round once for every rank.
    """
    sizes = ranks.sizes
    if len(sizes) == 1:
        return x
    most = max(sizes)
    padded = x.new_zeros(len(sizes), most, *x.shape[1:], dtype=stats_dtype(x.dtype))
    start = 0
    for rank in ring_order(ranks):
        padded[rank, : sizes[rank]] = x[start : start + sizes[rank]]
        start += sizes[rank]
    found = padded.new_empty(most, *x.shape[1:])
    _REDUCE_SCATTER(found, padded.flatten(0, 1), group=group_of(ranks))
    return found[: sizes[ranks.rank]].to(x.dtype)


def ring_order(ranks: Ranks) -> list[int]:
    """The ranks in the order in which this one sees them."""
    count = len(ranks.sizes)
    return [(ranks.rank + step) % count for step in range(count)]


def total(x: Tensor, ranks: Ranks) -> Tensor:
    """The sum over ranks, a tensor of its own."""
    x = x.clone()
    if len(ranks.sizes) > 1:
        dist.all_reduce(x, group=group_of(ranks))
    return x


def merge_columns(sums: RowSums, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Shift and total of each column over all rows of all ranks, from those of each rank's; in this rank's order."""
    assert isinstance(sums.shift, Tensor)
    if len(ranks.sizes) == 1:
        return sums.shift, sums.total
    offset, group = ranks.offset, group_of(ranks)
    shift = sums.shift.masked_fill(sums.total == 0, -torch.inf).roll(offset)
    own, part = shift.clone(), sums.total.roll(offset)
    dist.all_reduce(shift, dist.ReduceOp.MAX, group=group)
    shift = shift.masked_fill(shift == -torch.inf, 0)
    part = torch.where(part == 0, part, part * (own - shift).exp())
    dist.all_reduce(part, group=group)
    return shift.roll(-offset), part.roll(-offset)
