"""The loss as a formula, on materialised logits. Differentiable any number of times; the oracle of the tests."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import softmax
from ..core.folds import FOLDS
from ..core.mask import NO_MASK, Guide, Mask
from ..core.numerics import autocasting, row_numbers, stats_dtype, unit_rows, wide_dtype
from ..core.problem import Problem
from ..core.rows import (
    above_ties,
    fold_part,
    fold_scalars,
    guide_threshold,
    score_ties,
    squared_distances,
    teacher_sims,
)
from ..core.targets import from_logits, loss_of
from ..core.transforms import transformed


def why_not(problem: Problem) -> str | None:
    if problem.ranks is not None:
        return "it is one formula over one process's rows, and both directions across ranks share their columns' sums"
    return None


def loss_rows(problem: Problem, lost: float = 0.0) -> tuple[Tensor, list[Tensor]]:
    """`weight[i] * loss_i` for every row, [M], through ordinary autograd, and `sweep.Result.counted`.

    Takes several [M, N] matrices. lost: the share that is cut off each similarity, as tensor cores do: `rows.cut_off`.
    """
    if not autocasting(problem.operands[0]):
        return _loss_rows(problem, lost)
    with torch.autocast(problem.device.type, enabled=False):
        return _loss_rows(problem, lost)


def top_rows(problem: Problem) -> tuple[Tensor, Tensor]:
    """Returns each row's largest logit and its column, the first on ties; -inf and -1 if no column competes."""
    with torch.autocast(problem.device.type, enabled=False):
        z = logits(problem, _rows(problem))
        if not z.numel():
            return z.new_full((len(z),), -torch.inf), torch.full((len(z),), -1, device=z.device)
        maximum, column = z.max(1)
        return maximum, column.masked_fill(maximum == -torch.inf, -1)


def opposed_rows(problem: Problem) -> tuple[Tensor, Tensor]:
    """Returns the columns of each row's largest logit of another label and of its smallest one of its own, the first on
    ties, itself left out; -1 for none. The labels are those that the problem's mask compares."""
    (block,) = problem.blocks
    (labels,) = block.mask.compare
    with torch.autocast(problem.device.type, enabled=False):
        z = logits(replace(problem, blocks=(replace(block, mask=NO_MASK),)), _rows(problem))
    none = torch.full((len(z),), -1, device=z.device)
    if not z.numel():
        return none, none
    same = labels.rows[:, None] == labels.keys
    largest, nearest = z.masked_fill(same, -torch.inf).max(1)
    number = row_numbers(len(z), z)
    smallest, farthest = z.masked_fill(~same | (number[:, None] == number), torch.inf).min(1)
    return torch.where(largest == -torch.inf, none, nearest), torch.where(smallest == torch.inf, none, farthest)


def _loss_rows(problem: Problem, lost: float = 0.0) -> tuple[Tensor, list[Tensor]]:
    if problem.prefixes:
        total = torch.zeros_like(problem.weight)
        for weight, own in problem.apart():
            total = total + weight * _loss_rows(own, lost)[0]
        return total, []
    rows = _rows(problem)
    if problem.fold is not None:
        return _fold_rows(problem, rows, lost)
    z = logits(problem, rows, lost=lost)
    with torch.no_grad():
        found = counted(problem, rows, z) if problem.wants_tally else []
    return _losses(problem, z), found


def losses_of(problem: Problem, similarities: list[Tensor]) -> Tensor:
    """Returns the weighted losses [M] from each block's similarities [M, N] instead of embeddings.

    For masks and folds that do not read embeddings, and no distances other than cosine's.
    """
    if problem.fold is not None:
        values = 1 - similarities[0] if problem.fold.distance else similarities[0]
        return _folded(problem, values)[0]
    return _losses(problem, logits(problem, [], similarities))


def _losses(problem: Problem, z: Tensor) -> Tensor:
    if not problem.symmetric:
        # Before the formula: 0 times the NaN gradient of a row without admissible columns is NaN.
        z = z.masked_fill((problem.weight == 0)[:, None], 0)
    if problem.bends:
        return _bent(problem, z)
    loss = softmax.softmax_rows(z, problem.target, problem.label_smoothing, problem.decoupled, problem.copies)
    if problem.z_loss:
        loss = loss + problem.z_loss * z.logsumexp(1).square()
    loss = transformed(loss, problem.transform)
    if problem.symmetric:
        diagonal = torch.arange(problem.rows, device=z.device)
        loss = (
            loss + transformed(softmax.softmax_rows(z.T, diagonal, decoupled=problem.decoupled), problem.transform)
        ) / 2
    # Left-out rows are exactly 0, even if their logits are not finite.
    return torch.where(problem.weight == 0, 0, problem.weight * loss)


def _bent(problem: Problem, z: Tensor) -> Tensor:
    directions = (z, z.T) if problem.symmetric else (z,)
    losses = [transformed(loss_of(from_logits(problem, x)), problem.transform) for x in directions]
    loss = torch.stack(losses).mean(0) if problem.symmetric else losses[0]
    return torch.where(problem.weight == 0, 0, problem.weight * loss)


def _rows(problem: Problem) -> list[Tensor]:
    dtype = stats_dtype(problem.dtype)
    return [unit_rows(x.to(dtype)) if problem.cosine else x.to(dtype) for x in problem.operands]


def logits(problem: Problem, rows: list[Tensor], similarities: list[Tensor] | None = None, lost: float = 0.0) -> Tensor:
    """Returns the logits [M, all columns], -inf for dropped columns; only `skip` drops the target."""
    M, parts = problem.rows, []
    with torch.no_grad():
        thresholds = _thresholds(problem, rows)
    itself = torch.arange(M, device=problem.device)
    for number, block in enumerate(problem.blocks):
        sim = rows[block.query][:M] @ rows[block.key].T if similarities is None else similarities[number]
        if block.mask.factor is not None:
            sim = sim * _factors(problem, number, sim, thresholds)
        own, own_penalty = (itself, block.own_penalty) if number else (problem.target, 0.0)
        z = sim * problem.scale
        if lost:  # a target's logit is a separate product, not of the tile
            short = (1 - lost) * z
            z = torch.where(_at(problem.target, z), z, short) if number == 0 else short
        if block.penalty or own_penalty:
            penalty = torch.full_like(sim, block.penalty).masked_fill(_at(own, sim), own_penalty)
            z = z + penalty * sim.detach()
        if number == 0 and any(problem.margin):
            index = problem.target.clamp(min=0)[:, None]
            target = marginal(problem, index[:, 0])[0][:, None].to(z.dtype)
            z = z.scatter(1, index, torch.where(problem.target[:, None] < 0, z.gather(1, index), target))
        if block.bias is not None:
            bias = block.bias.to(z.dtype)
            if not number and not problem.bias_on_target:
                at = torch.stack([_at(column, z) for column in problem.all_targets.unbind(1)]).any(0)
                bias = bias.where(~at, 0)
            z = z + bias
        if problem.softcap:
            z = softmax.bent(z, problem.softcap)
        if block.bias is not None:
            z = torch.where(block.bias == -torch.inf, -torch.inf, z)  # even if z is NaN there
        if block.mask.given:
            with torch.no_grad():
                dropped = _left_out(problem, number, sim, thresholds)
            z = z.masked_fill(dropped, -torch.inf)
        parts.append(z)
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def factors(problem: Problem, rows: list[Tensor], similarities: list[Tensor]) -> list[Tensor | None]:
    """Returns what multiplies each block's similarities [M, N] under a mask with a factor; None: nothing does."""
    if not any(block.mask.factor is not None for block in problem.blocks):
        return [None] * len(similarities)
    thresholds = _thresholds(problem, rows)
    return [
        None if block.mask.factor is None else _factors(problem, number, sim, thresholds)
        for number, (block, sim) in enumerate(zip(problem.blocks, similarities, strict=True))
    ]


def _factors(problem: Problem, number: int, sim: Tensor, thresholds: _Thresholds) -> Tensor:
    mask = problem.blocks[number].mask
    assert mask.factor is not None
    above = _above(mask, sim.detach(), thresholds)
    if number == 0:
        above = above & ~_at(problem.target, above)
    return torch.where(above, mask.factor, sim.new_ones(()))


def marginal(problem: Problem, index: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the targets' logits under their margin, and the derivative by `scale * cosine`.

    In fp64: an angle is the root of a difference, which loses half of a cosine's digits.
    """
    block, narrow = problem.blocks[0], stats_dtype(problem.dtype)
    dtype = wide_dtype(problem.device, narrow)
    x, y = problem.operands[block.query][: problem.rows], problem.operands[block.key][index]
    cosine = (unit_rows(x.to(dtype)) * unit_rows(y.to(dtype))).sum(1)
    value, slope = softmax.marginal(cosine, problem.margin, torch.finfo(narrow).eps)
    return value * problem.scale, slope


class _Thresholds(NamedTuple):
    sim: tuple[Tensor, Tensor] | None
    guide: Tensor | None


def _thresholds(problem: Problem, rows: list[Tensor]) -> _Thresholds:
    """Returns the targets' similarities with their ties, and the thresholds of a guide, [M, 1]."""
    block, index = problem.blocks[0], problem.target.clamp(min=0)
    mask = block.mask
    sim = guide = None
    if any(b.mask.margin is not None for b in problem.blocks):
        x, y = rows[block.query][: problem.rows], rows[block.key]
        sim = (x * y[index]).sum(1)[:, None], score_ties(x, y, index)[:, None]
    if mask.guide is not None:
        own = _guide_cosines(mask.guide, problem.rows).gather(1, index[:, None])
        guide = guide_threshold(own, problem.guide_rule, mask.guide.query.shape[1])
    return _Thresholds(sim, guide)


def _guide_cosines(guide: Guide, M: int) -> Tensor:
    query, key = (unit_rows(x.to(stats_dtype(x.dtype))) for x in guide)
    return query[:M] @ key.T


def _dropped(problem: Problem, mask: Mask, sim: Tensor, thresholds: _Thresholds) -> Tensor:
    dropped = torch.zeros_like(sim, dtype=torch.bool)
    for rows, keys, keep in mask.compare:
        dropped = dropped | ((rows[:, None] == keys) ^ keep)
    if mask.dense is not None:
        dropped = dropped | ~mask.dense
    if mask.margin is not None and mask.factor is None:
        dropped = dropped | _above(mask, sim, thresholds)
    if mask.guide is not None and thresholds.guide is not None:
        dropped = dropped | (_guide_cosines(mask.guide, problem.rows) > thresholds.guide)
    return dropped


def _above(mask: Mask, sim: Tensor, thresholds: _Thresholds) -> Tensor:
    assert mask.margin is not None and thresholds.sim is not None
    own, ties = thresholds.sim
    above = sim > mask.relative * own + ties + mask.margin
    for column in mask.exempt.unbind(1) if mask.exempt is not None else ():
        above = above & ~_at(column, above)
    return above


def _left_out(problem: Problem, number: int, sim: Tensor, thresholds: _Thresholds) -> Tensor:
    """Returns what a block's mask drops; the target stays, except under `skip`."""
    mask = problem.blocks[number].mask
    dropped = _dropped(problem, mask, sim, thresholds)
    if number == 0:
        for column in problem.all_targets.unbind(1):
            dropped = dropped & ~_at(column, dropped)
    return dropped if mask.skip is None else dropped | _at(mask.skip, dropped)


@torch.no_grad()
def fold_admitted(problem: Problem) -> Tensor | None:
    """Returns the columns that a fold with a teacher may see, bool [M, columns]; None: all."""
    fold = problem.fold
    assert fold is not None
    beside = fold.beside
    if not fold.teachers or not (problem.masked or (beside is not None and beside.admitted is not None)):
        return None
    sizes = [(problem.rows, problem.operands[block.key].shape[0]) for block in problem.blocks]
    likes = [problem.scale.new_empty(()).expand(size) for size in sizes]
    parts = [~_left_out(problem, number, like, _Thresholds(None, None)) for number, like in enumerate(likes)]
    if beside is not None:
        every = torch.ones_like(beside.values, dtype=torch.bool)
        parts.append(every if beside.admitted is None else beside.admitted)
    return torch.cat(parts, 1)


def _at(columns: Tensor, like: Tensor) -> Tensor:
    return columns[:, None] == torch.arange(like.shape[1], device=like.device)


def counted(problem: Problem, rows: list[Tensor], z: Tensor) -> list[Tensor]:
    none, index = problem.target < 0, problem.target.clamp(min=0)[:, None]
    block, entry = problem.blocks[0], z.gather(1, index)
    ties = score_ties(rows[block.query][: problem.rows], rows[block.key], index[:, 0])[:, None]
    negatives = z.scatter(1, index, torch.where(none[:, None], entry, -torch.inf))
    admitted = negatives > -torch.inf
    above = (negatives > above_ties(entry, ties, problem.scale)).sum(1).to(z.dtype)
    maximum = negatives.amax(1) if len(negatives) else negatives.sum(1)  # of no rows there may be no columns either
    return [admitted.sum(1).to(z.dtype), above, maximum, entry[:, 0].masked_fill(none, 0)]


def _fold_rows(problem: Problem, rows: list[Tensor], lost: float) -> tuple[Tensor, list[Tensor]]:
    fold, block = problem.fold, problem.blocks[0]
    assert fold is not None
    x, y = rows[block.query][: problem.rows], rows[block.key]
    if fold.distance in ("", "cosine"):
        parts = [(1 - lost) * (rows[b.query][: problem.rows] @ rows[b.key].T) for b in problem.blocks]
        if fold.beside is not None:
            parts.append(fold.beside.values.to(x.dtype))
        sim = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        values = 1 - sim if fold.distance else sim
    else:
        squared = squared_distances(x, y)
        zero = squared == 0
        if fold.itself:
            zero = zero | _at(torch.arange(len(x), device=x.device), zero)
        # The root of 0 has gradient 0 here instead of infinity.
        root = torch.where(zero, 1, squared).sqrt() if fold.distance == "euclidean" else squared
        values = root.masked_fill(zero, 0).to(x.dtype)
    return _folded(problem, values)


def _folded(problem: Problem, values: Tensor) -> tuple[Tensor, list[Tensor]]:
    fold, every = problem.fold, slice(0, len(values))
    assert fold is not None
    part = fold_part(problem, every, teacher_sims(problem, every), fold_admitted(problem))
    loss, count = FOLDS[fold.name].formula(values, part, fold_scalars(problem), fold.options)
    return loss, [] if count is None else [count.detach()]
