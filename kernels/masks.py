"""Masks inside the tile: the columns that compete, from a few numbers per row and per column."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .softmax import hits


class MaskArgs(NamedTuple):
    """A column stays if every given part admits it; tuples hold a vector for each pair."""

    DropRows: Any  # tuple of int64 [M]: equal columns are dropped
    DropKeys: Any  # tuple of int64 [N]
    KeepRows: Any  # tuple of int64 [M]: only equal columns are kept
    KeepKeys: Any
    Dense: Any  # uint8 [M, N] or None: 0 is dropped
    Bits: Any  # int32 [M, cdiv(N, 32)] or None: 1 is dropped
    Threshold: Any  # [M] or None: larger similarities are dropped, except
    Exempt: Any  # a tuple of int64 [M]: these columns
    Skip: Any  # int64 [M] or None: this column is dropped
    Own: Any  # int64 [M] or None: the column whose similarity
    OwnScale: Any  # [] multiplies instead
    stride_dm: Any
    stride_dn: Any


@triton.jit
def admitted(sim, mask_m, mask_n, offs_m, offs_n, pid_n, N, masks, BLOCK_N: tl.constexpr):
    """Returns True for columns that may compete; the target is handled elsewhere."""
    admit = mask_m[:, None] & mask_n[None, :]
    for number in tl.static_range(len(masks.DropRows)):
        rows = tl.load(masks.DropRows[number] + offs_m, mask=mask_m, other=0)
        keys = tl.load(masks.DropKeys[number] + offs_n, mask=mask_n, other=0)
        admit &= rows[:, None] != keys[None, :]
    for number in tl.static_range(len(masks.KeepRows)):
        rows = tl.load(masks.KeepRows[number] + offs_m, mask=mask_m, other=0)
        keys = tl.load(masks.KeepKeys[number] + offs_n, mask=mask_n, other=0)
        admit &= rows[:, None] == keys[None, :]
    if masks.Dense is not None:
        place = masks.Dense + offs_m[:, None] * masks.stride_dm + offs_n[None, :] * masks.stride_dn
        admit &= tl.load(place, mask=mask_m[:, None] & mask_n[None, :], other=0) != 0
    if masks.Bits is not None:
        place = masks.Bits + offs_m[:, None] * tl.cdiv(N, 32) + offs_n[None, :] // 32
        word = tl.load(place, mask=mask_m[:, None] & mask_n[None, :], other=0)
        admit &= ((word >> (offs_n % 32).to(tl.int32)[None, :]) & 1) == 0
    if masks.Threshold is not None:
        above = sim > tl.load(masks.Threshold + offs_m, mask=mask_m, other=0.0)[:, None]
        for number in tl.static_range(len(masks.Exempt)):
            above &= ~hits(masks.Exempt[number], offs_m, mask_m, pid_n, BLOCK_N)
        admit &= ~above
    if masks.Skip is not None:
        admit &= ~hits(masks.Skip, offs_m, mask_m, pid_n, BLOCK_N)
    return admit


class PickArgs(NamedTuple):
    Picked: Any  # [M]: the similarity of the target


@triton.jit
def pick(z, sim, Target, offs_m, offs_n, pid_m, pid_n, M, N, args):
    """Reads one column per row from the products: a separate dot product would round differently."""
    hit = hits(Target, offs_m, offs_m < M, pid_n, z.shape[1])
    found = tl.sum(tl.where(hit, sim, 0.0), axis=1)
    tl.store(args.Picked + offs_m, found, mask=(offs_m < M) & (tl.sum(hit.to(tl.int32), axis=1) > 0))
    return z


class BitsArgs(NamedTuple):
    Threshold: Any  # [M]
    Bits: Any  # int32 [M, cdiv(N, 32)]


@triton.jit
def bits(z, sim, Target, offs_m, offs_n, pid_m, pid_n, M, N, args):
    """Writes one bit a column: 1 if its similarity exceeds the row's threshold."""
    BLOCK_M: tl.constexpr = z.shape[0]
    BLOCK_W: tl.constexpr = z.shape[1] // 32
    above = sim > tl.load(args.Threshold + offs_m, mask=offs_m < M, other=0.0)[:, None]
    shifted = above.to(tl.int32) << (tl.arange(0, z.shape[1]) % 32)[None, :]
    words = tl.sum(tl.reshape(shifted, (BLOCK_M, BLOCK_W, 32)), axis=2)
    offs_w = pid_n * BLOCK_W + tl.arange(0, BLOCK_W)
    place = args.Bits + offs_m[:, None] * tl.cdiv(N, 32) + offs_w[None, :]
    tl.store(place, words, mask=(offs_m < M)[:, None] & (offs_w < tl.cdiv(N, 32))[None, :])
    return z


class TopArgs(NamedTuple):
    Top: Any  # [n_tiles, M]: the tile's largest logit
    Column: Any  # int64 [n_tiles, M]: its column, the first on ties


@triton.jit
def top(z, sim, Target, offs_m, offs_n, pid_m, pid_n, M, N, args):
    largest, index = tl.max(z, axis=1, return_indices=True, return_indices_tie_break_left=True)
    place = pid_n.to(tl.int64) * M + offs_m
    tl.store(args.Top + place, largest, mask=offs_m < M)
    column = pid_n.to(tl.int64) * z.shape[1] + index
    tl.store(args.Column + place, column, mask=offs_m < M)
    return z


@triton.jit
def store(z, sim, Target, offs_m, offs_n, pid_m, pid_n, M, N, args):
    """Stores the similarities."""
    return sim
