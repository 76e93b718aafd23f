"""The work of a step by Triton's kernels, in shares of N x N x D products: of whole rows, and of half.

    python tests/launch/counts.py

Writes, as JSON, of nt_xent what each function of the softmax is handed and what is multiplied for the gradient, and of
losses without a softmax the similarities that kernels compute, and likewise.
tests/backends/test_triton_launch.py starts it.
"""

from __future__ import annotations

import device

device.Device(90)  # before torch
device.front_end_only()

import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import primitives  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402

import fusedloss  # noqa: E402
from fusedloss import sweep  # noqa: E402
from fusedloss.backends import triton  # noqa: E402
from fusedloss.losses import _twin  # noqa: E402

_twin.PLAIN += (FakeTensor,)
D = 768


def counted(loss: Callable[[torch.Tensor], torch.Tensor], rows: int, half: bool) -> dict[str, float]:
    products = 0

    def counting(function: Any) -> Any:
        def counts(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *more: Any) -> None:
            nonlocal products
            products += a.shape[0] * a.shape[1] * b.shape[1]
            function(out, a, b, *more)

        return counts

    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        found = primitives.elements(triton, patch)
        similarities, launched = triton._similarities, 0

        def launching(epilogue: Any, strip: Any, *rest: Any) -> None:
            nonlocal launched
            launched += len(strip.x) * len(strip.y)
            similarities(epilogue, strip, *rest)

        patch.setattr(triton, "_similarities", launching)
        for name in ("mm", "add_mm"):
            patch.setattr(sweep.gradients, name, counting(getattr(sweep.gradients, name)))
        if not half:
            patch.setattr(sweep, "halved", lambda problem, backend: None)
            patch.setattr(sweep, "tops", lambda problem, backend: None)
        with device.captured():
            loss(torch.empty(rows, D, dtype=torch.bfloat16, device="cuda", requires_grad=True)).backward()
    return {name: count / rows**2 for name, count in (*found.items(), ("launched", launched))} | {
        "products": products / rows**2 / D
    }


def nt_xent(learned: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    def loss(x: torch.Tensor) -> torch.Tensor:
        given = torch.ones((), device="cuda", requires_grad=True) if learned else 0.1
        return fusedloss.nt_xent(x[: len(x) // 2], x[len(x) // 2 :], temperature=given, backend="triton")

    return loss


def by_labels(loss: Callable[..., torch.Tensor], **options: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: loss(x, torch.empty(len(x), dtype=torch.int64, device="cuda"), backend="triton", **options)


LOSSES = {
    "nt_xent": nt_xent(False),
    "nt_xent, learned": nt_xent(True),
    "multi_similarity": by_labels(fusedloss.multi_similarity),
    "circle": by_labels(fusedloss.circle),
    "sup_con, in": by_labels(fusedloss.sup_con, form="in"),
    "batch_hard_triplet": by_labels(fusedloss.batch_hard_triplet),
}
found = [
    (name, rows, half, counted(loss, rows, half))
    for name, loss in LOSSES.items()
    for rows in (2048, 16384, 65536)
    for half in (False, True)
]
json.dump(found, sys.stdout)
