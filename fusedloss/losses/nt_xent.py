"""NT-Xent (SimCLR) and its decoupled form (DCL): two views of a batch, every view against all the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..masks import itself
from ..problem import Block, Mask
from ._in_batch import Loss, Objective, as_scale, asked, autocast, objective, result_of
from ._module import LossModule


@checks.explained
def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    return_stats: bool = False,
    group: Any = None,
    strategy: str = "gather",
    grad_scale: str = "ddp",
) -> Loss:
    """NT-Xent (Chen et al. 2020, SimCLR): 2B rows, each view's positive is the other view of the same sample.

        u      = the unit rows of [z1; z2];   pos(i) = (i + B) mod 2B
        loss_i = logsumexp_{j != i} <u_i, u_j> / temperature  -  <u_i, u_pos(i)> / temperature

    Equal to pytorch-metric-learning's NTXentLoss on [z1; z2] with labels [0..B-1, 0..B-1], whose memory is cubic.

    Args:
        z1, z2: `[B, D]`, two views of each sample; normalised inside.
        temperature: a positive number, or a tensor of one element, which receives a gradient.
        reduction: "mean" over the 2B rows, "sum", or "none" (`[2B]`, those of z1 first).
        backend: "auto", "triton", "chunked" or "reference".
        workspace_bytes: the most that the workspace for one chunk of similarities may take; see `info_nce`.
        return_stats: return `(loss, Stats)`.
        group: a ProcessGroup whose other ranks' columns compete, too. The result is the mean (or sum) over all ranks'
            rows, on every rank; "none" gives this rank's. See `fusedloss.distributed`.
        strategy: how columns travel: "gather", all at once, or "ring", a shard at a time.
        grad_scale: "ddp" (right after DistributedDataParallel's average), "sum" (this rank's share) or
            "match:<library>".

    Returns:
        A 0-dim tensor (`[2B]` for "none"), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        UnsupportedError: the backend asked for cannot run this.

    Example:
        >>> z1, z2 = projector(encoder(augment(x))), projector(encoder(augment(x)))
        >>> fusedloss.nt_xent(z1, z2, temperature=0.5).backward()
    """

    def ask() -> tuple[str, list[Objective]]:
        one = nt_xent_objective(
            z1,
            z2,
            temperature=temperature,
            reduction=reduction,
            backend=backend,
            workspace_bytes=workspace_bytes,
            return_stats=return_stats,
        )
        return "nt_xent", [one]

    return result_of(ask, asked(group, strategy, grad_scale))


@checks.explained
def decoupled_contrastive(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    return_stats: bool = False,
) -> Loss:
    """Decoupled contrastive learning (Yeh et al. 2022, DCL): NT-Xent whose positive is not in the denominator.

        loss_i = logsumexp_{j != i, pos(i)} <u_i, u_j> / temperature  -  <u_i, u_pos(i)> / temperature

    It is not bounded below; a row without negatives (B = 1) has loss 0. Parameters, result and errors are `nt_xent`'s.

    Example:
        >>> fusedloss.decoupled_contrastive(z1, z2, temperature=0.1).backward()
    """
    return nt_xent_objective(
        z1,
        z2,
        temperature=temperature,
        decoupled=True,
        reduction=reduction,
        backend=backend,
        workspace_bytes=workspace_bytes,
        return_stats=return_stats,
    ).result()


def nt_xent_objective(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    decoupled: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    return_stats: bool = False,
) -> Objective:
    checks.embeddings(z1=z1, z2=z2)
    if z1.shape[0] != z2.shape[0]:
        raise ValueError(f"z2 has {z2.shape[0]} rows and z1 {z1.shape[0]}: they must be views of the same samples")
    checks.scalar("temperature", temperature, z1, positive=True)
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    checks.count("workspace_bytes", workspace_bytes)
    scale, scale_bound = as_scale(temperature, z1, inverse=True)
    views = torch.cat(autocast(z1, z2))
    rows = itself(views.shape[0], views)
    return objective(
        [views],
        [Block(0, 0, mask=Mask(skip=rows))],
        rows.roll(z1.shape[0]),
        scale,
        scale_bound=scale_bound,
        cosine=True,
        decoupled=decoupled,
        reduction=reduction,
        backend=backend,
        workspace_bytes=workspace_bytes,
        return_stats=return_stats,
    )


class NTXentLoss(LossModule, function=nt_xent):
    """`nt_xent` with its options in the constructor and `forward(z1, z2)`."""


class DCLLoss(LossModule, function=decoupled_contrastive):
    """`decoupled_contrastive` with its options in the constructor and `forward(z1, z2)`."""
