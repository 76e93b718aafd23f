"""Proof of one family: small adversarial cases against the same formula in fp64, within the error budget.

    prove("cuda", "stats", "bf16", torch.device("cuda"))    ->    Proof(state="proved", cases=14, seconds=0.4, ...)

Each case runs twice, between red zones and on poisoned memory, and once more inside a CUDA graph. `check` shows the
errors of a few of them on every backend.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import testing
from ..backends import BACKENDS, triton
from ..core.errors import UnsupportedError
from ..trust import families
from . import rowwise, sweeps
from .draws import Draw, Outputs, Run, far_bytes
from .zones import Zones

Make = Callable[[Draw], Run]
CASES: dict[str, dict[str, Make]] = sweeps.CASES | rowwise.CASES
# The cases that `check` shows on every backend: one of each kind of loss.
CHECKED: dict[str, Make] = {
    "info_nce": CASES["grad"]["ragged"],
    "clip": CASES["grad+columns"]["ragged"],
    "multiple_negatives_ranking": CASES["exp"]["two blocks"],
    "siglip": CASES["fold:sigmoid"]["ragged"],
    "cosine_similarity": CASES["pairs"]["cos, ragged"],
    "list_net": CASES["classes"]["soft targets"],
    "cross_entropy": CASES["classes"]["ragged"],
    "mse": CASES["pointwise"]["squares"],
}
DRAWS = 6  # of 2, one row of distill_mse in tf32 saw half of what 6 do, and was off by 1.6 of the budget
# The step that operands are moved by: four roundings of fp32 (a product, its scale, exp and the sum after it), one of
# tf32.
STEPS = {"tf32": 2.0**-11}
STEP = 2 * torch.finfo(torch.float32).eps
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


class Proof(NamedTuple):
    """state: "proved" or "failed". worst: the largest error as a share of the budget, of which 1 is allowed.

    reason: of a failure the case and the figure, otherwise the cases that could not run here; mostly empty.
    """

    state: str
    cases: int
    seconds: float
    worst: float
    reason: str


def prove(
    backend: str, family: str, precision: str, device: torch.device, begins: Callable[[str], None] = lambda case: None
) -> Proof:
    """Runs the cases of a family until one fails. begins: called with each case.

    Raises ValueError for a family that `backend` lacks, or lacks in this precision; UnsupportedError if the backend
    runs nothing of this precision on `device`; and torch.OutOfMemoryError, which proves nothing about a kernel. Any
    other error is a failure of the case.
    """
    known = families.of_backend(backend, precision)
    if family not in known:
        raise ValueError(f"family must be one of {', '.join(known)} for {backend} in {precision}, got {family!r}")
    if reason := why_not(backend, family, DTYPES[precision], device):
        raise UnsupportedError(f"backend={backend!r} proves nothing of {family} in {precision} on {device}: {reason}")
    start, worst, left_out = time.perf_counter(), 0.0, ""
    with products(precision), _on(device):
        for count, (name, make) in enumerate(CASES[family].items(), 1):
            if absent := _absent(name, DTYPES[precision], device):
                left_out = f"{name}: {absent}"
                continue
            begins(name)
            share, reason = _proved(name, make, backend, precision, device)
            worst = max(worst, share)
            if "2^31" in name and device.type == "cuda":
                torch.cuda.empty_cache()  # frees gigabytes for other processes
            if reason:
                return Proof("failed", count, time.perf_counter() - start, worst, f"{name}: {reason}")
    return Proof("proved", len(CASES[family]) - bool(left_out), time.perf_counter() - start, worst, left_out)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes the device current, because graphs are captured on the current device."""
    return contextlib.nullcontext() if device.index is None or device.type != "cuda" else torch.cuda.device(device)


def why_not(backend: str, family: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Returns the reason why a family has no proof on the device, or None."""
    if family == "pair_logits" or family not in families.ROWWISE:
        return BACKENDS[backend].why_not_on(dtype, device)
    # The interpreter handles bfloat16, except for products of tiles.
    return triton.why_not_on(torch.float32 if dtype == torch.bfloat16 else dtype, device)


def _absent(name: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Returns a reason against rows beyond 2^31 elements: a CPU never touches that memory, a card needs 4 to 8 GiB."""
    if "2^31" not in name or device.type != "cuda" or torch.cuda.mem_get_info(device)[0] > 2 * 2 * far_bytes(dtype):
        return None
    return f"takes {2 * far_bytes(dtype) >> 30} GiB, half of what must be free"


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """Sets torch's switch for fp32 products by the precision, and resets it afterwards."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def errors(name: str, backend: str, precision: str, device: torch.device) -> dict[str, float]:
    """Returns the errors of one of CHECKED as shares of the budget: the losses' first, then the gradients'."""
    make = CHECKED[name]
    found = make(Draw(name, DTYPES[precision], device))(backend)
    return shares_of(found, name, make, precision, device)


# One case -------------------------------------------------------------------------------------------------------------


def _proved(name: str, make: Make, backend: str, precision: str, device: torch.device) -> tuple[float, str]:
    """Returns the largest share of the budget, and the reason why that is no proof, or ""."""
    zones = Zones(device)
    try:
        run = make(Draw(name, DTYPES[precision], device, zones=zones))
        with zones:
            found = run(backend)
        with zones:
            again = run(backend)
        if beside := zones.written():
            return float("inf"), beside
        if differs := _different(found, again):
            return float("inf"), f"{differs} differs from run to run"
        if device.type == "cuda" and (differs := _different(found, _captured(run, backend))):
            return float("inf"), f"{differs} is another inside a CUDA graph"
        shares = shares_of(found, name, make, precision, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return float("inf"), f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    what, worst = max(shares.items(), key=lambda item: item[1])
    return worst, f"{what} is off by {worst:.3g} of the budget" if not worst <= 1 else ""


def _different(found: Outputs, again: Outputs) -> str | None:
    """Returns the first output whose bits differ; all NaN are equal."""
    for name, x in found.items():
        y = again[name]
        if x.dtype != y.dtype or not bool(((x == y) | (x.isnan() & y.isnan())).all()):
            return name
    return None


def _captured(run: Run, backend: str) -> Outputs:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(backend)
    graph.replay()
    torch.cuda.synchronize()
    return {name: x.clone() for name, x in found.items()}


def shares_of(found: Outputs, name: str, make: Make, precision: str, device: torch.device) -> dict[str, float]:
    """Returns each output's error as a share of its budget: 2 x the error of eager, a rounding, and the condition's
    part.

    Eager is the formula in the same precision, by torch's own switches on a GPU; where a CPU stands in for tensor cores
    its operands are rounded instead. The condition's part is the change of the output, in fp64, with the last bits of
    the operands: with few rows eager may be lucky and we not. In 16 bits it also has the change by what tensor cores
    may cut off a sum. An output must be NaN or infinite exactly where fp64 is.
    """
    dtype, cut = DTYPES[precision], precision == "tf32" and device.type == "cpu"
    exact = make(Draw(name, dtype, device, wide=True))("reference")
    eager = make(Draw(name, dtype, device, cut=cut))("reference")
    step = STEPS.get(precision, STEP)
    others = [Draw(name, dtype, device, wide=True, nudged=number, step=step) for number in range(DRAWS)]
    if dtype.itemsize == 2:
        others.append(Draw(name, dtype, device, wide=True, short=True))
    moves = dict.fromkeys(found, 0.0)
    for draw in others:
        other = make(draw)("reference")
        for what in found:
            if not (draw.short and what.startswith("counted")):  # ties are ties in any precision
                moves[what] = max(moves[what], _largest(other[what].double() - exact[what].double()))
    return {what: _share(what, x, eager[what], exact, moves[what], precision) for what, x in found.items()}


def _largest(x: Tensor) -> float:
    """Returns the largest finite absolute value."""
    return x.abs().nan_to_num(0, 0, 0).amax().item()


def _share(what: str, out: Tensor, eager: Tensor, exact: Outputs, moves: float, precision: str) -> float:
    wanted, terms = exact[what].double(), exact.get(f"{what}: terms")
    if terms is not None:  # a sum that cancels, because a logit's rounding is that of its product
        rounding = 2**13 if precision == "tf32" else 1
        return testing.condition_share(out, wanted, rounding * terms, exact["bound"].item())
    finite = wanted.isfinite()
    same = torch.where(finite, out.isfinite(), (out == wanted) | (out.isnan() & wanted.isnan()))
    if not bool(same.all()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    # Statistics are in fp32 for all operands; whole numbers are exact.
    dtype = (
        DTYPES[precision] if what.startswith("gradient") else out.dtype if out.is_floating_point() else torch.float32
    )
    return testing.budget_share(out[finite], eager[finite], wanted[finite], dtype, moves)
