"""Autograd around the sweep: an `autograd.Function` in eager, one opaque `torch.library` op under torch.compile.

Both run the same `execute`. Scalar reductions get their gradients out of the forward (upstream only scales them);
`reduction="none"` cannot know its upstream weights, so its forward folds statistics and its backward sweeps again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, sweep
from .backends import BACKENDS, reference
from .errors import UnsupportedError
from .problem import (
    Block,
    Compare,
    Fold,
    Guide,
    GuideRule,
    Margin,
    Mask,
    Problem,
    Ranks,
    savable,
    saved_dtype,
    stats_dtype,
)
from .sweep import Wants
from .trust import audit

COUNTED = 4  # most vectors that `Result.counted` may hold


class Plan(NamedTuple):
    """The part of a problem that is not tensors, in the types that an op's schema knows."""

    backend: str
    fold: str  # "name distance", or ""
    group: str  # the ranks' process group, or ""
    shape: list[int]  # flags, counts and places, in the order in which _Reader meets them
    numbers: list[float]
    per_row: bool  # return [M] weighted losses instead of their sum


class Flat(NamedTuple):
    """A problem as an op takes it. Gradients are by the scale and by `tensors`; `constants` have none."""

    plan: Plan
    tensors: list[Tensor]  # operands, biases, a fold's scalars
    constants: list[Tensor]


def flatten(problem: Problem, backend: str, per_row: bool) -> Flat:
    flags = (problem.cosine, problem.symmetric, problem.decoupled, problem.wants_tally, problem.scale_bound is not None)
    shape = [len(problem.operands), len(problem.blocks), problem.copies]
    numbers = [problem.label_smoothing, problem.scale_bound or 0.0, *(float(v) for v in problem.guide_rule)]
    numbers += [problem.softcap, *problem.margin, problem.z_loss]
    constants: list[Tensor] = []
    biases = [b.bias for b in problem.blocks if b.bias is not None]

    def constant(x: Tensor | None) -> int:
        if x is not None:
            constants.append(x)
        return int(x is not None)

    for block in problem.blocks:
        mask = block.mask
        shape += [block.query, block.key, int(block.bias is not None), len(mask.compare)]
        for compare in mask.compare:
            shape.append(int(compare.keep))
            constants += [compare.rows, compare.keys]
        shape += [constant(mask.dense), constant(mask.exempt), constant(mask.skip)]
        constants += mask.guide or ()
        shape += [int(mask.guide is not None), int(mask.margin is not None)]
        numbers += [block.penalty, block.own_penalty, mask.margin or 0.0]
    shape += [*(int(flag) for flag in flags), problem.workspace_bytes or 0, len(problem.prefixes), *problem.prefixes]
    numbers += problem.prefix_weights
    ranks = problem.ranks
    if ranks is not None:
        shape += [ranks.rank, len(ranks.sizes), *ranks.sizes]
    fold = problem.fold
    if fold is not None:
        constants += fold.labels or ()
        shape += [int(fold.labels is not None), int(fold.itself), len(fold.scalars), int(fold.teacher is not None)]
        constants += [*fold.teacher, fold.teacher_scale] if fold.teacher and fold.teacher_scale is not None else []
        numbers += fold.options
    named = f"{fold.name} {fold.distance}" if fold else ""
    plan = Plan(backend, named, "" if ranks is None else ranks.group, shape, numbers, per_row)
    return Flat(plan, [*problem.operands, *biases, *(fold.scalars if fold else ())], constants)


class _Reader:
    """Walks a flat problem in the order in which it was written."""

    def __init__(self, plan: Plan, tensors: Sequence[Tensor], constants: Sequence[Tensor]):
        self.shape, self.numbers = iter(plan.shape), iter(plan.numbers)
        self.tensors, self.constants = iter(tensors), iter(constants)

    def flag(self) -> bool:
        return bool(next(self.shape))

    def constant(self) -> Tensor | None:
        return next(self.constants) if self.flag() else None


def unflatten(
    plan: Plan,
    scale: Tensor,
    target: Tensor,
    weight: Tensor,
    tensors: Sequence[Tensor],
    constants: Sequence[Tensor],
) -> Problem:
    read = _Reader(plan, tensors, constants)
    operand_count, block_count, copies = (next(read.shape) for _ in range(3))
    smoothing, bound, guide_margin, relative, softcap = (next(read.numbers) for _ in range(5))
    margin, z_loss = Margin(next(read.numbers), next(read.numbers)), next(read.numbers)
    operands = tuple(next(read.tensors) for _ in range(operand_count))
    blocks = tuple(_block(read) for _ in range(block_count))
    cosine, symmetric, decoupled, wants_tally, bounded = (read.flag() for _ in range(5))
    workspace_bytes = next(read.shape) or None
    prefixes = tuple(next(read.shape) for _ in range(next(read.shape)))
    prefix_weights = tuple(next(read.numbers) for _ in prefixes)
    ranks = None
    if plan.group:
        rank = next(read.shape)
        ranks = Ranks(plan.group, rank, tuple(next(read.shape) for _ in range(next(read.shape))))
    return Problem(
        operands,
        blocks,
        scale,
        target,
        weight,
        cosine,
        smoothing,
        symmetric,
        bound if bounded else None,
        workspace_bytes,
        decoupled,
        copies,
        GuideRule(guide_margin, bool(relative)),
        wants_tally,
        _fold(plan, read) if plan.fold else None,
        prefixes,
        prefix_weights,
        softcap,
        margin,
        z_loss,
        ranks,
    )


def _block(read: _Reader) -> Block:
    query, key = next(read.shape), next(read.shape)
    bias = next(read.tensors) if read.flag() else None
    compare = []
    for _ in range(next(read.shape)):
        keep = read.flag()
        compare.append(Compare(next(read.constants), next(read.constants), keep))
    dense, exempt, skip = read.constant(), read.constant(), read.constant()
    guide = Guide(next(read.constants), next(read.constants)) if read.flag() else None
    has_margin = read.flag()
    penalty, own_penalty, margin = (next(read.numbers) for _ in range(3))
    mask = Mask(tuple(compare), dense, margin if has_margin else None, exempt, guide, skip)
    return Block(query, key, bias, mask, penalty, own_penalty)


def _fold(plan: Plan, read: _Reader) -> Fold:
    has_labels, itself, count, has_teacher = read.flag(), read.flag(), next(read.shape), read.flag()
    labels = (next(read.constants), next(read.constants)) if has_labels else None
    teacher = Guide(next(read.constants), next(read.constants)) if has_teacher else None
    teacher_scale = next(read.constants) if has_teacher else None
    scalars = tuple(next(read.tensors) for _ in range(count))
    name, distance = plan.fold.split(" ")
    return Fold(name, tuple(read.numbers), labels, itself, distance, scalars, teacher, teacher_scale)


def _wants(plan: Plan, wanted: Sequence[bool]) -> Wants:
    """From flags in the order (scale, *tensors)."""
    by_scale, *rest = wanted
    flags = iter(rest)
    shape = iter(plan.shape)
    operand_count, block_count, _copies = (next(shape) for _ in range(3))
    operands = tuple(next(flags) for _ in range(operand_count))
    biases = []
    for _ in range(block_count):
        _query, _key, has_bias, compares = (next(shape) for _ in range(4))
        biases.append(bool(has_bias) and next(flags))
        for _ in range(compares + 5):
            next(shape)
    return Wants(operands, by_scale, tuple(biases), tuple(flags))


def _savable(problem: Problem) -> Problem:
    """With copies of what was made under inference_mode, where gradients are wanted."""
    plan, tensors, constants = flatten(problem, "reference", False)
    given = (problem.scale, problem.target, problem.weight)
    if not any(x.is_inference() for x in (*given, *tensors, *constants)):
        return problem
    scale, target, weight = map(savable, given)
    return unflatten(plan, scale, target, weight, list(map(savable, tensors)), list(map(savable, constants)))


def loss_rows_or_sum(problem: Problem, backend: str, per_row: bool) -> tuple[Tensor, list[Tensor]]:
    """The weighted losses [M], or their sum, differentiable in all but masks; and what the sweep counted by row."""
    if backend == "reference":
        problem = problem if torch.compiler.is_compiling() else _savable(problem)
        rows, counted = reference.loss_rows(problem)
        return (rows if per_row else rows.sum()), counted
    checks.untransformed(backend)
    plan, tensors, constants = flatten(problem, backend, per_row)
    arguments = (problem.scale, problem.target, problem.weight)
    wanted = [torch.is_grad_enabled() and t.requires_grad for t in (problem.scale, *tensors)]
    if torch.compiler.is_compiling():
        # Plain torch in eager; compiled, the driver's loop would be unrolled (minutes at 64 chunks).
        value, counted, *_ = torch.ops.fusedloss.sweep(*arguments, tensors, constants, *plan, wanted)
        return value, list(counted.detach())
    if not any(wanted):
        return execute(plan, wanted, *arguments, tensors, constants)[:2]
    value, *counted = _Loss.apply(plan, wanted, len(tensors), *map(savable, (*arguments, *tensors, *constants)))
    return value, counted


def loss_mean(problem: Problem, backend: str, count: Tensor | int) -> tuple[Tensor, list[Tensor]]:
    """The sum of the weighted losses over `count`, and what the sweep counted.

    Gradients that the forward keeps in bf16 are divided before they are rounded. Divided afterwards they were rounded
    twice: 2.36e-3 of their length from exact, where once is 1.66e-3.
    """
    if backend != "reference" and saved_dtype(problem.dtype) == torch.bfloat16:
        return loss_rows_or_sum(replace(problem, weight=problem.weight / count), backend, per_row=False)
    loss, counted = loss_rows_or_sum(problem, backend, per_row=False)
    return loss / count, counted


def top_rows(problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """Each row's largest logit and its column, the first on ties; -inf and -1 where no column competes."""
    if backend == "reference":
        return reference.top_rows(problem)
    checks.untransformed(backend)
    plan, tensors, constants = flatten(problem, backend, True)
    arguments = (problem.scale, problem.target, problem.weight)
    if torch.compiler.is_compiling():
        value, column = torch.ops.fusedloss.top_rows(*arguments, tensors, constants, *plan)
        return value, column
    return sweep.top_rows(problem, BACKENDS[backend])


def execute(
    plan: Plan,
    wanted: Sequence[bool],
    scale: Tensor,
    target: Tensor,
    weight: Tensor,
    tensors: Sequence[Tensor],
    constants: Sequence[Tensor],
    *,
    traced: bool = False,
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """The weighted losses or their sum, what was counted, and the sum's gradients by (scale, *tensors), or None.

    traced: it runs inside an op of a compiled graph, where autograd is out of reach and nothing is audited.
    """
    problem = unflatten(plan, scale, target, weight, tensors, constants)
    result = sweep.run(problem, BACKENDS[plan.backend], _wants(plan, wanted))
    if not traced and audit.due():
        audit.look(problem, plan.backend, result.rows, result.operands)
    biases = [g for g, block in zip(result.biases, problem.blocks, strict=True) if block.bias is not None]
    value = result.rows if plan.per_row else result.rows.sum()
    return value, result.counted, [result.scale, *result.operands, *biases, *result.scalars]


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        wanted: list[bool],
        count: int,
        scale: Tensor,
        target: Tensor,
        weight: Tensor,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.plan, ctx.wanted, ctx.count, ctx.length = plan, wanted, count, len(rest)
        tensors, constants = rest[:count], rest[count:]
        if plan.per_row:  # the backward sweeps: what it would be refused is refused now
            problem = unflatten(plan, scale, target, weight, tensors, constants)
            sweep.workspace_shape(problem, BACKENDS[plan.backend])
        ctx.save_for_backward(scale, target, weight, *rest)
        value, counted, gradients = execute(plan, _in_forward(plan, wanted), scale, target, weight, tensors, constants)
        ctx.gradients = None if plan.per_row else gradients
        ctx.dtypes = [x.dtype for x in (scale, *tensors)]
        ctx.mark_non_differentiable(*counted)
        return value, *counted

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or ctx.gradients is None:
            gradients = _Loss._from_inputs(ctx, upstream)
        else:
            # The inputs stay packed: a queue of negatives may have been overwritten since the forward read it.
            kept, ctx.gradients = ctx.gradients, None  # scaled in place, so this state serves once
            gradients = _scaled(kept, upstream)
        by_scale, *others = _cast(gradients, ctx.dtypes)
        return (None, None, None, by_scale, None, None, *others, *[None] * (ctx.length - ctx.count))

    @staticmethod
    def _from_inputs(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
        """What the forward has not kept; autograd refuses where an input has been written to since."""
        scale, target, weight, *rest = _saved(ctx)
        tensors, constants = rest[: ctx.count], rest[ctx.count :]
        if torch.is_grad_enabled():
            return _differentiable_gradients(ctx.plan, ctx.wanted, upstream, scale, target, weight, tensors, constants)
        if ctx.plan.per_row:
            # Upstream per row is one more row weight: the same sweep, run with it.
            summed = ctx.plan._replace(per_row=False)
            return execute(summed, ctx.wanted, scale, target, weight * upstream, tensors, constants)[2]
        return _scaled(execute(ctx.plan, ctx.wanted, scale, target, weight, tensors, constants)[2], upstream)


def _in_forward(plan: Plan, wanted: Sequence[bool]) -> list[bool]:
    return [want and not plan.per_row for want in wanted]


def _scaled(gradients: Sequence[Tensor | None], upstream: Tensor) -> list[Tensor | None]:
    """In place."""
    return [g if g is None else g.mul_(_like(upstream, g)) for g in gradients]


def _like(upstream: Tensor, gradient: Tensor) -> Tensor:
    """With as many dimensions: a 0-dim factor would be rounded to a 16-bit gradient's dtype before it multiplies."""
    return upstream.reshape([1] * gradient.dim())


def _cast(gradients: Sequence[Tensor | None], dtypes: Sequence[torch.dtype]) -> list[Tensor | None]:
    """Each rounded once, to its input's dtype."""
    return [g if g is None else g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True)]


def _differentiable_gradients(
    plan: Plan,
    wanted: list[bool],
    upstream: Tensor,
    scale: Tensor,
    target: Tensor,
    weight: Tensor,
    tensors: Sequence[Tensor],
    constants: Sequence[Tensor],
) -> list[Tensor | None]:
    """Under create_graph=True every backend reruns as the reference's formula, which autograd can differentiate again.

    `auto` may take a kernel from one day to the next: what works must not hang on that.
    """
    if plan.group:
        raise UnsupportedError(
            "second derivatives (create_graph=True) with group=: both directions across ranks have none. "
            "Leave group out."
        )
    # Apart, where two arguments are one tensor: else each would get the gradient of both.
    scale, *tensors = (t.view_as(t) for t in (scale, *tensors))
    inputs = [t for t, want in zip([scale, *tensors], wanted, strict=True) if want]
    with torch.autocast(tensors[0].device.type, enabled=False):
        rows, _ = reference.loss_rows(unflatten(plan, scale, target, weight, tensors, constants))
        loss = rows if plan.per_row else rows.sum()
        # An operand may stand in none of the blocks: hard negatives, in the direction from document to query.
        found = iter(torch.autograd.grad(loss, inputs, upstream, create_graph=True, materialize_grads=True))
    return [next(found) if want else None for want in wanted]


# The op ---------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("fusedloss::sweep", mutates_args=())
def _sweep(
    scale: Tensor,
    target: Tensor,
    weight: Tensor,
    tensors: list[Tensor],
    constants: list[Tensor],
    backend: str,
    fold: str,
    group: str,
    shape: list[int],
    numbers: list[float],
    per_row: bool,
    wanted: list[bool],
) -> list[Tensor]:
    """[value, counted [COUNTED, M], then the wanted gradients of the sum by (scale, *tensors)]; `per_row`: none."""
    plan = Plan(backend, fold, group, shape, numbers, per_row)
    arguments = (scale, target, weight, tensors, constants)
    value, counted, gradients = execute(plan, _in_forward(plan, wanted), *arguments, traced=True)
    kept = weight.new_zeros(COUNTED, weight.shape[0])
    for row, vector in enumerate(counted):
        kept[row] = vector
    return [value, kept, *(g for g in gradients if g is not None)]


@_sweep.register_fake
def _(scale, target, weight, tensors, constants, *options):
    plan, wanted = Plan(*options[:-1]), options[-1]
    dtype = stats_dtype(tensors[0].dtype)
    value = weight.new_empty(weight.shape if plan.per_row else ())
    operands = plan.shape[0]
    dtypes = [dtype, *[saved_dtype(tensors[0].dtype)] * operands, *[dtype] * (len(tensors) - operands)]
    kept = [(t, d) for t, d, want in zip([scale, *tensors], dtypes, wanted, strict=True) if want and not plan.per_row]
    return [value, weight.new_empty(COUNTED, weight.shape[0]), *(t.new_empty(t.shape, dtype=d) for t, d in kept)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    scale, target, weight, tensors, constants, *options, wanted = inputs
    ctx.plan, ctx.wanted, ctx.count, ctx.constants = Plan(*options), wanted, len(tensors), len(constants)
    ctx.save_for_backward(scale, target, weight, *tensors, *constants, *output[2:])


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    """What the forward saved; torch's error where some of it was written to since speaks of no argument."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "`bank`, or another tensor of the loss, must stay as it is until the last backward that reads it (per row, "
            f"with negatives, a second one, create_graph), got one that was modified since; write to it after that, or "
            f"pass bank.clone(). {error}"
        ) from error


def _backward(ctx: Any, upstream: list[Tensor]) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    scale, target, weight = (next(saved) for _ in range(3))
    tensors, constants = ([next(saved) for _ in range(count)] for count in (ctx.count, ctx.constants))
    kept = list(saved)
    if ctx.plan.per_row:
        summed = ctx.plan._replace(per_row=False)
        row_weight = weight * upstream[0]
        kept = torch.ops.fusedloss.sweep(scale, target, row_weight, tensors, constants, *summed, ctx.wanted)[2:]
    else:
        kept = [g * _like(upstream[0], g) for g in kept]
    found = iter(kept)
    dtypes = [x.dtype for x in (scale, *tensors)]
    by_scale, *others = _cast([next(found) if want else None for want in ctx.wanted], dtypes)
    return (by_scale, None, None, others, [None] * len(constants), *(None for _ in (*ctx.plan, ctx.wanted)))


_sweep.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("fusedloss::top_rows", mutates_args=())
def _top_rows(
    scale: Tensor,
    target: Tensor,
    weight: Tensor,
    tensors: list[Tensor],
    constants: list[Tensor],
    backend: str,
    fold: str,
    group: str,
    shape: list[int],
    numbers: list[float],
    per_row: bool,
) -> list[Tensor]:
    plan = Plan(backend, fold, group, shape, numbers, per_row)
    return list(sweep.top_rows(unflatten(plan, scale, target, weight, tensors, constants), BACKENDS[backend]))


@_top_rows.register_fake
def _(scale, target, weight, *_):
    return [torch.empty_like(weight), torch.empty_like(target)]
