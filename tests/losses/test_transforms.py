"""`transform=` and `decoupled=`: values and gradients against formulas in fp64, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import fusedloss
from fusedloss import transforms

PHI = {
    "focal(2)": (transforms.focal(2.0), lambda l: (1 - torch.exp(-l)) ** 2 * l),
    "focal(0.5)": (transforms.focal(0.5), lambda l: (1 - torch.exp(-l)) ** 0.5 * l),
    "focal(1), detached": (transforms.focal(1.0, detach=True), lambda l: (1 - torch.exp(-l)).detach() * l),
    "refined_logq": (transforms.refined_logq(), lambda l: (1 - torch.exp(-l)).detach() * l),
    "generalised(0.7)": (transforms.generalised(0.7), lambda l: (1 - torch.exp(-0.7 * l)) / 0.7),
    "clipped(2)": (transforms.clipped(2.0), lambda l: torch.minimum(l, torch.tensor(2.0, dtype=l.dtype))),
    "function": (lambda l: l.square() + l, lambda l: l * l + l),
}
ROWS, COLUMNS, D = 70, 131, 24


def rows(count, dim=D, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(x):
    return F.normalize(x, dim=1)


def logits_info_nce(x, y, scale):
    return unit(x) @ unit(y).T * scale


def by_formula(z, target, phi, decoupled=False, dropped=None):
    """phi of each row's loss, from all logits."""
    at = torch.zeros_like(z, dtype=torch.bool).scatter(1, target[:, None], True)
    left = z.masked_fill(dropped & ~at, -math.inf) if dropped is not None else z
    normaliser = left.masked_fill(at, -math.inf) if decoupled else left
    return phi(normaliser.logsumexp(1) - z[at])


LOSSES = {
    "info_nce": (
        lambda x, y, s, **o: fusedloss.info_nce(x, y, temperature=1 / s, normalize=True, **o),
        lambda x, y, s, phi, d: by_formula(logits_info_nce(x, y, s), torch.arange(len(x)), phi, d).mean(),
    ),
    "info_nce, mask, weight": (
        lambda x, y, s, **o: fusedloss.info_nce(
            x, y, TARGET, temperature=1 / s, normalize=True, mask=fusedloss.masks.same_id(ROW, KEY), weight=WEIGHT, **o
        ),
        lambda x, y, s, phi, d: (
            WEIGHT
            * by_formula(logits_info_nce(x, y, s), TARGET.clamp(min=0), phi, d, ROW[:, None] == KEY).masked_fill(
                TARGET < 0, 0
            )
        ).sum()
        / WEIGHT[TARGET >= 0].sum(),
    ),
    "clip": (
        lambda x, y, s, **o: fusedloss.clip(x, y[: len(x)], s, normalize=True, **o),
        lambda x, y, s, phi, d: (
            by_formula(logits_info_nce(x, y[: len(x)], s), torch.arange(len(x)), phi, d)
            + by_formula(logits_info_nce(y[: len(x)], x, s), torch.arange(len(x)), phi, d)
        ).mean()
        / 2,
    ),
    "multiple_negatives_ranking, joint": (
        lambda x, y, s, **o: fusedloss.multiple_negatives_ranking(
            x, y[: len(x)], scale=s, directions=("query_to_doc", "query_to_query", "doc_to_query"), **o
        ),
        lambda x, y, s, phi, d: by_formula(joint(x, y[: len(x)], s, d), torch.arange(len(x)), phi, d).mean(),
    ),
    "nt_xent": (
        lambda x, y, s, **o: fusedloss.nt_xent(x, y[: len(x)], temperature=1 / s, **o),
        lambda x, y, s, phi, d: nt_xent(x, y[: len(x)], s, phi),
    ),
    "gist_embed": (
        lambda x, y, s, **o: fusedloss.gist_embed(
            x, y[: len(x)], guide=(x.detach()[:, :7], y.detach()[: len(x), :7]), temperature=1 / s,
            contrast_anchors=False, contrast_positives=False, **o
        ),
        lambda x, y, s, phi, d: by_formula(
            logits_info_nce(x, y[: len(x)], s), torch.arange(len(x)), phi, d, guided(x.detach(), y.detach()[: len(x)])
        ).mean(),
    ),
    "linear_cross_entropy": (
        lambda x, y, s, **o: fusedloss.linear_cross_entropy(x, y, TARGET, ignore_index=-100, **o),
        lambda x, y, s, phi, d: by_formula(x @ y.T, TARGET.clamp(min=0), phi)[TARGET >= 0].mean(),
    ),
}  # fmt: skip
DECOUPLED = [name for name in LOSSES if name not in ("nt_xent", "linear_cross_entropy")]
TARGET = torch.arange(ROWS).roll(3).index_fill(0, torch.tensor([5, 11]), -100)
ROW, KEY = torch.arange(ROWS) % 17, torch.arange(COLUMNS) % 17
WEIGHT = torch.linspace(0.2, 2.0, ROWS, dtype=torch.float64)


def joint(x, y, s, decoupled):
    """The positive stands twice; a decoupled normaliser holds neither."""
    x, y = unit(x), unit(y)
    own = torch.eye(len(x), dtype=torch.bool)
    back = (y @ x.T * s).masked_fill(own, -math.inf) if decoupled else y @ x.T * s
    return torch.cat([x @ y.T * s, (x @ x.T * s).masked_fill(own, -math.inf), back], 1)


def nt_xent(x, y, s, phi):
    views = unit(torch.cat([x, y]))
    z = (views @ views.T * s).masked_fill(torch.eye(len(views), dtype=torch.bool), -math.inf)
    return by_formula(z, torch.arange(len(views)).roll(len(x)), phi).mean()


def guided(x, y):
    guide = unit(x[:, :7]) @ unit(y[:, :7]).T
    return guide > guide.diagonal()[:, None] + 1e-12


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def check(loss, backend, phi, formula, decoupled=False, **options):
    ours, theirs = LOSSES[loss]
    dtype = torch.float32 if backend in ("triton", "cuda") else torch.float64
    x, y = rows(ROWS), rows(COLUMNS, seed=1)
    y[: ROWS // 2] += 2 * x[: ROWS // 2]  # some rows are well fitted
    scale = torch.tensor(8.0, dtype=torch.float64)
    inputs = [t.clone().requires_grad_() for t in (x, y, scale)]
    expected = theirs(*inputs, formula, decoupled)
    used = inputs[:2] if loss in ("linear_cross_entropy", "gist_embed") else inputs
    wanted = gradients(expected, *used)
    given = [t.to(dtype).requires_grad_() for t in (x, y, scale)]
    loss_value = ours(*given, backend=backend, **({"decoupled": True} if decoupled else {}), transform=phi, **options)
    found = gradients(loss_value, *given[: len(used)])
    near = 3e-5 if dtype is torch.float32 else 1e-9
    assert_close(loss_value.double(), expected, rtol=near, atol=near)
    for mine, their in zip(found, wanted, strict=True):
        assert_close(mine.double(), their, rtol=near, atol=near * float(their.abs().max()))


# Each transform of info_nce, each loss with two of them.
PAIRS = [
    (loss, phi) for i, loss in enumerate(LOSSES) for j, phi in enumerate(PHI) if loss == "info_nce" or (i + j) % 4 == 0
]


@pytest.mark.parametrize("loss, phi", PAIRS)
@pytest.mark.parametrize("backend", ["chunked", "dense", "reference"])
def test_a_transform_is_its_formula(loss, phi, backend):
    check(loss, backend, *PHI[phi], workspace_bytes=33 * 8 * 512)


@pytest.mark.interpreter
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("loss, phi", [("info_nce, mask, weight", "focal(0.5)"), ("clip", "generalised(0.7)")])
def test_a_transform_on_kernels(loss, phi, backend):
    check(loss, backend, *PHI[phi])


@pytest.mark.parametrize("backend", ["chunked", "dense", "reference"])
@pytest.mark.parametrize("loss", DECOUPLED)
def test_decoupled_leaves_the_target_out(loss, backend):
    check(loss, backend, None, lambda l: l, decoupled=True)
    check(loss, backend, *PHI["generalised(0.7)"], decoupled=True)


@pytest.mark.parametrize("target", [None, TARGET], ids=["diagonal", "target"])
@pytest.mark.parametrize("backend", ["chunked", "dense", "reference"])
def test_margin_and_a_bias_beside_the_target(backend, target):
    x, y, bias = rows(ROWS).requires_grad_(), rows(COLUMNS, seed=1).requires_grad_(), rows(1, COLUMNS, seed=2)[0]
    bias[7] = -math.inf
    index = torch.arange(ROWS) if target is None else target
    counts = (index >= 0) & (index != 7)
    at = torch.zeros(ROWS, COLUMNS, dtype=torch.bool).scatter(1, index.clamp(min=0)[:, None], True)
    options = {"temperature": 1 / 8, "normalize": True, "backend": backend, "key_bias": bias}
    for margin, on_target in ((0.2, True), (0.0, False), (0.3, False)):
        z = logits_info_nce(x, y, 8.0)
        own = z - 8.0 * margin if not on_target else z + bias - 8.0 * margin
        full = torch.where(at, own, z + bias)[counts]
        expected = by_formula(full, index[counts], PHI["refined_logq"][1]).mean()
        found = fusedloss.info_nce(
            x, y, target, margin=margin, bias_on_target=on_target, transform=transforms.refined_logq(), **options
        )
        assert_close(found, expected, rtol=1e-9, atol=1e-9)
        for mine, their in zip(gradients(found, x, y), gradients(expected, x, y), strict=True):
            assert_close(mine, their, rtol=1e-8, atol=1e-9)
    with pytest.raises(ValueError, match="normalize must be True with margin"):
        fusedloss.info_nce(x, y, margin=0.1)
    with pytest.raises(ValueError, match="temperature must not require a gradient with margin"):
        fusedloss.info_nce(x, y, margin=0.1, normalize=True, temperature=torch.tensor(0.1, requires_grad=True))
    with pytest.raises(ValueError, match="key_bias must not require a gradient with bias_on_target"):
        fusedloss.info_nce(x, y, bias_on_target=False, key_bias=torch.zeros(COLUMNS, requires_grad=True))


@pytest.mark.parametrize("backend", ["chunked", "dense", "reference"])
@pytest.mark.parametrize("margin, on_target", [(0.3, True), (0.0, False), (0.3, False)])
def test_smoothing_spreads_over_the_targets_own_logit(backend, margin, on_target):
    x, y, bias = rows(6), rows(9, seed=1), rows(1, 9, seed=2)[0]
    bias[8] = -math.inf
    at = torch.eye(6, 9, dtype=torch.bool)
    z = logits_info_nce(x, y, 2.0) + (bias if on_target else bias.masked_fill(at, 0)) - 2.0 * margin * at.double()
    expected = (z.logsumexp(1) - 0.9 * z[at] - 0.1 * z[:, :8].mean(1)).mean()
    options = {"margin": margin, "bias_on_target": on_target, "key_bias": bias, "normalize": True, "backend": backend}
    found = fusedloss.info_nce(x, y, temperature=0.5, label_smoothing=0.1, **options)
    assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", ["chunked", "dense", "reference"])
@pytest.mark.parametrize("phi", ["focal(0.5)", "focal(2)", "generalised(0.7)", "clipped(2)"])
def test_perfect_and_lone_rows(phi, backend):
    """A row without negatives has loss 0 and no gradient; a loss of 1e-25 is not rounded to 0."""
    x = torch.eye(4, 8, requires_grad=True)
    options = {"backend": backend, "reduction": "none", "transform": PHI[phi][0]}
    lone = fusedloss.info_nce(x[:1], x[:1], **options)
    assert lone.item() == 0 and not gradients(lone.sum(), x)[0].any()
    fitted = fusedloss.info_nce(x, x, temperature=1 / 20, **options)
    plain = math.log1p(3 * math.exp(-20))
    power = {"focal(0.5)": 1.5, "focal(2)": 3.0}.get(phi, 1.0)
    assert_close(fitted.double(), torch.full((4,), plain**power, dtype=torch.float64), rtol=1e-4, atol=0)
    assert gradients(fitted.sum(), x)[0].isfinite().all()


def test_second_derivatives_and_per_row():
    x, y = rows(4, 3).requires_grad_(), rows(5, 3, seed=1).requires_grad_()
    for backend in ("chunked", "dense"):
        for reduction in ("mean", "none"):

            def loss(x, y, backend=backend, reduction=reduction):
                return fusedloss.info_nce(
                    x, y, temperature=0.5, transform=transforms.focal(1.5), backend=backend, reduction=reduction
                )

            assert torch.autograd.gradcheck(loss, (x, y))
            assert torch.autograd.gradgradcheck(loss, (x, y))


def test_what_a_transform_cannot_be():
    x = rows(4)
    with pytest.raises(ValueError, match="label_smoothing must be 0 with transform"):
        fusedloss.info_nce(x, x, label_smoothing=0.1, transform=transforms.focal())
    with pytest.raises(ValueError, match="z_loss must be 0 with transform"):
        fusedloss.linear_cross_entropy(x, x, torch.arange(4), z_loss=0.1, transform=transforms.focal())
    with pytest.raises(ValueError, match="label_smoothing must be 0 with decoupled"):
        fusedloss.info_nce(x, x, label_smoothing=0.1, decoupled=True)
    with pytest.raises(ValueError, match="negatives must not be given together with decoupled"):
        fusedloss.info_nce(x, x, negatives=x[:, None], decoupled=True)
    with pytest.raises(ValueError, match="transform must not be focal"):
        fusedloss.clip(x, x, 1.0, decoupled=True, transform=transforms.focal())
    with pytest.raises(TypeError, match="transform must be a function"):
        fusedloss.clip(x, x, 1.0, transform=3)
    with pytest.raises(ValueError, match="transform must return a tensor"):
        fusedloss.clip(x, x, 1.0, transform=lambda l: l.sum())
    for make, value in ((transforms.generalised, 0), (transforms.generalised, 1.5), (transforms.clipped, 0)):
        with pytest.raises(ValueError, match="must be above 0"):
            make(value)


@pytest.mark.parametrize("backend", ["chunked", "dense"])
def test_functions_that_autograd_cannot_serve(backend):
    x, factor = torch.eye(4, 8), torch.ones((), requires_grad=True)
    expected = fusedloss.info_nce(x, x, backend=backend)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():  # no derivative is wanted
            assert fusedloss.info_nce(x, x, backend=backend, transform=lambda l: (l > 0).to(l.dtype)) == 1
            assert fusedloss.info_nce(x, x, backend=backend, transform=lambda l: l.mul_(factor)) == expected
    x.requires_grad_()
    for wrong, says in (
        (lambda l: torch.ones_like(l), "autograd can differentiate by the losses"),
        (torch.no_grad()(lambda l: l * 2), "autograd can differentiate by the losses"),
        (lambda l: l * factor.exp(), "of the losses alone"),
    ):
        with pytest.raises(ValueError, match=f"transform must .*{says}"):
            fusedloss.info_nce(x, x, backend=backend, transform=wrong)
    with pytest.raises(TypeError, match=r"transform must return a floating tensor, got torch\.int64"):
        fusedloss.info_nce(x, x, backend=backend, transform=lambda l: l.long())
    loss = fusedloss.info_nce(x, x, backend=backend, transform=lambda l: l.double())
    assert loss.dtype is torch.float32 and gradients(loss, x)[0].dtype is torch.float32


def test_modules_check_their_transform():
    with pytest.raises(TypeError, match="transform must be a function"):
        fusedloss.nn.InfoNCELoss(transform=3)
    with pytest.raises(ValueError, match=r"transform must be one that fusedloss\.transforms makes"):
        fusedloss.nn.ClipLoss(transform=transforms.Transform("unknown"))
    fusedloss.nn.CosineSimilarityLoss(transform=torch.nn.Sigmoid())


def test_private_negatives_are_transformed_with_their_row():
    x, y, own = rows(6), rows(6, seed=1), torch.randn(6, 2, D, dtype=torch.float64)
    z = torch.cat([x @ y.T, torch.einsum("md,mkd->mk", x, own)], 1)
    expected = by_formula(z, torch.arange(6), PHI["focal(2)"][1]).mean()
    found = fusedloss.info_nce(x, y, temperature=1.0, negatives=own, transform=transforms.focal(2.0))
    assert_close(found, expected, rtol=1e-9, atol=1e-9)


# Supervised contrastive -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["dense", "chunked", "reference", "triton", "cuda"])
@pytest.mark.parametrize("name", PHI)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_supervised_contrastive_rows(backend, name, reduction):
    """The loss of a row is the mean over its positives; a row without one stays left out."""
    phi, formula = PHI[name]
    dtype = torch.float32 if backend in ("triton", "cuda") else torch.float64
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 3, 3, 4, 0])
    x, t = rows(10, seed=2).to(dtype).requires_grad_(), torch.tensor(0.5, dtype=dtype, requires_grad=True)
    positive = (labels[:, None] == labels) & ~torch.eye(10, dtype=torch.bool)
    counts, upstream = positive.any(1), rows(10, 1, seed=3)[:, 0] if reduction == "none" else torch.tensor(1.0)

    def wanted(x, t):
        z = (unit(x) @ unit(x).T / t).masked_fill(torch.eye(10, dtype=torch.bool), -math.inf)
        log_p = (z - z.logsumexp(1, keepdim=True)).where(positive, 0)
        found = formula(-log_p.sum(1)[counts] / positive.sum(1)[counts])
        return found.mean() if reduction == "mean" else torch.zeros(10, dtype=x.dtype).masked_scatter(counts, found)

    found = fusedloss.sup_con(x, labels, temperature=t, transform=phi, reduction=reduction, backend=backend)
    other = [v.detach().double().requires_grad_() for v in (x, t)]
    right = wanted(*other)
    near = {"rtol": 2e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-11}
    assert_close(found.double(), right, **near)
    gradients = torch.autograd.grad((found * upstream).sum(), (x, t))
    for a, b in zip(gradients, torch.autograd.grad((right * upstream).sum(), other), strict=True):
        assert_close(a.double(), b, **near)


def test_supervised_contrastive_refuses_the_other_form():
    with pytest.raises(ValueError, match="transform must be None with form='in', got one; pass form='out'"):
        fusedloss.sup_con(rows(4), torch.tensor([0, 0, 1, 1]), form="in", transform=transforms.focal())
