"""`python -m fusedloss bench`: the race. Same inputs, interleaved rounds, medians, beside the bare work.

The floor is the three matrix products that the gradient needs (four for CLIP), in the chunks that fusedloss uses: what
a perfect epilogue would cost. Memory is what a step needs on top of its inputs and gradients, each racer in a fresh
process. A racer whose gradient error exceeds 1e-2 is shown and marked, not ranked.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fusedloss

from . import measure, sweep, testing
from .backends import BACKENDS
from .info import probe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
MARKED_ERROR = 1e-2
ERROR_ROWS = 2048  # the gradient error is measured on a smaller batch of the same kind: fp64 at N = 16384 takes minutes
CHUNK = 1024


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
        """What eager holds at its peak: the logits, their log-softmax and its gradient (three matrices)."""
        return 3 * self.n * self.n * DTYPES[self.dtype].itemsize


Step = Callable[[Tensor, Tensor], Any]
Tick = Callable[[str], None]  # is told what happens next


def losses(point: Point) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Every racer's loss as a function of (query, key)."""
    t = point.temperature
    racers: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
    if point.loss == "clip":
        racers["fusedloss"] = lambda q, k: fusedloss.clip(q, k, 1 / t)
        eager = lambda q, k: testing.eager_clip(q, k, 1 / t)
    elif point.loss == "multiple_negatives_ranking":
        racers["fusedloss"] = lambda q, k: fusedloss.multiple_negatives_ranking(q, k, scale=1 / t)
        eager = lambda q, k: testing.eager_multiple_negatives_ranking(q, k, scale=1 / t)
    else:
        racers["fusedloss"] = lambda q, k: fusedloss.info_nce(q, k, temperature=t)
        eager = lambda q, k: testing.eager_info_nce(q, k, t)
        if hasattr(F, "linear_cross_entropy"):
            racers["F.linear_cross_entropy"] = lambda q, k: F.linear_cross_entropy(
                q / t,
                k,
                torch.arange(q.shape[0], device=q.device),
                options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK),
            )
    fused = racers["fusedloss"]
    if point.device == "cuda" and BACKENDS["triton"].why_not(probe("cuda", DTYPES[point.dtype])) is None:
        racers["fusedloss triton"] = lambda q, k: _with_backend("triton", fused, q, k)
    racers["eager"] = eager
    racers["torch.compile"] = torch.compile(eager, dynamic=False)
    return racers


def _with_backend(name: str, loss: Callable[[Tensor, Tensor], Tensor], query: Tensor, key: Tensor) -> Tensor:
    """`loss` under FUSEDLOSS_BACKEND, the switch its users have."""
    before = os.environ.get("FUSEDLOSS_BACKEND")
    os.environ["FUSEDLOSS_BACKEND"] = name
    try:
        return loss(query, key)
    finally:
        if before is None:
            del os.environ["FUSEDLOSS_BACKEND"]
        else:
            os.environ["FUSEDLOSS_BACKEND"] = before


def forward(loss: Callable[[Tensor, Tensor], Tensor]) -> Step:
    def step(query: Tensor, key: Tensor) -> None:
        with torch.no_grad():
            loss(query, key)

    return step


def forward_backward(loss: Callable[[Tensor, Tensor], Tensor]) -> Step:
    def step(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        leaves = [query.detach().requires_grad_(), key.detach().requires_grad_()]
        loss(*leaves).backward()
        return leaves[0].grad, leaves[1].grad  # type: ignore[return-value]

    return step


def floor(point: Point) -> Step:
    """The bare products: S = x y^T (twice for CLIP, whose normalisers must be known first), dx += S y, dy += S^T x."""
    columns, dtype = point.n, DTYPES[point.dtype]
    stored = 4 if point.device == "cpu" else dtype.itemsize  # a CPU's workspace is fp32 for 16-bit inputs too
    budget, most = sweep.WORKSPACE_BYTES[point.device], sweep.MAX_ROWS[point.device]
    rows = min(most, max(sweep.MIN_ROWS, budget // (stored * columns)), point.n)

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
    if name not in ("eager", "torch.compile"):
        return True
    if point.device == "cpu":
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8 << 30
    else:
        available = torch.cuda.mem_get_info()[0]
    return point.eager_bytes < 0.6 * available


def memory(point: Point, name: str) -> int:
    """Bytes a step of this racer needs on top of inputs and gradients. To be run in a fresh process."""
    query, key = point.inputs()
    loss = losses(point)[name]
    small = Point(**{**asdict(point), "n": 64}).inputs()
    forward_backward(loss)(*small)  # loads libraries, compiles: not the step's memory
    step = forward_backward(loss)
    gradients = 2 * query.numel() * query.element_size()
    return measure.peak_memory(lambda: step(query, key), point.device) - gradients


def gradient_error(point: Point, name: str) -> float:
    """||gradient - fp64|| / ||fp64||, the worse of the two sides, on a batch small enough for fp64."""
    query, key = point.inputs(min(point.n, ERROR_ROWS))
    found = forward_backward(losses(point)[name])(query, key)
    t = point.temperature
    exact = {
        "info_nce": lambda q, k: fusedloss.info_nce(q, k, temperature=t, backend="reference"),
        "clip": lambda q, k: fusedloss.clip(q, k, 1 / t, backend="reference"),
        "multiple_negatives_ranking": lambda q, k: fusedloss.multiple_negatives_ranking(
            q, k, scale=1 / t, backend="reference"
        ),
    }[point.loss]
    wanted = forward_backward(exact)(query.double(), key.double())
    return max(((f.double() - w).norm() / w.norm()).item() for f, w in zip(found, wanted, strict=True))


def race(point: Point, rounds: int, only: set[str] | None, with_memory: bool, tick: Tick) -> list[dict]:
    """One row per racer: seconds, ratio to the floor, memory, gradient error; or why it did not run."""
    query, key = point.inputs()
    racers = {n: f for n, f in losses(point).items() if only is None or n in only}
    running = {name: loss for name, loss in racers.items() if fits(point, name)}
    calls: dict[str, Callable[[], Any]] = {"floor": partial(floor(point), query, key)}
    for name, loss in running.items():
        calls[name] = partial(forward_backward(loss), query, key)
        calls[f"{name} forward"] = partial(forward(loss), query, key)
    tick(f"{point.loss} N={point.n} time")
    seconds = measure.time_interleaved(calls, rounds)
    rows = [{**asdict(point), "racer": "floor", "seconds": seconds["floor"], "ratio": 1.0}]
    for name in racers:
        row: dict[str, Any] = {**asdict(point), "racer": name}
        if name not in running:
            rows.append({**row, "note": f"not run: needs about {point.eager_bytes / 2**30:.1f} GiB"})
            continue
        row |= {"seconds": seconds[name], "forward_seconds": seconds[f"{name} forward"]}
        row["backward_seconds"] = row["seconds"] - row["forward_seconds"]
        row["ratio"] = seconds[name] / seconds["floor"]
        if with_memory:
            tick(f"{point.loss} N={point.n} memory of {name}")
            row["memory_bytes"] = measure.isolated(memory, point, name)
        tick(f"{point.loss} N={point.n} error of {name}")
        row["gradient_error"] = gradient_error(point, name)
        if not row["gradient_error"] <= MARKED_ERROR:
            row["note"] = f"not ranked: gradient error above {MARKED_ERROR}"
        rows.append(row)
    return rows


# The claims of the README, checked in one run -------------------------------------------------------------------------


def cpu_claims(rounds: int, tick: Tick) -> list[dict]:
    """Claim, measured, required, held: the figures that the project promises for a CPU."""
    base = Point(n=16384)
    cold, narrow = Point(n=16384, temperature=1e-3), Point(n=16384, dtype="bf16")
    query, key = base.inputs()
    short_query, short_key = narrow.inputs()
    scale = torch.tensor(base.temperature, requires_grad=True)
    fused, peer = losses(base)["fusedloss"], losses(base).get("F.linear_cross_entropy")
    calls = {
        "floor": partial(floor(base), query, key),
        "fp32": partial(forward_backward(fused), query, key),
        "cold": partial(forward_backward(losses(cold)["fusedloss"]), query, key),
        "learnable": partial(forward_backward(partial(fusedloss.info_nce, temperature=scale)), query, key),
        "bf16": partial(forward_backward(losses(narrow)["fusedloss"]), short_query, short_key),
    }
    if peer is not None:
        calls["F.linear_cross_entropy"] = partial(forward_backward(peer), query, key)
    tick("N=16384: time")
    seconds = measure.time_interleaved(calls, rounds)
    table = [
        claim("N=16384 D=384 fp32: time over the three bare products", seconds["fp32"] / seconds["floor"], 1.10),
        claim("temperature 1e-3: time over that at 0.05", seconds["cold"] / seconds["fp32"], 1.3),
        claim("bf16: times faster than fp32, logits in fp32", seconds["fp32"] / seconds["bf16"], 1.8, at_least=True),
        claim(
            "with a learnable temperature: time over the bare products", seconds["learnable"] / seconds["floor"], None
        ),
    ]
    if peer is not None:
        ratio = seconds["fp32"] / seconds["F.linear_cross_entropy"]
        table.insert(1, claim("time over F.linear_cross_entropy with chunking", ratio, 1.0))
    for n in (32768, 65536):
        point = Point(n=n)
        tick(f"N={n}: memory")
        mib = measure.isolated(memory, point, "fusedloss") / 2**20
        eager = point.eager_bytes / 2**30
        table.append(claim(f"N={n} D=384 fp32: MiB above inputs and gradients (eager: {eager:.0f} GiB)", mib, 128))
    tick("torch.compile at N=65536")
    first, again, graphs = measure.isolated(compile_times)
    table.append(claim("torch.compile(fullgraph=True) at N=65536 D=64: seconds of the first call", first, 30))
    table.append(claim("of these, seconds of a step at another N", again, None))
    table.append(claim("graphs compiled for two batch sizes", graphs, 1))
    return [*table, {"claim": "seconds", "measured": seconds, "required": None, "held": None}]


def compile_times() -> tuple[float, float, int]:
    """Seconds of the first compiled step at N = 65536, of one at another N, and the number of graphs.

    D = 64: at 384 the matrix products alone take longer than the bound.
    """
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
        "commit": _output("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "threads": torch.get_num_threads(),
        "fusedloss": fusedloss.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


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
    sizes = sorted({row["n"] for row in rows})
    for axis, (key, label, unit) in zip(axes, panels, strict=True):
        for number, name in enumerate(dict.fromkeys(row["racer"] for row in rows)):
            points = [(row["n"], row[key] / unit) for row in rows if row["racer"] == name and row.get(key)]
            look = {"color": "grey", "linestyle": "--"} if name == "floor" else {"color": f"C{number}", "marker": "o"}
            if points:
                axis.plot(*zip(*sorted(points), strict=True), label=name, **look)
        axis.set(xscale="log", yscale="log", xlabel="batch size N", ylabel=label)
        axis.set_xticks(sizes, [str(n) for n in sizes])
        axis.set_xticks([], minor=True)
        axis.grid(True, which="both", alpha=0.2)
        if axis.lines:
            axis.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def table(title: str, rows: list[dict], columns: dict[str, Callable[[dict], str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(*columns, title=title)
    for row in rows:
        shown.add_row(*(cell(row) for cell in columns.values()))
    Console(width=None if sys.stdout.isatty() else 140).print(shown)


def main(arguments: Any) -> int:
    """Runs what the command line asks for. Ctrl-C stops the race; what was measured until then is shown and written."""
    from rich.console import Console

    console = Console(stderr=True)
    rows: list[dict] = []
    claims: list[dict] = []
    interrupted = False
    with console.status("starting") as status:
        tick = lambda text: status.update(text) if console.is_terminal else console.print(text, highlight=False)
        try:
            if arguments.claims:
                claims = cpu_claims(arguments.rounds, tick)
            else:
                for n in arguments.n:
                    for temperature in arguments.temperature:
                        point = Point(
                            arguments.loss,
                            n,
                            arguments.d,
                            arguments.dtype,
                            temperature,
                            arguments.kind,
                            arguments.device,
                        )
                        only = set(arguments.racers) if arguments.racers else None
                        rows += race(point, arguments.rounds, only, not arguments.no_memory, tick)
        except KeyboardInterrupt:
            interrupted = True
    if claims:
        seconds = claims.pop()
        number = lambda v: f"{v:.4g}"
        table(
            "claims",
            claims,
            {
                "claim": lambda r: r["claim"],
                "measured": lambda r: number(r["measured"]),
                "required": lambda r: r["required"] or "",
                "held": lambda r: {True: "yes", False: "NO", None: ""}[r["held"]],
            },
        )
        claims.append(seconds)
    if rows:
        show = lambda key, form, unit=1: lambda r: form.format(r[key] / unit) if r.get(key) is not None else ""
        table(
            f"{arguments.loss}, D={arguments.d}, {arguments.dtype}, {arguments.device}",
            rows,
            {
                "N": lambda r: str(r["n"]),
                "temperature": lambda r: str(r["temperature"]),
                "racer": lambda r: r["racer"],
                "forward ms": show("forward_seconds", "{:.1f}", 1e-3),
                "both ms": show("seconds", "{:.1f}", 1e-3),
                "x floor": show("ratio", "{:.2f}"),
                "memory MiB": show("memory_bytes", "{:.0f}", 2**20),
                "gradient error": show("gradient_error", "{:.1e}"),
                "note": lambda r: r.get("note", ""),
            },
        )
    if arguments.out and (rows or claims):
        folder = Path(arguments.out)
        folder.mkdir(parents=True, exist_ok=True)
        results = {"environment": environment(), "command": sys.argv[1:], "rows": rows, "claims": claims}
        (folder / f"{arguments.name}.json").write_text(json.dumps(results, indent=1) + "\n")
        if rows:
            write_csv(folder / f"{arguments.name}.csv", rows)
            plot(folder / f"{arguments.name}.png", rows, f"{arguments.loss}, D = {arguments.d}, {arguments.dtype}")
    return 130 if interrupted else int(any(c["held"] is False for c in claims))
