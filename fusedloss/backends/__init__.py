"""The backends, and how one is chosen.

A backend is a module with `why_not(problem) -> str | None`. The sweep backends (`chunked`, `triton`) also provide the
primitives that the driver in `sweep.py` calls. On one row chunk:

    can_exp(problem)             whether `exp_rows` may be used: it finds, or the host knows, a safe shift
    can_store(problem)           whether one shift serves rows and columns: `exp_rows_and_columns` and `weigh`
    can_fold(problem)            whether `fold_rows` does what is otherwise `similarities` and a fold in torch
    takes_units(problem)         whether operands come as unit rows instead of with factors
    workspace_dtype(problem), workspace_copies(problem)   of the bounded workspace: its dtype, and what stands beside it
    stats_rows(strips, tally, score)                         -> RowSums           and adds to the tally, if any
    stats_rows_and_columns(strip, tally, score)              -> RowSums, RowSums  likewise
    exp_rows(problem, strips, outs, target_sim, tally, score) -> RowSums, q       writes E = exp(z - shift)
    exp_rows_and_columns(problem, strip, out)                -> RowSums, RowSums  likewise
    grad_rows(strips, outs, rows, columns, entry, gain, smooth) -> q              writes dz * gain
    top_rows(strips)                                         -> largest logits, their columns
    similarities(strip, out)                                 writes them, for folds
    fold_rows(problem, strip, out, part, score)              -> Folded            writes the gradient, if `out`
    guide_room(strip), guide_rows(strips, rule, room, own)   -> a block's StripMask.dropped each
    guide_scores(strip, room) -> [R]                         what a guide's threshold is read out of

Writers store `value * row_factor * col_factor`, multiplied before rounding; at the target 0, `grad_rows` its entry.
What surrounds them, per row, with `rows.py` as its definition:

    operand(x)                   x as the kernels read it: itself, or an aligned copy
    prepare, inverse_norms       1/norms and the targets' logits
    merge, settle, weigh         partial sums -> loss, weight / l, the target's entry
    finish                       a product -> the gradient: scale, 1/l, the projection through the norms

`reference` materialises the logits and is ordinary differentiable torch: `loss_rows(problem)`, `top_rows(problem)`.
A backend that takes `problem.prefixes` also has `admitted(mask, tile)`.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from .. import checks
from ..errors import UnsupportedError
from ..problem import Problem
from . import chunked, cuda, fastest, reference, triton

BACKENDS: dict[str, ModuleType] = dict(zip(checks.BACKENDS, (cuda, triton, chunked, reference), strict=True))

# A backend joins once the whole GPU test-suite has passed on such a device. Until then it is there by name.
AUTO: dict[str, tuple[str, ...]] = {"cpu": ("chunked", "reference"), "cuda": ("chunked", "reference")}


def select(problem: Problem, backend: str) -> str:
    """The name of the backend that runs `problem`: the one asked for, or the first of `auto` that can.

    Where `auto` has both `cuda` and `triton`, the one that was faster at such a size is before the other.
    """
    checks.backend(backend)
    if backend == "auto":
        backend = os.environ.get("FUSEDLOSS_BACKEND") or "auto"
        checks.backend(backend, "FUSEDLOSS_BACKEND")
    names: tuple[str, ...] = (
        AUTO.get(problem.device.type, ("chunked", "reference")) if backend == "auto" else (backend,)
    )
    if "cuda" in names and "triton" in names:
        names = fastest.order(names, problem)
    for name in names:
        if BACKENDS[name].why_not(problem) is None:
            return name
    reasons = "; ".join(f"{name}: {module.why_not(problem) or 'can run it'}" for name, module in BACKENDS.items())
    raise UnsupportedError(f"backend={backend!r} cannot run this problem. {reasons}")


def select_rowwise(backend: str, x: Tensor, *, multiplies: bool = False, unsupported: str | None = None) -> str:
    """Of a loss without a sweep: "reference", "chunked" or "triton"; of `auto` the first that can.

    multiplies: the kernel has products of tiles. unsupported: why no kernel takes these arguments.
    """
    if backend == "auto":
        backend = os.environ.get("FUSEDLOSS_BACKEND") or "auto"
        if backend == "auto":
            for backend in AUTO.get(x.device.type, ("chunked", "reference")):
                if _why_not_rowwise(backend, x, multiplies, unsupported) is None:
                    return backend
        checks.backend(backend, "FUSEDLOSS_BACKEND")
    else:
        checks.backend(backend)
    reason = _why_not_rowwise(backend, x, multiplies, unsupported)
    if reason is None:
        return backend
    raise UnsupportedError(f"backend={backend!r} cannot run this loss. {backend}: {reason}; chunked: can run it")


def _why_not_rowwise(backend: str, x: Tensor, multiplies: bool, unsupported: str | None) -> str | None:
    if backend == "triton":
        # What the interpreter cannot do with bfloat16 is to multiply tiles.
        dtype = torch.float32 if x.dtype == torch.bfloat16 and not multiplies else x.dtype
        return unsupported or triton.why_not_on(dtype, x.device)
    return "fusedloss._C has no kernel for this loss" if backend == "cuda" else None
