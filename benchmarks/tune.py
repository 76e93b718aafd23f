"""Times every candidate of the similarity kernels beside cuBLAS, on the GPU at hand.

    python benchmarks/tune.py --out benchmarks/results/tune-h200.json [--write] [--seconds 120]
    python benchmarks/tune.py --backend cuda --out benchmarks/results/tune-cuda-h200.json

For each mode and D: the similarities of one chunk, as the sweep sizes it, against the vendor's bare product of the same
shape into bf16 in the same rounds. A candidate counts only if what it writes agrees with what is usual. Triton's are
tiles: `--write` puts the fastest of each into measured.json, from where pick_config takes them. cuda's are the
plans of csrc/plan.cu: the kernel of sm_80, and that of sm_90 by single blocks and by clusters of two.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from tabulate import tabulate

from fusedloss import sweep
from fusedloss.backends import BACKENDS
from fusedloss.backends.cuda import launching as cuda_launching
from fusedloss.backends.triton import launching
from fusedloss.backends.triton.config import Config
from fusedloss.bench import measure
from fusedloss.bench.machine import probe
from fusedloss.core.problem import Block, Problem
from fusedloss.core.strips import Softmax, Strip

N = 65536
DIMS = (768, 1024, 4096, 384)  # in order of worth, should the time run out
MODES = ("exp", "stats", "grad", "stats, columns", "grad, columns", "grad, columns, q", "grad, q", "exp, columns")
USUAL_CONFIG, USUAL_PLAN = launching.picked, cuda_launching.plan_of
MEASURED = Path(__file__).parents[1] / "fusedloss" / "backends" / "triton" / "measured.json"


class Plan(NamedTuple):
    """Which of cuda's kernels."""

    capability: int
    cluster: int = 1

    def make(self, load: Any, device: int, tensor_cores: bool, aligned: bool, narrow: bool) -> Any:
        """In the place of `cuda_launching.plan_of`."""
        plan = load().plan(self.capability, tensor_cores, aligned, narrow)
        if plan.capability != self.capability:
            raise LookupError(f"this build has no kernel of sm_{self.capability}")
        plan.cluster = self.cluster
        return plan


def plans(capability: tuple[int, int]) -> list[Plan]:
    if capability != (9, 0):
        return [Plan(80)]
    return [Plan(80), Plan(90), Plan(90, 2)]


def candidates(capability: tuple[int, int]) -> Iterator[Config]:
    ways = ("descriptors", "pointers") if capability[0] >= 9 else ("pointers",)
    for way in ways:
        yield Config(way, 128, 256, 64, num_stages=3)
        yield Config(way, 128, 256, 64, num_stages=4, SUBTILES=2)
        yield Config(way, 128, 256, 64, num_stages=3, GROUP_M=16)
        # Two programs on a multiprocessor: one multiplies while the other exponentiates.
        yield Config(way, 128, 128, 64, num_warps=4, num_stages=3, programs=2)
        yield Config(way, 128, 128, 64, num_warps=8, num_stages=3, programs=2, SUBTILES=2)
        yield Config(way, 128, 128, 64, num_warps=8, num_stages=4)
        yield Config(way, 256, 128, 64, num_stages=3)
    yield Config("library", 32, 256, 64)
    yield Config("library", 64, 128, 64)


class Case:
    """One chunk's launch in one mode."""

    def __init__(self, backend: ModuleType, mode: str, rows: int, D: int, device: torch.device):
        unit = lambda count: torch.nn.functional.normalize(torch.randn(count, D, device=device), dim=1).bfloat16()
        x, y = unit(rows), unit(N)
        vector = lambda count: torch.rand(count, device=device)
        scale = torch.tensor(20.0, device=device)
        target = torch.arange(rows, device=device)
        self.backend, self.mode = backend, mode
        self.strip = Strip(x, y, scale, vector(rows) + 1, vector(N) + 1, None, target)
        self.out = torch.empty(rows, N, dtype=x.dtype, device=device)
        self.problem = Problem((x, y), (Block(0, 1),), scale, target, vector(rows), cosine=True, scale_bound=20.0)
        sim = vector(rows), vector(N)
        with_q = mode.endswith("q")
        self.rows = Softmax(sim[0] + 20, vector(rows), sim[0] if with_q else None)
        self.columns = Softmax(sim[1] + 20, vector(N), sim[1] if with_q else None) if "columns" in mode else None

    def run(self) -> Any:
        if self.mode == "stats":
            return self.backend.stats_rows([self.strip])
        if self.mode == "stats, columns":
            return self.backend.stats_rows_and_columns(self.strip)
        if self.mode == "exp":
            return self.backend.exp_rows(self.problem, [self.strip], [self.out], None)
        if self.mode == "exp, columns":
            return self.backend.exp_rows_and_columns(self.problem, self.strip, self.out)
        return self.backend.grad_rows([self.strip], [self.out], self.rows, self.columns, self.rows.weight, None)

    def bare(self) -> None:
        torch.mm(self.strip.x, self.strip.y.T, out=self.out)

    def digest(self) -> list[float]:
        """What a config may not change, but for the order of sums."""
        self.out.zero_()
        found = self.run()
        sums = [t for t in _tensors(found) if t.dim() == 2]
        stored = (
            [] if self.mode.startswith("stats") else [self.out.float().sum().item(), self.out[-1].float().sum().item()]
        )
        if self.mode.startswith("stats"):  # maxima and sums are relative to each other, per tile
            return [
                torch.logsumexp(m + s.log(), 0).double().sum().item()
                for m, s in zip(sums[::2], sums[1::2], strict=True)
            ]
        return [*stored, *(t.double().sum().item() for t in sums)]


def _tensors(found: Any) -> list[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        return [found]
    return [t for part in found for t in _tensors(part)] if isinstance(found, (tuple, list)) else []


def use(config: Config | Plan | None) -> None:
    """From the next launch on; None: what is usual."""
    launching.picked = (lambda *where: config) if isinstance(config, Config) else USUAL_CONFIG
    cuda_launching.plan_of = config.make if isinstance(config, Plan) else USUAL_PLAN


def times(case: Case, configs: list[Config] | list[Plan], rounds: int) -> dict[Config | Plan | None, float]:
    """Median seconds of each config that works, and of the bare product under None."""
    use(None)
    expected = case.digest()
    calls: dict[Any, Callable[[], Any]] = {None: case.bare}
    for config in configs:
        use(config)
        try:
            found = case.digest()
        except Exception as error:  # does not fit this device: not a candidate
            print(f"  {config}: {type(error).__name__}", file=sys.stderr)
            continue
        if any(abs(a - b) > 1e-3 * abs(b) + 1e-3 for a, b in zip(found, expected, strict=True)):
            print(f"  {config}: wrong, {found} for {expected}", file=sys.stderr)
            continue

        def call(config: Config | Plan = config) -> None:
            use(config)
            case.run()

        calls[config] = call
    taken: dict[Any, list[float]] = {}
    for name, seconds in measure.samples_interleaved(calls, rounds, warmup=2):
        taken.setdefault(name, []).append(seconds)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backend", choices=("triton", "cuda"), default="triton")
    parser.add_argument("--write", action="store_true", help="put the fastest configs into measured.json")
    parser.add_argument("--seconds", type=float, default=240.0, help="start no further case after this long")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args(argv)
    of_cuda = arguments.backend == "cuda"
    if arguments.write and of_cuda:
        parser.error("--write: the plans of cuda have no table; csrc/plan.cu picks them")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device: torch.cuda.is_available() is False")
    device = torch.device("cuda", torch.cuda.current_device())
    backend = BACKENDS[arguments.backend]
    if why := backend.why_not(probe(str(device), torch.bfloat16)):
        parser.error(f"--backend {arguments.backend}: {why}")
    capability = torch.cuda.get_device_capability(device)
    start, results = time.monotonic(), []
    for D, mode in itertools.product(DIMS, MODES):
        if time.monotonic() - start > arguments.seconds:
            print(f"out of time before D={D} {mode}", file=sys.stderr)
            break
        rows = sweep.chunks.chunk_rows(N, N, D, 2, device)
        case = Case(backend, mode, rows, D, device)
        configs = plans(capability) if of_cuda else list(candidates(capability))
        seconds = times(case, configs, arguments.rounds)
        bare = seconds.pop(None)
        ranked = sorted(seconds, key=seconds.__getitem__)
        for config in ranked:
            entry = {"mode": mode, "dtype": "bf16", "capability": list(capability), "D": D, "rows": rows, "N": N}
            results.append(
                {**entry, "config": config._asdict(), "seconds": seconds[config], "ratio": seconds[config] / bare}
            )
        flops = 2 * rows * N * D
        table = [[*config, seconds[config] * 1e3, seconds[config] / bare] for config in ranked[:4]]
        print(f"D={D} {mode}: rows {rows}, bare {bare * 1e3:.3f} ms, {flops / bare / 1e12:.0f} TFLOP/s")
        fields = Plan._fields if of_cuda else Config._fields
        print(tabulate(table, [*fields, "ms", "x bare"], floatfmt=".3f"), flush=True)
        machine = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__, "triton": triton.__version__}
        arguments.out.write_text(json.dumps({**machine, "results": results}, indent=1) + "\n")
        del case
    if arguments.write:
        best: dict[tuple, dict] = {}
        for entry in results:
            best.setdefault((entry["D"], entry["mode"]), {k: v for k, v in entry.items() if k not in ("rows", "N")})
        MEASURED.write_text(json.dumps(list(best.values()), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
