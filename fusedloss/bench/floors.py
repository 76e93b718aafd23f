"""The floor: the time of the bare products that a gradient needs, in the chunks of a sweep."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..core import products
from . import measure

FLOORS = FLOOR, BETTER = "floor", "better floor"


def floors(x: Tensor, y: Tensor, rows: int, counts: Sequence[int] = (1, 1, 1)) -> dict[str, Callable[[], None]]:
    """Steps of the products S = x y^T, dx = S y and dy += S^T x, each `counts` times, for `rows` of x at a time.

    `floor` takes torch.mm. For fp32 on a CPU `better floor` takes, for each of the three, what is faster on one chunk:
    MKL or oneDNN, which adds as many terms at a time as the sweep would let it. dy accumulates in fp32.
    """

    def calls(chunk: Tensor, s: Tensor, dx: Tensor, dy: Tensor) -> list[Callable[[int], None]]:
        return [
            lambda terms: products.mm(s, chunk, y.T, terms),
            lambda terms: products.mm(dx, s, y, terms),
            lambda terms: products.add_mm(dy, s.T, chunk, terms),
        ]

    def space() -> tuple[Tensor, Tensor, Tensor]:
        return x.new_empty(rows, len(y)), torch.empty_like(x), torch.zeros(y.shape, device=y.device)

    def step(terms: Sequence[int]) -> None:
        s, dx, dy = space()
        for start in range(0, len(x), rows):
            chunk = x[start : start + rows]
            part = calls(chunk, s[: len(chunk)], dx[start : start + rows], dy)
            for call, kind, times in zip(part, terms, counts, strict=True):
                for _ in range(times):
                    call(kind)

    @functools.cache
    def better() -> list[int]:
        s, dx, dy = space()
        chunk = x[:rows]
        part = calls(chunk, s[: len(chunk)].zero_(), dx[: len(chunk)], dy)
        seconds = {
            terms: [min(measure.seconds(functools.partial(call, terms)) for _ in range(4)) for call in part]
            for terms in (0, products.TERMS)
        }
        return [min(seconds, key=lambda terms: seconds[terms][kind]) for kind in range(len(part))]

    found: dict[str, Callable[[], None]] = {FLOOR: lambda: step([0, 0, 0])}
    if x.device.type == "cpu" and x.dtype == torch.float32:
        found[BETTER] = lambda: step(better())
    return found
