"""`python -m fusedloss report`: versions, verdicts and races of this machine, as one block to paste into an issue.

The block is JSON between fences, which benchmarks/reports.py reads. It holds no paths and no names of users.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from typing import Any

import torch

from ..backends import KERNELS
from ..bench.machine import describe, extension
from ..core import environment
from ..core.version import VERSION
from ..trust import ask, families, verdicts
from .verify import devices

FORM = 1
PATHS = ("FUSEDLOSS_CACHE_DIR",)


def main(as_json: bool = False) -> int:
    print(_written(found()) if as_json else block())
    return 0


def found() -> dict[str, Any]:
    return {"fusedloss report": FORM, "versions": versions(), "devices": [of_device(d) for d in devices(None)]}


def block() -> str:
    return f"```json\n{_written(found())}\n```"


def versions() -> dict[str, Any]:
    """Returns the versions of installed packages, and the environment variables that are set."""

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return {
        "fusedloss": VERSION,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "triton": version("triton"),
        "_C": extension(),
        "variables": {name: os.environ[name] for name in environment.VARIABLES if name in os.environ.keys() - PATHS},
    }


def of_device(device: torch.device) -> dict[str, Any]:
    kept = verdicts.read(device)
    return {
        "device": str(device),
        "name": describe(str(device)),
        "key": verdicts.key(device),
        "verdicts": {backend: _states(backend, ask.known(device)) for backend in KERNELS},
        "races": kept.races,
    }


def _states(backend: str, known: dict[str, verdicts.Verdict]) -> dict[str, Any]:
    """Returns the numbers of proved and unknown families, and the failed ones with their reasons."""
    found: dict[str, Any] = {verdicts.PROVED: 0, verdicts.FAILED: {}, verdicts.UNKNOWN: 0}
    for precision in families.PRECISIONS:
        for family in families.of_backend(backend, precision):
            verdict = known.get(verdicts.name_of(backend, family, precision), verdicts.Verdict(verdicts.UNKNOWN))
            if verdict.state == verdicts.FAILED:
                found[verdicts.FAILED][f"{family} {precision}"] = verdict.reason
            else:
                found[verdict.state] += 1
    return found


def _written(found: Any, depth: int = 0) -> str:
    """Returns JSON with a line for each version, verdict and race."""
    inner, outer = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(found, dict) and depth < 4 and any(isinstance(value, dict | list) for value in found.values()):
        parts = [f"{json.dumps(name)}: {_written(value, depth + 1)}" for name, value in found.items()]
        return "{" + inner + ("," + inner).join(parts) + outer + "}"
    if isinstance(found, list) and found and isinstance(found[0], dict):
        return "[" + inner + ("," + inner).join(_written(part, depth + 1) for part in found) + outer + "]"
    return json.dumps(found)
