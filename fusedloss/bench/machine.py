"""`python -m fusedloss info`: versions, devices, and for every backend whether it is available, or why it is not."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

from ..backends import BACKENDS, KERNELS, cuda, select
from ..core import environment
from ..core.errors import UnsupportedError
from ..core.problem import Block, Problem
from ..core.version import VERSION
from ..trust import ask, families, verdicts
from .tables import print_json

LARGE = (8192, 64)  # rows and D of a batch that `auto` does not give to `dense`


def probe(device: str, dtype: torch.dtype = torch.float32, shape: tuple[int, int] = (2, 4), **options: Any) -> Problem:
    """Returns a problem to ask backends about, by default a very small InfoNCE. Its tensors are expanded: no memory."""
    x = torch.ones(1, 1, device=device, dtype=dtype).expand(shape)
    ones = torch.ones(1, device=device).expand(shape[0])
    target = torch.zeros(1, dtype=torch.int64, device=device).expand(shape[0])
    return Problem((x, x), (Block(0, 1),), ones[0], target, ones, **options)


def main(as_json: bool = False) -> int:
    if as_json:
        print_json(facts())
    else:
        print("\n".join(lines()))
    return 0


def facts() -> dict[str, Any]:
    """Versions, variables and devices. A backend's value is why it cannot run, or None."""

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    devices = []
    for device in ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]:
        problem = probe(device)
        with ask.unasked():
            auto = picked(probe(device, shape=LARGE))
        reasons = {name: module.why_not(problem) for name, module in BACKENDS.items()}
        kernels = proved(problem.device) if any(reasons[name] is None for name in KERNELS) else {}
        about = {"device": device, "name": describe(device), "auto": auto, "backends": reasons}
        devices.append(about | {"verdicts": kernels})
    return {
        "fusedloss": VERSION,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "triton": version("triton"),
        "_C": extension(),
        "variables": environment.state(),
        "devices": devices,
    }


def lines() -> list[str]:
    """`facts` as text."""
    known = facts()
    found = [f"{name:10} {known[name]}" for name in ("fusedloss", "python", "torch", "triton", "_C")]
    for name, variable in known["variables"].items():
        value, error = variable["value"], variable["error"]
        shown = f"{name} is not set" if value is None else f"{name}={value}"
        found.append(f"{shown}: {error}" if error else shown)
    for device in known["devices"]:
        found.append(f"{device['device']}: {device['name']}; auto picks {device['auto']}")
        found += [f"  {name:10} {reason or 'available'}" for name, reason in device["backends"].items()]
        found += [f"  {name:10} {text}" for name, text in device["verdicts"].items()]
    return found


def proved(device: torch.device) -> dict[str, str]:
    """Returns the verdicts of each backend's kernels on `device`, and the file that holds them."""
    try:
        known, kept = ask.known(device), str(verdicts.path(device))
    except ValueError as error:  # FUSEDLOSS_CACHE_DIR is no folder
        return {"verdicts": str(error)}
    found = {}
    for backend in KERNELS:
        every = [
            verdicts.name_of(backend, family, precision)
            for precision in families.PRECISIONS
            for family in families.of_backend(backend, precision)
        ]
        by_state = {state: [n for n in every if n in known and known[n].state == state] for state in verdicts.STATES}
        unknown = len(every) - sum(len(by_state[state]) for state in (verdicts.PROVED, verdicts.FAILED))
        failed = [name.removeprefix(f"{backend} ") for name in by_state[verdicts.FAILED]]
        found[backend] = f"{len(by_state[verdicts.PROVED])} families proved, {len(failed)} failed, {unknown} unknown"
        found[backend] += f"; failed: {', '.join(failed)}" if failed else ""
    return found | {"verdicts": f"in {kept}"}


def extension() -> str:
    """Returns a line with the GPUs that fusedloss._C was built for, and whether it runs on those of this machine."""
    built = cuda.build_info()
    if built is None:
        return cuda.NOT_BUILT
    archs = built["archs"]
    assert isinstance(archs, list)
    how = f"CUDA {built['cuda_version']}: {' '.join(archs)}"
    if driver := built.get("driver_version"):
        how += f"; the driver runs CUDA up to {driver}"
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        runs = cuda.runs_on(archs, (major, minor)) and not cuda.old_driver(built, (major, minor))
        how += f"; {'runs' if runs else 'does not run'} on cuda:{i} (sm_{major}{minor})"
    return how


def picked(problem: Problem) -> str:
    """Returns the backend that `auto` picks, or the error if FUSEDLOSS_BACKEND names one that cannot run `problem`."""
    try:
        return select(problem, "auto")
    except (UnsupportedError, ValueError) as error:
        return f"nothing that runs: {error}"


def describe(device: str) -> str:
    if device == "cpu":
        threads = torch.get_num_threads()
        return f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' * (threads > 1)}"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
