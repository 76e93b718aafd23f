"""Losses over the batches of all processes: `group=`, `strategy=` and `grad_scale=` of the in-batch losses.

    loss = fusedloss.info_nce(query, key, group="world")

"world" are all ranks, once init_process_group has been called; before that it raises, where dist.group.WORLD is None
and asks for the loss of this process alone. The columns of all ranks are gathered, each rank computes its own rows
against them, and the gradients by the columns go back to whose they are, summed: one collective each way, of
embeddings; logits never travel. Every rank gets the mean over all rows. With strategy="ring" a rank holds one shard of
the columns at a time (`ring`).

Every rank makes the same call. Before anything travels, ranks tell each other in one small collective what they are
about to do: where one refuses its arguments, or they differ in more than numbers of rows, all of them raise at once.
Options, dtypes, dimensions and Python numbers are compared, and learnable parameters by value where they are on a CPU
(to 1e-6; a GPU's are not read back, but under FUSEDLOSS_CHECK=1). `weight`, `workspace_bytes` and `backend` are a
rank's own: one without weights weighs its rows 1. A rank without rows passes what its encoder gives for none; where
the encoder takes no empty batch, one row, cut off again: `encoder(padded)[:0]`.

That collective runs on the CPU where the group has a backend for it, as after init_process_group() or
init_process_group("cpu:gloo,cuda:nccl"); then nothing waits for a GPU. After init_process_group("nccl") it runs on the
GPU and the host reads its result, once a call: ranks could not know each other's numbers of rows otherwise.

Gradients are those of one process with the whole batch: `grad_scale="sum"` gives each rank its share, whose sum over
ranks is the gradient of every parameter; `"ddp"` gives world-size times that, because DistributedDataParallel and FSDP
average. Both hold for encoders, and for learnable temperatures, scales and biases as well. `"match:<library>"` scales
as that library does, right or wrong: `MATCH`.

Refused with a group, on all ranks: label_smoothing, return_stats, bool masks (the others work), info_nce's `negatives`
and `bank`, siglip's int64 targets, second derivatives; with strategy="ring" also backend="reference", sup_con's
form="in", and explicit targets together with a margin or a guide. docs/support.md has the table.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import sweep
from ..backends import SWEEPS, UnsupportedError, select
from ..core import checks
from ..core.problem import Block, Problem, Ranks
from ..core.rows import columns_and_weights, without_target
from ..sweep import autograd
from ..sweep.collectives import gather, scatter, total
from . import ring
from .ring import Shards

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


def world(group: dist.ProcessGroup | str, strategy: str, grad_scale: str) -> World:
    if isinstance(group, str):
        group = _named(group)
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        if group is getattr(getattr(dist, "GroupMember", None), "NON_GROUP_MEMBER", ()):
            raise ValueError("group is what new_group gives a rank that is not in it: pass a group of this rank's own")
        raise TypeError(
            f"group is a {type(group).__name__}: needs a ProcessGroup, or 'world', all ranks after init_process_group"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"group is one that rank {dist.get_rank()} is not in: pass a group of this rank's own")
    return World(group, rank, dist.get_world_size(group), strategy, grad_scale)


def check_group(group: object) -> None:
    """What can be said of it before there are processes."""
    if isinstance(group, str) and group != "world":
        raise ValueError(f"group is {group!r}: needs 'world', all ranks, or a ProcessGroup")


def _named(group: str) -> dist.ProcessGroup:
    check_group(group)
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group='world' before init_process_group: call it first, or leave group out for one process")
    return dist.distributed_c10d._get_default_group()


# The agreement --------------------------------------------------------------------------------------------------------


class Request(NamedTuple):
    """What a rank is about to do, checked by itself.

    what: the loss and its options, which must be the same everywhere, a line each. problems: of this rank's rows and
        columns alone; the loss is their mean. ignore_index: where the first problem's target indexes the columns of all
        ranks, in their order: the one that leaves a row out.
    """

    what: str
    problems: tuple[Problem, ...]
    backend: str
    reduction: str
    ignore_index: int | None = None


class Part(NamedTuple):
    """A problem of a call on which all ranks agree, and how many rows of each operand every rank has."""

    problem: Problem
    sizes: tuple[Ranks, ...]

    @property
    def rows(self) -> Ranks:
        return self.sizes[self.problem.blocks[0].query]

    @property
    def columns(self) -> int:
        return sum(sum(self.sizes[block.key].sizes) for block in self.problem.blocks)


class Agreed(NamedTuple):
    call: Request
    parts: tuple[Part, ...]
    around: World


WIDTH = 48  # numbers of rows that are told at once
PARAMETERS = 4  # values likewise
ALIKE = 1e-6  # relative: ranks whose CPUs differ may differ in a parameter's last bit
UNREAD = -(2**63)  # a parameter whose value is not told
UNBOUNDED = 2**62
COLUMN_BYTES = 256  # no backend takes as much for a column of one row of its workspace


class _Row(NamedTuple):
    """What a rank tells first, in front of its numbers of rows: all 8 bytes wide."""

    refuses: int
    facts: int  # their checksum
    length: int  # of the text behind it: facts, or why it refuses
    workspace: int  # bytes
    least: int  # of its targets
    most: int
    parameters: tuple[int, ...]
    counts: tuple[int, ...]

    def numbers(self) -> list[int]:
        filled = [*self.parameters, *[UNREAD] * PARAMETERS][:PARAMETERS], [*self.counts, *[-1] * WIDTH][:WIDTH]
        return [*self[:6], *filled[0], *filled[1]]

    @classmethod
    def read(cls, numbers: Sequence[int]) -> _Row:
        refuses, facts, length, workspace, least, most, *rest = numbers
        told = tuple(rest[:PARAMETERS]), tuple(rest[PARAMETERS:])
        return cls(refuses, facts, length, workspace, least, most, *told)


def agree(around: World, ask: Callable[[], Request]) -> Agreed:
    """What `ask` gives and how many rows every rank has; raises on all ranks where it raises on one, or they differ.

    Else that rank would go on without the others, which would wait for it.
    """
    call: Request | None = None
    error: Exception | None = None
    matrices: list[Tensor] = []
    try:
        checks.choice("strategy", around.strategy, STRATEGIES)
        checks.choice("grad_scale", around.grad_scale, GRAD_SCALES)
        call = ask()
        _refuse(call, around)
        matrices = [x for problem in call.problems for x in problem.operands]
        said = "\n".join(_facts(call, around, matrices))
        row = _row(call, said, matrices)
    except Exception as refusal:  # whatever it is, the others must hear of it
        error, said = refusal, _told(refusal)
        row = _Row(1, 0, len(said.encode()), UNBOUNDED, 0, -1, (), ())
    counts: list[Sequence[int]] = [[len(x) for x in matrices]]
    rows = [row]
    device = _meeting(around, matrices[0] if matrices else None)
    if around.size > 1:
        # Of a width that does not depend on what is asked: ranks that do not ask the same must not hang.
        rows = [_Row.read(one) for one in _exchanged(around, row.numbers(), len(row.numbers()), device)]
        if any(one.refuses for one in rows) or len({one.facts for one in rows}) > 1:
            texts = _heard(around, said, [one.length for one in rows], device)
            _raise_refused(error, [text if one.refuses else "" for one, text in zip(rows, texts, strict=True)])
            raise ValueError(
                "the ranks of group do not call the same loss with alike tensors: "
                + _differences([text.split("\n") for text in texts])
            )
        counts = [one.counts[: len(matrices)] for one in rows]
        if len(matrices) > WIDTH:
            counts = [*_exchanged(around, [len(x) for x in matrices], len(matrices), device)]
    if error is not None:
        raise error
    assert call is not None
    _compare_parameters(rows)
    sizes = iter([Ranks(around.group.group_name, around.rank, column) for column in zip(*counts, strict=True)])
    parts = tuple(Part(problem, tuple(next(sizes) for _ in problem.operands)) for problem in call.problems)
    _check_targets(call, parts[0], rows, around)
    _check_workspaces(call, parts, rows, around, device)
    return Agreed(call, parts, around.of_rows() if call.reduction == "none" else around)


def refuse(group: Any, error: Exception) -> None:
    """Raises it, and tells the other ranks, which are about to call a loss with this group."""

    def ask() -> Request:
        raise error

    agree(world(group, "gather", "ddp"), ask)


def _row(call: Request, said: str, matrices: Sequence[Tensor]) -> _Row:
    least, most = 0, -1
    if call.ignore_index is not None:
        target = call.problems[0].target
        if len(target) and checks.reads_values(target):
            kept = target[target != call.ignore_index]
            least, most = (int(kept.min()), int(kept.max())) if len(kept) else (0, -1)
    _, budget = checks.budget(call.problems[0].workspace_bytes)
    text = said.encode()
    parameters = [x for p in call.problems for x in (p.scale, *(p.fold.scalars if p.fold else ()))]
    values = tuple(_value(x) for x in parameters[:PARAMETERS])
    workspace = UNBOUNDED if budget is None else min(budget, UNBOUNDED)
    return _Row(0, zlib.crc32(text), len(text), workspace, least, most, values, tuple(len(x) for x in matrices))


def _value(x: Tensor) -> int:
    """A parameter as the 64 bits of a double."""
    return struct.unpack("q", struct.pack("d", float(x.detach())))[0] if checks.reads_values(x) else UNREAD


def _compare_parameters(rows: Sequence[_Row]) -> None:
    for values in zip(*(row.parameters for row in rows), strict=True):
        if UNREAD in values:
            continue
        numbers = [struct.unpack("d", struct.pack("q", value))[0] for value in values]
        if max(numbers) - min(numbers) > ALIKE * max(abs(number) for number in numbers):
            told = ", ".join(f"{number:.9g} on rank {rank}" for rank, number in enumerate(numbers))
            raise ValueError(
                f"the ranks of group have parameters (scale, 1 / temperature, bias) of different value: {told}; "
                "they must start alike and be averaged alike: put them into the module that "
                "DistributedDataParallel or FSDP wraps"
            )


def _check_targets(call: Request, first: Part, rows: Sequence[_Row], around: World) -> None:
    """Those that were read; all ranks come to the same end."""
    if call.ignore_index is None:
        return
    problem, columns = first.problem, first.columns
    if sum(first.rows.sizes) and not columns:
        raise ValueError("key has no rows on any rank of group: needs at least one")
    errors = [""] * len(rows)
    for rank, row in enumerate(rows):
        if row.least < 0 or row.most >= columns:
            outside = row.least if row.least < 0 else row.most
            errors[rank] = (
                f"target holds {outside}: needs indices from 0 to {columns - 1}, over the columns of all ranks"
            )
    if errors[around.rank]:
        checks.target("target", problem.target, problem.rows, columns, call.ignore_index, problem.operands[0])
    _raise_refused(None, errors)


def _check_workspaces(
    call: Request, parts: Sequence[Part], rows: Sequence[_Row], around: World, device: torch.device
) -> None:
    """A row of all ranks' similarities must fit every rank's bound; only where one is tight do they ask each other."""
    widest = max(part.columns + sweep.chunks.PAD * len(part.problem.blocks) for part in parts)
    if min(row.workspace for row in rows) >= COLUMN_BYTES * widest or not any(_stores(p.problem) for p in parts):
        return
    error: Exception | None = None
    try:
        for problem, sizes in parts:
            pairs = zip(problem.operands, sizes, strict=True)
            most = (x.new_empty(1, x.shape[1]).expand(_most(ranks, around), -1) for x, ranks in pairs)
            whole = replace(problem, operands=tuple(most))
            backend = select(problem, call.backend, plain=False)
            if backend in SWEEPS:
                sweep.workspace_shape(whole, SWEEPS[backend])
    except (UnsupportedError, ValueError) as refusal:
        error = refusal
    said = "" if error is None else _told(error)
    texts = [said]
    if around.size > 1:
        lengths = _exchanged(around, [len(said.encode())], 1, device)
        texts = _heard(around, said, [one[0] for one in lengths], device) if any(one[0] for one in lengths) else []
    _raise_refused(error, texts)


def _stores(problem: Problem) -> bool:
    """Whether a sweep has a workspace: not for the values of a softmax alone."""
    tensors = [problem.scale, *problem.operands, *(b.bias for b in problem.blocks if b.bias is not None)]
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return gradients or problem.fold is not None or problem.blocks[0].mask.guide is not None


def _most(sizes: Ranks, around: World) -> int:
    """Rows of an operand that a rank has before it at a time."""
    return max(sizes.sizes) if around.strategy == "ring" else sum(sizes.sizes)


def _raise_refused(error: Exception | None, texts: Sequence[str]) -> None:
    """This rank's own error, or that of the first rank that has one. texts: "" of those that do not refuse."""
    if error is not None:
        raise error
    for rank, text in enumerate(texts):
        if text:
            raise ValueError(f"rank {rank} of group refuses: {text}")


def _told(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:2000]


def _meeting(around: World, like: Tensor | None) -> torch.device:
    """Where the host's numbers are exchanged: on the CPU, if the group has a backend for it."""
    if any(pair.startswith("cpu:") for pair in dist.get_backend_config(around.group).split(",")):
        return torch.device("cpu")
    if like is not None:
        return like.device
    kind = around.group._device_types[0].type
    return around.group.bound_device_id or torch.device(kind, torch.get_device_module(kind).current_device())


def _exchanged(around: World, numbers: Sequence[int], width: int, device: torch.device) -> list[list[int]]:
    """What each rank says, filled up to `width`."""
    row = torch.tensor([*numbers, *[-1] * (width - len(numbers))], device=device)
    rows = [torch.empty_like(row) for _ in range(around.size)]
    dist.all_gather(rows, row, group=around.group)
    return torch.stack(rows).tolist()


def _heard(around: World, said: str, lengths: Sequence[int], device: torch.device) -> list[str]:
    """The text of each rank."""
    texts = _exchanged(around, list(said.encode()), max(lengths), device)
    return [bytes(text[:length]).decode() for text, length in zip(texts, lengths, strict=True)]


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


def _shared(part: Part, around: World, ignore_index: int | None) -> Problem:
    """The problem, its gradients scaled and its targets and what rows skip among the columns of all ranks."""
    problem, ranks = part
    by_rows, by_parameters = around.factors
    fold = problem.fold
    if fold is not None:
        fold = replace(fold, scalars=tuple(scaled(x, by_parameters) for x in fold.scalars))
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
        index, weight = columns_and_weights(problem.target, problem.weight, columns, ignore_index)
        index = (index - keys.offset) % max(columns, 1)  # in this rank's order
        bias = None if block.bias is None else everywhere(block.bias.detach(), keys)
        problem = replace(problem, target=index, weight=without_target(weight, index, bias, block.mask.skip))
    return problem


def _skipping(blocks: Sequence[Block], ranks: Sequence[Ranks]) -> list[Block]:
    """What a row skips beside its own column may be another rank's or another block's, or none."""
    found, here, everywhere_ = [], 0, -ranks[blocks[0].key].offset  # where the block's columns start
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


def _refuse(call: Request, around: World) -> None:
    """Raises where this has no form across ranks."""
    for problem in call.problems:
        refused = {
            "label_smoothing": problem.label_smoothing,
            "return_stats": problem.wants_tally,
            "a bool mask": any(block.mask.dense is not None for block in problem.blocks),
        }
        for name, given in refused.items():
            if given:
                raise ValueError(f"{name} with group=: it has no form across ranks; leave one of them out")
        if problem.symmetric and around.strategy == "gather":
            problem = replace(problem, ranks=Ranks(around.group.group_name, around.rank, (0,) * around.size))
        if select(problem, call.backend, plain=False) == "reference" and around.strategy == "ring":
            raise UnsupportedError("backend='reference' has no ring; take 'chunked' or 'triton', or strategy='gather'")
    first = call.problems[0]
    blocks = first.blocks
    if call.ignore_index is not None and around.strategy == "ring":
        if first.rows and not len(first.operands[blocks[0].key]):
            raise ValueError("key has no rows, with target and strategy='ring': needs one, or strategy='gather'")
        if any(block.mask.margin is not None or block.mask.guide for block in blocks):
            raise ValueError(
                "target with strategy='ring' and a margin or a guide: their thresholds are known where the target is; "
                "take strategy='gather'"
            )


def _facts(call: Request, around: World, matrices: Sequence[Tensor]) -> list[str]:
    """What ranks must have in common, a line each."""
    loss, *more = call.what.split("\n")
    kinds = (f"[rows, {x.shape[1]}] {x.dtype} {_grad(x)}" for x in matrices)
    lines = [
        f"{loss}{' with target' if call.ignore_index is not None else ''}, reduction {call.reduction}",
        f"strategy {around.strategy}",
        f"grad_scale {around.grad_scale}",
        f"{len(matrices)} matrices",
        *(f"matrix {number} {kind}" for number, kind in enumerate(kinds)),
        *more,
    ]
    if call.ignore_index is not None:
        lines.append(f"ignore_index {call.ignore_index}")
    for number, problem in enumerate(call.problems):
        lines += [f"part {number}, {line}" if number else line for line in _form(problem)]
    return lines


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
            "leaves out": None if mask.skip is None else f"column i + {mask.skip_offset}",
        }
        if mask.guide is not None:
            about["guide"] = f"[rows, {mask.guide.key.shape[1]}] {mask.guide.key.dtype}"
            about["guide's margin"] = f"{rule.margin} {'relative' if rule.relative else 'absolute'}"
        lines += [f"block {number} {name} {fact}" for name, fact in about.items() if fact]
    return lines


def _grad(x: Tensor) -> str:
    """Backward passes have collectives, too: ranks must agree on who has one."""
    return "with grad" if torch.is_grad_enabled() and x.requires_grad else "without grad"


def shards(part: Part, around: World, ignore_index: int | None) -> Shards:
    """The problem of this rank's rows against columns that go around."""
    problem = _shared(part, around, ignore_index)
    keys, index = part.sizes[problem.blocks[0].key], None
    if ignore_index is not None:
        index = (problem.target + keys.offset) % max(sum(keys.sizes), 1)
    return Shards(problem, part.rows, [part.sizes[block.key].sizes for block in problem.blocks], index)


def spread(part: Part, around: World, ignore_index: int | None) -> Problem:
    """The problem of this rank's rows against the columns of all ranks.

    Row i's column i stays column i, because a rank's own columns are the first that it sees.
    """
    problem, ranks = _shared(part, around, ignore_index), part.sizes
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
    # What no block takes rows of any more is left out.
    used = sorted({block.query for block in blocks})
    moved = {old: new for new, old in enumerate(used)} | {place[k]: len(used) + n for n, k in enumerate(keys)}
    return replace(
        problem,
        operands=(*(operands[number] for number in used), *(gathered[key] for key in keys)),
        blocks=tuple(replace(block, query=moved[block.query], key=moved[block.key]) for block in blocks),
        fold=fold,
        ranks=part.rows if problem.symmetric else None,
    )


def loss_across(around: World, ask: Callable[[], Request]) -> Tensor:
    """The mean of the call's losses over all ranks' rows, or this rank's rows' losses; gradients are its share, scaled.

    ask: checks the arguments and builds the problems; whatever it raises is raised on all ranks.
    """
    agreed = agree(around, ask)
    losses = [part_across(agreed, part) for part in agreed.parts]
    return torch.stack(losses).mean(0)


def part_across(agreed: Agreed, part: Part) -> Tensor:
    """The loss of one part."""
    call, around = agreed.call, agreed.around
    each, ignore_index = call.reduction == "none", call.ignore_index
    if around.strategy == "ring":
        found = shards(part, around, ignore_index)
        loss = ring.loss_rows_or_sum(found, select(found.problem, call.backend, plain=False), each)
        weight = found.problem.weight
    else:
        problem = spread(part, around, ignore_index)
        loss, _ = autograd.loss_rows_or_sum(problem, select(problem, call.backend, plain=False), each)
        weight = problem.weight
    return loss if each else averaged(loss, weight.sum(), part.rows, call.reduction)


def _together(matrices: Sequence[Tensor], ranks: Sequence[Ranks]) -> list[Tensor]:
    """The rows of all ranks of each matrix, by one collective."""
    if len(matrices) == 1:
        return [everywhere(matrices[0], ranks[0])]
    sizes = tuple(sum(counts) for counts in zip(*(r.sizes for r in ranks), strict=True))
    joined = everywhere(torch.cat(list(matrices)), ranks[0]._replace(sizes=sizes))
    order = [(ranks[0].rank + step) % len(sizes) for step in range(len(sizes))]
    parts = joined.split([r.sizes[rank] for rank in order for r in ranks])
    return [torch.cat(parts[number :: len(matrices)]) for number in range(len(matrices))]
