"""One matrix against itself by half of its tiles: what all of them give, and where all of them are taken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fusedloss
from fusedloss import masks, sweep, testing, transforms
from fusedloss.backends import chunked
from fusedloss.sweep import triangle

NUMBERS = torch.arange(23)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Of 7 rows, the last ones ragged. A test calls `keep` with the number of tiles that the workspace has room for."""
    monkeypatch.setattr("fusedloss.backends.dense.MOST", {})
    monkeypatch.setattr(sweep.chunks, "chunk_rows", lambda M, *_: min(M, 7))
    monkeypatch.setattr(chunked.tiles, "TILE_COLUMNS", 9)


def keep(monkeypatch, count):
    monkeypatch.setattr(sweep.chunks, "half_sides", lambda problem, backend: (min(problem.rows, 7), count))


def whole(monkeypatch):
    monkeypatch.setattr(sweep, "halved", lambda problem, backend: None)


def split(loss):
    return lambda x, labels, **o: loss(x[: len(x) // 2], x[len(x) // 2 : len(x) // 2 * 2], **o)


def itself(x, labels, temperature, mask=None, **options):
    mask = {"label": masks.same_id(labels, labels), "self": masks.not_self(), None: None}[mask]
    return fusedloss.info_nce(x, x, mask=mask, temperature=temperature, **options)


def symmetric_matrix(x, labels, temperature, **options):
    allowed = (labels[:, None] + labels) % 3 != 0
    return fusedloss.info_nce(x, x, mask=allowed, temperature=temperature, normalize=True, **options)


def weighted(x, labels, temperature, **options):
    """Some rows are left out, some have no other row that they may compete with."""
    weight = (labels % 3).to(x.dtype)
    target = torch.where(labels % 4 == 0, -100, torch.arange(len(x)))
    group = masks.same_group(labels, labels.clone())
    return fusedloss.info_nce(x, x, target, mask=group, weight=weight, temperature=temperature, **options)


LOSSES = {
    "nt_xent": split(fusedloss.nt_xent),
    "decoupled_contrastive": split(fusedloss.decoupled_contrastive),
    "sup_con": fusedloss.sup_con,
    "sup_con, in": lambda *a, **o: fusedloss.sup_con(*a, form="in", **o),
    "info_nce, labels": lambda *a, **o: itself(*a, mask="label", **o),
    "info_nce, normalized": lambda *a, **o: itself(*a, normalize=True, **o),
    "info_nce, smoothed": lambda *a, **o: itself(*a, label_smoothing=0.2, **o),
    "info_nce, a matrix": symmetric_matrix,
    "info_nce, weights": weighted,
    "info_nce, focal": lambda *a, **o: itself(*a, normalize=True, transform=transforms.focal(2.0), **o),
    "multi_similarity": lambda *a, temperature, **o: fusedloss.multi_similarity(*a, beta=1 / temperature, **o),
    "circle": lambda *a, temperature, **o: fusedloss.circle(*a, gamma=1 / temperature, **o),
}


def batch(rows, dim, classes, kind, seed, dtype=torch.float64):
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
        return (loss(x, labels, temperature=temperatures[0] if temperatures else temperature, **options)).square().sum()

    learned = [temperature] if isinstance(temperature, torch.Tensor) else []
    return testing.value_and_gradients(step, [x, *learned])


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(LOSSES)),
    rows=st.integers(1, 23),
    dim=st.sampled_from([2, 8]),
    classes=st.sampled_from([1, 2, 8]),
    kind=st.sampled_from(["random", "duplicates", "zeros"]),
    temperature=st.sampled_from([0.5, 0.1, 0.02, 0.004]),  # scales of every kind of shift
    learned=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    kept=st.sampled_from([0, 2, 99]),
    seed=st.integers(0, 99),
)
def test_half_of_the_tiles_give_what_all_of_them_give(
    name, rows, dim, classes, kind, temperature, learned, reduction, kept, seed
):
    x, labels = batch(rows, dim, classes, kind, seed)
    loss = LOSSES[name]
    if learned and name not in ("multi_similarity", "circle"):
        temperature = torch.tensor(temperature, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        keep(patch, kept)
        found = result(loss, x, labels, temperature, reduction=reduction)
        with torch.no_grad():
            value = loss(x, labels, temperature=temperature, reduction=reduction).square().sum()
        whole(patch)
        wanted = result(loss, x, labels, temperature, reduction=reduction)
    torch.testing.assert_close(value, found[0], rtol=1e-12, atol=1e-12)
    for a, b in zip(found, wanted, strict=True):
        # The terms of a gradient are as large as the slope of the logits, and they cancel.
        size = (1 + wanted[0].abs().sqrt().item()) / float(temperature) ** 2
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13 * size + 1e-10 * b.abs().max().item())


def similarities(monkeypatch):
    """Counts the similarities that are computed from now on."""
    counted, original = [], chunked.tiles.similarity

    def counts(strip, rows, tile, out):
        counted.append(out.numel())
        return original(strip, rows, tile, out)

    for module in (chunked.half, chunked.half_folds, chunked.masks, chunked.softmax):
        monkeypatch.setattr(module, "similarity", counts)
    return counted


@pytest.mark.parametrize("name", LOSSES)
def test_a_pair_is_multiplied_once_for_both_of_its_places(monkeypatch, name):
    """And once more for the gradient, or kept until then."""
    x, labels = batch(28, 4, 4, "random", 0)
    counted, half = similarities(monkeypatch), 4 * 5 // 2 * 7 * 7
    for kept, times in ((0, 2), (4, 1.6), (99, 1)):
        keep(monkeypatch, kept)
        LOSSES[name](x.requires_grad_(), labels, temperature=0.1)
        assert sum(counted) == times * half
        counted.clear()
    LOSSES[name](x.detach(), labels, temperature=0.1)
    assert sum(counted) == half


ONE_SIDED = {
    "a margin": lambda x, labels: fusedloss.info_nce(x, x, mask=masks.score_margin(0.1)),
    "a guide": lambda x, labels: fusedloss.info_nce(x, x, mask=masks.guide(x, x)),
    "a matrix": lambda x, labels: fusedloss.info_nce(x, x, mask=torch.ones(len(x), len(x)).tril() > 0),
    "labels of two kinds": lambda x, labels: fusedloss.info_nce(x, x, mask=masks.same_id(labels, labels + 1)),
    "another's column": lambda x, labels: fusedloss.info_nce(x, x, mask=masks.not_self(1)),
    "targets in a ring": lambda x, labels: fusedloss.info_nce(x, x, torch.arange(len(x)).roll(1)),
    "a bias": lambda x, labels: fusedloss.info_nce(x, x, key_bias=x[:, 0].detach()),
    "smoothing by row": lambda x, labels: fusedloss.info_nce(
        x, x, mask=masks.same_id(labels, labels), label_smoothing=0.1
    ),
    "two matrices": lambda x, labels: fusedloss.info_nce(x, x.clone()),
    "more columns": lambda x, labels: fusedloss.info_nce(x, x, bank=x.detach()[:3].clone()),
    "both directions": lambda x, labels: fusedloss.clip(x, x, 10.0),
    "classes of others": lambda x, labels: fusedloss.siglip(x, x, 10.0, -10.0),
}


@pytest.mark.parametrize("name", ONE_SIDED)
def test_what_is_not_symmetric_takes_all_of_the_tiles(monkeypatch, name):
    x, labels = batch(20, 4, 4, "random", 0)
    step = lambda x, **o: ONE_SIDED[name](x, labels)
    monkeypatch.setattr(triangle.Triangle, "__init__", None)  # not called
    found = testing.value_and_gradients(step, [x])
    monkeypatch.setenv("FUSEDLOSS_BACKEND", "reference")
    for a, b in zip(found, testing.value_and_gradients(step, [x]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["nt_xent", "sup_con", "multi_similarity", "circle", "sup_con, in"])
def test_permuted_rows_have_permuted_gradients(name):
    x, labels = batch(22, 6, 5, "random", 1)
    order = torch.randperm(22, generator=torch.Generator().manual_seed(2))
    if name == "nt_xent":  # row i and row i + 11 stay a pair
        order = torch.cat([order[order < 11], order[order < 11] + 11])
    value, gradient = result(LOSSES[name], x, labels, 0.1)
    again, permuted = result(LOSSES[name], x[order], labels[order], 0.1)
    torch.testing.assert_close(again, value)
    torch.testing.assert_close(permuted, gradient[order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "dtype, products",
    [(torch.float32, "mkl"), (torch.float32, "onednn"), (torch.bfloat16, "auto"), (torch.float16, "auto")],
)
@pytest.mark.parametrize("name", LOSSES)
def test_in_every_dtype_it_is_near_fp64(monkeypatch, name, dtype, products):
    """Beside all of the tiles in that dtype; twice with equal bits."""
    monkeypatch.setenv("FUSEDLOSS_CPU_PRODUCTS", products)
    x, labels = batch(23, 16, 5, "random", 3, dtype)
    x = x / 4
    found = result(LOSSES[name], x, labels, 0.1)
    assert all(map(torch.equal, found, result(LOSSES[name], x, labels, 0.1)))
    exact = result(LOSSES[name], x.double(), labels, 0.1)
    whole(monkeypatch)
    for a, b, c in zip(found, result(LOSSES[name], x, labels, 0.1), exact, strict=True):
        assert testing.budget_share(a, b, c, dtype, 1e-6 * c.abs().max().item()) <= 1


@pytest.mark.parametrize("distance", ["euclidean", "squared", "cosine"])
@pytest.mark.parametrize("classes", [1, 2, 11])
@pytest.mark.parametrize("kind", ["random", "duplicates", "zeros"])
def test_the_hardest_are_those_of_two_sweeps(monkeypatch, kind, classes, distance):
    """The same columns on ties, of rows and of whole batches: equal bits."""
    monkeypatch.setattr(sweep.chunks, "STATS_ROWS", {"cpu": 7})
    x, labels = batch(32, 3, classes, kind, 6, torch.float32)
    step = lambda x: fusedloss.batch_hard_triplet(x.round() if kind == "random" else x, labels, distance=distance)
    counted = similarities(monkeypatch)
    found = testing.value_and_gradients(step, [x * 2])
    assert sum(counted) == 4 * 5 // 2 * 7 * 7 + 4 * 4 * 7 + 4 * 4
    monkeypatch.setattr(sweep, "tops", lambda *_: None)
    assert all(map(torch.equal, found, testing.value_and_gradients(step, [x * 2])))


def test_statistics_are_those_of_all_tiles(monkeypatch):
    x, _ = batch(22, 6, 5, "random", 4, torch.float32)
    step = lambda: fusedloss.nt_xent(x[:11].clone().requires_grad_(), x[11:], temperature=0.1, return_stats=True)
    value, found = step()
    whole(monkeypatch)
    wanted_value, wanted = step()
    torch.testing.assert_close(value, wanted_value)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives_are_those_of_the_formula():
    x, labels = batch(12, 4, 3, "random", 5)

    def penalty(backend):
        leaf = x.clone().requires_grad_()
        loss = fusedloss.multi_similarity(leaf, labels, backend=backend)
        loss = loss + fusedloss.nt_xent(leaf[:6], leaf[6:], backend=backend)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        gradient.square().sum().backward()
        return leaf.grad

    torch.testing.assert_close(penalty("chunked"), penalty("reference"), rtol=1e-9, atol=1e-12)
