"""Small batches: whole logits and the gradient beside the value, in about twenty calls of plain torch.

Chunks do not pay below some size: their records, running sums and merged maxima made a step of 64 rows take 6.5 times
as long as eager torch (benchmarks/small.py). `auto` takes this backend for matrices up to `MOST` bytes; by name it
takes any. Masks, biases, margins and folds are the definitions of `reference` and `core.folds`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import checks, products
from ..core.folds import FOLDS
from ..core.mask import NO_MASK
from ..core.numerics import NORM_EPS, saved_dtype, stats_dtype, wide_dtype
from ..core.problem import NO_MARGIN, Problem
from ..core.rows import fold_part, fold_places, fold_scalars, squared_distances, teacher_sims
from ..core.targets import from_logits
from ..core.transforms import Transform, with_slope
from . import reference
from .protocol import Result, Wants
from .reference import top_rows as top_rows  # of whole rows, as here

# maths.md: Logits; The softmax row; Gradient of the logits; Gradient by the scale
# Bytes of one matrix of logits, by device. CPU: N = 1024 in fp32, where a step takes as long as in chunks (0.99 and
# 1.04 of eager's time). CUDA: N = 2048 in fp32, a guess; not measured.
MOST = {"cpu": 4 << 20, "cuda": 16 << 20}
MATRICES = 4  # of that size at once: similarities, logits, probabilities, and what a mask or a fold needs
OF_DIFFERENCES = ("euclidean", "squared")  # distances
softplus = torch._C._nn.softplus  # F.softplus takes 1 us more
cross_entropy = checks.OPERATORS.cross_entropy_loss


def why_not(problem: Problem) -> str | None:
    if problem.ranks is not None:
        return "both directions across ranks share their columns' sums, and it holds one process's rows"
    return None


def fits(problem: Problem) -> bool:
    """Whether `auto` takes it: the one rule by which a batch is small."""
    operands, blocks = problem.operands, problem.blocks
    first, columns = operands[0], 0
    for block in blocks:
        columns += operands[block.key].shape[0]
    if problem.fold is not None and problem.fold.beside is not None:
        columns += problem.fold.beside.values.shape[1]
    size = operands[blocks[0].query].shape[0] * columns * (8 if first.dtype is torch.float64 else 4)
    if not 0 < size <= MOST.get(first.device.type, 0) or why_not(problem) is not None:
        return False
    _, budget = checks.budget(problem.workspace_bytes)
    matrices = MATRICES if problem.fold is None else FOLDS[problem.fold.name].copies
    return budget is None or matrices * size <= budget


def run(problem: Problem, wants: Wants, share: float = 1.0) -> Result:
    """Returns the weighted losses, and the gradients of `share` times their sum."""
    if not problem.rows:
        return _of_no_rows(problem, wants)
    if problem.prefixes:
        return _prefixes(problem, wants, share)
    rows, norms, given = _rows(problem)
    if problem.fold is None:
        dz, result = _softmax(problem, rows, _similarities(problem, rows, norms, given), wants, share)
    else:
        dz, result = _folded(problem, rows, _similarities(problem, rows, norms, given), wants, share)
    if dz is None:
        return result
    return result._replace(operands=_contracted(problem, rows, norms, given, dz, wants))


def keeps(problem: Problem, wants: Wants) -> bool:
    """Whether `run_and_keep` takes it: each row's gradient hangs on its own upstream gradient alone."""
    whole = problem.symmetric or bool(problem.prefixes) or any(wants.biases) or any(wants.scalars)
    whole = whole or (problem.fold is not None and wants.scale)  # whose gradient a fold adds up itself
    return wants.any and problem.rows > 0 and not whole


class Kept(NamedTuple):
    """What `finish` needs of the forward of losses by row: the one matrix that spares it a product and a softmax."""

    dz: Tensor  # [M, columns], the gradient by the similarities
    by_scale: Tensor | None  # [M], in fp64


def run_and_keep(problem: Problem, wants: Wants) -> tuple[Result, Kept]:
    """The weighted losses by row, without gradients."""
    rows, norms, given = _rows(problem)
    sims = _similarities(problem, rows, norms, given)
    if problem.fold is None:
        dz, result = _softmax(problem, rows, sims, wants, 1.0, by_row=True)
    else:
        dz, result = _folded(problem, rows, sims, wants, 1.0)
    assert dz is not None, "a problem that it keeps wants a gradient"
    return result._replace(scale=None), Kept(dz, result.scale if problem.fold is None else None)


def finish(problem: Problem, wants: Wants, kept: Kept, upstream: Tensor) -> list[Tensor | None]:
    """The gradients by the operands, the biases, which want none, and the scale. Overwrites what was kept."""
    rows, norms, given = _rows(problem)
    dz = kept.dz.mul_(upstream[:, None]).masked_fill_(upstream[:, None] == 0, 0)  # of rows left out, NaN too
    by_scale = None if kept.by_scale is None else (kept.by_scale * upstream).masked_fill(upstream == 0, 0)
    by_scale = None if by_scale is None else by_scale.sum().to(problem.scale.dtype)
    biases = [None for block in problem.blocks if block.bias is not None]
    scalars = [None] * len(wants.scalars)
    return [*_contracted(problem, rows, norms, given, dz, wants), *biases, by_scale, *scalars]


def _rows(problem: Problem) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, ...] | None]:
    """The operands in the dtype of the logits, of length 1 where cosines are wanted; their lengths; as given."""
    dtype, rows, norms = stats_dtype(problem.operands[0].dtype), [], []
    for x in problem.operands:
        x = x if x.dtype is dtype else x.to(dtype)
        if problem.cosine:
            norm = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(NORM_EPS)
            norms.append(norm)
            x = x / norm
        rows.append(x)
    return rows, norms, _multiplied_as_given(problem)


def _multiplied_as_given(problem: Problem) -> tuple[Tensor, ...] | None:
    """Returns the operands, if the device multiplies them in 16 bits and returns fp32; None: fp32 rows are multiplied.

    On an H200 a product of bf16 rows takes a fifteenth of the time. It is exact, where tf32 would round unit rows.
    """
    x = problem.operands[0]
    return problem.operands if products.narrow(x.dtype, x.device) else None


def _similarities(
    problem: Problem, rows: list[Tensor], norms: list[Tensor], given: Sequence[Tensor] | None
) -> list[Tensor]:
    """Returns each block's similarities; none, for a fold of distances."""
    M = problem.rows
    found: list[Tensor] = []
    if problem.fold is not None and problem.fold.distance in OF_DIFFERENCES:
        return found
    for block in problem.blocks:
        if given is None:
            found.append(torch.mm(_of(rows[block.query], M), rows[block.key].t()))
            continue
        x, y = _of(given[block.query], M), given[block.key]
        sim = x.new_empty((M, y.shape[0]), dtype=rows[0].dtype)
        products.wide_mm(sim, x, y.t())
        found.append(sim.div_(_of(norms[block.query], M)).div_(norms[block.key].t()) if norms else sim)
    return found


def _of_no_rows(problem: Problem, wants: Wants) -> Result:
    zero, kept = problem.scale.new_zeros(()), saved_dtype(problem.dtype)
    operands = [
        x.new_zeros(x.shape, dtype=kept) if w else None for x, w in zip(problem.operands, wants.operands, strict=True)
    ]
    biases = [
        zero.new_zeros(b.bias.shape) if w and b.bias is not None else None
        for b, w in zip(problem.blocks, wants.biases, strict=True)
    ]
    scalars = [zero if w else None for w in wants.scalars]
    if scalars and problem.fold is not None and problem.fold.beside is not None:
        scalars[-1] = torch.zeros_like(problem.fold.beside.values)
    counted = [zero.new_zeros(0)] * 4 if problem.wants_tally else []
    scale = zero if wants.scale else None
    # Not the weights themselves, which calls share: autograd would write its graph to them.
    rows = torch.zeros_like(problem.weight)
    return Result(rows, tuple(operands), scale, tuple(biases), tuple(scalars), counted)


def _prefixes(problem: Problem, wants: Wants, share: float) -> Result:
    """The weighted sum of the losses of each prefix of D."""
    total: Result | None = None
    for weight, own in problem.apart():
        one = run(own, wants, share * weight)
        widened = []
        for x, g in zip(problem.operands, one.operands, strict=True):
            widened.append(None if g is None else torch.nn.functional.pad(g, (0, x.shape[1] - g.shape[1])))
        one = one._replace(rows=one.rows * weight, operands=tuple(widened))
        total = one if total is None else _sum(total, one)
    assert total is not None, "a problem of prefixes has one"
    return total


def _sum(a: Result, b: Result) -> Result:
    def add(x: tuple[Tensor | None, ...], y: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        return tuple(None if p is None or q is None else p + q for p, q in zip(x, y, strict=True))

    (scale,) = add((a.scale,), (b.scale,))
    return Result(a.rows + b.rows, add(a.operands, b.operands), scale, add(a.biases, b.biases), (), [])


# Softmax --------------------------------------------------------------------------------------------------------------


def _softmax(
    problem: Problem, rows: list[Tensor], sims: list[Tensor], wants: Wants, share: float, by_row: bool = False
) -> tuple[Tensor | None, Result]:
    """The losses, and the gradient by the similarities `[M, columns]`. by_row: the scale's gradient is of each row."""
    scale, number = problem.scale, problem.scale_bound
    plain = _is_plain(problem)
    if not plain:
        z = reference.logits(problem, rows, sims)
    elif wants.scale or problem.wants_tally:
        z = sims[0] * scale
    else:
        z = sims[0].mul_(scale if number is None else number)
    counted = reference.counted(problem, rows, z) if problem.wants_tally else []
    more = None
    if problem.bends:
        loss, dz, more = _bent_ways(problem, z, wants.any)
    else:
        loss, dz = _symmetric(problem, z, wants.any) if problem.symmetric else _one_direction(problem, z, wants.any)
    result = Result(loss, (None,) * len(rows), None, (None,) * len(problem.blocks), (), counted)
    if not wants.any:
        return None, result
    factor = number * share if plain and number is not None else scale * share
    if plain and not wants.scale:
        return dz.mul_(factor), result
    if any(problem.margin):
        at = problem.target.clamp(min=0)[:, None]
        slope = reference.marginal(problem, at[:, 0])[1][:, None].to(dz.dtype)
        dz.scatter_(1, at, torch.where(problem.target[:, None] < 0, 1, slope) * dz.gather(1, at))
    if problem.softcap:
        dz.mul_(1 - (z.clamp_min(-problem.softcap) / problem.softcap).square_())
    by_scale, biases, start = None, [], 0
    factors = reference.factors(problem, rows, sims)
    for block, sim, wanted, shrunk in zip(problem.blocks, sims, wants.biases, factors, strict=True):
        part = dz[:, start : start + sim.shape[1]]
        biases.append(part.sum(0) * share if wanted and block.bias is not None else None)
        if shrunk is not None:
            part.mul_(shrunk)
        if wants.scale:  # in fp64, because a row's terms cancel
            terms = (part * sim).sum(1 if by_row else (0, 1), dtype=wide_dtype(dz.device, dz.dtype))
            by_scale = terms if by_scale is None else by_scale + terms
        start += sim.shape[1]
    if by_scale is not None and more is not None:
        by_scale = by_scale + (more if by_row else more.sum(dtype=by_scale.dtype))
    if by_scale is not None and not by_row:
        by_scale = (by_scale * share).to(scale.dtype)
    return dz.mul_(factor), result._replace(scale=by_scale, biases=tuple(biases))


def _of(x: Tensor, M: int) -> Tensor:
    return x if x.shape[0] == M else x[:M]


def _is_plain(problem: Problem) -> bool:
    """Whether the logits are the similarities times the scale."""
    block = problem.blocks[0]
    if len(problem.blocks) > 1 or block.bias is not None or block.mask is not NO_MASK or block.penalty:
        return False
    return not problem.softcap and problem.margin is NO_MARGIN


def _one_direction(problem: Problem, z: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """The weighted losses and their gradient by the logits.

    The target's probability leaves the row before the others are summed: `1 - p_t` would cancel on well-fitted pairs.
    """
    index, weight, smoothing = problem.target[:, None], problem.weight, problem.label_smoothing
    if problem.decoupled:
        loss, p, entry = _decoupled(z, index)
    else:
        if problem.copies != 1:
            z.scatter_add_(1, index, torch.full_like(index, 1, dtype=z.dtype).mul_(math.log(problem.copies)))
        own = cross_entropy(z, problem.target, None, 0, -100, 0.0)[:, None]
        p = torch.softmax(z, 1).scatter_(1, index, 0)  # exp of the logarithm would round twice
        rest = p.sum(1, keepdim=True)
        loss = softplus(rest.log().add_(own), 1, 40.0)
        entry = rest
        if problem.copies != 1:
            loss = loss + math.log(problem.copies)
    if smoothing:
        admitted = z > -math.inf
        others = admitted.sum(1, keepdim=True).clamp_min(1).to(z.dtype)
        score = z.gather(1, index)
        loss = loss + smoothing * (score - z.masked_fill(~admitted, 0).sum(1, keepdim=True) / others)
        p.sub_((smoothing / others) * admitted)
        entry = entry - smoothing * (1 - 1 / others)
    if problem.z_loss:
        lse = z.logsumexp(1, keepdim=True)
        loss = loss + problem.z_loss * lse.square()
        slope = 2 * problem.z_loss * lse
        p.add_(z.sub(lse).exp_().scatter_(1, index, 0).mul_(slope))
        entry = entry - own.neg().exp() * slope
    if problem.transform is not None:
        loss, slope = _transformed(problem.transform, loss, wanted)
        p, entry = p.mul_(slope), entry * slope
    if problem.every_row and not problem.decoupled:
        entry = entry.neg_()
    else:
        weight = weight[:, None]
        out = weight == 0
        loss = loss.mul(weight).masked_fill_(out, 0)
        p, entry = p.mul_(weight).masked_fill_(out, 0), entry.mul(-weight).masked_fill_(out, 0)
    if problem.decoupled:
        entry = torch.where(index < 0, p[:, :1], entry)
    return loss[:, 0], p.scatter_(1, index.clamp(min=0) if problem.decoupled else index, entry)


def _bent_ways(problem: Problem, z: Tensor, wanted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The weighted losses, their gradient by the logits, and by the scale where that is no factor of one."""
    if not problem.symmetric:
        return _bent(problem, z, problem.weight, wanted)
    half = problem.weight / 2
    loss, dz, more = _bent(problem, z, half, wanted)
    loss_column, by_column, more_column = _bent(problem, z.t(), half, wanted)
    both = None if more is None or more_column is None else more + more_column
    return loss + loss_column, dz.add_(by_column.t()), both


def _bent(problem: Problem, z: Tensor, weight: Tensor, wanted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    parts = from_logits(problem, z)
    n, out = parts.negatives.logsumexp(1), weight == 0
    empty = n == -math.inf
    loss, by_negatives, by_targets, by_scale = parts.law(n, parts.scores)
    if problem.transform is not None:
        loss, slope = with_slope(loss, problem.transform, wanted)
        by_negatives, by_targets = by_negatives * slope, by_targets * slope[:, None]
        by_scale = None if by_scale is None else by_scale * slope
    dz = parts.negatives.sub_(n[:, None]).exp_().masked_fill_(empty[:, None], 0).mul_((by_negatives * weight)[:, None])
    entries = (by_targets * weight[:, None]).masked_fill(~parts.here, 0)
    dz.scatter_add_(1, parts.places, entries).masked_fill_(out[:, None], 0)
    more = None if by_scale is None else (by_scale * weight).masked_fill(out, 0)
    return (loss * weight).masked_fill(out, 0), dz, more


def _transformed(transform: Transform, loss: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """Of a column [M, 1]."""
    value, slope = with_slope(loss[:, 0], transform, wanted)
    return value[:, None], slope[:, None]


def _decoupled(z: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The target stays out of the normaliser; a row without negatives has loss 0 and no gradient."""
    none, at = index < 0, index.clamp(min=0)
    score = z.gather(1, at)
    z.scatter_(1, at, torch.where(none, score, -math.inf))
    score = score.masked_fill(none, 0)
    score = score.masked_fill(score == math.inf, math.nan)
    lse = z.logsumexp(1, keepdim=True)
    empty = lse == -math.inf
    p = z.sub(lse).exp_().masked_fill_(empty, 0)
    return (lse - score).masked_fill(empty, 0), p, (~empty).to(z.dtype)


def _symmetric(problem: Problem, z: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """Half of each row's loss and half of its own column's, over the diagonal."""
    index = problem.target[:, None]
    if problem.decoupled:
        loss, by_row, rest_row = _decoupled(z.clone(), index)
        loss_column, by_column, rest_column = _decoupled(z.t().clone(), index)
        by_column = by_column.t()
    else:
        own_row, own_column = torch.log_softmax(z, 1).gather(1, index), torch.log_softmax(z, 0).gather(1, index)
        by_row, by_column = torch.softmax(z, 1).scatter_(1, index, 0), torch.softmax(z, 0).scatter_(1, index, 0)
        rest_row, rest_column = by_row.sum(1, keepdim=True), by_column.sum(0)[:, None]
        loss = softplus(rest_row.log().sub_(own_row), 1, 40.0)
        loss_column = softplus(rest_column.log().sub_(own_column), 1, 40.0)
    if problem.transform is not None:
        loss, slope = _transformed(problem.transform, loss, wanted)
        loss_column, slope_column = _transformed(problem.transform, loss_column, wanted)
        by_row, by_column = by_row.mul_(slope), by_column.mul_(slope_column.t())
        rest_row, rest_column = rest_row.mul_(slope), rest_column.mul_(slope_column)
    loss = loss.add_(loss_column)
    entry = rest_row.add_(rest_column)
    if problem.every_row:
        return loss[:, 0].mul_(0.5), by_row.add_(by_column).scatter_(1, index, entry.neg_()).mul_(0.5)
    half = problem.weight[:, None] / 2
    out = half == 0
    dz = by_row.mul_(half).masked_fill_(out, 0).add_(by_column.mul_(half.t()).masked_fill_(out.t(), 0))
    dz.scatter_(1, index, entry.mul_(-half).masked_fill_(out, 0))
    return loss.mul_(half).masked_fill_(out, 0)[:, 0], dz


# Folds ----------------------------------------------------------------------------------------------------------------


def _folded(
    problem: Problem, rows: list[Tensor], sims: list[Tensor], wants: Wants, share: float
) -> tuple[Tensor | None, Result]:
    """The losses of a fold, and the gradient by its input."""
    fold, block = problem.fold, problem.blocks[0]
    assert fold is not None
    x, y = rows[block.query][: problem.rows], rows[block.key]
    if fold.distance in OF_DIFFERENCES:
        values = squared_distances(x, y)
        if fold.itself:
            values.diagonal().zero_()
        values = (values.sqrt_() if fold.distance == "euclidean" else values).to(x.dtype)
    else:
        parts = sims if fold.beside is None else [*sims, fold.beside.values.to(x.dtype)]
        values = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        values = 1 - values if fold.distance else values
    distances = values.clone() if fold.distance == "euclidean" and wants.any else None
    every = slice(0, problem.rows)
    part = fold_part(problem, every, teacher_sims(problem, every), reference.fold_admitted(problem))
    folded = FOLDS[fold.name].torch(values, part, fold_scalars(problem), fold.options, wants.any)
    scalars: list[Tensor | None] = [t.to(problem.scale.dtype) * share for t in folded.scalars]
    scalars += [None] * (1 + len(fold.scalars) - len(scalars))
    if fold.beside is not None:
        scalars.append(None)
    counted = [] if folded.count is None else [folded.count]
    none = (None,) * len(rows), (None,) * len(problem.blocks)
    result = Result(folded.loss, none[0], scalars[0], none[1], tuple(scalars[1:]), counted)
    if not wants.any:
        return None, result._replace(scale=None, scalars=(None,) * len(result.scalars))
    if share != 1.0:
        values.mul_(share)
    if fold.beside is not None:
        place = fold_places(problem)[-1]
        if wants.scalars[-1:] == (True,):
            result = result._replace(scalars=(*result.scalars[:-1], values[:, place].clone()))
        values = values[:, : place.start]
    if distances is not None:  # d|x - y| is (x - y) over the distance; 0 at distance 0
        values.div_(distances).masked_fill_(distances == 0, 0)
    return values, result


def _contracted(
    problem: Problem,
    rows: list[Tensor],
    norms: list[Tensor],
    given: Sequence[Tensor] | None,
    dz: Tensor,
    wants: Wants,
) -> tuple[Tensor | None, ...]:
    """The gradients by the operands, from the gradient by the similarities (or by a fold's input)."""
    found: list[Tensor | None] = [None] * len(rows)
    distance, start, M = "" if problem.fold is None else problem.fold.distance, 0, problem.rows
    if distance == "squared":
        dz = dz.mul_(2)
    elif distance == "cosine":
        dz = dz.neg_()
    apart = distance in OF_DIFFERENCES
    # Differences cancel, and in fp16 small entries would be 0.
    as_given = problem.dtype is torch.bfloat16 and not apart and rows[0].shape[1] > 1
    narrow = given if as_given else None

    def add(number: int, part: Tensor) -> None:
        total, size = found[number], rows[number].shape[0]
        if total is None and part.shape[0] == size:
            found[number] = part
        elif total is None:
            found[number] = torch.nn.functional.pad(part, (0, 0, 0, size - part.shape[0]))
        else:
            total[: part.shape[0]].add_(part)

    for block in problem.blocks:
        x, y = _of(rows[block.query], M), rows[block.key]
        part = dz if len(problem.blocks) == 1 else dz[:, start : start + y.shape[0]]
        start += y.shape[0]
        if narrow is not None:
            part = part.div_(_of(norms[block.query], M)).div_(norms[block.key].t()) if norms else part
            part, x, y = part.to(problem.dtype), _of(narrow[block.query], M), narrow[block.key]
        for number, own, other, by in ((block.query, x, y, part), (block.key, y, x, part.t())):
            if wants.operands[number]:
                if narrow is not None:
                    product = rows[number].new_empty(own.shape)
                    products.wide_mm(product, by, other)
                elif other.shape[1] == 1:
                    # A vector product of the library adds one by one, with three times the error of torch's sum.
                    product = (by * other.t()).sum(1, keepdim=True)
                else:
                    product = torch.mm(by, other)
                # Of differences: `dx_i = sum_j dz_ij (x_i - y_j)`.
                add(number, torch.addcmul(product.neg_(), own, by.sum(1, keepdim=True)) if apart else product)
    kept = saved_dtype(problem.dtype)
    for number, g in enumerate(found):
        if g is None:
            found[number] = torch.zeros_like(rows[number], dtype=kept) if wants.operands[number] else None
            continue
        if norms:  # through the norms; a row shorter than 1e-12 is divided by a constant
            unit, norm = rows[number], norms[number]
            along = (unit * g).sum(1, keepdim=True).masked_fill_(norm <= NORM_EPS, 0)
            g = g.addcmul_(unit, along, value=-1)
            g = g if narrow is not None else g.div_(norm)  # which is in `part` then
        found[number] = g if g.dtype is kept else g.to(kept)
    return tuple(found)
