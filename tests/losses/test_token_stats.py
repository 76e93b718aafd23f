"""linear_cross_entropy(temperature=, return_stats=True): correct tokens and entropies, against whole logits in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import fusedloss
from fusedloss import testing

BACKENDS = ["dense", "chunked", "reference"]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def logits(x, w, b, temperature, softcap):
    z = x @ w.T if b is None else x @ w.T + b
    return (softcap * torch.tanh(z / softcap) if softcap else z) / temperature


def entropy_of(z):
    p = z.softmax(1)
    return -torch.special.xlogy(p, p).sum(1)


def close(found, wanted, **tolerance):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    N=st.integers(1, 9),
    C=st.integers(1, 8),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 2.0]),
    temperature=st.sampled_from([1.0, 0.4, 3.0]),
    weight=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.2]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    compact=st.booleans(),
    seed=st.integers(0, 99),
)
def test_value_entropy_and_gradients(
    backend, N, C, bias, softcap, temperature, weight, smoothing, reduction, compact, seed
):
    tensors = [randn(N, 4, seed=seed), randn(C, 4, seed=seed + 1)] + ([randn(C, seed=seed + 2)] if bias else [])
    target = torch.randint(C, (N,), generator=torch.Generator().manual_seed(seed))
    target[N // 2] = -100 if N > 1 else target[0]
    counts = target != -100
    by_class = randn(C, seed=5).abs() + 0.1 if weight and softcap is None else None
    upstream = randn(N, seed=seed + 3)
    shared = {"label_smoothing": smoothing, "weight": by_class, "reduction": reduction}

    def ours(x, w, b=None):
        options = {"softcap": softcap, "temperature": temperature, "compact": compact, "backend": backend}
        options |= {"return_stats": True, "entropy_gradient": True}
        loss, stats = fusedloss.linear_cross_entropy(x, w, target, linear_bias=b, **options, **shared)
        z = logits(x, w, b, temperature, softcap)
        assert (stats.correct == ((z.argmax(1) == target) & counts)).all() and stats.correct.dtype == torch.bool
        assert (stats.entropy[~counts] == 0).all()
        return (loss * upstream if reduction == "none" else loss).sum() + (stats.entropy * upstream).sum()

    def theirs(x, w, b=None):
        z = logits(x, w, b, temperature, softcap)
        loss = F.cross_entropy(z, target, **shared)
        bonus = (entropy_of(z) * counts * upstream).sum()
        return (loss * upstream if reduction == "none" else loss).sum() + bonus

    found, wanted = (testing.value_and_gradients(f, tensors) for f in (ours, theirs))
    close(found, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_kernels_count_and_the_entropy_is_beside_them(backend):
    x, w, target = randn(9, 8).float(), randn(7, 8, seed=1).float(), torch.arange(9) % 7
    z = x.double() @ w.double().T / 0.5
    loss, stats = fusedloss.linear_cross_entropy(x, w, target, temperature=0.5, return_stats=True, backend=backend)
    torch.testing.assert_close(loss.double(), F.cross_entropy(z, target), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.entropy.double(), entropy_of(z), rtol=1e-5, atol=1e-6)
    assert (stats.correct == (z.argmax(1) == target)).all()


def test_without_a_request_the_entropy_has_no_gradient():
    x, w = randn(4, 3).requires_grad_(), randn(5, 3, seed=1)
    _, stats = fusedloss.linear_cross_entropy(x, w, torch.arange(4), return_stats=True)
    assert not stats.entropy.requires_grad


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_removed_class_and_certain_rows(backend, softcap):
    """p log p of a class that is removed, or has underflowed, is 0; so is the entropy of a row with one class."""
    x, w = randn(3, 4).requires_grad_(), randn(5, 4, seed=1).requires_grad_()
    bias = torch.tensor([0.0, -torch.inf, 0.0, -torch.inf, -torch.inf], dtype=torch.float64)
    options = {"linear_bias": bias, "softcap": softcap, "backend": backend}
    _, stats = fusedloss.linear_cross_entropy(
        x, w, torch.tensor([0, 2, 2]), return_stats=True, entropy_gradient=True, **options
    )
    z = logits(x, w[[0, 2]], None, 1.0, softcap)
    torch.testing.assert_close(stats.entropy, entropy_of(z))
    found = torch.autograd.grad(stats.entropy.sum(), (x, w))
    close(found, torch.autograd.grad(entropy_of(z).sum(), (x, w)), rtol=1e-9, atol=1e-12)
    sharp = fusedloss.linear_cross_entropy(1e3 * x, w, torch.tensor([0, 2, 2]), return_stats=True, backend=backend)[1]
    assert (sharp.entropy.abs() < 1e-100).all()


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_an_infinite_weight_concerns_the_rows_that_it_makes_infinite(backend):
    """A class at -inf has no share; at inf there is no softmax, nor where 0 multiplies the weight."""
    x, w = randn(4, 3), randn(5, 3, seed=1)
    w[1, 2], x[:, 2] = torch.inf, torch.tensor([-1.0, -2.0, 0.5, 0.0])
    _, stats = fusedloss.linear_cross_entropy(x, w, torch.zeros(4).long(), return_stats=True, backend=backend)
    torch.testing.assert_close(stats.entropy[:2], entropy_of(x[:2] @ w[[0, 2, 3, 4]].T))
    assert stats.entropy[2:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs(dtype):
    """The logits of 16-bit inputs are not rounded to 16 bits."""
    x, w = randn(40, 16, dtype=dtype), randn(50, 16, seed=1, dtype=dtype)
    target, weights = torch.arange(40), randn(40, seed=2)

    def ours(x, w):
        options = {"return_stats": True, "entropy_gradient": True, "backend": "chunked"}
        return (fusedloss.linear_cross_entropy(x, w, target, **options)[1].entropy * weights).sum()

    found = testing.value_and_gradients(ours, [x, w])
    wanted = testing.value_and_gradients(lambda x, w: (entropy_of(x @ w.T) * weights).sum(), [x.double(), w.double()])
    assert found[1].dtype == dtype
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-5, atol=1e-5)
    near = 2 * max(torch.finfo(dtype).eps, 1e-6)
    for one, other in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=near, atol=near * float(other.abs().max()))


def test_a_small_workspace_has_the_same_numbers():
    x, w, target = randn(50, 6), randn(3000, 6, seed=1), torch.arange(50)
    ask = lambda **o: fusedloss.linear_cross_entropy(x, w, target, return_stats=True, **o)[1]
    close(ask(workspace_bytes=3 * 3000 * 8 * 5), ask(backend="reference"), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_with_a_logit_that_is_no_number_is_not_correct(backend):
    x, w, target = randn(3, 4), randn(5, 4, seed=1), torch.tensor([0, 1, 2])
    x[1] = torch.nan
    correct = fusedloss.linear_cross_entropy(x, w, target, return_stats=True, backend=backend)[1].correct
    assert correct.tolist() == [bool((x[i] @ w.T).argmax() == i) and i != 1 for i in range(3)]
    w[4] = torch.nan  # of another class
    correct = fusedloss.linear_cross_entropy(x, w, target, return_stats=True, backend=backend)[1].correct
    assert not correct.any()


def test_shapes_follow_the_target():
    x, w, target = randn(2, 3, 4), randn(5, 4, seed=1), torch.tensor([[0, 1, -100], [2, -100, 4]])
    _, stats = fusedloss.linear_cross_entropy(x, w, target, return_stats=True)
    assert stats.correct.shape == stats.entropy.shape == target.shape
    loss, stats = fusedloss.linear_cross_entropy(x[:0], w, target[:0], return_stats=True)
    assert loss.isnan() and stats.entropy.shape == (0, 3)


def test_second_derivatives_name_the_backend_that_has_them():
    x, w = randn(4, 3).requires_grad_(), randn(5, 3, seed=1)
    options = {"return_stats": True, "entropy_gradient": True}

    def first(backend):
        _, stats = fusedloss.linear_cross_entropy(x, w, torch.arange(4), backend=backend, **options)
        return torch.autograd.grad(stats.entropy.sum(), x, create_graph=True)[0]

    with pytest.raises(fusedloss.UnsupportedError, match="backend must be 'reference' for second derivatives"):
        first("chunked")
    (found,) = torch.autograd.grad(first("reference").square().sum(), x)
    inner = torch.autograd.grad(entropy_of(x @ w.T).sum(), x, create_graph=True)[0]
    torch.testing.assert_close(found, torch.autograd.grad(inner.square().sum(), x)[0])


@pytest.mark.parametrize(
    "options, error, said",
    [
        ({"temperature": 0.0}, ValueError, "temperature must be a positive number, got 0.0"),
        ({"temperature": torch.tensor(1.0)}, TypeError, "temperature must be a number"),
        ({"entropy_gradient": True}, ValueError, "return_stats must be True with entropy_gradient=True, got False"),
    ],
)
def test_errors(options, error, said):
    with pytest.raises(error, match=said):
        fusedloss.linear_cross_entropy(randn(4, 3), randn(5, 3), torch.arange(4), **options)
