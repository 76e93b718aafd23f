"""Autograd around the sweep: an `autograd.Function` in eager, one opaque `torch.library` op under torch.compile.

Both run the same `execute`. Scalar reductions get their gradients out of the forward (upstream only scales them);
`reduction="none"` cannot know its upstream weights, so its forward folds statistics and its backward sweeps again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import sweep
from .backends import BACKENDS, reference
from .problem import Block, Problem, saved_dtype, stats_dtype
from .sweep import Wants


class Plan(NamedTuple):
    """The part of a problem that is not tensors, in the types that an op's schema knows."""

    backend: str
    blocks: list[int]  # query, key, has_bias of each block, flat
    operand_count: int
    cosine: bool
    label_smoothing: float
    symmetric: bool
    scale_bound: float | None
    workspace_bytes: int | None
    per_row: bool  # return [M] weighted losses instead of their sum

    @classmethod
    def of(cls, problem: Problem, backend: str, per_row: bool) -> Plan:
        blocks = [int(v) for b in problem.blocks for v in (b.query, b.key, b.bias is not None)]
        return cls(
            backend,
            blocks,
            len(problem.operands),
            problem.cosine,
            problem.label_smoothing,
            problem.symmetric,
            problem.scale_bound,
            problem.workspace_bytes,
            per_row,
        )

    def has_bias(self) -> list[bool]:
        return [bool(v) for v in self.blocks[2::3]]

    def problem(self, scale: Tensor, target: Tensor, weight: Tensor, tensors: Sequence[Tensor]) -> Problem:
        biases = iter(tensors[self.operand_count :])
        blocks = tuple(
            Block(query, key, next(biases) if biased else None)
            for query, key, biased in zip(self.blocks[0::3], self.blocks[1::3], self.has_bias(), strict=True)
        )
        return Problem(
            tuple(tensors[: self.operand_count]),
            blocks,
            scale,
            target,
            weight,
            self.cosine,
            self.label_smoothing,
            self.symmetric,
            self.scale_bound,
            self.workspace_bytes,
        )

    def wants(self, wanted: Sequence[bool]) -> Wants:
        """From flags in the order (scale, *operands, *biases)."""
        biases = iter(wanted[1 + self.operand_count :])
        return Wants(
            tuple(wanted[1 : 1 + self.operand_count]),
            wanted[0],
            tuple(biased and next(biases) for biased in self.has_bias()),
        )


def loss_rows_or_sum(problem: Problem, backend: str, per_row: bool) -> Tensor:
    """The weighted losses [M], or their sum, differentiable in the operands, the scale and the biases."""
    if backend == "reference":
        rows = reference.loss_rows(problem)
        return rows if per_row else rows.sum()
    plan = Plan.of(problem, backend, per_row)
    tensors = [*problem.operands, *(b.bias for b in problem.blocks if b.bias is not None)]
    arguments = (problem.scale, problem.target, problem.weight)
    wanted = [torch.is_grad_enabled() and t.requires_grad for t in (problem.scale, *tensors)]
    if torch.compiler.is_compiling():
        # Plain torch in eager; compiled, the driver's loop would be unrolled (minutes at 64 chunks).
        return torch.ops.fusedloss.softmax_sweep(*arguments, tensors, *plan, wanted)[0]
    if not any(wanted):
        return execute(plan, wanted, *arguments, tensors)[0]
    return _Loss.apply(plan, wanted, *arguments, *tensors)


def execute(
    plan: Plan, wanted: Sequence[bool], scale: Tensor, target: Tensor, weight: Tensor, tensors: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    """The weighted losses or their sum, and the sum's gradients by (scale, *tensors): None where not wanted."""
    result = sweep.run(plan.problem(scale, target, weight, tensors), BACKENDS[plan.backend], plan.wants(wanted))
    biases = [g for g, biased in zip(result.biases, plan.has_bias(), strict=True) if biased]
    value = result.rows if plan.per_row else result.rows.sum()
    return value, [result.scale, *result.operands, *biases]


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: Plan, wanted: list[bool], scale: Tensor, target: Tensor, weight: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.plan, ctx.wanted = plan, wanted
        if plan.per_row:  # the backward sweeps: what it would be refused is refused now
            sweep.workspace_shape(plan.problem(scale, target, weight, tensors), BACKENDS[plan.backend])
        ctx.save_for_backward(scale, target, weight, *tensors)
        value, gradients = execute(plan, _in_forward(plan, wanted), scale, target, weight, tensors)
        ctx.gradients = None if plan.per_row else gradients
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scale, target, weight, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            gradients = _differentiable_gradients(ctx.plan, ctx.wanted, upstream, *ctx.saved_tensors)
        else:
            gradients, ctx.gradients = ctx.gradients, None  # scaled in place below, so this state serves once
            if ctx.plan.per_row:
                gradients = _row_weighted_gradients(ctx.plan, ctx.wanted, upstream, *ctx.saved_tensors)
            elif gradients is None:
                gradients = execute(ctx.plan, ctx.wanted, scale, target, weight, tensors)[1]
            if not ctx.plan.per_row:
                gradients = [g if g is None else g.mul_(_like(upstream, g)) for g in gradients]
        by_scale, *rest = _cast(gradients, [scale, *tensors])
        return (None, None, by_scale, None, None, *rest)


def _in_forward(plan: Plan, wanted: list[bool]) -> list[bool]:
    return [want and not plan.per_row for want in wanted]


def _like(upstream: Tensor, gradient: Tensor) -> Tensor:
    """With as many dimensions: a 0-dim factor would be rounded to a 16-bit gradient's dtype before it multiplies."""
    return upstream.reshape([1] * gradient.dim())


def _cast(gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Each rounded once, to its input's dtype."""
    return [g if g is None else g.to(x.dtype) for g, x in zip(gradients, inputs, strict=True)]


def _row_weighted_gradients(
    plan: Plan, wanted: list[bool], upstream: Tensor, scale: Tensor, target: Tensor, weight: Tensor, *tensors: Tensor
) -> list[Tensor | None]:
    """Upstream per row is one more row weight: the same sweep, run with it."""
    summed = plan._replace(per_row=False)
    return execute(summed, wanted, scale, target, weight * upstream, tensors)[1]


def _differentiable_gradients(
    plan: Plan, wanted: list[bool], upstream: Tensor, scale: Tensor, target: Tensor, weight: Tensor, *tensors: Tensor
) -> list[Tensor | None]:
    """Under create_graph=True the plain-torch backend reruns as a formula, which autograd can differentiate again."""
    if plan.backend != "chunked":
        raise RuntimeError(
            f"second derivatives (create_graph=True): backend {plan.backend!r} has none. "
            "Pass backend='reference' or 'chunked'."
        )
    inputs = [t for t, want in zip([scale, *tensors], wanted, strict=True) if want]
    with torch.autocast(tensors[0].device.type, enabled=False):
        rows = reference.loss_rows(plan.problem(scale, target, weight, tensors))
        found = iter(torch.autograd.grad(rows if plan.per_row else rows.sum(), inputs, upstream, create_graph=True))
    return [next(found) if want else None for want in wanted]


# The op ---------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("fusedloss::softmax_sweep", mutates_args=())
def _softmax_sweep(
    scale: Tensor,
    target: Tensor,
    weight: Tensor,
    tensors: list[Tensor],
    backend: str,
    blocks: list[int],
    operand_count: int,
    cosine: bool,
    label_smoothing: float,
    symmetric: bool,
    scale_bound: float | None,
    workspace_bytes: int | None,
    per_row: bool,
    wanted: list[bool],
) -> list[Tensor]:
    """[value, then the wanted gradients of the sum by (scale, *tensors)]; with `per_row` the value alone."""
    plan = Plan(
        backend, blocks, operand_count, cosine, label_smoothing, symmetric, scale_bound, workspace_bytes, per_row
    )
    value, gradients = execute(plan, _in_forward(plan, wanted), scale, target, weight, tensors)
    return [value, *(g for g in gradients if g is not None)]


@_softmax_sweep.register_fake
def _(scale, target, weight, tensors, *options):
    _, _, operand_count, *_, per_row, wanted = options
    dtype = stats_dtype(tensors[0].dtype)
    value = weight.new_empty(weight.shape if per_row else ())
    dtypes = [dtype, *[saved_dtype(tensors[0].dtype)] * operand_count, *[dtype] * (len(tensors) - operand_count)]
    kept = [(t, d) for t, d, want in zip([scale, *tensors], dtypes, wanted, strict=True) if want and not per_row]
    return [value, *(t.new_empty(t.shape, dtype=d) for t, d in kept)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    scale, target, weight, tensors, *options, wanted = inputs
    ctx.plan, ctx.wanted, ctx.count = Plan(*options), wanted, len(tensors)
    ctx.save_for_backward(scale, target, weight, *tensors, *output[1:])


def _backward(ctx: Any, upstream: list[Tensor]) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    scale, target, weight, *tensors = saved[: 3 + ctx.count]
    kept = saved[3 + ctx.count :]
    if ctx.plan.per_row:
        summed = ctx.plan._replace(per_row=False)
        row_weight = weight * upstream[0]
        kept = torch.ops.fusedloss.softmax_sweep(scale, target, row_weight, tensors, *summed, ctx.wanted)[1:]
    found = iter(kept if ctx.plan.per_row else [g * _like(upstream[0], g) for g in kept])
    by_scale, *rest = _cast([next(found) if want else None for want in ctx.wanted], [scale, *tensors])
    return (by_scale, None, None, rest, *(None for _ in (*ctx.plan, ctx.wanted)))


_softmax_sweep.register_autograd(_backward, setup_context=_setup_context)
