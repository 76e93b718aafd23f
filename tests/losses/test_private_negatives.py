"""info_nce(negatives=[M, K, D]): columns that only their own row sees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import fusedloss
from fusedloss import masks, testing

BACKENDS = ["dense", "chunked", "reference", "triton", "cuda"]


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def formula(query, key, negatives, target, temperature, key_bias=None, normalize=False):
    """[M]: cross-entropy over the keys and the row's own columns, side by side."""
    if normalize:
        query, key, negatives = (F.normalize(x, dim=-1) for x in (query, key, negatives))
    z = query @ key.T / temperature
    z = z if key_bias is None else z + key_bias
    own = torch.einsum("md,mkd->mk", query, negatives) / temperature
    return F.cross_entropy(torch.cat([z, own], dim=1), target, reduction="none")


def close(found, wanted, **tolerance):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), **tolerance)


@settings(deadline=None, max_examples=25)
@given(
    M=st.integers(1, 7),
    more=st.integers(0, 4),
    K=st.integers(0, 3),
    D=st.integers(1, 6),
    normalize=st.booleans(),
    backend=st.sampled_from(BACKENDS[:2]),
    seed=st.integers(0, 99),
)
def test_they_stand_beside_the_keys(M, more, K, D, normalize, backend, seed):
    tensors = [randn(M, D, seed=seed), randn(M + more, D, seed=seed + 1), randn(M, K, D, seed=seed + 2)]
    tensors += [torch.tensor(0.4, dtype=torch.float64), randn(M + more, seed=seed + 3)]
    target = torch.randint(M + more, (M,), generator=torch.Generator().manual_seed(seed))

    def ours(q, k, n, t, b):
        options = {"temperature": t, "negatives": n, "key_bias": b, "normalize": normalize, "backend": backend}
        return fusedloss.info_nce(q, k, target, **options)

    def theirs(q, k, n, t, b):
        return formula(q, k, n, target, t, b, normalize).mean()

    found, wanted = (testing.value_and_gradients(f, tensors) for f in (ours, theirs))
    close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_rows_that_do_not_count_weights_and_reductions(backend, reduction):
    """fp32, so that the kernels run; an ignored row's own columns do not matter."""
    query, key, negatives = (randn(*s, seed=i, dtype=torch.float32) for i, s in enumerate([(6, 8), (9, 8), (6, 2, 8)]))
    target, weight = torch.tensor([3, -100, 0, 8, 5, 1]), torch.tensor([1.0, 2.0, 0.5, 0.0, 1.0, 3.0])
    upstream = randn(6, seed=7).float() if reduction == "none" else torch.tensor(1.7)
    counts = weight.double() * (target != -100)

    def ours(q, k, n):
        options = {"weight": weight, "reduction": reduction, "backend": backend, "temperature": 0.5}
        return (fusedloss.info_nce(q, k, target, negatives=n, **options) * upstream).sum()

    def theirs(q, k, n):
        rows = counts * formula(q, k, n, target.clamp(min=0), 0.5)
        rows = rows.sum() / counts.sum() if reduction == "mean" else rows.sum() if reduction == "sum" else rows
        return (rows * upstream.double()).sum()

    found = testing.value_and_gradients(ours, [query, key, negatives])
    wanted = testing.value_and_gradients(theirs, [query.double(), key.double(), negatives.double()])
    close(found, wanted, rtol=2e-5, atol=2e-6)
    assert found[1][1].abs().max() == found[3][1].abs().max() == 0


def test_masks_concern_the_keys_alone():
    query, key, negatives, ids = randn(5, 4), randn(5, 4, seed=1), randn(5, 2, 4, seed=2), torch.tensor([0, 0, 1, 1, 2])
    found = fusedloss.info_nce(query, key, negatives=negatives, mask=masks.same_id(ids, ids), reduction="none")
    bias = torch.zeros(5, 5, dtype=torch.float64)
    bias[(ids[:, None] == ids) & ~torch.eye(5, dtype=torch.bool)] = -torch.inf
    torch.testing.assert_close(found, formula(query, key, negatives, torch.arange(5), 0.05, bias))


def test_well_fitted_rows_keep_their_digits():
    """Loss 2e-26: log(1 + sum) of the keys' and the own columns' sums, where eager fp32 gives 0."""
    x = torch.eye(4)
    found = fusedloss.info_nce(x, x.clone(), negatives=-x[:, None], temperature=1 / 60)
    wanted = 3 * torch.exp(torch.tensor(-60.0, dtype=torch.float64)) + torch.exp(torch.tensor(-120.0).double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "negatives, options, error, said",
    [
        (randn(4, 3), {}, ValueError, r"negatives must be \[M, K, D\] = \[4, any, 3\], got shape \[4, 3\]"),
        (randn(3, 2, 3), {}, ValueError, r"negatives must be \[M, K, D\] = \[4, any, 3\], got shape \[3, 2, 3\]"),
        ("none", {}, ValueError, r"negatives must be \[M, K, D\] = \[4, any, 3\], got 'none', a str"),
        (
            randn(4, 2, 3).float(),
            {},
            TypeError,
            r"negatives\[:, 0\] must be torch.float64, like query, got torch.float32",
        ),
        (
            randn(4, 2, 3),
            {"label_smoothing": 0.1},
            ValueError,
            "negatives must not be given together with label_smoothing, got both",
        ),
        (
            randn(4, 2, 3),
            {"return_stats": True},
            ValueError,
            "negatives must not be given together with return_stats=True, got both",
        ),
    ],
)
def test_bad_input_is_named(negatives, options, error, said):
    with pytest.raises(error, match=said):
        fusedloss.info_nce(randn(4, 3), randn(4, 3), negatives=negatives, **options)


def test_matryoshka_says_that_it_cannot_cut_them():
    with pytest.raises(ValueError, match="negatives must not be given with info_nce under matryoshka, got it"):
        fusedloss.matryoshka(fusedloss.info_nce, randn(4, 3), randn(4, 3), dims=[2], negatives=randn(4, 2, 3))
