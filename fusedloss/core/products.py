"""Matrix products into a wider dtype, and which devices have them: `narrow` is asked by all that multiply.

On a CPU torch.mm multiplies fp32 by MKL, and a linear layer may do it by oneDNN. Both add in fp32. Which one is faster
depends on the CPU: two Zen 5 cores reach 465 GFLOP/s by oneDNN and 200 by MKL, two Zen 3 cores the same by both.
`chosen` decides between them, once per sweep.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import environment
from .numerics import cdiv, slices

LONG = 1e11  # operations per thread of a step that is worth a trial: 2 s at 50 GFLOP/s
ROUNDS = 2  # of a trial, after one that does not count; oneDNN must win all of them
FASTER = 1.1  # what oneDNN must gain: less may be noise, and torch.mm needs no copies
TILE = 1024  # rows of an operand at a time
PART = 1 << 20  # most elements of an operand that are copied at a time, 4 MiB
# oneDNN adds a dot product up from end to end, MKL 192 terms at a time and then these sums. The error of 512 terms is
# 1.5 times that of MKL, of 1024 terms 2.3 times, and the error budget is 2.
TERMS = 512
ALL = 1 << 30


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


class Chosen(NamedTuple):
    """For each fp32 product of a sweep the number of terms that oneDNN adds up at a time; 0: torch.mm multiplies."""

    sim: int = 0  # [R, D] @ [D, N]
    dx: int = 0  # [R, N] @ [N, D]
    dy: int = 0  # [N, R] @ [R, D]


TORCH = Chosen()
_faster: dict[tuple[str, int, int, int], bool] = {}  # by product, rows of a chunk, D and threads


def chosen(rows: int, columns: int, dim: int, dtype: torch.dtype, device: torch.device) -> Chosen:
    """Returns who multiplies in a sweep of `rows` embeddings [D] of a dtype against `columns` others.

    `FUSEDLOSS_CPU_PRODUCTS=auto` measures, for fp32 and steps that take a second or more. Within a process the answer
    depends on the arguments alone, so that equal calls give equal bits. 16-bit embeddings are cast up for their
    similarities, which oneDNN then multiplies at any size: their budget has room for sums of any length.
    """
    if device.type != "cpu" or dtype == torch.float64:
        return TORCH
    setting, wide = environment.cpu_products(), dtype == torch.float32
    if setting == "mkl":
        return TORCH
    threads = torch.get_num_threads()
    if setting == "auto" and wide and 6 * rows * columns * dim < LONG * threads:
        return TORCH
    if not _has_onednn():
        return TORCH
    if setting == "onednn":
        return Chosen(TERMS if wide else ALL, TERMS, TERMS)
    if not wide:
        return Chosen(sim=ALL)
    if torch.compiler.is_compiling():
        return TORCH  # nothing can be timed
    # A chunk's rows in the default workspace, rounded down to a power of two: few classes are timed.
    chunk = 1 << max(6, min(rows, TILE, (1 << 24) // columns).bit_length() - 1)
    return Chosen(*(TERMS * _is_faster(name, chunk, dim, threads) for name in Chosen._fields))


def _has_onednn() -> bool:
    """Whether oneDNN may stand in for torch.mm: it is there, not turned off, and would compute in fp32.

    Where a setting allows less than fp32, torch.mm decides what to make of it.
    """
    if not (torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()):
        return False
    modes = (os.environ.get(f"{prefix}_DEFAULT_FPMATH_MODE", "STRICT") for prefix in ("ONEDNN", "DNNL"))
    return (
        torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")  # type: ignore[attr-defined]
        and all(mode.upper() == "STRICT" for mode in modes)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _is_faster(name: str, rows: int, dim: int, threads: int) -> bool:
    key = (name, rows, dim, threads)
    found = _faster.get(key)
    if found is None:
        with _disable_current_modes():  # which would see products that the user did not ask for
            found = _trial(name, rows, dim)
        found = _faster.setdefault(key, found)  # of two threads that measure at once, the first decides for both
    return found


def _trial(name: str, rows: int, dim: int) -> bool:
    """Times both on a chunk's rows and a part of the columns: 0.1 s for all products at 50 GFLOP/s and D = 384."""
    ones = functools.partial(torch.ones, dtype=torch.float32, device="cpu")
    x, y, w = ones(rows, dim), ones(TERMS, dim), ones(rows, TILE)[:, :TERMS]
    step, out, a, b = {
        "sim": (mm, w, x, y.T),
        "dx": (add_mm, ones(rows, dim), w, y),
        "dy": (add_mm, ones(TERMS, dim), w.T, x),
    }[name]
    won = []
    for _ in range(1 + ROUNDS):
        seconds = []
        for onednn in (False, True):
            start = time.thread_time()  # not the clock on the wall: others may have the CPU for a while
            step(out, a, b, TERMS * onednn)
            seconds.append(time.thread_time() - start)
        won.append(seconds[1] * FASTER < seconds[0])
    return all(won[1:])


def mm(out: Tensor, a: Tensor, b: Tensor, onednn: int = 0) -> None:
    """`out = a @ b`, accumulated in the dtype of `out`. onednn: see `Chosen`."""
    if a.dtype == out.dtype:
        if onednn and a.dtype == torch.float32:
            _by_onednn(out, a, b, onednn, Tensor.copy_)
        else:
            torch.mm(a, b, out=out)
    elif narrow(a.dtype, a.device):
        wide_mm(out, a, b)
    elif a.dtype == torch.float16:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)  # a CPU's fp16 product overflows under the gain
    else:
        out.copy_(torch.mm(a, b))


def add_mm(total: Tensor, a: Tensor, b: Tensor, onednn: int = 0) -> None:
    """`total += a @ b`, accumulated in the dtype of `total`. onednn: see `Chosen`."""
    if a.dtype == total.dtype:
        if onednn and a.dtype == torch.float32:
            _by_onednn(total, a, b, onednn, Tensor.add_)
        else:
            total.addmm_(a, b)
    elif narrow(a.dtype, a.device):
        add_wide_mm(total, a, b)
    elif a.dtype == torch.float16:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
    else:
        total.add_(torch.mm(a, b))


def _by_onednn(out: Tensor, a: Tensor, b: Tensor, terms: int, write: Callable[[Tensor, Tensor], object]) -> None:
    """Writes or adds `a @ b`, a part of `a` at a time, of which the operator makes a contiguous copy.

    Its second operand is contiguous too: of other strides, products have taken 500 times as long.
    """
    if not (a.numel() and b.numel()):
        write(out, torch.mm(a, b))
        return
    terms = cdiv(a.shape[1], cdiv(a.shape[1], terms))  # parts of one size
    rows = max(TILE, PART // terms)
    for inner in slices(a.shape[1], terms):
        weight = b[inner].T.contiguous()
        for part in slices(a.shape[0], rows):
            write(out[part], torch.ops.mkldnn._linear_pointwise(a[part, inner], weight, None, "none", [], ""))
        write = Tensor.add_


def wide_mm(out: Tensor, a: Tensor, b: Tensor) -> None:
    torch.mm(a, b, out_dtype=out.dtype, out=out)


def add_wide_mm(total: Tensor, a: Tensor, b: Tensor) -> None:
    torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
