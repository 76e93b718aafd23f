"""The sweep's primitives as Triton kernels: launchers for `fusedloss.kernels`.

Triton is imported on first use: the package works without it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..problem import Problem, RowSums, Softmax, Strip

if TYPE_CHECKING:
    from ..kernels.config import Config

MIN_TRITON = (3, 6)
# exp(-69) = 1e-30 is the smallest row sum whose inverse, and products with x, stay normal numbers.
LOWEST_EXPONENT = 69.0
SAFE_SCALE = 59.0  # up to here exp_rows' exponents lie within [-69, 49]


def why_not(problem: Problem) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec("fusedloss.kernels") is None:
        return "fusedloss.kernels is missing: the package runs from a checkout that is not installed (pip install -e .)"
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_TRITON:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, MIN_TRITON))}"
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no kernel for {problem.dtype}"
    interpreted = triton.knobs.runtime.interpret
    if interpreted and problem.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies the bit patterns of bfloat16"
    if interpreted:
        return None
    if problem.device.type != "cuda" or torch.version.hip is not None:
        return f"needs an NVIDIA GPU, or TRITON_INTERPRET=1; the operands are on {problem.device}"
    capability = torch.cuda.get_device_capability(problem.device)
    if capability < (8, 0):
        return f"needs compute capability 8.0 or newer, not {'.'.join(map(str, capability))}"
    return None


def workspace_dtype(problem: Problem) -> torch.dtype:
    return problem.dtype


def can_exp(problem: Problem) -> bool:
    """Whether the host knows a shift that keeps every exponential and every row's sum normal."""
    return (
        problem.cosine
        and problem.scale_bound is not None
        and abs(problem.scale_bound) <= SAFE_SCALE
        and problem.dtype != torch.float16
        and all(block.bias is None for block in problem.blocks)
    )


def _exp_shift(bound: float) -> float:
    """Logits within +-bound: exponents at most 0, or higher where the lowest would underflow."""
    return min(bound, LOWEST_EXPONENT - bound)


def stats_rows(strips: list[Strip]) -> RowSums:
    maxima, sums = [], []
    for strip in strips:
        config = _config(strip, pressure=0)
        maxima.append(_row_table(strip, config))
        sums.append(_row_table(strip, config))
        _launch(_softmax().stats, strip, _softmax().StatsArgs(maxima[-1], sums[-1]), config)
    return _merge(torch.cat(maxima), torch.cat(sums))


def stats_rows_and_columns(strip: Strip) -> tuple[RowSums, RowSums]:
    config = _config(strip, pressure=0)
    row_max, row_sum = _row_table(strip, config), _row_table(strip, config)
    m_tiles = _cdiv(strip.x.shape[0], config.BLOCK_M)
    col_max = strip.scale.new_empty((m_tiles, strip.y.shape[0]))
    col_sum = torch.empty_like(col_max)
    args = _softmax().StatsArgs(row_max, row_sum, col_max, col_sum)
    _launch(_softmax().stats, strip, args, config)
    return _merge(row_max, row_sum), _merge(col_max, col_sum)


def exp_rows(
    problem: Problem, strips: list[Strip], outs: list[Tensor], target_sim: Tensor | None
) -> tuple[RowSums, Tensor | None]:
    """Write E = exp(z - shift). q_i = sum_{j != t} E_ij (sim_ij - target_sim_i), of unrounded E."""
    if problem.scale_bound is None:
        raise ValueError("exp_rows needs scale_bound: see can_exp")
    shift = _exp_shift(abs(problem.scale_bound))
    sums, qs = [], []
    for strip, out in zip(strips, outs, strict=True):
        config = _config(strip, pressure=0 if target_sim is None else 1)
        sums.append(_row_table(strip, config))
        q = None
        if target_sim is not None:
            q = _row_table(strip, config)
            qs.append(q)
        args = _softmax().ExpArgs(out, *out.stride(), shift, sums[-1], target_sim, q)
        _launch(_softmax().exp, strip, args, config)
    total = torch.cat(sums).sum(0)
    return RowSums(torch.full_like(total, shift), total), torch.cat(qs).sum(0) if qs else None


def grad_rows(
    strips: list[Strip], outs: list[Tensor], rows: Softmax, columns: Softmax | None, gain: Tensor | None
) -> Tensor | None:
    """Write gain * dz. q_i = sum_{j != t} dz_ij (sim_ij - target's), where targets are given."""
    wants_q = rows.target_sim is not None
    qs = []
    for strip, out in zip(strips, outs, strict=True):
        config = _config(strip, pressure=2 if wants_q and columns is not None else 1)
        q = _row_table(strip, config) if wants_q else None
        if q is not None:
            qs.append(q)
        args = _softmax().GradArgs(out, *out.stride(), gain, *rows, *(columns or (None, None, None)), q)
        _launch(_softmax().grad, strip, args, config)
    return torch.cat(qs).sum(0) if qs else None


def _merge(maxima: Tensor, sums: Tensor) -> RowSums:
    """Fold the tiles' partials, [tiles, R], in a fixed order. Maxima may be -inf."""
    maximum = maxima.amax(0)
    shift = torch.where(maximum == -math.inf, 0, maximum)
    return RowSums(shift, (sums * torch.exp(maxima - shift)).sum(0))


def _row_table(strip: Strip, config: Config) -> Tensor:
    n_tiles = _cdiv(strip.y.shape[0], config.BLOCK_N) * config.SUBTILES
    return strip.scale.new_empty((n_tiles, strip.x.shape[0]))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache
def _softmax() -> ModuleType:
    from ..kernels import softmax

    return softmax


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _precision(dtype: torch.dtype) -> str:
    """fp32 follows torch's switch for its own matmuls. Products of 16-bit numbers are exact."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


def _config(strip: Strip, pressure: int) -> Config:
    from ..kernels.config import pick_config

    x = strip.x
    return pick_config(
        x.shape[0],
        strip.y.shape[0],
        x.element_size(),
        _capability(x.device),
        tensor_cores=x.dtype != torch.float32 or _precision(x.dtype) == "tf32",
        pressure=pressure,
    )


def _launch(epilogue: Callable[..., None], strip: Strip, args: tuple, config: Config) -> None:
    x, y = strip.x, strip.y
    M, D = x.shape
    N = y.shape[0]
    # Triton launches on the current device, wherever the tensors are.
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        _softmax().similarity_kernel[(_cdiv(M, config.BLOCK_M) * _cdiv(N, config.BLOCK_N),)](
            x,
            y,
            strip.scale,
            strip.row_factor,
            strip.col_factor,
            strip.bias,
            strip.target,
            args,
            M,
            N,
            D,
            *x.stride(),
            *y.stride(),
            EPILOGUE=epilogue,
            INPUT_PRECISION=_precision(x.dtype),
            enable_fp_fusion=True,  # the default changes in Triton 3.10
            **config._asdict(),
        )
