"""Every loss, forward and backward, through Triton's own JIT, binder and launcher.

    python tests/launch/walk.py 90 '[["clip", "bfloat16", 300, 72, "as made"], ...]' [front end only]

Writes what failed, how often each kernel was launched, how many of the launches took the kernel of an earlier one, and
how many variants of it each loss needed, as JSON on stdout.
tests/backends/test_triton_launch.py starts it.
"""

from __future__ import annotations

import sys

import device

CAPABILITY = int(sys.argv[1])
GPU = device.Device(CAPABILITY)  # before torch
if len(sys.argv) > 3:
    device.front_end_only()

import collections  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402
from unittest import mock  # noqa: E402

import contract  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402

from fusedloss.backends.triton import launching  # noqa: E402
from fusedloss.losses import _twin  # noqa: E402

_twin.PLAIN += (FakeTensor,)  # subclasses are left to torch; this one stands in for a GPU's tensors


class Kernels:
    """What Triton was asked to launch, and what it compiled."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.loss = ""
        self.variants: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.again = 0
        self._known: set[Any] = set()
        options_of: dict[Any, dict[str, Any]] = {}  # those that are no parameters, by what they compiled
        run, launcher = triton.JITFunction.run, triton.compiler.CompiledKernel.__getitem__

        def asked(kernel: Any, *arguments: Any, **options: Any) -> Any:
            self.asked.append(kernel.fn.__name__)
            self._known.add(kernel)
            assert options["enable_fp_fusion"] is True, "launched around backends/triton.py's launch"
            compiled = run(kernel, *arguments, **options)
            parameters = ("grid", "warmup", *kernel.arg_names)
            options_of[compiled] = {name: value for name, value in options.items() if name not in parameters}
            return compiled

        def asked_again(compiled: Any, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*arguments: Any) -> None:
                kernel = compiled.src.fn
                self.asked.append(kernel.fn.__name__)
                self.again += 1
                taken = run(kernel, *arguments, grid=grid, warmup=True, **options_of[compiled])
                assert taken is compiled, "Triton would have compiled another kernel for these arguments"
                launcher(compiled, grid)(*arguments)

            return launch

        triton.JITFunction.run, triton.compiler.CompiledKernel.__getitem__ = asked, asked_again
        triton.knobs.runtime.jit_post_compile_hook = self._compiled

    def _compiled(self, *, key: str, fn: Any, **_: Any) -> None:
        self.variants[self.loss][structure(fn.jit_function.device_caches[0][0][key].src)] += 1

    def of(self, loss: str) -> None:
        """Counts what the loss needs as if it were the first."""
        if loss != self.loss:
            self.loss = loss
            launching._compiled.clear()
            for kernel in self._known:
                kernel.device_caches.clear()


def structure(source: Any) -> str:
    """A kernel by what it is made of: which operands are there, of what type, and which functions are compiled in.
    Variants of it differ by numbers: sizes of tiles, and what Triton specialises of an integer."""

    def of(kind: Any, path: tuple[int, ...]) -> str:
        if isinstance(kind, tuple):
            return f"({' '.join(of(part, (*path, place)) for place, part in enumerate(kind))})"
        if kind == "constexpr":
            value = source.constants[path]
            return "int" if type(value) is int else getattr(value, "__name__", repr(value))
        return "int" if kind in ("i32", "i64") else re.sub(r"\[.*\]", "", kind)

    return " ".join([source.name, *(of(kind, (place,)) for place, kind in enumerate(source.signature.values()))])


# How a matrix of embeddings may lie: rows that overlap, or all are one, have no tensor map; nor have odd addresses.
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as made": lambda x: x,
    "expanded": lambda x: x[:1].expand(x.shape),
    "overlapping": lambda x: x.new_empty(len(x) * 8 + x.shape[1]).as_strided(x.shape, (8, 1)),
    "transposed": lambda x: x.T.contiguous().T,
    "odd address": lambda x: x.new_empty(len(x), x.shape[1] + 1)[:, 1:],
}


def on_device(layout: str) -> Callable[[int, torch.Tensor], torch.Tensor]:
    def moved(place: int, x: torch.Tensor) -> torch.Tensor:
        """A number of its own, a temperature, stays in fp32."""
        dtype = torch.float32 if x.dim() == 0 and x.is_floating_point() else x.dtype
        found = x.detach().to("cuda", dtype)
        found = LAYOUTS[layout](found) if x.dim() == 2 and x.is_floating_point() else found
        return found.requires_grad_(x.requires_grad)

    return moved


def prefixes(learnt: bool) -> Callable[[contract.Batch], contract.Case]:
    """Prefixes that share a product."""

    def case(b: contract.Batch) -> contract.Case:
        options = {"dims": (16, contract.D, 48), "temperature": b.number(0.25) if learnt else 0.5}
        return contract.Case(contract.F.matryoshka, (contract.F.info_nce, b.x(), b.x()), options)

    return case


PREFIXES = {"matryoshka, fixed": prefixes(False), "matryoshka, learnt": prefixes(True)}  # beside the contract's


def step(name: str, dtype: str, rows: int, dim: int, layout: str) -> None:
    with FakeTensorMode(), mock.patch.object(contract, "D", dim):
        batch = contract.Batch(rows, getattr(torch, dtype), on_device(layout))
        call = {**contract.CASES, **PREFIXES}[name](batch)
        with device.captured():
            call.result(backend="triton").sum().backward()
        for leaf in batch.leaves:
            assert leaf.grad is not None and leaf.grad.is_cuda and leaf.grad.shape == leaf.shape


def failure(kernels: Kernels, case: list[Any], launched: collections.Counter[str]) -> str | None:
    kernels.asked.clear()
    try:
        step(*case)
    except Exception as error:
        error = error.__cause__ or error
        return f"{kernels.asked[-1] if kernels.asked else 'before any kernel'}: {type(error).__name__}: {error}"
    finally:
        arrived = [launch.kernel for launch in GPU.launches()]
        launched.update(arrived)
    if not arrived:
        return "no kernel was launched"
    # Triton launches nothing, and says nothing, where a grid's product is 0 or wraps around to less.
    return None if arrived == kernels.asked else f"launched {kernels.asked}, of which {arrived} came to the driver"


def main() -> None:
    kernels, failed, launched = Kernels(), [], collections.Counter()
    for name, dtype, rows, dim, layout in json.loads(sys.argv[2]):
        start = time.process_time()
        kernels.of(name)
        error = failure(kernels, [name, dtype, rows, dim, layout], launched)
        where = f"sm_{CAPABILITY}, {name}, {dtype}, {rows} x {dim}, {layout}"
        print(f"{where}: {error or 'ok'} ({time.process_time() - start:.2f} s)", file=sys.stderr, flush=True)
        if error:
            failed.append(f"{where}, {error}")
    found = {"failed": failed, "launches": launched, "again": kernels.again, "variants": kernels.variants}
    json.dump(found, sys.stdout)


main()
