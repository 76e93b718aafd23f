"""Few elements on a CPU: what `auto` hands to torch's operators and formulas has the values of a named backend."""

from __future__ import annotations

import math

import pytest
import torch
from condition import exact_and_moves, within
from contract import CASES, Batch
from torch.nn import functional as F

import fusedloss
from fusedloss import backends
from fusedloss.backends import FEW, few

# Losses without a sweep.
NAMES = [name for name in CASES if CASES[name](Batch(4)).takes("backend")]
NAMES = [name for name in NAMES if not CASES[name](Batch(4)).takes("workspace_bytes")]


# The rule -------------------------------------------------------------------------------------------------------------


def test_the_rule(monkeypatch):
    for what, most in FEW.items():
        assert few("auto", torch.empty(most), what) and not few("auto", torch.empty(most + 1), what)
        assert few("auto", torch.empty(most // 4), what, 4) and not few("auto", torch.empty(most // 4 + 1), what, 4)
    one = torch.ones(1)
    assert not any(few(name, one, "operator") for name in backends.BACKENDS)
    assert not few("auto", one.to("meta"), "operator")
    monkeypatch.setenv("FUSEDLOSS_BACKEND", "chunked")
    assert not few("auto", one, "operator")
    monkeypatch.setenv("FUSEDLOSS_BACKEND", "auto")
    assert few("auto", one, "operator")


def test_a_backend_by_name_is_not_replaced(monkeypatch):
    """Of torch's operators and formulas none is called."""
    x, t = torch.randn(8, 4, requires_grad=True), torch.rand(8, 4)
    for name in ("mse_loss", "l1_loss", "huber_loss", "smooth_l1_loss", "cross_entropy_loss"):
        monkeypatch.setattr(torch._C._nn, name, None)
    for loss in (fusedloss.mse, fusedloss.l1, fusedloss.huber, fusedloss.smooth_l1, fusedloss.list_net):
        loss(x, t, backend="chunked").backward()
        with pytest.raises(TypeError, match="'NoneType' object is not callable"):
            loss(x, t)
    fusedloss.cross_entropy(x, t.softmax(1), backend="chunked").backward()
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        fusedloss.cross_entropy(x, t.softmax(1))


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_inside_the_error_budget(name):
    """In fp32, against the reference's in fp64."""

    def run(dtype, backend, move=lambda x: x):
        def moved(_, x):
            if not x.is_floating_point():
                return x
            held = x.detach().float().to(x.dtype)
            return move(held).requires_grad_() if x.requires_grad else held

        batch = Batch(37, dtype, moved)
        value = CASES[name](batch).result(backend=backend)
        gradients = torch.autograd.grad(value.sum(), batch.leaves, materialize_grads=True)
        return {place: x.detach() for place, x in enumerate((value, *gradients))}

    found, other = run(torch.float32, "auto"), run(torch.float32, "reference")
    exact, moves = exact_and_moves(lambda move: run(torch.float64, "reference", move), torch.float32)
    for place, out in found.items():
        within(out, other[place], exact[place], moves[place], f"output {place}")


@pytest.mark.parametrize("name", NAMES)
def test_16_bits_are_computed_in_fp32(name):
    """Each result is rounded once: the reference's of the same numbers."""
    results = []
    for backend in ("auto", "reference"):
        batch = Batch(9, torch.bfloat16)
        value = CASES[name](batch).result(backend=backend)
        gradients = torch.autograd.grad(value.sum(), batch.leaves, materialize_grads=True)
        results.append([value.detach(), *gradients])
    for found, wanted in zip(*results, strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-8 * wanted.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
def test_a_kept_graph_gives_its_gradient_again(name):
    batch = Batch(6)
    value = CASES[name](batch).result().sum()
    once, again = (
        torch.autograd.grad(value, batch.leaves, torch.full_like(value, 3.0), True, materialize_grads=True)
        for _ in range(2)
    )
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_made_in_inference_mode(name):
    with torch.inference_mode():
        made = Batch(6, change=lambda _, x: x.detach())
        CASES[name](made)
    wanted = CASES[name](Batch(6)).result(backend="reference").detach()
    held = []

    def inference(_, x):
        with torch.inference_mode():
            held.append(x.detach().clone())
        return x if x.requires_grad else held[-1]

    torch.testing.assert_close(CASES[name](Batch(6, change=inference)).result().detach(), wanted)


# Extremes -------------------------------------------------------------------------------------------------------------


def rows_and_gradient(loss, x):
    x = x.detach().requires_grad_()
    rows = loss(x)
    return rows.detach(), *torch.autograd.grad(rows.sum(), x)


def test_certain_labels_keep_their_digits():
    """exp(-70) is 4e-31: torch's own loss is 0 there, or its gradient."""
    x = torch.tensor([-70.0, 70.0, -16.0, 16.0])
    t = torch.tensor([0.0, 1.0, 0.0, 1.0])
    tail, sign = torch.exp(-x.double().abs()), torch.tensor([1.0, -1.0, 1.0, -1.0])
    found, gradient = rows_and_gradient(lambda x: fusedloss.binary_cross_entropy_with_logits(x, t, reduction="none"), x)
    torch.testing.assert_close(found.double(), tail.log1p(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), sign * tail / (1 + tail), rtol=1e-6, atol=0)
    found, gradient = rows_and_gradient(lambda x: fusedloss.focal(x, t, gamma=0.0, reduction="none"), x)
    torch.testing.assert_close(found.double(), tail.log1p(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_focal_of_hard_labels(gamma, alpha):
    """As the formula, which one label between 0 and 1 brings back; finite also where the wrong share underflows."""
    x = torch.tensor([-200.0, 200.0, 70.0, -70.0, 3.0, -0.5, 0.0])
    t = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    own = lambda x, **more: fusedloss.focal(x, t, gamma=gamma, alpha=alpha, reduction="none", **more)
    found, wanted, mixed = (
        rows_and_gradient(loss, x)
        for loss in (
            own,
            lambda x: own(x, backend="reference"),
            lambda x: fusedloss.focal(
                torch.cat([x, x[:1]]), torch.cat([t, t[:1] + 0.5]), gamma=gamma, alpha=alpha, reduction="none"
            )[:-1],
        )
    )
    for a, b, c in zip(found, wanted, mixed, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=0)
        torch.testing.assert_close(a, c, rtol=2e-6, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_divergence_of_second_order(reduction):
    """Scores are a teacher's but for 1e-6: the loss is 1e-13, to which a teacher's probability of 0 adds nothing."""
    a, b = torch.eye(3, dtype=torch.float64), torch.rand(2, 3, 3, dtype=torch.float64)
    label = torch.stack([(a * x).sum(1) for x in b], 1) + torch.tensor([0.0, 1e-6], dtype=torch.float64)
    label = torch.cat([label, torch.full((3, 1), -math.inf, dtype=torch.float64)], 1)
    q = label.softmax(1)
    far = torch.full((3, 3), -800.0, dtype=torch.float64)
    found = fusedloss.distill_kl_div(a, *b, far, label=label, reduction=reduction)
    wanted = 0.5 * q[:, 0] * q[:, 1] * 1e-12
    wanted = {"none": wanted, "sum": wanted.sum(), "mean": wanted.mean()}[reduction]
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_certain_classes_keep_their_digits(dtype):
    """A row's loss is 3 exp(-69) = 3e-30, and one is 100: its probability is below the least that has all digits."""
    x = torch.zeros(3, 4, dtype=dtype)
    x[0, 1], x[1, 2] = 69.0, 100.0
    target = torch.tensor([1, 0, 3])
    found, gradient = rows_and_gradient(lambda x: fusedloss.cross_entropy(x, target, reduction="none"), x)
    certain = 3 * math.exp(-69)
    wanted = torch.tensor([certain, 100.0, math.log(4)], dtype=torch.float64)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient[0, 1].double().item(), -certain, rtol=1e-6, atol=0)
    assert gradient[1, 0] == -1
    assert fusedloss.cross_entropy(x[:1], target[:1]) == found[0]


def test_classes_that_are_not_likely_have_torchs_digits():
    """Without a probability above 0.9 torch's operator runs; one such row in the batch, and the exact loss does."""
    x, target = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 2.0]]), torch.tensor([2, -100])
    ours, torchs = (
        rows_and_gradient(lambda x, f=f: f(x, target, reduction="none"), x)
        for f in (fusedloss.cross_entropy, F.cross_entropy)
    )
    assert all(map(torch.equal, ours, torchs))
    likely = torch.cat([x, torch.tensor([[0.0, 0.0, 16.0]])])
    _, gradient = rows_and_gradient(lambda x: fusedloss.cross_entropy(x, torch.tensor([2, 1, 2])), likely)
    tail = 2 * math.exp(-16)
    torch.testing.assert_close(gradient[2, 2].double().item(), -tail / (1 + tail) / 3, rtol=1e-6, atol=0)


def test_tiny_differences():
    x, t = torch.full((4,), 1e-30), torch.zeros(4)
    assert fusedloss.l1(x, t).double().item() == pytest.approx(1e-30, rel=1e-6)
    assert fusedloss.huber(x, t, delta=1e-31).double().item() == pytest.approx(1e-31 * 9.5e-31, abs=1e-45)
    (gradient,) = torch.autograd.grad(fusedloss.mse(x.requires_grad_(), t, reduction="sum"), x)
    torch.testing.assert_close(gradient, torch.full((4,), 2e-30), rtol=1e-6, atol=0)


def test_huber_without_a_bound_is_half_the_square():
    x, t = torch.tensor([3.0, -2.0]), torch.zeros(2)
    assert fusedloss.huber(x, t, delta=math.inf) == (4.5 + 2.0) / 2


# Nothing, and mistakes ------------------------------------------------------------------------------------------------


def test_of_no_elements():
    x = torch.zeros(0, 4, requires_grad=True)
    for loss in (fusedloss.mse, fusedloss.l1, fusedloss.huber, fusedloss.smooth_l1):
        assert loss(x, x.detach()).isnan() and loss(x, x.detach(), reduction="sum") == 0
    assert fusedloss.binary_cross_entropy_with_logits(x, x.detach()).isnan()
    for found in (
        fusedloss.focal(x, x.detach()),
        fusedloss.list_net(x, x.detach()),
        fusedloss.adr_mse(x, x.detach()),
        fusedloss.margin_mse(x, x, x, label=torch.zeros(0)),
        fusedloss.contrastive_tension(x, x, torch.zeros(0)),
        fusedloss.embed_distill(x, x.detach(), distance="mse"),
    ):
        assert found == 0
    assert fusedloss.cross_entropy(x, torch.zeros(0, dtype=torch.int64)).isnan()


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["plain", "smoothed"])
def test_classes_that_do_not_exist_and_rows_that_are_left_out(options):
    x, target = torch.randn(4, 3, dtype=torch.float64), torch.tensor([2, 0, 1, 0])
    for bad in (3, -1):
        wrong = target.index_fill(0, torch.tensor([1]), bad)
        with pytest.raises(IndexError, match=rf"target\[1\] must be a class from 0 to 2, .* got {bad}"):
            fusedloss.cross_entropy(x, wrong, **options)
    for left_out in (-100, 0):
        some = target.where(target != 0, left_out)
        for reduction in ("mean", "sum", "none"):
            found, wanted = (
                f(x, some, ignore_index=left_out, reduction=reduction, **options)
                for f in (fusedloss.cross_entropy, F.cross_entropy)
            )
            torch.testing.assert_close(found, wanted)


def test_a_label_below_0_is_named():
    a = torch.randn(3, 4)
    for bad in (torch.tensor([1, 0, -1]), torch.tensor([math.nan, 0.0, -1.0])):
        with pytest.raises(ValueError, match=r"label must hold 1 for the same and 0 for not, got -1.* in row 2"):
            fusedloss.contrastive_tension(a, a, bad)


@pytest.mark.parametrize("loss", [fusedloss.binary_cross_entropy_with_logits, fusedloss.focal])
@pytest.mark.parametrize("label", [0.0, 1.0, 0.25])
@pytest.mark.parametrize("logit", [math.inf, -math.inf, math.nan])
def test_logits_that_are_not_finite(loss, label, logit):
    """As by the walk; in sentence-transformers' binary cross-entropy as in torch's."""
    x, t = torch.tensor([logit, 1.0]), torch.tensor([label, 0.0])
    found, walked = (loss(x, t, reduction="none", backend=backend) for backend in ("auto", "chunked"))
    torch.testing.assert_close(found, walked, equal_nan=True)
