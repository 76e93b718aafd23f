"""Red zones and poison around what is allocated on a device while a case runs.

    zones = Zones(device)
    with zones:
        run()
    beside = zones.written()  # None, or where something was written that nobody had asked for

Each tensor that torch hands out lies between two red zones; what was not to be filled with a number is poisoned: NaN,
or the largest integer. A kernel that reads what nobody wrote, or beyond a tensor's end, so computes NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ZONE = 16384  # bytes on either side: 20 rows of a workspace of 391 columns in 16 bits; whole units of any alignment
# The bytes FE FF FF FF: NaN in bf16, fp16 and fp32, so that what is read there shows, and what no kernel writes.
PATTERN = -2
WORD = 4

_aten = torch.ops.aten
EMPTY = frozenset(
    (
        _aten.empty.memory_format,
        _aten.empty_strided.default,
        _aten.empty_like.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
    )
)
FILLED = frozenset(
    (
        _aten.zeros.default,
        _aten.zeros_like.default,
        _aten.new_zeros.default,
        _aten.ones.default,
        _aten.ones_like.default,
        _aten.new_ones.default,
        _aten.full.default,
        _aten.full_like.default,
        _aten.new_full.default,
    )
)


class _Zoned(NamedTuple):
    before: Tensor  # int32
    behind: Tensor  # uint8
    phase: int  # of the pattern where `behind` starts
    what: str


class Zones(TorchDispatchMode):
    """The allocations on `device` while it is entered, also by autograd's threads; it may be entered again."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.zoned = device, list[_Zoned]()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func not in EMPTY and func not in FILLED:
            return found
        if found.device.type != self.device.type or not found.numel() or found.layout != torch.strided:
            return found
        out = self.between(found.shape, found.stride(), found.dtype)
        return out.copy_(found) if func in FILLED else out

    def holding(self, x: Tensor) -> Tensor:
        """A copy of `x`, of its strides, between zones; what lies between its rows is poison."""
        return self.between(x.shape, x.stride(), x.dtype).copy_(x)

    def between(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A poisoned tensor between zones."""
        span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        bytes_ = span * dtype.itemsize
        words = torch.full((2 * ZONE // WORD + -(-bytes_ // WORD),), PATTERN, dtype=torch.int32, device=self.device)
        memory = words.view(torch.uint8)
        own = memory[ZONE : ZONE + bytes_].view(dtype)
        own.fill_(_poison(dtype))
        behind = memory[ZONE + bytes_ : 2 * ZONE + bytes_]
        what = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
        self.zoned.append(_Zoned(words[: ZONE // WORD], behind, bytes_ % WORD, what))
        return own.as_strided(shape, stride)

    def written(self) -> str | None:
        """Where a zone was written to. Reads values back: it waits for the device."""
        if not self.zoned:
            return None
        expected = _expected(self.device)
        touched = [
            torch.stack([(z.before != PATTERN).any(), (z.behind != expected[z.phase :][:ZONE]).any()])
            for z in self.zoned
        ]
        for zoned, (before, behind) in zip(self.zoned, torch.stack(touched).tolist(), strict=True):
            if before or behind:
                return f"written {'before the start' if before else 'behind the end'} of {zoned.what}"
        return None


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max


@functools.cache
def _expected(device: torch.device) -> Tensor:
    return torch.full((ZONE // WORD + 1,), PATTERN, dtype=torch.int32, device=device).view(torch.uint8)
