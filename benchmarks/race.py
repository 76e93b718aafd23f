"""The race over a grid of points.

    python benchmarks/race.py short    # what says most first; ends within --budget, 8 minutes, by itself
    python benchmarks/race.py full     # every point; a second call goes on where the first one ended

Results are written after every point, so that a run may be interrupted, or killed. The points run in a process of their
own: a racer that crashes it, or never comes back, is noted and the point is raced again without it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fusedloss.backends import KERNELS
from fusedloss.bench import race, results, tables
from fusedloss.bench.peers import Point

SIZES = {"cuda": (4096, 16384, 65536, 131072), "cpu": (512, 1024, 2048)}
DIMS = {"cuda": (384, 768, 1024, 4096), "cpu": (64, 256)}
PATIENCE = 300.0  # seconds without a word from the racing process after which a racer counts as hung
GRACE = 20.0  # after the budget: to end the step that runs, compare gradients, and write


class Entry(NamedTuple):
    point: Point
    field: str  # "all" racers, or fusedloss's "own" beside the floor

    @property
    def work(self) -> float:
        return float(self.point.n) ** 2 * self.point.d * (4 if self.point.loss == "clip" else 3)


def grid(device: str, dtype: str) -> list[Point]:
    """Every point: losses x N x D x scale 20 and 100 x random and clustered."""
    kind_of = torch.device(device).type
    corners = itertools.product(
        ("info_nce", "clip"), SIZES[kind_of], DIMS[kind_of], (0.05, 0.01), ("random", "clustered")
    )
    return [Point(loss, n, d, dtype, temperature, kind, device) for loss, n, d, temperature, kind in corners]


def by_worth(points: list[Point]) -> list[Point]:
    """The large batch at a common D first, then its neighbours in N and D, and harder inputs last."""
    sizes, dims = sorted({p.n for p in points}), sorted({p.d for p in points})
    home = (sizes[len(sizes) // 2], dims[len(dims) // 3])

    def distance(point: Point) -> tuple:
        off = abs(sizes.index(point.n) - sizes.index(home[0])) + abs(dims.index(point.d) - dims.index(home[1]))
        harder = (point.temperature != 0.05) + (point.kind != "random")
        return (off + 2 * harder, harder, point.n * point.d, point.loss != "info_nce")

    return sorted(points, key=distance)


def full(points: list[Point]) -> list[Entry]:
    return [Entry(p, "all") for p in by_worth(points)]


def short(points: list[Point]) -> list[Entry]:
    """Both losses against everyone at the best place, our own over the plain grid, then everyone as time allows."""
    ordered = by_worth(points)
    first, rest = ordered[:2], ordered[2:]
    plain = [p for p in rest if p.temperature == 0.05 and p.kind == "random"]
    own = sorted(plain, key=lambda p: Entry(p, "own").work)
    return [*(Entry(p, "all") for p in first), *(Entry(p, "own") for p in own), *(Entry(p, "all") for p in rest)]


PRESETS = {"short": short, "full": full}


# Time -----------------------------------------------------------------------------------------------------------------


def predicted(entry: Entry, history: list[tuple[Entry, float]]) -> float:
    """Seconds, from the nearest point that was raced with the same field: as long, or longer in proportion."""
    same = [(e, seconds) for e, seconds in history if e.field == entry.field]
    # Nothing of its kind was raced yet: it is tried.
    if not same:
        return 0.0
    nearest, seconds = min(same, key=lambda pair: abs(pair[0].work - entry.work))
    return seconds * max(1.0, entry.work / nearest.work)


def run(
    entries: Iterable[Entry],
    race_point: Callable[[Entry], list[dict]],
    keep: Callable[[Entry, list[dict], float], None],
    until: float,
    clock: Callable[[], float] = time.monotonic,
) -> list[Entry]:
    """Races the entries in order, each that is predicted to end in time; returns those left out."""
    history: list[tuple[Entry, float]] = []
    left_out = []
    for entry in entries:
        start = clock()
        if start + predicted(entry, history) > until or start >= until:
            left_out.append(entry)
            continue
        rows = race_point(entry)
        history.append((entry, clock() - start))
        keep(entry, rows, clock() - start)
    return left_out


# The process that races -----------------------------------------------------------------------------------------------


class Crash(Exception):
    """The racing process ended, or went silent, while it did `doing`; `rows` is what it had told until then."""

    def __init__(self, why: str, doing: str, rows: list[dict]):
        super().__init__(why)
        self.doing, self.rows = doing, rows


class Worker:
    def __init__(self, work: Callable[[Any], None] | None = None) -> None:
        self.work, self.process = work or _work, None

    def race(self, job: dict[str, Any], until: float, tick: tables.Tick) -> list[dict]:
        """The rows of `bench.race(**job)`."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=self.work, args=(theirs,))
            ignoring = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is this process's to handle
            self.process.start()
            signal.signal(signal.SIGINT, ignoring)
            theirs.close()
        self.connection.send((job, until))
        doing, rows = "start: floor", []
        while True:
            patience = max(1.0, min(PATIENCE, until + GRACE - time.monotonic()))
            if not self.connection.poll(patience):
                self.stop()
                late = time.monotonic() > until
                why = race.OUT_OF_TIME if late else f"failed: did not return within {patience:.0f} s"
                raise Crash(why, doing, rows)
            try:
                what, *about = self.connection.recv()
            except EOFError:
                self.process.join()
                why = f"failed: ended its process with exit code {self.process.exitcode}"
                self.stop()
                raise Crash(why, doing, rows) from None
            if what == "doing":
                doing, rows = about
                tick(doing, 0)
            elif what == "failed":
                self.stop()
                raise Crash(f"failed: {about[0]}", doing, about[1])
            else:
                return about[0]

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None


def _work(connection: Any) -> None:
    while True:
        try:
            job, until = connection.recv()
        except EOFError:
            return
        rows: list[dict] = []
        try:
            race.race(
                **job,
                rows=rows,
                until=until,
                tick=lambda text, rows=rows: connection.send(("doing", text, rows)),
            )
        except Exception as error:
            connection.send(("failed", f"{type(error).__name__}: {error}".splitlines()[0], rows))
            return
        connection.send(("done", rows))


def race_point(
    entry: Entry, worker: Worker, options: dict[str, Any], broken: dict[str, str], until: float, tick: Any
) -> list[dict]:
    """The rows of a point. Who ended the racing process is noted in `broken` for this point, and the others go on."""
    excluded = dict(broken)
    while True:
        job = {"point": entry.point, "excluded": dict(excluded), "own": entry.field == "own", **options}
        try:
            return worker.race(job, until, tick)
        except Crash as crash:
            culprit = crash.doing.rpartition(": ")[2]
            row = next((row for row in crash.rows if row["racer"] == culprit), None)
            if row is None:
                row = {**asdict(entry.point), "racer": culprit}
                crash.rows.append(row)
            row.setdefault("note", str(crash))
            if culprit == "floor" or culprit in excluded or time.monotonic() > until:
                return crash.rows
            excluded[culprit] = row["note"]


# Results --------------------------------------------------------------------------------------------------------------


class Store:
    """The results file: it holds whole points only, and is written anew with each."""

    def __init__(self, folder: Path, name: str, command: list[str], only: set[str] | None = None):
        self.path = folder / f"{name}.json"
        about = {**results.environment(__file__), "racers": sorted(only) if only else "all"}
        self.found: dict[str, Any] = {"environment": about, "command": command}
        self.found |= {"left_out": [], "points": [], "rows": []}
        folder.mkdir(parents=True, exist_ok=True)

    def resume(self) -> str:
        """Goes on with the file if the code and the device are the same; else keeps it under another name."""
        if not self.path.exists():
            return ""
        old = json.loads(self.path.read_text())
        same = ("source", "device", "torch", "triton", "peers", "racers")
        if all(old["environment"].get(key) == self.found["environment"][key] for key in same):
            self.found = {**old, "left_out": []}
            return (
                f"{self.path} holds {len(old['points'])} points of this code on this device: they are not raced again"
            )
        kept = self.path.with_suffix(".old.json")
        self.path.replace(kept)
        return f"{self.path} was of other code, versions, racers or another device: it is {kept} now"

    def done(self) -> set[tuple]:
        return {_key(p["point"], p["field"]) for p in self.found["points"] if p["whole"]}

    def keep(self, entry: Entry, rows: list[dict], seconds: float) -> None:
        clocks = results.smi("clocks.sm", "temperature.gpu", "power.draw") if entry.point.device_type == "cuda" else []
        whole = not any(row.get("note") == race.OUT_OF_TIME for row in rows)
        place = asdict(entry.point)
        self.found["points"].append(
            {
                "point": place,
                "field": entry.field,
                "whole": whole,
                "seconds": seconds,
                "date": results.now(),
                "clocks": clocks,
            }
        )
        # A point that is raced again, with everyone this time or after it was cut short, replaces what there is.
        others = [row for row in self.found["rows"] if any(row[key] != place[key] for key in place)]
        self.found["rows"] = [*others, *rows]
        results.write_json(self.path, self.found)

    def finish(self, left_out: list[Entry]) -> None:
        self.found["left_out"] = [{"point": asdict(e.point), "field": e.field} for e in left_out]
        results.write_json(self.path, self.found)
        results.write_csv(self.path.with_suffix(".csv"), self.found["rows"], self.found["environment"])
        try:
            for loss, rows in plain_rows(self.found["rows"]):
                title = f"{loss}, scale 20, random, {rows[0]['dtype']}, {self.found['environment']['device']}"
                results.plot(self.path.with_name(f"{self.path.stem}-{loss}.png"), rows, title)
        except ImportError:
            print("no plots without matplotlib: pip install 'fusedloss[bench]'", file=sys.stderr)


def plain_rows(rows: list[dict]) -> Iterator[tuple[str, list[dict]]]:
    """(loss, its rows at scale 20 on random inputs)."""
    for loss in dict.fromkeys(row["loss"] for row in rows):
        mine = [r for r in rows if r["loss"] == loss and r["temperature"] == 0.05 and r["kind"] == "random"]
        if mine:
            yield loss, mine


def _key(point: dict, field: str) -> tuple:
    return (*point.values(), field)


def remaining(entries: list[Entry], done: set[tuple]) -> list[Entry]:
    """What is not there yet. Our own racers are also among all."""
    return [
        e for e in entries if _key(asdict(e.point), e.field) not in done and _key(asdict(e.point), "all") not in done
    ]


def show_summary(rows: list[dict]) -> None:
    def cell(line: dict, key: str, form: str, unit: float = 1) -> str:
        return form.format(line[key] / unit) if line.get(key) is not None else ""

    cells = [
        [
            f"{line['loss']} {line['n']} x {line['d']}",
            f"{1 / line['temperature']:g}",
            line["kind"],
            cell(line, "seconds", "{:.2f}", 1e-3),
            cell(line, "ratio", "{:.2f}"),
            *(cell(line["ratios"], backend, "{:.2f}") for backend in KERNELS),
            cell(line, "normalize_ratio", "{:.2f}"),
            line.get("peer", ""),
            cell(line, "peer_seconds", "{:.2f}", 1e-3),
            cell(line, "gradient_error", "{:.1e}"),
            cell(line, "peer_error", "{:.1e}"),
            cell(line, "workspace_bytes", "{:.0f}", 2**20),
            line.get("note") or "",
        ]
        for line in results.summary(rows)
    ]
    headers = [
        "N x D",
        "scale",
        "inputs",
        "ms",
        "x floor",
        *KERNELS,
        "normalized",
        "fastest peer",
        "its ms",
        "error",
        "its error",
    ]
    tables.table("fusedloss and the fastest peer that is ranked", [*headers, "workspace MiB", ""], cells)


def main(argv: list[str] | None = None) -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16" if cuda else "fp32")
    parser.add_argument("--budget", type=float, help="seconds; default: 480 for short, none for full")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--limit", type=float, default=2.0, help="seconds of rounds after which a slow racer has enough"
    )
    parser.add_argument("--racers", nargs="+", help="only these, by their names in the results")
    parser.add_argument("--out", type=Path, default=Path("build/race"), help="folder for JSON, CSV and PNG")
    parser.add_argument("--name", default="race", help="their file name")
    arguments = parser.parse_args(argv)
    if arguments.device.startswith("cuda") and not cuda:
        parser.error(f"--device {arguments.device}: torch {torch.__version__} sees no GPU here")
    budget = arguments.budget or (480.0 if arguments.preset == "short" else float("inf"))
    until = time.monotonic() + budget - min(GRACE, budget / 10)
    only = set(arguments.racers) if arguments.racers else None
    options = {"rounds": arguments.rounds, "limit": arguments.limit, "only": only, "with_memory": True}

    store = Store(arguments.out, arguments.name, sys.argv[1:] if argv is None else argv, only)
    if said := store.resume():
        print(said, file=sys.stderr)
    entries = remaining(PRESETS[arguments.preset](grid(arguments.device, arguments.dtype)), store.done())
    left_out, interrupted, worker = list(entries), False, Worker()
    try:
        with tables.progress(len(entries)) as tick:
            timeout = 120 if budget < float("inf") else 600
            broken = race.broken_peers(arguments.device, only, tick, timeout)

            def race_one(entry: Entry) -> list[dict]:
                return race_point(entry, worker, options, broken, until, tick)

            def keep(entry: Entry, rows: list[dict], seconds: float) -> None:
                store.keep(entry, rows, seconds)
                left_out.remove(entry)
                tick(f"kept in {store.path}")

            run(entries, race_one, keep, until)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        worker.stop()
    store.finish(left_out)
    show_summary(store.found["rows"])
    if left_out:
        why = "interrupted" if interrupted else f"the budget of {budget:.0f} s is spent"
        print(f"{why}; {len(left_out)} of {len(entries)} points are left out, first:", file=sys.stderr)
        for point, field in left_out[:5]:
            about = f"{point.loss} N={point.n} D={point.d} scale {point.scale:g} {point.kind} ({field})"
            print(f"  {about}", file=sys.stderr)
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
