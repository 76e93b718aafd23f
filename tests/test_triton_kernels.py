"""Every epilogue against the plain formula in fp64, in Triton's interpreter without a GPU."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fusedloss.problem import Block, Problem, RowSums, Softmax, Strip

pytest.importorskip("triton")
from fusedloss.kernels.config import Config, pick_config

from fusedloss.backends import triton as backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]
SCALE = 3.0


class Case(NamedTuple):
    """Shapes and operands of one chunk. The interpreter's tile is 16 x 32 x 16."""

    rows: int
    columns: tuple[int, ...]  # one strip each
    dim: int
    layout: str = "contiguous"
    factors: bool = False
    bias: bool = False
    target: str = "shuffled"


CASES = {
    "one ragged tile": Case(5, (7,), 3),
    "several tiles, all edges ragged": Case(40, (70,), 33),
    "full tiles only": Case(32, (64,), 16),
    "one row": Case(1, (33,), 17),
    "one column, the target": Case(20, (1,), 8, target="zero"),
    "one feature": Case(17, (40,), 1),
    "transposed operands": Case(18, (40,), 20, layout="transposed"),
    "every second feature and row of a larger matrix": Case(18, (40,), 20, layout="strided"),
    "two strips, the target in the first": Case(18, (40, 35), 20),
    "cosine factors": Case(18, (40,), 20, factors=True),
    "bias, with columns removed": Case(18, (40, 35), 20, bias=True),
    "factors and bias": Case(18, (40,), 20, factors=True, bias=True),
    "rows without a target": Case(18, (40,), 20, target="some"),
    "no target at all": Case(18, (40,), 20, target="none"),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


def matrix(rows: int, columns: int, dtype: torch.dtype, layout: str) -> Tensor:
    if layout == "transposed":
        return matrix(columns, rows, dtype, "contiguous").T
    if layout == "strided":
        return matrix(2 * rows, 2 * columns, dtype, "contiguous")[::2, 1::2]
    return (torch.randn(rows, columns) / columns**0.25).to(DEVICE, dtype)


def make(case: Case, dtype: torch.dtype) -> list[Strip]:
    x = matrix(case.rows, case.dim, dtype, case.layout)
    strips = []
    for number, columns in enumerate(case.columns):
        y = matrix(columns, case.dim, dtype, case.layout)
        bias = None
        if case.bias:
            bias = torch.randn(columns).masked_fill(torch.rand(columns) < 0.3, -torch.inf).to(DEVICE)
        target = torch.randint(columns, (case.rows,), device=DEVICE)
        if case.target == "some":
            # Out of range on either side, also where 32 bits would wrap around to a column.
            strange = torch.tensor([-1, columns, 2**32 + 1, -(2**32)], device=DEVICE)
            target[::2] = strange[torch.arange(len(target[::2])) % 4]
        strips.append(
            Strip(
                x,
                y,
                torch.tensor(SCALE, device=DEVICE),
                1 / x.float().norm(dim=1) if case.factors else None,
                1 / y.float().norm(dim=1) if case.factors else None,
                bias,
                None if number or case.target == "none" else target,
            )
        )
    return strips


def problem_of(strips: list[Strip], scale_bound: float | None = None) -> Problem:
    x = strips[0].x
    return Problem(
        (x, *(strip.y for strip in strips)),
        tuple(Block(0, 1 + number, strip.bias) for number, strip in enumerate(strips)),
        strips[0].scale,
        torch.zeros(x.shape[0], dtype=torch.int64, device=x.device),
        torch.ones(x.shape[0], device=x.device),
        scale_bound=scale_bound,
    )


def formula(strip: Strip) -> tuple[Tensor, Tensor]:
    """(similarities, logits) in fp64; the target's logit and those of removed columns are -inf."""
    sim = strip.x.double() @ strip.y.double().T
    if strip.row_factor is not None and strip.col_factor is not None:
        sim = sim * strip.row_factor.double()[:, None] * strip.col_factor.double()
    z = sim * strip.scale.double()
    if strip.bias is not None:
        z = z + strip.bias.double()
    if strip.target is not None:
        columns = torch.arange(z.shape[1], device=z.device)
        z = z.masked_fill(columns == strip.target[:, None], -torch.inf)
    return sim, z


def factored(value: Tensor, strip: Strip) -> Tensor:
    if strip.row_factor is None or strip.col_factor is None:
        return value
    return value * strip.row_factor.double()[:, None] * strip.col_factor.double()


def workspace(strips: list[Strip]) -> tuple[Tensor, list[Tensor]]:
    """A NaN workspace whose rows are longer than the strips, and a view of it for each strip."""
    widths = [-(-strip.y.shape[0] // 16) * 16 for strip in strips]
    x = strips[0].x
    buffer = torch.full((x.shape[0], sum(widths) + 16), math.nan, dtype=x.dtype, device=x.device)
    starts = [sum(widths[:number]) for number in range(len(widths))]
    return buffer, [buffer[:, start : start + strip.y.shape[0]] for start, strip in zip(starts, strips, strict=True)]


def assert_near(actual: Tensor, expected: Tensor, magnitude: Tensor | float = 0.0) -> None:
    """Within 64 ulp of a logit of 10, of the value or, for sums that cancel, `magnitude`."""
    actual = actual.double()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    bound = 64 * torch.finfo(torch.float32).eps * 10
    error = (actual - expected).abs() - bound * torch.maximum(expected.abs(), torch.as_tensor(magnitude))
    assert (same | (error <= 0)).all(), error[~same].max()


def assert_stored(outs: list[Tensor], expected: list[Tensor], buffer: Tensor) -> None:
    """Each tile rounded once to the workspace's dtype, the padding untouched."""
    info = torch.finfo(buffer.dtype)
    for out, value in zip(outs, expected, strict=True):
        slack = (info.eps + 1e-4) * value.abs() + info.smallest_normal * info.eps
        assert ((out.double() - value).abs() <= slack).all()
        out.fill_(math.nan)
    assert buffer.isnan().all()


def lse(sums: RowSums) -> Tensor:
    return sums.shift + sums.total.log()


def assert_lse(sums: RowSums, z: Tensor) -> None:
    assert sums.shift.isfinite().all()
    assert_near(lse(sums), torch.logsumexp(z, 1), magnitude=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stats(case, dtype):
    strips = make(case, dtype)
    z = torch.cat([formula(strip)[1] for strip in strips], 1)
    assert_lse(backend.stats_rows(strips), z)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stats_with_columns(case, dtype):
    strip = make(case, dtype)[0]
    z = formula(strip)[1]
    rows, columns = backend.stats_rows_and_columns(strip)
    assert_lse(rows, z)
    assert_lse(columns, z.T)


@pytest.mark.parametrize("with_q", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exp(case, dtype, with_q):
    strips = make(case, dtype)
    target_sim = torch.randn(case.rows, device=DEVICE) if with_q else None
    buffer, outs = workspace(strips)
    sums, q = backend.exp_rows(problem_of(strips, scale_bound=SCALE), strips, outs, target_sim)
    sims, zs = zip(*map(formula, strips), strict=True)
    exps = [torch.exp(z - sums.shift.double()[:, None]) for z in zs]
    assert_near(sums.total, sum(e.sum(1) for e in exps))
    if with_q:
        terms = torch.cat([e * (s - target_sim[:, None]) for e, s in zip(exps, sims, strict=True)], 1)
        assert_near(q, terms.sum(1), magnitude=terms.abs().sum(1) + sums.total)
    else:
        assert q is None
    assert_stored(outs, [factored(e, s) for e, s in zip(exps, strips, strict=True)], buffer)


def direction(z: Tensor, with_q: bool) -> Softmax:
    """Weights of either sign; every third row left out, with whatever its shift may then be."""
    shift = z.amax(1).float()
    weight = 2 * torch.rand(shift.shape, device=DEVICE) - 1  # |gain * dz| <= 2**15 in fp16
    weight[shift == -torch.inf] = 0
    weight[::3] = 0
    for start, value in enumerate([-torch.inf, torch.inf, torch.nan]):
        shift[3 * start :: 9] = value
    target_sim = torch.randn(shift.shape, device=DEVICE) if with_q else None
    return Softmax(shift, weight, target_sim)


def grad_formula(z: Tensor, sim: Tensor, softmax: Softmax) -> tuple[Tensor, Tensor]:
    """(dz, terms of q), both [M, N]."""
    left_out = (softmax.weight == 0)[:, None]
    shift = softmax.shift.double()[:, None].masked_fill(left_out, 0)
    dz = (softmax.weight.double()[:, None] * torch.exp(z - shift)).masked_fill(left_out, 0)
    target_sim = 0 if softmax.target_sim is None else softmax.target_sim.double()[:, None]
    return dz, dz * (sim - target_sim)


def gain_of(dtype):
    """What the sweep passes: None, or a power of two on the device."""
    return torch.tensor(2.0**15, device=DEVICE) if dtype == torch.float16 else None


@pytest.mark.parametrize("with_q", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_grad(case, dtype, with_q):
    strips = make(case, dtype)
    buffer, outs = workspace(strips)
    sims, zs = zip(*map(formula, strips), strict=True)
    rows = direction(torch.cat(zs, 1), with_q)
    gain = gain_of(dtype)
    q = backend.grad_rows(strips, outs, rows, None, gain)
    dz, terms = zip(*(grad_formula(z, sim, rows) for z, sim in zip(zs, sims, strict=True)), strict=True)
    if with_q:
        terms = torch.cat(terms, 1)
        assert_near(q, terms.sum(1), magnitude=terms.abs().sum(1) + rows.weight.abs())
    else:
        assert q is None
    gain = 1 if gain is None else gain.double()
    assert_stored(outs, [gain * factored(v, s) for v, s in zip(dz, strips, strict=True)], buffer)


@pytest.mark.parametrize("with_q", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_with_columns(case, dtype, with_q):
    strips = make(case, dtype)[:1]
    buffer, outs = workspace(strips)
    sim, z = formula(strips[0])
    rows, columns = direction(z, with_q), direction(z.T, with_q)
    # Both directions together must stay within fp16 as well.
    rows, columns = (
        rows._replace(weight=rows.weight / 8),
        columns._replace(weight=columns.weight / 8),
    )
    gain = gain_of(dtype)
    q = backend.grad_rows(strips, outs, rows, columns, gain)
    dz_rows, row_terms = grad_formula(z, sim, rows)
    dz_columns, column_terms = grad_formula(z.T, sim.T, columns)
    if with_q:
        size = row_terms.abs().sum(1) + column_terms.abs().sum(0) + rows.weight.abs()
        assert_near(q, row_terms.sum(1) + column_terms.sum(0), magnitude=size)
    dz = factored(dz_rows + dz_columns.T, strips[0])
    info = torch.finfo(dtype)
    gain = 1 if gain is None else gain.double()
    value = gain * dz
    parts = gain * factored(dz_rows.abs() + dz_columns.T.abs(), strips[0])
    slack = (info.eps + 1e-4) * parts + info.smallest_normal * info.eps
    assert ((outs[0].double() - value).abs() <= slack).all()
    outs[0].fill_(math.nan)
    assert buffer.isnan().all()


@pytest.mark.parametrize("subtiles", [1, 2])
def test_tiles_do_not_change_results(monkeypatch, subtiles):
    """Each half of a tile has its own partials; the second may lie out of range altogether."""
    tile = Config(32, 64, 32, GROUP_M=1, SUBTILES=subtiles, num_warps=4, num_stages=2)
    monkeypatch.setattr(backend, "_config", lambda strip, pressure: tile)
    case = Case(40, (70,), 33, factors=True, bias=True)
    test_stats_with_columns(case, torch.float32)
    test_exp(case, torch.float32, with_q=True)
    test_grad_with_columns(case, torch.float32, with_q=True)


def test_a_nan_logit_reaches_its_row_and_column_only():
    strip = make(CASES["several tiles, all edges ragged"], torch.float32)[0]
    strip.x[3] = math.nan
    rows, _ = backend.stats_rows_and_columns(strip)
    assert lse(rows).isnan().nonzero().tolist() == [[3]]
    strip.x[3] = 0
    strip.y[5] = math.nan
    _, columns = backend.stats_rows_and_columns(strip)
    assert lse(columns).isnan().nonzero().tolist() == [[5]]


def test_a_removed_column_is_not_read():
    strips = make(Case(18, (40,), 20, bias=True), torch.float32)
    expected = lse(backend.stats_rows(strips))
    strips[0].y[strips[0].bias == -torch.inf] = math.nan
    assert torch.equal(lse(backend.stats_rows(strips)), expected)


def test_a_row_without_columns():
    strips = make(Case(3, (40,), 20, bias=True), torch.float32)
    strips[0].bias.fill_(-torch.inf)
    sums = backend.stats_rows(strips)
    assert sums.shift.tolist() == sums.total.tolist() == [0, 0, 0]
    rows, columns = backend.stats_rows_and_columns(strips[0])
    assert not rows.total.any() and not columns.total.any()


def test_extreme_logits_stay_finite():
    """Scale 1000: exponents reach +-3000, far beyond what exp can hold without its shift."""
    strip = make(CASES["several tiles, all edges ragged"], torch.float32)[0]
    strip = strip._replace(scale=torch.tensor(1000.0, device=DEVICE))
    z = formula(strip)[1]
    rows, columns = backend.stats_rows_and_columns(strip)
    bound = 64 * torch.finfo(torch.float32).eps * z[z.isfinite()].abs().max()
    for sums, expected in [(rows, z.logsumexp(1)), (columns, z.logsumexp(0))]:
        assert (lse(sums).double() - expected).abs().max() <= bound


@pytest.mark.parametrize("bound", [0.0, 1.0, 20.0, 34.5, 50.0, 59.0])
def test_the_shift_of_exp_is_safe(bound):
    """Exponentials of logits within +-bound, and 2**27 of the largest together, are normal."""
    shift = backend._exp_shift(bound)
    assert math.exp(-bound - shift) >= 1e-30
    assert 2**27 * math.exp(bound - shift) <= 1e30


def test_can_exp():
    strips = make(CASES["cosine factors"], torch.float32)
    problem = problem_of(strips, scale_bound=20.0)
    replace = lambda **changes: problem.__class__(**{**vars(problem), "cosine": True, **changes})
    assert backend.can_exp(replace())
    assert backend.can_exp(replace(scale_bound=-59.0))
    assert not backend.can_exp(replace(cosine=False))
    assert not backend.can_exp(replace(scale_bound=None))
    assert not backend.can_exp(replace(scale_bound=60.0))
    assert not backend.can_exp(replace(operands=tuple(x.half() for x in problem.operands)))
    bias = torch.zeros(40, device=DEVICE)
    assert not backend.can_exp(replace(blocks=(Block(0, 1, bias),)))


def test_why_not(monkeypatch):
    import triton

    problem = problem_of(make(CASES["one ragged tile"], torch.float32))
    cast = lambda dtype: problem.__class__(
        **{**vars(problem), "operands": tuple(x.to(dtype) for x in problem.operands)}
    )
    assert backend.why_not(problem) is None
    assert "float64" in backend.why_not(cast(torch.float64))
    if triton.knobs.runtime.interpret:
        assert "bfloat16" in backend.why_not(cast(torch.bfloat16))
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert "3.5.1" in backend.why_not(problem)
    monkeypatch.undo()
    if DEVICE == "cpu":
        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
        assert "cpu" in backend.why_not(problem)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("pressure", [0, 1, 2])
def test_small_problems_get_small_tiles(capability, pressure):
    few, many = (pick_config(n, n, 2, capability, pressure=pressure) for n in (256, 65536))
    assert few.BLOCK_M * few.BLOCK_N < many.BLOCK_M * many.BLOCK_N
