"""Cross-entropy of logits with classes or class probabilities, a twin of torch.nn.functional.cross_entropy.

torch in fp64 says what is right, torch in the inputs' dtype which dtype and shape come back; what torch has not
(z_loss, softcap) is written out around it.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import math
import pickle
import warnings
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import fusedloss
from fusedloss import testing
from fusedloss.rowwise import classes

# A backend, and the sizes under which its walk turns at tens of elements: in blocks, or with the classes first.
WAYS = {
    "reference": ("reference", {}),
    "chunked": ("chunked", {}),
    "chunked, in blocks": ("chunked", {"BLOCK": 16, "FEW_CLASSES": 1}),
    "chunked, classes first": ("chunked", {"BLOCK": 16, "FEW_ELEMENTS": 0}),
    "triton": ("triton", {}),
}
KERNELS = [way for way in WAYS if way != "reference"]
REDUCTIONS = ["mean", "sum", "none"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
VARIANTS = {
    "classes": {},
    "weights": {"weight": True},
    "ignored": {"ignore_index": 1},
    "smoothed": {"label_smoothing": 0.2},
    "probabilities": {"probabilities": True},
    "probabilities, weights, smoothed": {"probabilities": True, "weight": True, "label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.1},
    "softcap": {"softcap": 2.0},
    "probabilities, z_loss, softcap": {"probabilities": True, "z_loss": 0.1, "softcap": 2.0},
    "all": {"weight": True, "ignore_index": 1, "label_smoothing": 0.2, "z_loss": 0.1, "softcap": 2.0},
}

MIXED = ["classes", "weights", "probabilities, weights, smoothed", "z_loss", "all"]


def identify(value):
    return str(value).removeprefix("torch.")


@contextlib.contextmanager
def walking(way):
    """Gives the name of the backend."""
    backend, sizes = WAYS[way]
    with mock.patch.multiple(classes, **sizes) if sizes else contextlib.nullcontext():
        yield backend


def example(shape, variant, dtype=torch.float64, seed=0, device="cpu"):
    """Logits, target, and the options."""
    generator = torch.Generator().manual_seed(seed)
    options = dict(variant)
    d = 0 if len(shape) == 1 else 1
    C, rows = shape[d], shape[:d] + shape[d + 1 :]
    x = (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    if options.pop("probabilities", False):
        target = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    else:
        target = torch.randint(0, C, rows, generator=generator)
    if options.get("weight"):
        options["weight"] = (torch.rand(C, generator=generator, dtype=torch.float64) + 0.1).to(dtype).to(device)
    return x.to(device), target.to(device), options


def wide(options):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}


def written_out(x, target, *, reduction="mean", ignore_index=-100, z_loss=0.0, softcap=None, **options):
    z = x if softcap is None else softcap * torch.tanh(x / softcap)
    loss = F.cross_entropy(z, target, reduction=reduction, ignore_index=ignore_index, **options)
    if z_loss:
        square = z.logsumexp(0 if x.dim() == 1 else 1).square()
        counts = torch.ones_like(square) if target.is_floating_point() else (target != ignore_index).to(z.dtype)
        square = z_loss * square * counts
        loss = loss + {"none": square, "sum": square.sum(), "mean": square.sum() / counts.sum()}[reduction]
    return loss


def step(function, x, upstream):
    """The loss and its gradient, weighed with `upstream`, which has its shape."""
    leaf = x.detach().clone().requires_grad_()
    loss = function(leaf)
    return loss.detach(), torch.autograd.grad(loss, leaf, upstream.to(loss.dtype).expand(loss.shape))[0]


def close(found, wanted, dtype=torch.float64):
    tolerance = TOLERANCE[dtype]
    scale = wanted.abs().nan_to_num(0, 0, 0).max().item() if wanted.numel() else 0.0
    # Gradients are differences of shares, and 1 - tanh^2 is one of numbers around 1: a few eps of these.
    least = 1e-13 if dtype == torch.float64 else 3e-7
    torch.testing.assert_close(
        found.double(), wanted.double(), rtol=tolerance, atol=tolerance * scale * 0.3 + least, equal_nan=True
    )


def check(shape, variant, reduction, dtype, way, device="cpu", seed=0):
    """Gives what was found, what torch has in that dtype, and what is right."""
    torch.manual_seed(seed)
    x, target, options = example(shape, variant, dtype, seed, device)
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    upstream = torch.rand(rows if reduction == "none" else (), device=device).to(dtype)
    own = step(lambda x: written_out(x, target, reduction=reduction, **options), x, upstream)
    with walking(way) as backend:
        found = step(
            lambda x: fusedloss.cross_entropy(x, target, reduction=reduction, backend=backend, **options), x, upstream
        )
    shares = target.double() if target.is_floating_point() else target
    wanted = step(lambda x: written_out(x, shares, reduction=reduction, **wide(options)), x.double(), upstream.double())
    if wanted[0].dim() == 0 and wanted[0].isnan():  # the mean of no rows, whose gradient is NaN in torch at times
        wanted = wanted[0], torch.zeros_like(x)
    for a, b, c in zip(found, own, wanted, strict=True):
        assert a.dtype == b.dtype == dtype and a.shape == b.shape
        close(a, c, dtype)
    return found, own, wanted


# The value and its gradient -------------------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_gradients_dtypes_and_shapes_are_torchs(variant, dtype, way):
    """And errors within a budget: twice torch's in that dtype, and an eps."""
    if way == "triton" and dtype == torch.float64:
        with pytest.raises(fusedloss.UnsupportedError, match=r"no kernel for torch\.float64"):
            fusedloss.cross_entropy(torch.zeros(2, 3).double(), torch.tensor([0, 1]), backend="triton")
        return
    found, own, wanted = check((9, 33), VARIANTS[variant], REDUCTIONS[len(variant) % 3], dtype, way)
    if dtype != torch.float64:
        assert all(testing.budget_share(*each, dtype) <= 1 for each in zip(found, own, wanted, strict=True))


@settings(deadline=None, max_examples=120)
@given(data=st.data())
def test_any_options_together(data):
    rows, behind = data.draw(st.integers(0, 5)), data.draw(st.lists(st.integers(0, 3), max_size=2))
    C = data.draw(st.integers(1, 20))
    shape = (C,) if data.draw(st.integers(0, 9)) == 0 else (rows, C, *behind)
    variant = {
        "weight": data.draw(st.booleans()) or None,
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.1, 1.0])),
    }
    empty = 0 in shape
    if not empty:  # what torch has makes nothing of nothing; the rest is ours
        variant["z_loss"] = data.draw(st.sampled_from([0.0, 1e-3, 0.1]))
        variant["softcap"] = data.draw(st.sampled_from([None, 0.5, 30.0]))
    if data.draw(st.booleans()):
        variant["probabilities"] = True
    else:
        variant["ignore_index"] = data.draw(st.sampled_from([-100, 0, C - 1, 255]))
    way = data.draw(st.sampled_from(list(WAYS)))
    dtype = data.draw(st.sampled_from(DTYPES[1:] if way == "triton" else DTYPES))
    check(shape, variant, data.draw(st.sampled_from(REDUCTIONS)), dtype, way, seed=data.draw(st.integers(0, 999)))


@pytest.mark.parametrize("way", WAYS)
def test_uint8_classes(way):
    x, target, _ = example((40, 3), {}, torch.float32)
    with walking(way) as backend:
        for ignored in (-100, 1, 255):
            found = fusedloss.cross_entropy(x, target.to(torch.uint8), ignore_index=ignored, backend=backend)
            close(found, F.cross_entropy(x, target.to(torch.uint8), ignore_index=ignored), torch.float32)
        target[3] = 255
        found = fusedloss.cross_entropy(x, target.to(torch.uint8), ignore_index=255, backend=backend)
        close(found, F.cross_entropy(x, target, ignore_index=255), torch.float32)


def test_dtypes_that_differ_promote_as_in_torch():
    """Logits, probabilities and weights of any floating dtype beside each other."""
    x, shares, options = example((6, 5), {"probabilities": True, "weight": True})
    for first, second, third in itertools.product(DTYPES, DTYPES[:3], [*DTYPES[1:], None]):
        target, weight = shares.to(second), None if third is None else options["weight"].to(third)
        for reduction in ("mean", "none"):
            found, wanted = (
                step(
                    lambda x, f=f, t=target, w=weight, r=reduction: f(x, t, w, reduction=r), x.to(first), torch.ones(())
                )
                for f in (fusedloss.cross_entropy, F.cross_entropy)
            )
            lowest = max((d for d in (first, second, third) if d), key=TOLERANCE.__getitem__)
            for a, b in zip(found, wanted, strict=True):
                assert a.dtype == b.dtype, (first, second, third)
                torch.testing.assert_close(a, b, rtol=3 * TOLERANCE[lowest], atol=3 * TOLERANCE[lowest])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=identify)
def test_under_autocast_the_loss_is_fp32_as_in_torch(dtype):
    for variant in ("classes", "probabilities", "all"):
        x, target, options = example((6, 5), VARIANTS[variant], torch.bfloat16)
        with torch.autocast("cpu", dtype=dtype):
            for reduction in REDUCTIONS:
                found = fusedloss.cross_entropy(x, target, reduction=reduction, **options)
                wanted = written_out(x.float(), target, reduction=reduction, **options)
                assert found.dtype == torch.float32
                close(found, wanted, torch.float32)
            assert fusedloss.cross_entropy(x[:0], target[:0]).dtype == F.cross_entropy(x[:0], target[:0]).dtype


def test_the_deprecated_pair_goes_first_and_warns():
    x, target, _ = example((4, 3), {})
    for size_average, reduce in itertools.product((None, True, False), repeat=2):
        if size_average is None and reduce is None:
            continue
        options = {"size_average": size_average, "reduce": reduce, "reduction": "sum"}
        with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
            found = fusedloss.cross_entropy(x, target, **options)
        with pytest.warns(UserWarning):
            wanted = F.cross_entropy(x, target, **options)
        assert found.shape == wanted.shape
        close(found, wanted)


def test_parameters_are_torchs_in_their_order_and_then_ours_by_name():
    for ours, theirs in (
        (fusedloss.cross_entropy, F.cross_entropy),
        (fusedloss.CrossEntropyLoss, torch.nn.CrossEntropyLoss),
    ):
        a, b = (list(inspect.signature(f).parameters.values()) for f in (ours, theirs))
        assert [(p.name, p.default, p.kind) for p in a[: len(b)]] == [(p.name, p.default, p.kind) for p in b]
        assert [p.name for p in a[len(b) :]] == ["z_loss", "softcap", "backend"]
        assert all(p.kind is p.KEYWORD_ONLY for p in a[len(b) :])


# Degenerate inputs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("variant", ["classes", "weights", "smoothed", "probabilities"])
def test_a_mean_of_nothing_is_nan_and_a_sum_zero(variant, shape, way):
    x, target, options = example(shape, VARIANTS[variant], torch.float32)
    with walking(way) as backend:
        for reduction in REDUCTIONS:
            found, wanted = (
                step(lambda x, f=f, r=reduction, o=o: f(x, target, reduction=r, **options, **o), x, torch.ones(()))
                for f, o in ((fusedloss.cross_entropy, {"backend": backend}), (F.cross_entropy, {}))
            )
            for a, b in zip(found, wanted, strict=True):
                assert a.shape == b.shape and a.dtype == b.dtype
                torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", ["classes", "weights", "smoothed", "z_loss"])
def test_a_mean_of_ignored_rows_is_nan_without_a_gradient(variant, way):
    x, _, options = example((6, 3), VARIANTS[variant], torch.float32)
    target = torch.full((6,), -100)
    with walking(way) as backend:
        for reduction in REDUCTIONS:
            loss, grad = step(
                lambda x, r=reduction: fusedloss.cross_entropy(x, target, reduction=r, backend=backend, **options),
                x,
                torch.ones(()),
            )
            assert loss.isnan() if reduction == "mean" else (loss == 0).all()
            assert (grad == 0).all()


@pytest.mark.parametrize("way", WAYS)
def test_what_an_ignored_row_holds_does_not_matter(way):
    """NaN, infinities: neither its loss nor its gradient is anything but 0."""
    x, target, options = example((40, 3), VARIANTS["all"], torch.float32)
    target[:3] = 1
    with walking(way) as backend:
        function = lambda x: fusedloss.cross_entropy(x, target, backend=backend, **options)
        wanted = step(function, x, torch.ones(()))
        x[0], x[1, 2], x[2, 0] = torch.nan, torch.inf, -torch.inf
        for a, b in zip(step(function, x, torch.ones(())), wanted, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", MIXED)
def test_equal_and_extreme_logits(variant, way):
    """+-1e4 and all equal: finite, and torch's in fp64."""
    _, target, options = example((6, 5), VARIANTS[variant], torch.float32)
    x = torch.zeros(6, 5)
    x[1], x[2], x[3] = 1e4, -1e4, torch.tensor([1e4, -1e4, 0.0, 1e4, -1e4])
    x[4], x[5] = torch.tensor([-1e4, -1e4, 1e4, -1e4, -1e4]), torch.tensor([300.0, 0, -300, 100, 200])
    with walking(way) as backend:
        found = step(
            lambda x: fusedloss.cross_entropy(x, target, backend=backend, reduction="none", **options),
            x,
            torch.ones(()),
        )
    shares = target.double() if target.is_floating_point() else target
    wanted = step(lambda x: written_out(x, shares, reduction="none", **wide(options)), x.double(), torch.ones(()))
    for a, b in zip(found, wanted, strict=True):
        assert a.isfinite().all()
        close(a, b, torch.float32)


@pytest.mark.parametrize("way", KERNELS)
def test_a_certain_target_keeps_its_digits(way):
    """log_softmax gives 0 from 17 on; here loss and gradient are right to fp32's relative precision, entry by entry."""
    size = torch.tensor([0.0, 1.0, 5.0, 10.0, 17.0, 30.0, 60.0, 80.0])
    x = torch.randn(8, 5)
    x[:, 2] += size
    target = torch.full((8,), 2)
    with walking(way) as backend:
        loss, grad = step(
            lambda x: fusedloss.cross_entropy(x, target, reduction="none", backend=backend), x, torch.ones(())
        )
    z = x.double()
    others = (z - z[:, 2:3]).exp().index_fill(1, torch.tensor([2]), 0)
    wanted = others / (1 + others.sum(1, keepdim=True))
    wanted[:, 2] = -wanted.sum(1)
    torch.testing.assert_close(loss.double(), others.sum(1).log1p(), rtol=2e-6, atol=0)
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=0)
    assert loss[-1] > 0 and F.cross_entropy(x[-1:], target[-1:]) == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", MIXED)
def test_nan_in_nan_out(variant, way):
    """In the row's loss and in its gradient; the other rows are not touched."""
    x, target, options = example((6, 5), VARIANTS[variant], torch.float32)
    if not target.is_floating_point():
        target = torch.tensor([0, 2, 3, 4, 0, 2])
    for column in (0, 2):
        x[1, column] = torch.nan
        with walking(way) as backend:
            loss, grad = step(
                lambda x, b=backend: fusedloss.cross_entropy(x, target, reduction="none", backend=b, **options),
                x,
                torch.ones(()),
            )
            assert loss.isnan().tolist() == [i == 1 for i in range(6)]
            assert grad[1].isnan().any() and grad[[0, 2, 3, 4, 5]].isfinite().all()
            assert fusedloss.cross_entropy(x, target, backend=backend, **options).isnan()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_infinite_logits_are_as_in_torch(bad, label_smoothing, way):
    """-inf shuts a class out: of the target, the loss is inf. +inf is inf - inf."""
    x = torch.randn(4, 3)
    x[1, 0], x[2, 1] = bad, bad
    target = torch.tensor([0, 0, 0, 2])
    with walking(way) as backend:
        found, wanted = (
            step(
                lambda x, f=f, o=o: f(x, target, reduction="none", label_smoothing=label_smoothing, **o),
                x,
                torch.ones(()),
            )
            for f, o in ((fusedloss.cross_entropy, {"backend": backend}), (F.cross_entropy, {}))
        )
    torch.testing.assert_close(found[0], wanted[0], equal_nan=True)
    if bad < 0:
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-7)
    else:
        assert not found[1][1:3].isfinite().all(1).any() and found[1][[0, 3]].isfinite().all()


@pytest.mark.parametrize("way", KERNELS)
def test_an_fp16_mean_keeps_gradients_that_a_gradient_scaler_enlarges(way):
    """1 / n and small probabilities are far below fp16's smallest number; times 2^15 they are not."""
    n = 1 << 8
    x, target, _ = example((n, 4), {}, torch.float16)
    x *= 3
    scaler = torch.tensor(2.0**15, dtype=torch.float16)
    with walking(way if way != "chunked, in blocks" else "chunked") as backend:
        found = step(lambda x: fusedloss.cross_entropy(x, target, backend=backend), x, scaler)[1]
    wanted = step(lambda x: F.cross_entropy(x, target), x.double(), scaler.double())[1]
    torch.testing.assert_close(found.double(), wanted, rtol=2e-3, atol=2.0**-24)


# Gradients of what usually has none, and second ones ------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_weights_and_probabilities_that_require_grad_have_one(label_smoothing, way):
    dtype = torch.float32 if way == "triton" else torch.float64
    x, shares, options = example((6, 5), {"probabilities": True, "weight": True}, dtype)
    index = torch.randint(0, 5, (6,))

    def nll(x, w):  # torch has no gradient of the weights of classes
        log_p = x.log_softmax(1)
        picked = w[index]
        first = -(picked * log_p.gather(1, index[:, None])[:, 0]).sum() / picked.sum()
        smooth = -(w * log_p).sum() / picked.sum() / 5
        return (1 - label_smoothing) * first + label_smoothing * smooth

    with walking(way) as backend:
        chosen = {"label_smoothing": label_smoothing, "backend": backend}
        found = testing.value_and_gradients(
            lambda x, q, w: fusedloss.cross_entropy(x, q, w, **chosen), [x, shares, options["weight"]]
        )
        by_weight = testing.value_and_gradients(
            lambda x, w: fusedloss.cross_entropy(x, index, w, **chosen), [x, options["weight"]]
        )
    wanted = testing.value_and_gradients(
        lambda x, q, w: F.cross_entropy(x, q, w, label_smoothing=label_smoothing),
        [x.double(), shares.double(), options["weight"].double()],
    )
    wanted_by_weight = testing.value_and_gradients(nll, [x.double(), options["weight"].double()])
    for a, b in zip([*found, *by_weight], [*wanted, *wanted_by_weight], strict=True):
        close(a, b, dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_second_derivatives_are_the_references(variant):
    x, target, options = example((4, 5), VARIANTS[variant])
    x.requires_grad_()
    for way in ("chunked", "chunked, classes first"):
        with (
            walking(way) as backend,
            pytest.raises(
                fusedloss.UnsupportedError,
                match=r"backend must be 'reference' for second derivatives \(create_graph=True\)",
            ),
        ):
            loss = fusedloss.cross_entropy(x, target, backend=backend, **options)
            torch.autograd.grad(loss, x, create_graph=True)
    second = []
    for f, o in ((fusedloss.cross_entropy, {"backend": "reference"}), (written_out, {})):
        (grad,) = torch.autograd.grad(f(x, target, **options, **o), x, create_graph=True)
        second.append(torch.autograd.grad(grad.square().sum(), x)[0])
    close(*second)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=identify)
def test_a_graph_that_is_kept_gives_the_same_gradient_again(dtype, reduction, way):
    """Also where the first was written to: what is given away is not what is kept."""
    x, target, _ = example((6, 5), {}, dtype)
    x.requires_grad_()
    with walking(way) as backend:
        loss = fusedloss.cross_entropy(x, target, reduction=reduction, backend=backend)
        for upstream in (torch.ones_like(loss), torch.rand_like(loss)):
            first, second = (torch.autograd.grad(loss, x, upstream, retain_graph=True)[0] for _ in range(2))
            wanted = first.clone()
            first.zero_()
            assert torch.equal(second, wanted)
            assert torch.equal(torch.autograd.grad(loss, x, upstream, retain_graph=True)[0], wanted)
        loss.backward(upstream)
        assert torch.equal(x.grad, wanted)
        with pytest.raises(RuntimeError, match="a second time"):
            loss.backward(upstream)


@pytest.mark.parametrize("variant", ["classes", "all", "probabilities"])
def test_transforms_see_the_formula(variant):
    """torch.func.grad and vmap, forward-mode derivatives, batches of upstream gradients, the compiler."""
    x, target, options = example((4, 5, 3), VARIANTS[variant])
    ours, theirs = (lambda x, t, f=f: f(x, t, **options) for f in (fusedloss.cross_entropy, written_out))
    found, wanted = (torch.func.vmap(torch.func.grad(f), in_dims=-1)(x, target) for f in (ours, theirs))
    close(found, wanted)
    tangent = torch.randn_like(x)
    found, wanted = (torch.func.jvp(lambda x, f=f: f(x, target), (x,), (tangent,)) for f in (ours, theirs))
    for a, b in zip(found, wanted, strict=True):
        close(a, b)
    leaf = x.clone().requires_grad_()
    upstream = torch.tensor([0.0, 1, 2], dtype=torch.float64)
    found, wanted = (
        torch.autograd.grad(f(leaf, target), leaf, upstream, is_grads_batched=True)[0] for f in (ours, theirs)
    )
    close(found, wanted)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    found, wanted = (testing.value_and_gradients(lambda x, f=f: f(x, target), [x]) for f in (compiled, theirs))
    for a, b in zip(found, wanted, strict=True):
        close(a, b)


# What is kept, and what is left alone ---------------------------------------------------------------------------------


def saved_bytes(function):
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(id(t), t), lambda t: t):
        function()
    return sum(t.numel() * t.itemsize for t in saved.values())


@pytest.mark.parametrize("way", KERNELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_more_is_kept_than_in_torch(variant, way):
    """The gradient, of the logits' size and dtype, and for fp16 a number per row."""
    for dtype, shape in [(torch.float16, (6, 10)), (torch.float32, (2, 10, 3)), (torch.bfloat16, (6, 10))]:
        x, target, options = example(shape, VARIANTS[variant], dtype)
        x.requires_grad_()
        reduction = "none" if dtype == torch.bfloat16 else "mean"
        with walking(way) as backend:
            loss = lambda f, x=x, t=target, r=reduction, o=options, **b: f(x, t, reduction=r, **o, **b)
            found = saved_bytes(lambda f=loss, b=backend: f(fusedloss.cross_entropy, backend=b))
        gain = 4 * 6 if dtype == torch.float16 else 0
        assert 0 <= found - x.numel() * x.itemsize - gain <= 1  # a bool: whether a mean's weights add up to 0
        assert found <= saved_bytes(lambda f=loss: f(written_out))


@pytest.mark.parametrize("way", KERNELS)
def test_without_a_gradient_nothing_is_kept(way, monkeypatch):
    """Neither saved nor written."""
    x, target, _ = example((64, 10), {}, torch.float32)
    with walking(way) as backend:
        assert saved_bytes(lambda: fusedloss.cross_entropy(x, target, backend=backend)) == 0
        monkeypatch.setattr(classes._Walk, "forward", None)
        with torch.no_grad():
            assert not fusedloss.cross_entropy(x.requires_grad_(), target, backend=backend).requires_grad


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", MIXED)
def test_inputs_are_never_written_to(variant, way):
    for shape in ((6, 5), (3, 5, 4)):
        x, target, options = example(shape, VARIANTS[variant], torch.float32)
        x.requires_grad_()
        before = copy.deepcopy((x, target, options))
        with walking(way) as backend:
            loss = fusedloss.cross_entropy(x, target, reduction="none", backend=backend, **options)
            upstream = torch.rand(loss.shape)
            kept = upstream.clone()
            loss.backward(upstream)
        assert torch.equal(x, before[0]) and torch.equal(target, before[1]) and torch.equal(upstream, kept)
        assert options.get("weight") is None or torch.equal(options["weight"], before[2]["weight"])


LAYOUTS = [
    lambda y: y,
    lambda y: y.transpose(0, -1).contiguous().transpose(0, -1),
    lambda y: torch.stack([y, torch.full_like(y, 9)], dim=-1)[..., 0],
    lambda y: torch.cat([torch.full_like(y, 9), y], dim=0)[len(y) :],
    lambda y: y.movedim(1, -1).contiguous().movedim(-1, 1) if y.dim() > 1 else y,  # channels last
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", ["classes", "all", "probabilities, weights, smoothed"])
def test_any_strides(variant, way):
    for shape in ((6, 5), (3, 5, 2, 4)):
        x, target, options = example(shape, VARIANTS[variant], torch.float32)
        wanted = step(lambda x, t=target, o=options: written_out(x, t, reduction="none", **o), x, torch.ones(()))
        for first, second in zip(LAYOUTS, [*LAYOUTS[1:4], *LAYOUTS[:2]], strict=True):
            leaf, chosen = first(x).detach().requires_grad_(), dict(options)
            if "weight" in options:
                chosen["weight"] = LAYOUTS[2](options["weight"])
            with walking(way) as backend:
                loss = fusedloss.cross_entropy(leaf, second(target), reduction="none", backend=backend, **chosen)
            (grad,) = torch.autograd.grad(loss.sum(), leaf)
            close(loss, wanted[0], torch.float32)
            close(grad, wanted[1], torch.float32)


@pytest.mark.parametrize("way", KERNELS)
def test_expanded_logits_and_upstream_gradients(way):
    row = torch.randn(5)
    target = torch.randint(0, 5, (6,))
    with walking(way) as backend:
        found, wanted = (
            step(lambda x, f=f, o=o: f(x.expand(6, 5), target, reduction="none", **o).sum(), row, torch.ones(()))
            for f, o in ((fusedloss.cross_entropy, {"backend": backend}), (F.cross_entropy, {}))
        )
    for a, b in zip(found, wanted, strict=True):
        close(a, b, torch.float32)


# Errors ---------------------------------------------------------------------------------------------------------------

X, T = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
BAD = [
    (lambda f: f([1.0], T), TypeError, "input must be logits .*, got a list"),
    (lambda f: f(X.long(), T), TypeError, r"input must be logits in float16.*, got torch\.int64"),
    (lambda f: f(torch.zeros(()), T), ValueError, r"input must be logits \[C\], \[N, C\].*, got shape \[\]"),
    (lambda f: f(X.to_sparse(), T), TypeError, "input must be a dense tensor, got layout torch.sparse_coo"),
    (lambda f: f(torch.nn.Linear(1, 1), T), TypeError, "input must not be a model, got the nn.Module Linear"),
    (lambda f: f(X, [0, 1]), TypeError, "target must be a tensor of classes .*, got a list"),
    (lambda f: f(X, T.int()), TypeError, r"target must be int64 .*, got torch\.int32"),
    (
        lambda f: f(X, T[:3]),
        ValueError,
        r"target must be one class per row of input, \[4\], or floating class probabilities \[4, 3\], got shape \[3\]",
    ),
    (
        lambda f: f(X, X[:3]),
        ValueError,
        r"target must be class probabilities of input's shape, \[4, 3\], or .* \[4\], got torch.float32 \[3, 3\]",
    ),
    (lambda f: f(X, T.to("meta")), ValueError, "target must be on cpu, like input, got meta"),
    (
        lambda f: f(X, T + 1),
        IndexError,
        r"target\[2\] must be a class from 0 to 2, or -100 to leave the row out, got 3",
    ),
    (
        lambda f: f(X[:, :, None], T[:, None] - 1),
        IndexError,
        r"target\[0, 0\] must be a class from 0 to 2, or -100 to leave the row out, got -1",
    ),
    (
        lambda f: f(X, X, ignore_index=1),
        ValueError,
        "ignore_index must be negative if target holds class probabilities, got 1",
    ),
    (lambda f: f(X, T, ignore_index=1.0), TypeError, "ignore_index must be a whole number, got .*, a float"),
    (lambda f: f(X, T, torch.ones(4)), ValueError, r"weight must have shape \[3\], one number per class, got \[4\]"),
    (lambda f: f(X, T, [1.0, 2.0, 3.0]), TypeError, r"weight must be a floating tensor \[3\], got a list"),
    (lambda f: f(X, T, torch.ones(3).long()), TypeError, r"weight must be a floating tensor \[3\], got torch.int64"),
    (lambda f: f(X, T, reduction="average"), ValueError, "reduction must be one of.*, got 'average'"),
    (lambda f: f(X, T, label_smoothing=1.5), ValueError, r"label_smoothing must be a number from 0 to 1, got 1\.5"),
    (lambda f: f(X, T, label_smoothing="0"), TypeError, "label_smoothing must be a number from 0 to 1, got '0', a str"),
    (lambda f: f(X, T, z_loss=math.nan), ValueError, "z_loss must be a finite number, got nan"),
    (lambda f: f(X, T, z_loss="1"), TypeError, "z_loss must be a number, got '.*', a str"),
    (lambda f: f(X, T, softcap=0.0), ValueError, r"softcap must be a positive number, got 0\.0"),
    (lambda f: f(X, T, softcap=torch.tensor(1.0)), TypeError, "softcap must be a number, got a Tensor"),
    (lambda f: f(X, T, backend="fast"), ValueError, "backend must be one of.*, got 'fast'"),
    (lambda f: f(X, T, backend="cuda"), fusedloss.UnsupportedError, "no kernel for this loss"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[str(i) for i in range(len(BAD))])
def test_errors_name_the_argument_and_what_it_needs(call, error, message):
    with pytest.raises(error, match=message):
        call(fusedloss.cross_entropy)


@pytest.mark.parametrize("way", KERNELS)
def test_where_values_are_not_read_a_class_out_of_range_makes_the_loss_nan(way, monkeypatch):
    monkeypatch.setattr(classes.checks, "reads_values", lambda x: False)
    x = torch.randn(4, 3)
    with walking(way) as backend:
        for options in ({}, {"weight": torch.rand(3)}, {"label_smoothing": 0.1}):
            found = fusedloss.cross_entropy(
                x, torch.tensor([0, 3, -100, -1]), reduction="none", backend=backend, **options
            )
            wanted = written_out(x, torch.tensor([0, 0, -100, 0]), reduction="none", **options)
            assert found.isnan().tolist() == [False, True, False, True]
            close(found[::2], wanted[::2], torch.float32)
            assert fusedloss.cross_entropy(x, T - 1, backend=backend, **options).isnan()
            close(
                fusedloss.cross_entropy(x, T, backend=backend, **options), written_out(x, T, **options), torch.float32
            )


# The module -----------------------------------------------------------------------------------------------------------


def test_the_module_is_torchs():
    x, target, _ = example((4, 3), {}, torch.float32)
    weight = torch.tensor([1.0, 2.0, 3.0])
    for args, options in (
        ((), {}),
        ((weight, None, 1, None, "sum", 0.1), {}),
        ((), {"weight": weight, "reduction": "none", "label_smoothing": 0.3}),
    ):
        found, wanted = (c(*args, **options) for c in (fusedloss.CrossEntropyLoss, torch.nn.CrossEntropyLoss))
        assert isinstance(found, torch.nn.CrossEntropyLoss)
        close(found(x, target), wanted(x, target), torch.float32)
        assert list(found.state_dict()) == list(wanted.state_dict())
        assert list(dict(found.named_buffers())) == list(dict(wanted.named_buffers()))
        close(pickle.loads(pickle.dumps(found))(x, target), wanted(x, target), torch.float32)
        found.load_state_dict(wanted.state_dict())
    assert fusedloss.CrossEntropyLoss(weight).double().weight.dtype == torch.float64
    with pytest.warns(UserWarning, match="deprecated"):
        summed = fusedloss.CrossEntropyLoss(size_average=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(summed(x, target), F.cross_entropy(x, target, reduction="sum"), torch.float32)


def test_the_module_takes_our_options_by_name_and_shows_them():
    x, target, _ = example((4, 3), {}, torch.float32)
    made = fusedloss.CrossEntropyLoss(ignore_index=2, z_loss=0.5, softcap=3.0, backend="reference")
    assert repr(made) == "CrossEntropyLoss(ignore_index=2, z_loss=0.5, softcap=3.0, backend='reference')"
    close(made(x, target), written_out(x, target, ignore_index=2, z_loss=0.5, softcap=3.0), torch.float32)
    assert repr(fusedloss.CrossEntropyLoss(torch.ones(3))) == "CrossEntropyLoss()"
    with pytest.raises(TypeError, match=r"weight must not be a model, got the nn\.Module Linear"):
        fusedloss.CrossEntropyLoss(torch.nn.Linear(2, 2))
    for options, message in (
        ({"softcap": -1.0}, r"softcap must be a positive number, got -1\.0"),
        ({"label_smoothing": 2.0}, "label_smoothing must be a number from 0 to 1, got 2.0"),
        ({"reduction": "all"}, "reduction must be one of 'mean', 'sum', 'none', got 'all'"),
        ({"backend": "fast"}, "backend must be one of .*, got 'fast'"),
    ):
        with pytest.raises(ValueError, match=message):
            fusedloss.CrossEntropyLoss(**options)


# sentence-transformers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("negatives", [0, 3])
def test_multiple_negatives_ranking_of_a_cross_encoder(negatives, way):
    """Its candidates' scores stand in one row, the positive's first: cross_entropy(10 * sigmoid(scores), zeros)."""
    losses = pytest.importorskip("sentence_transformers.cross_encoder.losses")
    loss = losses.MultipleNegativesRankingLoss.__new__(losses.MultipleNegativesRankingLoss)  # needs no encoder here
    torch.nn.Module.__init__(loss)
    loss.scale, loss.activation_fn, loss.cross_entropy_loss = 10.0, torch.nn.Sigmoid(), torch.nn.CrossEntropyLoss()
    scores = torch.randn(6, 1 + negatives).to(torch.float32 if way == "triton" else torch.float64)
    with walking(way) as backend:
        found = testing.value_and_gradients(
            lambda s: fusedloss.cross_entropy(10 * s.sigmoid(), torch.zeros(6, dtype=torch.long), backend=backend),
            [scores],
        )
    wanted = testing.value_and_gradients(lambda s: loss.calculate_loss(list(s.T), 6), [scores.double()])
    for a, b in zip(found, wanted, strict=True):
        close(a, b, scores.dtype)


# GPU ------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["reference", "chunked", "triton"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=identify)
@pytest.mark.parametrize("variant", VARIANTS)
def test_on_a_gpu(variant, dtype, way):
    for shape in ((333, 77), (5, 10_000), (2000, 3), (3, 21, 15, 17)):
        for reduction in REDUCTIONS:
            check(shape, VARIANTS[variant], reduction, dtype, way, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_nothing_is_read_back_from_a_gpu(backend):
    x = torch.randn(64, 32, device="cuda", requires_grad=True)
    target, weight = torch.randint(0, 32, (64,), device="cuda"), torch.rand(32, device="cuda")
    step_ = lambda: fusedloss.cross_entropy(x, target, weight, label_smoothing=0.1, backend=backend).backward()
    step_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step_()
    finally:
        torch.cuda.set_sync_debug_mode("default")
