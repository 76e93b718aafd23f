"""Losses of a query's documents: pairs in tiles, or a whole list in one program.

fusedloss/rowwise/lists.py has the maths in torch, under the same names. In pair kernels a program has a block of
documents i and visits all documents j: each pair is visited from both sides, and programs add nothing to each other.
"""

import triton
import triton.language as tl

from .softmax import finite


@triton.jit
def log1p(x):
    """log1p for 0 <= x <= 1 (Kahan): log(1 + x) alone loses x below 6e-8."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit(do_not_specialize=["top"])
def lambda_kernel(
    Z,  # [Q, n], scores times sigma, the highest first and padding last
    Value,  # [Q, n]: gains, labels for RankNet, or gain / discount for NDCG-Loss1 (OWN)
    Length,  # int64 [Q], or None: n documents
    High,  # [n] or None: 1 / discount, its fp32 part and the rest: differences of neighbours cancel in fp32
    Low,
    Near,  # [n] or None: the weight by the distance of positions
    Loss,  # [Q, blocks]
    Gradient,  # [Q, n] or None
    n,
    top,
    OWN: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    q = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_I
    i = first + tl.arange(0, BLOCK_I)
    length = n
    if Length is not None:
        length = tl.load(Length + q).to(tl.int32)
    z_i = tl.load(Z + q * n + i, mask=i < n, other=0.0)[:, None]
    v_i = tl.load(Value + q * n + i, mask=i < n, other=0.0)[:, None]
    last = tl.where(first < top, length, tl.minimum(length, top))
    loss = tl.zeros((BLOCK_I,), tl.float32)
    gradient = tl.zeros((BLOCK_I,), tl.float32)
    for start in range(0, last, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        z_j = tl.load(Z + q * n + j, mask=j < n, other=0.0)[None, :]
        v_j = tl.load(Value + q * n + j, mask=j < n, other=0.0)[None, :]
        # Weights of "i should be above j" and of the reverse.
        if OWN:
            win = v_i + 0.0 * v_j
            lose = v_j + 0.0 * v_i
        elif High is None and Near is None:
            win = (v_i > v_j).to(tl.float32)
            lose = (v_i < v_j).to(tl.float32)
        else:
            weight = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
            if Near is not None:
                distance = tl.abs(i[:, None] - j[None, :])
                weight += tl.load(Near + distance, mask=distance < n, other=0.0)
            if High is not None:
                high = tl.load(High + i, mask=i < n, other=0.0)[:, None] - tl.load(High + j, mask=j < n, other=0.0)
                low = tl.load(Low + i, mask=i < n, other=0.0)[:, None] - tl.load(Low + j, mask=j < n, other=0.0)
                weight += tl.abs(high + low)
            apart = v_i - v_j
            win = tl.where(apart < 0, 0.0, apart) * weight  # a NaN stays
            lose = tl.where(apart > 0, 0.0, -apart) * weight
        x = z_i - z_j
        e = tl.exp(-tl.abs(x))
        near_one = 1.0 / (1.0 + e)
        above = tl.where(x >= 0, near_one, e * near_one)  # sigmoid(x)
        below = tl.where(x >= 0, e * near_one, near_one)
        counts = (i < length)[:, None] & (j < length)[None, :] & ((i < top)[:, None] | (j < top)[None, :])
        loss += tl.sum(tl.where(counts, win * (log1p(e) + tl.where(x < 0, -x, 0.0)), 0.0), axis=1)
        gradient += tl.sum(tl.where(counts, lose * above - win * below, 0.0), axis=1)
    tl.store(Loss + q * tl.num_programs(1) + tl.program_id(1), tl.sum(loss, axis=0))
    if Gradient is not None:
        tl.store(Gradient + q * n + i, gradient, mask=i < n)


@triton.jit
def _score(Scores, Mask, at, at_mask, inside, scale, LARGEST: tl.constexpr):
    """Loads scores, clamped and times the scale, and whether there is a document."""
    real = inside
    if Mask is not None:
        real = inside & (tl.load(Mask + at_mask, mask=inside, other=0) != 0)
    z = tl.load(Scores + at, mask=real, other=0.0).to(tl.float32)
    return tl.where(z > LARGEST, LARGEST, tl.where(z < -LARGEST, -LARGEST, z)) * scale, real


@triton.jit
def adr_ranks_kernel(
    Scores,  # [Q, n], rows of unit stride, as Labels and Mask
    Labels,
    Mask,  # uint8 or None
    Loss,  # [Q, blocks]: 4 times it
    Slope,  # [Q, n]: derivative of the loss by the soft rank
    scale,
    n,
    stride_sq,
    stride_yq,
    stride_mq,
    LARGEST: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    q = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    at_s, at_y, at_m = q * stride_sq, q * stride_yq, q * stride_mq
    z_i, real_i = _score(Scores, Mask, at_s + i, at_m + i, i < n, scale, LARGEST)
    y_i = tl.load(Labels + at_y + i, mask=real_i, other=0.0).to(tl.float32)
    leads = tl.zeros((BLOCK_I,), tl.float32)
    excess = tl.zeros((BLOCK_I,), tl.float32)
    count = 0.0
    for start in range(0, n, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        z_j, real_j = _score(Scores, Mask, at_s + j, at_m + j, j < n, scale, LARGEST)
        y_j = tl.load(Labels + at_y + j, mask=real_j, other=0.0).to(tl.float32)
        x = z_j[None, :] - z_i[:, None]
        apart = y_j[None, :] - y_i[:, None]
        above = tl.where(apart > 0, 1.0, tl.where(apart < 0, -1.0, apart))  # a NaN stays
        sign = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))
        e = tl.exp(-tl.abs(x))
        pull = (sign - above) - sign * (2.0 * e / (1.0 + e))  # 2 sigmoid(x) - 1, minus the label's sign
        leads += tl.sum(tl.where(real_j[None, :], above, 0.0), axis=1)
        excess += tl.sum(tl.where(real_j[None, :], pull, 0.0), axis=1)
        count += tl.sum(real_j.to(tl.float32), axis=0)
    slope = excess / (tl.log2(leads + (count + 3.0)) - 1.0)
    slope = tl.where(real_i, slope, 0.0)
    tl.store(Slope + q * n + i, slope, mask=i < n)
    total = tl.sum(tl.where(real_i, slope * excess, 0.0), axis=0)
    tl.store(Loss + q * tl.num_programs(1) + tl.program_id(1), total)


@triton.jit
def adr_gradient_kernel(
    Scores,
    Mask,
    Slope,  # [Q, n], 0 for padding
    Gradient,  # [Q, n]: by scale * score, times 4
    scale,
    n,
    stride_sq,
    stride_mq,
    LARGEST: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    q = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    at_s, at_m = q * stride_sq, q * stride_mq
    z_i, real_i = _score(Scores, Mask, at_s + i, at_m + i, i < n, scale, LARGEST)
    slope_i = tl.load(Slope + q * n + i, mask=i < n, other=0.0)
    gradient = tl.zeros((BLOCK_I,), tl.float32)
    for start in range(0, n, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        z_j, real_j = _score(Scores, Mask, at_s + j, at_m + j, j < n, scale, LARGEST)
        slope_j = tl.load(Slope + q * n + j, mask=j < n, other=0.0)
        e = tl.exp(-tl.abs(z_j[None, :] - z_i[:, None]))
        leak = 4.0 * e / ((1.0 + e) * (1.0 + e))
        gradient += tl.sum(tl.where(real_j[None, :], leak * (slope_j[None, :] - slope_i[:, None]), 0.0), axis=1)
    tl.store(Gradient + q * n + i, tl.where(real_i, gradient, 0.0), mask=i < n)


@triton.jit
def _added(m1, t1, m2, t2):
    """Adds exp(m1) t1 and exp(m2) t2, as such a pair. t may have either sign."""
    m = tl.maximum(m1, m2)
    shift = finite(m)
    return m, t1 * tl.exp(m1 - shift) + t2 * tl.exp(m2 - shift)


@triton.jit
def list_mle_kernel(
    Z,  # [Q, n] in the list's order, padding far below
    Weight,  # [Q, n], [1, n] or None: 1
    Loss,  # [Q]
    Gradient,  # [Q, n] or None
    n,
    stride_zq,
    stride_wq,
    BLOCK_N: tl.constexpr,
):
    q = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK_N)
    inside = j < n
    z = tl.load(Z + q * stride_zq + j, mask=inside, other=float("-inf")).to(tl.float32)
    weight = inside.to(tl.float32)
    if Weight is not None:
        weight = tl.load(Weight + q * stride_wq + j, mask=inside, other=0.0)
    # Shift and sum are kept separate: their logarithm would round in proportion to the scores.
    shift, total = tl.associative_scan((z, inside.to(tl.float32)), 0, _added, reverse=True)
    total = tl.where(inside, total, 1.0)
    loss = tl.where(inside, weight * ((shift - z) + tl.log(total)), 0.0)
    tl.store(Loss + q, tl.sum(loss, axis=0))
    if Gradient is not None:
        shift = tl.where(inside, -shift, float("-inf"))
        shift, total = tl.associative_scan((shift, weight / total), 0, _added)
        tl.store(Gradient + q * n + j, tl.exp(z + shift) * total - weight, mask=inside)
