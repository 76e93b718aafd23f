"""Small batches, few elements, short lists: every loss and every drop-in beside what it replaces, in one run.

    python benchmarks/small.py --json benchmarks/results/small.json
    python benchmarks/small.py --losses info_nce,clip --sizes 16,64 --threads 1       # to the terminal
    python benchmarks/small.py --losses drop-in --sizes 16,64,256 --seconds 300
    python benchmarks/small.py --compile --threads 1 --seconds 600 --json benchmarks/results/small.json
    python benchmarks/small.py --host --json benchmarks/results/small_host.json       # the host's part on a GPU

A step is forward and backward. Racers take turns; a sample is as many steps in a row as last 3 ms, a ratio the median
of the rounds' own ratios. Racers are `fusedloss`, `eager` (the formula as users write it) and the library's class; with
--compile also torch.compile of eager, at one size of each family (20 to 60 s a loss on two cores). Sweeps, rows and
pairs have N rows (D = 384), lists Q x n scores, elements their number. What the file already holds for the same code,
device and versions is not measured again; a run that ends early, by Ctrl-C or --seconds, keeps what it has.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import small_cases
import torch
from readme_table import small_cell
from small_cases import CASES, Case, Race

from fusedloss.bench import results, tables
from fusedloss.sweep import admission, chunks, gradients

SIZES: dict[str, Sequence[Any]] = {
    **dict.fromkeys(("sweep", "rows", "pairs", "drop-in"), small_cases.ROWS),
    **dict.fromkeys(("lists", "drop-in lists"), small_cases.LISTS),
    "elements": small_cases.ELEMENTS,
}
COMPILED = (64, (16, 32), 1 << 16)  # one of each family: a size of a loss takes half a minute to compile
MOST = {"drop-in": 1.05, "drop-in lists": 1.05, "elements": 1.05}  # the largest ratio that holds; of others 1.10
FEW, MOST_EXTRA = 1 << 16, 10.0  # of fewer elements the difference counts, in us
HOST_SIZES = (64, 1024)
MOST_ON_HOST = {"info_nce": 150.0, "clip": 200.0}  # us
PRODUCTS: list[Any] = []  # torch forgets an implementation with its library
SLOW = 1.0  # seconds: some libraries hold [N, N, D]
SAMPLE = 3e-3  # seconds
SAME = ("source", "device", "torch")  # of the environment: where they differ, so do the figures
Step = Callable[[], None]


def words(size: Any) -> str:
    return "x".join(map(str, size)) if isinstance(size, tuple) else str(size)


def step(function: Callable[..., Any], race: Race, racer: str) -> Step:
    leaves = [x.detach().clone().requires_grad_() for x in race.leaves]
    cleared = [*leaves, *race.parameters.get(racer, ())]

    def run() -> None:
        for leaf in cleared:
            leaf.grad = None
        value = function(*leaves)
        if value.requires_grad:  # else it ran backward itself
            value.backward()

    return run


def timed(steps: dict[str, Step], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of a step in each round, by racer; of a slow one of a single step.

    Before a sample its racer takes a step that is not timed: the first after another's pays for pages that the
    allocator had given to that one.
    """

    def seconds(run: Step, repeats: int) -> float:
        start = clock()
        for _ in range(repeats):
            run()
        return (clock() - start) / repeats

    samples: dict[str, list[float]] = {name: [] for name in steps}
    repeats = {}
    for name, run in steps.items():
        run()
        first = seconds(run, 1)
        repeats[name] = max(1, round(SAMPLE / (seconds(run, 3) if first < SAMPLE else first)))
        if first > SLOW and name not in ("fusedloss", "eager"):
            samples[name].append(first)
    names = [name for name in steps if not samples[name]]
    for number in range(rounds):
        for place in range(len(names)):
            name = names[(number + place) % len(names)]
            steps[name]()
            samples[name].append(seconds(steps[name], repeats[name]))
    return samples


def measured(name: str, case: Case, size: Any, threads: int, rounds: int, compiled: bool) -> dict[str, Any]:
    """A row: medians in us, ratios to the fastest of what is replaced and to eager, whether the bound holds."""
    row: dict[str, Any] = {"loss": name, "family": case.family, "size": words(size), "threads": threads}
    if not isinstance(size, tuple) and size > case.most:
        return row | {"note": f"what is replaced does not fit beyond N = {case.most}"}
    torch.set_num_threads(threads)
    race = case.at(size)
    racers = dict(race.racers)
    if compiled and "eager" in racers and size in COMPILED:
        torch._dynamo.reset()  # a code object is compiled for eight sizes at most
        racers["torch.compile"] = torch.compile(racers["eager"], dynamic=False)
    steps = {racer: step(function, race, racer) for racer, function in racers.items()}
    if "torch.compile" in steps:
        try:
            steps["torch.compile"]()
        except Exception as error:
            row["note"] = f"torch.compile: {type(error).__name__}: {error}".splitlines()[0][:160]
            del steps["torch.compile"]
    # Of one thread the processor's time counts, which other processes lengthen less than the wall's.
    samples = timed(steps, rounds, time.process_time if threads == 1 else time.perf_counter)
    us = {racer: round(1e6 * statistics.median(taken), 2) for racer, taken in samples.items()}
    once = lambda racer: len(samples[racer]) == 1  # of a slow one
    theirs = lambda racer: samples[racer] * rounds if once(racer) and rounds > 1 else samples[racer]
    ratio_to = lambda racer: statistics.median(a / b for a, b in zip(samples["fusedloss"], theirs(racer), strict=True))
    replaced = [racer for racer in us if racer not in ("fusedloss", "torch.compile")]
    against = max(replaced, key=ratio_to)
    ratios = {racer: round(ratio_to(racer), 3) for racer in us if racer != "fusedloss"}
    row |= {"us": us, "ratios": ratios, "against": against, "ratio": ratios[against]}
    if case.family == "elements" and size < FEW:
        extra = round(us["fusedloss"] - us[against], 2)
        return row | {"extra_us": extra, "held": extra <= MOST_EXTRA}
    return row | {"held": row["ratio"] <= MOST.get(case.family, 1.10)}


# The host's part of a step on a GPU ----------------------------------------------------------------------------------


def without_a_gpu() -> list[None]:
    """Triton gets a driver whose launches do nothing, tensors stay a CPU's, products are left out: what a step then
    takes is the host's part of it. Returns a list that grows with each launch."""
    import overhead
    from triton import knobs

    launched: list[None] = []
    overhead.NoDevice.Launcher.__call__ = lambda self, *arguments: launched.append(None)
    knobs.cache.dir = str(Path(__file__).parents[1] / "build" / "launch" / "front")  # not that of real kernels
    front_end_only()
    overhead.without_a_gpu(extension=False)
    os.environ["FUSEDLOSS_BACKEND"] = "triton"
    for module in (admission, chunks, gradients):  # on a CPU they fill it with zeros
        module.fresh = lambda like, shape, dtype=None: like.new_empty(shape, dtype=dtype)
    small_cases.D, small_cases.DIMS, small_cases.CLASSES = 16, (16, 8), 64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels of torch are replaced
        products = torch.library.Library("aten", "IMPL")
        products.impl("mm", lambda x, y: x.new_empty(x.shape[0], y.shape[1]), "CPU")
        products.impl("addmm", lambda total, x, y, beta=1, alpha=1: x.new_empty(x.shape[0], y.shape[1]), "CPU")
        products.impl("mm.out", lambda x, y, out: out, "CPU")
        products.impl("addmm.out", lambda total, x, y, beta=1, alpha=1, out=None: out, "CPU")
        products.impl("addmm_", lambda total, x, y, beta=1, alpha=1: total, "CPU")
    PRODUCTS.append(products)
    return launched


def on_the_host(name: str, case: Case, size: int, rounds: int, launched: list[None]) -> dict[str, Any]:
    """A row: us of ours, and of eager, whose operators do not depend on N: a CPU computes them, at few rows."""
    race, few = case.at(size), case.at(min(size, HOST_SIZES[0]))
    steps = {
        "fusedloss": step(race.racers["fusedloss"], race, "fusedloss"),
        "eager": step(few.racers["eager"], few, "eager"),
    }
    row: dict[str, Any] = {"loss": name, "family": "host", "size": words(size), "threads": 1}
    try:
        steps["fusedloss"]()  # compiles
        launched.clear()
        steps["fusedloss"]()
        row["launches"] = len(launched)
        if not launched:
            return row | {"note": "it has no kernel"}
        samples = timed(steps, rounds, time.process_time)
    except IndexError:
        return row | {"note": "torch takes rows by numbers that no kernel wrote"}
    us = {racer: round(1e6 * statistics.median(taken), 2) for racer, taken in samples.items()}
    ratio = statistics.median(a / b for a, b in zip(samples["fusedloss"], samples["eager"], strict=True))
    row |= {"us": us, "ratios": {"eager": round(ratio, 3)}, "against": "eager", "ratio": round(ratio, 3)}
    return row | {"held": us["fusedloss"] <= MOST_ON_HOST[name] if name in MOST_ON_HOST else None}


def front_end_only() -> None:
    """tests/launch/device.py's: nothing runs the kernels, so that Triton may stop before LLVM."""
    path = Path(__file__).parents[1] / "tests" / "launch" / "device.py"
    spec = importlib.util.spec_from_file_location("launch_device", path)
    assert spec is not None and spec.loader is not None
    device = importlib.util.module_from_spec(spec)
    sys.modules["launch_device"] = device
    spec.loader.exec_module(device)
    device.front_end_only()


def key(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["loss"], row["size"], row["threads"]


class Store:
    """The rows, and the file that they are kept in."""

    def __init__(self, path: Path | None):
        self.path, self.rows = path, {}
        self.environment = results.environment(__file__)
        if path is not None and path.exists():
            before = json.loads(path.read_text())
            if all(before["environment"][name] == self.environment[name] for name in SAME):
                self.rows = {key(row): row for row in before["rows"]}

    def knows(self, name: str, size: Any, threads: int, compiled: bool) -> bool:
        row = self.rows.get((name, words(size), threads))
        if row is None or not compiled or "us" not in row or size not in COMPILED or "eager" not in row["us"]:
            return row is not None
        return "torch.compile" in row["us"] or "torch.compile" in row.get("note", "")

    def keep(self, row: dict[str, Any], rounds: int) -> None:
        self.rows[key(row)] = row
        self.write(rounds)

    def write(self, rounds: int) -> None:
        if self.path is None:
            return
        order = {name: place for place, name in enumerate(CASES)}
        sizes = {name: place for family in SIZES.values() for place, name in enumerate(map(words, family))}
        place = lambda row: (row["threads"], order.get(row["loss"], len(order)), sizes.get(row["size"], 0))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = {"environment": self.environment, "rounds": rounds, "left_out": small_cases.LEFT_OUT}
        results.write_json(self.path, found | {"rows": sorted(self.rows.values(), key=place)})


def chosen(wanted: Sequence[str] | None) -> dict[str, Case]:
    """By name, by the name before a comma, by family, or by the name of a library or of a class."""
    if wanted is None:
        return CASES

    def named(name: str, case: Case) -> set[str]:
        parts = {name, name.partition(", ")[0], name.partition(".")[0], name.rpartition(".")[2]}
        return parts | {case.family, case.family.partition(" ")[0]}

    unknown = [w for w in wanted if not any(w in named(name, case) for name, case in CASES.items())]
    if unknown:
        raise ValueError(f"--losses: no loss or family {', '.join(unknown)}; there are {'; '.join(CASES)}")
    return {name: case for name, case in CASES.items() if named(name, case) & set(wanted)}


def size_of(text: str) -> Any:
    parts = tuple(map(int, text.split("x")))
    return parts if len(parts) > 1 else parts[0]


def sizes_of(case: Case, wanted: Sequence[Any] | None) -> list[Any]:
    """Those of the family; `wanted` may hold some that it lacks, as few elements or lists of another length."""
    if wanted is None:
        return list(SIZES[case.family])
    lists = isinstance(SIZES[case.family][0], tuple)
    return [size for size in wanted if isinstance(size, tuple) == lists]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A table for each family and number of threads, the worst ratio first; ** marks what misses its bound."""
    groups: dict[tuple[str, int], dict[str, list[dict]]] = {}
    for row in rows:
        groups.setdefault((row["family"], row["threads"]), {}).setdefault(row["loss"], []).append(row)
    for (family, threads), losses in groups.items():
        columns = list(dict.fromkeys(row["size"] for found in losses.values() for row in found))
        worst = lambda found: max((row["ratio"] for row in found if "ratio" in row), default=0.0)
        lines = []
        for name, found in sorted(losses.items(), key=lambda item: -worst(item[1])):
            at = {row["size"]: row for row in found}
            lines.append([name, *(small_cell(at.get(size)) for size in columns)])
            if any("torch.compile" in row.get("ratios", {}) for row in found):
                ratios = [at[size].get("ratios", {}).get("torch.compile") if size in at else None for size in columns]
                lines.append(["  over torch.compile", *(f"{ratio:.2f}" if ratio else "" for ratio in ratios)])
        title = f"{family}, {threads} thread{'s' * (threads > 1)}: time over the fastest of what is replaced"
        if family == "host":
            title = "the host's part on a GPU"
        tables.table(title, ["loss", *columns], lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = lambda text: re.split(r",(?! )", text)
    parser.add_argument("--losses", type=several, help="names of losses or drop-ins, families, libraries: a,b")
    parser.add_argument("--sizes", type=lambda text: [size_of(part) for part in text.split(",")], help="16,64,4x8")
    parser.add_argument("--threads", type=lambda text: [*map(int, text.split(","))], default=[1, 2], help="1,2")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=math.inf, help="starts nothing after as many")
    parser.add_argument("--compile", action="store_true", help=f"also torch.compile, at {COMPILED}")
    parser.add_argument("--host", action="store_true", help="instead the host's part of a step on a GPU, without one")
    parser.add_argument("--json", "--out", dest="out", type=Path, help="the file that results are kept in")
    options = parser.parse_args(arguments)
    try:
        cases = chosen(options.losses)
    except ValueError as error:
        parser.error(str(error))
    store = Store(options.out)
    launched = without_a_gpu() if options.host else []
    if options.host:  # families that have N rows
        rows = {name: case for name, case in cases.items() if case.family in ("sweep", "rows", "pairs")}
        plan = [(name, case, size, 1) for name, case in rows.items() for size in options.sizes or HOST_SIZES]
    else:
        plan = [
            (name, case, size, threads)
            for name, case in cases.items()
            for threads in options.threads
            for size in sizes_of(case, options.sizes)
        ]
    todo = [at for at in plan if not store.knows(at[0], at[2], at[3], options.compile)]
    until, code, done = time.monotonic() + options.seconds, 0, 0
    warnings.filterwarnings("ignore", module="lightly|pytorch_metric_learning|sentence_transformers|torch")
    try:
        with tables.progress(len(todo)) as tick:
            for name, case, size, threads in todo:
                if time.monotonic() > until:
                    break
                tick(f"{name}, {words(size)}, {threads} thread{'s' * (threads > 1)}")
                if options.host:
                    row = on_the_host(name, case, size, options.rounds, launched)
                else:
                    row = measured(name, case, size, threads, options.rounds, options.compile)
                store.keep(row, options.rounds)
                done += 1
    except KeyboardInterrupt:
        code = 130
    store.write(options.rounds)
    asked = {(name, words(size), threads) for name, _, size, threads in plan}
    show([row for at, row in store.rows.items() if at in asked])
    if done < len(todo):
        print(f"{len(todo) - done} of {len(plan)} points were not measured; the same command goes on")
    return code


if __name__ == "__main__":
    sys.exit(main())
