"""What the tests of all kernels hold them to: a strip's formula in fp64, and how near to it they must come."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedloss.core.mask import StripMask
from fusedloss.core.strips import RowSums, Softmax, Strip


def formula(strip: Strip) -> tuple[Tensor, Tensor]:
    """(similarities, logits) in fp64; the target's logit and those of dropped and removed columns are -inf."""
    sim = strip.x.double() @ strip.y.double().T
    if strip.row_factor is not None and strip.col_factor is not None:
        sim = sim * strip.row_factor.double()[:, None] * strip.col_factor.double()
    z = sim * strip.scale.double()
    if strip.own is not None and strip.own_scale is not None:
        z = torch.where(at(strip.own, z), sim * strip.own_scale.double(), z)
    if strip.bias is not None:
        z = z + strip.bias.double()
    if strip.softcap:
        z = strip.softcap * torch.tanh(z / strip.softcap)
    removed = dropped(strip.mask, sim) if strip.mask is not None else torch.zeros_like(z, dtype=torch.bool)
    if strip.bias is not None:
        removed |= strip.bias == -torch.inf
    if strip.target is not None:
        removed |= at(strip.target, z)
    return sim, z.masked_fill(removed, -torch.inf)


def at(columns: Tensor, like: Tensor) -> Tensor:
    """bool [M, N]: each row's own column; out of range: none."""
    return torch.arange(like.shape[1], device=like.device) == columns[:, None]


def dropped(mask: StripMask, sim: Tensor) -> Tensor:
    drop = torch.zeros_like(sim, dtype=torch.bool)
    for compare in mask.compare:
        equal = compare.rows[:, None] == compare.keys
        drop |= ~equal if compare.keep else equal
    if mask.dense is not None:
        drop |= ~mask.dense
    if mask.dropped is not None:
        found = mask.dropped
        drop |= unpacked(found, sim.shape[1]) if isinstance(found, Tensor) else found.stored > 0
    if mask.threshold is not None:
        above = sim > mask.threshold.double()[:, None]
        for exempt in () if mask.exempt is None else mask.exempt.unbind(1):
            above &= ~at(exempt, sim)
        drop |= above
    if mask.skip is not None:
        drop |= at(mask.skip, sim)
    return drop


def unpacked(bits: Tensor, columns: int) -> Tensor:
    """bool [M, N] of a guide's words."""
    each = bits[:, :, None] >> torch.arange(32, device=bits.device, dtype=torch.int32) & 1
    return each.flatten(1)[:, :columns].bool()


def factored(value: Tensor, strip: Strip) -> Tensor:
    if strip.row_factor is None or strip.col_factor is None:
        return value
    return value * strip.row_factor.double()[:, None] * strip.col_factor.double()


def assert_near(actual: Tensor, expected: Tensor, magnitude: Tensor | float = 0.0) -> None:
    """Within 64 ulp of a logit of 10, of the value or, for sums that cancel, `magnitude`."""
    actual = actual.double()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    bound = 64 * torch.finfo(torch.float32).eps * 10
    error = (actual - expected).abs() - bound * torch.maximum(expected.abs(), torch.as_tensor(magnitude))
    assert (same | (error <= 0)).all(), error[~same].max()


def lse(sums: RowSums) -> Tensor:
    """Of the tiles' partial sums, or of sums that are whole."""
    shift = sums.shift if isinstance(sums.shift, Tensor) else torch.full_like(sums.total, sums.shift)
    logs = shift.double() + sums.total.double().log()
    return torch.logsumexp(logs, 0) if logs.dim() == 2 else logs


def assert_lse(sums: RowSums, z: Tensor) -> None:
    assert_near(lse(sums), torch.logsumexp(z, 1), magnitude=1.0)


def direction(z: Tensor, with_q: bool, wild: bool = True) -> Softmax:
    """Weights of either sign; every third row left out, with whatever its shift may then be: `wild`."""
    shift = z.amax(1).float()
    weight = 2 * torch.rand(shift.shape, device=z.device) - 1  # |gain * dz| <= 2**15 in fp16
    weight[shift == -torch.inf] = 0
    weight[::3] = 0
    if not wild:
        shift[weight == 0] = 0
    for start, value in enumerate([-torch.inf, torch.inf, torch.nan] if wild else ()):
        shift[3 * start :: 9] = value
    target_sim = torch.randn(shift.shape, device=z.device) if with_q else None
    return Softmax(shift, weight, target_sim)


def grad_formula(z: Tensor, sim: Tensor, softmax: Softmax) -> tuple[Tensor, Tensor]:
    """(dz, terms of q), both [M, N]."""
    left_out = (softmax.weight == 0)[:, None]
    shift = softmax.shift.double()[:, None].masked_fill(left_out, 0)
    dz = (softmax.weight.double()[:, None] * torch.exp(z - shift)).masked_fill(left_out, 0)
    target_sim = 0 if softmax.target_sim is None else softmax.target_sim.double()[:, None]
    return dz, dz * (sim - target_sim)


def with_entry(value: Tensor, entry: Tensor, strip: Strip) -> Tensor:
    """`value` with each row's entry at its target, where the strip holds it."""
    if strip.target is None:
        return value
    return torch.where(at(strip.target, value), entry.double()[:, None], value)


def gain_of(dtype: torch.dtype, device: torch.device | str) -> Tensor | None:
    """What the sweep passes: None, or a power of two on the device."""
    return torch.tensor(2.0**15, device=device) if dtype == torch.float16 else None
