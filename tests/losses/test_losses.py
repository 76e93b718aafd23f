"""What each loss means: equality with its textbook formula, the contracts of its options, and its edge cases.

The formulas here are written out in fp64 with torch's own cross_entropy, independently of the package's epilogue.
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from condition import of_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import fusedloss
from fusedloss import testing
from fusedloss.core import checks
from fusedloss.losses import _module

BACKENDS = ["dense", "chunked", "reference"]


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def close(found, wanted, rtol=1e-11):
    torch.testing.assert_close(found, torch.as_tensor(wanted).to(found), rtol=rtol, atol=1e-13)


# InfoNCE --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("with_options", [False, True])
def test_info_nce_is_cross_entropy(backend, reduction, label_smoothing, normalize, with_options):
    query, key, temperature = randn(13, 6), randn(17, 6), 0.4
    target = torch.randint(0, 17, (13,))
    target[4] = -100
    weight, bias = torch.rand(13, dtype=torch.float64), randn(17)
    options = {"target": target, "weight": weight, "key_bias": bias} if with_options else {}

    def ours(q, k):
        return fusedloss.info_nce(
            q,
            k,
            temperature=temperature,
            label_smoothing=label_smoothing,
            normalize=normalize,
            reduction=reduction,
            backend=backend,
            **options,
        )

    def formula(q, k):
        if normalize:
            q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
        z = q @ k.T / temperature + options.get("key_bias", 0)
        rows = F.cross_entropy(
            z, options.get("target", torch.arange(13)), label_smoothing=label_smoothing, reduction="none"
        )
        w = weight * (target != -100) if with_options else torch.ones(13, dtype=torch.float64)
        return {"none": w * rows, "sum": (w * rows).sum(), "mean": (w * rows).sum() / w.sum()}[reduction]

    upstream = torch.rand(13, dtype=torch.float64) if reduction == "none" else torch.tensor(1.7, dtype=torch.float64)
    found, wanted = (
        testing.value_and_gradients(lambda *t, f=f: (f(*t) * upstream).sum(), [query, key]) for f in (ours, formula)
    )
    for a, b in zip(found, wanted, strict=True):
        close(a, b)
    close(ours(query, key), formula(query, key))


@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_infinity_removes_a_key_and_the_rows_whose_target_it_is(backend):
    query, key = randn(5, 4).requires_grad_(), randn(6, 4).requires_grad_()
    bias = torch.zeros(6, dtype=torch.float64)
    bias[2] = -math.inf
    rows = fusedloss.info_nce(query, key, key_bias=bias, reduction="none", label_smoothing=0.1, backend=backend)
    assert rows[2] == 0
    mean = fusedloss.info_nce(query, key, key_bias=bias, label_smoothing=0.1, backend=backend)
    close(mean, rows.sum() / 4)
    mean.backward()
    assert query.grad[2].abs().max() == 0 and key.grad[2].abs().max() == 0
    kept = torch.tensor([0, 1, 3, 4])
    keys = torch.cat([key[:2], key[3:]])
    close(mean, fusedloss.info_nce(query[kept], keys, torch.tensor([0, 1, 2, 3]), label_smoothing=0.1, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_left_out_rows(backend):
    query, key = randn(3, 4).requires_grad_(), randn(3, 4).requires_grad_()
    target = torch.tensor([7, 7, 7])
    loss = fusedloss.info_nce(query, key, target, ignore_index=7, backend=backend)
    assert loss == 0  # a zero denominator gives 0
    loss.backward()
    assert query.grad.abs().max() == 0 and key.grad.abs().max() == 0
    rows = fusedloss.info_nce(query, key, torch.tensor([0, 7, 1]), ignore_index=7, reduction="none", backend=backend)
    assert rows[1] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_column_is_exactly_zero(backend):
    for scale in (1.0, 1e4):
        query, key = (scale * randn(1, 4)).requires_grad_(), (scale * randn(1, 4)).requires_grad_()
        loss = fusedloss.info_nce(query, key, backend=backend)
        loss.backward()
        assert loss == 0 and query.grad.abs().max() == 0 and key.grad.abs().max() == 0
        rows = fusedloss.clip(query, key, 100.0, reduction="none", backend=backend)
        assert rows == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    query, key = randn(0, 4).requires_grad_(), randn(5, 4).requires_grad_()
    loss = fusedloss.info_nce(query, key, backend=backend)
    loss.backward()
    assert loss == 0 and query.grad.shape == (0, 4) and key.grad.abs().max() == 0
    assert fusedloss.clip(query, key[:0], 2.0, backend=backend) == 0
    assert fusedloss.multiple_negatives_ranking(query, key[:0], key, backend=backend) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_row_stays_finite_under_normalize(backend):
    query, key = randn(4, 3), randn(4, 3)
    query[1], key[2] = 0, 0
    found = testing.value_and_gradients(
        lambda q, k: fusedloss.info_nce(q, k, normalize=True, backend=backend), [query, key]
    )
    wanted = testing.value_and_gradients(lambda q, k: testing.eager_info_nce(q, k, normalize=True), [query, key])
    assert all(torch.isfinite(t).all() for t in found)
    close(found[0], wanted[0])


ALL = ["dense", "chunked", "reference", "triton", "cuda"]


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("how", ["ignored", "weight 0", "no key"])
def test_where_no_row_counts_the_loss_and_all_gradients_are_zero(backend, dtype, normalize, label_smoothing, how):
    leaves = [randn(3, 8).to(dtype).requires_grad_(), randn(4, 8).to(dtype).requires_grad_()]
    options = {
        "ignored": {"target": torch.full((3,), -100)},
        "weight 0": {"weight": torch.zeros(3)},
        "no key": {"key_bias": torch.full((4,), -math.inf)},
    }[how]
    loss = fusedloss.info_nce(*leaves, normalize=normalize, label_smoothing=label_smoothing, backend=backend, **options)
    assert loss == 0
    loss.backward()
    assert all((leaf.grad == 0).all() for leaf in leaves)


@pytest.mark.parametrize("backend", ALL)
def test_a_zero_row_in_fp16_leaves_the_other_gradients_their_digits(backend):
    """Its 1/norm of 1e12 would take all the room that an fp16 workspace has."""
    query, key = randn(6, 8).half(), randn(7, 8).half()
    key[-1] = 0
    step = lambda q, k: fusedloss.info_nce(q, k, normalize=True, backend=backend)
    found = testing.value_and_gradients(step, [query, key])
    wanted = testing.value_and_gradients(
        lambda q, k: fusedloss.info_nce(q, k, normalize=True), [query.double(), key.double()]
    )
    for a, b in [(found[1], wanted[1]), (found[2][:-1], wanted[2][:-1])]:
        assert (a.double() - b).norm() < 2e-3 * b.norm()


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_zero_row_has_the_gradient_of_the_formula_in_every_dtype(dtype, backend):
    """As F.normalize's: by the unit row, over 1e-12. With a scale of 1e-9 that is a number in fp16, too."""
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bit patterns of bfloat16")
    query, key = randn(6, 8).to(dtype), randn(7, 8).to(dtype)
    query[1], key[-1] = 0, 0
    step = lambda q, k, b: 1e-9 * fusedloss.info_nce(q, k, temperature=1.0, normalize=True, backend=b)
    found = testing.value_and_gradients(lambda *t: step(*t, backend), [query, key])
    formula = lambda q, k: 1e-9 * testing.eager_info_nce(q, k, 1.0, normalize=True)
    exact = testing.value_and_gradients(formula, [query.double(), key.double()])
    assert exact[1][1].norm() > 1 and exact[2][-1].norm() > 1
    for a, b, zero in [(found[1], exact[1], 1), (found[2], exact[2], -1)]:
        assert (a[zero].double() - b[zero]).norm() <= 2 * torch.finfo(dtype).eps * b[zero].norm()


@pytest.mark.parametrize("backend", ALL)
def test_a_zero_sum_of_weights_gives_zero(backend):
    query, key = randn(3, 4).float().requires_grad_(), randn(3, 4).float()
    loss = fusedloss.info_nce(query, key, weight=torch.tensor([1.0, -1.0, 0.0]), backend=backend)
    assert loss == 0
    loss.backward()
    assert (query.grad == 0).all()


@pytest.mark.parametrize("backend", ALL)
def test_an_infinite_target_logit_gives_nan_as_in_torch(backend):
    """inf - inf. A loss of 0 would make training that has diverged look perfect."""
    x = torch.eye(3) * 1e20
    assert math.isnan(F.cross_entropy(x @ x, torch.arange(3)))
    leaf = x.clone().requires_grad_()
    loss = fusedloss.info_nce(leaf, x.clone(), temperature=1.0, backend=backend)
    assert math.isnan(loss.detach())
    loss.backward()
    assert leaf.grad.isnan().any()
    assert math.isnan(fusedloss.clip(x, x.clone(), 1.0, backend=backend))
    bias = torch.tensor([0.0, math.inf, 0.0])
    rows = fusedloss.info_nce(torch.eye(3), torch.eye(3), key_bias=bias, reduction="none", backend=backend)
    assert rows.isnan()[1]


@pytest.mark.parametrize("backend", ALL)
def test_a_removed_key_may_hold_anything(backend):
    query, key = randn(4, 3).float(), randn(5, 3).float()
    bias = torch.tensor([0.0, 0.3, 0.0, 0.0, -math.inf])
    wanted = fusedloss.info_nce(query, key[:4], key_bias=bias[:4], backend=backend)
    near = of_logits(query @ key[:4].T / 0.05 + bias[:4])
    for bad in (math.nan, math.inf):
        key[4] = bad
        found = fusedloss.info_nce(query, key, key_bias=bias, backend=backend)
        torch.testing.assert_close(found, wanted, rtol=0, atol=near)


@pytest.mark.parametrize("backend", ALL)
def test_label_smoothing_of_pairs_far_better_than_their_negatives(backend):
    """Their logit 100 above the others: l stays finite, and with it the smoothed entry."""
    query, key = (x.float() for x in pairs(16, 32, 0.0))
    step = lambda q, k: fusedloss.info_nce(q, k, temperature=0.01, label_smoothing=0.1, normalize=True, backend=backend)
    found = testing.value_and_gradients(step, [query, key])
    doubles = [query.double(), key.double()]

    def formula(q, k):
        logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / 0.01
        return F.cross_entropy(logits, torch.arange(len(q)), label_smoothing=0.1)

    wanted = testing.value_and_gradients(formula, doubles)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logit_that_is_not_finite_gives_what_torch_gives(backend, bad):
    query, key = torch.rand(4, 3) + 0.1, torch.rand(4, 3) + 0.1
    key[2, 1] = bad
    loss = fusedloss.info_nce(query, key, backend=backend)
    assert math.isnan(loss) and math.isnan(testing.eager_info_nce(query, key))


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_and_bias_take_any_floating_dtype(backend):
    query, key = randn(4, 3).float(), randn(4, 3).float()
    half = fusedloss.info_nce(
        query, key, weight=torch.ones(4).half(), key_bias=torch.ones(4).bfloat16(), backend=backend
    )
    torch.testing.assert_close(half, fusedloss.info_nce(query, key), rtol=0, atol=of_logits(query @ key.T / 0.05))
    assert half.dtype == torch.float32
    double = fusedloss.info_nce(query, key, key_bias=torch.ones(4, dtype=torch.float64), backend=backend)
    assert double.dtype == torch.float32
    bias = torch.zeros((), dtype=torch.float64)
    assert fusedloss.clip(query, key, 2.0, bias, backend=backend).dtype == torch.float32


# CLIP -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_clip_is_both_cross_entropies(backend, reduction):
    image, text, scale = randn(11, 5), randn(11, 5), torch.tensor(2.5, dtype=torch.float64)
    upstream = torch.rand(11, dtype=torch.float64) if reduction == "none" else 1.3

    def formula(i, t, s):
        z, target = s * i @ t.T, torch.arange(11)
        rows, columns = (F.cross_entropy(x, target, reduction=reduction) for x in (z, z.T))
        return (rows + columns) / 2

    def ours(i, t, s):
        return fusedloss.clip(i, t, s, reduction=reduction, backend=backend)

    found, wanted = (
        testing.value_and_gradients(lambda *a, f=f: (f(*a) * upstream).sum(), [image, text, scale])
        for f in (ours, formula)
    )
    for a, b in zip(found, wanted, strict=True):
        close(a, b)


def test_clip_bias_cancels_and_gets_its_gradient():
    bias = torch.tensor([0.7], requires_grad=True)
    image, text = randn(4, 3).float(), randn(4, 3).float()
    loss = fusedloss.clip(image, text, 10.0, bias)
    loss.backward()
    assert loss.dim() == 0 and bias.grad == 0
    close(loss.detach(), fusedloss.clip(image, text, 10.0), rtol=0)


# Multiple negatives ranking -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("similarity", ["cos", "dot"])
@pytest.mark.parametrize("columns", [0, 1, 3])
def test_ranking_is_cross_entropy_over_all_documents(backend, similarity, columns):
    anchor, positive = randn(7, 5), randn(7, 5)
    negatives = [randn(7 + 2 * i, 5) for i in range(columns)]
    scale = torch.tensor(3.0, dtype=torch.float64)

    def formula(a, p, *rest):
        *n, s = rest
        documents = torch.cat([p, *n])
        if similarity == "cos":
            a, documents = F.normalize(a, dim=1), F.normalize(documents, dim=1)
        return F.cross_entropy(s * a @ documents.T, torch.arange(7))

    def ours(a, p, *rest):
        *n, s = rest
        return fusedloss.multiple_negatives_ranking(a, p, *n, scale=s, similarity=similarity, backend=backend)

    found, wanted = (testing.value_and_gradients(f, [anchor, positive, *negatives, scale]) for f in (ours, formula))
    for a, b in zip(found, wanted, strict=True):
        close(a, b)


@pytest.mark.parametrize("backend", ALL)
def test_ranking_with_a_column_of_no_negatives(backend):
    leaves = [randn(4, 5).float(), randn(4, 5).float()]
    rank = lambda q, k, *more: fusedloss.multiple_negatives_ranking(q, k, *more, backend=backend)
    found = testing.value_and_gradients(lambda q, k: rank(q, k, k[:0]), leaves)
    for a, b in zip(found, testing.value_and_gradients(rank, leaves), strict=True):
        close(a, b, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor_in_several_places_gets_the_whole_gradient(backend):
    x = randn(6, 4)

    def ours(a):
        return fusedloss.multiple_negatives_ranking(a, a, a, backend=backend)

    def formula(a):
        return testing.eager_multiple_negatives_ranking(a, a, a)

    for a, b in zip(testing.value_and_gradients(ours, [x]), testing.value_and_gradients(formula, [x]), strict=True):
        close(a, b)


# Accuracy -------------------------------------------------------------------------------------------------------------


def pairs(rows, dim, noise):
    query = F.normalize(randn(rows, dim), dim=1)
    return query, F.normalize(query + noise * randn(rows, dim) / math.sqrt(dim), dim=1)


TORTURE = {
    # Losses around 1e-26; from 1e-36 on the gradient itself would leave fp32.
    "separated pairs at scale 100": lambda: (*pairs(256, 384, 0.7), 0.01),
    "temperature 1e-3": lambda: (randn(256, 384) / 20, randn(300, 384) / 20, 1e-3),
    "rows of norm 1e4": lambda: (randn(256, 384) * 510, randn(300, 384) * 510, 0.05),
    "D = 1": lambda: (randn(300, 1), randn(333, 1), 0.05),
    "D = 4097": lambda: (*pairs(96, 4097, 0.5), 0.05),
    "M = 1, N = 70001": lambda: (randn(1, 64), randn(70001, 64), 0.5),
}


@pytest.mark.parametrize("case", list(TORTURE))
def test_torture_in_fp32(case):
    # In one dimension each error is that of a logit or two, and a draw may find eager exact: the worst of four.
    draws = [tortured(case) for _ in range(4 if case == "D = 1" else 1)]
    for number, name in enumerate(("loss", "dquery", "dkey")):
        out, base, exact = (torch.stack([draw[side][number] for draw in draws]) for side in range(3))
        share = testing.budget_share(out, base, exact, torch.float32)
        assert share <= 1, f"{name}: {share:.2f} of the budget"


def tortured(case):
    """Values and gradients of ours, of eager, and in fp64; ours inside the bounds that need no eager."""
    query, key, temperature = TORTURE[case]()
    tensors = [query.float(), key.float(), torch.tensor(temperature)]
    found = testing.value_and_gradients(lambda q, k, t: fusedloss.info_nce(q, k, temperature=t), tensors)
    eager = testing.value_and_gradients(testing.eager_info_nce, tensors)
    doubles = [t.double() for t in tensors]
    oracle = testing.value_and_gradients(
        lambda q, k, t: fusedloss.info_nce(q, k, temperature=t, backend="reference"), doubles
    )
    assert all(torch.isfinite(t).all() for t in found)

    query, key, temperature = doubles
    sim = query @ key.T
    largest = max(1, (sim / temperature).abs().max().item())
    eps = torch.finfo(torch.float32).eps
    for name, out, exact in zip(("dquery", "dkey"), found[1:], oracle[1:], strict=False):
        norm = exact.norm(dim=1)
        # Exponentials under 2**-100 of a row's largest are 0 by design, and elements under 1e-38 lose bits: gradient
        # rows made of nothing else are left aside.
        counts = (norm > 2.0**-90 * norm.max()) & (norm > 1e-35)
        if not counts.any():
            continue
        # No bound may exceed what a gradient of 0 would pass with: 1.
        error = ((out.double() - exact).norm(dim=1) / norm)[counts].max()
        assert error < 0.5, f"{name}: {error:.2f} of its row"
        assert error <= 64 * eps * largest, f"{name}: {error / (64 * eps * largest):.2f} of the row bound"

    p = (sim / temperature).softmax(dim=1)
    row_bounds = (p * (sim - sim.diagonal()[:, None])).abs().sum() / len(query)
    assert (found[3].double() - oracle[3]).abs() <= 1e-5 * row_bounds / temperature**2
    return found, eager, oracle


@pytest.mark.parametrize("temperature", [1e-10, 1e-20])
@pytest.mark.parametrize("rows, normalize", [(1, False), (1, True), (5, False), (5, True)])
def test_a_row_without_negatives_at_any_temperature(rows, normalize, temperature):
    """Its logit and what fp32 keeps of it are more apart than exp can take."""
    query, key = (torch.randn(rows, 8, requires_grad=True) for _ in range(2))
    options = {"temperature": temperature, "normalize": normalize, "mask": torch.zeros(rows, rows, dtype=torch.bool)}
    for more in (options, {**options, "workspace_bytes": 4096}):
        loss = fusedloss.info_nce(query, key, reduction="none", backend="chunked", **more)
        assert all((x == 0).all() for x in (loss, *torch.autograd.grad(loss.sum(), [query, key])))
    with torch.no_grad():
        query[0] = math.nan
    loss = fusedloss.info_nce(query, key, reduction="none", backend="chunked", **options)
    by_query, _ = torch.autograd.grad(loss.sum(), [query, key])
    assert loss[0].isnan() and by_query[0].isnan().all() and (loss[1:] == 0).all() and (by_query[1:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [20, 40, 60, 69, 75])
def test_the_loss_of_well_fitted_pairs_down_to_1e_30(backend, scale):
    """Orthonormal pairs: the loss is log1p((N - 1) exp(-scale)), 1e-7 to 2e-31; eager fp32 gives 0 from 17 on."""
    x = torch.eye(64)
    loss = fusedloss.info_nce(x, x.clone(), temperature=1 / scale, backend=backend)
    assert loss.item() == pytest.approx(math.log1p(63 * math.exp(-scale)), rel=1e-3)


# Properties -----------------------------------------------------------------------------------------------------------

sizes = st.integers(1, 24)


@st.composite
def batches(draw):
    rows, extra, dim, seed = draw(sizes), draw(st.integers(0, 9)), draw(st.integers(1, 9)), draw(st.integers(0, 999))
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, dim, dtype=torch.float64, generator=generator) for n in (rows, rows + extra))


@settings(deadline=None, max_examples=30)
@given(batches(), st.floats(0.05, 5), st.booleans())
def test_property_permuting_keys_permutes_the_target(batch, temperature, normalize):
    query, key = batch
    order = torch.randperm(len(key))
    target = torch.argsort(order)[: len(query)]
    a = fusedloss.info_nce(query, key, temperature=temperature, normalize=normalize)
    b = fusedloss.info_nce(query, key[order], target, temperature=temperature, normalize=normalize)
    close(a, b)


@settings(deadline=None, max_examples=30)
@given(batches(), st.floats(-50, 50))
def test_property_a_constant_bias_changes_nothing(batch, shift):
    query, key = batch
    bias = torch.full((len(key),), shift, dtype=torch.float64)
    close(fusedloss.info_nce(query, key, key_bias=bias), fusedloss.info_nce(query, key), rtol=1e-9)


@settings(deadline=None, max_examples=30)
@given(batches(), st.floats(0.05, 5))
def test_property_never_negative_and_monotone_in_the_keys(batch, temperature):
    query, key = batch
    rows = fusedloss.info_nce(query, key, temperature=temperature, reduction="none")
    fewer = fusedloss.info_nce(query, key[: len(query)], temperature=temperature, reduction="none")
    assert (rows >= 0).all() and (fewer <= rows + 1e-12).all()


@settings(deadline=None, max_examples=30)
@given(batches(), st.floats(0.1, 5))
def test_property_scale_gradient_is_the_inner_product_with_the_query_gradient(batch, scale):
    """Scaling all queries is scaling the logits: scale * dscale = <query, dquery>."""
    query, key = batch
    s = torch.tensor(scale, dtype=torch.float64)
    _, dquery, _, dscale = testing.value_and_gradients(
        lambda q, k, s: fusedloss.info_nce(q, k, temperature=1 / s), [query, key, s]
    )
    close(s * dscale, (query * dquery).sum(), rtol=1e-8)


@settings(deadline=None, max_examples=30)
@given(batches())
def test_property_clip_is_symmetric_and_the_mean_of_two_info_nce(batch):
    image, text = batch[0], batch[1][: len(batch[0])]
    both = fusedloss.clip(image, text, 2.0)
    close(both, fusedloss.clip(text, image, 2.0))
    one, other = (fusedloss.info_nce(a, b, temperature=0.5) for a, b in ((image, text), (text, image)))
    close(both, (one + other) / 2)


@settings(deadline=None, max_examples=30)
@given(batches(), st.integers(1, 8))
def test_property_splitting_the_keys_into_blocks_changes_nothing(batch, cut):
    query, key = batch
    cut = min(len(query) + cut, len(key))
    whole = fusedloss.info_nce(query, key, temperature=1 / 20, normalize=True)
    blocks = [key[:cut]] + ([key[cut:]] if cut < len(key) else [])
    close(fusedloss.multiple_negatives_ranking(query, *blocks), whole)


# Modules --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(_module.MODEL | _module.CROSS_ENCODER))
def test_a_loss_of_embeddings_says_which_takes_a_model(name):
    part = ".cross_encoder" if name in _module.CROSS_ENCODER else ""
    told = f"got the nn.Module Linear; fusedloss.integrations.sentence_transformers{part}.{name} takes a model"
    with pytest.raises(TypeError, match=told):
        getattr(fusedloss, name)(torch.nn.Linear(2, 2))


def test_other_losses_say_where_there_are_some():
    with pytest.raises(TypeError, match=r"normalize must not be a model, got the nn\.Module Linear"):
        fusedloss.SigLipLoss(torch.nn.Linear(2, 2))


# Bad input ------------------------------------------------------------------------------------------------------------

GOOD = torch.ones(3, 4)
NUMBERS = [1e-45, 1e-320, 10**400, math.inf, 0]
WRONG_TYPES = ["0.1", None, True, [0.1]]
BAD = [
    (lambda: fusedloss.info_nce([1.0], GOOD), TypeError, "query must be a tensor .*got a list"),
    (
        lambda: fusedloss.info_nce(torch.nn.Linear(2, 2), GOOD),
        TypeError,
        "query must be a tensor of embeddings, got the nn.Module Linear",
    ),
    (lambda: fusedloss.info_nce(GOOD.long(), GOOD), TypeError, "query must be float16.*, got torch.int64"),
    (
        lambda: fusedloss.info_nce(GOOD.to_sparse(), GOOD),
        TypeError,
        "query must be a dense tensor, got layout torch.sparse_coo",
    ),
    (
        lambda: fusedloss.info_nce(GOOD[0], GOOD),
        ValueError,
        r"query must have two dimensions \[rows, D\], got shape \[4\]",
    ),
    (lambda: fusedloss.info_nce(GOOD, GOOD[:, :2]), ValueError, "key must have D = 4, like query, got D = 2"),
    (
        lambda: fusedloss.info_nce(GOOD[:, :0], GOOD[:, :0]),
        ValueError,
        "query must have at least one dimension D, got D = 0",
    ),
    (
        lambda: fusedloss.info_nce(GOOD, GOOD.double()),
        TypeError,
        "key must be torch.float32, like query, got torch.float64",
    ),
    (lambda: fusedloss.info_nce(GOOD, GOOD.to("meta")), ValueError, "key must be on cpu, like query, got meta"),
    (
        lambda: fusedloss.info_nce(GOOD, GOOD[:2]),
        ValueError,
        r"key must have at least 3 rows, one per row of query, for the default target arange\(3\), got 2",
    ),
    (lambda: fusedloss.info_nce(GOOD, GOOD[:0], torch.zeros(3).long()), (ValueError, IndexError), "key|target"),
    (
        lambda: fusedloss.info_nce(GOOD, GOOD, torch.tensor([0, 1])),
        ValueError,
        r"target must have shape \[3\], one index per row, got \[2\]",
    ),
    (
        lambda: fusedloss.info_nce(GOOD, GOOD, torch.ones(3)),
        TypeError,
        r"target must be an int64 tensor \[3\] of column indices, got torch.float32 \[3\]",
    ),
    (
        lambda: fusedloss.info_nce(GOOD, GOOD, torch.tensor([0, 3, 1])),
        IndexError,
        r"target\[1\] must be an index from 0 to 2, or -100 to leave the row out, got 3",
    ),
    (
        lambda: fusedloss.info_nce(GOOD, GOOD, torch.tensor([0, -1, 1])),
        IndexError,
        r"target\[1\] must be an index from 0 to 2, or -100 to leave the row out, got -1",
    ),
    (
        lambda: fusedloss.info_nce(GOOD, GOOD, temperature=0.0),
        ValueError,
        "temperature must be a positive number, got 0.0",
    ),
    (
        lambda: fusedloss.info_nce(GOOD, GOOD, temperature=math.nan),
        ValueError,
        "temperature must be a positive number, got nan",
    ),
    (
        lambda: fusedloss.info_nce(GOOD, GOOD, temperature="hot"),
        TypeError,
        "temperature must be a positive number or a tensor of one element, got 'hot', a str",
    ),
    (
        lambda: fusedloss.info_nce(GOOD, GOOD, temperature=torch.tensor(-1.0)),
        ValueError,
        "temperature must be a positive number, got -1.0",
    ),
    (
        lambda: fusedloss.info_nce(GOOD, GOOD, temperature=torch.ones(2)),
        ValueError,
        r"temperature must have one element, shape \[\] or \[1\], got shape \[2\]",
    ),
    (
        lambda: fusedloss.info_nce(GOOD, GOOD, temperature=torch.tensor(1)),
        TypeError,
        "temperature must be a floating tensor or a Python number, got torch.int64",
    ),
    (
        lambda: fusedloss.info_nce(GOOD, GOOD, key_bias=torch.ones(4)),
        ValueError,
        r"key_bias must have shape \[3\], one number per key, got \[4\]",
    ),
    (
        lambda: fusedloss.info_nce(GOOD, GOOD, key_bias=3.0),
        TypeError,
        r"key_bias must be a floating tensor \[3\], got 3.0, a float",
    ),
    (
        lambda: fusedloss.info_nce(GOOD, GOOD, weight=torch.ones(3, 1)),
        ValueError,
        r"weight must have shape \[3\], one number per query, got \[3, 1\]",
    ),
    (
        lambda: fusedloss.info_nce(GOOD, GOOD, label_smoothing=1.5),
        ValueError,
        "label_smoothing must be a number from 0 to 1, got 1.5",
    ),
    (
        lambda: fusedloss.info_nce(GOOD, GOOD, reduction="avg"),
        ValueError,
        "reduction must be one of 'mean'.*, got 'avg'",
    ),
    (
        lambda: fusedloss.info_nce(GOOD, GOOD, backend="tpu"),
        ValueError,
        "backend must be one of 'auto', 'cuda'.*, got 'tpu'",
    ),
    (
        lambda: fusedloss.info_nce(GOOD, GOOD, backend=["chunked"]),
        ValueError,
        r"backend must be one of 'auto', 'cuda', 'triton', 'chunked', 'dense', 'reference', got a list",
    ),
    *[
        (lambda t=t: fusedloss.info_nce(GOOD, GOOD, temperature=t), ValueError, "temperature must be .*, got")
        for t in NUMBERS
    ],
    *[
        (
            lambda t=t: fusedloss.info_nce(GOOD, GOOD, temperature=t),
            TypeError,
            "temperature must be a positive number or a tensor of one element, got",
        )
        for t in WRONG_TYPES
    ],
    *[
        (
            lambda t=t: fusedloss.info_nce(GOOD, GOOD, label_smoothing=t),
            TypeError,
            "label_smoothing must be a number from 0 to 1, got",
        )
        for t in WRONG_TYPES
    ],
    (
        lambda: fusedloss.info_nce(GOOD, GOOD, label_smoothing=torch.tensor(0.1)),
        TypeError,
        "label_smoothing must be a number from 0 to 1, got a Tensor",
    ),
    *[
        (
            lambda t=t: fusedloss.info_nce(GOOD, GOOD, ignore_index=t),
            TypeError,
            "ignore_index must be a whole number, got",
        )
        for t in [*WRONG_TYPES, 1.5]
    ],
    (
        lambda: fusedloss.info_nce(GOOD, GOOD, ignore_index=2**70),
        ValueError,
        "ignore_index must be a 64-bit integer, got 1180591620717411303424",
    ),
    (
        lambda: fusedloss.clip(GOOD, GOOD, 1e39),
        ValueError,
        r"logit_scale must be representable in torch.float32, as must its inverse, got 1e\+39",
    ),
    (
        lambda: fusedloss.info_nce(GOOD, GOOD, weight=torch.ones(3).to_sparse()),
        TypeError,
        "weight must be a dense tensor, got layout torch.sparse_coo",
    ),
    (
        lambda: fusedloss.info_nce(GOOD, GOOD, weight=torch.ones(3, device="meta")),
        ValueError,
        "weight must be on cpu, like the embeddings, got meta",
    ),
    (
        lambda: fusedloss.info_nce(GOOD, GOOD, key_bias=torch.ones(3, device="meta")),
        ValueError,
        "key_bias must be on cpu, like the embeddings, got meta",
    ),
    (
        lambda: fusedloss.info_nce(GOOD, GOOD, temperature=torch.ones((), device="meta")),
        ValueError,
        "temperature must be on cpu, like the embeddings, got meta",
    ),
    (
        lambda: fusedloss.info_nce(GOOD, GOOD, torch.arange(3, device="meta")),
        ValueError,
        "target must be on cpu, like the embeddings, got meta",
    ),
    (
        lambda: fusedloss.InfoNCELoss(reduction="x"),
        ValueError,
        "reduction must be one of 'mean', 'sum', 'none', got 'x'",
    ),
    (lambda: fusedloss.InfoNCELoss(temperature=-1.0), ValueError, "temperature must be a positive number, got -1.0"),
    (
        lambda: fusedloss.InfoNCELoss(label_smoothing=9),
        ValueError,
        "label_smoothing must be a number from 0 to 1, got 9",
    ),
    (
        lambda: fusedloss.ClipLoss(backend="x"),
        ValueError,
        "backend must be one of 'auto', 'cuda', 'triton', 'chunked', 'dense', 'reference', got 'x'",
    ),
    (
        lambda: fusedloss.MultipleNegativesRankingLoss(similarity="x"),
        ValueError,
        "similarity must be one of 'cos', 'dot', got 'x'",
    ),
    (lambda: fusedloss.info_nce(GOOD, GOOD, backend="cuda"), fusedloss.UnsupportedError, "chunked: can run it"),
    (
        lambda: fusedloss.clip(GOOD, GOOD[:2], 1.0),
        ValueError,
        "text_features must have 3 rows, one text per image of image_features, got 2",
    ),
    (lambda: fusedloss.clip(GOOD, GOOD, math.inf), ValueError, "logit_scale must be a finite number, got inf"),
    (
        lambda: fusedloss.clip(GOOD, GOOD, 1.0, "b"),
        TypeError,
        "logit_bias must be a finite number or a tensor of one element, got 'b', a str",
    ),
    (
        lambda: fusedloss.multiple_negatives_ranking(GOOD, GOOD[:2]),
        ValueError,
        "positive must have at least 3 rows, one per row of anchor, got 2",
    ),
    (
        lambda: fusedloss.multiple_negatives_ranking(GOOD, GOOD, GOOD[:, :3]),
        ValueError,
        r"negatives\[0\] must have D = 4, like anchor, got D = 3",
    ),
    (
        lambda: fusedloss.multiple_negatives_ranking(GOOD, GOOD, scale=-1),
        ValueError,
        "scale must be a positive number, got -1.0",
    ),
    (
        lambda: fusedloss.multiple_negatives_ranking(GOOD, GOOD, similarity="l2"),
        ValueError,
        "similarity must be one of 'cos', 'dot', got 'l2'",
    ),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input_names_the_argument_the_value_and_the_remedy(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_workspace_that_is_too_small_is_refused_in_the_forward(reduction, monkeypatch):
    query = GOOD.clone().requires_grad_()
    with pytest.raises(
        ValueError, match="workspace_bytes must be at least 64, the bytes of one row of 16 similarities, got 1"
    ):
        fusedloss.info_nce(query, GOOD, workspace_bytes=1, reduction=reduction)
    monkeypatch.setenv("FUSEDLOSS_WORKSPACE_BYTES", "1")
    with pytest.raises(ValueError, match="FUSEDLOSS_WORKSPACE_BYTES must be at least 64, the bytes of one row of"):
        fusedloss.info_nce(query, GOOD, reduction=reduction)


def test_a_bad_environment_variable_is_named(monkeypatch):
    monkeypatch.setenv("FUSEDLOSS_BACKEND", "nope")
    for loss in (fusedloss.info_nce, fusedloss.mse):
        with pytest.raises(ValueError, match=r"FUSEDLOSS_BACKEND must be auto, .*, got 'nope'; set one, or unset it"):
            loss(GOOD, GOOD)
    monkeypatch.setenv("FUSEDLOSS_BACKEND", "")
    assert fusedloss.info_nce(GOOD, GOOD) == fusedloss.info_nce(GOOD, GOOD, backend="auto")


def test_numbers_of_other_libraries_are_numbers():
    import numpy

    wanted = fusedloss.info_nce(GOOD, GOOD, temperature=0.25)
    for number in (numpy.float32(0.25), numpy.float64(0.25)):
        assert fusedloss.info_nce(GOOD, GOOD, temperature=number) == wanted
    assert fusedloss.clip(GOOD, GOOD, numpy.int64(4)) == fusedloss.clip(GOOD, GOOD, 4.0)


def test_modules_show_the_options_that_are_not_the_default():
    shown = {
        "InfoNCELoss(temperature=0.05)": fusedloss.InfoNCELoss(),
        "InfoNCELoss(temperature=0.1, label_smoothing=0.3, ignore_index=7, normalize=True, backend='reference')": (
            fusedloss.InfoNCELoss(0.1, 0.3, 7, True, backend="reference")
        ),
        "ClipLoss()": fusedloss.ClipLoss(),
        "ClipLoss(normalize=True, reduction='sum', workspace_bytes=5)": fusedloss.ClipLoss(
            True, "sum", workspace_bytes=5
        ),
        "MultipleNegativesRankingLoss(scale=5.0, similarity='dot', backend='chunked')": (
            fusedloss.MultipleNegativesRankingLoss(5.0, "dot", backend="chunked")
        ),
    }
    for text, module in shown.items():
        assert repr(module) == text


def test_an_out_of_range_target_is_nan_where_values_are_not_read(monkeypatch):
    """As on a GPU, or under torch.compile."""

    monkeypatch.setattr(checks, "reads_values", lambda x: False)
    query = GOOD.clone().requires_grad_()
    loss = fusedloss.info_nce(query, GOOD, torch.tensor([0, 3, 1]))
    loss.backward()
    assert math.isnan(loss.detach()) and query.grad.isnan().any()
    assert not math.isnan(fusedloss.info_nce(GOOD, GOOD, torch.tensor([0, -100, 1])))


def test_the_environment_variable_checks_values_on_any_device(monkeypatch):

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    elsewhere = torch.ones(1, device="meta")
    assert not checks.reads_values(elsewhere)
    monkeypatch.setenv("FUSEDLOSS_CHECK", "1")
    assert checks.reads_values(elsewhere)


# NaN in, NaN out ------------------------------------------------------------------------------------------------------


LABELS, GRADES, HALF = torch.arange(6) // 2, torch.arange(6.0), torch.arange(6) % 2
LIST = torch.tensor([2, 0, 1, 3])
# Every loss, of x [6, 4], which has the NaN, and y of the same shape.
OF_A_ROW = {
    "adaptive_layer": lambda x, y: fusedloss.adaptive_layer(fusedloss.info_nce, [x, x], [y, y]),
    "angle": lambda x, y, **o: fusedloss.angle(x, y, GRADES, **o),
    "arcface": lambda x, y, **o: fusedloss.arcface(x, LABELS, y, **o),
    "batch_all_triplet": lambda x, y, **o: fusedloss.batch_all_triplet(x, LABELS, **o),
    "batch_hard_soft_margin_triplet": lambda x, y, **o: fusedloss.batch_hard_soft_margin_triplet(x, LABELS, **o),
    "batch_hard_triplet": lambda x, y, **o: fusedloss.batch_hard_triplet(x, LABELS, **o),
    "batch_semi_hard_triplet": lambda x, y, **o: fusedloss.batch_semi_hard_triplet(x, LABELS, **o),
    "binary_cross_entropy_with_logits": lambda x, y, **o: fusedloss.binary_cross_entropy_with_logits(
        x, y.sigmoid(), **o
    ),
    "circle": lambda x, y, **o: fusedloss.circle(x, LABELS, **o),
    "clip": lambda x, y, **o: fusedloss.clip(x, y, 2.0, **o),
    "clip_distill": lambda x, y, **o: fusedloss.clip_distill(x, y, 2.0, y, y, 3.0, **o),
    "contrastive": lambda x, y, **o: fusedloss.contrastive(x, y, HALF, **o),
    "contrastive_tension": lambda x, y, **o: fusedloss.contrastive_tension(x, y, HALF, **o),
    "contrastive_tension_in_batch": lambda x, y, **o: fusedloss.contrastive_tension_in_batch(x, y, **o),
    "cosent": lambda x, y, **o: fusedloss.cosent(x, y, GRADES, **o),
    "cosface": lambda x, y, **o: fusedloss.cosface(x, LABELS, y, **o),
    "cosine_similarity": lambda x, y, **o: fusedloss.cosine_similarity(x, y, GRADES, **o),
    "cross_entropy": lambda x, y, **o: fusedloss.cross_entropy(x, LABELS, **o),
    "decoupled_contrastive": lambda x, y, **o: fusedloss.decoupled_contrastive(x, y, **o),
    "distill_kl_div": lambda x, y, **o: fusedloss.distill_kl_div(x, y, y + 1, label=y[:, :2], **o),
    "embed_distill": lambda x, y, **o: fusedloss.embed_distill(x, y, **o),
    "focal": lambda x, y, **o: fusedloss.focal(x, LABELS, **o),
    "gist_embed": lambda x, y, **o: fusedloss.gist_embed(x, y, guide=(y, y), **o),
    "global_orthogonal_regularization": lambda x, y: fusedloss.global_orthogonal_regularization(x, y),
    "huber": lambda x, y, **o: fusedloss.huber(x, y, **o),
    "in_batch_margin_ranking": lambda x, y, **o: fusedloss.in_batch_margin_ranking(x, y, **o),
    "info_nce": lambda x, y, **o: fusedloss.info_nce(x, y, **o),
    "l1": lambda x, y, **o: fusedloss.l1(x, y, **o),
    "lambda_loss": lambda x, y, **o: fusedloss.lambda_loss(x, LIST.expand(6, 4), **o),
    "linear_cross_entropy": lambda x, y, **o: fusedloss.linear_cross_entropy(x, y, LABELS, **o),
    "list_mle": lambda x, y, **o: fusedloss.list_mle(x, LIST.expand(6, 4), **o),
    "list_net": lambda x, y, **o: fusedloss.list_net(x, LIST.expand(6, 4), **o),
    "plist_mle": lambda x, y, **o: fusedloss.plist_mle(x, LIST.expand(6, 4), **o),
    "adr_mse": lambda x, y, **o: fusedloss.adr_mse(x, LIST.expand(6, 4), **o),
    "rank_net": lambda x, y, **o: fusedloss.rank_net(x, LIST.expand(6, 4), **o),
    "list_info_nce": lambda x, y, **o: fusedloss.list_info_nce(x, LIST.expand(6, 4) > 2, **o),
    "list_circle": lambda x, y, **o: fusedloss.list_circle(x, LIST.expand(6, 4) > 2, **o),
    "info_nce_distill": lambda x, y, **o: fusedloss.info_nce_distill(x, y, y, x.nan_to_num(0, 0), **o),
    "margin_mse": lambda x, y, **o: fusedloss.margin_mse(x, y, y + 1, label=y[:, 0], **o),
    "matryoshka": lambda x, y, **o: fusedloss.matryoshka(fusedloss.info_nce, x, y, dims=[4, 2], **o),
    "matryoshka_2d": lambda x, y: fusedloss.matryoshka_2d(fusedloss.info_nce, [x, x], [y, y], dims=[4, 2]),
    "mega_batch_margin": lambda x, y, **o: fusedloss.mega_batch_margin(x, y, **o),
    "mse": lambda x, y, **o: fusedloss.mse(x, y, **o),
    "multi_similarity": lambda x, y, **o: fusedloss.multi_similarity(x, LABELS, **o),
    "multiple_negatives_ranking": lambda x, y, **o: fusedloss.multiple_negatives_ranking(x, y, **o),
    "nt_xent": lambda x, y, **o: fusedloss.nt_xent(x, y, **o),
    "online_contrastive": lambda x, y, **o: fusedloss.online_contrastive(x, y, HALF, **o),
    "proxy_anchor": lambda x, y, **o: fusedloss.proxy_anchor(x, LABELS, y, **o),
    "proxy_nca": lambda x, y, **o: fusedloss.proxy_nca(x, LABELS, y, **o),
    "siglip": lambda x, y, **o: fusedloss.siglip(x, y, 2.0, **o),
    "smooth_l1": lambda x, y, **o: fusedloss.smooth_l1(x, y, **o),
    "softmax_pair": lambda x, y, **o: fusedloss.softmax_pair(x, y, torch.cat([y[:3]] * 3, 1), None, LABELS, **o),
    "sup_con": lambda x, y, **o: fusedloss.sup_con(x, LABELS, **o),
    "sup_con in": lambda x, y, **o: fusedloss.sup_con(x, LABELS, form="in", **o),
    "triplet": lambda x, y, **o: fusedloss.triplet(x, y, y + 1, **o),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", OF_A_ROW)
def test_a_diverged_row_shows_in_every_mean(name, backend):
    """A loss that counts the rows which lose anything counts no NaN: 0 / 0 is no loss of 0."""
    takes = inspect.signature(getattr(fusedloss, name.split()[0])).parameters
    options = {"backend": backend} if "backend" in takes else {}
    for bad, where in [(math.nan, slice(1, 2)), (math.nan, slice(None)), (math.inf, slice(1, 2))]:
        x, y = randn(6, 4), randn(6, 4)
        x[where] = bad
        mean = OF_A_ROW[name](x, y, **options)
        whole = OF_A_ROW[name](x, y, reduction="sum", **options) if "reduction" in takes else mean
        assert whole.isnan() or bad == math.inf
        assert mean.isnan() == whole.isnan(), f"{bad} in rows {where}: a mean of {mean} and a sum of {whole}"


def test_every_loss_is_asked_for_its_nan():
    twins = {"huber_loss", "l1_loss", "mse_loss", "smooth_l1_loss"}
    assert {name.split()[0] for name in OF_A_ROW} == set(fusedloss.functional.__all__) - twins


@pytest.mark.parametrize("backend", ["dense", "chunked", "reference", "triton", "cuda"])
def test_statistics_of_rows_that_are_nan(backend):
    """Not an accuracy of 1 because nothing compares as larger, nor a hardest negative of 0, as where there is none."""
    query, key = randn(6, 8).float(), randn(6, 8).float()
    query[2] = math.nan
    _, stats = fusedloss.info_nce(query, key, return_stats=True, backend=backend)
    assert stats.accuracy.isnan() and stats.mean_reciprocal_rank.isnan() and stats.positive_score.isnan()
    weight = torch.ones(6)
    weight[2] = 0
    _, stats = fusedloss.info_nce(query, key, weight=weight, return_stats=True, backend=backend)
    assert all(value.isfinite() for value in stats)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", ["dense", "chunked", "triton", "cuda"])
def test_statistics_beside_a_column_that_is_not_finite(backend, bad):
    """As those of the reference: a NaN among the negatives has no rank and is no largest one."""
    query, key = torch.randn(5, 8).abs(), torch.randn(150, 8)
    for place, target in ((0, 1), (70, 0), (149, 2)):
        spoilt = key.clone()
        spoilt[place] = bad
        for weight in (torch.ones(5), torch.tensor([1.0, 0, 0, 0, 0])):
            options = {"target": torch.arange(5) + target, "weight": weight, "return_stats": True}
            _, found = fusedloss.info_nce(query, spoilt, backend=backend, **options)
            _, wanted = fusedloss.info_nce(query, spoilt, backend="reference", **options)
            for own, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(own, other, equal_nan=True, rtol=1e-5, atol=0)
