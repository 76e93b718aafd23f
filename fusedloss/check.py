"""`python -m fusedloss check`: each backend on this machine against fp64, as a share of the error budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fusedloss

from . import testing
from .backends import BACKENDS
from .info import probe
from .problem import stats_dtype

LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "info_nce": (
        lambda q, k, s, **o: fusedloss.info_nce(q, k, temperature=1 / s, **o),
        lambda q, k, s: testing.eager_info_nce(q, k, 1 / s),
    ),
    "clip": (lambda q, k, s, **o: fusedloss.clip(q, k, s, **o), testing.eager_clip),
    "multiple_negatives_ranking": (
        lambda q, k, s, **o: fusedloss.multiple_negatives_ranking(q, k, scale=s, **o),
        lambda q, k, s: testing.eager_multiple_negatives_ranking(q, k, scale=s),
    ),
}
ROWS, DIM = 257, 96  # ragged for every tile size


def rows(devices: list[str]) -> Iterator[dict[str, Any]]:
    """One row per device x backend x loss x dtype: its worst share of the budget (1 passes), or why not."""
    for device in devices:
        for backend, module in BACKENDS.items():
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                row = {"device": device, "backend": backend, "dtype": str(dtype).removeprefix("torch.")}
                reason = module.why_not(probe(device, dtype))
                if reason:
                    yield {**row, "loss": "all", "reason": reason}
                    continue
                for name, (ours, eager) in LOSSES.items():
                    yield {**row, "loss": name, "share": _share(ours, eager, device, backend, dtype)}


def _share(ours: Any, eager: Any, device: str, backend: str, dtype: torch.dtype) -> float:
    query, key = (x.to(device) for x in testing.inputs("random", ROWS, ROWS, DIM, dtype))
    tensors = [query, key, torch.tensor(20.0, dtype=stats_dtype(dtype), device=device)]
    found = testing.value_and_gradients(lambda *t: ours(*t, backend=backend), tensors)
    baseline = testing.value_and_gradients(eager, tensors)
    exact = testing.value_and_gradients(lambda *t: ours(*t, backend="reference"), [t.double() for t in tensors])
    # The scale's gradient has a bound of its own, in the tests: a max over one element is no yardstick.
    shares = [testing.budget_share(f, b, e, dtype) for f, b, e in zip(found[:3], baseline, exact, strict=False)]
    return max(shares)


def main() -> int:
    from rich.console import Console
    from rich.table import Table

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    table = Table("device", "backend", "loss", "dtype", "share of the error budget", title="fusedloss check")
    failed = 0
    for row in rows(devices):
        verdict = row.get("reason")
        if verdict is None:
            out_of_budget = not row["share"] <= 1
            failed += out_of_budget
            verdict = f"{row['share']:.2f}" + ("  FAILED" if out_of_budget else "")
        table.add_row(row["device"], row["backend"], row["loss"], row["dtype"], verdict)
    Console(width=140).print(table)
    return int(failed > 0)
