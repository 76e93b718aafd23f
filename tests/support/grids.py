"""Parameters of the tests that are products: the devices that are there, and a part that has every pair of values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import pytest
import torch

# Without CUDA there are no parameters of "cuda" that a run would only skip: 5,000 of 23,000 tests.
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


def one_of(values: Iterable[Any]) -> list[Any]:
    """The first; the others are of the grid."""
    value, *others = values
    return [value, *(pytest.param(other, marks=pytest.mark.grid) for other in others)]


def cover(cases: Sequence[tuple[int, ...]]) -> set[int]:
    """Places of `cases` that hold, together, every pair of values of two axes that any case holds.

    Always the case with the most pairs that are still missing, the first of equals: of a x b x c ... little more than
    the product of the two longest axes is left.
    """
    if not cases or len(cases[0]) < 2:
        return set(range(len(cases)))
    pairs = [set(combinations(enumerate(case), 2)) for case in cases]
    missing = set().union(*pairs)
    taken: set[int] = set()
    while missing:
        best = max(range(len(cases)), key=lambda place: len(pairs[place] & missing))
        taken.add(best)
        missing -= pairs[best]
    return taken
