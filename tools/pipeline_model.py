"""A model of the similarity kernels' pipeline: the share of the tensor cores' peak that a tile should reach, on paper.

    python tools/pipeline_model.py > docs/results/gpu-model.md

One multiprocessor walks tiles; all multiprocessors do the same. Four resources serve in the order of requests: the way
from L2 (bytes a clock, then a latency), the tensor cores, the schedulers' issue slots with the units for exponentials
beside them, and the way to memory for what is stored. A ring of stages lies between loads and products. The model knows
nothing of clocks that fall under load, of misses in L2 or of bank conflicts: a share is of the peak at the clock that
the device runs at, and an upper estimate of it.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fusedloss.backends.triton.config import Config, pick_config

# The inputs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """Rates are those of one multiprocessor, a clock. `SOURCES` says where they come from."""

    name: str
    capability: int
    multiprocessors: int
    fma: int  # multiply-adds of bf16 with fp32 sums
    store: float  # bytes to memory
    l2: float = 48.0  # bytes from L2
    latency: float = 700.0  # clocks of a load from L2 under load
    trip: float = 300.0  # clocks of one dependent access to L2 in a fold
    ex2: float = 16.0  # exponentials
    shared: float = 128.0  # bytes of shared memory
    ipc: float = 0.8  # instructions of a scheduler with several warps
    ipc_warp: float = 0.65  # of a scheduler with one


def device(name: str, capability: int, multiprocessors: int, tflops: float, ghz: float, tbs: float, **more: float):
    """From figures of a data sheet: dense bf16 TFLOP/s with fp32 sums, boost clock, TB/s of memory."""
    fma = 2 ** round(math.log2(tflops * 1e3 / (2 * multiprocessors * ghz)))
    return Device(name, capability, multiprocessors, fma, tbs * 1e3 / ghz / multiprocessors, **more)


DEVICES = {
    "a100": device("A100", 80, 108, 312, 1.41, 2.04, l2=47.4),
    "rtx4090": device("RTX 4090", 89, 128, 165.2, 2.52, 1.01),
    "l40s": device("L40S", 89, 142, 362, 2.52, 0.86),
    "h100": device("H100", 90, 132, 989, 1.83, 3.35),
    "h200": device("H200", 90, 132, 989, 1.83, 4.8),
    "b200": device("B200", 100, 148, 2250, 1.85, 8.0, l2=64.0),
}
SOURCES = (
    ("multiprocessors, bf16 FLOP/s, clock, memory", "NVIDIA's data sheets and white papers; the clock is the one at "
     "which the peak is stated. The multiply-adds a clock follow from them: 1024 (A100), 256 (RTX 4090, with fp32 "
     "sums), 512 (L40S), 2048 (H100, H200), 4096 (B200)"),
    ("16 exponentials and 128 bytes of shared memory a clock", "CUDA C++ programming guide, throughput of arithmetic "
     "instructions; FlashAttention-4 (arXiv 2603.05451) for B200"),
    ("L2 of an A100, 47.4 bytes a clock", "5120 bytes a clock for 108 multiprocessors, NVIDIA's A100 white paper"),
    ("L2 elsewhere, 48 bytes a clock; 64 on a B200", "**assumed**. Microbenchmarks of an H100 give 25 to 40, published "
     "products with this tile and no multicast need 35. The page shows 35 as well"),
    ("700 clocks of a load, 300 of a dependent access", "**assumed** under load; an idle L2 takes some 260"),
    ("0.65 and 0.8 instructions a clock of a scheduler with one warp and with several", "**assumed**"),
    ("instructions of a fold", "counted in the machine code: `tools/fold_counts.py`"),
    ("shared memory on sm_100", "**assumed**: loads do not compete with products for it"),
)  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """A persistent program. block_m x block_n is a tile: of all consumers together, or of each if they are `separate`.

    ahead: a producer loads the next tile's stages during a fold. Without one, they are loaded after it.
    lead: the steps by which the first of two consumers of one tile is ahead when they meet, once a tile.
    cluster: the programs, side by side along M, that share the loads of y.
    """

    block_m: int
    block_n: int
    stages: int
    instructions: float = 0.0  # of a fold, by thread and element
    ex2: float = 0.0  # by element
    stored: int = 0  # bytes of an element
    block_d: int = 64
    warps: int = 8  # of a consumer
    consumers: int = 1
    separate: bool = False
    ahead: bool = False
    lead: int = 0
    cluster: int = 1
    programs: int = 1  # at once on a multiprocessor
    trips: int = 2  # accesses to L2 that wait for each other, at the start of a fold
    itemsize: int = 2

    @property
    def rows(self) -> int:
        """Of a consumer's part."""
        return self.block_m if self.separate else self.block_m // self.consumers

    @property
    def stage_bytes(self) -> int:
        return (self.block_m + self.block_n) * self.block_d * self.itemsize

    @property
    def shared_bytes(self) -> int:
        return self.programs * self.stages * self.stage_bytes

    def product(self, device: Device) -> float:
        """Clocks of one consumer's products of one stage: the tensor cores', or those of shared memory if it has more.

        wgmma reads y once for 64 rows and x once, mma.sync each once for the 32 x 64 of a warp, tcgen05 y once for 128
        rows. What loads write counts as well, but on sm_100, where published products have no room for it.
        """
        high, wide = {8: (32, 64), 9: (64, self.block_n), 10: (128, self.block_n)}[device.capability // 10]
        x, y = self.rows * self.block_n / wide, self.block_n * self.rows / high
        written = (self.block_m + self.block_n) / (1 if self.separate else self.consumers)
        moved = (x + y + (written if device.capability < 100 else 0)) * self.block_d * self.itemsize
        return max(self.rows * self.block_n * self.block_d / self.fma(device), moved / device.shared)

    def fma(self, device: Device) -> float:
        return device.fma * 2 / self.itemsize

    def peak(self, device: Device, D: int) -> float:
        """Clocks of a tile's products at the tensor cores' peak."""
        return self.block_m * self.block_n * D / self.fma(device)


# The model ------------------------------------------------------------------------------------------------------------

Process = Generator["float | Gate", None, None]


class Events:
    """Processes yield the time at which they go on, or the gate that they wait for."""

    def __init__(self) -> None:
        self.now, self._queue, self._order = 0.0, [], itertools.count()  # type: ignore[var-annotated]

    def start(self, process: Process, at: float = 0.0) -> None:
        heapq.heappush(self._queue, (at, next(self._order), process))

    def run(self) -> None:
        while self._queue:
            self.now, _, process = heapq.heappop(self._queue)
            for asked in process:
                if isinstance(asked, Gate):
                    if asked.time is None:
                        asked.waiting.append(process)
                        break
                    asked = asked.time
                if asked > self.now:
                    self.start(process, asked)
                    break


@dataclass
class Gate:
    """Opens at a time that is known once all `parties` have said theirs."""

    events: Events
    parties: int = 1
    time: float | None = None
    waiting: list[Process] = field(default_factory=list)
    latest: float = 0.0

    def open(self, at: float) -> None:
        self.latest, self.parties = max(self.latest, at), self.parties - 1
        if self.parties == 0:
            self.time = self.latest
            for process in self.waiting:
                self.events.start(process, max(self.time, self.events.now))


class Server:
    """Serves amounts at a rate, in the order of requests."""

    def __init__(self, rate: float):
        self.rate, self.free = rate, 0.0

    def serve(self, now: float, amount: float) -> float:
        self.free = max(now, self.free) + amount / self.rate
        return self.free


QUANTUM = 64  # instructions of a fold after which another warp may be next


class _Program:
    """One block: its ring, its producer and its consumers. `ends` are the times at which its tiles were folded."""

    def __init__(self, kernel: Kernel, device: Device, D: int, tiles: int, events: Events, shared: _Shared):
        self.kernel, self.device, self.events, self.shared, self.tiles = kernel, device, events, shared, tiles
        self.steps = -(-D // kernel.block_d)
        users = 1 if kernel.separate else kernel.consumers
        gates = lambda count, parties: [Gate(events, parties) for _ in range(count)]
        self.full, self.empty = gates(tiles * self.steps, 1), gates(tiles * self.steps, users)
        self.met, self.folded = gates(tiles, 1), gates(tiles, users)
        events.start(self._produce())
        for number in range(kernel.consumers):
            events.start(self._consume(number))

    def _produce(self) -> Process:
        kernel, device = self.kernel, self.device
        size = (kernel.block_m + kernel.block_n / kernel.cluster) * kernel.block_d * kernel.itemsize
        for use in range(self.tiles * self.steps):
            tile = use // self.steps
            if not kernel.ahead and tile and use % self.steps == 0:
                yield self.folded[tile - 1]
            if use >= kernel.stages:
                yield self.empty[use - kernel.stages]
            self.full[use].open(self.shared.l2.serve(self.events.now, size) + device.latency)

    def _consume(self, number: int) -> Process:
        kernel, shared, events = self.kernel, self.shared, self.events
        clocks = kernel.product(self.device)
        mine = range(number, self.tiles, kernel.consumers) if kernel.separate else range(self.tiles)
        meets = kernel.lead > 0 and kernel.consumers > 1 and not kernel.separate
        meeting = min(self.steps, kernel.lead) - 1
        left = 0.0  # when the tile before was stored
        for tile in mine:
            if meets and number == 1:
                yield self.met[tile]
            before, held = 0.0, -1
            for step in range(self.steps):
                use = tile * self.steps + step
                yield self.full[use]
                done = shared.tensor.serve(events.now, clocks)
                if held >= 0:  # one product stays under way
                    yield before
                    self.empty[held].open(events.now)
                before, held = done, use
                if meets and number == 0 and step == meeting:
                    self.met[tile].open(events.now)
            yield before
            self.empty[held].open(events.now)
            yield max(left, events.now + kernel.trips * self.device.trip)
            elements = kernel.rows * kernel.block_n
            of_thread = kernel.instructions * elements / (32 * kernel.warps)
            parts = max(1, round(of_thread / QUANTUM))
            for _ in range(parts):
                some = of_thread / parts
                done = shared.issue.serve(events.now, some * kernel.warps / 4)
                done = max(done, shared.ex2.serve(events.now, elements * kernel.ex2 / parts))
                left = shared.store.serve(events.now, elements * kernel.stored / parts)
                yield max(done, events.now + some / self.device.ipc_warp)
            self.folded[tile].open(events.now)


class _Shared:
    """What the programs of a multiprocessor share."""

    def __init__(self, device: Device):
        self.l2, self.tensor, self.store = Server(device.l2), Server(1.0), Server(device.store)
        self.issue, self.ex2 = Server(device.ipc), Server(device.ex2)


def ends(kernel: Kernel, device: Device, D: int, tiles: int) -> list[float]:
    """Returns when tiles are folded, those of all programs of a multiprocessor in order."""
    events, shared = Events(), _Shared(device)
    programs = [_Program(kernel, device, D, tiles, events, shared) for _ in range(kernel.programs)]
    events.run()
    return sorted(gate.time for program in programs for gate in program.folded if gate.time is not None)


def enough(steps: int) -> int:
    """Tiles of a program after which it has settled, with as many before them: more where a tile has few steps."""
    return 2 * min(12, max(3, 60 // steps))


@functools.lru_cache(maxsize=4096)
def clocks(kernel: Kernel, device: Device, D: int) -> float:
    """Returns the clocks of a tile among many: neither of the first ones nor of the last."""
    tiles = enough(-(-D // kernel.block_d))
    times, some = _ends(kernel, device, D, 2 * tiles + 2), tiles * kernel.programs
    return (times[2 * some - 1] - times[some - 1]) / some


def share(kernel: Kernel, device: Device, D: int) -> float:
    """Returns the part of the tensor cores' peak that large M and N reach."""
    return kernel.peak(device, D) / clocks(kernel, device, D)


def bounds(kernel: Kernel, device: Device, D: int) -> dict[str, float]:
    """Returns the clocks of a tile that each resource alone would take: no tile takes less than the largest."""
    steps, elements = -(-D // kernel.block_d), kernel.block_m * kernel.block_n
    loaded = (kernel.block_m + kernel.block_n / kernel.cluster) * kernel.block_d * kernel.itemsize * steps
    instructions = kernel.instructions * elements / 128  # of a scheduler
    of_warp = kernel.instructions * kernel.rows * kernel.block_n / (32 * kernel.warps)
    return {
        "products": kernel.product(device) * (1 if kernel.separate else kernel.consumers) * steps,
        "L2": loaded / device.l2,
        "issue": instructions / device.ipc,
        "ex2": elements * kernel.ex2 / device.ex2,
        "store": elements * kernel.stored / device.store,
        "ring": steps * device.latency / kernel.stages / kernel.programs,
        "warps": of_warp / device.ipc_warp / (kernel.consumers if kernel.separate else 1) / kernel.programs,
    }


def launch(kernel: Kernel, device: Device, M: int, N: int, D: int) -> float:
    """Returns the clocks of all tiles of M x N: rounds of tiles, the last one with idle multiprocessors."""
    tiles = -(-M // kernel.block_m) * -(-N // kernel.block_n)
    at_once = device.multiprocessors * kernel.programs
    rounds = -(-tiles // at_once)
    known = min(rounds, enough(-(-D // kernel.block_d)))
    times = _ends(kernel, device, D, known)
    return times[-1] + (rounds - known) * clocks(kernel, device, D) * kernel.programs


@functools.lru_cache(maxsize=4096)
def _ends(kernel: Kernel, device: Device, D: int, tiles: int) -> list[float]:
    return ends(kernel, device, D, tiles)


# Instructions of a fold by thread and element, and exponentials by element: `tools/fold_counts.py`, 2026-11-30, with
# Triton 3.7.1 and nvcc 13.0.
COUNTS: dict[str, dict[str, tuple[float, float]]] = {
    "triton, sm_80": {
        "stats": (23.7, 1),
        "exp, columns": (29.2, 1),
        "exp": (25.4, 1),
        "grad": (23.8, 1),
        "stats, columns": (33.5, 2),
        "grad, columns": (28.5, 2),
        "grad, columns, q": (45.2, 2),
    },
    "triton, sm_90": {
        "stats": (10.8, 1),
        "exp, columns": (17.1, 1),
        "exp": (11.9, 1),
        "grad": (11.5, 1),
        "stats, columns": (25.4, 2),
        "grad, columns": (20.0, 2),
        "grad, columns, q": (28.3, 2),
    },
    "triton, sm_100": {
        "stats": (16.7, 1),
        "exp, columns": (42.2, 2),
        "exp": (30.0, 2),
        "grad": (20.0, 1),
        "stats, columns": (46.1, 2),
        "grad, columns": (27.3, 2),
        "grad, columns, q": (49.9, 2),
    },
    "cuda, sm_80": {
        "stats": (11.0, 1),
        "exp": (13.0, 1),
        "grad": (13.5, 1),
        "stats, columns": (25.2, 2),
        "grad, columns": (18.7, 2),
        "grad, columns, q": (25.4, 2),
    },
    "cuda, sm_90": {
        "stats": (9.9, 1),
        "exp": (9.9, 1),
        "grad": (9.9, 1),
        "stats, columns": (28.9, 2),
        "grad, columns": (14.6, 2),
        "grad, columns, q": (21.7, 2),
    },
}

# The kernels ----------------------------------------------------------------------------------------------------------

DIMS = (128, 256, 384, 768, 1024, 4096)
MODES = ("stats", "exp", "grad", "stats, columns", "grad, columns", "grad, columns, q")


def triton(device: Device, mode: str, config: Config) -> Kernel:
    """The kernel of Triton's backend for bf16. Raises LookupError for the library's products: not modelled."""
    if config.GEMM == "library":
        raise LookupError("the library multiplies")
    fold = _fold("triton", device, mode)
    sides = config.BLOCK_M, config.BLOCK_N, config.num_stages
    return Kernel(*sides, **fold, block_d=config.BLOCK_D, warps=config.num_warps, programs=config.programs)


def picked(device: Device, mode: str, M: int, N: int, D: int) -> Config:
    return pick_config(M, N, D, "bf16", divmod(device.capability, 10), mode)


def cuda(device: Device, mode: str) -> Kernel:
    """The kernel of csrc/ for bf16: `Sm90` of similarity_sm90.cuh, or similarity_sm80.cuh."""
    fold = _fold("cuda", device, mode)
    if device.capability != 90:
        return Kernel(128, 128, 3, **fold)
    # Vectors are fetched before the products: what a fold reads first is in the scratch.
    way = {"block_d": 32, "stages": 8, "lead": 6, "cluster": 2, "trips": 0}
    return Kernel(128, 256, **way, **fold, warps=4, consumers=2, ahead=True)


def _fold(backend: str, device: Device, mode: str) -> dict[str, Any]:
    capability = 80 if device.capability in (86, 89) else device.capability
    instructions, ex2 = COUNTS[f"{backend}, sm_{capability}"][mode]
    return {"instructions": instructions, "ex2": ex2, "stored": 0 if mode.startswith("stats") else 2}


# The rule of fusedloss/backends/triton/config.py ----------------------------------------------------------------------

GRID = tuple(itertools.product((512, 1024, 1536, 2048, 4096, 8192), (128, 384, 768, 1024)))  # M = N; D
RULED = ("h200", "a100", "l40s")  # B200's folds differ too much from tile to tile to be counted once


def candidates(device: Device, mode: str) -> list[Config]:
    """Tiles that fit, and whose folds were seen not to spill (docs/kernel-resources.md, docs/performance-notes.md)."""
    if device.capability == 90:
        large = [Config("descriptors", 128, 256, 64, num_stages=4)] if mode in ("stats", "exp", "grad") else []
        small = [Config("descriptors", 64, 64, 64, num_warps=4, num_stages=4, programs=n) for n in (1, 2, 3)]
        return [*large, Config("descriptors", 128, 128, 64, num_stages=4), *small]
    small = [Config("pointers", 64, 64, 64, num_warps=4, num_stages=4, programs=n) for n in (1, 2)]
    wide = [Config("pointers", 128, 128, 64)] if mode != "grad, columns, q" else []
    return [*wide, Config("pointers", 128, 64, 64), *small]


def excess(device: Device, mode: str, size: int, D: int) -> tuple[float, Config, Config]:
    """Returns by how much the rule's tile takes longer than the model's best, and both."""
    time = lambda config: launch(triton(device, mode, config), device, size, size, D)
    rule = picked(device, mode, size, size, D)
    best = min(candidates(device, mode), key=time)
    return time(rule) / time(best) - 1, rule, best


# The page -------------------------------------------------------------------------------------------------------------

SHOWN = ("stats", "exp", "grad", "stats, columns", "grad, columns", "grad, columns, q")
ROWS = [("triton", name) for name in ("a100", "l40s", "h200", "b200")] + [("cuda", n) for n in ("a100", "l40s", "h200")]
LOW_L2 = 35.0

HEAD = """# GPU model

What a model of the kernels' pipeline predicts: the share of the tensor cores' peak that the similarity product reaches
with its fold, in bf16, for many rows and columns. `python tools/pipeline_model.py` writes this page, and
`tests/bench/test_pipeline_model.py` holds it to the model. **No GPU has measured any of it.** The last column is for
the share at D = 768, once one has.

A share counts clocks: a GPU that lowers its clock under load loses seconds, and no share. The model is an upper
estimate. It knows the latency and bandwidth of L2, the ring of stages, the products, a fold's instructions and
exponentials, and the stores. It knows nothing of misses in L2, of bank conflicts or of the instruction cache.

"""


def page() -> str:
    return HEAD + "\n".join([*_inputs(), *_predictions(), *_published(), *_questions(), *_rule()]) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(map(str, line))} |".replace("|  |", "| |") for line in lines] + [""]


def percent(value: float) -> str:
    return f"{100 * value:.0f}"


def _inputs() -> list[str]:
    of = lambda d: (d.name, d.multiprocessors, d.fma, d.l2, f"{d.store:.0f}", f"{d.latency:.0f}", f"{d.ex2:.0f}")
    counts = [(way, *(f"{COUNTS[way][mode][0]:g}" for mode in SHOWN)) for way in COUNTS]
    return [
        "## Inputs",
        "",
        "By clock and multiprocessor:",
        "",
        *table(
            ("GPU", "multiprocessors", "multiply-adds", "bytes from L2", "bytes to memory", "latency", "exponentials"),
            map(of, DEVICES.values()),
        ),
        *table(("input", "source"), SOURCES),
        "Instructions of a fold, by thread and element, of a tile inside of the matrix that holds no target:",
        "",
        *table(("kernels", *SHOWN), counts),
    ]


def prediction(backend: str, name: str, mode: str) -> Sequence[str]:
    """A row: percent at `DIMS`, in brackets with less of L2."""
    device, cells = DEVICES[name], []
    for D in DIMS:
        try:
            kernel = (
                cuda(device, mode) if backend == "cuda" else triton(device, mode, picked(device, mode, 8448, 65536, D))
            )
            cells.append(
                f"{percent(share(kernel, device, D))} ({percent(share(kernel, replace(device, l2=LOW_L2), D))})"
            )
        except LookupError:
            cells.append("library")
    return (device.name, mode, *cells, "")


def _predictions() -> list[str]:
    lines = ["## Predictions", "", f"Percent of the peak, in brackets with {LOW_L2:.0f} bytes a clock from L2.", ""]
    for backend in ("triton", "cuda"):
        rows = [prediction(backend, name, mode) for way, name in ROWS if way == backend for mode in SHOWN]
        head = ("GPU", "mode", *(f"D = {D}" for D in DIMS), "measured at 768")
        lines += [f"### {backend}", "", *table(head, rows)]
    return lines


def _published() -> list[str]:
    """Kernels of others, of which both the tile and a share are public."""
    h200, b200 = DEVICES["h200"], DEVICES["b200"]
    gemm = Kernel(128, 256, 4, 2, stored=2, warps=4, consumers=2, ahead=True, cluster=2, trips=0)
    pairs = replace(gemm, separate=True, stages=6)
    lse = Kernel(128, 320, 3, 6, ex2=1, warps=4, consumers=2, ahead=True, cluster=2)
    fast, slow = (100 * share(replace(gemm, ahead=ahead), h200, 4096) for ahead in (True, False))
    ratio = share(lse, h200, 4096) / share(gemm, h200, 4096)
    deep = {256: 1067, 512: 1365, 1024: 1539, 2048: 1595}  # TFLOP/s by K
    found = {K: share(pairs, b200, K) for K in deep}
    more = [f"{100 * found[K] / found[2048] / (rate / deep[2048]) - 100:.0f}" for K, rate in deep.items()]
    rows = (
        (
            "logits of Liger's CuTe kernels on an H200, K = 4096, a cluster of two (linkedin/Liger-Kernel, 9d045718)",
            "tensor cores active 95.5 % of the time where loads cross a tile's border, 89.7 % before",
            f"{fast:.0f} and {slow:.0f} %",
            f"{fast - 95.5:.0f} and {slow - 89.7:.0f} points too high",
        ),
        (
            "Liger's kernel of log-sum-exps on sm_90, 128 x 320 x 64, K = 4096 (62b691b7)",
            "at least the rate of the logits' product",
            f"{ratio:.2f} of it",
            f"at least {100 - 100 * ratio:.0f} % too low",
        ),
        (
            "Liger's product on a B200 by pairs of blocks, M = 128256, N = 4096, K = 256, 512, 1024, 2048 (ce72ded9)",
            ", ".join(f"{rate}" for rate in deep.values()) + " TFLOP/s",
            ", ".join(percent(value) for value in found.values()) + " % of the peak",
            f"{', '.join(more)} % too high, both relative to K = 2048: what takes a fixed time is missing",
        ),
    )
    return [
        "## Against published figures",
        "",
        "Few kernels of others have both their tile and a share published. A fold of 2 instructions an element is "
        "assumed for a product that is only stored, 6 for one with a sum of exponentials. The model is too high where "
        "D is small: read its figures against each other rather than against a clock.",
        "",
        *table(("kernel", "published", "model", "misfit"), rows),
    ]


def _questions() -> list[str]:
    """What the model says of changes to csrc/'s sm_90a kernel."""
    device, dims = DEVICES["h200"], (256, 384, 768, 1024)
    low = replace(device, l2=LOW_L2)
    exp = cuda(device, "exp")
    own = replace(exp, block_m=64, block_d=64, stages=4, separate=True, lead=0)
    changes = {
        "as it is": exp,
        "without the cluster": replace(exp, cluster=1),
        "4 stages of 48 KiB, a lead of 2": replace(exp, block_d=64, stages=4, lead=2),
        "vectors that are fetched behind the products": replace(exp, trips=2),
        "a y tile a consumer": own,
        "row sums by a column of ones in dx's product": replace(exp, instructions=exp.instructions - 1.1),
        "row and column factor and scale in one product": replace(exp, instructions=exp.instructions - 2),
    }
    cells = lambda k: [f"{percent(share(k, device, D))} ({percent(share(k, low, D))})" for D in dims]
    return [
        "## Open questions of the sm_90a kernel",
        "",
        "`exp` on an H200, percent of the peak:",
        "",
        *table(("change", *(f"D = {D}" for D in dims)), [(name, *cells(kernel)) for name, kernel in changes.items()]),
    ]


def _rule() -> list[str]:
    rows = []
    for name in RULED:
        for mode in ("exp", "grad, columns"):
            for size, D in GRID:
                more, rule, best = excess(DEVICES[name], mode, size, D)
                if more > 0.05 and D == 768:
                    shape = lambda c: (
                        f"{c.BLOCK_M} x {c.BLOCK_N}" + (f", {c.programs} at once" if c.programs > 1 else "")
                    )
                    rows.append((DEVICES[name].name, mode, size, shape(rule), shape(best), f"{100 * more:.0f}"))
    return [
        "## The rule for tiles",
        "",
        "Where the tile of `pick_config` takes over 5 % longer than the model's best of those that fit, at D = 768 and "
        "M = N:",
        "",
        *table(("GPU", "mode", "M = N", "rule", "model's best", "longer, %"), rows),
    ]


if __name__ == "__main__":
    print(page(), end="")
