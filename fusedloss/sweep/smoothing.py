"""Label smoothing for rows that all have the same admissible columns."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.rows import row_chunks
from .gradients import Gradients
from .inputs import Inputs


class Smoothing:
    """Label smoothing without masks is a rank-one correction: it needs the mean column, not the tiles.

    loss_i += eps (z_it - mean_j z_ij) over the admissible columns, those whose bias is not -inf.
    """

    def __init__(self, inputs: Inputs):
        problem = inputs.problem
        self.inputs = inputs
        self.eps = problem.label_smoothing
        self.admissible = [
            torch.ones(problem.operands[block.key].shape[0], dtype=inputs.dtype, device=problem.device)
            if bias is None
            else (bias > -torch.inf).to(inputs.dtype)
            for block, bias in zip(problem.blocks, inputs.biases, strict=True)
        ]
        self.count = torch.stack([a.sum() for a in self.admissible]).sum().clamp_min(1)
        self.mean_key: list[Tensor] = []
        self.mean_sim = torch.zeros_like(problem.weight)
        self.mean_score = torch.zeros_like(problem.weight)
        for block, bias, admissible in zip(problem.blocks, inputs.biases, self.admissible, strict=True):
            col_factor, row_factor = inputs.factors[block.key], inputs.factors[block.query]
            share = admissible / self.count
            mean = _weighted_sum(problem.operands[block.key], share if col_factor is None else share * col_factor)
            sim = _matvec(problem.operands[block.query], mean)
            self.mean_sim = self.mean_sim + (sim if row_factor is None else sim * row_factor)
            self.mean_key.append(mean)
            if bias is not None:
                self.mean_score = self.mean_score + (share * bias.masked_fill(admissible == 0, 0)).sum()
        self.mean_score = self.mean_score + problem.scale * self.mean_sim + self._beside_targets() / self.count

    def _beside_targets(self) -> Tensor:
        """Returns what a margin, and a bias of the negatives alone, add to the rows' targets but to no other column."""
        problem, bias = self.inputs.problem, self.inputs.biases[0]
        added = -problem.margin.cosine * problem.scale
        if problem.bias_on_target or bias is None:
            return added
        return added - bias.masked_fill(self.admissible[0] == 0, 0)[problem.target.clamp(min=0)]

    def losses(self) -> Tensor:
        weight = self.inputs.problem.weight
        loss = self.eps * weight * (self.inputs.prepared.score - self.mean_score).to(weight.dtype)
        return loss.masked_fill(weight == 0, 0)

    def add_to(self, gradients: Gradients) -> None:
        """Adds to the accumulators, before the scale and the gain's inverse multiply them."""
        inputs, problem, weight = self.inputs, self.inputs.problem, self.inputs.problem.weight
        if gradients.scale is not None and inputs.target_sim is not None:
            terms = weight * (inputs.target_sim - self.mean_sim)
            gradients.scale += self.eps * terms.sum(dtype=gradients.scale.dtype)
        gained = weight if gradients.gain is None else weight * gradients.gain
        for number, block in enumerate(problem.blocks):
            row_factor, col_factor = inputs.factors[block.query], inputs.factors[block.key]
            rows = gained if row_factor is None else gained * row_factor
            columns = self.admissible[number] / self.count
            dx, dy, dbias = gradients.operands[block.query], gradients.operands[block.key], gradients.biases[number]
            if dbias is not None:
                dbias -= self.eps * weight.sum() * columns
            if dx is not None:
                dx.accumulator().addr_(rows, self.mean_key[number], alpha=-self.eps)
            if dy is not None:
                mean_query = _weighted_sum(problem.operands[block.query], rows)
                factored = columns if col_factor is None else columns * col_factor
                dy.accumulator().addr_(factored, mean_query, alpha=-self.eps)


def _weighted_sum(x: Tensor, weight: Tensor) -> Tensor:
    """Returns `weight @ x` in the dtype of `weight`, without a converted copy of `x`."""
    total = weight.new_zeros(x.shape[1])
    for chunk in row_chunks(x):
        total += weight[chunk] @ x[chunk].to(weight.dtype)
    return total


def _matvec(x: Tensor, vector: Tensor) -> Tensor:
    out = vector.new_empty(x.shape[0])
    for chunk in row_chunks(x):
        out[chunk] = x[chunk].to(vector.dtype) @ vector
    return out
