"""Masks inside the tile: the columns that compete, from a few numbers per row and per column."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .softmax import hits

# maths.md: Masks and thresholds


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
