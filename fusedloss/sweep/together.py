"""Sweeps of several prefixes of the same embeddings, side by side: their similarities come out of one product.

A chunk of rows has a part of the workspace for each prefix. The products of the gradients are each prefix's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends.protocol import Prefixes, Result, Sweeps
from ..core.numerics import slices
from ..core.problem import Problem
from ..core.rows import fresh
from ..core.strips import Settled, Strip
from . import chunks
from .inputs import part

if TYPE_CHECKING:
    from . import _Sweep


def fit(problem: Problem, dims: Sequence[int], backend: Sweeps) -> bool:
    """Whether sweeps of these prefixes go side by side: one direction of a plain softmax, whose chunks of MIN_ROWS rows
    have a workspace for all of them. Masks and biases leave no registers beside the accumulator: they spill."""
    plain = not (problem.symmetric or problem.mirrored or problem.label_smoothing or problem.wants_tally)
    if not plain or problem.masked or problem.softcap:
        return False
    if any(block.bias is not None or block.penalty or block.own_penalty for block in problem.blocks):
        return False
    return len(dims) > 1 and chunks.rows_of_panels(problem, backend, len(dims)) >= min(chunks.MIN_ROWS, problem.rows)


class Together:
    """sweeps: of the prefixes, ascending."""

    def __init__(self, sweeps: Sequence[_Sweep], backend: Prefixes):
        self.sweeps, self.backend, self.longest = sweeps, backend, sweeps[-1]

    def run(self) -> list[Result]:
        longest = self.longest
        if not longest.problem.rows:
            return [sweep.run() for sweep in self.sweeps]
        if not longest.wants.any:
            found = [self._losses(self._stats(c, self._strips(c))) for c in longest.admission.stats_chunks()]
        else:
            write = self._exp if self.backend.can_exp(longest.problem) else self._grad
            found = [self._losses(write(chunk, outs)) for chunk, outs in self._chunks()]
        losses = [torch.cat(list(parts)) for parts in zip(*found, strict=True)]
        return [sweep.result(own, []) for sweep, own in zip(self.sweeps, losses, strict=True)]

    @staticmethod
    def _losses(rows: list[Settled]) -> list[Tensor]:
        return [of_prefix.loss for of_prefix in rows]

    def _chunks(self) -> list[tuple[slice, list[list[Tensor]]]]:
        problem, count = self.longest.problem, len(self.sweeps)
        rows, width = chunks.rows_of_panels(problem, self.backend, count), chunks.width_of(problem)
        workspace = fresh(problem.scale, (rows, count * width), self.backend.workspace_dtype(problem))
        panels = workspace.split(width, dim=1)
        return [(c, [chunks.of_blocks(problem, panel, c) for panel in panels]) for c in slices(problem.rows, rows)]

    def _strips(self, chunk: slice) -> list[list[Strip]]:
        """Returns the strips, whose masks are found once."""
        masks = [strip.mask for strip in self.longest.admission.strips(chunk)]
        return [[sweep.inputs.strip(number, chunk, mask) for number, mask in enumerate(masks)] for sweep in self.sweeps]

    def _stats(self, chunk: slice, strips: list[list[Strip]]) -> list[Settled]:
        found = zip(self.sweeps, self.backend.stats_prefixes(strips), strict=True)
        return [sweep.inputs.settle(chunk, sums) for sweep, sums in found]

    def _exp(self, chunk: slice, outs: list[list[Tensor]]) -> list[Settled]:
        found = self.backend.exp_prefixes(self.longest.problem, self._strips(chunk), outs)
        return [
            sweep.after_exp(chunk, own, sums, None) for sweep, own, sums in zip(self.sweeps, outs, found, strict=True)
        ]

    def _grad(self, chunk: slice, outs: list[list[Tensor]]) -> list[Settled]:
        strips = self._strips(chunk)
        rows = self._stats(chunk, strips)
        pairs = list(zip(self.sweeps, rows, strict=True))
        softmaxes = [own.softmax(part(sweep.inputs.target_sim, chunk)) for sweep, own in pairs]
        gains = [sweep.gradients.gain for sweep in self.sweeps]
        qs = self.backend.grad_prefixes(strips, outs, softmaxes, [own.entry for own in rows], gains)
        for sweep, own_outs, q in zip(self.sweeps, outs, qs, strict=True):
            sweep.gradients.contract(chunk, own_outs)
            sweep.gradients.add_scale(q)
        return rows
