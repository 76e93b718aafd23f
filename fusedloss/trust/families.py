"""Families of kernels: groups that can be right or wrong independently, and the families that a loss takes.

A verdict is of a family on one backend in one precision. A sweep takes several, all of which must be good; a loss
without a sweep takes one. `cases.py` proves each.

    rows, stats, .. the epilogues of a sweep, which `core/epilogues.py` explains: "rows" belongs to every sweep,
                    `fold:NAME` are the folds that kernels compute in their tile
    masks           whatever drops columns, further targets included, or scales a row's own: a branch of all above
    together        several prefixes out of one product
    softcap, tally  branches of them, too; tally includes smoothing whose share differs from row to row

    classes         rows of logits                  pair_logits     logits of pairs of embeddings
    pairs           rows of embeddings              lists           scores of documents
    pointwise       elements
"""

from __future__ import annotations

import functools

import torch

from ..core import folds
from ..core.epilogues import EPILOGUES, OPTIONS
from ..core.mask import NO_MASK
from ..core.problem import Problem
from ..core.rows import tf32

FOLDS = tuple(name for name, fold in folds.FOLDS.items() if fold.sums != folds.ROW)  # of sums in the tile
# csrc/ folds one matrix a tile, and once: there the similarities are folded in torch, and prefixes swept one by one.
TRITON_ONLY = ("together", *(f"fold:{name}" for name in FOLDS if folds.FOLDS[name].sums == folds.TEACHER))
_KERNELS = [name for name in EPILOGUES if not name.startswith(("prefixes", "half", "fold:"))]
SWEEP = (*_KERNELS, *OPTIONS, *(f"fold:{name}" for name in FOLDS))
ROWWISE = ("classes", "pair_logits", "pairs", "lists", "pointwise")
BACKENDS = ("cuda", "triton")  # the backends with kernels
PRECISIONS = ("bf16", "fp16", "tf32", "fp32")

Flags = tuple[tuple[str, str] | None, bool, bool, bool, bool, bool, bool, bool, bool, bool, bool, bool]

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def precision(dtype: torch.dtype) -> str | None:
    """Returns the precision of products of a dtype: one of PRECISIONS, None for fp64, which no kernel takes."""
    if dtype == torch.float32:
        return "tf32" if tf32() else "fp32"
    return _NAMES.get(dtype)


@functools.cache
def of_backend(backend: str, precision: str | None = None) -> tuple[str, ...]:
    """Returns the families of "cuda" or "triton"; with a precision, those that are ever launched in it.

    fp16 stores no exponentials, and is folded in torch, because a fold's derivatives may be below its range. Only
    those of a distillation are known to be in it.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}; no other has kernels")
    known = on(backend, SWEEP)
    if precision == "fp16":
        lacks = {"exp", "stored", *(f"fold:{name}" for name in FOLDS)} - set(TRITON_ONLY)
        known = tuple(name for name in known if name not in lacks)
    return (*known, *(ROWWISE if backend == "triton" else ()))


def on(backend: str, families: tuple[str, ...]) -> tuple[str, ...]:
    """Returns those of the families that a backend has."""
    return families if backend == "triton" else tuple(name for name in families if name not in TRITON_ONLY)


def of_problem(problem: Problem) -> tuple[str, ...]:
    """Returns the families that a forward and a backward of `problem` may launch, in the precision of its operands.

    Never too few: wanted gradients are not known here, nor whether a row's columns come from several ranks. `on` leaves
    out those that a backend lacks. Guides may be of another dtype: see `guide_dtypes`.
    """
    return of_flags(flags(problem))


def of_flags(flags: Flags) -> tuple[str, ...]:
    found = _found if torch.compiler.is_compiling() else _families  # a compiler warns of a cache
    return found(*flags)


def flags(problem: Problem) -> Flags:
    """Returns the properties of a problem that decide its families: the arguments of `_found`."""
    masked, guided = problem.targets is not None, False
    for block in problem.blocks:
        mask = block.mask
        if mask is not NO_MASK:
            masked, guided = masked or mask.given, guided or mask.guide is not None
        masked = masked or block.own_penalty != block.penalty
    fold, softcap = problem.fold, problem.softcap != 0
    return (
        None if fold is None else (fold.name, fold.distance),
        problem.symmetric,
        problem.mirrored,
        problem.top,
        masked,
        guided,
        softcap,
        problem.wants_tally,
        problem.label_smoothing != 0,
        (softcap or problem.scale_bound is not None) and problem.has_safe_shift,
        problem.operands[0].dtype is torch.float16,
        bool(problem.prefixes),
    )


def guide_dtypes(problem: Problem) -> tuple[torch.dtype, ...]:
    """Returns the guides' dtypes other than the operands'. In their precision a sweep takes `rows` and `guide`, too."""
    found = {x.dtype: None for block in problem.blocks for x in block.mask.guide or ()}  # in order
    return tuple(dtype for dtype in found if dtype != problem.dtype)


def _found(
    fold: tuple[str, str] | None,
    symmetric: bool,
    mirrored: bool,
    top: bool,
    masked: bool,
    guided: bool,
    softcap: bool,
    tally: bool,
    smoothing: bool,
    safe: bool,
    fp16: bool,
    prefixes: bool,
) -> tuple[str, ...]:
    taken = {"rows"}
    if fold is not None:
        name, distance = fold
        if f"fold:{name}" in TRITON_ONLY and not distance:  # where `cuda` takes the similarities
            taken |= {f"fold:{name}", "stats", "similarities"}
        elif name in FOLDS and not distance and not fp16:
            taken.add(f"fold:{name}")
        elif distance in ("", "cosine"):  # other distances are computed in torch
            taken.add("similarities")
    elif top:
        taken.add("top")
    elif symmetric:
        taken |= {"stats+columns", "grad+columns", *(["stored"] if safe else [])}
    else:
        taken |= {"stats", "grad", *(["exp"] if safe else [])}
        if mirrored:  # half of the chunks' columns
            taken |= {"stats+columns", "grad+columns", *(["stored"] if safe else [])}
    if prefixes and "stats" in taken:
        taken.add("together")
    tally = tally or (smoothing and (masked or softcap))  # `Problem.smooths_by_row`
    options = {"masks": masked, "guide": guided, "softcap": softcap, "tally": tally}
    taken |= {name for name, given in options.items() if given}
    return tuple(name for name in SWEEP if name in taken)


_families = functools.cache(_found)


def plain(*, symmetric: bool, safe: bool, fp16: bool) -> tuple[str, ...]:
    """Returns the families of a softmax loss without further options."""
    options = dict.fromkeys(("mirrored", "top", "masked", "guided", "softcap", "tally", "smoothing", "prefixes"), False)
    return _found(None, symmetric=symmetric, safe=safe and not fp16, fp16=fp16, **options)
