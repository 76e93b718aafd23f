"""Matryoshka in one sweep: softmax losses of several prefixes of the same embeddings, out of one similarity GEMM.

    z_k[i, j] = scale <x_i[:d_k], y_j[:d_k]> / (|x_i[:d_k]| |y_j[:d_k]|) + bias_j
    loss_i    = weight_i sum_k c_k CE(z_k[i], target_i)

With segments [d_{k-1}, d_k) of the columns, and |x|_k, |y|_k the norms of the prefixes:

    acc += x[:, segment k] @ y[:, segment k].T        after which acc holds the dot products of prefix k
    H_k[i, j] = scale dz_k[i, j] / (|x_i|_k |y_j|_k)
    dx[:, segment k] = (sum_{m >= k} H_m) @ y[:, segment k] - (sum_{m >= k} rowsum(dz_m z_m) / |x|_m^2) x[:, segment k]

and dy alike, with the transpose and column sums. The three products of the longest prefix serve all of them: 6 MND,
against 6 MN sum_k d_k for a loop. Two passes over a row chunk: the first stores the logits of all prefixes and sums
their exponentials; the second turns a tile of them into dz, its suffix sums and products while it is in cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .problem import NORM_EPS, RowSums, stats_dtype
from .rows import row_chunks, settle

LOG2E = math.log2(math.e)
# A tile [384, 1024] of one prefix with its companions is 4.5 MiB of fp32, near what the cores keep in their L2. More
# rows would make the products no faster, and memory that is touched for the first time costs more than they do.
CPU_ROWS, TILE_COLUMNS = 384, 1024
SCORE_ROWS = 128  # at a time in fp64: 768 KiB at D = 768
# Up to this scale neither exp(z) nor its sum leaves fp32, so no maximum is searched; and exp(-2 * 30) = 2**-87 leaves
# nothing to flush.
SAFE_SCALE = 30.0
FLUSH = 2.0**-100  # smaller exponentials turn products into denormals, 2 to 5 times slower on a CPU

NOTHING = 1e30  # as a shift: 2 to the power of minus that is 0, and 0 times it as well

Admit = Callable[[int, slice, slice], Tensor | None]


class Prefixed(NamedTuple):
    losses: Tensor  # [M], weighted
    gradients: tuple[Tensor | None, ...]  # of losses.sum(), one per operand, fp32 (fp64 for fp64)
    scale: Tensor | None
    biases: tuple[Tensor | None, ...]


@torch.no_grad()
def sweep_prefixes(
    operands: Sequence[Tensor],
    blocks: Sequence[tuple[int, int, Tensor | None]],
    scale: Tensor,
    target: Tensor,
    weight: Tensor,
    dims: Sequence[int],
    dim_weights: Sequence[float],
    wants_operands: Sequence[bool],
    wants_scale: bool,
    wants_biases: Sequence[bool],
    *,
    chunk: int,
    admit: Admit | None = None,
) -> Prefixed:
    """The weighted losses of the cosine logits of all prefixes, and the gradients of their sum.

    operands: matrices [rows, D]. blocks: (query, key, bias), columns side by side under one row normaliser.
    scale: 0-dim; target: [M], a column of block 0; weight: [M], 0 leaves a row out: all as in `Problem`.
    dims, dim_weights: d_k and c_k, in any order.
    chunk: rows at a time, at most. The workspace takes chunk * len(dims) * columns elements; without gradients there
        is none.
    admit: (block, rows, columns) -> which may compete, [rows, columns] bool, or None for all. It is asked twice, and
        has no say about targets.
    """
    return _Sweep(
        operands, blocks, scale, target, weight, dims, dim_weights, wants_operands, wants_scale, wants_biases, admit
    ).run(chunk)


class _Queries(NamedTuple):
    """Rows of one operand in a chunk: `x` divided by its norm at the longest prefix and times scale * log2(e)."""

    x: Tensor  # [R, d_K]
    signed: Tensor  # [R, d_K], times the sign of the row's weight
    ratio: Tensor  # [K, R] |x|_K / |x|_k
    dx: Tensor | None  # [R, d_K]


class _Tile(NamedTuple):
    block: int
    columns: slice
    z: Tensor | None  # [K, R, columns] in the workspace: logits in units of log 2, without bias
    hits: tuple[Tensor, Tensor] | None  # (mask, column) of the targets inside


class _Normalised(NamedTuple):
    """What the second pass needs of the first, per prefix and row."""

    loss: Tensor  # [R]
    shift: Tensor  # [K, R], fp64: z minus it is the logarithm of dz, to base 2
    entry: Tensor  # [K, R]: |dz| of the target is minus that
    sign: Tensor  # [K, R] of dz
    score: Tensor  # [K, R] of the target, without bias


class _Sweep:
    def __init__(
        self,
        operands: Sequence[Tensor],
        blocks: Sequence[tuple[int, int, Tensor | None]],
        scale: Tensor,
        target: Tensor,
        weight: Tensor,
        dims: Sequence[int],
        dim_weights: Sequence[float],
        wants_operands: Sequence[bool],
        wants_scale: bool,
        wants_biases: Sequence[bool],
        admit: Admit | None,
    ):
        self.dtype = stats_dtype(operands[0].dtype)
        self.device = operands[0].device
        self.wide = torch.float64 if self.device.type in ("cpu", "cuda") else self.dtype  # fp64 is not everywhere
        self.operands, self.admit = operands, admit
        self.target, self.weight = target, weight.to(self.dtype)
        self.blocks = [(query, key) for query, key, _ in blocks]
        self.columns = [operands[key].shape[0] for _, key in self.blocks]
        self.biases = [None if bias is None else bias.to(self.dtype) for _, _, bias in blocks]
        by_dim: dict[int, float] = {}
        for dim, dim_weight in zip(dims, dim_weights, strict=True):
            by_dim[dim] = by_dim.get(dim, 0.0) + dim_weight
        self.dims = sorted(by_dim)
        self.dim_weights = [by_dim[dim] for dim in self.dims]
        self.segments = [slice(low, high) for low, high in zip([0, *self.dims], self.dims, strict=False)]

        # Logits are kept in units of log 2. A scale of 0 would leave nothing to learn the cosines from; the gradients
        # are multiplied by the true one.
        self.scale = scale.to(self.dtype)
        self.unit = torch.where(self.scale == 0, 1e-20, self.scale) * LOG2E
        self.natural = self.scale.to(self.wide) / self.unit.to(self.wide)
        self.back = self.natural.to(self.dtype)
        self.safe = (
            self.device.type == "cpu"
            and all(bias is None for bias in self.biases)
            and abs(self.scale.item()) <= SAFE_SCALE
        )
        used = {number for block in self.blocks for number in block}
        # [K, rows] per operand
        self.inverse = {n: self._inverse_norms(operands[n]) for n in used}
        self.wants = [wanted and n in used for n, wanted in enumerate(wants_operands)]
        self.wants_any = any(wants_operands) or wants_scale or any(wants_biases)
        self.totals = [
            x.new_zeros(x.shape, dtype=self.dtype) if w else None for x, w in zip(operands, wants_operands, strict=True)
        ]
        # sum of dz z over the other side, by prefix and row; what the gradient loses to the norms follows from it
        self.along = {n: torch.zeros_like(self.inverse[n]) for n in used if self.wants[n]}
        self.scale_grad = torch.zeros_like(self.scale) if wants_scale else None
        self.bias_grads = [
            torch.zeros_like(bias) if wanted and bias is not None else None
            for bias, wanted in zip(self.biases, wants_biases, strict=True)
        ]
        self.keys = {key for _, key in self.blocks}

    def run(self, chunk: int) -> Prefixed:
        M = self.target.shape[0]
        losses = torch.empty_like(self.weight)
        chunk = max(1, min(chunk, M, CPU_ROWS if self.device.type == "cpu" else chunk))
        width = min(TILE_COLUMNS, max([1, *self.columns]))
        elements = len(self.dims) * sum(self.columns) if self.wants_any else width
        self.workspace = self.weight.new_empty(chunk * elements)
        self.buffers = [self.weight.new_empty(chunk * width) for _ in range(3)]
        self.y = self.weight.new_empty((width, self.dims[-1]))
        self.rows = {n: [self.weight.new_empty((chunk, self.dims[-1])) for _ in range(3)] for n, _ in self.blocks}
        for start in range(0, M, chunk):
            part = slice(start, min(start + chunk, M))
            queries = {number: self._queries(number, part) for number, _ in self.blocks}
            tiles = list(self._tiles(part, width))
            found = self._settle(part, queries, *self._sums(part, queries, tiles))
            losses[part] = found.loss
            if self.wants_any:
                for tile in tiles:
                    self._tile_gradients(part, queries, tile, found)
                for number, rows_ in queries.items():
                    self._end_chunk(number, part, rows_)
        for number, total in enumerate(self.totals):
            if total is not None and number in self.keys:
                self._finish(number, slice(0, total.shape[0]))
        return Prefixed(losses, tuple(self.totals), self.scale_grad, tuple(self.bias_grads))

    # The parts of a chunk -------------------------------------------------------------------------------------------

    def _queries(self, number: int, part: slice) -> _Queries:
        inverse = self.inverse[number][:, part]
        x, signed, dx = (buffer[: part.stop - part.start] for buffer in self.rows[number])
        torch.mul(self._wide(self.operands[number][part]), (inverse[-1] * self.unit)[:, None], out=x)
        torch.mul(x, self.weight[part].sign()[:, None], out=signed)
        return _Queries(x, signed, inverse / inverse[-1], dx.zero_() if self.wants[number] else None)

    def _tiles(self, part: slice, width: int) -> Iterator[_Tile]:
        rows, offset, K = part.stop - part.start, 0, len(self.dims)
        for block, columns in enumerate(self.columns):
            for start in range(0, columns, width):
                tile = slice(start, min(start + width, columns))
                size = K * rows * (tile.stop - start)
                z = None
                if self.wants_any:
                    z = self.workspace[offset : offset + size].view(K, rows, tile.stop - start)
                    offset += size
                yield _Tile(block, tile, z, self._hits(part, tile) if block == 0 else None)

    def _hits(self, part: slice, tile: slice) -> tuple[Tensor, Tensor] | None:
        index = self.target[part] - tile.start
        inside = (index >= 0) & (index < tile.stop - tile.start)
        if self.device.type == "cpu" and not inside.any():
            return None  # elsewhere the host reads nothing back
        return inside[:, None], index.clamp(0, tile.stop - tile.start - 1)[:, None]

    def _wide(self, x: Tensor) -> Tensor:
        return x[:, : self.dims[-1]].to(self.dtype)

    def _keys(self, tile: _Tile) -> Tensor:
        return self._wide(self.operands[self.blocks[tile.block][1]][tile.columns])

    def _inverse_norms(self, x: Tensor) -> Tensor:
        """`problem.inverse_norms` of every prefix, [K, rows], from one pass over `x`."""
        squares = [
            torch.linalg.vector_norm(x[:, s], dim=1, dtype=self.dtype).to(self.wide).square() for s in self.segments
        ]
        norms = torch.stack(squares).cumsum(0).sqrt()
        if x.dtype == torch.float16:
            norms = norms.masked_fill(norms == 0, 1)
        return norms.clamp_min(NORM_EPS).reciprocal().to(self.dtype)

    def _buffer(self, number: int, like: Tensor) -> Tensor:
        return self.buffers[number][: like.numel()].view(like.shape)

    def _sums(self, part: slice, queries: dict[int, _Queries], tiles: list[_Tile]) -> tuple[Tensor, Tensor]:
        """Writes the logits of every prefix; returns shift and total, [K, R]: sum_{j != t} 2^z = total 2^shift."""
        rows = part.stop - part.start
        total = self.weight.new_zeros((len(self.dims), rows))
        maximum = torch.zeros_like(total) if self.safe else torch.full_like(total, -torch.inf)
        for tile in tiles:
            query, key = self.blocks[tile.block]
            x, _, ratio, _ = queries[query]
            y, inverse = self._keys(tile), self.inverse[key][:, tile.columns]
            admitted = None if self.admit is None else self.admit(tile.block, part, tile.columns)
            shape = rows, tile.columns.stop - tile.columns.start
            z_last = self.buffers[1][: rows * shape[1]].view(shape) if tile.z is None else tile.z[-1]
            scratch = self._buffer(0, z_last)
            last = len(self.dims) - 1
            for k, segment in enumerate(self.segments):
                # Dot products accumulate where the last prefix's logits will stand.
                if k == 0:
                    torch.mm(x[:, segment], y[:, segment].T, out=z_last)
                else:
                    z_last.addmm_(x[:, segment], y[:, segment].T)
                if k == last:
                    z = z_last.mul_(inverse[k])
                else:
                    z = self._buffer(2, z_last) if tile.z is None else tile.z[k]
                    torch.mul(z_last, inverse[k], out=z).mul_(ratio[k, :, None])
                if self.safe:
                    torch.exp2(z, out=scratch)
                    self._leave_out(scratch, tile, admitted, 0.0)
                else:
                    if self.biases[tile.block] is not None or admitted is not None or tile.hits is not None:
                        z = self._add_bias_(scratch.copy_(z), tile)
                        self._leave_out(z, tile, admitted, -torch.inf)
                    new = torch.maximum(maximum[k], z.amax(1))
                    shift = torch.where(new == -torch.inf, 0, new)
                    torch.sub(z, shift[:, None], out=scratch).exp2_()
                    total[k] *= torch.exp2(maximum[k] - shift)
                    maximum[k] = new
                total[k] += scratch.sum(1)
        return torch.where(maximum == -torch.inf, 0, maximum), total

    def _add_bias_(self, z: Tensor, tile: _Tile) -> Tensor:
        bias = self.biases[tile.block]
        if bias is None:
            return z
        bias = bias[tile.columns]
        return z.add_(bias * LOG2E).masked_fill_(bias == -torch.inf, -torch.inf)

    def _leave_out(self, values: Tensor, tile: _Tile, admitted: Tensor | None, value: float) -> None:
        if admitted is not None:
            values.masked_fill_(~admitted, value)
        if tile.hits is not None:
            inside, index = tile.hits
            values.scatter_(1, index, torch.where(inside, value, values.gather(1, index)))

    def _settle(self, part: slice, queries: dict[int, _Queries], shift: Tensor, total: Tensor) -> _Normalised:
        """Losses, and what a logit is compared with so that its power of two is |dz|."""
        own, weight = self._scores(part, queries[self.blocks[0][0]]), self.weight[part]
        # z in natural units is `back` times what the workspace holds: exactly, also where `unit` was rounded.
        natural, score = shift.to(self.wide) * self.natural, own * self.natural
        bias = self.biases[0]
        if bias is not None:
            score = score + bias[self.target[part]]
        rows = [settle(RowSums(natural[k], total[k]), score[k], c * weight) for k, c in enumerate(self.dim_weights)]
        over_l = torch.stack([row.weight for row in rows])
        return _Normalised(
            torch.stack([row.loss for row in rows]).sum(0),
            shift.to(self.wide) - over_l.abs().to(self.wide).log2(),
            -over_l.abs() * total,
            over_l.sign(),
            own.to(self.dtype),
        )

    def _scores(self, part: slice, rows: _Queries) -> Tensor:
        """[K, R] of the targets, as the workspace has them but fp64: well-fitted pairs owe all of their loss to these."""
        wide = self.wide
        query, key = self.blocks[0]
        target, D = self.target[part], self.dims[-1]
        sim = torch.empty(rows.ratio.shape, dtype=wide, device=self.device)
        x = self.operands[query][part, :D]
        for start in range(0, x.shape[0], SCORE_ROWS):
            r = slice(start, start + SCORE_ROWS)
            product = self.operands[key][target[r], :D].to(wide).mul_(x[r])
            for k, segment in enumerate(self.segments):
                sim[k, r] = product[:, segment].sum(1)
        # The norms as the sweep rounds them, so that target and negatives share their errors.
        factor = (self.inverse[query][-1, part] * self.unit).to(wide) * rows.ratio.to(wide)
        return sim.cumsum(0) * factor * self.inverse[key][:, target].to(wide)

    def _tile_gradients(self, part: slice, queries: dict[int, _Queries], tile: _Tile, found: _Normalised) -> None:
        query, key = self.blocks[tile.block]
        _, signed, ratio, dx = queries[query]
        assert tile.z is not None
        inverse = self.inverse[key][:, tile.columns]
        admitted = None if self.admit is None else self.admit(tile.block, part, tile.columns)
        dy = self.totals[key]
        y = None
        if dx is not None:
            raw = self._keys(tile)
            y = self.y[: raw.shape[0]]
            for k, segment in enumerate(self.segments):
                torch.mul(raw[:, segment], inverse[k, :, None], out=y[:, segment])
        # |dz| times the row's ratio: an addend of the exponent, no pass of its own. Where it is rounded a row of dz is off
        # by one factor (ulp(16) / 2 = 5e-7), which the target has to share: a row sums to 0.
        exact = (found.shift - ratio.to(self.wide).log2()).clamp(max=NOTHING)
        shift = exact.to(self.dtype)
        entry = found.entry * ratio
        sign = found.sign / ratio
        dz, suffix, product = (self._buffer(n, tile.z[0]) for n in range(3))
        for k in reversed(range(len(self.dims))):
            z, segment = tile.z[k], self.segments[k]
            torch.sub(z, shift[k, :, None], out=dz)
            self._add_bias_(dz, tile).exp2_()
            if not self.safe and self.device.type == "cpu" and self.dtype == torch.float32:
                torch.ops.aten.hardshrink.out(dz, FLUSH, out=dz)
            self._leave_out(dz, tile, admitted, 0.0)
            if tile.hits is not None:
                inside, index = tile.hits
                dz.scatter_add_(1, index, torch.where(inside, entry[k, :, None], 0))
            if self.scale_grad is not None:
                # A row of dz sums to 0: less the target's the logits give the same, and have little to cancel.
                torch.sub(z, found.score[k, :, None], out=product).mul_(dz)
                self.scale_grad += torch.dot(product.sum(1), sign[k]) / self.unit
            self._sum_along(part, tile, k, torch.mul(z, dz, out=product), sign[k])
            bias_grad = self.bias_grads[tile.block]
            if bias_grad is not None:
                bias_grad[tile.columns] += torch.mv(dz.T, sign[k])
            if self.dim_weights[k] < 0:
                dz.neg_()
            # suffix = sum_{m >= k} dz_m / |y|_m * |y|_k: the columns' 1/norms wait for the products.
            if k == len(self.dims) - 1:
                dz, suffix = suffix, dz
            else:
                torch.addcmul(dz, suffix, inverse[k + 1] / inverse[k], out=suffix)
            if dx is not None and y is not None:
                dx[:, segment].addmm_(suffix, y[:, segment])
            if dy is not None:
                dy[tile.columns, segment].addmm_(suffix.T, signed[:, segment])

    def _sum_along(self, part: slice, tile: _Tile, k: int, product: Tensor, sign: Tensor) -> None:
        """Row and column sums of `product = dz z`, of the very dz that is multiplied: its errors along x cancel."""
        query, key = self.blocks[tile.block]
        if query in self.along:
            self.along[query][k, part] += product.sum(1) * sign
        if key in self.along:
            self.along[key][k, tile.columns] += torch.mv(product.T, sign)

    def _end_chunk(self, number: int, part: slice, rows: _Queries) -> None:
        """dx to the units of what `_finish` multiplies: there a key's gradient and a query's are one matrix."""
        total = self.totals[number]
        if total is None or rows.dx is None:
            return
        for k, segment in enumerate(self.segments):
            factor = self.unit * self.weight[part].sign() / rows.ratio[k]
            total[part, segment].addcmul_(rows.dx[:, segment], factor[:, None])
        if number not in self.keys:
            self._finish(number, part)

    def _finish(self, number: int, part: slice) -> None:
        """Applies the norms and their projection; a row shorter than 1e-12 is divided by a constant: none."""
        total, inverse = self.totals[number], self.inverse[number][:, part]
        if total is None:
            return
        total = total[part]
        along = self.along[number][:, part] * (inverse * inverse).masked_fill(inverse >= 1 / NORM_EPS, 0)
        along = along.flip(0).cumsum(0).flip(0) * self.back
        inverse = inverse * self.back
        x = self.operands[number][part]
        for r in row_chunks(x):
            for k, segment in enumerate(self.segments):
                dx = total[r, segment].mul_(inverse[k, r, None])
                dx.addcmul_(x[r, segment].to(self.dtype), along[k, r, None], value=-1)
