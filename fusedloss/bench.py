"""`python -m fusedloss bench`: the race. Same inputs, interleaved rounds, medians, beside the bare work.

The floor is the three matrix products that the gradient needs (four for CLIP), in the chunks that fusedloss uses: what
a perfect epilogue would cost. Memory is what a step needs on top of its inputs and gradients, each racer in a fresh
process. A racer whose gradient error exceeds 1e-2 is shown and marked, not ranked; one that would not fit is not run.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.utils
import torch._inductor.config
from torch import Tensor
from torch.nn import functional as F

import fusedloss

from . import measure, show, sweep, testing
from .backends import BACKENDS
from .info import cpu_name, picked, probe
from .show import Tick

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
MARKED_ERROR = 1e-2
ERROR_ROWS = 2048  # the gradient error is measured on a smaller batch of the same kind: fp64 at N = 16384 takes minutes
PEER_CHUNK = 1024  # rows a chunk of F.linear_cross_entropy
MATERIALISING = ("eager", "torch.compile", "fusedloss:reference")


@dataclass(frozen=True)
class Point:
    """One place of the race."""

    loss: str = "info_nce"
    n: int = 4096
    d: int = 384
    dtype: str = "fp32"
    temperature: float = 0.05
    kind: str = "random"
    device: str = "cpu"

    def inputs(self, rows: int | None = None) -> tuple[Tensor, Tensor]:
        count = rows or self.n
        query, key = testing.inputs(self.kind, count, count, self.d, DTYPES[self.dtype])
        return query.to(self.device), key.to(self.device)

    @property
    def eager_bytes(self) -> int:
        """What eager holds at its peak: the logits, their log-softmax and its gradient, in fp32 for 16-bit inputs."""
        return 3 * self.n * self.n * max(4, DTYPES[self.dtype].itemsize)


Loss = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[Tensor, Tensor], Any]


def fused(point: Point, backend: str) -> Loss:
    t = point.temperature
    if point.loss == "clip":
        return lambda q, k: fusedloss.clip(q, k, 1 / t, backend=backend)
    if point.loss == "multiple_negatives_ranking":
        return lambda q, k: fusedloss.multiple_negatives_ranking(q, k, scale=1 / t, backend=backend)
    return lambda q, k: fusedloss.info_nce(q, k, temperature=t, backend=backend)


def losses(point: Point) -> dict[str, Loss]:
    """Every racer's loss as a function of (query, key). `fusedloss` is the backend that auto picks."""
    t = point.temperature
    racers = {"fusedloss": fused(point, "auto")}
    for backend, module in BACKENDS.items():
        if module.why_not(probe(point.device, DTYPES[point.dtype])) is None:
            racers[f"fusedloss:{backend}"] = fused(point, backend)
    if point.loss == "clip":
        eager = lambda q, k: testing.eager_clip(q, k, 1 / t)
    elif point.loss == "multiple_negatives_ranking":
        eager = lambda q, k: testing.eager_multiple_negatives_ranking(q, k, scale=1 / t)
    else:
        eager = lambda q, k: testing.eager_info_nce(q, k, t)
        if hasattr(F, "linear_cross_entropy"):
            racers["F.linear_cross_entropy"] = lambda q, k: F.linear_cross_entropy(
                q / t,
                k,
                torch.arange(q.shape[0], device=q.device),
                options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=PEER_CHUNK),
            )
    racers["eager"] = eager
    racers["torch.compile"] = torch.compile(eager, dynamic=False)
    return racers


def entered(point: Point, only: set[str] | None) -> dict[str, Loss]:
    """The racers named, or by default each implementation once: no oracle, and no interpreted kernel."""
    racers = losses(point)
    if only is not None:
        return {name: loss for name, loss in racers.items() if name in only}
    picks = picked(probe(point.device, DTYPES[point.dtype]))
    left_out = {f"fusedloss:{picks}", "fusedloss:reference"} | (
        {"fusedloss:triton"} if point.device == "cpu" else set()
    )
    return {name: loss for name, loss in racers.items() if name not in left_out}


def forward(loss: Loss) -> Step:
    def step(query: Tensor, key: Tensor) -> None:
        with torch.no_grad():
            loss(query, key)

    return step


def forward_backward(loss: Loss) -> Step:
    def step(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        leaves = [query.detach().requires_grad_(), key.detach().requires_grad_()]
        loss(*leaves).backward()
        return leaves[0].grad, leaves[1].grad  # type: ignore[return-value]

    return step


def floor_rows(point: Point) -> int:
    """Rows a chunk, as the sweep sizes them: fewer, larger products are faster, so the floor must not have smaller."""
    device = torch.device(point.device)
    itemsize = DTYPES[point.dtype].itemsize
    return sweep.chunk_rows(point.n, point.n, point.d, max(4, itemsize) if device.type == "cpu" else itemsize, device)


def floor(point: Point) -> Step:
    """The bare products: S = x y^T (twice for CLIP, whose normalisers must be known first), dx += S y, dy += S^T x."""
    dtype, rows, columns = DTYPES[point.dtype], floor_rows(point), point.n

    def step(query: Tensor, key: Tensor) -> None:
        space = torch.empty(rows, columns, dtype=dtype, device=query.device)
        dx, dy = torch.empty_like(query), torch.zeros(key.shape, device=key.device)  # dy accumulates in fp32
        for start in range(0, point.n, rows):
            chunk = slice(start, min(start + rows, point.n))
            s = space[: chunk.stop - chunk.start]
            for _ in range(2 if point.loss == "clip" else 1):
                torch.mm(query[chunk], key.T, out=s)
            torch.mm(s, key, out=dx[chunk])
            sweep.add_mm(dy, s.T, query[chunk])

    return step


def fits(point: Point, name: str) -> bool:
    """Whether a racer that materialises the logits may be started here at all."""
    return name not in MATERIALISING or point.eager_bytes < 0.6 * available_bytes(point.device)


def available_bytes(device: str) -> int:
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")))
        group = Path("/sys/fs/cgroup")  # a container's own limit
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, StopIteration, ValueError):
        pass  # another system, no such group, or "max"
    return min(found, default=8 << 30)


def memory(point: Point, name: str) -> int:
    """Bytes a step of this racer needs on top of inputs and gradients. To be run in a fresh process."""
    query, key = point.inputs()
    loss = losses(point)[name]
    # Loading libraries and compiling is not the step's memory. Compiled code knows one size only.
    warm = (query, key) if name == "torch.compile" else Point(**{**asdict(point), "n": 64}).inputs()
    forward_backward(loss)(*warm)
    step = forward_backward(loss)
    gradients = 2 * query.numel() * query.element_size()
    return measure.peak_memory(lambda: step(query, key), point.device) - gradients


def gradient_error(point: Point, name: str) -> float:
    """||gradient - fp64|| / ||fp64||, the worse of the two sides, on a batch small enough for fp64."""
    query, key = point.inputs(min(point.n, ERROR_ROWS))
    found = forward_backward(losses(point)[name])(query, key)
    wanted = forward_backward(fused(point, "reference"))(query.double(), key.double())
    return max(((f.double() - w).norm() / w.norm()).item() for f, w in zip(found, wanted, strict=True))


def steps(point: Point, rounds: int, only: set[str] | None, with_memory: bool) -> int:
    """How often `race` ticks."""
    running = sum(fits(point, name) for name in entered(point, only))
    return running + (2 * running + 1) * rounds + (with_memory + 1) * running


def race(
    point: Point, rounds: int, only: set[str] | None, with_memory: bool, tick: Tick, rows: list[dict]
) -> list[dict]:
    """One row per racer: seconds, ratio to the floor, memory, gradient error; or why it did not run.

    Rows are appended to `rows` at the start and filled in as figures come, for whoever interrupts.
    """
    # Dynamo keeps 8 graphs of one function, whichever torch.compile call they are from, and runs eager from then on.
    torch.compiler.reset()
    query, key = point.inputs()
    racers = entered(point, only)
    found: dict[str, dict[str, Any]] = {name: {**asdict(point), "racer": name} for name in ("floor", *racers)}
    rows += found.values()
    if "fusedloss" in found:
        found["fusedloss"]["backend"] = picked(probe(point.device, DTYPES[point.dtype]))
    calls: dict[str, Callable[[], Any]] = {"floor": partial(floor(point), query, key)}
    for name, loss in racers.items():
        if not fits(point, name):
            found[name]["note"] = f"not run: needs about {point.eager_bytes / 2**30:.1f} GiB"
            continue
        tick(f"{point.loss} N={point.n}: first run of {name}")
        pair = {
            name: partial(forward_backward(loss), query, key),
            f"{name} forward": partial(forward(loss), query, key),
        }
        try:
            for call in pair.values():
                call()
        except Exception as error:  # out of memory, or a peer that cannot do this: the others still race
            found[name]["note"] = _reason(error)
            continue
        calls |= pair
    calls["floor"]()
    samples: dict[str, list[float]] = {}
    tick(f"{point.loss} N={point.n}: time")
    for name, taken in measure.samples_interleaved(calls, rounds, warmup=0):
        samples.setdefault(name, []).append(taken)
        _fill_in_times(found, samples)
        tick(f"{point.loss} N={point.n}: time")
    for name in racers:
        if name not in calls:
            continue
        row = found[name]
        try:
            if with_memory:
                tick(f"{point.loss} N={point.n}: memory of {name}")
                row["memory_bytes"] = measure.isolated(memory, point, name)
            tick(f"{point.loss} N={point.n}: error of {name}")
            row["gradient_error"], row["gradient_error_rows"] = gradient_error(point, name), min(point.n, ERROR_ROWS)
        except Exception as error:
            row["note"] = _reason(error)
            continue
        if not row["gradient_error"] <= MARKED_ERROR:
            row["note"] = f"not ranked: gradient error above {MARKED_ERROR}"
    return rows


def _reason(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {error}".splitlines()[0]


def _fill_in_times(found: dict[str, dict[str, Any]], samples: dict[str, list[float]]) -> None:
    """Medians and ranges. `backward_seconds` is what gradients add to a loss computed without them."""
    median = {name: statistics.median(taken) for name, taken in samples.items()}
    for name, row in found.items():
        if name in median:
            row["seconds"], row["rounds"] = median[name], len(samples[name])
            row["seconds_min"], row["seconds_max"] = min(samples[name]), max(samples[name])
            if "floor" in median:
                row["ratio"] = median[name] / median["floor"]
        if name in median and f"{name} forward" in median:
            row["forward_seconds"] = median[f"{name} forward"]
            row["backward_seconds"] = median[name] - row["forward_seconds"]


# The claims of the README, checked in one run -------------------------------------------------------------------------


def cpu_claims(rounds: int, tick: Tick, claims: list[dict], samples: dict[str, list[float]]) -> None:
    """Appends claim, measured, required, held: the figures that the project promises for a CPU."""
    base = Point(n=16384)
    cold, narrow = Point(n=16384, temperature=1e-3), Point(n=16384, dtype="bf16")
    query, key = base.inputs()
    short_query, short_key = narrow.inputs()
    scale = torch.tensor(base.temperature, requires_grad=True)
    racers = losses(base)
    calls = {
        "floor": partial(floor(base), query, key),
        "fp32": partial(forward_backward(racers["fusedloss"]), query, key),
        "cold": partial(forward_backward(losses(cold)["fusedloss"]), query, key),
        "learnable": partial(forward_backward(partial(fusedloss.info_nce, temperature=scale)), query, key),
        "bf16": partial(forward_backward(losses(narrow)["fusedloss"]), short_query, short_key),
    }
    if "F.linear_cross_entropy" in racers:
        calls["F.linear_cross_entropy"] = partial(forward_backward(racers["F.linear_cross_entropy"]), query, key)
    tick("N=16384: time")
    try:
        for name, taken in measure.samples_interleaved(calls, rounds):
            samples.setdefault(name, []).append(taken)
            tick("N=16384: time")
    finally:
        if len(samples) == len(calls):
            claims += _time_claims({name: statistics.median(taken) for name, taken in samples.items()})
    for n in (32768, 65536):
        point = Point(n=n)
        tick(f"N={n}: memory")
        mib = measure.isolated(memory, point, "fusedloss") / 2**20
        eager = f"eager, computed: {point.eager_bytes / 2**30:.0f} GiB"
        claims.append(claim(f"N={n} D=384 fp32: MiB above inputs and gradients ({eager})", mib, 128))
    tick("torch.compile at N=65536")
    first, again, graphs = measure.isolated(compile_times)
    claims.append(claim("torch.compile(fullgraph=True) at N=65536 D=64: seconds of the first call", first, 30))
    claims.append(claim("for comparison, seconds of a compiled step at N=49152", again, None))
    claims.append(claim("graphs compiled for two batch sizes", graphs, 1))


CLAIM_CALLS = 6


def _time_claims(seconds: dict[str, float]) -> list[dict]:
    found = [claim("N=16384 D=384 fp32: time over the three bare products", seconds["fp32"] / seconds["floor"], 1.10)]
    if "F.linear_cross_entropy" in seconds:
        ratio = seconds["fp32"] / seconds["F.linear_cross_entropy"]
        found.append(claim("time over F.linear_cross_entropy with chunking", ratio, 1.0))
    return [
        *found,
        claim("temperature 1e-3: time over that at 0.05", seconds["cold"] / seconds["fp32"], 1.3),
        claim("bf16: times faster than fp32, logits in fp32", seconds["fp32"] / seconds["bf16"], 1.8, at_least=True),
        claim(
            "with a learnable temperature: time over the bare products", seconds["learnable"] / seconds["floor"], None
        ),
    ]


def compile_times() -> tuple[float, float, int]:
    """Seconds of the first compiled step at N = 65536, of one at another N, and the number of graphs.

    D = 64: at 384 the matrix products alone take longer than the bound.
    """
    torch._inductor.config.force_disable_caches = True  # else a second run would find the first one's code on disk
    torch._dynamo.utils.counters.clear()

    def loss(query: Tensor, key: Tensor) -> Tensor:
        return fusedloss.info_nce(query, key)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    taken = []
    for n in (65536, 49152):
        leaves = [x.requires_grad_() for x in Point(n=n, d=64).inputs()]
        start = time.perf_counter()
        compiled(*leaves).backward()
        taken.append(time.perf_counter() - start)
    return taken[0], taken[1], torch._dynamo.utils.counters["stats"]["unique_graphs"]


def claim(text: str, measured: float, required: float | None, at_least: bool = False) -> dict:
    held = None if required is None else bool(measured >= required if at_least else measured <= required)
    word = "at least" if at_least else "at most"
    return {"claim": text, "measured": measured, "required": required and f"{word} {required}", "held": held}


# Results --------------------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """What a figure depends on."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "platform": platform.platform(),
        "cpu": f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "threads": torch.get_num_threads(),
        "fusedloss": fusedloss.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "load before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _commit() -> str | None:
    """The checkout's that this file is tracked in, "-dirty" where it has changes; None for an installed package."""
    here = Path(__file__)
    git = ("git", "-C", str(here.parent))
    if _output(*git, "ls-files", here.name) != here.name:
        return None
    return _output(*git, "describe", "--always", "--dirty", "--exclude=*")


def write_csv(path: Path, rows: Iterable[dict]) -> None:
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def plot(path: Path, rows: list[dict], title: str) -> None:
    """Time and memory against the batch, one line a racer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    panels = [("seconds", "seconds, forward + backward", 1), ("memory_bytes", "MiB above inputs and gradients", 2**20)]
    lines = list(dict.fromkeys((row["racer"], row["temperature"]) for row in rows))
    sizes = sorted({row["n"] for row in rows})
    for axis, (key, label, unit) in zip(axes, panels, strict=True):
        for number, (racer, temperature) in enumerate(lines):
            mine = [row for row in rows if (row["racer"], row["temperature"]) == (racer, temperature)]
            # A log axis has no place for 0: a step that stays within what its process had before.
            points = sorted((row["n"], row[key] / unit) for row in mine if row.get(key, 0) > 0)
            if points:
                several = len({temperature for _, temperature in lines}) > 1
                name = f"{racer}, temperature {temperature}" if several else racer
                style = {"color": f"C{number % 10}", "linestyle": ":" if racer == "floor" else "-"}
                axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, **style)
        axis.set(xscale="log", yscale="log", xlabel="batch size N", ylabel=label)
        axis.set_xticks(sizes, [str(n) for n in sizes])
        axis.minorticks_off()
        axis.grid(True, alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show_claims(claims: list[dict]) -> None:
    verdict = {True: "yes", False: "NO", None: ""}
    cells = [[c["claim"], f"{c['measured']:.4g}", c["required"] or "", verdict[c["held"]]] for c in claims]
    show.table("claims", ["claim", "measured", "required", "held"], cells)


def show_rows(title: str, rows: list[dict]) -> None:
    def number(row: dict, key: str, form: str, unit: float = 1) -> str:
        return form.format(row[key] / unit) if row.get(key) is not None else ""

    cells = []
    for row in rows:
        spread = f"{row['seconds_min'] * 1e3:.1f} .. {row['seconds_max'] * 1e3:.1f}" if "seconds" in row else ""
        cells.append(
            [
                str(row["n"]),
                str(row["temperature"]),
                f"{row['racer']} ({row['backend']})" if "backend" in row else row["racer"],
                number(row, "forward_seconds", "{:.1f}", 1e-3),
                number(row, "backward_seconds", "{:.1f}", 1e-3),
                number(row, "seconds", "{:.1f}", 1e-3),
                spread,
                number(row, "ratio", "{:.2f}"),
                number(row, "memory_bytes", "{:.0f}", 2**20),
                number(row, "gradient_error", "{:.1e}"),
                row.get("note", ""),
            ]
        )
    headers = ["N", "temperature", "racer", "forward ms", "backward ms", "both ms", "min .. max", "x floor"]
    show.table(title, [*headers, "memory MiB", "gradient error", "note"], cells)


def main(arguments: Any) -> int:
    """Runs what the command line asks for. Ctrl-C stops the race; what was measured until then is shown and written."""
    point = Point(arguments.loss, 64, arguments.d, arguments.dtype, 1.0, arguments.kind, arguments.device)
    points = [replace(point, n=n, temperature=t) for n in arguments.n for t in arguments.temperature]
    only = set(arguments.racers) if arguments.racers else None
    if only and (unknown := only - set(losses(point)) - {"floor"}):
        print(f"--racers {' '.join(sorted(unknown))}: unknown; here are {', '.join(losses(point))}", file=sys.stderr)
        return 2
    before = environment()
    rows: list[dict] = []
    claims: list[dict] = []
    samples: dict[str, list[float]] = {}
    with_memory, interrupted = not arguments.no_memory, False
    if arguments.claims:
        total = CLAIM_CALLS * arguments.rounds + 4
    else:
        total = sum(steps(p, arguments.rounds, only, with_memory) for p in points)
    try:
        with show.progress(total) as tick:
            if arguments.claims:
                cpu_claims(arguments.rounds, tick, claims, samples)
            else:
                for p in points:
                    race(p, arguments.rounds, only, with_memory, tick, rows)
    except KeyboardInterrupt:
        interrupted = True
    title = f"{arguments.loss}, D = {arguments.d}, {arguments.dtype}, {arguments.device}"
    if claims:
        show_claims(claims)
    if rows:
        show_rows(title, rows)
    if interrupted:
        print("interrupted: this is what was measured until then", file=sys.stderr)
    if arguments.out and (rows or claims):
        folder = Path(arguments.out)
        folder.mkdir(parents=True, exist_ok=True)
        results = {"environment": before, "command": arguments.command_line, "interrupted": interrupted}
        results |= {"rows": rows, "claims": claims, "seconds": samples}
        (folder / f"{arguments.name}.json").write_text(json.dumps(results, indent=1) + "\n")
        if rows:
            write_csv(folder / f"{arguments.name}.csv", rows)
            try:
                plot(folder / f"{arguments.name}.png", rows, title)
            except ImportError:
                print("no plot without matplotlib: pip install 'fusedloss[bench]'", file=sys.stderr)
    return 130 if interrupted else int(any(c["held"] is False for c in claims))
