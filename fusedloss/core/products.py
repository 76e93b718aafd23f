"""Matrix products into a wider dtype, and which devices have them: `narrow` is asked by all that multiply."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def narrow(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether 16-bit matrices are multiplied as they are, accumulated in fp32 and returned in fp32.

    That is `out_dtype`, which torch 2.10 has on CUDA and ROCm: for bf16 from compute capability 8.0 on, and for fp16
    unless sums in fp16 are allowed, where it raises. Elsewhere they are cast up, and a CPU's bf16 product returns bf16.
    """
    if device.type != "cuda" or dtype.itemsize != 2:
        return False
    if dtype == torch.float16:
        return not torch.backends.cuda.matmul.allow_fp16_accumulation
    return _multiplies_bf16(device)


@functools.cache
def _multiplies_bf16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def mm(out: Tensor, a: Tensor, b: Tensor) -> None:
    """`out = a @ b`, accumulated in the dtype of `out`."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif narrow(a.dtype, a.device):
        wide_mm(out, a, b)
    elif a.dtype == torch.float16:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)  # a CPU's fp16 product overflows under the gain
    else:
        out.copy_(torch.mm(a, b))


def add_mm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, accumulated in the dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif narrow(a.dtype, a.device):
        add_wide_mm(total, a, b)
    elif a.dtype == torch.float16:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
    else:
        total.add_(torch.mm(a, b))


def wide_mm(out: Tensor, a: Tensor, b: Tensor) -> None:
    torch.mm(a, b, out_dtype=out.dtype, out=out)


def add_wide_mm(total: Tensor, a: Tensor, b: Tensor) -> None:
    torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
