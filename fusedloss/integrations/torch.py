"""torch's own contrastive losses, fused: the InfoNCE that is proposed for torch.nn, and `F.linear_cross_entropy`.

    from fusedloss.integrations import torch as fused

    fused.patch()       # F.linear_cross_entropy, and F.info_nce_loss and nn.InfoNCELoss where this torch has them

`info_nce_loss` and `InfoNCELoss` have the signatures of pytorch/pytorch#195380 and work with any torch. Class
probabilities and K-dimensional class weights run torch's code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusedloss

from .. import masks
from ..core import checks
from ._drop_in import Patch, counted, replaced, runs_fused

_linear_cross_entropy: Any = getattr(F, "linear_cross_entropy", None)


@counted
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """`torch.nn.functional.linear_cross_entropy`, by `fusedloss.linear_cross_entropy` where it takes the arguments.

    Example:
        >>> with fused.patch():
        ...     F.linear_cross_entropy(hidden, head.weight, tokens).backward()
    """
    given: dict[str, Any] = {
        "linear_bias": linear_bias,
        "weight": weight,
        "reduction": reduction,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "options": options,
    }
    if runs_fused("torch.linear_cross_entropy", _why_not(input, linear_weight, target)):
        return fusedloss.linear_cross_entropy(input, linear_weight, target, **given)
    if _linear_cross_entropy is None:
        raise RuntimeError("this torch has no F.linear_cross_entropy to run instead; install torch 2.13 or newer")
    result: Tensor = _linear_cross_entropy(input, linear_weight, target, **given)
    return result


def _why_not(x: Tensor, weight: Tensor, target: Tensor) -> str | None:
    if not all(type(t) in (Tensor, nn.Parameter) for t in (x, weight, target)):
        return "an argument is no plain tensor"
    if target.dtype is not torch.int64:
        return "its targets are probabilities, or of a dtype other than int64"
    if weight.dim() != 2 or target.shape != x.shape[:-1]:
        return "it has K-dimensional classes"
    return None if x.dtype is weight.dtype and x.dtype in checks.FLOATING else "its dtypes differ"


def info_nce_loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    reduction: str = "mean",
) -> Tensor:
    """InfoNCE in one direction, of normalised embeddings, as pytorch/pytorch#195380 proposes it.

        loss_i = logsumexp over the columns of row i  -  cos(query_i, positive_key_i) / temperature

    The columns are all positive keys, or with `negative_keys` the row's own positive key and all negative keys.

    Args:
        query, positive_key: `[N, D]`, aligned by index.
        negative_keys: `[M, D]`, shared by all rows. Copied beside the positive keys if they receive a gradient.
        temperature: a positive number, or a tensor of one element, which receives a gradient.
        reduction: "mean", "sum" or "none" (`[N]`).

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.

    Example:
        >>> fused.info_nce_loss(encode(questions), encode(answers), temperature=0.07).backward()
    """
    checks.embeddings(query=query, positive_key=positive_key)
    if positive_key.shape != query.shape:
        raise ValueError(f"positive_key must have {len(query)} rows, one per row of query, got {len(positive_key)}")
    shared: dict[str, Any] = {"temperature": temperature, "normalize": True, "reduction": reduction}
    if negative_keys is None:
        return fusedloss.info_nce(query, positive_key, **shared)
    checks.embeddings(query=query, negative_keys=negative_keys)
    # The other rows' positives have the rows' id, which drops them; a row's own always stays.
    rows, others = (query.new_zeros(len(x), dtype=torch.int64) for x in (query, negative_keys))
    shared["mask"] = masks.same_id(rows, torch.cat([rows, others + 1]))
    if negative_keys.requires_grad:
        return fusedloss.info_nce(query, torch.cat([positive_key, negative_keys]), **shared)
    return fusedloss.info_nce(query, positive_key, bank=negative_keys, **shared)


class InfoNCELoss(nn.Module):
    """`info_nce_loss` as a module, with the constructor of pytorch/pytorch#195380.

    Example:
        >>> loss = fused.InfoNCELoss(temperature=0.07)
        >>> loss(encode(questions), encode(answers)).backward()
    """

    def __init__(self, temperature: float = 0.07, reduction: str = "mean"):
        super().__init__()
        checks.scalar("temperature", temperature, None, positive=True)
        checks.choice("reduction", reduction, checks.REDUCTIONS)
        self.temperature, self.reduction = temperature, reduction

    def forward(self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None) -> Tensor:
        return info_nce_loss(query, positive_key, negative_keys, self.temperature, self.reduction)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}"


def patch() -> Patch:
    """Replaces torch's functions and modules in every loaded module. Returns a Patch: `undo()` reverts it."""
    found = {
        replaced(getattr(F, "linear_cross_entropy", None)): linear_cross_entropy,
        replaced(getattr(F, "info_nce_loss", None)): info_nce_loss,
        replaced(getattr(nn, "InfoNCELoss", None)): InfoNCELoss,
    }
    return Patch({original: own for original, own in found.items() if original is not None and original is not own})
