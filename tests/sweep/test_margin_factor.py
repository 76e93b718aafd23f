"""masks.score_margin(factor=): negatives above the threshold count with a share of their similarity.

The formula is dense, in fp64: the similarity is multiplied where the threshold is exceeded, which has no gradient.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import fusedloss
from fusedloss import masks, testing
from fusedloss.backends import chunked

BACKENDS = ["dense", "chunked", "reference"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several row chunks and column tiles at tens of rows, so that thresholds are cut at their borders."""
    from fusedloss import sweep

    monkeypatch.setattr(sweep.chunks, "chunk_rows", lambda M, *_: min(M, 5))
    monkeypatch.setattr("fusedloss.backends.dense.MOST", {})
    monkeypatch.setattr(chunked.tiles, "TILE_COLUMNS", 7)


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def shrunk(sim, target, margin, relative, factor, exempt=None):
    """The similarities [M, N], those above the threshold times the factor."""
    above = sim.detach() > relative * sim.detach().gather(1, target[:, None]) + margin
    if exempt is not None:
        above &= ~(exempt[:, :, None] == torch.arange(sim.shape[1])).any(1)
    above &= target[:, None] != torch.arange(sim.shape[1])
    return torch.where(above, factor * sim, sim)


def same(ours, formula, tensors, rtol=1e-9, atol=1e-11):
    upstream = torch.rand(ours(*tensors).shape, dtype=torch.float64) + 0.5
    found = testing.value_and_gradients(lambda *t: (ours(*t) * upstream).sum(), tensors)
    wanted = testing.value_and_gradients(lambda *t: (formula(*t) * upstream).sum(), [t.double() for t in tensors])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 12),
    more=st.integers(0, 9),
    margin=st.sampled_from([-3.0, -0.3, 0.0, 0.1, 9.0]),
    relative=st.sampled_from([1.0, 0.8]),
    factor=st.sampled_from([0.0, 0.5, 1.0]),
    with_exempt=st.booleans(),
    bias=st.booleans(),
    normalize=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.3]),
    reduction=st.sampled_from(["mean", "none"]),
    seed=st.integers(0, 999),
)
def test_it_is_the_formula(
    backend, rows, more, margin, relative, factor, with_exempt, bias, normalize, smoothing, reduction, seed
):
    torch.manual_seed(seed)
    columns = rows + more
    tensors = [randn(rows, 5), randn(columns, 5), torch.tensor(0.7, dtype=torch.float64)]
    added = randn(columns) if bias else None
    target = torch.randint(columns, (rows,))
    exempt = torch.randint(-1, columns, (rows, 2)) if with_exempt else None
    mask = masks.score_margin(margin, exempt, relative=relative, factor=factor)

    def ours(q, k, t):
        options = {"label_smoothing": smoothing, "normalize": normalize, "reduction": reduction, "backend": backend}
        return fusedloss.info_nce(q, k, target, temperature=t, key_bias=added, mask=mask, **options)

    def formula(q, k, t):
        q, k = (F.normalize(x, dim=1) if normalize else x for x in (q, k))
        z = shrunk(q @ k.T, target, margin, relative, factor, exempt) / t + (added if bias else 0)
        return F.cross_entropy(z, target, reduction=reduction, label_smoothing=smoothing)

    same(ours, formula, tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hardness", [None, "all_negatives"])
def test_beside_other_directions_and_hardness(backend, hardness):
    texts = [randn(9, 5) for _ in range(3)]
    mask = masks.score_margin(0.05, factor=0.5) & masks.same_id(torch.arange(9) % 4, torch.arange(18) % 5)
    kept = (torch.arange(9) % 4)[:, None] != torch.arange(18) % 5
    kept |= torch.eye(9, 18, dtype=torch.bool)
    strength = 0.7 if hardness else 0.0

    def ours(a, p, n):
        options = {"hardness_mode": hardness, "hardness_strength": strength, "backend": backend}
        directions = ("query_to_doc", "query_to_query")
        return fusedloss.multiple_negatives_ranking(a, p, n, scale=3.0, directions=directions, mask=mask, **options)

    def formula(a, p, n):
        a, p, n = (F.normalize(t, dim=1) for t in (a, p, n))
        sim = shrunk(a @ torch.cat([p, n]).T, torch.arange(9), 0.05, 1.0, 0.5)
        z = 3 * sim + strength * sim.detach() * (1 - torch.eye(9, 18))
        within = (3 * a @ a.T).masked_fill(torch.eye(9, dtype=torch.bool), -torch.inf)
        whole = torch.cat([z.masked_fill(~kept, -torch.inf), within], 1)
        return (whole.logsumexp(1) - z.diagonal()).mean()

    same(ours, formula, texts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_keep_the_error_budget(dtype):
    """Far from the threshold by construction: a similarity near it may fall on either side in 16 bits."""
    torch.manual_seed(0)
    query, key = randn(40, 16, dtype=dtype), randn(40, 16, dtype=dtype)
    query, key = query * 4, key * 4
    target, sim = torch.arange(40), query.double() @ key.double().T
    gaps = (sim - sim.diagonal()[:, None] - 2.0).abs()
    assert gaps[~torch.eye(40, dtype=torch.bool)].min() > 1e-3
    mask = masks.score_margin(2.0, factor=0.5)
    ours = lambda q, k: fusedloss.info_nce(q, k, temperature=20.0, mask=mask, backend="chunked")
    formula = lambda q, k: F.cross_entropy(shrunk(q @ k.T, target, 2.0, 1.0, 0.5) / 20, target)
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 2e-4}
    same(ours, formula, [query, key], **tolerance)


@pytest.mark.parametrize("temperature, sweeps", [(0.05, 1), (0.02, 2)])
def test_one_sweep_where_exponentials_need_no_shift(temperature, sweeps, monkeypatch):
    """Of unit rows at scales up to 30, over several chunks and tiles, as the formula in fp64."""
    calls = []
    for name in ("exp_rows", "stats_rows", "grad_rows"):
        kept = getattr(chunked, name)
        monkeypatch.setattr(chunked, name, lambda *args, name=name, kept=kept: (calls.append(name), kept(*args))[1])
    query, key = torch.randn(40, 6, dtype=torch.float64), torch.randn(50, 6, dtype=torch.float64)
    options = {"temperature": temperature, "normalize": True, "mask": masks.score_margin(relative=0.8, factor=0.5)}
    ours = lambda q, k: fusedloss.info_nce(q, k, backend="chunked", **options)

    def formula(q, k):
        sim = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T
        return F.cross_entropy(shrunk(sim, torch.arange(40), 0.0, 0.8, 0.5) / temperature, torch.arange(40))

    same(ours, formula, [query, key])
    calls.clear()
    testing.value_and_gradients(ours, [query, key])
    assert set(calls) == ({"exp_rows"} if sweeps == 1 else {"stats_rows", "grad_rows"})


@pytest.mark.parametrize("drops", ["dense", "labels"])
def test_a_column_that_a_mask_drops_may_be_nan(drops):
    """On `chunked`, whose tests of a tile are numbers; a column that competes spoils the rows that it competes in."""
    query, key, labels = randn(4, 5), randn(4, 5), torch.tensor([0, 0, 1, 2])
    kept = torch.ones(4, 4, dtype=torch.bool)
    kept[0, 1] = kept[1, 0] = False
    mask = kept if drops == "dense" else masks.same_id(labels, labels)
    spoilt = key.clone()
    spoilt[1] = torch.nan
    call = lambda k: fusedloss.info_nce(query, k, mask=mask, reduction="none", backend="chunked")
    own, wanted = call(spoilt), call(key)
    assert own[0] == wanted[0] and own[1:].isnan().all()


def test_it_counts_as_a_negative_that_competes():
    sim = torch.tensor([[0.5, 0.9], [0.0, 0.5]])
    query, key = torch.eye(2), sim.T.contiguous()
    mask = masks.score_margin(relative=0.95, factor=0.5)
    loss, stats = fusedloss.info_nce(query, key, temperature=1.0, mask=mask, return_stats=True, backend="chunked")
    assert stats.masked == 0 and stats.accuracy == 1  # 0.9 counts as 0.45, below 0.5
    torch.testing.assert_close(loss, F.cross_entropy(torch.tensor([[0.5, 0.45], [0.0, 0.5]]), torch.arange(2)))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_kernels_say_that_they_cannot(backend):
    with pytest.raises(fusedloss.UnsupportedError, match="factor"):
        fusedloss.info_nce(torch.ones(2, 4), torch.ones(2, 4), mask=masks.score_margin(factor=0.5), backend=backend)


def test_a_bias_that_learns_is_refused():
    bias = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="key_bias must not require a gradient with score_margin's factor"):
        fusedloss.info_nce(torch.ones(2, 4), torch.ones(2, 4), key_bias=bias, mask=masks.score_margin(factor=0.5))


@pytest.mark.parametrize("factor", [-0.1, 1.5, float("nan"), "half"])
def test_bad_factors_are_named(factor):
    with pytest.raises((ValueError, TypeError), match="factor must be"):
        masks.score_margin(factor=factor)
