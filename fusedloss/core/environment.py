"""The environment variables. Each is read at every call, and whatever it does not know is an error, never ignored.

Values are compared without case or surrounding space; an empty one counts as not set.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

BACKENDS = ("cuda", "triton", "chunked", "dense", "reference")
CPU_PRODUCTS = ("auto", "mkl", "onednn")
VERIFY = ("first", "off", "inline", "trust")
SWITCH = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}

Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """What torch.compile calls and does not trace: for the graph, which arguments that are no tensors decide.

    As torch.compiler.assume_constant_result, which imports the compiler, seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def get(name: str) -> str | None:
    """os.environ.get in 0.2 us: that one raises and catches two errors where a variable is not set, 1 us."""
    known = getattr(os.environ, "_data", None)  # the dictionary in it
    return None if known is not None and ENCODED[name] not in known else os.environ.get(name)


def switch(name: str) -> bool:
    """Whether a variable that is on or off is on."""
    value = get(name) or ""
    on = SWITCH.get(value.strip().lower())
    if on is None:
        raise ValueError(f"{name} must be 1, true, yes, 0, false or no, got {value!r}; set {name}=1, or unset it")
    return on


def backend() -> str:
    """What backend="auto" means by FUSEDLOSS_BACKEND, or "auto"."""
    value = get("FUSEDLOSS_BACKEND")
    if value is None:
        return "auto"
    chosen = value.strip().lower() or "auto"
    if chosen != "auto" and chosen not in BACKENDS:
        raise ValueError(f"FUSEDLOSS_BACKEND must be auto, {', '.join(BACKENDS)}, got {value!r}; set one, or unset it")
    return chosen


def workspace_bytes() -> int | None:
    """What workspace_bytes=None means by FUSEDLOSS_WORKSPACE_BYTES; None: the device's default."""
    value = get("FUSEDLOSS_WORKSPACE_BYTES") or ""
    digits = value.strip()
    if not digits:
        return None
    if not (digits.isascii() and digits.isdecimal()) or int(digits) == 0:
        raise ValueError(
            f"FUSEDLOSS_WORKSPACE_BYTES must be a positive number of bytes, got {value!r}; "
            "set 67108864, say, for 64 MiB, or unset it"
        )
    return int(digits)


def cpu_products() -> str:
    """Who multiplies fp32 matrices on a CPU: see `products.chosen`."""
    value = get("FUSEDLOSS_CPU_PRODUCTS") or ""
    chosen = value.strip().lower() or "auto"
    if chosen not in CPU_PRODUCTS:
        raise ValueError(
            f"FUSEDLOSS_CPU_PRODUCTS must be {', '.join(CPU_PRODUCTS)}, got {value!r}; set one, or unset it for auto"
        )
    return chosen


def verify() -> str:
    """When a kernel is proved that `auto` would take: see `trust.ask`."""
    value = get("FUSEDLOSS_VERIFY") or ""
    chosen = value.strip().lower() or "first"
    if chosen not in VERIFY:
        raise ValueError(f"FUSEDLOSS_VERIFY must be {', '.join(VERIFY)}, got {value!r}; set one, or unset it for first")
    return chosen


def cache_dir() -> Path:
    """Where verdicts are kept: FUSEDLOSS_CACHE_DIR, else $XDG_CACHE_HOME/fusedloss, else ~/.cache/fusedloss."""
    value = os.environ.get("FUSEDLOSS_CACHE_DIR", "").strip()
    if not value:
        base, home = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~")
        if os.path.isabs(base):  # others are to be ignored, says the standard
            return Path(base, "fusedloss")
        return Path(home if os.path.isabs(home) else os.sep, ".cache", "fusedloss")  # who has no home keeps nothing
    folder = Path(os.path.expanduser(value))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"FUSEDLOSS_CACHE_DIR must be a folder, got the file {value!r}; name a folder, or unset it")
    return folder


def audit() -> float:
    """The share of calls that `trust.audit` looks at; 0: none."""
    value = get("FUSEDLOSS_AUDIT") or ""
    if not value.strip():
        return 0.0
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:  # nor NaN
        raise ValueError(
            f"FUSEDLOSS_AUDIT must be a number from 0 to 1, the share of calls, got {value!r}; set 1e-3, or unset it"
        )
    return share


VARIABLES: dict[str, Callable[[], object]] = {
    "FUSEDLOSS_BACKEND": backend,
    "FUSEDLOSS_WORKSPACE_BYTES": workspace_bytes,
    "FUSEDLOSS_CPU_PRODUCTS": cpu_products,
    "FUSEDLOSS_DISABLE": lambda: switch("FUSEDLOSS_DISABLE"),
    "FUSEDLOSS_CHECK": lambda: switch("FUSEDLOSS_CHECK"),
    "FUSEDLOSS_VERIFY": verify,
    "FUSEDLOSS_CACHE_DIR": cache_dir,
    "FUSEDLOSS_AUDIT": audit,
}
OTHERS = (
    "FUSEDLOSS_CALLS",  # a file, of tools/pytest_patch.py
    "FUSEDLOSS_CUDA",  # of setup.py
    "FUSEDLOSS_CUDA_ARCHS",
    "FUSEDLOSS_TEST_PATIENCE",  # of the tests
    "TRITON_INTERPRET",  # of Triton
)
ENCODED = {name: os.environ.encodekey(name) for name in (*VARIABLES, *OTHERS)}


def state() -> dict[str, dict[str, str | None]]:
    """Every variable, for `info`: its value, or None if it is not set, and why that is refused; misspelt ones last."""
    known = (*VARIABLES, *OTHERS)
    found: dict[str, dict[str, str | None]] = {}
    for name in known:
        found[name] = {"value": os.environ.get(name), "error": None}
        try:
            VARIABLES.get(name, str)()
        except ValueError as error:
            found[name]["error"] = str(error)
    for name in sorted(os.environ):
        if name.startswith("FUSEDLOSS_") and name not in known:
            found[name] = {"value": os.environ[name], "error": "fusedloss has no variable of this name"}
    return found
