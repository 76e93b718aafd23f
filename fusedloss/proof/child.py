"""`python -m fusedloss verify --child DEVICE NAME...`: proves families one after another and says what it finds.

Each message is a JSON object in a line of its own:

    {"kind": "trying", "name": "triton stats bf16"}
    {"kind": "alive", "case": "random, 257 x 391 x 96"}     what it is at; also when a kernel was compiled for it
    {"kind": "verdict", "name": ..., "state": ..., ...}     the fields of a `verdicts.Verdict`
    {"kind": "unknown", "name": ..., "reason": ...}         there was no memory for it

`--child DEVICE NAME... race {"backends": {"bf16": ["triton"]}, "points": [[4096, 4096, 768]]}`, with names or without,
then times what is proved, if all the names are:

    {"kind": "entry", "entry": {...}}                       of the table in order.py
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..backends import triton
from ..core.errors import UnsupportedError
from ..trust.verdicts import FAILED, PROVED, Verdict, fields_of, parts_of
from . import cases
from . import race as races

Say = Callable[..., None]


def main(arguments: Sequence[str]) -> int:
    """arguments: the device, the families by name, and maybe what to race."""
    device, *names = arguments
    names, raced = (names[:-2], json.loads(names[-1])) if "race" in names else (names, None)
    # What anybody prints goes to stderr: the parent reads this pipe.
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(kind: str, **fields: Any) -> None:
        print(json.dumps({"kind": kind, **fields}), file=messages, flush=True)

    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    torch.empty(1, device=device)  # a card that takes no second context says so before a family is tried
    if prove(torch.device(device), names, say) and raced is not None:
        race(torch.device(device), **raced, say=say)
    return 0


def _end_with_the_parent() -> None:
    """Who holds the other end of stdin. Not by sys.stdin: a thread that holds its lock aborts the interpreter's end."""
    with contextlib.suppress(OSError):
        while os.read(0, 1 << 10):
            pass
    os._exit(1)


def race(
    device: torch.device,
    backends: Mapping[str, Sequence[str]],
    say: Say,
    points: Sequence[races.Point] = (),
    around: races.Point | None = None,
    kinds: Sequence[str] = races.ALL_KINDS,
) -> None:
    """around: of the points, instead of them all, those that `race.around` finds."""
    with triton.compiling(lambda seconds: say("alive", case="the race")):
        for precision, names in backends.items():
            for entry in races.race(device, names, precision, races.around(*around) if around else points, kinds):
                say("entry", entry=entry)


def prove(device: torch.device, names: Sequence[str], say: Say) -> bool:
    """Whether all are proved."""
    good = True
    for name in names:
        say("trying", name=name)
        backend, family, precision = parts_of(name)
        compiled, at = [0.0], [""]

        def begins(case: str, at: list[str] = at) -> None:
            at.append(case)
            say("alive", case=case)

        def compiles(seconds: float, compiled: list[float] = compiled, at: list[str] = at) -> None:
            compiled.append(seconds)
            say("alive", case=at[-1])

        with triton.compiling(compiles):
            try:
                verdict = Verdict(*cases.prove(backend, family, precision, device, begins))
            except (torch.OutOfMemoryError, UnsupportedError, ValueError) as error:  # says nothing of a kernel
                say("unknown", name=name, reason=_line(error))
                good = False
                continue
            except Exception as error:  # a kernel that raises has failed, whatever it raises
                verdict = Verdict(FAILED, reason=f"{type(error).__name__}: {_line(error)}")
        seconds = max(0.0, verdict.seconds - sum(compiled))
        say("verdict", name=name, **fields_of(verdict._replace(seconds=seconds)))
        good = good and verdict.state == PROVED
        if verdict.state == FAILED and device.type != "cpu":
            torch.get_device_module(device).synchronize(device)  # raises where no later kernel would run: a new child
    return good


def _line(error: Exception) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0][:300]
