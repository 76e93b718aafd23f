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


def formula(query, key, negatives, target, temperature, key_bias=None, normalize=False, real=None):
    """[M]: cross-entropy over the keys and the row's own columns, side by side."""
    if normalize:
        query, key, negatives = (F.normalize(x, dim=-1) for x in (query, key, negatives))
    z = query @ key.T / temperature
    z = z if key_bias is None else z + key_bias
    own = torch.einsum("md,mkd->mk", query, negatives) / temperature
    own = own if real is None else own.masked_fill(~real, -torch.inf)
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
    padded=st.booleans(),
    backend=st.sampled_from(BACKENDS[:2]),
    seed=st.integers(0, 99),
)
def test_they_stand_beside_the_keys(M, more, K, D, normalize, padded, backend, seed):
    tensors = [randn(M, D, seed=seed), randn(M + more, D, seed=seed + 1), randn(M, K, D, seed=seed + 2)]
    tensors += [torch.tensor(0.4, dtype=torch.float64), randn(M + more, seed=seed + 3)]
    target = torch.randint(M + more, (M,), generator=torch.Generator().manual_seed(seed))
    real = torch.rand(M, K, generator=torch.Generator().manual_seed(seed)) < 0.5 if padded else None

    def ours(q, k, n, t, b):
        options = {"temperature": t, "negatives": n, "key_bias": b, "normalize": normalize, "backend": backend}
        return fusedloss.info_nce(q, k, target, negatives_mask=real, **options)

    def theirs(q, k, n, t, b):
        return formula(q, k, n, target, t, b, normalize, real).mean()

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
        (
            randn(4, 2, 3),
            {"negatives_mask": torch.ones(4, 3).bool()},
            ValueError,
            r"negatives_mask must be bool \[4, 2\], got shape \[4, 3\]",
        ),
        (None, {"negatives_mask": torch.ones(4, 2).bool()}, ValueError, "negatives must be given with negatives_mask"),
    ],
)
def test_bad_input_is_named(negatives, options, error, said):
    with pytest.raises(error, match=said):
        fusedloss.info_nce(randn(4, 3), randn(4, 3), negatives=negatives, **options)


def test_matryoshka_says_that_it_cannot_cut_them():
    with pytest.raises(ValueError, match="negatives must not be given with info_nce under matryoshka, got it"):
        fusedloss.matryoshka(fusedloss.info_nce, randn(4, 3), randn(4, 3), dims=[2], negatives=randn(4, 2, 3))


# Of multiple negatives ranking ----------------------------------------------------------------------------------------


def ranking_formula(anchor, positive, *negatives, real=None, own, scale, directions=("query_to_doc",), hardness=0.0):
    """[B]: a joint softmax over what each row sees."""
    a, p, *n = (F.normalize(x, dim=1) for x in (anchor, positive, *negatives))
    B, K = len(a), len(n)
    real = torch.ones(B, K, dtype=torch.bool) if real is None else real
    itself = torch.eye(B, dtype=torch.bool)
    z = [scale * a @ p.T]
    for k, x in enumerate(n):
        sim = a @ x.T
        seen = real[:, k].expand(B, B) & (itself if own else True)
        z.append((scale * sim + hardness * itself.to(sim) * sim.detach()).masked_fill(~seen, -torch.inf))
    if "query_to_query" in directions:
        z.append((scale * a @ a.T).masked_fill(itself, -torch.inf))
    if "doc_to_doc" in directions:
        z.append((scale * p @ p.T).masked_fill(itself, -torch.inf))
        for k, x in enumerate(() if own else n):
            z.append((scale * p @ x.T).masked_fill(itself | ~real[:, k], -torch.inf))
    return torch.cat(z, 1).logsumexp(1) - z[0].diagonal()


@settings(deadline=None, max_examples=30)
@given(
    B=st.integers(1, 7),
    K=st.integers(1, 3),
    own=st.booleans(),
    padded=st.booleans(),
    directions=st.sampled_from([("query_to_doc",), ("query_to_doc", "query_to_query"), ("query_to_doc", "doc_to_doc")]),
    hardness=st.sampled_from([0.0, 0.8]),
    swept=st.booleans(),
    backend=st.sampled_from(BACKENDS[:3]),
    seed=st.integers(0, 99),
)
def test_ranking_sees_the_negatives_that_exist(B, K, own, padded, directions, hardness, swept, backend, seed):
    """swept: a mask that drops nothing has the sweep decide, which the merged scores otherwise spare."""
    tensors = [randn(B, 4, seed=seed + i) for i in range(2 + K)] + [torch.tensor(3.0, dtype=torch.float64)]
    real = torch.rand(B, K, generator=torch.Generator().manual_seed(seed)) < 0.5 if padded else None
    everything = torch.ones(B, B * (1 + K), dtype=torch.bool) if swept else None

    def ours(*t):
        options = {
            "directions": directions,
            "hardness_mode": "hard_negatives" if hardness else None,
            "mask": everything,
        }
        options |= {"hardness_strength": hardness, "own_negatives": own, "negatives_mask": real, "backend": backend}
        return fusedloss.multiple_negatives_ranking(*t[:-1], scale=t[-1], **options)

    def theirs(*t):
        options = {"real": real, "own": own, "directions": directions, "hardness": hardness}
        return ranking_formula(*t[:-1], scale=t[-1], **options).mean()

    found, wanted = (testing.value_and_gradients(f, tensors) for f in (ours, theirs))
    close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("own", [False, True])
def test_ranking_in_kernels(backend, own):
    tensors = [randn(9, 8, seed=i, dtype=torch.float32) for i in range(4)]
    real = torch.rand(9, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    everything = torch.ones(9, 27, dtype=torch.bool)

    def ours(*t):
        return fusedloss.multiple_negatives_ranking(
            *t, scale=3.0, own_negatives=own, negatives_mask=real, mask=everything, backend=backend
        )

    found = testing.value_and_gradients(ours, tensors)
    wanted = testing.value_and_gradients(
        lambda *t: ranking_formula(*t, real=real, own=own, scale=3.0).mean(), [t.double() for t in tensors]
    )
    close(found, wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("options", [{"decoupled": True}, {"return_stats": True}, {"reduction": "none"}], ids=str)
def test_own_negatives_beside_other_options(options):
    """The same numbers as a bool mask of the documents has."""
    texts = [randn(6, 4, seed=i) for i in range(4)]
    itself = torch.eye(6, dtype=torch.bool)
    mask = torch.cat([torch.ones_like(itself), itself, itself], 1)
    found = fusedloss.multiple_negatives_ranking(*texts, own_negatives=True, **options)
    wanted = fusedloss.multiple_negatives_ranking(*texts, mask=mask, **options)
    found, wanted = (x if isinstance(x, tuple) else (x,) for x in (found, wanted))
    close((found[0], *(found[1] if len(found) > 1 else ())), (wanted[0], *(wanted[1] if len(wanted) > 1 else ())))


def test_both_directions_have_their_own_losses():
    texts = [randn(6, 4, seed=i) for i in range(3)]
    options = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction", "scale": 3.0}
    found = fusedloss.multiple_negatives_ranking(*texts, own_negatives=True, reduction="none", **options)
    a, p, _ = (F.normalize(x, dim=1) for x in texts)
    back = F.cross_entropy(3 * p @ a.T, torch.arange(6), reduction="none")
    torch.testing.assert_close(found, (ranking_formula(*texts, own=True, scale=3.0) + back) / 2)


def test_second_derivatives_where_all_of_a_row_s_negatives_are_padding():
    """As without those negatives; a log-sum-exp of nothing but -inf gave NaN."""
    query, key, negatives = randn(4, 3, seed=1), randn(4, 3, seed=2), randn(4, 2, 3, seed=3)
    real = torch.tensor([[True, True], [False, False], [True, False], [False, True]])

    def penalty(loss):
        x = query.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    def ranking(x):
        options = {"own_negatives": True, "negatives_mask": real, "similarity": "dot", "scale": 1 / 0.4}
        return fusedloss.multiple_negatives_ranking(x, key, *negatives.unbind(1), **options)

    wanted = penalty(lambda x: formula(x, key, negatives, torch.arange(4), 0.4, real=real).mean())
    close([penalty(ranking)], [wanted], rtol=1e-9, atol=1e-12)
    nce = lambda x: fusedloss.info_nce(x, key, temperature=0.4, negatives=negatives, negatives_mask=real)
    close([penalty(nce)], [wanted], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "count, options, error, said",
    [
        (0, {"negatives_mask": torch.ones(4, 1).bool()}, ValueError, "negatives must be given with negatives_mask"),
        (2, {"negatives_mask": torch.ones(4, 1).bool()}, ValueError, r"negatives_mask must be bool \[4, 2\]"),
        (2, {"negatives_mask": torch.ones(4, 2)}, TypeError, "negatives_mask must be a tensor of bool"),
    ],
)
def test_bad_masks_of_ranking_are_named(count, options, error, said):
    texts = [randn(4, 3) for _ in range(2 + count)]
    with pytest.raises(error, match=said):
        fusedloss.multiple_negatives_ranking(*texts, **options)


def test_columns_of_other_lengths_are_named():
    texts = [randn(4, 3), randn(4, 3), randn(4, 3), randn(5, 3)]
    with pytest.raises(ValueError, match=r"negatives\[1\] must have 4 rows, one per row of anchor, with own_negatives"):
        fusedloss.multiple_negatives_ranking(*texts, own_negatives=True)
    with pytest.raises(ValueError, match=r"negatives\[1\] must have 4 rows, like negatives\[0\], with negatives_mask"):
        fusedloss.multiple_negatives_ranking(*texts, negatives_mask=torch.ones(4, 2).bool())
