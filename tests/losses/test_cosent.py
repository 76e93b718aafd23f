"""CoSENT and AnglE, pairs ranked by gold scores: sentence-transformers' own, and the sum over all pairs written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import fusedloss
from fusedloss import testing
from fusedloss.rowwise.ordered import ordered_pairs

losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
util = pytest.importorskip("sentence_transformers.util")

BACKENDS = ["chunked", "reference"]
SIMILARITIES = {
    "cos": util.pairwise_cos_sim,
    "dot": util.pairwise_dot_score,
    "euclidean": util.pairwise_euclidean_sim,
    "manhattan": util.pairwise_manhattan_sim,
    "angle": util.pairwise_angle_sim,
}


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def same(ours, theirs, tensors, rtol=1e-9, atol=1e-11):
    found, wanted = (testing.value_and_gradients(lambda *t, f=f: 1.7 * f(*t), tensors) for f in (ours, theirs))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=rtol, atol=atol)


def written_out(z, label):
    """log(1 + sum), pair by pair."""
    terms = [z[i] - z[j] for i in range(len(z)) for j in range(len(z)) if label[i] < label[j]]
    return torch.stack([z.sum() * 0, *terms]).logsumexp(0)


@st.composite
def labels(draw, rows):
    kind = draw(st.sampled_from(["distinct", "few", "equal", "bool", "int", "half", "infinite"]))
    if kind == "infinite":
        return torch.tensor([-math.inf, 0.0, math.inf])[torch.randint(0, 3, (rows,))]
    if kind in ("distinct", "half"):
        return torch.rand(rows).to(torch.float16 if kind == "half" else torch.float32)
    found = torch.randint(-2, 3, (rows,)) * (kind != "equal")
    return {"few": found / 4, "bool": found > 0, "int": found, "equal": found}[kind]


# The order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_ordered_pairs_is_the_sum_over_all_pairs(backend, data):
    rows = data.draw(st.integers(0, 12))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    label = data.draw(labels(rows))
    label = label.byte() if label.dtype == torch.bool else label
    z = randn(rows) * data.draw(st.sampled_from([0.0, 1.0, 30.0, 1e4]))
    same(lambda z: ordered_pairs(z, label, backend), lambda z: written_out(z, label), [z])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ordered_pairs_of_large_scores(dtype):
    """scale * s = 1e4: one pair in the wrong order owes all of the loss, and nothing overflows."""
    z, label = torch.tensor([1e4, -1e4, 0.0, 5.0], dtype=dtype), torch.tensor([0, 1, 2, 2])
    value, gradient = testing.value_and_gradients(lambda z: ordered_pairs(z, label), [z])
    assert value == 2e4 and gradient.tolist() == [1, -1, 0, 0]
    z = torch.tensor([-1e4, 0.0, 5e3, 5e3], dtype=dtype)  # and in the right order, of none
    found = testing.value_and_gradients(lambda z: ordered_pairs(z, label), [z])
    assert all((t == 0).all() for t in found)


def test_gradients_keep_their_digits_in_fp32():
    """A rank of 500 scores up to 1e4: differences of O(1) numbers in fp32 sums would be off in the third digit."""
    z, label = (randn(500) * 3e3).float(), torch.rand(500)
    _, found = testing.value_and_gradients(lambda z: ordered_pairs(z, label), [z])
    _, wanted = testing.value_and_gradients(lambda z: ordered_pairs(z, label, "reference"), [z.double()])
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-7)


def test_ordered_pairs_saves_vectors_only():
    z, label = randn(1000).float().requires_grad_(), torch.rand(1000)
    ours = theirs = 0

    def count(t):
        nonlocal ours
        ours += t.numel() * t.element_size()
        return t

    with saved_tensors_hooks(count, lambda t: t):
        ordered_pairs(z, label)
    ours, theirs = 0, ours
    with saved_tensors_hooks(count, lambda t: t):
        upstream = losses.CoSENTLoss(None, scale=1.0, similarity_fct=lambda a, b: a)
        upstream.compute_loss_from_embeddings([z, z], label)
    ours, theirs = theirs, ours
    assert ours == 3 * 4000 and ours <= theirs


def test_second_derivatives_of_the_order():
    z, label = randn(6).requires_grad_(), torch.tensor([0, 1, 1, 2, 0, 3])
    assert torch.autograd.gradgradcheck(lambda z: ordered_pairs(z, label), z)


# The losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_cosent(similarity, backend, data):
    rows, dim, scale = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 6)), data.draw(st.sampled_from([1.0, 20]))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    label, tensors = data.draw(labels(rows)), [randn(rows, dim), randn(rows, dim)]
    theirs = losses.CoSENTLoss(None, scale=scale, similarity_fct=SIMILARITIES[similarity])
    same(
        lambda a, b: fusedloss.cosent(a, b, label, scale=scale, similarity=similarity, backend=backend),
        lambda a, b: theirs.compute_loss_from_embeddings([a, b], label),
        tensors,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_angle(backend, data):
    rows, dim, others = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    tensors = [randn(rows, dim) for _ in range(1 + others)]
    theirs = losses.AnglELoss(None, scale=5.0)
    label = data.draw(labels(rows))
    if others > 1:
        label = data.draw(st.sampled_from([None, label.float(), label if label.dtype != torch.bool else label.int()]))
    ours = lambda a, b, *rest: fusedloss.angle(
        a, b, *(rest if rest else [label]), scale=5.0, backend=backend, **({"label": label} if rest else {})
    )
    same(ours, lambda *t: theirs.compute_loss_from_embeddings(list(t), label), tensors)


def test_angle_takes_its_score_by_name_too():
    a, b, c = randn(4, 6), randn(4, 6), randn(4, 6)
    score = torch.rand(4)
    wanted = fusedloss.angle(a, b, score)
    assert fusedloss.angle(a, b, score=score) == wanted and fusedloss.angle(a, b, label=score) == wanted
    ones = torch.ones(4, dtype=torch.bool)
    assert fusedloss.angle(a, b, c, label=ones) == fusedloss.angle(a, b, c)


@pytest.mark.parametrize("loss", [fusedloss.cosent, fusedloss.angle])
def test_no_pairs_no_loss(loss):
    for rows in (0, 1, 5):
        found = testing.value_and_gradients(lambda a, b, n=rows: loss(a, b, torch.ones(n)), [randn(rows, 3)] * 2)
        assert all((t == 0).all() for t in found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", [fusedloss.cosent, fusedloss.angle])
def test_nan_in_nan_out(loss, backend):
    for where in ("a", "b", "score", "score of all"):
        a, b, score = randn(5, 4).float(), randn(5, 4).float(), torch.tensor([0.0, 1, 1, 0, 2])
        if where == "score of all":
            score[:] = torch.nan
        else:
            {"a": a, "b": b, "score": score}[where].view(-1)[3] = torch.nan
        found = testing.value_and_gradients(lambda a, b, s=score: loss(a, b, s, backend=backend), [a, b])
        assert found[0].isnan() and (where == "score of all" or all(t.isnan().any() for t in found))
    # Where nothing is compared, too, as in the library.
    assert loss(a * torch.nan, b, torch.ones(5), backend=backend).isnan()


def test_a_learnt_scale():
    a, b, label = randn(6, 4), randn(6, 4), torch.randint(0, 3, (6,))
    for shape in ((), (1,)):
        scale = torch.full(shape, 3.0, dtype=torch.float64)
        ours = lambda a, b, scale: fusedloss.cosent(a, b, label, scale=scale)
        theirs = lambda a, b, scale: written_out(scale.reshape(()) * nn.functional.cosine_similarity(a, b), label)
        same(ours, theirs, [a, b, scale])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("loss", ["cosent", "angle", "angle, negatives"])
def test_backends_and_dtypes(loss, backend, dtype):
    check_backend(loss, backend, dtype, "cpu")


def check_backend(loss, backend, dtype, device):
    label = torch.randint(0, 4, (33,), device=device)
    tensors = [testing.inputs("pairs", 33, 33, 21, dtype, seed, device)[seed % 2] for seed in range(3)]
    function = {
        "cosent": lambda a, b, c, **o: fusedloss.cosent(a, b, label, **o),
        "angle": lambda a, b, c, **o: fusedloss.angle(a, b, label, **o),
        "angle, negatives": lambda a, b, c, **o: fusedloss.angle(a, b, c, scale=3.0, **o),
    }[loss]
    ours = testing.value_and_gradients(lambda *t: function(*t, backend=backend), tensors)
    eager = testing.value_and_gradients(lambda *t: function(*(x.float() for x in t), backend="reference"), tensors)
    oracle = testing.value_and_gradients(lambda *t: function(*t, backend="reference"), [t.double() for t in tensors])
    for a, b, c in zip(ours, eager, oracle, strict=True):
        assert testing.budget_share(a, b, c, a.dtype) <= 1
    assert ours[0].dtype == torch.float32 and all(g.dtype == dtype for g in ours[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["triton", "chunked"])
@pytest.mark.parametrize("loss", ["cosent", "angle", "angle, negatives"])
def test_backends_and_dtypes_on_a_gpu(loss, backend, dtype):
    check_backend(loss, backend, dtype, "cuda")


@pytest.mark.gpu
def test_nothing_is_read_back_from_a_gpu():
    a, b = (torch.randn(64, 32, device="cuda", requires_grad=True) for _ in range(2))
    score = torch.rand(64, device="cuda")
    fusedloss.cosent(a, b, score).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fusedloss.cosent(a, b, score).backward()
        fusedloss.angle(a, b, score).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.lengthy
def test_under_the_compiler():
    a, b, score = randn(8, 4), randn(8, 4), torch.rand(8)
    function = torch.compile(lambda a, b: fusedloss.cosent(a, b, score), backend="aot_eager")
    same(function, lambda a, b: fusedloss.cosent(a, b, score), [a, b])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x, y: fusedloss.cosent(x, x, y[:2]), ValueError, r"score must have shape \[3\], got \[2\]"),
        (lambda x, y: fusedloss.cosent(x, x[:2], y), ValueError, "b must have 3 rows, like a, got 2"),
        (lambda x, y: fusedloss.cosent(x, x, y, scale=-1.0), ValueError, "scale must be a positive number, got -1.0"),
        (
            lambda x, y: fusedloss.cosent(x, x, y, similarity="jaccard"),
            ValueError,
            "similarity must be one of 'cos', 'dot', 'euclidean', 'manhattan', 'angle', got 'jaccard'",
        ),
        (
            lambda x, y: fusedloss.angle(x, x),
            ValueError,
            r"score must be a tensor \[B\] unless negatives are given, got None",
        ),
        (lambda x, y: fusedloss.angle(x, x, y, x), ValueError, r"score must be .*, got shape \[\d+\]; pass"),
        (lambda x, y: fusedloss.angle(x, x, y, label=y), ValueError, r"score must be .*, got shape \[\d+\]; pass"),
        (lambda x, y: fusedloss.angle(x, x, x, x[:1]), ValueError, r"negatives\[1\] must have 3 rows, like a, got 1"),
        (lambda x, y: fusedloss.angle(x, x, x, label=y[:1]), ValueError, r"label must have shape \[3\], got \[1\]"),
        (
            lambda x, y: fusedloss.CoSENTLoss(nn.Linear(1, 1)),
            TypeError,
            "scale must not be a model, got the nn.Module Linear",
        ),
        (
            lambda x, y: fusedloss.CoSENTLoss(similarity="jaccard"),
            ValueError,
            "similarity must be one of 'cos', 'dot', 'euclidean', 'manhattan', 'angle', got 'jaccard'",
        ),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(3, 4), torch.tensor([0.1, 0.7, 0.3]))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_a_small_loss_keeps_its_digits(backend):
    """log(1 + exp(-14)) is 8.3e-7: as the log of 1.0000008 in fp32 it has one digit."""
    a, b = torch.tensor([[7.0], [-7.0]]), torch.ones(2, 1)
    loss = fusedloss.cosent(a, b, torch.tensor([1, 0]), scale=1.0, similarity="dot", backend=backend)
    torch.testing.assert_close(loss.double(), torch.tensor(-14.0, dtype=torch.float64).exp().log1p(), rtol=1e-6, atol=0)
