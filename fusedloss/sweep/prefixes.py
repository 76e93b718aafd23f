"""Matryoshka in one sweep: softmax losses of several prefixes of the same embeddings, out of one similarity GEMM.

The three products of the longest prefix serve all of them: 6 MND, against 6 MN sum_k d_k for a loop. Two passes over a
row chunk: the first stores the logits of all prefixes and sums their exponentials; the second turns a tile of them into
dz, its suffix sums and products while it is in cache.

If the device multiplies 16-bit matrices into fp32, all three products take the embeddings as they are, and the suffix
sums are rounded once for each of the two products that they enter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.protocol import Wants
from ..core import products
from ..core.numerics import FLUSH, LOG2E, NORM_EPS, UNSHIFTED_SCALE, slices, stats_dtype, wide_dtype
from ..core.problem import Problem
from ..core.rows import fresh, largest_finite, power_of_two, row_chunks, settle
from ..core.strips import RowSums

# maths.md: Prefixes; Online log-sum-exp; Gradient by the scale
# A tile [384, 1536] of one prefix is 2.25 MiB of fp32, near what two cores keep in their L2. More rows would not make
# the products faster, and fresh memory is slow: writing a tile takes 0.48 ms the first time, then 0.06.
CPU_ROWS, TILE_COLUMNS = 384, 1536
SCORE_ROWS = 128  # at a time in fp64: 768 KiB at D = 768

Admit = Callable[[int, slice, slice], Tensor | None]


class Prefixed(NamedTuple):
    losses: Tensor  # [M], weighted
    gradients: tuple[Tensor | None, ...]  # of losses.sum(), one per operand, fp32 (fp64 for fp64)
    scale: Tensor | None
    biases: tuple[Tensor | None, ...]


@torch.no_grad()
def sweep_prefixes(problem: Problem, wants: Wants, chunk: int, admit: Admit | None = None) -> Prefixed:
    """Returns the weighted losses of the cosine logits of all prefixes, in any order, and the gradients of their sum.

    chunk: the largest number of rows at a time. The workspace takes chunk * len(prefixes) * columns elements; without
    gradients there is none. admit: (block, rows, columns) -> bool [rows, columns], True for columns that may compete,
    or None for all. It is called twice, and does not apply to targets.
    """
    return _Prefixes(problem, wants, admit).run(chunk)


# The views that the loops over tiles and prefixes use are made once: a view takes 2 us, and a step has dozens.


class _Queries(NamedTuple):
    """Rows of one operand in a chunk: `x` divided by its norm at the longest prefix and times scale * log2(e).

    For 16-bit products `x` and `signed` are the rows as they are, and the tile is multiplied instead.
    """

    x: list[Tensor]  # per segment [R, d_k - d_{k-1}]
    signed: list[Tensor]  # times the sign of the row's weight
    factor: Tensor  # [R]
    ratio: Tensor  # [K, R] |x|_K / |x|_k
    ratios: list[Tensor]  # per prefix [R, 1], including the factor that `x` lacks
    times: list[Tensor]  # per prefix [R, 1], the factor that `signed` lacks
    dx: list[Tensor] | None  # per segment


class _Tile(NamedTuple):
    """Columns of a block."""

    block: int
    query: int
    columns: slice
    y: Tensor  # [columns, d_K], in the input dtype
    inverse: list[Tensor]  # per prefix [columns], 1 / norms
    times: list[Tensor]  # per prefix [columns], 1 / norms, which 16-bit keys lack; 0 for zero rows
    step: list[Tensor]  # |y|_k / |y|_{k+1}
    along: list[Tensor] | None
    dy: list[Tensor] | None  # per segment
    dbias: Tensor | None


class _Part(NamedTuple):
    """A tile's part of a row chunk."""

    tile: _Tile
    z: list[Tensor] | None  # per prefix [R, columns] in the workspace: logits in units of log 2, without bias
    hits: tuple[Tensor, Tensor] | None  # (mask, column) of the targets inside


class _Normalised(NamedTuple):
    """Results of the first pass that the second needs, [K, R]: `|dz| = weight 2^(z - shift)` off the target."""

    shift: Tensor
    weight: Tensor
    entry: Tensor  # of the target
    sign: Tensor  # of dz
    score: Tensor  # of the target, without bias


class _Rows(NamedTuple):
    """The same per prefix, [R, 1], for one operand's rows: weight and entry times their ratio."""

    shift: list[Tensor]
    weight: list[Tensor]
    entry: list[Tensor]
    sign: list[Tensor]  # [R], over the ratio
    score: list[Tensor]


class _Prefixes:
    def __init__(self, problem: Problem, wants: Wants, admit: Admit | None):
        operands = problem.operands
        self.dtype, self.device = stats_dtype(problem.dtype), problem.device
        self.wide = wide_dtype(self.device, self.dtype)
        self.operands, self.admit, self.rule = operands, admit, problem.rule
        self.target, self.weight = problem.target, problem.weight.to(self.dtype)
        self.narrow = products.narrow(problem.dtype, self.device)
        self.blocks = [(block.query, block.key) for block in problem.blocks]
        self.columns = [operands[key].shape[0] for _, key in self.blocks]
        self.biases = [None if block.bias is None else block.bias.to(self.dtype) for block in problem.blocks]
        by_dim: dict[int, float] = {}
        for dim, dim_weight in zip(problem.prefixes, problem.prefix_weights, strict=True):
            by_dim[dim] = by_dim.get(dim, 0.0) + dim_weight
        self.dims = sorted(by_dim)
        self.dim_weights = [by_dim[dim] for dim in self.dims]
        self.segments = [slice(low, high) for low, high in zip([0, *self.dims], self.dims, strict=False)]

        # Logits are kept in units of log 2. A scale of 0 is replaced here, because the cosines could not be recovered
        # from logits of 0; the gradients are multiplied by the true scale.
        self.scale = problem.scale.to(self.dtype)
        self.unit = torch.where(self.scale == 0, 1e-20, self.scale) * LOG2E
        self.natural = self.scale.to(self.wide) / self.unit.to(self.wide)
        self.back = self.natural.to(self.dtype)
        self.safe = (
            self.device.type == "cpu"
            and all(bias is None for bias in self.biases)
            and abs(self.scale.item()) <= UNSHIFTED_SCALE
        )
        used = {number for block in self.blocks for number in block}
        # [K, rows] per operand
        self.inverse_wide = {n: self._inverse_norms(operands[n]) for n in used}
        self.inverse = {n: inverse.to(self.dtype) for n, inverse in self.inverse_wide.items()}
        # For matrices that are multiplied as they are. A zero row gives 0 with any factor, and 1e12 would not fit fp16.
        self.times = self.inverse
        if self.narrow:
            self.times = {n: inverse.masked_fill(inverse >= 1 / NORM_EPS, 0) for n, inverse in self.inverse.items()}
        self.wants = [wanted and n in used for n, wanted in enumerate(wants.operands)]
        self.wants_any = wants.any
        self.totals = [
            x.new_zeros(x.shape, dtype=self.dtype) if w else None for x, w in zip(operands, wants.operands, strict=True)
        ]
        # sum of dz z over the other side, by prefix and row; the projection through the norms follows from it
        self.along = {n: torch.zeros_like(self.inverse[n]) for n in used if self.wants[n]}
        self.scale_grad = torch.zeros_like(self.scale, dtype=self.wide) if wants.scale else None
        self.bias_grads = [
            torch.zeros_like(bias) if wanted and bias is not None else None
            for bias, wanted in zip(self.biases, wants.biases, strict=True)
        ]
        self.keys = {key for _, key in self.blocks}
        self.gain = self._gain() if self.narrow and operands[0].dtype == torch.float16 else None

    def run(self, chunk: int) -> Prefixed:
        M = self.target.shape[0]
        losses = torch.empty_like(self.weight)
        chunk = max(1, min(chunk, M, CPU_ROWS if self.device.type == "cpu" else chunk))
        width = min(TILE_COLUMNS, max([1, *self.columns]))
        elements = len(self.dims) * sum(self.columns) if self.wants_any else width
        self.workspace = fresh(self.weight, (chunk * elements,))
        self.buffers = [fresh(self.weight, (chunk * width,)) for _ in range(3)]
        self.rounded = self.operands[0].new_empty(chunk * width if self.narrow and self.wants_any else 0)
        self.y = self.weight.new_empty((width, self.dims[-1]))
        self.scores = [torch.empty((SCORE_ROWS, self.dims[-1]), dtype=self.wide, device=self.device) for _ in range(2)]
        copies = 1 if self.narrow else 3
        self.rows = {n: [self.weight.new_empty((chunk, self.dims[-1])) for _ in range(copies)] for n, _ in self.blocks}
        tiles = list(self._tiles(width))
        for part in slices(M, chunk):
            queries = {number: self._queries(number, part) for number, _ in self.blocks}
            parts = self._parts(part, tiles)
            losses[part], found = self._settle(part, queries, *self._sums(part, queries, parts))
            if self.wants_any:
                settled = {number: self._settled(found, rows.ratio) for number, rows in queries.items()}
                for piece in parts:
                    self._tile_gradients(part, queries, piece, settled[piece.tile.query])
                for number, rows in queries.items():
                    self._end_chunk(number, part, rows)
        for number, total in enumerate(self.totals):
            if total is not None and number in self.keys:
                self._finish(number, slice(0, total.shape[0]))
        by_scale = None if self.scale_grad is None else self.scale_grad.to(self.dtype)
        return Prefixed(losses, tuple(self.totals), by_scale, tuple(self.bias_grads))

    # The parts of a chunk -------------------------------------------------------------------------------------------

    def _queries(self, number: int, part: slice) -> _Queries:
        # Each of the rows' factors is rounded once: scale 100 would magnify four roundings beyond eager's error.
        exact = self.inverse_wide[number][:, part] * self.unit.to(self.wide)
        factor = exact[-1].to(self.dtype)
        ratio = (exact / factor.to(self.wide)).to(self.dtype)
        ratio[-1] = 1
        dx, *copies = (buffer[: part.stop - part.start] for buffer in self.rows[number])
        sign, column, times = self.weight[part].sign()[:, None], factor[:, None], []
        if self.narrow:
            x = signed = self.operands[number][part]
            ratios = [row[:, None] * column for row in ratio]
            gained = column * sign if self.gain is None else column * sign * self.gain
            times = [gained * (inverse[:, None] > 0) for inverse in self.times[number][:, part]]
        else:
            x, signed = copies
            torch.mul(self._wide(self.operands[number][part]), column, out=x)
            torch.mul(x, sign, out=signed)
            ratios = [row[:, None] for row in ratio]
        return _Queries(
            self._cut(x),
            self._cut(signed),
            factor,
            ratio,
            ratios,
            times,
            self._cut(dx.zero_()) if self.wants[number] else None,
        )

    def _gain(self) -> Tensor:
        """Returns the power of two that scales the largest possible suffix sum, with either side's factors, to fp16's
        maximum.

        |dz_k| is at most c_k weight_i, and norms grow with the prefix.
        """
        largest = torch.zeros_like(self.scale)
        for query, key in self.blocks:
            if not self.weight.numel() or not len(self.operands[key]):
                continue
            rows = self.times[query][:, : len(self.weight)] * self.weight.abs()
            ratios, total = rows / self.inverse[query][-1, : len(self.weight)], torch.zeros_like(largest)
            for share, row, ratio, column in zip(self.dim_weights, rows, ratios, self.times[key], strict=True):
                by_row, by_column = (
                    largest_finite(row) * self.unit.abs(),
                    largest_finite(ratio) * largest_finite(column),
                )
                total += abs(share) * torch.maximum(by_row, by_column)
            largest = torch.maximum(largest, total)
        return power_of_two(15 - torch.log2(largest))

    def _cut(self, x: Tensor) -> list[Tensor]:
        return [x[:, segment] for segment in self.segments]

    def _tiles(self, width: int) -> Iterator[_Tile]:
        for block, (query, key) in enumerate(self.blocks):
            total, dbias = self.totals[key], self.bias_grads[block]
            for tile in slices(self.columns[block], width):
                inverse = self.inverse[key][:, tile]
                yield _Tile(
                    block,
                    query,
                    tile,
                    self.operands[key][tile, : self.dims[-1]],
                    list(inverse),
                    list(self.times[key][:, tile]),
                    list(inverse[1:] / inverse[:-1]),
                    list(self.along[key][:, tile]) if key in self.along else None,
                    None if total is None else self._cut(total[tile]),
                    None if dbias is None else dbias[tile],
                )

    def _parts(self, part: slice, tiles: list[_Tile]) -> list[_Part]:
        rows, offset, parts = part.stop - part.start, 0, []
        for tile in tiles:
            width = tile.y.shape[0]
            z = None
            if self.wants_any:
                size = len(self.dims) * rows * width
                z = list(self.workspace[offset : offset + size].view(-1, rows, width))
                offset += size
            parts.append(_Part(tile, z, self._hits(part, tile.columns) if tile.block == 0 else None))
        return parts

    def _hits(self, part: slice, tile: slice) -> tuple[Tensor, Tensor] | None:
        index = self.target[part] - tile.start
        inside = (index >= 0) & (index < tile.stop - tile.start)
        if self.device.type == "cpu" and not inside.any():
            return None  # on other devices the host reads nothing back
        return inside[:, None], index.clamp(0, tile.stop - tile.start - 1)[:, None]

    def _wide(self, x: Tensor) -> Tensor:
        return x[:, : self.dims[-1]].to(self.dtype)

    def _inverse_norms(self, x: Tensor) -> Tensor:
        """`1 / max(|x_i|, 1e-12)` of every prefix, [K, rows], from one pass over `x`."""
        squares = [
            torch.linalg.vector_norm(x[:, s], dim=1, dtype=self.dtype).to(self.wide).square() for s in self.segments
        ]
        return torch.stack(squares).cumsum(0).sqrt().clamp_min(NORM_EPS).reciprocal()

    def _buffer(self, number: int, rows: int, tile: _Tile) -> Tensor:
        columns = tile.y.shape[0]
        return self.buffers[number][: rows * columns].view(rows, columns)

    def _sums(self, part: slice, queries: dict[int, _Queries], parts: list[_Part]) -> tuple[Tensor, Tensor]:
        """Writes the logits of every prefix; returns shift and total, [K, R]: sum_{j != t} 2^z = total 2^shift."""
        rows, last = part.stop - part.start, len(self.dims) - 1
        total = self.weight.new_zeros((len(self.dims), rows))
        maximum = torch.zeros_like(total) if self.safe else torch.full_like(total, -torch.inf)
        totals, maxima = list(total), list(maximum)
        for tile, logits, hits in parts:
            x, ratios = queries[tile.query].x, queries[tile.query].ratios
            y = [segment.T for segment in self._cut(tile.y if self.narrow else tile.y.to(self.dtype))]
            admitted = None if self.admit is None else self.admit(tile.block, part, tile.columns)
            leaves_out = self.biases[tile.block] is not None or admitted is not None or hits is not None
            scratch = self._buffer(0, rows, tile)
            z_last = self._buffer(1, rows, tile) if logits is None else logits[-1]
            for k in range(last + 1):
                # Dot products accumulate in the memory of the last prefix's logits.
                if k == 0:
                    products.mm(z_last, x[k], y[k])
                else:
                    products.add_mm(z_last, x[k], y[k])
                if k == last:
                    z = z_last.mul_(tile.inverse[k])
                    if self.narrow:
                        z.mul_(ratios[k])
                else:
                    z = self._buffer(2, rows, tile) if logits is None else logits[k]
                    torch.mul(z_last, tile.inverse[k], out=z).mul_(ratios[k])
                if self.safe:
                    torch.exp2(z, out=scratch)
                    self._leave_out(scratch, hits, admitted, 0.0)
                else:
                    if leaves_out:
                        z = self._add_bias_(scratch.copy_(z), tile)
                        self._leave_out(z, hits, admitted, -torch.inf)
                    new = torch.maximum(maxima[k], z.amax(1))
                    shift = torch.where(new == -torch.inf, 0, new)
                    torch.sub(z, shift[:, None], out=scratch).exp2_()
                    totals[k].mul_(torch.exp2(maxima[k] - shift))
                    maxima[k].copy_(new)
                totals[k].add_(scratch.sum(1))
        return torch.where(maximum == -torch.inf, 0, maximum), total

    def _add_bias_(self, z: Tensor, tile: _Tile) -> Tensor:
        bias = self.biases[tile.block]
        if bias is None:
            return z
        bias = bias[tile.columns]
        return z.add_(bias * LOG2E).masked_fill_(bias == -torch.inf, -torch.inf)

    def _leave_out(
        self, values: Tensor, hits: tuple[Tensor, Tensor] | None, admitted: Tensor | None, value: float
    ) -> None:
        if admitted is not None:
            values.masked_fill_(~admitted, value)
        if hits is not None:
            inside, index = hits
            values.scatter_(1, index, torch.where(inside, value, values.gather(1, index)))

    def _settle(
        self, part: slice, queries: dict[int, _Queries], shift: Tensor, total: Tensor
    ) -> tuple[Tensor, _Normalised]:
        own, weight = self._scores(part, queries[self.blocks[0][0]]), self.weight[part]
        # z in natural units is `back` times the workspace's value, exactly, even if `unit` was rounded.
        natural, score = shift.to(self.wide) * self.natural, own * self.natural
        bias = self.biases[0]
        if bias is not None:
            score = score + bias[self.target[part]]
        rows = [
            settle(RowSums(natural[k], total[k]), score[k], c * weight, self.rule)
            for k, c in enumerate(self.dim_weights)
        ]
        over_l, entry = (torch.stack(vectors) for vectors in zip(*((r.weight, r.entry) for r in rows), strict=True))
        losses, sign = torch.stack([row.loss for row in rows]).sum(0), over_l.sign()
        return losses, _Normalised(shift, over_l.abs(), entry * sign, sign, own.to(self.dtype))

    def _scores(self, part: slice, rows: _Queries) -> Tensor:
        """Returns the targets' logits [K, R], in fp64 because the loss of a well-fitted pair depends on them."""
        wide = self.wide
        query, key = self.blocks[0]
        target, D = self.target[part], self.dims[-1]
        sim = torch.empty(rows.ratio.shape, dtype=wide, device=self.device)
        x = self.operands[query][part, :D]
        for r in slices(x.shape[0], SCORE_ROWS):
            product, other = (buffer[: target[r].shape[0]] for buffer in self.scores)
            product.copy_(self.operands[key][target[r], :D]).mul_(other.copy_(x[r]))
            for k, segment in enumerate(self.segments):
                sim[k, r] = product[:, segment].sum(1)
        # The norms as the sweep rounds them, so that target and negatives share their errors.
        factor = rows.factor.to(wide) * rows.ratio.to(wide)
        return sim.cumsum(0) * factor * self.inverse[key][:, target].to(wide)

    def _settled(self, found: _Normalised, ratio: Tensor) -> _Rows:
        columns = (found.shift, found.weight * ratio, found.entry * ratio)
        shift, weight, entry = (list(t[:, :, None]) for t in columns)
        return _Rows(shift, weight, entry, list(found.sign / ratio), list(found.score[:, :, None]))

    def _tile_gradients(self, part: slice, queries: dict[int, _Queries], piece: _Part, settled: _Rows) -> None:
        tile, logits, hits = piece
        rows, last = queries[tile.query], len(self.dims) - 1
        assert logits is not None
        count = part.stop - part.start
        admitted = None if self.admit is None else self.admit(tile.block, part, tile.columns)
        flush = self.device.type == "cpu" and self.dtype == torch.float32
        y: list[Tensor] = []
        if rows.dx is not None and not self.narrow:
            raw, y = self._cut(tile.y.to(self.dtype)), self._cut(self.y[: tile.y.shape[0]])
            for k in range(last + 1):
                torch.mul(raw[k], tile.inverse[k][:, None], out=y[k])
        rows_along = self.along.get(tile.query)
        dz, suffix, product = (self._buffer(n, count, tile) for n in range(3))
        for k in reversed(range(last + 1)):
            z, sign = logits[k], settled.sign[k]
            if self.safe:
                torch.exp2(z, out=dz)
            else:
                torch.sub(z, settled.shift[k], out=dz)
                self._add_bias_(dz, tile).exp2_()
                if flush:
                    torch.ops.aten.hardshrink.out(dz, FLUSH, out=dz)
            # A separate pass: added to the exponent, 1 / l would be rounded by up to ulp(16) / 2 = 5e-7.
            dz.mul_(settled.weight[k])
            self._leave_out(dz, hits, admitted, 0.0)
            if hits is not None:
                inside, index = hits
                dz.scatter_add_(1, index, torch.where(inside, settled.entry[k], 0))
            if self.scale_grad is not None:
                # A row of dz sums to 0, so logits minus the target's give the same sum with less cancellation.
                torch.sub(z, settled.score[k], out=product).mul_(dz)
                self.scale_grad += torch.dot(product.sum(1).to(self.wide), sign.to(self.wide)) / self.unit
            # Row and column sums of dz z, of the very dz that is multiplied: its errors along x cancel.
            # The last prefix's follow from the whole, in `_finish`.
            if k < last and (rows_along is not None or tile.along is not None):
                torch.mul(z, dz, out=product)
            if k < last and rows_along is not None:
                rows_along[k, part].addcmul_(product.sum(1), sign)
            if k < last and tile.along is not None:
                tile.along[k].addmv_(product.T, sign)
            if tile.dbias is not None:
                tile.dbias.addmv_(dz.T, sign)
            if self.dim_weights[k] < 0:
                dz.neg_()
            # suffix = sum_{m >= k} dz_m / |y|_m * |y|_k: the columns' 1/norms are applied after the products.
            if k == last:
                dz, suffix = suffix, dz
            else:
                torch.addcmul(dz, suffix, tile.step[k], out=suffix)
            if rows.dx is not None and self.narrow:
                times = tile.times[k] if self.gain is None else tile.times[k] * self.gain
                products.add_mm(rows.dx[k], self._rounded(suffix, times, product), tile.y[:, self.segments[k]])
            elif rows.dx is not None:
                rows.dx[k].addmm_(suffix, y[k])
            if tile.dy is not None:
                values = self._rounded(suffix, rows.times[k], product) if self.narrow else suffix
                products.add_mm(tile.dy[k], values.T, rows.signed[k])

    def _rounded(self, suffix: Tensor, factor: Tensor, scratch: Tensor) -> Tensor:
        out = self.rounded[: suffix.numel()].view(suffix.shape)
        return out.copy_(torch.mul(suffix, factor, out=scratch))

    def _end_chunk(self, number: int, part: slice, rows: _Queries) -> None:
        """Brings dx to the units that `_finish` multiplies, where a key's gradient and a query's may be one matrix."""
        total = self.totals[number]
        if total is None or rows.dx is None:
            return
        factor = self.unit * self.weight[part].sign() / rows.ratio
        for k, segment in enumerate(self.segments):
            if number in self.keys:
                total[part, segment] += rows.dx[k].mul_(factor[k, :, None])
            else:
                torch.mul(rows.dx[k], factor[k, :, None], out=total[part, segment])
        if number not in self.keys:
            self._finish(number, part)

    def _finish(self, number: int, part: slice) -> None:
        """Applies the norms and their projection. A row shorter than 1e-12 is divided by a constant and has no
        projection.

        All prefixes' sums of dz z add up to the product of the gradient, norms held fixed, with x. The last one follows
        from it, which saves a pass and makes the rest orthogonal to x to the last digit.
        """
        total = self.totals[number]
        if total is None:
            return
        total, inverse, along = total[part], self.inverse[number][:, part], self.along[number][:, part]
        x = self.operands[number][part]
        scaled = inverse if self.gain is None else inverse / self.gain
        for r in row_chunks(x):
            pairs = [(total[r, segment], x[r, segment].to(self.dtype)) for segment in self.segments]
            along[-1, r] -= along[:-1, r].sum(0)
            for k, (dx, row) in enumerate(pairs):
                dx.mul_(scaled[k, r, None])
                along[-1, r] += torch.linalg.vecdot(dx, row)
            lost = along[:, r] * inverse[:, r].square().masked_fill(inverse[:, r] >= 1 / NORM_EPS, 0)
            lost = lost.flip(0).cumsum(0).flip(0)
            for k, (dx, row) in enumerate(pairs):
                dx.addcmul_(row, lost[k, :, None], value=-1).mul_(self.back)
