"""The one sweep: row chunks, a bounded workspace, and two plain GEMMs per block by the vendor's library.

    for each row chunk:   z tile -> exp or dz in the workspace       (a backend's primitive)
                          dx[chunk] += W @ y,   dy += W.T @ x[chunk]  (torch.mm, fp32 accumulation)

No tensor here grows with M x N. What comes out are gradients of the *sum* of the weighted losses; the caller multiplies
by upstream / denominator in fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .epilogues import softmax_loss
from .problem import NORM_EPS, Problem, RowSums, Softmax, Strip, inverse_norms, stats_dtype

# The workspace holds one row chunk. CPU: 256 rows at N = 65536, 1024 at 16384; GPU: thousands.
WORKSPACE_BYTES = {"cpu": 64 << 20, "cuda": 768 << 20}
MIN_ROWS = 64  # fewer make dy's rank-k update memory-bound; the budget is exceeded only beyond N = 262144 in fp32
MAX_ROWS = {"cpu": 1024, "cuda": 5632}
STATS_COLUMNS = 16384  # a sweep that stores nothing sizes its chunks as if rows were this long
CONVERTED_COLUMNS = 4096  # where a product wants another dtype, the workspace is converted tile by tile
PAD = 16  # elements: each block's part of a workspace row starts aligned for 16-byte accesses


class Wants(NamedTuple):
    """Which gradients are asked for."""

    operands: tuple[bool, ...]
    scale: bool
    biases: tuple[bool, ...]  # one per block

    @property
    def any(self) -> bool:
        return self.scale or any(self.operands) or any(self.biases)


class Result(NamedTuple):
    rows: Tensor  # [M] weighted losses
    operands: tuple[Tensor | None, ...]  # gradients of rows.sum(), in the statistics dtype
    scale: Tensor | None
    biases: tuple[Tensor | None, ...]


@torch.no_grad()
def run(problem: Problem, backend: ModuleType, wants: Wants) -> Result:
    """The weighted losses and the gradients of their sum."""
    with torch.autocast(problem.device.type, enabled=False):
        return _Sweep(problem, backend, wants).run()


class _Sweep:
    """The state of one sweep: what is precomputed per row and column, and the accumulators."""

    def __init__(self, problem: Problem, backend: ModuleType, wants: Wants):
        self.problem, self.backend, self.wants = problem, backend, wants
        self.dtype = stats_dtype(problem.dtype)
        self.factors = [inverse_norms(x) if problem.cosine else None for x in problem.operands]
        self.biases = [None if b.bias is None else b.bias.to(self.dtype).contiguous() for b in problem.blocks]
        target_sim = self._target_sim()
        self.target_sim = target_sim.to(self.dtype)
        # Wide until the shift is subtracted: at scale 100 the half-ulp of an fp32 score is a relative 4e-6 of its pair.
        self.target_score = target_sim * problem.scale
        if self.biases[0] is not None:
            self.target_score = self.target_score + self.biases[0][problem.target]
        self.operand_grads = [
            problem.scale.new_zeros(x.shape) if wanted else None
            for x, wanted in zip(problem.operands, wants.operands, strict=True)
        ]
        self.bias_grads = [
            torch.zeros_like(bias) if wanted and bias is not None else None
            for bias, wanted in zip(self.biases, wants.biases, strict=True)
        ]
        self.scale_grad = torch.zeros_like(problem.scale) if wants.scale else None
        self.smoothing = _Smoothing(self) if problem.label_smoothing else None
        self.gain = self._gain() if backend.workspace_dtype(problem) == torch.float16 else None

    def run(self) -> Result:
        if self.problem.symmetric:
            rows = self._symmetric()
        elif self.wants.any:
            rows = self._one_directional()
        else:
            rows = torch.empty_like(self.problem.weight)
            for chunk in self._stats_chunks():
                rows[chunk] = self._chunk_loss(chunk, self.backend.stats_rows(self._strips(chunk)))
        gradients = self._finish() if self.wants.any else (None,) * len(self.operand_grads)
        return Result(rows, gradients, self.scale_grad, tuple(self.bias_grads))

    # One direction ----------------------------------------------------------------------------------------------------

    def _one_directional(self) -> Tensor:
        losses = torch.empty_like(self.problem.weight)
        workspace = self._workspace()
        write = self._exp_chunk if self.backend.can_exp(self.problem) else self._grad_chunk
        for chunk in self._chunks(workspace.shape[0]):
            losses[chunk] = write(chunk, self._outs(workspace, chunk))
        return losses

    def _exp_chunk(self, chunk: slice, outs: list[Tensor]) -> Tensor:
        """E = exp(z - shift) in the workspace; weight / l is folded into the operands of the two GEMMs."""
        sums, q = self.backend.exp_rows(self.problem, self._strips(chunk), outs, self._wanted_target_sim(chunk))
        sums = sums.settle(self.target_score[chunk])
        softmax = self._softmax(sums, self.target_score[chunk], self.problem.weight[chunk], self.target_sim[chunk])
        over_l = softmax.weight
        entry = -sums.total
        if self.problem.label_smoothing:
            entry = entry + self.problem.label_smoothing * sums.total_with(self.target_score[chunk])
        self._patch_target(chunk, outs[0], entry)
        self._contract(chunk, outs, over_l)
        if q is not None and self.scale_grad is not None:
            self.scale_grad += (over_l * q).sum()
        return self._chunk_loss(chunk, sums)

    def _grad_chunk(self, chunk: slice, outs: list[Tensor]) -> Tensor:
        """Where no shift is known to be safe: the row's log-sum-exp first, then dz itself."""
        sums = self.backend.stats_rows(self._strips(chunk)).settle(self.target_score[chunk])
        rows = self._softmax(sums, self.target_score[chunk], self.problem.weight[chunk], self.target_sim[chunk])
        q = self.backend.grad_rows(self._strips(chunk), outs, rows, None, self.gain)
        entry = self.problem.label_smoothing * self.problem.weight[chunk] - rows.weight * sums.total
        self._patch_target(chunk, outs[0], entry if self.gain is None else entry * self.gain)
        self._contract(chunk, outs, None)
        if q is not None and self.scale_grad is not None:
            self.scale_grad += q.sum()
        return self._chunk_loss(chunk, sums)

    # Both directions --------------------------------------------------------------------------------------------------

    def _symmetric(self) -> Tensor:
        """Both normalisers must be known before any dz: one stats sweep that folds rows and columns, one grad sweep."""
        score, weight = self.target_score, self.problem.weight / 2
        row_sums, column_sums = RowSums.empty(weight), RowSums.empty(weight)
        for chunk in self._stats_chunks():
            rows, part = self.backend.stats_rows_and_columns(self._strips(chunk)[0])
            row_sums.shift[chunk], row_sums.total[chunk] = rows
            column_sums = column_sums.merge(part)
        row_sums, column_sums = row_sums.settle(score), column_sums.settle(score)
        if self.wants.any:
            columns = self._softmax(column_sums, score, weight, self.target_sim)
            workspace = self._workspace()
            for chunk in self._chunks(workspace.shape[0]):
                outs = self._outs(workspace, chunk)
                sums = row_sums.at(chunk)
                rows = self._softmax(sums, score[chunk], weight[chunk], self.target_sim[chunk])
                q = self.backend.grad_rows(self._strips(chunk), outs, rows, columns, self.gain)
                entry = -(rows.weight * sums.total + columns.weight[chunk] * column_sums.total[chunk])
                self._patch_target(chunk, outs[0], entry if self.gain is None else entry * self.gain)
                self._contract(chunk, outs, None)
                if q is not None and self.scale_grad is not None:
                    self.scale_grad += q.sum()
        losses = softmax_loss(*row_sums, score) + softmax_loss(*column_sums, score)
        return _zero_where(weight == 0, weight * losses)

    # Pieces -----------------------------------------------------------------------------------------------------------

    def _softmax(self, sums: RowSums, score: Tensor, weight: Tensor, target_sim: Tensor) -> Softmax:
        """`weight * exp(z - lse)` as `(weight / l) * exp(z - shift)`: 0 for a row that is left out."""
        over_l = weight / sums.total_with(score)
        return Softmax(sums.shift, _zero_where(weight == 0, over_l), target_sim if self.wants.scale else None)

    def _chunk_loss(self, chunk: slice, sums: RowSums) -> Tensor:
        loss = softmax_loss(*sums, self.target_score[chunk])
        if self.smoothing is not None:
            loss = loss + self.smoothing.loss(chunk)
        weight = self.problem.weight[chunk]
        return _zero_where(weight == 0, weight * loss)

    def _wanted_target_sim(self, chunk: slice) -> Tensor | None:
        return self.target_sim[chunk] if self.wants.scale else None

    def _target_sim(self) -> Tensor:
        """`f_i f_t <x_i, y_t>` as a row dot beside the sweep: in the tile it would cost registers and spill.

        In fp64 where the device has it: O(M D) work, and well-fitted pairs owe all of their loss to this number.
        """
        block, target = self.problem.blocks[0], self.problem.target
        wide = torch.float64 if self.problem.device.type in ("cpu", "cuda") else self.dtype
        x, y = self.problem.operands[block.query], self.problem.operands[block.key]
        sim = torch.empty(self.problem.rows, dtype=wide, device=x.device)
        for chunk in self._stats_chunks():
            sim[chunk] = torch.linalg.vecdot(x[chunk].to(wide), y[target[chunk]].to(wide))
        row_factor, col_factor = self.factors[block.query], self.factors[block.key]
        if row_factor is not None and col_factor is not None:
            sim = sim * row_factor * col_factor[target]
        return sim

    def _gain(self) -> Tensor:
        """The power of two that brings the largest possible dz to fp16's upper half: what is small would round to 0.

        |dz| is at most its row's weight times both factors. Computed on the device; undone in fp32 after the GEMMs.
        """
        one = torch.ones_like(self.problem.scale)
        largest = [one if f is None or not len(f) else f.amax() for f in self.factors]
        factors = torch.stack([largest[block.query] * largest[block.key] for block in self.problem.blocks]).amax()
        weight = self.problem.weight.abs().amax() if self.problem.rows else one
        return torch.exp2(torch.floor(15 - torch.log2(factors * weight.clamp_min(2.0**-126))))

    def _strips(self, chunk: slice) -> list[Strip]:
        strips = []
        for number, block in enumerate(self.problem.blocks):
            row_factor, col_factor = self.factors[block.query], self.factors[block.key]
            strips.append(
                Strip(
                    x=self.problem.operands[block.query][chunk],
                    y=self.problem.operands[block.key],
                    scale=self.problem.scale,
                    row_factor=None if row_factor is None else row_factor[chunk],
                    col_factor=col_factor,
                    bias=self.biases[number],
                    target=self.problem.target[chunk] if number == 0 else None,
                )
            )
        return strips

    # Chunks and workspace ---------------------------------------------------------------------------------------------

    def _chunk_rows(self, columns: int, itemsize: int) -> int:
        device = self.problem.device.type
        budget = WORKSPACE_BYTES.get(device, WORKSPACE_BYTES["cpu"])
        rows = min(budget // max(1, columns * itemsize), MAX_ROWS.get(device, MAX_ROWS["cpu"]))
        return max(1, min(max(MIN_ROWS, rows // MIN_ROWS * MIN_ROWS), self.problem.rows))

    def _chunks(self, rows: int) -> Iterator[slice]:
        for start in range(0, self.problem.rows, rows):
            yield slice(start, min(start + rows, self.problem.rows))

    def _stats_chunks(self) -> Iterator[slice]:
        return self._chunks(self._chunk_rows(STATS_COLUMNS, self.dtype.itemsize))

    def _block_widths(self) -> list[int]:
        return [-(-self.problem.operands[block.key].shape[0] // PAD) * PAD for block in self.problem.blocks]

    def _workspace(self) -> Tensor:
        dtype = self.backend.workspace_dtype(self.problem)
        width = sum(self._block_widths())
        rows = self._chunk_rows(width, dtype.itemsize)
        return torch.empty((rows, width), dtype=dtype, device=self.problem.device)

    def _outs(self, workspace: Tensor, chunk: slice) -> list[Tensor]:
        rows, start, outs = chunk.stop - chunk.start, 0, []
        for block, width in zip(self.problem.blocks, self._block_widths(), strict=True):
            outs.append(workspace[:rows, start : start + self.problem.operands[block.key].shape[0]])
            start += width
        return outs

    def _patch_target(self, chunk: slice, out: Tensor, entry: Tensor) -> None:
        """The target's entry, merged in fp32 before it is rounded into the workspace."""
        block, target = self.problem.blocks[0], self.problem.target[chunk]
        row_factor, col_factor = self.factors[block.query], self.factors[block.key]
        if row_factor is not None and col_factor is not None:
            entry = entry * row_factor[chunk] * col_factor[target]
        out.scatter_(1, target[:, None], entry[:, None].to(out.dtype))

    # The two GEMMs ----------------------------------------------------------------------------------------------------

    def _contract(self, chunk: slice, outs: list[Tensor], over_l: Tensor | None) -> None:
        """`dx[chunk] += over_l * (W @ y)`, `dy += W.T @ (over_l * x[chunk])`, `dbias += W.T @ over_l`."""
        for number, (block, out) in enumerate(zip(self.problem.blocks, outs, strict=True)):
            x, y = self.problem.operands[block.query][chunk], self.problem.operands[block.key]
            dx, dy = self.operand_grads[block.query], self.operand_grads[block.key]
            dbias = self.bias_grads[number]
            dtype = _gemm_dtype(self.problem, out.dtype)
            rows = (x if over_l is None else x * over_l[:, None]).to(dtype) if dy is not None else None
            converts = not dtype == out.dtype == y.dtype or (dbias is not None and out.dtype != self.dtype)
            columns = CONVERTED_COLUMNS if converts else y.shape[0]
            product = None if dx is None else torch.zeros(x.shape, dtype=self.dtype, device=x.device)
            for start in range(0, y.shape[0], columns):
                tile = slice(start, min(start + columns, y.shape[0]))
                values = out[:, tile]
                if dbias is not None:
                    ones = torch.ones_like(self.problem.weight[chunk]) if over_l is None else over_l
                    row_factor = self.factors[block.query]
                    if row_factor is not None:
                        ones = ones / row_factor[chunk]
                    dbias[tile] += values.T.to(ones.dtype) @ ones
                values = values.to(dtype)
                if product is not None:
                    add_mm(product, values, y[tile].to(dtype))
                if dy is not None and rows is not None:
                    add_mm(dy[tile], values.T, rows)
            if dx is not None and product is not None:
                dx[chunk] += product if over_l is None else product.mul_(over_l[:, None])

    def _finish(self) -> tuple[Tensor | None, ...]:
        """Apply what the accumulators left out: the scale, the gain, the smoothing term and the norms' projection."""
        gain = 1.0 if self.gain is None else self.gain
        for block, dbias in zip(self.problem.blocks, self.bias_grads, strict=True):
            if dbias is not None:
                col_factor = self.factors[block.key]
                dbias.div_(gain if col_factor is None else col_factor * gain)
        for dx in self.operand_grads:
            if dx is not None:
                dx.mul_(self.problem.scale / gain)
        if self.smoothing is not None:
            self.smoothing.add_gradients()
        for x, factor, dx in zip(self.problem.operands, self.factors, self.operand_grads, strict=True):
            if dx is not None and factor is not None:
                _project_(dx, x, factor)
        return tuple(self.operand_grads)


class _Smoothing:
    """Label smoothing without masks is a rank-one correction: it needs the mean column, not the tiles.

    loss_i += eps (z_it - mean_j z_ij) over the admissible columns, those whose bias is not -inf.
    """

    def __init__(self, sweep: _Sweep):
        self.sweep, self.eps = sweep, sweep.problem.label_smoothing
        problem = sweep.problem
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

    def loss(self, chunk: slice) -> Tensor:
        return self.eps * (self.sweep.target_score[chunk] - self.mean_score[chunk]).to(self.mean_score.dtype)

    def add_gradients(self) -> None:
        sweep, problem = self.sweep, self.sweep.problem
        weight = problem.weight
        if sweep.scale_grad is not None:
            sweep.scale_grad += self.eps * (weight * (sweep.target_sim - self.mean_sim)).sum()
        for number, block in enumerate(problem.blocks):
            row_factor, col_factor = sweep.factors[block.query], sweep.factors[block.key]
            rows = weight if row_factor is None else weight * row_factor
            columns = self.admissible[number] / self.count
            dx, dy, dbias = (
                sweep.operand_grads[block.query],
                sweep.operand_grads[block.key],
                sweep.bias_grads[number],
            )
            if dbias is not None:
                dbias -= self.eps * weight.sum() * columns
            if dx is not None:
                dx.addr_(rows, self.mean_key[number] * problem.scale, alpha=-self.eps)
            if dy is not None:
                mean_query = _weighted_sum(problem.operands[block.query], rows)
                factored = columns if col_factor is None else columns * col_factor
                dy.addr_(factored, mean_query * problem.scale, alpha=-self.eps)


def _zero_where(condition: Tensor, value: Tensor) -> Tensor:
    """0 where a row is left out, also if its own value is not finite."""
    return value.masked_fill(condition, 0)


def _gemm_dtype(problem: Problem, stored: torch.dtype) -> torch.dtype:
    """bf16 inputs meet a bf16 copy of the tile where the CPU has bf16 matrix units; else what the workspace holds."""
    if problem.device.type == "cpu" and problem.dtype == torch.bfloat16 and _cpu_multiplies_bf16():
        return torch.bfloat16
    return stored


@functools.cache
def _cpu_multiplies_bf16() -> bool:
    capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch; AMX implies the flag
    return bool(capabilities.get("avx512_bf16", False))


def add_mm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, accumulated in the dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif a.dtype == torch.float16:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))  # a CPU's fp16 product is fp16 and overflows under the gain
    else:
        total.add_(torch.mm(a, b))


def _row_chunks(x: Tensor) -> Iterator[slice]:
    for start in range(0, x.shape[0], 4096):
        yield slice(start, start + 4096)


def _weighted_sum(x: Tensor, weight: Tensor) -> Tensor:
    """`weight @ x` in the dtype of `weight`, without a converted copy of `x`."""
    total = weight.new_zeros(x.shape[1])
    for chunk in _row_chunks(x):
        total += weight[chunk] @ x[chunk].to(weight.dtype)
    return total


def _matvec(x: Tensor, vector: Tensor) -> Tensor:
    out = vector.new_empty(x.shape[0])
    for chunk in _row_chunks(x):
        out[chunk] = x[chunk].to(vector.dtype) @ vector
    return out


def _project_(dx: Tensor, x: Tensor, factor: Tensor) -> None:
    """From the gradient with 1/norms held fixed to the gradient through them: `dx -= f^2 <dx, x> x`, in place.

    A row shorter than 1e-12 is divided by a constant: nothing to project.
    """
    squared = (factor * factor).masked_fill(factor >= 1 / NORM_EPS, 0)
    for chunk in _row_chunks(x):
        row = x[chunk].to(dx.dtype)
        along = (dx[chunk] * row).sum(1) * squared[chunk]
        dx[chunk].addcmul_(row, along[:, None], value=-1)
