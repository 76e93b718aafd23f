"""Which columns of a block may compete: a mask as the problem has it, and as a backend sees it, a chunk at a time.

What users write is in `fusedloss.masks`. A new part has a field in both, its torch form in `backends/chunked/masks.py`
and `backends/reference.py`, and its device code in `kernels/masks.py` and `csrc/epilogues/masks.cuh`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .numerics import rows_of


class Compare(NamedTuple):
    """A number per row and per column: columns with the row's number are dropped, or only they are kept."""

    rows: Tensor  # int64 [M]
    keys: Tensor  # int64 [N]
    keep: bool


class Guide(NamedTuple):
    """Another model's embeddings of a block's rows and columns, of any dimension; they enter as unit vectors."""

    query: Tensor  # [M, G]
    key: Tensor  # [N, G]


class GuideRule(NamedTuple):
    """Drops columns that the guide finds closer than the target minus a margin (a share of it if `relative`)."""

    margin: float = 0.0
    relative: bool = False


class Mask(NamedTuple):
    """The columns of a block that may compete: those that every part admits. The target always may, except under
    `skip`.

    dense: bool [M, N], True for columns that may compete. margin: drops columns whose similarity is above the share
    `relative` of the target's by more than this, or with `factor` multiplies that similarity by it. exempt: int64 [M,
    E], columns that the margin leaves as they are; -1: none. skip: int64 [M], the one column that the row leaves out
    (itself); -1: none. skip_offset: its distance from column i; across ranks it may be another rank's column.
    """

    compare: tuple[Compare, ...] = ()
    dense: Tensor | None = None
    margin: float | None = None
    exempt: Tensor | None = None
    guide: Guide | None = None
    skip: Tensor | None = None
    skip_offset: int = 0
    relative: float = 1.0
    factor: float | None = None

    @property
    def given(self) -> bool:
        none = self.dense is None and self.margin is None and self.guide is None and self.skip is None
        return bool(self.compare) or not none

    def contiguous(self) -> Mask:
        compare = tuple(Compare(c.rows.contiguous(), c.keys.contiguous(), c.keep) for c in self.compare)
        return self._replace(compare=compare, skip=None if self.skip is None else self.skip.contiguous())

    @property
    def keys(self) -> list[Tensor]:
        """Its tensors with one entry per column. `dense`, which has rows and columns, is not among them."""
        return [*(c.keys for c in self.compare), *([] if self.guide is None else [self.guide.key])]

    def map_keys(self, function: Callable[[Tensor], Tensor]) -> Mask:
        """Returns the mask with each of `keys` replaced, e.g. by the columns of all ranks."""
        compare = tuple(c._replace(keys=function(c.keys)) for c in self.compare)
        guide = None if self.guide is None else Guide(self.guide.query, function(self.guide.key))
        return self._replace(compare=compare, guide=guide)

    def columns(self, part: slice) -> Mask:
        """Returns the mask of some columns, counted from the first of them."""
        # Not by a function that holds `part`: torch.compile would treat the sizes in it as constants.
        compare = tuple(Compare(c.rows, c.keys[part], c.keep) for c in self.compare)
        dense = None if self.dense is None else self.dense[:, part]
        guide = None if self.guide is None else Guide(self.guide.query, self.guide.key[part])
        exempt, skip = self.exempt, self.skip
        if part.start:
            exempt, skip = (None if x is None else x - part.start for x in (exempt, skip))
        return self._replace(compare=compare, dense=dense, exempt=exempt, guide=guide, skip=skip)

    def turned(self) -> Mask:
        """Returns the mask with rows and columns exchanged; a margin, a guide and `skip` belong to one direction."""
        compare = tuple(Compare(c.keys, c.rows, c.keep) for c in self.compare)
        return Mask(compare, None if self.dense is None else self.dense.T)


NO_MASK = Mask()


class StripMask(NamedTuple):
    """A block's mask, for one row chunk."""

    compare: tuple[Compare, ...] = ()  # rows [R], keys [N]
    dense: Tensor | None = None  # [R, N]
    threshold: Tensor | None = None  # [R]: larger similarities are dropped, or multiplied by `factor`
    exempt: Tensor | None = None  # [R, E], int64
    skip: Tensor | None = None  # [R]
    factor: float | None = None
    without: Tensor | None = None  # [R, E], columns that the sums leave out besides the target; -1: none
    dropped: Any = None  # columns dropped by the guide, in the backend's own format: tiles on demand, packed bits

    @property
    def given(self) -> bool:
        """Whether it drops columns besides the targets."""
        parts = (self.dense, self.threshold, self.skip, self.dropped)
        return bool(self.compare) or any(part is not None for part in parts)

    @classmethod
    def of(cls, mask: Mask, threshold: Tensor | None) -> StripMask:
        """Returns a block's mask for all rows, with a threshold in place of its margin."""
        shared = {name: getattr(mask, name) for name in cls._fields if name in Mask._fields}
        return cls(**shared, threshold=threshold)

    def rows(self, part: slice) -> StripMask:
        """Returns the mask of some rows, before a guide has dropped any column."""
        tensors: dict[str, Any] = {
            name: rows_of(x, part) for name, x in self._asdict().items() if isinstance(x, Tensor)
        }
        return self._replace(compare=tuple(c._replace(rows=rows_of(c.rows, part)) for c in self.compare), **tensors)

    def columns(self, part: slice) -> StripMask:
        """Returns the mask of some columns, counted from the first of them, before a guide has dropped any."""
        given = (self.exempt, self.skip, self.without)
        exempt, skip, without = (x - part.start if x is not None and part.start else x for x in given)
        dense = None if self.dense is None else self.dense[:, part]
        compare = tuple(c._replace(keys=c.keys[part]) for c in self.compare)
        return self._replace(compare=compare, dense=dense, exempt=exempt, skip=skip, without=without)

    @property
    def vectors(self) -> dict[str, Tensor | None]:
        """Returns the parts that are one number per row, by the names under which kernels read them."""
        return {"threshold": self.threshold, "skip": self.skip}
