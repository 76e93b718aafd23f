"""What ranks tell each other before anything travels: one small collective, in which all of them raise alike."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import sweep
from ..backends import SWEEPS, UnsupportedError, select
from ..core import checks
from ..core.problem import Fold, Problem, Ranks
from .world import GRAD_SCALES, STRATEGIES, World, world_of


class Request(NamedTuple):
    """The call that a rank is about to make, checked by that rank.

    what: the loss and its options, which must be the same everywhere, a line each. problems: of this rank's rows and
        columns alone; the loss is their mean. ignore_index: the target that leaves a row out, if the first problem's
        target indexes the columns of all ranks, in rank order. stays: operands whose rows are this rank's columns only.
        return_stats: whether statistics are asked for.
    """

    what: str
    problems: tuple[Problem, ...]
    backend: str
    reduction: str
    ignore_index: int | None = None
    stays: tuple[int, ...] = ()
    return_stats: bool = False


class Part(NamedTuple):
    """A problem of a call on which all ranks agree, and how many rows of each operand every rank has.

    An operand that stays has the sizes of a group of one.
    """

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
    world: World


WIDTH = 48  # numbers of rows in the first exchange
PARAMETERS = 4  # values of parameters in it
ALIKE = 1e-6  # relative: ranks whose CPUs differ may differ in a parameter's last bit
UNREAD = -(2**63)  # stands for a parameter whose value was not read
UNBOUNDED = 2**62
COLUMN_BYTES = 256  # more than any backend's workspace takes for one column of a row


class _Row(NamedTuple):
    """The first numbers that a rank sends, before its numbers of rows; each is 8 bytes wide."""

    refuses: int
    facts: int  # their checksum
    length: int  # of the text that follows: the facts, or the error
    workspace: int  # bytes
    least: int  # of its targets
    most: int
    parameters: tuple[int, ...]
    counts: tuple[int, ...]

    def numbers(self) -> list[int]:
        filled = [*self.parameters, *[UNREAD] * PARAMETERS][:PARAMETERS], [*self.counts, *[-1] * WIDTH][:WIDTH]
        return [*self[:6], *filled[0], *filled[1]]

    @classmethod
    def saying(cls, text: str, refuses: int = 0) -> _Row:
        """Returns the numbers of a text alone: facts, or an error."""
        told = text.encode()
        return cls(refuses, 0 if refuses else zlib.crc32(told), len(told), UNBOUNDED, 0, -1, (), ())

    @classmethod
    def read(cls, numbers: Sequence[int]) -> _Row:
        refuses, facts, length, workspace, least, most, *rest = numbers
        told = tuple(rest[:PARAMETERS]), tuple(rest[PARAMETERS:])
        return cls(refuses, facts, length, workspace, least, most, *told)


def agree(world: World, ask: Callable[[], Request]) -> Agreed:
    """Returns the result of `ask` and every rank's rows; all ranks raise if `ask` raises on one, or calls differ.

    Otherwise that rank would go on, and the others would wait for it.
    """
    call: Request | None = None
    error: Exception | None = None
    matrices: list[Tensor] = []
    try:
        checks.choice("strategy", world.strategy, STRATEGIES)
        checks.choice("grad_scale", world.grad_scale, GRAD_SCALES)
        call = ask()
        _refuse(call, world)
        matrices = [x for problem in call.problems for x in problem.operands]
        said = "\n".join(_facts(call, world, matrices))
        row = _row(call, said, matrices)
    except Exception as refusal:  # any error must reach the other ranks
        error, said = refusal, _told(refusal)
        row = _Row.saying(said, refuses=1)
    counts: list[Sequence[int]] = [[len(x) for x in matrices]]
    device = _meeting(world, matrices[0] if matrices else None)
    rows = _met(world, row, said, error, device)
    if world.size > 1:
        counts = [one.counts[: len(matrices)] for one in rows]
        if len(matrices) > WIDTH:
            counts = [*_exchanged(world, [len(x) for x in matrices], len(matrices), device)]
    assert call is not None
    _compare_parameters(rows)
    columns = zip(*counts, strict=True)

    def ranks(number: int, x: Tensor) -> Ranks:
        sizes, name = next(columns), world.group.group_name
        return Ranks(name, 0, (len(x),)) if number in call.stays else Ranks(name, world.rank, sizes)

    parts = tuple(Part(p, tuple(ranks(number, x) for number, x in enumerate(p.operands))) for p in call.problems)
    _check_targets(call, parts[0], rows, world)
    _check_workspaces(call, parts, rows, world, device)
    return Agreed(call, parts, world.of_rows() if call.reduction == "none" else world)


def alike(world: World, say: Callable[[], str]) -> None:
    """Raises on all ranks if `say` raises on one, or says on one what it does not say on the others.

    For who calls losses several times: ranks that differed in how often would wait for each other.
    """
    said, error = "", None
    try:
        said = say()
        row = _Row.saying(said)
    except Exception as refusal:
        error, said = refusal, _told(refusal)
        row = _Row.saying(said, refuses=1)
    _met(world, row, said, error, _meeting(world, None))


def _met(world: World, row: _Row, said: str, error: Exception | None, device: torch.device) -> list[_Row]:
    """Returns every rank's row; raises on all ranks if one refuses, or if they differ in their facts."""
    rows = [row]
    if world.size > 1:
        # Its width does not depend on the call, because ranks with different calls must not hang.
        rows = [_Row.read(one) for one in _exchanged(world, row.numbers(), len(row.numbers()), device)]
        if any(one.refuses for one in rows) or len({one.facts for one in rows}) > 1:
            texts = _heard(world, said, [one.length for one in rows], device)
            _raise_refused(error, [text if one.refuses else "" for one, text in zip(rows, texts, strict=True)])
            raise ValueError(
                "all ranks of group must call one loss with tensors of the same dtypes and dimensions, got "
                + _differences([text.split("\n") for text in texts])
            )
    if error is not None:
        raise error
    return rows


def refuse(group: Any, error: Exception) -> None:
    """Raises the error here and on the other ranks, which are about to call a loss with this group."""

    def say() -> str:
        raise error

    alike(world_of(group, "gather", "ddp"), say)


def _row(call: Request, said: str, matrices: Sequence[Tensor]) -> _Row:
    least, most = 0, -1
    if call.ignore_index is not None:
        target = call.problems[0].target
        if len(target) and checks.reads_values(target):
            kept = target[target != call.ignore_index]
            least, most = (int(kept.min()), int(kept.max())) if len(kept) else (0, -1)
    _, budget = checks.budget(call.problems[0].workspace_bytes)
    text = said.encode()
    parameters = [x for p in call.problems for x in (p.scale, *_parameters(p.fold))]
    values = tuple(_value(x) for x in parameters[:PARAMETERS])
    workspace = UNBOUNDED if budget is None else min(budget, UNBOUNDED)
    return _Row(0, zlib.crc32(text), len(text), workspace, least, most, values, tuple(len(x) for x in matrices))


def _parameters(fold: Fold | None) -> Sequence[Tensor]:
    """Returns a fold's numbers that may be tensors."""
    if fold is None:
        return ()
    return fold.scalars if fold.teacher_scale is None else (*fold.scalars, fold.teacher_scale)


def _value(x: Tensor) -> int:
    """Returns a parameter as the 64 bits of a double."""
    return struct.unpack("q", struct.pack("d", float(x.detach())))[0] if checks.reads_values(x) else UNREAD


def _compare_parameters(rows: Sequence[_Row]) -> None:
    for values in zip(*(row.parameters for row in rows), strict=True):
        if UNREAD in values:
            continue
        numbers = [struct.unpack("d", struct.pack("q", value))[0] for value in values]
        if max(numbers) - min(numbers) > ALIKE * max(abs(number) for number in numbers):
            values_by_rank = ", ".join(f"{number:.9g} on rank {rank}" for rank, number in enumerate(numbers))
            raise ValueError(
                f"a learnable scale, temperature or bias must be equal on all ranks of group, got {values_by_rank}; "
                "put it into the module that DistributedDataParallel or FSDP wraps"
            )


def _check_targets(call: Request, first: Part, rows: Sequence[_Row], world: World) -> None:
    """Checks the targets that were read; all ranks reach the same result."""
    if call.ignore_index is None:
        return
    problem = first.problem
    columns = sum(first.sizes[problem.blocks[0].key].sizes)
    if sum(first.rows.sizes) and not columns:
        raise ValueError("key must have at least one row on some rank of group, got none")
    errors = [""] * len(rows)
    for rank, row in enumerate(rows):
        if row.least < 0 or row.most >= columns:
            outside = row.least if row.least < 0 else row.most
            errors[rank] = (
                f"target must hold indices from 0 to {columns - 1}, over the columns of all ranks, got {outside}"
            )
    if errors[world.rank]:
        checks.target("target", problem.target, problem.rows, columns, call.ignore_index, problem.operands[0])
    _raise_refused(None, errors)


def _check_workspaces(
    call: Request, parts: Sequence[Part], rows: Sequence[_Row], world: World, device: torch.device
) -> None:
    """Checks that a row of all ranks' similarities fits every rank's bound. If none is tight, nothing is sent."""
    widest = max(_width(part) for part in parts)
    if min(row.workspace for row in rows) >= COLUMN_BYTES * widest or not any(_stores(p.problem) for p in parts):
        return
    error: Exception | None = None
    try:
        for problem, sizes in parts:
            pairs = zip(problem.operands, sizes, strict=True)
            most = (x.new_empty(1, x.shape[1]).expand(_most(ranks, world), -1) for x, ranks in pairs)
            whole = replace(problem, operands=tuple(most))
            backend = select(problem.whole, call.backend, plain=False)
            if backend not in SWEEPS:
                continue
            if problem.prefixes and world.strategy == "gather" and SWEEPS[backend].shares_prefixes(problem):
                sweep.chunks.prefix_rows(whole)
            else:
                sweep.workspace_shape(whole.whole, SWEEPS[backend])
    except (UnsupportedError, ValueError) as refusal:
        error = refusal
    said = "" if error is None else _told(error)
    texts = [said]
    if world.size > 1:
        lengths = _exchanged(world, [len(said.encode())], 1, device)
        texts = _heard(world, said, [one[0] for one in lengths], device) if any(one[0] for one in lengths) else []
    _raise_refused(error, texts)


def _width(part: Part) -> int:
    """Returns the most columns of a workspace for one row."""
    problem = part.problem
    return (part.columns + sweep.chunks.PAD * len(problem.blocks)) * max(1, len(problem.prefixes))


def _stores(problem: Problem) -> bool:
    """Whether a sweep has a workspace; the values of a softmax need none."""
    tensors = [problem.scale, *problem.operands, *(b.bias for b in problem.blocks if b.bias is not None)]
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return gradients or problem.fold is not None or problem.blocks[0].mask.guide is not None


def _most(sizes: Ranks, world: World) -> int:
    """Returns the most rows of an operand that a rank holds at a time."""
    return max(sizes.sizes) if world.strategy == "ring" else sum(sizes.sizes)


def _raise_refused(error: Exception | None, texts: Sequence[str]) -> None:
    """Raises this rank's error, or that of the first rank with one. texts: "" for ranks without an error."""
    if error is not None:
        raise error
    for rank, text in enumerate(texts):
        if text:
            raise ValueError(f"rank {rank} of group refuses: {text}")


def _told(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:2000]


def _meeting(world: World, like: Tensor | None) -> torch.device:
    """Returns the device of the exchange: the CPU, if the group has a backend for it."""
    if any(pair.startswith("cpu:") for pair in dist.get_backend_config(world.group).split(",")):
        return torch.device("cpu")
    if like is not None:
        return like.device
    kind = world.group._device_types[0].type
    return world.group.bound_device_id or torch.device(kind, torch.get_device_module(kind).current_device())


def _exchanged(world: World, numbers: Sequence[int], width: int, device: torch.device) -> list[list[int]]:
    """Returns every rank's numbers, padded to `width`."""
    row = torch.tensor([*numbers, *[-1] * (width - len(numbers))], device=device)
    rows = [torch.empty_like(row) for _ in range(world.size)]
    dist.all_gather(rows, row, group=world.group)
    return torch.stack(rows).tolist()


def _heard(world: World, said: str, lengths: Sequence[int], device: torch.device) -> list[str]:
    """Returns the text of each rank."""
    texts = _exchanged(world, list(said.encode()), max(lengths), device)
    return [bytes(text[:length]).decode() for text, length in zip(texts, lengths, strict=True)]


def _differences(heard: Sequence[Sequence[str]]) -> str:
    """Lists each rank's facts that are not common to all."""
    common = set(heard[0]).intersection(*heard[1:])
    return "; ".join(
        f"rank {rank}: {', '.join(fact for fact in facts if fact not in common) or 'nothing more'}"
        for rank, facts in enumerate(heard)
    )


def _refuse(call: Request, world: World) -> None:
    """Raises for options that do not work across ranks."""
    for problem in call.problems:
        refused = {
            "label_smoothing": problem.label_smoothing,
            "return_stats": call.return_stats,
            "a bool mask": any(block.mask.dense is not None for block in problem.blocks),
        }
        for name, given in refused.items():
            if given:
                raise ValueError(f"{name} must not be given together with group, got both; leave one of them out")
        if problem.symmetric and world.strategy == "gather":
            problem = replace(problem, ranks=Ranks(world.group.group_name, world.rank, (0,) * world.size))
        backend = select(problem.whole, call.backend, plain=False)
        if backend not in SWEEPS and world.strategy == "ring":
            raise UnsupportedError(
                f"strategy must be 'gather' with backend={backend!r}, got 'ring'; or pass one of the backends "
                + ", ".join(map(repr, SWEEPS))
            )
    first = call.problems[0]
    blocks = first.blocks
    if call.ignore_index is not None and world.strategy == "ring":
        if first.rows and not len(first.operands[blocks[0].key]):
            raise ValueError(
                "key must have at least one row with target and strategy='ring', got none; pass strategy='gather'"
            )
        if any(block.mask.margin is not None or block.mask.guide for block in blocks):
            raise ValueError(
                "strategy must be 'gather' with target and a mask of a margin or a guide, whose threshold only the "
                "rank of the target knows, got 'ring'"
            )


def _facts(call: Request, world: World, matrices: Sequence[Tensor]) -> list[str]:
    """Returns the facts that ranks must have in common, a line each."""
    loss, *more = call.what.split("\n")
    kinds = (f"[rows, {x.shape[1]}] {x.dtype} {_grad(x)}" for x in matrices)
    lines = [
        f"{loss}{' with target' if call.ignore_index is not None else ''}, reduction {call.reduction}",
        f"strategy {world.strategy}",
        f"grad_scale {world.grad_scale}",
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
    """Returns the other facts that ranks must have in common, besides their matrices, a line each."""
    scale = f"a tensor {_grad(problem.scale)}" if problem.scale_bound is None else f"up to {problem.scale_bound}"
    lines = [f"normalize {problem.cosine}", f"both ways {problem.symmetric}", f"scale {scale}"]
    if any(problem.margin):
        lines.append(f"margin {problem.margin.cosine:g}")
    if problem.prefixes:
        lines.append(f"prefixes {problem.prefixes} by {problem.prefix_weights}")
    if not problem.bias_on_target:
        lines.append("no bias on the target")
    if problem.decoupled:
        lines.append("decoupled")
    if problem.targets is not None:
        lines.append(f"several targets a row, {problem.targets.form}")
    if problem.debiased:
        lines.append(f"debiased {problem.debiased:g}")
    if problem.transform is not None:
        name, value, detach, function = problem.transform
        lines.append(f"transform {name} {value} {detach}" if function is None else "transform by a function")
    fold = problem.fold
    if fold is not None:
        scalars = ", ".join(_grad(x) for x in fold.scalars)
        lines += [f"form {fold.name} {fold.options}", f"ids {fold.labels is not None}", f"parameters {scalars}"]
        lines += [f"teacher [rows, {teacher.key.shape[1]}] {teacher.key.dtype}" for teacher in fold.teachers]
    for number, block in enumerate(problem.blocks):
        mask, bias, rule = block.mask, block.bias, problem.guide_rule
        about: dict[str, object] = {
            "columns": f"of matrix {block.key} for rows of matrix {block.query}",
            "hardness": block.penalty,
            "hardness of the own": block.own_penalty,
            "bias": bias if bias is None else f"{bias.dtype} {_grad(bias)}",
            "ids": ", ".join("agree" if compare.keep else "differ" for compare in mask.compare),
            "margin": None if mask.margin is None else str(mask.margin),
            "margin's share of the target": None if mask.relative == 1 else mask.relative,
            "margin's factor": None if mask.factor is None else str(mask.factor),
            "leaves out": None if mask.skip is None else f"column i + {mask.skip_offset}",
        }
        if mask.guide is not None:
            about["guide"] = f"[rows, {mask.guide.key.shape[1]}] {mask.guide.key.dtype}"
            about["guide's margin"] = f"{rule.margin} {'relative' if rule.relative else 'absolute'}"
        lines += [f"block {number} {name} {fact}" for name, fact in about.items() if fact]
    return lines


def _grad(x: Tensor) -> str:
    """Says whether there is a backward pass: it has collectives, too, so ranks must agree on it."""
    return "with grad" if torch.is_grad_enabled() and x.requires_grad else "without grad"
