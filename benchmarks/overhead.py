"""What a call costs the host: the time of the Python above the kernels, and the launches it issues.

    python benchmarks/overhead.py

On a GPU the kernels run (on tiny inputs, and nothing waits for them); without one Triton gets a driver whose launches
do nothing, and tensors of a CPU. `bare` repeats the very launches of the call, Triton kernels and products, with the
same arguments: what is above it is ours, autograd's and the allocator's.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from tabulate import tabulate
from triton.backends.compiler import GPUTarget

import fusedloss
from fusedloss import sweep
from fusedloss.backends import triton as backend
from fusedloss.info import cpu_name

ROWS, DIM = 16, 64
REPEATS, ROUNDS = 200, 15


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


def without_a_gpu() -> None:
    triton.runtime.driver.set_active(NoDevice())
    backend.why_not = lambda problem: None
    backend._capability, backend._multiprocessors = lambda device: (9, 0), lambda device: 132
    torch.set_num_threads(1)


def microseconds(call: Callable[[], Any]) -> float:
    """Median over rounds of the mean time in which the host is done with `call`."""
    for _ in range(20):
        call()
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(REPEATS):
            call()
        taken.append((time.perf_counter() - start) / REPEATS * 1e6)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return statistics.median(taken)


def launches(call: Callable[[], Any]) -> list[Callable[[], Any]]:
    """Every Triton launch and every product of one call, ready to be repeated."""
    found: list[Callable[[], Any]] = []
    run, mm, add_mm = triton.JITFunction.run, sweep.mm, sweep.add_mm

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **options: Any) -> Any:
            found.append(lambda: function(*args, **options))
            return function(*args, **options)

        return record

    triton.JITFunction.run, sweep.mm, sweep.add_mm = recorded(run), recorded(mm), recorded(add_mm)
    try:
        call()
    finally:
        triton.JITFunction.run, sweep.mm, sweep.add_mm = run, mm, add_mm
    return found


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        without_a_gpu()
    leaves = [torch.randn(ROWS, DIM, device=device).bfloat16().requires_grad_() for _ in range(2)]
    scale = torch.tensor(20.0, device=device, requires_grad=True)
    losses = {
        "info_nce, normalize=True": lambda: fusedloss.info_nce(*leaves, normalize=True, backend="triton"),
        "info_nce": lambda: fusedloss.info_nce(*leaves, backend="triton"),
        "clip, learnable scale": lambda: fusedloss.clip(*leaves, scale, backend="triton"),
        "multiple_negatives_ranking": lambda: fusedloss.multiple_negatives_ranking(*leaves, backend="triton"),
    }
    rows = []
    for name, loss in losses.items():

        def step(loss: Callable[[], torch.Tensor] = loss) -> None:
            for leaf in (*leaves, scale):
                leaf.grad = None
            loss().backward()

        step()
        issued = launches(step)
        whole, bare = microseconds(step), microseconds(lambda issued=issued: [launch() for launch in issued])
        rows.append({"loss": name, "us": whole, "launches": len(issued), "bare_us": bare, "above_us": whole - bare})
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, launches that do nothing"
    print(machine)
    print(tabulate([row.values() for row in rows], [*rows[0]], floatfmt=".0f"))
    if len(sys.argv) > 1:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
        with open(sys.argv[1], "w") as file:
            json.dump({"machine": machine, **versions, "rows": rows}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
