"""Pairs with targets, reference scores, InfoNCE and circle loss of lists, against formulas written query by query."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import fusedloss
from fusedloss import testing

BACKENDS = ["reference", "chunked"]


def drawn(seed, Q, n, holes):
    """Scores with NaN where there is no document, labels from 0 to 2, and the mask."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(Q, n, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 3, (Q, n), generator=g)
    mask = torch.rand(Q, n, generator=g) < 0.7 if holes else torch.ones(Q, n, dtype=torch.bool)
    return scores.masked_fill(~mask, math.nan), labels, mask


def same(ours, formula, tensors, rtol=1e-9, atol=1e-11):
    upstream = torch.rand(ours(*tensors).shape, dtype=torch.float64) + 0.5
    found, wanted = (
        testing.value_and_gradients(lambda *t, f=f: (f(*t) * upstream).sum(), tensors) for f in (ours, formula)
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def reduce(sums, counts, reduction):
    sums, counts = torch.stack(sums), torch.tensor(counts, dtype=torch.float64)
    total = counts.sum()
    return {"none": sums, "sum": sums.sum(), "mean": sums.sum() / (total if total else 1)}[reduction]


# Targets of pairs -----------------------------------------------------------------------------------------------------


def soft_formula(scores, soft, mask, sigma, k, reduction):
    """Binary cross-entropy of each ordered pair of documents, one of them among the best k."""
    sums, counts = [], []
    for s, p, real in zip(scores, soft, mask, strict=True):
        s, p = s[real], p[real][:, real]
        place = (-s.detach()).argsort(stable=True).argsort()
        total, count = s.sum() * 0, 0.0
        for i in range(len(s)):
            for j in range(len(s)):
                if i != j and (k is None or min(place[i], place[j]) < k):
                    total = total - p[i, j] * F.logsigmoid(sigma * (s[i] - s[j]))
                    count += float(p[i, j])
        sums.append(total)
        counts.append(count)
    return reduce(sums, counts, reduction)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=20)
@given(
    Q=st.integers(1, 3),
    n=st.integers(1, 7),
    holes=st.booleans(),
    k=st.sampled_from([None, 1, 3]),
    sigma=st.sampled_from([1.0, 2.5]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    judged=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 999),
)
def test_pairs_with_targets(backend, Q, n, holes, k, sigma, reduction, judged, seed):
    """Not every pair has been judged; the diagonal and the padding are not read."""
    scores, _, mask = drawn(seed, Q, n, holes)
    g = torch.Generator().manual_seed(seed)
    p = torch.rand(Q, n, n, generator=g, dtype=torch.float64).triu(1)
    known = (torch.rand(Q, n, n, generator=g) < judged).triu(1)
    soft = (p + (1 - p).triu(1).mT).where(known | known.mT, 0)
    unread = torch.eye(n, dtype=torch.bool) | ~(mask[:, :, None] & mask[:, None, :])
    given_soft = soft.masked_fill(unread, math.nan)

    def ours(s):
        options = {"sigma": sigma, "k": k, "reduction": reduction, "reduction_log": "natural", "backend": backend}
        return fusedloss.rank_net(s, soft=given_soft, mask=mask, **options)

    same(ours, lambda s: soft_formula(s, soft, mask, sigma, k, reduction), [scores])


def test_many_documents_are_visited_in_blocks():
    """More than one block of pairs, and of queries."""
    scores, _, mask = drawn(0, 3, 300, True)
    p = torch.rand(3, 300, 300, dtype=torch.float64).triu(1)
    soft = p + (1 - p).triu(1).mT
    by = [
        testing.value_and_gradients(lambda s, b=b: fusedloss.rank_net(s, soft=soft, mask=mask, backend=b), [scores])
        for b in BACKENDS
    ]
    for one, other in zip(*by, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_certain_targets_are_rank_net():
    scores, labels, mask = drawn(1, 4, 9, True)
    certain = (labels[:, :, None] > labels[:, None, :]).double()
    found, wanted = (
        testing.value_and_gradients(lambda s, o=o: fusedloss.rank_net(s, mask=mask, **o), [scores])
        for o in ({"soft": certain}, {"labels": labels})
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_scores(dtype):
    scores, soft = torch.randn(4, 20).to(dtype), torch.rand(4, 20, 20)
    soft = soft.triu(1) + (1 - soft).triu(1).mT
    found = testing.value_and_gradients(lambda s: fusedloss.rank_net(s, soft=soft, backend="chunked"), [scores])
    wanted = testing.value_and_gradients(
        lambda s: fusedloss.rank_net(s, soft=soft.double(), backend="reference"), [scores.double()]
    )
    near = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=near, atol=near * wanted[1].abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_is_kept(backend):
    scores, soft = torch.randn(2, 3), torch.rand(2, 3, 3)
    soft[0, 0, 1] = math.nan
    rows = fusedloss.rank_net(scores, soft=soft, reduction="none", backend=backend)
    assert rows[0].isnan() and rows[1].isfinite()


# Reference scores -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ragged", [False, True])
def test_a_reference_is_direct_preference_optimisation(backend, ragged):
    """-log sigmoid(beta ((s_i - s_j) - (r_i - r_j))) over the pairs with label_i > label_j."""
    scores, labels, _ = drawn(2, 5, 6, False)
    reference = torch.randn(5, 6, dtype=torch.float64)
    q, i, j = (labels[:, :, None] > labels[:, None, :]).nonzero().T
    assert len(q)

    def ours(s):
        lists = [list(x.unbind()) for x in (s, labels, reference)] if ragged else (s, labels, reference)
        options = {"reference": lists[2], "sigma": 0.3, "reduction_log": "natural", "backend": backend}
        return fusedloss.rank_net(lists[0], lists[1], **options)

    def formula(s):
        margin = reference[q, i] - reference[q, j]
        return F.softplus(-0.3 * (s[q, i] - s[q, j] - margin)).mean()

    same(ours, formula, [scores])


# InfoNCE and circle loss ----------------------------------------------------------------------------------------------


def nce_formula(scores, labels, mask, temperature, positives, reduction):
    sums, counts = [], []
    for s, y, real in zip(scores, labels, mask, strict=True):
        z, y = s[real] / temperature, y[real] > 0
        total = z.sum() * 0
        if y.any() and positives == "joint":
            total = z.logsumexp(0) - z[y].logsumexp(0)
        elif y.any():
            total = torch.stack([torch.cat([z[~y], p[None]]).logsumexp(0) - p for p in z[y]]).mean()
        sums.append(total)
        counts.append(bool(y.any()))
    return reduce(sums, counts, reduction)


@settings(deadline=None, max_examples=30)
@given(
    Q=st.integers(1, 5),
    n=st.integers(1, 6),
    holes=st.booleans(),
    positives=st.sampled_from(["each", "joint"]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 999),
)
def test_info_nce_of_lists(Q, n, holes, positives, reduction, seed):
    scores, labels, mask = drawn(seed, Q, n, holes)
    temperature = torch.tensor(0.7, dtype=torch.float64)

    def ours(s, t):
        options = {"positives": positives, "reduction": reduction}
        return fusedloss.list_info_nce(s, labels, mask=mask, temperature=t, **options)

    same(ours, lambda s, t: nce_formula(s, labels, mask, t, positives, reduction), [scores, temperature])


def circle_formula(scores, labels, mask, m, gamma, reduction):
    sums, counts = [], []
    for s, y, real in zip(scores, labels, mask, strict=True):
        s, y = s[real], y[real] > 0
        p, n = s[y], s[~y]
        total = s.sum() * 0
        both = bool(y.any() and (~y).any())
        if both:
            pull = (-gamma * torch.relu(1 + m - p.detach()) * (p - 1 + m)).exp().sum()
            push = (gamma * torch.relu(n.detach() + m) * (n - m)).exp().sum()
            total = torch.log(1 + push * pull)
        sums.append(total)
        counts.append(both)
    return reduce(sums, counts, reduction)


@settings(deadline=None, max_examples=30)
@given(
    Q=st.integers(1, 5),
    n=st.integers(1, 6),
    holes=st.booleans(),
    gamma=st.sampled_from([2.0, 16.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 999),
)
def test_circle_of_lists(Q, n, holes, gamma, reduction, seed):
    scores, labels, mask = drawn(seed, Q, n, holes)
    ours = lambda s: fusedloss.list_circle(s, labels, mask=mask, m=0.3, gamma=gamma, reduction=reduction)
    same(ours, lambda s: circle_formula(s, labels, mask, 0.3, gamma, reduction), [scores.tanh()])


def test_second_derivatives_of_circle_hold_its_factors_fixed():
    scores, labels, mask = drawn(3, 2, 5, False)
    ours = lambda s: fusedloss.list_circle(s, labels, m=0.3, gamma=4.0)
    formula = lambda s: circle_formula(s, labels, mask, 0.3, 4.0, "mean")
    found, wanted = (torch.autograd.functional.hessian(f, scores.tanh()) for f in (ours, formula))
    assert wanted.abs().max() > 0.01
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("loss", [fusedloss.list_info_nce, fusedloss.list_circle])
def test_lists_of_all_lengths_and_labels_that_are_no_numbers(loss):
    scores = [torch.randn(n, dtype=torch.float64) for n in (3, 0, 5)]
    labels = [torch.tensor([1, 0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([0, 1, 1, 0, 0])]
    rows = loss(scores, labels, reduction="none")
    alone = [loss(s[None], y[None]) for s, y in zip(scores, labels, strict=True)]
    torch.testing.assert_close(rows, torch.stack(alone))
    assert rows[1] == 0
    wrong = torch.tensor([[0.0, math.nan, 1.0], [0.0, 1.0, 0.0]])
    rows = loss(torch.randn(2, 3), wrong, reduction="none")
    assert rows[0].isnan() and rows[1].isfinite()


@pytest.mark.parametrize("loss", [fusedloss.list_info_nce, fusedloss.list_circle])
@pytest.mark.parametrize("where", ["scores", "labels"])
def test_nan_is_not_swallowed_where_no_document_is_relevant(loss, where):
    scores, labels = torch.randn(2, 3, requires_grad=True), torch.zeros(2, 3)
    with torch.no_grad():
        (scores if where == "scores" else labels)[0, 2] = math.nan
    rows = loss(scores, labels, reduction="none")
    assert rows[0].isnan() and rows[1] == 0 and loss(scores, labels).isnan()
    (gradient,) = torch.autograd.grad(rows.sum(), scores)
    assert gradient[0].isnan().any() and gradient[1].eq(0).all()
    mask = torch.tensor([[True, True, False]] * 2)
    assert loss(scores, labels, mask=mask) == 0


def test_a_well_fitted_list_keeps_its_digits():
    """Loss e^-60, where log_softmax in fp32 gives 0."""
    scores, labels = torch.tensor([[60.0, 0.0, -5.0]]), torch.tensor([[1, 0, 0]])
    for positives in ("each", "joint"):
        found = fusedloss.list_info_nce(scores, labels, positives=positives)
        wanted = math.exp(-60) + math.exp(-65)
        torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-5, atol=0)


# Errors ---------------------------------------------------------------------------------------------------------------

SCORES, LABELS, SOFT = torch.zeros(2, 3), torch.zeros(2, 3), torch.full((2, 3, 3), 0.5)


@pytest.mark.parametrize(
    "call, error, said",
    [
        (lambda: fusedloss.rank_net(SCORES), ValueError, "labels must be given, or soft in their place, got neither"),
        (lambda: fusedloss.rank_net(SCORES, LABELS, soft=SOFT), ValueError, "labels must be given.* got both"),
        (lambda: fusedloss.rank_net(SCORES, soft=SOFT[0]), ValueError, r"soft must have shape \[2, 3, 3\]"),
        (lambda: fusedloss.rank_net(SCORES, soft=SOFT.long()), TypeError, "soft must be a floating tensor"),
        (
            lambda: fusedloss.rank_net(SCORES, soft=2 * SOFT + 1),
            ValueError,
            "soft must hold numbers from 0 to 1, got 2",
        ),
        (
            lambda: fusedloss.rank_net([SCORES[0]], soft=SOFT),
            TypeError,
            "scores must be a tensor .* with soft, got a list",
        ),
        (
            lambda: fusedloss.rank_net(SCORES, LABELS, reference=SCORES[:1]),
            ValueError,
            r"reference must have shape \[2, 3\], like scores, got \[1, 3\]",
        ),
        (
            lambda: fusedloss.rank_net(SCORES, soft=SOFT, backend="triton"),
            fusedloss.UnsupportedError,
            "no kernel reads a target for each pair",
        ),
        (
            lambda: fusedloss.list_info_nce(SCORES, LABELS, positives="all"),
            ValueError,
            "positives must be one of 'each', 'joint', got 'all'",
        ),
        (
            lambda: fusedloss.list_info_nce(SCORES, LABELS, temperature=0.0),
            ValueError,
            "temperature must be a positive number",
        ),
        (lambda: fusedloss.list_circle(SCORES, LABELS, gamma=-1.0), ValueError, "gamma must be a positive number"),
    ],
)
def test_errors(call, error, said):
    with pytest.raises(error, match=said):
        call()
