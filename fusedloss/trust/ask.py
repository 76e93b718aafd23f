"""Decides whether `auto` may take a backend, by known verdicts of a problem's families, or by a child process.

FUSEDLOSS_VERIFY = first    what is unknown is proved before its first use, by a child process; the call waits for it
                   off      nothing is proved; what is known counts, the rest runs elsewhere
                   inline   as first, in this process (for a debugger; a hang hangs, an illegal access ends it)
                   trust    what is unknown counts as proved

The child is a fresh interpreter with a time limit. An illegal access or a hang ends the child, not the training. It
reports each family before it tries it. If it dies, that family has failed, and a new child goes on with the next. If it
cannot run at all (no memory, no second context on the card), families stay unknown: this is reported once and not
stored. After the proofs it times the proved backends at three sizes around the call's, for `order.py`; no verdict
depends on that.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import importlib
import json
import logging
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..core import environment
from ..core.numerics import capturing as capturing
from . import families as families_
from . import order, verdicts
from .verdicts import FAILED, PROVED, UNKNOWN, Verdict

COMMAND = [sys.executable, "-m", "fusedloss", "verify", "--child"]
SILENCE = 120.0  # seconds without a message in which one kernel may compile, or a family's cases run
RACE = 60.0  # seconds of the race after a proof, within TOTAL
TOTAL = 300.0  # seconds that one call may wait: less than other ranks wait for it in a collective
TIMED = ("cuda",)  # includes ROCm; on other devices `measure` does not wait for the work
AHEAD = "`python -m fusedloss verify` does it ahead of time"
# Signals of users, schedulers and the out-of-memory killer; no kernel raises them.
FROM_OUTSIDE = [-getattr(signal, name) for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
Size = tuple[str, int, int, int]  # of a call: its kind in the tables of `order.py`, M, N and D
logger = logging.getLogger("fusedloss")

_known: dict[torch.device, dict[str, Verdict]] = {}  # this process's verdicts: the file's, and its own
_settled: dict[tuple[str, tuple[str, ...], str | None, torch.device], bool] = {}  # results that hold in any mode
_said: set[str] = set()
_asks = True  # False within `unasked`
_one_at_a_time = threading.RLock()


def admits(
    backend: str, families: tuple[str, ...], dtype: torch.dtype, device: torch.device, size: Size | None = None
) -> bool:
    """Whether `auto` may run these families of a backend on the device.

    size: the size around which they are timed after the proof; None: they are not timed.
    """
    if torch.compiler.is_compiling():
        return _while_tracing(backend, families, dtype, device)
    precision = families_.precision(dtype)
    settled = _settled.get((backend, families, precision, device))
    return _decide(backend, families, precision, device, size) if settled is None else settled


def settled(backend: str, families: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> bool | None:
    """Returns the result of `admits` if it holds in any mode, or None."""
    return _settled.get((backend, families, families_.precision(dtype), device))


@environment.constant
def _while_tracing(backend: str, families: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> bool:
    precision, mode = families_.precision(dtype), environment.verify()
    if precision is None:
        return False
    with _one_at_a_time:
        names = [verdicts.name_of(backend, family, precision) for family in families]
        if mode in ("first", "inline") and any(name not in known(device) for name in names):
            _say_once(
                f"nothing is verified while torch.compile traces: of backend {backend!r} on {_called(device)} some is "
                f"unknown, and another one runs. {AHEAD}"
            )
        return _all_hold(names, device, mode)


def _decide(
    backend: str, families: tuple[str, ...], precision: str | None, device: torch.device, size: Size | None
) -> bool:
    mode = environment.verify()
    if precision is None:
        return False
    with _one_at_a_time:
        names = [verdicts.name_of(backend, family, precision) for family in families]
        unknown = [name for name in names if name not in known(device)]
        if unknown and mode in ("first", "inline") and _asks:
            if capturing(device):
                _say_once(
                    f"nothing is verified while a CUDA graph is captured: of backend {backend!r} on {_called(device)} "
                    f"some is unknown, and another one runs. {AHEAD}"
                )
                return False
            _verify(device, unknown, mode, size if mode == "first" and device.type in TIMED else None)
        admitted = _all_hold(names, device, mode)
        # Results that depend on the mode are decided at each call.
        if all(_state(device, name) != UNKNOWN for name in names):
            _settled[backend, families, precision, device] = admitted
            order.choose_anew()
        return admitted


def _all_hold(names: Sequence[str], device: torch.device, mode: str) -> bool:
    good = (PROVED, UNKNOWN) if mode == "trust" else (PROVED,)
    return all(_state(device, name) in good for name in names)


def _state(device: torch.device, name: str) -> str:
    verdict = known(device).get(name)
    return UNKNOWN if verdict is None else verdict.state


def known(device: torch.device) -> dict[str, Verdict]:
    """Returns this process's verdicts of a device, by name; UNKNOWN are those that a child could not decide."""
    if device not in _known:
        _known[device] = verdicts.read(device).verdicts
    return _known[device]


def learn(device: torch.device, found: dict[str, Verdict]) -> str:
    """Adds verdicts here and to the file; returns "", or why the file cannot be written."""
    with _one_at_a_time:
        known(device).update(found)
        _settled.clear()
        order.choose_anew()
        return verdicts.keep(device, found)


def forget() -> None:
    """Forgets this process's verdicts, so that files are read again."""
    for memo in (_known, _settled, _said):
        memo.clear()
    verdicts.key.cache_clear()
    order.forget()


@contextlib.contextmanager
def unasked() -> Iterator[None]:
    """Context in which nothing is proved: `auto` goes by known verdicts."""
    global _asks
    before, _asks = _asks, False
    try:
        yield
    finally:
        _asks = before


def _called(device: torch.device) -> str:
    return str(verdicts.key(device)["device"])


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        _say(text)


def _say(text: str) -> None:
    """Logs a warning, the lowest level that is shown if logging was not set up."""
    logger.warning("fusedloss: %s", text)


# Verifying ------------------------------------------------------------------------------------------------------------


def _verify(device: torch.device, names: list[str], mode: str, size: Size | None) -> None:
    """Finds each name's verdict, or UNKNOWN for this process, and times around a size; logs a line before and after."""

    def left() -> list[str]:
        kept = verdicts.read(device).verdicts
        known(device).update({name: kept[name] for name in names if name in kept})
        return [name for name in names if name not in known(device)]

    start = time.monotonic()
    try:
        # A process that wants the times waits until the one that takes them is done.
        with verdicts.locked(device, TOTAL, lambda: size is None and not left()) as held:
            names = left()
            if names and held:
                _prove(device, names, mode, size, TOTAL - (time.monotonic() - start))
            elif names:
                _say_once(f"another process verifies {_called(device)} since {TOTAL:.0f} s: {_elsewhere(names)}")
    finally:
        for name in names:
            known(device).setdefault(name, Verdict(UNKNOWN))
        if size is not None:
            order.read_again(device)


def _prove(device: torch.device, names: list[str], mode: str, size: Size | None, limit: float) -> None:
    _say(
        f"verifying {_summed(names)} on {_called(device)} before first use: this call waits for it. {AHEAD}, "
        "FUSEDLOSS_VERIFY=off leaves it out"
    )
    found: dict[str, Verdict] = {}
    start, unkept = time.monotonic(), ""

    def note(name: str, verdict: Verdict) -> None:
        nonlocal unkept
        found[name] = verdict
        unkept = learn(device, {name: verdict})

    race = None if size is None else _race(device, names, size)
    if mode == "inline":
        why = prove_inline(device, names, note)
    else:
        why = prove_in_child(device, names, note, limit=limit, race=race)
    good = sum(verdict.state == PROVED for verdict in found.values())
    said = f"verified on {_called(device)}: {good} of {len(names)} families, {time.monotonic() - start:.0f} s"
    if found:
        said += f"; kept in {verdicts.path(device)}" if not unkept else f"; kept in memory alone ({unkept})"
    if race is not None and race.entries:
        fastest = ", ".join(f"{entry['backend']} at {order.size_of(entry)}" for entry in race.entries)
        said += f"; fastest: {fastest}"
    if race is not None and race.why and good == len(names):
        said += f"; the race ended early: {race.why}"
    bad = [f"{name} ({verdict.reason})" for name, verdict in found.items() if verdict.state == FAILED]
    if bad:
        said += f"; another backend runs instead of what failed: {', '.join(bad)}"
    unknown = [name for name in names if name not in found]
    if unknown:
        said += f"; {_elsewhere(unknown)}: {why}"
    _say(said)


@dataclasses.dataclass
class _Race:
    """A race in a child after all its proofs: its options, the entries it sent, and why it ended early."""

    device: torch.device
    asked: dict[str, Any]  # options of `child.race`
    entries: list[order.Entry] = dataclasses.field(default_factory=list)
    why: str = ""

    def note(self, entry: order.Entry) -> None:
        self.entries.append(entry)
        order.learn(self.device, entry)


def _race(device: torch.device, names: Sequence[str], size: Size) -> _Race | None:
    """Returns the race of the backends that these names' proofs complete, or None if there is nothing new."""
    asked, _, precision = verdicts.parts_of(names[0])
    kind, *around = size

    def proved(backend: str) -> bool:
        needed = {verdicts.name_of(backend, family, precision) for family in order.needs(precision, kind)}
        return all(name in names or _state(device, name) == PROVED for name in needed)

    timed = [e for e in order.raced(device) if (e["dtype"], e["kind"]) == (precision, kind) and asked in e["seconds"]]
    if timed or not proved(asked):
        return None
    backends = [backend for backend in families_.BACKENDS if proved(backend)]
    return _Race(device, {"backends": {precision: backends}, "around": around, "kinds": [kind]})


def _elsewhere(names: Sequence[str]) -> str:
    return f"unknown, so another backend runs instead: {', '.join(names)}"


def _summed(names: Sequence[str]) -> str:
    """ "triton stats bf16", "triton grad bf16" -> "triton (stats, grad; bf16)"."""
    backend, _, precision = verdicts.parts_of(names[0])
    return f"{backend} ({', '.join(verdicts.parts_of(name)[1] for name in names)}; {precision})"


def prove_inline(device: torch.device, names: Sequence[str], found: Callable[[str, Verdict], None]) -> str:
    """Proves in this process; returns "", or why some are unknown."""
    why: list[str] = []

    def say(kind: str, **fields: Any) -> None:
        if kind == "verdict":
            found(fields.pop("name"), verdicts.verdict_of(fields))
        elif kind == "unknown":
            why.append(fields["reason"])

    # Imported by name, because the library must not depend on its proofs.
    importlib.import_module("fusedloss.proof.child").prove(device, names, say)
    return "; ".join(why)


def prove_in_child(
    device: torch.device,
    names: Sequence[str],
    found: Callable[[str, Verdict], None],
    begin: Callable[[str], None] = lambda name: None,
    limit: float = math.inf,
    race: _Race | None = None,
) -> str:
    """Proves in one child after another; returns "", or why some are unknown. begin: called with each name. limit:
    seconds in all.

    race: run by the first child, if that proves all names.
    """
    left, why = list(names), ""
    deadline = time.monotonic() + limit
    while left:
        before = len(left)
        try:
            child = _Child(device, [*left, *(_to_race(race.asked) if race is not None else [])])
        except OSError as error:
            return f"no child process could be started ({error})"
        with child:
            trying: str | None = None
            case = ""
            while True:
                message = child.hears(min(SILENCE, deadline - time.monotonic()))
                kind = message.pop("kind")
                if kind == "trying":
                    trying, case = message["name"], ""
                    begin(trying)
                elif kind == "alive":
                    case = f"{message['case']}: "
                elif kind in ("verdict", "unknown"):
                    name, trying = message.pop("name"), None
                    left.remove(name)
                    if kind == "verdict":
                        found(name, verdicts.verdict_of(message))
                    else:
                        why = message["reason"]
                    if not left:
                        deadline = min(deadline, time.monotonic() + RACE)
                elif kind == "entry" and race is not None and order.is_entry(message.get("entry")):
                    race.note(message["entry"])
                elif kind in ("silent", "ended"):
                    break
            if not left:
                if race is not None and kind == "silent":
                    race.why = "out of time"
                elif race is not None and child.code != 0:
                    race.why = child.ending()
                return why
            race = None
            if kind == "silent" and time.monotonic() >= deadline:
                return f"not done within {limit:.0f} s"
            ending = f"no sign of life for {SILENCE:.0f} s" if kind == "silent" else child.ending()
            from_outside = kind == "ended" and child.code in FROM_OUTSIDE
            if from_outside or (trying is None and len(left) == before):
                return f"the child that verifies: {ending}"
            if trying is not None:
                left.remove(trying)
                found(trying, Verdict(FAILED, reason=f"{case}the child that verifies: {ending}"))
    return why


def race_in_child(
    device: torch.device,
    backends: Mapping[str, Sequence[str]],
    points: Sequence[tuple[int, int, int]],
    found: Callable[[dict[str, Any]], None],
) -> str:
    """Times these backends, by precision; returns "", or why the child ended before its last point."""
    try:
        child = _Child(device, _to_race({"backends": backends, "points": points}))
    except OSError as error:
        return f"no child process could be started ({error})"
    with child:
        while True:
            message = child.hears(SILENCE)
            if message["kind"] == "entry":
                found(message["entry"])
            elif message["kind"] == "silent":
                return f"no sign of life for {SILENCE:.0f} s"
            elif message["kind"] == "ended":
                return "" if child.code == 0 else child.ending()


def _to_race(asked: Mapping[str, Any]) -> list[str]:
    return ["race", json.dumps(asked)]


class _Child:
    """A process that proves families, one after another; its messages are JSON objects, one a line."""

    def __init__(self, device: torch.device, names: Sequence[str]):
        variables = {name: value for name, value in os.environ.items() if name not in environment.VARIABLES}
        # The child must import what this process does, and nothing from the current folder.
        variables |= {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path), "PYTHONSAFEPATH": "1"}
        self.process = subprocess.Popen(
            [*COMMAND, str(device), *names],
            env=variables | {"FUSEDLOSS_VERIFY": "off"},
            stdin=subprocess.PIPE,  # the child sees its end if this process is gone
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # a terminal's Ctrl-C reaches only this process
        )
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.errors: collections.deque[str] = collections.deque(maxlen=20)
        self.readers = [threading.Thread(target=read, daemon=True) for read in (self._read, self._read_errors)]
        for reader in self.readers:
            reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self.errors.extend(line.strip() for line in self.process.stderr if line.strip())

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a hanging driver may keep the process
            self.process.wait(10)
        for reader in self.readers:
            reader.join(5)  # longer only if a grandchild holds the pipe
        if not any(reader.is_alive() for reader in self.readers):
            for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
                assert pipe is not None
                pipe.close()

    def hears(self, limit: float) -> dict[str, Any]:
        try:
            line = self.lines.get(timeout=max(limit, 0))
        except queue.Empty:
            return {"kind": "silent"}
        return {"kind": "ended"} if line is None else json.loads(line)

    @functools.cached_property
    def code(self) -> int:
        """Returns the exit code, after the child has closed its pipe."""
        try:
            return self.process.wait(10)
        except subprocess.TimeoutExpired:
            return 0

    def ending(self) -> str:
        how = f"exit code {self.code}" if self.code >= 0 else f"ended by {signal.Signals(-self.code).name}"
        self.readers[1].join(5)
        return how + (f", {self.errors[-1][:200]}" if self.errors else "")
