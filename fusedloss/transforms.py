"""Functions of each row's own loss, for `transform=`: the loss becomes `sum_i w_i phi(l_i)`.

The gradient of `phi(l_i)` is `phi'(l_i)` times that of `l_i`, and the row's loss is known when its sums are. So a
transform takes no further pass over the similarities. In eager mode any function of a tensor of losses `[M]` is a
transform, if each of its results depends on its own row alone. Where gradients are wanted, autograd must be able to
differentiate it, and it may read no other tensor that requires a gradient.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .core import checks
from .core.transforms import FORMULAS, Transform

__all__ = ["Transform", "bind", "clipped", "focal", "generalised", "refined_logq"]


def focal(gamma: float = 2.0, *, detach: bool = False) -> Transform:
    """Weights each row by its miss (Lin et al. 2017): `phi(l) = (1 - e^-l)^gamma l`, where `e^-l` is p of the target.

    detach: the factor receives no gradient, as in KaLM-Embedding-V2 (arXiv 2506.20923). gamma: at least 0.

    Example:
        >>> fusedloss.info_nce(query, key, transform=fusedloss.transforms.focal(0.5)).backward()
    """
    checks.number("gamma", gamma, least=0)
    return Transform("focal", float(gamma), bool(detach))


def refined_logq() -> Transform:
    """The refined logQ correction (arXiv 2507.09331): `phi(l) = [1 - e^-l] l`, whose factor receives no gradient.

    Pass the correction as `key_bias`.
    """
    return Transform("focal", 1.0, True)


def generalised(q: float) -> Transform:
    """Generalised cross-entropy (Zhang and Sabuncu 2018): `phi(l) = (1 - e^(-q l)) / q`, for labels with noise.

    q: from 0, the cross-entropy, which it may not be, to 1, the mean absolute error.
    """
    checks.number("q", q)
    if not 0 < q <= 1:
        raise ValueError(f"q must be above 0 and at most 1, got {q}; leave the transform out for 0")
    return Transform("generalised", float(q))


def clipped(maximum: float) -> Transform:
    """Truncates: `phi(l) = min(l, maximum)`. Rows above have no gradient."""
    checks.number("maximum", maximum)
    if maximum <= 0:
        raise ValueError(f"maximum must be above 0, got {maximum}; pass the largest loss that a row may have")
    return Transform("clipped", float(maximum))


def bind(transform: Transform | Callable[[Tensor], Tensor] | None, decoupled: bool = False) -> Transform | None:
    """Returns what `transform=` means, of a loss that may be negative if it is `decoupled`."""
    if isinstance(transform, Transform) and transform.name == "focal" and decoupled:
        raise ValueError(
            "transform must not be focal or refined_logq with decoupled=True, whose losses may be negative, got it; "
            "leave one of them out"
        )
    if isinstance(transform, Transform) and transform.name not in FORMULAS:
        raise ValueError(
            f"transform must be one that fusedloss.transforms makes, such as focal(2.0), got {transform}; pass a "
            "function as it is"
        )
    if transform is None or isinstance(transform, Transform):
        return transform
    checks.function("transform", transform, "fusedloss.transforms.focal(2.0)")
    return Transform("function", function=transform)
