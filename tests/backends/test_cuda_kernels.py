"""Every epilogue of csrc/'s similarity kernels against the plain formula in fp64: on a CPU with tests/host/ in the
toolkit's place, and on a GPU as fusedloss._C.

Tiles are 128 x 128 (128 x 256 with sm_90's), a stage is 128 bytes of D, or 64.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import NamedTuple

import pytest
import torch
from epilogue_checks import (
    ALL_AT_ONCE,
    SCALE,
    SETS,
    assert_fenced,
    check_exp,
    check_grad,
    check_half_fold,
    check_half_tops,
    check_stats,
    check_stats_with_columns,
    check_stored,
    check_tally,
    check_top,
    chosen,
    fenced,
    packed,
    problem_of,
    with_factors,
    with_threshold,
)
from fold_checks import SUMS, check_fold
from grids import DEVICES
from strips import direction, dropped, factored, formula, lse, unpacked
from torch import Tensor

import fusedloss
from fusedloss.backends import cuda
from fusedloss.backends.cuda import launching
from fusedloss.core.folds import Part
from fusedloss.core.mask import Compare, GuideRule, StripMask
from fusedloss.core.problem import Fold
from fusedloss.core.strips import Extremes, Strip, Tally, Tile
from fusedloss.masks import score_margin
from fusedloss.sweep import triangle

pytestmark = pytest.mark.host


class Number(NamedTuple):
    """A format, and torch's setting for products of fp32."""

    dtype: torch.dtype
    precision: str = "highest"


NUMBERS = {
    "bf16": Number(torch.bfloat16),
    "fp16": Number(torch.float16),
    "fp32": Number(torch.float32),
    "tf32": Number(torch.float32, "high"),
}
# fp32 in full is another loop over the same accumulators, and fp16's exponentials are not stored.
FEW = [name for name in NUMBERS if name in ("bf16", "fp32")]

SHAPES = {  # M, N, D
    "inside one tile": (5, 7, 3),
    "one row, tiles to the right": (1, 257, 7),
    "one more row and column than a tile has": (129, 131, 33),
    "tiles below, one column too many in D": (260, 40, 65),
    "whole tiles": (128, 256, 64),
    "one feature": (33, 40, 1),
    "more stages than the ring has": (70, 130, 200),
    "twice around sm_90's ring": (200, 600, 600),
}
# Of sm_90's ring, which test_cuda_sm90.py goes around: sm_80's has no more of it than stages, and takes seconds a case.
ON = [pytest.param(name, marks=pytest.mark.whole) if "twice around" in name else name for name in SHAPES]
EPILOGUES_ON = ["inside one tile", "one more row and column than a tile has", "whole tiles"]


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cpu":
        on_the_host(request.getfixturevalue("host_extension"), monkeypatch)
    elif reason := launching._why_not(
        torch.float32, torch.device("cuda", torch.cuda.current_device()), launching.extension
    ):
        pytest.skip(reason)
    return torch.device(request.param)


def on_the_host(extension, monkeypatch):
    monkeypatch.setattr(launching, "extension", lambda: extension)


@pytest.fixture(params=NUMBERS)
def number(request):
    with products(NUMBERS[request.param]):
        yield NUMBERS[request.param]


@contextlib.contextmanager
def products(number):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(number.precision)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(params=FEW)
def one_of_each(request):
    with products(NUMBERS[request.param]):
        yield NUMBERS[request.param]


# How an operand may lie, none of which is copied: what `operand` would make of them is the first.


def rows(x):
    """Rows that start on 16 bytes, NaN between them."""
    wide = 16 // x.itemsize
    padded = x.new_full((x.shape[0], -(-x.shape[1] // wide) * wide + wide), math.nan)
    return padded[:, : x.shape[1]].copy_(x)


def columns(x):
    return rows(x.T).T


def off_by_one(x):
    """Rows that start anywhere, the first one an element behind 16 bytes."""
    lines, length = x.shape[0], x.shape[1] | 1  # odd
    flat = x.new_full((1 + lines * length,), math.nan)
    found = flat[1:].view(lines, length)[:, : x.shape[1]].copy_(x)
    assert found.data_ptr() % 16
    return found


def columns_off_by_one(x):
    return off_by_one(x.T).T


LAYOUTS = {
    "rows": (rows, rows),
    "columns": (columns, columns),
    "rows anywhere": (off_by_one, off_by_one),
    "columns anywhere": (columns_off_by_one, columns_off_by_one),
    "rows and columns": (rows, columns),
    "columns anywhere and rows": (columns_off_by_one, rows),
}


def rounded(x: Tensor, number: Number, to_even: bool = False) -> Tensor:
    """What the products take: fp32 operands as tf32, to the nearest, ties away from 0 or to even."""
    if number.precision == "highest" or x.dtype != torch.float32:
        return x
    bits = x.view(torch.int32)
    return ((bits + (0xFFF + (bits >> 13 & 1) if to_even else 0x1000)) & ~0x1FFF).view(torch.float32)


def matrices(shape, number, device, layout="rows"):
    """Operands that the products take as they are, except in `test_products`."""
    M, N, D = SHAPES[shape]
    made = (torch.randn(count, D, device=device) / D**0.25 for count in (M, N))
    return [lay(rounded(x.to(number.dtype), number)) for lay, x in zip(LAYOUTS[layout], made, strict=True)]


def strip_of(shape, number, device, layout="rows", *given) -> Strip:
    x, y = matrices(shape, number, device, layout)
    (M, N), scale = (len(x), len(y)), torch.tensor(SCALE, device=device)
    target = torch.randint(N, (M,), device=device)
    strip = Strip(x, y, scale, None, None, None, target)
    return chosen(strip, given)


@pytest.fixture(params=SETS.values(), ids=SETS.keys())
def given(request):
    return request.param


# Products -------------------------------------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ON)
def test_products(device, shape, layout, number):
    """In fp32 whatever the operands are, with factors or without; the target's is picked out of the same ones."""
    M, N, D = SHAPES[shape]
    x, y = (lay(x.to(number.dtype)) for lay, x in zip(LAYOUTS[layout], random(M, N, D, device), strict=True))
    target = torch.randint(N, (M,), device=device)
    strip = with_factors(Strip(x, y, torch.tensor(SCALE, device=device), None, None, None, target))
    # sm_80's kernel rounds ties away from 0, sm_90's loads to even: no GPU has said whether these do so at all.
    cut = number.precision == "high" and device.type == "cuda"
    x, y = (rounded(t.contiguous(), number, to_even=launching.capability_of(device) == 90) for t in (x, y))
    exact = strip if cut else strip._replace(x=x, y=y)
    size = x.double().abs() @ y.double().abs().T
    for each, right in ((strip, exact), *((s._replace(row_factor=None, col_factor=None) for s in (strip, exact)),)):
        for aligned in (True, False):
            out, buffer = fenced(M, N, torch.float32, device, aligned)
            cuda.similarities(each, out)
            picked = cuda.guide_scores(each, torch.empty(0))
            assert torch.equal(picked, out.gather(1, target[:, None])[:, 0])
            room = factored(size, each) * (2**-9 if cut else (D + 8) * 2**-24)
            assert ((out.double() - formula(right)[0]).abs() <= room).all()
            assert_fenced(out, buffer)


def random(M, N, D, device):
    return [torch.randn(count, D, device=device) / D**0.25 for count in (M, N)]


# Softmax --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ON)
@pytest.mark.parametrize("layout", ["rows", "columns anywhere and rows"])
def test_stats(device, shape, layout, number):
    strip = strip_of(shape, number, device, layout)
    check_stats(cuda, [strip])
    check_stats_with_columns(cuda, strip)


def test_stats_of_several_strips(device, one_of_each):
    """The sums of each, one below the other."""
    first = strip_of("one more row and column than a tile has", one_of_each, device, "rows", "bias")
    y = rounded(torch.randn_like(first.y)[:60], one_of_each)
    second = first._replace(y=rows(y), bias=None, target=None)
    check_stats(cuda, [first, second])


@pytest.mark.pairwise
@pytest.mark.parametrize("shape", EPILOGUES_ON)
def test_stats_of_what_is_masked(device, shape, given, one_of_each):
    strip = strip_of(shape, one_of_each, device, "rows", *given)
    check_stats(cuda, [strip])
    check_stats_with_columns(cuda, strip)


@pytest.mark.pairwise
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("shape", EPILOGUES_ON)
@pytest.mark.parametrize("names", [(), ("bias",), ALL_AT_ONCE], ids=["nothing else", "bias", "all at once"])
@pytest.mark.parametrize("epilogue", ["stats", "exp"])
def test_what_is_counted(device, epilogue, names, shape, by_columns, one_of_each):
    if epilogue == "exp" and by_columns:
        pytest.skip("nobody asks for both")
    strip = strip_of(shape, one_of_each, device, "rows", *names)
    check_tally(cuda, "stats+columns" if by_columns else epilogue, strip)


@pytest.mark.parametrize("shape", ON)
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "anywhere"])
@pytest.mark.parametrize("names", [(), ("factors", "no target")], ids=["targets", "factors"])
def test_exp(device, shape, names, aligned, one_of_each):
    strip = strip_of(shape, one_of_each, device, "rows", *names)
    check_exp(cuda, [strip], aligned)
    check_stored(cuda, strip, aligned)


@pytest.mark.pairwise
@pytest.mark.parametrize("shape", EPILOGUES_ON)
def test_exp_of_what_is_masked(device, shape, given, one_of_each):
    strip = strip_of(shape, one_of_each, device, "rows", *given)
    check_exp(cuda, [strip])
    check_stored(cuda, strip)


@pytest.mark.pairwise
@pytest.mark.parametrize("shape", ON)
@pytest.mark.parametrize("with_q", [False, True], ids=["no q", "q"])
@pytest.mark.parametrize("by_columns", [False, True], ids=["rows", "both"])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "anywhere"])
def test_grad(device, shape, aligned, by_columns, with_q, number):
    if not aligned and number.dtype == torch.float16:
        pytest.skip("stored as bf16 is")
    factored = with_q and (shape != "one feature" or number.dtype != torch.float16)  # which would overflow
    strip = strip_of(shape, number, device, "rows", *(("factors",) if factored else ()))
    check_grad(cuda, [strip], by_columns, with_q, aligned=aligned)


@pytest.mark.pairwise
@pytest.mark.parametrize("shape", EPILOGUES_ON)
@pytest.mark.parametrize("by_columns", [False, True], ids=["rows", "both"])
def test_grad_of_what_is_masked(device, shape, by_columns, given, one_of_each):
    check_grad(cuda, [strip_of(shape, one_of_each, device, "rows", *given)], by_columns)


@pytest.mark.pairwise
@pytest.mark.parametrize("shape", EPILOGUES_ON)
@pytest.mark.parametrize("names", [(), ("bias",), ALL_AT_ONCE], ids=["nothing else", "bias", "all at once"])
@pytest.mark.parametrize("with_q", [False, True], ids=["no q", "q"])
def test_grad_that_is_smoothed(device, shape, with_q, names, number):
    strip = strip_of(shape, number, device, "rows", *names)
    check_grad(cuda, [strip], False, with_q, smooth=torch.rand(len(strip.x), device=device) / 8)


# Masks' own -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ON)
@pytest.mark.parametrize("names", [(), ("bias",), ("softcap", "skip"), ALL_AT_ONCE], ids=str)
def test_top(device, shape, names, one_of_each):
    check_top(cuda, strip_of(shape, one_of_each, device, "rows", *names))


def test_the_first_of_equal_ones_is_the_top(device, one_of_each):
    """In several tiles, and in several warps' columns."""
    x, y = torch.ones(130, 8, device=device), torch.zeros(300, 8, device=device)
    for first, others in ((0, (1, 8, 299)), (63, (64, 130)), (127, (128,)), (200, (264, 295)), (7, (9, 70, 135))):
        y.zero_()
        y[[first, *others]] = 1
        strip = Strip(x.to(one_of_each.dtype), y.to(one_of_each.dtype), x.new_tensor(1.0), None, None, None, None)
        top, column = cuda.top_rows([strip])
        assert (top == 8).all() and (column == first).all()


@pytest.mark.parametrize("shape", ON)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_guide(device, shape, layout, number):
    """One bit a column: what is more similar than the threshold. Columns beyond the last are anything."""
    strip = strip_of(shape, number, device, layout, "factors")
    sim = formula(strip)[0]
    margin = 0.05
    threshold = with_threshold(strip, StripMask()).threshold
    (bits,) = cuda.guide_rows([strip], GuideRule(margin), torch.empty(0), own=threshold + margin)
    wanted = sim > threshold.double()[:, None]
    near = (sim - threshold.double()[:, None]).abs() < 1e-4
    assert ((unpacked(bits, sim.shape[1]) == wanted) | near).all()


def test_a_guides_own_targets_are_ties(device, number):
    """The threshold is read out of the same products."""
    strip = strip_of("one more row and column than a tile has", number, device, "rows", "factors")
    (bits,) = cuda.guide_rows([strip], GuideRule(), torch.empty(0))
    assert not unpacked(bits, len(strip.y)).gather(1, strip.target[:, None]).any()


# Folds ----------------------------------------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("shape", ON)
@pytest.mark.parametrize("kind", SUMS)
@pytest.mark.parametrize("labelled", [False, True], ids=["targets", "labels"])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "anywhere"])
def test_folds(device, shape, kind, labelled, aligned, one_of_each):
    strip = strip_of(shape, one_of_each, device, "rows", "factors" if aligned else "dropped")._replace(mask=None)
    check_fold(cuda, strip, kind, labelled, aligned)


@pytest.mark.parametrize("shape", ON)
def test_folds_of_both_places(device, shape, one_of_each):
    """Chunks of 150 rows: several tiles of rows, the last of them ragged."""
    check_half_fold(cuda, strip_of(shape, one_of_each, device, "rows", "factors"), side=150)


@pytest.mark.parametrize("shape", ON)
def test_searches_of_both_places(device, shape, number):
    check_half_tops(cuda, strip_of(shape, number, device, "rows", "factors"), side=150)


def test_the_first_of_equal_ones_is_found_in_both_places(device, one_of_each):
    """Of three labels and 300 equal rows: whether the tile's row or its column is the row that searches."""
    x, labels = torch.ones(300, 8, dtype=one_of_each.dtype, device=device), torch.arange(300, device=device) % 3
    strip = Strip(x, x, torch.ones((), device=device), None, None, None, None)
    nearest, farthest = (Extremes.empty(300, strip.scale) for _ in range(2))
    for rows in (slice(0, 150), slice(150, 300)):
        mask = StripMask((Compare(labels[rows], labels, False),))
        tiles = triangle.tiles_of(rows, 300)
        cuda.half_tops(problem_of(strip), strip._replace(x=x[rows], mask=mask), tiles, nearest, farthest)
    own = torch.arange(300, device=device)
    assert torch.equal(nearest.column, (labels == 0).long())
    assert torch.equal(farthest.column, torch.where(own < 3, own + 3, labels))
    assert (nearest.value == 8).all() and (farthest.value == -8).all()


# NaN, infinities, extremes --------------------------------------------------------------------------------------------


def test_a_nan_reaches_its_row_and_column_only(device, number):
    strip = strip_of("one more row and column than a tile has", number, device)
    strip.x[3] = math.nan
    assert lse(cuda.stats_rows_and_columns(strip)[0]).isnan().nonzero().tolist() == [[3]]
    strip.x[3] = 0
    strip.y[130] = math.nan
    assert lse(cuda.stats_rows_and_columns(strip)[1]).isnan().nonzero().tolist() == [[130]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["bias", "dropped", "dense", "bits", "skip"])
def test_what_is_dropped_may_hold_anything(device, name, bad, one_of_each):
    """The same sums, and an entry of 0 for it."""
    strip = strip_of("one more row and column than a tile has", one_of_each, device, "rows", "no target", name)
    M, N = len(strip.x), len(strip.y)
    column = torch.tensor([0, 77, 130], device=device)
    if name == "bias":
        strip.bias[column] = -torch.inf
    elif name == "dropped":
        (compare,) = strip.mask.compare
        every = torch.zeros_like(compare.rows)
        strip = strip._replace(mask=StripMask((Compare(every, compare.keys.index_fill(0, column, 0), False),)))
    elif name == "skip":
        column = column[:1]
        strip = strip._replace(mask=StripMask(skip=column.expand(M).contiguous()))
    else:
        drop = dropped(strip.mask, torch.zeros(M, N, device=device)).index_fill(1, column, True)
        strip = strip._replace(mask=StripMask(dense=~drop) if name == "dense" else StripMask(dropped=packed(drop)))
    by_row = direction(formula(strip)[1], True)
    entry = torch.zeros(M, device=device)

    def everything():
        out, _ = fenced(M, N, strip.x.dtype, device)
        sums = cuda.stats_rows([strip])
        cuda.grad_rows([strip], [out], by_row._replace(target_sim=None), None, entry, None)
        return *sums, out

    wanted = everything()
    strip.y[column] = bad
    found = everything()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert (found[2][:, column] == 0).all()


def test_a_row_without_columns(device, one_of_each):
    strip = strip_of("inside one tile", one_of_each, device, "rows", "bias")
    strip.bias.fill_(-torch.inf)
    by_row, by_column = cuda.stats_rows_and_columns(strip)
    assert (by_row.shift == -torch.inf).all() and not by_row.total.any() and not by_column.total.any()


def test_extreme_logits_stay_finite(device, number):
    """Exponents of +-3000, far beyond what exp can hold without its shift."""
    strip = strip_of("one more row and column than a tile has", number, device)
    strip = strip._replace(scale=torch.tensor(1000.0, device=device))
    z = formula(strip)[1]
    by_row, by_column = cuda.stats_rows_and_columns(strip)
    bound = 64 * torch.finfo(torch.float32).eps * z[z.isfinite()].abs().max()
    for sums, expected in [(by_row, z.logsumexp(1)), (by_column, z.logsumexp(0))]:
        assert (lse(sums).double() - expected).abs().max() <= bound


def test_nothing_to_do(device, one_of_each):
    """A grid of no blocks is an error of CUDA's."""
    x, one = torch.randn(3, 8, device=device).to(one_of_each.dtype), torch.ones((), device=device)
    for a, b in ((x[:0], x), (x, x[:0])):
        strip = Strip(a, b, one, None, None, None, None)
        sums = cuda.stats_rows([strip])
        assert sums.total.shape[1] == len(a) and (len(b) or not sums.total.numel())


# The host's own -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bf16", "fp32", "tf32"])
@pytest.mark.parametrize("layout", ["rows", "columns anywhere and rows"])
def test_bits_do_not_depend_on_who_is_first(name, layout, host_extension, monkeypatch):
    """Threads and blocks in either order, copies as early or as late as they may be: what a kernel that lacks a barrier
    or a wait computes depends on it."""
    on_the_host(host_extension, monkeypatch)
    number, cpu = NUMBERS[name], torch.device("cpu")
    strip = strip_of("more stages than the ring has", number, cpu, layout)
    busy = strip_of("one more row and column than a tile has", number, cpu, layout, *ALL_AT_ONCE)
    tallies = []

    def everything():
        found = []
        for each in (strip, busy):
            (M, N), dtype = (len(each.x), len(each.y)), each.x.dtype
            torch.manual_seed(1)
            by_row, by_column = (direction(z, True) for z in (formula(each)[1], formula(each)[1].T))
            found += [t for sums in cuda.stats_rows_and_columns(each) for t in sums]
            tallies.append(Tally.empty(M, each.scale))
            found += [cuda.stats_rows([each], tallies[-1], torch.zeros(M)).total, *tallies[-1], *cuda.top_rows([each])]
            out = torch.empty(M, N, dtype=dtype)
            found += [s.total for s in cuda.exp_rows_and_columns(problem_of(each), each, out)] + [out]
            out = torch.empty(M, N, dtype=dtype)
            smooth = torch.rand(M) if each is busy else None
            found += [cuda.grad_rows([each], [out], by_row, by_column, torch.ones(M), None, smooth), out]
            found += cuda.guide_rows([each], GuideRule(), torch.empty(0), own=torch.zeros(M))
        out = torch.empty(70, 130, dtype=strip.x.dtype)
        fold = Fold("sigmoid", scalars=(torch.tensor(0.1),))
        part = Part(torch.arange(70), torch.rand(70), strip.target)
        folded = cuda.fold_rows(problem_of(strip, fold=fold), strip, out, part, torch.zeros(70))
        return [*found, folded.loss, *folded.scalars, out, *both_places(strip)]

    def both_places(strip):
        x, labels = strip.y, torch.arange(130) // 5
        own = Strip(x, x, torch.ones(()), strip.col_factor, strip.col_factor, None, None)
        tile, part = Tile(slice(0, 70), slice(70, 130)), Part(torch.arange(130), torch.rand(130), None, labels, labels)
        given = own._replace(x=x[tile.rows], row_factor=None).columns(tile.columns)
        found = []
        for kind, options in (("multi_similarity", (2.0, 9.0, 0.5)), ("pair_hinge", (0.1, 1.0, 0.0))):
            problem = problem_of(own, fold=Fold(kind, options, labels=(labels, labels), itself=True))
            half, out = cuda.half_fold(problem, part), torch.empty(70, 60, dtype=x.dtype)
            half.add(given, tile)
            found += [half.settle().loss]
            half.write(given, out, tile)
            found += [out]
        searches = [Extremes.empty(130, own.scale) for _ in range(2)]
        mask = StripMask((Compare(labels[tile.rows], labels, False),))
        chunk = own._replace(x=x[tile.rows], row_factor=None, mask=mask)
        cuda.half_tops(problem_of(own), chunk, [tile], *searches)
        return [*found, *(x for extremes in searches for x in extremes)]

    runs = []
    with products(number):
        for order in ("forward", "backward"):
            for copies in ("late", "early"):
                monkeypatch.setenv("FUSEDLOSS_HOST_ORDER", order)
                monkeypatch.setenv("FUSEDLOSS_HOST_COPIES", copies)
                runs.append(everything())
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["bf16", "fp16", "tf32"])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_duplicate_is_a_tie_where_tensor_cores_cut_off(normalize, name, sign, host_extension, monkeypatch):
    """Sums of one sign lose most: a negative similarity comes out larger than the target's, which is summed in fp64."""
    on_the_host(host_extension, monkeypatch)
    monkeypatch.setenv("FUSEDLOSS_HOST_SUMS", "truncate")
    number, rows, dim = NUMBERS[name], 20, 1024
    key = rounded(1 + torch.rand(dim) / 4, number).to(number.dtype) / 32
    query = sign * rounded(1 + torch.rand(rows, dim) / 4, number).to(number.dtype) / 32
    keys = key.expand(rows + 30, dim).contiguous()
    with products(number):
        call = functools.partial(fusedloss.info_nce, query, keys, temperature=1e3, normalize=normalize, backend="cuda")
        stats = call(return_stats=True)[1]
        kept = call(mask=score_margin(0.0), reduction="none")
    assert stats.accuracy == 1 and stats.mean_reciprocal_rank == 1
    assert torch.allclose(kept, torch.tensor(rows + 30).log(), rtol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_duplicate_is_a_tie_where_products_are_of_tf32(normalize, host_extension, monkeypatch):
    """The target's score is of operands as they are, its duplicates' of rounded ones."""
    on_the_host(host_extension, monkeypatch)
    rows = 40
    query, key = torch.randn(rows, 24), 5 * torch.nn.functional.normalize(torch.randn(rows, 24), dim=1)
    query = query + 2 * key  # so that a target is its row's best, beside its duplicate
    keys = torch.cat([key, key])
    with products(NUMBERS["tf32"]):
        call = functools.partial(fusedloss.info_nce, query, keys, temperature=1.0, normalize=normalize, backend="cuda")
        stats = call(return_stats=True)[1]
        kept = call(mask=score_margin(0.0), reduction="none")
    best = torch.nn.functional.normalize if normalize else lambda x, dim: x
    z = best(query, dim=1).double() @ best(key, dim=1).double().T
    own = z.diagonal()[:, None]
    assert (z <= own).all(), "the draw"
    assert stats.accuracy == 1 and stats.mean_reciprocal_rank == 1
    room = 2**-8 if normalize else 2**-8 * query.norm(dim=1) * key.norm(dim=1).max()
    wanted = torch.cat([z, z], dim=1).logsumexp(1) - own[:, 0]
    assert ((kept - wanted).abs() <= room).all()


def test_what_the_sanitizers_run_has_every_kernel(host_extension, monkeypatch):
    """tools/sanitize.py, here without compute-sanitizer."""
    import sanitize

    on_the_host(host_extension, monkeypatch)
    ran = set()
    original = launching.call

    def call(name, device, *arguments):
        ran.add(name)
        original(name, device, *arguments)

    monkeypatch.setattr(launching, "call", call)
    sanitize.everything("cpu")
    launches = {name for name in dir(host_extension) if name[0].islower() and callable(getattr(host_extension, name))}
    assert ran >= launches - {"build_info", "plan"}
