"""What tests, `python -m fusedloss check` and the benchmark share: inputs, eager baselines, and the error budget.

    err(out, fp64) <= 2 * err(eager, fp64) + eps(dtype) * max|fp64|

`eager` is what a careful user writes in the inputs' own dtype; fp64 is `backend="reference"` on the inputs cast up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

KINDS = ("random", "pairs", "clustered")


def inputs(
    kind: str, rows: int, columns: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Unit-length query [rows, dim] and key [columns, dim].

    random: independent directions. pairs: key i is query i plus a little noise, so that trained pairs are well apart.
    clustered: eight tight clusters, so that many negatives score almost as the positive does.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    query, key = normal(rows, dim), normal(columns, dim)
    if kind == "pairs":
        shared = min(rows, columns)
        key[:shared] = query[:shared] + 0.3 * key[:shared]
    elif kind == "clustered":
        centres = 3 * normal(8, dim)
        query, key = query + centres[torch.arange(rows) % 8], key + centres[torch.arange(columns) % 8]
    elif kind != "random":
        raise ValueError(f"kind is {kind!r}: needs one of {KINDS}")
    return F.normalize(query, dim=1).to(dtype), F.normalize(key, dim=1).to(dtype)


def eager_info_nce(query: Tensor, key: Tensor, temperature: float | Tensor = 0.05, normalize: bool = False) -> Tensor:
    """As users write it: the matmul in the inputs' dtype; a cosine loss casts up, normalises, multiplies in fp32."""
    if normalize:
        query, key = F.normalize(_up(query), dim=1), F.normalize(_up(key), dim=1)
    return F.cross_entropy(_up(query @ key.T) / temperature, torch.arange(query.shape[0], device=query.device))


def eager_clip(
    image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor, normalize: bool = False
) -> Tensor:
    if normalize:
        image_features, text_features = (F.normalize(_up(x), dim=1) for x in (image_features, text_features))
    logits = _up(image_features @ text_features.T) * logit_scale
    target = torch.arange(logits.shape[0], device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def eager_multiple_negatives_ranking(
    anchor: Tensor, positive: Tensor, *negatives: Tensor, scale: float | Tensor = 20.0, similarity: str = "cos"
) -> Tensor:
    documents = torch.cat([positive, *negatives])
    return eager_info_nce(anchor, documents, 1 / scale, normalize=similarity == "cos")


def value_and_gradients(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """[loss, *gradients] of `function` at fresh leaves with the values of `tensors`; 0 for one it does not use."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


def budget_share(out: Tensor, eager: Tensor, oracle: Tensor, dtype: torch.dtype) -> float:
    """The error of `out` as a share of the budget: at most 1 passes, inf where `out` is not finite and `oracle` is."""
    wanted = oracle.double()
    error = (out.double() - wanted).abs().max().item()
    if error != error:
        return float("inf")
    eager_error = (eager.double() - wanted).abs().nan_to_num(0, 0, 0).max().item()
    budget = 2 * eager_error + torch.finfo(dtype).eps * wanted.abs().max().item()
    return error / budget if budget else (0.0 if error == 0 else float("inf"))


def _up(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
