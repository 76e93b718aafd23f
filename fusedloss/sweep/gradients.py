"""The outputs of a sweep: gradients, to which each chunk adds two products."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..backends.protocol import Wants
from ..core import products
from ..core.numerics import NORM_EPS, constant, rows_of, saved_dtype, slices, wide_dtype
from ..core.problem import Problem
from ..core.products import add_mm, mm
from ..core.rows import fresh, largest_finite, power_of_two
from ..core.strips import Tile
from . import chunks
from .inputs import Inputs, part


class Gradients:
    """The gradients of one sweep. gain: the factor of dz in fp16, or None."""

    def __init__(
        self,
        inputs: Inputs,
        wants: Wants,
        into: Mapping[int, Tensor] | None = None,
        half: bool = False,
        share: float = 1.0,
    ):
        """into: the tensors that gradients of pure queries are added to; the others then are in fp32. half: whether an
        element is the gradient of both of its places. share: the factor of all gradients once they are finished."""
        problem = inputs.problem
        self.inputs, self.problem, self.wants = inputs, problem, wants
        self.biases = [
            torch.zeros_like(bias) if wanted and bias is not None else None
            for bias, wanted in zip(inputs.biases, wants.biases, strict=True)
        ]
        # In fp64, which costs nothing here, because the parts of rows and chunks cancel.
        wide = wide_dtype(problem.device, inputs.dtype)
        self.scale = torch.zeros_like(problem.scale, dtype=wide) if wants.scale else None
        number = 0 if problem.fold is None else len(problem.fold.scalars)
        self.scalars = [torch.zeros_like(problem.scale, dtype=wide) if x else None for x in wants.scalars[:number]]
        fold = problem.fold
        self.beside: Tensor | None = None  # by a fold's columns beside the blocks
        if fold is not None and fold.beside is not None and wants.scalars[-1:] == (True,):
            self.beside = torch.zeros_like(fold.beside.values, dtype=inputs.dtype)
        self.gain, self.share = _gain(inputs, 2 if half else 1), share
        self.multiplier = _multiplier(problem, share)
        self.operands = [
            Gradient(problem, number, self._finisher(number), into) if wanted else None
            for number, wanted in enumerate(wants.operands)
        ]

    def _finisher(self, number: int) -> Callable[..., None]:
        inputs = self.inputs
        finish, multiplier, gain = inputs.backend.finish, self.multiplier, self.gain
        # The closures below do not hold `self`: a cycle would keep the gradients until the next collection, and
        # autograd would copy them.
        operand, norms, units = inputs.given[number], inputs.norms[number], inputs.units

        def apply(total: Tensor, over_l: Tensor | None, rows: slice, out: Tensor) -> None:
            factor, own = part(norms, rows), rows_of(operand, rows)
            more: Tensor | None = None
            if factor is not None and units:  # from the gradient by the unit row
                more = factor
            elif factor is not None and own.dtype == torch.float16:  # see `inverse_norms`
                zero = torch.linalg.vector_norm(own, math.inf, dim=1) == 0
                more = torch.ones_like(factor).masked_fill(zero, 1 / NORM_EPS)
            if more is not None:
                over_l = more if over_l is None else over_l * more
            finish(total, over_l, multiplier, gain, own, factor, out)

        return apply

    def add_scale(self, terms: Tensor | None) -> None:
        if terms is not None and self.scale is not None:
            self.scale += terms.sum(dtype=self.scale.dtype)

    def queries(self, chunk: slice) -> dict[int, Tensor]:
        """Returns the chunk's rows of the queries whose keys want a gradient: dy += W.T @ x."""
        numbers = {block.query for block in self.problem.blocks if self.wants.operands[block.key]}
        return {number: rows_of(self.inputs.operands[number], chunk) for number in sorted(numbers)}

    def contract(
        self,
        chunk: slice,
        outs: Sequence[Tensor],
        queries: Mapping[int, Tensor] | None = None,
        over_l: Tensor | None = None,
    ) -> None:
        """`dx[chunk] += over_l * (W @ y)`, `dy += W.T @ queries`, `dbias += W.T @ over_l`.

        `queries` are the chunk's rows of x, already times `over_l` if that is given.
        """
        problem, inputs = self.problem, self.inputs
        queries = self.queries(chunk) if queries is None else queries
        for number, (block, out) in enumerate(zip(problem.blocks, outs, strict=True)):
            y, dtype = inputs.operands[block.key], gemm_dtype(problem, out.dtype)
            dx, dy, dbias = self.operands[block.query], self.operands[block.key], self.biases[number]
            converts = not dtype == out.dtype == y.dtype or (dbias is not None and out.dtype != inputs.dtype)
            columns = chunks.CONVERTED_COLUMNS if converts else max(1, y.shape[0])
            for tile in slices(y.shape[0], columns):
                values = out if columns == y.shape[0] else out[:, tile]
                if dbias is not None:
                    ones = torch.ones_like(problem.weight[chunk]) if over_l is None else over_l
                    row_factor = inputs.factors[block.query]
                    if row_factor is not None:
                        ones = ones / row_factor[chunk]
                    dbias[tile] += values.T.to(ones.dtype) @ ones
                values = values.to(dtype)
                if dx is not None:
                    dx.add_rows(values, rows_of(y, tile).to(dtype), inputs.onednn.dx)
                if dy is not None:
                    dy.add_columns(tile, values.T, queries[block.query].to(dtype), inputs.onednn.dy)
        for dx in self.operands:
            if dx is not None:
                dx.end_chunk(chunk, over_l)

    def add_tile(self, tile: Tile, values: Tensor) -> None:
        """`dx[rows] += W @ x[columns]` and, off the diagonal, `dx[columns] += W.T @ x[rows]`, of the one operand."""
        number = self.problem.blocks[0].query
        x, gradient, dtype = self.inputs.operands[number], self.operands[number], gemm_dtype(self.problem, values.dtype)
        if gradient is None:
            return
        total, onednn = gradient.accumulator(), self.inputs.onednn
        rows, columns = x[tile.rows].to(dtype), x[tile.columns]
        converts = not dtype == values.dtype == x.dtype
        for some in slices(len(columns), chunks.CONVERTED_COLUMNS if converts else len(columns)):
            entries = values[:, some].to(dtype)
            add_mm(total[tile.rows], entries, columns[some].to(dtype), onednn.dx)
            if tile.rows != tile.columns:
                add_mm(total[tile.columns][some], entries.T, rows, onednn.dy)

    def undo_gain(self) -> None:
        """Divides the biases' gradients by the gain and the columns' factors."""
        for block, dbias in zip(self.problem.blocks, self.biases, strict=True):
            if dbias is not None:
                col_factor, gain = self.inputs.factors[block.key], 1.0 if self.gain is None else self.gain
                dbias.div_(gain if col_factor is None else col_factor * gain)

    def share_others(self) -> None:
        """Multiplies what are no operands' gradients, in which `finish` multiplies the products."""
        if self.share != 1.0:
            for gradient in (self.scale, *self.scalars, self.beside, *self.biases):
                if gradient is not None:
                    gradient.mul_(self.share)

    def finished(self) -> tuple[Tensor | None, ...]:
        """Returns the operands' gradients, with the share, the scale, the gain and the norms' projection applied."""
        return tuple(None if g is None else g.finished() for g in self.operands)


class Gradient:
    """The gradient of one operand while chunks come in.

    An operand that is only a query has its whole row when the chunk ends: one product, finished and written once, in
    the saved dtype. An operand that is a key somewhere accumulates over chunks, in fp32.
    """

    def __init__(
        self, problem: Problem, number: int, finish: Callable[..., None], into: Mapping[int, Tensor] | None = None
    ):
        self.like, self.shape = problem.scale, problem.operands[number].shape
        # Partial sums are not rounded.
        self.dtype = saved_dtype(problem.dtype) if into is None else problem.scale.dtype
        self.into = (into or {}).get(number)
        self.apply = finish  # (total, over_l, rows, out): applies what the products leave out
        self.at_once = not problem.label_smoothing and all([block.key != number for block in problem.blocks])
        if problem.fold is not None and problem.fold.distance in ("euclidean", "squared"):
            self.at_once = False  # distances add a multiple of each row to the total
        self.kept = self.into if self.at_once else None  # finished rows
        self.total: Tensor | None = None  # over all chunks
        self.product: Tensor | None = None  # of this chunk

    def accumulator(self) -> Tensor:
        if self.total is None:
            self.total = self.like.new_zeros(self.shape)
        return self.total

    def add_rows(self, values: Tensor, y: Tensor, onednn: int = 0) -> None:
        if self.product is None:
            self.product = self.like.new_empty((values.shape[0], y.shape[1]))
            mm(self.product, values, y, onednn)
        else:
            add_mm(self.product, values, y, onednn)

    def add_columns(self, tile: slice, values: Tensor, x: Tensor, onednn: int = 0) -> None:
        if self.total is None and values.shape[0] == self.shape[0]:
            self.total = fresh(self.like, self.shape)
            mm(self.total, values, x, onednn)
        else:
            add_mm(self.accumulator()[tile], values, x, onednn)

    def end_chunk(self, chunk: slice, over_l: Tensor | None) -> None:
        if self.product is None:
            return
        if self.into is not None:
            part = torch.empty_like(self.product)
            self.apply(self.product, over_l, chunk, part)
            self.into[chunk] += part
        elif self.at_once:
            if self.kept is None:
                whole = self.product.shape == self.shape and self.product.dtype == self.dtype
                self.kept = self.product if whole else fresh(self.like, self.shape, self.dtype)
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


def _multiplier(problem: Problem, share: float) -> Tensor:
    """Returns the factor of products that are the gradient by the similarities, or of a softmax by the logits."""
    scale, number = problem.scale, problem.scale_bound
    if problem.fold is not None:
        return constant(share, scale.dtype, scale.device)
    if share == 1.0:
        return scale
    return scale * share if number is None else constant(number * share, scale.dtype, scale.device)


def _gain(inputs: Inputs, places: int) -> Tensor | None:
    """Returns the gain of dz in fp16: the power of two that scales its largest possible value to fp16's upper half.

    Without it small values would round to 0. |dz| is at most the row's weight times both factors, at the target times
    its slope, and times 1 + 2 z_loss lse, for which there is room up to 16. An element may be the sum of `places` of
    them. The gain of a fold is adjusted per chunk by
    `folded.fit`. It is computed on the device and undone in fp32 after the GEMMs. A row of NaN spoils only itself.
    """
    problem, backend = inputs.problem, inputs.backend
    one = constant(1.0, problem.scale.dtype, problem.device)
    if backend.workspace_dtype(problem) != torch.float16:
        folds = problem.fold is not None and not backend.can_fold(problem)
        in_fp16 = folds and problem.dtype == torch.float16 and products.narrow(torch.float16, one.device)
        return one * 2.0**126 if in_fp16 else None
    largest = [one if f is None or not len(f) else largest_finite(f) for f in inputs.factors]
    factors = torch.stack([largest[block.query] * largest[block.key] for block in problem.blocks]).amax()
    weight = problem.weight.abs()
    if problem.fold is not None:  # a distillation: of "mse", |2 q_j (d_j - sum q d)| <= 4
        weight = weight * (4 * problem.scale.abs())
    if inputs.prepared.slope is not None:
        weight = weight * inputs.prepared.slope.abs().clamp_min(1)
    weight = largest_finite(weight) if problem.rows else one
    return power_of_two((11 if problem.z_loss else 15) - torch.log2(factors * weight * places))


def gemm_dtype(problem: Problem, stored: torch.dtype) -> torch.dtype:
    """Returns bf16 for bf16 inputs on a CPU with bf16 matrix units, else the workspace's dtype."""
    if problem.device.type == "cpu" and problem.dtype == torch.bfloat16 and _cpu_multiplies_bf16():
        return torch.bfloat16
    return stored


@functools.cache
def _cpu_multiplies_bf16() -> bool:
    capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch; AMX implies the flag
    return bool(capabilities.get("avx512_bf16", False))
