"""Autograd around the sweep: an `autograd.Function` in eager, one opaque `torch.library` op under torch.compile.

Both run the same `execute`. Scalar reductions get their gradients out of the forward (upstream only scales them);
`reduction="none"` cannot know its upstream weights, so its forward folds statistics and its backward sweeps again;
`dense` keeps the gradient by the similarities for it, which it has anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import sweep
from ..backends import SWEEPS, dense, reference
from ..backends.protocol import Wants
from ..core import checks
from ..core.errors import UnsupportedError
from ..core.numerics import savable, saved_dtype, stats_dtype, without_autocast
from ..core.problem import Problem
from . import audit
from .packing import Flat, pack, put_together, take_apart, unpack

COUNTED = 4  # most vectors that `Result.counted` may hold


class How(NamedTuple):
    """How a problem is computed."""

    backend: str
    per_row: bool  # return [M] weighted losses instead of their sum
    share: float = 1.0  # factor of the sum: 1 / M for the mean of M rows


def loss_rows_or_sum(problem: Problem, backend: str, per_row: bool, share: float = 1.0) -> tuple[Tensor, list[Tensor]]:
    """The weighted losses [M], or their sum, differentiable in all but masks; and what the sweep counted by row."""
    compiling = torch.compiler.is_compiling()
    if backend == "reference":
        rows, counted = reference.loss_rows(problem if compiling else _savable(problem)[0])
        return (rows if per_row else rows.sum()), counted
    checks.untransformed(backend)
    how = How(backend, per_row, share)
    if compiling:
        # Plain torch in eager; compiled, the driver's loop would be unrolled (minutes at 64 chunks).
        flat = pack(problem)
        value, counted, *_ = torch.ops.fusedloss.sweep(*flat, backend, per_row, _wanted(flat.inputs))
        return value, list(counted.detach())
    problem, empty, inputs, constants = _savable(problem)
    wanted = _wanted(inputs)
    if not any(wanted):
        return execute(problem, how, wanted)[:2]
    value, *counted = _Loss.apply(problem, empty, constants, how, wanted, *inputs)
    return value, counted


def _wanted(inputs: Sequence[Tensor]) -> list[bool]:
    enabled = torch.is_grad_enabled()
    return [enabled and t.requires_grad for t in inputs]


def _savable(problem: Problem) -> tuple[Problem, Problem, list[Tensor], list[Tensor]]:
    """The problem whole and apart, with copies of what was made under inference_mode, where gradients are wanted."""
    empty, inputs, constants = take_apart(problem)
    if any([x.is_inference() for x in (*inputs, *constants)]):
        inputs, constants = list(map(savable, inputs)), list(map(savable, constants))
        problem = put_together(empty, inputs, constants)
    return problem, empty, inputs, constants


def loss_mean(problem: Problem, backend: str, count: Tensor | int) -> tuple[Tensor, list[Tensor]]:
    """The sum of the weighted losses over `count`, and what the sweep counted.

    Gradients that the forward keeps in bf16 are divided before they are rounded. Divided afterwards they were rounded
    twice: 2.36e-3 of their length from exact, where once is 1.66e-3. A number divides them as the backend finishes
    them, in no call of torch; the compiler fuses the division.
    """
    once = backend != "reference" and not torch.compiler.is_compiling()
    if once and isinstance(count, int) and count == max(problem.rows, 1):
        return loss_rows_or_sum(problem, backend, False, 1.0 / count)
    if backend == "dense" or (backend != "reference" and saved_dtype(problem.dtype) == torch.bfloat16):
        return loss_rows_or_sum(problem.weighing(problem.weight / count), backend, per_row=False)
    loss, counted = loss_rows_or_sum(problem, backend, per_row=False)
    return loss / count, counted


def top_rows(problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """Returns each row's largest logit and its column, the first on ties; -inf and -1 if no column competes."""
    if backend in ("reference", "dense"):
        return reference.top_rows(problem)
    checks.untransformed(backend)
    if torch.compiler.is_compiling():
        value, column = torch.ops.fusedloss.top_rows(*pack(problem), backend)
        return value, column
    return sweep.top_rows(problem, SWEEPS[backend])


def opposed_rows(problem: Problem, backend: str) -> tuple[Tensor, Tensor] | None:
    """Returns the columns of each row's largest logit of another label and of its smallest one of its own, from one
    matrix or one sweep over half of the tiles; None if the backend has none."""
    if backend in ("reference", "dense"):
        return reference.opposed_rows(problem)
    if torch.compiler.is_compiling() or backend not in SWEEPS:
        return None
    checks.untransformed(backend)
    return sweep.opposed_rows(problem, SWEEPS[backend])


def execute(
    problem: Problem, how: How, wanted: Sequence[bool], *, traced: bool = False
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """The weighted losses or their sum, what was counted, and the sum's gradients by the inputs, or None.

    wanted: by (*operands, *biases, scale, *scalars), the order in which a problem declares its inputs. traced: it runs
        inside an op of a compiled graph, where autograd is out of reach and nothing is audited.
    """
    wants = _wants(problem, wanted)
    if how.backend == "dense":
        with without_autocast(problem.operands[0]):
            result = dense.run(problem, wants, how.share)
    else:
        result = sweep.run(problem, SWEEPS[how.backend], wants, how.share)
    if not traced and audit.due():
        dtype = stats_dtype(problem.dtype)
        gradients = [None if g is None else g.to(dtype) / how.share for g in result.operands]
        audit.look(problem, how.backend, result.rows, gradients)
    value = result.rows if how.per_row else result.rows.sum() if how.share == 1.0 else result.rows.mean()
    kept = [g for g, block in zip(result.biases, problem.blocks, strict=True) if block.bias is not None]
    return value, result.counted, [*result.operands, *kept, result.scale, *result.scalars]


def _wants(problem: Problem, wanted: Sequence[bool]) -> Wants:
    flags = iter(wanted[len(problem.operands) :])
    biases = tuple([block.bias is not None and next(flags) for block in problem.blocks])
    return Wants(tuple(wanted[: len(problem.operands)]), next(flags), biases, tuple(flags))


class _Loss(torch.autograd.Function):
    """Takes the problem as it is; keeps it apart from its tensors, whose memory and versions autograd watches."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: Problem,
        empty: Problem,
        constants: list[Tensor],
        how: How,
        wanted: list[bool],
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.empty, ctx.how, ctx.wanted, ctx.count = empty, how, wanted, len(inputs)
        if how.per_row and how.backend in SWEEPS:  # the backward sweeps: what it would be refused is refused now
            sweep.workspace_shape(problem, SWEEPS[how.backend])
        ctx.save_for_backward(*inputs, *constants)
        ctx.gradients = ctx.kept = None
        if how.per_row and how.backend == "dense" and dense.keeps(problem, wants := _wants(problem, wanted)):
            with without_autocast(problem.operands[0]):
                (value, *_, counted), ctx.kept = dense.run_and_keep(problem, wants)
        else:
            value, counted, gradients = execute(problem, how, _in_forward(how, wanted))
            ctx.gradients = None if how.per_row else gradients
        ctx.dtypes = [x.dtype for x in inputs]
        ctx.mark_non_differentiable(*counted)
        return value, *counted

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or ctx.gradients is None:
            gradients = _Loss._from_inputs(ctx, upstream)
        else:
            # Do not unpack `saved_tensors` here: autograd's version check would reject a memory bank that was
            # overwritten after the forward.
            kept, ctx.gradients = ctx.gradients, None  # scaled in place, so this state serves once
            gradients = _scaled(kept, upstream)
        return (None,) * 5 + tuple(_cast(gradients, ctx.dtypes))

    @staticmethod
    def _from_inputs(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
        """What the forward has not kept; autograd refuses where an input has been written to since."""
        saved = _saved(ctx)
        problem = put_together(ctx.empty, saved[: ctx.count], saved[ctx.count :])
        if torch.is_grad_enabled():
            return _differentiable_gradients(problem, ctx.how, ctx.wanted, upstream)
        if ctx.kept is not None:
            kept, ctx.kept = ctx.kept, None  # overwritten, so this state serves once
            with without_autocast(problem.operands[0]):
                return dense.finish(problem, _wants(problem, ctx.wanted), kept, upstream)
        if ctx.how.per_row:
            # Upstream per row is one more row weight: the same sweep, run with it.
            problem = problem.weighing(problem.weight * upstream)
            return execute(problem, ctx.how._replace(per_row=False), ctx.wanted)[2]
        return _scaled(execute(problem, ctx.how, ctx.wanted)[2], upstream)


def _in_forward(how: How, wanted: Sequence[bool]) -> list[bool]:
    return [want and not how.per_row for want in wanted]


def _scaled(gradients: list[Tensor | None], upstream: Tensor) -> list[Tensor | None]:
    """In place. The upstream gradient of `loss.backward()` itself is 1, and reading it on a CPU takes 1 us."""
    if type(upstream) is Tensor and checks.reads_values(upstream) and float(upstream.detach()) == 1:
        return gradients
    return [g if g is None else g.mul_(_like(upstream, g)) for g in gradients]


def _like(upstream: Tensor, gradient: Tensor) -> Tensor:
    """With as many dimensions: a 0-dim factor would be rounded to a 16-bit gradient's dtype before it multiplies."""
    return upstream if upstream.dtype is gradient.dtype else upstream.reshape([1] * gradient.dim())


def _cast(gradients: Sequence[Tensor | None], dtypes: Sequence[torch.dtype]) -> list[Tensor | None]:
    """Each rounded once, to its input's dtype."""
    return [g if g is None or g.dtype is dtype else g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True)]


def _differentiable_gradients(
    problem: Problem, how: How, wanted: Sequence[bool], upstream: Tensor
) -> list[Tensor | None]:
    """Under create_graph=True every backend reruns as the reference's formula, which autograd can differentiate again.

    `auto` may take a kernel from one day to the next: what works must not hang on that.
    """
    if problem.ranks is not None:
        raise UnsupportedError(
            "group must be None for second derivatives (create_graph=True) of a loss of both directions, got a group"
        )
    empty, inputs, constants = take_apart(problem)
    # Apart, where two arguments are one tensor: else each would get the gradient of both.
    inputs = [t.view_as(t) for t in inputs]
    with torch.autocast(problem.device.type, enabled=False):
        rows, _ = reference.loss_rows(put_together(empty, inputs, constants))
        loss = rows if how.per_row else rows.sum() * how.share
        by = [t for t, want in zip(inputs, wanted, strict=True) if want]
        # An operand may stand in none of the blocks: hard negatives, in the direction from document to query.
        found = iter(torch.autograd.grad(loss, by, upstream, create_graph=True, materialize_grads=True))
    return [next(found) if want else None for want in wanted]


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    """What the forward saved; torch's error where some of it was written to since speaks of no argument."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "`bank`, or another tensor of the loss, must stay as it is until the last backward that reads it (per row, "
            "with negatives, a second one, create_graph), got one that was modified; write to it after that backward, "
            f"or pass bank.clone(). {error}"
        ) from error


# The op ---------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("fusedloss::sweep", mutates_args=())
def _sweep(
    inputs: list[Tensor],
    constants: list[Tensor],
    ints: list[int],
    floats: list[float],
    names: str,
    backend: str,
    per_row: bool,
    wanted: list[bool],
) -> list[Tensor]:
    """[value, counted [COUNTED, M], then the wanted gradients of the sum by the inputs]; `per_row`: none."""
    problem, how = unpack(Flat(inputs, constants, ints, floats, names)), How(backend, per_row)
    value, counted, gradients = execute(problem, how, _in_forward(how, wanted), traced=True)
    kept = problem.weight.new_zeros(COUNTED, problem.rows)
    for row, vector in enumerate(counted):
        kept[row] = vector
    return [value, kept, *(g for g in gradients if g is not None)]


@_sweep.register_fake
def _(inputs, constants, ints, floats, names, backend, per_row, wanted):
    problem = unpack(Flat(inputs, constants, ints, floats, names))
    weight, operands = problem.weight, len(problem.operands)
    dtypes = [saved_dtype(problem.dtype)] * operands + [stats_dtype(problem.dtype)] * (len(inputs) - operands)
    kept = [(t, d) for t, d, want in zip(inputs, dtypes, wanted, strict=True) if want and not per_row]
    value = weight.new_empty(weight.shape if per_row else ())
    return [value, weight.new_empty(COUNTED, weight.shape[0]), *(t.new_empty(t.shape, dtype=d) for t, d in kept)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *flat, ctx.backend, ctx.per_row, ctx.wanted = inputs
    tensors, constants, *ctx.numbers = flat
    ctx.counts = len(tensors), len(constants)
    ctx.save_for_backward(*tensors, *constants, *output[2:])


def _backward(ctx: Any, upstream: list[Tensor]) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    inputs, constants = ([next(saved) for _ in range(count)] for count in ctx.counts)
    kept = list(saved)
    if ctx.per_row:
        problem = unpack(Flat(inputs, constants, *ctx.numbers))
        flat = pack(problem.weighing(problem.weight * upstream[0]))
        kept = torch.ops.fusedloss.sweep(*flat, ctx.backend, False, ctx.wanted)[2:]
    else:
        kept = [g * _like(upstream[0], g) for g in kept]
    found = iter(kept)
    gradients = _cast([next(found) if want else None for want in ctx.wanted], [x.dtype for x in inputs])
    return (gradients, [None] * len(constants), *(None for _ in (*ctx.numbers, "backend", "per_row", "wanted")))


_sweep.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("fusedloss::top_rows", mutates_args=())
def _top_rows(
    inputs: list[Tensor],
    constants: list[Tensor],
    ints: list[int],
    floats: list[float],
    names: str,
    backend: str,
) -> list[Tensor]:
    return list(sweep.top_rows(unpack(Flat(inputs, constants, ints, floats, names)), SWEEPS[backend]))


@_top_rows.register_fake
def _(inputs, constants, ints, floats, names, backend):
    problem = unpack(Flat(inputs, constants, ints, floats, names))
    return [torch.empty_like(problem.weight), torch.empty_like(problem.target)]
