"""The order in which `auto` tries backends: by times at the nearest point, otherwise as given.

Times come from the races of this machine, in its verdict file, and then from the shipped table `fastest.json`, which
benchmarks/fastest.py writes from a race on a GPU. Both have entries of one form:

    {"capability": [9, 0], "dtype": "bf16", "kind": "one direction", "N": 4096, "D": 768,
     "backend": "triton", "seconds": {"triton": 1.1e-3, "chunked": 2.4e-3, "reference": 3.0e-3}}

dtype: how products are computed, `families.PRECISIONS`. kind: `kind`. backend: the first in seconds. "M" is given if
there were not N rows.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..core import checks
from ..core.numerics import stats_dtype
from ..core.problem import Problem
from . import families, verdicts

KINDS = (("one direction", "one direction, bounded"), ("both directions", "both directions, bounded"))
FORM = {"capability": list, "dtype": str, "kind": str, "N": int, "D": int, "backend": str, "seconds": dict}
REFERENCE = "reference"
# Matrices of [M, N] in fp32 that plain torch holds at once: similarities, logits, probabilities and their gradient.
MATERIALISED = 4

Entry = dict[str, Any]

_races: dict[torch.device, list[Entry]] = {}
chosen: dict[Any, Sequence[tuple[str, bool]]] = {}  # by `backends`: by a problem's flags, dtype, device, sizes


def order(names: tuple[str, ...], problem: Problem) -> tuple[str, ...]:
    """Returns `names`, the fastest first."""
    M, (N, D) = problem.rows, problem.operands[problem.blocks[0].key].shape  # one launch per block
    place = (capability(problem.device), families.precision(problem.dtype), kind(problem))
    nearest = _nearest(problem.device, place, M, N, D)
    seconds = {} if nearest is None else nearest["seconds"]
    return tuple(sorted(names, key=lambda name: seconds.get(name, math.inf)))


def kind(problem: Problem) -> str | None:
    """Returns a problem's kind in a race. Masks and further blocks were not raced and are ignored; folds have none."""
    if problem.fold is not None:
        return None
    return KINDS[problem.symmetric][problem.has_safe_shift]


def raced_as(problem: Problem) -> tuple[str, int, int, int] | None:
    """Returns a problem's kind, M, N and D in the tables; None: such problems are not raced."""
    of, (N, D), M = kind(problem), problem.operands[problem.blocks[0].key].shape, problem.rows
    if of is None or M * N == 0:
        return None
    if problem.symmetric:  # across ranks it is a block of some rows, but the race has squares
        M = N = math.isqrt(M * N)
    return of, M, N, D


def needs(precision: str, kind: str) -> tuple[str, ...]:
    """Returns the families of a raced loss of this kind, without masks."""
    both = kind in KINDS[True]
    return families.plain(symmetric=both, safe=kind == KINDS[both][True], fp16=precision == "fp16")


def materialises(problem: Problem) -> bool:
    """Whether plain torch was raced on such a problem, and has the memory for it."""
    if problem.top or problem.masked or problem.wants_tally or problem.prefixes or len(problem.blocks) > 1:
        return False
    _, budget = checks.budget(problem.workspace_bytes)
    budget = budget or checks.WORKSPACE_BYTES.get(problem.device.type, checks.WORKSPACE_BYTES["cpu"])
    return MATERIALISED * problem.rows * problem.columns * stats_dtype(problem.dtype).itemsize <= budget


def forget() -> None:
    """Forgets the races, so that files are read again."""
    _races.clear()
    choose_anew()


def choose_anew() -> None:
    """Resets the choices of `auto`, after a change of a verdict or a time."""
    global chosen
    chosen = {}  # not cleared: a thread that chooses at this moment, by old values, writes to the old dict


def read_again(device: torch.device) -> None:
    """Reads the races of other processes since then."""
    _races[device] = merged(raced(device), kept(device))
    choose_anew()


def learn(device: torch.device, entry: Entry) -> str:
    """Adds an entry here and to the file; returns "", or why the file cannot be written."""
    _races[device] = merged(merged(raced(device), kept(device)), [entry])
    choose_anew()
    return verdicts.keep(device, {}, _races[device])


def _nearest(device: torch.device, place: tuple[object, ...], M: int, N: int, D: int) -> Entry | None:
    """Returns the entry nearest by ratio, in the first table with one of the same capability, precision and kind."""

    def off(entry: Entry) -> float:
        by_rows, by_columns = math.log(rows_of(entry) / max(M, 1)), math.log(entry["N"] / max(N, 1))
        return (abs(by_rows) + abs(by_columns)) / 2 + abs(math.log(entry["D"] / D))

    for table in (raced(device), _shipped()):
        found = [e for e in table if (e["capability"], e["dtype"], e["kind"]) == place]
        if found:
            return min(found, key=off)
    return None


def rows_of(entry: Entry) -> int:
    return entry["M"] if "M" in entry else entry["N"]


def size_of(entry: Entry) -> str:
    return f"{rows_of(entry)} x {entry['N']} x {entry['D']}"


def capability(device: torch.device) -> list[int]:
    return [*torch.cuda.get_device_capability(device)] if device.type == "cuda" else []


def raced(device: torch.device) -> list[Entry]:
    """Returns this process's entries: the file's at the first call, and those raced since."""
    if device not in _races:
        _races[device] = kept(device)
    return _races[device]


def kept(device: torch.device) -> list[Entry]:
    """Returns the file's current entries."""
    return [entry for entry in verdicts.read(device).races if is_entry(entry)]


@functools.cache
def _shipped() -> list[Entry]:
    return json.loads((Path(__file__).parent / "fastest.json").read_text())


def is_entry(found: Any) -> bool:
    """Whether `found` is an entry; a file may hold anything."""
    if not isinstance(found, dict) or any(type(found.get(name)) is not form for name, form in FORM.items()):
        return False
    times, rows = found["seconds"], rows_of(found)
    return (
        type(rows) is int
        and min(rows, found["N"], found["D"]) > 0
        and all(type(s) in (int, float) and s > 0 for s in times.values())
    )


def merged(old: list[Entry], new: list[Entry]) -> list[Entry]:
    """Returns one entry for each point; new entries replace old ones."""
    place = lambda entry: [*(entry[name] for name in ("capability", "dtype", "kind", "N", "D")), rows_of(entry)]
    by_place = {json.dumps(place(entry)): entry for entry in (*old, *new)}
    return sorted(by_place.values(), key=place)
