"""Contrastive tension with in-batch negatives: one sentence, two encoders."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from ..core import checks
from ._options import SweepOptions, expanded
from .clip import clip


@expanded
def contrastive_tension_in_batch(
    a: Tensor,
    b: Tensor,
    logit_scale: float | Tensor = 20.0,
    **options: Unpack[SweepOptions],
) -> Tensor:
    """Contrastive tension with in-batch negatives (Carlsson et al. 2021), as in sentence-transformers.

        z_ij   = logit_scale * cos(a_i, b_j)
        loss_i = (logsumexp_j z_ij + logsumexp_j z_ji) / 2 - z_ii

    a, b: `[B, D]`, the same sentences by two encoders; normalised inside. logit_scale: the multiplier itself; in
    sentence-transformers it is the exponential of a learnt parameter that starts at log(20). This is `clip` with
    `normalize=True`, whose other parameters, result and errors it shares.

    Example:
        >>> fusedloss.contrastive_tension_in_batch(encoder_1(x), encoder_2(x), log_scale.exp()).backward()
    """
    checks.embeddings(a=a, b=b)
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"b must have {a.shape[0]} rows, one for each sentence of a, got {b.shape[0]}")
    loss = clip(a, b, logit_scale, normalize=True, **options)
    assert isinstance(loss, Tensor)
    return loss
