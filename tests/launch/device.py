"""A GPU that computes nothing: what a test's child process needs to drive Triton's own JIT and launcher without one.

`libcuda.c` is the driver, `cuda_device.cpp` the device of torch's tensors. These have no values (FakeTensorMode), so
that every branch for CUDA is taken, and whatever reads a value back raises.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

HERE = Path(__file__).absolute().parent
BUILD = HERE.parents[1] / "build" / "launch"
ON_DEVICE = 1 << 60  # of an address, see cuPointerGetAttribute in libcuda.c


def why_not() -> str | None:
    import torch

    if torch.version.cuda or torch.version.hip:
        return "torch is built for GPUs: it would not take this one for its own"
    missing = [name for name in ("gcc", "g++") if shutil.which(name) is None]
    return f"needs {' and '.join(missing)}" if missing else None


def _package(name: str) -> Path:
    """Without importing it: what is loaded here must come before torch."""
    return Path(importlib.util.find_spec(name).submodule_search_locations[0])


def build() -> None:
    """Both libraries into build/launch; several processes may ask at once."""
    torch, headers = _package("torch"), _package("triton") / "backends" / "nvidia" / "include"
    driver = ["gcc", "-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
    driver += [f"-I{headers}", HERE / "libcuda.c", "-Wl,-soname,libcuda.so.1"]
    device = ["g++", "-std=c++20", "-O0", f"-I{torch / 'include'}", HERE / "cuda_device.cpp"]
    device += [f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name, command in {"libcuda.so.1": driver, "cuda_device.so": device}.items():
            command = [str(word) for word in (*command, "-shared", "-fPIC")]
            parts = [*command, (torch / "version.py").read_text(), *(p.read_text() for p in HERE.glob("*.c*"))]
            digest, key = hashlib.sha256("\0".join(parts).encode()).hexdigest(), BUILD / f"{name}.digest"
            if not key.exists() or key.read_text() != digest:
                done = subprocess.run([*command, "-o", str(BUILD / name)], capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
                key.write_text(digest)


def environment(cache: Path) -> dict[str, str]:
    """Of a child process, in which Triton compiles and finds the driver."""
    found = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(HERE), str(HERE.parent / "support"), str(HERE.parent / "losses"), *(path for path in sys.path if path)]
    found |= {"TRITON_CACHE_DIR": str(cache), "TRITON_LIBCUDA_PATH": str(BUILD), "LD_LIBRARY_PATH": str(BUILD)}
    return found | {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


# In the child ---------------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int


class Device:
    """`Device(90)` before anything imports torch: from then on Triton's driver is the stub, on an sm_90."""

    def __init__(self, capability: int):
        assert "torch" not in sys.modules  # it asks once, while it is imported, whether there are such devices
        ctypes.CDLL(str(BUILD / "cuda_device.so"))
        import torch
        import triton
        from torch._subclasses.fake_tensor import FakeTensor
        from triton.backends.nvidia.driver import CudaDriver

        self.driver = ctypes.CDLL("libcuda.so.1")
        self.driver.stub_launches.restype = ctypes.c_char_p
        assert self.driver.stub_be(capability), f"tests/launch/libcuda.c knows no sm_{capability}"
        properties = Properties(self.driver.stub_multiprocessors())
        torch.cuda.get_device_properties = lambda device=None: properties
        torch.cuda.get_device_capability = lambda device=None: divmod(capability, 10)
        torch.cuda.get_device_name = lambda device=None: "stub"
        torch.cuda.current_device = lambda: 0
        torch.cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=0)
        FakeTensor.data_ptr = _address
        active = CudaDriver()
        active.get_device_capability, active.get_current_device = torch.cuda.get_device_capability, lambda: 0
        active.get_current_stream = lambda device: 0
        triton.runtime.driver.set_active(active)

    def refuse(self, function: str) -> None:
        self.driver.stub_refuse(function.encode())

    def launches(self) -> list[Launch]:
        """Since they were last asked for."""
        found = []
        for line in self.driver.stub_launches().decode().splitlines():
            name, *numbers = re.sub(" (grid|block|shared)", "", line).split()
            x, y, z, *block, shared = map(int, numbers)
            found.append(Launch(name, (x, y, z), tuple(block), shared))
        return found


class Properties(NamedTuple):
    multi_processor_count: int
    L2_cache_size: int = 50 << 20
    total_memory: int = 80 << 30


def _address(x: Any) -> int:
    """Of a storage as CUDA's allocator aligns them, 512 bytes; torch gives tensors without values none."""
    if not x.untyped_storage().nbytes():
        return 0
    base = (x.untyped_storage()._cdata << 5) | (ON_DEVICE if x.is_cuda else 0)
    return base + x.storage_offset() * x.itemsize


def front_end_only() -> None:
    """From now on Triton's compiler stops before LLVM and ptxas, two thirds of its time: what the binder and the
    launcher need of it, types, constants and tensor maps, is there. Registers and shared memory are not."""
    from triton.backends.nvidia.compiler import CUDABackend

    nothing = {"shared": 0, "tmem_size": 0, "global_scratch_size": 0, "global_scratch_align": 1}
    nothing |= {"profile_scratch_size": 0, "profile_scratch_align": 1}

    def llir(module: Any, metadata: dict[str, Any]) -> str:
        metadata.update(nothing, name=module.get_entry_func_name())
        return ""

    whole = CUDABackend.add_stages

    def add_stages(self: Any, stages: dict[str, Any], *options: Any) -> None:
        whole(self, stages, *options)
        stages["llir"], stages["ptx"] = llir, lambda _, metadata: ""
        stages["cubin"] = lambda _, metadata: f"no cubin of {metadata['name']}\0".encode()

    CUDABackend.add_stages = add_stages


@contextlib.contextmanager
def captured() -> Iterator[None]:
    """What a CUDA graph cannot hold raises: values and shapes that the host reads, copies from and to its memory."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            options = options or {}
            result = function(*arguments, **options)
            given = [x for x in torch.utils._pytree.tree_leaves((arguments, options)) if isinstance(x, torch.Tensor)]
            made = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
            copies = function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten.copy)
            if copies and len({x.device.type for x in (*given, *made)}) > 1:
                raise RuntimeError(
                    f"{function}: a copy between the host's memory and the device's waits for the device"
                )
            return result

    with Watch():
        yield
