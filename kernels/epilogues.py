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
    largest, index = tl.max(z, axis=1, return_indices=True, return_indices_tie_break_left=True)
    place = pid_n.to(tl.int64) * M + offs_m
    tl.store(args.Top + place, largest, mask=mask_m)
    column = pid_n.to(tl.int64) * z.shape[1] + index
    tl.store(args.Column + place, column, mask=mask_m)
    return z


@triton.jit
def store(z, sim, Target, offs_m, offs_n, mask_m, mask_n, pid_m, pid_n, M, N, args):
    """Stores the similarities."""
    return sim
