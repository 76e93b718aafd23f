"""The backends, and the choice among them.

A backend is a module with `why_not(problem) -> str | None`. `cuda`, `triton` and `chunked` have the primitives of
`protocol.Sweeps`, which the driver in `sweep/` calls. `reference` materialises the logits in differentiable torch:
`loss_rows(problem)`, `top_rows(problem)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..core import checks, environment
from ..core.epilogues import Epilogue
from ..core.errors import UnsupportedError
from ..core.problem import Block, Fold, Problem
from ..trust import ask, families
from ..trust import order as order_
from . import chunked, cuda, dense, reference, triton
from .protocol import Sweeps

SWEEPS: dict[str, Sweeps] = {"cuda": cuda, "triton": triton, "chunked": chunked}
BACKENDS: dict[str, ModuleType] = dict(zip(checks.BACKENDS, (cuda, triton, chunked, dense, reference), strict=True))

Candidates = Sequence[tuple[str, bool]]  # backends in order of preference; True: its kernels need no further proof

KERNELS = families.BACKENDS  # the backends that `auto` takes only after their kernels are proved on the device

AUTO: dict[str, tuple[str, ...]] = {
    "cpu": ("chunked", "reference"),
    "cuda": ("cuda", "triton", "chunked", "reference"),
    "xpu": ("triton", "chunked", "reference"),
}
# csrc/ has no tcgen05 kernel, so on these GPUs the vendor's products should be faster (not measured).
AUTO_FROM_SM_100 = ("triton", "chunked", "cuda", "reference")
WITHOUT_KERNELS = ("chunked", "reference")  # on devices without kernels
PLAIN = (order_.REFERENCE, True)
DENSE = (("dense", True),)
# Elements up to which `auto` on a CPU hands a loss without a sweep to ordinary torch, whose calls take less time there
# than a walk with the gradient beside it. Measured on one thread of an EPYC; on a GPU nothing was measured.
FEW = {
    "operator": 1 << 17,  # torch's own operator of the absolute error
    "squares": 1 << 19,  # of the squared error: 1.17 of its time at 2^18, 0.69 at 2^20
    "longer": 1 << 22,  # operators that the walk passes later: Huber's, and losses that are not reduced
    "pointwise": 1 << 14,  # formulas of several operators, by family
    "classes": 1 << 17,
    "pairs": 1 << 18,
    "cosines": 1 << 16,
    "lists": 1 << 15,
}
MOST_CHOSEN = 1024  # entries of `order.chosen`, most of which differ in their sizes
AUTOMATIC = "backend='auto'"
UNPROVED = "not proved on this device, which `python -m fusedloss verify` does"


def forms(epilogue: Epilogue) -> dict[str, str]:
    """Returns how each backend that has the epilogue computes it: "formula", "torch" or "kernel".

    A fold without a kernel runs in torch on the backend's similarities.
    """
    found = {}
    for name, backend in SWEEPS.items():
        kind = "kernel" if name in KERNELS else "torch"
        if epilogue.name.startswith("fold:"):
            found[name] = kind if backend.can_fold(_asks(epilogue.name.removeprefix("fold:"))) else "torch"
        elif all(hasattr(backend, primitive) for primitive in epilogue.primitives):
            found[name] = kind
    return {**found, "reference": "formula"}


def _asks(fold: str) -> Problem:
    """Returns the smallest problem with a fold."""
    x, one = torch.ones(1, 1), torch.ones(())
    return Problem((x,), (Block(0, 0),), one, torch.zeros(1, dtype=torch.int64), torch.ones(1), fold=Fold(fold))


def select(problem: Problem, backend: str, *, plain: bool = True) -> str:
    """Returns the backend for `problem`: the given one, or the first of `auto` that can run it and is proved.

    `auto` first tries the kernels that were faster at a similar size. plain: `auto` may also pick `reference`, which
    cannot run across ranks.
    """
    checks.backend(backend)
    named = environment.backend() if backend == "auto" else backend
    if named == "auto":
        found = _automatic(problem, plain)
    else:
        found = _named(named, backend, problem.device, KERNELS)
    for name, settled in found:
        if BACKENDS[name].why_not(problem) is None and (settled or _proved(name, problem)):
            return name
    named_by = _named_by(named, backend)
    reasons = "; ".join(f"{name}: {_why_not(name, problem, named_by)}" for name in BACKENDS)
    raise UnsupportedError(f"{named_by} cannot run this problem. {reasons}{_remedy(named_by)}")


def sums_prefixes(problem: Problem, backend: str, *, plain: bool = True) -> bool:
    """Whether the backend that `select` would choose has one sweep for all prefixes of the problem."""
    if problem.transform is not None or any(problem.margin) or not problem.bias_on_target or problem.bends:
        return False
    if problem.label_smoothing or any(b.penalty or b.own_penalty or b.mask.margin is not None for b in problem.blocks):
        return False
    return BACKENDS[select(problem.whole, backend, plain=plain)].why_not(problem) is None


def _automatic(problem: Problem, plain: bool) -> Candidates:
    """Returns the candidates of `auto`. Looking up the result of an earlier call takes 2 us."""
    if torch.compiler.is_compiling():  # sizes may be symbols, and comparing one would add a guard
        return [(name, name not in KERNELS) for name in _in_tile_first(_auto(problem.device), problem)]
    if plain and dense.fits(problem):
        return DENSE
    operands, first, chosen = problem.operands, problem.blocks[0], order_.chosen
    x, flags = operands[0], families.flags(problem)
    dtype, device = x.dtype, x.device
    in_tf32 = dtype is torch.float32 and families.tf32()
    key = (flags, dtype, device, in_tf32, operands[first.query].shape, operands[first.key].shape)
    found = chosen.get(key)
    if found is None:
        names = _auto(device)
        if names[0] in KERNELS:
            names = _in_tile_first(order_.order(names, problem), problem)
        taken = families.of_flags(flags)
        needed = {name: families.on(name, taken) for name in KERNELS}
        found = _remembered(chosen, key, names, needed, x)
    if found[0] == PLAIN and not (plain and order_.materialises(problem)):
        return (*found[1:], PLAIN)
    return found


def _in_tile_first(names: tuple[str, ...], problem: Problem) -> tuple[str, ...]:
    """Returns `triton` first where it alone folds in its tile: from `cuda`'s similarities torch would fold."""
    if names[0] != "cuda" or problem.fold is None or cuda.can_fold(problem) or not triton.can_fold(problem):
        return names
    return "triton", *(name for name in names if name != "triton")


def _remembered(
    chosen: dict[Any, Candidates], key: Any, names: Sequence[str], needed: Mapping[str, tuple[str, ...]], x: Tensor
) -> Candidates:
    """Stores and returns the candidates except those that are settled as unproved.

    A problem with a guide is never settled, because the guide's dtype may differ.
    """
    known = {
        name: None if "guide" in families else ask.settled(name, families, x.dtype, x.device)
        for name, families in needed.items()
    }
    found = tuple((name, bool(known.get(name, True))) for name in names if known.get(name) is not False)
    if len(chosen) >= MOST_CHOSEN:
        chosen.clear()
    chosen[key] = found
    return found


def _proved(name: str, problem: Problem) -> bool:
    needed, x = families.on(name, families.of_problem(problem)), problem.operands[0]
    size = None if torch.compiler.is_compiling() else order_.raced_as(problem)
    if not ask.admits(name, needed, x.dtype, x.device, size):
        return False
    # A guide may be of another dtype.
    if "guide" not in needed:
        return True
    return all(ask.admits(name, ("rows", "guide"), dtype, x.device) for dtype in families.guide_dtypes(problem))


def _why_not(name: str, problem: Problem, named_by: str) -> str:
    return BACKENDS[name].why_not(problem) or (UNPROVED if named_by == AUTOMATIC and name in KERNELS else "can run it")


def _named_by(named: str, backend: str) -> str:
    """Returns, for a message, where the backend was named."""
    if named == "auto":
        return AUTOMATIC
    return f"backend={backend!r}" if backend != "auto" else f"FUSEDLOSS_BACKEND={named}"


def _named(named: str, backend: str, device: torch.device, kernels: tuple[str, ...]) -> Candidates:
    """Returns the candidates, in order. kernels: the backends that have kernels for such losses.

    A backend named as an argument is taken without proof. FUSEDLOSS_BACKEND is a preference for a whole script: losses
    that it has no kernel for go to `auto`. But a backend that runs nothing at all on this device raises.
    """
    if backend != "auto":
        return ((named, True),)
    absent = named in kernels and BACKENDS[named].why_not_on(torch.float32, device)  # float32, which all of them take
    others = () if absent else _auto(device)
    return [(named, True), *((name, name not in KERNELS) for name in others if name != named)]


@environment.constant
def _auto(device: torch.device) -> tuple[str, ...]:
    """Returns `auto`'s order of backends without results of races."""
    kind = device.type
    if kind == "cuda" and torch.version.hip is None and cuda.capability_of(device) >= 100:
        return AUTO_FROM_SM_100
    return AUTO.get(kind, WITHOUT_KERNELS)


def _remedy(named_by: str) -> str:
    return "; unset FUSEDLOSS_BACKEND or pass backend='chunked'" if named_by.startswith("FUSEDLOSS") else ""


def few(backend: str, x: Tensor, what: str, each: int = 1) -> bool:
    """Whether `auto` hands a loss of so few elements to ordinary torch: see FEW.

    each: how many numbers the formula makes of an element. A backend that is named runs; a compiler fuses the formula
    anyway, and its sizes may be symbols.
    """
    return (
        backend == "auto"
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and x.numel() * each <= FEW[what]
        and environment.backend() == "auto"
    )


def select_rowwise(
    backend: str, x: Tensor, family: str | None, *, multiplies: bool = False, unsupported: str | None = None
) -> str:
    """Returns the backend of a loss without a sweep: "reference", "chunked" or "triton"; `auto` as in `select`.

    family: the family of the kernels that would run, one of `families.ROWWISE`; None: no kernels, nothing to prove.
    multiplies: the kernel multiplies tiles. unsupported: the reason why no kernel takes these arguments.
    """
    checks.backend(backend)
    named = environment.backend() if backend == "auto" else backend
    if named == "auto":
        found = _automatic_rowwise(x, family)
    else:
        found = _named(named, backend, x.device, ("triton",))
    for name, settled in found:
        if _why_not_rowwise(name, x, multiplies, unsupported) is None and (
            settled or family is None or ask.admits(name, (family,), x.dtype, x.device)
        ):
            return name
    named_by, name = _named_by(named, backend), found[0][0] if found else "triton"
    reason = _why_not_rowwise(name, x, multiplies, unsupported) or UNPROVED
    raise UnsupportedError(f"{named_by} cannot run this loss. {name}: {reason}; chunked: can run it{_remedy(named_by)}")


def _automatic_rowwise(x: Tensor, family: str | None) -> Candidates:
    if torch.compiler.is_compiling() or family is None:
        return [(name, family is None or name not in KERNELS) for name in _auto(x.device)]
    chosen, dtype, device = order_.chosen, x.dtype, x.device
    key = (family, dtype, device, dtype is torch.float32 and families.tf32())
    found = chosen.get(key)
    return _remembered(chosen, key, _auto(device), {"triton": (family,)}, x) if found is None else found


def _why_not_rowwise(backend: str, x: Tensor, multiplies: bool, unsupported: str | None) -> str | None:
    if backend == "triton":
        # The interpreter handles bfloat16, except for products of tiles.
        dtype = torch.float32 if x.dtype == torch.bfloat16 and not multiplies else x.dtype
        return unsupported or triton.why_not_on(dtype, x.device)
    if backend == "dense":
        return "it holds the logits of a loss over in-batch similarities, which this is not"
    return "fusedloss._C has no kernel for this loss" if backend == "cuda" else None
