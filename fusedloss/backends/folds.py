"""The folds that kernels compute in their tile, on `cuda` and on `triton`: what each is told, and what becomes of its
tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from ..core.folds import FOLDS as IN_TORCH
from ..core.folds import (
    Folded,
    LogSum,
    Part,
    Sides,
    circle_row,
    multi_similarity_row,
    proxy_anchor_row,
    sup_con_in_row,
)
from ..core.numerics import group_numbers, group_sizes, stats_dtype
from ..core.problem import Fold, Problem
from ..core.rows import fold_scalars, patch_target
from ..core.strips import Patch, RowSums, Softmax, Strip, Tile


class Kernel(Protocol):
    """One launch over a strip. csrc/similarity_fields.h says what the fields are."""

    def row_table(self) -> Tensor:
        """Returns room for one number per tile and row, [n_tiles, R]."""

    def column_table(self) -> Tensor:
        """Returns room for one number per tile and column, [m_tiles, N]."""

    def __call__(self, fields: dict[str, Any], out: Tensor | None = None) -> None: ...


class Kernels(NamedTuple):
    """What a backend brings. The kernels are those of FOLDS: a sum's is named as its fold, and sides have two, `_stats`
    and `_grad`."""

    of: Callable[[str, Strip, bool], Kernel]  # by name; whether it stands for its columns as rows, too
    merge: Callable[[RowSums, RowSums], RowSums]


class _Sums(NamedTuple):
    """A fold of one pass: sums over a row."""

    # Of FoldArgs, beside what all folds have: by the fold's options and scalars.
    fields: Callable[[Fold, Strip, Part, Tensor], dict[str, Any]]
    tables: tuple[str, ...]  # of FoldArgs, beside "loss"
    # `Folded` less the loss: from the tables and the rows' weights.
    finish: Callable[[dict[str, Tensor], Tensor, Strip, Tensor | None, Part], tuple[Tensor | None, tuple[Tensor, ...]]]


class _Sides(NamedTuple):
    """A fold of two passes: log-sum-exps of a row's positives and of its negatives, then the gradient."""

    row: Callable[[LogSum, LogSum, tuple[Tensor, ...], tuple[float, ...]], Sides]  # the loss, from both
    fields: Callable[..., dict[str, float]]  # of SidesArgs, by the fold's options
    kernel: str = "sides"
    counts: bool = False  # rows of which the loss is not 0
    mean: bool = False  # of the positives, inside the logarithm: rows need one, and the scale has a gradient


def can_fold(problem: Problem) -> bool:
    """True for sums over a row's similarities. fp16 lacks the range for their smallest derivatives."""
    fold = problem.fold
    known = fold is not None and fold.name in FOLDS and not fold.distance
    return known and problem.dtype != torch.float16


def can_halve(problem: Problem) -> bool:
    """True where a tile of one matrix against itself can stand for both places of its pairs.

    Both have equal values, and by equal labels they are of one side. A target is a row's own.
    """
    fold = problem.fold
    if fold is None or not can_fold(problem) or not fold.itself or fold.labels is None:
        return False
    return fold.name == "pair_hinge" or isinstance(FOLDS[fold.name], _Sides)


def workspace_copies(problem: Problem, in_tile: bool) -> float:
    fold = problem.fold
    return IN_TORCH[fold.name].copies if fold is not None and not in_tile else 1


def workspace_dtype(problem: Problem, in_tile: bool) -> torch.dtype:
    """Returns the workspace's dtype; folds in torch take similarities in fp32."""
    return stats_dtype(problem.dtype) if problem.fold is not None and not in_tile else problem.dtype


def fold_rows(
    kernels: Kernels, problem: Problem, strip: Strip, out: Tensor | None, part: Part, score: Tensor
) -> Folded:
    """A fold's loss, and its gradient by the similarities times both factors in `out`: nothing in between is stored."""
    fold = problem.fold
    assert fold is not None
    how = FOLDS[fold.name]
    if isinstance(how, _Sides):
        sides = TwoSides(kernels, problem, part)
        sides.add(strip)
        folded = sides.settle()
        q = None if out is None else sides.write(strip, out)
        return folded if q is None else folded._replace(scalars=(q.sum(),))
    run = kernels.of(fold.name, strip, False)
    fields = {"weight": part.weight} | _relations(part, None) | how.fields(fold, strip, part, score)
    tables = {name: run.row_table() for name in ("loss", *how.tables)}
    run(fields | tables, out)
    weight = fields["weight"]
    loss = (weight * tables["loss"].sum(0)).masked_fill(part.weight == 0, 0)
    return Folded(loss, *how.finish(tables, weight, strip, out, part))


def half_fold(kernels: Kernels, problem: Problem, part: Part) -> TwoSides | HalfHinges:
    """Returns the fold of all rows of one matrix against itself, by tiles. part: of all rows."""
    assert problem.fold is not None
    return (HalfHinges if problem.fold.name == "pair_hinge" else TwoSides)(kernels, problem, part)


def _relations(part: Part, tile: Tile | None) -> dict[str, Tensor | None]:
    """tile: of one matrix against itself; None: the part's rows against all columns."""
    if tile is None or part.row_labels is None or part.key_labels is None:
        return {"row_labels": part.row_labels, "key_labels": part.key_labels, "own": part.own}
    labels = {"row_labels": part.row_labels[tile.rows], "key_labels": part.key_labels[tile.columns]}
    on_diagonal = tile.rows == tile.columns
    return labels | {"own": part.rows[: tile.rows.stop - tile.rows.start] if on_diagonal else None}


def _places(part: Part, tile: Tile | None) -> list[tuple[slice, str]]:
    """Returns the parts of all rows that a tile has sums for, and how their fields' names begin."""
    if tile is None:
        return [(slice(0, len(part.weight)), "")]
    return [(rows, "col_" if dim == 0 else "") for rows, dim in tile.directions]


class TwoSides:
    """A fold of two log-sum-exps: statistics of both sides, the row's loss in torch, then the gradient.

    Of whole rows, or of the tiles of one matrix against itself.
    """

    sums_first = True  # all tiles are added before one is written

    def __init__(self, kernels: Kernels, problem: Problem, part: Part):
        fold, weight = problem.fold, part.weight
        assert fold is not None
        self.how = cast(_Sides, FOLDS[fold.name])
        self.kernels, self.problem, self.part = kernels, problem, part
        self.fields = self.how.fields(*fold.options)
        self.sums = {name: RowSums.empty(len(weight), weight) for name in ("pull", "push")}
        self.number: Tensor | None = None  # of each row's positives, where the kernel counts them
        self.softmax: dict[str, Softmax] = {}  # by side: the weights are the loss's derivatives over the sums

    def add(self, strip: Strip, tile: Tile | None = None) -> None:
        """Adds to the sums of the rows, and of the columns as rows. tile: None, the strip is of whole rows."""
        places = _places(self.part, tile)
        run = self.kernels.of(f"{self.how.kernel}_stats", strip, len(places) > 1)
        found = {
            (place, name): RowSums(*((run.column_table if place else run.row_table)() for _ in range(2)))
            for _, place in places
            for name in self.sums
        }
        count = run.row_table() if tile is None else None
        tables = {f"{place}{name}_max": sums.shift for (place, name), sums in found.items()}
        tables |= {f"{place}{name}_sum": sums.total for (place, name), sums in found.items()}
        run(self.fields | _relations(self.part, tile) | tables | {"count": count})
        for rows, place in places:
            for name, sums in self.sums.items():
                running = RowSums(cast(Tensor, sums.shift)[rows], sums.total[rows])
                self.kernels.merge(running, found[place, name])  # in place
        if count is not None:
            self.number = count.sum(0)

    def settle(self) -> Folded:
        """Returns the losses, once all columns are added."""
        fold, weight, how = self.problem.fold, self.part.weight, self.how
        assert fold is not None
        pull, push = (
            LogSum(torch.where(side.total == 0, 0, side.shift), side.total.log()) for side in self.sums.values()
        )
        found = how.row(pull, push, fold_scalars(self.problem), fold.options)
        loss = found.loss
        if how.mean:
            number = self.number
            if number is None:
                number = group_sizes(group_numbers(cast(Tensor, self.part.row_labels))) - 1
            weight = weight.masked_fill(number == 0, 0)
            loss = loss + number.to(loss.dtype).log()
        left_out = weight == 0
        loss = (weight * loss).masked_fill(left_out, 0)
        for (name, side), logs, slope in zip(self.sums.items(), (pull, push), found[1:], strict=True):
            over = (weight * slope / side.total).masked_fill(left_out | (side.total == 0), 0)
            self.softmax[name] = Softmax(logs.shift, over, None)
        return Folded(loss, (loss > 0).to(loss.dtype) if how.counts else None)

    def write(self, strip: Strip, out: Tensor, tile: Tile | None = None) -> Tensor | None:
        """Writes the gradient, of a tile that of both places. Returns the terms of that by the scale, if it has one."""
        run = self.kernels.of(f"{self.how.kernel}_grad", strip, tile is not None)
        places = _places(self.part, tile) if tile is None else [(tile.rows, ""), (tile.columns, "col_")]
        given: dict[str, Any] = {"q": run.row_table() if tile is None or self.how.mean else None}
        for rows, place in places:
            for name, softmax in self.softmax.items():
                given |= {f"{place}{name}_shift": softmax.shift[rows], f"{place}{name}_weight": softmax.weight[rows]}
        run(self.fields | _relations(self.part, tile) | given, out)
        return given["q"] if self.how.mean else None


class HalfHinges:
    """`pair_hinge` by the tiles of one matrix against itself: sums and gradient at once."""

    sums_first = False

    def __init__(self, kernels: Kernels, problem: Problem, part: Part):
        assert problem.fold is not None
        self.kernels, self.part, self.fields = kernels, part, _pair_hinge(problem.fold)
        self.loss, self.count = torch.zeros_like(part.weight), torch.zeros_like(part.weight)

    def add(self, strip: Strip, tile: Tile) -> None:
        self.write(strip, None, tile)

    def write(self, strip: Strip, out: Tensor | None, tile: Tile) -> None:
        run, weight = self.kernels.of("pair_hinge", strip, True), self.part.weight
        given = {"weight": weight[tile.rows], "col_weight": weight[tile.columns]}
        tables: dict[str, Tensor] = {}
        for _, place in (places := _places(self.part, tile)):
            tables |= {f"{place}{name}": (run.column_table if place else run.row_table)() for name in ("loss", "count")}
        run(self.fields | _relations(self.part, tile) | given | tables, out)
        for rows, place in places:
            self.loss[rows] += tables[f"{place}loss"].sum(0)
            self.count[rows] += tables[f"{place}count"].sum(0)

    def settle(self) -> Folded:
        weight = self.part.weight
        left_out = weight == 0
        return Folded((weight * self.loss).masked_fill(left_out, 0), self.count.masked_fill(left_out, 0))


def _margin_ranking(fold: Fold, strip: Strip, part: Part, score: Tensor) -> dict[str, Any]:
    (margin, mean), weight = fold.options, part.weight
    if mean:
        assert part.target is not None
        own = torch.zeros_like(part.target) if part.own is None else (part.own >= 0) & (part.own != part.target)
        weight = weight / (strip.y.shape[0] - 1 - own.to(weight.dtype)).clamp_min(1)
    return {"weight": weight, "margin": margin, "target_value": score.to(strip.scale.dtype)}


def _pair_hinge(fold: Fold, *_: Any) -> dict[str, Any]:
    margin, sign, pulls = fold.options
    return {"margin": margin, "sign": sign, "pulls": bool(pulls)}


def _by_scalars(tables: dict[str, Tensor], *_: Any) -> tuple[None, tuple[Tensor, ...]]:
    return None, (tables["scale_grad"].sum(), tables["bias_grad"].sum(0).sum())


def _patched(
    tables: dict[str, Tensor], weight: Tensor, strip: Strip, out: Tensor | None, part: Part
) -> tuple[None, tuple[Tensor, ...]]:
    """The target's entry is what its row's hinges add up to, which is known now."""
    if out is not None:
        assert part.target is not None
        entry = (-weight * tables["count"].sum(0)).masked_fill(part.weight == 0, 0)
        patch_target(Patch(out, part.target, strip.row_factor, strip.col_factor), entry)
    return None, ()


def _counted(
    tables: dict[str, Tensor], weight: Tensor, strip: Strip, out: Tensor | None, part: Part
) -> tuple[Tensor, tuple[Tensor, ...]]:
    return tables["count"].sum(0).masked_fill(part.weight == 0, 0), ()


# By the names of folds.FOLDS; csrc/similarity_fields.h says what the fields are.
FOLDS: dict[str, _Sums | _Sides] = {
    "sigmoid": _Sums(lambda fold, *_: {"sigmoid_bias": fold.scalars[0]}, ("scale_grad", "bias_grad"), _by_scalars),
    "margin_ranking": _Sums(_margin_ranking, ("count",), _patched),
    "pair_hinge": _Sums(_pair_hinge, ("count",), _counted),
    "multi_similarity": _Sides(
        multi_similarity_row,
        lambda alpha, beta, base: {"pull": -alpha, "push": beta, "pull_base": base, "push_base": base},
    ),
    "proxy_anchor": _Sides(
        proxy_anchor_row,
        lambda margin, alpha: {"pull": -alpha, "push": alpha, "pull_base": margin, "push_base": -margin},
    ),
    "circle": _Sides(
        circle_row, lambda margin, gamma: {"margin": margin, "gamma": gamma}, kernel="circle", counts=True
    ),
    "sup_con_in": _Sides(sup_con_in_row, lambda *_: {"pull": 1.0, "push": 1.0}, mean=True),
}
