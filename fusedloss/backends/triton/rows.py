"""What happens once per row in Triton: launchers for `kernels/rows.py`, with the names of `core/rows.py`."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...core.numerics import cdiv
from ...core.problem import NO_RULE, RowRule
from ...core.strips import Patch, Prepared, RowSums, Settled
from .launching import ALIGNMENT, divisor, launch, out_wide, whole


def prepare(
    x: Tensor,
    y: Tensor,
    target: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    rule: RowRule = NO_RULE,
    *,
    cosine: bool,
    wants_target_sim: bool,
) -> Prepared:
    M, N, D = len(x), len(y), min(whole(x), whole(y))  # operands end in zeros
    row_factor = scale.new_empty(M) if cosine else None
    col_factor = row_factor if y is x else scale.new_empty(N) if cosine else None
    score = torch.empty(M, dtype=torch.float64, device=x.device)
    target_sim = scale.new_empty(M) if wants_target_sim else None
    softcap, margin = rule.softcap, rule.margin
    slope = scale.new_empty(M) if softcap or any(margin) else None
    own_columns = None if y is x else col_factor
    by_row(
        "prepare_kernel",
        x.device,
        M if own_columns is None else max(M, N),
        x,
        y,
        target,
        row_factor,
        own_columns,
        scale,
        bias,
        score,
        target_sim,
        slope,
        M,
        N,
        D,
        x.stride(0),
        y.stride(0),
        SOFTCAP=softcap or None,
        MARGIN=(margin.angle, math.sin(margin.angle), math.cos(margin.angle), margin.cosine) if any(margin) else None,
        WIDE=divisor(D, x.stride(0), y.stride(0)),
    )
    return Prepared(row_factor, col_factor, score, target_sim, slope)


def inverse_norms(y: Tensor) -> Tensor:
    N, D = len(y), whole(y)
    factor = torch.empty(N, dtype=torch.float32, device=y.device)
    nothing = (None,) * 5
    sizes = (0, N, D, 0, y.stride(0))
    constants = {"SOFTCAP": None, "MARGIN": None, "WIDE": divisor(D, y.stride(0))}
    by_row("prepare_kernel", y.device, N, None, y, None, None, factor, *nothing, *sizes, **constants)
    return factor


def merge(running: RowSums, part: RowSums) -> RowSums:
    """Folds the part's tiles into `running`, in place."""
    n_tiles, R = part.total.shape
    by_row("merge_kernel", part.total.device, R, *part, *running, n_tiles, R)
    return running


def settle(
    sums: RowSums,
    score: Tensor,
    weight: Tensor,
    rule: RowRule = NO_RULE,
    *,
    smooth: Tensor | None = None,
    slope: Tensor | None = None,
    patch: Patch | None = None,
    scaled: Sequence[Tensor] = (),
    dtype: torch.dtype | None = None,
) -> Settled:
    shift, total = sums
    n_tiles, R = total.shape if total.dim() == 2 else (1, total.shape[0])
    loss, own_shift, over_l, entry = [torch.empty_like(weight) for _ in range(4)]
    settled = Settled(loss, own_shift, over_l, entry, [_roomy(x, dtype) for x in scaled])
    given = isinstance(shift, float)
    out, target, row_factor, col_factor = patch or (None, None, None, None)
    D = min((whole(x) for x in (*scaled, *settled.scaled)), default=1)
    strides = tuple(x.stride(0) for pair in zip(scaled, settled.scaled, strict=True) for x in pair)
    by_row(
        "settle_kernel",
        total.device,
        R,
        None if given else shift,
        total,
        shift if given else 0.0,
        score,
        weight,
        float(rule.label_smoothing),
        float(rule.copies),
        rule.z_loss or None,
        settled.shift,
        settled.weight,
        settled.entry if patch is None else None,
        settled.loss,
        out,
        target,
        row_factor,
        col_factor,
        tuple(scaled),
        tuple(settled.scaled),
        n_tiles,
        R,
        D,
        0 if out is None else out.stride(0),
        strides,
        smooth,
        slope,
        RELATIVE=patch is not None,
        DECOUPLED=rule.decoupled,
        WIDE=divisor(D, *strides) if scaled else 1,
    )
    return settled


def weigh(patch: Patch, rows: Tensor, columns: Tensor, entry: Tensor) -> None:
    out, (R, N) = patch.out, patch.out.shape
    sizes = (R, N, out.stride(0))
    by_row("weigh_kernel", out.device, R, out, rows, columns, entry, *patch[1:], *sizes, WIDE=out_wide(out))


def finish(
    total: Tensor,
    over_l: Tensor | None,
    scale: Tensor,
    gain: Tensor | None,
    x: Tensor,
    factor: Tensor | None,
    out: Tensor,
) -> None:
    R, D = total.shape
    projected = None if factor is None else x
    strides = total.stride(0), x.stride(0), out.stride(0)
    sizes = (R, D, *strides)
    given = (total, over_l, scale, gain, projected, factor, out)
    by_row("finish_kernel", total.device, R, *given, *sizes, WIDE=divisor(D, *strides))


def _roomy(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Returns memory of the shape of `x`, whose rows start on 16 bytes."""
    (rows, columns), wide = x.shape, ALIGNMENT // (dtype or x.dtype).itemsize
    room = x.new_empty((rows, cdiv(columns, wide) * wide), dtype=dtype)
    return room if columns % wide == 0 else room[:, :columns]


def by_row(name: str, device: torch.device, R: int, *args: Any, **constants: Any) -> None:
    """Launches a kernel of `kernels/rows.py`, a few rows a program."""
    if R:
        options = row_options(name, device.type == "cpu")
        launch(getattr(_rows(), name), (cdiv(R, options["BLOCK_R"]),), device, *args, **constants, **options)


@functools.cache
def row_options(name: str, interpreted: bool) -> dict[str, int]:
    from .config import pick_rows

    return pick_rows(name, interpreted=interpreted)


@functools.cache
def _rows() -> ModuleType:
    from ...kernels import rows

    return rows
