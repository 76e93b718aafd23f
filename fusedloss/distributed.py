"""Losses over the batches of all processes: `group=`, `strategy=` and `grad_scale=` of the in-batch losses.

    loss = fusedloss.info_nce(query, key, group=torch.distributed.group.WORLD)

The columns of all ranks are gathered, each rank computes its own rows against them, and the gradients by the columns
go back to whose they are, summed: one collective each way, of embeddings; logits never travel. Every rank gets the mean
over all rows. With strategy="ring" a rank holds one shard of the columns at a time (`ring`). Before init_process_group
WORLD is None, which asks for the loss of this process alone.

Every rank makes the same call: whatever differs but numbers of rows is told on all of them. A rank without rows passes
what its encoder gives for none; where the encoder takes no empty batch, one row, cut off again: `encoder(padded)[:0]`.

Gradients are those of one process with the whole batch: `grad_scale="sum"` gives each rank its share, whose sum over
ranks is the gradient of every parameter; `"ddp"` gives world-size times that, because DistributedDataParallel and FSDP
average. Both hold for encoders, and for learnable temperatures, scales and biases as well. `"match:<library>"` scales
as that library does, right or wrong: `MATCH`.

Refused with a group: label_smoothing, return_stats, bool masks, info_nce's `negatives` and `bank`, siglip's int64
targets; in a ring also sup_con's form "in", and explicit targets together with a margin or a guide.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import checks, op, ring
from .backends import UnsupportedError, select
from .collectives import gather, scatter, total
from .problem import Block, Compare, Guide, Problem, Ranks
from .ring import Shards

T = TypeVar("T")
STRATEGIES = ("gather", "ring")
# What each library's gradient is over the right one, after DDP's average: of the embeddings, and of the loss's own
# parameters (temperature, scale, bias); "W" is the world size. From reading and a model of four ranks.
MATCH = {
    "sentence_transformers": ("1", "1"),
    "lightly": ("1", "1"),
    "open_clip": ("1/W", "1"),  # its default flags; with --local-loss --gather-with-grad it is ("1", "1")
    "flag_embedding": ("1/W", "1"),
    "grad_cache": ("1/W", "1"),
    "tevatron": ("1", "W"),
    "pytorch_metric_learning": ("1", "W"),
    "pylate": ("W", "W"),
    "contrastors": ("W", "W"),
}
GRAD_SCALES = ("ddp", "sum", *(f"match:{library}" for library in MATCH))


class World(NamedTuple):
    """The ranks of a group and what is asked of them."""

    group: dist.ProcessGroup
    rank: int
    size: int
    strategy: str
    grad_scale: str
    weight: float = 1.0

    @property
    def factors(self) -> tuple[float, float]:
        """What gradients by embeddings and by the loss's parameters are times the share."""
        known = {"1": 1.0, "W": float(self.size), "1/W": 1.0 / self.size}
        if self.grad_scale == "sum":
            return 1.0, 1.0
        by_rows, by_parameters = MATCH.get(self.grad_scale.removeprefix("match:"), ("1", "1"))
        whole = self.size * self.weight
        return whole * known[by_rows], whole * known[by_parameters]

    def of_rows(self) -> World:
        """For `reduction="none"`: what becomes of the rows is the caller's, who averages over ranks as DDP does."""
        return self if self.grad_scale == "sum" else self._replace(weight=1.0 / self.size)


def world(group: dist.ProcessGroup, strategy: str, grad_scale: str) -> World:
    checks.choice("strategy", strategy, STRATEGIES)
    checks.choice("grad_scale", grad_scale, GRAD_SCALES)
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        if group is getattr(getattr(dist, "GroupMember", None), "NON_GROUP_MEMBER", ()):
            raise ValueError("group is what new_group gives a rank that is not in it: pass a group of this rank's own")
        raise TypeError(
            f"group is a {type(group).__name__}: needs a ProcessGroup, such as torch.distributed.group.WORLD after "
            "init_process_group"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"group is one that rank {dist.get_rank()} is not in: pass a group of this rank's own")
    return World(group, rank, dist.get_world_size(group), strategy, grad_scale)


def agreed(around: World, what: str, *tensors: Tensor) -> list[Ranks]:
    """How many rows of each tensor every rank has; raises on every rank alike where the rest of them differs.

    what: the loss and its options, which must be the same everywhere, a line each.
    """
    kinds = (f"[rows, {x.shape[1]}] {x.dtype} {_grad(x)}" for x in tensors)
    matrices = [f"matrix {number} {kind}" for number, kind in enumerate(kinds)]
    loss, *more = what.split("\n")
    facts = [
        loss,
        f"strategy {around.strategy}",
        f"grad_scale {around.grad_scale}",
        f"{len(tensors)} matrices",
        *matrices,
        *more,
    ]
    said, counts = "\n".join(facts).encode(), [len(x) for x in tensors]
    # Of a width that does not depend on what is asked: ranks that do not ask the same must not hang.
    rows = _exchanged(around, [zlib.crc32(said), len(said), *counts[:WIDTH]], WIDTH + 2, tensors[0].device)
    if len({row[0] for row in rows}) > 1:
        longest = max(row[1] for row in rows)
        texts = _exchanged(around, list(said), longest, tensors[0].device)
        heard = [bytes(text[: row[1]]).decode().split("\n") for text, row in zip(texts, rows, strict=True)]
        raise ValueError(f"the ranks of group do not call the same loss with alike tensors: {_differences(heard)}")
    found = [row[2:] for row in rows]
    if len(tensors) > WIDTH:
        found = _exchanged(around, counts, len(tensors), tensors[0].device)
    sizes = list(zip(*(row[: len(tensors)] for row in found), strict=True))
    return [Ranks(around.group.group_name, around.rank, tuple(column)) for column in sizes]


WIDTH = 16


def _agreed_upon(around: World, device: torch.device, ask: Callable[[], T]) -> T:
    """What `ask` gives; raises on all ranks where it raises on one. Else that rank would go on without the others."""
    try:
        found, error = ask(), None
    except (IndexError, TypeError, ValueError) as refusal:
        error = refusal
    refused = [rank for rank, (flag,) in enumerate(_exchanged(around, [int(error is not None)], 1, device)) if flag]
    if error is not None:
        raise error
    if refused:
        raise ValueError(f"rank {refused[0]} of group refuses its target; its own error says why")
    return found


def _exchanged(around: World, numbers: Sequence[int], width: int, device: torch.device) -> list[list[int]]:
    """What each rank says, filled up to `width`."""
    row = torch.tensor([*numbers, *[-1] * (width - len(numbers))], device=device)
    rows = [torch.empty_like(row) for _ in range(around.size)]
    dist.all_gather(rows, row, group=around.group)
    return torch.stack(rows).tolist()


def _differences(heard: Sequence[Sequence[str]]) -> str:
    """What each rank says that not all of them say."""
    common = set(heard[0]).intersection(*heard[1:])
    return "; ".join(
        f"rank {rank}: {', '.join(fact for fact in facts if fact not in common) or 'nothing more'}"
        for rank, facts in enumerate(heard)
    )


# Gradients across ranks -----------------------------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    """Rows of all ranks; backward sums what all ranks have for this one's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return gather(x, ranks)

    @staticmethod
    @once_differentiable  # a collective is no part of a graph: second derivatives would lack the other ranks' share
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return scatter(upstream, ctx.ranks), None


class _Scaled(torch.autograd.Function):
    """The same tensor, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream * ctx.factor, None


class _Mean(torch.autograd.Function):
    """Of all ranks' rows: the sum of their sums over the sum of their counts; the gradient is this rank's share."""

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
    """`[N, ...]`, the rows of all ranks, this one's first."""
    if len(ranks.sizes) == 1:
        return x
    return _Gather.apply(x, ranks) if x.requires_grad and torch.is_grad_enabled() else gather(x.detach(), ranks)


def averaged(value: Tensor, count: Tensor, ranks: Ranks, reduction: str) -> Tensor:
    return _Mean.apply(value, count, ranks, reduction == "mean")


def summed_across(
    function: Callable[..., Tensor], x: Tensor, constants: tuple[Tensor, ...], ranks: Ranks, strategy: str
) -> Tensor:
    """`function(x, y, *constants, *others)` `[M]`, summed over the ranks' rows y and what they have as constants."""
    if strategy == "ring":
        return ring.Summed.apply(function, ranks, x, *constants)
    return function(x, everywhere(x, ranks), *constants, *(everywhere(c, ranks) for c in constants))


# A problem of this rank's rows ----------------------------------------------------------------------------------------


# Of all columns there are, an index for each row in the order of the ranks, and the row's weight.
Target = Callable[[int], tuple[Tensor, Tensor]]


def _shared(problem: Problem, around: World, what: str, target: Target | None) -> tuple[Problem, list[Ranks]]:
    """The problem, its gradients scaled and its targets found; and how many rows of each operand the ranks have."""
    refused = {
        "label_smoothing": problem.label_smoothing,
        "return_stats": problem.wants_tally,
        "a bool mask": any(block.mask.dense is not None for block in problem.blocks),
    }
    for name, given in refused.items():
        if given:
            raise ValueError(f"{name} with group=: it has no form across ranks; leave one of them out")
    ranks = agreed(around, "\n".join([what, *_form(problem)]), *problem.operands)
    by_rows, by_parameters = around.factors
    fold = problem.fold
    if fold is not None:
        fold = replace(fold, scalars=tuple(scaled(x, by_parameters) for x in fold.scalars))
    problem = replace(
        problem,
        operands=tuple(scaled(x, by_rows) for x in problem.operands),
        blocks=tuple(replace(block, bias=scaled(block.bias, by_parameters)) for block in problem.blocks),
        scale=scaled(problem.scale, by_parameters),
        fold=fold,
    )
    if target is not None:
        block = problem.blocks[0]
        keys = ranks[block.key]
        columns = sum(keys.sizes)
        index, weight = _agreed_upon(around, problem.device, lambda: target(columns))
        index = (index - keys.offset) % max(columns, 1)  # in this rank's order
        if block.bias is not None:
            weight = weight.masked_fill(everywhere(block.bias.detach(), keys)[index] == -torch.inf, 0)
        if block.mask.skip is not None:
            weight = weight.masked_fill(block.mask.skip == index, 0)
        problem = replace(problem, target=index, weight=weight)
    return problem, ranks


def _form(problem: Problem) -> list[str]:
    """What ranks must have in common beside their matrices, a line each."""
    scale = f"a tensor {_grad(problem.scale)}" if problem.scale_bound is None else f"up to {problem.scale_bound}"
    lines = [f"normalize {problem.cosine}", f"both ways {problem.symmetric}", f"scale {scale}"]
    fold = problem.fold
    if fold is not None:
        scalars = ", ".join(_grad(x) for x in fold.scalars)
        lines += [f"form {fold.name} {fold.options}", f"ids {fold.labels is not None}", f"parameters {scalars}"]
    for number, block in enumerate(problem.blocks):
        mask, bias, rule = block.mask, block.bias, problem.guide_rule
        about: dict[str, object] = {
            "columns": f"of matrix {block.key} for rows of matrix {block.query}",
            "hardness": block.penalty,
            "hardness of the own": block.own_penalty,
            "bias": bias if bias is None else f"{bias.dtype} {_grad(bias)}",
            "ids": ", ".join("agree" if compare.keep else "differ" for compare in mask.compare),
            "margin": None if mask.margin is None else str(mask.margin),
            "leaves out": "a column" if mask.skip is not None else None,
        }
        if mask.guide is not None:
            about["guide"] = f"[rows, {mask.guide.key.shape[1]}] {mask.guide.key.dtype}"
            about["guide's margin"] = f"{rule.margin} {'relative' if rule.relative else 'absolute'}"
        lines += [f"block {number} {name} {fact}" for name, fact in about.items() if fact]
    return lines


def _grad(x: Tensor) -> str:
    """Backward passes have collectives, too: ranks must agree on who has one."""
    return "with grad" if torch.is_grad_enabled() and x.requires_grad else "without grad"


def shards(problem: Problem, around: World, what: str, target: Target | None = None) -> tuple[Shards, Ranks]:
    """The problem of this rank's rows against columns that go around, and the ranks' numbers of rows."""
    problem, ranks = _shared(problem, around, what, target)
    keys, index = ranks[problem.blocks[0].key], None
    if target is not None:
        if any(block.mask.margin is not None or block.mask.guide for block in problem.blocks):
            raise ValueError(
                "target with strategy='ring' and a margin or a guide: their thresholds are known where the target is; "
                "take strategy='gather'"
            )
        index = (problem.target + keys.offset) % max(sum(keys.sizes), 1)
    sizes = [ranks[block.key].sizes for block in problem.blocks]
    rows = ranks[problem.blocks[0].query]
    return Shards(problem, rows, sizes, index), rows


def spread(problem: Problem, around: World, what: str, target: Target | None = None) -> tuple[Problem, Ranks]:
    """The problem of this rank's rows against the columns of all ranks, and the ranks' numbers of rows.

    Row i's column i stays column i, because a rank's own columns are the first that it sees.
    """
    problem, ranks = _shared(problem, around, what, target)
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
        sizes, mask = ranks[block.key], block.mask
        compare = tuple(Compare(c.rows, of_all(c.keys, sizes), c.keep) for c in mask.compare)
        guide = None if mask.guide is None else Guide(mask.guide.query, of_all(mask.guide.key, sizes))
        bias = None if block.bias is None else everywhere(block.bias, sizes)
        return replace(block, key=place[block.key], mask=mask._replace(compare=compare, guide=guide), bias=bias)

    blocks = tuple(block_of_all(block) for block in problem.blocks)
    fold = problem.fold
    if fold is not None and fold.labels is not None:
        fold = replace(fold, labels=(fold.labels[0], of_all(fold.labels[1], ranks[problem.blocks[0].key])))
    rows = ranks[problem.blocks[0].query]
    # What no block takes rows of any more is left out.
    used = sorted({block.query for block in blocks})
    moved = {old: new for new, old in enumerate(used)} | {place[k]: len(used) + n for n, k in enumerate(keys)}
    return replace(
        problem,
        operands=(*(operands[number] for number in used), *(gathered[key] for key in keys)),
        blocks=tuple(replace(block, query=moved[block.query], key=moved[block.key]) for block in blocks),
        fold=fold,
        ranks=rows if problem.symmetric else None,
    ), rows


def loss_across(
    problem: Problem, backend: str, reduction: str, around: World, what: str, target: Target | None = None
) -> Tensor:
    """The loss over all ranks' rows, or this rank's rows' losses; its gradient is this rank's share, scaled."""
    each, what = reduction == "none", f"{what}, reduction {reduction}"
    around = around.of_rows() if each else around
    if around.strategy == "ring":
        found, rows = shards(problem, around, what, target)
        chosen = select(found.problem, backend)
        if chosen == "reference":
            raise UnsupportedError("backend='reference' has no ring; take 'chunked' or 'triton', or strategy='gather'")
        loss, weight = ring.loss_rows_or_sum(found, chosen, each), found.problem.weight
    else:
        problem, rows = spread(problem, around, what, target)
        loss, _ = op.loss_rows_or_sum(problem, select(problem, backend), each)
        weight = problem.weight
    return loss if each else averaged(loss, weight.sum(), rows, reduction)


def _together(matrices: Sequence[Tensor], ranks: Sequence[Ranks]) -> list[Tensor]:
    """The rows of all ranks of each matrix, by one collective."""
    if len(matrices) == 1:
        return [everywhere(matrices[0], ranks[0])]
    sizes = tuple(sum(counts) for counts in zip(*(r.sizes for r in ranks), strict=True))
    joined = everywhere(torch.cat(list(matrices)), ranks[0]._replace(sizes=sizes))
    order = [(ranks[0].rank + step) % len(sizes) for step in range(len(sizes))]
    parts = joined.split([r.sizes[rank] for rank in order for r in ranks])
    return [torch.cat(parts[number :: len(matrices)]) for number in range(len(matrices))]
