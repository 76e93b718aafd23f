"""Memory as growth between two sizes, in a process of its own: no library's start, and no other test's leavings.

growth(peak, *arguments, sizes=(64, 8192))    # peak(*arguments, 8192) - peak(*arguments, 64), bytes
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from patience import seconds

from fusedloss.bench import measure

MIB = 2**20
# One heap, and what is freed goes back at once: else a peak has what the allocator keeps, up to 32 MiB a block.
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


def measured(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test of peaks; a CPU's can be reset on Linux only."""
    skip = pytest.mark.skipif(sys.platform != "linux", reason="a CPU's peak can be reset on Linux only")
    return pytest.mark.memory(skip(test))


def growth(peak: Callable[..., int], *arguments: object, sizes: tuple[int, int]) -> int:
    """`peak` must be a module's, so that another process finds it."""
    small, large = at_sizes(peak, *arguments, sizes=sizes)
    return large - small


def at_sizes(peak: Callable[..., int], *arguments: object, sizes: tuple[object, ...]) -> list[int]:
    """The peaks themselves, of which differences count. A size is what `peak` takes for one."""
    with mock.patch.dict(os.environ, ENVIRONMENT):
        return measure.isolated(_peaks, peak, arguments, sizes, timeout=seconds(3600))


def _peaks(peak: Callable[..., int], arguments: tuple[object, ...], sizes: tuple[object, ...]) -> list[int]:
    torch.set_num_threads(1)
    peak(*arguments, sizes[0])  # loads what a first step loads
    return [peak(*arguments, size) for size in sizes]
