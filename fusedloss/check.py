"""`python -m fusedloss check`: each backend on this machine against fp64, as a share of the error budget."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fusedloss

from . import _ctrl_c, show, testing
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
    # One of each family of losses without a sweep: pairs of rows, lists, classes, elements.
    "cosine_similarity": (
        lambda q, k, s, **o: fusedloss.cosine_similarity(q, k, _numbers(q), **o),
        lambda q, k, s: F.mse_loss(F.cosine_similarity(_wide(q), _wide(k)), _numbers(q)),
    ),
    "list_net": (
        lambda q, k, s, **o: fusedloss.list_net(q, k.detach(), **o),
        lambda q, k, s: F.cross_entropy(_wide(q), _wide(k.detach()).softmax(1)),
    ),
    "cross_entropy": (
        lambda q, k, s, **o: fusedloss.cross_entropy(q, _classes(q), **o),
        lambda q, k, s: F.cross_entropy(q, _classes(q)),
    ),
    "mse": (lambda q, k, s, **o: fusedloss.mse(q, k, **o), lambda q, k, s: F.mse_loss(q, k)),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS, DIM = 257, 96  # ragged for every tile size


QUANTITIES = ("value", "query's gradient", "key's gradient")


def _wide(x: Tensor) -> Tensor:
    return x.to(stats_dtype(x.dtype))


def _numbers(x: Tensor) -> Tensor:
    return torch.linspace(0, 1, len(x), dtype=stats_dtype(x.dtype), device=x.device)


def _classes(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device) % x.shape[1]


def rows(devices: list[str]) -> Iterator[dict[str, Any]]:
    """One row per device x backend x loss x dtype: shares of the budget (1 passes), or why not, or what it raised."""
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
                for name, (ours, eager) in LOSSES.items():
                    try:
                        yield {**row, "loss": name, "shares": _shares(ours, eager, device, backend, dtype)}
                    except Exception as error:  # a backend that cannot do what it said: a failure, and the next one
                        yield {**row, "loss": name, "error": f"{type(error).__name__}: {error}".splitlines()[0]}


def _shares(ours: Any, eager: Any, device: str, backend: str, dtype: torch.dtype) -> list[float]:
    """In the order of QUANTITIES."""
    query, key = (x.to(device) for x in testing.inputs("random", ROWS, ROWS, DIM, dtype))
    tensors = [query, key, torch.tensor(20.0, dtype=stats_dtype(dtype), device=device)]
    found = testing.value_and_gradients(lambda *t: ours(*t, backend=backend), tensors)
    baseline = testing.value_and_gradients(eager, tensors)
    exact = testing.value_and_gradients(lambda *t: ours(*t, backend="reference"), [t.double() for t in tensors])
    # The scale's gradient has a bound of its own, in the tests: a max over one element is no yardstick.
    return [testing.budget_share(f, b, e, dtype) for f, b, e in zip(found[:3], baseline, exact, strict=False)]


def main() -> int:
    """Ctrl-C stops it; what was checked until then is shown."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    table, failed, interrupted = [], 0, False
    try:
        with show.progress() as tick:
            for row in rows(devices):
                tick("{device} {backend} {dtype}".format(**row))
                shares = row.get("shares", [])
                out_of_budget = "error" in row or not all(share <= 1 for share in shares)
                failed += out_of_budget
                verdict = row.get("reason", "FAILED" if out_of_budget else "ok")
                if "error" in row:
                    verdict += f": {row['error']}"
                cells = [f"{share:.2f}" for share in shares] or [""] * len(QUANTITIES)
                table.append([row["device"], row["backend"], row["loss"], row["dtype"], *cells, verdict])
    except KeyboardInterrupt:
        interrupted = True
    headers = ["device", "backend", "loss", "dtype", *QUANTITIES, ""]
    show.table("errors against fp64, as shares of the budget 2 x error of eager + eps", headers, table)
    if failed:
        print(f"{failed} of {len(table)} out of budget", file=sys.stderr)
    if interrupted:
        print("interrupted: this is what was checked until then", file=sys.stderr)
        return _ctrl_c.CODE
    return int(failed > 0)
