"""How a kernel of `fusedloss._C` is launched: on which devices, what it is told, and what its failures say."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...core import environment
from ...core.mask import StripMask
from ...core.numerics import cdiv
from ...core.rows import tf32
from ...core.strips import Strip
from ..shared import check_vector

LAUNCHES = ("prepare", "merge", "settle", "scale_rows", "weigh", "finish")
PARAMS = {name: f"{name.title().replace('_', '')}Params" for name in LAUNCHES}
NUMBERS = frozenset((int, float, bool))
DTYPES = {getattr(torch, name): name for name in ("float32", "float16", "bfloat16")}
NOT_BUILT = (
    "not built: there was no nvcc or no GPU at installation; install with FUSEDLOSS_CUDA=1, which takes nvcc alone"
)
ALIGNMENT = 16  # bytes: the size of one cp.async, and TMA's alignment of rows


@functools.cache
def extension() -> ModuleType:
    """Imported on first use: the package works without it."""
    from ... import _C

    return _C


def stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def launch(name: str, device: torch.device, **fields: Any) -> None:
    """Launches `_C.name` with the fields of its struct."""
    call(name, device, struct(PARAMS[name], **fields))


def call(name: str, device: torch.device, *arguments: Any) -> None:
    """Calls on the tensors' device, because kernels are launched on the current device."""
    run = getattr(extension(), name)
    try:
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return run(*arguments, stream(device))
        with torch.cuda.device(device):
            run(*arguments, stream(device))
    except RuntimeError as error:
        raise RuntimeError(_failed(name, device, str(error))) from None


# The remedies of CUDA's errors, by a part of their names.
REMEDIES = {
    "InsufficientDriver": "update the driver, or install fusedloss again with an nvcc of the driver's CUDA or older",
    "NoKernelImage": "install fusedloss again with FUSEDLOSS_CUDA_ARCHS={arch}",
    "UnsupportedPtx": "update the driver, or install fusedloss again with FUSEDLOSS_CUDA_ARCHS={arch}",
    "InvalidPtx": "install fusedloss again with FUSEDLOSS_CUDA_ARCHS={arch}",
    "MemoryAllocation": "free memory on {device}, or reduce the batch",
    # These are reported by the next call, and every later call fails.
    "IllegalAddress": "a kernel before this one failed: start again with CUDA_LAUNCH_BLOCKING=1 to see which",
    "LaunchFailure": "a kernel before this one failed: start again with CUDA_LAUNCH_BLOCKING=1 to see which",
    "Assert": "a kernel before this one failed: start again with CUDA_LAUNCH_BLOCKING=1 to see which",
}


def _failed(name: str, device: torch.device, error: str) -> str:
    """Words a failed launch. error: "name: cudaErrorName: CUDA's text", from csrc/bindings.cpp."""
    what, arch = str(device), ""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        arch = f"{major}{minor}"
        what = f"{device} (sm_{arch})"
    remedies = [remedy for part, remedy in REMEDIES.items() if f"cudaError{part}" in error]
    remedy = "".join(f"{one.format(arch=arch, device=device)}; " for one in remedies[:1])
    info = extension().build_info()
    driver = f", the driver runs up to {info['driver_version']}" if info["driver_version"] else ""
    return (
        f"backend 'cuda': kernel {name!r} was not launched on {what}. {error}. fusedloss._C was built with CUDA "
        f"{info['cuda_version']} for {', '.join(info['archs'])}{driver}. Remedy: {remedy}`python -m fusedloss info` "
        "says what runs here, and backend='chunked' needs none of it"
    )


def struct(name: str, **fields: Any) -> Any:
    """Fills a struct of csrc/: tensors for pointers, lists of them for arrays, torch's dtypes; None is the default."""
    # Saves 0.3 us for each number, and a small batch's step passes 46.
    given = {k: v if type(v) in NUMBERS else _plain(k, v) for k, v in fields.items() if v is not None}
    return getattr(extension(), name)(**given)


def number_format(dtype: torch.dtype) -> Any:
    return getattr(extension().DType, DTYPES[dtype])


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        check_vector(name, value)
        return value.data_ptr()
    if isinstance(value, torch.dtype):
        return number_format(value)
    return [_plain(name, each) for each in value] if isinstance(value, list) else value


def build_info() -> Mapping[str, object] | None:
    """Returns what fusedloss._C was built with, or None if it was not built."""
    try:
        return extension().build_info()
    except ImportError:
        return None


@environment.constant
def why_not_on(dtype: torch.dtype, device: torch.device) -> str | None:
    """Returns the reason why no kernel runs for such tensors, or None."""
    return _why_not(dtype, device, extension)


@functools.cache
def _why_not(dtype: torch.dtype, device: torch.device, load: Any) -> str | None:
    """Cached per dtype, device and extension."""
    info = build_info()
    if info is None:
        return f"the extension fusedloss._C was {NOT_BUILT}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"no kernel for {dtype}"
    archs = info["archs"]
    assert isinstance(archs, list)
    if archs == ["host"]:
        return None if device.type == "cpu" else f"built for the host; the operands are on {device}"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"needs an NVIDIA GPU; the operands are on {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"needs compute capability 8.0 or newer, not {'.'.join(map(str, capability))}"
    if not runs_on(archs, capability):
        return f"fusedloss._C was built for {', '.join(archs)}, the GPU is sm_{capability[0]}{capability[1]}"
    return old_driver(info, capability)


def old_driver(info: Mapping[str, object], capability: tuple[int, int]) -> str | None:
    """Returns the reason why the driver cannot run fusedloss._C, by CUDA's rules of compatibility, or None.

    A runtime needs a driver of its major version, whatever the minor one; the driver compiles PTX of its own version or
    of an older one.
    """
    built, driver, archs = info["cuda_version"], info.get("driver_version"), info["archs"]
    assert isinstance(built, str) and isinstance(archs, list)
    if not isinstance(driver, str) or not driver:
        return None
    here, needed = (tuple(map(int, version.split("."))) for version in (driver, built))
    gpu = f"{capability[0]}{capability[1]}"
    if here[0] < needed[0]:
        return (
            f"the driver runs CUDA up to {driver}, and fusedloss._C was built with {built}: update the driver to one "
            f"of CUDA {needed[0]}.0 or newer, or install fusedloss again with an nvcc of CUDA {here[0]} (CUDA_HOME)"
        )
    if here < needed and not runs_on([arch for arch in archs if arch.startswith("sm_")], capability):
        return (
            f"fusedloss._C has no machine code for the GPU, an sm_{gpu}, but PTX of CUDA {built}, and the driver "
            f"compiles PTX up to {driver}: update it, or install fusedloss again with FUSEDLOSS_CUDA_ARCHS={gpu}"
        )
    return None


# Machine code of these does not run on other architectures, nor theirs on these.
INTEGRATED = {(8, 7), (10, 1), (11, 0)}


def runs_on(archs: list[str], capability: tuple[int, int]) -> bool:
    """By CUDA's rules, machine code runs on its major version from its minor on, PTX on everything newer.

    With an "a", both run on exactly that architecture; with an "f", both on its major version from its minor on.
    """
    for arch in archs:
        kind, _, number = arch.partition("_")
        built = divmod(int(number.rstrip("af")), 10)
        if built == capability:
            return True
        if number.endswith("a") or built > capability:
            continue
        if kind == "compute" and number.isdigit():
            return True
        if built[0] == capability[0] and not INTEGRATED & {built, capability}:
            return True
    return False


def is_aligned(x: Tensor) -> bool:
    lines, length = x.shape
    starts = lines <= 1 or (x.stride(0) >= length and x.stride(0) * x.itemsize % ALIGNMENT == 0)
    return (x.stride(1) == 1 or length == 1) and starts and x.data_ptr() % ALIGNMENT == 0


@functools.cache
def capability_of(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.lru_cache(maxsize=256)
def plan_of(load: Any, capability: int, tensor_cores: bool, aligned: bool, narrow: bool) -> Any:
    return load().plan(capability, tensor_cores, aligned, narrow)


class Launch:
    """One strip's launch: its plan, its tables, and the call."""

    def __init__(self, strip: Strip, *, narrow: bool = False):
        """narrow: the epilogue needs the narrow tile, whatever the strip (`NARROW` in csrc/epilogues/)."""
        self.strip = strip
        narrow = narrow or strip.x.dtype == torch.float32 or bool(strip.softcap) or strip.own is not None
        if strip.mask is not None and not narrow:
            narrow = any(part is not None and part != () for part in strip.mask)
        self.tensor_cores = strip.x.dtype != torch.float32 or tf32()
        aligned = is_aligned(strip.x) and is_aligned(strip.y)
        self.plan = plan_of(extension, capability_of(strip.x.device), self.tensor_cores, aligned, narrow)

    def row_table(self) -> Tensor:
        lines = cdiv(self.strip.y.shape[0], self.plan.BLOCK_N)
        return self.strip.scale.new_empty((lines, self.strip.x.shape[0]))

    def column_table(self) -> Tensor:
        lines = cdiv(self.strip.x.shape[0], self.plan.BLOCK_M)
        return self.strip.scale.new_empty((lines, self.strip.y.shape[0]))

    def __call__(self, name: str, args: Any, out: Tensor | None = None) -> None:
        strip, x, y = self.strip, self.strip.x, self.strip.y
        if not x.shape[0] or not y.shape[0]:
            return
        given = struct(
            "Strip",
            x=x,
            y=y,
            out=out,
            M=x.shape[0],
            N=y.shape[0],
            D=x.shape[1],
            stride_xm=x.stride(0),
            stride_xd=x.stride(1),
            stride_yn=y.stride(0),
            stride_yd=y.stride(1),
            stride_om=0 if out is None else out.stride(0),
            scale=strip.scale,
            row_factor=strip.row_factor,
            col_factor=strip.col_factor,
            bias=strip.bias,
            softcap=strip.softcap,
            target=strip.target,
            tensor_cores=self.tensor_cores,
            **({} if strip.mask is None and strip.own is None else {"masks": self._masks()}),
        )
        call(name, x.device, given, number_format(x.dtype), args, self.plan)

    def _masks(self) -> Any:
        mask = self.strip.mask or StripMask()
        drops, keeps = ([c for c in mask.compare if c.keep == keep] for keep in (False, True))
        dense, bits = mask.dense, mask.dropped
        if mask.without is not None:  # no guide goes together with several targets
            bits = columns_as_bits(mask.without, len(self.strip.y))
        exempt = () if mask.exempt is None else mask.exempt.unbind(1)
        ids = [[c.contiguous() for c in columns] for columns in (
            [c.rows for c in drops], [c.keys for c in drops], [c.rows for c in keeps], [c.keys for c in keeps], exempt
        )]  # fmt: skip
        self.kept = ids, bits  # keeps copies until the launch
        return struct(
            "Masks",
            **dict(zip(("drop_rows", "drop_keys", "keep_rows", "keep_keys", "exempt"), ids, strict=True)),
            dense=dense,
            bits=bits,
            **mask.vectors,
            own=self.strip.own,
            own_scale=self.strip.own_scale,
            stride_dm=0 if dense is None else dense.stride(0),
            stride_dn=0 if dense is None else dense.stride(1),
            stride_bm=0 if bits is None else bits.stride(0),
        )


def columns_as_bits(columns: Tensor, N: int) -> Tensor:
    """Returns int32 [R, cdiv(N, 32)], 1 at these columns [R, P] of each row, which differ; -1: none."""
    bit = torch.where(columns < 0, 0, 1 << columns % 32).to(torch.int32)  # the last one is the sign
    bits = bit.new_zeros((len(columns), cdiv(N, 32)))
    return bits.scatter_add_(1, columns.clamp(min=0) // 32, bit)


def operand(x: Tensor) -> Tensor:
    """Returns `x` itself if the kernels can copy 16 bytes at a time, by row or by column, else a padded copy.

    TMA takes only rows.
    """
    by_row = is_aligned(x)
    if by_row or (is_aligned(x.T) and capability_of(x.device) != 90):
        return x
    wide = ALIGNMENT // x.itemsize
    padded = x.new_empty((x.shape[0], cdiv(x.shape[1], wide) * wide))
    return padded[:, : x.shape[1]].copy_(x)
