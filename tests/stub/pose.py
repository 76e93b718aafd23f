"""Tensors that pose as two CUDA devices' over runtime.cpp, and what they are asked: for processes of their own.

`load` comes before torch is imported: torch then has autograd threads for the devices. Tensors are FakeTensors: they
have a device, strides and storages, and no numbers, so that whoever reads one back is refused by torch itself.
"""

from __future__ import annotations

import collections
import ctypes
import importlib.util
import itertools
import json
import threading
import traceback
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

MEMORY, STREAMS = 0x5AD0 << 48, 0x5AE0 << 48  # as in runtime.cpp: the device is in the upper 16 bits
ROOM = 1 << 32  # between two storages


def load(folder: Path) -> tuple[ctypes.CDLL, ModuleType]:
    """The runtime, and fusedloss._C over it."""
    ctypes.CDLL(str(folder / "libtorch_device.so"))
    runtime = ctypes.CDLL(str(folder / "libcudart_stub.so"))
    runtime.stub_take.restype = ctypes.c_char_p
    spec = importlib.util.spec_from_file_location("_C", folder / "_C.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return runtime, module


class Machine:
    """Two devices; `launches` of the extension since the last `reset`, `faults` of all kinds."""

    def __init__(self, runtime: ctypes.CDLL, module: ModuleType):
        import torch

        import fusedloss.backends.cuda
        import fusedloss.backends.cuda.launching
        import fusedloss.backends.cuda.rows
        from fusedloss import sweep
        from fusedloss.core import checks
        from fusedloss.losses import _twin

        self.runtime, self.module, self.torch = runtime, module, torch
        self.cuda, self.rows = fusedloss.backends.cuda, fusedloss.backends.cuda.rows
        self.launching = fusedloss.backends.cuda.launching
        self.sweep = sweep
        self.local = threading.local()
        self.spaces: dict[int, tuple[Any, int, int]] = {}  # by storage: a weak reference, the base, bytes
        self.bases: dict[int, tuple[Any, int]] = {}
        self.count = itertools.count(1)
        self.extension = self._extension()
        self._pose(checks, _twin)
        self.reset()

    def reset(self, capability: int = 90) -> None:
        self.runtime.stub_reset()
        self.launches: list[dict[str, Any]] = []
        self.faults: list[str] = []
        self.capabilities = [capability] * 2
        for index in range(2):
            self.runtime.stub_device(index, capability, 132)
        launching = self.launching
        caches = launching._why_not, launching.capability_of, launching.plan_of, self.sweep.chunks._properties
        for cache in caches:
            cache.cache_clear()

    # torch.cuda -------------------------------------------------------------------------------------------------------

    def current(self) -> int:
        index = ctypes.c_int()
        self.runtime.cudaGetDevice(ctypes.byref(index))
        return index.value

    def stream(self, device: Any = None) -> int:
        """A thread's own on each device."""
        index = self.current() if device is None else self.torch.device(device).index
        return STREAMS + (index << 48) + threading.get_native_id() % 4096 * 16 + 16

    def _exchange(self, index: int) -> int:
        before = self.current()
        if index >= 0:
            self.runtime.cudaSetDevice(index)
        return before

    def _pose(self, checks: ModuleType, twin: ModuleType) -> None:
        from torch._subclasses.fake_tensor import FakeTensor

        def capability(device: Any = None) -> tuple[int, int]:
            index = self.current() if device is None else self.torch.device(device).index or 0
            return divmod(self.capabilities[index], 10)

        cuda, index = self.torch.cuda, lambda d: d if isinstance(d, int) else self.torch.device(d).index
        cuda.is_available, cuda.device_count = lambda: True, lambda: 2
        cuda.current_device = self.current
        cuda._exchange_device = cuda._maybe_exchange_device = self._exchange
        cuda._get_device_index = cuda._utils._get_device_index = lambda device, *a, **k: index(device)
        cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=self.stream(device))
        cuda.is_current_stream_capturing = lambda: False
        cuda.get_device_capability = capability
        cuda.get_device_properties = lambda device=None: SimpleNamespace(
            name="stub", major=capability(device)[0], minor=capability(device)[1], multi_processor_count=132,
            L2_cache_size=50 << 20, total_memory=80 << 30,
        )  # fmt: skip
        FakeTensor.data_ptr = lambda x: self.address(x)
        checks.Tensor, twin.PLAIN = FakeTensor, (FakeTensor,)  # other subclasses are left to torch, or checked slowly
        self.launching.extension = lambda: self.extension

    # Memory -----------------------------------------------------------------------------------------------------------

    def address(self, x: Any) -> int:
        from torch.multiprocessing.reductions import StorageWeakRef

        storage = x.untyped_storage()
        known = self.spaces.get(storage._cdata)
        if known is None or known[0].expired():
            if x.device.type != "cuda":
                self.faults.append(f"the address of a tensor on {x.device} is asked for")
            base = MEMORY + ((x.device.index or 0) << 48) + next(self.count) * ROOM
            known = self.spaces[storage._cdata] = (StorageWeakRef(storage), base, storage.nbytes())
            self.bases[base] = (known[0], known[2])
        return known[1] + x.storage_offset() * x.itemsize

    def _outlives(self, name: str, pointer: int) -> None:
        """Memory that a kernel was given is some tensor's still, after its launch: nothing freed it before."""
        reference, size = self.bases[pointer // ROOM * ROOM]
        if reference.expired():
            self.faults.append(f"{name} was given memory of a tensor that is gone")
        elif pointer % ROOM >= max(size, 1):
            self.faults.append(f"{name} was given an address behind a tensor's {size} bytes")

    # The extension ----------------------------------------------------------------------------------------------------

    def _extension(self) -> SimpleNamespace:
        made = {}
        for name in dir(self.module):
            value = getattr(self.module, name)
            launches = callable(value) and not isinstance(value, type) and name not in ("plan", "build_info")
            made[name] = self._watched(name, value) if launches else value
        return SimpleNamespace(**made)

    def _watched(self, name: str, function: Any) -> Any:
        def launch(*arguments: Any) -> None:
            try:
                function(*arguments)
            finally:
                for line in self.runtime.stub_take().decode().splitlines():
                    found = json.loads(line)
                    if "fault" in found:
                        self.faults.append(found["fault"])
                        continue
                    found["asked"] = name
                    self.launches.append(found)
                    for pointer in found["pointers"]:
                        self._outlives(name, pointer)

        return launch


def watch() -> Any:
    """A mode that counts what crosses from the host to a device or back, and notes which matrices are multiplied.

    Both by the line of fusedloss that asks for it.
    """
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        crossings: collections.Counter[str]

        def __init__(self) -> None:
            super().__init__()
            self.crossings = collections.Counter()
            self.products: set[tuple[object, str]] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__.rstrip("_") in PRODUCTS:
                factor = next(x for x, about in zip(args, func._schema.arguments, strict=False) if about.name in RIGHT)
                if 1 not in (*factor.shape, *out.shape):  # no vector
                    self.products.add((factor.dtype, where()))
            copies, kinds = func.overloadpacket.__name__ in COPIES, set()
            for given in (*args, *(kwargs or {}).values(), out):
                for x in given if isinstance(given, list | tuple) else (given,):
                    # A kernel takes a 0-dim tensor on the host by value.
                    if isinstance(x, Tensor) and (copies or x.dim()):
                        kinds.add(x.device.type)
            if len(kinds) > 1:
                self.crossings[f"{func} {where()}"] += 1
            return out

    return Watch()


PRODUCTS, RIGHT = ("mm", "addmm", "bmm", "baddbmm"), ("mat2", "batch2")
COPIES = ("_to_copy", "copy_", "_copy_from", "_local_scalar_dense")


def where() -> str:
    for frame in reversed(traceback.extract_stack()):
        if "/fusedloss/" in frame.filename and "/tests/" not in frame.filename:
            return f"{Path(frame.filename).name}:{frame.lineno} {frame.line}"
    return ""
