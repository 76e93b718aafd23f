"""Pairs of documents, visited in blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.numerics import slices
from .common import BLOCK

ROWS = 32, 128  # of a block, least and most: larger blocks waste more pairs below the diagonal
ONE_BLOCK = 64  # documents of a query that always form one block


class Pairs(NamedTuple):
    """A block of pairs (i, j): i in `rows`, and j in `columns`, the rows and all documents after them."""

    queries: slice
    rows: slice
    columns: slice
    workspace: Sequence[Tensor]  # [queries, rows, columns] each
    whole: bool  # whether the block has all pairs

    def difference(self, x: Tensor, out: Tensor) -> Tensor:
        """x_j - x_i"""
        if self.whole:
            return torch.sub(x.unsqueeze(1), x.unsqueeze(2), out=out)  # takes a third of the time of slices
        return torch.sub(x[self.queries, None, self.columns], x[self.queries, self.rows, None], out=out)

    def square(self, block: Tensor) -> Tensor:
        return block[..., : block.shape[1]]

    def add_odd(self, total: Tensor, value: Tensor) -> None:
        """Adds value_ij to total_i and subtracts it from total_j. The square holds value_ji = -value_ij, too."""
        if self.whole:
            total.add_(value.sum(2))
            return
        total[self.queries, self.rows].add_(value.sum(2))
        if self.columns.stop > self.rows.stop:
            total[self.queries, self.rows.stop :].sub_(value[..., value.shape[1] :].sum(1))


def pairs(z: Tensor, top: int, buffers: int) -> Iterator[Pairs]:
    """Yields blocks that together have every pair i < j with i among the `top`."""
    Q, n = z.shape
    block = BLOCK.get(z.device.type, BLOCK["cuda"])
    if n <= ONE_BLOCK and Q * n * n <= block:
        room = z.new_empty(buffers, Q, top, n)
        yield Pairs(slice(0, Q), slice(0, top), slice(0, n), room.unbind(), top == n)
        return
    height = n if n <= ONE_BLOCK else min(n, max(ROWS[0], min(ROWS[1], block // max(Q * n, 1))))
    batch = max(1, block // max(height * n, 1))
    room = z.new_empty(buffers, min(batch, Q) * min(height, top) * n)
    for rows in slices(top, height):
        start = rows.start
        for queries in slices(Q, batch):
            shape = queries.stop - queries.start, rows.stop - start, n - start
            workspace = [flat[: math.prod(shape)].view(shape) for flat in room]
            yield Pairs(queries, rows, slice(start, n), workspace, False)
