"""Drop-ins for lightly's NTXentLoss, DCLLoss and DCLWLoss: same constructors, same results, no [2B, 2B] logits.

    from fusedloss.integrations import lightly as fused

    fused.patch()       # before `NTXentLoss(...)` is built

NTXentLoss is also fused with a memory bank, kept by lightly's module, and with `gather_distributed`, gathered by
lightly's layer. A negative temperature, and DCLLoss with `gather_distributed` on several ranks, run lightly's code.
`SupConLoss` and `SigLIPLoss`, which lightly lacks, are here too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import masks
from ..core import checks
from ..functional import decoupled_contrastive, info_nce, nt_xent, siglip, sup_con
from ..rowwise.pairs import scores
from ._drop_in import Patch, counted, library, runs_fused
from ._fits import alike, only, overridden, plain, refusal, scalar_fits

library("lightly.loss", "lightly", "1.6.0")

from lightly.loss.dcl_loss import DCLLoss as _DCLLoss  # noqa: E402
from lightly.loss.dcl_loss import DCLWLoss as _DCLWLoss  # noqa: E402
from lightly.loss.ntx_ent_loss import NTXentLoss as _NTXentLoss  # noqa: E402
from lightly.models.modules.memory_bank import MemoryBankModule as _MemoryBankModule  # noqa: E402
from lightly.utils import dist  # noqa: E402

criterion_fits = plain(nn.CrossEntropyLoss)


def _why_not(out0: Tensor, out1: Tensor, temperature: float | Tensor) -> str | None:
    same = alike(out0, out1)
    reason = None if same else refusal(checks.embeddings, out0=out0, out1=out1)
    reason = reason or scalar_fits("temperature", temperature, out0, positive=True)
    if reason or same:
        return reason
    if out0.shape != out1.shape:
        return "out0 and out1 have different shapes"
    return None if out0.shape[0] else "the batch is empty"


class NTXentLoss(_NTXentLoss):
    """lightly's NTXentLoss in O(B D) memory, or O((B + bank) D)."""

    @counted
    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        if not runs_fused("lightly.NTXentLoss", self._why_not(out0, out1)):
            return super().forward(out0, out1)
        gathers = self.gather_distributed and dist.world_size() > 1
        if self.memory_bank.size[0] == 0 and not gathers:
            return nt_xent(out0, out1, temperature=self.temperature)
        out0, out1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        out1, negatives = self.memory_bank.forward(out1, update=out0.requires_grad)
        return self._gathered(out0, out1) if negatives is None else self._against(out0, out1, negatives.to(out0.device))

    def _why_not(self, out0: Tensor, out1: Tensor) -> str | None:
        reason = _why_not(out0, out1, self.temperature)
        if reason is None and criterion_fits(self.cross_entropy):
            return "cross_entropy is not the CrossEntropyLoss of the constructor"
        bank = self.memory_bank
        if reason or only(bank, _MemoryBankModule, size=(0,)):
            return reason
        if not only(bank, _MemoryBankModule, feature_dim_first=True) or overridden(bank, _MemoryBankModule, "forward"):
            return "memory_bank is not the MemoryBankModule of the constructor"
        return None if bank.bank.dtype == out0.dtype else "the memory bank and the projections have different dtypes"

    def _against(self, out0: Tensor, out1: Tensor, negatives: Tensor) -> Tensor:
        """MoCo: row i's keys are its other view and the bank [D, K]; ids mask the other rows' views."""
        ids = torch.zeros(len(out0), dtype=torch.int64, device=out0.device)
        columns = torch.cat([ids, ids.new_ones(negatives.shape[1])])
        keys = torch.cat([out1, negatives.T])
        return info_nce(out0, keys, temperature=self.temperature, mask=masks.same_id(ids, columns))

    def _gathered(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Each view of this rank against both views of all ranks, except itself."""
        rows, all0, all1 = len(out0), torch.cat(dist.gather(out0), 0), torch.cat(dist.gather(out1), 0)
        first = dist.rank() * rows
        own = torch.arange(first, first + rows, device=out0.device)
        losses = []
        for out, same, other in ((out0, all0, all1), (out1, all1, all0)):
            keys = torch.cat([same, other])
            mask = masks.not_self(offset=first)
            losses.append(info_nce(out, keys, own + len(same), temperature=self.temperature, mask=mask))
        return (losses[0] + losses[1]) / 2


class DCLLoss(_DCLLoss):
    """lightly's DCLLoss in O(B D) memory; `weight_fn` is called as in lightly."""

    @counted
    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        kind = DCLWLoss if isinstance(self, DCLWLoss) else DCLLoss
        if not runs_fused(f"lightly.{kind.__name__}", self._why_not(out0, out1)):
            return super().forward(out0, out1)
        loss = decoupled_contrastive(out0, out1, temperature=self.temperature)
        if not self.weight_fn:
            return loss
        own = scores("cos", out0, out1)[:, 0] / self.temperature
        out0, out1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        weighted = (own * self.weight_fn(out0, out1)).mean() + (own * self.weight_fn(out1, out0)).mean()
        return loss + own.mean() - 0.5 * weighted

    def _why_not(self, out0: Tensor, out1: Tensor) -> str | None:
        reason = overridden(self, DCLLoss, "_loss") or _why_not(out0, out1, self.temperature)
        if reason is None and len(out0) == 1:
            return "a batch of one has no negatives"
        if reason is None and self.gather_distributed and dist.world_size() > 1:
            return "gather_distributed is set and there are several ranks"
        return reason


class DCLWLoss(_DCLWLoss, DCLLoss):
    """lightly's DCLWLoss: DCLLoss with its weights."""


class SupConLoss(nn.Module):
    """Supervised contrastive loss (Khosla et al. 2020) of two views and their labels, which lightly lacks.

    Args:
        temperature: a positive number.

    Example:
        >>> loss = SupConLoss(temperature=0.1)
        >>> loss(model(view0), model(view1), labels).backward()
    """

    def __init__(self, temperature: float = 0.1):
        super().__init__()
        checks.scalar("temperature", temperature, None, positive=True)
        self.temperature = temperature

    def forward(self, out0: Tensor, out1: Tensor, labels: Tensor) -> Tensor:
        """out0, out1: `[B, D]`. labels: integers `[B]`, one per sample."""
        checks.embeddings(out0=out0, out1=out1)
        return sup_con(torch.cat([out0, out1]), torch.cat([labels, labels]).long(), temperature=self.temperature)


class SigLIPLoss(nn.Module):
    """Sigmoid loss (Zhai et al. 2023, SigLIP) of two views or of images and texts, which lightly lacks.

    Args:
        scale, bias: of the logits `scale * cos + bias`, trained with the model; the paper starts at 10 and -10.

    Example:
        >>> loss = SigLIPLoss()
        >>> loss(model(images), text_model(texts)).backward()
    """

    def __init__(self, scale: float = 10.0, bias: float = -10.0):
        super().__init__()
        checks.scalar("scale", scale, None, positive=True)
        checks.number("bias", bias)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.bias = nn.Parameter(torch.tensor(float(bias)))

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """out0, out1: `[B, D]`."""
        return siglip(out0, out1, self.log_scale.exp(), self.bias, normalize=True)


def patch() -> Patch:
    """Replaces lightly's classes by these, wherever they are imported; `undo()` or `with` reverts it."""
    return Patch({_NTXentLoss: NTXentLoss, _DCLLoss: DCLLoss, _DCLWLoss: DCLWLoss})
