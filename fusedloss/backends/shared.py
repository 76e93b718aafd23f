"""What both sets of hand-written kernels are told: a shift that is safe beforehand, and how vectors must lie."""

from __future__ import annotations

from torch import Tensor

from ..core.problem import Problem

# exp(-69) = 1e-30 is the smallest row sum whose inverse, and products with x, stay normal numbers.
LOWEST_EXPONENT = 69.0


def can_exp(problem: Problem) -> bool:
    return problem.has_safe_shift


def exp_shift(problem: Problem) -> float:
    """Logits within +-bound: exponents at most 0, or higher where the lowest would underflow."""
    bound = problem.softcap or problem.scale_bound
    if bound is None:
        raise ValueError("exp_rows must have scale_bound or a softcap, got neither; see can_exp")
    return min(abs(bound), LOWEST_EXPONENT - abs(bound))


def check_vector(name: str, x: Tensor) -> None:
    """A net: kernels take a vector's address and no stride, so another one would be read beside its numbers."""
    if x.dim() == 1 and not x.is_contiguous():
        raise RuntimeError(
            f"internal error: {name} must be a vector of stride 1 where a kernel reads it, got stride {x.stride(0)}; "
            "please report it, and call .contiguous() on the vectors that you pass"
        )
