"""The sweep's primitives as Triton kernels: launchers for `fusedloss.kernels`.

Triton is imported on first use: the package works without it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import environment, products
from ..problem import (
    NO_RULE,
    GuideRule,
    Patch,
    Prepared,
    Problem,
    RowRule,
    RowSums,
    Settled,
    Softmax,
    Strip,
    StripMask,
    Tally,
    stats_dtype,
)
from ..rows import guide_threshold, tf32
from ..waves import wave_rows
from .shared import can_exp, check_vector, exp_shift

if TYPE_CHECKING:
    from ..kernels.config import Config

MIN_TRITON = (3, 6)
FOLD_COPIES = 12  # see chunked
ALIGNMENT = 16  # bytes: of a row's start, for wide copies and for tensor descriptors
PANEL_BYTES = 32 << 20  # fp32 similarities from the vendor's GEMM: they fit an H200's L2, where the fold reads them


def why_not(problem: Problem) -> str | None:
    if problem.prefixes:
        return "no kernel sums several prefixes in one sweep yet; matryoshka takes them one after the other here"
    dtypes = {problem.dtype: None}  # in order
    for block in problem.blocks:
        dtypes |= {x.dtype: None for x in block.mask.guide or ()}
    reasons = (why_not_on(dtype, problem.device) for dtype in dtypes)
    return next((reason for reason in reasons if reason), None)


@environment.constant
def why_not_on(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why no kernel runs for tensors like that."""
    return _why_not(dtype, device, environment.get("TRITON_INTERPRET"))


@functools.cache
def _why_not(dtype: torch.dtype, device: torch.device, interpret: str | None) -> str | None:
    """Looking for a package takes 20 us: once per dtype and device."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec("fusedloss.kernels") is None:
        return "fusedloss.kernels is missing: the package runs from a checkout that is not installed (pip install -e .)"
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_TRITON:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, MIN_TRITON))}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no kernel for {dtype}"
    interpreted = triton.knobs.runtime.interpret
    if interpreted and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies the bit patterns of bfloat16"
    if interpreted:
        return None
    if device.type not in ("cuda", "xpu"):
        return f"needs a GPU (CUDA, ROCm or XPU), or TRITON_INTERPRET=1; the operands are on {device}"
    if not on_nvidia(device):
        return None  # its proof says what runs there
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"needs compute capability 8.0 or newer, not {'.'.join(map(str, capability))}"
    return None


@contextlib.contextmanager
def compiling(tell: Callable[[float], None]) -> Iterator[None]:
    """Within, `tell` is told of each kernel that was compiled, and in how many seconds."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    import triton

    def listen(*, times: Any, **_: Any) -> None:
        tell(times.total / 1e6)

    knobs = triton.knobs.compilation
    before, knobs.listener = knobs.listener, listen
    try:
        yield
    finally:
        knobs.listener = before


def takes_units(problem: Problem) -> bool:
    return False  # factors act on the accumulator


def can_fold(problem: Problem) -> bool:
    return False  # folds are in torch


def workspace_copies(problem: Problem) -> float:
    return FOLD_COPIES if problem.fold is not None else 1


def workspace_dtype(problem: Problem) -> torch.dtype:
    return problem.dtype if problem.fold is None else stats_dtype(problem.dtype)  # folds see the similarities


can_store = can_exp


# The similarity GEMM --------------------------------------------------------------------------------------------------


def stats_rows(strips: list[Strip], tally: Tally | None = None, score: Tensor | None = None) -> RowSums:
    maxima, sums = [], []
    for strip in strips:
        config = _config(strip, _mode("stats", strip, tally))
        maxima.append(_row_table(strip, config))
        sums.append(_row_table(strip, config))
        counts = _tally_args(strip, config, tally, score)
        args = _softmax().StatsArgs(maxima[-1], sums[-1], Tally=counts)
        _similarities(_softmax().stats, strip, None, args, config)
        _add_tally(tally, counts)
    return RowSums(_stacked(maxima), _stacked(sums))


def stats_rows_and_columns(
    strip: Strip, tally: Tally | None = None, score: Tensor | None = None
) -> tuple[RowSums, RowSums]:
    config = _config(strip, _mode("stats, columns", strip, tally))
    rows = RowSums(_row_table(strip, config), _row_table(strip, config))
    columns = RowSums(_column_table(strip, config), _column_table(strip, config))
    counts = _tally_args(strip, config, tally, score)
    _similarities(_softmax().stats, strip, None, _softmax().StatsArgs(*rows, *columns, counts), config)
    _add_tally(tally, counts)
    return rows, columns


def _tally_args(strip: Strip, config: Config, tally: Tally | None, score: Tensor | None) -> Any:
    if tally is None:
        return None
    return _softmax().TallyArgs(score, *(_row_table(strip, config) for _ in tally))


def _add_tally(tally: Tally | None, counts: Any) -> None:
    if tally is not None:
        for total, table in zip(tally, counts[1:], strict=True):
            if total is tally.maximum:
                torch.maximum(total, table.amax(0), out=total)
            else:
                total.add_(table.sum(0))


def top_rows(strips: list[Strip]) -> tuple[Tensor, Tensor]:
    (strip,) = strips
    config = _config(strip, _mode("top", strip, None))
    top = _row_table(strip, config)
    column = torch.empty_like(top, dtype=torch.int64)
    _similarities(_masks().top, strip, None, _masks().TopArgs(top, column), config)
    largest = top.amax(0)
    first = column.masked_fill(top != largest, strip.y.shape[0]).amin(0)
    return largest, first.masked_fill(largest == -torch.inf, -1)


def similarities(strip: Strip, out: Tensor) -> None:
    """`out = row_factor * col_factor * <x, y>`, nothing else."""
    # Writers multiply by the factors once more: here they come after.
    bare = strip._replace(row_factor=None, col_factor=None, bias=None, target=None, mask=None, own=None, softcap=0.0)
    _similarities(_masks().store, bare, out, (), _config(strip, "store"))
    if strip.row_factor is not None and strip.col_factor is not None:
        out.mul_(strip.row_factor[:, None]).mul_(strip.col_factor)


def guide_room(strip: Strip) -> tuple[int, int]:
    return 0, 0  # nothing is stored but bits


def guide_rows(strips: list[Strip], rule: GuideRule, room: Tensor, own: Tensor | None = None) -> list[Tensor]:
    """What the guide drops of each block, one bit a column."""
    threshold = guide_threshold(guide_scores(strips[0], room) if own is None else own, rule, strips[0].x.shape[1])
    dropped = []
    for strip in strips:
        bits = torch.empty((strip.x.shape[0], _cdiv(strip.y.shape[0], 32)), dtype=torch.int32, device=strip.x.device)
        args = _masks().BitsArgs(threshold, bits)
        _similarities(_masks().bits, strip, None, args, _config(strip, "guide"))
        dropped.append(bits)
    return dropped


def guide_scores(strip: Strip, room: Tensor) -> Tensor:
    own = strip.scale.new_empty(strip.x.shape[0])
    _similarities(_masks().pick, strip, None, _masks().PickArgs(own), _config(strip, "guide"))
    return own


def _mode(name: str, strip: Strip, tally: Tally | None) -> str:
    more = {"tally": tally is not None, "masked": _masked(strip), "softcap": bool(strip.softcap)}
    return ", ".join([name, *(option for option, given in more.items() if given)])


def _masked(strip: Strip) -> bool:
    return strip.mask is not None or strip.own_scale is not None


def exp_rows(
    problem: Problem,
    strips: list[Strip],
    outs: list[Tensor],
    target_sim: Tensor | None,
    tally: Tally | None = None,
    score: Tensor | None = None,
) -> tuple[RowSums, None]:
    """Write E = exp(z - shift). A scale that is known beforehand has no gradient, so there is no q."""
    if target_sim is not None:
        raise ValueError("exp_rows has no q: a scale with a gradient is not known beforehand")
    shift = exp_shift(problem)
    sums = []
    for strip, out in zip(strips, outs, strict=True):
        config = _config(strip, _mode("exp", strip, tally))
        sums.append(_row_table(strip, config))
        counts = _tally_args(strip, config, tally, score)
        _similarities(_softmax().exp, strip, out, _softmax().ExpArgs(shift, sums[-1], Tally=counts), config)
        _add_tally(tally, counts)
    return RowSums(shift, _stacked(sums)), None


def exp_rows_and_columns(problem: Problem, strip: Strip, out: Tensor) -> tuple[RowSums, RowSums]:
    config = _config(strip, _mode("exp, columns", strip, None))
    shift, rows, columns = exp_shift(problem), _row_table(strip, config), _column_table(strip, config)
    _similarities(_softmax().exp, strip, out, _softmax().ExpArgs(shift, rows, columns), config)
    return RowSums(shift, rows), RowSums(shift, columns)


def grad_rows(
    strips: list[Strip],
    outs: list[Tensor],
    rows: Softmax,
    columns: Softmax | None,
    entry: Tensor,
    gain: Tensor | None,
    smooth: Tensor | None = None,
) -> Tensor | None:
    """Write gain * dz. q holds the tiles' sums of dz_ij (sim_ij - target's), j != t, where targets are given."""
    wants_q = rows.target_sim is not None
    qs = []
    for strip, out in zip(strips, outs, strict=True):
        mode = f"grad{', columns' if columns is not None else ''}{', q' if wants_q else ''}"
        config = _config(strip, _mode(mode, strip, None))
        q = _row_table(strip, config) if wants_q else None
        if q is not None:
            qs.append(q)
        own_entry = None if strip.target is None else entry
        args = _softmax().GradArgs(
            gain, rows.shift, rows.weight, own_entry, rows.target_sim, *(columns or (None, None, None)), q, smooth
        )
        _similarities(_softmax().grad, strip, out, args, config)
    return _stacked(qs) if qs else None


def _stacked(tables: list[Tensor]) -> Tensor:
    return tables[0] if len(tables) == 1 else torch.cat(tables)


def _row_table(strip: Strip, config: Config) -> Tensor:
    n_tiles = _cdiv(strip.y.shape[0], config.BLOCK_N) * config.SUBTILES
    return strip.scale.new_empty((n_tiles, strip.x.shape[0]))


def _column_table(strip: Strip, config: Config) -> Tensor:
    return strip.scale.new_empty((_cdiv(strip.x.shape[0], config.BLOCK_M), strip.y.shape[0]))


def _similarities(epilogue: Callable[..., None], strip: Strip, out: Tensor | None, args: tuple, config: Config) -> None:
    if config.GEMM == "library":
        return _panels(epilogue, strip, out, args, config)
    x, y = strip.x, strip.y
    (M, D), N = x.shape, y.shape[0]
    tiles = _cdiv(M, config.BLOCK_M) * _cdiv(N, config.BLOCK_N)
    if not tiles:
        return
    descriptors = config.GEMM == "descriptors"
    stride_om = 0 if out is None else out.stride(0)
    kernel_x, kernel_y, kernel_out = x, y, out
    if descriptors:
        kernel_x = _descriptor(x, config.BLOCK_M, config.BLOCK_D)
        kernel_y = _descriptor(y, config.BLOCK_N, config.BLOCK_D)
        if out is not None:
            kernel_out = _descriptor(out, config.BLOCK_M, config.BLOCK_N // config.SUBTILES)
    launch(
        _similarity().similarity_kernel,
        (min(tiles, config.programs * _multiprocessors(x.device)),),
        x.device,
        kernel_x,
        kernel_y,
        kernel_out,
        *_columns(strip),
        args,
        M,
        N,
        D,
        x.stride(0),
        y.stride(0),
        stride_om,
        EPILOGUE=epilogue,
        INPUT_PRECISION=_precision(x.dtype, x.device),
        DESCRIPTORS=descriptors,
        **config.options(),
    )


def _panels(epilogue: Callable[..., None], strip: Strip, out: Tensor | None, args: tuple, config: Config) -> None:
    """The vendor's GEMM into a panel of columns, fp32, and one pass over it while it is in L2."""
    x, y = strip.x, strip.y
    M, N = x.shape[0], y.shape[0]
    width = _panel_columns(strip, config)
    panel = strip.scale.new_empty((M, min(width, _cdiv(N, 4) * 4)))
    for start in range(0, N if M else 0, width):
        part = y[start : start + width]
        sim = panel[:, : part.shape[0]]
        _multiply(sim, x, part)
        launch(
            _similarity().panel_kernel,
            (_cdiv(M, config.BLOCK_M), _cdiv(part.shape[0], config.BLOCK_N)),
            x.device,
            sim,
            out,
            *_columns(strip),
            args,
            M,
            N,
            panel.stride(0),
            0 if out is None else out.stride(0),
            start // config.BLOCK_N,
            EPILOGUE=epilogue,
            BLOCK_M=config.BLOCK_M,
            BLOCK_N=config.BLOCK_N,
            num_warps=config.num_warps,
        )


def _panel_columns(strip: Strip, config: Config) -> int:
    """Whole tiles of columns, and whole waves of the vendor's GEMM."""
    M, N = strip.x.shape[0], strip.y.shape[0]
    columns = wave_rows(N, M, PANEL_BYTES // 4 // max(1, M), _multiprocessors(strip.x.device))
    return max(config.BLOCK_N, columns // config.BLOCK_N * config.BLOCK_N)


def _multiply(sim: Tensor, x: Tensor, y: Tensor) -> None:
    """`sim = x @ y.T` in fp32."""
    if x.dtype == sim.dtype:
        torch.mm(x, y.T, out=sim)
    elif products.narrow(x.dtype, x.device):
        products.wide_mm(sim, x, y.T)
    else:
        torch.mm(x.to(sim.dtype), y.to(sim.dtype).T, out=sim)


def _columns(strip: Strip) -> tuple[Any, ...]:
    softcap = strip.softcap or None
    return strip.scale, strip.row_factor, strip.col_factor, strip.bias, softcap, strip.target, _mask_args(strip)


def _mask_args(strip: Strip) -> Any:
    if not _masked(strip):
        return None
    mask = strip.mask or StripMask()
    drops, keeps = ([c for c in mask.compare if c.keep == keep] for keep in (False, True))
    dense, bits = mask.dense, mask.dropped
    exempt = () if mask.exempt is None else tuple(c.contiguous() for c in mask.exempt.unbind(1))
    return _masks().MaskArgs(
        tuple(c.rows.contiguous() for c in drops),
        tuple(c.keys.contiguous() for c in drops),
        tuple(c.rows.contiguous() for c in keeps),
        tuple(c.keys.contiguous() for c in keeps),
        None if dense is None else dense.view(torch.uint8),
        bits,
        mask.threshold,
        exempt,
        mask.skip,
        strip.own,
        strip.own_scale,
        *((0, 0) if dense is None else dense.stride()),
    )


# Once per row ---------------------------------------------------------------------------------------------------------


def operand(x: Tensor) -> Tensor:
    """Rows of unit stride that start on 16-byte boundaries and do not overlap: `x` itself, or one padded copy.

    Rows that overlap or are expanded have no tensor map.
    """
    starts = x.stride(0) >= x.shape[1] and x.stride(0) * x.itemsize % ALIGNMENT == 0
    if x.stride(1) == 1 and starts and x.data_ptr() % ALIGNMENT == 0:
        return x
    padded = x.new_empty((x.shape[0], _cdiv(x.shape[1] * x.itemsize, ALIGNMENT) * ALIGNMENT // x.itemsize))
    return padded[:, : x.shape[1]].copy_(x)


def prepare(
    x: Tensor,
    y: Tensor,
    target: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    rule: RowRule = NO_RULE,
    *,
    cosine: bool,
    wants_target_sim: bool,
) -> Prepared:
    (M, D), N = x.shape, y.shape[0]
    row_factor = scale.new_empty(M) if cosine else None
    col_factor = row_factor if y is x else scale.new_empty(N) if cosine else None
    score = torch.empty(M, dtype=torch.float64, device=x.device)
    target_sim = scale.new_empty(M) if wants_target_sim else None
    softcap, margin = rule.softcap, rule.margin
    slope = scale.new_empty(M) if softcap or any(margin) else None
    own_columns = None if y is x else col_factor
    _by_row(
        "prepare_kernel",
        x.device,
        M if own_columns is None else max(M, N),
        x,
        y,
        target,
        row_factor,
        own_columns,
        scale,
        bias,
        score,
        target_sim,
        slope,
        M,
        N,
        D,
        x.stride(0),
        y.stride(0),
        SOFTCAP=softcap or None,
        MARGIN=(margin.angle, math.sin(margin.angle), math.cos(margin.angle), margin.cosine) if any(margin) else None,
    )
    return Prepared(row_factor, col_factor, score, target_sim, slope)


def inverse_norms(y: Tensor) -> Tensor:
    N, D = y.shape
    factor = torch.empty(N, dtype=torch.float32, device=y.device)
    nothing = (None,) * 5
    sizes = (0, N, D, 0, y.stride(0))
    _by_row("prepare_kernel", y.device, N, None, y, None, None, factor, *nothing, *sizes, SOFTCAP=None, MARGIN=None)
    return factor


def merge(running: RowSums, part: RowSums) -> RowSums:
    """Folds the part's tiles into `running`, in place."""
    n_tiles, R = part.total.shape
    _by_row("merge_kernel", part.total.device, R, *part, *running, n_tiles, R)
    return running


def settle(
    sums: RowSums,
    score: Tensor,
    weight: Tensor,
    rule: RowRule = NO_RULE,
    *,
    smooth: Tensor | None = None,
    slope: Tensor | None = None,
    patch: Patch | None = None,
    scaled: Sequence[Tensor] = (),
    dtype: torch.dtype | None = None,
) -> Settled:
    shift, total = sums
    n_tiles, R = total.shape if total.dim() == 2 else (1, total.shape[0])
    loss, own_shift, over_l, entry = (torch.empty_like(weight) for _ in range(4))
    settled = Settled(loss, own_shift, over_l, entry, [torch.empty_like(x, dtype=dtype) for x in scaled])
    given = isinstance(shift, float)
    out, target, row_factor, col_factor = patch or (None, None, None, None)
    D = scaled[0].shape[1] if scaled else 1
    strides = tuple(x.stride(0) for pair in zip(scaled, settled.scaled, strict=True) for x in pair)
    _by_row(
        "settle_kernel",
        total.device,
        R,
        None if given else shift,
        total,
        shift if given else 0.0,
        score,
        weight,
        float(rule.label_smoothing),
        float(rule.copies),
        rule.z_loss or None,
        settled.shift,
        settled.weight,
        settled.entry if patch is None else None,
        settled.loss,
        out,
        target,
        row_factor,
        col_factor,
        tuple(scaled),
        tuple(settled.scaled),
        n_tiles,
        R,
        D,
        0 if out is None else out.stride(0),
        strides,
        smooth,
        slope,
        RELATIVE=patch is not None,
        DECOUPLED=rule.decoupled,
    )
    return settled


def weigh(patch: Patch, rows: Tensor, columns: Tensor, entry: Tensor) -> None:
    R, N = patch.out.shape
    _by_row("weigh_kernel", patch.out.device, R, patch.out, rows, columns, entry, *patch[1:], R, N, patch.out.stride(0))


def finish(
    total: Tensor,
    over_l: Tensor | None,
    scale: Tensor,
    gain: Tensor | None,
    x: Tensor,
    factor: Tensor | None,
    out: Tensor,
) -> None:
    R, D = total.shape
    projected = None if factor is None else x
    strides = total.stride(0), x.stride(0), out.stride(0)
    _by_row("finish_kernel", total.device, R, total, over_l, scale, gain, projected, factor, out, R, D, *strides)


def _by_row(name: str, device: torch.device, R: int, *args: Any, **constants: Any) -> None:
    """Launch a kernel of `kernels/rows.py`, a few rows a program."""
    if R:
        options = _row_options(name, device.type == "cpu")
        launch(getattr(_rows(), name), (_cdiv(R, options["BLOCK_R"]),), device, *args, **constants, **options)


@functools.cache
def _row_options(name: str, interpreted: bool) -> dict[str, int]:
    from ..kernels.config import pick_rows

    return pick_rows(name, interpreted=interpreted)


# Devices --------------------------------------------------------------------------------------------------------------


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache
def _softmax() -> ModuleType:
    from ..kernels import softmax

    return softmax


@functools.cache
def _masks() -> ModuleType:
    from ..kernels import masks

    return masks


@functools.cache
def _similarity() -> ModuleType:
    from ..kernels import similarity

    return similarity


@functools.cache
def _rows() -> ModuleType:
    from ..kernels import rows

    return rows


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **constants: Any) -> None:
    """Every launch of every kernel."""
    _check(args)
    with _on(device):
        try:
            kernel[grid](*args, **constants, enable_fp_fusion=True)  # the default changes in Triton 3.10
        except Exception as error:
            raise RuntimeError(_failed(kernel.fn.__name__, device, error)) from error


# What a failed compile or launch asks for, by words of its error.
REMEDIES = {
    "C compiler": "install gcc, or name a C compiler in CC",
    "'-shared', '-fPIC'": "Python.h and a C compiler must be there: install gcc and python3-dev",  # the command's words
    "libcuda": "install NVIDIA's driver, or name the folder of libcuda.so.1 in TRITON_LIBCUDA_PATH",
    "ptxas": "install triton again, or name a ptxas in TRITON_PTXAS_PATH (TRITON_PTXAS_BLACKWELL_PATH from sm_100 on)",
    "no kernel image": "update the driver: it knows no such cubin",
    "kernel image is invalid": "update the driver: it knows no such cubin",
    "Permission denied": "name a folder that can be written in TRITON_CACHE_DIR",
    "No space left": "make room, or name another folder in TRITON_CACHE_DIR",
    # These are found by whoever asks next, and no later call succeeds.
    "illegal memory access": "a kernel before this one failed: start again with CUDA_LAUNCH_BLOCKING=1 to see which",
    "launch failure": "a kernel before this one failed: start again with CUDA_LAUNCH_BLOCKING=1 to see which",
}


def _failed(name: str, device: torch.device, error: Exception) -> str:
    import triton

    what = str(device)
    if device.type == "cuda":
        what = f"{device} ({torch.cuda.get_device_name(device)}, {_architecture(device)})"
    said = str(error)
    remedy = next((f"{remedy}; " for words, remedy in REMEDIES.items() if words in said), "")
    first = next((line.strip() for line in said.splitlines() if line.strip()), "no message")
    return (
        f"backend 'triton': kernel {name!r} was not launched on {what} by Triton {triton.__version__}. "
        f"{type(error).__name__}: {first}. Remedy: {remedy}`python -m fusedloss check` says what runs here, and "
        "backend='chunked' needs none of it"
    )


def _architecture(device: torch.device) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName
    return "sm_" + "".join(map(str, torch.cuda.get_device_capability(device)))


def _check(args: tuple[Any, ...]) -> None:
    for number, value in enumerate(args):
        if isinstance(value, Tensor):
            check_vector(f"argument {number}", value)
        elif isinstance(value, tuple):
            _check(value)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, wherever the tensors are."""
    if device.type == "xpu":
        return torch.xpu.device(device)
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    """Of an NVIDIA GPU; config.ELSEWHERE of one of ROCm or XPU; None in the interpreter."""
    if device.type not in ("cuda", "xpu"):
        return None
    if on_nvidia(device):
        return torch.cuda.get_device_capability(device)
    from ..kernels.config import ELSEWHERE

    return ELSEWHERE


def on_nvidia(device: torch.device) -> bool:
    """Or in the interpreter, on a CPU; ROCm's devices are called cuda, too."""
    return device.type != "xpu" and torch.version.hip is None


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).max_compute_units
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _precision(dtype: torch.dtype, device: torch.device) -> str:
    """fp32 follows torch's switch for its own matmuls. Products of 16-bit numbers are exact.

    Of other GPUs Triton 3.7 multiplies tf32 on gfx942 alone: there fp32 is fp32.
    """
    if dtype == torch.float32 and tf32() and on_nvidia(device):
        return "tf32"
    return "ieee"


NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _config(strip: Strip, mode: str) -> Config:
    (M, D), N = strip.x.shape, strip.y.shape[0]
    precision = _precision(strip.x.dtype, strip.x.device)
    dtype = "tf32" if precision == "tf32" else NAMES[strip.x.dtype]
    return _picked(M, N, D, dtype, _capability(strip.x.device), mode)


@functools.lru_cache(maxsize=1024)
def _picked(*where: Any) -> Config:
    from ..kernels.config import pick_config

    return pick_config(*where)


def _descriptor(x: Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])
