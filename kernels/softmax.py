"""The similarity GEMM, and the epilogues that fold a tile of logits while it is in registers.

    z[i, j] = scale * row_factor[i] * col_factor[j] * <x_i, y_j> + bias[j]

Logits stay in fp32 from the accumulator to the exponential. The target, columns out of range and
removed columns (bias = -inf) have z = -inf. Sums are written as one partial per row and tile,
[n_tiles, M]: without atomics they do not depend on the order in which tiles run.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def similarity_kernel(
    X,  # [M, D]
    Y,  # [N, D]
    Scale,  # 0-dim
    RowFactor,  # [M] or None
    ColFactor,  # [N] or None
    Bias,  # [N] or None
    Target,  # [M] int64 or None
    args,  # the epilogue's own
    M,
    N,
    D,
    stride_xm,
    stride_xd,
    stride_yn,
    stride_yd,
    EPILOGUE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
):
    # GROUP_M row tiles walk the columns together: x stays in L2, a y tile is fetched once for all.
    pid = tl.program_id(0)
    m_tiles = tl.cdiv(M, BLOCK_M)
    group_size = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = pid // group_size * GROUP_M
    rows_in_group = tl.minimum(m_tiles - first_m, GROUP_M)
    pid_m = first_m + pid % group_size % rows_in_group
    pid_n = pid % group_size // rows_in_group

    # int64: a row's offset passes 2**31 elements at M = 2**20, D = 2048.
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_m = offs_m < M
    mask_n = offs_n < N
    if Bias is not None:
        # A removed column is not even read, so that NaN in it cannot outlive the -inf.
        mask_n = tl.load(Bias + offs_n, mask=mask_n, other=float("-inf")) != float("-inf")
    x_ptrs = X + offs_m[:, None] * stride_xm + offs_d[None, :] * stride_xd
    y_ptrs = Y + offs_n[None, :] * stride_yn + offs_d[:, None] * stride_yd
    sim = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_D):
        mask_d = offs_d < D - start
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_d[None, :], other=0.0)
        y = tl.load(y_ptrs, mask=mask_n[None, :] & mask_d[:, None], other=0.0)
        sim = tl.dot(x, y, sim, input_precision=INPUT_PRECISION)
        x_ptrs += BLOCK_D * tl.cast(stride_xd, tl.int64)
        y_ptrs += BLOCK_D * tl.cast(stride_yd, tl.int64)

    # In two halves, fewer logits, similarities and column vectors are live at once: with rows,
    # columns and q on sm_90, a whole 128 x 128 tile spills 264 bytes a thread, halves spill none.
    if SUBTILES == 1:
        _fold(
            sim, Scale, RowFactor, ColFactor, Bias, Target, args,
            M, N, pid_m, pid_n, EPILOGUE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        halves = tl.permute(tl.reshape(sim, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        _fold(
            left, Scale, RowFactor, ColFactor, Bias, Target, args,
            M, N, pid_m, pid_n * 2, EPILOGUE, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        _fold(
            right, Scale, RowFactor, ColFactor, Bias, Target, args,
            M, N, pid_m, pid_n * 2 + 1, EPILOGUE, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip


@triton.jit
def _fold(
    sim, Scale, RowFactor, ColFactor, Bias, Target, args,
    M, N, pid_m, pid_n,
    EPILOGUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """From the accumulator to logits with everything inadmissible at -inf, and the epilogue."""
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    if RowFactor is not None:
        sim *= tl.load(RowFactor + offs_m, mask=offs_m < M, other=0.0)[:, None]
    if ColFactor is not None:
        sim *= tl.load(ColFactor + offs_n, mask=mask_n, other=0.0)[None, :]
    z = sim * tl.load(Scale)
    if Bias is not None:
        z += tl.load(Bias + offs_n, mask=mask_n, other=float("-inf"))[None, :]
    else:
        z = tl.where(mask_n[None, :], z, float("-inf"))
    if Target is not None:
        # int64 once a row, 32 bits per element: an int64 comparison is two instructions.
        hit = tl.load(Target + offs_m, mask=offs_m < M, other=-1) - pid_n.to(tl.int64) * BLOCK_N
        hit = tl.where((hit >= 0) & (hit < BLOCK_N), hit, -1).to(tl.int32)
        z = tl.where(tl.arange(0, BLOCK_N)[None, :] == hit[:, None], float("-inf"), z)
    EPILOGUE(z, sim, RowFactor, ColFactor, offs_m, offs_n, pid_m, pid_n, M, N, args)


@triton.jit
def _finite(maximum):
    """A shift for exponents: -inf - -inf would be NaN where every column is masked."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _exp(x):
    """log2(e) enters after the shift is subtracted: large logits do not magnify its rounding."""
    return tl.exp2(x * LOG2E)


@triton.jit
def _store_tile(Out, stride_om, stride_on, value, RowFactor, ColFactor, offs_m, offs_n, M, N):
    """Factors enter before rounding, so that the next two GEMMs take x and y as they are.

    They are loaded again because two more column vectors, live across the epilogue, would spill.
    """
    mask_m = offs_m < M
    mask_n = offs_n < N
    if RowFactor is not None:
        value *= tl.load(RowFactor + offs_m, mask=mask_m, other=0.0)[:, None]
    if ColFactor is not None:
        value *= tl.load(ColFactor + offs_n, mask=mask_n, other=0.0)[None, :]
    out_ptrs = Out + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on
    mask = mask_m[:, None] & mask_n[None, :]
    tl.store(out_ptrs, value.to(Out.dtype.element_ty), mask=mask)


class StatsArgs(NamedTuple):
    """Maxima and sums of exp(z - maximum); a maximum may be -inf, its sum is then 0."""

    RowMax: Any  # [n_tiles, M]
    RowSum: Any
    ColMax: Any = None  # [m_tiles, N]
    ColSum: Any = None


@triton.jit
def stats(z, sim, RowFactor, ColFactor, offs_m, offs_n, pid_m, pid_n, M, N, args):
    row_max = tl.max(z, axis=1)
    row_sum = tl.sum(_exp(z - _finite(row_max)[:, None]), axis=1)
    row = pid_n.to(tl.int64) * M + offs_m
    tl.store(args.RowMax + row, row_max, mask=offs_m < M)
    tl.store(args.RowSum + row, row_sum, mask=offs_m < M)
    if args.ColMax is not None:
        z = tl.where((offs_m < M)[:, None], z, float("-inf"))
        col_max = tl.max(z, axis=0)
        col_sum = tl.sum(_exp(z - _finite(col_max)[None, :]), axis=0)
        col = pid_m.to(tl.int64) * N + offs_n
        tl.store(args.ColMax + col, col_max, mask=offs_n < N)
        tl.store(args.ColSum + col, col_sum, mask=offs_n < N)


class ExpArgs(NamedTuple):
    """E = exp(z - shift) and its row sums; with TargetSim also Q, those of E (sim - target_sim)."""

    Out: Any  # [M, N]
    stride_om: Any
    stride_on: Any
    shift: Any  # one number for all rows
    RowSum: Any  # [n_tiles, M]
    TargetSim: Any = None  # [M]
    Q: Any = None  # [n_tiles, M]


@triton.jit
def exp(z, sim, RowFactor, ColFactor, offs_m, offs_n, pid_m, pid_n, M, N, args):
    e = _exp(z - args.shift)
    row = pid_n.to(tl.int64) * M + offs_m
    tl.store(args.RowSum + row, tl.sum(e, axis=1), mask=offs_m < M)
    if args.TargetSim is not None:
        target_sim = tl.load(args.TargetSim + offs_m, mask=offs_m < M, other=0.0)
        q = tl.sum(e * (sim - target_sim[:, None]), axis=1)
        tl.store(args.Q + row, q, mask=offs_m < M)
    _store_tile(args.Out, args.stride_om, args.stride_on, e, RowFactor, ColFactor, offs_m, offs_n, M, N)


class GradArgs(NamedTuple):
    """dz = weight * exp(z - shift) per row, plus the same per column where ColShift is given.

    Out receives `gain * dz`. Q receives the row sums of dz (sim - target_sim), without the gain,
    where the row's term is taken against the row's target and the column's against the column's.
    """

    Out: Any  # [M, N]
    stride_om: Any
    stride_on: Any
    Gain: Any  # 0-dim or None
    RowShift: Any  # [M]
    RowWeight: Any
    RowTargetSim: Any = None
    ColShift: Any = None  # [N]
    ColWeight: Any = None
    ColTargetSim: Any = None
    Q: Any = None  # [n_tiles, M]


@triton.jit
def _load_softmax(Shift, Weight, offs, mask):
    """Shift and weight; a weight of 0 gets shift +inf, because 0 * exp(z - shift) may be NaN."""
    weight = tl.load(Weight + offs, mask=mask, other=0.0)
    shift = tl.load(Shift + offs, mask=mask, other=0.0)
    return tl.where(weight == 0, float("inf"), shift), weight


@triton.jit
def grad(z, sim, RowFactor, ColFactor, offs_m, offs_n, pid_m, pid_n, M, N, args):
    mask_m = offs_m < M
    mask_n = offs_n < N
    shift, weight = _load_softmax(args.RowShift, args.RowWeight, offs_m, mask_m)
    dz = weight[:, None] * _exp(z - shift[:, None])
    if args.Q is not None:
        target_sim = tl.load(args.RowTargetSim + offs_m, mask=mask_m, other=0.0)
        q = tl.sum(dz * (sim - target_sim[:, None]), axis=1)
    if args.ColShift is not None:
        shift, weight = _load_softmax(args.ColShift, args.ColWeight, offs_n, mask_n)
        p = weight[None, :] * _exp(z - shift[None, :])
        dz += p
        if args.Q is not None:
            target_sim = tl.load(args.ColTargetSim + offs_n, mask=mask_n, other=0.0)
            q += tl.sum(p * (sim - target_sim[None, :]), axis=1)
    if args.Q is not None:
        tl.store(args.Q + pid_n.to(tl.int64) * M + offs_m, q, mask=mask_m)
    if args.Gain is not None:
        dz *= tl.load(args.Gain)
    _store_tile(args.Out, args.stride_om, args.stride_on, dz, RowFactor, ColFactor, offs_m, offs_n, M, N)
