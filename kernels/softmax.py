"""Epilogues of the softmax losses: the sums that a tile of logits folds into, and the stored values.

Called with z (the target and inadmissible columns at -inf), the similarities and the tile's place;
they return the value to store. Sums are written
as one partial per row and tile, [n_tiles, M]: without atomics they do not depend on the order in
which tiles run.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# maths.md: Softcap; Tally; Online log-sum-exp; Gradient of the logits; Gradient by the scale; Symmetric
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def finite(maximum):
    """Returns a finite shift for exponents: -inf - -inf would be NaN if every column is masked."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def exponential(x):
    """Multiplies by log2(e) after subtracting the shift, so that large logits do not magnify its rounding."""
    return tl.exp2(x * LOG2E)


@triton.jit
def tanh(x):
    """tanh to 2 ulp; a series replaces 1 - exp(-2 |x|) where that would cancel."""
    square = x * x
    series = 62.0 / 2835 * square - 17.0 / 315
    series = ((series * square + 2.0 / 15) * square - 1.0 / 3) * square
    e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    far = (1 - e) / (1 + e)
    return tl.where(square < 0.09, x + x * series, tl.where(x < 0, -far, far))


@triton.jit
def hits(Target, offs_m, mask_m, pid_n, BLOCK_N: tl.constexpr):
    """Returns True at a row's target in the tile: int64 once a row, 32 bits an element."""
    column = tl.load(Target + offs_m, mask=mask_m, other=-1) - pid_n.to(tl.int64) * BLOCK_N
    column = tl.where((column >= 0) & (column < BLOCK_N), column, -1).to(tl.int32)
    return tl.arange(0, BLOCK_N)[None, :] == column[:, None]


class FurtherArgs(NamedTuple):
    """A row's targets besides the first, in other columns."""

    Columns: Any  # int64 [count, M]; -1: none
    count: Any


@triton.jit
def met(Further, offs_m, mask_m, pid_n, M, BLOCK_N: tl.constexpr):
    """Returns how many further targets to look for in a tile: all, or 0 if no row has one there, as in most tiles."""
    found = tl.zeros(offs_m.shape, tl.int32)
    for number in range(Further.count):
        column = tl.load(Further.Columns + number * M + offs_m, mask=mask_m, other=-1) - pid_n.to(tl.int64) * BLOCK_N
        found |= ((column >= 0) & (column < BLOCK_N)).to(tl.int32)
    return tl.where(tl.max(found, axis=0) > 0, Further.count, 0)


class TallyArgs(NamedTuple):
    """Counts of a row's admissible negatives, [n_tiles, M] each."""

    Score: Any  # [M]: logits above it rank before the target's
    Count: Any
    Above: Any
    Max: Any
    Z: Any
    Sim: Any


@triton.jit
def tally(z, sim, offs_m, mask_m, pid_n, M, args):
    row = pid_n.to(tl.int64) * M + offs_m
    admitted = z > float("-inf")
    score = tl.load(args.Score + offs_m, mask=mask_m, other=0.0)
    tl.store(args.Count + row, tl.sum(admitted.to(tl.float32), axis=1), mask=mask_m)
    tl.store(args.Above + row, tl.sum((z > score[:, None]).to(tl.float32), axis=1), mask=mask_m)
    tl.store(args.Max + row, tl.max(z, axis=1), mask=mask_m)
    tl.store(args.Z + row, tl.sum(tl.where(admitted, z, 0.0), axis=1), mask=mask_m)
    tl.store(args.Sim + row, tl.sum(tl.where(admitted, sim, 0.0), axis=1), mask=mask_m)


class StatsArgs(NamedTuple):
    """Maxima and sums of exp(z - maximum); a maximum may be -inf, its sum is then 0."""

    RowMax: Any  # [n_tiles, M]
    RowSum: Any
    ColMax: Any = None  # [m_tiles, N]
    ColSum: Any = None
    Tally: Any = None  # TallyArgs


@triton.jit
def stats(z, sim, Target, offs_m, offs_n, mask_m, mask_n, pid_m, pid_n, M, N, args):
    if args.Tally is not None:
        tally(z, sim, offs_m, mask_m, pid_n, M, args.Tally)
    row_max = tl.max(z, axis=1)
    row_sum = tl.sum(exponential(z - finite(row_max)[:, None]), axis=1)
    row = pid_n.to(tl.int64) * M + offs_m
    tl.store(args.RowMax + row, row_max, mask=mask_m)
    tl.store(args.RowSum + row, row_sum, mask=mask_m)
    if args.ColMax is not None:
        z = tl.where(mask_m[:, None], z, float("-inf"))
        col_max = tl.max(z, axis=0)
        col_sum = tl.sum(exponential(z - finite(col_max)[None, :]), axis=0)
        col = pid_m.to(tl.int64) * N + offs_n
        tl.store(args.ColMax + col, col_max, mask=mask_n)
        tl.store(args.ColSum + col, col_sum, mask=mask_n)
    return z


class ExpArgs(NamedTuple):
    """E = exp(z - shift) and its sums: by row, and by column where ColSum is given."""

    shift: Any  # one number for all rows and columns
    RowSum: Any  # [n_tiles, M]
    ColSum: Any = None  # [m_tiles, N]
    Tally: Any = None  # TallyArgs


@triton.jit
def exp(z, sim, Target, offs_m, offs_n, mask_m, mask_n, pid_m, pid_n, M, N, args):
    if args.Tally is not None:
        tally(z, sim, offs_m, mask_m, pid_n, M, args.Tally)
    e = exponential(z - args.shift)
    tl.store(args.RowSum + pid_n.to(tl.int64) * M + offs_m, tl.sum(e, axis=1), mask=mask_m)
    if args.ColSum is not None:
        col_sum = tl.sum(tl.where(mask_m[:, None], e, 0.0), axis=0)
        tl.store(args.ColSum + pid_m.to(tl.int64) * N + offs_n, col_sum, mask=mask_n)
    return e


class GradArgs(NamedTuple):
    """dz = weight * exp(z - shift) per row, plus the same per column where ColShift is given.

    Stored is `gain * dz`, and `gain * entry` at the target. Q receives the row sums of
    dz (sim - target_sim), without the gain and the target, where the row's term is taken against
    the row's target and the column's against the column's. Smooth is subtracted from every admissible dz.
    """

    Gain: Any  # 0-dim or None
    RowShift: Any  # [M]
    RowWeight: Any
    Entry: Any = None  # [M]
    RowTargetSim: Any = None
    ColShift: Any = None  # [N]
    ColWeight: Any = None
    ColTargetSim: Any = None
    Q: Any = None  # [n_tiles, M]
    Smooth: Any = None  # [M]


@triton.jit
def load_softmax(Shift, Weight, offs, mask):
    """Loads shift and weight; a weight of 0 gets shift +inf, because 0 * exp(z - shift) may be NaN."""
    weight = tl.load(Weight + offs, mask=mask, other=0.0)
    shift = tl.load(Shift + offs, mask=mask, other=0.0)
    return tl.where(weight == 0, float("inf"), shift), weight


@triton.jit
def grad(z, sim, Target, offs_m, offs_n, mask_m, mask_n, pid_m, pid_n, M, N, args):
    shift, weight = load_softmax(args.RowShift, args.RowWeight, offs_m, mask_m)
    dz = weight[:, None] * exponential(z - shift[:, None])
    if args.Q is not None:
        target_sim = tl.load(args.RowTargetSim + offs_m, mask=mask_m, other=0.0)
        q = tl.sum(dz * (sim - target_sim[:, None]), axis=1)
    if args.ColShift is not None:
        shift, weight = load_softmax(args.ColShift, args.ColWeight, offs_n, mask_n)
        p = weight[None, :] * exponential(z - shift[None, :])
        dz += p
        if args.Q is not None:
            target_sim = tl.load(args.ColTargetSim + offs_n, mask=mask_n, other=0.0)
            q += tl.sum(p * (sim - target_sim[None, :]), axis=1)
    if args.Q is not None:
        tl.store(args.Q + pid_n.to(tl.int64) * M + offs_m, q, mask=mask_m)
    if args.Smooth is not None:
        smooth = tl.load(args.Smooth + offs_m, mask=mask_m, other=0.0)
        dz -= tl.where(z > float("-inf"), smooth[:, None], 0.0)
    if Target is not None:
        # Computed again: keeping a tile of predicates since the logits spills 16 bytes on sm_100.
        hit = hits(Target, offs_m, mask_m, pid_n, z.shape[1])
        dz = tl.where(hit, tl.load(args.Entry + offs_m, mask=mask_m, other=0.0)[:, None], dz)
    if args.Gain is not None:
        dz *= tl.load(args.Gain)
    return dz
