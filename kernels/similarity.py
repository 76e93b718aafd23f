"""The similarity GEMM with an epilogue: a tile of logits is folded while it is in registers.

    z[i, j] = scale * row_factor[i] * col_factor[j] * <x_i, y_j> + bias[j], bent by a softcap

Three kernels, one fold, one table of epilogues (`softmax.py`):

    similarity_kernel   the GEMM by hand, persistent; operands through tensor descriptors (TMA on sm_90
                        and up) or through pointers (cp.async below)
    prefixes_kernel     the same GEMM, whose accumulator is folded at the end of each prefix of the features
    panel_kernel        the similarities of a panel of columns were written in fp32 by the vendor's GEMM

N's divisibility by 16 saves predicates, as M's does: without specialising M, "exp" took 237 registers on sm_90 instead
of 210, "grad" 255 instead of 231. Rows of any length are read and stored 16 bytes at a time: operands end in zeros, and
of Out's rows the padding is written, too (`vectors.py`).

Logits stay in fp32 from the accumulator to the exponential. Targets, columns out of range and removed columns (bias =
-inf) have z = -inf.
"""

import triton
import triton.language as tl

from .masks import admitted
from .softmax import hits, met, tanh
from .vectors import up

# How a tile is folded: on the one path of all tiles, or on one of two.
ONE_PATH, INNER_PATH, OTHER_PATH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
PANEL_WIDE = tl.constexpr(4)  # divides a panel's stride; up to a multiple of it a row of the panel ends in zeros
DESCRIPTOR = tl.constexpr(0)  # in the place of OUT_WIDE: Out is one


@triton.jit
def similarity_kernel(
    X,  # [M, D]: a descriptor of BLOCK_M x BLOCK_D, or a pointer to rows of unit stride
    Y,  # [N, D], likewise
    Out,  # [M, N]: likewise BLOCK_M x BLOCK_N / SUBTILES; None where nothing is stored
    Scale,  # 0-dim
    RowFactor,  # [M] or None
    ColFactor,  # [N] or None
    Bias,  # [N] or None
    softcap,  # logits become softcap * tanh(z / softcap); or None
    Target,  # [M] int64 or None
    Further,  # FurtherArgs or None
    masks,  # MaskArgs or None
    args,  # the epilogue's own
    M,
    N,
    D,
    stride_xm,
    stride_yn,
    stride_om,
    EPILOGUE: tl.constexpr,
    INNER: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WIDE: tl.constexpr,  # divides D and the strides of X and Y
    OUT_WIDE: tl.constexpr,  # divides Out's stride; up to a multiple of it a row may be written
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    # Persistent: only as many programs as can run at once walk all tiles. Not flattened: one loop over tiles and D
    # keeps a second accumulator alive and spills (3.7.1 and 3.9.0, 128 x 256).
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    # SPECIALIZE: one warp multiplies, two load, and the others fold the last tile out of a second accumulator.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=False, warp_specialize=SPECIALIZE):
        pid_m, pid_n = place(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        sim = product(
            X, Y, M, N, D, stride_xm, stride_yn, pid_m, pid_n,
            INPUT_PRECISION, DESCRIPTORS, WIDE, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        _fold_tile(
            sim, Out, Scale, RowFactor, ColFactor, Bias, softcap, Target, Further, masks, args, M, N, stride_om,
            pid_m, pid_n, EPILOGUE, INNER, OUT_WIDE, BLOCK_M, BLOCK_N, SUBTILES,
        )  # fmt: skip


@triton.jit
def prefixes_kernel(
    X,  # as in similarity_kernel
    Y,
    Outs,  # of each prefix a pointer to [M, N], or None
    Scale,
    RowFactors,  # of each prefix [M]
    ColFactors,  # of each prefix [N]
    Bias,
    softcap,
    Target,
    masks,
    args,  # of each prefix, the epilogue's own
    Ends,  # of each prefix its last feature + 1, ascending; multiples of BLOCK_D but for the last
    M,
    N,
    stride_xm,
    stride_yn,
    stride_om,
    EPILOGUE: tl.constexpr,
    INNER: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,  # of X and Y
    WIDE: tl.constexpr,
    OUT_WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
):
    """Folds the similarities of each prefix of the rows while the accumulator of the longest one grows."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=False):
        pid_m, pid_n = place(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        sim = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for number in tl.static_range(len(Ends)):
            sim = _products(
                sim, X, Y, 0 if number == 0 else Ends[number - 1], Ends[number], M, N, stride_xm, stride_yn,
                pid_m, pid_n, INPUT_PRECISION, DESCRIPTORS, WIDE, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            _fold_tile(
                sim, Outs[number], Scale, RowFactors[number], ColFactors[number], Bias, softcap, Target, None, masks,
                args[number], M, N, stride_om, pid_m, pid_n, EPILOGUE, INNER, OUT_WIDE, BLOCK_M, BLOCK_N, SUBTILES,
            )  # fmt: skip


@triton.jit(do_not_specialize=["first_tile"])
def panel_kernel(
    Sim,  # [M, columns of the panel] fp32
    Out,
    Scale,
    RowFactor,
    ColFactor,
    Bias,
    softcap,
    Target,
    Further,
    masks,
    args,
    M,
    N,
    stride_sm,
    stride_om,
    first_tile,  # the panel's first column is first_tile * BLOCK_N
    EPILOGUE: tl.constexpr,
    INNER: tl.constexpr,
    OUT_WIDE: tl.constexpr,  # as in similarity_kernel
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid_m = tl.program_id(0)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = first_tile.to(tl.int64) * BLOCK_N + offs_n < up(N, PANEL_WIDE)
    place = Sim + offs_m[:, None] * up(stride_sm, PANEL_WIDE) + offs_n[None, :]
    sim = tl.load(place, mask=(offs_m < M)[:, None] & columns[None, :], other=0.0)
    _fold_tile(
        sim, Out, Scale, RowFactor, ColFactor, Bias, softcap, Target, Further, masks, args, M, N, stride_om,
        pid_m, first_tile + tl.program_id(1), EPILOGUE, INNER, OUT_WIDE, BLOCK_M, BLOCK_N, 1,
    )  # fmt: skip


@triton.jit
def product(
    X, Y, M, N, D, stride_xm, stride_yn, pid_m, pid_n,
    INPUT_PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Returns a tile of `X @ Y.T`."""
    return _products(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), X, Y, 0, D, M, N, stride_xm, stride_yn, pid_m, pid_n,
        INPUT_PRECISION, DESCRIPTORS, WIDE, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _products(
    sim, X, Y, first, end, M, N, stride_xm, stride_yn, pid_m, pid_n,
    INPUT_PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds the products over the features from `first` to `end`."""
    if DESCRIPTORS:
        for start in range(first, end, BLOCK_D):
            x = X.load([pid_m * BLOCK_M, start])
            y = Y.load([pid_n * BLOCK_N, start])
            sim = tl.dot(x, y.T, sim, input_precision=INPUT_PRECISION)
    else:
        # int64: a row's offset passes 2**31 elements at M = 2**20, D = 2048.
        offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_d = tl.arange(0, BLOCK_D)
        x_ptrs = X + offs_m[:, None] * up(stride_xm, WIDE) + offs_d[None, :]
        y_ptrs = Y + offs_n[None, :] * up(stride_yn, WIDE) + offs_d[:, None]
        for start in range(first, end, BLOCK_D):
            mask_d = offs_d < up(end, WIDE) - start
            x = tl.load(x_ptrs + start, mask=(offs_m < M)[:, None] & mask_d[None, :], other=0.0)
            y = tl.load(y_ptrs + start, mask=(offs_n < N)[None, :] & mask_d[:, None], other=0.0)
            if INPUT_PRECISION == "tf32":
                x, y = _rounded(x), _rounded(y)
            sim = tl.dot(x, y, sim, input_precision=INPUT_PRECISION)
    return sim


@triton.jit
def place(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """GROUP_M row tiles walk the columns together, so that x stays in L2, and a y tile is fetched once for all."""
    m_tiles = tl.cdiv(M, BLOCK_M)
    group_size = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = tile // group_size * GROUP_M
    rows_in_group = tl.minimum(m_tiles - first_m, GROUP_M)
    return first_m + tile % group_size % rows_in_group, tile % group_size // rows_in_group


@triton.jit
def _rounded(x):
    """Rounds to the nearest tf32, ties away from 0: the tensor cores would cut 13 bits off, and with them 7e-4 of the
    length of duplicates' similarities. Infinities and NaN stay as they are."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where((bits & 0x7F800000) == 0x7F800000, bits, (bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _bent(z, softcap):
    if softcap is not None:
        z = softcap * tanh(z / softcap)
    return z


@triton.jit
def _fold_tile(
    sim, Out, Scale, RowFactor, ColFactor, Bias, softcap, Target, Further, masks, args, M, N, stride_om,
    pid_m, pid_n,
    EPILOGUE: tl.constexpr, INNER: tl.constexpr, OUT_WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """Folds a tile. INNER: one inside of the matrix that holds no target, as most are, without a test of an element."""
    if INNER:
        if _is_inner(Target, Further, M, N, pid_m, pid_n, BLOCK_M, BLOCK_N):
            _fold_parts(
                sim, Out, Scale, RowFactor, ColFactor, Bias, softcap, None, None, masks, args, M, N, stride_om,
                pid_m, pid_n, EPILOGUE, INNER_PATH, OUT_WIDE, BLOCK_M, BLOCK_N, SUBTILES,
            )  # fmt: skip
        else:
            _fold_parts(
                sim, Out, Scale, RowFactor, ColFactor, Bias, softcap, Target, Further, masks, args, M, N, stride_om,
                pid_m, pid_n, EPILOGUE, OTHER_PATH, OUT_WIDE, BLOCK_M, BLOCK_N, SUBTILES,
            )  # fmt: skip
    else:
        _fold_parts(
            sim, Out, Scale, RowFactor, ColFactor, Bias, softcap, Target, Further, masks, args, M, N, stride_om,
            pid_m, pid_n, EPILOGUE, ONE_PATH, OUT_WIDE, BLOCK_M, BLOCK_N, SUBTILES,
        )  # fmt: skip


@triton.jit
def _is_inner(Target, Further, M, N, pid_m, pid_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    inner = ((pid_m + 1) * BLOCK_M <= M) & ((pid_n + 1) * BLOCK_N <= N)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    if Target is not None:
        column = tl.load(Target + offs_m, mask=offs_m < M, other=-1) - pid_n.to(tl.int64) * BLOCK_N
        inner &= tl.max(((column >= 0) & (column < BLOCK_N)).to(tl.int32), axis=0) == 0
    if Further is not None:
        inner &= met(Further, offs_m, offs_m < M, pid_n, M, BLOCK_N) == 0
    return inner


@triton.jit
def _fold_parts(
    sim, Out, Scale, RowFactor, ColFactor, Bias, softcap, Target, Further, masks, args, M, N, stride_om,
    pid_m, pid_n,
    EPILOGUE: tl.constexpr, PATH: tl.constexpr, OUT_WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    # In two halves, fewer logits, similarities and column vectors are live at once: with rows,
    # columns and q on sm_90, a whole 128 x 128 tile spills 264 bytes a thread, halves none.
    if SUBTILES == 1:
        _fold(
            sim, Out, Scale, RowFactor, ColFactor, Bias, softcap, Target, Further, masks, args, M, N, stride_om,
            pid_m, pid_n, EPILOGUE, PATH, OUT_WIDE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        halves = tl.permute(tl.reshape(sim, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        _fold(
            left, Out, Scale, RowFactor, ColFactor, Bias, softcap, Target, Further, masks, args, M, N, stride_om,
            pid_m, pid_n * 2, EPILOGUE, PATH, OUT_WIDE, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        _fold(
            right, Out, Scale, RowFactor, ColFactor, Bias, softcap, Target, Further, masks, args, M, N, stride_om,
            pid_m, pid_n * 2 + 1, EPILOGUE, PATH, OUT_WIDE, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip


@triton.jit
def _fold(
    acc, Out, Scale, RowFactor, ColFactor, Bias, softcap, Target, Further, masks, args, M, N, stride_om,
    pid_m, pid_n,
    EPILOGUE: tl.constexpr, PATH: tl.constexpr, OUT_WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Turns the accumulator into logits, with -inf for inadmissible columns; then the epilogue and the store."""
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    if PATH == INNER_PATH:
        mask_m, mask_n = tl.full((BLOCK_M,), 1, tl.int1), tl.full((BLOCK_N,), 1, tl.int1)
    else:
        mask_m, mask_n = offs_m < M, offs_n < N
    sim, scale = acc, tl.load(Scale)
    if RowFactor is not None:
        row_factor = tl.load(RowFactor + offs_m, mask=mask_m, other=0.0)
    if ColFactor is not None:
        col_factor = tl.load(ColFactor + offs_n, mask=mask_n, other=0.0)
    # Of one matrix against itself both places of a pair have the same bits if their factors are multiplied first. Or
    # else exp(f - shift) of a row's largest, whose shift is of the other place, would be off by the rounding of f.
    if RowFactor is not None and ColFactor is not None:
        sim *= row_factor[:, None] * col_factor[None, :]
    elif RowFactor is not None:
        sim *= row_factor[:, None]
    elif ColFactor is not None:
        sim *= col_factor[None, :]
    if PATH == ONE_PATH or RowFactor is None or ColFactor is None:
        z = sim * scale
    # Of two paths, the scale enters by the rows: a product less where nothing reads the similarities. In two orders:
    # what both begin with is moved in front of them, and the last product is fused with the epilogue's subtraction
    # only if they stand in one block.
    elif PATH == INNER_PATH:
        z = acc * (row_factor * scale)[:, None] * col_factor[None, :]
    else:
        z = acc * col_factor[None, :] * (row_factor * scale)[:, None]
    if masks is not None:
        if masks.Own is not None:
            z = tl.where(hits(masks.Own, offs_m, mask_m, pid_n, BLOCK_N), sim * tl.load(masks.OwnScale), z)
    if Bias is not None:
        bias = tl.load(Bias + offs_n, mask=mask_n, other=float("-inf"))
        # Not only an addition of -inf, because NaN in a removed column would stay NaN.
        z = tl.where(bias[None, :] == float("-inf"), float("-inf"), _bent(z + bias[None, :], softcap))
    elif PATH == INNER_PATH:
        z = _bent(z, softcap)
    else:
        z = tl.where(mask_n[None, :], _bent(z, softcap), float("-inf"))
    if masks is not None:
        admit = admitted(sim, mask_m, mask_n, offs_m, offs_n, pid_n, N, masks, BLOCK_N)
        z = tl.where(admit, z, float("-inf"))
    if Target is not None:
        z = tl.where(hits(Target, offs_m, mask_m, pid_n, BLOCK_N), float("-inf"), z)
    if Further is not None:
        for number in range(met(Further, offs_m, mask_m, pid_n, M, BLOCK_N)):
            z = tl.where(hits(Further.Columns + number * M, offs_m, mask_m, pid_n, BLOCK_N), float("-inf"), z)
    value = EPILOGUE(z, sim, Target, offs_m, offs_n, mask_m, mask_n, pid_m, pid_n, M, N, args)
    if Out is not None:
        if softcap is not None:
            # The softcap's derivative, 1 - tanh^2. Dropped columns are 0, and the target's entry has a slope of its
            # own.
            bend = tl.where(z == float("-inf"), 0.0, z / softcap)
            value *= 1 - bend * bend
        # Factors enter before rounding, so that the next two GEMMs take x and y as they are. They
        # are loaded again because two more vectors, live across the epilogue, would spill.
        if RowFactor is not None:
            value *= tl.load(RowFactor + offs_m, mask=mask_m, other=0.0)[:, None]
        if ColFactor is not None:
            value *= tl.load(ColFactor + offs_n, mask=mask_n, other=0.0)[None, :]
        if OUT_WIDE == DESCRIPTOR:
            Out.store([pid_m * BLOCK_M, pid_n * BLOCK_N], value.to(Out.dtype))
        else:
            out_ptrs = Out + offs_m[:, None] * up(stride_om, OUT_WIDE) + offs_n[None, :]
            stored = mask_n
            if PATH != INNER_PATH and OUT_WIDE != 16:
                stored = tl.arange(0, BLOCK_N) < up(N, OUT_WIDE) - pid_n * BLOCK_N
            tl.store(out_ptrs, value.to(Out.dtype.element_ty), mask=mask_m[:, None] & stored[None, :])
