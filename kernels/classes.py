"""Rows of logits with a class, or a share of each class: a row's loss and its gradient.

One program folds a few rows over blocks of classes, with a running maximum, and walks them again for the gradient. Rows
are those of [N, C, S], with any strides: row r is n = r // S, s = r % S.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .rows import _log1p
from .softmax import exponential, finite
from .vectors import up

FP16_LARGEST = tl.constexpr(2.0**14)  # see fusedloss/rowwise/classes.py


class Sizes(NamedTuple):
    """The tile of a launch."""

    BLOCK_R: int
    BLOCK_C: int
    num_warps: int


def pick_sizes(C: int, S: int, *, interpreted: bool) -> Sizes:
    """Returns a tile of 16 elements a thread and pass. If rows are adjacent (S > 1), a warp reads 32 of them."""
    if interpreted:
        return Sizes(16, 32, 4)
    width = min(triton.next_power_of_2(C), 4096)
    if S > 1:
        width = min(width, 64)
        return Sizes(32, width, 4 if width > 16 else 2)
    rows = max(1, min(32, 1024 // width))  # 64 rows of 10 classes, in fp64 once a row, spilled
    return Sizes(rows, width, 8 if width == 4096 else 4)


@triton.jit
def class_rows_kernel(
    X,  # logits
    Target,  # [R] int64, within the classes
    LeftOut,  # [R] uint8 or None
    Weight,  # [C] or None: of the classes under smoothing
    Hard,  # [R], or None: `hard` for every row
    Smooth,
    Square,
    Loss,  # [R]
    Grad,  # or None
    Gain,  # [R] or None: factor of fp16 gradients
    hard,
    smooth,
    square,
    gamma,
    softcap,
    R,
    C,
    S,
    stride_xn,
    stride_xc,
    stride_xs,
    stride_gn,
    stride_gc,
    stride_gs,
    SMOOTHS: tl.constexpr,
    SQUARES: tl.constexpr,
    FOCAL: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDE: tl.constexpr,  # divides C and the rows' strides: see vectors.py
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """hard (1 - p_t)^gamma (-log p_t) - smooth sum_j w_j log p_j + square logsumexp^2."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = offs < R
    C, stride_xn, stride_gn = up(C, WIDE), up(stride_xn, WIDE), up(stride_gn, WIDE)
    base = offs // S * stride_xn + offs % S * stride_xs
    target = tl.load(Target + offs, mask=mask, other=0)
    own_z = tl.load(X + base + target * stride_xc, mask=mask, other=0.0).to(tl.float32)
    if CAPPED:
        own_z = softcap * _tanh(own_z / softcap)
    maximum = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    above = tl.zeros((BLOCK_R,), tl.float32)  # sum of w_j (z_j - z_t), so that only differences of two logits cancel
    weights = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, C, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        inside = mask[:, None] & (offs_c < C)[None, :]
        z = _load(X, base, offs_c, stride_xc, inside, float("-inf"))
        if CAPPED:
            z = softcap * _tanh(z / softcap)
        if SMOOTHS:
            w = _weights(Weight, offs_c, C, BLOCK_C)
            weights += w
            above += tl.sum(tl.where(inside, w[None, :] * (z - finite(own_z)[:, None]), 0.0), axis=1)
        z = tl.where(inside & (offs_c[None, :] != target[:, None]), z, float("-inf"))
        new = tl.maximum(maximum, tl.max(z, axis=1))
        part = tl.sum(exponential(z - finite(new)[:, None]), axis=1)
        total = total * exponential(maximum - finite(new)) + part
        maximum = new
    own_z = tl.where(own_z == float("inf"), float("nan"), own_z)  # inf - inf, as in torch
    shift = finite(tl.maximum(maximum, own_z))
    others, own = total * exponential(maximum - shift), exponential(own_z - shift)
    over_l = 1.0 / (others + own)
    s, p_t = others * over_l, own * over_l
    # fp64, once a row: the loss of a well-fitted row is this difference.
    difference = tl.log(total.to(tl.float64)) + (maximum.to(tl.float64) - own_z.to(tl.float64))
    nll = (tl.maximum(difference, 0.0) + _log1p(tl.exp(-tl.abs(difference)))).to(tl.float32)
    hard = _per_row(Hard, hard, offs, mask, BLOCK_R)
    loss = hard * nll
    if FOCAL:
        # At s = 0, -log p_t / s is 1; (1 - p_t)^gamma is 0.
        focus = tl.where(s == 0, 0.0, tl.exp2(gamma * tl.log2(s)))
        loss *= focus
        hard *= focus * (1 + gamma * p_t * tl.where(s == 0, 1.0, nll / s))
    rest = tl.zeros((BLOCK_R,), tl.float32)
    bound = tl.abs(hard)
    if SMOOTHS:
        smooth = _per_row(Smooth, smooth, offs, mask, BLOCK_R)
        weight_sum = tl.sum(weights, axis=0)
        loss += smooth * (weight_sum * nll - above)
        rest += smooth * weight_sum
        bound += tl.abs(rest)
    if SQUARES:
        lse = shift + tl.log((others + own).to(tl.float64)).to(tl.float32)
        square = _per_row(Square, square, offs, mask, BLOCK_R)
        loss += square * lse * lse
        rest += 2 * square * lse
        bound += tl.abs(2 * square * lse)
    left_out = tl.zeros((BLOCK_R,), tl.int1)
    if LeftOut is not None:
        left_out = tl.load(LeftOut + offs, mask=mask, other=0) != 0
    tl.store(Loss + offs, tl.where(left_out, 0.0, loss), mask=mask)
    if Grad is not None:
        entry = rest * p_t - hard * s
        over_l *= hard + rest
        grad_base = offs // S * stride_gn + offs % S * stride_gs
        gain = _store_gain(Gain, bound, offs, mask)
        for start in range(0, C, BLOCK_C):
            offs_c = start + tl.arange(0, BLOCK_C)
            inside = mask[:, None] & (offs_c < C)[None, :]
            z = _load(X, base, offs_c, stride_xc, inside, float("-inf"))
            if CAPPED:
                capped = _tanh(z / softcap)
                z = softcap * capped
            dz = exponential(z - shift[:, None]) * over_l[:, None]
            dz = tl.where(offs_c[None, :] == target[:, None], entry[:, None], dz)
            if SMOOTHS:
                dz -= smooth[:, None] * _weights(Weight, offs_c, C, BLOCK_C)[None, :]
            if CAPPED:
                dz *= 1 - capped * capped
            _store(Grad, grad_base, offs_c, stride_gc, inside, tl.where(left_out[:, None], 0.0, dz / gain[:, None]))


@triton.jit
def share_rows_kernel(
    X,  # logits
    Share,  # of each class, or logits whose softmax is the shares
    Mask,  # uint8 [R, C] or None
    Weight,  # [C] or None
    Loss,  # [R]
    Grad,  # or None
    Gain,  # [R] or None
    hard,
    smooth,
    square,
    softcap,
    R,
    C,
    S,
    stride_xn,
    stride_xc,
    stride_xs,
    stride_qn,
    stride_qc,
    stride_qs,
    stride_gn,
    stride_gc,
    stride_gs,
    stride_mr,
    stride_mc,
    SOFTMAX: tl.constexpr,  # Share is logits
    SMOOTHS: tl.constexpr,
    SQUARES: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDE: tl.constexpr,  # divides C and the rows' strides: see vectors.py
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """-sum_j (hard w_j q_j + smooth w_j) log p_j + square logsumexp^2, over the mask's entries."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = offs < R
    C, stride_xn, stride_gn = up(C, WIDE), up(stride_xn, WIDE), up(stride_gn, WIDE)
    base = offs // S * stride_xn + offs % S * stride_xs
    share_base = offs // S * up(stride_qn, WIDE) + offs % S * stride_qs
    mask_base = offs * up(stride_mr, WIDE)
    maximum = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    share_max = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    share_sum = tl.zeros((BLOCK_R,), tl.float32)
    weighed = tl.zeros((BLOCK_R,), tl.float32)  # sum of the multipliers of -log p_j
    bound = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, C, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        known = mask[:, None] & (offs_c < C)[None, :]
        inside = _inside(Mask, mask_base, known, offs_c, stride_mc)
        z = _load_where(X, base, offs_c, stride_xc, known, inside, float("-inf"))
        if CAPPED:
            z = softcap * _tanh(z / softcap)
        z = tl.where(inside, z, float("-inf"))
        new = tl.maximum(maximum, tl.max(z, axis=1))
        total = total * exponential(maximum - finite(new)) + tl.sum(exponential(z - finite(new)[:, None]), axis=1)
        maximum = new
        if SOFTMAX:
            q = _share_logits(Share, share_base, offs_c, stride_qc, known, inside)
            new = tl.maximum(share_max, tl.max(q, axis=1))
            part = tl.sum(exponential(q - finite(new)[:, None]), axis=1)
            share_sum = share_sum * exponential(share_max - finite(new)) + part
            share_max = new
        else:
            q = _load_where(Share, share_base, offs_c, stride_qc, known, inside, 0.0)
            c = hard * q
            if SMOOTHS:
                c += tl.where(inside, smooth, 0.0)
            c *= _weights(Weight, offs_c, C, BLOCK_C)[None, :]
            weighed += tl.sum(c, axis=1)
            bound += tl.sum(tl.abs(c), axis=1)
    shift = finite(maximum)
    log_l = tl.log(total.to(tl.float64)).to(tl.float32)
    share_shift, over_share = finite(share_max), 1.0 / share_sum
    if SOFTMAX:
        weighed, bound = weighed + 1, bound + 1
    rest = weighed
    loss = tl.zeros((BLOCK_R,), tl.float32)
    if SQUARES:
        lse = shift + log_l
        loss += square * lse * lse
        rest += 2 * square * lse
        bound += tl.abs(2 * square * lse)
    if Grad is not None:
        grad_base = offs // S * stride_gn + offs % S * stride_gs
        gain = _store_gain(Gain, 2 * bound, offs, mask)
    for start in range(0, C, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        known = mask[:, None] & (offs_c < C)[None, :]
        inside = _inside(Mask, mask_base, known, offs_c, stride_mc)
        z = _load_where(X, base, offs_c, stride_xc, known, inside, float("-inf"))
        if CAPPED:
            capped = _tanh(z / softcap)
            z = softcap * capped
        if SOFTMAX:
            q = _share_logits(Share, share_base, offs_c, stride_qc, known, inside)
            c = exponential(q - share_shift[:, None]) * over_share[:, None]
        else:
            c = hard * _load_where(Share, share_base, offs_c, stride_qc, known, inside, 0.0)
            if SMOOTHS:
                c += smooth
            c *= _weights(Weight, offs_c, C, BLOCK_C)[None, :]
        z -= shift[:, None]
        loss += tl.sum(tl.where(inside, c * (log_l[:, None] - z), 0.0), axis=1)
        if Grad is not None:
            dz = exponential(z) * (rest / total)[:, None] - c
            if CAPPED:
                dz *= 1 - capped * capped
            _store(Grad, grad_base, offs_c, stride_gc, known, tl.where(inside, dz / gain[:, None], 0.0))
    tl.store(Loss + offs, loss, mask=mask)


@triton.jit
def pair_logits_kernel(
    U,  # [B, D]
    V,
    Weight,  # [C, k D]: slices for those of u, v, |u - v|, u v that are used
    Bias,  # [C] or None
    Out,  # [B, C] fp32
    B,
    D,
    C,
    stride_ub,
    stride_ud,
    stride_vb,
    stride_vd,
    stride_wc,
    stride_wd,
    stride_ob,
    REP: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    MULTIPLICATION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    WIDE: tl.constexpr,  # divides D and the rows' strides: see vectors.py
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The logits of the concatenation [u; v; |u - v|; u v], whose parts exist only in registers."""
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = offs_b < B
    D, stride_ub, stride_vb, stride_wc = up(D, WIDE), up(stride_ub, WIDE), up(stride_vb, WIDE), up(stride_wc, WIDE)
    total = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        inside = rows[:, None] & (offs_d < D)[None, :]
        u = tl.load(U + offs_b[:, None] * stride_ub + offs_d[None, :] * stride_ud, mask=inside, other=0.0)
        v = tl.load(V + offs_b[:, None] * stride_vb + offs_d[None, :] * stride_vd, mask=inside, other=0.0)
        u, v = u.to(tl.float32), v.to(tl.float32)
        W = Weight + offs_c[None, :].to(tl.int64) * stride_wc + offs_d[:, None] * stride_wd
        known = (offs_d < D)[:, None] & (offs_c < C)[None, :]
        if REP:
            total = _dot(u, W, known, total, INPUT_PRECISION)
            W += D * stride_wd
            total = _dot(v, W, known, total, INPUT_PRECISION)
            W += D * stride_wd
        if DIFFERENCE:
            total = _dot(tl.abs(u - v), W, known, total, INPUT_PRECISION)
            W += D * stride_wd
        if MULTIPLICATION:
            total = _dot(u * v, W, known, total, INPUT_PRECISION)
    if Bias is not None:
        total += tl.load(Bias + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(Out + offs_b[:, None] * stride_ob + offs_c[None, :], total, mask=rows[:, None] & (offs_c < C)[None, :])


@triton.jit
def _dot(x, W, known, total, INPUT_PRECISION: tl.constexpr):
    w = tl.load(W, mask=known, other=0.0).to(tl.float32)
    return tl.dot(x, w, total, input_precision=INPUT_PRECISION)


@triton.jit
def _load(X, base, offs_c, stride, inside, other):
    return tl.load(X + base[:, None] + offs_c.to(tl.int64)[None, :] * stride, mask=inside, other=other).to(tl.float32)


@triton.jit
def _load_where(X, base, offs_c, stride, known, inside, other):
    """Loads what is known, and keeps what is inside: a load masked by an element is as narrow as an element."""
    return tl.where(inside, _load(X, base, offs_c, stride, known, other), other)


@triton.jit
def _share_logits(Share, base, offs_c, stride, known, inside):
    """Loads logits of shares in any dtype, with -inf for missing ones: integers have no -inf."""
    return tl.where(inside, _load(Share, base, offs_c, stride, known, 0), float("-inf"))


@triton.jit
def _store(X, base, offs_c, stride, inside, value):
    tl.store(X + base[:, None] + offs_c.to(tl.int64)[None, :] * stride, value.to(X.dtype.element_ty), mask=inside)


@triton.jit
def _inside(Mask, base, known, offs_c, stride):
    inside = known
    if Mask is not None:
        inside &= tl.load(Mask + base[:, None] + offs_c[None, :] * stride, mask=known, other=0) != 0
    return inside


@triton.jit
def _weights(Weight, offs_c, C, BLOCK_C: tl.constexpr):
    if Weight is None:
        return tl.where(offs_c < C, 1.0, 0.0)
    else:
        return tl.load(Weight + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)


@triton.jit
def _per_row(Values, value, offs, mask, BLOCK_R: tl.constexpr):
    if Values is None:
        return tl.full((BLOCK_R,), 1.0, tl.float32) * value
    else:
        return tl.load(Values + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_gain(Gain, bound, offs, mask):
    """Divides a row's gradient so that its largest entry fits fp16, and its small ones do not vanish."""
    if Gain is None:
        return tl.where(bound >= 0, 1.0, 1.0)
    else:
        gain = tl.where(bound == 0, 1.0, bound / FP16_LARGEST)
        tl.store(Gain + offs, gain, mask=mask)
        return gain


@triton.jit
def _tanh(x):
    """tanh without cancellation: a series up to 0.15, where its next term is a share of 6e-9."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 - square * 17 / 315)))
    e = exponential(-2 * tl.abs(x))
    return tl.where(tl.abs(x) < 0.15, series, tl.where(x < 0, -1.0, 1.0) * (1 - e) / (1 + e))
