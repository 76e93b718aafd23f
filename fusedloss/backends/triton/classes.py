"""Rows of logits against classes as Triton kernels: launchers for `fusedloss.kernels.classes`."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...core.numerics import cdiv
from ...core.rows import tf32
from .launching import ALIGNMENT, divisor, launch, on_nvidia

Found = tuple[Tensor, Tensor | None, Tensor | None]  # losses of rows, their gradient, and its factor


def rows(x: Tensor, terms: Any, wants_grad: bool) -> Found:
    """Computes `chunked` of `rowwise/classes.py`, with its `Terms`."""
    loss, grad, gain = _outputs(x, wants_grad)
    R, C, S, options = _shape(x)
    if not R:
        return loss, grad, gain
    weight = None if terms.weight is None else terms.weight.contiguous()
    of_row = (_of_rows(v, loss) for v in (terms.hard, terms.smooth, terms.square))
    (hards, hard), (smooths, smooth), (squares, square) = of_row
    cap = {"CAPPED": terms.softcap is not None}
    softcap = 1.0 if terms.softcap is None else float(terms.softcap)
    kinds = {"SMOOTHS": terms.smooths, "SQUARES": terms.squares, **cap}
    if terms.share is None:
        left_out = None if terms.left_out is None else terms.left_out.contiguous().view(torch.uint8)
        launch(
            _kernels().class_rows_kernel,
            (cdiv(R, options["BLOCK_R"]),),
            x.device,
            x,
            terms.target.contiguous(),
            left_out,
            weight,
            hards,
            smooths,
            squares,
            loss,
            grad,
            gain,
            hard,
            smooth,
            square,
            float(terms.gamma),
            softcap,
            R,
            C,
            S,
            *_strides(x),
            *_strides(grad),
            **kinds,
            FOCAL=terms.gamma != 0,
            WIDE=_wide(x, grad),
            **options,
        )
    else:
        share = (x, terms.share, None, weight, loss, grad, gain)
        _share_rows(*share, float(terms.hard), float(terms.smooth), float(terms.square), softcap, kinds, False)
    return loss, grad, gain


def soft_rows(logits: Tensor, beside: tuple[Tensor, Tensor | None], wants_grad: bool) -> Found:
    """Computes `soft_chunked` of `rowwise/classes.py`."""
    target_logits, mask = beside
    loss, grad, gain = _outputs(logits, wants_grad)
    if logits.shape[0]:
        mask = None if mask is None else mask.view(torch.uint8)
        kinds = {"SMOOTHS": False, "SQUARES": False, "CAPPED": False}
        _share_rows(logits, target_logits, mask, None, loss, grad, gain, 1.0, 0.0, 0.0, 1.0, kinds, True)
    return loss, grad, gain


def _share_rows(
    x: Tensor,
    share: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    loss: Tensor,
    grad: Tensor | None,
    gain: Tensor | None,
    hard: float,
    smooth: float,
    square: float,
    softcap: float,
    kinds: dict[str, bool],
    softmax: bool,
) -> None:
    R, C, S, options = _shape(x)
    launch(
        _kernels().share_rows_kernel,
        (cdiv(R, options["BLOCK_R"]),),
        x.device,
        x,
        share,
        mask,
        weight,
        loss,
        grad,
        gain,
        hard,
        smooth,
        square,
        softcap,
        R,
        C,
        S,
        *_strides(x),
        *_strides(share),
        *_strides(grad),
        *((0, 0) if mask is None else mask.stride()),
        SOFTMAX=softmax,
        WIDE=_wide(x, share, grad, mask),
        **kinds,
        **options,
    )


def pair_logits(u: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None, parts: tuple[str, ...]) -> Tensor:
    """Returns the logits `[B, C]` in fp32."""
    (B, D), C = u.shape, weight.shape[0]
    out = torch.empty((B, C), dtype=torch.float32, device=u.device)
    if not B or not C:
        return out
    interpreted, nvidia = u.device.type == "cpu", on_nvidia(u.device)
    block_b, block_c = (16 if interpreted else 64 if nvidia else 32), (16 if C <= 16 else 32)
    wide = divisor(D, u.stride(0), v.stride(0), weight.stride(0))
    launch(
        _kernels().pair_logits_kernel,
        (cdiv(B, block_b), cdiv(C, block_c)),
        u.device,
        u,
        v,
        weight,
        None if bias is None else bias.contiguous(),
        out,
        B,
        D,
        C,
        *u.stride(),
        *v.stride(),
        *weight.stride(),
        out.stride(0),
        REP="rep" in parts,
        DIFFERENCE="difference" in parts,
        MULTIPLICATION="multiplication" in parts,
        # Three products on tensor cores, accurate to a few bits of fp32: without them 64 x 64 tiles spilled 750 bytes.
        # AMD's have no tf32x3; with bf16x6 a tile spills 217 registers on gfx1100, of 32 rows in fp32 none.
        WIDE=wide,
        INPUT_PRECISION="ieee" if not nvidia else "tf32" if tf32() else "tf32x3",
        BLOCK_B=block_b,
        BLOCK_C=block_c,
        # Of rows that are read by fewer than 16 bytes, 32 took so many addresses that 48 bytes spilled on sm_120.
        BLOCK_D=32 if nvidia and not interpreted and wide * u.itemsize >= ALIGNMENT else 16,
        num_warps=4,
    )
    return out


def _outputs(x: Tensor, wants_grad: bool) -> Found:
    rows = x.shape[:1] + x.shape[2:]
    loss = torch.empty(rows, dtype=torch.float32, device=x.device)
    grad = torch.empty(x.shape, dtype=x.dtype, device=x.device) if wants_grad else None
    return loss, grad, torch.empty_like(loss) if wants_grad and x.dtype == torch.float16 else None


def _shape(x: Tensor) -> tuple[int, int, int, dict[str, int]]:
    """Returns rows, classes, positions after the classes, and the options of a launch."""
    C, S = x.shape[1], x.shape[2] if x.dim() == 3 else 1
    return x.shape[0] * S, C, S, _sizes(C, S, x.device.type == "cpu")


@functools.lru_cache(maxsize=256)
def _sizes(C: int, S: int, interpreted: bool) -> dict[str, int]:
    return _kernels().pick_sizes(C, S, interpreted=interpreted)._asdict()


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    if x is None:
        return 0, 0, 0
    return x.stride(0), x.stride(1), x.stride(2) if x.dim() == 3 else 0


def _wide(x: Tensor, *others: Tensor | None) -> int:
    """Returns what divides the classes and the strides of rows, if classes are adjacent. Of odd rows nothing does."""
    return divisor(x.shape[1], *(t.stride(0) for t in (x, *others) if t is not None))


def _of_rows(value: float | Tensor, loss: Tensor) -> tuple[Tensor | None, float]:
    """Returns a tensor per row, or a number for all."""
    if not isinstance(value, Tensor):
        return None, float(value)
    return value.to(loss.dtype).expand_as(loss).contiguous(), 0.0


@functools.cache
def _kernels() -> ModuleType:
    from ...kernels import classes

    return classes
