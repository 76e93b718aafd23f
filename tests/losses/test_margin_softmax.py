"""arcface and cosface are pytorch-metric-learning's losses, without a [B, C] matrix and without the derivative of acos.

pytorch-metric-learning is the reference in fp64: its margins are in degrees, and its W is [D, C].
"""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from grids import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from peaks import MIB, growth, measured
from torch.nn import functional as F

import fusedloss
from fusedloss import sweep, testing
from fusedloss.backends import BACKENDS, chunked
from fusedloss.bench import measure
from fusedloss.core.problem import Block, Margin, Problem
from fusedloss.sweep import autograd

pml = pytest.importorskip("pytorch_metric_learning.losses")

LOSSES = {"arcface": fusedloss.arcface, "cosface": fusedloss.cosface}


@contextlib.contextmanager
def chunks(rows=5, columns=7, units=True):
    """Several row chunks and column tiles at tens of rows; without `units`, norms stay factors of the products."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep.chunks, "chunk_rows", lambda M, *_: max(1, min(M, rows)))
        patch.setattr("fusedloss.backends.dense.MOST", {})
        patch.setattr(sweep.chunks, "STATS_ROWS", {"cpu": rows, "cuda": rows})
        patch.setattr(chunked.tiles, "TILE_COLUMNS", columns)
        if not units:
            patch.setattr(chunked, "UNIT_BYTES", 0)
        yield


def theirs(loss, x, target, weight, margin, scale, reduction="mean"):
    """pytorch-metric-learning's, with our weight in the place of its parameter."""
    made = {
        "arcface": lambda: pml.ArcFaceLoss(*weight.shape, margin=math.degrees(margin), scale=scale),
        "cosface": lambda: pml.CosFaceLoss(*weight.shape, margin=margin, scale=scale),
    }[loss]()
    del made.W
    made.W = weight.T
    if reduction == "mean":
        return made(x, target)
    rows = made.compute_loss(x, target, None, x, target)["loss"]["losses"]
    return rows if reduction == "none" else rows.sum()


def eager(loss, x, target, weight, margin, scale):
    """As users write it, in fp32 from 16 bits."""
    x, weight = (t if t.dtype == torch.float64 else t.float() for t in (x, weight))
    cosine = F.normalize(x, dim=1) @ F.normalize(weight, dim=1).T
    own = cosine.gather(1, target[:, None])
    if loss == "arcface":
        angle = own.clamp(-1, 1).acos()
        changed = torch.where(angle <= math.pi - margin, (angle + margin).cos(), own - margin * math.sin(margin))
    else:
        changed = own - margin
    return F.cross_entropy(scale * cosine.scatter(1, target[:, None], changed), target)


def inputs(rows, classes, dim, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return normal(rows, dim), 3 * normal(classes, dim), torch.randint(classes, (rows,), generator=generator)


def same(ours, other, tensors, rtol=1e-9, atol=1e-11):
    """Values and gradients, with an upstream gradient of every entry's own."""

    def weighed(function):
        def call(*leaves):
            loss = function(*leaves)
            upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
            return (loss * upstream).sum()

        return call

    torch.testing.assert_close(ours(*tensors), other(*tensors), rtol=rtol, atol=atol)
    found, wanted = (testing.value_and_gradients(weighed(f), tensors) for f in (ours, other))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=rtol, atol=atol)


def skip_if_unsupported(backend, x):
    problem = Problem((x,), (Block(0, 0),), x.new_ones(()), torch.zeros(1), torch.zeros(1))
    if reason := BACKENDS[backend].why_not(problem):
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("backend", ["dense", "chunked", "triton"])
def test_a_margin_beneath_a_softcap(backend):
    """No loss has both yet: the target's slope is the product of the two. test_cuda_rows.py has `cuda` beside these."""
    x, y, target = inputs(9, 11, 6, torch.float32)
    skip_if_unsupported(backend, x)
    rule = {"cosine": True, "margin": Margin(0.3, 0.1), "softcap": 5.0}

    def loss(rows, name):
        def call(x, y):
            weight = torch.linspace(0.5, 1, 9, dtype=x.dtype)
            scale = torch.tensor(8.0, dtype=x.dtype)
            return rows(Problem((x, y), (Block(0, 1),), scale, target, weight, **rule), name, True)[0]

        return call

    ours, wanted = loss(autograd.loss_rows_or_sum, backend), loss(autograd.loss_rows_or_sum, "reference")
    found = testing.value_and_gradients(lambda *t: ours(*t).sum(), (x, y))
    exact = testing.value_and_gradients(lambda *t: wanted(*t).sum(), (x.double(), y.double()))
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=1e-5)


# The losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=50, deadline=None)
@given(
    # In one dimension every angle is 0 or pi, where theirs has no gradient.
    shape=st.tuples(st.integers(1, 12), st.integers(1, 17), st.integers(2, 6)),
    margin=st.sampled_from([0.0, 0.35, 0.5, 1.5, 3.0]),
    scale=st.sampled_from([0.5, 20.0, 64.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    backend=st.sampled_from(["dense", "chunked", "reference"]),
    units=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_it_is_pytorch_metric_learnings(loss, shape, margin, scale, reduction, backend, units, seed):
    x, weight, target = inputs(*shape, seed=seed)
    options = {"margin": margin, "scale": scale, "reduction": reduction}
    with chunks(units=units):
        same(
            lambda x, w: LOSSES[loss](x, target, w, backend=backend, **options),
            lambda x, w: theirs(loss, x, target, w, **options),
            (x, weight),
        )


def test_the_defaults_are_the_papers():
    """s = 64 and m = 0.5 of ArcFace, 0.35 of CosFace; pytorch-metric-learning's 28.6 degrees are 0.4992."""
    x, weight, target = inputs(9, 11, 4)
    torch.testing.assert_close(fusedloss.arcface(x, target, weight), theirs("arcface", x, target, weight, 0.5, 64.0))
    torch.testing.assert_close(fusedloss.cosface(x, target, weight), theirs("cosface", x, target, weight, 0.35, 64.0))
    made = pml.ArcFaceLoss(11, 4).double()
    found = fusedloss.arcface(x, target, made.W.T, margin=math.radians(28.6))
    torch.testing.assert_close(found, made(x, target))


@pytest.mark.parametrize("backend", ["dense", "chunked", "reference"])
@pytest.mark.parametrize("loss", LOSSES)
def test_without_a_margin_it_is_cross_entropy_of_cosines(loss, backend):
    x, weight, target = inputs(9, 11, 4)
    cosines = lambda x, w: F.normalize(x, dim=1) @ F.normalize(w, dim=1).T
    same(
        lambda x, w: LOSSES[loss](x, target, w, margin=0.0, scale=20.0, backend=backend),
        lambda x, w: F.cross_entropy(20 * cosines(x, w), target),
        (x, weight),
    )


def test_a_negative_margin_of_cosface_helps_its_target():
    x, weight, target = inputs(9, 11, 4)
    for margin in (-0.3, -5.0):
        same(
            lambda x, w, m=margin: fusedloss.cosface(x, target, w, margin=m),
            lambda x, w, m=margin: theirs("cosface", x, target, w, m, 64.0),
            (x, weight),
        )


@pytest.mark.parametrize("backend", ["dense", "chunked", "triton", "cuda", "reference"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_are_not_there(reduction, loss, backend):
    x, weight, target = inputs(9, 11, 4, torch.float32)
    target[[1, 4]] = 3
    ignoring = target.masked_fill(target == 3, -1)
    kept = target != 3

    def fewer(x, w):
        found = LOSSES[loss](x[kept], target[kept], w, reduction=reduction, scale=20.0, backend="reference")
        return found.new_zeros(9).index_put((kept,), found) if reduction == "none" else found

    for index, target_ in ((-1, ignoring), (3, target)):
        ours = lambda x, w, i=index, t=target_: LOSSES[loss](
            x, t, w, ignore_index=i, reduction=reduction, scale=20.0, backend=backend
        )
        same(ours, fewer, (x, weight), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["dense", "chunked", "triton", "cuda", "reference"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rows, classes", [(0, 5), (0, 0), (4, 5)], ids=["empty", "no classes", "all ignored"])
def test_a_batch_without_rows_has_loss_0_and_no_gradient(rows, classes, loss, backend):
    x, weight = torch.randn(rows, 3), torch.randn(classes, 3)
    target = torch.full((rows,), -100)
    for reduction, shape in (("mean", ()), ("sum", ()), ("none", (rows,))):
        call = lambda x, w, r=reduction: LOSSES[loss](x, target, w, reduction=r, backend=backend)
        assert call(x, weight).shape == shape
        total = lambda x, w, f=call: f(x, w).sum()
        assert all((found == 0).all() for found in testing.value_and_gradients(total, (x, weight)))


@pytest.mark.parametrize("backend", ["dense", "chunked", "triton", "cuda", "reference"])
@pytest.mark.parametrize("loss", LOSSES)
def test_one_class_is_always_right(loss, backend):
    x, weight, _ = inputs(5, 1, 3, torch.float32)
    call = lambda x, w: LOSSES[loss](x, torch.zeros(5, dtype=torch.long), w, reduction="sum", backend=backend)
    for found in testing.value_and_gradients(call, (x, weight)):
        assert (found == 0).all()


# Angles ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["dense", "chunked", "triton", "cuda", "reference"])
@pytest.mark.parametrize("loss", LOSSES)
def test_exactly_aligned_and_opposed_targets(loss, backend, dtype):
    """cos is 1 or -1 there and its gradient 0, so that the target's logit is a constant; acos's would be infinite."""
    weight = torch.tensor([[2.0, 0, 0], [0, 0.5, 0], [3, -1, 2], [-1, 1, 1]], dtype=dtype)
    x = torch.stack([4 * weight[0], -weight[1], 0.5 * weight[2], -2 * weight[3]])
    skip_if_unsupported(backend, x)
    target, margin, scale = torch.arange(4), 0.5, 8.0
    ends = torch.tensor([1, -1, 1, -1], dtype=torch.float64)

    def wanted(x, w):
        cosine = F.normalize(x, dim=1) @ F.normalize(w, dim=1).T
        own = ends - margin
        if loss == "arcface":
            own = torch.where(ends > 0, math.cos(margin), -1 - margin * math.sin(margin))
        return F.cross_entropy(scale * torch.where(torch.eye(4, dtype=torch.bool), own, cosine), target)

    call = lambda x, w: LOSSES[loss](x, target, w, margin=margin, scale=scale, backend=backend)
    found = testing.value_and_gradients(call, (x, weight))
    exact = testing.value_and_gradients(wanted, (x.double(), weight.double()))
    # A unit row times its slope is O(scale), and what is left beside the row itself the rounding of that. The sine is
    # the root of a difference: a cosine in fp64, within 4 eps of 1, has it to 3e-8, and so the target's logit.
    eps, sine = torch.finfo(dtype).eps, (4 * 2**-52) ** 0.5
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-6, atol=1e-6)
    for one, other in zip(found[1:], exact[1:], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=4 * eps, atol=scale * (4 * eps + math.sin(margin) * sine))


@pytest.mark.parametrize("backend", ["dense", "chunked", "triton", "cuda", "reference"])
@pytest.mark.parametrize("end", [0.0, math.pi])
def test_arcface_close_to_its_class_vector(end, backend):
    """Down to 1e-3 the angle is in the value and the gradient: rounding is eps / angle of what is left of the row."""
    weight, target = torch.tensor([[1.0, 0], [0.3, 1], [-0.7, 0.2]]), torch.zeros(1, dtype=torch.long)
    for angle in (1e-3, 1e-2, 0.1, 0.4):
        x = torch.tensor([[math.cos(end - angle), math.sin(abs(end - angle))]])
        call = lambda x, w: fusedloss.arcface(x, target, w, margin=0.5, scale=8.0, backend=backend)
        found = testing.value_and_gradients(call, (x, weight))
        formula = lambda x, w: theirs("arcface", x, target, w, 0.5, 8.0)
        wanted = testing.value_and_gradients(formula, (x.double(), weight.double()))
        torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-6, atol=1e-6)
        for one, other in zip(found[1:], wanted[1:], strict=True):
            error = (one.double() - other).abs().max() / other.abs().max()
            assert error < 4 * torch.finfo(torch.float32).eps / angle, f"{angle}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["dense", "chunked", "triton", "cuda", "reference"])
def test_multiples_of_class_vectors_have_no_direction(backend, dtype):
    """The cosine of 768 products is a few eps off 1; divided by its sine, that would be a direction out of nothing."""
    weight, target = inputs(64, 64, 768, dtype)[1], torch.arange(64)
    skip_if_unsupported(backend, weight)
    x = weight * torch.rand(64, 1, dtype=dtype).add(0.1)
    call = lambda x, w: fusedloss.arcface(x, target, w, scale=8.0, reduction="sum", backend=backend)
    found = testing.value_and_gradients(call, (x, weight))

    def constant(x, w):
        cosine = F.normalize(x, dim=1) @ F.normalize(w, dim=1).T
        return F.cross_entropy(
            8 * cosine.masked_fill(torch.eye(64, dtype=torch.bool), math.cos(0.5)), target, reduction="sum"
        )

    wanted = testing.value_and_gradients(constant, (x.double(), weight.double()))
    for one, other in zip(found, wanted, strict=True):
        error = (one.double() - other).abs().max() / other.abs().max()
        assert error < (1e-7 if dtype == torch.float64 else 2e-5), f"{error:.1e}"


def test_no_angle_has_an_infinite_gradient():
    """Every direction of 4096 around a class vector, the axes and their opposites among them."""
    angles = torch.arange(4096) * (2 * math.pi / 4096)
    x = torch.stack([angles.cos(), angles.sin()], 1)
    weight = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    for target in range(3):
        index = torch.full((4096,), target)
        call = lambda x, w, t=index: fusedloss.arcface(x, t, w, margin=0.5, scale=64.0, reduction="sum")
        value, by_x, by_weight = testing.value_and_gradients(call, (x, weight))
        assert value.isfinite() and by_weight.isfinite().all()
        # |d cos(theta + m) / dx| is sin(theta + m) / |x|, of two logits at most, in a plane of unit rows.
        assert by_x.abs().max() < 2 * 64 * 1.01


def test_zero_rows_have_no_direction():
    """Cosine 0, as F.normalize leaves it: finite, and no row's gradient but their own is touched."""
    x, weight, target = inputs(4, 5, 3, torch.float32)
    x[1], weight[2] = 0, 0
    target[:] = torch.tensor([0, 1, 2, 3])
    for loss, call in LOSSES.items():
        value, by_x, by_weight = testing.value_and_gradients(
            lambda x, w, f=call: f(x, target, w, scale=8.0), (x, weight)
        )
        margin = {"arcface": 0.5, "cosface": 0.35}[loss]
        torch.testing.assert_close(value, eager(loss, x, target, weight, margin, 8.0))
        rest = [0, 2, 3]
        exact = testing.value_and_gradients(
            lambda x, w, o=loss, m=margin: eager(o, x, target, w, m, 8.0), (x.double(), weight.double())
        )
        torch.testing.assert_close(by_x[rest].double(), exact[1][rest], rtol=1e-5, atol=1e-6)
        assert by_x.isfinite().all() and by_weight.isfinite().all()


# Precision ------------------------------------------------------------------------------------------------------------

SHAPES = {"ragged": (37, 53, 29), "one row": (1, 167, 64), "two classes": (5, 2, 8), "two dimensions": (33, 40, 2)}


@pytest.mark.pairwise
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("margin, scale", [(0.5, 64.0), (0.2, 8.0), (1.5, 30.0)])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["dense", "chunked", "triton", "cuda"])
@pytest.mark.parametrize("device", DEVICES)
def test_inside_the_error_budget(device, backend, dtype, loss, margin, scale, shape):
    found, baseline, exact = [], [], []
    # A row's rounding is one factor of all of its gradient, and in two dimensions a single row is most of the error.
    # One draw of ours and of eager's says little. Triton's interpreter is slow: one draw.
    for seed in range(1 if backend == "triton" else 5):
        x, weight, target = (t.to(device) for t in inputs(*SHAPES[shape], dtype, seed))
        skip_if_unsupported(backend, x)
        ours = lambda x, w, t=target: LOSSES[loss](x, t, w, margin=margin, scale=scale, backend=backend)
        plain = lambda x, w, t=target: eager(loss, x, t, w, margin, scale)
        with chunks(16, 32):
            found.append(testing.value_and_gradients(ours, (x, weight)))
        baseline.append(testing.value_and_gradients(plain, (x, weight)))
        exact.append(testing.value_and_gradients(plain, (x.double(), weight.double())))
    for number, name in enumerate(("loss", "embeddings", "weight")):
        out, base, wanted = ([draw[number] for draw in draws] for draws in (found, baseline, exact))
        assert out[0].dtype == (torch.float32 if name == "loss" else dtype) and out[0].shape == wanted[0].shape
        share = testing.typical_budget_share(out, base, wanted, dtype)
        assert share <= 1, f"{name}: {share:.2f} of the budget"


@pytest.mark.parametrize("backend", ["dense", "chunked", "triton", "cuda", "reference"])
@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_scales(loss, backend):
    """Logits of +-1e4 and a margin of thousands of units: each is half an ulp, 2**-11, off, and so is the loss."""
    x, weight, target = inputs(12, 9, 4, torch.float32)
    call = lambda x, w: LOSSES[loss](x, target, w, margin=0.5, scale=1e4, reduction="none", backend=backend)
    wanted = theirs(loss, x.double(), target, weight.double(), 0.5, 1e4, "none")
    # Cosines of unit rows of D = 4 are off by 4 half-ulps of 1, and all of that is times the scale.
    torch.testing.assert_close(call(x, weight).double(), wanted, rtol=1e-6, atol=1e4 * 4 * 2**-24)
    for found in testing.value_and_gradients(lambda x, w: call(x, w).sum(), (x, weight)):
        assert found.isfinite().all()


@pytest.mark.parametrize("backend", ["dense", "chunked", "triton", "cuda", "reference"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_well_fitted_row_keeps_its_loss(loss, backend):
    """exp(-30) and less: a difference from a log-sum-exp in fp32 would be 0, or below."""
    weight = torch.eye(4)
    x, target = weight + 0.02, torch.arange(4)
    call = lambda x, w: LOSSES[loss](x, target, w, margin=0.1, scale=40.0, reduction="none", backend=backend)
    wanted = LOSSES[loss](x.double(), target, weight.double(), margin=0.1, scale=40.0, reduction="none")
    assert wanted.max() < 1e-12
    torch.testing.assert_close(call(x, weight).double(), wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", ["dense", "chunked", "triton", "cuda", "reference"])
@pytest.mark.parametrize("loss", LOSSES)
def test_nan_in_nan_out_but_for_ignored_rows(loss, backend):
    x, weight, target = inputs(6, 5, 3, torch.float32)
    x[2] = torch.nan
    rows = lambda: LOSSES[loss](x, target, weight, reduction="none", backend=backend)
    assert rows().isnan().tolist() == [False, False, True, False, False, False]
    target[2] = -100
    assert rows()[2] == 0 and rows().isfinite().all()


# Memory ---------------------------------------------------------------------------------------------------------------


@measured
@pytest.mark.parametrize("loss", LOSSES)
def test_no_matrix_of_rows_and_classes(loss):
    """[2048, 8192] fp32 are 64 MiB, of which eager keeps three; here a workspace of 4, unit copies of 2, and tiles."""
    assert growth(peak, loss, 4 * MIB, sizes=(64, 2048)) < 40 * MIB


def peak(loss, workspace_bytes, rows):
    """Beyond gradients, against four times as many classes."""
    classes, dim = 4 * rows, 32
    x, weight = torch.randn(rows, dim, requires_grad=True), torch.randn(classes, dim, requires_grad=True)
    target = torch.randint(classes, (rows,))
    step = lambda: LOSSES[loss](x, target, weight, workspace_bytes=workspace_bytes).backward()
    return measure.peak_memory(step) - (rows + classes) * dim * 4


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_kept_for_backward(loss):
    """The inputs and their gradients, [B, D] and [C, D]: a part of the [B, C] matrices that eager keeps."""
    x, weight, target = inputs(256, 2048, 16, torch.float32)
    x.requires_grad_(), weight.requires_grad_()

    def kept(step):
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
            loss = step()
        return loss, sum(t.nbytes for t in saved.values())

    found, ours = kept(lambda: LOSSES[loss](x, target, weight))
    nodes, gradients = [found.grad_fn], 0
    while nodes:
        node = nodes.pop()
        gradients += sum(g.nbytes for g in getattr(node, "gradients", None) or () if g is not None)
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    _, others = kept(lambda: eager(loss, x, target, weight, 0.5, 64.0))
    embeddings = x.nbytes + weight.nbytes
    assert gradients == embeddings and ours + gradients < 2.2 * embeddings < others / 5


# Autograd and its surroundings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["dense", "chunked", "reference"])
def test_one_tensor_on_both_sides(backend):
    """Rows as their own class vectors: both sides' gradients are summed, and no angle's derivative is infinite."""
    x, target = inputs(6, 6, 3)[0], (torch.arange(6) + 1) % 6
    for name, loss in LOSSES.items():
        same(
            lambda x, f=loss: f(x, target, x, margin=0.3, scale=8.0, backend=backend),
            lambda x, n=name: theirs(n, x, target, x, 0.3, 8.0),
            (x,),
        )
        own = testing.value_and_gradients(lambda x, f=loss: f(x, torch.arange(6), x, backend=backend), (x,))
        assert all(found.isfinite().all() for found in own)


@pytest.mark.parametrize("loss", LOSSES)
def test_compiled_it_is_one_op_with_the_same_numbers(loss):
    x, weight, target = inputs(9, 11, 4, torch.float32)
    call = lambda x, w: LOSSES[loss](x, target, w)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found, wanted = (testing.value_and_gradients(f, (x, weight)) for f in (compiled, call))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "changes, error, message",
    [
        (
            {"embeddings": torch.rand(4)},
            ValueError,
            r"embeddings must have two dimensions \[rows, D\], got shape \[4\]",
        ),
        ({"weight": torch.rand(5, 4)}, ValueError, "weight must have D = 3, like embeddings, got D = 4"),
        (
            {"weight": torch.rand(5, 3).double()},
            TypeError,
            "weight must be torch.float32, like embeddings, got torch.float64",
        ),
        (
            {"weight": torch.rand(0, 3), "target": torch.full((4,), -100)},
            ValueError,
            "weight must have at least one row, one per class, got none",
        ),
        (
            {"target": torch.zeros(3, dtype=torch.long)},
            ValueError,
            r"target must have shape \[4\], one index per row, got \[3\]",
        ),
        (
            {"target": torch.zeros(4)},
            TypeError,
            r"target must be an int64 tensor \[4\] of column indices, got torch.float32 \[4\]",
        ),
        (
            {"target": torch.tensor([0, 5, 0, 0])},
            IndexError,
            r"target\[1\] must be an index from 0 to 4, or -100.*, got 5",
        ),
        (
            {"target": torch.tensor([0, 0, -1, 0])},
            IndexError,
            r"target\[2\] must be an index from 0 to 4, or -100 to leave the row out, got -1",
        ),
        ({"margin": torch.tensor(0.5)}, TypeError, "margin must be a number, got a Tensor"),
        ({"margin": math.nan}, ValueError, "margin must be a finite number, got nan"),
        ({"scale": 0.0}, ValueError, "scale must be a positive number, got 0.0"),
        ({"scale": torch.tensor(2.0)}, TypeError, "scale must be a number, got a Tensor"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be a whole number, got 1.5, a float"),
        ({"reduction": "median"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'median'"),
        (
            {"backend": "fast"},
            ValueError,
            "backend must be one of 'auto', 'cuda', 'triton', 'chunked', 'dense', 'reference', got 'fast'",
        ),
        ({"backend": "cuda"}, fusedloss.UnsupportedError, "cannot run this problem"),
        ({"workspace_bytes": 0}, ValueError, "workspace_bytes must be at least 1 or None, got 0"),
    ],
)
def test_bad_arguments_are_named(loss, changes, error, message):
    given = {"embeddings": torch.rand(4, 3), "target": torch.zeros(4, dtype=torch.long), "weight": torch.rand(5, 3)}
    with pytest.raises(error, match=message):
        LOSSES[loss](**{**given, **changes})


@pytest.mark.parametrize("margin", [-0.1, math.pi, 28.6])
def test_arcface_has_radians(margin):
    x, weight, target = inputs(4, 5, 3)
    with pytest.raises(ValueError, match=f"margin must be an angle in radians, from 0 to below pi, got {margin}"):
        fusedloss.arcface(x, target, weight, margin=margin)
