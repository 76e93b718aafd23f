"""What a call costs the host: the time of the Python above the kernels, and the launches it issues.

    python benchmarks/overhead.py [--out overhead.json]

On a GPU the kernels run (on tiny inputs, and nothing waits for them); without one Triton gets a driver whose launches
do nothing, fusedloss._C functions that do nothing, and both tensors of a CPU. `bare` repeats the very launches of the
call, kernels and products, with the same arguments: what is above it is ours, autograd's and the allocator's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from tabulate import tabulate
from triton.backends.compiler import GPUTarget

import fusedloss
from fusedloss import sweep
from fusedloss.backends import BACKENDS, cuda
from fusedloss.backends import triton as triton_backend
from fusedloss.backends.cuda import folds as cuda_folds
from fusedloss.backends.cuda import launching as cuda_launching
from fusedloss.backends.triton import launching
from fusedloss.bench.machine import cpu_name, probe

ROOT = Path(__file__).parents[1]
ROWS, DIM = 16, 64
ROUNDS = 15


class NoDevice:
    """Enough of a Triton driver to specialise, compile and launch for sm_90, into nothing."""

    class Launcher:
        def __init__(self, source: Any, metadata: Any):
            pass

        def __call__(self, *arguments: Any) -> None:
            pass

    class Utils:
        def load_binary(self, *arguments: Any) -> tuple[int, int, int, int, int]:
            return 0, 1, 64, 0, 1024

        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

        def unload_module(self, module: int) -> None:
            pass

    utils, launcher_cls = Utils(), Launcher
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


def without_a_gpu(extension: bool = True) -> None:
    """extension: also fusedloss._C, which takes a minute to build."""
    triton.runtime.driver.set_active(NoDevice())
    triton_backend.why_not = lambda problem: None
    triton_backend.why_not_on = lambda dtype, device: None
    launching.capability_of, triton_backend.multiprocessors = lambda device: (9, 0), lambda device: 132
    if extension and (built := _extension()):
        stub = _launching(built, lambda launch: lambda *arguments: None)
        cuda_launching.extension = lambda: stub
        cuda.why_not, cuda_launching.capability_of = lambda problem: None, lambda device: 90
    torch.set_num_threads(1)


def _extension() -> Any:
    """fusedloss._C of this checkout for its structs, as the tests build it, once: a minute."""
    spec = importlib.util.spec_from_file_location("host_build", ROOT / "tests" / "host" / "build.py")
    host = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(host)
    if why := host.why_not():
        return print(f"cuda: {why}", file=sys.stderr)
    return host.load(host.build())


def _launching(built: Any, made: Callable[[Callable[..., None]], Callable[..., None]]) -> SimpleNamespace:
    """The extension with other launches: what is neither a struct, nor a plan."""
    plain = lambda name, value: isinstance(value, type) or name.startswith("_") or name in ("plan", "build_info")
    return SimpleNamespace(
        **{name: value if plain(name, value) else made(value) for name, value in vars(built).items()}
    )


def microseconds(call: Callable[[], Any], repeats: int) -> float:
    """Median over rounds of the mean time in which the host is done with `call`."""
    for _ in range(min(repeats, 20)):
        call()
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        taken.append((time.perf_counter() - start) / repeats * 1e6)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return statistics.median(taken)


def launches(call: Callable[[], Any]) -> list[Callable[[], Any]]:
    """Every kernel's launch and every product of one call, ready to be repeated."""
    found: list[Callable[[], Any]] = []
    fields_of_structs: list[dict[str, Any]] = []  # a launch of cuda holds pointers: the tensors must live as long

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **options: Any) -> Any:
            found.append(lambda held=fields_of_structs: function(*args, **options))
            return function(*args, **options)

        return record

    def keeping(name: str, **fields: Any) -> Any:
        fields_of_structs.append(fields)
        return struct(name, **fields)

    struct, again = cuda_launching.struct, triton.compiler.CompiledKernel.__getitem__
    places = [(triton.JITFunction, "run"), (sweep.gradients, "mm"), (sweep.gradients, "add_mm")]
    with contextlib.ExitStack() as patches:
        for owner, name in places:
            patches.enter_context(mock.patch.object(owner, name, recorded(getattr(owner, name))))
        launcher = lambda compiled, grid: recorded(again(compiled, grid))
        patches.enter_context(mock.patch.object(triton.compiler.CompiledKernel, "__getitem__", launcher))
        if cuda.build_info() is not None:
            extension = _launching(cuda_launching.extension(), recorded)
            patches.enter_context(mock.patch.object(cuda_launching, "extension", lambda: extension))
            for module in (cuda, cuda_launching, cuda_folds):
                patches.enter_context(mock.patch.object(module, "struct", keeping))
        call()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=200)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        without_a_gpu()
    leaves = [torch.randn(ROWS, DIM, device=device).bfloat16().requires_grad_() for _ in range(2)]
    scale = torch.tensor(20.0, device=device, requires_grad=True)
    losses = {
        "info_nce, normalize=True": lambda backend: fusedloss.info_nce(*leaves, normalize=True, backend=backend),
        "info_nce": lambda backend: fusedloss.info_nce(*leaves, backend=backend),
        "clip, learnable scale": lambda backend: fusedloss.clip(*leaves, scale, backend=backend),
        "multiple_negatives_ranking": lambda backend: fusedloss.multiple_negatives_ranking(*leaves, backend=backend),
    }
    rows = []
    for backend, (name, loss) in itertools.product(("triton", "cuda"), losses.items()):
        if why := BACKENDS[backend].why_not(probe(device, torch.bfloat16)):
            print(f"{backend}, {name}: {why}", file=sys.stderr)
            continue

        def step(loss: Callable[[str], torch.Tensor] = loss, backend: str = backend) -> None:
            for leaf in (*leaves, scale):
                leaf.grad = None
            loss(backend).backward()

        step()
        issued = launches(step)
        whole = microseconds(step, arguments.repeats)
        bare = microseconds(lambda issued=issued: [launch() for launch in issued], arguments.repeats)
        about = {"backend": backend, "loss": name, "us": whole, "launches": len(issued)}
        rows.append({**about, "bare_us": bare, "above_us": whole - bare})
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, launches that do nothing"
    print(machine)
    print(tabulate([row.values() for row in rows], [*rows[0]], floatfmt=".0f"))
    if arguments.out:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
        arguments.out.write_text(json.dumps({"machine": machine, **versions, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
