"""Losses of rows of logits with a class, or a share of each class: cross-entropy, focal loss, distilled scores.

With `p = softmax(z)` and target `t`, a row's loss is

    loss = hard (1 - p_t)^gamma (-log p_t) - smooth sum_j w_j log p_j + square logsumexp(z)^2

where `hard sum_j w_j q_j (-log p_j)` stands first if the target is a distribution `q`. The target stays out of the
sum `s = sum_{j != t} p_j`, as in `core/softmax.py`: `-log p_t = log(1 + s / p_t)`, and the target's entry of the
gradient is `-s`. A row's weight in a mean is part of `hard`, `smooth` and `square`, so that the walk computes the final
gradient of the loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import few, select_rowwise
from ..backends.triton import classes as triton_classes
from ..core import checks
from ..core.numerics import savable, slices, stats_dtype
from ..core.softmax import LIKELY, softmax_rows
from .pointwise import last_use, once_only, transformed

# Elements at a time on a CPU: with 2^18, starting threads made 2^20 and 2^23 elements take 10 to 60 % longer.
BLOCK = 1 << 20
# torch's log_softmax takes single steps along a last dimension of fewer classes than a vector has lanes: ten times the
# time, so there the classes go first and the rows are the vectors.
FEW_CLASSES = 16
FEW_ELEMENTS = 1 << 12  # up to this size the transposition takes longer
LEAST = 1e-30  # smallest probability with all its digits
FP16_LARGEST = 2.0**14  # of a row's saved gradient: numbers down to 2^-38 of that do not underflow

# One for all rows, or `[M]`, or `[N, S]` beside logits `[N, C, S]`.
PerRow = float | Tensor


def _counts(factor: Tensor | float) -> bool:
    """Whether a factor, of all rows or of each, may differ from 0."""
    return isinstance(factor, Tensor) or factor != 0


class Terms(NamedTuple):
    """The terms of a row's loss, for logits `[M, C]` or `[N, C, S]`; rows are `[M]` or `[N, S]`."""

    target: Tensor | None = None  # int64 per row, within the classes
    share: Tensor | None = None  # q, of the logits' shape
    weight: Tensor | None = None  # w, [C]
    left_out: Tensor | None = None  # bool per row: no loss and no gradient, for any logits
    hard: PerRow = 1.0
    smooth: PerRow = 0.0
    square: PerRow = 0.0
    gamma: float = 0.0
    softcap: float | None = None  # z = softcap tanh(x / softcap)

    @property
    def plain(self) -> bool:
        """Whether this is plain cross-entropy of classes, with every row counted alike."""
        return not (
            self.share is not None
            or self.weight is not None
            or self.left_out is not None
            or self.softcap is not None
            or isinstance(self.hard, Tensor)
            or self.gamma
            or self.smooths
            or self.squares
        )

    @property
    def smooths(self) -> bool:
        return _counts(self.smooth)

    @property
    def squares(self) -> bool:
        return _counts(self.square)

    def at(self, where: tuple[slice, ...]) -> Terms:
        """Returns the terms of a block of rows."""
        per_row = ("target", "left_out", "hard", "smooth", "square")
        values = {name: getattr(self, name) for name in per_row}
        part: dict[str, Any] = {n: v[where] for n, v in values.items() if isinstance(v, Tensor) and v.dim()}
        if self.share is not None:
            part["share"] = self.share[of_rows(where)]
        return self._replace(**part)


def of_rows(where: tuple[slice, ...]) -> tuple[slice, ...]:
    """Returns all classes of a block of rows."""
    return (*where[:1], slice(None), *where[1:])


def cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    empty: float = float("nan"),
    backend: str = "auto",
) -> Tensor:
    """Computes `torch.nn.functional.cross_entropy` of logits `[M, C]` or `[N, C, S]`, and classes or probabilities.

    A mean divides by the sum of its rows' class weights; `z_loss` counts rows. A mean of no rows is `empty`.
    """
    x, target, weight = savable(x), savable(target), None if weight is None else savable(weight)
    hard: PerRow = 1 - label_smoothing
    smooth: PerRow = label_smoothing / x.shape[1]
    square: PerRow = z_loss
    share = index = left_out = None
    total: Tensor | None = None  # sum of the class weights
    count: int | Tensor = x.numel() // x.shape[1]
    if target.dim() == x.dim():
        share = target
    else:
        index, left_out, outside, count = admitted(target, x.shape[1], ignore_index)
        if weight is not None:
            hard = weight.to(stats_dtype(x.dtype))[index]
            hard = hard if left_out is None else hard.masked_fill(left_out, 0)
            total, hard = hard.sum(), hard * (1 - label_smoothing)
        hard = _nan_outside(hard, outside, stats_dtype(x.dtype))
    none: bool | Tensor = False
    if reduction == "mean":
        none = count == 0 if total is None else total == 0
        count = count.clamp(min=1).to(stats_dtype(x.dtype)) if isinstance(count, Tensor) else max(count, 1)
        per = count if total is None else torch.where(total == 0, 1, total)
        hard, smooth, square = hard / per, smooth and smooth / per, square and square / count
    terms = Terms(index, share, weight, left_out, hard, smooth, square, softcap=softcap)
    found = loss(x, terms, reduced=reduction != "none", backend=backend)
    if isinstance(none, Tensor):
        return torch.where(none, empty, found)
    return found + empty if none else found  # without a gradient


def certain(x: Tensor, target: Tensor, ignore_index: int, reduction: str, backend: str) -> Tensor | None:
    """`cross_entropy` of `[M, C]` in fp32 or fp64 on a CPU, without options, in few calls.

    Few logits without a likely class run as torch's own operator, whose autograd is C++. None where this cannot run:
    rows left out or out of range, few classes of many rows, or another backend.
    """
    M, C = x.shape
    small = few(backend, x, "classes")
    if transformed() or M * C > BLOCK or not (small or select_rowwise(backend, x, "classes") == "chunked"):
        return None
    if small:
        log_p = torch.log_softmax(x, 1)
        if log_p.detach().max().item() < LIKELY:  # a NaN is not below
            try:
                own: Tensor = checks.OPERATORS.nll_loss_nd(log_p, target, None, checks.CODES[reduction], ignore_index)
                return own
            except IndexError:  # the long way's says which row
                return None
    # An error of the gather takes a millisecond.
    if 0 <= ignore_index < C or (C < FEW_CLASSES and M * C > FEW_ELEMENTS) or target.min().item() < 0:
        return None
    terms = Terms(target, hard=1 / M if reduction == "mean" else 1.0)
    try:
        if torch.is_grad_enabled() and x.requires_grad:
            return _Walk.apply(x, terms, _plain_block, reduction != "none")
        rows = _plain_block(x, terms, False)[0]
        return rows if reduction == "none" else rows.sum()
    except RuntimeError as error:
        if "out of bounds" not in str(error):
            raise
        return None  # the gather's: a class that does not exist, which the long way names


def focal_classes(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """`-alpha_t (1 - p_t)^gamma log p_t` (Lin et al. 2017) of `p = softmax(input)`, fp32 or fp64.

    input: `[M, C]` or `[N, C, d1, ...]`. target: int64, its shape without C. alpha: `[C]`. The mean counts the rows
    that are not ignored, and is 0 without any. 1 - p_t is the sum of the other probabilities: if p_t rounds to 1,
    neither the loss nor its gradient is 0, and a gamma below 1 does not divide by 0.
    """
    input, target, alpha = savable(input), savable(target), None if alpha is None else savable(alpha)
    rows = input.shape[:1] + input.shape[2:]
    x, target = (input, target) if input.dim() == 2 else (input.flatten(2), target.flatten(1))
    target, left_out, outside, count = admitted(target, x.shape[1], ignore_index)
    hard: PerRow = 1.0 if alpha is None else alpha.to(stats_dtype(x.dtype))[target]
    hard = _nan_outside(hard, outside, stats_dtype(x.dtype))
    if reduction == "mean":
        hard = hard / (count.clamp(min=1).to(stats_dtype(x.dtype)) if isinstance(count, Tensor) else max(count, 1))
    terms = Terms(target, left_out=left_out, hard=hard, gamma=gamma)
    found = loss(x, terms, reduced=reduction != "none", backend=backend)
    return found.reshape(rows) if reduction == "none" else found


def soft_cross_entropy_rows(
    logits: Tensor, target_logits: Tensor, mask: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """`-sum_j softmax(target_logits)_j log softmax(logits)_j` of each row of `[Q, n]`, over the entries of `mask`.

    A row without entries gives 0. Only the logits receive a gradient, and only it, `[Q, n]`, is kept.
    """
    backend = select_rowwise(backend, logits, "classes")
    target_logits, mask = savable(target_logits.detach()), None if mask is None else savable(mask)
    if backend == "reference" or transformed():
        return soft_formula(logits, target_logits, mask)
    walk = triton_classes.soft_rows if backend == "triton" else soft_chunked
    if torch.is_grad_enabled() and logits.requires_grad:
        return _Walk.apply(logits, (target_logits, mask), walk, False)
    return walk(logits, (target_logits, mask), False)[0]


def admitted(
    target: Tensor, columns: int, ignore_index: int
) -> tuple[Tensor, Tensor | None, Tensor | None, int | Tensor]:
    """Returns the target within the classes, left-out rows, rows out of range, and the number of rows not left out.

    If values may be read, a row out of range raises IndexError, and left-out rows are None if there are none, as in
    most batches.
    """
    reads = checks.reads_values(target) and target.numel() > 0 and not transformed()
    if reads:
        low, high = (int(end) for end in target.aminmax())
        if 0 <= low and high < columns and not low <= ignore_index <= high:
            return target, None, None, target.numel()
    left_out = target == ignore_index
    outside = ((target < 0) | (target >= columns)) & ~left_out
    count = target.numel() - left_out.sum()
    if not reads:
        return target.masked_fill(left_out | outside, 0), left_out, outside, count
    if bool(outside.any()):
        place = tuple(outside.nonzero()[0].tolist())
        raise IndexError(
            f"target[{', '.join(map(str, place))}] must be a class from 0 to {columns - 1}, or {ignore_index} to leave "
            f"the row out, got {int(target[place])}"
        )
    return target.masked_fill(left_out, 0), left_out, None, int(count)


def _nan_outside(hard: PerRow, outside: Tensor | None, dtype: torch.dtype) -> PerRow:
    return hard if outside is None else hard + outside.to(dtype).masked_fill(outside, torch.nan)


def loss(x: Tensor, terms: Terms, *, reduced: bool, backend: str) -> Tensor:
    """Returns the rows' losses, or their sum, in the statistics dtype."""
    backend = select_rowwise(backend, x, "classes")
    if (
        backend == "reference"
        or not x.numel()
        or transformed()  # a compiler fuses the formula, but would unroll a loop over blocks
        or (torch.is_grad_enabled() and any(_learns(t) for t in (terms.hard, terms.weight, terms.share)))
    ):
        rows = formula(x, terms)
        return rows.sum() if reduced else rows
    walk = triton_classes.rows if backend == "triton" else chunked
    if torch.is_grad_enabled() and x.requires_grad:
        return _Walk.apply(x, terms, walk, reduced)
    rows = walk(x, terms, False)[0]
    return rows.sum() if reduced else rows


def _learns(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


# Backend "reference" --------------------------------------------------------------------------------------------------


def formula(x: Tensor, terms: Terms) -> Tensor:
    """Returns each row's loss; differentiable by logits, class weights and shares."""
    shape = x.shape[:1] + x.shape[2:]
    z, C = x.to(stats_dtype(x.dtype)), x.shape[1]
    if terms.left_out is not None:
        z = z.masked_fill(terms.left_out.unsqueeze(1), 0)
    if terms.softcap is not None:
        z = terms.softcap * torch.tanh(z / terms.softcap)
    z = z.movedim(1, -1).reshape(-1, C)
    weight = z.new_ones(C) if terms.weight is None else terms.weight.to(z.dtype)
    if terms.share is not None:
        q = terms.share.to(z.dtype).movedim(1, -1).reshape(-1, C)
        first = -(weight * q * z.log_softmax(1)).sum(1)
    else:
        assert terms.target is not None
        first = softmax_rows(z, terms.target.reshape(-1))
        if terms.gamma:
            s = -torch.expm1(-first)
            first = s.masked_fill(s == 0, 1) ** terms.gamma * first  # first is 0 there, and 0^(gamma - 1) inf
    rows = terms.hard * first.reshape(shape)
    if _counts(terms.smooth):  # torch 2.10's compiler cannot trace properties of a NamedTuple
        rows = rows - terms.smooth * (weight * z.log_softmax(1)).sum(1).reshape(shape)
    if _counts(terms.square):
        rows = rows + terms.square * _logsumexp(z).square().reshape(shape)
    return rows if terms.left_out is None else rows.masked_fill(terms.left_out, 0)


def _logsumexp(z: Tensor) -> Tensor:
    """Keeps all digits of the gradient for large logits, for which torch's exp(z - logsumexp(z)) loses them."""
    shift = z.detach().amax(1, keepdim=True)
    shift = shift.masked_fill(shift.isinf(), 0)
    return (z - shift).logsumexp(1) + shift[:, 0]


def soft_formula(logits: Tensor, target_logits: Tensor, mask: Tensor | None) -> Tensor:
    dtype = stats_dtype(logits.dtype)
    log_q, log_p = (_log_softmax(t.to(dtype), mask) for t in (target_logits, logits))
    rows = -(log_q.exp() * log_p)
    return (rows if mask is None else rows.masked_fill(~mask, 0)).sum(1)


def _log_softmax(z: Tensor, mask: Tensor | None) -> Tensor:
    """Computes log_softmax over the mask's entries; finite for a row without any."""
    if mask is None:
        return z.log_softmax(1)
    return z.masked_fill(~mask & mask.any(1, keepdim=True), -torch.inf).log_softmax(1)


# Backend "chunked" ----------------------------------------------------------------------------------------------------


def chunked(x: Tensor, terms: Terms, wants_grad: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the rows' losses, the gradient of their sum by `x` in its dtype, and that gradient's factor per row."""
    # A few positions per row after the classes do not fill vectors either.
    narrow = x.shape[1] < FEW_CLASSES or (x.dim() == 3 and x.shape[2] < FEW_CLASSES)
    d = 0 if narrow and x.numel() > FEW_ELEMENTS else 1
    if x.numel() <= BLOCK or x.device.type != "cpu":
        return _block(x, terms, d, wants_grad)
    rows, dtype = x.shape[:1] + x.shape[2:], stats_dtype(x.dtype)
    loss = x.new_empty(rows, dtype=dtype)
    grad = x.new_empty(x.shape) if wants_grad else None
    gain = x.new_empty(rows, dtype=dtype) if wants_grad and x.dtype == torch.float16 else None
    for where in _blocks(x):
        full = of_rows(where)
        own = None if grad is None else grad[full]
        loss[where], _, part = _block(x[full], terms.at(where), d, wants_grad, own)
        if gain is not None and part is not None:
            gain[where] = part
    return loss, grad, gain


def _blocks(x: Tensor) -> Iterator[tuple[slice, ...]]:
    """Yields blocks of rows: along `M`; of `[N, C, S]` along N, and along S if one of N is too large."""
    N, C = x.shape[:2]
    if x.dim() == 2:
        yield from ((rows,) for rows in slices(N, max(1, BLOCK // C)))
        return
    S = x.shape[2]
    n, s = max(1, BLOCK // (C * S)), max(FEW_CLASSES, BLOCK // C)
    yield from itertools.product(slices(N, n), slices(S, s))


def _block(
    x: Tensor, terms: Terms, d: int, wants_grad: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Computes `chunked` for rows that fit the caches. The gradient is written to `out`, if given.

    d: the dimension of the classes inside the block.
    """
    dtype = stats_dtype(x.dtype)
    if d and terms.plain and x.dtype == dtype:
        return _plain_block(x, terms, wants_grad, out)
    if d == 0:
        x, out = x.movedim(1, 0), None if out is None else out.movedim(1, 0)
    z = x if d and x.dtype == dtype else _copied(x, dtype)
    if terms.softcap is not None:
        capped = torch.tanh(z / terms.softcap)
        z = terms.softcap * capped
    weight = None if terms.weight is None else terms.weight.to(dtype).view(-1, *(1,) * (x.dim() - 1 - d))
    log_p = torch.log_softmax(z, d) if terms.smooths or terms.share is not None else None
    cost, factor = _beside_the_target(z, log_p, terms, weight, d)
    if terms.share is None:
        loss, p = _hard_target(z, log_p, terms, factor, d, wants_grad, out)
    else:
        assert log_p is not None
        loss, p = _share(log_p, terms, weight, factor, d, wants_grad)
    if cost is not None:
        loss = loss + cost
    left_out = _beside(terms.left_out, d)
    if left_out is not None:
        loss.masked_fill_(left_out, 0)
    loss = loss.squeeze(d)
    if not wants_grad:
        return loss, None, None
    if terms.smooths:
        smooth = _beside(terms.smooth, d)
        p.sub_(smooth if weight is None else smooth * weight)
    if terms.softcap is not None:
        p.mul_(1 - capped.square())
    if left_out is not None:
        p.masked_fill_(left_out, 0)
    gain = _take_gain(p, d) if x.dtype == torch.float16 else None
    if out is None:
        out = p if d and p.dtype == x.dtype else torch.empty_like(x)
    if out is not p:
        out.copy_(p)
    return loss, (out if d else out.movedim(0, 1)), gain


def _plain_block(
    x: Tensor, terms: Terms, wants_grad: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Computes a block of the common case, a hard target and no option, in as few calls as possible."""
    p, target, _, s, loss = _without_target(x, torch.softmax, terms.target, 1, out)
    if wants_grad:
        p.scatter_(1, target, s.neg_())
    if terms.hard != 1:
        hard = loss.new_full((), terms.hard)  # type: ignore[arg-type]  # plain: it is a number
        loss.mul_(hard)
        if wants_grad:
            p.mul_(hard)
    if wants_grad and out is not None and p is not out:
        p = out.copy_(p)
    return loss.squeeze(1), p if wants_grad else None, None


def _beside_the_target(z: Tensor, log_p: Tensor | None, terms: Terms, weight: Tensor | None, d: int) -> tuple[Any, Any]:
    """Returns what z_loss and smoothing add to the loss, and their factor of p in the gradient; None for neither."""
    cost: Any = None
    factor: Any = None
    if terms.squares:
        square, lse = _beside(terms.square, d), torch.logsumexp(z, d, keepdim=True)
        cost, factor = square * lse.square(), 2 * square * lse
    if terms.smooths:
        assert log_p is not None
        smooth = _beside(terms.smooth, d)
        own = smooth * (log_p if weight is None else log_p * weight).sum(d, keepdim=True)
        total = smooth * (z.shape[d] if weight is None else weight.sum())
        cost = -own if cost is None else cost - own
        factor = total if factor is None else factor + total
    return cost, factor


def _share(
    log_p: Tensor, terms: Terms, weight: Tensor | None, factor: Any, d: int, wants_grad: bool
) -> tuple[Tensor, Tensor]:
    """Returns the loss of targets that are shares, and the gradient by z but for the smoothing's own entry."""
    assert terms.share is not None
    hard = _beside(terms.hard, d)
    q = (terms.share if d else terms.share.movedim(1, 0)).to(log_p.dtype)
    q = q if weight is None else q * weight
    loss = (q * log_p).sum(d, keepdim=True).mul_(-hard)
    p = log_p.exp_()
    if wants_grad:
        total = hard * q.sum(d, keepdim=True)
        p.mul_(total if factor is None else total + factor)
        p = p.addcmul_(hard, q, value=-1) if isinstance(hard, Tensor) else p.sub_(q, alpha=hard)
    return loss, p


def _hard_target(
    z: Tensor, log_p: Tensor | None, terms: Terms, factor: Any, d: int, wants_grad: bool, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns the loss of targets that are one class each, focal or not, and the gradient as `_share` does."""
    hard: Any = _beside(terms.hard, d)
    softmax = torch.softmax if log_p is None else (lambda *_, **__: log_p.exp_())
    p, target, p_t, s, loss = _without_target(z, softmax, terms.target, d, out)
    if terms.gamma:
        # At s = 0, -log p_t / s is 1, and so is 0^0.
        slope = (loss / s).masked_fill_(s == 0, 1).mul_(p_t).mul_(terms.gamma).add_(1)
        focus = s**terms.gamma
        loss, hard = loss * focus * hard, hard * focus * slope
    else:
        loss.mul_(hard)
    if wants_grad and factor is None:
        p.scatter_(d, target, s.neg_()).mul_(hard)
    elif wants_grad:
        p.mul_(hard + factor).scatter_(d, target, factor * p_t - hard * s)
    return loss, p


def _without_target(
    z: Tensor, softmax: Callable[..., Tensor], target: Tensor | None, d: int, out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns p with 0 at the target, the target's place, p_t, s and -log p_t. p is in `out` if that fits."""
    assert target is not None
    if out is not None and out.dtype == z.dtype and out.is_contiguous():
        p = softmax(z, d, out=out)
    else:
        p = softmax(z, d)
    target = target.unsqueeze(d)
    p_t = p.gather(d, target)
    p.scatter_(d, target, 0)
    s = p.sum(d, True)
    loss = (s / p_t).log1p_()
    s.div_(s + p_t)  # removes an error common to all shares: for equal logits the gradient's error was twice torch's
    # If p_t has lost its digits, log p_t is computed with s = 1. This is rare, so a CPU tests for it first.
    if z.device.type != "cpu" or not p_t.amin().item() > LEAST:
        # For an infinite logit p_t is NaN, and the loss stays NaN.
        loss = torch.where(p_t <= LEAST, torch.logsumexp(z, d, keepdim=True) - z.gather(d, target), loss)
    return p, target, p_t, s, loss


def soft_chunked(
    logits: Tensor, beside: tuple[Tensor, Tensor | None], wants_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns `soft_formula`, its gradient p - q, and that gradient's factor."""
    target_logits, mask = beside
    dtype = stats_dtype(logits.dtype)
    loss = logits.new_empty(logits.shape[0], dtype=dtype)
    grad = logits.new_empty(logits.shape) if wants_grad else None
    gain = loss.new_empty(loss.shape) if wants_grad and logits.dtype == torch.float16 else None
    step = max(1, BLOCK // max(1, logits.shape[1])) if logits.device.type == "cpu" else max(1, len(logits))
    for rows in slices(logits.shape[0], step):
        own = None if mask is None else mask[rows]
        log_q, log_p = (_log_softmax(t[rows].to(dtype), own) for t in (target_logits, logits))
        q = log_q.exp_()
        cost = q * log_p
        torch.sum(cost if own is None else cost.masked_fill_(~own, 0), 1, out=loss[rows])
        if grad is not None:
            p = log_p.exp_().sub_(q)
            p = p if own is None else p.masked_fill_(~own, 0)
            if gain is not None:
                gain[rows] = _take_gain(p, 1)
            grad[rows] = p
    return loss.neg_(), grad, gain


def _take_gain(grad: Tensor, d: int) -> Tensor:
    """Divides each row's gradient in place, so that fp16 holds it; returns the factor that undoes this."""
    gain = grad.abs().amax(d, keepdim=True).div_(FP16_LARGEST)
    gain.masked_fill_(gain == 0, 1)
    grad.div_(gain)
    return gain.squeeze(d)


def _beside(value: PerRow | None, d: int) -> Any:
    """Returns a number per row with one more dimension, for the classes."""
    return value.unsqueeze(d) if isinstance(value, Tensor) and value.dim() else value


def _copied(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a contiguous copy in `dtype`."""
    out = x.new_empty(x.shape, dtype=dtype)
    # copy_ transposes in tiles of 60 x 60 on one thread, which takes four times as long if one side is under 16.
    return torch.mul(x, 1, out=out) if x.dtype == dtype else out.copy_(x)


# The gradient ---------------------------------------------------------------------------------------------------------


class _Walk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, terms: Any, walk: Callable[..., Any], reduced: bool) -> Tensor:
        loss, grad, gain = walk(x, terms, True)
        ctx.reduced = reduced
        ctx.save_for_backward(grad, gain)
        return loss.sum() if reduced else loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        once_only()
        grad, gain = ctx.saved_tensors
        return scaled(grad, upstream if ctx.reduced else upstream.unsqueeze(1), gain), None, None, None


def scaled(grad: Tensor, upstream: Tensor, gain: Tensor | None = None) -> Tensor:
    """Returns `grad * upstream`, times `gain` per row, rounded once."""
    if gain is not None:
        upstream = upstream * gain.unsqueeze(1)
    if not upstream.dim():
        # If upstream is 1, as after a plain backward(), the product is skipped: a CPU tests for it, because the product
        # costs a third. Not if the graph is kept, because the next backward pass reads this tensor again.
        unscaled = upstream.device.type == "cpu" and last_use(upstream) and upstream.item() == 1
        return grad if unscaled else grad * upstream
    if grad.dtype == upstream.dtype:
        return grad * upstream
    out = torch.empty_like(grad)
    rows = max(1, BLOCK * grad.shape[0] // max(1, grad.numel())) if grad.device.type == "cpu" else max(1, len(grad))
    for part, own, factor in zip(out.split(rows), grad.split(rows), upstream.split(rows), strict=True):
        part.copy_(own * factor)
    return out
