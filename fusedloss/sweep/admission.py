"""Which columns may compete in a row: a block's mask and a guide's, for one chunk."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from ..backends.protocol import Admits
from ..core.mask import StripMask
from ..core.numerics import rows_of, slices, stats_dtype
from ..core.problem import Block
from ..core.rows import fresh, score_ties, tie_to_exact
from ..core.strips import Strip
from . import chunks
from .inputs import Elsewhere, Inputs, part, unit


class Admission:
    """masks: each block's, for all rows. guides: a strip of all rows for each masked block; block 0 has targets."""

    def __init__(self, inputs: Inputs, elsewhere: Elsewhere | None = None):
        problem = inputs.problem
        self.inputs, self.problem, self.backend, self.elsewhere = inputs, problem, inputs.backend, elsewhere
        self.masks = [self._mask(number, block) for number, block in enumerate(problem.blocks)]
        self.guides = self._guides()
        self.room: Tensor | None = None  # of the guide's similarities of a chunk
        self.chunk = slice(0, 0)  # the chunk of the last call of `admitted`, and its masks
        self.last: list[StripMask | None] = []

    def _mask(self, number: int, block: Block) -> StripMask | None:
        """Returns a block's mask; a margin's threshold is a share of the target's similarity plus the margin."""
        mask, targets = block.mask, self.problem.targets
        further = None if number or targets is None or targets.columns.shape[1] == 1 else targets.columns[:, 1:]
        if not mask.given:
            return None if further is None else StripMask(without=further)
        threshold = None if self.elsewhere is None else self.elsewhere.thresholds[number]
        if mask.margin is not None and threshold is None:
            target_sim = self.inputs.prepared.target_sim
            assert target_sim is not None
            own = target_sim if mask.relative == 1 else target_sim * mask.relative
            threshold = own + (self.ties + mask.margin)
        return StripMask.of(mask, threshold)._replace(without=further)

    @functools.cached_property
    def ties(self) -> Tensor | float:
        """Returns the most by which a similarity may exceed the target's and still be a tie, `[M]` or a number."""
        first, operands = self.problem.blocks[0], self.inputs.operands
        if self.problem.cosine:
            return tie_to_exact(operands[first.query])
        x, y = operands[first.query][: self.problem.rows], operands[first.key]
        return score_ties(x, y, self.problem.target.clamp(min=0))

    def _guides(self) -> dict[int, Strip]:
        problem, backend = self.problem, self.backend
        if problem.blocks[0].mask.guide is None:
            return {}
        own = {id(x): x for block in problem.blocks for x in block.mask.guide or ()}
        units = backend.takes_units(replace(problem, operands=tuple(own.values()), cosine=True, label_smoothing=0.0))
        sides: dict[int, tuple[Tensor, Tensor | None]] = {}
        for place, x in own.items():
            x = backend.operand(x)
            factor = backend.inverse_norms(x)
            sides[place] = (unit(x, factor), None) if units else (x, factor)
        one, strips = torch.ones_like(problem.scale), {}
        for number, block in enumerate(problem.blocks):
            if block.mask.guide is None:  # the guide does not mask this direction
                continue
            (x, row_factor), (y, col_factor) = (sides[id(side)] for side in block.mask.guide)
            target = problem.target if number == 0 else None
            scale, onednn = one.to(stats_dtype(x.dtype)), self.inputs.chosen(x).sim
            strips[number] = Strip(x, y, scale, row_factor, col_factor, None, target, onednn=onednn)
        return strips

    def strips(self, chunk: slice) -> list[Strip]:
        """Returns the strips of a chunk of rows, with their masks."""
        masks = [None if mask is None else mask.rows(chunk) for mask in self.masks]
        if self.guides:
            parts = [self._guide(number, chunk) for number in self.guides]
            own = None if self.elsewhere is None else part(self.elsewhere.guide, chunk)
            drops = self.backend.guide_rows(parts, self.problem.guide_rule, self._room(parts[0]), own)
            for number, dropped in zip(self.guides, drops, strict=True):
                masks[number] = (masks[number] or StripMask())._replace(dropped=dropped)
        return [self.inputs.strip(number, chunk, mask) for number, mask in enumerate(masks)]

    def admitted(self, block: int, rows: slice, columns: slice) -> Tensor | None:
        """Returns a tile, True for columns that may compete; None: all. Tiles are asked for chunk by chunk."""
        if rows != self.chunk:
            self.last, self.chunk = [strip.mask for strip in self.strips(rows)], rows
        mask = self.last[block]
        return None if mask is None else cast(Admits, self.backend).admitted(mask, columns)

    def guide_scores(self) -> Tensor | None:
        """Returns the guide's similarities of the targets, for all rows."""
        if not self.guides:
            return None
        found = []
        for chunk in self.stats_chunks():
            strip = self._guide(0, chunk)
            found.append(self.backend.guide_scores(strip, self._room(strip)))
        return torch.cat(found) if found else self.guides[0].scale.new_empty(0)

    def _guide(self, number: int, chunk: slice) -> Strip:
        guide = self.guides[number]
        x, row_factor = rows_of(guide.x, chunk), part(guide.row_factor, chunk)
        return guide._replace(x=x, row_factor=row_factor, target=part(guide.target, chunk))

    def _room(self, strip: Strip) -> Tensor:
        if self.room is None:  # the first chunk is the largest
            self.room = fresh(strip.scale, self.backend.guide_room(strip))
        return self.room

    def stats_chunks(self) -> Iterator[slice]:
        """Chunks of a sweep that stores nothing; the storing sweep's with a guide, so that both have one mask, and with
        several targets, which may become bits."""
        problem = self.problem
        as_stored = self.guides or problem.targets is not None
        rows = chunks.workspace_shape(problem, self.backend)[0][0] if as_stored else chunks.stats_rows(problem.device)
        return slices(problem.rows, rows)
