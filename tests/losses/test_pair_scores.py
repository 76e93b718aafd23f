"""Scores of a matrix's rows against the same rows of others: what pair, triplet and distillation losses are made of.

Each kind is compared, value and gradients, with torch's own function in fp64; every backend with that.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fusedloss import UnsupportedError, testing
from fusedloss.rowwise import pairs
from fusedloss.rowwise.pairs import KINDS, scores

BACKENDS = ["chunked", "reference"]


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def angle(x, y, eps):
    x, y = (F.pad(F.normalize(t, dim=1, eps=eps), (0, t.shape[1] % 2)) for t in (x, y))
    x, y = (torch.complex(*t.chunk(2, dim=1)) for t in (x, y))
    product = (x * y.conj()).sum(1)
    return (product.real + product.imag).abs()


TORCH = {
    "dot": lambda x, y, eps: torch.linalg.vecdot(x, y),
    "cos": lambda x, y, eps: (F.normalize(x, dim=1, eps=eps) * F.normalize(y, dim=1, eps=eps)).sum(1),
    "angle": angle,
    "euclidean": lambda x, y, eps: F.pairwise_distance(x, y, eps=eps),
    "squared": lambda x, y, eps: F.pairwise_distance(x, y, eps=eps).square(),
    "manhattan": lambda x, y, eps: F.pairwise_distance(x, y, p=1, eps=eps),
}
EPS = {"cos": [1e-12, 1e-8, 1e-2], "angle": [1e-12, 1e-2]}


@contextlib.contextmanager
def blocks(elements):
    """The walk over blocks, whatever the size; a context, because hypothesis repeats the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "BLOCK", {"cpu": elements, "cuda": elements})
        patch.setattr(pairs, "_plain", lambda *_: False)
        patch.setattr(pairs, "few", lambda *_: False)
        yield


def weighed(function, weight):
    """Each row and other with a weight of its own, so that none is taken for another."""
    return lambda *tensors: (function(*tensors) * weight.to(tensors[0].device)).sum()


def expected(kind, eps, weight):
    formula = lambda q, *others: torch.stack([TORCH[kind](q, other, eps) for other in others], dim=1)
    return weighed(formula, weight)


def same(found, wanted, **tolerance):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_scores_are_torchs(kind, backend, data):
    rows, dim, count = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    tensors = [randn(rows, dim) * data.draw(st.sampled_from([0.1, 1.0, 30.0])) for _ in range(1 + count)]
    eps = data.draw(st.sampled_from(EPS.get(kind, [0.0, 1e-6, 0.3])))
    weight = randn(rows, count)
    wanted = testing.value_and_gradients(expected(kind, eps, weight), tensors)
    ours = weighed(lambda *t: scores(kind, *t, eps=eps, backend=backend), weight)
    small = testing.value_and_gradients(ours, tensors)
    with blocks(data.draw(st.integers(1, 40))):
        walked = testing.value_and_gradients(ours, tensors)
    same(small, wanted, rtol=1e-10, atol=1e-10)
    same(walked, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_default_eps_is_sentence_transformers(kind, backend):
    """1e-12 for norms, nothing added to a difference."""
    x, y = randn(5, 6).float(), randn(5, 6).float()
    wanted = TORCH[kind](x.double(), y.double(), 1e-12 if kind in EPS else 0.0)[:, None]
    same([scores(kind, x, y, backend=backend)], [wanted], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_and_zero_rows_have_finite_gradients(kind, backend):
    """A distance of 0 has gradient 0, as in torch; a zero row's cosine is 0, and eps takes its norm's place."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    x, y, z = (randn(6, 5).to(dtype) for _ in range(3))
    y[0], x[1], y[2] = x[0], 0, 0
    x[3] = y[3] = 0
    eps = 1e-3 if kind in EPS else 0.0
    weight = randn(6, 2).to(dtype)
    wanted = testing.value_and_gradients(expected(kind, eps, weight), [x.double(), y.double(), z.double()])
    with blocks(10):
        found = testing.value_and_gradients(
            weighed(lambda *t: scores(kind, *t, eps=eps, backend=backend), weight), [x, y, z]
        )
    assert all(t.isfinite().all() for t in wanted)
    # A row met with itself: AnglE's imaginary part is 0 and its gradient is not.
    same(found, wanted, rtol=1e-4, atol=1e-3) if dtype == torch.float32 else same(found, wanted)


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("kind", ["cos", "angle"])
def test_a_row_shorter_than_eps_is_divided_by_eps(kind, backend):
    """And that is a constant: no gradient through its norm (torch's cosine_similarity has one, of a norm not used)."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    x, y = randn(4, 6).to(dtype), randn(4, 6).to(dtype)
    x[1], y[2] = x[1] * 1e-4, y[2] * 1e-4
    linear = lambda x, y: scores(kind, x, y, eps=0.01, backend=backend)
    with blocks(6):
        _, dx, dy = testing.value_and_gradients(lambda *t: linear(*t).sum(), [x, y])
        value = linear(x, y)[:, 0]
    # Linear in that row: <gradient, row> is the score, where a whole cosine has 0.
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close((dx * x).sum(1), value * torch.tensor([0, 1, 0, 0]), **close)
    torch.testing.assert_close((dy * y).sum(1), value * torch.tensor([0, 0, 1, 0]), **close)
    assert value[1] != 0 and value[2] != 0


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_row(kind, backend):
    x, y = randn(4, 5).float(), randn(4, 5).float()
    x[2, 3] = torch.nan
    with blocks(5):
        found = scores(kind, x, y, backend=backend)[:, 0]
        _, dx, dy = testing.value_and_gradients(lambda *t: scores(kind, *t, backend=backend).sum(), [x, y])
    assert found.isnan().tolist() == [False, False, True, False]
    others = [0, 1, 3]
    assert dx[others].isfinite().all() and dy[others].isfinite().all()
    assert dy[2].isnan().any() or kind == "manhattan"  # torch.sign(NaN) is 0


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(kind, backend):
    x, y = (randn(0, 3).float().requires_grad_() for _ in range(2))
    with blocks(5):
        found = scores(kind, x, y, x, backend=backend)
        found.sum().backward()
    assert found.shape == (0, 2) and x.grad.shape == (0, 3)


# Precision ------------------------------------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("dim", [1, 7, 384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_within_the_error_budget(kind, backend, dtype, dim):
    """Of what a careful user writes: the formula in fp32, and gradients rounded to the inputs' dtype."""
    query, key = testing.inputs("pairs", 33, 33, dim, dtype)
    tensors = [query, key, testing.inputs("random", 33, 33, dim, dtype, seed=1)[1]]
    weight, eps = randn(33, 2).float(), {"cos": 1e-8}.get(kind, 1e-12 if kind == "angle" else 1e-6)

    def matrix_and_gradients(function, leaves):
        leaves = [t.detach().requires_grad_() for t in leaves]
        found = function(*leaves)
        return [found.detach(), *torch.autograd.grad((found * weight).sum(), leaves)]

    def torchs(*matrices):
        query, *others = (t if t.dtype == torch.float64 else t.float() for t in matrices)
        return torch.stack([TORCH[kind](query, other, eps) for other in others], dim=1)

    with blocks(7 * dim):
        ours = matrix_and_gradients(lambda *t: scores(kind, *t, eps=eps, backend=backend), tensors)
    eager, oracle = matrix_and_gradients(torchs, tensors), matrix_and_gradients(torchs, [t.double() for t in tensors])
    for a, b, c in zip(ours, eager, oracle, strict=True):
        assert testing.budget_share(a, b, c, a.dtype) <= 1
    assert all(a.dtype == dtype for a in ours[1:]) and ours[0].dtype == torch.float32


def test_a_zero_row_in_fp16_has_a_gradient_that_fits():
    """1 / eps is beyond fp16: the row is divided by 1."""
    for backend in ("chunked", "triton"):
        x, y = randn(3, 4).half(), randn(3, 4).half()
        x[1], y[2] = 0, 0
        _, dx, dy = testing.value_and_gradients(lambda *t, b=backend: scores("cos", *t, backend=b).sum(), [x, y])
        assert dx.isfinite().all() and dy.isfinite().all()
        torch.testing.assert_close(dx[1].float(), F.normalize(y[1].float(), dim=0), rtol=1e-2, atol=1e-2)


def test_16_bit_inputs_are_never_whole_in_fp32():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor) and t.dtype == torch.float32:
                    largest = max(largest, t.untyped_storage().nbytes() // 4)
            return out

    x, y, z = (randn(64, 32).bfloat16().requires_grad_() for _ in range(3))
    for kind in KINDS:
        with blocks(8 * 32), Watch():
            scores(kind, x, y, z, backend="chunked").sum().backward()
    assert largest <= 8 * 32


# Tensors of every kind ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_strides(kind, backend):
    dtype = torch.float32 if backend == "triton" else torch.float64
    base = randn(7, 12).to(dtype)
    views = {
        "columns": base[:, 1:7],
        "every other": base[:, ::2],
        "transposed": randn(6, 7).to(dtype).T,
        "one row for all": base[:1, :6].expand(7, 6),
        "one number a row": base[:, :1].expand(7, 6),
    }
    weight = randn(7, len(views)).to(dtype)
    query = randn(7, 12).to(dtype)[:, ::2]

    def run(own):
        leaves = [t.detach().requires_grad_() for t in (query, *views.values())]
        if own:
            leaves = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in leaves]
        function = weighed(lambda *t: scores(kind, *t, backend="reference" if own else backend), weight)
        value = function(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    with blocks(13):
        same(run(False), run(True), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_tensor_in_several_places_gets_all_gradients(kind, backend):
    x, y = randn(5, 4).float(), randn(5, 4).float()
    weight = randn(5, 3).float()
    with blocks(8):
        ours = testing.value_and_gradients(
            weighed(lambda x, y: scores(kind, x, y, x, y, backend=backend), weight), [x, y]
        )
    wanted = testing.value_and_gradients(
        weighed(lambda x, y: scores(kind, x, y.clone(), x.clone(), y.clone(), backend="reference"), weight), [x, y]
    )
    same(ours, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_what_requires_a_gradient_gets_one(kind, backend):
    tensors, weight = [randn(5, 4).float() for _ in range(3)], randn(5, 2).float()
    function = weighed(lambda *t: scores(kind, *t, backend=backend), weight)
    with blocks(8):
        _, *whole = testing.value_and_gradients(function, tensors)
        for wanted in [(0,), (1,), (2,), (0, 2), (1, 2)]:
            leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
            function(*leaves).backward()
            for i, (leaf, gradient) in enumerate(zip(leaves, whole, strict=True)):
                if i in wanted:
                    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-5, atol=1e-6)
                else:
                    assert leaf.grad is None


def test_inputs_are_not_written_to_and_a_second_backward_gives_the_same():
    for kind in KINDS:
        for backend in ("chunked", "triton"):
            x, y = (randn(5, 4).float().requires_grad_() for _ in range(2))
            before = x.detach().clone(), y.detach().clone()
            with blocks(8):
                found = scores(kind, x, y, backend=backend)
                value = found.detach().clone()
                first = torch.autograd.grad(found.sum(), (x, y), retain_graph=True)
                second = torch.autograd.grad(found.sum(), (x, y))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            assert torch.equal(x, before[0]) and torch.equal(y, before[1]) and torch.equal(found, value)


# Derivatives and memory -----------------------------------------------------------------------------------------------


@pytest.mark.lengthy
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind, backend):
    x, y, z = (randn(3, 5).requires_grad_() for _ in range(3))
    with blocks(5):
        function = lambda x, y, z: scores(kind, x, y, z, backend=backend)
        assert torch.autograd.gradgradcheck(function, (x, y, z))
        assert torch.autograd.gradgradcheck(lambda x, y: scores(kind, x, y, y, backend=backend).square(), (x, y))


def test_triton_s_second_derivatives_are_the_formula_s():
    x, y = (randn(3, 5).float().requires_grad_() for _ in range(2))
    found = []
    for backend in ("triton", "reference"):
        (gradient,) = torch.autograd.grad(scores("cos", x, y, backend=backend).sum(), x, create_graph=True)
        found.append([gradient, *torch.autograd.grad(gradient.square().sum(), (x, y))])
    torch.testing.assert_close(*found)


def saved_bytes(function, *tensors):
    """[in all, beside the inputs themselves], each storage once."""
    kept, own = {}, {t.untyped_storage().data_ptr() for t in tensors}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.numel() * t.element_size()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        loss = function(*tensors)
    assert loss.requires_grad
    return sum(kept.values()), sum(size for place, size in kept.items() if place not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_are_the_inputs_and_a_few_numbers_a_row(kind, backend, dtype):
    rows = 1100  # more elements than the formula takes, which keeps what it likes
    tensors = [randn(rows, 256).to(dtype).requires_grad_() for _ in range(3)]
    _, ours = saved_bytes(lambda *t: scores(kind, *t, backend=backend), *tensors)
    numbers = {"euclidean": 2, "cos": 5, "angle": 5}.get(kind, 0)  # K scores; and 1 + K norms
    assert ours == numbers * rows * 4


@pytest.mark.parametrize("rows", [3, 1100])  # below and above what takes the formula
@pytest.mark.parametrize("kind", KINDS)
def test_no_more_is_saved_than_by_torch(kind, rows):
    x, y = (randn(rows, 256).float().requires_grad_() for _ in range(2))
    eps = 1e-8 if kind in EPS else 1e-6
    ours, theirs = (
        saved_bytes(f, x, y)[1] for f in (lambda x, y: scores(kind, x, y, eps=eps), lambda x, y: TORCH[kind](x, y, eps))
    )
    # In torch a dot product saves nothing but its inputs.
    assert ours <= theirs if kind != "dot" else ours == 0


# Backends -------------------------------------------------------------------------------------------------------------


def test_backends_that_cannot():
    x = randn(3, 4)
    with pytest.raises(UnsupportedError, match=r"no kernel for torch\.float64.*chunked: can run it"):
        scores("dot", x, x, backend="triton")
    with pytest.raises(UnsupportedError, match="no kernel for this loss"):
        scores("dot", x, x, backend="cuda")


def test_under_the_compiler():
    x, y = randn(3, 4).float(), randn(3, 4).float()
    function = torch.compile(lambda x, y: scores("cos", x, y).sum(), backend="aot_eager", fullgraph=True)
    same(
        testing.value_and_gradients(function, [x, y]),
        testing.value_and_gradients(lambda x, y: scores("cos", x, y).sum(), [x, y]),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["triton", "chunked"])
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind, backend, dtype):
    for rows, dim in [(1, 1), (37, 7), (1000, 384), (5, 4099)]:
        tensors = [testing.inputs("random", rows, rows, dim, dtype, seed, "cuda")[0] for seed in range(3)]
        weight = torch.randn(rows, 2, device="cuda")
        ours = testing.value_and_gradients(weighed(lambda *t: scores(kind, *t, backend=backend), weight), tensors)
        eager, oracle = (
            testing.value_and_gradients(
                weighed(lambda *t, wide=wide: scores(kind, *(x.to(wide) for x in t), backend="reference"), weight),
                tensors if wide == torch.float32 else [x.double() for x in tensors],
            )
            for wide in (torch.float32, torch.float64)
        )
        for a, b, c in zip(ours, eager, oracle, strict=True):
            assert testing.budget_share(a, b, c, torch.float32 if a.dim() == 0 else dtype) <= 1
