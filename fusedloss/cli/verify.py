"""`python -m fusedloss verify`: proves every family of kernels before its first use, and then races the kernels.

Only CUDA and ROCm devices are raced: on a CPU `auto` has no kernels, and `measure` does not synchronise other devices.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..backends import KERNELS
from ..bench import tables
from ..core import ctrl_c
from ..proof import cases, race
from ..trust import ask, families, order, verdicts
from ..trust.verdicts import FAILED, PROVED, Verdict

# The families that a race launches: of one and of both directions, with and without a bound of the logits.
RACED = ("rows", "stats", "exp", "grad", "stats+columns", "grad+columns", "stored")
COLUMNS = ("backend", "family", "precision", "state", "cases", "seconds", "of the budget", "")


def devices(asked: str | None) -> list[torch.device]:
    """Returns the device asked for, or one device for each key of verdicts, for which a verdict holds."""
    if asked is not None:
        return [torch.device(asked) if ":" in asked or asked == "cpu" else torch.device(asked, 0)]
    kinds: dict[str, torch.device] = {}
    for kind in ("cuda", "xpu"):
        for index in range(torch.get_device_module(kind).device_count()):
            device = torch.device(kind, index)
            kinds.setdefault(str(verdicts.key(device)), device)
    return list(kinds.values()) or [torch.device("cpu")]


def names(device: torch.device, backend: str | None, family: str | None) -> tuple[list[str], list[str]]:
    """Returns the names of the families that run on `device`, and a line for each reason why others do not."""
    found: list[str] = []
    reasons: dict[str, list[str]] = {}
    for name in KERNELS if backend is None else (backend,):
        for precision, dtype in cases.DTYPES.items():
            known = families.of_backend(name, precision)
            why = {each: cases.why_not(name, each, dtype, device) for each in known if family in (None, each)}
            found += [verdicts.name_of(name, each, precision) for each, reason in why.items() if reason is None]
            for reason in {reason: None for reason in why.values() if reason}:
                reasons.setdefault(f"{name}: {reason}", []).append(precision)
    return found, [f"{reason} ({', '.join(precisions)})" for reason, precisions in reasons.items()]


def main(arguments: argparse.Namespace) -> int:
    """Proves, races and prints the table. After Ctrl-C the verdicts until then are kept and shown."""
    rows: list[dict[str, Any]] = []
    why: list[str] = []
    unfit: list[str] = []
    interrupted, start = False, time.monotonic()
    try:
        for device in devices(arguments.device):
            wanted, reasons = names(device, arguments.backend, arguments.family)
            unfit += [f"{device}: {reason}" for reason in reasons]
            rows += [{"device": str(device), "name": name} for name in wanted]
            if not wanted:
                continue
            with tables.progress(len(wanted)) as tick, _shown(device, wanted, rows):
                why.append(_proved(device, wanted, arguments.again, tick))
            if device.type == "cuda" and not arguments.no_race:
                with tables.progress() as tick:
                    why.append(raced(device, race.VERIFIED, arguments.again, tick))
    except KeyboardInterrupt:
        interrupted = True
    if arguments.json:
        tables.print_json([_plain(row) for row in rows])
    else:
        _tables(rows, time.monotonic() - start)
    said = [reason for reason in why if reason]
    if not rows:
        said += ["nothing to verify here", *unfit]
    for line in said:
        print(line, file=sys.stderr)
    if interrupted:
        print("interrupted: this is what was verified until then", file=sys.stderr)
        return ctrl_c.CODE
    states = [row["verdict"].state for row in rows]
    if FAILED in states:
        return 1
    asked = arguments.device or arguments.backend or arguments.family
    return 2 if states.count(PROVED) < len(states) or (not rows and asked) else 0


def _proved(device: torch.device, wanted: list[str], again: bool, tick: tables.Tick) -> str:
    """Proves the families without a verdict, and again those that failed. Returns why some are unknown, or ""."""

    def left() -> list[str]:
        known = verdicts.read(device).verdicts
        return [name for name in wanted if again or name not in known or known[name].state == FAILED]

    unkept: dict[str, None] = {}

    def found(name: str, verdict: Verdict) -> None:
        unkept[ask.learn(device, {name: verdict})] = None

    with verdicts.locked(device, ask.TOTAL, lambda: False):  # if another process still holds the lock, both prove
        todo = left()
        for name in wanted:
            if name not in todo:
                tick(f"{device} {name}: kept")
        why = ask.prove_in_child(device, todo, found, lambda name: tick(f"{device} {name}"))
    lines = [f"{device}: some are unknown: {why}"] if why else []
    lines += [f"{device}: kept nowhere: {reason}; set FUSEDLOSS_CACHE_DIR to a folder" for reason in unkept if reason]
    return "\n".join(lines)


def raced(device: torch.device, points: Sequence[race.Point], again: bool, tick: tables.Tick) -> str:
    """Times proved kernels without times, and keeps each entry at once. Returns why the race ended early, or ""."""
    known = order.kept(device)
    todo = {}
    for precision in families.PRECISIONS:
        backends = [name for name in KERNELS if _proves_the_sweep(device, name, precision)]
        full = [e for e in known if e["dtype"] == precision and set(backends) <= set(e["seconds"])]
        timed = {(order.rows_of(entry), entry["N"], entry["D"]) for entry in full}.intersection(points)
        # A first use times a few of the points, and some points do not run on every card.
        if backends and (again or 2 * len(timed) < len(points)):
            todo[precision] = backends

    def found(entry: dict[str, Any]) -> None:
        order.learn(device, entry)
        tick(f"{device} {entry['dtype']}, {entry['kind']}, {order.size_of(entry)}: {entry['backend']}")

    why = ask.race_in_child(device, todo, points, found) if todo else ""
    return f"{device}: the race ended early: {why}" if why else ""


def _proves_the_sweep(device: torch.device, backend: str, precision: str) -> bool:
    """Returns whether all families that a race launches are proved."""
    needed = set(RACED) & set(families.of_backend(backend, precision))
    known = ask.known(device)
    names = [verdicts.name_of(backend, family, precision) for family in needed]
    return all(name in known and known[name].state == PROVED for name in names)


@contextlib.contextmanager
def _shown(device: torch.device, wanted: list[str], rows: list[dict[str, Any]]) -> Iterator[None]:
    """Adds the verdicts to the device's rows, even if the body raises."""
    try:
        yield
    finally:
        known = ask.known(device)
        for row in rows:
            if row["device"] == str(device):
                row["verdict"] = known.get(row["name"], Verdict(verdicts.UNKNOWN))


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    backend, family, precision = verdicts.parts_of(row["name"])
    named = {"device": row["device"], "backend": backend, "family": family, "precision": precision}
    return named | verdicts.fields_of(row["verdict"]) | {"kept": str(verdicts.path(torch.device(row["device"])))}


def _tables(rows: list[dict[str, Any]], seconds: float) -> None:
    for device in dict.fromkeys(row["device"] for row in rows):
        own = [row for row in rows if row["device"] == device]
        table = []
        for row in own:
            verdict = row["verdict"]
            ran = verdict.cases > 0
            cells = [str(verdict.cases), f"{verdict.seconds:.1f}", f"{verdict.worst:.2f}"] if ran else [""] * 3
            table.append([*verdicts.parts_of(row["name"]), verdict.state, *cells, verdict.reason])
        called = verdicts.key(torch.device(device))["device"]
        good = sum(row["verdict"].state == PROVED for row in own)
        tables.table(f"{device}, {called}: {good} of {len(own)} families proved, {seconds:.0f} s", COLUMNS, table)
        entries = order.kept(torch.device(device))
        for precision in families.PRECISIONS:
            wins = collections.Counter(entry["backend"] for entry in entries if entry["dtype"] == precision)
            if wins:
                shares = ", ".join(f"{name} {count}" for name, count in wins.most_common())
                print(f"fastest at {wins.total()} points in {precision}: {shares}")
        print(f"kept in {verdicts.path(torch.device(device))}")
