"""Inputs, eager baselines and the error budget of the tests, of `python -m fusedloss check` and of the benchmark.

    err(out, fp64) <= 2 * err(eager, fp64) + eps(dtype) * max|fp64|

`eager` is the code that a careful user writes in the inputs' dtype. `fp64` is `backend="reference"` on the inputs cast
to float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

KINDS = ("random", "pairs", "clustered")


def inputs(
    kind: str,
    rows: int,
    columns: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor]:
    """Returns a unit-length query [rows, dim] and key [columns, dim].

    random: independent directions. pairs: key i is query i plus a little noise, like the pairs of a trained model.
    clustered: eight tight clusters, in which many negatives score almost as high as the positive.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=device)

    query, key = normal(rows, dim), normal(columns, dim)
    if kind == "pairs":
        shared = min(rows, columns)
        key[:shared] = query[:shared] + 0.3 * key[:shared]
    elif kind == "clustered":
        centres = 3 * normal(8, dim)
        query += centres[torch.arange(rows, device=device) % 8]
        key += centres[torch.arange(columns, device=device) % 8]
    elif kind != "random":
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    return F.normalize(query, dim=1).to(dtype), F.normalize(key, dim=1).to(dtype)


def eager_info_nce(query: Tensor, key: Tensor, temperature: float | Tensor = 0.05, normalize: bool = False) -> Tensor:
    """Returns the loss as users write it: the matmul in the inputs' dtype; with `normalize` all of it in fp32."""
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


def exact_gradients(
    loss: str, query: Tensor, key: Tensor, scale: float, rows: Tensor, *, cosine: bool = False, bias: float = 0.0
) -> list[Tensor]:
    """Returns [value, the query's gradient[rows], the key's gradient[rows]] of info_nce, clip or siglip, in fp64.

    The result is that of `backend="reference"`, for batches whose logits do not fit. Logits are computed in chunks of
    1 GiB: one pass over all rows finds the normalisers. cosine: divide the embeddings by their norms first.
    """
    x, y, n = query.double(), key.double(), len(query)
    lengths = [t.norm(dim=1, keepdim=True).clamp_min(1e-12) for t in (x, y)]
    if cosine:
        x, y = x / lengths[0], y / lengths[1]
    row_lse, column_lse = x.new_zeros(n), x.new_full((n,), -torch.inf)
    softplus = x.new_zeros(())
    for part in torch.arange(n, device=x.device).split(max(1, (1 << 27) // n)):
        z = scale * (x[part] @ y.T) + bias
        if loss == "siglip":
            softplus += F.softplus(z).sum()
            continue
        row_lse[part] = z.logsumexp(1)
        if loss == "clip":
            column_lse = torch.logaddexp(column_lse, z.logsumexp(0))
    target = scale * (x * y).sum(1) + bias
    if loss == "siglip":
        value = (softplus - target.sum()) / n
    else:
        value = (row_lse - target if loss == "info_nce" else (row_lse + column_lse) / 2 - target).mean()

    def gradient(own: Tensor, other: Tensor, own_lse: Tensor | None, other_lse: Tensor | None) -> Tensor:
        """Returns the gradient by own[rows]; a direction whose log-sum-exp is None is left out."""
        z = scale * (own[rows] @ other.T) + bias
        if loss == "siglip":
            dz = z.sigmoid()
        else:
            parts = [] if own_lse is None else [(z - own_lse[rows, None]).exp()]
            parts += [] if other_lse is None else [(z - other_lse).exp()]
            dz = parts[0] if len(parts) == 1 else (parts[0] + parts[1]) / 2
        dz[torch.arange(len(rows), device=z.device), rows] -= 1
        return dz @ other * (scale / n)

    columns = column_lse if loss == "clip" else None
    gradients = [gradient(x, y, row_lse, columns), gradient(y, x, columns, row_lse)]
    if cosine:
        for i, (unit, length) in enumerate(zip((x, y), lengths, strict=True)):
            along = (gradients[i] * unit[rows]).sum(1, keepdim=True)
            gradients[i] = (gradients[i] - along * unit[rows]) / length[rows]
    return [value, *gradients]


def value_and_gradients(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns [loss, *gradients] of `function` at fresh leaves with the values of `tensors`; 0 for an unused one."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


def budget_share(out: Tensor, eager: Tensor, oracle: Tensor, dtype: torch.dtype, moves: float = 0.0) -> float:
    """Returns the error of `out` as a share of the budget: 1 or less passes; inf if `out` is not finite.

    moves: the further error that the problem's condition allows, because eager's error may be small by luck.
    """
    wanted = oracle.double()
    error = (out.double() - wanted).abs().max().item()
    if error != error:
        return float("inf")
    eager_error = (eager.double() - wanted).abs().nan_to_num(0, 0, 0).max().item()
    budget = 2 * eager_error + torch.finfo(dtype).eps * wanted.abs().max().item() + moves
    return error / budget if budget else (0.0 if error == 0 else float("inf"))


def typical_budget_share(
    outs: Sequence[Tensor], eagers: Sequence[Tensor], oracles: Sequence[Tensor], dtype: torch.dtype
) -> float:
    """Returns the budget share over several random draws: the geometric mean, or a quarter of the worst if larger.

    The error of one small draw is mostly luck.
    """
    shares = [budget_share(*draw, dtype) for draw in zip(outs, eagers, oracles, strict=True)]
    mean = sum(math.log(max(share, 0.125)) for share in shares) / len(shares)
    return max(math.exp(mean), max(shares) / 4 if len(shares) > 1 else 0.0)


def condition_share(out: Tensor, exact: Tensor, terms: Tensor, largest: float) -> float:
    """Returns the error of a sum whose terms cancel, as a share of the bound from their rounding: 1 or less passes.

        |out - exact| <= eps (2 + largest) sum |terms|

    It is for gradients by a temperature or a scale, 0-dim. `terms` are `dz_ij sim_ij`; the budget of one draw does not
    know that they cancel. largest: the largest absolute logit. A term holds exp(z), and rounding z changes it by a
    relative eps |z|. eps is that of `out`'s dtype, the dtype of the arithmetic: fp32 also for 16-bit embeddings.
    """
    bound = torch.finfo(out.dtype).eps * (2 + largest) * terms.double().abs().sum().item()
    error = abs(out.double() - exact.double()).item()
    return error / bound if bound else (0.0 if error == 0 else float("inf"))


def _up(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
