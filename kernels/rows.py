"""Computations once per row, besides the similarity GEMM: each kernel replaces a dozen small ones.

Sizes here are M x D and M x n_tiles. Scores of targets and losses are fp64: this is O(M) work, and a well-fitted pair's
loss is the difference of these numbers.
"""

import triton
import triton.language as tl

from .softmax import finite
from .vectors import up

# maths.md: Margin; Softcap; Online log-sum-exp; Settle; Symmetric; Contraction
# Rows shorter than this are divided by it, as in torch.nn.functional.normalize.
NORM_EPS = tl.constexpr(1e-12)
FP32_EPS = tl.constexpr(2.0**-23)


@triton.jit
def prepare_kernel(
    X,  # [M, D] or None
    Y,  # [N, D]
    Target,  # [M] int64 or None
    RowFactor,  # [M] or None: 1 / |x_i|
    ColFactor,  # [N] or None: 1 / |y_j|
    Scale,  # 0-dim
    Bias,  # [N] or None
    Score,  # [M] fp64 or None: the target's logit
    TargetSim,  # [M] or None: row_factor_i * col_factor_t * <x_i, y_t>
    Slope,  # [M] or None: derivative of the score by its `scale * sim`
    M,
    N,
    D,
    stride_xm,
    stride_yn,
    SOFTCAP: tl.constexpr,  # or None
    MARGIN: tl.constexpr,  # angle, its sine and cosine, and the amount subtracted from a cosine; or None
    WIDE: tl.constexpr,  # divides D and the strides: see vectors.py
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Numbers that scores depend on are constants, because an argument would be rounded to fp32.
    D, stride_xm, stride_yn = up(D, WIDE), up(stride_xm, WIDE), up(stride_yn, WIDE)
    offs = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    if X is not None:
        mask = offs < M
        x_squared = tl.zeros((BLOCK_R,), tl.float32)
        if Score is not None:
            target = tl.load(Target + offs, mask=mask, other=0)
            none = target < 0
            target = tl.maximum(target, 0)
            t_squared = tl.zeros((BLOCK_R,), tl.float32)
            dot = tl.zeros((BLOCK_R,), tl.float64)
            x_exact = tl.zeros((BLOCK_R,), tl.float64)
            t_exact = tl.zeros((BLOCK_R,), tl.float64)
            for start in range(0, D, BLOCK_D):
                x = _load(X, offs, stride_xm, start, D, mask, BLOCK_D)
                t = _load(Y, target, stride_yn, start, D, mask, BLOCK_D)
                x_squared += tl.sum(x * x, axis=1)
                t_squared += tl.sum(t * t, axis=1)
                dot += tl.sum(x.to(tl.float64) * t.to(tl.float64), axis=1)
                if MARGIN is not None:
                    x_exact += tl.sum(x.to(tl.float64) * x.to(tl.float64), axis=1)
                    t_exact += tl.sum(t.to(tl.float64) * t.to(tl.float64), axis=1)
            if MARGIN is not None:
                # An angle is the root of a difference, so rounded factors would cost half its digits.
                dot /= tl.maximum(tl.sqrt(x_exact), NORM_EPS, propagate_nan=tl.PropagateNan.ALL)
                dot /= tl.maximum(tl.sqrt(t_exact), NORM_EPS, propagate_nan=tl.PropagateNan.ALL)
            elif RowFactor is not None:
                # The same factors as in the tile, with the same rounding.
                dot *= _inverse_norm(x_squared, X).to(tl.float64)
                dot *= _inverse_norm(t_squared, X).to(tl.float64)
            dot = tl.where(none, 0.0, dot)
            if TargetSim is not None:
                tl.store(TargetSim + offs, dot.to(tl.float32), mask=mask)
            if MARGIN is not None:
                dot, slope = _marginal(dot, MARGIN)
            score = dot * tl.load(Scale).to(tl.float64)
            if Bias is not None:
                score += tl.load(Bias + target, mask=mask, other=0.0).to(tl.float64)
            if SOFTCAP is not None:
                score = SOFTCAP * _tanh(score / SOFTCAP)
                bend = 1 - (score / SOFTCAP) * (score / SOFTCAP)
                slope = bend if MARGIN is None else bend * slope
            tl.store(Score + offs, score, mask=mask)
            if Slope is not None:
                tl.store(Slope + offs, slope.to(tl.float32), mask=mask)
        else:
            for start in range(0, D, BLOCK_D):
                x = _load(X, offs, stride_xm, start, D, mask, BLOCK_D)
                x_squared += tl.sum(x * x, axis=1)
        if RowFactor is not None:
            tl.store(RowFactor + offs, _inverse_norm(x_squared, X), mask=mask)
    if ColFactor is not None:
        mask = offs < N
        y_squared = tl.zeros((BLOCK_R,), tl.float32)
        for start in range(0, D, BLOCK_D):
            y = _load(Y, offs, stride_yn, start, D, mask, BLOCK_D)
            y_squared += tl.sum(y * y, axis=1)
        tl.store(ColFactor + offs, _inverse_norm(y_squared, Y), mask=mask)


@triton.jit(do_not_specialize=["n_tiles"])
def merge_kernel(
    Max,  # [n_tiles, R]
    Sum,
    RunningMax,  # [R]: updated in place
    RunningSum,
    n_tiles,
    R,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Adds a table of partial sums to the running ones; columns get one per chunk."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = offs < R
    maximum, total = _merged(Max, Sum, n_tiles, R, offs, mask, BLOCK_R, BLOCK_T)
    old_total = tl.load(RunningSum + offs, mask=mask, other=0.0)
    # An empty sum has any maximum: 0 would bury sums relative to exp(-100).
    old = tl.where(old_total == 0, float("-inf"), tl.load(RunningMax + offs, mask=mask, other=0.0))
    new = tl.maximum(maximum, old)
    total = total * tl.exp(maximum - finite(new)) + old_total * tl.exp(old - finite(new))
    tl.store(RunningMax + offs, new, mask=mask)
    tl.store(RunningSum + offs, total, mask=mask)


@triton.jit(do_not_specialize=["n_tiles"])
def settle_kernel(
    Max,  # [n_tiles, R], or None: all sums are relative to exp(shift)
    Sum,  # [n_tiles, R]
    shift,
    Score,  # [R] fp64, the target's logit
    Weight,  # [R]
    label_smoothing,
    copies,  # number of times that the target is in l
    z_loss,  # or None
    Shift,  # [R] outputs: the row's shift, or None
    OverL,  # weight / l
    Entry,  # the target's entry of the gradient
    Loss,  # weight * loss, or None
    Out,  # the workspace whose target entries are patched, or None
    Target,
    RowFactor,
    ColFactor,
    xs,  # matrices [R, D] and their copies multiplied by over_l
    scaled,
    n_tiles,
    R,
    D,
    stride_om,
    strides,  # of xs and of scaled
    Smooth,  # [R] or None: subtracted from every admissible entry by smoothing
    Slope,  # [R] or None: factor of the target's entry
    RELATIVE: tl.constexpr,  # entries are relative to over_l
    DECOUPLED: tl.constexpr,  # the target stays out of l
    WIDE: tl.constexpr,  # divides D and `strides`: see vectors.py
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Turns partial sums into the loss, weight / l, the target's entry and the scaled operands of dy."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = offs < R
    score = tl.load(Score + offs, mask=mask, other=0.0)
    score = tl.where(score.to(tl.float32) == float("inf"), float("nan"), score)
    weight = tl.load(Weight + offs, mask=mask, other=0.0)
    if Max is not None:
        maximum, total = _merged(Max, Sum, n_tiles, R, offs, mask, BLOCK_R, BLOCK_T)
        row_shift = finite(maximum)
    else:
        total = _summed(Sum, n_tiles, R, offs, mask, BLOCK_R, BLOCK_T)
        row_shift = tl.full((BLOCK_R,), shift, tl.float32)
    # For a row without negatives, 1 / l is 1 and not exp(-score).
    row_shift = tl.where(total == 0, score.to(tl.float32), row_shift)
    above = score - row_shift.to(tl.float64)
    # Bounded: see core/rows.py.
    most = tl.where((label_smoothing > 0) | (z_loss is not None), 80.0, 88.0)
    if DECOUPLED:
        l = total
        weight = tl.where(total == 0, 0.0, weight)
    else:
        l = total + copies * tl.exp(tl.minimum(above, most, propagate_nan=tl.PropagateNan.ALL)).to(tl.float32)
    if (Loss is not None) | (z_loss is not None):
        positive = total > 0
        log_total = tl.log(tl.where(positive, total, 1.0).to(tl.float64))
        # log(copies + exp(difference)); a NaN total stays, and a NaN target, also of a row without negatives.
        log_total = tl.where(positive, log_total, total.to(tl.float64))
        difference = tl.where(total == 0, float("-inf"), log_total) - above
        if DECOUPLED:
            loss = difference
        else:
            floor = tl.log(tl.full((BLOCK_R,), 1.0, tl.float64) * copies)
            loss = tl.maximum(difference, floor) + _log1p(tl.exp(-tl.abs(difference - floor)))
        loss = tl.where(difference == difference, loss, difference)  # maxima drop NaN
    spread = label_smoothing
    if z_loss is not None:
        lse = (score + loss).to(tl.float32)
        spread += 2 * z_loss * lse
        l /= 1 + 2 * z_loss * lse
        loss += z_loss * (lse * lse)
    over_l = tl.where(weight == 0, 0.0, weight / l)
    if Shift is not None:
        tl.store(Shift + offs, row_shift, mask=mask)
    if OverL is not None:
        tl.store(OverL + offs, over_l, mask=mask)
    if Loss is not None:
        tl.store(Loss + offs, tl.where(weight == 0, 0.0, weight * loss.to(tl.float32)), mask=mask)
    if Entry is not None or Out is not None:
        if RELATIVE:
            entry = spread * l - total
        else:
            entry = spread * weight - over_l * total
        if Smooth is not None:
            entry -= tl.load(Smooth + offs, mask=mask, other=0.0)
        if Slope is not None:
            entry *= tl.load(Slope + offs, mask=mask, other=0.0)
        entry = tl.where(weight == 0, 0.0, entry)
        if Entry is not None:
            tl.store(Entry + offs, entry, mask=mask)
        if Out is not None:
            target = tl.load(Target + offs, mask=mask, other=-1)
            hit = mask & (target >= 0)
            if RowFactor is not None:
                entry *= tl.load(RowFactor + offs, mask=hit, other=0.0)
                entry *= tl.load(ColFactor + target, mask=hit, other=0.0)
            tl.store(Out + offs * stride_om + target, entry.to(Out.dtype.element_ty), mask=hit)
    for number in tl.static_range(len(xs)):
        stride, scaled_stride = up(strides[2 * number], WIDE), up(strides[2 * number + 1], WIDE)
        for start in range(0, D, BLOCK_D):
            x = _load(xs[number], offs, stride, start, up(D, WIDE), mask, BLOCK_D) * over_l[:, None]
            _store(scaled[number], offs, scaled_stride, start, up(D, WIDE), mask, x, BLOCK_D)


@triton.jit
def weigh_kernel(
    Out,  # [R, N]: exponentials times both factors, made the gradient in place
    RowWeight,  # [R]
    ColWeight,  # [N]
    Entry,  # [R]
    Target,
    RowFactor,
    ColFactor,
    R,
    N,
    stride_om,
    WIDE: tl.constexpr,  # divides the stride; up to a multiple of it a row may be written
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes dz = E (w_i / l_i + w_j / l_j) from E, which was stored until both normalisers were known."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = offs < R
    row_weight = tl.load(RowWeight + offs, mask=mask, other=0.0)
    target = tl.load(Target + offs, mask=mask, other=-1)
    entry = tl.load(Entry + offs, mask=mask, other=0.0)
    if RowFactor is not None:
        entry *= tl.load(RowFactor + offs, mask=mask, other=0.0)
        entry *= tl.load(ColFactor + target, mask=mask & (target >= 0) & (target < N), other=0.0)
    stride_om = up(stride_om, WIDE)
    for start in range(0, N, BLOCK_D):
        offs_n = start + tl.arange(0, BLOCK_D)
        col_weight = tl.load(ColWeight + offs_n, mask=offs_n < N, other=0.0)
        dz = _load(Out, offs, stride_om, start, up(N, WIDE), mask, BLOCK_D)
        dz *= row_weight[:, None] + col_weight[None, :]
        dz = tl.where(offs_n[None, :] == target[:, None], entry[:, None], dz)
        _store(Out, offs, stride_om, start, up(N, WIDE), mask, dz, BLOCK_D)


@triton.jit(do_not_specialize=["R"])
def finish_kernel(
    Sum,  # [R, D] fp32
    OverL,  # [R] or None
    Scale,  # 0-dim
    Gain,  # 0-dim or None
    X,  # [R, D], or None: no norms
    Factor,  # [R]
    Out,  # [R, D]; may be Sum
    R,
    D,
    stride_sm,
    stride_xm,
    stride_om,
    WIDE: tl.constexpr,  # divides D and the strides: see vectors.py
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Applies what the products leave out: 1 / l, the scale, the gain, and the projection through the norms.

    The gradient with 1 / norms held fixed becomes the one through them: dx -= f^2 <dx, x> x.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = offs < R
    D, stride_sm, stride_xm, stride_om = up(D, WIDE), up(stride_sm, WIDE), up(stride_xm, WIDE), up(stride_om, WIDE)
    multiplier = tl.full((BLOCK_R,), 1.0, tl.float32) * tl.load(Scale)
    if Gain is not None:
        multiplier /= tl.load(Gain)
    if OverL is not None:
        multiplier *= tl.load(OverL + offs, mask=mask, other=0.0)
    along = tl.zeros((BLOCK_R,), tl.float32)
    if X is not None:
        for start in range(0, D, BLOCK_D):
            dx = _load(Sum, offs, stride_sm, start, D, mask, BLOCK_D) * multiplier[:, None]
            along += tl.sum(dx * _load(X, offs, stride_xm, start, D, mask, BLOCK_D), axis=1)
        factor = tl.load(Factor + offs, mask=mask, other=0.0)
        # A row shorter than NORM_EPS is divided by a constant, so there is no projection.
        along *= tl.where(factor >= 1 / NORM_EPS, 0.0, factor * factor)
    for start in range(0, D, BLOCK_D):
        dx = _load(Sum, offs, stride_sm, start, D, mask, BLOCK_D) * multiplier[:, None]
        if X is not None:
            dx -= along[:, None] * _load(X, offs, stride_xm, start, D, mask, BLOCK_D)
        _store(Out, offs, stride_om, start, D, mask, dx, BLOCK_D)


@triton.jit
def _load(X, rows, stride, start, D, mask, BLOCK_D: tl.constexpr):
    """Loads an fp32 tile [BLOCK_R, BLOCK_D]."""
    offs_d = start + tl.arange(0, BLOCK_D)
    inside = mask[:, None] & (offs_d < D)[None, :]
    return tl.load(X + rows[:, None] * stride + offs_d[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(X, rows, stride, start, D, mask, value, BLOCK_D: tl.constexpr):
    offs_d = start + tl.arange(0, BLOCK_D)
    inside = mask[:, None] & (offs_d < D)[None, :]
    tl.store(X + rows[:, None] * stride + offs_d[None, :], value.to(X.dtype.element_ty), mask=inside)


@triton.jit
def _inverse_norm(squared, X):
    if X.dtype.element_ty == tl.float16:
        squared = tl.where(squared == 0, 1.0, squared)  # see core/numerics.py
    return 1.0 / tl.maximum(tl.sqrt_rn(squared), NORM_EPS, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _merged(Max, Sum, n_tiles, R, offs, mask, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr):
    """Merges maxima and sums of exp(z - maximum) of all tiles, in a fixed order. A maximum may be -inf."""
    maximum = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, n_tiles, BLOCK_T):
        tiles = start + tl.arange(0, BLOCK_T)
        place = tiles.to(tl.int64)[:, None] * R + offs[None, :]
        inside = (tiles < n_tiles)[:, None] & mask[None, :]
        tile_max = tl.load(Max + place, mask=inside, other=float("-inf"))
        tile_sum = tl.load(Sum + place, mask=inside, other=0.0)
        new = tl.maximum(maximum, tl.max(tile_max, axis=0))
        part = tl.sum(tile_sum * tl.exp(tile_max - finite(new)[None, :]), axis=0)
        total = total * tl.exp(maximum - finite(new)) + part
        maximum = new
    return maximum, total


@triton.jit
def _summed(Sum, n_tiles, R, offs, mask, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr):
    total = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, n_tiles, BLOCK_T):
        tiles = start + tl.arange(0, BLOCK_T)
        place = tiles.to(tl.int64)[:, None] * R + offs[None, :]
        inside = (tiles < n_tiles)[:, None] & mask[None, :]
        total += tl.sum(tl.load(Sum + place, mask=inside, other=0.0), axis=0)
    return total


@triton.jit
def _marginal(cosine, MARGIN: tl.constexpr):
    """The target's cosine less its margin, and the derivative by it: `marginal` in core/softmax.py."""
    ANGLE: tl.constexpr = MARGIN[0]
    SIN: tl.constexpr = MARGIN[1]
    COS: tl.constexpr = MARGIN[2]
    square = (1 - cosine) * (1 + cosine)
    apart = square > FP32_EPS
    sine = tl.sqrt(tl.maximum(square, 0.0))
    beyond = cosine < -COS
    value = tl.where(beyond, cosine - ANGLE * SIN, cosine * COS - sine * SIN)
    slope = tl.where(beyond, 1.0, COS + tl.where(apart, cosine / tl.where(apart, sine, 1.0), 0.0) * SIN)
    return value - MARGIN[3], slope


@triton.jit
def _tanh(x):
    """tanh in fp64, with an absolute error of 1e-16."""
    e = tl.exp(-2 * tl.abs(x))
    return tl.where(x < 0, e - 1, 1 - e) / (1 + e)


@triton.jit
def _log1p(x):
    """log1p in fp64, to fp32's precision down to the smallest x: log(1 + x) alone loses x below 1e-16."""
    return tl.where(x < 1e-6, x - 0.5 * x * x, tl.log(1 + x))
