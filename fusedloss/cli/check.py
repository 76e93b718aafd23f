"""`python -m fusedloss check`: each backend on this machine against fp64, as a share of the error budget."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

from ..backends import BACKENDS
from ..bench import tables
from ..bench.machine import probe
from ..core import ctrl_c
from ..core.errors import UnsupportedError
from ..proof import cases
from ..trust import families

LOSSES = cases.CHECKED
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUANTITIES = ("value", "first gradient", "second gradient")


def rows(devices: list[str]) -> Iterator[dict[str, Any]]:
    """Yields a row per device, backend, loss and dtype: shares of the budget (1 passes), a reason, or an error."""
    for device in devices:
        for backend, module in BACKENDS.items():
            reasons = {dtype: module.why_not(probe(device, dtype)) for dtype in DTYPES}
            row: dict[str, Any] = {"device": device, "backend": backend}
            if None not in reasons.values() and len(set(reasons.values())) == 1:
                yield {**row, "dtype": "all", "loss": "all", "reason": reasons[DTYPES[0]]}
                continue
            for dtype, reason in reasons.items():
                row["dtype"] = str(dtype).removeprefix("torch.")
                if reason:
                    yield {**row, "loss": "all", "reason": reason}
                    continue
                for name in LOSSES:
                    try:
                        yield {**row, "loss": name, "shares": _shares(name, backend, dtype, torch.device(device))}
                    except UnsupportedError as error:
                        yield {**row, "loss": name, "reason": str(error)}
                    except Exception as error:  # a backend that fails after it accepted the problem; the next one runs
                        yield {**row, "loss": name, "error": f"{type(error).__name__}: {error}".splitlines()[0]}


def _shares(name: str, backend: str, dtype: torch.dtype, device: torch.device) -> list[float]:
    """Returns shares of the budget in the order of QUANTITIES; a loss of one leaf has two."""
    precision = families.precision(dtype)
    assert precision is not None
    return list(cases.errors(name, backend, precision, device).values())[: len(QUANTITIES)]


def main(as_json: bool = False) -> int:
    """Checks, and prints the result. After Ctrl-C it holds the checks until then."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    table, found, failed, interrupted = [], [], 0, False
    try:
        with tables.progress() as tick:
            for row in rows(devices):
                tick("{device} {backend} {dtype}".format(**row))
                shares = row.get("shares", [])
                out_of_budget = "error" in row or not all(share <= 1 for share in shares)
                failed += out_of_budget
                state = "cannot run" if "reason" in row else "failed" if out_of_budget else "ok"
                found.append(row | {"shares": dict(zip(QUANTITIES, shares, strict=False)), "state": state})
                verdict = row.get("reason", "FAILED" if out_of_budget else "ok")
                if "error" in row:
                    verdict += f": {row['error']}"
                cells = [f"{share:.2f}" for share in shares] + [""] * (len(QUANTITIES) - len(shares))
                table.append([row["device"], row["backend"], row["loss"], row["dtype"], *cells, verdict])
    except KeyboardInterrupt:
        interrupted = True
    if as_json:
        tables.print_json(found)
    else:
        headers = ["device", "backend", "loss", "dtype", *QUANTITIES, ""]
        tables.table("errors against fp64, as shares of the budget 2 x error of eager + eps", headers, table)
    if failed:
        print(f"{failed} of {len(table)} out of budget", file=sys.stderr)
    if interrupted:
        print("interrupted: this is what was checked until then", file=sys.stderr)
        return ctrl_c.CODE
    return int(failed > 0)
