"""The one sweep: row chunks, a bounded workspace, and two plain GEMMs per block by the vendor's library.

    for each row chunk:   z tile -> exp or dz in the workspace       (a backend's primitive)
                          dx[chunk] = W @ y,   dy += W.T @ x[chunk]   (torch.mm, fp32 accumulation)

No tensor here grows with M x N. What comes out are gradients of the *sum* of the weighted losses; the caller multiplies
by upstream / denominator in fp32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, products
from .collectives import gather, merge_columns
from .folds import FOLDS, Folded
from .prefixes import sweep_prefixes
from .problem import (
    NORM_EPS,
    Block,
    Patch,
    Prepared,
    Problem,
    RowSums,
    Settled,
    Softmax,
    Strip,
    StripMask,
    Tally,
    autocasting,
    rows_of,
    saved_dtype,
    stats_dtype,
)
from .products import add_mm, mm
from .rows import (
    above_ties,
    fold_part,
    fold_scalars,
    fresh,
    largest_finite,
    power_of_two,
    row_chunks,
    score_ties,
    squared_distances,
    tie_to_exact,
)
from .waves import wave_rows

MIB = 1 << 20
GIB = 1 << 30
# The workspace holds one row chunk. CPU: 256 rows at N = 65536, 1024 at 16384.
CPU_BYTES, CPU_ROWS = checks.WORKSPACE_BYTES["cpu"], 1024
MIN_ROWS = 64  # fewer make dy's rank-k update memory-bound
# On a GPU dy's accumulation costs 244 / rows of the products' time on an H200 (6 % at 4096), at any N and D: a chunk of
# 4096 rows is worth 1 GiB at N = 131072, 8 GiB at N = 2**20, where the card has it.
CUDA_BYTES, CUDA_ROWS = checks.WORKSPACE_BYTES["cuda"], 8448
CUDA_LEAST_ROWS, CUDA_SHARE = 3840, 16  # rows that the default may exceed CUDA_BYTES for; at most this part of the card
STATS_ROWS = {"cpu": 1024, "cuda": CUDA_ROWS}  # a sweep that stores nothing has partial sums only
DISTANCE_COLUMNS = 512  # whose distances stand in fp64: 4 MiB at 1024 rows, a few times
CONVERTED_COLUMNS = 4096  # where a product wants another dtype, the workspace is converted tile by tile
PAD = 16  # elements: each block's part of a workspace row starts aligned for 16-byte accesses


class Wants(NamedTuple):
    """Which gradients are asked for."""

    operands: tuple[bool, ...]
    scale: bool
    biases: tuple[bool, ...]  # one per block
    scalars: tuple[bool, ...] = ()  # a fold's own

    @property
    def any(self) -> bool:
        return self.scale or any(self.operands) or any(self.biases) or any(self.scalars)


class Result(NamedTuple):
    rows: Tensor  # [M] weighted losses
    operands: tuple[Tensor | None, ...]  # gradients of rows.sum(), in saved_dtype
    scale: Tensor | None
    biases: tuple[Tensor | None, ...]
    scalars: tuple[Tensor | None, ...]
    counted: list[Tensor]  # each [M]: the start of a Tally and the target's logit, or what a fold's sum is divided by


@torch.no_grad()
def run(problem: Problem, backend: ModuleType, wants: Wants) -> Result:
    """The weighted losses and the gradients of their sum."""
    once = _prefixed if problem.prefixes else _swept
    if not autocasting(problem.operands[0]):
        return once(problem, backend, wants)
    with torch.autocast(problem.device.type, enabled=False):
        return once(problem, backend, wants)


def _swept(problem: Problem, backend: ModuleType, wants: Wants) -> Result:
    return _Sweep(problem, backend, wants).run()


def _prefixed(problem: Problem, backend: ModuleType, wants: Wants) -> Result:
    """All prefixes out of one similarity product: `prefixes.py`, which walks the same chunks."""
    width, columns = len(problem.prefixes), problem.columns
    chunk = STATS_ROWS.get(problem.device.type, STATS_ROWS["cpu"])
    if wants.any:
        sizes = (problem.rows, width * columns, problem.operands[0].shape[1])
        chunk = chunk_rows(*sizes, stats_dtype(problem.dtype).itemsize, problem.device, problem.workspace_bytes)
    found = sweep_prefixes(
        problem.operands,
        [(block.query, block.key, block.bias) for block in problem.blocks],
        problem.scale,
        problem.target,
        problem.weight,
        problem.prefixes,
        problem.prefix_weights,
        wants.operands,
        wants.scale,
        wants.biases,
        chunk=chunk,
        admit=_Admission(problem, backend) if problem.masked else None,
        copies=problem.copies,
    )
    kept = saved_dtype(problem.dtype)
    gradients = tuple(None if g is None else g.to(kept) for g in found.gradients)
    return Result(found.losses, gradients, found.scale, found.biases, (), [])


class _Admission:
    """Which columns may compete, asked for tile by tile; a guide answers for a chunk at a time."""

    def __init__(self, problem: Problem, backend: ModuleType):
        wants = Wants((False,) * len(problem.operands), False, (False,) * len(problem.blocks))
        self.backend = backend
        self.sweep, self.chunk = _Sweep(problem, backend, wants), slice(0, 0)
        self.masks: list[StripMask | None] = []

    def __call__(self, block: int, rows: slice, columns: slice) -> Tensor | None:
        if rows != self.chunk:
            self.masks = [strip.mask for strip in self.sweep._strips(rows)]
            self.chunk = rows
        mask = self.masks[block]
        return None if mask is None else self.backend.admitted(mask, columns)


@torch.no_grad()
def top_rows(problem: Problem, backend: ModuleType) -> tuple[Tensor, Tensor]:
    """Each row's largest logit and its column, the first on ties; -inf and -1 where no column competes."""
    wants = Wants((False,) * len(problem.operands), False, (False,) * len(problem.blocks))
    with torch.autocast(problem.device.type, enabled=False):
        return _Sweep(problem, backend, wants).top_rows()


# Chunks ---------------------------------------------------------------------------------------------------------------


def chunk_rows(M: int, N: int, D: int, itemsize: int, device: torch.device, workspace_bytes: int | None = None) -> int:
    """Rows a chunk, so that `rows * N * itemsize` keeps to the budget: the argument, the environment, the default."""
    name, workspace_bytes = checks.budget(workspace_bytes)
    row_bytes = max(1, N * itemsize)
    if workspace_bytes is not None and workspace_bytes < row_bytes and M:
        raise ValueError(
            f"{name} is {workspace_bytes}: one row of {N} similarities takes {row_bytes} bytes; "
            f"allow {MIN_ROWS} rows, {MIN_ROWS * row_bytes} bytes, or more"
        )
    if device.type == "cuda":
        card = _properties(device)
        least = min(CUDA_LEAST_ROWS * row_bytes, card.total_memory // CUDA_SHARE)
        budget = max(CUDA_BYTES, least) if workspace_bytes is None else workspace_bytes
        return wave_rows(M, D, min(CUDA_ROWS, budget // row_bytes), card.multi_processor_count)
    rows = min(CPU_ROWS, (workspace_bytes or CPU_BYTES) // row_bytes)
    if rows < MIN_ROWS and workspace_bytes is not None:
        return min(max(rows, 1), max(M, 1))
    return max(1, min(max(MIN_ROWS, rows // MIN_ROWS * MIN_ROWS), M))


def workspace_shape(problem: Problem, backend: ModuleType) -> tuple[tuple[int, int], torch.dtype]:
    """(rows, columns) and dtype of the workspace; raises where the budget does not allow one."""
    dtype, D = backend.workspace_dtype(problem), problem.operands[0].shape[1]
    width = sum(_block_widths(problem))
    beside = math.ceil(width * backend.workspace_copies(problem))
    rows = chunk_rows(problem.rows, beside, D, dtype.itemsize, problem.device, problem.workspace_bytes)
    return (rows, width), dtype


def _block_widths(problem: Problem) -> list[int]:
    return [-(-problem.operands[block.key].shape[0] // PAD) * PAD for block in problem.blocks]


@functools.cache
def _properties(device: torch.device):
    return torch.cuda.get_device_properties(device)


class Elsewhere(NamedTuple):
    """What a sweep over columns that hold no targets is told of them; rows `[M]`."""

    thresholds: tuple[Tensor | None, ...]  # of each block's margin
    guide: Tensor | None  # the guide's similarity of the target
    targets: bool = False  # some rows' targets are here all the same


class _Sweep:
    """The state of one sweep: what is precomputed per row and column, and the accumulators."""

    def __init__(
        self,
        problem: Problem,
        backend: ModuleType,
        wants: Wants,
        elsewhere: Elsewhere | None = None,
        into: Mapping[int, Tensor] | None = None,
    ):
        """into: where the gradient of an operand that is only ever a query is added; the others then are in fp32."""
        self.problem, self.backend, self.wants, self.elsewhere, self.into = problem, backend, wants, elsewhere, into
        self.dtype = stats_dtype(problem.dtype)
        self.operands = [backend.operand(x) for x in problem.operands]
        self.biases = [None if b.bias is None else b.bias.to(self.dtype).contiguous() for b in problem.blocks]
        self.prepared = self._prepare()
        self.norms = self._norms()
        self.given, self.factors = self.operands, self.norms
        self.units = bool(backend.takes_units(problem))
        if self.units:
            self.operands = [_unit(x, factor) for x, factor in zip(self.given, self.norms, strict=True)]
            self.factors = [None] * len(self.operands)
        self.masks = [self._mask(number, block) for number, block in enumerate(problem.blocks)]
        own = {id(x): x for block in problem.blocks for x in block.mask.guide or ()}
        self.unit_guides = bool(own) and backend.takes_units(
            replace(problem, operands=tuple(own.values()), cosine=True, label_smoothing=0.0)
        )
        self.guides = self._guides()
        self.room: Tensor | None = None  # for what guides say of a chunk
        penalties = [p for block in problem.blocks for p in (block.penalty, block.own_penalty)]
        self.scales = {p: problem.scale + p if p else problem.scale for p in penalties}
        self.own = torch.arange(problem.rows, device=problem.device) if any(penalties) else None
        self.by_row_smoothing = problem.smooths_by_row
        counts = problem.wants_tally or self.by_row_smoothing
        self.tally = Tally.empty(problem.rows, problem.weight) if counts else None
        self.count: list[Tensor] = []
        self.bias_grads = [
            torch.zeros_like(bias) if wanted and bias is not None else None
            for bias, wanted in zip(self.biases, wants.biases, strict=True)
        ]
        # Of rows and chunks whose parts cancel: fp64 costs nothing here.
        wide = torch.float64 if problem.device.type in ("cpu", "cuda") else self.dtype
        self.scale_grad = torch.zeros_like(problem.scale, dtype=wide) if wants.scale else None
        self.scalar_grads = [torch.zeros_like(problem.scale, dtype=wide) if x else None for x in wants.scalars]
        self.smoothing = _Smoothing(self) if problem.label_smoothing and not self.by_row_smoothing else None
        self.gain = self._gain()
        self.gradients = [self._gradient(number) if wanted else None for number, wanted in enumerate(wants.operands)]

    def run(self) -> Result:
        if not self.problem.rows and not (self.problem.symmetric and self.problem.ranks):
            losses = torch.empty_like(self.problem.weight)
        elif self.problem.fold is not None:
            losses = self._folded()
        elif self.problem.symmetric:
            losses = self._symmetric()
        elif self.wants.any:
            losses = self._one_directional()
        else:
            losses = _joined([self._stats(chunk, self._strips(chunk))[0].loss for chunk in self._stats_chunks()])
        if self.smoothing is not None:
            losses += self.smoothing.losses(self)
        gradients = self._finish() if self.wants.any else (None,) * len(self.operands)
        counted = self.count
        if self.tally is not None and self.problem.wants_tally:
            counted = [*self.tally[:3], self.prepared.score.to(self.dtype)]
        by_scale, *scalars = (None if g is None else g.to(self.dtype) for g in (self.scale_grad, *self.scalar_grads))
        return Result(losses, gradients, by_scale, tuple(self.bias_grads), tuple(scalars), counted)

    def top_rows(self) -> tuple[Tensor, Tensor]:
        if not self.problem.rows or not self.problem.columns:
            found = [self._no_top()]
        else:
            found = [self.backend.top_rows(self._strips(chunk)) for chunk in self._stats_chunks()]
        values, columns = zip(*found, strict=True)
        return _joined(list(values)), _joined(list(columns))

    def _no_top(self) -> tuple[Tensor, Tensor]:
        weight = self.problem.weight
        return torch.full_like(weight, -torch.inf), torch.full_like(self.problem.target, -1)

    # One direction ----------------------------------------------------------------------------------------------------

    def _one_directional(self) -> Tensor:
        workspace = self._workspace()
        write = self._exp_chunk if self.backend.can_exp(self.problem) else self._grad_chunk
        return _joined(
            [
                write(chunk, self._outs(workspace, chunk)).loss
                for chunk in _chunks(self.problem.rows, workspace.shape[0])
            ]
        )

    def _exp_chunk(self, chunk: slice, outs: list[Tensor]) -> Settled:
        """E = exp(z - shift) in the workspace; weight / l is folded into the operands of the two GEMMs."""
        strips, counts = self._strips(chunk), self._counts(chunk)
        sums, q = self.backend.exp_rows(self.problem, strips, outs, self._wanted_target_sim(chunk), *counts)
        dtype = _gemm_dtype(self.problem, outs[0].dtype)
        queries = self._queries(chunk)
        rows = self._settle(
            chunk,
            sums,
            patch=self._patch(chunk, outs[0]),
            scaled=list(queries.values()),
            dtype=dtype,
        )
        self._contract(chunk, outs, dict(zip(queries, rows.scaled, strict=True)), rows.weight)
        if q is not None and self.scale_grad is not None:
            self.scale_grad += (rows.weight * q).sum(dtype=self.scale_grad.dtype)
        return rows

    def _grad_chunk(self, chunk: slice, outs: list[Tensor]) -> Settled:
        """Where no shift is known to be safe: the row's log-sum-exp first, then dz itself."""
        strips = self._strips(chunk)
        rows, smooth = self._stats(chunk, strips)
        self._grad(chunk, strips, outs, rows.softmax(self._wanted_target_sim(chunk)), None, rows.entry, smooth)
        return rows

    def _stats(self, chunk: slice, strips: list[Strip]) -> tuple[Settled, Tensor | None]:
        """The rows' losses, and what smoothing takes from each admissible entry where a mask makes that differ."""
        sums = self.backend.stats_rows(strips, *self._counts(chunk))
        if not self.by_row_smoothing or self.tally is None:
            return self._settle(chunk, sums), None
        count, *_, z, sim = (rows_of(t, chunk) for t in self.tally)
        weight, score = (rows_of(t, chunk) for t in (self.problem.weight, self.prepared.score))
        spread = self.problem.label_smoothing * weight  # over the target and `count` others
        smooth = spread / (count + 1)
        rows = self._settle(chunk, sums, smooth=smooth)
        score = score.to(z.dtype)
        loss = rows.loss + (spread * score - smooth * (z + score)).masked_fill(weight == 0, 0)
        target_sim = self._wanted_target_sim(chunk)
        if self.scale_grad is not None and target_sim is not None and self.wants.any:
            self.scale_grad += (spread * target_sim - smooth * (sim + target_sim)).sum(dtype=self.scale_grad.dtype)
        return rows._replace(loss=loss), smooth

    def _counts(self, chunk: slice) -> tuple[Tally | None, Tensor | None]:
        if self.tally is None:
            return None, None
        score, ties = self.prepared.score.to(self.dtype), self.ties if self.problem.wants_tally else 0.0
        return Tally(*(rows_of(t, chunk) for t in self.tally)), rows_of(
            above_ties(score, ties, self.problem.scale), chunk
        )

    @functools.cached_property
    def ties(self) -> Tensor | float:
        """By how much a similarity may exceed the row's target's and still be a tie, `[M]` or a number."""
        first = self.problem.blocks[0]
        if self.problem.cosine:
            return tie_to_exact(self.operands[first.query])
        x, y = self.operands[first.query][: self.problem.rows], self.operands[first.key]
        return score_ties(x, y, self.problem.target.clamp(min=0))

    # Other functions of a row's similarities --------------------------------------------------------------------------

    def _folded(self) -> Tensor:
        workspace = self._workspace()
        losses = []
        for chunk in _chunks(self.problem.rows, workspace.shape[0]):
            outs = self._outs(workspace, chunk)
            losses.append(self._fold_chunk(chunk, self._strips(chunk)[0], outs[0]))
        return _joined(losses)

    def _fold_chunk(self, chunk: slice, strip: Strip, out: Tensor) -> Tensor:
        """The whole rows of a chunk are in the workspace: similarities, then the gradient by them."""
        fold, block = self.problem.fold, self.problem.blocks[0]
        assert fold is not None
        part = fold_part(self.problem, chunk)
        if self.backend.can_fold(self.problem):
            score = rows_of(self.prepared.score, chunk)
            folded = self.backend.fold_rows(self.problem, strip, out if self.wants.any else None, part, score)
            self._add_fold(folded)
            if self.wants.any:
                self._contract(chunk, [out], self._queries(chunk), None)
            return folded.loss
        apart = None
        if fold.distance in ("euclidean", "squared"):
            apart = self._distances(chunk, out)
        else:
            self.backend.similarities(strip, out)
            if fold.distance == "cosine":
                torch.sub(1, out, out=out)
        folded = FOLDS[fold.name][0](out, part, fold_scalars(self.problem), fold.options, self.wants.any)
        self._add_fold(folded)
        if not self.wants.any:
            return folded.loss
        if fold.distance == "cosine":
            out.neg_()
        elif apart is not None:
            # d |x - y|^2 = 2 (x - y) (dx - dy), and d|x - y| its half over the distance; 0 where that is 0.
            out.div_(apart).masked_fill_(apart == 0, 0) if fold.distance == "euclidean" else out.mul_(2)
        if strip.row_factor is not None and strip.col_factor is not None:
            out.mul_(strip.row_factor[:, None]).mul_(strip.col_factor)
        out = self._narrowed(out)
        if apart is not None:  # of what is multiplied: `dx_i = sum_j dz_ij (x_i - y_j)` may cancel
            for number, rows, dim in ((block.query, chunk, 1), (block.key, slice(None), 0)):
                gradient = self.gradients[number]
                if gradient is not None:
                    own, sums = self.operands[number][rows].to(self.dtype), out.sum(dim, dtype=self.dtype)
                    gradient.accumulator()[rows].addcmul_(own, sums[:, None])
            out.neg_()
        self._contract(chunk, [out], self._queries(chunk), None)
        return folded.loss

    def _narrowed(self, out: Tensor) -> Tensor:
        """The gradient by the similarities in the inputs' dtype, where that is what the device multiplies fastest."""
        dtype = self.problem.dtype
        if not products.narrow(dtype, self.problem.device):
            return out
        if self.gain is not None:
            self._fit(out, self.gain)
        return torch.empty_strided(out.shape, out.stride(), dtype=dtype, device=out.device).copy_(out)

    def _fit(self, out: Tensor, gain: Tensor) -> None:
        """`out` times the gain, made smaller first where `out` would leave fp16.

        How large a fold's derivative gets is only seen when it is there. What was accumulated in the larger gain is
        brought to the smaller one: both are powers of two.
        """
        fits = torch.minimum(gain, power_of_two(15 - torch.log2(largest_finite(out))))
        for gradient in self.gradients:
            if gradient is not None and gradient.total is not None:
                gradient.total.mul_(fits / gain)
        out.mul_(gain.copy_(fits))

    def _add_fold(self, folded: Folded) -> None:
        if folded.count is not None:
            self.count = [torch.cat([*self.count, folded.count])]
        if self.wants.any:
            for total, part in zip([self.scale_grad, *self.scalar_grads], folded.scalars, strict=False):
                if total is not None:
                    total += part

    def _distances(self, chunk: slice, out: Tensor) -> Tensor:
        """Writes distances, of which it returns a copy; a tile of columns at a time, in torch on every backend."""
        fold, block = self.problem.fold, self.problem.blocks[0]
        assert fold is not None
        x, y = self.operands[block.query][chunk], self.operands[block.key]
        for start in range(0, len(y), DISTANCE_COLUMNS):
            tile = slice(start, start + DISTANCE_COLUMNS)
            out[:, tile] = squared_distances(x, y[tile])
        if fold.itself:
            out.diagonal(chunk.start).zero_()
        return out.sqrt_().clone() if fold.distance == "euclidean" else out

    # Both directions --------------------------------------------------------------------------------------------------

    def _symmetric(self) -> Tensor:
        """Both normalisers must be known before any dz: one stats sweep that folds rows and columns, one grad sweep.

        Where all of E fits the workspace and one shift serves rows and columns, it is stored instead of computed twice.
        """
        score, weight = self.prepared.score, self.problem.weight / 2
        ranks = self.problem.ranks
        if self.wants.any and self.tally is None and ranks is None and self.backend.can_store(self.problem):
            workspace = self._workspace()
            if workspace.shape[0] == self.problem.rows:
                return self._stored(workspace, weight)
        columns: RowSums | None = None
        chunks = []
        for chunk in self._stats_chunks():
            sums, more = self.backend.stats_rows_and_columns(self._strips(chunk)[0], *self._counts(chunk))
            chunks.append(self._settle(chunk, sums, weight)[:4])
            if chunk.stop - chunk.start == self.problem.rows and ranks is None:
                columns = more
            else:
                columns = self.backend.merge(columns or RowSums.empty(self.problem.columns, weight), more)
        if not chunks:  # one of several ranks, without rows
            chunks = [(weight, weight, weight, weight)]
        loss, shift, over_l, entries = (_joined(list(parts)) for parts in zip(*chunks, strict=True))
        rows = Settled(loss, shift, over_l, entries, [])
        if ranks is not None:  # this rank settles its own columns, whose targets are its rows
            shift, total = merge_columns(columns or RowSums.empty(self.problem.columns, weight), ranks)
            columns = RowSums(shift[: self.problem.rows], total[: self.problem.rows])
        by_column = self.backend.settle(columns, score, weight)
        target_sim = self.prepared.target_sim if self.wants.scale else None
        by_row, column_softmax = rows.softmax(target_sim), by_column.softmax(target_sim)
        if ranks is not None:
            known = [t for t in column_softmax if t is not None]
            everywhere = gather(torch.stack(known, 1), ranks).unbind(1)
            column_softmax = Softmax(*(t.contiguous() for t in everywhere), *[None] * (3 - len(known)))
        if self.wants.any and self.problem.rows:
            entry = rows.entry + by_column.entry
            workspace = self._workspace()
            for chunk in _chunks(self.problem.rows, workspace.shape[0]):
                part, outs = by_row.map(functools.partial(rows_of, part=chunk)), self._outs(workspace, chunk)
                self._grad(chunk, self._strips(chunk), outs, part, column_softmax, rows_of(entry, chunk))
        return rows.loss + by_column.loss

    def _stored(self, workspace: Tensor, weight: Tensor) -> Tensor:
        chunk = slice(0, self.problem.rows)
        outs = self._outs(workspace, chunk)
        sums, column_sums = self.backend.exp_rows_and_columns(self.problem, self._strips(chunk)[0], outs[0])
        rows = self._settle(chunk, sums, weight)
        columns = self.backend.settle(column_sums, self.prepared.score, weight)
        entry = rows.entry + columns.entry
        self.backend.weigh(self._patch(chunk, outs[0]), rows.weight, columns.weight, entry)
        self._contract(chunk, outs, self._queries(chunk), None)
        return rows.loss + columns.loss

    # Pieces -----------------------------------------------------------------------------------------------------------

    def _prepare(self) -> Prepared:
        block = self.problem.blocks[0]
        if self.elsewhere is not None and not self.elsewhere.targets:
            row_factor = col_factor = None
            if self.problem.cosine:
                row_factor, col_factor = (
                    self.backend.inverse_norms(self.operands[n]) for n in (block.query, block.key)
                )
            none = torch.zeros_like(self.problem.weight)
            return Prepared(row_factor, col_factor, none, none)
        return self.backend.prepare(
            self.operands[block.query],
            self.operands[block.key],
            self.problem.target,
            self.problem.scale,
            self.biases[0],
            self.problem.rule,
            cosine=self.problem.cosine,
            wants_target_sim=self.wants.scale or any(b.mask.margin is not None for b in self.problem.blocks),
        )

    def _mask(self, number: int, block: Block) -> StripMask | None:
        """A block's mask for all rows; the threshold of a margin is the target's similarity and the margin."""
        mask = block.mask
        if not mask.given:
            return None
        threshold = None if self.elsewhere is None else self.elsewhere.thresholds[number]
        if mask.margin is not None and threshold is None:
            assert self.prepared.target_sim is not None
            threshold = self.prepared.target_sim + (self.ties + mask.margin)
        return StripMask(mask.compare, mask.dense, threshold, mask.exempt, mask.skip)

    def _guides(self) -> dict[int, Strip]:
        """The guide's embeddings as strips of all rows, by the blocks that it masks; in the first stands the target."""
        if self.problem.blocks[0].mask.guide is None:
            return {}
        one = torch.ones_like(self.problem.scale)
        prepared: dict[int, tuple[Tensor, Tensor | None]] = {}
        strips = {}
        for number, block in enumerate(self.problem.blocks):
            if block.mask.guide is None:  # a direction that the mask does not concern
                continue
            sides = []
            for x in block.mask.guide:
                if id(x) not in prepared:
                    x_ = self.backend.operand(x)
                    factor = self.backend.inverse_norms(x_)
                    prepared[id(x)] = (_unit(x_, factor), None) if self.unit_guides else (x_, factor)
                sides.append(prepared[id(x)])
            (x, row_factor), (y, col_factor) = sides
            target = self.problem.target if number == 0 else None
            strips[number] = Strip(x, y, one.to(stats_dtype(x.dtype)), row_factor, col_factor, None, target)
        return strips

    def _norms(self) -> list[Tensor | None]:
        block = self.problem.blocks[0]
        known = {block.query: self.prepared.row_factor, block.key: self.prepared.col_factor}
        if not self.problem.cosine:
            return [None] * len(self.operands)
        return [
            known[number] if number in known else self.backend.inverse_norms(x)
            for number, x in enumerate(self.operands)
        ]

    def _settle(self, chunk: slice, sums: RowSums, weight: Tensor | None = None, **options) -> Settled:
        weight = self.problem.weight if weight is None else weight
        score, slope = rows_of(self.prepared.score, chunk), _part_or_none(self.prepared.slope, chunk)
        return self.backend.settle(sums, score, rows_of(weight, chunk), self.problem.rule, slope=slope, **options)

    def _patch(self, chunk: slice, out: Tensor) -> Patch:
        block = self.problem.blocks[0]
        row_factor = _part_or_none(self.factors[block.query], chunk)
        return Patch(out, rows_of(self.problem.target, chunk), row_factor, self.factors[block.key])

    def _grad(
        self,
        chunk: slice,
        strips: list[Strip],
        outs: list[Tensor],
        rows: Softmax,
        columns: Softmax | None,
        entry: Tensor,
        smooth: Tensor | None = None,
    ) -> None:
        q = self.backend.grad_rows(strips, outs, rows, columns, entry, self.gain, smooth)
        self._contract(chunk, outs, self._queries(chunk), None)
        if q is not None and self.scale_grad is not None:
            self.scale_grad += q.sum(dtype=self.scale_grad.dtype)

    def _gradient(self, number: int) -> _Gradient:
        finish, scale, gain = self.backend.finish, self.problem.scale, self.gain
        if self.problem.fold is not None:
            scale = torch.ones_like(scale)  # folds give the gradient by the similarity itself
        # Nothing of `self` below: a cycle would keep the gradients until the next collection, and autograd copy them.
        operand, norms, units = self.given[number], self.norms[number], self.units

        def apply(total: Tensor, over_l: Tensor | None, rows: slice, out: Tensor) -> None:
            factor, own = _part_or_none(norms, rows), rows_of(operand, rows)
            more: Tensor | None = None
            if factor is not None and units:  # from the gradient by the unit row
                more = factor
            elif factor is not None and own.dtype == torch.float16:  # see `inverse_norms`
                zero = torch.linalg.vector_norm(own, math.inf, dim=1) == 0
                more = torch.ones_like(factor).masked_fill(zero, 1 / NORM_EPS)
            if more is not None:
                over_l = more if over_l is None else over_l * more
            finish(total, over_l, scale, gain, own, factor, out)

        return _Gradient(self.problem, number, apply, self.into)

    def _queries(self, chunk: slice) -> dict[int, Tensor]:
        """The chunk's rows of what stands against keys whose gradient is wanted: dy += W.T @ x."""
        numbers = {block.query for block in self.problem.blocks if self.wants.operands[block.key]}
        return {number: rows_of(self.operands[number], chunk) for number in sorted(numbers)}

    def _wanted_target_sim(self, chunk: slice) -> Tensor | None:
        return _part_or_none(self.prepared.target_sim, chunk) if self.wants.scale else None

    def _gain(self) -> Tensor | None:
        """Of dz in fp16: the power of two that brings the largest possible one to its upper half.

        What is small would round to 0. |dz| is at most its row's weight times both factors, at the target times its
        slope, and times 1 + 2 z_loss lse, for which there is room up to 16. A fold's is found as it goes, by `_fit`.
        Computed on the device; undone in fp32 after the GEMMs. A row of NaN is the only one that it spoils.
        """
        one = torch.ones_like(self.problem.scale)
        if self.backend.workspace_dtype(self.problem) != torch.float16:
            folds = self.problem.fold is not None and not self.backend.can_fold(self.problem)
            in_fp16 = folds and self.problem.dtype == torch.float16 and products.narrow(torch.float16, one.device)
            return one * 2.0**126 if in_fp16 else None
        largest = [one if f is None or not len(f) else largest_finite(f) for f in self.factors]
        factors = torch.stack([largest[block.query] * largest[block.key] for block in self.problem.blocks]).amax()
        weight = self.problem.weight.abs()
        if self.prepared.slope is not None:
            weight = weight * self.prepared.slope.abs().clamp_min(1)
        weight = largest_finite(weight) if self.problem.rows else one
        return power_of_two((11 if self.problem.z_loss else 15) - torch.log2(factors * weight))

    def _strips(self, chunk: slice) -> list[Strip]:
        strips = []
        for number, block in enumerate(self.problem.blocks):
            mask = self.masks[number]
            other_own = block.own_penalty != block.penalty and number > 0  # in block 0 it is the target
            strips.append(
                Strip(
                    x=rows_of(self.operands[block.query], chunk),
                    y=self.operands[block.key],
                    scale=self.scales[block.penalty],
                    row_factor=_part_or_none(self.factors[block.query], chunk),
                    col_factor=self.factors[block.key],
                    bias=self.biases[number],
                    target=rows_of(self.problem.target, chunk) if number == 0 else None,
                    mask=None if mask is None else mask.rows(chunk),
                    own=_part_or_none(self.own, chunk) if other_own else None,
                    own_scale=self.scales[block.own_penalty] if other_own else None,
                    softcap=self.problem.softcap,
                )
            )
        if self.guides:
            parts = [
                guide._replace(
                    x=rows_of(guide.x, chunk),
                    row_factor=_part_or_none(guide.row_factor, chunk),
                    target=_part_or_none(guide.target, chunk),
                )
                for guide in self.guides.values()
            ]
            if self.room is None:  # the first chunk is the largest
                self.room = fresh(parts[0].scale, self.backend.guide_room(parts[0]))
            own = None if self.elsewhere is None else _part_or_none(self.elsewhere.guide, chunk)
            drops = self.backend.guide_rows(parts, self.problem.guide_rule, self.room, own)
            for number, dropped in zip(self.guides, drops, strict=True):
                mask = strips[number].mask or StripMask()
                strips[number] = strips[number]._replace(mask=mask._replace(dropped=dropped))
        return strips

    def _guide_scores(self) -> Tensor | None:
        if not self.guides:
            return None
        guide, found = self.guides[0], []
        for chunk in self._stats_chunks():
            parts = (
                rows_of(guide.x, chunk),
                _part_or_none(guide.row_factor, chunk),
                _part_or_none(guide.target, chunk),
            )
            strip = guide._replace(x=parts[0], row_factor=parts[1], target=parts[2])
            if self.room is None:  # the first chunk is the largest
                self.room = fresh(strip.scale, self.backend.guide_room(strip))
            found.append(self.backend.guide_scores(strip, self.room))
        return _joined(found) if found else guide.scale.new_empty(0)

    def _stats_chunks(self) -> Iterator[slice]:
        """With a guide the chunks of the sweep that stores: its mask must come out alike in forward and backward."""
        rows = STATS_ROWS.get(self.problem.device.type, STATS_ROWS["cpu"])
        if self.guides:
            rows = workspace_shape(self.problem, self.backend)[0][0]
        return _chunks(self.problem.rows, rows)

    def _workspace(self) -> Tensor:
        shape, dtype = workspace_shape(self.problem, self.backend)
        return fresh(self.problem.scale, shape, dtype)

    def _outs(self, workspace: Tensor, chunk: slice) -> list[Tensor]:
        outs, start = [], 0
        rows = chunk.stop - chunk.start
        for block, width in zip(self.problem.blocks, _block_widths(self.problem), strict=True):
            outs.append(workspace[:rows, start : start + self.operands[block.key].shape[0]])
            start += width
        return outs

    # The two GEMMs ----------------------------------------------------------------------------------------------------

    def _contract(self, chunk: slice, outs: list[Tensor], queries: dict[int, Tensor], over_l: Tensor | None) -> None:
        """`dx[chunk] += over_l * (W @ y)`, `dy += W.T @ queries`, `dbias += W.T @ over_l`.

        `queries` are the rows of x that belong to the chunk, already times `over_l` where there is one.
        """
        problem = self.problem
        for number, (block, out) in enumerate(zip(problem.blocks, outs, strict=True)):
            y, dtype = self.operands[block.key], _gemm_dtype(problem, out.dtype)
            dx, dy, dbias = self.gradients[block.query], self.gradients[block.key], self.bias_grads[number]
            converts = not dtype == out.dtype == y.dtype or (dbias is not None and out.dtype != self.dtype)
            columns = CONVERTED_COLUMNS if converts else max(1, y.shape[0])
            for start in range(0, y.shape[0], columns):
                tile = slice(start, min(start + columns, y.shape[0]))
                values = out if columns == y.shape[0] else out[:, tile]
                if dbias is not None:
                    ones = torch.ones_like(problem.weight[chunk]) if over_l is None else over_l
                    row_factor = self.factors[block.query]
                    if row_factor is not None:
                        ones = ones / row_factor[chunk]
                    dbias[tile] += values.T.to(ones.dtype) @ ones
                values = values.to(dtype)
                if dx is not None:
                    dx.add_rows(values, rows_of(y, tile).to(dtype))
                if dy is not None:
                    dy.add_columns(tile, values.T, queries[block.query].to(dtype))
        for dx in self.gradients:
            if dx is not None:
                dx.end_chunk(chunk, over_l)

    def _finish(self) -> tuple[Tensor | None, ...]:
        """Apply what the accumulators left out: the scale, the gain, the smoothing term and the norms' projection."""
        for block, dbias in zip(self.problem.blocks, self.bias_grads, strict=True):
            if dbias is not None:
                col_factor, gain = self.factors[block.key], 1.0 if self.gain is None else self.gain
                dbias.div_(gain if col_factor is None else col_factor * gain)
        if self.smoothing is not None:
            self.smoothing.add_gradients(self)
        return tuple(None if g is None else g.finished() for g in self.gradients)


class Partial(_Sweep):
    """A sweep over some of a row's columns, whose normaliser is known only when all have been seen (`ring`)."""

    def taken_along(self) -> Elsewhere:
        """What sweeps over other columns need to be told: this one has the targets."""
        return Elsewhere(tuple(None if mask is None else mask.threshold for mask in self.masks), self._guide_scores())

    def sums(self) -> tuple[RowSums, RowSums | None]:
        """Of the rows; and of the columns, where the problem is symmetric."""
        problem, backend, found = self.problem, self.backend, []
        columns = RowSums.empty(problem.columns, problem.weight) if problem.symmetric else None
        for chunk in self._stats_chunks() if problem.columns else ():
            strips = self._strips(chunk)
            if columns is None:
                rows = backend.stats_rows(strips, None, None)
            else:
                rows, more = backend.stats_rows_and_columns(strips[0])
                columns = backend.merge(columns, more)
            found.append(backend.merge(RowSums.empty(chunk.stop - chunk.start, problem.weight), rows))
        if not found:
            return RowSums.empty(problem.rows, problem.weight), columns
        return RowSums(*(_joined(list(parts)) for parts in zip(*found, strict=True))), columns

    def differentiate(self, rows: Softmax, columns: Softmax | None, entry: Tensor) -> Result:
        """Of the sum of the losses of rows whose softmax is known; `entry` is the targets'."""
        if self.problem.rows and self.problem.columns:
            workspace = self._workspace()
            for chunk in _chunks(self.problem.rows, workspace.shape[0]):
                part, outs = rows.map(functools.partial(rows_of, part=chunk)), self._outs(workspace, chunk)
                self._grad(chunk, self._strips(chunk), outs, part, columns, rows_of(entry, chunk))
        by_scale = None if self.scale_grad is None else self.scale_grad.to(self.dtype)
        return Result(entry, self._finish(), by_scale, tuple(self.bias_grads), (), [])


class _Gradient:
    """The gradient of one operand while chunks come in.

    What is only ever a query has all of its row when its chunk ends: one product, finished and written once, in the
    dtype that is kept. What is a key somewhere accumulates over chunks, in fp32.
    """

    def __init__(
        self, problem: Problem, number: int, finish: Callable[..., None], into: Mapping[int, Tensor] | None = None
    ):
        self.like, self.shape = problem.scale, problem.operands[number].shape
        # A part of a sum is not rounded.
        self.dtype = saved_dtype(problem.dtype) if into is None else problem.scale.dtype
        self.into = (into or {}).get(number)
        self.apply = finish  # (total, over_l, rows, out): what the products left out
        queries, keys = ({getattr(block, side) for block in problem.blocks} for side in ("query", "key"))
        at_once = not problem.label_smoothing and number in queries - keys
        if problem.fold is not None and problem.fold.distance in ("euclidean", "squared"):
            at_once = False  # the lengths of both sides add a multiple of each row
        self.kept = (fresh(self.like, self.shape, self.dtype) if self.into is None else self.into) if at_once else None
        self.total: Tensor | None = None  # over all chunks
        self.product: Tensor | None = None  # of this chunk

    def accumulator(self) -> Tensor:
        if self.total is None:
            self.total = self.like.new_zeros(self.shape)
        return self.total

    def add_rows(self, values: Tensor, y: Tensor) -> None:
        if self.product is None:
            self.product = self.like.new_empty((values.shape[0], y.shape[1]))
            mm(self.product, values, y)
        else:
            add_mm(self.product, values, y)

    def add_columns(self, tile: slice, values: Tensor, x: Tensor) -> None:
        if self.total is None and values.shape[0] == self.shape[0]:
            self.total = fresh(self.like, self.shape)
            mm(self.total, values, x)
        else:
            add_mm(self.accumulator()[tile], values, x)

    def end_chunk(self, chunk: slice, over_l: Tensor | None) -> None:
        if self.product is None:
            return
        if self.into is not None:
            part = torch.empty_like(self.product)
            self.apply(self.product, over_l, chunk, part)
            self.into[chunk] += part
        elif self.kept is not None:
            self.apply(self.product, over_l, chunk, rows_of(self.kept, chunk))
        else:
            self.accumulator()[chunk] += self.product if over_l is None else self.product.mul_(over_l[:, None])
        self.product = None

    def finished(self) -> Tensor:
        if self.kept is not None:
            return self.kept
        total = self.accumulator()
        out = total if total.dtype == self.dtype else torch.empty_like(total, dtype=self.dtype)
        if self.shape[0]:
            self.apply(total, None, slice(0, self.shape[0]), out)
        return out


class _Smoothing:
    """Label smoothing without masks is a rank-one correction: it needs the mean column, not the tiles.

    loss_i += eps (z_it - mean_j z_ij) over the admissible columns, those whose bias is not -inf.
    """

    def __init__(self, sweep: _Sweep):
        problem = sweep.problem
        self.eps = problem.label_smoothing
        self.admissible = [
            torch.ones(problem.operands[block.key].shape[0], dtype=sweep.dtype, device=problem.device)
            if bias is None
            else (bias > -torch.inf).to(sweep.dtype)
            for block, bias in zip(problem.blocks, sweep.biases, strict=True)
        ]
        self.count = torch.stack([a.sum() for a in self.admissible]).sum().clamp_min(1)
        self.mean_key: list[Tensor] = []
        self.mean_sim = torch.zeros_like(problem.weight)
        self.mean_score = torch.zeros_like(problem.weight)
        for block, bias, admissible in zip(problem.blocks, sweep.biases, self.admissible, strict=True):
            col_factor, row_factor = sweep.factors[block.key], sweep.factors[block.query]
            share = admissible / self.count
            mean = _weighted_sum(problem.operands[block.key], share if col_factor is None else share * col_factor)
            sim = _matvec(problem.operands[block.query], mean)
            self.mean_sim = self.mean_sim + (sim if row_factor is None else sim * row_factor)
            self.mean_key.append(mean)
            if bias is not None:
                self.mean_score = self.mean_score + (share * bias.masked_fill(admissible == 0, 0)).sum()
        self.mean_score = self.mean_score + problem.scale * self.mean_sim

    def losses(self, sweep: _Sweep) -> Tensor:
        weight = sweep.problem.weight
        loss = self.eps * weight * (sweep.prepared.score - self.mean_score).to(weight.dtype)
        return loss.masked_fill(weight == 0, 0)

    def add_gradients(self, sweep: _Sweep) -> None:
        """To the accumulators, which the scale and the gain's inverse are still to multiply."""
        problem, weight, target_sim = sweep.problem, sweep.problem.weight, sweep.prepared.target_sim
        if sweep.scale_grad is not None and target_sim is not None:
            terms = weight * (target_sim - self.mean_sim)
            sweep.scale_grad += self.eps * terms.sum(dtype=sweep.scale_grad.dtype)
        gained = weight if sweep.gain is None else weight * sweep.gain
        for number, block in enumerate(problem.blocks):
            row_factor, col_factor = sweep.factors[block.query], sweep.factors[block.key]
            rows = gained if row_factor is None else gained * row_factor
            columns = self.admissible[number] / self.count
            dx, dy, dbias = sweep.gradients[block.query], sweep.gradients[block.key], sweep.bias_grads[number]
            if dbias is not None:
                dbias -= self.eps * weight.sum() * columns
            if dx is not None:
                dx.accumulator().addr_(rows, self.mean_key[number], alpha=-self.eps)
            if dy is not None:
                mean_query = _weighted_sum(problem.operands[block.query], rows)
                factored = columns if col_factor is None else columns * col_factor
                dy.accumulator().addr_(factored, mean_query, alpha=-self.eps)


def _unit(x: Tensor, factor: Tensor | None) -> Tensor:
    assert factor is not None
    return x.to(factor.dtype) * factor[:, None]


def _part_or_none(x: Tensor | None, chunk: slice) -> Tensor | None:
    return None if x is None else rows_of(x, chunk)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _chunks(count: int, rows: int) -> Iterator[slice]:
    for start in range(0, count, rows):
        yield slice(start, min(start + rows, count))


def _gemm_dtype(problem: Problem, stored: torch.dtype) -> torch.dtype:
    """bf16 inputs meet a bf16 copy of the tile where the CPU has bf16 matrix units; else what the workspace holds."""
    if problem.device.type == "cpu" and problem.dtype == torch.bfloat16 and _cpu_multiplies_bf16():
        return torch.bfloat16
    return stored


@functools.cache
def _cpu_multiplies_bf16() -> bool:
    capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch; AMX implies the flag
    return bool(capabilities.get("avx512_bf16", False))


def _weighted_sum(x: Tensor, weight: Tensor) -> Tensor:
    """`weight @ x` in the dtype of `weight`, without a converted copy of `x`."""
    total = weight.new_zeros(x.shape[1])
    for chunk in row_chunks(x):
        total += weight[chunk] @ x[chunk].to(weight.dtype)
    return total


def _matvec(x: Tensor, vector: Tensor) -> Tensor:
    out = vector.new_empty(x.shape[0])
    for chunk in row_chunks(x):
        out[chunk] = x[chunk].to(vector.dtype) @ vector
    return out
