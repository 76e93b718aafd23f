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


def cover(cases: Sequence[tuple[int, ...]], strength: int = 2, beside: Iterable[int] = ()) -> set[int]:
    """Places of `cases` that hold, together, every combination of values of `strength` axes that any case holds.

    Those of `beside` are among them. Always the case with the most combinations that are still missing, the first of
    equals: of a x b x c ... little more than the product of the longest axes is left, two of them for pairs.
    """
    varied = [axis for axis in zip(*cases, strict=True) if len(set(axis)) > 1]
    if len(varied) < strength:
        return set(range(len(cases)))
    held = [set(combinations(enumerate(case), strength)) for case in zip(*varied, strict=True)]
    taken = set(beside)
    missing = set().union(*held).difference(*(held[place] for place in taken))
    gains = [len(some) for some in held]  # at most: what is missing only shrinks, so that most need no look
    while missing:
        best, gain = -1, 0
        for place, some in enumerate(held):
            if gains[place] > gain:
                gains[place] = len(some & missing)
                if gains[place] > gain:
                    best, gain = place, gains[place]
        taken.add(best)
        missing -= held[best]
    return taken
