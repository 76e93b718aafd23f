"""The CUDA C++ backend. Its extension exists; its sweep does not yet, and this module says so."""

from __future__ import annotations

from collections.abc import Mapping

from ..problem import Problem


def build_info() -> Mapping[str, object] | None:
    """What fusedloss._C was built with, or None where it was not built."""
    try:
        from .. import _C
    except ImportError:
        return None
    return _C.build_info()


def why_not(problem: Problem) -> str | None:
    if build_info() is None:
        return "the extension fusedloss._C was not built (nvcc not found at installation)"
    return "fusedloss._C has no similarity sweep yet"
