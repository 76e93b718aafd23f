"""What happens once per row in CUDA: launchers for `csrc/rows.h`, with the names of `core/rows.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.problem import NO_RULE, RowRule
from ...core.strips import Patch, Prepared, RowSums, Settled
from .launching import launch


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
    (M, D), N = x.shape, y.shape[0]
    row_factor = scale.new_empty(M) if cosine else None
    col_factor = row_factor if y is x else scale.new_empty(N) if cosine else None
    score = torch.empty(M, dtype=torch.float64, device=x.device)
    target_sim = scale.new_empty(M) if wants_target_sim else None
    slope = scale.new_empty(M) if rule.softcap or any(rule.margin) else None
    launch(
        "prepare",
        x.device,
        x=x,
        y=y,
        dtype=x.dtype,
        target=target,
        scale=scale,
        bias=bias,
        row_factor=row_factor,
        col_factor=None if y is x else col_factor,
        score=score,
        target_sim=target_sim,
        slope=slope,
        M=M,
        N=N,
        D=D,
        stride_xm=x.stride(0),
        stride_xd=x.stride(1),
        stride_yn=y.stride(0),
        stride_yd=y.stride(1),
        softcap=rule.softcap,
        margin_angle=rule.margin.angle,
        margin_cosine=rule.margin.cosine,
    )
    return Prepared(row_factor, col_factor, score, target_sim, slope)


def inverse_norms(y: Tensor) -> Tensor:
    N, D = y.shape
    factor = torch.empty(N, dtype=torch.float32, device=y.device)
    strides = {"stride_yn": y.stride(0), "stride_yd": y.stride(1)}
    launch("prepare", y.device, y=y, dtype=y.dtype, col_factor=factor, N=N, D=D, **strides)
    return factor


def merge(running: RowSums, part: RowSums) -> RowSums:
    """Folds the part's tiles into `running`, in place."""
    n_tiles, R = part.total.shape
    sums = {"max": part.shift, "sum": part.total, "running_max": running.shift, "running_sum": running.total}
    launch("merge", part.total.device, **sums, n_tiles=n_tiles, R=R)
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
    loss, own_shift, over_l, entry = (torch.empty_like(weight) for _ in range(4))
    given = isinstance(shift, float)
    launch(
        "settle",
        total.device,
        max=None if given else shift,
        sum=total,
        shift=shift if given else 0.0,
        score=score.to(torch.float64),
        weight=weight,
        label_smoothing=rule.label_smoothing,
        copies=rule.copies,
        z_loss=rule.z_loss,
        decoupled=rule.decoupled,
        smooth=smooth,
        slope=slope,
        row_shift=own_shift,
        over_l=over_l,
        entry=entry if patch is None else None,
        loss=loss,
        **({} if patch is None else _patch(patch, "out_dtype")),
        n_tiles=n_tiles,
        R=R,
    )
    return Settled(loss, own_shift, over_l, entry, [_scaled(x, over_l, dtype or x.dtype) for x in scaled])


def _scaled(x: Tensor, row_factor: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    launch(
        "scale_rows",
        x.device,
        input=x,
        out=out,
        in_dtype=x.dtype,
        out_dtype=dtype,
        row_factor=row_factor,
        M=x.shape[0],
        D=x.shape[1],
        in_stride=x.stride(0),
        in_stride_d=x.stride(1),
        out_stride=out.stride(0),
    )
    return out


def weigh(patch: Patch, rows: Tensor, columns: Tensor, entry: Tensor) -> None:
    R, N = patch.out.shape
    weights = {"row_weight": rows, "col_weight": columns, "entry": entry}
    launch("weigh", patch.out.device, **weights, **_patch(patch, "dtype"), R=R, N=N)


def _patch(patch: Patch, dtype: str) -> dict[str, Any]:
    return patch._asdict() | {dtype: patch.out.dtype, "stride_om": patch.out.stride(0)}


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
    launch(
        "finish",
        total.device,
        total=total,
        over_l=over_l,
        scale=scale,
        gain=gain,
        x=None if factor is None else x,
        factor=factor,
        out=out,
        x_dtype=x.dtype,
        out_dtype=out.dtype,
        R=R,
        D=D,
        stride_tm=total.stride(0),
        stride_xm=x.stride(0),
        stride_xd=x.stride(1),
        stride_om=out.stride(0),
    )
