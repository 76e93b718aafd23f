"""Shared by both sets of hand-written kernels: which modes they have, a safe shift, and the check of vectors."""

from __future__ import annotations

from torch import Tensor

from ..core.problem import Problem

# exp(-69) = 1e-30 is the smallest row sum whose inverse, and products with x, stay normal numbers.
LOWEST_EXPONENT = 69.0
NO_FACTOR = (
    "no kernel multiplies the gradient of single columns by score_margin's factor yet; 'chunked' and 'dense' do, or "
    "leave factor out to drop them"
)


def can_exp(problem: Problem) -> bool:
    return problem.has_safe_shift


def half_softmax(problem: Problem) -> bool:
    return problem.fold is None and not problem.top and not problem.wants_tally  # counts are of rows alone


def shares_prefixes(problem: Problem) -> bool:
    return False  # each is a sweep of its own


def exp_shift(problem: Problem) -> float:
    """Returns the shift for logits within +-bound: exponents are at most 0, or higher if the lowest would underflow."""
    bound = problem.softcap or problem.scale_bound
    if bound is None:
        raise ValueError("exp_rows must have scale_bound or a softcap, got neither; see can_exp")
    return min(abs(bound), LOWEST_EXPONENT - abs(bound))


def check_vector(name: str, x: Tensor) -> None:
    """Checks a vector's stride: kernels take no stride, and would read the wrong numbers."""
    if x.dim() == 1 and not x.is_contiguous():
        raise RuntimeError(
            f"internal error: {name} must be a vector of stride 1 where a kernel reads it, got stride {x.stride(0)}; "
            "please report it, and call .contiguous() on the vectors that you pass"
        )
