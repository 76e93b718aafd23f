"""Which of the backends with kernels of their own goes first: the one that was faster at the nearest point raced.

fastest.json is written by benchmarks/fastest.py from a race on a GPU; empty until one has run it.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import torch

from ..problem import Problem
from ..rows import tf32
from .shared import can_exp

KERNELS = ("cuda", "triton")
KINDS = (("one direction", "one direction, bounded"), ("both directions", "both directions, bounded"))
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def order(names: tuple[str, ...], problem: Problem) -> tuple[str, ...]:
    """`names` with the faster of KERNELS in the place of the first of them; as they are where nothing was raced."""
    # Under torch.compile sizes may be symbols, and every comparison of one would be a guard.
    if torch.compiler.is_compiling() or not _table():
        return names
    y = problem.operands[problem.blocks[0].key]  # a block is a launch
    return _order(names, y.get_device(), _precision(y.dtype), kind(problem), y.shape)


def kind(problem: Problem) -> str | None:
    """What the race tells apart. Masks and further blocks were not raced: they go with their kind; a fold has none."""
    if problem.fold is not None:
        return None
    return KINDS[problem.symmetric][can_exp(problem)]


@functools.lru_cache(maxsize=1024)
def _order(names: tuple[str, ...], device: int, dtype: str, kind: str | None, shape: torch.Size) -> tuple[str, ...]:
    faster = _faster(_capability(device), dtype, kind, *shape)
    if faster is None:
        return names
    both = iter(sorted(KERNELS, key=lambda name: name != faster))
    return tuple(next(both) if name in KERNELS else name for name in names)


def _faster(capability: list[int], dtype: str, kind: str | None, N: int, D: int) -> str | None:
    """At the nearest point raced, by ratio."""
    found = [e for e in _table() if (e["capability"], e["dtype"], e["kind"]) == (capability, dtype, kind)]
    if not found:
        return None
    off = lambda entry: abs(math.log(entry["N"] / max(N, 1))) + abs(math.log(entry["D"] / D))
    return min(found, key=off)["backend"]


def _capability(device: int) -> list[int]:
    return [*torch.cuda.get_device_capability(device)]


def _precision(dtype: torch.dtype) -> str:
    """As the race names it: it multiplies fp32 in full."""
    if dtype == torch.float32 and tf32():
        return "tf32"
    return NAMES.get(dtype, "")


@functools.cache
def _table() -> list[dict]:
    return json.loads((Path(__file__).parent / "fastest.json").read_text())
