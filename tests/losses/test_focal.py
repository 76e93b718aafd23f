"""Focal loss of independent labels and of classes: the formulas of torchvision's sigmoid_focal_loss and of Lin et al.
2017, written out in torch and evaluated in fp64.
"""

from __future__ import annotations

import contextlib
import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import fusedloss
from fusedloss import testing
from fusedloss.backends.triton import pointwise as triton_pointwise
from fusedloss.rowwise import classes, pointwise

BACKENDS = ["reference", "chunked", "triton"]
REDUCTIONS = ["mean", "sum", "none"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
GAMMAS = [0.0, 0.5, 1.0, 2.0, 5.0]
KINDS = ["labels", "soft labels", "classes"]


def identify(value):
    return str(value).removeprefix("torch.")


@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
    """Several blocks and programs at tens of elements, on a CPU."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(pointwise, "BLOCK", 16)
        monkeypatch.setattr(triton_pointwise, "INTERPRETED_BLOCK", 16)
        monkeypatch.setattr(classes, "BLOCK", 16)


def classes_first(chosen):
    """Where a walk over few classes has them in its rows, which it does for many elements."""
    return mock.patch.object(classes, "FEW_ELEMENTS", 0) if chosen else contextlib.nullcontext()


def labels_written_out(x, t, gamma=2.0, alpha=None):
    """torchvision.ops.sigmoid_focal_loss, for which no alpha is -1."""
    p = torch.sigmoid(x)
    ce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    p_t = p * t + (1 - p) * (1 - t)
    loss = ce * (1 - p_t) ** gamma
    return loss if alpha is None else (alpha * t + (1 - alpha) * (1 - t)) * loss


def classes_written_out(x, t, gamma=2.0, alpha=None, ignore_index=-100):
    """-alpha_t (1 - p_t)^gamma log p_t, with 1 - p_t as the sum of the other classes' probabilities."""
    inside = t.masked_fill(t == ignore_index, 0).unsqueeze(1)
    log_p = x.log_softmax(1)
    rest = log_p.exp().scatter(1, inside, 0).sum(1)
    loss = -(rest**gamma if gamma else 1.0) * log_p.gather(1, inside).squeeze(1)
    loss = loss if alpha is None else alpha[inside.squeeze(1)] * loss
    return loss.masked_fill(t == ignore_index, 0)


def written_out(x, t, *, reduction="mean", **options):
    rows = (labels_written_out if t.is_floating_point() else classes_written_out)(x, t, **options)
    count = rows.numel() if t.is_floating_point() else (t != options.get("ignore_index", -100)).sum()
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / max(int(count), 1)}[reduction]


def example(kind, shape=(6, 5), dtype=torch.float64, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "classes":
        t = torch.randint(0, shape[1], shape[:1] + shape[2:], generator=generator)
    else:
        t = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
        t = t if kind == "soft labels" else t.round()
    return x.to(dtype).to(device), t.to(device)


def step(function, x, upstream):
    leaf = x.detach().clone().requires_grad_()
    loss = function(leaf)
    return loss.detach(), torch.autograd.grad(loss, leaf, upstream.to(loss.dtype).expand(loss.shape))[0]


def both(x, t, upstream=None, **options):
    """What is found, and the formula in fp64."""
    upstream = torch.ones((), device=x.device) if upstream is None else upstream
    exact = {k: v for k, v in options.items() if k != "backend"}
    if isinstance(exact.get("alpha"), torch.Tensor):
        exact["alpha"] = exact["alpha"].double()
    shares = t.double() if t.is_floating_point() else t
    return (
        step(lambda x: fusedloss.focal(x, t, **options), x, upstream),
        step(lambda x: written_out(x, shares, **exact), x.double(), upstream),
    )


def close(found, wanted, dtype=torch.float64):
    tolerance = TOLERANCE[dtype]
    scale = wanted.abs().nan_to_num(0, 0, 0).max().item() if wanted.numel() else 0.0
    torch.testing.assert_close(
        found.double(), wanted.double(), rtol=tolerance, atol=tolerance * scale * 0.3 + 1e-13, equal_nan=True
    )


def check(kind, shape, dtype, gamma, alpha, reduction, backend, device="cpu", seed=0, **options):
    torch.manual_seed(seed)
    x, t = example(kind, shape, dtype, seed, device)
    if kind == "classes" and alpha is not None:
        alpha = torch.rand(shape[1], device=device).to(dtype)
    rows = t.shape if reduction == "none" else ()
    upstream = torch.rand(rows, device=device)
    found, wanted = both(x, t, upstream, gamma=gamma, alpha=alpha, reduction=reduction, backend=backend, **options)
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and found[0].shape == rows
    assert found[1].dtype == dtype and found[1].shape == shape
    close(found[0], wanted[0], torch.float32 if dtype != torch.float64 else dtype)
    close(found[1], wanted[1], dtype)


# The value and its gradient -------------------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_formula(kind, gamma, dtype, backend):
    if backend == "triton" and dtype == torch.float64:
        with pytest.raises(fusedloss.UnsupportedError, match=r"no kernel for torch\.float64"):
            fusedloss.focal(*example(kind), backend=backend)
        return
    for i, shape in enumerate([(6, 5), (2, 4, 3), (2, 18, 2, 1)]):
        with classes_first(i == 1):
            check(kind, shape, dtype, gamma, [None, 0.25, 1.0][i], REDUCTIONS[i], backend)


@settings(deadline=None, max_examples=80)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(0, 5),
    C=st.integers(1, 20),
    behind=st.lists(st.integers(1, 3), max_size=2),
    gamma=st.sampled_from(GAMMAS) | st.floats(0, 6),
    alpha=st.none() | st.floats(0, 1),
    ignore_index=st.sampled_from([-100, 0, 7]),
    reduction=st.sampled_from(REDUCTIONS),
    backend=st.sampled_from(BACKENDS),
    turned=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_options_together(kind, rows, C, behind, gamma, alpha, ignore_index, reduction, backend, turned, seed):
    dtype = torch.float32 if backend == "triton" else torch.float64
    options = {"ignore_index": ignore_index} if kind == "classes" else {}
    if kind == "classes" and C == 1:
        C = 2  # one class is certain: 0^gamma, tested below
    with classes_first(turned):
        check(kind, (rows, C, *behind), dtype, gamma, alpha, reduction, backend, seed=seed, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=identify)
@pytest.mark.parametrize("kind", KINDS)
def test_inside_the_error_budget(kind, dtype, backend):
    x, t = example(kind, (40, 6), dtype)
    eager = testing.value_and_gradients(lambda x: written_out(x, t), [x])
    found, exact = both(x, t, backend=backend)
    for a, b, c in zip(found, eager, exact, strict=True):
        assert testing.budget_share(a, b, c, dtype) <= 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_gamma_0_is_cross_entropy(backend):
    for kind, theirs in (
        ("labels", F.binary_cross_entropy_with_logits),
        ("soft labels", F.binary_cross_entropy_with_logits),
        ("classes", F.cross_entropy),
    ):
        x, t = example(kind, (6, 5, 3), torch.float32)
        for reduction in REDUCTIONS:
            found = step(
                lambda x, t=t, r=reduction: fusedloss.focal(x, t, gamma=0, reduction=r, backend=backend),
                x,
                torch.ones(()),
            )
            wide = t.double() if t.is_floating_point() else t
            wanted = step(lambda x, t=wide, f=theirs, r=reduction: f(x, t, reduction=r), x.double(), torch.ones(()))
            for a, b in zip(found, wanted, strict=True):
                close(a, b, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_of_any_shape_and_of_another_dtype(backend):
    for shape in ((), (1,), (7,), (2, 3, 2, 2)):
        check("soft labels", shape, torch.float32, 1.5, 0.3, "none", backend)
    x, t = example("soft labels", (6, 5), torch.float32)
    for first, second in ((torch.float32, torch.bfloat16), (torch.float16, torch.float32)):
        found, wanted = both(x.to(first), t.to(second), backend=backend)
        assert found[0].dtype == torch.float32 and found[1].dtype == first
        close(found[0], wanted[0], torch.float32)
        close(found[1], wanted[1], first)


def test_promoted_dtypes_decide_the_losss():
    x, t = example("soft labels", (6, 5), torch.float64)
    assert fusedloss.focal(x.float(), t).dtype == torch.float64
    assert fusedloss.focal(x.half(), t.bfloat16()).dtype == torch.float32


# Degenerate inputs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_costs_nothing(backend):
    """A mean over no elements, no rows, or none but ignored ones is 0, and has no gradient."""
    cases = [(torch.zeros(shape), torch.zeros(shape), {}) for shape in ((0,), (0, 3), (2, 0))]
    cases += [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), {}),
        (torch.zeros(2, 3, 0), torch.zeros(2, 0, dtype=torch.long), {}),
        (torch.randn(4, 3), torch.full((4,), 7), {"ignore_index": 7}),
        (torch.randn(4, 3), torch.full((4,), -100), {"alpha": torch.ones(3)}),
    ]
    for x, t, options in cases:
        for reduction in REDUCTIONS:
            loss, grad = step(
                lambda x, t=t, o=options, r=reduction: fusedloss.focal(x, t, reduction=r, backend=backend, **o),
                x,
                torch.ones(()),
            )
            assert (loss == 0).all() and (grad == 0).all() and grad.shape == x.shape
            assert loss.shape == (t.shape if reduction == "none" else ())


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_an_ignored_row_holds_does_not_matter(backend):
    x, t = example("classes", (6, 5), torch.float32)
    t[[1, 4]] = 9
    function = lambda x: fusedloss.focal(x, t, ignore_index=9, backend=backend)
    wanted = step(function, x, torch.ones(()))
    x[1, 0], x[4, 2] = torch.nan, torch.inf
    for a, b in zip(step(function, x, torch.ones(())), wanted, strict=True):
        assert torch.equal(a, b)


EXTREME = [0.0, 1e-3, 5.0, 17.0, 40.0, 80.0, 90.0, 300.0, 1e4]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_labels_beside_logits_of_any_size(gamma, backend):
    """Value and gradient are finite and have all of fp32's digits, down to where fp32 itself ends."""
    size = torch.tensor(EXTREME)
    x = torch.cat([size, -size]).repeat(3)
    t = torch.tensor([0.0, 1.0, 0.3]).repeat_interleave(2 * len(EXTREME))
    found = step(
        lambda x: fusedloss.focal(x, t, gamma=gamma, alpha=0.25, reduction="none", backend=backend), x, torch.ones(())
    )
    z, s = x.double(), t.double()
    p, q = torch.sigmoid(z), torch.sigmoid(-z)  # both to their last digits
    wrong = p * (1 - s) + q * s
    ce = -(s * F.logsigmoid(z) + (1 - s) * F.logsigmoid(-z))
    alpha = 0.25 * s + 0.75 * (1 - s)
    slope = gamma * p * q * (1 - 2 * s) * (ce / wrong.clamp(min=1e-300)) + (p * (1 - s) - q * s)
    power = wrong**gamma
    for a, b in zip(found, (alpha * power * ce, alpha * power * slope), strict=True):
        assert a.isfinite().all()
        # power is exp(gamma log q): an eps of log(q), which is up to 87, costs gamma * 87 * eps of it on a GPU
        torch.testing.assert_close(a.double(), b, rtol=2e-6 + gamma * 5e-6, atol=3e-38)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_classes_beside_logits_of_any_size(gamma, backend):
    """A certain target's loss and gradient keep their digits too; log_softmax gives 0 from 17 on."""
    x = torch.zeros(2 * len(EXTREME), 3)
    x[: len(EXTREME), 1] = torch.tensor(EXTREME)
    x[len(EXTREME) :, 2] = torch.tensor(EXTREME)
    t = torch.ones(len(x), dtype=torch.long)
    found = step(lambda x: fusedloss.focal(x, t, gamma=gamma, reduction="none", backend=backend), x, torch.ones(()))
    z = x.double()
    p = z.softmax(1)
    rest = p[:, 0] + p[:, 2]
    nll = torch.where(rest < 0.5, -torch.log1p(-rest), -z.log_softmax(1)[:, 1])
    loss = rest**gamma * nll
    ratio = torch.where(rest == 0, 1, nll / rest.clamp(min=1e-300))
    slope = rest**gamma * (1 + gamma * p[:, 1] * ratio)  # of -log p_t, whose derivative is p - onehot
    grad = p * slope[:, None]
    grad[:, 1] = -rest * slope
    for a, b in zip(found, (loss, grad), strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a.double(), b, rtol=1e-5 + gamma * 5e-6, atol=3e-38)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_one_class_is_certain(gamma, backend):
    loss, grad = step(
        lambda x: fusedloss.focal(x, torch.zeros(4, dtype=torch.long), gamma=gamma, backend=backend),
        torch.randn(4, 1),
        torch.ones(()),
    )
    assert loss == 0 and (grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_nan_out(kind, gamma, backend):
    x, t = example(kind, (6, 5), torch.float32)
    x[2, 3] = torch.nan
    loss, grad = step(
        lambda x: fusedloss.focal(x, t, gamma=gamma, reduction="none", backend=backend), x, torch.ones(())
    )
    where = torch.zeros(6, 5, dtype=torch.bool)
    where[2, 3] = True
    assert torch.equal(loss.isnan(), where if t.is_floating_point() else where.any(1))
    assert grad[2, 3].isnan() and grad[[0, 1, 3, 4, 5]].isfinite().all()
    assert fusedloss.focal(x, t, gamma=gamma, backend=backend).isnan()
    if kind != "classes":
        x, t = example(kind, (6, 5), torch.float32)
        t[0, 0] = torch.nan
        assert fusedloss.focal(x, t, gamma=gamma, backend=backend).isnan()


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_an_fp16_mean_keeps_gradients_that_a_gradient_scaler_enlarges(kind, backend, monkeypatch):
    monkeypatch.undo()
    x, t = example(kind, (1 << 8, 4), torch.float16)
    found, wanted = both(x, t, torch.tensor(2.0**15), backend=backend)
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=2e-3, atol=2.0**-24)


# Gradients of what usually has none, and second ones ------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_labels_and_alpha_that_require_grad_have_one(backend):
    x, t = example("soft labels")
    found = testing.value_and_gradients(lambda x, t: fusedloss.focal(x, t, alpha=0.3, backend=backend), [x, t])
    wanted = testing.value_and_gradients(lambda x, t: written_out(x, t, alpha=0.3), [x, t])
    for a, b in zip(found, wanted, strict=True):
        close(a, b)
    (x, t), alpha = example("classes"), torch.rand(5, dtype=torch.float64)
    found = testing.value_and_gradients(lambda x, a: fusedloss.focal(x, t, alpha=a, backend=backend), [x, alpha])
    wanted = testing.value_and_gradients(lambda x, a: written_out(x, t, alpha=a), [x, alpha])
    for a, b in zip(found, wanted, strict=True):
        close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_the_references(kind):
    x, t = example(kind)
    x.requires_grad_()
    with pytest.raises(
        fusedloss.UnsupportedError,
        match=r"backend must be 'reference' for second derivatives \(create_graph=True\)",
    ):
        torch.autograd.grad(fusedloss.focal(x, t, backend="chunked"), x, create_graph=True)
    second = []
    for f, o in ((fusedloss.focal, {"backend": "reference"}), (written_out, {})):
        (grad,) = torch.autograd.grad(f(x, t, **o), x, create_graph=True)
        second.append(torch.autograd.grad(grad.square().sum(), x)[0])
    close(*second)


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_see_the_formula(kind):
    """torch.func.grad, forward-mode derivatives, the compiler."""
    x, t = example(kind)
    close(torch.func.grad(fusedloss.focal)(x, t), torch.func.grad(written_out)(x, t))
    tangent = torch.randn_like(x)
    found, wanted = (torch.func.jvp(lambda x, f=f: f(x, t), (x,), (tangent,)) for f in (fusedloss.focal, written_out))
    for a, b in zip(found, wanted, strict=True):
        close(a, b)
    torch._dynamo.reset()
    compiled = torch.compile(fusedloss.focal, fullgraph=True, backend="aot_eager")
    found, wanted = (testing.value_and_gradients(lambda x, f=f: f(x, t), [x]) for f in (compiled, written_out))
    for a, b in zip(found, wanted, strict=True):
        close(a, b)


# What is kept, and what is left alone ---------------------------------------------------------------------------------


def saved_bytes(function):
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(id(t), t), lambda t: t):
        function()
    return sum(t.numel() * t.itemsize for t in saved.values())


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=identify)
@pytest.mark.parametrize("kind", KINDS)
def test_one_tensor_of_the_logits_size_is_kept(kind, dtype, backend):
    x, t = example(kind, (16, 10), dtype)
    x.requires_grad_()
    for reduction in REDUCTIONS:
        loss = lambda f, r=reduction, **o: f(x, t, reduction=r, **o)
        found = saved_bytes(lambda f=loss: f(fusedloss.focal, backend=backend))
        per_row = 4 * 16 if kind == "classes" and dtype == torch.float16 else 0
        assert found == x.numel() * x.itemsize + per_row
        assert found <= saved_bytes(lambda f=loss: f(written_out))
    assert saved_bytes(lambda: fusedloss.focal(x.detach(), t, backend=backend)) == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_any_strides_and_inputs_that_are_never_written_to(kind, backend):
    x, t = example(kind, (6, 5, 4), torch.float32)
    alpha = torch.rand(5, 2)[:, 0] if kind == "classes" else 0.25
    _, wanted = both(x, t, reduction="none", alpha=alpha)
    layouts = [
        lambda y: y.transpose(0, -1).contiguous().transpose(0, -1),
        lambda y: torch.stack([y, y * 0 + 9], dim=-1)[..., 0],
        lambda y: torch.cat([y * 0 + 9, y], dim=0)[len(y) :],
    ]
    for first in layouts:
        for second in layouts:
            leaf, other = first(x).detach().requires_grad_(), second(t)
            loss = fusedloss.focal(leaf, other, reduction="none", alpha=alpha, backend=backend)
            (grad,) = torch.autograd.grad(loss.sum(), leaf)
            close(loss, wanted[0], torch.float32)
            close(grad, wanted[1], torch.float32)
            assert torch.equal(leaf, x) and torch.equal(other, t)


# Errors ---------------------------------------------------------------------------------------------------------------

X, T, C = torch.zeros(4, 3), torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
BAD = [
    (lambda f: f([1.0], T), TypeError, "input must be a tensor, got a list"),
    (lambda f: f(X, None), TypeError, "target must be a tensor, got None"),
    (lambda f: f(X.long(), T), TypeError, r"input must be float16.*, got torch\.int64"),
    (lambda f: f(X.to_sparse(), T), TypeError, "input must be a dense tensor, got layout torch.sparse_coo"),
    (lambda f: f(X, C.int()), TypeError, r"target must be floating labels or int64 classes, got torch\.int32"),
    (lambda f: f(X, T[:2]), ValueError, r"target must have input's shape, \[4, 3\], got \[2, 3\]"),
    (lambda f: f(X, T.to("meta")), ValueError, "target must be on cpu, like input, got meta"),
    (lambda f: f(X, T, gamma=-1), ValueError, "gamma must be a number of at least 0, got -1"),
    (lambda f: f(X, T, gamma=math.nan), ValueError, "gamma must be a finite number, got nan"),
    (lambda f: f(X, T, gamma="2"), TypeError, "gamma must be a number, got '.*', a str"),
    (lambda f: f(X, T, alpha=2.0), ValueError, r"alpha must be a number from 0 to 1, got 2\.0"),
    (
        lambda f: f(X, T, alpha=torch.ones(3)),
        TypeError,
        "alpha must be a number from 0 to 1 or None if target holds labels, got a tensor, which is for classes",
    ),
    (lambda f: f(X, T, ignore_index=1), ValueError, "ignore_index must be -100, .*, got 1"),
    (lambda f: f(X, T, reduction="average"), ValueError, "reduction must be one of.*, got 'average'"),
    (lambda f: f(X, T, backend="fast"), ValueError, "backend must be one of.*, got 'fast'"),
    (lambda f: f(X, T, backend="cuda"), fusedloss.UnsupportedError, "no kernel for this loss"),
    (
        lambda f: f(X[0], C[0]),
        ValueError,
        r"input must be \[M, C\] or \[M, C, d1, ...\] if target holds classes, got shape \[3\]",
    ),
    (lambda f: f(X, C[:3]), ValueError, r"target must be int64 \[4\], got shape \[3\]"),
    (lambda f: f(X[:, :, None], C), ValueError, r"target must be int64 \[4, 1\], got shape \[4\]"),
    (lambda f: f(X, C + 1), IndexError, r"target\[2\] must be a class from 0 to 2, or -100.*, got 3"),
    (lambda f: f(X, C, alpha=0.25), TypeError, r"alpha must be a floating tensor \[3\], got 0.25, a float"),
    (
        lambda f: f(X, C, alpha=torch.ones(4)),
        ValueError,
        r"alpha must have shape \[3\], one number per class, got \[4\]",
    ),
    (lambda f: f(X, C, ignore_index=1.5), TypeError, "ignore_index must be a whole number, got .*, a float"),
    (lambda f: f(X, C, backend="fast"), ValueError, "backend must be one of.*, got 'fast'"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[str(i) for i in range(len(BAD))])
def test_errors_name_the_argument_and_what_it_needs(call, error, message):
    with pytest.raises(error, match=message):
        call(fusedloss.focal)


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_values_are_not_read_a_class_out_of_range_makes_the_loss_nan(backend, monkeypatch):
    monkeypatch.setattr(classes.checks, "reads_values", lambda x: False)
    for alpha in (None, torch.rand(3)):
        found = fusedloss.focal(
            torch.randn(4, 3), torch.tensor([0, 3, -100, -1]), alpha=alpha, reduction="none", backend=backend
        )
        assert found.isnan().tolist() == [False, True, False, True] and found[2] == 0


# The module -----------------------------------------------------------------------------------------------------------


def test_a_modules_alpha_of_classes_is_a_buffer():
    """It goes where the module goes, as the weights of torch.nn.CrossEntropyLoss."""
    (x, t), alpha = example("classes"), torch.tensor([1.0, 2.0, 0.5, 0.0, 1.5])
    made = fusedloss.FocalLoss(alpha=alpha)
    assert list(made.state_dict()) == ["alpha"] and made.double().alpha.dtype == torch.float64
    close(made(x, t), written_out(x, t, alpha=alpha.double()))


# GPU ------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=identify)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind, gamma, dtype, backend):
    for shape in ((333, 77), (3, 21, 15, 17)):
        for reduction in REDUCTIONS:
            check(kind, shape, dtype, gamma, 0.25, reduction, backend, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_read_back_from_a_gpu(kind, backend):
    x, t = example(kind, (64, 10), torch.float32, device="cuda")
    x.requires_grad_()
    fusedloss.focal(x, t, backend=backend).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fusedloss.focal(x, t, backend=backend).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
