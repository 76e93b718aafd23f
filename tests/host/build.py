"""csrc/ as a Python module that runs on a CPU: its kernels unchanged, with tests/host/ in the toolkit's place."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).absolute().parents[2]
CSRC, HOST = ROOT / "csrc", ROOT / "tests" / "host"
FLAGS = ["-x", "c++", "-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden"]
WARNINGS = ["-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]
DEFINES = ["-DFUSEDLOSS_HOST", "-DFUSEDLOSS_ARCHS=host"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
FUSED = ["-ffp-contract=fast", "-mfma"]  # x * y + z in one rounding, as nvcc has it
JOBS = 2


def why_not() -> str | None:
    if shutil.which("g++") is None:
        return "needs g++"
    if importlib.util.find_spec("pybind11") is None:
        return "needs pybind11"
    return None if (Path(sysconfig.get_path("include")) / "Python.h").exists() else "needs Python.h"


def build(sanitize: bool = False, fused: bool = False) -> Path:
    """The library in build/host, which keeps objects for the next time; several processes may ask at once.

    Sanitized it has the sm_80 kernels alone.
    """
    folder, flags, common = _settings(sanitize, fused)
    sources = [CSRC / "bindings.cpp"]  # the longest first
    sources += [file for file in sorted(CSRC.glob("*.cpp")) if file not in sources]
    sources += [file for file in sorted(CSRC.glob("*.cu")) if not (sanitize and "sm90" in file.name)]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(JOBS) as pool:
            objects = list(pool.map(lambda source: _compile(source, folder, flags, common), sources))
        library = folder / "_C.so"
        digest = _digest([], objects)
        _make(library, digest, lambda out: _run("g++", "-shared", *map(str, objects), *flags[len(FLAGS) :], "-o", out))
    return library


def bindings() -> Path:
    """Its object of bindings.cpp, half a minute's work, which knows nothing of kernels: tests/stub/ links it, too."""
    folder, flags, common = _settings()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _compile(CSRC / "bindings.cpp", folder, flags, common)


def _settings(sanitize: bool = False, fused: bool = False) -> tuple[Path, list[str], str]:
    """The folder, g++'s flags, and a digest of what all sources hang on."""
    import pybind11

    folder = ROOT / "build" / "host" / ("sanitized" if sanitize else "fused" if fused else "plain")
    folder.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{path}" for path in (HOST, CSRC, pybind11.get_include(), sysconfig.get_path("include"))]
    extra = [*(SANITIZE if sanitize else ["-DFUSEDLOSS_SM90A=1"]), *(FUSED if fused else [])]
    flags = [*FLAGS, *WARNINGS, *DEFINES, *includes, *extra]
    headers = [file for where in (CSRC, HOST) for file in sorted(where.rglob("*.*h"))]
    return folder, flags, _digest([sys.version, _run("g++", "--version"), *flags], headers)


def load(library: Path, name: str = "_C") -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    spec = importlib.util.spec_from_file_location(name, library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _compile(source: Path, folder: Path, flags: list[str], common: str) -> Path:
    out = folder / f"{source.name}.o"
    if source.suffix == ".cpp":  # as fast to run, a quarter faster to compile
        flags = [*flags, "-O0", "-g0"]
    _make(out, _digest([common], [source]), lambda new: _run("g++", *flags, "-c", str(source), "-o", new))
    return out


def _make(out: Path, digest: str, make) -> None:
    """By content: checkouts and caches change times. Renamed into place: a process may have the old one mapped."""
    key = out.with_name(out.name + ".digest")
    if out.exists() and key.exists() and key.read_text() == digest:
        return
    new = out.with_name(out.name + ".new")
    make(str(new))
    new.replace(out)
    key.write_text(digest)


def _digest(words: list[str], files: list[Path]) -> str:
    digest = hashlib.sha256(repr(words).encode())
    for file in files:
        digest.update(repr((file.name, file.stat().st_size)).encode() + file.read_bytes())
    return digest.hexdigest()


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout
