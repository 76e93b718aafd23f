"""The protocol of a sweep backend, on one chunk of rows; mypy holds every backend to it.

Functions that write store `value * row_factor * col_factor`, multiplied before rounding; at the target they store 0,
and `grad_rows` its entry.
"""

# maths.md: Names; Logits; Settle; Gradient of the logits; Contraction; Tally; Symmetric; Folds; Prefixes
# maths.md: Half of the tiles

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..core.folds import Folded, Part
from ..core.mask import GuideRule, StripMask
from ..core.problem import NO_RULE, Beside, Problem, RowRule
from ..core.strips import Extremes, Patch, Prepared, RowSums, Settled, Softmax, Strip, Tally, Tile


class Wants(NamedTuple):
    """Which gradients are wanted."""

    operands: tuple[bool, ...]
    scale: bool
    biases: tuple[bool, ...]  # one per block
    scalars: tuple[bool, ...] = ()  # a fold's own, and the columns beside its blocks

    @classmethod
    def none(cls, problem: Problem) -> Wants:
        return cls((False,) * len(problem.operands), False, (False,) * len(problem.blocks))

    @property
    def any(self) -> bool:
        return self.scale or any(self.operands) or any(self.biases) or any(self.scalars)


class Result(NamedTuple):
    """What a sweep returns."""

    rows: Tensor  # [M] weighted losses
    operands: tuple[Tensor | None, ...]  # gradients of rows.sum(), in saved_dtype
    scale: Tensor | None
    biases: tuple[Tensor | None, ...]
    scalars: tuple[Tensor | None, ...]  # by a fold's own, and by the columns beside its blocks
    counted: list[Tensor]  # each [M]: the start of a Tally and the target's logit, or the divisor of a fold's sum


class Rows(Protocol):
    """What happens once per row; `fusedloss.core.rows` is the definition."""

    def operand(self, x: Tensor) -> Tensor:
        """Returns x as the kernels read it: x itself, or an aligned copy."""

    def inverse_norms(self, y: Tensor, /) -> Tensor: ...

    def prepare(
        self,
        x: Tensor,
        y: Tensor,
        target: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        rule: RowRule = NO_RULE,
        *,
        cosine: bool,
        wants_target_sim: bool,
    ) -> Prepared:
        """Returns 1/norms and the targets' logits."""

    def merge(self, running: RowSums, part: RowSums) -> RowSums:
        """Merges the sums over two disjoint sets of columns."""

    def settle(
        self,
        sums: RowSums,
        score: Tensor,
        weight: Tensor,
        rule: RowRule = NO_RULE,
        *,
        smooth: Tensor | None = None,
        slope: Tensor | None = None,
        patch: Patch | None = None,
        scaled: Sequence[Tensor] = (),
        dtype: torch.dtype | None = None,
    ) -> Settled:
        """Turns partial sums into loss, weight / l and the target's entry."""

    def finish(
        self,
        total: Tensor,
        over_l: Tensor | None,
        scale: Tensor,
        gain: Tensor | None,
        x: Tensor,
        factor: Tensor | None,
        out: Tensor,
    ) -> None:
        """Turns a product into the gradient: applies scale, 1/l and the projection through the norms."""


class Sweeps(Rows, Protocol):
    """The primitives of every backend. Strips are the blocks of a chunk, side by side under one normaliser."""

    def why_not(self, problem: Problem) -> str | None:
        """Returns the reason why this backend cannot run the problem, or None."""

    def takes_units(self, problem: Problem) -> bool:
        """Whether operands come as unit rows instead of with factors."""

    def can_exp(self, problem: Problem) -> bool:
        """Whether `exp_rows` may be used: it computes a safe shift, or the host knows one."""

    def can_store(self, problem: Problem) -> bool:
        """Whether one shift serves rows and columns; the backend then implements `Stores`."""

    def can_fold(self, problem: Problem) -> bool:
        """Whether `fold_rows` replaces `similarities` and a fold in torch; the backend then implements `FoldsRows`."""

    def can_halve(self, problem: Problem) -> bool:
        """Whether one matrix against itself takes half of its square tiles; the backend then implements `Halves`."""

    def can_halve_rows(self, problem: Problem) -> bool:
        """Whether one matrix against itself takes half of its chunks' columns, by the functions of rows and columns; of
        a fold the backend then implements `HalvesFolds`, of row maxima `HalvesTops`."""

    def shares_prefixes(self, problem: Problem) -> bool:
        """Whether `sweep/prefixes.py` sums all prefixes; the backend then implements `Admits`."""

    def common_prefixes(self, problem: Problem) -> tuple[int, ...]:
        """Returns the prefixes, ascending, whose sweeps share a product; the backend then implements `Prefixes`."""

    def workspace_dtype(self, problem: Problem) -> torch.dtype: ...

    def workspace_copies(self, problem: Problem) -> float:
        """Returns the memory besides the workspace, in multiples of its size."""

    def stats_rows(self, strips: list[Strip], tally: Tally | None = None, score: Tensor | None = None) -> RowSums:
        """Adds to the tally, if any."""

    def stats_rows_and_columns(
        self, strip: Strip, tally: Tally | None = None, score: Tensor | None = None
    ) -> tuple[RowSums, RowSums]: ...

    def exp_rows(
        self,
        problem: Problem,
        strips: list[Strip],
        outs: list[Tensor],
        target_sim: Tensor | None,
        tally: Tally | None = None,
        score: Tensor | None = None,
    ) -> tuple[RowSums, Tensor | None]:
        """Writes E = exp(z - shift)."""

    def grad_rows(
        self,
        strips: list[Strip],
        outs: list[Tensor],
        rows: Softmax,
        columns: Softmax | None,
        entry: Tensor,
        gain: Tensor | None,
        smooth: Tensor | None = None,
    ) -> Tensor | None:
        """Writes dz * gain."""

    def top_rows(self, strips: list[Strip]) -> tuple[Tensor, Tensor]:
        """The largest logits, and their columns."""

    def similarities(self, strip: Strip, out: Tensor) -> None:
        """Writes the similarities, for folds in torch."""

    def guide_room(self, strip: Strip) -> tuple[int, int]: ...

    def guide_rows(
        self, strips: list[Strip], rule: GuideRule, room: Tensor, own: Tensor | None = None
    ) -> Sequence[Any]:
        """Returns each block's `StripMask.dropped`, in the backend's own format."""

    def guide_scores(self, strip: Strip, room: Tensor) -> Tensor:
        """Returns the guide's similarities of the targets, [R], from which thresholds follow."""


class Stores(Sweeps, Protocol):
    """Keeps E of both directions in the workspace."""

    def exp_rows_and_columns(self, problem: Problem, strip: Strip, out: Tensor) -> tuple[RowSums, RowSums]: ...

    def weigh(self, patch: Patch, rows: Tensor, columns: Tensor, entry: Tensor) -> None:
        """Turns E into dz, in place."""


class FoldsRows(Sweeps, Protocol):
    """Folds in the tile."""

    def fold_rows(self, problem: Problem, strip: Strip, out: Tensor | None, part: Part, score: Tensor) -> Folded:
        """Writes the gradient, if `out`."""


class Distills(FoldsRows, Protocol):
    """Folds the similarities of two models in one tile."""

    def taught(self, problem: Problem) -> list[Strip]:
        """Returns each block's strip of the teacher's similarities, for all rows."""

    def distill_rows(
        self,
        problem: Problem,
        strips: list[Strip],
        taught: list[Strip],
        outs: Sequence[Tensor] | None,
        part: Part,
        beside: Beside | None = None,
        gain: Tensor | None = None,
    ) -> Folded:
        """Writes the gradient times the gain, if `outs`, and returns that by the rows' own columns.

        Strips have no target. A mask is one bool matrix, whose rows end in False up to a multiple of 16 columns.
        """


class HalfFold(Protocol):
    """A fold of one matrix against itself, by tiles that each stand for both places of their pairs."""

    @property
    def sums_first(self) -> bool:
        """Whether all tiles are added before one is written; if not, writing adds."""

    def add(self, strip: Strip, tile: Tile) -> None:
        """Adds the tile to the sums of its rows and of its columns."""

    def settle(self) -> Folded:
        """Returns the losses of all rows, once all tiles are added."""

    def write(self, strip: Strip, out: Tensor, tile: Tile) -> Tensor | None:
        """Writes the gradient by the similarities of both places; returns the terms of that by the scale, if any."""


class HalvesFolds(FoldsRows, Protocol):
    def half_fold(self, problem: Problem, part: Part) -> HalfFold:
        """part: of all rows."""


class HalvesTops(Sweeps, Protocol):
    def half_tops(
        self, problem: Problem, strip: Strip, tiles: list[Tile], nearest: Extremes, farthest: Extremes
    ) -> None:
        """Takes each row's largest logit of another label, and its smallest one of its own, itself left out."""


class Halves(HalvesTops, Protocol):
    """Computes one matrix against itself by its tiles on and above the diagonal, a chunk's row of tiles at a time.

    Its sums are those of all rows, and their shifts are powers of two: `sum_{j != t} exp(z_ij) = total * 2**shift`.
    """

    def half_start(self, problem: Problem) -> RowSums:
        """Returns the sums of no tiles."""

    def half_stats(
        self,
        problem: Problem,
        strip: Strip,
        tiles: list[Tile],
        sums: RowSums,
        tally: Tally | None = None,
        score: Tensor | None = None,
    ) -> None:
        """Adds each tile to the sums, and to the tally, of its rows and of its columns."""

    def half_grad(
        self, problem: Problem, strip: Strip, tiles: list[Tile], rows: Softmax, entry: Tensor, q: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yields `dz_ij + dz_ji` of each tile, `entry` at the targets; adds to q what `grad_rows` returns."""

    def half_sides_start(self, problem: Problem) -> list[RowSums]:
        """Returns the log-sum-exps of no tiles: positives' and negatives', with shifts of the natural exponent."""

    def half_sides(
        self, problem: Problem, strip: Strip, tiles: list[Tile], part: Part, sums: Sequence[RowSums]
    ) -> None:
        """Adds each tile to the log-sum-exps of its rows and of its columns; rows are sorted by label."""

    def half_sides_grad(
        self,
        problem: Problem,
        strip: Strip,
        tiles: list[Tile],
        part: Part,
        sides: Sequence[Softmax],
        q: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yields each tile's gradient by the similarities of both places; adds `sum dv_ij v_ij` to q."""


class Admits(Sweeps, Protocol):
    """Says what a mask admits, for prefixes that share one product."""

    def admitted(self, mask: StripMask, tile: slice) -> Tensor: ...


class Prefixes(Sweeps, Protocol):
    """Computes several prefixes of the same embeddings out of one product.

    Lists are by prefix, ascending, and the inner ones by block. A function returns for each prefix what the one of a
    single sweep returns.
    """

    def stats_prefixes(self, strips: list[list[Strip]]) -> list[RowSums]: ...

    def exp_prefixes(self, problem: Problem, strips: list[list[Strip]], outs: list[list[Tensor]]) -> list[RowSums]: ...

    def grad_prefixes(
        self,
        strips: list[list[Strip]],
        outs: list[list[Tensor]],
        rows: list[Softmax],
        entries: list[Tensor],
        gains: list[Tensor | None],
    ) -> list[Tensor | None]: ...
