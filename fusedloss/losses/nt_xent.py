"""NT-Xent (SimCLR) and its decoupled form (DCL): two views of a batch, each view against all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor

from .. import transforms
from ..core import checks
from ..core.mask import Mask
from ..core.numerics import filled, row_numbers
from ..core.problem import Block, Problem
from ..core.transforms import Transform
from . import _straight as straight
from ._options import Call, CountingAcrossOptions, CountingOptions, expanded
from ._softmax import Loss, as_scale, autocast, counting_mean_of, result_of
from ._targets import check_debiased


@expanded
def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    transform: Transform | Callable[[Tensor], Tensor] | None = None,
    debiased: float = 0.0,
    **options: Unpack[CountingAcrossOptions],
) -> Loss:
    """NT-Xent (Chen et al. 2020, SimCLR): 2B rows, each view's positive is the other view of the same sample.

        u      = the unit rows of [z1; z2];   pos(i) = (i + B) mod 2B
        loss_i = logsumexp_{j != i} <u_i, u_j> / temperature  -  <u_i, u_pos(i)> / temperature

    Equal to pytorch-metric-learning's NTXentLoss on [z1; z2] with labels [0..B-1, 0..B-1], whose memory is cubic.

    Args:
        z1, z2: `[B, D]`, two views of each sample; normalised inside.
        temperature: a positive number, or a tensor of one element, which receives a gradient.
        transform: a function of each row's own loss: one of `fusedloss.transforms`, or a function of a tensor `[2B]`.
        debiased: the share of the negatives that are none in truth (Chuang et al. 2020): see `info_nce`.
        reduction: "mean" over the 2B rows, "sum", or "none" (`[2B]`, those of z1 first).

    Returns:
        A 0-dim tensor (`[2B]` for "none"), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> z1, z2 = projector(encoder(augment(x))), projector(encoder(augment(x)))
        >>> fusedloss.nt_xent(z1, z2, temperature=0.5).backward()
    """
    found = straight.views(z1, z2, temperature, options, (transform, debiased))
    if found is not None:
        return found
    return result_of(
        options,
        lambda call: call.request(
            "nt_xent", nt_xent_problem(z1, z2, temperature, call, transform=transform, debiased=debiased)
        ),
    )


@expanded
def decoupled_contrastive(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    **options: Unpack[CountingOptions],
) -> Loss:
    """Decoupled contrastive learning (Yeh et al. 2022, DCL): NT-Xent without the positive in the denominator.

        loss_i = logsumexp_{j != i, pos(i)} <u_i, u_j> / temperature  -  <u_i, u_pos(i)> / temperature

    It is not bounded below; a row without negatives (B = 1) has loss 0. Parameters, result and errors are `nt_xent`'s.

    Example:
        >>> fusedloss.decoupled_contrastive(z1, z2, temperature=0.1).backward()
    """
    call = Call(**options)
    return counting_mean_of([nt_xent_problem(z1, z2, temperature, call, decoupled=True)], call)


def nt_xent_problem(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor,
    call: Call,
    *,
    decoupled: bool = False,
    transform: Transform | Callable[[Tensor], Tensor] | None = None,
    debiased: float = 0.0,
) -> Problem:
    checks.embeddings(z1=z1, z2=z2)
    if z1.shape[0] != z2.shape[0]:
        raise ValueError(f"z2 must have {z1.shape[0]} rows, views of the samples of z1, got {z2.shape[0]}")
    checks.scalar("temperature", temperature, z1, positive=True)
    check_debiased(debiased)
    scale, scale_bound = as_scale(temperature, z1, inverse=True)
    views = torch.cat(autocast(z1, z2))
    rows = row_numbers(views.shape[0], views)
    return Problem(
        operands=(views,),
        blocks=(Block(0, 0, mask=Mask(skip=rows)),),
        scale=scale,
        target=rows.roll(z1.shape[0]),
        weight=filled(views.shape[0], 1.0, scale.dtype, views.device),
        every_row=True,
        cosine=True,
        scale_bound=scale_bound,
        workspace_bytes=call.workspace_bytes,
        decoupled=decoupled,
        wants_tally=call.return_stats,
        transform=transforms.bind(transform),
        mirrored=True,
        debiased=float(debiased),
    )
