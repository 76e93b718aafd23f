"""The loss over the columns of all ranks: gathered, or around the ring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import select, sums_prefixes
from ..core.mask import Guide
from ..core.problem import Block, Problem, Ranks
from ..core.rows import columns_and_weights, several_targets, without_target
from ..sweep import autograd
from ..sweep.collectives import gather, scatter, total
from . import ring
from .agreement import Agreed, Part, Request, agree
from .ring import Shards
from .world import World


class _Gather(torch.autograd.Function):
    """The rows of all ranks; backward sums the gradients of all ranks for this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return gather(x, ranks)

    @staticmethod
    @once_differentiable  # a collective is no part of a graph: second derivatives would lack the other ranks' share
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return scatter(upstream, ctx.ranks), None


class _Scaled(torch.autograd.Function):
    """The same tensor; its gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream * ctx.factor, None


class _Mean(torch.autograd.Function):
    """The mean over all ranks' rows, the sum of sums over the sum of counts; the gradient is this rank's share."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: Tensor, ranks: Ranks, mean: bool) -> Tensor:
        both = total(torch.stack([value, count.to(value.dtype)]), ranks)
        ctx.over = torch.where(both[1] == 0, torch.ones_like(both[1]), both[1]) if mean else torch.ones_like(both[1])
        return torch.where(both[1] == 0, torch.zeros_like(both[0]), both[0] / ctx.over) if mean else both[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        return upstream / ctx.over, None, None, None


def scaled(x: Any, factor: float) -> Any:
    return _Scaled.apply(x, factor) if isinstance(x, Tensor) and x.requires_grad and factor != 1 else x


def everywhere(x: Tensor, ranks: Ranks) -> Tensor:
    """Returns `[N, ...]`, the rows of all ranks, this one's first."""
    if len(ranks.sizes) == 1:
        return x
    return _Gather.apply(x, ranks) if x.requires_grad and torch.is_grad_enabled() else gather(x.detach(), ranks)


def averaged(value: Tensor, count: Tensor, ranks: Ranks, reduction: str) -> Tensor:
    return _Mean.apply(value, count, ranks, reduction == "mean")


def summed_across(
    function: Callable[..., Tensor], x: Tensor, constants: tuple[Tensor, ...], ranks: Ranks, strategy: str
) -> Tensor:
    """Returns `function(x, y, *constants, *others)` `[M]`, summed over the ranks' rows y and their constants."""
    if strategy == "ring":
        return ring.Summed.apply(function, ranks, x, *constants)
    return function(x, everywhere(x, ranks), *constants, *(everywhere(c, ranks) for c in constants))


def _shared(part: Part, world: World, ignore_index: int | None) -> Problem:
    """Returns the problem with scaled gradients, and with targets and `skip` among all ranks' columns."""
    problem, ranks = part
    by_rows, by_parameters = world.factors
    fold = problem.fold
    if fold is not None:
        fold = replace(fold, scalars=tuple(scaled(x, by_parameters) for x in fold.scalars))
        if fold.beside is not None:
            fold = replace(fold, beside=fold.beside._replace(values=scaled(fold.beside.values, by_rows)))
    problem = replace(
        problem,
        operands=tuple(scaled(x, by_rows) for x in problem.operands),
        blocks=tuple(replace(b, bias=scaled(b.bias, by_parameters)) for b in _skipping(problem.blocks, ranks)),
        scale=scaled(problem.scale, by_parameters),
        fold=fold,
    )
    if ignore_index is not None:
        block = problem.blocks[0]
        keys = ranks[block.key]
        columns = sum(keys.sizes)
        bias = None if block.bias is None else everywhere(block.bias.detach(), keys)
        if problem.targets is not None:
            return _of_several(problem, keys, ignore_index, bias)
        index, weight = columns_and_weights(problem.target, problem.weight, columns, ignore_index)
        index = (index - keys.offset) % max(columns, 1)  # in this rank's order
        problem = replace(problem, target=index, weight=without_target(weight, index, bias, block.mask.skip))
    return problem


def _of_several(problem: Problem, keys: Ranks, ignore_index: int, bias: Tensor | None) -> Problem:
    """Returns the problem with several targets a row among all ranks' columns, in this rank's order."""
    assert problem.targets is not None
    given, columns = problem.targets.columns, sum(keys.sizes)
    inside = (given >= 0) & (given < columns)
    index = torch.where(inside, (given - keys.offset) % max(columns, 1), columns)
    index = torch.where(given == ignore_index, -1, index)
    skip = problem.blocks[0].mask.skip
    index, weight = several_targets(index, problem.weight, columns, -1, bias, skip)
    return replace(problem, target=index[:, 0], weight=weight, targets=problem.targets._replace(columns=index))


def _skipping(blocks: Sequence[Block], ranks: Sequence[Ranks]) -> list[Block]:
    """A row that skips a column other than its own may skip another rank's or block's column, or none."""
    found, here, everywhere_ = [], 0, -ranks[blocks[0].key].offset  # the start of the block's columns
    for block in blocks:
        keys, mask = ranks[block.key], block.mask
        if mask.skip is not None and mask.skip_offset:
            index = mask.skip + (here - everywhere_)
            inside = (index >= 0) & (index < sum(keys.sizes))
            skip = torch.where(inside, (index - keys.offset) % max(sum(keys.sizes), 1), -1)
            block = replace(block, mask=mask._replace(skip=skip))
        found.append(block)
        here += keys.sizes[keys.rank]
        everywhere_ += sum(keys.sizes)
    return found


def shards(part: Part, world: World, ignore_index: int | None) -> Shards:
    """The problem of this rank's rows against columns that travel."""
    problem = _shared(part, world, ignore_index)
    keys, index = part.sizes[problem.blocks[0].key], None
    if ignore_index is not None:
        index = problem.target if problem.targets is None else problem.targets.columns
        index = torch.where(index < 0, -1, (index + keys.offset) % max(sum(keys.sizes), 1))
    return Shards(problem, part.rows, [part.sizes[block.key].sizes for block in problem.blocks], index)


def spread(part: Part, world: World, ignore_index: int | None) -> Problem:
    """Returns the problem of this rank's rows against the columns of all ranks.

    Row i's column i stays column i, because a rank's own columns are the first that it sees.
    """
    problem, ranks = _shared(part, world, ignore_index), part.sizes
    operands = problem.operands
    keys = sorted({block.key for block in problem.blocks})
    place = {key: len(operands) + number for number, key in enumerate(keys)}
    gathered = dict(zip(keys, _together([operands[key] for key in keys], [ranks[key] for key in keys]), strict=True))
    guides: dict[int, Tensor] = {}

    def of_all(x: Tensor, sizes: Ranks) -> Tensor:
        if id(x) not in guides:
            guides[id(x)] = everywhere(x, sizes)
        return guides[id(x)]

    def block_of_all(block: Block) -> Block:
        sizes = ranks[block.key]
        bias = None if block.bias is None else everywhere(block.bias, sizes)
        mask = block.mask.map_keys(lambda x: of_all(x, sizes))
        return replace(block, key=place[block.key], mask=mask, bias=bias)

    blocks = tuple(block_of_all(block) for block in problem.blocks)
    fold = problem.fold
    if fold is not None and fold.labels is not None:
        fold = replace(fold, labels=(fold.labels[0], of_all(fold.labels[1], ranks[problem.blocks[0].key])))
    if fold is not None and fold.teachers:
        pairs = zip(fold.teachers, problem.blocks, strict=True)
        fold = replace(fold, teachers=tuple(Guide(t.query, of_all(t.key, ranks[b.key])) for t, b in pairs))
    # Operands that no block refers to any more are left out.
    used = sorted({block.query for block in blocks})
    moved = {old: new for new, old in enumerate(used)} | {place[k]: len(used) + n for n, k in enumerate(keys)}
    return replace(
        problem,
        operands=(*(operands[number] for number in used), *(gathered[key] for key in keys)),
        blocks=tuple(replace(block, query=moved[block.query], key=moved[block.key]) for block in blocks),
        fold=fold,
        ranks=part.rows if problem.symmetric else None,
    )


def loss_across(world: World, ask: Callable[[], Request]) -> Tensor:
    """Returns the mean loss over all ranks' rows, or this rank's losses; gradients are this rank's share, scaled.

    ask: checks the arguments and builds the problems; whatever it raises is raised on all ranks.
    """
    agreed = agree(world, ask)
    losses = [part_across(agreed, part) for part in agreed.parts]
    return torch.stack(losses).mean(0)


def part_across(agreed: Agreed, part: Part) -> Tensor:
    """Returns the loss of one part."""
    call, world = agreed.call, agreed.world
    each, ignore_index = call.reduction == "none", call.ignore_index
    if world.strategy == "ring":
        found = shards(part, world, ignore_index)
        loss = ring.ring_loss(found, select(found.problem.whole, call.backend, plain=False), each)
        weight = found.problem.weight
    else:
        problem = spread(part, world, ignore_index)
        loss, weight = _of_rows(problem, call.backend, each), problem.weight
    return loss if each else averaged(loss, weight.sum(), part.rows, call.reduction)


def _of_rows(problem: Problem, backend: str, each: bool) -> Tensor:
    """Returns the weighted losses of rows against gathered columns, or their sum; of all prefixes, if it has some."""
    if problem.prefixes and not sums_prefixes(problem, backend, plain=False):
        return torch.stack([weight * _of_rows(own, backend, each) for weight, own in problem.apart()]).sum(0)
    chosen = select(problem, backend, plain=False)
    return autograd.loss_rows_or_sum(problem, chosen, each)[0]


def _together(matrices: Sequence[Tensor], ranks: Sequence[Ranks]) -> list[Tensor]:
    """Returns the rows of all ranks of each matrix, by one collective. What stays is as it is."""
    stays = [len(r.sizes) == 1 for r in ranks]
    if any(stays):
        travelling = [(x, r) for x, r, here in zip(matrices, ranks, stays, strict=True) if not here]
        found = iter(_together(*map(list, zip(*travelling, strict=True))) if travelling else [])
        return [x if here else next(found) for x, here in zip(matrices, stays, strict=True)]
    if len(matrices) == 1:
        return [everywhere(matrices[0], ranks[0])]
    sizes = tuple(sum(counts) for counts in zip(*(r.sizes for r in ranks), strict=True))
    joined = everywhere(torch.cat(list(matrices)), ranks[0]._replace(sizes=sizes))
    order = [(ranks[0].rank + step) % len(sizes) for step in range(len(sizes))]
    parts = joined.split([r.sizes[rank] for rank in order for r in ranks])
    return [torch.cat(parts[number :: len(matrices)]) for number in range(len(matrices))]
