"""The shift that the host knows to be safe before any logit is: what lets hand-written kernels exponentiate at once."""

from __future__ import annotations

import torch

from ..problem import Problem

# exp(-69) = 1e-30 is the smallest row sum whose inverse, and products with x, stay normal numbers.
LOWEST_EXPONENT = 69.0
SAFE_SCALE = 59.0  # up to here exponents lie within [-69, 49]


def can_exp(problem: Problem) -> bool:
    """Whether the host knows a shift that keeps every exponential and every row's sum normal."""
    bound = problem.bound
    return bound is not None and bound <= SAFE_SCALE and problem.dtype != torch.float16 and not problem.smooths_by_row


def exp_shift(problem: Problem) -> float:
    """Logits within +-bound: exponents at most 0, or higher where the lowest would underflow."""
    bound = problem.softcap or problem.scale_bound
    if bound is None:
        raise ValueError("exp_rows needs scale_bound or a softcap: see can_exp")
    return min(abs(bound), LOWEST_EXPONENT - abs(bound))
