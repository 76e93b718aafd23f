"""What a loss across ranks costs each of them, from 1 to 1024: memory and time, modelled. Writes docs/scaling.md.

    python benchmarks/scaling.py              # the tables between markers and docs/scaling.png
    python benchmarks/scaling.py --check      # only says whether they are up to date
    python benchmarks/scaling.py --measure    # two gloo processes on this machine beside the model, a minute

No GPU has run the kernels across ranks. Rates are stated peaks times an efficiency that others have published for this
kind of work; each assumption is a named constant below, with its source.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

from fusedloss.core.waves import wave_rows
from fusedloss.sweep.chunks import CPU_BYTES, CPU_ROWS, CUDA_BYTES, CUDA_LEAST_ROWS, CUDA_ROWS, CUDA_SHARE, MIN_ROWS

ROOT = Path(__file__).parents[1]
PAGE, PLOT = ROOT / "docs" / "scaling.md", ROOT / "docs" / "scaling.png"
MEASURED = ROOT / "benchmarks" / "results" / "scaling.json"
RACE = ROOT / "benchmarks" / "results" / "race.json"
GIB = 2**30

# Assumptions ----------------------------------------------------------------------------------------------------------

DENSE_BF16 = 989.4e12  # FLOP/s, H100 SXM and H200: NVIDIA's data sheets, without sparsity
EFFICIENCY = 0.41  # Liger-Kernel's fused linear cross-entropy at D = 1024 on an H200: 406 TFLOP/s (its PR #1334)
HBM = {"H100": 3.35e12, "H200": 4.8e12}  # bytes/s, data sheets
CARD = {"H100": 80 * GIB, "H200": 141 * GIB}
MULTIPROCESSORS = 132
NODE = 8  # GPUs that NVLink joins
NVLINK = 450e9  # bytes/s of a GPU each way: 900 both ways, data sheets
INFINIBAND = 400e9 / 8  # bytes/s of a GPU's own adapter each way: ConnectX-7, 400 Gb/s
PROTOCOL = 0.82  # of NVLink's rate is what NCCL gets, 370 GB/s (nccl-tests issue 212); taken for InfiniBand as well
HOP = 10e-6  # seconds that a message needs beside its bytes: a guess
STATISTICS = 4  # bytes: sums and accumulators are fp32

# The model, per rank --------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A loss of `columns` rows in all, as many columns, on `world` ranks."""

    columns: int
    world: int
    dim: int = 1024
    itemsize: int = 2  # bytes of an embedding's element
    symmetric: bool = False  # CLIP

    @property
    def rows(self) -> int:
        return -(-self.columns // self.world)


class Machine(NamedTuple):
    """What a rank has."""

    rate: float  # FLOP/s of the loss's products
    bandwidth: float  # bytes/s of its memory
    within: float  # bytes/s each way, to another rank of its node
    adapter: float  # bytes/s each way, of its own adapter to other nodes
    node: int  # ranks of one
    chunk: Callable[[int, int, int, int], int]  # rows, columns, dim, itemsize: rows of the workspace


def gpu_chunk(card: int) -> Callable[[int, int, int, int], int]:
    """`sweep.chunks.chunk_rows` of a card."""

    def chunk(rows: int, columns: int, dim: int, itemsize: int) -> int:
        row = columns * itemsize
        budget = max(CUDA_BYTES, min(CUDA_LEAST_ROWS * row, card // CUDA_SHARE))
        return wave_rows(rows, dim, min(CUDA_ROWS, budget // row), MULTIPROCESSORS)

    return chunk


def cpu_chunk(rows: int, columns: int, dim: int, itemsize: int) -> int:
    most = min(CPU_ROWS, CPU_BYTES // (columns * STATISTICS))
    return min(max(MIN_ROWS, most // MIN_ROWS * MIN_ROWS), rows)


def gpu(name: str = "H100") -> Machine:
    rate = DENSE_BF16 * EFFICIENCY
    return Machine(rate, HBM[name], NVLINK * PROTOCOL, INFINIBAND * PROTOCOL, NODE, gpu_chunk(CARD[name]))


class Memory(NamedTuple):
    """Bytes at the peak of a step of the loss, all that it holds of embeddings and their gradients."""

    own: float  # this rank's embeddings of both sides, and the gradient of its rows
    columns: float  # of all ranks (gather) or of shards on their way (ring), and their gradients
    workspace: float

    @property
    def total(self) -> float:
        return sum(self)


def memory(place: Place, machine: Machine, strategy: str) -> Memory:
    m, n, d, e = place.rows, place.columns, place.dim, place.itemsize
    own = 3 * m * d * e
    narrowed = e if e < STATISTICS else 0  # a gradient in the embeddings' dtype, beside its fp32 sums
    if strategy == "ring" and place.world > 1:
        # Keys here and the next ones; dy of this shard, what arrives and what leaves; dx's sums.
        shards = 2 * e + 3 * STATISTICS + STATISTICS
        return Memory(own, shards * m * d, machine.chunk(m, m, d, e) * m * e)
    gathered = e if place.world > 1 else 0
    while_sweeping = (gathered + STATISTICS) * n * d, machine.chunk(m, n, d, e) * n * e
    when_swept = (gathered + STATISTICS + narrowed) * n * d, 0
    phases = [while_sweeping, when_swept]
    if place.world > 1:  # the gradient, its copy in the order of ranks and in fp32, and what comes back of it
        phases.append(((gathered + e + STATISTICS) * n * d + STATISTICS * m * d, 0))
    return Memory(own, *max(phases, key=sum))


class Seconds(NamedTuple):
    """Of a step of the loss: its products, reading and writing memory beside them, and waiting for links."""

    products: float
    traffic: float
    links: float

    @property
    def total(self) -> float:
        return sum(self)


def seconds(place: Place, machine: Machine, strategy: str) -> Seconds:
    m, n, d, e = place.rows, place.columns, place.dim, place.itemsize
    product = 2 * m * n * d / machine.rate
    if strategy == "gather" or place.world == 1:
        products = 4 if place.symmetric else 3
        chunks = math.ceil(m / machine.chunk(m, n, d, e))
        traffic = 2 * STATISTICS * n * d * chunks  # dy's sums are read and written by each chunk
        if place.world > 1:
            # Columns are put into a rank's own order, gradients back, widened.
            traffic += (2 * e + e + STATISTICS) * n * d
        links = sum(collective(n * d * size, place.world, machine) for size in (e, STATISTICS))
        return Seconds(products * product, traffic / machine.bandwidth, links)
    # Twice around: sums of rows; then gradients, where dy's sums travel with their columns. While a shard is worked on,
    # the next is on its way: what the link needs beyond that is waiting.
    chunks = math.ceil(m / machine.chunk(m, m, d, e))
    accumulation = 2 * STATISTICS * m * d * (chunks + 1) / machine.bandwidth  # + 1: what arrives is added
    link = machine.within if place.world <= machine.node else machine.adapter
    first, second = product / place.world, 3 * product / place.world + accumulation
    waits = max(0.0, m * d * e / link + HOP - first) + max(0.0, m * d * (e + STATISTICS) / link + HOP - second)
    return Seconds(4 * product, accumulation * place.world, waits * place.world)


def collective(size: float, world: int, machine: Machine) -> float:
    """An all-gather of `size` bytes in all, or a reduce-scatter: the slower of a rank's links and its node's adapters.

    NCCL spreads what enters a node over the adapters of all its GPUs; NVLink hands it on meanwhile.
    """
    if world == 1:
        return 0.0
    inside = size * (world - 1) / world / machine.within
    across = size * max(0, world - machine.node) / world / (machine.node * machine.adapter)
    return max(inside, across) + HOP * (world - 1)


# What is written ------------------------------------------------------------------------------------------------------

BATCHES, WORLDS = (2**16, 2**20, 2**22, 2**24), (1, 8, 64, 256, 1024)
STRATEGIES = ("gather", "ring")


def assumptions() -> str:
    peak, of_memory = f"{DENSE_BF16 / 1e12:.1f} TFLOP/s", f"{HBM['H100'] / 1e12:.2f} TB/s, 80 GiB"
    measured_by_others = "what Liger-Kernel's fused linear cross-entropy reaches at D = 1024 on an H200 (its PR #1334)"
    nccl = "[nccl-tests #212](https://github.com/NVIDIA/nccl-tests/issues/212)"
    rows = [
        ["products", f"{peak} x {EFFICIENCY}", f"H100 SXM's data sheet, dense bf16, times {measured_by_others}"],
        ["memory", of_memory, f"its data sheet; H200: {HBM['H200'] / 1e12:.1f} TB/s, 141 GiB"],
        ["NVLink", f"{NVLINK / 1e9:.0f} GB/s each way x {PROTOCOL}", f"its data sheet, times what NCCL gets, {nccl}"],
        ["InfiniBand", f"{INFINIBAND / 1e9:.0f} GB/s each way x {PROTOCOL}", "400 Gb/s a GPU; the share is NVLink's"],
        ["a message", f"{HOP * 1e6:.0f} us", "a guess"],
        ["work", "gather 6 m N D, ring 8 m N D", "the kernels' design; 2 of the 8 are the first time around"],
        ["dy's sums", "read and written once a chunk", "rows of a chunk as `fusedloss.sweep` picks them"],
    ]
    return tabulate(rows, ["", "assumed", "source"], tablefmt="github", disable_numparse=True)


def costs() -> str:
    machine, table = gpu(), []
    for columns in BATCHES:
        for world in WORLDS:
            place = Place(columns, world)
            held = {s: memory(place, machine, s).total for s in STRATEGIES}
            spent = {s: seconds(place, machine, s) for s in STRATEGIES}
            cells = [f"2^{columns.bit_length() - 1}", str(world), str(place.rows)]
            cells += [
                f"{size / GIB:.3g}" if size <= CARD["H100"] else f"**{size / GIB:.0f}**" for size in held.values()
            ]
            cells += [f"{figure(spent[s].total)} ({figure(spent[s].links)})" for s in STRATEGIES]
            table.append(cells)
    headers = ["global batch", "ranks", "rows a rank", "gather, GiB", "ring, GiB", "gather, s", "ring, s"]
    return tabulate(table, headers, tablefmt="github", disable_numparse=True)


def figure(value: float) -> str:
    """Two digits, without an exponent."""
    return f"{value:.0f}" if value >= 10 or value == 0 else f"{value:.{1 - math.floor(math.log10(value))}f}"


def limits() -> str:
    table = []
    for name, card in CARD.items():
        for share in (1, 2, 4):
            most = [largest(strategy, card / share, gpu(name), 1024) for strategy in STRATEGIES]
            cells = [f"{most[0] / 1e6:.1f} million", f"{most[1] / 1e6:.0f} million", str(most[1] // 1024)]
            table.append([name, f"{card / share / GIB:.3g} GiB", *cells])
    headers = ["", "for the loss", "gather", "ring", "its rows a rank"]
    return tabulate(table, headers, tablefmt="github", disable_numparse=True)


def largest(strategy: str, room: float, machine: Machine, world: int) -> int:
    """The largest global batch, of as many rows on every rank, whose loss fits into `room`."""
    low, high = 0, 2**24  # rows of a rank
    while high - low > 1:
        middle = (low + high) // 2
        fits = memory(Place(middle * world, world), machine, strategy).total <= room
        low, high = (middle, high) if fits else (low, middle)
    return low * world


def hidden(world: int) -> int:
    """Rows a rank from which the ring waits for no link."""
    return next(m for m in range(64, 2**16, 64) if seconds(Place(m * world, world), gpu(), "ring").links == 0)


def verdict() -> str:
    machine, card = gpu(), CARD["H100"]
    whole, quarter = (largest("gather", card / share, machine, 1024) / 1e6 for share in (1, 4))
    end, small = Place(2**24, 1024), Place(2**20, 1024)
    held = {s: memory(end, machine, s) for s in STRATEGIES}
    spent = {s: seconds(end, machine, s) for s in STRATEGIES}
    before = {s: seconds(small, machine, s).total for s in STRATEGIES}
    chunk = machine.chunk(end.rows, end.columns, end.dim, end.itemsize)
    bytes_of_number = held["gather"].columns / end.columns / end.dim
    return f"""\
* **Gather stops at a global batch of {whole:.1f} million on 80 GiB**, whatever the number of ranks: each of a \
column's {end.dim} numbers costs {bytes_of_number:.0f} bytes on every rank. With a quarter of the card for the loss \
and the rest for the model it stops at {quarter:.1f} million. **There the ring must begin.**
* At 2^24 on {end.world} ranks gather would need {held["gather"].total / GIB:.0f} GiB, the ring \
{held["ring"].total / GIB:.1f} GiB.
* The ring computes a fourth product. It is still the faster one at that size, {spent["ring"].total:.1f} s against \
{spent["gather"].total:.1f} s: gather's workspace has room for {chunk} rows of 2^24 columns, and for each such chunk \
it reads and writes all of dy's sums, {spent["gather"].traffic:.1f} s in all.
* The ring waits for no link from {hidden(8)} rows a rank on within a node, and from {hidden(1024)} across nodes, \
where all ranks wait for the one of each node that hands its shard to the next node, through its own adapter. With \
fewer rows gather is faster by far: {before["gather"]:.3f} s against {before["ring"]:.2f} s at 2^20 on \
{small.world} ranks.
* So: gather as long as it fits. Beyond that the ring, with {hidden(1024)} rows a rank or more."""


def on_a_cpu() -> str:
    """The rate of the committed race."""
    rows = json.loads(RACE.read_text())["rows"]
    row = max((r for r in rows if r["racer"] == "fusedloss" and "seconds" in r), key=lambda r: r["n"])
    rate = 6 * row["n"] ** 2 * row["d"] / row["seconds"]
    return f"""\
The one device that this project has measured is a CPU of two cores: {rate / 1e9:.0f} GFLOP/s of products at \
N = {row["n"]}, D = {row["d"]} ([race.json](../benchmarks/results/race.json)). A batch of 2^20 at D = 1024 would keep \
it busy for {6 * 2**40 * 1024 / rate / 3600:.1f} hours, and W of them for 1/W of that."""


def checked() -> str:
    """The model beside two processes of this machine; and the memory of four, which share its cores."""
    if not MEASURED.exists():
        return "**Not measured yet**; `python benchmarks/scaling.py --measure` does."
    found = json.loads(MEASURED.read_text())
    rate, bandwidth, link = (found[name] for name in ("rate", "bandwidth", "link"))
    machine, table = Machine(rate, bandwidth, link, link, NODE, cpu_chunk), []
    for row in found["rows"] + found["more"]:
        place = Place(row["columns"], row["world"], row["dim"], 4, row["loss"] == "clip")
        given = 2 * place.rows * place.dim * place.itemsize
        held, spent = memory(place, machine, row["strategy"]), seconds(place, machine, row["strategy"])
        cells = [row["loss"], row["strategy"], str(row["world"])]
        cells += [f"{row['bytes'] / 2**20:.0f}", f"{(held.total - given) / 2**20:.0f}"]
        timed = [f"{row['seconds']:.2f}", f"{spent.total:.2f}"] if row in found["rows"] else ["", ""]
        table.append(cells + timed)
    headers = ["", "", "processes", "MiB above the embeddings", "model", "s", "model"]
    text = tabulate(table, headers, tablefmt="github", disable_numparse=True)
    row = found["rows"][0]
    return f"""\
Processes of one thread on gloo and {found["environment"]["cpu"]}, a batch of \
{row["columns"]} x {row["dim"]} in fp32. The model was given what each process measures beside the other: \
{rate / 1e9:.0f} GFLOP/s of the loss without group=, {bandwidth / 1e9:.1f} GB/s of memory, {link / 1e9:.2f} GB/s of an \
all-gather. It does not know of gloo's own buffers, and other work on the machine moves the times.

{text}"""


TABLES = (verdict, costs, limits, assumptions, on_a_cpu, checked)  # in the page's order


def written(text: str) -> str:
    for table in TABLES:
        start, end = f"<!-- {table.__name__}:start -->", f"<!-- {table.__name__}:end -->"
        before, rest = text.split(start)
        text = before + start + "\n" + table() + "\n" + end + rest.split(end)[1]
    return text


def plot(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    machine, worlds = gpu(), [2**i for i in range(11)]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    figure.suptitle("The loss on one of several H100s, D = 1024, bf16: modelled, not measured")
    for number, columns in enumerate(BATCHES):
        for strategy, style in zip(STRATEGIES, ("-", "--"), strict=True):
            places = [Place(columns, world) for world in worlds if world > 1 or strategy == "gather"]
            label = f"2^{columns.bit_length() - 1} rows, {strategy}"
            values = [
                [memory(p, machine, strategy).total / GIB for p in places],
                [seconds(p, machine, strategy).total for p in places],
            ]
            for axis, line in zip(axes, values, strict=True):
                axis.plot([p.world for p in places], line, style, color=f"C{number}", marker=".", label=label)
    axes[0].axhline(CARD["H100"] / GIB, color="black", linestyle=":", linewidth=1)
    axes[0].text(1, CARD["H100"] / GIB * 1.1, "80 GiB", fontsize="small")
    for axis, label in zip(axes, ("memory of a rank (GiB)", "time of a step of the loss (s)"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="ranks (GPUs, nodes of 8)", ylabel=label)
        axis.set_xticks(worlds, [str(world) for world in worlds])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


# Two processes of this machine ----------------------------------------------------------------------------------------


def on_a_rank(rank: int, world: int, folder: str, columns: int, dim: int) -> None:
    import torch
    import torch.distributed as dist

    import fusedloss
    from fusedloss.bench.measure import peak_memory
    from fusedloss.distributed import STRATEGIES as KNOWN

    torch.set_num_threads(1)
    # glibc keeps freed blocks of up to 32 MiB to itself, which hides what is alive: here they go back at once.
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-3, 1 << 16)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    losses: dict[str, Callable] = {
        "info_nce": lambda q, k, **ranks: fusedloss.info_nce(q, k, normalize=True, **ranks),
        "clip": lambda q, k, **ranks: fusedloss.clip(q, k, 20.0, normalize=True, **ranks),
    }

    def step(loss: str, rows: int, **ranks: object) -> Callable[[], None]:
        query, key = (torch.randn(rows, dim, requires_grad=True) for _ in range(2))

        def run() -> None:
            query.grad = key.grad = None
            losses[loss](query, key, **ranks).backward()

        return run

    def timed(call: Callable[[], object]) -> float:
        dist.barrier()
        start = time.perf_counter()
        call()
        dist.barrier()
        return time.perf_counter() - start

    rows = columns // world
    step("info_nce", 256, group=dist.group.WORLD)()
    found: list[dict] = []
    for loss in losses:
        for strategy in (s for s in STRATEGIES if s in KNOWN):
            run = step(loss, rows, group=dist.group.WORLD, strategy=strategy)
            dist.barrier()
            held = peak_memory(run)
            row = {"loss": loss, "strategy": strategy, "world": world, "columns": columns, "dim": dim, "bytes": held}
            found.append(row | {"seconds": min(timed(run) for _ in range(3))})
    alone = step("info_nce", rows)
    rate = 6 * rows**2 * dim / min(timed(alone) for _ in range(3))
    x, y = torch.randn(2, columns, dim)
    bandwidth = 2 * x.nbytes / min(timed(lambda: y.copy_(x)) for _ in range(3))
    mine, parts = x.chunk(world)[rank], list(y.chunk(world))
    link = x.nbytes * (world - 1) / world / min(timed(lambda: dist.all_gather(parts, mine)) for _ in range(3))
    if rank == 0:
        result = {"rate": rate, "bandwidth": bandwidth, "link": link, "rows": found}
        Path(folder, "found.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def measure(columns: int = 16384, dim: int = 1024) -> None:
    import torch.multiprocessing

    from fusedloss.bench.results import environment, write_json

    found = {}
    for world in (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(on_a_rank, (world, folder, columns, dim), nprocs=world)
            found[world] = json.loads(Path(folder, "found.json").read_text())
    write_json(MEASURED, {"environment": environment(__file__), **found[2], "more": found[4]["rows"]})


def main(arguments: Iterable[str]) -> int:
    if "--measure" in arguments:
        measure()
    text = PAGE.read_text()
    if "--check" in arguments:
        if written(text) != text:
            print("docs/scaling.md is out of date: run python benchmarks/scaling.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(written(text))
    plot(PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
