"""Distillation: a tile of the student's similarities and one of the teacher's, folded together.

    a = slope u - shift      b, likewise, of the teacher
    q = exp(a) inverse       p = exp(b) inverse

with a row's slope (the scale times the row's factor), shift (its largest logit) and inverse (of the sum of its
exponentials, from sweeps with `softmax.stats`), and u, the accumulator times the column's factor. Two accumulators are
alive at once, so that neither matrix is stored and p is never rounded to 16 bits.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .similarity import DESCRIPTOR, PANEL_WIDE, place, product
from .softmax import exponential
from .vectors import up

# maths.md: Folds
FAR = tl.constexpr(-1e30)  # the exponent of a column that is left out: its exponential is 0


class Model(NamedTuple):
    """What turns a model's accumulators into exponents and its exponentials into a softmax."""

    Slope: Any  # [M]
    Shift: Any
    Inverse: Any
    ColFactor: Any = None  # [N]


class DistillArgs(NamedTuple):
    """Sums over a row, one partial per row and tile: Loss, without the logarithms of the totals, and Q, of the
    derivative by the logit times u. Of "mse" a first launch writes Q = sum q (q - p), the Mean of the second.

    Out receives the derivative by the logit times Weight, 0 where Weight is 0, and times the student's ColFactor.
    """

    Student: Any  # Model
    Teacher: Any
    Loss: Any  # [n_tiles, M] each
    Q: Any
    Weight: Any = None  # [M]
    Mean: Any = None


@triton.jit
def distill_kernel(
    X,  # [M, D]: a descriptor of BLOCK_M x BLOCK_D, or a pointer to rows of unit stride
    Y,  # [N, D], and the teacher's [M, T] and [N, T]
    U,
    V,
    Out,  # [M, N]: likewise BLOCK_M x BLOCK_N / SUBTILES; None where nothing is stored
    Admit,  # uint8 [M, N], 0: left out; rows end in zeros up to a multiple of 16; or None
    args,  # DistillArgs
    M,
    N,
    D,
    T,
    stride_xm,
    stride_yn,
    stride_um,
    stride_vn,
    stride_om,
    stride_am,
    FORM: tl.constexpr,  # "distill", "distill_ce" or "distill_mse"
    INPUT_PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WIDE: tl.constexpr,  # divides D and the strides of X and Y
    TEACHER_WIDE: tl.constexpr,  # T and those of U and V
    OUT_WIDE: tl.constexpr,  # as in similarity_kernel
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
):
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=False):
        pid_m, pid_n = place(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        taught = product(
            U, V, M, N, T, stride_um, stride_vn, pid_m, pid_n,
            INPUT_PRECISION, DESCRIPTORS, TEACHER_WIDE, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        sim = product(
            X, Y, M, N, D, stride_xm, stride_yn, pid_m, pid_n,
            INPUT_PRECISION, DESCRIPTORS, WIDE, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        if SUBTILES == 1:
            _distill(
                sim, taught, Out, Admit, args, M, N, stride_om, stride_am,
                pid_m, pid_n, FORM, OUT_WIDE, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        else:
            left, right = _halves(sim, BLOCK_M, BLOCK_N)
            taught_left, taught_right = _halves(taught, BLOCK_M, BLOCK_N)
            _distill(
                left, taught_left, Out, Admit, args, M, N, stride_om, stride_am,
                pid_m, pid_n * 2, FORM, OUT_WIDE, BLOCK_M, BLOCK_N // 2,
            )  # fmt: skip
            _distill(
                right, taught_right, Out, Admit, args, M, N, stride_om, stride_am,
                pid_m, pid_n * 2 + 1, FORM, OUT_WIDE, BLOCK_M, BLOCK_N // 2,
            )  # fmt: skip


@triton.jit(do_not_specialize=["first_tile"])
def distill_panel_kernel(
    Sim,  # [M, columns of the panel] fp32
    Taught,  # likewise, the teacher's
    Out,
    Admit,
    args,
    M,
    N,
    stride_sm,  # of both
    stride_om,
    stride_am,
    first_tile,  # the panels' first column is first_tile * BLOCK_N
    FORM: tl.constexpr,
    OUT_WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid_m = tl.program_id(0)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = (offs_m < M)[:, None] & (first_tile.to(tl.int64) * BLOCK_N + offs_n < up(N, PANEL_WIDE))[None, :]
    at = offs_m[:, None] * up(stride_sm, PANEL_WIDE) + offs_n[None, :]
    sim, taught = tl.load(Sim + at, mask=there, other=0.0), tl.load(Taught + at, mask=there, other=0.0)
    _distill(
        sim, taught, Out, Admit, args, M, N, stride_om, stride_am,
        pid_m, first_tile + tl.program_id(1), FORM, OUT_WIDE, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _halves(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _exponents(u, admit, model, offs_m, mask_m):
    """Returns the exponents, FAR where a column is left out, and the softmax."""
    slope = tl.load(model.Slope + offs_m, mask=mask_m, other=0.0)
    shift = tl.load(model.Shift + offs_m, mask=mask_m, other=0.0)
    a = tl.where(admit, u * slope[:, None] - shift[:, None], FAR)
    return a, exponential(a) * tl.load(model.Inverse + offs_m, mask=mask_m, other=0.0)[:, None]


@triton.jit
def _distill(
    u, taught, Out, Admit, args, M, N, stride_om, stride_am, pid_m, pid_n,
    FORM: tl.constexpr, OUT_WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Folds both accumulators."""
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    student, teacher = args.Student, args.Teacher
    if student.ColFactor is not None:
        u *= tl.load(student.ColFactor + offs_n, mask=mask_n, other=0.0)[None, :]
    if teacher.ColFactor is not None:
        taught *= tl.load(teacher.ColFactor + offs_n, mask=mask_n, other=0.0)[None, :]
    admit = mask_n[None, :]
    if Admit is not None:
        there = mask_m[:, None] & (offs_n < tl.cdiv(N, 16) * 16)[None, :]  # which needs no test of a single column
        at = offs_m[:, None] * (stride_am // 16 * 16) + offs_n[None, :]
        admit = tl.load(Admit + at, mask=there, other=0) != 0
        u = tl.where(admit, u, 0.0)  # its derivative is 0, and it may be NaN
    b, p = _exponents(taught, admit, teacher, offs_m, mask_m)
    a, q = _exponents(u, admit, student, offs_m, mask_m)
    d = q - p
    if args.Mean is not None:
        dz = 2 * q * (d - tl.load(args.Mean + offs_m, mask=mask_m, other=0.0)[:, None])
    else:
        dz = d
    row = pid_n.to(tl.int64) * M + offs_m
    if FORM == "distill":
        terms = p * (b - a) + d
    elif FORM == "distill_ce":
        terms = -p * a
    else:
        terms = d * d
    by = q if FORM == "distill_mse" and args.Mean is None else u
    tl.store(args.Loss + row, tl.sum(terms, axis=1), mask=mask_m)
    tl.store(args.Q + row, tl.sum(dz * by, axis=1), mask=mask_m)
    if Out is not None:
        weight = tl.load(args.Weight + offs_m, mask=mask_m, other=0.0)[:, None]
        value = tl.where(weight == 0, 0.0, dz * weight)  # a row that is left out may be NaN
        if student.ColFactor is not None:
            value *= tl.load(student.ColFactor + offs_n, mask=mask_n, other=0.0)[None, :]
        if OUT_WIDE == DESCRIPTOR:
            Out.store([pid_m * BLOCK_M, pid_n * BLOCK_N], value.to(Out.dtype))
        else:
            stored = mask_n
            if OUT_WIDE != 16:
                stored = tl.arange(0, BLOCK_N) < up(N, OUT_WIDE) - pid_n * BLOCK_N
            out_ptrs = Out + offs_m[:, None] * up(stride_om, OUT_WIDE) + offs_n[None, :]
            tl.store(out_ptrs, value.to(Out.dtype.element_ty), mask=mask_m[:, None] & stored[None, :])
