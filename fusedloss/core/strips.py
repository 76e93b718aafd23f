"""What the primitives of a backend are handed, a chunk of rows at a time, and what they return."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .mask import StripMask


class Strip(NamedTuple):
    """One block of one row chunk, as backends take it: `R` rows against all `N` columns of the block.

    z[i, j] = scale * row_factor[i] * col_factor[j] * <x_i, y_j> + bias[j], bent by `softcap` where there is one

    Vectors are in the statistics dtype and contiguous; `x` and `y` are in the input dtype with any strides.
    """

    x: Tensor  # [R, D]
    y: Tensor  # [N, D]
    scale: Tensor  # 0-dim, the block's penalty included
    row_factor: Tensor | None  # [R]
    col_factor: Tensor | None  # [N]
    bias: Tensor | None  # [N], may hold -inf: that column is removed
    target: Tensor | None  # [R] int64, the column of this block that the sums leave out; -1 (or out of range): none
    mask: StripMask | None = None
    own: Tensor | None = None  # [R] int64, the column that `own_scale` multiplies instead
    own_scale: Tensor | None = None
    softcap: float = 0.0
    onednn: int = 0  # see `products.Chosen.sim`

    def columns(self, part: slice) -> Strip:
        """Returns the strip of some columns, counted from the first of them; without a column of its own scale."""
        return self._replace(
            y=self.y[part],
            col_factor=None if self.col_factor is None else self.col_factor[part],
            bias=None if self.bias is None else self.bias[part],
            target=self.target - part.start if self.target is not None and part.start else self.target,
            mask=None if self.mask is None else self.mask.columns(part),
        )


class Tile(NamedTuple):
    """A tile on or above the diagonal of one matrix against itself."""

    rows: slice
    columns: slice
    room: Tensor | None = None  # [rows, columns], keeps its logits or exponentials from the statistics to the gradient

    @property
    def directions(self) -> list[tuple[slice, int]]:
        """The parts of the matrix that it has sums for, with the dimension to sum over: its rows, and its columns as
        rows of the other half. On the diagonal both are one."""
        return [(self.rows, 1)] if self.rows == self.columns else [(self.rows, 1), (self.columns, 0)]


class Extremes(NamedTuple):
    """Each row's largest value so far and its column, the first on ties; -inf and -1: none."""

    value: Tensor
    column: Tensor

    @classmethod
    def empty(cls, rows: int, like: Tensor) -> Extremes:
        return cls(like.new_full((rows,), -torch.inf), like.new_full((rows,), -1, dtype=torch.int64))

    def take(self, values: Tensor, part: slice, dim: int, first: int) -> None:
        """Takes in the values of the rows `part`, whose columns are dimension `dim` and start at `first`.

        Reads places only where a value rises: with torch.max, which finds all of them, this takes 4 times as long.
        """
        largest = values.amax(dim)
        (rising,) = torch.nonzero(largest > self.value[part], as_tuple=True)
        if len(rising):
            place = values.index_select(1 - dim, rising).argmax(dim) + first
            self.value[part].index_copy_(0, rising, largest[rising])
            self.column[part].index_copy_(0, rising, place)

    def take_few(self, values: Tensor, rows: Tensor, columns: Tensor) -> None:
        """Takes in the values of single places: of each row the largest, and of equal ones the first."""
        order = columns.argsort(stable=True)
        order = order[values[order].argsort(descending=True, stable=True)]
        order = order[rows[order].argsort(stable=True)]
        values, rows, columns = values[order], rows[order], columns[order]
        best = values > self.value[rows]
        best[1:] &= rows[1:] != rows[:-1]
        self.value.index_copy_(0, rows[best], values[best])
        self.column.index_copy_(0, rows[best], columns[best])


class Tally(NamedTuple):
    """Counts of a row's admissible negatives, for statistics and smoothing; zeros and -inf at first."""

    admitted: Tensor  # [R], their number
    above: Tensor  # the number with a larger logit than the target
    maximum: Tensor  # the largest logit
    z: Tensor  # sums of the logits, and of the similarities
    sim: Tensor

    @classmethod
    def empty(cls, size: int, like: Tensor) -> Tally:
        zeros = like.new_zeros(4, size)
        return cls(zeros[0], zeros[1], like.new_full((size,), -torch.inf), zeros[2], zeros[3])


class RowSums(NamedTuple):
    """The sum over a row's negatives: `sum_{j != t} exp(z_ij) = total * exp(shift)`.

    A row without negatives has total 0. Between two primitives of one backend the sums may still be partial: a leading
    axis of tiles, a shift of -inf for a tile without an admissible column, or one number as the shift of all rows.
    """

    shift: Tensor | float  # [R]
    total: Tensor  # [R]

    @classmethod
    def empty(cls, size: int, like: Tensor) -> RowSums:
        return cls(like.new_zeros(size), like.new_zeros(size))


class Prepared(NamedTuple):
    """Values of block 0 that are computed before its logits."""

    row_factor: Tensor | None  # [M] 1/norms
    col_factor: Tensor | None  # [N]
    score: Tensor  # [M], wide: at scale 100 the half-ulp of an fp32 score is a relative 4e-6 of its pair
    target_sim: Tensor | None  # [M], if the gradient of the scale is wanted
    slope: Tensor | None = None  # [M], derivative of the score by the target's `scale * sim`, if that is not 1


class Patch(NamedTuple):
    """The places of the targets' entries of a chunk: `out[i, target[i]]`, times both factors."""

    out: Tensor  # [R, N]
    target: Tensor  # [R]
    row_factor: Tensor | None  # [R]
    col_factor: Tensor | None  # [N]


class Settled(NamedTuple):
    """A row once its normaliser is known."""

    loss: Tensor  # [R], weighted; 0 for a row that is left out
    shift: Tensor
    weight: Tensor  # weight / l
    entry: Tensor  # the target's entry of the gradient
    scaled: list[Tensor]
    further: Tensor | None = None  # [R, P - 1], the entries of further targets

    def softmax(self, target_sim: Tensor | None) -> Softmax:
        return Softmax(self.shift, self.weight, target_sim)


class Softmax(NamedTuple):
    """One direction's gradient, as a function of the logits: `dz = weight * exp(z - shift)` off the target.

    `shift` is the row's largest negative and `weight` holds `1 / l`, so that the exponentials lie in [0, 1] and keep
    their full precision however well the pair is fitted.
    """

    shift: Tensor
    weight: Tensor
    target_sim: Tensor | None  # similarity of the target, if the gradient of the scale is wanted

    def map(self, function: Callable[[Tensor], Tensor]) -> Softmax:
        sim = None if self.target_sim is None else function(self.target_sim)
        return Softmax(function(self.shift), function(self.weight), sim)
