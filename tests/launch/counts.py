"""The work of a step of nt_xent by Triton's kernels, in shares of N x N x D products: of whole rows, and of half.

    python tests/launch/counts.py

Writes, as JSON, what each function of the softmax is handed and what is multiplied for the gradient.
tests/backends/test_triton_launch.py starts it.
"""

from __future__ import annotations

import device

device.Device(90)  # before torch
device.front_end_only()

import json  # noqa: E402
import sys  # noqa: E402
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


def counted(rows: int, learned: bool, half: bool) -> dict[str, float]:
    products = 0

    def counting(function: Any) -> Any:
        def counts(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *more: Any) -> None:
            nonlocal products
            products += a.shape[0] * a.shape[1] * b.shape[1]
            function(out, a, b, *more)

        return counts

    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        found = primitives.elements(triton, patch)
        for name in ("mm", "add_mm"):
            patch.setattr(sweep.gradients, name, counting(getattr(sweep.gradients, name)))
        if not half:
            patch.setattr(sweep, "halved", lambda problem, backend: None)
        views = [torch.empty(rows // 2, D, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(2)]
        temperature = torch.ones((), device="cuda", requires_grad=True) if learned else 0.1
        with device.captured():
            fusedloss.nt_xent(*views, temperature=temperature, backend="triton").backward()
    return {name: count / rows**2 for name, count in found.items()} | {"products": products / rows**2 / D}


found = [
    (rows, learned, half, counted(rows, learned, half))
    for rows in (2048, 16384, 65536)
    for learned in (False, True)
    for half in (False, True)
]
json.dump(found, sys.stdout)
