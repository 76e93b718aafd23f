"""Epilogues beside the softmax's: what is read out of a tile for guides, mined losses and folds in torch."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .softmax import hits


class PickArgs(NamedTuple):
    Picked: Any  # [M]: the similarity of the target


@triton.jit
def pick(z, sim, Target, offs_m, offs_n, mask_m, mask_n, pid_m, pid_n, M, N, args):
    """Reads one column per row from the products: a separate dot product would round differently."""
    hit = hits(Target, offs_m, mask_m, pid_n, z.shape[1])
    found = tl.sum(tl.where(hit, sim, 0.0), axis=1)
    tl.store(args.Picked + offs_m, found, mask=mask_m & (tl.sum(hit.to(tl.int32), axis=1) > 0))
    return z


class BitsArgs(NamedTuple):
    Threshold: Any  # [M]
    Bits: Any  # int32 [M, cdiv(N, 32)]


@triton.jit
def bits(z, sim, Target, offs_m, offs_n, mask_m, mask_n, pid_m, pid_n, M, N, args):
    """Writes one bit a column: 1 if its similarity exceeds the row's threshold."""
    BLOCK_M: tl.constexpr = z.shape[0]
    BLOCK_W: tl.constexpr = z.shape[1] // 32
    above = sim > tl.load(args.Threshold + offs_m, mask=mask_m, other=0.0)[:, None]
    shifted = above.to(tl.int32) << (tl.arange(0, z.shape[1]) % 32)[None, :]
    words = tl.sum(tl.reshape(shifted, (BLOCK_M, BLOCK_W, 32)), axis=2)
    offs_w = pid_n * BLOCK_W + tl.arange(0, BLOCK_W)
    place = args.Bits + offs_m[:, None] * tl.cdiv(N, 32) + offs_w[None, :]
    tl.store(place, words, mask=mask_m[:, None] & (offs_w < tl.cdiv(N, 32))[None, :])
    return z


class TopArgs(NamedTuple):
    Top: Any  # [n_tiles, M]: the tile's largest logit
    Column: Any  # int64 [n_tiles, M]: its column, the first on ties


@triton.jit
def top(z, sim, Target, offs_m, offs_n, mask_m, mask_n, pid_m, pid_n, M, N, args):
    place = pid_n.to(tl.int64) * M + offs_m
    _largest(z, True, args.Top + place, args.Column + place, mask_m, pid_n.to(tl.int64) * z.shape[1], 1)
    return z


@triton.jit
def _largest(value, chosen, Values, Places, mask, first, axis: tl.constexpr):
    # A NaN is no value: of two, the reduction takes one by their order, and would lose what stands before it.
    value = tl.where(chosen & (value == value), value, float("-inf"))
    largest, index = tl.max(value, axis=axis, return_indices=True, return_indices_tie_break_left=True)
    tl.store(Values, largest, mask=mask)
    tl.store(Places, first + index, mask=mask)


class OpposedArgs(NamedTuple):
    """Of one matrix against itself. First the largest value of another label, then the largest of the negated values of
    a row's own label, itself left out: [2, n_tiles, M] and, of the tile's columns as rows, [2, m_tiles, N]."""

    Labels: Any  # int64 [M]
    KeyLabels: Any  # int64 [N]
    Own: Any  # int64 [M] on the diagonal, or None
    RowBias: Any  # [M] or None
    ColBias: Any  # [N] or None
    Values: Any
    Places: Any  # int64: the columns, the first on ties
    stride: Any  # from the first to the second
    ColValues: Any = None
    ColPlaces: Any = None  # int64: the rows
    col_stride: Any = None


@triton.jit
def opposed(z, sim, Target, offs_m, offs_n, mask_m, mask_n, pid_m, pid_n, M, N, args):
    rows = tl.load(args.Labels + offs_m, mask=mask_m, other=0)
    keys = tl.load(args.KeyLabels + offs_n, mask=mask_n, other=0)
    there, same = mask_m[:, None] & mask_n[None, :], rows[:, None] == keys[None, :]
    other, same = there & ~same, there & same  # of labels
    if args.Own is not None:
        same &= ~hits(args.Own, offs_m, mask_m, pid_n, z.shape[1])
    value = z
    if args.ColBias is not None:
        value = z + tl.load(args.ColBias + offs_n, mask=mask_n, other=0.0)[None, :]
    place, first = pid_n.to(tl.int64) * M + offs_m, pid_n.to(tl.int64) * z.shape[1]
    _largest(value, other, args.Values + place, args.Places + place, mask_m, first, 1)
    place += args.stride
    _largest(-value, same, args.Values + place, args.Places + place, mask_m, first, 1)
    if args.ColValues is not None:
        value = z
        if args.RowBias is not None:
            value = z + tl.load(args.RowBias + offs_m, mask=mask_m, other=0.0)[:, None]
        place, first = pid_m.to(tl.int64) * N + offs_n, pid_m.to(tl.int64) * z.shape[0]
        _largest(value, other, args.ColValues + place, args.ColPlaces + place, mask_n, first, 0)
        place += args.col_stride
        _largest(-value, same, args.ColValues + place, args.ColPlaces + place, mask_n, first, 0)
    return z


@triton.jit
def store(z, sim, Target, offs_m, offs_n, mask_m, mask_n, pid_m, pid_n, M, N, args):
    """Stores the similarities."""
    return sim
