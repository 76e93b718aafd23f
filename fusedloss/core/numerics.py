"""Dtypes, norms and the constants that more than one floor reads."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import _len_torch_dispatch_stack

NORM_EPS = 1e-12  # as in F.normalize: a zero row stays zero instead of becoming NaN
SAFE_SCALE = 59.0  # up to this scale exponents lie within [-69, 49]: see `exp_shift` of backends/shared.py
# Up to this scale neither exp(cosine * scale) nor a sum of 2**40 of them leaves fp32: no maximum is computed, and no
# exponential is small enough to flush: exp(-2 * 30) = 2**-87.
UNSHIFTED_SCALE = 30.0
LOG2E = math.log2(math.e)
# Exponentials below this share of the row's largest are 0. Smaller ones turn products into denormals, which made the
# GEMMs 2 to 5 times slower on a CPU at cold temperatures. 2**-100 leaves 26 bits above the denormals for the other
# factor.
FLUSH = 2.0**-100
FOLD_COPIES = 12  # matrices of a chunk that a fold in torch needs: sorted values and their int64 places, masks


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of losses, log-sum-exps and accumulators: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide_dtype(device: torch.device, otherwise: torch.dtype) -> torch.dtype:
    """Returns fp64 if the device has it."""
    return torch.float64 if device.type in ("cpu", "cuda") else otherwise


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of saved gradients. bf16 has fp32's range; fp16 would lose what a gradient scaler enlarges."""
    return dtype if dtype == torch.bfloat16 else stats_dtype(dtype)


def autocasting(x: Tensor) -> bool:
    """Whether torch.autocast is on for the device of `x`. False for meta tensors, for which torch's query raises."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Where `x` is."""
    return torch.autocast(x.device.type, enabled=False) if autocasting(x) else contextlib.nullcontext()


def savable(x: Tensor) -> Tensor:
    """Returns `x`, or a copy if autograd cannot save it: a tensor made under inference_mode and used outside.

    Tracing cannot ask, and traces no inference tensors.
    """
    return x if torch.compiler.is_compiling() or not (x.is_inference() and torch.is_grad_enabled()) else x.clone()


def inverse_norms(x: Tensor) -> Tensor:
    """Returns `1 / max(|x_i|, 1e-12)` per row, in the statistics dtype, without a copy of `x`.

    A zero row in fp16 gets 1 instead: its similarities are 0 either way, and 1e12 would leave the other gradients no
    room in an fp16 workspace. Its own gradient is multiplied by 1e12 at the end, so that it is the formula's in every
    dtype: as with F.normalize, the gradient by the zero unit row over 1e-12 (mostly infinite in fp16).
    """
    norms = torch.linalg.vector_norm(x, dim=1, dtype=stats_dtype(x.dtype))
    if x.dtype == torch.float16:
        norms = norms.masked_fill(norms == 0, 1)
    return norms.clamp_min(NORM_EPS).reciprocal()


def rows_of(x: Tensor, part: slice) -> Tensor:
    """Returns `x[part]`, and `x` itself for all of it: a slice takes 2 us, and small batches are one chunk."""
    return x if part.stop - part.start == x.shape[0] else x[part]


def cdiv(a: int, b: int) -> int:
    """Returns `a / b`, rounded up."""
    return -(-a // b)


def slices(count: int, size: int) -> Iterator[slice]:
    """Yields slices of `size`, the last one shorter."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def unit_rows(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=1, eps=NORM_EPS)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


# Constant tensors, which calls share and must not write to ------------------------------------------------------------


def row_numbers(rows: int, like: Tensor) -> Tensor:
    """0, 1, ... `rows` - 1, where `like` is: each row's own column."""
    return _shared(_numbers, rows, 0, torch.int64, like.device)


def filled(rows: int, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[rows]`, all of one value."""
    return _shared(_filled, rows, value, dtype, device)


def constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 0-dim tensor."""
    return _shared(_constant, 0, value, dtype, device)


Make = Callable[[int, float, torch.dtype, torch.device], Tensor]
_kept: dict[tuple[object, ...], Tensor] = {}
MOST_KEPT, LARGEST_KEPT = 64, 4096  # tensors, and elements of one: 2 MiB in all


def _shared(make: Make, rows: int, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor of an earlier call if it is like a new one, which takes 3 to 5 us to make.

    It is made anew under a compiler, a dispatch mode and a transform, whose tensors are their own, and while a CUDA
    graph is captured, whose memory is. Each stream has its own, because streams do not wait for each other.
    """
    if torch.compiler.is_compiling() or rows > LARGEST_KEPT:
        return make(rows, value, dtype, device)
    stream = None
    if device.type == "cuda":
        if capturing(device):
            return make(rows, value, dtype, device)
        stream = torch.cuda.current_stream(device).cuda_stream
    if _len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return make(rows, value, dtype, device)
    key = (make, rows, value, dtype, device, stream)
    found = _kept.get(key)
    if found is None:
        if len(_kept) >= MOST_KEPT:
            _kept.clear()
        with torch.inference_mode(False):
            found = _kept[key] = make(rows, value, dtype, device)
    return found


def _numbers(rows: int, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(rows, dtype=dtype, device=device)


def _filled(rows: int, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((rows,), value, dtype=dtype, device=device)


def _constant(rows: int, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=dtype, device=device)


def group_numbers(labels: Tensor) -> Tensor:
    """Labels `[N]` as numbers from 0 up to at most N - 1, alike where the labels are, without a GPU's reading one back.

    On a CPU torch.unique takes a fifth of the time of the calls below, but has no fixed shape to trace.
    """
    if labels.is_cpu and not (
        torch.compiler.is_compiling() or _len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active()
    ):
        return torch.unique(labels, return_inverse=True)[1]
    ordered, order = labels.sort()
    changes = torch.ones_like(ordered).index_fill_(0, row_numbers(len(labels), labels)[:1], 0)
    changes[1:] = (ordered[1:] != ordered[:-1]).long()
    return torch.empty_like(labels).scatter_(0, order, changes.cumsum(0))


def group_sizes(groups: Tensor) -> Tensor:
    """Returns `[N]`, the number of rows in each row's group, of `group_numbers`."""
    return torch.zeros_like(groups).index_add_(0, groups, torch.ones_like(groups))[groups]
