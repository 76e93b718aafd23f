"""The loss as a formula, on materialised logits. Differentiable any number of times; the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import epilogues
from ..problem import Problem, autocasting, stats_dtype, unit_rows


def why_not(problem: Problem) -> str | None:
    return None


def loss_rows(problem: Problem) -> Tensor:
    """`weight[i] * loss_i` for every row, [M], through ordinary autograd. Costs several [M, N] matrices."""
    if not autocasting(problem.operands[0]):
        return _loss_rows(problem)
    with torch.autocast(problem.device.type, enabled=False):
        return _loss_rows(problem)


def _loss_rows(problem: Problem) -> Tensor:
    dtype = stats_dtype(problem.dtype)
    rows = [unit_rows(x.to(dtype)) if problem.cosine else x.to(dtype) for x in problem.operands]
    parts = []
    for block in problem.blocks:
        z = rows[block.query] @ rows[block.key].T * problem.scale
        if block.bias is not None:
            bias = block.bias.to(dtype)
            z = torch.where(bias == -torch.inf, -torch.inf, z + bias)  # whatever z is there, NaN included
        parts.append(z)
    z = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    if not problem.symmetric:
        # Before the formula: 0 times the NaN gradient of a row without admissible columns is NaN.
        z = z.masked_fill((problem.weight == 0)[:, None], 0)
    loss = epilogues.softmax_rows(z, problem.target, problem.label_smoothing)
    if problem.symmetric:
        diagonal = torch.arange(problem.rows, device=z.device)
        loss = (loss + epilogues.softmax_rows(z.T, diagonal)) / 2
    # Rows that are left out are exactly 0, also where their own logits are not finite.
    return torch.where(problem.weight == 0, 0, problem.weight * loss)
