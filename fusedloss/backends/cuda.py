"""The CUDA C++ backend. Its extension exists; its sweep does not yet, and this module says so."""

from __future__ import annotations

from ..problem import Problem


def why_not(problem: Problem) -> str | None:
    try:
        from .. import _C  # noqa: F401
    except ImportError:
        return "the extension fusedloss._C was not built (nvcc not found at installation)"
    return "fusedloss._C has no similarity sweep yet"
