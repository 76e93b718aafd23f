"""Red zones and poison around memory that is allocated on a device while a case runs.

    zones = Zones(device)
    with zones:
        run()
    beside = zones.written()  # None, or where something was written that nobody had asked for

Each tensor that torch allocates is between two red zones. Memory that is not filled with a number is poisoned: NaN, or
the largest integer. So a kernel that reads unwritten memory, or beyond a tensor's end, computes NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ZONE = 16384  # bytes on either side: 20 rows of a workspace of 391 columns in 16 bits; whole units of any alignment
# 16-bit values of zones: NaN in bf16, fp16 and, in pairs, fp32, so that reading them shows. Each zone starts at a
# different one: CPU arithmetic keeps a NaN's payload, so a value read from one zone and written to another would
# otherwise be unnoticed.
LOWEST, HIGHEST, STARTS = -63, -1, 512  # 0xFFC1 to 0xFFFE

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
    before: Tensor  # bytes
    behind: Tensor
    expected: Tensor  # of both
    what: str


class Zones(TorchDispatchMode):
    """Context that wraps allocations on `device`, also by autograd's threads; it may be entered again."""

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
        """Returns a copy of `x` between zones, with its strides; gaps between its rows are poison."""
        return self.between(x.shape, x.stride(), x.dtype).copy_(x)

    def between(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Returns a poisoned tensor between zones."""
        span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        end = ZONE + span * dtype.itemsize
        memory = torch.empty(end + ZONE, dtype=torch.uint8, device=self.device)
        start = 2 * (181 * len(self.zoned) % STARTS)
        expected = _pattern(self.device)[start : start + ZONE]
        before, behind = memory[:ZONE].copy_(expected), memory[end:].copy_(expected)
        self.zoned.append(_Zoned(before, behind, expected, f"{str(dtype).removeprefix('torch.')} {list(shape)}"))
        return memory[ZONE:end].view(dtype).fill_(_poison(dtype)).as_strided(shape, stride)

    def written(self) -> str | None:
        """Returns where a zone was written to, or None. Reads values back, so it waits for the device."""
        if not self.zoned:
            return None
        touched = [torch.stack([(z.before != z.expected).any(), (z.behind != z.expected).any()]) for z in self.zoned]
        for zoned, (before, behind) in zip(self.zoned, torch.stack(touched).tolist(), strict=True):
            if before or behind:
                return f"written {'before the start' if before else 'behind the end'} of {zoned.what}"
        return None


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max


@functools.cache
def _pattern(device: torch.device) -> Tensor:
    """Returns bytes for a zone that starts at any of STARTS values."""
    generator = torch.Generator().manual_seed(0)
    halves = torch.randint(LOWEST, HIGHEST, (ZONE // 2 + STARTS,), generator=generator, dtype=torch.int16)
    return halves.view(torch.uint8).to(device)
