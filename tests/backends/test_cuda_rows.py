"""csrc/rows.cu against fusedloss/rows.py: on a CPU compiled by its compiler, and on a GPU as fusedloss._C."""

import math

import pytest
import torch
from grids import DEVICES

from fusedloss.backends.cuda import launching
from fusedloss.backends.cuda import rows as cuda_rows
from fusedloss.core import rows as plain
from fusedloss.core.problem import Margin, RowRule
from fusedloss.core.strips import Patch, RowSums

pytestmark = pytest.mark.host

EPS = 2.0**-23
INF = math.inf
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (33, 8), (9, 264), (40, 100), (33, 515)]


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cpu":
        host = request.getfixturevalue("host_extension")
        monkeypatch.setattr(launching, "extension", lambda: host)
    else:
        pytest.importorskip("fusedloss._C", reason="fusedloss._C was not built")
    return torch.device(request.param)


def aligned(x):
    return x.clone()


def padded(x):  # rows that start on 16 bytes, and the last vector is not whole
    wide = x.new_empty(x.shape[0], -(-x.shape[1] // 8) * 8 + 8)
    return wide[:, : x.shape[1]].copy_(x)


def unaligned(x):
    return x.new_empty(x.shape[0], x.shape[1] + 3)[:, 1 : 1 + x.shape[1]].copy_(x)


def transposed(x):
    return x.T.contiguous().T


LAYOUTS = [aligned, padded, unaligned, transposed]
ROWS = [aligned, padded, unaligned]  # unit stride along them


def name(x):
    return getattr(x, "__name__", str(x))


def close(found, wanted, tolerance, magnitude=None):
    """Within `tolerance` of the magnitude, by default one's own."""
    assert found.isfinite().all() and found.shape == wanted.shape
    room = tolerance * (wanted.double() if magnitude is None else magnitude).abs()
    off = (found.double() - wanted.double()).abs()
    assert (off <= room).all(), f"off by {(off / room).nan_to_num().max().item():.2f} of the room"


def rounding(dtype):
    return max(torch.finfo(dtype).eps, 4 * EPS)


def factors(count, device, present=True):
    return torch.rand(count, device=device) + 0.5 if present else None


# prepare --------------------------------------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
@pytest.mark.parametrize("M, D", SHAPES)
@pytest.mark.parametrize("cosine, biased", [(True, False), (False, True)], ids=["cosine", "biased"])
def test_prepare(device, dtype, layout, M, D, cosine, biased):
    N = M + 5 if D % 2 else max(1, M - 3)
    x, y = (layout(torch.randn(n, D, device=device).to(dtype)) for n in (M, N))
    target = torch.randint(-1, N, (M,), device=device)
    target[M // 2] = -1
    scale = torch.tensor(20.0, device=device)
    bias = torch.randn(N, device=device) if biased else None
    found = cuda_rows.prepare(x, y, target, scale, bias, cosine=cosine, wants_target_sim=True)
    wanted = plain.prepare(x.double(), y.double(), target, scale.double(), bias, cosine=cosine, wants_target_sim=True)
    size = torch.linalg.vecdot(x.double().abs(), y.double()[target.clamp(min=0)].abs())
    exact = torch.linalg.vecdot(x.double(), y.double()[target.clamp(min=0)])
    if cosine:
        close(found.row_factor, wanted.row_factor, 8 * EPS)
        close(found.col_factor, wanted.col_factor, 8 * EPS)
        # The very factors that are handed out, unrounded otherwise.
        exact *= found.row_factor.double() * found.col_factor.double()[target.clamp(min=0)]
        size *= wanted.row_factor * wanted.col_factor[target.clamp(min=0)]
    else:
        assert found.row_factor is None and found.col_factor is None
    exact = exact.masked_fill(target < 0, 0)
    score = exact * 20 if bias is None else exact * 20 + bias.double()[target.clamp(min=0)]
    close(found.score, score, 1e-14, magnitude=20 * size + 2)
    close(found.score, wanted.score, 16 * EPS, magnitude=20 * size + 2)
    close(found.target_sim, exact, EPS)
    assert found.score.dtype == torch.float64 and found.slope is None


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_norms_have_the_same_bits_in_every_layout(device, dtype):
    x = (10 * torch.randn(19, 301, device=device)).to(dtype)
    x[3], x[4], x[5, 7] = 0, 1e-20, math.nan
    scale = torch.tensor(1.0, device=device)
    found = [cuda_rows.inverse_norms(layout(x)) for layout in LAYOUTS]
    both = cuda_rows.prepare(x, x, torch.arange(19, device=device), scale, None, cosine=True, wants_target_sim=False)
    assert both.row_factor is both.col_factor
    for factor in (*found[1:], both.row_factor):
        assert torch.equal(factor.nan_to_num(), found[0].nan_to_num())
    wanted = plain.inverse_norms(x)
    assert wanted.isnan().tolist() == found[0].isnan().tolist() == (torch.arange(19, device=device) == 5).tolist()
    close(found[0].nan_to_num(), wanted.nan_to_num(), 4 * EPS)
    assert found[0][3] == (1 if dtype == torch.float16 else 1e12)


MARGINS = [(0.5, 0.0), (0.0, 0.35), (0.3, 0.2)]


@pytest.mark.parametrize("softcap, margin", [(7.0, (0.0, 0.0)), *((cap, m) for cap in (0.0, 7.0) for m in MARGINS)])
def test_margin_and_softcap(device, softcap, margin):
    x, y = (torch.randn(n, 24, dtype=torch.float64, device=device) for n in (37, 9))
    target = torch.arange(37, device=device) % 10 - 1
    x[1::3] += 3 * y[target[1::3]]
    x[2] = 2 * y[target[2]]  # its own class vector
    x[3] = -y[target[3]]  # beyond pi - angle
    x[11] = y[target[11]] + 1e-5 * x[11]  # closer than sqrt(eps): there the slope is cos(angle)
    x, y, scale = x.float(), y.float(), torch.tensor(30.0, device=device)
    options = {"cosine": any(margin), "wants_target_sim": True}
    rule = RowRule(softcap=softcap, margin=Margin(*margin))
    found = cuda_rows.prepare(x, y, target, scale, None, rule, **options)
    wanted = plain.prepare(x, y, target, scale, None, rule, **options)
    # The angle at a class vector is the root of its products' rounding.
    near = torch.isin(torch.arange(37, device=device), torch.tensor([2, 11], device=device))
    close(found.score[~near], wanted.score[~near], 1e-12, magnitude=wanted.score[~near].abs() + 1)
    close(found.score[near], wanted.score[near], 1e-6)
    close(found.slope, wanted.slope, 2 * EPS, magnitude=wanted.slope.abs() + 1e-6)
    close(found.target_sim, wanted.target_sim, EPS, magnitude=wanted.target_sim.abs() + 1e-9)


# merge and settle -----------------------------------------------------------------------------------------------------


def tables(n_tiles, R, device, level=0.0):
    """Partial sums as the sweep leaves them: -inf and 0 for a tile without admissible columns."""
    maxima = 30 * torch.randn(n_tiles, R, device=device) + level
    total = 1 + 100 * torch.rand(n_tiles, R, device=device)
    none = torch.rand(n_tiles, R, device=device) < 0.2
    none[:, 3::7] = True
    return RowSums(maxima.masked_fill(none, -INF), total.masked_fill(none, 0))


def folded(sums):
    """In fp64."""
    shift = sums.shift.double().amax(0)
    finite = shift.masked_fill(shift == -INF, 0)
    return RowSums(finite, (sums.total.double() * torch.exp(sums.shift.double() - finite)).sum(0))


@pytest.mark.parametrize("n_tiles", [1, 5, 8, 33, 100])
@pytest.mark.parametrize("R", [1, 33, 100])
@pytest.mark.parametrize("level", [0.0, -200.0, 300.0])
def test_merge(device, n_tiles, R, level):
    first, second = tables(n_tiles, R, device, level), tables(3, R, device, level)
    running = RowSums.empty(R, first.total)
    for part in (first, second):
        assert cuda_rows.merge(running, part) is running
    wanted = folded(RowSums(*(torch.cat(pair) for pair in zip(first, second, strict=True))))
    close(running.total, wanted.total, 8 * EPS)
    some = wanted.total > 0
    assert torch.equal(running.shift[some].double(), wanted.shift[some])
    again = RowSums.empty(R, first.total)
    for part in (first, second):
        cuda_rows.merge(again, part)
    assert all(torch.equal(a, b) for a, b in zip(running, again, strict=True))  # a fixed order


def test_merge_of_what_is_no_number(device):
    part = RowSums(
        torch.tensor([[math.nan, INF, 1.0], [0.0, 0.0, -INF]], device=device),
        torch.tensor([[math.nan, math.nan, math.nan], [1.0, 1.0, 0.0]], device=device),
    )
    running = cuda_rows.merge(RowSums.empty(3, part.total), part)
    assert running.total.isnan().all()
    running = cuda_rows.merge(running, RowSums(torch.zeros(1, 3, device=device), torch.ones(1, 3, device=device)))
    assert running.total.isnan().all()


OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "decoupled": {"decoupled": True},
    "copies": {"copies": 3},
    "z_loss": {"z_loss": 1e-3},
    "all": {"label_smoothing": 0.2, "copies": 2, "z_loss": 1e-2},
    "decoupled z_loss": {"decoupled": True, "z_loss": 1e-2},
}


@pytest.mark.pairwise
@pytest.mark.parametrize("n_tiles, R", [(1, 1), (5, 33), (64, 40), (7, 100)])
@pytest.mark.parametrize("one_shift", [False, True], ids=["maxima", "one shift"])
@pytest.mark.parametrize("bent", [False, True], ids=["", "smooth and slope"])
@pytest.mark.parametrize("options", OPTIONS)
def test_settle(device, n_tiles, R, one_shift, bent, options):
    sums = tables(n_tiles, R, device)
    score = 25 * torch.randn(R, dtype=torch.float64, device=device)
    if one_shift:
        sums = RowSums(-2.5, sums.total)
        wide = RowSums(torch.full((R,), -2.5, dtype=torch.float64, device=device), sums.total.double().sum(0))
    else:
        wide = folded(sums)
    score += wide.shift  # now above, now below the negatives
    weight = torch.rand(R, device=device) - 0.2
    weight[5:9] = 0
    score[5:7] = torch.tensor([-INF, math.nan], device=device)[: score[5:7].shape[0]]  # left out
    more = {"smooth": factors(R, device) / 100, "slope": factors(R, device)} if bent else {}
    found = cuda_rows.settle(sums, score, weight, RowRule(**OPTIONS[options]), **more)
    doubles = {key: value.double() for key, value in more.items()}
    wanted = plain.settle(wide, score, weight.double(), RowRule(**OPTIONS[options]), **doubles)
    assert torch.equal(found.shift, wanted.shift.float())
    close(found.weight, wanted.weight, 32 * EPS)
    size = weight.abs() * (1.5 if bent else 1) + 0.02 * bent
    close(found.loss, wanted.loss, 16 * EPS, magnitude=wanted.loss.abs() + (size if "z_loss" in options else 0))
    lse = score.abs().nan_to_num(0, 0, 0) + 40 if "z_loss" in OPTIONS[options] else 1
    close(found.entry, wanted.entry, 32 * EPS, magnitude=size * lse)
    if R > 9:
        assert not any(t[5:9].any() for t in (found.loss, found.weight, found.entry))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize("layout", ROWS, ids=name)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_settle_patches_the_workspace(device, dtype, cosine, layout, smoothing):
    R, N, D = 33, 50, 27
    sums = tables(5, R, device)
    wide = folded(sums)
    score = wide.shift + torch.randn(R, dtype=torch.float64, device=device)
    weight = torch.rand(R, device=device) + 0.1
    weight[4] = 0
    target = torch.randint(-1, N, (R,), device=device)
    target[:2] = -1
    out = layout(torch.randn(R, N, device=device).to(dtype))
    wanted_out = out.double()
    row_factor, col_factor = factors(R, device, cosine), factors(N, device, cosine)
    scaled = [torch.randn(R, D, device=device).to(dtype), transposed(torch.randn(R, 16, device=device).to(dtype))]
    found = cuda_rows.settle(
        sums,
        score,
        weight,
        RowRule(smoothing),
        patch=Patch(out, target, row_factor, col_factor),
        scaled=scaled,
        dtype=torch.float32 if dtype == torch.float16 else dtype,
    )
    doubled = [None if t is None else t.double() for t in (row_factor, col_factor)]
    patch = Patch(wanted_out, target, *doubled)
    wanted = plain.settle(wide, score, weight.double(), RowRule(smoothing), patch=patch)
    hit = torch.zeros_like(out, dtype=torch.bool)
    hit.scatter_(1, target.clamp(min=0)[:, None], (target >= 0)[:, None])
    assert torch.equal(out[~hit].double(), wanted_out[~hit])
    room = wanted_out.abs() + 8 * EPS * wide.total[:, None]
    close(out, wanted_out.to(out.dtype), 2 * rounding(dtype), magnitude=room)
    close(found.weight, wanted.weight, 16 * EPS)
    close(found.loss, wanted.loss, 8 * EPS, magnitude=wanted.loss)
    for x, copy in zip(scaled, found.scaled, strict=True):
        assert torch.equal(copy, (x.float() * found.weight[:, None]).to(copy.dtype))


def test_rows_without_negatives(device):
    total = torch.zeros(2, 4, device=device)
    sums = RowSums(torch.full_like(total, -INF), total)
    score = torch.tensor([50.0, -300.0, 0.0, 80.0], dtype=torch.float64, device=device)
    found = cuda_rows.settle(sums, score, torch.ones(4, device=device))
    assert found.loss.tolist() == found.entry.tolist() == [0] * 4 and found.weight.tolist() == [1] * 4
    assert found.shift.tolist() == score.tolist()
    found = cuda_rows.settle(sums, score, torch.ones(4, device=device), RowRule(decoupled=True, z_loss=0.1))
    assert found.loss.tolist() == found.entry.tolist() == found.weight.tolist() == [0] * 4


@pytest.mark.parametrize("options", OPTIONS)
def test_extreme_and_undefined_scores(device, options):
    """As the definition in fp32, which is where its bounds are fp32's."""
    score = [INF, math.nan, -INF, 1e39, 500.0, -500.0, 88.5, 3.0, 3.0]
    total = torch.tensor([[2.0] * 7 + [math.nan, INF]], device=device)
    score = torch.tensor(score, dtype=torch.float64, device=device)
    sums, weight = RowSums(torch.zeros_like(total), total), torch.ones(9, device=device)
    found = cuda_rows.settle(sums, score, weight, RowRule(**OPTIONS[options]))
    wanted = plain.settle(RowSums(*(t[0] for t in sums)), score, weight, RowRule(**OPTIONS[options]))
    for key in ("loss", "shift", "weight", "entry"):
        a, b = getattr(found, key), getattr(wanted, key)
        torch.testing.assert_close(
            a, b, rtol=3e-6, atol=1e-40, equal_nan=True, msg=lambda text, key=key: f"{key}: {text}"
        )


# weigh, finish and scaled rows ----------------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("layout", ROWS, ids=name)
@pytest.mark.parametrize("R, N", [(1, 1), (33, 8), (6, 515), (3, 2056)])
@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
def test_weigh(device, dtype, layout, R, N, cosine):
    out = layout(torch.rand(R, N, device=device).to(dtype))
    around = out if out._base is None else out._base
    outside = torch.ones_like(around, dtype=torch.bool)
    torch.as_strided(outside, out.shape, out.stride(), out.storage_offset()).fill_(False)
    around[outside] = 7
    target = torch.randint(-1, N, (R,), device=device)
    target[0] = N - 1
    rows, columns, entry = factors(R, device), factors(N + 1, device)[1:], torch.randn(R, device=device)
    row_factor, col_factor = factors(R, device, cosine), factors(N, device, cosine)
    wanted = out.double()
    doubled = [None if t is None else t.double() for t in (row_factor, col_factor)]
    plain.weigh(Patch(wanted, target, *doubled), rows.double(), columns.double(), entry.double())
    cuda_rows.weigh(Patch(out, target, row_factor, col_factor), rows, columns, entry)
    close(out, wanted, rounding(dtype))
    assert (around[outside] == 7).all()  # nothing is written between the rows


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
@pytest.mark.parametrize("R, D", SHAPES)
@pytest.mark.parametrize("given", ["all", "gain", "over_l", "nothing"])
def test_finish(device, dtype, layout, R, D, given):
    x = layout(torch.randn(R, D, device=device).to(dtype))
    x[R // 2] *= 1e-14 if dtype != torch.float16 else 0  # its factor is constant: nothing to project
    total = (layout if layout in ROWS else aligned)(torch.randn(R, D, device=device))
    over_l = factors(R, device, given in ("all", "over_l"))
    gain = torch.tensor(4.0, device=device) if given in ("all", "gain") else None
    factor = plain.inverse_norms(x) if given != "nothing" else None
    scale = torch.tensor(20.0, device=device)
    in_place = given in ("all", "over_l")
    out = total if in_place else (padded if layout is padded else aligned)(torch.zeros(R, D, device=device).to(dtype))
    wanted, exact = total.double(), total.double()
    doubled = (None if t is None else t.double() for t in (over_l, scale, gain))
    plain.finish(wanted, *doubled, x.double(), None if factor is None else plain.inverse_norms(x.double()), wanted)
    cuda_rows.finish(total, over_l, scale, gain, x, factor, out)
    multiplier = 20 / (1 if gain is None else 4) * (1 if over_l is None else over_l[:, None].double())
    size = (exact * multiplier).abs()
    size = size + (exact * multiplier).norm(dim=1, keepdim=True)  # and the projection's
    close(out, wanted.to(out.dtype), rounding(out.dtype), magnitude=size)
    if factor is None:
        close(out, wanted, rounding(out.dtype))


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=name)
@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
@pytest.mark.parametrize("M, D", SHAPES)
def test_scaled_rows(device, dtype, out_dtype, layout, M, D):
    x = layout((300 * torch.randn(M, D, device=device)).to(dtype))  # beyond fp16 with their factor
    x[0, 0] = -0.0
    x[M - 1, D - 1] = INF
    factor = 1000 * torch.randn(M, device=device)
    assert torch.equal(cuda_rows._scaled(x, factor, out_dtype), (x.float() * factor[:, None]).to(out_dtype))


def test_nothing_to_do(device):
    none, scale = torch.empty(0, 7, device=device), torch.tensor(1.0, device=device)
    empty = none[:, 0]
    index = empty.long()
    assert cuda_rows.inverse_norms(none).shape == (0,)
    found = cuda_rows.prepare(none, none, index, scale, None, cosine=True, wants_target_sim=True)
    assert found.score.shape == found.target_sim.shape == (0,)
    cuda_rows.merge(RowSums(empty, empty), RowSums(none.T, none.T))
    assert cuda_rows.settle(RowSums(none.T, none.T), empty.double(), empty, scaled=[none]).scaled[0].shape == (0, 7)
    cuda_rows.weigh(Patch(none, index, None, None), empty, none[0:0, 0], empty)
    cuda_rows.finish(none, None, scale, None, none, None, none)
