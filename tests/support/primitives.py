"""Which families of kernels a backend was asked for, found by wrapping what a sweep and the row-wise losses call."""

from __future__ import annotations

import functools
from typing import Any

from fusedloss.backends import BACKENDS, triton
from fusedloss.backends.triton import classes as triton_classes
from fusedloss.backends.triton import lists as triton_lists
from fusedloss.backends.triton import pairs as triton_pairs
from fusedloss.backends.triton import pointwise as triton_pointwise
from fusedloss.backends.triton import rows as triton_rows

PLAIN = {
    "prepare": "rows",
    "inverse_norms": "rows",
    "merge": "rows",
    "settle": "rows",
    "finish": "rows",
    "weigh": "stored",
    "exp_rows_and_columns": "stored",
    "top_rows": "top",
    "half_tops": "top",
    "similarities": "similarities",
    "guide_rows": "guide",
    "guide_scores": "guide",
    "stats_rows": "stats",
    "stats_rows_and_columns": "stats+columns",
    "exp_rows": "exp",
    "stats_prefixes": "together",
    "exp_prefixes": "together",
    "grad_prefixes": "together",
}


FOLDS = ("fold_rows", "half_fold", "distill_rows")
SOFTMAX = ("stats_rows", "stats_rows_and_columns", "exp_rows", "exp_rows_and_columns", "grad_rows")


def elements(module: Any, monkeypatch) -> dict[str, int]:
    """The number of similarities that each function of the softmax is handed from now on."""
    counted = dict.fromkeys(SOFTMAX, 0)

    def counting(name: str, function: Any) -> Any:
        @functools.wraps(function)
        def counts(*args: Any, **kwargs: Any) -> Any:
            counted[name] += sum(len(strip.x) * len(strip.y) for strip in _strips([*args, *kwargs.values()]))
            return function(*args, **kwargs)

        return counts

    for name in (name for name in SOFTMAX if hasattr(module, name)):
        monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    return counted


def record(backend: str, monkeypatch) -> set[str]:
    """The families, as they are asked for from now on."""
    module, found = BACKENDS[backend], set()
    for name in (*PLAIN, "grad_rows", *FOLDS):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, _recorded(name, getattr(module, name), found))
    if backend == "triton":
        _record_launches(found, monkeypatch)
    return found


def _recorded(name: str, function: Any, found: set[str]) -> Any:
    @functools.wraps(function)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        found.update(_families(name, args, kwargs))
        return function(*args, **kwargs)

    return recorded


def _strips(given: list[Any]) -> list[Any]:
    return [x for arg in given for x in (arg if isinstance(arg, list) else [arg]) if type(x).__name__ == "Strip"]


def _families(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[str]:
    given = [*args, *kwargs.values()]
    strips, found = _strips(given), set()
    if name in PLAIN:
        found.add(PLAIN[name])
    elif name in FOLDS:
        found.add(f"fold:{args[0].fold.name}")
    else:
        _, _, _, columns, *rest = args
        found.add("grad" if columns is None else "grad+columns")
        if len(rest) > 2 and rest[2] is not None:  # a share of smoothing for each row
            found.add("tally")
    if any(type(arg).__name__ == "Tally" for arg in given):
        found.add("tally")
    if name in ("fold_rows", "half_fold", "similarities"):
        return found
    if any(strip.mask is not None or strip.own_scale is not None for strip in strips):
        found.add("masks")
    if any(strip.softcap for strip in strips):
        found.add("softcap")
    return found


def _record_launches(found: set[str], monkeypatch) -> None:
    """Of kernels outside of the sweep, by the module that they stand in."""
    launch = triton.launch

    def launched(kernel: Any, *args: Any, **constants: Any) -> None:
        name, family = kernel.fn.__name__, kernel.fn.__module__.rpartition(".")[2]
        if family in ("classes", "pairs", "lists", "pointwise"):
            found.add("pair_logits" if name == "pair_logits_kernel" else family)
        launch(kernel, *args, **constants)

    for module in (triton, triton_rows, triton_classes, triton_lists, triton_pairs, triton_pointwise):
        monkeypatch.setattr(module, "launch", launched)
