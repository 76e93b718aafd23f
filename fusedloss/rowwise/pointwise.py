"""Losses of elements: of a prediction x and its target t, each pair on its own.

    Difference          mse, l1, huber, smooth_l1: a function of d = x - t
    BinaryCrossEntropy  a logit and a label from 0 to 1
    Focal               the same, with less weight on well-classified elements

Each has its formula twice: `values`, differentiable, and `block`, which computes the loss and the derivative by x of
one block that stays in a core's cache. Only the derivative is kept for the backward pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backends import few, select_rowwise
from ..core import checks
from ..core.errors import UnsupportedError
from ..core.numerics import savable, stats_dtype

BLOCK = 1 << 19  # elements on a CPU, 2 MiB in fp32: fewer make thread starts noticeable, 2^21 exceed the caches
# Derivatives of logits are at most about 1 and often tiny: in fp16 they are kept times this. 1024 would overflow for
# a label of 64, 64 does for one of 1024.
FP16_GAIN = 64.0


class Elements(NamedTuple):
    """The tensors that a formula's `block` reads and writes, all of one shape (weights broadcast), in any dtypes."""

    x: Tensor
    t: Tensor
    weight: Tensor | None
    pos_weight: Tensor | None
    slope: Tensor | None  # in the dtype of the computation: the derivative by x over `slope_factor`, if wanted
    losses: Tensor | None  # over `value_factor`; without it their sum is wanted


@dataclass
class Difference:
    """factor * c * (d - c / 2) with d = x - t, and c = d clamped to +-delta; its derivative by x is factor * c.

    mse is delta = inf and factor = 2, huber any delta and 1, smooth_l1 delta = beta and 1 / beta, and l1 its limit for
    delta = 0: |d|, with c the sign of d. Losses are multiplied by under where d < 0, by over where d > 0.
    """

    delta: float
    factor: float = 1.0
    under: float = 1.0
    over: float = 1.0

    @property
    def value_factor(self) -> float:
        return self.factor / 2 if self.delta == math.inf else self.factor

    @property
    def slope_factor(self) -> float:
        return self.factor

    def values(self, x: Tensor, t: Tensor, pos_weight: Tensor | None) -> Tensor:
        if self.delta == math.inf:
            square = checks.OPERATORS.mse_loss(x, t, checks.CODES["none"])
            loss = self.factor / 2 * square if self.factor != 2 else square
        elif self.delta == 0:
            loss = self.factor * (x - t).abs() if self.factor != 1 else (x - t).abs()
        else:
            d = x - t
            c = d.clamp(-self.delta, self.delta)
            loss = self.factor * c * (d - c / 2)
        if self.under == 1.0 == self.over:
            return loss
        return loss * torch.where(x < t, loss.new_full((), self.under), self.over)

    def block(self, e: Elements, wide: torch.dtype) -> Tensor:
        squares, signs = self.delta == math.inf, self.delta == 0
        symmetric = self.under == 1.0 == self.over
        out = e.slope if symmetric and e.weight is None else None  # if c is the slope, it is written there directly
        if e.x.dtype == wide or e.t.dtype == wide:
            d = torch.sub(e.x, e.t, out=out if squares else None)
        else:
            d = e.x.to(wide).sub_(e.t)
        if squares:
            c = d
        elif signs:
            c = torch.sign(d, out=out)
        else:
            c = torch.clamp(d, -self.delta, self.delta, out=out)
        slope = c
        if not symmetric:
            slope = c.clamp(min=0).mul_(self.over).add_(c.clamp(max=0), alpha=self.under)
        if e.weight is not None:
            slope = slope * e.weight.to(wide)
        if e.slope is not None and slope is not e.slope:
            e.slope.copy_(slope)
        if e.losses is not None:
            return torch.mul(slope, d if squares or signs else d - c / 2, out=e.losses)
        total = _dot(slope, d)
        return total if squares or signs else total.sub_(_dot(slope, c), alpha=0.5)


@dataclass
class BinaryCrossEntropy:
    """b * softplus(x) + a * softplus(-x) with a = pos_weight * t, b = 1 - t; its derivative is b * s(x) - a * s(-x).

    s is the sigmoid. A block computes them from small = s(-|x|), which keeps its digits where s(x) is almost 1, and
    from log1p(exp(-|x|)) = -log1p(-small):

        side = b where x > 0, else -a      loss = side * x - (a + b) * log1p(-small)
                                           derivative = side - (a + b) * small * sign(x)

    For labels from 0 to 1 no term of the loss is below 0, so nothing cancels in the sum.
    """

    value_factor: ClassVar[float] = 1.0
    slope_factor: ClassVar[float] = 1.0

    def values(self, x: Tensor, t: Tensor, pos_weight: Tensor | None) -> Tensor:
        return _between(*softplus_of_both(x, pos_weight), t)

    def block(self, e: Elements, wide: torch.dtype) -> Tensor:
        x, t = e.x.to(wide), e.t.to(wide)
        small, log = _tails(x)
        positive = _positive(x)
        both = None  # a + b, if it is not 1
        if e.weight is None and e.pos_weight is None:
            side = positive - t
        else:
            a, b = t if e.pos_weight is None else t * e.pos_weight.to(wide), 1 - t
            if e.weight is not None:
                weight = e.weight.to(wide)
                a, b = a * weight, b.mul_(weight)
            both = a + b
            side = b.mul_(positive).sub_((1 - positive).mul_(a))
            log.mul_(both)
        if e.slope is not None:
            half_sign = positive.sub_(0.5)  # copysign takes three times as long
            torch.addcmul(side, half_sign, small if both is None else small.mul_(both), value=-2, out=e.slope)
        if e.losses is not None:
            return torch.addcmul(log.neg_(), side, x, out=e.losses)
        return _dot(side, x).sub_(log.sum())


@dataclass
class Focal:
    """alpha_t * q^gamma * ce: q = 1 - p_t is the wrong share, ce the binary cross-entropy.

    q = p (1 - t) + (1 - p) t and alpha_t = alpha t + (1 - alpha) (1 - t). Both p and 1 - p are sigmoids, so q keeps its
    digits down to the smallest normal number, at which it is clamped: there q^gamma * ce is 0 to every digit, and its
    derivative for gamma < 1 is not 0 * inf.
    """

    gamma: float
    alpha: float | None = None

    value_factor: ClassVar[float] = 1.0
    slope_factor: ClassVar[float] = 1.0

    def values(self, x: Tensor, t: Tensor, pos_weight: Tensor | None) -> Tensor:
        q = torch.lerp(torch.sigmoid(x), torch.sigmoid(-x), t)
        loss = q.clamp(min=torch.finfo(q.dtype).tiny) ** self.gamma * _between(*softplus_of_both(x), t)
        return loss if self.alpha is None else loss * ((2 * self.alpha - 1) * t + (1 - self.alpha))

    def hard(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns `values` of labels y: 1 for 0, -1 for 1."""
        against = x * y
        q = torch.sigmoid(against)
        q = q.clamp(min=torch.finfo(q.dtype).tiny) if self.gamma < 1 else q
        loss = q**self.gamma * F.softplus(against, threshold=50)
        return loss if self.alpha is None else loss * torch.where(y < 0, y.new_full((), self.alpha), 1 - self.alpha)

    def block(self, e: Elements, wide: torch.dtype) -> Tensor:
        x, t = e.x.to(wide), e.t.to(wide)
        small, log = _tails(x)
        positive = _positive(x)
        signed = (positive - 0.5).mul_(2).mul_(small)  # copysign takes longer
        p, not_p = positive - signed, (1 - positive).add_(signed)
        q = p.addcmul_(p, t, value=-1).addcmul_(not_p, t).clamp_(min=torch.finfo(wide).tiny)
        side = positive.sub_(t)
        ce = torch.addcmul(log.neg_(), side, x)
        power = q**self.gamma
        if self.alpha is not None:
            power *= (2 * self.alpha - 1) * t + (1 - self.alpha)
        if e.slope is not None:  # dq/dx = p (1 - p) (1 - 2 t)
            by_q = small.addcmul_(small, small, value=-1).mul_(1 - 2 * t).div_(q).mul_(ce).mul_(self.gamma)
            torch.mul(power, by_q.add_(side).sub_(signed), out=e.slope)
        if e.losses is not None:
            return torch.mul(power, ce, out=e.losses)
        return _dot(power, ce)


Formula = Difference | BinaryCrossEntropy | Focal


def softplus_of_both(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns softplus(x) and factor * softplus(-x), of which a label interpolates without cancellation."""
    # Beyond 50, log(1 + exp(x)) is x to all digits of fp64; beyond torch's 20, its derivative is off by 2e-9.
    no, yes = F.softplus(x, threshold=50), F.softplus(-x, threshold=50)
    return no, yes if factor is None else yes * factor


def _between(no: Tensor, yes: Tensor, t: Tensor) -> Tensor:
    """Returns `(1 - t) no + t yes`. torch.lerp, one call less, makes infinity minus infinity of an infinite logit."""
    return torch.addcmul((1 - t) * no, t, yes)


def _tails(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns sigmoid(-|x|) and log(sigmoid(|x|)) = -log1p(exp(-|x|)), each to its last digits."""
    small = x.abs().neg_().sigmoid_()
    return small, small.neg().log1p_()


def _positive(x: Tensor) -> Tensor:
    """Returns 1 if x > 0, else 0, in a floating dtype: comparisons that write bool take 7 times as long on a CPU."""
    return torch.gt(x, 0, out=torch.empty_like(x))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a, b) if a.dim() == 1 else torch.dot(a.reshape(-1), b.reshape(-1))


class Task(NamedTuple):
    """All inputs except x and t."""

    formula: Formula
    weight: Tensor | None
    pos_weight: Tensor | None
    reduction: str
    dtype: torch.dtype  # of the loss
    weight_sum: Tensor | None  # the divisor of a mean, if it is not the number of elements
    backend: str

    def wide(self, x: Tensor, t: Tensor) -> torch.dtype:
        return stats_dtype(x.dtype if x.dtype == t.dtype else torch.promote_types(x.dtype, t.dtype))

    def gain(self, kept: torch.dtype) -> float:
        """The factor of the kept derivative."""
        return FP16_GAIN if kept == torch.float16 and not isinstance(self.formula, Difference) else 1.0


def loss(
    formula: Formula,
    x: Tensor,
    t: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    *,
    reduction: str,
    dtype: torch.dtype,
    weight_sum: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Returns the loss in `dtype`; x and t have one shape, to which the weights broadcast.

    A mean divides by `weight_sum`, or by the number of elements; the mean of no elements is NaN, as in torch.
    """
    if few(backend, x, "pointwise"):
        task = Task(formula, weight, pos_weight, reduction, dtype, weight_sum, "reference")
        return _by_formula(x, t, task, few_of_them=True)
    task = Task(formula, weight, pos_weight, reduction, dtype, weight_sum, select_rowwise(backend, x, "pointwise"))
    if (
        task.backend == "reference"
        or (weight is not None and weight.requires_grad)
        or (pos_weight is not None and pos_weight.requires_grad)
        or (t.requires_grad and not isinstance(formula, Difference))
        or transformed()
    ):
        return _by_formula(x, t, task)
    if torch.is_grad_enabled() and (x.requires_grad or t.requires_grad):
        return _Pointwise.apply(x, t, task)
    return _evaluate(x, t, task, None)


def transformed() -> bool:
    """Whether ordinary torch is needed: for a compiler, which fuses it, torch.func, or forward-mode autograd."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def _by_formula(x: Tensor, t: Tensor, task: Task, few_of_them: bool = False) -> Tensor:
    wide = task.wide(x, t)
    x, t = savable(x if x.dtype is wide else x.to(wide)), savable(t if t.dtype is wide else t.to(wide))
    values = _of_hard_labels(x, t, task) if few_of_them and not transformed() else None
    if values is None:
        values = task.formula.values(x, t, None if task.pos_weight is None else savable(task.pos_weight))
    if task.weight is not None:
        values = values * savable(task.weight)
    if task.reduction == "mean" and task.weight_sum is None:
        values = values.mean()  # of nothing NaN
    elif task.reduction != "none":
        values = values.sum()
        values = values if task.weight_sum is None else values / task.weight_sum
    return values if values.dtype is task.dtype else values.to(task.dtype)


def _of_hard_labels(x: Tensor, t: Tensor, task: Task) -> Tensor | None:
    """Returns each focal loss in half the operators, if all labels are 0 or 1 and all logits finite; None otherwise."""
    if not isinstance(task.formula, Focal) or not torch.linalg.vector_norm(x.detach()).item() < math.inf:
        return None
    y = signs(t)
    return None if y is None else task.formula.hard(x, y)


def signs(t: Tensor) -> Tensor | None:
    """Returns 1 for labels of 0 and -1 for labels of 1; None if there are others, or if `t` learns."""
    if t.requires_grad:
        return None
    y = _positive(t)
    return y.mul_(-2).add_(1) if torch.equal(t, y) else None


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, task: Task) -> Tensor:
        dtype = x.dtype
        if ctx.needs_input_grad[1] and t.dtype != dtype:
            dtype = torch.promote_types(dtype, t.dtype)
        if dtype == torch.float16 and (task.weight is not None or task.pos_weight is not None):
            dtype = torch.float32  # a weight may have any strides
        kept = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        value = _evaluate(x, t, task, kept)
        ctx.reduction, ctx.backend, ctx.dtypes = task.reduction, task.backend, (x.dtype, t.dtype)
        ctx.factor = task.formula.slope_factor / task.gain(dtype)
        by_sum = task.reduction == "mean" and task.weight_sum is not None
        if task.reduction == "mean" and not by_sum:
            ctx.factor /= x.numel() or 1
        ctx.save_for_backward(kept, *((task.weight_sum,) if by_sum else ()))
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        once_only()
        kept, *weight_sum = ctx.saved_tensors
        wide = stats_dtype(kept.dtype)
        # The kept derivative becomes the gradient in place: a fresh tensor's pages take longer than the product.
        out = kept if last_use(upstream) else None
        if ctx.reduction == "none" and any(upstream.stride()):
            if upstream.dtype != kept.dtype:
                kept, upstream, out = kept.to(wide), upstream.to(wide), None
            grad = torch.addcmul(kept.new_zeros(()), kept, upstream, value=ctx.factor, out=out)
        else:
            if upstream.dim():  # a sum's is one number for all; addcmul takes twice as long with two factors
                upstream = upstream[(0,) * upstream.dim()] if upstream.numel() else upstream.new_zeros(())
            # In fp32, because 1 / 2^26 is 0 in fp16.
            factor = (upstream if upstream.dtype == wide else upstream.to(wide)) * ctx.factor
            if weight_sum:
                factor = factor / weight_sum[0]
            grad = _times(kept, factor, ctx.backend, out)
        x_dtype, t_dtype = ctx.dtypes
        by_x = (grad if grad.dtype == x_dtype else grad.to(x_dtype)) if ctx.needs_input_grad[0] else None
        by_t = None
        if ctx.needs_input_grad[1]:
            by_t = grad.to(t_dtype).neg() if ctx.needs_input_grad[0] else grad.to(t_dtype).neg_()
        return by_x, by_t, None


def once_only() -> None:
    """Raises in a backward pass under create_graph, because only the first derivative was kept."""
    if torch.is_grad_enabled():
        raise UnsupportedError(
            "backend must be 'reference' for second derivatives (create_graph=True) of this loss, got one that keeps "
            "only the first"
        )


def last_use(upstream: Tensor) -> bool:
    """Whether the running backward pass frees the graph (no retain_graph), and is no vmap over upstream gradients."""
    return not (
        torch._C._autograd._get_current_graph_task_keep_graph()
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(upstream)
    )


def _times(kept: Tensor, factor: Tensor, backend: str, out: Tensor | None) -> Tensor:
    """Returns `kept * factor` in kept's dtype, multiplied in the factor's, which is fp32 or wider."""
    if kept.dtype == factor.dtype or kept.device.type == "cpu":
        return torch.mul(kept, factor, out=out)  # on a CPU a number keeps its digits in a product with 16 bits
    if backend == "triton":
        from ..backends.triton import pointwise as triton_pointwise

        return triton_pointwise.times(kept, factor, torch.empty_like(kept) if out is None else out)
    return kept.to(factor.dtype).mul_(factor).to(kept.dtype)


def _evaluate(x: Tensor, t: Tensor, task: Task, kept: Tensor | None) -> Tensor:
    """Returns the loss, and writes to `kept` the derivative by x over the formula's `slope_factor`, times `gain`."""
    losses = None
    if task.reduction == "none":
        losses = torch.empty_like(x, dtype=task.dtype, memory_format=torch.contiguous_format)
    if task.backend == "triton":
        from ..backends.triton import pointwise as triton_pointwise

        _, columns, weight, pos_weight = grid(x.shape, task.weight, task.pos_weight)
        gain = 1.0 if kept is None else task.gain(kept.dtype)
        total = triton_pointwise.evaluate(task.formula, x, t, weight, pos_weight, kept, gain, losses, columns)
    else:
        total = _walk(x, t, task, kept, losses)
    if losses is not None:
        return losses
    if task.formula.value_factor != 1:
        total.mul_(task.formula.value_factor)
    if task.reduction == "mean":
        total.div_((x.numel() or math.nan) if task.weight_sum is None else task.weight_sum)
    return total if total.dtype == task.dtype else total.to(task.dtype)


def _walk(x: Tensor, t: Tensor, task: Task, kept: Tensor | None, losses: Tensor | None) -> Tensor:
    """Walks block by block on a CPU, all at once elsewhere. Sums of blocks are added in fp64."""
    wide = task.wide(x, t)
    if x.numel() <= BLOCK or x.device.type != "cpu":
        return _step(Elements(x, t, task.weight, task.pos_weight, kept, losses), task, wide)
    rows, columns, weight, pos_weight = grid(x.shape, task.weight, task.pos_weight)
    parts = [_blocks(y, rows, columns) for y in (x, t, weight, pos_weight, kept, losses)]
    sums = [_step(Elements(*part), task, wide) for part in zip(*parts, strict=False)]
    return torch.stack(sums).sum(dtype=torch.float64) if losses is None else losses


def _step(e: Elements, task: Task, wide: torch.dtype) -> Tensor:
    """Computes one block: the sum of its losses over `value_factor`, or the losses themselves."""
    kept = e.slope
    if kept is not None and kept.dtype != wide:
        e = e._replace(slope=torch.empty_like(kept, dtype=wide))
    found = task.formula.block(e, wide)
    if e.slope is not None and kept is not None and e.slope is not kept:
        gain = task.gain(kept.dtype)
        kept.copy_(e.slope if gain == 1 else e.slope.mul_(gain))
    if e.losses is not None and task.formula.value_factor != 1:
        e.losses.mul_(task.formula.value_factor)
    return found


def _blocks(x: Tensor | None, rows: int, columns: int) -> Iterable[Any]:
    """Yields blocks of `[rows, columns]` with about BLOCK elements: a piece of a row, or a few rows."""
    if x is None:
        return itertools.repeat(None)
    if rows == 1:
        return x.reshape(-1).split(BLOCK)
    x = x.reshape(rows, columns)
    if columns > BLOCK:
        return itertools.chain.from_iterable(row.split(BLOCK) for row in x.unbind(0))
    many = BLOCK // columns
    if x.stride(0) == 0:  # a weight by column: one block of it stays in the cache and serves all rows
        whole = x[:many].contiguous()
        return itertools.chain(itertools.repeat(whole, rows // many), (whole[: rows % many],))
    return x.split(many)


def grid(
    shape: torch.Size, weight: Tensor | None, pos_weight: Tensor | None
) -> tuple[int, int, Tensor | None, Tensor | None]:
    """Returns rows and columns of the elements, such that each weight is `[rows, columns]` with strides of 0 to
    broadcast.

    A weight by element, by row or by column is not copied. Another one, such as `[C, 1, 1]` in `[B, C, H, W]`, is
    expanded to all dimensions from its first on, and copied.
    """
    if weight is None and pos_weight is None:
        return 1, shape.numel(), None, None
    dims = len(shape)
    padded = [None if w is None else w.reshape((1,) * (dims - w.dim()) + w.shape) for w in (weight, pos_weight)]
    given = [w for w in padded if w is not None]

    def fits(part: torch.Size, whole: torch.Size) -> bool:
        return part == whole or part.numel() == 1

    splits = range(dims)
    for split in splits:
        if all(fits(w.shape[:split], shape[:split]) and fits(w.shape[split:], shape[split:]) for w in given):
            break
    else:
        split = next((dim for dim in splits if any(w.shape[dim] != 1 for w in given)), 0)
        padded = [None if w is None else w.expand(w.shape[:split] + shape[split:]) for w in padded]
    rows, columns = shape[:split].numel(), shape[split:].numel()
    pairs = [None if w is None else w.reshape(w.shape[:split].numel(), w.shape[split:].numel()) for w in padded]
    weight, pos_weight = (None if w is None else w.expand(rows, columns) for w in pairs)
    return rows, columns, weight, pos_weight
