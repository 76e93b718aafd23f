"""Losses of a row's similarities other than a softmax: whole rows of a chunk, then the gradient by them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ..backends.protocol import FoldsRows
from ..core import products
from ..core.folds import FOLDS, Folded
from ..core.numerics import rows_of, slices
from ..core.problem import Fold
from ..core.rows import fold_part, fold_scalars, largest_finite, power_of_two, squared_distances
from ..core.strips import Strip
from .gradients import Gradients
from .inputs import Inputs

DISTANCE_COLUMNS = 512  # distances in fp64 at a time: 4 MiB at 1024 rows, a few times


def fold_chunk(inputs: Inputs, gradients: Gradients, chunk: slice, strip: Strip, out: Tensor) -> Folded:
    """Returns the chunk's losses and adds their gradients. out: the chunk's part of the workspace."""
    problem, backend, fold, wanted = inputs.problem, inputs.backend, inputs.problem.fold, gradients.wants.any
    assert fold is not None
    part = fold_part(problem, chunk)
    if backend.can_fold(problem):
        score = rows_of(inputs.prepared.score, chunk)
        folded = cast(FoldsRows, backend).fold_rows(problem, strip, out if wanted else None, part, score)
    else:
        distances = _values(inputs, fold, chunk, strip, out)
        folded = FOLDS[fold.name].torch(out, part, fold_scalars(problem), fold.options, wanted)
    if not wanted:
        return folded
    for total, terms in zip([gradients.scale, *gradients.scalars], folded.scalars, strict=False):
        if total is not None:
            total += terms
    if not backend.can_fold(problem):
        out = _by_similarity(inputs, gradients, fold, chunk, strip, out, distances)
    gradients.contract(chunk, [out])
    return folded


def _values(inputs: Inputs, fold: Fold, chunk: slice, strip: Strip, out: Tensor) -> Tensor | None:
    """Writes the fold's input, similarities or distances; returns a copy of distances if their gradient needs one."""
    if fold.distance in ("euclidean", "squared"):
        return _distances(inputs, fold, chunk, out)
    inputs.backend.similarities(strip, out)
    if fold.distance == "cosine":
        torch.sub(1, out, out=out)
    return None


def _distances(inputs: Inputs, fold: Fold, chunk: slice, out: Tensor) -> Tensor:
    """Writes distances, a tile of columns at a time, in torch on every backend."""
    block = inputs.problem.blocks[0]
    x, y = inputs.operands[block.query][chunk], inputs.operands[block.key]
    for tile in slices(len(y), DISTANCE_COLUMNS):
        out[:, tile] = squared_distances(x, y[tile])
    if fold.itself:
        out.diagonal(chunk.start).zero_()
    return out.sqrt_().clone() if fold.distance == "euclidean" else out


def _by_similarity(
    inputs: Inputs, gradients: Gradients, fold: Fold, chunk: slice, strip: Strip, out: Tensor, distances: Tensor | None
) -> Tensor:
    """Turns the gradient by the fold's input into the one by the similarities, for the products."""
    if fold.distance == "cosine":
        out.neg_()
    elif distances is not None:
        # d |x - y|^2 = 2 (x - y) (dx - dy), and d|x - y| is half of that over the distance; 0 at distance 0.
        out.div_(distances).masked_fill_(distances == 0, 0) if fold.distance == "euclidean" else out.mul_(2)
    if strip.row_factor is not None and strip.col_factor is not None:
        out.mul_(strip.row_factor[:, None]).mul_(strip.col_factor)
    out = _narrowed(inputs, gradients, out)
    if distances is not None:  # sums of the rounded dz, as multiplied: `dx_i = sum_j dz_ij (x_i - y_j)` may cancel
        block = inputs.problem.blocks[0]
        for number, rows, dim in ((block.query, chunk, 1), (block.key, slice(None), 0)):
            gradient = gradients.operands[number]
            if gradient is not None:
                own, sums = inputs.operands[number][rows].to(inputs.dtype), out.sum(dim, dtype=inputs.dtype)
                gradient.accumulator()[rows].addcmul_(own, sums[:, None])
        out.neg_()
    return out


def _narrowed(inputs: Inputs, gradients: Gradients, out: Tensor) -> Tensor:
    """Returns the gradient by the similarities in the inputs' dtype, if the device multiplies that fastest."""
    dtype = inputs.problem.dtype
    if not products.narrow(dtype, inputs.problem.device):
        return out
    if gradients.gain is not None:
        fit(out, gradients)
    return torch.empty_strided(out.shape, out.stride(), dtype=dtype, device=out.device).copy_(out)


def fit(out: Tensor, gradients: Gradients) -> None:
    """Multiplies `out` by the gain, which is made smaller first if `out` would leave fp16.

    The size of a fold's derivative is known only once it is computed. Sums accumulated with the larger gain are brought
    to the smaller one: both are powers of two.
    """
    gain = gradients.gain
    assert gain is not None
    fits = torch.minimum(gain, power_of_two(15 - torch.log2(largest_finite(out))))
    for gradient in gradients.operands:
        if gradient is not None and gradient.total is not None:
            gradient.total.mul_(fits / gain)
    out.mul_(gain.copy_(fits))
