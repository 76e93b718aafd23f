"""`python -m fusedloss info`: versions, devices, and every backend: available, or why not."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

import fusedloss

from .backends import BACKENDS, cuda, select
from .problem import Block, Problem


def probe(device: str, dtype: torch.dtype = torch.float32) -> Problem:
    """The smallest problem of the commonest kind."""
    x = torch.ones(2, 4, device=device, dtype=dtype)
    ones = torch.ones(2, device=device)
    return Problem((x, x), (Block(0, 1),), ones[0], torch.arange(2, device=device), ones)


def lines() -> list[str]:
    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    found = [
        f"fusedloss  {fusedloss.__version__}",
        f"python     {platform.python_version()} on {platform.platform()}",
        f"torch      {torch.__version__}",
        f"triton     {version('triton')}",
    ]
    built = cuda.build_info()
    how = (
        "not built (nvcc not found at installation)"
        if built is None
        else f"CUDA {built['cuda_version']}, {built['archs']}"
    )
    found.append(f"_C         {how}")
    for name in ("FUSEDLOSS_BACKEND", "FUSEDLOSS_CHECK"):
        found.append(f"{name}={os.environ.get(name, '')}" + ("" if name in os.environ else "(not set)"))
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for device in devices:
        problem = probe(device)
        what = torch.cuda.get_device_name(device) if device != "cpu" else torch.backends.cpu.get_cpu_capability()
        found.append(f"{device}: {what}, auto picks {select(problem, 'auto')}")
        for name, module in BACKENDS.items():
            found.append(f"  {name:10} {module.why_not(problem) or 'available'}")
    return found
