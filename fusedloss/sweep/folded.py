"""Losses of a row's similarities other than a softmax: whole rows of a chunk, then the gradient by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ..backends import chunked
from ..backends.protocol import Distills, FoldsRows
from ..core import products
from ..core.folds import FOLDS, Folded
from ..core.mask import StripMask
from ..core.numerics import cdiv, rows_of, slices
from ..core.problem import Beside, Fold, Problem
from ..core.rows import (
    fold_part,
    fold_places,
    fold_scalars,
    largest_finite,
    power_of_two,
    squared_distances,
    teacher_sims,
)
from ..core.strips import Strip
from .chunks import PAD
from .gradients import Gradients
from .inputs import Inputs
from .inputs import part as of_chunk

MASK_COLUMNS = 1024  # of a mask at a time: fp32 [1024, 1024] is 4 MiB
DISTANCE_COLUMNS = 512  # distances in fp64 at a time: 4 MiB at 1024 rows, a few times


def fold_chunk(
    inputs: Inputs, gradients: Gradients, chunk: slice, strips: list[Strip], workspace: Tensor, teacher: Tensor | None
) -> Folded:
    """Returns the chunk's losses and adds their gradients.

    teacher: as the workspace, for a teacher's similarities, where torch folds them.
    """
    problem, backend, fold, wanted = inputs.problem, inputs.backend, inputs.problem.fold, gradients.wants.any
    assert fold is not None
    places = fold_places(problem, PAD)
    row = workspace[: chunk.stop - chunk.start, : places[-1].stop]  # as the fold sees it
    outs = [row[:, place] for place in places]
    if backend.can_fold(problem) and fold.teachers:
        folded = _distilled(inputs, gradients.gain, chunk, strips, outs[: len(strips)] if wanted else None)
    elif backend.can_fold(problem):
        part, score = fold_part(problem, chunk), rows_of(inputs.prepared.score, chunk)
        folded = cast(FoldsRows, backend).fold_rows(problem, strips[0], outs[0] if wanted else None, part, score)
    else:
        room = None if teacher is None else teacher[: row.shape[0], : row.shape[1]]
        admitted = _admitted(problem, chunk, strips, row, places)
        part = fold_part(problem, chunk, teacher_sims(problem, chunk, room, places), admitted)
        distances = _values(inputs, fold, chunk, strips, outs)
        folded = FOLDS[fold.name].torch(row, part, fold_scalars(problem), fold.options, wanted)
    if not wanted:
        return folded
    for total, terms in zip([gradients.scale, *gradients.scalars], folded.scalars, strict=False):
        if total is not None:
            total += terms
    if gradients.beside is not None:
        gradients.beside[chunk] = outs[-1] if folded.beside is None else folded.beside
    outs = outs[: len(strips)]
    if not backend.can_fold(problem):
        outs = _by_similarity(inputs, gradients, fold, chunk, strips, row, outs, distances)
    gradients.contract(chunk, outs)
    return folded


def _distilled(
    inputs: Inputs, gain: Tensor | None, chunk: slice, strips: list[Strip], outs: list[Tensor] | None
) -> Folded:
    """Both models' similarities in one tile. A mask, in which the target may compete, becomes one bool matrix."""
    problem, fold = inputs.problem, inputs.problem.fold
    assert fold is not None
    masks = [None if strip.mask is None else StripMask(dense=_dense(strip)) for strip in strips]
    strips = [strip._replace(mask=mask, target=None) for strip, mask in zip(strips, masks, strict=True)]
    taught = [
        strip._replace(x=rows_of(strip.x, chunk), row_factor=of_chunk(strip.row_factor, chunk))
        for strip in inputs.taught
    ]
    beside = None
    if fold.beside is not None:
        beside = Beside(*(None if x is None else x[chunk] for x in fold.beside))  # type: ignore[arg-type]
    part = fold_part(problem, chunk)
    return cast(Distills, inputs.backend).distill_rows(problem, strips, taught, outs, part, beside, gain)


def _dense(strip: Strip, out: Tensor | None = None) -> Tensor:
    """Returns the columns that a mask admits, bool [R, N]; new rows end in False up to a multiple of PAD."""
    assert strip.mask is not None
    rows, columns = strip.x.shape[0], strip.y.shape[0]
    if out is None:
        room = torch.empty((rows, cdiv(columns, PAD) * PAD), dtype=torch.bool, device=strip.x.device)
        room[:, columns:] = False
        out = room[:, :columns]
    for tile in slices(columns, MASK_COLUMNS):
        out[:, tile] = chunked.admitted(strip.mask, tile, strip.target)
    return out


def _admitted(
    problem: Problem, chunk: slice, strips: list[Strip], row: Tensor, places: Sequence[slice]
) -> Tensor | None:
    """Returns the columns of a chunk that a fold with a teacher may see, bool like `row`; None: all.

    Masks here do not depend on similarities, so that torch evaluates them on every backend. The padding between blocks
    is none of the columns.
    """
    fold = problem.fold
    assert fold is not None
    beside = None if fold.beside is None else fold.beside.admitted
    if not fold.teachers or (not problem.masked and beside is None and len(places) == 1):
        return None
    admitted = torch.zeros_like(row, dtype=torch.bool)
    for strip, place in zip(strips, places, strict=False):
        out = admitted[:, place]
        if strip.mask is None:
            out.fill_(True)
        else:
            _dense(strip, out)
    if fold.beside is not None:
        admitted[:, places[-1]] = True if beside is None else beside[chunk]
    return admitted


def _values(inputs: Inputs, fold: Fold, chunk: slice, strips: list[Strip], outs: Sequence[Tensor]) -> Tensor | None:
    """Writes the fold's input, similarities or distances; returns a copy of distances if their gradient needs one."""
    if fold.distance in ("euclidean", "squared"):
        return _distances(inputs, fold, chunk, outs[0])
    for strip, out in zip(strips, outs, strict=False):
        inputs.backend.similarities(strip, out)
    if fold.beside is not None:
        outs[-1].copy_(fold.beside.values[chunk])
    if fold.distance == "cosine":
        torch.sub(1, outs[0], out=outs[0])
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
    inputs: Inputs,
    gradients: Gradients,
    fold: Fold,
    chunk: slice,
    strips: list[Strip],
    row: Tensor,
    outs: list[Tensor],
    distances: Tensor | None,
) -> list[Tensor]:
    """Turns the gradient by the fold's input into those by the blocks' similarities, for the products."""
    if fold.distance == "cosine":
        row.neg_()
    elif distances is not None:
        # d |x - y|^2 = 2 (x - y) (dx - dy), and d|x - y| is half of that over the distance; 0 at distance 0.
        row.div_(distances).masked_fill_(distances == 0, 0) if fold.distance == "euclidean" else row.mul_(2)
    for strip, out in zip(strips, outs, strict=True):
        if strip.row_factor is not None and strip.col_factor is not None:
            out.mul_(strip.row_factor[:, None]).mul_(strip.col_factor)
    outs = _narrowed(inputs, gradients, row, outs)
    if distances is not None:  # sums of the rounded dz, as multiplied: `dx_i = sum_j dz_ij (x_i - y_j)` may cancel
        block, (out,) = inputs.problem.blocks[0], outs
        for number, rows, dim in ((block.query, chunk, 1), (block.key, slice(None), 0)):
            gradient = gradients.operands[number]
            if gradient is not None:
                own, sums = inputs.operands[number][rows].to(inputs.dtype), out.sum(dim, dtype=inputs.dtype)
                gradient.accumulator()[rows].addcmul_(own, sums[:, None])
        out.neg_()
    return outs


def _narrowed(inputs: Inputs, gradients: Gradients, row: Tensor, outs: list[Tensor]) -> list[Tensor]:
    """Returns the gradients by the similarities in the inputs' dtype, if the device multiplies that fastest."""
    dtype = inputs.problem.dtype
    if not products.narrow(dtype, inputs.problem.device):
        return outs
    if gradients.gain is not None:
        fit(row, gradients)
    return [torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device).copy_(x) for x in outs]


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
