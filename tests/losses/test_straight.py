"""`straight`: which calls come there, and that its numbers are the formula's."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F

import fusedloss
from fusedloss.losses import _straight as straight
from fusedloss.testing import budget_share

TARGET = torch.tensor([4, 0, 0, 3, 2])


def linear(x, y, scale, **options):
    return fusedloss.linear_cross_entropy(x, y, TARGET, temperature=1 / scale, **options)


# Calls of (x, y, scale, **options), and whether rows are divided by their lengths, both directions, and the targets.
CALLS = {
    "info_nce": (lambda x, y, s, **o: fusedloss.info_nce(x, y, temperature=1 / s, **o), False, False, None),
    "info_nce, target": (
        lambda x, y, s, **o: fusedloss.info_nce(x, y, TARGET, temperature=1 / s, **o),
        False,
        False,
        TARGET,
    ),
    "info_nce, normalize": (
        lambda x, y, s, **o: fusedloss.info_nce(x, y, temperature=1 / s, normalize=True, **o),
        True,
        False,
        None,
    ),
    "multiple_negatives_ranking": (
        lambda x, y, s, **o: fusedloss.multiple_negatives_ranking(x, y, scale=s, **o),
        True,
        False,
        None,
    ),
    "clip": (fusedloss.clip, False, True, None),
    "clip, normalize": (partial(fusedloss.clip, normalize=True), True, True, None),
    "contrastive_tension_in_batch": (fusedloss.contrastive_tension_in_batch, True, True, None),
    "linear_cross_entropy": (linear, False, False, TARGET),
}


def matrices(seed, near, dtype=torch.float32, D=12):
    """near: how much of y is x; the targets' columns are likely with most of it."""
    draw = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(5, D, generator=draw, dtype=torch.float64), dim=1)
    y = F.normalize(near * x + torch.randn(5, D, generator=draw, dtype=torch.float64) / D**0.5, dim=1)
    return [z.to(dtype).requires_grad_() for z in (x, y)]


def formula(x, y, scale, cosine, symmetric, target):
    x, y = (F.normalize(z, dim=1, eps=1e-12) if cosine else z for z in (x, y))
    z = x @ y.T * scale
    target = torch.arange(len(x)) if target is None else target
    loss = F.cross_entropy(z, target)
    return (loss + F.cross_entropy(z.T, target)) / 2 if symmetric else loss


@pytest.fixture
def taken(monkeypatch):
    """Whether each call of `straight.mean` had a result."""
    found = []
    mean = straight.mean
    monkeypatch.setattr(straight, "mean", lambda *a, **o: found.append(mean(*a, **o)) or found[-1])
    return found


@pytest.mark.parametrize("near", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("name", CALLS)
def test_value_and_gradient_are_within_the_budget(name, near, taken):
    function, *how = CALLS[name]
    for seed, scale in enumerate((0.5, 5.0, 40.0)):
        x, y = matrices(seed, near)
        learns = "clip" in name or "tension" in name
        given = torch.tensor(scale, requires_grad=True) if learns else scale
        leaves = [x, y, given] if learns else [x, y]
        loss = function(x, y, given)
        results = [loss.detach(), *torch.autograd.grad(loss, leaves)]
        assert taken and taken[-1] is not None
        wanted = []
        for dtype in (torch.float32, torch.float64):
            copies = [t.detach().to(dtype).requires_grad_() for t in leaves]
            value = formula(*copies[:2], copies[2] if learns else scale, *how)
            wanted.append([value.detach(), *torch.autograd.grad(value, copies)])
        for place, (own, eager, exact) in enumerate(zip(results, *wanted, strict=True)):
            # The scale's gradient is a sum of terms that cancel, each with the rounding of its similarity.
            moves = 4 * torch.finfo(torch.float32).eps if place == 3 else 0.0
            assert budget_share(own, eager, exact, torch.float32, moves) <= 1, (scale, place)


@pytest.mark.parametrize("apart", [10.0, 30.0, 69.0])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_loss_of_well_fitted_pairs_keeps_its_digits(apart, symmetric, taken):
    """`log(1 + exp(-apart))` each, 1e-30 at 69: 1 - p would be 0 from 17 on."""
    x, y = torch.eye(4).mul(apart).requires_grad_(), torch.eye(4).requires_grad_()
    loss = fusedloss.clip(x, y, 1.0) if symmetric else fusedloss.info_nce(x, y, temperature=1.0)
    assert taken[-1] is not None
    torch.testing.assert_close(loss.item(), math.log1p(3 * math.exp(-apart)), rtol=3e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss, x)
    share = math.exp(-apart) / (1 + 3 * math.exp(-apart)) / 4
    exact = torch.full((4, 4), share).fill_diagonal_(-3 * share)
    torch.testing.assert_close(gradient, exact, rtol=3e-5, atol=0)


@pytest.mark.parametrize("near", [0.0, 4.0])
@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives(name, near, taken):
    function, *how = CALLS[name]
    leaves = matrices(3, near, torch.float64, D=3)
    assert torch.autograd.gradgradcheck(lambda x, y: function(x, y, 3.0), leaves)
    assert taken[-1] is not None
    for own, wanted in zip(
        torch.autograd.grad(function(*leaves, 3.0), leaves),
        torch.autograd.grad(formula(*leaves, 3.0, *how), leaves),
        strict=True,
    ):
        torch.testing.assert_close(own, wanted, rtol=1e-10, atol=1e-14)


def signed(x, y, scale, bias, cosine):
    x, y = (F.normalize(z, dim=1) if cosine else z for z in (x, y))
    signs = 2 * torch.eye(len(x), len(y), dtype=x.dtype) - 1
    return -F.logsigmoid(signs * (scale * x @ y.T + bias)).sum() / len(x)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("scale", [1.0, 10.0, 60.0])
def test_siglip(cosine, scale, monkeypatch):
    """Value and gradients within the budget, to the digits of pairs that fit; rows of more columns; its derivatives."""
    found = []
    sigmoid = straight.sigmoid
    monkeypatch.setattr(straight, "sigmoid", lambda *a, **o: found.append(sigmoid(*a, **o)) or found[-1])
    x, y = matrices(0, 4.0)
    leaves = [x[:4].detach().requires_grad_(), y, torch.tensor(scale).requires_grad_(), torch.tensor(-0.5 * scale)]
    leaves[3].requires_grad_()
    results = []
    for dtype in (None, torch.float32, torch.float64):
        copies = leaves if dtype is None else [t.detach().to(dtype).requires_grad_() for t in leaves]
        call = signed if dtype else lambda *given: fusedloss.siglip(*given[:4], normalize=given[4])
        value = call(*copies, cosine)
        results.append([value.detach(), *torch.autograd.grad(value, copies)])
    assert found[-1] is not None
    for place, (own, eager, exact) in enumerate(zip(*results, strict=True)):
        moves = 16 * torch.finfo(torch.float32).eps if place > 2 else 0.0  # sums of terms that cancel
        assert budget_share(own, eager, exact, torch.float32, moves) <= 1, place
    wide = [t.detach().double().requires_grad_() for t in leaves]
    assert torch.autograd.gradgradcheck(lambda *given: fusedloss.siglip(*given, normalize=cosine), wide)


def test_siglip_keeps_the_digits_of_pairs_that_fit():
    x = torch.eye(3).requires_grad_()
    loss = fusedloss.siglip(x, torch.eye(3).requires_grad_(), 138.0, -69.0)
    torch.testing.assert_close(loss.item(), 3 * math.exp(-69), rtol=3e-6, atol=0)


@pytest.mark.parametrize("near", [0.0, 8.0])
def test_sides_that_are_one_tensor_or_made_of_each_other(near):
    """Under create_graph=True each side has its own gradient, once."""
    (w, _) = matrices(1, 0.0, torch.float64)
    other = matrices(2, 0.0, torch.float64)[0].detach()
    for x, y in ((w, w), (w, near * w + other), (near * w + other, w)):
        for loss in (
            partial(fusedloss.info_nce, normalize=True),
            partial(fusedloss.clip, logit_scale=3.0, normalize=True),
            partial(fusedloss.siglip, logit_scale=3.0, normalize=True),
            fusedloss.multiple_negatives_ranking,
        ):
            (own,) = torch.autograd.grad(loss(x, y), w, create_graph=True)
            (wanted,) = torch.autograd.grad(loss(x, y, backend="reference"), w, create_graph=True)
            torch.testing.assert_close(own, wanted, rtol=1e-10, atol=1e-14)
            second, wanted = (torch.autograd.grad(g.square().sum(), w, retain_graph=True)[0] for g in (own, wanted))
            torch.testing.assert_close(second, wanted, rtol=1e-9, atol=1e-13)


def test_tensors_made_in_inference_mode(taken):
    """Autograd cannot save them: the losses copy them."""
    x, y = matrices(0, 1.0, torch.float64)
    with torch.inference_mode():
        scale, z = torch.tensor(2.0, dtype=torch.float64), x.detach().clone().requires_grad_()
    for own, plain, loss in (
        ((x, y, scale), (x, y, 2.0), fusedloss.clip),
        ((x, y, scale), (x, y, 2.0), fusedloss.siglip),
        ((x, y, None, scale), (x, y, None, 2.0), lambda a, b, _, s: fusedloss.info_nce(a, b, temperature=s)),
    ):
        results = [torch.autograd.grad(loss(*given), (x, y)) for given in (own, plain)]
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-14)
    for loss in (fusedloss.info_nce, lambda a, b: fusedloss.linear_cross_entropy(a, b, TARGET)):
        z.grad = None
        loss(z, y).backward()
        torch.testing.assert_close(z.grad, torch.autograd.grad(loss(x, y), x)[0], rtol=1e-10, atol=1e-14)


def test_another_default_device():
    x, y = matrices(0, 1.0)
    wanted = fusedloss.siglip(x, y, 2.0), fusedloss.clip(x, y, 2.0)
    with torch.device("meta"):
        own = fusedloss.siglip(x, y, 2.0), fusedloss.clip(x, y, 2.0)
    torch.testing.assert_close(own, wanted)


def test_a_mode_that_fakes_tensors():
    x, y = matrices(0, 1.0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss = fusedloss.info_nce(x, y)
    assert isinstance(loss, FakeTensor)


def test_linear_cross_entropy_needs_a_target():
    with pytest.raises(TypeError, match="target must be an int64 tensor"):
        fusedloss.linear_cross_entropy(*matrices(0, 1.0), None)


def test_a_loss_that_is_kept_holds_no_gradient():
    """After its backward, as torch's: a list of losses of a whole epoch stays small."""
    x, y = matrices(0, 8.0)
    loss = fusedloss.info_nce(x, y, temperature=0.02)
    assert type(loss.grad_fn).__name__ == "_OfLogitsBackward"
    loss.backward()
    assert not any(isinstance(value, torch.Tensor) for value in vars(loss.grad_fn).values())
    with pytest.raises(RuntimeError, match="freed"):
        loss.grad_fn.saved_tensors  # noqa: B018


def test_fewer_columns_than_rows_are_named():
    x, y = matrices(0, 0.0)
    for loss, name in ((fusedloss.info_nce, "key"), (lambda a, b: fusedloss.siglip(a, b, 1.0), "text_features")):
        with pytest.raises(ValueError, match=f"{name} must have at least 5 rows"):
            loss(x, y[:4])


def test_rows_of_length_0_and_logits_that_are_not_finite():
    x, y = matrices(0, 1.0, torch.float64)
    with torch.no_grad():
        x[1] = 0
    found, wanted = (
        torch.autograd.grad(fusedloss.info_nce(x, y, normalize=True, backend=backend), (x, y))
        for backend in ("auto", "reference")
    )
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12 * other.abs().max().item())
    with torch.no_grad():
        x[1, 0] = math.nan
    assert fusedloss.info_nce(x, y).isnan() and fusedloss.clip(x, y, 2.0).isnan()


def test_who_comes_here(taken, monkeypatch):
    """fp32 and fp64 on a CPU, with a gradient for both sides, as `auto`, without options, up to one size."""
    x, y = matrices(0, 1.0)
    loss = fusedloss.info_nce

    def comes(*given, **options):
        taken.clear()
        loss(*given, **options)
        return bool(taken) and taken[-1] is not None

    assert comes(x, y) and comes(x, x) and comes(x.double(), y.double()) and comes(x, torch.nn.Parameter(y.detach()))
    assert comes(x, y, reduction="mean", return_stats=False, group=None)  # as modules pass them
    assert not comes(x, y.detach())  # a memory may be overwritten before the backward
    assert not comes(x.bfloat16(), y.bfloat16())
    for options in ({"reduction": "sum"}, {"backend": "dense"}, {"workspace_bytes": 1 << 20}, {"return_stats": True}):
        assert not comes(x, y, **options)
    for options in ({"label_smoothing": 0.1}, {"decoupled": True}, {"weight": torch.ones(5)}, {"debiased": 0.1}):
        assert not comes(x, y, **options)
    assert not comes(x, y, torch.tensor([0, 1, 2, 3, -100]))
    with torch.no_grad():
        assert not comes(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert not comes(x, y)
    many = torch.ones(straight.MOST // 5 + 1, 12, requires_grad=True)
    assert comes(x, many[:-1]) and not comes(x, many)
    monkeypatch.setenv("FUSEDLOSS_WORKSPACE_BYTES", "100000000")
    assert not comes(x, y)
    monkeypatch.delenv("FUSEDLOSS_WORKSPACE_BYTES")
    monkeypatch.setenv("FUSEDLOSS_BACKEND", "chunked")
    assert not comes(x, y)


def test_modules_come_here(taken):
    x, y = matrices(0, 1.0)
    for module in (
        fusedloss.InfoNCELoss(),
        fusedloss.MultipleNegativesRankingLoss(),
        fusedloss.LinearCrossEntropyLoss(),
    ):
        taken.clear()
        module(x, y, TARGET) if isinstance(module, fusedloss.LinearCrossEntropyLoss) else module(x, y)
        assert taken[-1] is not None, module


def test_a_number_of_another_type_is_refused_as_elsewhere():
    """-100.0 equals the default of `ignore_index`, and 0 that of the others."""
    x, y = matrices(0, 1.0)
    with pytest.raises(TypeError, match=r"ignore_index must be a whole number, got -100\.0"):
        fusedloss.info_nce(x, y, ignore_index=-100.0)
    found = fusedloss.info_nce(x, y, label_smoothing=0)
    torch.testing.assert_close(found, fusedloss.info_nce(x, y, backend="dense"))


def taught_by(x, y, scale, teacher, teacher_scale, cosine=False, teacher_cosine=False, symmetric=False):
    x, y = (F.normalize(z, dim=1) if cosine else z for z in (x, y))
    teacher = [F.normalize(z, dim=1) if teacher_cosine else z for z in teacher]
    sides = [(scale * x @ y.T, teacher_scale * teacher[0] @ teacher[1].T)]
    sides += [(z.T, t.T) for z, t in sides] if symmetric else []
    losses = [F.kl_div(z.log_softmax(1), t.log_softmax(1), reduction="batchmean", log_target=True) for z, t in sides]
    return sum(losses) / len(losses)


BOTH = ("query_to_key", "key_to_query")
DISTILLED = {
    "info_nce_distill": (
        lambda x, y, s, t, **o: fusedloss.info_nce_distill(x, y, *t, temperature=1 / s, teacher_temperature=0.25, **o),
        {},
    ),
    "info_nce_distill, both": (
        lambda x, y, s, t, **o: fusedloss.info_nce_distill(
            x, y, *t, temperature=1 / s, teacher_temperature=0.25, normalize=True, directions=BOTH, **o
        ),
        {"cosine": True, "teacher_cosine": True, "symmetric": True},
    ),
    "clip_distill": (
        lambda x, y, s, t, **o: fusedloss.clip_distill(x, y, s, *t, 4.0, normalize=True, **o),
        {"cosine": True, "symmetric": True},
    ),
}


@pytest.fixture
def divergences(monkeypatch):
    found = []
    divergence = straight.divergence
    monkeypatch.setattr(straight, "divergence", lambda *a, **o: found.append(divergence(*a, **o)) or found[-1])
    return found


@pytest.mark.parametrize("near", [0.0, 8.0])
@pytest.mark.parametrize("name", DISTILLED)
def test_divergences(name, near, divergences):
    """Value and gradients within the budget, also the scale's; second derivatives."""
    loss, how = DISTILLED[name]
    for seed, scale in enumerate((0.5, 5.0, 40.0)):
        (x, y), teacher = matrices(seed, near), [z.detach() for z in matrices(seed + 9, 1.0, D=7)]
        for given in (scale, torch.tensor(scale, requires_grad=True)):
            leaves = [x, y] if type(given) is float else [x, y, given]
            results = []
            for dtype in (None, torch.float32, torch.float64):
                copies = leaves if dtype is None else [t.detach().to(dtype).requires_grad_() for t in leaves]
                factor, taught = copies[2] if len(copies) > 2 else scale, teacher
                taught = [t.double() for t in teacher] if dtype is torch.float64 else teacher
                call = (lambda *a: taught_by(*a, 4.0, **how)) if dtype else loss
                value = call(*copies[:2], factor, taught)
                results.append([value.detach(), *torch.autograd.grad(value, copies)])
            assert divergences and divergences[-1] is not None
            for place, (own, eager, exact) in enumerate(zip(*results, strict=True)):
                moves = 4 * torch.finfo(torch.float32).eps if place == 3 else 0.0  # a sum of terms that cancel
                assert budget_share(own, eager, exact, torch.float32, moves) <= 1, (scale, place)
    wide = [t.detach().double().requires_grad_() for t in (x, y, torch.tensor(3.0))]
    taught = [t.double() for t in teacher]
    assert torch.autograd.gradgradcheck(lambda *a: loss(*a, taught), wide, fast_mode=True)
    assert divergences[-1] is not None


def test_a_student_that_equals_its_teacher_has_no_loss(divergences):
    x, y = matrices(0, 1.0)
    loss = fusedloss.clip_distill(x, y, 20.0, x, y, 20.0)
    assert divergences[-1] is not None and loss == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, (x, y)))


def test_divergences_of_other_calls_go_by_the_sweep(divergences):
    (x, y), teacher = matrices(0, 1.0), [z.detach() for z in matrices(1, 1.0, D=7)]
    with_nan = [teacher[0].clone().index_fill_(0, torch.tensor([1]), math.nan), teacher[1]]
    for taught, options in (
        (teacher, {"form": "ce"}),
        (teacher, {"mask": torch.ones(5, 5, dtype=torch.bool)}),
        (teacher, {"reduction": "sum"}),
        ([z.double() for z in teacher], {}),
        (with_nan, {}),
    ):
        found = fusedloss.info_nce_distill(x, y, *taught, **options)
        assert divergences[-1] is None
        wanted = fusedloss.info_nce_distill(x, y, *taught, backend="reference", **options)
        torch.testing.assert_close(found, wanted, equal_nan=True)
    with pytest.raises(ValueError, match="teacher_key must be"):
        fusedloss.info_nce_distill(x, y, teacher[0], teacher[1][:3])
    learns, fixed = (fusedloss.info_nce_distill(x, y, t, y.detach()) for t in (2 * x, 2 * x.detach()))
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (learns, fixed)))


def of_every_direction(x, y, scale):
    x, y, own = F.normalize(x, dim=1), F.normalize(y, dim=1), torch.eye(len(x), dtype=torch.bool)
    within = [(scale * z @ z.T).masked_fill(own, -torch.inf) for z in (x, y)]
    z = scale * x @ y.T
    return F.cross_entropy(torch.cat([z, within[0], z.T, within[1]], 1), torch.arange(len(x)))


def supervised(x, labels, temperature):
    """Row by row, of those that have a positive."""
    z, losses = F.normalize(x, dim=1) @ F.normalize(x, dim=1).T / temperature, []
    for i, row in enumerate(z):
        others = [j for j in range(len(x)) if j != i]
        positives = [j for j in others if labels[j] == labels[i]]
        if positives:
            losses.append(row[others].logsumexp(0) - row[positives].mean())
    return torch.stack(losses).mean()


LABELS = torch.tensor([3, -1, 3, 7, 3])  # two rows without a positive
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
OF_ITSELF = {
    "sup_con": (
        lambda x, y, s, **o: fusedloss.sup_con(x, LABELS, temperature=1 / s, **o) + 0 * y.sum(),
        lambda x, y, s: supervised(x, LABELS, 1 / s) + 0 * y.sum(),
    ),
    "sup_con, one label": (
        lambda x, y, s, **o: fusedloss.sup_con(x, 0 * LABELS, temperature=1 / s, **o) + 0 * y.sum(),
        lambda x, y, s: supervised(x, 0 * LABELS, 1 / s) + 0 * y.sum(),
    ),
    "multiple_negatives_ranking": (
        lambda x, y, s, **o: fusedloss.multiple_negatives_ranking(x, y, scale=s, directions=ALL, **o),
        of_every_direction,
    ),
    "nt_xent": (
        lambda x, y, s, **o: fusedloss.nt_xent(x, y, temperature=20 / s, **o),
        lambda x, y, s: supervised(torch.cat([x, y]), [*range(5), *range(5)], 20 / s),
    ),
}


@pytest.fixture
def without_a_sweep(monkeypatch):
    """The sweep's call fails."""
    for name in ("loss_mean", "loss_rows_or_sum"):
        for module in (fusedloss.sweep.autograd, fusedloss.losses._softmax):
            monkeypatch.setattr(module, name, None, raising=False)


@pytest.mark.parametrize("near", [0.0, 8.0])
@pytest.mark.parametrize("name", OF_ITSELF)
def test_matrices_against_themselves(name, near, without_a_sweep):
    """Value and gradients within the budget, also of one tensor as both; second derivatives."""
    loss, wanted = OF_ITSELF[name]
    for seed, scale in enumerate((0.5, 5.0, 40.0)):
        leaves = matrices(seed, near)
        results = []
        for dtype in (None, torch.float32, torch.float64):
            copies = leaves if dtype is None else [t.detach().to(dtype).requires_grad_() for t in leaves]
            value = (wanted if dtype else loss)(*copies, scale)
            results.append([value.detach(), *torch.autograd.grad(value, copies)])
        for place, (own, eager, exact) in enumerate(zip(*results, strict=True)):
            assert budget_share(own, eager, exact, torch.float32, 0.0) <= 1, (scale, place)
    x, y = (t.detach().double().requires_grad_() for t in leaves)
    assert torch.autograd.gradgradcheck(lambda *both: loss(*both, 3.0), (x, y), fast_mode=True)
    both = [torch.autograd.grad(function(x, x, 3.0), x, create_graph=True)[0] for function in (loss, wanted)]
    torch.testing.assert_close(*both, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(*(torch.autograd.grad(g.square().sum(), x)[0] for g in both), rtol=1e-8, atol=1e-12)


def test_what_the_sweep_keeps_of_them(monkeypatch):
    """No row with a positive, one row, NaN, a learnable scale: as on `reference`."""
    (x, y), scale = matrices(0, 1.0, torch.float64), torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    with_nan = x.detach().index_fill(0, torch.tensor([2]), math.nan).requires_grad_()
    of_zero = x.detach().index_fill(0, torch.tensor([2]), 0.0).requires_grad_()
    alone = torch.arange(5)
    for z, call in (
        (x, lambda x, **o: fusedloss.sup_con(x, alone, **o)),
        (x, lambda x, **o: fusedloss.sup_con(x[:1], alone[:1], **o)),
        (with_nan, lambda x, **o: fusedloss.sup_con(x, LABELS, **o)),
        (of_zero, lambda x, **o: fusedloss.sup_con(x, LABELS, **o)),
        (of_zero, lambda x, **o: fusedloss.multiple_negatives_ranking(x, y, directions=ALL, **o)),
        (scale, lambda s, **o: fusedloss.multiple_negatives_ranking(x, y, directions=ALL, scale=s, **o)),
    ):
        losses = [call(z), call(z, backend="reference")]
        torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-12, equal_nan=True)
        own, wanted = (torch.autograd.grad(loss, z)[0] for loss in losses)
        torch.testing.assert_close(
            own, wanted, rtol=1e-9, atol=1e-10 * wanted.nan_to_num().abs().max().item(), equal_nan=True
        )
    with torch.no_grad():
        z = 3 * x
    z.requires_grad_()
    loss = fusedloss.nt_xent(x, z, temperature=0.01)  # of likely positives
    torch.testing.assert_close(loss, fusedloss.nt_xent(x, z, temperature=0.01, backend="reference"), rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match="labels must"):
        fusedloss.sup_con(x, LABELS[:4])
