"""The one sweep: row chunks, a bounded workspace, and two plain GEMMs per block by the vendor's library.

    for each row chunk:   z tile -> exp or dz in the workspace       (a backend's primitive)
                          dx[chunk] = W @ y,   dy += W.T @ x[chunk]   (torch.mm, fp32 accumulation)

No tensor here grows with M x N. The results are gradients of the *sum* of the weighted losses, times a number; the
caller multiplies by upstream.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from ..backends.protocol import Prefixes, Result, Stores, Sweeps, Wants
from ..core.numerics import autocasting, rows_of, saved_dtype, slices, stats_dtype
from ..core.problem import Problem
from ..core.rows import above_ties
from ..core.strips import Prepared, RowSums, Settled, Softmax, Strip, Tally
from ..core.targets import add_entries
from . import chunks, together
from .admission import Admission
from .chunks import workspace_shape
from .collectives import gather, merge_columns
from .folded import fold_chunk
from .gradients import Gradients, gemm_dtype
from .inputs import Elsewhere, Inputs, part
from .prefixes import sweep_prefixes
from .smoothing import Smoothing
from .triangle import Staircase, Triangle, disordered, halved, ordered, tops

__all__ = ["Elsewhere", "Partial", "Result", "Wants", "run", "top_rows", "workspace_shape"]


def run(problem: Problem, backend: Sweeps, wants: Wants, share: float = 1.0) -> Result:
    """Runs the sweep: the weighted losses, and the gradients of `share` times their sum."""
    if torch.is_grad_enabled():  # inside of an autograd.Function it is not
        with torch.no_grad():
            return run(problem, backend, wants, share)
    if not autocasting(problem.operands[0]):
        return _run(problem, backend, wants, share)
    with torch.autocast(problem.device.type, enabled=False):
        return _run(problem, backend, wants, share)


def _run(problem: Problem, backend: Sweeps, wants: Wants, share: float) -> Result:
    if not problem.prefixes:
        return _swept(problem, backend, wants, share)
    if backend.shares_prefixes(problem):
        return _prefixed(problem, backend, wants, share)
    return _each_prefix(problem, backend, wants, share)


def _swept(
    problem: Problem, backend: Sweeps, wants: Wants, share: float, into: Mapping[int, Tensor] | None = None
) -> Result:
    half = halved(problem, backend)
    if half is None:
        return _Sweep(problem, backend, wants, into=into, share=share).run()
    if half.fold is None or not backend.can_halve(half):
        return _Sweep(half, backend, wants, into=into, half=True, share=share).run()
    half, order = ordered(half)
    return disordered(_Sweep(half, backend, wants, half=True, share=share).run(), order)


def _prefixed(problem: Problem, backend: Sweeps, wants: Wants, share: float) -> Result:
    """Runs all prefixes from one similarity product: `prefixes.py`, which walks the same chunks."""
    chunk = chunks.prefix_rows(problem) if wants.any else chunks.stats_rows(problem.device)
    admit = Admission(Inputs(problem, backend, False)).admitted if problem.masked else None
    found = sweep_prefixes(problem, wants, chunk, admit)
    kept = saved_dtype(problem.dtype)
    for gradient in (*found.gradients, found.scale, *found.biases) if share != 1.0 else ():
        if gradient is not None:
            gradient.mul_(share)
    gradients = tuple(None if g is None else g.to(kept) for g in found.gradients)
    return Result(found.losses, gradients, found.scale, found.biases, (), [])


def _each_prefix(problem: Problem, backend: Sweeps, wants: Wants, share: float) -> Result:
    """Sweeps once for each prefix, over the first columns of the operands as they are, and adds up in fp32."""
    dtype, found = stats_dtype(problem.dtype), []
    wanted = zip(problem.operands, wants.operands, strict=True)
    totals = [x.new_zeros(x.shape, dtype=dtype) if want else None for x, want in wanted]
    for dim, result in _of_prefixes(problem, backend, wants, share):
        for total, gradient in zip(totals, result.operands, strict=True):
            if total is not None and gradient is not None:
                total[:, :dim] += gradient
        found.append(result._replace(operands=()))
    kept = tuple(None if total is None else total.to(saved_dtype(problem.dtype)) for total in totals)
    biases = tuple(_total(of_prefixes) for of_prefixes in zip(*(result.biases for result in found), strict=True))
    rows = torch.stack([result.rows for result in found]).sum(0)
    return Result(rows, kept, _total([result.scale for result in found]), biases, (), [])


def _of_prefixes(problem: Problem, backend: Sweeps, wants: Wants, share: float) -> Iterator[tuple[int, Result]]:
    """Yields prefixes with their results: first those that share a product, then the others, each by itself."""
    ones: dict[int, Problem] = {}
    for dim, factor in zip(problem.prefixes, problem.prefix_weights, strict=True):
        weight = problem.weight * factor + (ones[dim].weight if dim in ones else 0)
        operands = tuple(x[:, :dim] for x in problem.operands)
        ones[dim] = replace(problem, operands=operands, weight=weight, every_row=False, prefixes=(), prefix_weights=())
    common = backend.common_prefixes(problem)
    if common and together.fit(ones[common[-1]], common, backend):
        sharing = cast(Prefixes, backend)
        sweeps = [_Sweep(ones.pop(dim), backend, wants, into={}, share=share) for dim in common]
        yield from zip(common, together.Together(sweeps, sharing).run(), strict=True)
    for dim, one in ones.items():
        yield dim, _swept(one, backend, wants, share, into={})


def _total(parts: Sequence[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return torch.stack(given).sum(0) if given else None


@torch.no_grad()
def top_rows(problem: Problem, backend: Sweeps) -> tuple[Tensor, Tensor]:
    """Returns each row's largest logit and its column, the first on ties; -inf and -1 if no column competes."""
    if not problem.rows or not problem.columns:
        return torch.full_like(problem.weight, -torch.inf), torch.full_like(problem.target, -1)
    with torch.autocast(problem.device.type, enabled=False):
        admission = Admission(Inputs(problem, backend, False))
        found = [backend.top_rows(admission.strips(chunk)) for chunk in admission.stats_chunks()]
    values, columns = zip(*found, strict=True)
    return _joined(values), _joined(columns)


@torch.no_grad()
def opposed_rows(problem: Problem, backend: Sweeps) -> tuple[Tensor, Tensor] | None:
    """`triangle.tops`, with autocast off."""
    with torch.autocast(problem.device.type, enabled=False):
        return tops(problem, backend)


class _Sweep:
    """One sweep: its inputs, admission, gradients, and the modes in which chunks are walked."""

    def __init__(
        self,
        problem: Problem,
        backend: Sweeps,
        wants: Wants,
        elsewhere: Elsewhere | None = None,
        into: Mapping[int, Tensor] | None = None,
        half: bool = False,
        share: float = 1.0,
    ):
        """into, share: see `Gradients`. half: whether `halved` has returned the problem."""
        self.half = half
        self.problem, self.backend, self.wants = problem, backend, wants
        self.inputs = Inputs(problem, backend, wants.scale, elsewhere, wants.any)
        self.admission = Admission(self.inputs, elsewhere)
        self.by_row_smoothing = problem.smooths_by_row
        counts = problem.wants_tally or self.by_row_smoothing
        self.tally = Tally.empty(problem.rows, problem.weight) if counts else None
        self.smoothing = Smoothing(self.inputs) if problem.label_smoothing and not self.by_row_smoothing else None
        self.inputs.admitted = None if self.tally is None else self.tally.admitted
        self.gradients = Gradients(self.inputs, wants, into, half, share)

    def run(self) -> Result:
        problem = self.problem
        counted: list[Tensor] = []
        if not problem.rows and not (problem.symmetric and problem.ranks):
            losses = torch.empty_like(problem.weight)
        elif problem.fold is not None:
            losses, counted = self._halves().fold() if self.half else self._folded()
        elif problem.symmetric:
            losses = self._symmetric()
        elif self.half:
            losses = self._halves().softmax()
        elif self.wants.any:
            losses = self._one_directional()
        else:
            found = [self._stats(c, self.admission.strips(c))[0].loss for c in self.admission.stats_chunks()]
            losses = _joined(found)
        if self.smoothing is not None:
            losses += self.smoothing.losses()
        if self.tally is not None and problem.wants_tally:
            score = self.inputs.prepared.score.to(self.inputs.dtype)
            count, above, maximum = self.tally[:3]
            # Kernels compare, and nothing is larger than NaN. A loss is NaN that no score or weight made so.
            spoilt = losses.isnan() & score.isfinite() & (problem.weight == problem.weight) & (maximum != torch.inf)
            counted = [count, above, maximum.masked_fill(spoilt, torch.nan), score]
        return self.result(losses, counted)

    def result(self, losses: Tensor, counted: list[Tensor]) -> Result:
        gradients = self.gradients
        operands: tuple[Tensor | None, ...] = (None,) * len(self.problem.operands)
        for terms in self.inputs.by_scale:
            gradients.add_scale(terms)
        if self.wants.any:
            gradients.undo_gain()
            if self.smoothing is not None:
                self.smoothing.add_to(gradients)
            operands = gradients.finished()
            gradients.share_others()
        narrowed = [None if g is None else g.to(self.inputs.dtype) for g in (gradients.scale, *gradients.scalars)]
        scalars = narrowed[1:]
        if self.problem.fold is not None and self.problem.fold.beside is not None:
            scalars.append(gradients.beside)
        return Result(losses, operands, narrowed[0], tuple(gradients.biases), tuple(scalars), counted)

    def _halves(self) -> Triangle | Staircase:
        return (Triangle if self.backend.can_halve(self.problem) else Staircase)(self)

    def _chunks(self) -> list[tuple[slice, list[Tensor]]]:
        """Yields chunks of rows, and each block's part of the workspace for them."""
        workspace = chunks.workspace(self.problem, self.backend)
        return [
            (chunk, chunks.of_blocks(self.problem, workspace, chunk))
            for chunk in slices(self.problem.rows, workspace.shape[0])
        ]

    # One direction ----------------------------------------------------------------------------------------------------

    def _one_directional(self) -> Tensor:
        write = self._exp_chunk if self.backend.can_exp(self.problem) else self._grad_chunk
        return _joined([write(chunk, outs).loss for chunk, outs in self._chunks()])

    def _exp_chunk(self, chunk: slice, outs: list[Tensor]) -> Settled:
        """Writes E = exp(z - shift) to the workspace; weight / l is folded into the operands of the two GEMMs."""
        strips, target_sim = self.admission.strips(chunk), part(self.inputs.target_sim, chunk)
        sums, q = self.backend.exp_rows(self.problem, strips, outs, target_sim, *self.counts(chunk))
        return self.after_exp(chunk, outs, sums, q)

    def after_exp(self, chunk: slice, outs: list[Tensor], sums: RowSums, q: Tensor | None) -> Settled:
        """Settles the rows of a chunk whose exponentials are stored, and adds their products to the gradients."""
        inputs, gradients = self.inputs, self.gradients
        queries = gradients.queries(chunk)
        rows = inputs.settle(
            chunk,
            sums,
            patch=inputs.patch(chunk, outs[0]),
            scaled=list(queries.values()),
            dtype=gemm_dtype(self.problem, outs[0].dtype),
        )
        gradients.contract(chunk, outs, dict(zip(queries, rows.scaled, strict=True)), rows.weight)
        gradients.add_scale(None if q is None else rows.weight * q)
        return rows

    def _grad_chunk(self, chunk: slice, outs: list[Tensor]) -> Settled:
        """Without a safe shift: computes the row's log-sum-exp first, then dz itself."""
        strips = self.admission.strips(chunk)
        rows, smooth = self._stats(chunk, strips)
        softmax = rows.softmax(part(self.inputs.target_sim, chunk))
        self._grad(chunk, strips, outs, softmax, None, rows.entry, smooth, rows.further)
        return rows

    def _grad(
        self,
        chunk: slice,
        strips: list[Strip],
        outs: list[Tensor],
        rows: Softmax,
        columns: Softmax | None,
        entry: Tensor,
        smooth: Tensor | None = None,
        further: Tensor | None = None,
    ) -> None:
        gain, targets = self.gradients.gain, self.problem.targets
        q = self.backend.grad_rows(strips, outs, rows, columns, entry, gain, smooth)
        if targets is not None and further is not None:
            patch = self.inputs.patch(chunk, outs[0])._replace(target=rows_of(targets.columns, chunk)[:, 1:])
            add_entries(patch, further if gain is None else further * gain)
        self.gradients.contract(chunk, outs)
        self.gradients.add_scale(q)

    def _stats(self, chunk: slice, strips: list[Strip]) -> tuple[Settled, Tensor | None]:
        """Returns the rows' losses, and what smoothing subtracts from each admissible entry if rows differ in it."""
        inputs = self.inputs
        sums = self.backend.stats_rows(strips, *self.counts(chunk))
        if not self.by_row_smoothing or self.tally is None:
            return inputs.settle(chunk, sums), None
        count, *_, z, sim = (rows_of(t, chunk) for t in self.tally)
        weight, score = (rows_of(t, chunk) for t in (self.problem.weight, inputs.prepared.score))
        spread = self.problem.label_smoothing * weight  # over the target and `count` others
        smooth = spread / (count + 1)
        rows = inputs.settle(chunk, sums, smooth=smooth)
        score = score.to(z.dtype)
        loss = rows.loss + (spread * score - smooth * (z + score)).masked_fill(weight == 0, 0)
        target_sim = part(inputs.target_sim, chunk)
        if target_sim is not None:
            self.gradients.add_scale(spread * target_sim - smooth * (sim + target_sim))
        return rows._replace(loss=loss), smooth

    def counts(self, chunk: slice) -> tuple[Tally | None, Tensor | None]:
        """Returns the chunk's part of the tally, and the logits above which columns rank before the targets."""
        if self.tally is None:
            return None, None
        score = self.inputs.prepared.score.to(self.inputs.dtype)
        ties = self.admission.ties if self.problem.wants_tally else 0.0
        above = above_ties(score, ties, self.problem.scale)
        return Tally(*(rows_of(t, chunk) for t in self.tally)), rows_of(above, chunk)

    # Other functions of a row's similarities --------------------------------------------------------------------------

    def _folded(self) -> tuple[Tensor, list[Tensor]]:
        workspace, fold = chunks.workspace(self.problem, self.backend), self.problem.fold
        in_torch = fold is not None and fold.teachers and not self.backend.can_fold(self.problem)
        teacher = torch.zeros_like(workspace) if in_torch else None
        found = []
        for chunk in slices(self.problem.rows, workspace.shape[0]):
            strips = self.admission.strips(chunk)
            found.append(fold_chunk(self.inputs, self.gradients, chunk, strips, workspace, teacher))
        counts = [folded.count for folded in found if folded.count is not None]
        return _joined([folded.loss for folded in found]), [torch.cat(counts)] if counts else []

    # Both directions --------------------------------------------------------------------------------------------------

    def _symmetric(self) -> Tensor:
        """Both normalisers must be known before any dz: one stats sweep that folds rows and columns, one grad sweep.

        If all of E fits the workspace and one shift serves rows and columns, E is stored instead of computed twice.
        """
        problem, backend, inputs, ranks = self.problem, self.backend, self.inputs, self.problem.ranks
        weight = problem.weight / 2
        if self.wants.any and self.tally is None and ranks is None and backend.can_store(problem):
            if workspace_shape(problem, backend)[0][0] == problem.rows:
                return self._stored(weight)
        columns: RowSums | None = None
        found = []
        for chunk in self.admission.stats_chunks():
            sums, more = backend.stats_rows_and_columns(self.admission.strips(chunk)[0], *self.counts(chunk))
            found.append(inputs.settle(chunk, sums, weight)[:4])
            if chunk.stop - chunk.start == problem.rows and ranks is None:
                columns = more
            else:
                columns = backend.merge(columns or RowSums.empty(problem.columns, weight), more)
        if not found:  # one of several ranks, without rows
            found = [(weight, weight, weight, weight)]
        loss, shift, over_l, entries = (_joined(vectors) for vectors in zip(*found, strict=True))
        rows = Settled(loss, shift, over_l, entries, [])
        if ranks is not None:  # this rank settles its own columns: their targets are its rows
            shift, total = merge_columns(columns or RowSums.empty(problem.columns, weight), ranks)
            columns = RowSums(shift[: problem.rows], total[: problem.rows])
        assert columns is not None  # found has a chunk, or ranks have
        by_column = inputs.settle_columns(columns, weight)
        by_row, column_softmax = rows.softmax(inputs.target_sim), by_column.softmax(inputs.target_sim)
        if ranks is not None:
            known = [t for t in column_softmax if t is not None]
            everywhere = gather(torch.stack(known, 1), ranks).unbind(1)
            column_softmax = Softmax(*(t.contiguous() for t in everywhere), *[None] * (3 - len(known)))
        if self.wants.any and problem.rows:
            self._differentiate(by_row, column_softmax, rows.entry + by_column.entry)
        return rows.loss + by_column.loss

    def _differentiate(
        self, rows: Softmax, columns: Softmax | None, entry: Tensor, further: Tensor | None = None
    ) -> None:
        """Computes the gradients of all rows, whose softmax is known; `entry` and `further` are the targets'."""
        for chunk, outs in self._chunks():
            of_chunk = rows.map(functools.partial(rows_of, part=chunk))
            strips, more = self.admission.strips(chunk), part(further, chunk)
            self._grad(chunk, strips, outs, of_chunk, columns, rows_of(entry, chunk), further=more)

    def _stored(self, weight: Tensor) -> Tensor:
        ((chunk, outs),) = self._chunks()
        inputs, backend = self.inputs, cast(Stores, self.backend)
        sums, column_sums = backend.exp_rows_and_columns(self.problem, self.admission.strips(chunk)[0], outs[0])
        rows = inputs.settle(chunk, sums, weight)
        columns = inputs.settle_columns(column_sums, weight)
        entry = rows.entry + columns.entry
        backend.weigh(inputs.patch(chunk, outs[0]), rows.weight, columns.weight, entry)
        self.gradients.contract(chunk, outs)
        return rows.loss + columns.loss


class Partial(_Sweep):
    """A sweep over some of a row's columns; the normaliser is known only after all of them (`ring`)."""

    @property
    def prepared(self) -> Prepared:
        return self.inputs.prepared

    def taken_along(self) -> Elsewhere:
        """Returns what sweeps over other columns need from this one, which has the targets."""
        thresholds = tuple(None if mask is None else mask.threshold for mask in self.admission.masks)
        return Elsewhere(thresholds, self.admission.guide_scores())

    def sums(self) -> tuple[RowSums, RowSums | None]:
        """Returns the rows' sums, and the columns' if the problem is symmetric."""
        problem, backend, found = self.problem, self.backend, []
        columns = RowSums.empty(problem.columns, problem.weight) if problem.symmetric else None
        for chunk in self.admission.stats_chunks() if problem.columns else ():
            strips = self.admission.strips(chunk)
            if columns is None:
                rows = backend.stats_rows(strips, *self.counts(chunk))
            else:
                rows, more = backend.stats_rows_and_columns(strips[0])
                columns = backend.merge(columns, more)
            found.append(backend.merge(RowSums.empty(chunk.stop - chunk.start, problem.weight), rows))
        if not found:
            return RowSums.empty(problem.rows, problem.weight), columns
        return RowSums(*(_joined(vectors) for vectors in zip(*found, strict=True))), columns

    def differentiate(
        self, rows: Softmax, columns: Softmax | None, entry: Tensor, further: Tensor | None = None
    ) -> Result:
        """Returns the gradients of the sum of the losses of rows whose softmax is known; `entry` and `further` are the
        targets'."""
        if self.problem.rows and self.problem.columns:
            self._differentiate(rows, columns, entry, further)
        return self.result(entry, [])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
