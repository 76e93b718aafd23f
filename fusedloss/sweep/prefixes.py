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
    inputs = _Inputs(problem)
    M = inputs.target.shape[0]
    chunk = max(1, min(chunk, M, CPU_ROWS if inputs.device.type == "cpu" else chunk))
    memory = _Memory(inputs, chunk, min(TILE_COLUMNS, max([1, *inputs.columns])), wants.any)
    gradients = _Gradients(inputs, wants)
    first, second = _Sums(inputs, memory, admit), _Products(inputs, memory, gradients, admit)
    losses, tiles = torch.empty_like(inputs.weight), _tiles(inputs, memory, gradients)
    for part in slices(M, chunk):
        queries = {number: _queries(inputs, memory, number, part, gradients) for number, _ in inputs.blocks}
        pieces = _pieces(inputs, memory, part, tiles)
        shift, total = first.run(part, queries, pieces)
        losses[part], found = _settle(inputs, memory, part, queries, shift, total)
        if wants.any:
            second.run(part, queries, pieces, found)
    return gradients.result(losses)


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


class _Piece(NamedTuple):
    """A tile of a row chunk."""

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


# What both passes read ------------------------------------------------------------------------------------------------


class _Inputs:
    """The problem in the units of the sweep: logits times log2(e), and 1 / norms of every prefix of every row."""

    def __init__(self, problem: Problem):
        operands = problem.operands
        self.dtype, self.device = stats_dtype(problem.dtype), problem.device
        self.wide = wide_dtype(self.device, self.dtype)
        self.operands, self.rule = operands, problem.rule
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

        # A scale of 0 is replaced here, because the cosines could not be recovered from logits of 0; the gradients are
        # multiplied by the true scale.
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
        self.gain = self._gain() if self.narrow and operands[0].dtype == torch.float16 else None

    def cut(self, x: Tensor) -> list[Tensor]:
        return [x[:, segment] for segment in self.segments]

    def converted(self, x: Tensor) -> Tensor:
        return x[:, : self.dims[-1]].to(self.dtype)

    def add_bias_(self, z: Tensor, tile: _Tile) -> Tensor:
        bias = self.biases[tile.block]
        if bias is None:
            return z
        bias = bias[tile.columns]
        return z.add_(bias * LOG2E).masked_fill_(bias == -torch.inf, -torch.inf)

    def hits(self, part: slice, tile: slice) -> tuple[Tensor, Tensor] | None:
        """Returns which rows have their target in the tile, and its column there."""
        index = self.target[part] - tile.start
        inside = (index >= 0) & (index < tile.stop - tile.start)
        if self.device.type == "cpu" and not inside.any():
            return None  # on other devices the host reads nothing back
        return inside[:, None], index.clamp(0, tile.stop - tile.start - 1)[:, None]

    def _inverse_norms(self, x: Tensor) -> Tensor:
        """Returns `1 / max(|x_i|, 1e-12)` of every prefix, [K, rows], from one pass over `x`."""
        squares = [
            torch.linalg.vector_norm(x[:, s], dim=1, dtype=self.dtype).to(self.wide).square() for s in self.segments
        ]
        return torch.stack(squares).cumsum(0).sqrt().clamp_min(NORM_EPS).reciprocal()

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


class _Memory:
    """Every buffer of a sweep, allocated once."""

    def __init__(self, inputs: _Inputs, chunk: int, width: int, keeps: bool):
        """keeps: the workspace holds the logits of a chunk, for the second pass."""
        weight, longest = inputs.weight, inputs.dims[-1]
        elements = len(inputs.dims) * sum(inputs.columns) if keeps else width
        self.width, self.keeps = width, keeps
        self.workspace = fresh(weight, (chunk * elements,))
        self.buffers = [fresh(weight, (chunk * width,)) for _ in range(3)]
        self.rounded = inputs.operands[0].new_empty(chunk * width if inputs.narrow and keeps else 0)
        self.y = weight.new_empty((width, longest))
        self.scores = [torch.empty((SCORE_ROWS, longest), dtype=inputs.wide, device=inputs.device) for _ in range(2)]
        copies = 1 if inputs.narrow else 3
        self.rows = {n: [weight.new_empty((chunk, longest)) for _ in range(copies)] for n, _ in inputs.blocks}

    def buffer(self, number: int, rows: int, tile: _Tile) -> Tensor:
        columns = tile.y.shape[0]
        return self.buffers[number][: rows * columns].view(rows, columns)


def _tiles(inputs: _Inputs, memory: _Memory, gradients: _Gradients) -> list[_Tile]:
    tiles = []
    for block, (query, key) in enumerate(inputs.blocks):
        total, dbias, along = gradients.totals[key], gradients.biases[block], gradients.along.get(key)
        for tile in slices(inputs.columns[block], memory.width):
            inverse = inputs.inverse[key][:, tile]
            tiles.append(
                _Tile(
                    block,
                    query,
                    tile,
                    inputs.operands[key][tile, : inputs.dims[-1]],
                    list(inverse),
                    list(inputs.times[key][:, tile]),
                    list(inverse[1:] / inverse[:-1]),
                    None if along is None else list(along[:, tile]),
                    None if total is None else inputs.cut(total[tile]),
                    None if dbias is None else dbias[tile],
                )
            )
    return tiles


def _pieces(inputs: _Inputs, memory: _Memory, part: slice, tiles: list[_Tile]) -> list[_Piece]:
    rows, offset, pieces = part.stop - part.start, 0, []
    for tile in tiles:
        width = tile.y.shape[0]
        z = None
        if memory.keeps:
            size = len(inputs.dims) * rows * width
            z = list(memory.workspace[offset : offset + size].view(-1, rows, width))
            offset += size
        pieces.append(_Piece(tile, z, inputs.hits(part, tile.columns) if tile.block == 0 else None))
    return pieces


def _queries(inputs: _Inputs, memory: _Memory, number: int, part: slice, gradients: _Gradients) -> _Queries:
    # Each of the rows' factors is rounded once: scale 100 would magnify four roundings beyond eager's error.
    exact = inputs.inverse_wide[number][:, part] * inputs.unit.to(inputs.wide)
    factor = exact[-1].to(inputs.dtype)
    ratio = (exact / factor.to(inputs.wide)).to(inputs.dtype)
    ratio[-1] = 1
    dx, *copies = (buffer[: part.stop - part.start] for buffer in memory.rows[number])
    sign, column, times = inputs.weight[part].sign()[:, None], factor[:, None], []
    if inputs.narrow:
        x = signed = inputs.operands[number][part]
        ratios = [row[:, None] * column for row in ratio]
        gained = column * sign if inputs.gain is None else column * sign * inputs.gain
        times = [gained * (inverse[:, None] > 0) for inverse in inputs.times[number][:, part]]
    else:
        x, signed = copies
        torch.mul(inputs.converted(inputs.operands[number][part]), column, out=x)
        torch.mul(x, sign, out=signed)
        ratios = [row[:, None] for row in ratio]
    wanted = number in gradients.along
    return _Queries(
        inputs.cut(x), inputs.cut(signed), factor, ratio, ratios, times, inputs.cut(dx.zero_()) if wanted else None
    )


def _leave_out_(values: Tensor, hits: tuple[Tensor, Tensor] | None, admitted: Tensor | None, value: float) -> None:
    """Overwrites targets and columns that may not compete."""
    if admitted is not None:
        values.masked_fill_(~admitted, value)
    if hits is not None:
        inside, index = hits
        values.scatter_(1, index, torch.where(inside, value, values.gather(1, index)))


# The first pass -------------------------------------------------------------------------------------------------------


class _Sums:
    """Writes the logits of every prefix into the workspace, and sums their exponentials."""

    def __init__(self, inputs: _Inputs, memory: _Memory, admit: Admit | None):
        self.inputs, self.memory, self.admit = inputs, memory, admit

    def run(self, part: slice, queries: dict[int, _Queries], pieces: list[_Piece]) -> tuple[Tensor, Tensor]:
        """Returns shift and total, [K, R]: sum_{j != t} 2^z = total 2^shift."""
        inputs = self.inputs
        total = inputs.weight.new_zeros((len(inputs.dims), part.stop - part.start))
        maximum = torch.zeros_like(total) if inputs.safe else torch.full_like(total, -torch.inf)
        totals, maxima = list(total), list(maximum)
        for piece in pieces:
            tile, _, hits = piece
            admitted = None if self.admit is None else self.admit(tile.block, part, tile.columns)
            scratch = self.memory.buffer(0, total.shape[1], tile)
            for k, z in enumerate(self._logits(queries[tile.query], piece, total.shape[1])):
                if inputs.safe:
                    torch.exp2(z, out=scratch)
                    _leave_out_(scratch, hits, admitted, 0.0)
                else:
                    if inputs.biases[tile.block] is not None or admitted is not None or hits is not None:
                        z = inputs.add_bias_(scratch.copy_(z), tile)
                        _leave_out_(z, hits, admitted, -torch.inf)
                    new = torch.maximum(maxima[k], z.amax(1))
                    shift = torch.where(new == -torch.inf, 0, new)
                    torch.sub(z, shift[:, None], out=scratch).exp2_()
                    totals[k].mul_(torch.exp2(maxima[k] - shift))
                    maxima[k].copy_(new)
                totals[k].add_(scratch.sum(1))
        return torch.where(maximum == -torch.inf, 0, maximum), total

    def _logits(self, queries: _Queries, piece: _Piece, rows: int) -> Iterator[Tensor]:
        """Yields the logits of a tile, prefix by prefix, without bias: in the workspace, or else in a buffer."""
        inputs, memory, (tile, kept, _) = self.inputs, self.memory, piece
        x, ratios, last = queries.x, queries.ratios, len(inputs.dims) - 1
        y = [segment.T for segment in inputs.cut(tile.y if inputs.narrow else tile.y.to(inputs.dtype))]
        z_last = memory.buffer(1, rows, tile) if kept is None else kept[-1]
        for k in range(last):
            # Dot products accumulate in the memory of the last prefix's logits.
            self._multiply(k, z_last, x[k], y[k])
            z = memory.buffer(2, rows, tile) if kept is None else kept[k]
            yield torch.mul(z_last, tile.inverse[k], out=z).mul_(ratios[k])
        self._multiply(last, z_last, x[last], y[last])
        z = z_last.mul_(tile.inverse[last])
        yield z.mul_(ratios[last]) if inputs.narrow else z

    @staticmethod
    def _multiply(k: int, out: Tensor, x: Tensor, y: Tensor) -> None:
        (products.add_mm if k else products.mm)(out, x, y)


# Once per row ---------------------------------------------------------------------------------------------------------


def _settle(
    inputs: _Inputs, memory: _Memory, part: slice, queries: dict[int, _Queries], shift: Tensor, total: Tensor
) -> tuple[Tensor, _Normalised]:
    """Returns the rows' losses, and what the second pass needs, from the sums of the first."""
    own, weight = _scores(inputs, memory, part, queries[inputs.blocks[0][0]]), inputs.weight[part]
    # z in natural units is `back` times the workspace's value, exactly, even if `unit` was rounded.
    natural, score = shift.to(inputs.wide) * inputs.natural, own * inputs.natural
    bias = inputs.biases[0]
    if bias is not None:
        score = score + bias[inputs.target[part]]
    rows = [
        settle(RowSums(natural[k], total[k]), score[k], c * weight, inputs.rule)
        for k, c in enumerate(inputs.dim_weights)
    ]
    over_l, entry = (torch.stack(vectors) for vectors in zip(*((r.weight, r.entry) for r in rows), strict=True))
    losses, sign = torch.stack([row.loss for row in rows]).sum(0), over_l.sign()
    return losses, _Normalised(shift, over_l.abs(), entry * sign, sign, own.to(inputs.dtype))


def _scores(inputs: _Inputs, memory: _Memory, part: slice, rows: _Queries) -> Tensor:
    """Returns the targets' logits [K, R], in fp64 because the loss of a well-fitted pair depends on them."""
    wide = inputs.wide
    query, key = inputs.blocks[0]
    target, D = inputs.target[part], inputs.dims[-1]
    sim = torch.empty(rows.ratio.shape, dtype=wide, device=inputs.device)
    x = inputs.operands[query][part, :D]
    for r in slices(x.shape[0], SCORE_ROWS):
        product, other = (buffer[: target[r].shape[0]] for buffer in memory.scores)
        product.copy_(inputs.operands[key][target[r], :D]).mul_(other.copy_(x[r]))
        for k, segment in enumerate(inputs.segments):
            sim[k, r] = product[:, segment].sum(1)
    # The norms as the sweep rounds them, so that target and negatives share their errors.
    factor = rows.factor.to(wide) * rows.ratio.to(wide)
    return sim.cumsum(0) * factor * inputs.inverse[key][:, target].to(wide)


# The second pass ------------------------------------------------------------------------------------------------------


class _Gradients:
    """The gradients of the operands, the scale and the biases, summed over chunks."""

    def __init__(self, inputs: _Inputs, wants: Wants):
        self.inputs = inputs
        operands, used = inputs.operands, inputs.inverse
        self.totals = [
            x.new_zeros(x.shape, dtype=inputs.dtype) if w else None
            for x, w in zip(operands, wants.operands, strict=True)
        ]
        # sum of dz z over the other side, by prefix and row; the projection through the norms follows from it
        self.along = {n: torch.zeros_like(used[n]) for n in used if wants.operands[n]}
        self.scale = torch.zeros_like(inputs.scale, dtype=inputs.wide) if wants.scale else None
        self.biases = [
            torch.zeros_like(bias) if wanted and bias is not None else None
            for bias, wanted in zip(inputs.biases, wants.biases, strict=True)
        ]
        self.keys = {key for _, key in inputs.blocks}

    def add_rows(self, number: int, part: slice, rows: _Queries) -> None:
        """Brings dx to the units that `_finish` multiplies, where a key's gradient and a query's may be one matrix."""
        total, inputs = self.totals[number], self.inputs
        if total is None or rows.dx is None:
            return
        factor = inputs.unit * inputs.weight[part].sign() / rows.ratio
        for k, segment in enumerate(inputs.segments):
            if number in self.keys:
                total[part, segment] += rows.dx[k].mul_(factor[k, :, None])
            else:
                torch.mul(rows.dx[k], factor[k, :, None], out=total[part, segment])
        if number not in self.keys:
            self._finish(number, part)

    def result(self, losses: Tensor) -> Prefixed:
        for number, total in enumerate(self.totals):
            if total is not None and number in self.keys:
                self._finish(number, slice(0, total.shape[0]))
        by_scale = None if self.scale is None else self.scale.to(self.inputs.dtype)
        return Prefixed(losses, tuple(self.totals), by_scale, tuple(self.biases))

    def _finish(self, number: int, part: slice) -> None:
        """Applies the norms and their projection. A row shorter than 1e-12 is divided by a constant and has no
        projection.

        All prefixes' sums of dz z add up to the product of the gradient, norms held fixed, with x. The last one follows
        from it, which saves a pass and makes the rest orthogonal to x to the last digit.
        """
        total, inputs = self.totals[number], self.inputs
        if total is None:
            return
        total, inverse, along = total[part], inputs.inverse[number][:, part], self.along[number][:, part]
        x = inputs.operands[number][part]
        scaled = inverse if inputs.gain is None else inverse / inputs.gain
        for r in row_chunks(x):
            pairs = [(total[r, segment], x[r, segment].to(inputs.dtype)) for segment in inputs.segments]
            along[-1, r] -= along[:-1, r].sum(0)
            for k, (dx, row) in enumerate(pairs):
                dx.mul_(scaled[k, r, None])
                along[-1, r] += torch.linalg.vecdot(dx, row)
            lost = along[:, r] * inverse[:, r].square().masked_fill(inverse[:, r] >= 1 / NORM_EPS, 0)
            lost = lost.flip(0).cumsum(0).flip(0)
            for k, (dx, row) in enumerate(pairs):
                dx.addcmul_(row, lost[k, :, None], value=-1).mul_(inputs.back)


class _Products:
    """Turns the logits of a chunk into dz, its suffix sums and products, tile by tile."""

    def __init__(self, inputs: _Inputs, memory: _Memory, gradients: _Gradients, admit: Admit | None):
        self.inputs, self.memory, self.gradients, self.admit = inputs, memory, gradients, admit
        self.flush = inputs.device.type == "cpu" and inputs.dtype == torch.float32

    def run(self, part: slice, queries: dict[int, _Queries], pieces: list[_Piece], found: _Normalised) -> None:
        settled = {number: self._settled(found, rows.ratio) for number, rows in queries.items()}
        for piece in pieces:
            number = piece.tile.query
            self._tile(part, queries[number], piece, settled[number])
        for number, rows in queries.items():
            self.gradients.add_rows(number, part, rows)

    @staticmethod
    def _settled(found: _Normalised, ratio: Tensor) -> _Rows:
        columns = (found.shift, found.weight * ratio, found.entry * ratio)
        shift, weight, entry = (list(t[:, :, None]) for t in columns)
        return _Rows(shift, weight, entry, list(found.sign / ratio), list(found.score[:, :, None]))

    def _tile(self, part: slice, rows: _Queries, piece: _Piece, settled: _Rows) -> None:
        inputs, tile = self.inputs, piece.tile
        last, count = len(inputs.dims) - 1, part.stop - part.start
        admitted = None if self.admit is None else self.admit(tile.block, part, tile.columns)
        y = self._keys(tile) if rows.dx is not None and not inputs.narrow else []
        dz, suffix, product = (self.memory.buffer(n, count, tile) for n in range(3))
        for k in reversed(range(last + 1)):
            self._differentiate(k, piece, settled, admitted, out=dz)
            self._sum(k, part, piece, settled, dz, product)
            if inputs.dim_weights[k] < 0:
                dz.neg_()
            # suffix = sum_{m >= k} dz_m / |y|_m * |y|_k: the columns' 1/norms are applied after the products.
            if k == last:
                dz, suffix = suffix, dz
            else:
                torch.addcmul(dz, suffix, tile.step[k], out=suffix)
            self._multiply(k, rows, tile, y, suffix, product)

    def _keys(self, tile: _Tile) -> list[Tensor]:
        """Returns the segments of the keys, each divided by the norm of its prefix."""
        raw = self.inputs.cut(tile.y.to(self.inputs.dtype))
        y = self.inputs.cut(self.memory.y[: tile.y.shape[0]])
        for segment, inverse, out in zip(raw, tile.inverse, y, strict=True):
            torch.mul(segment, inverse[:, None], out=out)
        return y

    def _differentiate(self, k: int, piece: _Piece, settled: _Rows, admitted: Tensor | None, out: Tensor) -> None:
        """Writes |dz| of prefix k; the sign is the row's."""
        tile, logits, hits = piece
        assert logits is not None
        if self.inputs.safe:
            torch.exp2(logits[k], out=out)
        else:
            torch.sub(logits[k], settled.shift[k], out=out)
            self.inputs.add_bias_(out, tile).exp2_()
            if self.flush:
                torch.ops.aten.hardshrink.out(out, FLUSH, out=out)
        # A separate pass: added to the exponent, 1 / l would be rounded by up to ulp(16) / 2 = 5e-7.
        out.mul_(settled.weight[k])
        _leave_out_(out, hits, admitted, 0.0)
        if hits is not None:
            inside, index = hits
            out.scatter_add_(1, index, torch.where(inside, settled.entry[k], 0))

    def _sum(self, k: int, part: slice, piece: _Piece, settled: _Rows, dz: Tensor, product: Tensor) -> None:
        """Adds the sums of dz and of dz z to the gradients by scale and bias, and to `along`."""
        tile, logits, _ = piece
        assert logits is not None
        z, sign, by_scale, inputs = logits[k], settled.sign[k], self.gradients.scale, self.inputs
        if by_scale is not None:
            # A row of dz sums to 0, so logits minus the target's give the same sum with less cancellation.
            torch.sub(z, settled.score[k], out=product).mul_(dz)
            by_scale += torch.dot(product.sum(1).to(inputs.wide), sign.to(inputs.wide)) / inputs.unit
        # Row and column sums of dz z, of the very dz that is multiplied: its errors along x cancel.
        # The last prefix's follow from the whole, in `_Gradients._finish`.
        rows_along = self.gradients.along.get(tile.query)
        if k < len(inputs.dims) - 1 and (rows_along is not None or tile.along is not None):
            torch.mul(z, dz, out=product)
            if rows_along is not None:
                rows_along[k, part].addcmul_(product.sum(1), sign)
            if tile.along is not None:
                tile.along[k].addmv_(product.T, sign)
        if tile.dbias is not None:
            tile.dbias.addmv_(dz.T, sign)

    def _multiply(self, k: int, rows: _Queries, tile: _Tile, y: list[Tensor], suffix: Tensor, scratch: Tensor) -> None:
        """Adds segment k of both sides' gradients, in 16 bits with the factors that the operands lack."""
        inputs = self.inputs
        if rows.dx is not None and inputs.narrow:
            times = tile.times[k] if inputs.gain is None else tile.times[k] * inputs.gain
            products.add_mm(rows.dx[k], self._rounded(suffix, times, scratch), tile.y[:, inputs.segments[k]])
        elif rows.dx is not None:
            rows.dx[k].addmm_(suffix, y[k])
        if tile.dy is not None:
            values = self._rounded(suffix, rows.times[k], scratch) if inputs.narrow else suffix
            products.add_mm(tile.dy[k], values.T, rows.signed[k])

    def _rounded(self, suffix: Tensor, factor: Tensor, scratch: Tensor) -> Tensor:
        out = self.memory.rounded[: suffix.numel()].view(suffix.shape)
        return out.copy_(torch.mul(suffix, factor, out=scratch))
