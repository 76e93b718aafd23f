"""tevatron's contrastive losses, without a matrix of scores, on one process and across all of them.

    from fusedloss.integrations import tevatron as fused

    fused.patch()       # before `SimpleContrastiveLoss(...)` is made

Across processes the loss and the gradient by the embeddings are the library's: with `scale_loss`, the exact gradient
after DistributedDataParallel's average. Tested with 0.1.0.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core import checks
from ..core.numerics import row_numbers
from ..functional import info_nce
from ._drop_in import Patch, counted, library, runs_fused
from ._fits import alike, refusal

library("tevatron.loss", "tevatron", "0.1.0")

from tevatron.loss import DistributedContrastiveLoss as _DistributedContrastiveLoss  # noqa: E402
from tevatron.loss import SimpleContrastiveLoss as _SimpleContrastiveLoss  # noqa: E402


def _why_not(loss: Any, x: Any, y: Any, options: dict[str, Any]) -> str | None:
    if not alike(x, y, same_rows=False):
        return refusal(checks.embeddings, x=x, y=y) or "its embeddings are not alike"
    if options.get("target") is not None:
        return "targets are given"
    if options.get("reduction", "mean") not in checks.REDUCTIONS:
        return "its reduction is unknown"
    if x.shape[0] * loss.target_per_qry != y.shape[0]:
        return "there are not target_per_qry passages for each query"
    return None


class SimpleContrastiveLoss(_SimpleContrastiveLoss):
    """tevatron's loss of this name, by `fusedloss.info_nce`."""

    @counted
    def __call__(self, x: Tensor, y: Tensor, target: Any = None, reduction: str = "mean") -> Tensor:
        options = {"target": target, "reduction": reduction}
        if not runs_fused("tevatron.SimpleContrastiveLoss", _why_not(self, x, y, options)):
            return super().__call__(x, y, **options)
        own = self.target_per_qry * row_numbers(x.shape[0], x)
        return info_nce(x, y, own, temperature=1.0, reduction=reduction)


class DistributedContrastiveLoss(_DistributedContrastiveLoss):
    """tevatron's loss of this name: each process computes its own queries' rows against the passages of all."""

    @counted
    def __call__(self, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        why_not = "it is called with options" if options else _why_not(self, x, y, options)
        if not runs_fused("tevatron.DistributedContrastiveLoss", why_not):
            return super().__call__(x, y, **options)
        own = self.target_per_qry * (self.rank * x.shape[0] + row_numbers(x.shape[0], x))  # among all passages
        # The library multiplies the loss by the number of processes, and with it the gradient, which "ddp" does alone.
        scale = "ddp" if self.scale_loss else "sum"
        loss = info_nce(x, y, own, temperature=1.0, group="world", grad_scale=scale)
        return loss + (self.word_size - 1) * loss.detach() if self.scale_loss else loss


def patch() -> Patch:
    """Replaces the library's classes by these, wherever they are imported; `undo()` or `with` reverts it."""
    return Patch(
        {_SimpleContrastiveLoss: SimpleContrastiveLoss, _DistributedContrastiveLoss: DistributedContrastiveLoss}
    )
