"""Verdicts of the kernels on a device: one JSON file for each combination of everything that could change them.

    {"schema": 1, "key": {...}, "verdicts": {"triton stats bf16": {"state": "proved", ...}}, "races": [...]}

Nothing in it is executed. A file that cannot be read, has another schema or key, or belongs to a user other than this
one and root, is ignored. If nothing can be written, verdicts live as long as the process.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..core import environment
from ..core.version import VERSION

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SCHEMA = 1
PROVED, FAILED, UNKNOWN = STATES = ("proved", "failed", "unknown")
STALE = 900.0  # seconds after which a lock without fcntl counts as one of a process that is gone
logger = logging.getLogger("fusedloss")
_ignored: set[str] = set()  # files that were reported as ignored


class Verdict(NamedTuple):
    """The verdict of one family, from a `cases.Proof`. Unknown ones are never stored."""

    state: str
    cases: int = 0
    seconds: float = 0.0  # without the time of compilation
    worst: float = 0.0  # error as a share of the budget
    reason: str = ""


class Kept(NamedTuple):
    verdicts: dict[str, Verdict]
    races: list[dict[str, Any]]


def name_of(backend: str, family: str, precision: str) -> str:
    return f"{backend} {family} {precision}"


def parts_of(name: str) -> tuple[str, str, str]:
    """Returns the backend, the family and the precision of a name."""
    backend, family, precision = name.split(" ")
    return backend, family, precision


# The key --------------------------------------------------------------------------------------------------------------


@functools.cache
def key(device: torch.device) -> dict[str, Any]:
    """Returns everything that a verdict depends on. A difference in any of it needs a new proof."""

    return {
        **_hardware(device),
        "driver": _driver() if device.type != "cpu" else "",
        "runtime": torch.version.cuda or torch.version.hip or "",
        "torch": torch.__version__,
        "triton": _triton(),
        "fusedloss": VERSION,
        "sources": digest(sources()),
        "extension": digest(extension()),
    }


def _hardware(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        vectors = torch.backends.cpu.get_cpu_capability()
        return {"device": f"{platform.machine()} {vectors}", "capability": [], "multiprocessors": 0}
    found = torch.get_device_module(device).get_device_properties(device)
    if device.type == "xpu":
        return {"device": found.name, "capability": [], "multiprocessors": found.max_compute_units}
    return {
        "device": found.name,
        "capability": [found.major, found.minor],
        "multiprocessors": found.multi_processor_count,
    }


def _driver() -> str:
    """Returns the driver's release, if Linux tells it, and the newest CUDA that it runs, if torch tells it."""
    release = ""
    with contextlib.suppress(OSError):
        release = Path("/proc/driver/nvidia/version").read_text().partition("\n")[0].strip()
    newest = getattr(torch._C, "_cuda_getDriverVersion", None)
    return f"{release} {newest() if newest else ''}".strip()


def _triton() -> str:
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-windows"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return ""


def sources() -> list[Path]:
    """Returns the source files: the kernels with their tables of tiles, their launchers, and the cases."""
    package = Path(__file__).parents[1]
    found = [package / "backends" / name for name in ("distill.py", "folds.py", "shared.py")]
    found += [package / "proof" / f"{name}.py" for name in ("cases", "draws", "rowwise", "sweeps", "zones")]
    for backend in ("triton", "cuda"):
        found += sorted((package / "backends" / backend).glob("*.py"))
    found.append(package / "backends" / "triton" / "measured.json")
    spec = importlib.util.find_spec("fusedloss.kernels")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        found += [file for file in sorted(Path(folder).rglob("*")) if file.suffix in (".py", ".json")]
    return found


def extension() -> list[Path]:
    """Returns the file of fusedloss._C, without loading it."""
    spec = importlib.util.find_spec("fusedloss._C")
    return [Path(spec.origin)] if spec and spec.origin else []


def digest(files: Iterable[Path]) -> str:
    """Hashes names and contents; modification times differ between copies of one package."""
    found = hashlib.sha256()
    for file in files:
        if file.is_file():
            data = file.read_bytes()
            found.update(f"{file.name} {len(data)}\n".encode() + data)
    return found.hexdigest()


# The file -------------------------------------------------------------------------------------------------------------


def path(device: torch.device) -> Path:
    known = key(device)
    name = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]
    return environment.cache_dir() / f"{name}.json"


def read(device: torch.device) -> Kept:
    """Reads the device's file; logs one line if an existing file is ignored."""
    file = path(device)
    try:
        with file.open("rb") as opened:
            _check_owner(os.fstat(opened.fileno()).st_uid)
            return _parsed(json.loads(opened.read()), key(device))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError) as error:
        if str(file) not in _ignored:
            _ignored.add(str(file))
            why = error.strerror if isinstance(error, OSError) else error
            logger.warning("fusedloss: the verdicts in %s are ignored: %s", file, why)
    return Kept({}, [])


def _check_owner(owner: int) -> None:
    """Accepts this user's files and root's: images are often built by root, who needs no such file to do harm."""
    getuid = getattr(os, "getuid", None)
    if getuid is not None and owner not in (getuid(), 0):
        raise ValueError(f"they belong to another user ({owner})")


def _parsed(found: Any, expected: Mapping[str, Any]) -> Kept:
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f"they are not of schema {SCHEMA}")
    if found.get("key") != expected:
        raise ValueError("they are of another device or version")
    verdicts, races = found.get("verdicts"), found.get("races", [])
    if not isinstance(verdicts, dict) or not isinstance(races, list):
        raise ValueError("they have another form")
    return Kept({name: verdict_of(fields) for name, fields in verdicts.items()}, races)


def verdict_of(fields: Any) -> Verdict:
    """Returns the verdict of `fields_of`; ValueError if fields have another form."""
    form: dict[str, tuple[type, ...]] = {
        "state": (str,),
        "cases": (int,),
        "seconds": (int, float),
        "worst": (int, float, type(None)),
        "reason": (str,),
    }
    if not isinstance(fields, dict) or any(not isinstance(fields.get(name), kinds) for name, kinds in form.items()):
        raise ValueError("they have another form")
    if fields["state"] not in (PROVED, FAILED):
        raise ValueError(f"they hold an unknown state {fields['state']!r}")
    worst = math.inf if fields["worst"] is None else fields["worst"]
    return Verdict(fields["state"], fields["cases"], fields["seconds"], worst, fields["reason"])


def fields_of(verdict: Verdict) -> dict[str, Any]:
    """Returns fields for JSON, which cannot express an infinite error or NaN."""
    return verdict._asdict() | {"worst": verdict.worst if math.isfinite(verdict.worst) else None}


def keep(device: torch.device, verdicts: Mapping[str, Verdict], races: list[dict[str, Any]] | None = None) -> str:
    """Adds to the file by replacing it; returns "", or why that is not possible.

    races: replace all stored ones; None keeps them.
    """
    file = path(device)
    kept = read(device)
    known = kept.verdicts | {name: verdict for name, verdict in verdicts.items() if verdict.state != UNKNOWN}
    content = {
        "schema": SCHEMA,
        "key": key(device),
        "verdicts": {name: fields_of(verdict) for name, verdict in sorted(known.items())},
        "races": kept.races if races is None else races,
    }
    new = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, new = tempfile.mkstemp(prefix=file.stem, suffix=".new", dir=file.parent)
        with os.fdopen(handle, "w") as opened:
            json.dump(content, opened, indent=1)
        os.chmod(new, 0o644)  # readable, because a cluster's prolog may write it as root for everybody
        os.replace(new, file)
    except OSError as error:
        if new is not None:
            with contextlib.suppress(OSError):
                os.unlink(new)
        return error.strerror or str(error)
    return ""


# The lock -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(device: torch.device, limit: float, done: Callable[[], bool]) -> Iterator[bool]:
    """Whether no other process verifies this device: waits for it, until `done()`, or for `limit` seconds.

    If no lock can be made, nothing can be stored either, and each process works alone.
    """
    file, deadline = path(device).with_suffix(".lock"), time.monotonic() + limit
    held: Callable[[], None] | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        while True:
            held = _take(file)
            if held is not None or done() or time.monotonic() > deadline:
                break
            time.sleep(0.1)
    except OSError:
        held = _nothing
    if held is None:
        yield False
        return
    try:
        yield True
    finally:
        held()


def _nothing() -> None:
    pass


def _take(file: Path) -> Callable[[], None] | None:
    """Returns a function that releases the lock, or None if another process has it; OSError if there can be none."""
    if fcntl is not None:
        # Not truncated, and links are not followed, because others may write to the folder.
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError:  # a network file system may have no locks
            os.close(handle)
        else:
            return lambda: os.close(handle)
    own = file.with_suffix(".held")
    with contextlib.suppress(OSError):
        if time.time() - own.stat().st_mtime > STALE:
            own.unlink()
    try:
        os.close(os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return None

    def give_back() -> None:
        with contextlib.suppress(OSError):
            own.unlink()

    return give_back
