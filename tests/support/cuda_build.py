"""fusedloss._C as nvcc builds it, for tests that read it, or call it without a GPU: the installed one, or our own."""

from __future__ import annotations

import fcntl
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).absolute().parents[2]


def archs() -> str:
    """FUSEDLOSS_CUDA_ARCHS of the one build that all tests read: sm_80, sm_90 and sm_90a, or "" for all architectures.

    All where docs/cuda-resources.md is not of this nvcc and these sources: its writer held the others to the rules.
    """
    import cuda_resources

    table = (ROOT / "docs" / "cuda-resources.md").read_text()
    known = f"nvcc {nvcc_version()} from sources {cuda_resources.digest(*cuda_resources.SOURCES)};" in table
    return "80;90a" if known else ""


def load() -> ModuleType:
    """The module. A process has one of this name: pybind11 answers with the first, whatever file is asked for."""
    try:
        from fusedloss import _C
    except ImportError:
        file = library()
        module = _load(file)
        assert Path(str(module.__file__)) == file, f"{module.__file__} was loaded before: {file} has no place here"
        return module
    return _C


def library() -> Path:
    """Its file: of `archs()`; an installed one was built for the GPUs here, or by name."""
    if (spec := importlib.util.find_spec("fusedloss._C")) and spec.origin:
        return Path(spec.origin)
    if reason := why_not():
        pytest.skip(f"fusedloss._C was not built, and cannot be: {reason}")
    return build(archs())


def archs_of(file: Path) -> list[str]:
    """What its build_info says, in a process of its own."""
    code = (
        "import json, pathlib, sys, cuda_build as b; print(json.dumps(b._load(pathlib.Path(sys.argv[1])).build_info()))"
    )
    command = [sys.executable, "-c", code, str(file)]
    done = subprocess.run(command, cwd=ROOT / "tests" / "support", check=True, capture_output=True, text=True)
    return json.loads(done.stdout)["archs"]


def why_not() -> str | None:
    for name in ("setuptools", "pybind11", "ninja"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"needs {name}: pip install -e .[dev]"
    if nvcc() is None:
        return "nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda)"
    return None if (Path(sysconfig.get_path("include")) / "Python.h").exists() else "needs Python.h"


def nvcc() -> str | None:
    return runpy.run_path(str(ROOT / "setup.py"), run_name="fusedloss_setup")["find_nvcc"]()


def nvcc_version() -> str | None:
    """13.0.88, or None where there is none."""
    if (compiler := nvcc()) is None:
        return None
    said = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    return found[1] if (found := re.search(r"\bV([\d.]+)", said)) else None


def unoptimised(nvcc: str) -> dict[str, str]:
    """Variables for a build in a fifth of the time, where this nvcc can; ptxas spills and serialises then."""
    options = subprocess.run([nvcc, "--help"], check=True, capture_output=True, text=True).stdout
    return {"NVCC_APPEND_FLAGS": "--Ofast-compile=max"} if "--Ofast-compile" in options else {}


def build(archs: str) -> Path:
    """In build/nvcc, which keeps objects for the next time; several processes may ask at once."""
    name = f"{sys.implementation.cache_tag}-{archs.replace(';', '-') or 'all'}"
    folder = ROOT / "build" / "nvcc" / name
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"FUSEDLOSS_CUDA": "1", "FUSEDLOSS_CUDA_ARCHS": archs}
    # --force: setuptools looks at the sources' times alone, ninja at those of the headers as well.
    command = ["setup.py", "build_ext", "--force", "--build-lib", str(folder), "--build-temp", str(folder / "objects")]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return next((folder / "fusedloss").glob("_C.*.so"))


def _load(library: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader("fusedloss._C", str(library))
    specification = importlib.util.spec_from_file_location("fusedloss._C", library, loader=loader)
    assert specification is not None
    module = importlib.util.module_from_spec(specification)
    loader.exec_module(module)
    return module
