"""How a Triton kernel is launched: on which devices, with which tile, and what its failures say."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...core import environment
from ...core.numerics import cdiv
from ...core.rows import tf32
from ...core.strips import Strip
from ..shared import check_vector

if TYPE_CHECKING:
    from .config import Config

MIN_TRITON = (3, 6)
ALIGNMENT = 16  # bytes: of a row's start, for wide copies and for tensor descriptors


@environment.constant
def why_not_on(dtype: torch.dtype, device: torch.device) -> str | None:
    """Returns the reason why no kernel runs for such tensors, or None."""
    return _why_not(dtype, device, environment.get("TRITON_INTERPRET"))


@functools.cache
def _why_not(dtype: torch.dtype, device: torch.device, interpret: str | None) -> str | None:
    """Cached per dtype and device, because looking for a package takes 20 us."""
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
        return None  # on such GPUs only the proof says what runs
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


# Launches -------------------------------------------------------------------------------------------------------------

MOST_COMPILED = 4096
_compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}  # what was launched, with its constants, by `_likeness`


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **constants: Any) -> None:
    """Launches a kernel; every launch goes through here.

    The kernel that Triton compiled for an earlier launch like this one is launched at once: for each launch Triton
    reads its environment, specialises every argument and looks up the text of that, 17 us where this takes 10.
    """
    like: list[Any] = [kernel.fn, device, *constants, *constants.values()]
    _likeness(args, like)
    key = tuple(like)
    known = _compiled.get(key)
    with _on(device):
        try:
            if known is not None:
                known[0][(*grid, 1, 1)[:3]](*args, *known[1])
                return
            _check(args)
            compiled = kernel[grid](*args, **constants, enable_fp_fusion=True)  # the default changes in Triton 3.10
        except Exception as error:
            raise RuntimeError(_failed(kernel.fn.__name__, device, error)) from error
    if compiled is not None and on_nvidia(device):  # in the interpreter it is; AMD's backend looks at storages, too
        if len(_compiled) >= MOST_COMPILED:
            _compiled.clear()
        _compiled[key] = compiled, [constants[name] for name in kernel.arg_names[len(args) :]]


def _likeness(args: tuple[Any, ...], found: list[Any]) -> None:
    """Appends what Triton compiles a kernel for: the arguments' types, whether 16 divides an address or an integer,
    whether an integer is 1 or takes 64 bits. And which tensors are not contiguous, for `_check`."""
    for x in args:
        kind = type(x)
        if x is None:
            found.append(None)
        elif kind is int:
            found.append(
                "1" if x == 1 else ("long" if x >> 31 else "int") if x & 15 else ("long 16" if x >> 31 else 16)
            )
        elif isinstance(x, Tensor):
            found.append(x.dtype)
            if x.data_ptr() & 15:
                found.append("odd address")
            if not x.is_contiguous():
                found.append(("strided", x.dim()))
        elif isinstance(x, tuple):
            found.append(kind)
            _likeness(x, found)
            found.append("end")
        elif kind is float:
            found.append(float)
        else:  # a descriptor, whose address 16 divides
            found += (kind, x.base.dtype, *x.block_shape)


# How wide kernels read and write (kernels/vectors.py) -----------------------------------------------------------------


def divisor(*sizes: int) -> int:
    """Returns the largest of 1, 2, 4, 8 and 16 that divides all sizes and strides of a launch."""
    return math.gcd(16, *sizes)


def whole(x: Tensor) -> int:
    """Returns the columns of a matrix up to the next 16 bytes, if each row has that room, else its columns."""
    wide = ALIGNMENT // x.itemsize
    columns, stride = cdiv(x.shape[1], wide) * wide, x.stride(0)
    return columns if stride >= columns and stride % wide == 0 == x.data_ptr() % ALIGNMENT else x.shape[1]


def out_wide(out: Tensor | None) -> int:
    """Returns what divides a row that is written, with its padding up to 16 bytes: the workspace's, and never read."""
    if out is None:
        return 16
    wide = divisor(whole(out), out.stride(0))
    return wide if out.shape[1] % wide == 0 else min(wide, 8)


# The remedies of a failed compile or launch, by words of its error.
REMEDIES = {
    "C compiler": "install gcc, or name a C compiler in CC",
    "'-shared', '-fPIC'": "Python.h and a C compiler must be there: install gcc and python3-dev",  # the command's words
    "libcuda": "install NVIDIA's driver, or name the folder of libcuda.so.1 in TRITON_LIBCUDA_PATH",
    "ptxas": "install triton again, or name a ptxas in TRITON_PTXAS_PATH (TRITON_PTXAS_BLACKWELL_PATH from sm_100 on)",
    "no kernel image": "update the driver: it knows no such cubin",
    "kernel image is invalid": "update the driver: it knows no such cubin",
    "Permission denied": "name a folder that can be written in TRITON_CACHE_DIR",
    "No space left": "make room, or name another folder in TRITON_CACHE_DIR",
    # These are reported by the next call, and every later call fails.
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


_HERE = contextlib.nullcontext()


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes the tensors' device current, because Triton launches on the current device."""
    if device.type == "xpu":
        return torch.xpu.device(device)
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Returns an NVIDIA GPU's capability; config.ELSEWHERE for ROCm and XPU; None in the interpreter."""
    if device.type not in ("cuda", "xpu"):
        return None
    if on_nvidia(device):
        return torch.cuda.get_device_capability(device)
    from .config import ELSEWHERE

    return ELSEWHERE


def has_registers_for_two_paths(device: torch.device) -> bool:
    """True on sm_90, and in the interpreter. On sm_80, sm_100, sm_120 and AMD's some kernels would spill."""
    return capability_of(device) in ((9, 0), None)


def on_nvidia(device: torch.device) -> bool:
    """True on NVIDIA GPUs, and on a CPU in the interpreter; ROCm's devices are called cuda, too."""
    return device.type != "xpu" and torch.version.hip is None


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).max_compute_units
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def precision_of(dtype: torch.dtype, device: torch.device) -> str:
    """Returns the precision of fp32 products, by torch's switch for matmuls. Products of 16-bit numbers are exact.

    On other GPUs Triton 3.7 multiplies tf32 only on gfx942, so fp32 stays fp32 there.
    """
    if dtype == torch.float32 and tf32() and on_nvidia(device):
        return "tf32"
    return "ieee"


NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def config_of(strip: Strip, mode: str) -> Config:
    (M, D), N = strip.x.shape, strip.y.shape[0]
    precision = precision_of(strip.x.dtype, strip.x.device)
    dtype = "tf32" if precision == "tf32" else NAMES[strip.x.dtype]
    return picked(M, N, D, dtype, capability_of(strip.x.device), mode)


@functools.lru_cache(maxsize=1024)
def picked(*where: Any) -> Config:
    from .config import pick_config

    return pick_config(*where)


def descriptor(x: Tensor, rows: int, columns: int, in_tf32: bool = False) -> Any:
    """in_tf32: copies round fp32 to the nearest tf32. The tensor cores would cut off what it has less."""
    found = _descriptors()(x, x.shape, x.stride(), [rows, columns])
    if in_tf32:
        found.round_f32_to_tf32 = True  # Triton 3.6 has no such field, and cuts off
    return found


@functools.cache
def _descriptors() -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor
