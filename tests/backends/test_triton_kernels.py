"""Triton's kernels beside what tests/conformance/ holds them to, in its interpreter without a GPU."""

from __future__ import annotations

import inspect
import math
from typing import NamedTuple

import pytest
import torch
from epilogue_checks import TILES
from epilogue_checks import problem_of as checked_problem
from fold_checks import KINDS, check_fold, fold_of, part_of
from strips import assert_near, formula, lse
from torch import Tensor

from fusedloss.backends.shared import exp_shift
from fusedloss.core import rows as plain
from fusedloss.core.problem import Block, Problem, RowRule
from fusedloss.core.strips import Patch, RowSums, Softmax, Strip
from fusedloss.functional import clip
from fusedloss.proof.zones import Zones
from fusedloss.testing import value_and_gradients

pytest.importorskip("triton")
from fusedloss.kernels import distill, similarity

from fusedloss.backends import triton as backend
from fusedloss.backends.triton import launching
from fusedloss.backends.triton import rows as launchers
from fusedloss.backends.triton.config import ELSEWHERE, SPECIALIZED, Config, pick_config, pick_rows

pytestmark = pytest.mark.interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]
SCALE = 3.0


class Case(NamedTuple):
    """Shapes and operands of one chunk. Tiles are 16 x 32 x 16 or twice that."""

    rows: int
    columns: tuple[int, ...]  # one strip each
    dim: int
    factors: bool = False
    bias: bool = False


CASES = {
    "one ragged tile": Case(5, (7,), 3),
    "several tiles, all edges ragged": Case(40, (70,), 33),
    "one row": Case(1, (33,), 17),
    "cosine factors": Case(18, (40,), 20, factors=True),
}


def matrix(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(rows, columns) / columns**0.25).to(DEVICE, dtype)


def make(case: Case, dtype: torch.dtype) -> list[Strip]:
    x = backend.operand(matrix(case.rows, case.dim, dtype))
    strips = []
    for number, columns in enumerate(case.columns):
        y = backend.operand(matrix(columns, case.dim, dtype))
        bias = None
        if case.bias:
            bias = torch.randn(columns).masked_fill(torch.rand(columns) < 0.3, -torch.inf).to(DEVICE)
        target = torch.randint(columns, (case.rows,), device=DEVICE)
        strips.append(
            Strip(
                x,
                y,
                torch.tensor(SCALE, device=DEVICE),
                1 / x.float().norm(dim=1) if case.factors else None,
                1 / y.float().norm(dim=1) if case.factors else None,
                bias,
                None if number else target,
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


# Once per row: `core/rows.py` is the definition ------------------------------------------------------------------


@pytest.fixture
def few_rows(monkeypatch):
    """Several programs, and several steps of each, at tens of rows and columns."""

    def options(kernel, interpreted):
        return {name: {"BLOCK_R": 8, "BLOCK_T": 4, "BLOCK_D": 16}[name] for name in pick_rows(kernel, interpreted=True)}

    monkeypatch.setattr(launchers, "row_options", options)


def pair(dtype: torch.dtype, rows: int = 21, columns: int = 34, dim: int = 37) -> tuple[Tensor, Tensor, Tensor]:
    x, y = (backend.operand(matrix(count, dim, dtype)) for count in (rows, columns))
    return x, y, torch.randint(columns, (rows,), device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("wants_target_sim", [False, True])
@pytest.mark.parametrize("rows, columns", [(21, 34), (34, 21)])
def test_prepare(dtype, cosine, biased, wants_target_sim, rows, columns, few_rows):
    x, y, target = pair(dtype, rows, columns)
    x[3] = y[2] = 0  # a zero row has a finite factor
    scale, bias = torch.tensor(7.0, device=DEVICE), torch.randn(columns, device=DEVICE) if biased else None
    options = {"cosine": cosine, "wants_target_sim": wants_target_sim}
    found = backend.prepare(x, y, target, scale, bias, **options)
    wanted = plain.prepare(x, y, target, scale, bias, **options)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    both_sides = backend.prepare(x, x, torch.arange(rows, device=DEVICE), scale, None, **options)
    assert both_sides.row_factor is both_sides.col_factor


def test_inverse_norms_of_rows_that_are_not_in_a_pair(few_rows):
    _, y, _ = pair(torch.float16)
    torch.testing.assert_close(backend.inverse_norms(y), plain.inverse_norms(y), rtol=1e-6, atol=0)


def partial_sums(tiles: int, rows: int) -> RowSums:
    """Tables of tiles; some tiles, and one whole row, without a column."""
    shift, total = 30 * torch.randn(tiles, rows, device=DEVICE), 9 * torch.rand(tiles, rows, device=DEVICE)
    nothing = torch.rand(tiles, rows, device=DEVICE) < 0.2
    nothing[:, 2] = True
    return RowSums(shift.masked_fill(nothing, -torch.inf), total.masked_fill(nothing, 0))


def merged(sums: RowSums) -> RowSums:
    total = RowSums.empty(sums.total.shape[1], sums.total)
    for tile in zip(*sums, strict=True):
        total = plain.merge(total, RowSums(*tile))
    return total


@pytest.mark.parametrize("tiles", [1, 7])
@pytest.mark.parametrize("level", [-300.0, 0.0, 300.0])
def test_merge(tiles, level, few_rows):
    first, second = partial_sums(tiles, 21), partial_sums(2, 21)
    first, second = (sums._replace(shift=sums.shift + level) for sums in (first, second))
    found = backend.merge(backend.merge(RowSums.empty(21, first.total), first), second)
    wanted = merged(RowSums(*(torch.cat(pair) for pair in zip(first, second, strict=True))))
    log = wanted.shift.double() + wanted.total.double().log()
    assert_near(found.shift + found.total.log(), log, magnitude=1.0)


@pytest.mark.parametrize("tiles", [1, 7])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("one_shift", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
def test_settle(tiles, label_smoothing, one_shift, cosine, few_rows):
    """Rows left out, without negatives, far better and far worse than their negatives; NaN in a sum and in a target."""
    x, y, target = pair(torch.float16, dim=23)
    sums = partial_sums(tiles, 21)
    sums.shift[:, 12], sums.total[:, 12] = -torch.inf, 0
    if one_shift:
        sums = RowSums(-40.0, sums.total)
    score = 20 * torch.randn(21, device=DEVICE, dtype=torch.float64)
    score[4], score[5], score[12] = 200.0, -200.0, torch.nan
    weight = torch.rand(21, device=DEVICE) - 0.2
    weight[6:9] = 0
    sums.total[0, 9] = torch.nan
    summed = RowSums(torch.full((21,), -40.0, device=DEVICE), sums.total.sum(0)) if one_shift else merged(sums)
    factors = [torch.rand(count, device=DEVICE) + 1 if cosine else None for count in (21, 34)]
    for patched in (False, True):
        outs = [torch.zeros(21, 40, device=DEVICE)[:, :34] for _ in range(2)]
        patches = [Patch(out, target, *factors) for out in outs] if patched else [None, None]
        scaled = {"scaled": [x, y[:21]], "dtype": torch.float32} if patched else {}
        found = backend.settle(sums, score, weight, RowRule(label_smoothing), patch=patches[0], **scaled)
        wanted = plain.settle(summed, score, weight, RowRule(label_smoothing), patch=patches[1], **scaled)
        bounds = {"rtol": 64 * 50 * torch.finfo(torch.float32).eps, "atol": 1e-30, "equal_nan": True}
        for name in ("loss", "weight", *([] if patched else ["entry"])):
            torch.testing.assert_close(getattr(found, name), getattr(wanted, name), **bounds)
        torch.testing.assert_close(*outs, **bounds)
        for a, b in zip(found.scaled, wanted.scaled, strict=True):
            torch.testing.assert_close(a, b, **bounds)


def test_tiny_losses_keep_their_digits(few_rows):
    """log(1 + x) down to x = 1e-30, where eager fp32 is 0."""
    negatives = torch.logspace(-30, 2, 33, device=DEVICE)
    sums = RowSums(torch.zeros(1, 33, device=DEVICE), negatives[None])
    found = backend.settle(sums, torch.zeros(33, dtype=torch.float64, device=DEVICE), torch.ones(33, device=DEVICE))
    torch.testing.assert_close(found.loss.double(), torch.log1p(negatives.double()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("cosine", [False, True])
def test_weigh(cosine, few_rows):
    e, target = torch.rand(21, 70, device=DEVICE), torch.randint(70, (21,), device=DEVICE)
    factors = [torch.rand(count, device=DEVICE) if cosine else None for count in (21, 70)]
    rows, columns, entry = torch.rand(21, device=DEVICE), torch.rand(70, device=DEVICE), torch.rand(21, device=DEVICE)
    found, wanted = e.clone(), e.clone()
    backend.weigh(Patch(found, target, *factors), rows, columns, entry)
    plain.weigh(Patch(wanted, target, *factors), rows, columns, entry)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("with_gain", [False, True])
@pytest.mark.parametrize("with_l", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_finish(with_gain, with_l, cosine, in_place, few_rows):
    x, _, _ = pair(torch.float16)
    x[5] = 0
    factor = backend.inverse_norms(x) if cosine else None
    total, scale = torch.randn(21, 37, device=DEVICE), torch.tensor(7.0, device=DEVICE)
    gain = torch.tensor(2.0**9, device=DEVICE) if with_gain else None
    over_l = torch.rand(21, device=DEVICE) if with_l else None
    found, wanted = total.clone(), total.clone()
    outs = [t if in_place else torch.full((21, 40), torch.nan, device=DEVICE)[:, :37] for t in (found, wanted)]
    backend.finish(found, over_l, scale, gain, x, factor, outs[0])
    plain.finish(wanted, over_l, scale, gain, x, factor, outs[1])
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


# Folds ----------------------------------------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labelled", [False, True], ids=["targets", "labels"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_folds(monkeypatch, tile, case, kind, labelled, stored):
    """The interpreter multiplies no bf16: where torch does not, operands are fp16 and only what is stored is bf16."""
    monkeypatch.setattr(backend, "config_of", lambda strip, mode: TILES[tile])
    monkeypatch.setattr(backend, "_panel_columns", lambda strip, config: 2 * config.BLOCK_N)
    operands = torch.float16 if stored == torch.bfloat16 and tile != "library" else stored
    (strip,) = make(CASES[case], operands)
    check_fold(backend, strip, kind, labelled, stored=stored)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_row_of_a_fold(kind):
    """And where the row is left out, nothing is NaN; all other rows have the same bits."""
    (strip,) = make(CASES["several tiles, all edges ragged"], torch.float32)
    sim = formula(strip)[0]
    score = sim.gather(1, strip.target[:, None])[:, 0]
    strip, fold = fold_of(strip, kind, sim, score)
    part, found = part_of(strip, kind, labelled=True), []
    for bad in (0.0, math.nan):
        strip.x[3:5] += bad
        out = torch.empty(40, 72, device=DEVICE)[:, :70]
        found.append((backend.fold_rows(checked_problem(strip, fold=fold), strip, out, part, score).loss, out))
    assert part.weight[3] > 0 and part.weight[4] == 0
    (wanted, stored), (loss, out) = found
    assert loss.isnan().nonzero().tolist() == [[3]]
    others = [i for i in range(40) if i != 3]
    assert torch.equal(loss[others], wanted[others]) and torch.equal(out[others], stored[others])


# Addresses, alignment, extremes ---------------------------------------------------------------------------------------


def sparse(rows: int, columns: int, stride: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """A matrix whose rows lie `stride` elements apart, in memory that is only reserved until it is written."""
    import numpy

    reserved = torch.from_numpy(numpy.empty(rows * stride, dtype=numpy.uint16)).view(dtype)
    return reserved.view(rows, stride)[:, :columns]


@pytest.mark.parametrize("tile", ["pointers", "descriptors", "library"], indirect=False)
def test_addresses_beyond_two_to_the_31_elements(monkeypatch, tile):
    """Operands, workspace and gradients: 40 rows, 2**26 + 8 elements apart, end at 2.6e9 elements, 5.4 GB."""
    monkeypatch.setattr(backend, "config_of", lambda strip, mode: TILES[tile])
    stride = 2**26 + 8
    assert 39 * stride > 2**31
    if DEVICE == "cuda":
        pytest.skip("reserves without touching: a CPU's memory; test_gpu.py has the sizes themselves")
    case = Case(40, (40,), 20)
    strip = make(case, torch.float16)[0]
    x, y, out = (sparse(40, columns, stride) for columns in (20, 20, 40))
    x.copy_(strip.x), y.copy_(strip.y), out.fill_(math.nan)
    far = strip._replace(x=x, y=y)
    assert torch.equal(lse(backend.stats_rows([far])), lse(backend.stats_rows([strip])))
    near, scaled = torch.empty(40, 40, dtype=torch.float16), []
    for s, o in ((strip, near), (far, out)):
        sums, _ = backend.exp_rows(problem_of([strip], scale_bound=SCALE), [s], [o], None)
        score, patch = torch.zeros(40, dtype=torch.float64), Patch(o, strip.target, None, None)
        settled = backend.settle(sums, score, torch.ones(40), patch=patch, scaled=[s.x], dtype=torch.float32)
        backend.weigh(patch, settled.weight, settled.weight, settled.weight)
        scaled += settled.scaled
    assert torch.equal(near, out) and torch.equal(*scaled)
    total, kept = torch.randn(40, 20), sparse(40, 20, stride)
    backend.finish(total, None, torch.tensor(2.0), None, x, backend.inverse_norms(x), kept)
    wanted = torch.empty(40, 20, dtype=torch.float16)
    backend.finish(total, None, torch.tensor(2.0), None, strip.x, backend.inverse_norms(strip.x), wanted)
    assert torch.equal(kept, wanted)


@pytest.mark.parametrize("tile, softcap", [(tile, 2.0 * (i % 2)) for i, tile in enumerate(TILES)])
def test_tiles_that_need_no_test_are_folded_like_the_others(monkeypatch, tile, softcap):
    """Those inside of the matrix that hold no target; with factors, or without them under a softcap."""
    config = TILES[tile]
    monkeypatch.setattr(backend, "config_of", lambda strip, mode: config)
    strip = make(Case(40, (140,), 20, factors=not softcap), torch.float16)[0]
    strip = strip._replace(target=torch.arange(40, device=DEVICE), softcap=softcap)
    of_targets = {(i // config.BLOCK_M, i // config.BLOCK_N) for i in range(40)}
    whole = {(m, n) for m in range(40 // config.BLOCK_M) for n in range(140 // config.BLOCK_N)}
    assert whole - of_targets
    row, column = (torch.rand(size, device=DEVICE) + 0.5 for size in (40, 140))
    problem, gain = problem_of([strip], scale_bound=SCALE), torch.tensor(8.0, device=DEVICE)
    outs = torch.empty(3, 40, 144, device=DEVICE, dtype=torch.float16)[:, :, :140].unbind(0)
    rows, columns = backend.stats_rows_and_columns(strip)
    e, _ = backend.exp_rows(problem, [strip], [outs[0]], None)
    both = backend.exp_rows_and_columns(problem, strip, outs[1])
    q = backend.grad_rows([strip], [outs[2]], Softmax(row, row, row), Softmax(column, column, column), row, gain)
    assert q is not None
    sim, z = formula(strip)
    slope = 1 - (z.clamp_min(-softcap) / softcap).square() if softcap else torch.ones_like(z)
    factors = 1.0 if softcap else strip.row_factor.double()[:, None] * strip.col_factor.double()
    exact = (z - exp_shift(problem)).exp()
    by_row, by_column = (w.double() * (z - w.double()).exp() for w in (row[:, None], column))
    of_q = (by_row * (sim - row[:, None]) + by_column * (sim - column)).sum(1)
    dz = ((by_row + by_column) * slope).scatter(1, strip.target[:, None], row.double()[:, None])
    sums = {"rtol": 2e-5, "atol": 2e-5, "check_dtype": False}
    torch.testing.assert_close(lse(rows), z.logsumexp(1), **sums)
    torch.testing.assert_close(lse(columns), z.logsumexp(0), **sums)
    for total, dim in ((e.total, 1), (both[0].total, 1), (both[1].total, 0)):
        torch.testing.assert_close(total.sum(0), exact.sum(dim), **sums)
    torch.testing.assert_close(q.sum(0), of_q, **sums)

    def assert_stored(out: Tensor, wanted: Tensor, straight: Tensor) -> None:
        """Rounded once; a slope near 0 is a difference of fp32 numbers near 1, times the value before it."""
        atol = max(1e-6, 8 * torch.finfo(torch.float32).eps * float(straight.max()))
        torch.testing.assert_close(out, wanted * factors, rtol=2**-10, atol=atol, check_dtype=False)

    for out in outs[:2]:
        assert_stored(out, exact * slope.where(z > -math.inf, 1), exact)
    assert_stored(outs[2], 8 * dz, 8 * (by_row + by_column))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_aligned_are_copied_once(dtype):
    """To rows that begin and end on 16 bytes, as wide copies and tensor maps need; such ones stay as they are."""
    whole = torch.randn(12, 64, device=DEVICE).to(dtype)
    assert backend.operand(whole) is whole
    assert backend.operand(whole[2:, :40]).data_ptr() == whole[2:].data_ptr()
    ends = (whole[:, :7].contiguous(), whole[:, :7], whole[:, :50])  # within 16 bytes; behind them the copy has zeros
    for odd in (whole[:, 1:9], *ends, whole.T, whole[:, ::2], whole[:1].expand(5, 64)[:, 3:]):
        copy = backend.operand(odd)
        columns = launching.whole(copy)
        assert columns * dtype.itemsize % 16 == 0 and columns - odd.shape[1] < 16 // dtype.itemsize
        assert not copy.as_strided((len(copy), columns), copy.stride())[:, odd.shape[1] :].any()
        assert torch.equal(copy, odd) and copy.data_ptr() != odd.data_ptr()
        assert copy.stride(1) == 1 and copy.stride(0) * dtype.itemsize % 16 == copy.data_ptr() % 16 == 0


@pytest.mark.parametrize(("rows", "dim"), [(35, 50), (1, 12), (21, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", ["pointers", "library"])
def test_what_lies_behind_a_row_is_in_no_sum(monkeypatch, tile, dtype, rows, dim):
    """NaN stands behind the rows of the operands, in the workspace, and wherever memory has not been written."""
    monkeypatch.setattr(backend, "config_of", lambda strip, mode: TILES[tile])
    wide = [torch.full((rows, 64), math.nan, dtype=dtype, device=DEVICE) for _ in range(2)]
    for x in wide:
        x[:, :dim] = matrix(rows, dim, dtype)
    scale = torch.tensor(SCALE, device=DEVICE)

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        name = "reference" if x.dtype == torch.float64 else "triton"
        return clip(x[:, :dim], y[:, :dim], scale, normalize=True, backend=name)

    with Zones(torch.device(DEVICE)) as zones:
        found = value_and_gradients(loss, (*wide, scale))
    assert zones.written() is None
    wanted = value_and_gradients(loss, [x.double() for x in (*wide, scale)])
    rounding = 1e-5 if dtype == torch.float32 else 2e-3
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=rounding, atol=rounding * b.abs().max().item(), check_dtype=False)


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
    assert (sums.shift == -torch.inf).all() and not sums.total.any()
    settled = backend.settle(
        sums, torch.tensor([3.0, 900.0, -900.0], device=DEVICE).double(), torch.ones(3, device=DEVICE)
    )
    assert settled.loss.tolist() == settled.entry.tolist() == [0, 0, 0] and settled.weight.tolist() == [1, 1, 1]
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
    problem = problem_of(make(CASES["one row"], torch.float32), scale_bound=-bound)
    shift = exp_shift(problem)
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


@pytest.fixture
def nothing_known():
    """Answers are kept; these tests change what they were found from."""
    launching._why_not.cache_clear()
    yield launching._why_not.cache_clear
    launching._why_not.cache_clear()


def test_why_not(monkeypatch, nothing_known):
    import triton

    problem = problem_of(make(CASES["one ragged tile"], torch.float32))
    cast = lambda dtype: problem.__class__(
        **{**vars(problem), "operands": tuple(x.to(dtype) for x in problem.operands)}
    )
    assert backend.why_not(problem) is None
    assert "float64" in backend.why_not(cast(torch.float64))
    if triton.knobs.runtime.interpret:
        assert "bfloat16" in backend.why_not(cast(torch.bfloat16))
    nothing_known()
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert "3.5.1" in backend.why_not(problem)
    monkeypatch.undo()
    if DEVICE == "cpu":
        nothing_known()
        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
        assert "cpu" in backend.why_not(problem)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0), ELSEWHERE])
@pytest.mark.parametrize("mode", ["stats", "exp", "grad, columns, q"])
def test_small_problems_get_small_tiles(capability, mode):
    few, many = (pick_config(n, n, 768, "bf16", capability, mode) for n in (256, 65536))
    assert few.BLOCK_M * few.BLOCK_N < many.BLOCK_M * many.BLOCK_N


def test_the_way_to_multiply_follows_the_device_and_the_width():
    way = lambda D, capability, dtype="bf16": pick_config(65536, 65536, D, dtype, capability, "exp").GEMM
    assert way(768, (9, 0)) == way(768, (10, 0)) == "descriptors"
    assert way(768, (8, 0)) == way(4096, (8, 0)) == way(768, (12, 0)) == "pointers"
    assert way(4096, (9, 0)) == "library"
    assert way(768, (9, 0), "fp32") == way(64, (8, 0), "fp32") == "library"
    assert way(768, ELSEWHERE, "fp32") == "pointers"


def test_tf32_is_rounded_to_the_nearest(monkeypatch):
    """The tensor cores cut 13 bits off: of 1 + 0.75 of tf32's last place they would make 1."""
    step = 2.0**-10
    x = torch.tensor([[1 + 0.75 * step, -1 - 0.75 * step, 1 + 0.25 * step, math.inf, -math.inf, math.nan, 2.0**-126]])
    wanted = torch.tensor([[1 + step, -1 - step, 1.0, math.inf, -math.inf, math.nan, 2.0**-126]])
    x[0, 5] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # the NaN of a GPU
    monkeypatch.setattr(backend, "precision_of", lambda dtype, device: "tf32")
    monkeypatch.setattr(backend, "config_of", lambda strip, mode: TILES["pointers"])
    x, y, out = x.T.contiguous().to(DEVICE), torch.ones(1, 1, device=DEVICE), torch.empty(7, 16, device=DEVICE)[:, :1]
    one = torch.ones((), device=DEVICE)
    backend.similarities(Strip(backend.operand(x), backend.operand(y), one, None, None, None, None), out)
    torch.testing.assert_close(out.T.cpu(), wanted, rtol=0, atol=0, equal_nan=True)


def test_tensor_maps_round_to_tf32(monkeypatch):
    found = []
    monkeypatch.setattr(backend, "launch", lambda kernel, grid, device, *args, **options: found.append(args[:3]))
    monkeypatch.setattr(backend, "config_of", lambda strip, mode: TILES["descriptors"])
    strip = make(CASES["one row"], torch.float32)[0]
    for precision in ("tf32", "ieee"):
        monkeypatch.setattr(backend, "precision_of", lambda dtype, device, found=precision: found)
        backend.exp_rows(problem_of([strip], scale_bound=SCALE), [strip], [torch.empty(1, 36)[:, :33]], None)
    assert [[getattr(x, "round_f32_to_tf32", False) for x in args] for args in found] == [
        [True, True, False],
        [False, False, False],
    ]


@pytest.mark.parametrize("device, hip", [("xpu", None), ("xpu:1", None), ("cuda", "7.0")])
def test_a_gpu_of_amd_or_intel_is_tried_without_what_is_nvidias(monkeypatch, device, hip):
    import triton

    device = torch.device(device)
    nothing_known = lambda: [f.cache_clear() for f in (launching._why_not, launching.capability_of)]
    nothing_known()
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))  # ROCm's word for gfx942
    monkeypatch.setattr(launching, "tf32", lambda: True)
    assert backend.why_not_on(torch.bfloat16, device) is None
    assert "float64" in backend.why_not_on(torch.float64, device)
    assert launching.capability_of(device) == ELSEWHERE and launching.precision_of(torch.float32, device) == "ieee"
    monkeypatch.setattr(torch.version, "hip", None)
    nothing_known()
    if device.type == "cuda":
        assert launching.capability_of(device) == (9, 4) and launching.precision_of(torch.float32, device) == "tf32"
    nothing_known()


def test_no_config_for_amd_or_intel_has_tensor_maps():
    for mode in ("stats", "exp, columns", "grad, columns, q", "guide", "top, masked", "stats, softcap"):
        for dtype in ("bf16", "fp16", "fp32"):
            for n, D in ((256, 768), (65536, 768), (65536, 8192)):
                config = pick_config(n, n, D, dtype, ELSEWHERE, mode)
                assert config.GEMM == "pointers" and config.SUBTILES == 1


def test_a_measured_config_is_taken_at_the_nearest_width(monkeypatch):
    from fusedloss.backends.triton import config

    entry = {"capability": [9, 0], "dtype": "bf16", "mode": "exp", "D": 768}
    table = [
        {**entry, "config": {**TILES["library"]._asdict()}},
        {**entry, "D": 4096, "config": {**TILES["pointers"]._asdict()}},
    ]
    monkeypatch.setattr(config, "_table", lambda: table)
    pick = lambda D, **other: pick_config(
        65536, 65536, D, **{"dtype": "bf16", "capability": (9, 0), "mode": "exp", **other}
    )
    assert pick(1024) == pick(16) == TILES["library"] and pick(3000) == TILES["pointers"]
    assert pick(1024, mode="stats") not in TILES.values() and pick(1024, dtype="fp16") not in TILES.values()


def test_programs_of_the_row_kernels_cover_every_row():
    for kernel in ("prepare_kernel", "merge_kernel", "settle_kernel", "finish_kernel"):
        sizes = pick_rows(kernel, interpreted=False)
        assert sizes["BLOCK_R"] * max(sizes.get("BLOCK_D", 1), sizes.get("BLOCK_T", 1)) <= 2048


@pytest.mark.parametrize("classes", [16, 21])
def test_logits_that_a_mask_leaves_out_are_in_no_sum(classes):
    from fusedloss.backends.triton import classes as triton_classes

    x, share = matrix(5, classes, torch.float32), matrix(5, classes, torch.float32)
    mask = torch.rand(5, classes, device=DEVICE) < 0.7
    mask[:, 0] = True
    gone = [t.masked_fill(~mask, math.nan) for t in (x, share)]
    loss, grad, _ = triton_classes.soft_rows(gone[0], (gone[1], mask), True)
    leaf = x.double().requires_grad_()
    log_p, q = (t.double().masked_fill(~mask, -math.inf).log_softmax(1) for t in (leaf, share))
    wanted = -(q.exp() * log_p).masked_fill(~mask, 0).sum(1)
    (slope,) = torch.autograd.grad(wanted.sum(), leaf)
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-5, atol=1e-5, check_dtype=False)
    torch.testing.assert_close(grad, slope, rtol=1e-5, atol=1e-5, check_dtype=False)


def test_folds_run_beside_the_next_products_on_sm_100_alone():
    """In the mode and at the sizes that do not spill: exp spills 24 bytes, and 288 at other sizes. Masks have 4 warps,
    because a bool matrix beside a store does not compile with 8."""
    pick = lambda N, capability, mode: pick_config(8192, N, 768, "bf16", capability, mode)
    for mode in SPECIALIZED:
        assert pick(8192, (10, 0), mode).SPECIALIZE and pick(8192, (10, 3), mode).SPECIALIZE
        assert not pick(8191, (10, 0), mode).SPECIALIZE
        assert not any(pick(8192, capability, mode).SPECIALIZE for capability in ((8, 0), (9, 0), (12, 0), None))
        assert pick(8192, (9, 0), mode).num_stages == 4
    assert not any(pick(8192, (10, 0), mode).SPECIALIZE for mode in ("exp", "grad, q", "exp, several", "exp, masked"))
    assert [pick(N, (10, 0), "exp, masked").num_warps for N in (8192, 8191)] == [4, 4]


def test_the_kernels_of_tiles_take_the_options_of_a_config():
    """Triton refuses an option that a kernel does not name, where it compiles one."""
    options = set(Config("pointers", 64, 64, 64).options()) - {"num_warps", "num_stages"}
    for kernel in (similarity.similarity_kernel, similarity.prefixes_kernel, distill.distill_kernel):
        assert options <= set(inspect.signature(kernel.fn).parameters)
