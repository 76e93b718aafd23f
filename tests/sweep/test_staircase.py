"""One matrix against itself by chunks of rows and the rows behind them: how kernels take half of the similarities."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from primitives import elements

import fusedloss
from fusedloss import masks, sweep, testing, transforms
from fusedloss.backends import BACKENDS, chunked
from fusedloss.core.mask import Compare, StripMask
from fusedloss.core.problem import Fold
from fusedloss.core.strips import Patch, Strip
from fusedloss.core.waves import half_rows, wave_rows
from fusedloss.losses._folded import fold_loss, fold_problem
from fusedloss.losses._options import Call
from fusedloss.sweep import triangle


def split(loss):
    return lambda x, labels, **o: loss(x[: len(x) // 2], x[len(x) // 2 : len(x) // 2 * 2], **o)


def itself(x, labels, mask=None, **options):
    return fusedloss.info_nce(x, x, mask=mask, **options)


def weighted(x, labels, **options):
    """Some rows are left out, some have no other row that they may compete with."""
    weight = (labels % 3).to(x.dtype)
    return itself(x, labels, masks.same_group(labels, labels), weight=weight, normalize=True, **options)


LOSSES = {
    "nt_xent": split(fusedloss.nt_xent),
    "nt_xent, clipped": split(lambda *a, **o: fusedloss.nt_xent(*a, transform=transforms.clipped(0.5), **o)),
    "decoupled_contrastive": split(fusedloss.decoupled_contrastive),
    "sup_con": fusedloss.sup_con,
    "labels": lambda x, labels, **o: itself(x, labels, masks.same_id(labels, labels), **o),
    "itself": lambda x, labels, **o: itself(x, labels, masks.not_self(), normalize=True, **o),
    "smoothed": lambda x, labels, **o: itself(x, labels, label_smoothing=0.2, normalize=True, **o),
    "weights": weighted,
}


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr("fusedloss.backends.dense.MOST", {})


def by_strips(patch, side):
    """`chunked` goes the way of the kernels, in chunks of so many rows."""
    patch.setattr(chunked, "can_halve", lambda problem: False)
    patch.setattr(chunked, "can_halve_rows", BACKENDS["triton"].can_halve_rows)
    patch.setattr(sweep.chunks, "strip_rows", lambda problem, backend: min(side, problem.rows))


def batch(rows, dim, classes, kind="random", seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    if kind == "duplicates":
        x[1::2] = x[: rows // 2 * 2 : 2][: len(x[1::2])]
    elif kind == "zeros":
        x[::3] = 0
    return x.to(dtype), torch.randint(0, classes, (rows,), generator=generator)


def result(loss, x, labels, temperature, **options):
    """Value and gradients, by the temperature as well if it is a tensor."""

    def step(x, *temperatures):
        return loss(x, labels, temperature=temperatures[0] if temperatures else temperature, **options).square().sum()

    return testing.value_and_gradients(step, [x, *([temperature] if isinstance(temperature, torch.Tensor) else [])])


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(LOSSES)),
    rows=st.integers(2, 23),
    side=st.sampled_from([1, 5, 11, 16]),
    classes=st.sampled_from([1, 2, 8]),
    kind=st.sampled_from(["random", "duplicates", "zeros"]),
    temperature=st.sampled_from([0.5, 0.1, 0.02, 0.004]),
    learned=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 99),
)
def test_chunks_and_the_rows_behind_them_give_the_formula(
    name, rows, side, classes, kind, temperature, learned, reduction, seed
):
    x, labels = batch(rows, 6, classes, kind, seed)
    temperature = torch.tensor(temperature, dtype=torch.float64) if learned else temperature
    with pytest.MonkeyPatch.context() as patch:
        by_strips(patch, side)
        found = result(LOSSES[name], x, labels, temperature, reduction=reduction, backend="chunked")
        with torch.no_grad():
            value = LOSSES[name](x, labels, temperature=temperature, reduction=reduction, backend="chunked")
    wanted = result(LOSSES[name], x, labels, temperature, reduction=reduction, backend="reference")
    torch.testing.assert_close(value.square().sum(), found[0], rtol=1e-12, atol=1e-12)
    for a, b in zip(found, wanted, strict=True):
        # The terms of a gradient are as large as the slope of the logits, and they cancel.
        size = (1 + wanted[0].abs().sqrt().item()) / float(temperature) ** 2
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13 * size + 1e-10 * b.abs().max().item())


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(LOSSES)),
    half=st.integers(2, 30),
    side=st.integers(1, 20),
    learned=st.booleans(),
    grad=st.booleans(),
)
def test_a_pair_is_multiplied_once_outside_of_the_diagonal(name, half, side, learned, grad):
    """Of N rows in chunks of R, N (N + R) / 2 similarities at most, once for the sums and once for the gradient."""
    rows = 2 * half
    x, labels = batch(rows, 3, 3, dtype=torch.float32)
    temperature = torch.tensor(0.1).requires_grad_(grad) if learned else 0.1
    with pytest.MonkeyPatch.context() as patch:
        by_strips(patch, side)
        counted = elements(chunked, patch)
        LOSSES[name](x.requires_grad_(grad), labels, temperature=temperature, backend="chunked")
    squares = sum(min(side, rows - start) ** 2 for start in range(0, rows, side))
    once = (rows * rows + squares) // 2
    assert counted == {
        "stats_rows": squares,
        "stats_rows_and_columns": once - squares,
        "exp_rows": 0,
        "exp_rows_and_columns": 0,
        "grad_rows": once if grad else 0,
    }
    assert once <= rows * (rows + min(side, rows)) / 2


@pytest.mark.parametrize("loss, masked", [("nt_xent", False), ("itself", False), ("labels", True)])
def test_tiles_behind_a_chunk_skip_nothing(monkeypatch, loss, masked):
    """Without a mask kernels have larger tiles, and test no element of most."""
    found = []
    by_strips(monkeypatch, 16)
    original = chunked.stats_rows_and_columns

    def seen(strip, *rest):
        found.append((strip.x.data_ptr() == strip.y.data_ptr(), strip.mask is not None))
        return original(strip, *rest)

    monkeypatch.setattr(chunked, "stats_rows_and_columns", seen)
    squares = []
    rows = chunked.stats_rows
    monkeypatch.setattr(chunked, "stats_rows", lambda strips, *a: squares.append(strips[0].mask) or rows(strips, *a))
    x, labels = batch(40, 8, 4)
    LOSSES[loss](x, labels, temperature=0.5, backend="chunked")
    assert len(squares) == 3 and None not in squares
    assert found == [(False, masked)] * 2


@pytest.mark.parametrize("cut", [0, 1, 9, 13, 22])
def test_the_columns_of_a_strip_are_its_columns(cut):
    """With every part of a mask: the sums of two parts, merged, are those of the whole."""
    rows, columns = 9, 22
    x, labels = batch(rows + columns, 4, 3, seed=4)
    own = torch.arange(rows)
    mask = StripMask(
        compare=(Compare(labels[:rows], labels[rows:], False), Compare(own % 2, torch.arange(columns) % 2, True)),
        dense=(x[:rows, :1] + x[rows:, 1]) < 1,
        threshold=torch.full((rows,), 0.3, dtype=torch.float64),
        exempt=torch.stack([own * 2, own + 11], 1),
        skip=columns - 1 - own,
    )
    one = torch.ones((), dtype=torch.float64)
    strip = Strip(x[:rows], x[rows:], one, None, None, x[rows:, 2].contiguous(), (own * 7) % columns, mask)
    whole = chunked.stats_rows([strip])
    parts = [slice(0, cut), slice(cut, columns)]
    found = [chunked.stats_rows([strip.columns(part)]) for part in parts if part.stop > part.start]
    merged = found[0] if len(found) == 1 else chunked.merge(*found)
    for sums in (whole, merged):
        assert ((sums.total > 0).sum() > rows // 2) and (sums.total == 0).sum() < rows
    torch.testing.assert_close(merged.total * merged.shift.exp(), whole.total * whole.shift.exp())


# The kernels ----------------------------------------------------------------------------------------------------------

NUMBERS = {"triton": (torch.float32, torch.float16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}


@pytest.mark.parametrize(
    "name, backend, dtype",
    [
        (name, backend, dtype)
        for backend, dtypes in NUMBERS.items()
        for dtype in dtypes
        for name in ("nt_xent", "weights", *(("sup_con", "labels") if dtype == torch.float32 else ()))
    ],
    ids=lambda x: str(x).split(".")[-1],
)
@pytest.mark.parametrize("temperature", [0.5, "0.5, stored", 0.01, "learned"])
def test_kernels_are_inside_the_error_budget(monkeypatch, name, temperature, backend, dtype):
    """In chunks of 32 of 75 rows, the last one ragged. Exponentials are stored where they have one safe shift and all
    of them fit, and computed twice elsewhere."""
    x, labels = batch(75, 24, 4, seed=1, dtype=dtype)
    x = x / 4
    learned, stored = temperature == "learned", temperature == "0.5, stored"
    temperature = torch.tensor(0.1) if learned else 0.5 if stored else temperature
    options = {"workspace_bytes": 80 * (80 if stored else 33) * x.itemsize, "backend": backend}
    if stored:
        monkeypatch.setattr(sweep.chunks, "strip_rows", lambda *_: 32)
        stored = dtype != torch.float16 and not name.startswith("labels")  # without cosines
    counted = elements(BACKENDS[backend], monkeypatch)
    found = result(LOSSES[name], x, labels, temperature, **options)
    rows = 75 if name in ("sup_con", "labels", "weights") else 74
    once = (rows * rows + 2 * 32 * 32 + (rows - 64) ** 2) // 2
    assert sum(counted.values()) == (once if stored else 2 * once)
    assert counted["exp_rows_and_columns" if stored else "grad_rows"] == once
    assert all(map(torch.equal, found, result(LOSSES[name], x, labels, temperature, **options)))
    baseline = result(LOSSES[name], x, labels, temperature, backend="reference")
    wide = temperature.double() if learned else temperature
    exact = result(LOSSES[name], x.double(), labels, wide, backend="reference")
    for a, b, c in zip(found[:2], baseline, exact, strict=False):
        assert testing.budget_share(a, b, c, dtype, 1e-6 * c.abs().max().item()) <= 1
    if learned:
        torch.testing.assert_close(found[2].double(), exact[2], rtol=2e-5, atol=0)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_rows_that_are_not_finite_spoil_what_they_spoil_in_whole_rows(monkeypatch, backend):
    """A NaN spoils the rows that compete with it, and no row that its mask keeps from it."""
    x, labels = batch(60, 8, 3, dtype=torch.float32)
    x[7, 0], x[41] = torch.nan, 0

    def rows_and_gradient():
        leaf = x.clone().requires_grad_()
        mask, options = masks.same_group(labels, labels), {"workspace_bytes": 64 * 17 * 4, "backend": backend}
        losses = itself(leaf, labels, mask, reduction="none", **options)
        losses.sum().backward()
        return losses.detach(), leaf.grad

    found = rows_and_gradient()
    monkeypatch.setattr(sweep.chunks, "strip_rows", lambda *_: 0)
    assert 0 < found[0].isnan().sum() < 60
    for a, b in zip(found, rows_and_gradient(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_target_outside_of_the_tile_is_none(backend):
    """Wherever it is: its factor is not read, and no entry is written."""
    e, factor = torch.rand(5, 16), torch.rand(16)
    target = torch.tensor([-1, 16, 2**45, -(2**45), 3])
    rows, columns, entry = torch.rand(5), torch.rand(16), torch.rand(5)
    wanted = e * (rows[:, None] + columns)
    wanted[4, 3] = entry[4] * factor[4] * factor[3]
    BACKENDS[backend].weigh(Patch(e, target, factor[:5], factor), rows, columns, entry)
    torch.testing.assert_close(e, wanted)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_rows_may_lie_by_column(backend):
    x, labels = batch(75, 24, 4, dtype=torch.float32)
    options = {"temperature": 0.1, "workspace_bytes": 80 * 33 * 4, "backend": backend}
    step = lambda x: fusedloss.sup_con(x, labels, **options)
    for a, b in zip(*(testing.value_and_gradients(step, [z]) for z in (x, x.T.contiguous().T)), strict=True):
        torch.testing.assert_close(a, b)


def folded(x, labels, others):
    fold = Fold("sup_con_in", labels=(labels, others), itself=True)
    one, call = x.new_ones(()), Call("sum")
    return fold_loss(fold_problem([x], one, one.expand(len(x)), fold, call, cosine=True), call)[0]


WHOLE = {
    "a matrix": lambda x, labels: itself(x, labels, labels[:, None] == labels),
    "labels of two tensors": lambda x, labels: itself(x, labels, masks.same_id(labels, labels.clone())),
    "targets": lambda x, labels: fusedloss.info_nce(x, x, torch.arange(len(x))),
    "another's column": lambda x, labels: itself(x, labels, masks.not_self(1)),
    "a margin": lambda x, labels: itself(x, labels, masks.score_margin(0.1)),
    "two matrices": lambda x, labels: fusedloss.info_nce(x, x.clone()),
    "a bias": lambda x, labels: fusedloss.info_nce(x, x, key_bias=x[:, 0].detach()),
    "smoothing by row": lambda x, labels: itself(x, labels, masks.same_id(labels, labels), label_smoothing=0.1),
    "counts": lambda x, labels: split(fusedloss.nt_xent)(x, labels, return_stats=True)[0],
    "both directions": lambda x, labels: fusedloss.clip(x, x, 10.0),
    "a fold's labels of two tensors": lambda x, labels: folded(x, labels, labels.clone()),
    "a fold that takes whole rows": lambda x, labels: fusedloss.batch_semi_hard_triplet(x, labels),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_the_host_does_not_know_to_be_symmetric_takes_whole_rows(monkeypatch, name):
    x, labels = batch(36, 4, 4, dtype=torch.float32)
    step = lambda x: WHOLE[name](x, labels)
    monkeypatch.setattr(triangle.Staircase, "__init__", None)  # not called
    monkeypatch.setenv("FUSEDLOSS_WORKSPACE_BYTES", str(40 * 16 * 4 * 12))
    monkeypatch.setenv("FUSEDLOSS_BACKEND", "triton")
    found = testing.value_and_gradients(step, [x])
    monkeypatch.setenv("FUSEDLOSS_BACKEND", "reference")
    for a, b in zip(found, testing.value_and_gradients(step, [x]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_both_places_fit_fp16(monkeypatch):
    """The gain leaves room for their sum: each is up to the largest weight, and the power of two of one would not."""
    x = torch.zeros(40, 8, dtype=torch.float16)
    x[:20, 0], x[20:, 0] = 1, -1  # each row's target is its opposite: its probability is 0, the entry is the weight
    step = lambda x: split(fusedloss.nt_xent)(
        x, None, temperature=0.05, reduction="sum", workspace_bytes=48 * 16 * 2, backend="triton"
    )
    found = testing.value_and_gradients(step, [x])
    exact = testing.value_and_gradients(
        lambda x: split(fusedloss.nt_xent)(x, None, temperature=0.05, reduction="sum", backend="reference"),
        [x.double()],
    )
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-3, atol=2e-3)


# How many rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("D", [64, 384, 768, 4096])
@pytest.mark.parametrize("multiprocessors", [16, 108, 132])
def test_a_chunk_leaves_rows_behind_it(D, multiprocessors):
    for M in (1, 100, 129, 4096, 16384, 65536, 2**20):
        for most in (1, 300, 8448):
            whole = wave_rows(M, D, most, multiprocessors)
            for room in (None, 1000, 2**28):
                rows = half_rows(M, D, most, multiprocessors, whole, room)
                assert 0 <= rows <= min(most, M) and (rows == M or rows % 128 == 0)


@pytest.mark.parametrize(
    "room, wanted",
    [
        (None, [1024, 2048, 4096, 5632, 5632]),  # two sweeps of half instead of two, and one product of a chunk's two
        (0, [0, 0, 0, 5632, 5632]),  # instead of one sweep
        (2**28, [1024, 2048, 4096, 5632, 5632]),  # one sweep of half, up to 20000 rows
    ],
)
def test_half_is_taken_where_it_saves_products(room, wanted):
    """H200, D = 768: 3 chunks of 16384 rows, 12 of 65536."""
    sizes = (1024, 2048, 4096, 16384, 65536)
    assert [half_rows(M, 768, 8448, 132, wave_rows(M, 768, 8448, 132), room) for M in sizes] == wanted


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_one_chunk_saves_a_product(monkeypatch, backend):
    """`dz + dz^T` is symmetric, so that dx's product is all of the gradient."""
    x, _ = batch(40, 8, 1, dtype=torch.float32)
    counted, products = elements(BACKENDS[backend], monkeypatch), []
    add_mm = sweep.gradients.add_mm
    monkeypatch.setattr(sweep.gradients, "add_mm", lambda *a: (products.append(a[1].numel()), add_mm(*a)))
    for temperature in (0.5, torch.tensor(0.5)):
        result(LOSSES["nt_xent"], x, None, temperature, backend=backend)
    once = 40 * 40
    found = {name: count for name, count in counted.items() if count}
    assert found == {"exp_rows_and_columns": once, "stats_rows": once, "grad_rows": once}
    assert products == [once, once]
