"""What a user reads where a compile or a launch fails, and what the watch over a capture says: JSON on stdout."""

from __future__ import annotations

import device

GPU = device.Device(90)  # before torch
device.front_end_only()

import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from unittest import mock  # noqa: E402

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from triton.backends.nvidia.compiler import CUDABackend  # noqa: E402
from triton.runtime.errors import PTXASError  # noqa: E402

import fusedloss  # noqa: E402


@triton.jit
def one(X):
    tl.store(X + tl.program_id(0), 1.0)


def loss(rows: int) -> None:
    x = torch.empty(rows, 8, device="cuda")
    fusedloss.triplet(x, x, x, backend="triton")


def compile_fails() -> None:
    failed = PTXASError("`ptxas` failed with error code 255")
    with mock.patch.object(CUDABackend, "make_ttgir", side_effect=failed), triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        loss(3)


def no_compiler() -> None:
    missing = RuntimeError("Failed to find C compiler. Please specify via CC environment variable")
    with mock.patch.object(triton.JITFunction, "run", side_effect=missing):
        loss(3)


def refused(function: str) -> None:
    GPU.refuse(function)
    try:
        loss(3)
    finally:
        GPU.refuse("")


def tensor_map() -> None:
    """What `operand` is there for."""
    from fusedloss.backends import triton as backend

    with mock.patch.object(backend, "operand", lambda x: x):
        key = torch.empty(1, 64, device="cuda", dtype=torch.bfloat16).expand(300, 64)
        fusedloss.info_nce(key, key, temperature=torch.ones((), device="cuda"), backend="triton")


def x() -> torch.Tensor:
    return torch.ones(3, device="cuda")


FAILURES: dict[str, Callable[[], object]] = {
    "compile": compile_fails,
    "compiler": no_compiler,
    "load": lambda: refused("cuModuleLoadData"),
    "launch": lambda: refused("cuLaunchKernelEx"),
    "tensor map": tensor_map,
    "grid": lambda: one[(1, 65536)](x()),
    "host": lambda: one[(1,)](torch.ones(3)),
}
CAPTURED: dict[str, Callable[[], object]] = {
    "item": lambda: x().sum().item(),
    "bool": lambda: bool(x().sum() > 0),
    "tolist": lambda: x().tolist(),
    "nonzero": lambda: x().nonzero(),
    "mask": lambda: x()[x() > 0],
    "cpu": lambda: x().cpu(),
    "from a list": lambda: torch.tensor([1, 2], device="cuda"),
    "from the host": lambda: torch.ones(3).to("cuda"),
    "copy_": lambda: x().copy_(torch.ones(3)),
    "nothing": lambda: torch.full((), 2.0, device="cuda") * x().masked_fill(x() > 0, 1.0),
}


def said(function: Callable[[], object]) -> list[str]:
    try:
        with FakeTensorMode():
            function()
    except Exception as error:
        return [type(error).__name__, str(error), type(error.__cause__).__name__]
    return []


def captured(function: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        with device.captured():
            return function()

    return call


found = {name: said(function) for name, function in FAILURES.items()}
found |= {f"captured {name}": said(captured(function)) for name, function in CAPTURED.items()}
GPU.launches()
said(lambda: one[(0,)](x()))  # Triton says nothing, and launches nothing
json.dump(found | {"empty grid": [launch.kernel for launch in GPU.launches()]}, sys.stdout)
