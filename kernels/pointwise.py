"""Losses of elements in one pass: the loss, its sum by program, and the derivative by the prediction.

A formula is `(x, t, pos_weight, numbers) -> loss, derivative`, all in fp32; fusedloss/rowwise/pointwise.py has its
mathematics, with the same names.
"""

import triton
import triton.language as tl


@triton.jit
def pointwise_kernel(
    X,  # [n]
    T,  # [n]
    Weight,  # or None; element (i, j) of rows of `columns` elements at strides that may be 0
    PosWeight,  # likewise
    Kept,  # [n] or None: the derivative
    Losses,  # [n] or None
    Partial,  # [programs] or None: sums of the loss
    n,
    columns,
    stride_wr,
    stride_wc,
    stride_pr,
    stride_pc,
    value_factor,  # of Losses
    gain,  # of Kept
    numbers,  # of the formula: a tuple of floats
    FORMULA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    offs = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(X + offs, mask=mask, other=0.0).to(tl.float32)
    t = tl.load(T + offs, mask=mask, other=0.0).to(tl.float32)
    pos_weight = None
    if PosWeight is not None:
        place = offs // columns * stride_pr + offs % columns * stride_pc
        pos_weight = tl.load(PosWeight + place, mask=mask, other=0.0).to(tl.float32)
    loss, derivative = FORMULA(x, t, pos_weight, numbers)
    if Weight is not None:
        place = offs // columns * stride_wr + offs % columns * stride_wc
        weight = tl.load(Weight + place, mask=mask, other=0.0).to(tl.float32)
        loss *= weight
        derivative *= weight
    if Kept is not None:
        tl.store(Kept + offs, (derivative * gain).to(Kept.dtype.element_ty), mask=mask)
    if Losses is not None:
        tl.store(Losses + offs, (loss * value_factor).to(Losses.dtype.element_ty), mask=mask)
    if Partial is not None:
        tl.store(Partial + pid, tl.sum(tl.where(mask, loss, 0.0)))


@triton.jit
def times_kernel(Kept, Factor, Out, n, BLOCK: tl.constexpr):
    """Multiplies a 16-bit tensor by an fp32 scalar, in fp32."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    kept = tl.load(Kept + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(Out + offs, (kept * tl.load(Factor)).to(Out.dtype.element_ty), mask=mask)


@triton.jit
def squared(x, t, pos_weight, numbers):
    d = x - t
    slope = d * _side(d, numbers)
    return slope * d, slope


@triton.jit
def absolute(x, t, pos_weight, numbers):
    d = x - t
    slope = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0)) * _side(d, numbers)
    return tl.where(d == d, slope * d, d), slope


@triton.jit
def clamped(x, t, pos_weight, numbers):
    d = x - t
    delta = numbers[2]
    c = tl.clamp(d, -delta, delta, propagate_nan=tl.PropagateNan.ALL)
    slope = c * _side(d, numbers)
    return slope * (d - 0.5 * c), slope


@triton.jit
def _side(d, numbers):
    return tl.where(d < 0, numbers[0], numbers[1])


@triton.jit
def binary_cross_entropy(x, t, pos_weight, numbers):
    small, log, positive = _tails(x)
    a = t
    if pos_weight is not None:
        a = t * pos_weight
    b = 1 - t
    side = tl.where(positive, b, -a)
    both = 1.0
    if pos_weight is not None:
        both = a + b
    return side * x + both * log, side - both * tl.where(positive, small, -small)


@triton.jit
def focal(x, t, pos_weight, numbers):
    gamma, alpha, rest = numbers  # alpha is for label 1, rest for label 0
    small, log, positive = _tails(x)
    large = 1 - small
    p, not_p = tl.where(positive, large, small), tl.where(positive, small, large)
    # The maximum drops a NaN, but ce and the derivative are NaN anyway.
    q = tl.maximum(p * (1 - t) + not_p * t, 1.1754943508222875e-38)
    side = tl.where(positive, 1 - t, -t)
    ce = side * x + log
    power = tl.exp(gamma * tl.log(q)) * (alpha * t + rest * (1 - t))
    by_q = gamma * (small * large * (1 - 2 * t) / q) * ce
    return power * ce, power * (by_q + side - tl.where(positive, small, -small))


@triton.jit
def _tails(x):
    """Returns sigmoid(-|x|), log1p(exp(-|x|)) and whether x > 0. Kahan's logarithm is exact for small e."""
    e = tl.exp(-tl.abs(x))
    u = 1 + e
    log = tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1.0, u - 1)))
    return e / u, log, x > 0
