"""The commonest losses of the smallest batches, on a CPU: differentiable torch, without a record of what was asked.

Such a step takes torch 200 us; the record, the choice of a backend and an `autograd.Function` around the operands took
300 more. Here products and norms are torch's own and differentiate themselves. So does torch's cross-entropy where no
column is likely. It loses the digits of a likely target, so there the gradient is found beside the value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from ..backends import dense
from ..core import checks, environment
from ..core.numerics import NORM_EPS, row_numbers, savable, unit_rows
from ..core.softmax import LIKELY, softmax_rows
from ._options import are_default

# maths.md: Logits; The softmax row; Gradient of the logits
MOST = 1 << 16  # similarities: N = 256
PLAIN = (Tensor, nn.Parameter)
WIDE = (torch.float32, torch.float64)
TINY, LARGE = 2.0**-100, 2.0**100  # scales between are finite in both dtypes, and so are their inverses
softplus = torch._C._nn.softplus  # F.softplus takes 1 us more
Options = Mapping[str, Any]


def mean(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    options: Options,
    off: tuple[object, ...],
    *,
    inverse: bool = False,
    cosine: bool = False,
    symmetric: bool = False,
    every: bool = False,
    target: Tensor | None = None,
) -> Tensor | None:
    """Returns the mean cross-entropy of the rows of `scale <x_i, y_j>`; None where the losses' own checks are to
    decide, or this cannot run.

    options, off: see `_fits`. inverse: `scale` is a temperature. symmetric: the mean of both directions. every: each
    row's logits are those of `_EverySimilarity`; the scale is a float. target: int64 [M] columns; None: the diagonal.
    It reads the scale, the target's ends and the largest probability.
    """
    if not _fits(x, y, scale, options, off) or ((symmetric or every) and x.shape[0] != y.shape[0]):
        return None
    if x.shape[0] > y.shape[0] if target is None else not _are_columns(target, x, y):
        return None
    target = row_numbers(x.shape[0], x) if target is None else savable(target)
    z = _similarities(x, y, cosine, every)
    z = z / scale if inverse else z * scale
    found, likely = [], False
    for side in (z, z.t()) if symmetric else (z,):
        found.append(torch.log_softmax(side, 1))
        likely = likely or not found[-1].detach().max().item() < LIKELY  # a NaN is not below
    if likely:
        return _OfLogits.apply(z, target, *[log_p.detach() for log_p in found])
    losses = [checks.OPERATORS.nll_loss_nd(log_p, target, None, checks.CODES["mean"], -100) for log_p in found]
    return (losses[0] + losses[1]) / 2 if symmetric else losses[0]


def sigmoid(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    options: Options,
    off: tuple[object, ...],
    *,
    bias: float | Tensor | None = None,
    cosine: bool = False,
) -> Tensor | None:
    """Returns `sum_ij log(1 + exp(-y_ij (scale <x_i, y_j> + bias))) / M`, y = 1 on the diagonal and -1 elsewhere; None
    as `mean`. It reads the scale and the bias."""
    if not _fits(x, y, scale, options, off) or x.shape[0] > y.shape[0]:
        return None
    if bias is not None and not -LARGE < _number(bias, x) < LARGE:
        return None
    z = _similarities(x, y, cosine) * scale
    z = z if bias is None else z + bias
    against = torch.ones(z.shape, dtype=z.dtype, device=z.device).fill_diagonal_(-1)
    return softplus(z * against, 1, 40.0).sum() / x.shape[0]


def divergence(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    teacher: tuple[Tensor, Tensor, float | Tensor],
    options: Options,
    off: tuple[object, ...],
    *,
    inverse: bool = False,
    cosine: bool = False,
    teacher_cosine: bool = False,
    symmetric: bool = False,
) -> Tensor | None:
    """Returns the mean over rows of `KL(p_i || q_i)`, the softmax of `scale <x_i, y_j>` being q and the teacher's p;
    None as `mean`, and where the loss is not finite.

    teacher: its rows and columns, and its scale, or temperature with `inverse`. It reads both scales and the loss.
    """
    taught, others, factor = teacher
    if not _fits(x, y, scale, options, off) or not (_is_matrix(taught) and _is_matrix(others)):
        return None
    if taught.shape[0] != x.shape[0] or others.shape[0] != y.shape[0] or taught.shape[1] != others.shape[1]:
        return None
    if taught.dtype is not x.dtype or others.dtype is not x.dtype or not TINY < _number(factor, x) < LARGE:
        return None
    if symmetric and x.shape[0] != y.shape[0]:
        return None
    if taught.requires_grad or others.requires_grad:
        taught, others = taught.detach(), others.detach()
    z, t, number = _similarities(x, y, cosine), _similarities(taught, others, teacher_cosine), 1.0
    t = t.div_(factor) if inverse else t.mul_(factor)
    if type(scale) is float:
        number = 1 / scale if inverse else scale
    else:
        z = z / scale if inverse else z * scale
    loss: Tensor = _Divergence.apply(z, t, number, symmetric)
    return loss if math.isfinite(loss.item()) else None


def supervised(
    x: Tensor, labels: Tensor, temperature: float | Tensor, options: Options, off: tuple[object, ...]
) -> Tensor | None:
    """Returns `sup_con` of form "out"; None as `mean`, and where the loss is not finite. It reads the loss."""
    if type(temperature) is not float or not _fits(x, x, temperature, options, off) or not _are_numbers(labels, x):
        return None
    if x.shape[0] == 1:  # it has no other
        return None
    loss, _ = _Supervised.apply(x, labels, temperature)
    return loss if math.isfinite(loss.item()) else None


def views(
    z1: Tensor, z2: Tensor, temperature: float | Tensor, options: Options, off: tuple[object, ...]
) -> Tensor | None:
    """Returns `nt_xent`, which is `sup_con` of two rows a label; None as `mean`, and where a positive is likely. It
    reads the largest probability."""
    if type(temperature) is not float or not _fits(z1, z2, temperature, options, off) or z1.shape[0] != z2.shape[0]:
        return None
    if 4 * z1.shape[0] * z2.shape[0] > MOST:
        return None
    loss, largest = _Supervised.apply(torch.cat((z1, z2)), row_numbers(z1.shape[0], z1).repeat(2), temperature)
    return loss if largest.item() < LIKELY else None  # a NaN is not below


def _similarities(x: Tensor, y: Tensor, cosine: bool, every: bool = False) -> Tensor:
    if cosine:
        x, y = _Unit.apply(x, y)
    return _EverySimilarity.apply(x, y) if every else torch.mm(x, y.t())


def _number(value: float | Tensor, like: Tensor) -> float:
    """The value of a float, or of a 0-dim tensor beside `like`; NaN of anything else."""
    if type(value) is float:
        return value
    if type(value) not in PLAIN or value.dtype is not like.dtype or value.dim() or not value.is_cpu:  # type: ignore[union-attr]
        return math.nan
    number: float = math.nan if value.is_inference() else value.detach().item()  # type: ignore[union-attr]
    return number


def _fits(x: Tensor, y: Tensor, scale: float | Tensor, options: Options, off: tuple[object, ...]) -> bool:
    """The one rule by which a call comes here. options: those that losses share, which must be the defaults. off: the
    loss's own, of which each must be None, False or 0.0.

    A backward reads its inputs again, and what does not learn may be a memory that is overwritten before it.
    """
    if torch.compiler.is_compiling() or not are_default(options):  # sizes may be symbols
        return False
    for value in off:
        if value is not None and value is not False and (type(value) is not float or value):
            return False
    if not (_is_matrix(x) and _is_matrix(y)) or x.dtype is not y.dtype or x.shape[1] != y.shape[1]:
        return False
    if not (x.requires_grad and y.requires_grad and torch.is_grad_enabled()) or _len_torch_dispatch_stack():
        return False  # a mode may fake them
    size = x.shape[0] * y.shape[0]
    if not 0 < size <= MOST or size * x.element_size() > dense.MOST.get("cpu", 0):  # nothing that `dense` would leave
        return False
    if not TINY < _number(scale, x) < LARGE:
        return False
    if not checks.reads_values(x) or torch.autograd.forward_ad._current_level >= 0 or checks.autocasts(x):
        return False
    return environment.backend() == "auto" and environment.workspace_bytes() is None and not environment.audit()


def _is_matrix(x: Tensor) -> bool:
    """Whether `x` is [rows, D], fp32 or fp64, on a CPU, and autograd saves it."""
    if type(x) not in PLAIN or x.dtype not in WIDE or not x.is_cpu or x.is_nested or x.is_inference():
        return False
    return x.layout is torch.strided and x.dim() == 2 and x.shape[1] > 0


def _are_numbers(numbers: Tensor, x: Tensor) -> bool:
    """Whether they are int64 [rows of x], on a CPU."""
    if type(numbers) is not Tensor or numbers.dtype is not torch.int64 or not numbers.is_cpu or numbers.is_nested:
        return False
    return numbers.layout is torch.strided and numbers.shape == x.shape[:1]


def _are_columns(target: Tensor, x: Tensor, y: Tensor) -> bool:
    if not _are_numbers(target, x):
        return False
    low, high = target.aminmax()
    return low.item() >= 0 and high.item() < y.shape[0]


class _Unit(torch.autograd.Function):
    """Unit rows of both. The derivative of F.normalize takes 100 us more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        norms = [torch.linalg.vector_norm(z, dim=1, keepdim=True).clamp_min_(NORM_EPS) for z in (x, y)]
        units = x / norms[0], y / norms[1]
        ctx.save_for_backward(x, y, *units, *norms)
        return units

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, ...]:
        x, y, *units, x_norm, y_norm = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Views, in case both are one tensor, or one is made of the other: else each would get the gradient of both.
            x, y = x.view_as(x), y.view_as(y)
            return torch.autograd.grad((unit_rows(x), unit_rows(y)), (x, y), upstream, create_graph=True)
        return tuple(map(_through_norm, units, (x_norm, y_norm), upstream))


def _through_norm(unit: Tensor, norm: Tensor, g: Tensor) -> Tensor:
    """The gradient by rows, of which `g` is that by their unit rows."""
    along = (unit * g).sum(1, keepdim=True).masked_fill_(norm <= NORM_EPS, 0)  # a constant's is 0
    return torch.addcmul(g, unit, along, value=-1).div_(norm)


class _EverySimilarity(torch.autograd.Function):
    """`[x y^T, x x^T, y x^T, y y^T]` [N, 4 N] of x and y [N, D], where a row's with itself is -inf."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        across = torch.mm(x, y.t())
        own = [torch.mm(z, z.t()).fill_diagonal_(-math.inf) for z in (x, y)]
        return torch.cat([across, own[0], across.t(), own[1]], 1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        across, x_own, turned, y_own = upstream.chunk(4, 1)
        if torch.is_grad_enabled():
            own = torch.eye(x.shape[0], dtype=torch.bool, device=x.device)
            x_own, y_own = x_own.masked_fill(own, 0), y_own.masked_fill(own, 0)
        across, x_own, y_own = across + turned.t(), x_own + x_own.t(), y_own + y_own.t()
        return torch.mm(across, y).addmm(x_own, x), torch.mm(across.t(), x).addmm(y_own, y)


class _OfLogits(torch.autograd.Function):
    """The mean of the rows of logits, or of both directions', of which `log_p` are the log-softmaxes."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, target: Tensor, *log_p: Tensor) -> Tensor:
        ctx.share = 1 / (len(target) * len(log_p))
        loss, dz = _beside(log_p[0], target[:, None])
        for other in log_p[1:]:
            loss_of_columns, by_columns = _beside(other, target[:, None])
            loss, dz = loss.add_(loss_of_columns), dz.add_(by_columns.t())
        ctx.save_for_backward(z, target, dz)  # which frees them after the backward, where a loss is kept
        return loss.sum() * ctx.share

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        z, target, dz = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return dz * (upstream * ctx.share), *(None,) * (len(ctx.needs_input_grad) - 1)
        sides = (z, z.t())[: len(ctx.needs_input_grad) - 2]
        loss = torch.stack([softmax_rows(side, target).sum() for side in sides]).sum() * ctx.share
        by_z = torch.autograd.grad(loss, z, upstream, create_graph=True)[0]
        return by_z, *(None,) * (len(ctx.needs_input_grad) - 1)


class _Divergence(torch.autograd.Function):
    """The mean of the rows' divergences of the softmax of `number x` from that of `t`, or of both directions'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, number: float, symmetric: bool) -> Tensor:
        z = x if number == 1 else x * number
        loss, dz = _apart(z, t)
        if symmetric:
            loss_of_columns, by_columns = _apart(z.t(), t.t())
            loss, dz = loss.add_(loss_of_columns).mul_(0.5), dz.add_(by_columns.t())
        ctx.number, ctx.symmetric = number, symmetric
        ctx.save_for_backward(x, t, dz.mul_(number / (x.shape[0] * (1 + symmetric))))
        return loss.mean()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, t, dz = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return dz * upstream, None, None, None
        z = x * ctx.number
        sides = ((z, t), (z.t(), t.t()))[: 1 + ctx.symmetric]
        loss = -torch.stack([(b.softmax(1) * a.log_softmax(1)).sum(1).mean() for a, b in sides]).mean()
        return torch.autograd.grad(loss, x, upstream, create_graph=True)[0], None, None, None


def _apart(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The rows' divergences [M], and the gradient of their sum by `z`.

    `sum (q - p)`, which is 0 in exact arithmetic, cancels the rounding of the normalisers: equal logits have loss 0.
    """
    log_q, log_p = torch.log_softmax(z, 1), torch.log_softmax(t, 1)
    p = log_p.exp()
    dz = log_q.exp().sub_(p)
    return log_p.sub_(log_q).mul_(p).add_(dz).sum(1).clamp_min_(0), dz


class _Supervised(torch.autograd.Function):
    """The mean over rows with a positive of the mean over its positives of `-log p`, p without the row itself; and the
    largest `log p`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(NORM_EPS)
        unit = x / norm
        log_p = torch.log_softmax(torch.mm(unit, unit.t()).div_(temperature).fill_diagonal_(-math.inf), 1)
        share, counts = _shares(labels, x.dtype)
        largest = log_p.max()
        dz = log_p.exp().mul_(counts).sub_(share)
        loss = log_p.fill_diagonal_(0).mul_(share).sum().neg_()
        dx = _through_norm(unit, norm, torch.mm(dz.add(dz.t()).div_(temperature), unit))
        ctx.save_for_backward(x, labels, dx)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(largest)
        return loss, largest

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, labels, dx = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return dx * upstream, None, None
        unit, own = unit_rows(x), torch.eye(x.shape[0], dtype=torch.bool, device=x.device)
        log_p = (torch.mm(unit, unit.t()) / ctx.temperature).masked_fill(own, -math.inf).log_softmax(1)
        loss = -(log_p.masked_fill(own, 0) * _shares(labels, x.dtype)[0]).sum()
        return torch.autograd.grad(loss, x, upstream, create_graph=True)[0], None, None


def _shares(labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What each pair's logarithm weighs in the mean [N, N], and what a row's do in all [N, 1]."""
    positive = (labels[:, None] == labels).fill_diagonal_(False).to(dtype)
    number = positive.sum(1, keepdim=True)
    counts = (number > 0).to(dtype)
    counts.div_(counts.sum().clamp_min_(1))
    return positive.mul_(counts / number.clamp_min_(1)), counts


def _beside(log_p: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The rows' losses [M, 1], and the gradient of their sum by the logits.

    The target's probability leaves the row before the others are summed: `1 - p_t` would cancel on well-fitted pairs.
    """
    p = log_p.exp().scatter_(1, index, 0)
    rest = p.sum(1, keepdim=True)
    loss = softplus(rest.log().sub_(log_p.gather(1, index)), 1, 40.0)
    return loss, p.scatter_(1, index, rest.neg_())
