"""Which columns of a tile may compete: masks, biases, guides, and the counts of what they leave."""

# maths.md: Logits; Masks and thresholds; Softcap
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.mask import GuideRule, StripMask
from ...core.rows import guide_threshold
from ...core.strips import Strip, Tally
from .tiles import Rows, fill_, hits, rows_of, similarities, similarity, tile_buffer, tiles, view, wide_of


def shrink_(sim: Tensor, strip: Strip, tile: slice, unit: Tensor | None = None) -> Tensor | None:
    """Multiplies similarities above the mask's threshold by its factor; returns the multipliers, None if all are 1.

    unit: what `sim` is times the similarities, if not 1.
    """
    if strip.mask is None or strip.mask.factor is None or strip.mask.threshold is None:
        return None
    threshold = strip.mask.threshold if unit is None else strip.mask.threshold * unit
    above = _above(sim, strip.mask, threshold, tile)
    if _as_numbers(sim):
        factors = above.neg_().add_(1).clamp_(min=strip.mask.factor)  # which lies between 0 and 1
    else:
        factors = torch.where(above, strip.mask.factor, sim.new_ones(()))
    sim.mul_(factors)
    return factors


def _as_numbers(z: Tensor) -> bool:
    """Whether tests of a tile are 0 and 1 in its dtype, as `drop_` takes them: on CPUs a bool matrix takes 0.8 ns an
    element to write and `masked_fill_` 2.6, numbers 0.15 and three passes of 0.12 (Zen 2)."""
    return z.device.type == "cpu"


def _tested(z: Tensor, test: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
    """A comparison with the shape of `z`."""
    if not _as_numbers(z):
        return test(x, y)
    if x.dtype == z.dtype:
        return test(x, y, out=torch.empty_like(z))
    return torch.empty_like(z).copy_(test(x, y).view(torch.uint8))


def drop_(z: Tensor, dropped: Tensor) -> Tensor:
    """Sets `z` to -inf where `dropped`, even NaN; overwrites `dropped` where that holds numbers."""
    if dropped.dtype == torch.bool:
        return z.masked_fill_(dropped, -math.inf)
    bounds = dropped.sub_(0.5).mul_(-math.inf)
    torch.minimum(z, bounds, out=z)
    if bool(z.amax().isnan()):
        z.masked_fill_(bounds < 0, -math.inf)
    return z


def _above(values: Tensor, mask: StripMask, threshold: Tensor, tile: slice) -> Tensor:
    above = _tested(values, torch.gt, values, threshold[:, None])
    for column in mask.exempt.unbind(1) if mask.exempt is not None else ():
        fill_(above, column, tile, False)
    return above


def logits(sim: Tensor, strip: Strip, tile: slice, out: Tensor) -> Tensor:
    return admit_(torch.mul(sim, strip.scale, out=out), strip, tile)


def admit_(z: Tensor, strip: Strip, tile: slice, unit: float = 1.0, far: float | None = None) -> Tensor:
    """Turns `unit * scale * sim` into logits, with softcap, and -inf for columns that may not compete, even NaN.

    The target gets -inf, too, because the sums leave it out. `far`: added to columns that a guide drops, instead of
    -inf, in a tenth of `masked_fill_`'s time.
    """
    dropped = [] if strip.mask is None else list(_dropped(z, strip.mask, strip.scale * unit, tile))
    if strip.own_scale is not None:
        inside, index = hits(strip.own, tile)
        entry = z.gather(1, index)
        z.scatter_(1, index, torch.where(inside, entry * (strip.own_scale / strip.scale), entry))
    removed = None
    if strip.bias is not None:
        bias = strip.bias[tile]
        z.add_(bias if unit == 1 else (bias.to(wide_of(z)) * unit).to(z.dtype))
        removed = bias == -math.inf
    if strip.softcap:
        z.div_(strip.softcap).tanh_().mul_(strip.softcap)
    if removed is not None and (z.device.type != "cpu" or bool(removed.any())):
        z.masked_fill_(removed, -math.inf)
    for columns in dropped:
        drop_(z, columns)
    if strip.mask is not None and strip.mask.dropped is not None:
        dropped_by_guide = _drops(strip.mask.dropped, tile)
        if far is None:
            z.masked_fill_(dropped_by_guide > 0, -math.inf)
        else:
            z.add_(dropped_by_guide, alpha=far)
    if strip.mask is not None and strip.mask.skip is not None:
        fill_(z, strip.mask.skip, tile, -math.inf)
    if strip.target is not None:
        fill_(z, strip.target, tile, -math.inf)
    if strip.mask is not None and strip.mask.without is not None:
        _leave_out_(z, strip.mask.without, tile)
    return z


def softcap_slope(z: Tensor, softcap: float, out: Tensor) -> Tensor:
    """Returns the softcap's derivative from its value z; 0 for the -inf of a dropped column."""
    return torch.addcmul(z.new_ones(()), z, z, value=-(softcap**-2), out=out).clamp_(min=0)


def _dropped(z: Tensor, mask: StripMask, scale: Tensor | None, tile: slice) -> Iterator[Tensor]:
    """Yields the dropped columns of the tile `z = scale * sim` for each mask except the guide's, see `_as_numbers`."""
    for compare in mask.compare:
        yield _tested(z, torch.ne if compare.keep else torch.eq, compare.rows[:, None], compare.keys[tile])
    if mask.dense is not None:
        dense = mask.dense[:, tile]
        yield torch.empty_like(z).copy_(dense.view(torch.uint8)).neg_().add_(1) if _as_numbers(z) else ~dense
    if mask.threshold is not None and mask.factor is None and scale is not None:
        yield _above(z, mask, mask.threshold * scale, tile)


def admitted(mask: StripMask, tile: slice, target: Tensor | None = None) -> Tensor:
    """Returns True for columns that no part of a mask drops, for masks that do not depend on similarities.

    target: `[R]`, columns that only `skip` drops.
    """
    drops = None if mask.dropped is None else _drops(mask.dropped, tile)
    like = next(t for t in (*(c.rows for c in mask.compare), mask.dense, mask.skip, drops) if t is not None)
    z = torch.zeros(like.shape[0], tile.stop - tile.start, device=like.device)
    for dropped in _dropped(z, mask, None, tile):
        drop_(z, dropped)
    if target is not None:
        fill_(z, target, tile, 0)
    if mask.skip is not None:
        fill_(z, mask.skip, tile, -math.inf)
    return z == 0 if drops is None else (z == 0) & (drops == 0)


def _leave_out_(z: Tensor, columns: Tensor, tile: slice) -> None:
    """Sets `z[i, columns[i, e]] = -inf` for those in the tile. Added, since others would overwrite at the edges."""
    index = columns - tile.start
    inside = (index >= 0) & (index < z.shape[1])
    z.scatter_add_(1, index.clamp_(0, z.shape[1] - 1), torch.where(inside, -math.inf, z.new_zeros(())))


def count_(tally: Tally | None, strip: Strip, z: Tensor, sim: Tensor | None, score: Tensor) -> None:
    """Adds the tile to the tally. `sim` None: it is `z / scale`, and its sum is not wanted."""
    if tally is None:
        return
    admitted = z > -math.inf
    tally.admitted.add_(admitted.sum(1))
    tally.above.add_((z > score[:, None]).sum(1))
    torch.maximum(tally.maximum, z.amax(1), out=tally.maximum)
    if sim is not None:
        tally.z.add_(z.masked_fill(~admitted, 0).sum(1))
        tally.sim.add_(sim.masked_fill(~admitted, 0).sum(1))


class Drops(NamedTuple):
    """The columns of a block that a guide drops: 1, else 0."""

    stored: Tensor | None  # block 0's, from which the threshold was read; others are computed tile by tile
    strip: Strip
    x: Rows
    threshold: Tensor
    buffer: Tensor


def guide_room(strip: Strip) -> tuple[int, int]:
    return strip.x.shape[0], strip.y.shape[0]


def guide_rows(strips: list[Strip], rule: GuideRule, room: Tensor, own: Tensor | None = None) -> list[Drops]:
    """Returns the guide's drops of each block of a chunk. `strips` hold its embeddings; `room` is for block 0.

    The threshold is read from the product that contains the target: a separate dot product would round differently, and
    half the positives would exceed their own threshold. own: `[R]`, the values read earlier, if no block has the
    target.
    """
    first = strips[0]
    stored = room[: first.x.shape[0], : first.y.shape[0]]
    similarities(first, stored)
    own = _at_target(stored, first.target) if own is None else own
    threshold = guide_threshold(own, rule, first.x.shape[1])[:, None]
    for tile in tiles(first):
        stored[:, tile].gt_(threshold)
    buffer = tile_buffer(strips) if len(strips) > 1 else threshold
    known = {id(first.x): rows_of(first)}
    for strip in strips:
        if id(strip.x) not in known:
            known[id(strip.x)] = rows_of(strip)
    return [Drops(stored if s is first else None, s, known[id(s.x)], threshold, buffer) for s in strips]


def guide_scores(strip: Strip, room: Tensor) -> Tensor:
    """Returns `[R]`, the guide's similarities of the rows' targets, as `guide_rows` reads them."""
    stored = room[: strip.x.shape[0], : strip.y.shape[0]]
    similarities(strip, stored)
    return _at_target(stored, strip.target)


def _at_target(values: Tensor, target: Tensor | None) -> Tensor:
    assert target is not None
    return values.gather(1, target.clamp(min=0)[:, None])[:, 0]


def _drops(drops: Drops, tile: slice) -> Tensor:
    if drops.stored is not None:
        return drops.stored[:, tile]
    out = view(drops.buffer, drops.x.x.shape[0], tile)
    similarity(drops.strip, drops.x, tile, out)
    return out.gt_(drops.threshold)
