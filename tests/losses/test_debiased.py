"""`debiased=`: values and gradients against the paper's formula in fp64, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import fusedloss
from fusedloss import masks, transforms
from fusedloss.testing import budget_share

ROWS, COLUMNS, D = 40, 61, 12
BACKENDS = ["chunked", "dense", "reference"]
IDS = torch.arange(ROWS) % 7, torch.arange(COLUMNS) % 7
TARGET = torch.arange(ROWS).roll(3).index_fill(0, torch.tensor([5, 11]), -100)
WEIGHT = torch.linspace(0.0, 2.0, ROWS, dtype=torch.float64)


def rows(count, seed=0, dim=D):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chuang(z, target, tau, scale, admitted=None):
    """The authors' lines, with the negatives of each row counted."""
    at = torch.zeros_like(z, dtype=torch.bool).scatter(1, target.clamp(min=0)[:, None], True)
    negative = ~at if admitted is None else ~at & admitted
    pos, neg = z[at].exp(), z.exp().masked_fill(~negative, 0)
    count = negative.sum(1).to(z.dtype)
    least = count * torch.exp(-scale)
    estimated = (-tau * count * pos + neg.sum(1)) / (1 - tau)
    g = torch.where(estimated < least, least, estimated)
    return -torch.log(pos / (pos + g)), estimated < least


def cosines(x, y, scale):
    return F.normalize(x, dim=1) @ F.normalize(y, dim=1).T * scale


def info_nce(x, y, s, tau, **options):
    return fusedloss.info_nce(x, y, temperature=1 / s, normalize=True, debiased=tau, **options)


def mean(x, y, s, tau):
    return chuang(cosines(x, y, s), torch.arange(len(x)), tau, s)[0].mean()


def masked(x, y, s, tau):
    bias = torch.linspace(-1, 1, COLUMNS, dtype=torch.float64).index_fill(0, torch.tensor([50, 60]), -math.inf)
    z = cosines(x, y, s) + bias
    admitted = (IDS[0][:, None] != IDS[1]) & (bias > -math.inf)
    losses = chuang(z, TARGET, tau, s, admitted)[0].masked_fill(TARGET < 0, 0)
    return (WEIGHT * losses).sum() / WEIGHT[TARGET >= 0].sum()


def of_masked(x, y, s, tau, **options):
    bias = torch.linspace(-1, 1, COLUMNS, dtype=torch.float64).index_fill(0, torch.tensor([50, 60]), -math.inf)
    mask = masks.same_id(*IDS)
    return info_nce(x, y, s, tau, target=TARGET, mask=mask, key_bias=bias.to(x.dtype), weight=WEIGHT, **options)


def both_ways(x, y, s, tau):
    z, own = cosines(x, y[: len(x)], s), torch.arange(len(x))
    return (chuang(z, own, tau, s)[0] + chuang(z.T, own, tau, s)[0]).mean() / 2


ADMITTED = IDS[0][:, None] != IDS[0].roll(3)


def both_ways_of(admitted):
    def formula(x, y, s, tau):
        z, own = cosines(x, y[: len(x)], s), torch.arange(len(x))
        forth, back = chuang(z, own, tau, s, admitted)[0], chuang(z.T, own, tau, s, admitted.T)[0]
        return (forth + back).mean() / 2

    return formula


def views(x, y, s, tau):
    u = torch.cat([x, y[: len(x)]])
    own = ~torch.eye(len(u), dtype=torch.bool)
    return chuang(cosines(u, u, s), torch.arange(len(u)).roll(len(x)), tau, s, own)[0].mean()


def ranked(x, y, s, tau):
    z = torch.cat([cosines(x, y[: len(x)], s), cosines(x, y[len(x) :], s), cosines(x, x, s)], 1)
    admitted = torch.ones_like(z, dtype=torch.bool)
    admitted[:, -len(x) :].fill_diagonal_(False)
    return chuang(z, torch.arange(len(x)), tau, s, admitted)[0].mean()


LOSSES = {
    "info_nce": (info_nce, mean),
    "info_nce, mask, bias, target, weight": (of_masked, masked),
    "clip": (lambda x, y, s, tau, **o: fusedloss.clip(x, y[: len(x)], s, normalize=True, debiased=tau, **o), both_ways),
    "clip, ids": (
        lambda x, y, s, tau, **o: fusedloss.clip(
            x, y[: len(x)], s, normalize=True, debiased=tau, mask=masks.same_id(IDS[0], IDS[0].roll(3)), **o
        ),
        both_ways_of(ADMITTED),
    ),
    "clip, bool": (
        lambda x, y, s, tau, **o: fusedloss.clip(x, y[: len(x)], s, normalize=True, debiased=tau, mask=ADMITTED, **o),
        both_ways_of(ADMITTED),
    ),
    "both directions, ids": (
        lambda x, y, s, tau, **o: fusedloss.multiple_negatives_ranking(
            x,
            y[: len(x)],
            scale=s,
            directions=("query_to_doc", "doc_to_query"),
            partition_mode="per_direction",
            ids=(torch.arange(ROWS), IDS[0]),
            debiased=tau,
            **o,
        ),
        both_ways_of(IDS[0][:, None] != IDS[0]),
    ),
    "nt_xent": (
        lambda x, y, s, tau, **o: fusedloss.nt_xent(x, y[: len(x)], temperature=1 / s, debiased=tau, **o),
        views,
    ),
    "multiple_negatives_ranking": (
        lambda x, y, s, tau, **o: fusedloss.multiple_negatives_ranking(
            x, y[: len(x)], y[len(x) :], scale=s, directions=("query_to_doc", "query_to_query"), debiased=tau, **o
        ),
        ranked,
    ),
}  # fmt: skip


def inputs(scale=8.0, dtype=torch.float64):
    x, y = rows(ROWS), rows(COLUMNS, 1)
    y[: ROWS // 2] += 2 * x[: ROWS // 2]  # well fitted: their bound is reached
    return [t.to(dtype).requires_grad_() for t in (x, y, torch.tensor(scale, dtype=torch.float64))]


def close(found, wanted, given, leaves, near):
    assert_close(found.double(), wanted, rtol=near, atol=near)
    for mine, their in zip(torch.autograd.grad(found, given), torch.autograd.grad(wanted, leaves), strict=True):
        assert_close(mine.double(), their, rtol=near, atol=near * float(their.abs().max()))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("learnt", [True, False])
def test_it_is_the_papers(loss, backend, learnt):
    ours, theirs = LOSSES[loss]
    given, leaves = inputs(), inputs()
    if not learnt:
        given[2] = 8.0
    options = {"workspace_bytes": 17 * 8 * 128} if backend == "chunked" else {}
    found = ours(*given, 0.1, backend=backend, **options)
    close(found, theirs(*leaves, 0.1), given[: 2 + learnt], leaves[: 2 + learnt], 1e-9)


def test_the_bound_is_reached_by_some_rows_and_not_by_others():
    x, y, s = inputs()
    clamped = chuang(cosines(x, y, s), torch.arange(ROWS), 0.1, s)[1]
    assert 5 < int(clamped.sum()) < ROWS - 5


@pytest.mark.interpreter
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("loss", ["info_nce", "info_nce, mask, bias, target, weight", "clip", "nt_xent"])
def test_kernels(loss, backend):
    ours, theirs = LOSSES[loss]
    given, leaves = inputs(dtype=torch.float32), inputs()
    close(ours(*given, 0.1, backend=backend), theirs(*leaves, 0.1), given, leaves, 3e-5)
    given[2] = 8.0
    leaves = inputs()
    close(ours(*given, 0.1, backend=backend), theirs(*leaves, 0.1), given[:2], leaves[:2], 3e-5)


@pytest.mark.parametrize("scale", [2.0, 20.0, 50.0])
@pytest.mark.parametrize("backend", ["chunked", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_budget(scale, backend, dtype):
    x, y, _ = inputs()
    exact = [t.detach().to(dtype).double().requires_grad_() for t in (x, y)]
    eager = [t.detach().to(dtype).float().requires_grad_() for t in (x, y)]
    given = [t.detach().to(dtype).requires_grad_() for t in (x, y)]
    s = torch.tensor(scale, dtype=torch.float64)
    wanted, plain = mean(*exact, s, 0.1), mean(*eager, s.float(), 0.1)
    found = info_nce(*given, scale, 0.1, backend=backend)
    assert budget_share(found, plain, wanted, torch.float32) <= 1
    gradients = (torch.autograd.grad(l, v) for l, v in ((found, given), (plain, eager), (wanted, exact)))
    for mine, their, true in zip(*gradients, strict=True):
        assert budget_share(mine, their.to(dtype), true, dtype) <= 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_at_the_bound_have_a_gradient_of_their_target_alone(backend):
    """All rows reach it, and their gradients are of the order 1e-12."""
    x, s = rows(9, 3), torch.tensor(14.0, dtype=torch.float64)
    key = x + 0.1 * rows(9, 4)
    given, leaves = ([t.clone().requires_grad_() for t in (x, key)] for _ in range(2))
    wanted = torch.log1p(8 * torch.exp(-s - cosines(*leaves, s).diagonal())).mean()
    close(info_nce(*given, s, 0.2, backend=backend), wanted, given, leaves, 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("phi", [transforms.focal(1.5), transforms.clipped(0.7)])
def test_a_transform_is_of_the_debiased_loss(backend, phi):
    given, leaves = inputs(), inputs()
    losses = chuang(cosines(*leaves), torch.arange(ROWS), 0.1, leaves[2])[0]
    wanted = (1 - torch.exp(-losses)) ** 1.5 * losses if phi.name == "focal" else losses.clamp(max=0.7)
    close(info_nce(*given, 0.1, transform=phi, backend=backend), wanted.mean(), given, leaves, 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_row_and_a_second_derivative(backend):
    given, leaves = inputs(), inputs()
    found = info_nce(*given, 0.1, backend=backend, reduction="none")
    wanted = chuang(cosines(*leaves), torch.arange(ROWS), 0.1, leaves[2])[0]
    factor = torch.linspace(-1, 1, ROWS, dtype=torch.float64)
    close((found * factor).sum(), (wanted * factor).sum(), given, leaves, 1e-9)
    twice = []
    for loss, tensors in ((info_nce(*given, 0.1, backend=backend), given), (mean(*leaves, 0.1), leaves)):
        first = torch.autograd.grad(loss, tensors, create_graph=True)
        twice.append(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))
    for mine, their in zip(*twice, strict=True):
        assert_close(mine, their, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_degenerate_rows(backend):
    x = rows(1).requires_grad_()
    loss = info_nce(x, x.detach(), 5.0, 0.3, backend=backend)
    loss.backward()
    assert loss == 0 and not x.grad.any()  # no negatives
    only = masks.same_group(torch.arange(4), torch.arange(4))
    x = rows(4).requires_grad_()
    loss = info_nce(x, rows(4, 1), 5.0, 0.3, mask=only, backend=backend)
    loss.backward()
    assert loss == 0 and not x.grad.any()  # all masked
    assert info_nce(rows(3), rows(3), 5.0, 0.3, target=torch.full((3,), -100), backend=backend) == 0
    assert info_nce(rows(0), rows(3), 5.0, 0.3, backend=backend) == 0
    x = rows(4)
    x[2] = math.nan
    losses = info_nce(x, rows(6, 1), 5.0, 0.3, backend=backend, reduction="none")
    assert losses.isnan().tolist() == [False, False, True, False]


def test_a_share_of_0_is_the_plain_loss():
    x, y, s = inputs()
    assert torch.equal(info_nce(x, y, s, 0.0), fusedloss.info_nce(x, y, temperature=1 / s, normalize=True))


@pytest.mark.parametrize(
    "options, error",
    [
        ({"debiased": 1.0}, "debiased must be at least 0 and below 1"),
        ({"debiased": -0.1}, "debiased must be at least 0 and below 1"),
        ({"decoupled": True}, "debiased must not be given together with decoupled"),
        ({"label_smoothing": 0.1}, "debiased must not be given together with label_smoothing"),
        ({"margin": 0.1, "normalize": True}, "debiased must not be given together with margin"),
        ({"negatives": torch.ones(3, 2, 4)}, "negatives must not be given together with debiased"),
    ],
    ids=str,
)
def test_what_it_refuses(options, error):
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=error):
        fusedloss.info_nce(x, x, **{"debiased": 0.1, **options})


def test_what_the_other_losses_refuse():
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="debiased must not be given together with decoupled"):
        fusedloss.clip(x, x, 1.0, decoupled=True, debiased=0.1)
    with pytest.raises(ValueError, match="doc_to_query under partition_mode='joint'"):
        fusedloss.multiple_negatives_ranking(x, x, directions=("query_to_doc", "doc_to_query"), debiased=0.1)


@pytest.mark.parametrize("scale", [40.0, 55.0])
def test_gradients_of_1e_30_at_the_bound_are_numbers(scale):
    """As of a row whose target's cosine and scale add up to exponents of 65 to 80."""
    cosine = torch.linspace(-1, 1, 41, dtype=torch.float64)
    query = torch.stack([torch.ones_like(cosine), torch.zeros_like(cosine)], 1)
    key = torch.stack([cosine, (1 - cosine.square()).sqrt()], 1)
    options = {"temperature": 1 / scale, "normalize": True, "debiased": 0.3, "reduction": "sum"}
    for rows in (slice(41), slice(28, 29)):
        found, wanted = [], []
        for kept, dtype, backend in ((found, torch.float32, "chunked"), (wanted, torch.float64, "reference")):
            x, y = (t.to(dtype).requires_grad_() for t in (query[rows], key))
            loss = fusedloss.info_nce(x, y, torch.arange(41)[rows], backend=backend, **options)
            kept += [loss, *torch.autograd.grad(loss, (x, y))]
        for own, other in zip(found, wanted, strict=True):
            assert_close(own.double(), other, rtol=1e-5, atol=1e-28 + 1e-5 * float(other.detach().abs().max()))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("backend", ["chunked", "dense"])
def test_drawn_options(seed, backend):
    draw = torch.Generator().manual_seed(seed)

    def whole(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    def numbers(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    M, N, K, tau = whole(1, 9), whole(1, 30), whole(0, 9), [0.0, 0.05, 0.3, 0.9][seed % 4]
    normalize, masked, biased = (whole(0, 1) > 0 for _ in range(3))
    target = torch.randint(N, (M,), generator=draw)
    target[torch.rand(M, generator=draw) < 0.2] = -100
    x, y, bank = numbers(M, 5), numbers(N, 5), numbers(K, 5)
    s = torch.tensor(float(whole(1, 12)) if normalize else 0.7, dtype=torch.float64)
    bias = numbers(N + K) if biased else torch.zeros(N + K, dtype=torch.float64)
    bias[torch.rand(N + K, generator=draw) < 0.2 * biased] = -math.inf
    ids = torch.randint(4, (M,), generator=draw), torch.randint(4, (N + K,), generator=draw)
    weight = torch.rand(M, generator=draw, dtype=torch.float64)
    given, leaves = ([t.clone().requires_grad_() for t in (x, y, s, bias)] for _ in range(2))

    x, y, s, bias = leaves
    unit = (lambda t: F.normalize(t, dim=1)) if normalize else (lambda t: t)
    z = unit(x) @ unit(torch.cat([y, bank])).T * s + bias
    counts = (target >= 0) & (bias[target.clamp(min=0)] > -math.inf)
    z = z.masked_fill(~counts[:, None], 0)
    admitted = (bias > -math.inf).expand_as(z)
    admitted = admitted & (ids[0][:, None] != ids[1]) if masked else admitted
    losses = chuang(z, target, tau, s, admitted)[0] if tau else plain(z, target, admitted)
    total = weight[counts].sum()
    wanted = (weight * losses.masked_fill(~counts, 0)).sum() / (total if total else 1)

    x, y, s, bias = given
    found = fusedloss.info_nce(
        x, y, target, temperature=1 / s, normalize=normalize, debiased=tau, bank=bank, weight=weight,
        key_bias=bias if biased else None, mask=masks.same_id(*ids) if masked else None, backend=backend,
    )  # fmt: skip
    assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    of = 3 + biased
    for mine, their in zip(
        torch.autograd.grad(found, given[:of]), torch.autograd.grad(wanted, leaves[:of]), strict=True
    ):
        assert_close(mine, their, rtol=1e-8, atol=1e-11)


def plain(z, target, admitted):
    at = torch.zeros_like(z, dtype=torch.bool).scatter(1, target.clamp(min=0)[:, None], True)
    return z.masked_fill(~at & ~admitted, -math.inf).logsumexp(1) - z[at]
