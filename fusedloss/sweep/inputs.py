"""The inputs of a sweep: operands in the backend's form, factors, and the targets' logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..backends.protocol import Distills, Sweeps
from ..core import products, targets
from ..core.mask import StripMask
from ..core.numerics import rows_of, stats_dtype
from ..core.problem import Problem
from ..core.rows import further_targets
from ..core.strips import Patch, Prepared, RowSums, Settled, Strip
from ..core.transforms import settled


class Elsewhere(NamedTuple):
    """Values of the targets for a sweep over columns that hold none; rows `[M]`."""

    thresholds: tuple[Tensor | None, ...]  # threshold of each block's margin
    guide: Tensor | None  # the guide's similarity of the target
    targets: bool = False  # some rows' targets are among these columns nevertheless


class Inputs:
    """given: the operands in the backend's form. operands: the same, or fp32 unit rows if the backend takes `units`;
    their factors then are None. scales: by penalty."""

    def __init__(
        self,
        problem: Problem,
        backend: Sweeps,
        by_scale: bool,
        elsewhere: Elsewhere | None = None,
        by_any: bool = False,
    ):
        """by_scale: whether the scale's gradient is wanted. by_any: whether any is."""
        self.problem, self.backend, self.by_any = problem, backend, by_any
        self.dtype = stats_dtype(problem.dtype)
        self.given = [backend.operand(x) for x in problem.operands]
        self.biases = [None if b.bias is None else b.bias.to(self.dtype).contiguous() for b in problem.blocks]
        self.prepared = self._prepared(by_scale, elsewhere)
        self.norms = self._norms()
        self.operands, self.factors = self.given, self.norms
        self.units = bool(backend.takes_units(problem))
        if self.units:
            self.operands = [unit(x, factor) for x, factor in zip(self.given, self.norms, strict=True)]
            self.factors = [None] * len(self.operands)
        penalties = [p for block in problem.blocks for p in (block.penalty, block.own_penalty)]
        self.scales = {p: problem.scale + p if p else problem.scale for p in penalties}
        self.own = torch.arange(problem.rows, device=problem.device) if any(penalties) else None
        self.target_sim = self.prepared.target_sim if by_scale else None
        self.onednn = self.chosen(self.given[0])
        self.admitted: Tensor | None = None  # [M], the numbers of the rows' negatives, if they are counted
        self.taught = self._taught()
        self.by_scale: list[Tensor] = []  # terms of the scale's gradient that no primitive returns
        self.scores, self.sims = self._of_all_targets() if problem.bends else (self.prepared.score, self.target_sim)

    def _prepared(self, by_scale: bool, elsewhere: Elsewhere | None) -> Prepared:
        problem, block = self.problem, self.problem.blocks[0]
        query, key = self.given[block.query], self.given[block.key]
        if elsewhere is not None and not elsewhere.targets:
            row_factor = col_factor = None
            if problem.cosine:
                row_factor, col_factor = self.backend.inverse_norms(query), self.backend.inverse_norms(key)
            none = torch.zeros_like(problem.weight)
            return Prepared(row_factor, col_factor, none, none)
        return self.backend.prepare(
            query,
            key,
            problem.target,
            problem.scale,
            self.biases[0] if problem.bias_on_target else None,
            problem.rule,
            cosine=problem.cosine,
            wants_target_sim=by_scale or any(b.mask.margin is not None for b in problem.blocks),
        )

    def _taught(self) -> list[Strip]:
        """Returns each block's strip of a teacher's similarities, for all rows, where the backend folds them."""
        fold = self.problem.fold
        if fold is None or not fold.teachers or not self.backend.can_fold(self.problem):
            return []
        return cast(Distills, self.backend).taught(self.problem)

    def _of_all_targets(self) -> tuple[Tensor, Tensor | None]:
        """Returns the logits of all targets `[M, P]`, and their similarities if the scale's gradient is wanted."""
        problem, block, first = self.problem, self.problem.blocks[0], self.prepared.score[:, None]
        own = None if self.target_sim is None else self.target_sim[:, None]
        if problem.targets is None:
            return first, own
        bias = self.biases[0] if problem.bias_on_target else None
        factors = self.prepared.row_factor, self.prepared.col_factor
        further = problem.targets.columns[:, 1:]
        scores, sims = further_targets(
            self.given[block.query], self.given[block.key], further, problem.scale, bias, *factors
        )
        return torch.cat([first, scores], 1), None if own is None else torch.cat([own, sims.to(own.dtype)], 1)

    def _norms(self) -> list[Tensor | None]:
        block = self.problem.blocks[0]
        known = {block.query: self.prepared.row_factor, block.key: self.prepared.col_factor}
        if not self.problem.cosine:
            return [None] * len(self.given)
        return [
            known[number] if number in known else self.backend.inverse_norms(x) for number, x in enumerate(self.given)
        ]

    def chosen(self, x: Tensor) -> products.Chosen:
        """Returns who multiplies rows like `x`, an operand or a guide's embeddings."""
        problem = self.problem
        return products.chosen(problem.rows, problem.columns, x.shape[1], x.dtype, problem.device)

    def strip(self, number: int, chunk: slice, mask: StripMask | None) -> Strip:
        """Returns the strip of a block and a chunk of rows."""
        block = self.problem.blocks[number]
        other_own = block.own_penalty != block.penalty and number > 0  # in block 0 it is the target
        return Strip(
            x=rows_of(self.operands[block.query], chunk),
            y=self.operands[block.key],
            scale=self.scales[block.penalty],
            row_factor=part(self.factors[block.query], chunk),
            col_factor=self.factors[block.key],
            bias=self.biases[number],
            target=rows_of(self.problem.target, chunk) if number == 0 else None,
            mask=mask,
            own=part(self.own, chunk) if other_own else None,
            own_scale=self.scales[block.own_penalty] if other_own else None,
            softcap=self.problem.softcap,
            onednn=self.onednn.sim,
        )

    def settle(self, chunk: slice, sums: RowSums, weight: Tensor | None = None, **options: Any) -> Settled:
        weight = self.problem.weight if weight is None else weight
        score, slope = rows_of(self.prepared.score, chunk), part(self.prepared.slope, chunk)
        rule = self.problem.rule
        if self.problem.bends:
            return self._bent(chunk, sums, rows_of(weight, chunk), **options)

        def settle(weight: Tensor, **options: Any) -> Settled:
            return self.backend.settle(sums, score, weight, rule, slope=slope, **options)

        return self._transformed(rows_of(weight, chunk), settle, **options)

    def settle_columns(self, sums: RowSums, weight: Tensor) -> Settled:
        """Settles the other direction of a symmetric problem."""
        if self.problem.bends:
            return self._bent(slice(0, len(weight)), sums, weight)
        rule, score = self.problem.column_rule, self.prepared.score
        return self._transformed(weight, lambda weight: self.backend.settle(sums, score, weight, rule))

    def _bent(self, chunk: slice, sums: RowSums, weight: Tensor, **options: Any) -> Settled:
        """Settles rows whose loss is no plain softmax."""
        problem, columns = self.problem, rows_of(self.problem.all_targets, chunk)
        if sums.total.dim() > 1 and isinstance(sums.shift, Tensor):  # of tiles
            sums = self.backend.merge(RowSums.empty(len(weight), weight), sums)
        elif sums.total.dim() > 1:
            sums = sums._replace(total=sums.total.sum(0))
        scores, here = rows_of(self.scores, chunk), columns >= 0
        law = targets.law_of(problem, here, scores[:, 0], part(self.admitted, chunk))
        if "patch" in options:
            options["patch"] = options["patch"]._replace(target=columns)
        rows, entries, by_scale = targets.settle(
            sums, scores, weight, law, problem.transform, wanted=self.by_any, **options
        )
        if self.sims is not None:
            self.by_scale.append(targets.scale_terms(entries, by_scale, rows_of(self.sims, chunk), here))
        return rows

    def _transformed(self, weight: Tensor, settle: Callable[..., Settled], **options: Any) -> Settled:
        transform = self.problem.transform
        if transform is None:
            return settle(weight, **options)
        return settled(transform, weight, settle, self.by_any, **options)

    def patch(self, chunk: slice, out: Tensor) -> Patch:
        block = self.problem.blocks[0]
        row_factor = part(self.factors[block.query], chunk)
        return Patch(out, rows_of(self.problem.target, chunk), row_factor, self.factors[block.key])


def unit(x: Tensor, factor: Tensor | None) -> Tensor:
    assert factor is not None
    return x.to(factor.dtype) * factor[:, None]


def part(x: Tensor | None, chunk: slice) -> Tensor | None:
    return None if x is None else rows_of(x, chunk)
