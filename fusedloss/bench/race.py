"""`python -m fusedloss bench`: the race. All racers get the same inputs in interleaved rounds; medians are compared.

The floor is the time of the three matrix products that the gradient needs (four for CLIP), in the chunks that fusedloss
uses: a perfect epilogue would add nothing to it. On a CPU a second floor takes the faster of two libraries' fp32
products, each product by itself. Memory is that of a step above its inputs and gradients. On a CPU only
a process has a peak, so each racer's memory is measured in a fresh process. A racer whose gradient error exceeds 1e-2
is shown, marked and not ranked. A racer that cannot run is shown with the reason.
"""

from __future__ import annotations

import importlib.util
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch._dynamo.utils
import torch._inductor.config
from torch import Tensor

import fusedloss

from .. import backends, sweep, testing
from ..backends import BACKENDS
from ..trust import order
from . import measure, results, tables
from .floors import BETTER, FLOOR, FLOORS, floors
from .machine import picked, probe
from .peers import DTYPES, PEERS, SIGLIP_BIAS, Loss, Point
from .tables import Tick

MARKED_ERROR = 1e-2
TRIED_ERROR = 0.5  # a larger gradient error on a tiny batch is not rounding
ERROR_ROWS = 1024  # rows of each side's gradient that are compared with fp64
SAMPLE_SECONDS = 0.02
LIMIT = 30.0  # seconds after which a slow racer gets no more rounds
MATERIALISING = ("eager", "torch.compile", "fusedloss:reference")
NORMALIZE = ", normalize=True"
NORMALIZED = f"fusedloss{NORMALIZE}"
GRAPHED = "fusedloss, CUDA graph"
KERNELS = tuple(f"fusedloss:{backend}{how}" for backend in backends.KERNELS for how in ("", NORMALIZE))
OWN = frozenset(("fusedloss", NORMALIZED, GRAPHED, *KERNELS))
GRAPHED_ROWS = 8192  # up to this N launches are a visible part of a step's time
FORWARD = " forward"
OUT_OF_TIME = "not run: out of time"

NOBODY: Mapping[str, str] = MappingProxyType({})

Step = Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True)
class Racer:
    loss: Loss | None
    why_not: str = ""  # the reason if there is no loss
    caveat: str = ""  # why the racer is shown but never ranked
    computes: str = "info_nce"  # the loss whose exact gradient it is compared with
    cosine: bool = False
    backend: str = ""  # fusedloss's backend
    sweep: str | None = None  # the kind of its sweep, named as in trust/order.py


def fused(point: Point, backend: str, **options: Any) -> Loss:
    t = point.temperature
    if point.loss == "clip":
        return lambda q, k: fusedloss.clip(q, k, 1 / t, backend=backend, **options)
    if point.loss == "multiple_negatives_ranking":
        return lambda q, k: fusedloss.multiple_negatives_ranking(q, k, scale=1 / t, backend=backend)
    return lambda q, k: fusedloss.info_nce(q, k, temperature=t, backend=backend, **options)


def graphed(loss: Loss) -> Loss:
    """Returns `loss` as a CUDA graph, captured at its first call: the time of a small batch without its launches."""
    captured: list[Callable[..., Any]] = []

    def run(query: Tensor, key: Tensor) -> Tensor:
        if not captured:
            with torch.enable_grad():
                samples = tuple(x.detach().clone().requires_grad_() for x in (query, key))
                captured.append(torch.cuda.make_graphed_callables(loss, samples))
        return captured[0](query, key)

    return run


def racers(point: Point, only: Collection[str] | None = None, excluded: Mapping[str, str] = NOBODY) -> dict[str, Racer]:
    """Returns all racers, or those named. `fusedloss` runs with backend="auto"; normalize=True bounds its logits.

    excluded: peers that are not even imported, and the reasons.
    """
    cosine = point.loss == "multiple_negatives_ranking"
    computes = "info_nce" if cosine else point.loss
    on_a_gpu = point.device_type == "cuda"

    def own(backend: str, **options: Any) -> Racer:
        loss, unit = fused(point, backend, **options), cosine or bool(options)
        known = {"symmetric": point.loss == "clip", "cosine": unit, "scale_bound": point.scale}
        problem = probe(point.device, DTYPES[point.dtype], (point.n, point.d), **known)
        runs = picked(problem) if backend == "auto" else backend
        return Racer(loss, computes=computes, cosine=unit, backend=runs, sweep=order.kind(problem))

    found = {"fusedloss": own("auto")}
    if not cosine:
        found[NORMALIZED] = own("auto", normalize=True)
        if on_a_gpu and point.n <= GRAPHED_ROWS:
            captured = graphed(fused(point, "auto", normalize=True))
            found[GRAPHED] = replace(found[NORMALIZED], loss=captured, sweep=None)
    for backend, module in BACKENDS.items():
        why_not, kernels = module.why_not(probe(point.device, DTYPES[point.dtype])), backend in backends.KERNELS
        if why_not is None:
            found[f"fusedloss:{backend}"] = own(backend)
            if on_a_gpu and kernels and not cosine:
                found[f"fusedloss:{backend}{NORMALIZE}"] = own(backend, normalize=True)
        elif on_a_gpu and kernels:
            found[f"fusedloss:{backend}"] = Racer(None, why_not)
    for name, peer in PEERS.items():
        if name not in excluded and (only is None or name in only):
            loss = peer.enter(point)
            racer = Racer(None, loss) if isinstance(loss, str) else Racer(loss)
            found[name] = replace(racer, caveat=peer.caveat, computes=peer.computes or computes, cosine=cosine)
    found |= {name: replace(found.get(name, Racer(None)), loss=None, why_not=why) for name, why in excluded.items()}
    return {name: racer for name, racer in found.items() if only is None or name in only}


def entered(
    point: Point, only: Collection[str] | None, excluded: Mapping[str, str] = NOBODY, own: bool = False
) -> dict[str, Racer]:
    """Returns the racers named. The default is each implementation once, without the oracle and interpreted kernels.

    own: only fusedloss's racers, without those that run plain torch by name.
    """
    everyone = racers(point, only if not own else OWN if only is None else OWN & set(only), excluded)
    if only is not None:
        return everyone
    picks = {f"fusedloss:{r.backend}{n.removeprefix('fusedloss')}" for n, r in everyone.items() if n in OWN}
    left_out = picks | {"fusedloss:reference"} | set(KERNELS if point.device_type == "cpu" else ())
    return {name: racer for name, racer in everyone.items() if name not in left_out}


def forward(loss: Loss) -> Step:
    def step(query: Tensor, key: Tensor) -> None:
        with torch.no_grad():
            loss(query, key)

    return step


def forward_backward(loss: Loss) -> Step:
    def step(query: Tensor, key: Tensor) -> list[Tensor]:
        leaves = [query.detach().requires_grad_(), key.detach().requires_grad_()]
        value = loss(*leaves)
        value.backward()
        return [value.detach(), leaves[0].grad, leaves[1].grad]  # type: ignore[list-item]

    return step


def floor_rows(point: Point) -> int:
    """Returns the sweep's rows a chunk. Large products are faster, so the floor must have chunks at least as large."""
    device = torch.device(point.device)
    itemsize = DTYPES[point.dtype].itemsize
    return sweep.chunks.chunk_rows(
        point.n, point.n, point.d, max(4, itemsize) if device.type == "cpu" else itemsize, device
    )


def bare(point: Point, query: Tensor, key: Tensor) -> dict[str, Callable[[], Any]]:
    """Returns the floors of a point. CLIP computes the similarities twice, first for its normalisers."""
    return floors(query, key, floor_rows(point), (2 if point.loss == "clip" else 1, 1, 1))


def fits(point: Point, name: str) -> bool:
    """Returns whether a racer's memory fits. Without memory a CPU swaps or ends the process; CUDA raises OOM."""
    if point.device_type != "cpu" or name not in MATERIALISING:
        return True
    return point.eager_bytes < 0.6 * available_bytes()


def available_bytes() -> int:
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
    """Returns the bytes that a racer's step needs above inputs and gradients. On a CPU, call it in a fresh process."""
    query, key = point.inputs()
    loss = racers(point)[name].loss
    assert loss is not None
    # The warm-up loads libraries and compiles, which is no memory of the step. Compiled code accepts one size only.
    warm = (query, key) if name == "torch.compile" else replace(point, n=64).inputs()
    forward_backward(loss)(*warm)
    return step_memory(forward_backward(loss), query, key, point.device)


def step_memory(step: Step, query: Tensor, key: Tensor, device: str) -> int:
    gradients = 2 * query.numel() * query.element_size()
    return measure.peak_memory(lambda: step(query, key), device) - gradients


def gradient_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Returns `||gradient - fp64|| / ||fp64||` over the sampled rows, of the worse side."""
    return max(((f.double() - w).norm() / w.norm()).item() for f, w in zip(found[1:], wanted[1:], strict=True))


def steps(point: Point, rounds: int, only: set[str] | None) -> int:
    """Returns the largest number of ticks of `race`."""
    running = sum(fits(point, name) and racer.loss is not None for name, racer in entered(point, only).items())
    bare = 2 if point.device_type == "cpu" and point.dtype == "fp32" else 1
    return 2 + running + (2 * running + bare) * rounds + 2 * running


def race(
    point: Point,
    rounds: int,
    only: set[str] | None,
    with_memory: bool,
    tick: Tick,
    rows: list[dict],
    *,
    limit: float = math.inf,
    until: float = math.inf,
    excluded: Mapping[str, str] = NOBODY,
    own: bool = False,
) -> list[dict]:
    """Returns one row per racer: seconds, ratio to the floor, memory, gradient error; or why it did not run.

    Rows are appended to `rows` at the start and filled in as figures arrive, so that an interrupted race keeps them.
    Every tick's text ends in ": " and the racer that runs next.

    Args:
        limit: seconds after which a slow racer gets no more rounds; it gets at least one.
        until: the time.monotonic() after which no racer starts.
        excluded: racers that are not run, and why.
        own: leave out the peers.
    """
    # Dynamo keeps 8 graphs of one function, whichever torch.compile call they are from, and runs eager from then on.
    torch.compiler.reset()
    place = f"{point.loss} N={point.n} D={point.d} scale {point.scale:g} {point.kind}"
    tick(f"{place}, inputs: floor")
    query, key = point.inputs()
    calls = bare(point, query, key)
    entries = entered(point, only, excluded, own)
    found: dict[str, dict[str, Any]] = {name: {**asdict(point), "racer": name} for name in (*calls, *entries)}
    rows += found.values()
    for name, racer in entries.items():
        found[name] |= {key: value for key in ("backend", "sweep") if (value := getattr(racer, key))}
    looked_at = _looked_at(point)
    repeats: dict[str, int] = {}
    sampled: dict[str, list[Tensor]] = {}

    def failed(name: str, error: Exception) -> None:
        found[name.removesuffix(FORWARD)]["note"] = _reason(error)

    def dropped(name: str, error: Exception) -> None:
        failed(name, error)
        calls.pop(name)
        measure.free_memory()  # raises now if the device is lost, and not in the next racer

    for name, racer in entries.items():
        row = found[name]
        if racer.why_not:
            row["note"] = racer.why_not if racer.why_not.startswith(("failed", "OOM")) else f"not run: {racer.why_not}"
        elif not fits(point, name):
            row["note"] = f"not run: needs about {point.eager_bytes / 2**30:.1f} GiB"
        elif time.monotonic() > until:
            row["note"] = OUT_OF_TIME
        if "note" in row or racer.loss is None:
            continue
        tick(f"{place}, first run: {name}")
        both, alone = forward_backward(racer.loss), forward(racer.loss)
        try:
            found_now = both(query, key)
            sampled[name] = [found_now[0], *(g[looked_at].clone() for g in found_now[1:])]
            del found_now
            alone(query, key)
            measure.synchronize()
            if point.device_type == "cuda":  # the first run compiled; this one is the step itself
                again: list[float] = []
                timed = lambda q, k, both=both, again=again: again.append(measure.seconds(partial(both, q, k)))
                row["memory_bytes"] = step_memory(timed, query, key, point.device)
                repeats[name] = repeats[name + FORWARD] = _repeats(again[0])
        except Exception as error:  # out of memory, or a peer that cannot run this point; the others still race
            failed(name, error)
        if "note" in row:
            sampled.pop(name, None)
            measure.free_memory()  # after the except clause, whose traceback keeps the call's tensors alive
            continue
        calls |= {name: partial(both, query, key), name + FORWARD: partial(alone, query, key)}
    tick(f"{place}, first run: floor")
    for name in FLOORS:
        if name in calls:
            calls[name]()
            if point.device_type == "cuda":
                repeats[name] = _repeats(measure.seconds(calls[name]))

    samples: dict[str, list[float]] = {}
    for name, taken in measure.samples_interleaved(
        calls,
        rounds,
        warmup=0,
        repeats=repeats,
        limit=limit,
        starting=lambda name: tick(f"{place}, time: {name.removesuffix(FORWARD)}"),
        failed=dropped,
    ):
        samples.setdefault(name, []).append(taken)
        _fill_in_times(found, samples)
        if time.monotonic() > until and len(samples) == len(calls):
            break
    calls.clear()
    measure.free_memory()

    exact: dict[tuple[str, bool], list[Tensor]] = {}
    for name, outcome in sampled.items():
        row, racer = found[name], entries[name]
        try:
            if with_memory and point.device_type == "cpu":
                tick(f"{place}, memory: {name}")
                row["memory_bytes"] = measure.isolated(memory, point, name)
            tick(f"{place}, error: {name}")
            if (kind := (racer.computes, racer.cosine)) not in exact:
                bias = SIGLIP_BIAS if racer.computes == "siglip" else 0.0
                exact[kind] = testing.exact_gradients(
                    racer.computes, query, key, point.scale, looked_at, cosine=racer.cosine, bias=bias
                )
            row["gradient_error"], row["gradient_error_rows"] = gradient_error(outcome, exact[kind]), len(looked_at)
            row["value_error"] = ((outcome[0].double() - exact[kind][0]) / exact[kind][0]).abs().item()
        except Exception as error:
            failed(name, error)
        if "note" in row:
            measure.free_memory()
            continue
        row["ranked"] = row["gradient_error"] <= MARKED_ERROR and not racer.caveat
        if not row["ranked"]:
            row["note"] = f"not ranked: {racer.caveat or f'gradient error above {MARKED_ERROR}'}"
    return rows


def _looked_at(point: Point) -> Tensor:
    """Returns the rows whose gradients are compared: all, or ERROR_ROWS at random."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(point.n, generator=generator)[:ERROR_ROWS].to(point.device)


def _repeats(seconds: float) -> int:
    """Returns the calls per sample, enough to hide the microseconds of the clock and of a synchronisation."""
    return max(1, min(100, round(SAMPLE_SECONDS / max(seconds, 1e-6))))


def _reason(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, MemoryError) or any(word in text for word in ("OutOfMemory", "can't allocate memory")):
        return "OOM"
    return f"failed: {text}"


def _fill_in_times(found: dict[str, dict[str, Any]], samples: dict[str, list[float]]) -> None:
    """Fills in medians and ranges. `backward_seconds` is the time that gradients add to the loss alone."""
    median = {name: statistics.median(taken) for name, taken in samples.items()}
    for name, row in found.items():
        if name in median:
            row["seconds"], row["rounds"], row["samples"] = median[name], len(samples[name]), samples[name]
            row["seconds_min"], row["seconds_max"] = min(samples[name]), max(samples[name])
            for ratio, below in (("ratio", FLOOR), ("better_ratio", BETTER)):
                if below in median:
                    row[ratio] = median[name] / median[below]
        if name in median and name + FORWARD in median:
            row["forward_seconds"], row["forward_samples"] = median[name + FORWARD], samples[name + FORWARD]
            row["backward_seconds"] = median[name] - row["forward_seconds"]


# Peers that must not end the race -------------------------------------------------------------------------------------


def try_peer(name: str, device: str) -> None:
    """Runs a tiny step of a peer's compiled code. Call it in a fresh process: the code may crash, hang or be wrong."""
    for loss in ("info_nce", "clip"):
        point = Point(loss, 512, 128, "bf16", device=device)
        peer = PEERS[name]
        entry = peer.enter(point)
        if isinstance(entry, str):
            continue
        query, key = point.inputs()
        rows = torch.arange(point.n, device=device)
        bias = SIGLIP_BIAS if peer.computes else 0.0
        wanted = testing.exact_gradients(peer.computes or loss, query, key, point.scale, rows, bias=bias)
        error = gradient_error(forward_backward(entry)(query, key), wanted)
        if not error < TRIED_ERROR:
            raise RuntimeError(f"{loss} at N={point.n}: gradient error {error:.1e}")


def broken_peers(device: str, only: set[str] | None, tick: Tick, timeout: float = 120) -> dict[str, str]:
    """Returns the peers with kernels that fail a tiny step here, and why. On a CPU none of them runs."""
    if torch.device(device).type == "cpu":
        return {}
    tried = [p.name for p in PEERS.values() if p.module and (only is None or p.name in only)]
    tried = [name for name in tried if importlib.util.find_spec(PEERS[name].module)]
    found = {}
    with ThreadPoolExecutor(max(1, min(6, (os.cpu_count() or 1) // 2))) as pool:
        runs = {name: pool.submit(measure.isolated, try_peer, name, device, timeout=timeout) for name in tried}
        for name, run in runs.items():
            tick(f"trying {name}", 0)
            try:
                run.result()
            except Exception as error:
                found[name] = f"failed: a tiny step beforehand: {type(error).__name__}: {error}".splitlines()[0]
    return found


# The claims of docs/results/cpu.md, checked in one run ---------------------------------------------------------------


def cpu_claims(rounds: int, tick: Tick, claims: list[dict], samples: dict[str, list[float]]) -> None:
    """Measures the figures that the project promises for a CPU, and appends them to `claims`."""
    base = Point(n=16384)
    cold, narrow = Point(n=16384, temperature=1e-3), Point(n=16384, dtype="bf16")
    query, key = base.inputs()
    short_query, short_key = narrow.inputs()
    scale = torch.tensor(base.temperature, requires_grad=True)
    own, cce = fused(base, "auto"), PEERS["F.linear_cross_entropy"].enter(base)
    calls: dict[str, Callable[[], Any]] = {
        **bare(base, query, key),
        "fp32": partial(forward_backward(own), query, key),
        "cold": partial(forward_backward(fused(cold, "auto")), query, key),
        "learnable": partial(forward_backward(partial(fusedloss.info_nce, temperature=scale)), query, key),
        "bf16": partial(forward_backward(fused(narrow, "auto")), short_query, short_key),
    }
    if not isinstance(cce, str):
        calls["F.linear_cross_entropy"] = partial(forward_backward(cce), query, key)
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
    found = [claim("N=16384 D=384 fp32: time over the three bare products", seconds["fp32"] / seconds[FLOOR], 1.10)]
    found.append(claim("over the faster of MKL's and oneDNN's", seconds["fp32"] / seconds[BETTER], None))
    if "F.linear_cross_entropy" in seconds:
        ratio = seconds["fp32"] / seconds["F.linear_cross_entropy"]
        found.append(claim("time over F.linear_cross_entropy with chunking", ratio, 1.0))
    return [
        *found,
        claim("temperature 1e-3: time over that at 0.05", seconds["cold"] / seconds["fp32"], 1.3),
        claim("bf16: times faster than fp32, logits in fp32", seconds["fp32"] / seconds["bf16"], 1.8, at_least=True),
        claim("with a learnable temperature: time over the bare products", seconds["learnable"] / seconds[FLOOR], None),
    ]


def compile_times() -> tuple[float, float, int]:
    """Returns the seconds of the first compiled step at N = 65536 and of one at another N, and the number of graphs.

    D is 64 because the matrix products of 384 alone take longer than the bound.
    """
    torch._inductor.config.force_disable_caches = True  # a second run would find the first one's code on disk
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


# In a terminal --------------------------------------------------------------------------------------------------------


def show_claims(claims: list[dict]) -> None:
    verdict = {True: "yes", False: "NO", None: ""}
    cells = [[c["claim"], f"{c['measured']:.4g}", c["required"] or "", verdict[c["held"]]] for c in claims]
    tables.table("claims", ["claim", "measured", "required", "held"], cells)


def show_rows(title: str, rows: list[dict]) -> None:
    """Prints a table of the racers that ran or failed, and a line for each reason why others did not run."""

    def number(row: dict, key: str, form: str, unit: float = 1) -> str:
        return form.format(row[key] / unit) if row.get(key) is not None else ""

    cells: list[list[str]] = []
    absent: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        if "seconds" not in row and row.get("note", "").startswith("not run: ") and row["note"] != OUT_OF_TIME:
            absent.setdefault((row["racer"], row["note"].removeprefix("not run: ")), []).append(row["n"])
            continue
        spread = f"{row['seconds_min'] * 1e3:.1f} .. {row['seconds_max'] * 1e3:.1f}" if "seconds" in row else ""
        cells.append(
            [
                str(row["n"]),
                str(row["temperature"]),
                row["racer"] if row.get("backend", "") in row["racer"] else f"{row['racer']} ({row['backend']})",
                number(row, "forward_seconds", "{:.1f}", 1e-3),
                number(row, "backward_seconds", "{:.1f}", 1e-3),
                number(row, "seconds", "{:.1f}", 1e-3),
                spread,
                number(row, "ratio", "{:.2f}"),
                number(row, "better_ratio", "{:.2f}"),
                number(row, "memory_bytes", "{:.0f}", 2**20),
                number(row, "gradient_error", "{:.1e}"),
                row.get("note", ""),
            ]
        )
    headers = [
        "N",
        "temperature",
        "racer",
        "forward ms",
        "backward ms",
        "both ms",
        "min .. max",
        "x floor",
        "x better floor",
    ]
    tables.table(title, [*headers, "memory MiB", "gradient error", "note"], cells)
    for (racer, reason), sizes in absent.items():
        where = "" if len(set(sizes)) == len({row["n"] for row in rows}) else f" at N = {', '.join(map(str, sizes))}"
        print(f"not run{where}: {racer}: {reason}")


def main(arguments: Any) -> int:
    """Runs what the command line asks for. Ctrl-C stops the race; what was measured until then is shown and written."""
    point = Point(arguments.loss, 64, arguments.d, arguments.dtype, 1.0, arguments.kind, arguments.device)
    points = [replace(point, n=n, temperature=t) for n in arguments.n for t in arguments.temperature]
    only = set(arguments.racers) if arguments.racers else None
    with tables.progress() as tick:  # peers are imported, some of which take seconds
        tick("looking who can race here")
        if only and (unknown := only - set(racers(point)) - {*FLOORS}):
            print(
                f"--racers {' '.join(sorted(unknown))}: unknown; here are {', '.join(racers(point))}", file=sys.stderr
            )
            return 2
        before = results.environment()
        total = sum(steps(p, arguments.rounds, only) for p in points)
    rows: list[dict] = []
    claims: list[dict] = []
    samples: dict[str, list[float]] = {}
    with_memory, ended = not arguments.no_memory, None
    try:
        with tables.progress(CLAIM_CALLS * arguments.rounds + 4 if arguments.claims else total) as tick:
            if arguments.claims:
                cpu_claims(arguments.rounds, tick, claims, samples)
            else:
                excluded = broken_peers(arguments.device, only, tick)
                for p in points:
                    race(p, arguments.rounds, only, with_memory, tick, rows, limit=LIMIT, excluded=excluded)
    except KeyboardInterrupt:
        ended = "interrupted"
    except measure.DeviceLost as error:
        ended = f"the device is lost ({error})"
    title = f"{arguments.loss}, D = {arguments.d}, {arguments.dtype}, {arguments.device}"
    found = {"environment": before, "command": arguments.command_line, "interrupted": bool(ended)}
    found |= {"rows": rows, "claims": claims, "seconds": samples}
    if arguments.json:
        tables.print_json(found)
    elif claims:
        show_claims(claims)
    elif rows:
        show_rows(title, rows)
    if ended:
        print(f"{ended}: this is what was measured until then", file=sys.stderr)
    if arguments.out and (rows or claims):
        folder = Path(arguments.out)
        folder.mkdir(parents=True, exist_ok=True)
        results.write_json(folder / f"{arguments.name}.json", found)
        if rows:
            results.write_csv(folder / f"{arguments.name}.csv", rows, before)
            try:
                results.plot(folder / f"{arguments.name}.png", rows, title)
            except ImportError:
                print("no plot without matplotlib: pip install 'fusedloss[bench]'", file=sys.stderr)
    if ended:
        return 130 if ended == "interrupted" else 1
    own_failed = any(row["racer"] == "fusedloss" and row.get("note", "").startswith("failed") for row in rows)
    return int(own_failed or any(c["held"] is False for c in claims))
