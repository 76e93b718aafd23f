"""Multi-similarity and circle loss: both weigh every positive and every negative of a row."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from ..core import checks
from ..core.numerics import constant, stats_dtype
from ..core.problem import Fold
from ._folded import fold_loss, fold_problem
from ._options import Call, SweepOptions, expanded
from ._softmax import autocast, over


@expanded
def multi_similarity(
    embeddings: Tensor,
    labels: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    **options: Unpack[SweepOptions],
) -> Tensor:
    """Multi-similarity loss (Wang et al. 2019) as in pytorch-metric-learning, over cosines s, without its miner.

        loss_i = 1/alpha log(1 + sum_{p in P(i)} exp(-alpha (s_ip - base)))
               + 1/beta  log(1 + sum_{n in N(i)} exp( beta  (s_in - base)))

    P(i) are the other rows of row i's label, N(i) those of other labels; the mean is over all rows.

    Args:
        embeddings: `[N, D]`, normalised inside. labels: int64 `[N]`, any values.
        alpha, beta: positive. base: a cosine.
        reduction: "mean", "sum" or "none" (`[N]`).

    Returns:
        A 0-dim tensor (`[N]` for "none"), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> fusedloss.multi_similarity(encoder(x), y).backward()
    """
    checks.scalar("alpha", alpha, None, positive=True)
    checks.scalar("beta", beta, None, positive=True)
    checks.number("base", base)
    numbers = (float(alpha), float(beta), float(base))
    return _folded("multi_similarity", embeddings, labels, numbers, Call(**options), every_row=True)[0]


@expanded
def circle(
    embeddings: Tensor,
    labels: Tensor,
    *,
    m: float = 0.4,
    gamma: float = 80.0,
    **options: Unpack[SweepOptions],
) -> Tensor:
    """Circle loss (Sun et al. 2020) as in pytorch-metric-learning, over cosines s.

        loss_i = log(1 + sum_{n in N(i)} exp( gamma relu(s_in + m) (s_in - m))
                       * sum_{p in P(i)} exp(-gamma relu(1 + m - s_ip) (s_ip - 1 + m)))

    The factors relu(.) are constants to the gradient. A row without a positive or without a negative has loss 0; the
    mean is over the rows whose loss is above 0.

    Args:
        embeddings: `[N, D]`, normalised inside. labels: int64 `[N]`, any values.
        m: the relaxation margin. gamma: the scale, positive.
        reduction: "mean", "sum" or "none" (`[N]`).

    Returns:
        A 0-dim tensor (`[N]` for "none"), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> fusedloss.circle(encoder(x), y, m=0.25, gamma=256).backward()
    """
    checks.number("m", m)
    checks.scalar("gamma", gamma, None, positive=True)
    call = Call(**options)
    loss, count = _folded("circle", embeddings, labels, (float(m), float(gamma)), call)
    return over(loss, count) if call.reduction == "mean" and count is not None else loss


def _folded(
    name: str,
    embeddings: Tensor,
    labels: Tensor,
    numbers: tuple[float, ...],
    call: Call,
    *,
    every_row: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """every_row: the mean counts all rows."""
    checks.embeddings(embeddings=embeddings)
    checks.integers("labels", labels, (embeddings.shape[0],), embeddings)
    (x,) = autocast(embeddings)
    one = constant(1.0, stats_dtype(x.dtype), x.device)
    weight = one.expand(x.shape[0]).contiguous()
    fold = Fold(name, numbers, labels=(labels, labels), itself=True)
    problem = fold_problem([x], one, weight, fold, call, cosine=True)
    return fold_loss(problem, call, over=len(x) if every_row else None)
