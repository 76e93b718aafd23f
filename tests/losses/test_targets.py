"""Several positives a row, `target=[M, P]`: values and gradients against formulas in fp64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import fusedloss
from fusedloss import masks, transforms
from fusedloss.backends.cuda.launching import columns_as_bits
from fusedloss.testing import budget_share

ROWS, COLUMNS, D, MOST = 37, 53, 12, 4
BACKENDS = ["chunked", "dense", "reference"]
KERNELS = ["triton", "cuda"]
ALL = [*BACKENDS, *KERNELS]
FORMS = ["each", "joint"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = torch.arange(ROWS) % 7, torch.arange(COLUMNS) % 7
WEIGHT = torch.linspace(0.0, 2.0, ROWS, dtype=torch.float64)


def rows(count, seed=0, dim=D):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn():
    """From 0 to 4 positives a row, in any order, some of them twice."""
    draw = torch.Generator().manual_seed(5)
    target = torch.randint(COLUMNS, (ROWS, MOST), generator=draw)
    target[torch.rand(ROWS, MOST, generator=draw) < 0.4] = -100
    target[3] = -100
    target[4] = torch.tensor([9, 9, -100, 9])
    target[5] = torch.tensor([-100, 0, COLUMNS - 1, -100])
    return target


TARGET = drawn()


def formula(z, target, form, admitted=None):
    """From all logits; 0 for a row without a positive."""
    at = torch.zeros(len(z), z.shape[1] + 1, dtype=torch.bool)
    at = at.scatter(1, target.where(target >= 0, z.shape[1]), True)[:, :-1]
    others = ~at if admitted is None else ~at & admitted
    s = z.exp().masked_fill(~others, 0).sum(1, keepdim=True)
    if form == "each":
        return torch.log1p(s / z.exp().masked_fill(~at, 1)).masked_fill(~at, 0).sum(1) / at.sum(1).clamp(min=1)
    positive = z.exp().masked_fill(~at, 0).sum(1, keepdim=True)
    return torch.log1p(s / positive.masked_fill(~at.any(1, keepdim=True), math.inf))[:, 0]


def cosines(x, y, scale):
    return F.normalize(x, dim=1) @ F.normalize(y, dim=1).T * scale


def inputs(dtype=torch.float64, scale=8.0):
    x, y = rows(ROWS), rows(COLUMNS, 1)
    for i in range(0, ROWS, 2):  # some are well fitted
        y[TARGET[i][TARGET[i] >= 0]] += 2 * x[i]
    return [t.to(dtype).requires_grad_() for t in (x, y, torch.tensor(scale, dtype=torch.float64))]


def setting(backend):
    """The dtype, and how near."""
    return (torch.float32, 3e-5) if backend in KERNELS else (torch.float64, 1e-9)


def info_nce(x, y, s, form, target=TARGET, **options):
    return fusedloss.info_nce(x, y, target, temperature=1 / s, normalize=True, positives=form, **options)


def mean(x, y, s, form):
    losses = formula(cosines(x, y, s), TARGET, form)
    return losses[(TARGET >= 0).any(1)].mean()


def close(found, wanted, given, leaves, near=1e-9):
    assert_close(found.double(), wanted, rtol=near, atol=near)
    for mine, their in zip(torch.autograd.grad(found, given), torch.autograd.grad(wanted, leaves), strict=True):
        assert_close(mine.double(), their, rtol=near, atol=near * float(their.abs().max()))


@pytest.mark.interpreter
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("learnt", [True, False])
def test_it_is_its_formula(form, backend, learnt):
    dtype, near = setting(backend)
    given, leaves = inputs(dtype), inputs()
    if not learnt:
        given[2] = 8.0
    options = {} if backend in ("dense", "reference") else {"workspace_bytes": 17 * dtype.itemsize * 64}
    found = info_nce(*given, form, backend=backend, **options)
    close(found, mean(*leaves, form), given[: 2 + learnt], leaves[: 2 + learnt], near)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["chunked", "dense"])
def test_a_temperature_that_learns_in_fp32(form, backend):
    given, leaves = inputs(torch.float32), inputs()
    close(info_nce(*given, form, backend=backend), mean(*leaves, form), given, leaves, 3e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("bias_on_target", [True, False])
def test_masks_biases_banks_and_weights(form, backend, bias_on_target):
    """A bias of -inf removes positives, too; a mask removes none."""
    dtype, near = setting(backend)
    given, leaves = inputs(dtype), inputs()
    bank = rows(11, 7)
    bias = torch.linspace(-1, 1, COLUMNS + 11, dtype=torch.float64).index_fill(
        0, torch.tensor([0, 9, 20, 60]), -math.inf
    )
    x, y, s = leaves
    plain = cosines(x, torch.cat([y, bank]), s)
    ids = torch.cat([IDS[1], torch.arange(11)])
    admitted = (IDS[0][:, None] != ids) & (bias > -math.inf)
    target = TARGET.masked_fill(torch.isin(TARGET, torch.tensor([0, 9, 20])), -100)
    at = torch.zeros(ROWS, COLUMNS + 12, dtype=torch.bool).scatter(1, target.where(target >= 0, COLUMNS + 11), True)[
        :, :-1
    ]
    z = plain + (bias if bias_on_target else bias.where(~at, 0))
    counts = (target >= 0).any(1)
    wanted = (WEIGHT[counts] * formula(z, target, form, admitted)[counts]).sum() / WEIGHT[counts].sum()
    found = info_nce(
        *given, form, mask=masks.same_id(IDS[0], ids), key_bias=bias.to(dtype), bank=bank.to(dtype),
        weight=WEIGHT.to(dtype), bias_on_target=bias_on_target, backend=backend,
    )  # fmt: skip
    close(found, wanted, given, leaves, near)


@pytest.mark.interpreter
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ALL)
def test_without_normalize_by_row_and_under_a_transform(form, backend):
    dtype, near = setting(backend)
    given, leaves = inputs(dtype), inputs()
    factor = torch.linspace(-1, 1, ROWS, dtype=torch.float64)
    x, y, s = leaves
    counts = (TARGET >= 0).any(1)
    losses = formula(x @ y.T * (s / 50), TARGET, form)[counts]
    wanted = (factor[counts] * (1 - torch.exp(-losses)) ** 1.5 * losses).sum()
    x, y, s = given
    found = fusedloss.info_nce(
        x, y, TARGET, temperature=50 / s, positives=form, reduction="none", transform=transforms.focal(1.5),
        backend=backend,
    )  # fmt: skip
    assert not found[~counts].any()
    close((factor * found).sum(), wanted, given, leaves, near)


@pytest.mark.interpreter
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ALL)
def test_one_positive_is_the_plain_loss(form, backend):
    dtype, near = setting(backend)
    given, leaves = inputs(dtype), inputs()
    target = TARGET[:, 0]
    x, y, s = leaves
    wanted = fusedloss.info_nce(x, y, target, temperature=1 / s, normalize=True, backend="reference")
    close(info_nce(*given, form, target[:, None], backend=backend), wanted, given, leaves, near)


@pytest.mark.interpreter
@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize("backend", KERNELS)
def test_tiles_with_and_without_a_target(learnt, backend):
    """Of kernels, which look for further targets only where a tile has one."""
    draw = torch.Generator().manual_seed(2)
    target = torch.stack([70 + torch.randperm(60, generator=draw)[:5] for _ in range(70)])
    target[:8, 2:] = -100
    target[3] = torch.arange(93, 98)
    given, leaves = ([rows(70).to(dtype), rows(200, 1).to(dtype)] for dtype in (torch.float32, torch.float64))
    for tensors in (given, leaves):
        tensors.append(torch.tensor(6.0, dtype=tensors[0].dtype))
        for t in tensors:
            t.requires_grad_()
    scale = given[2] if learnt else 6.0
    found = info_nce(*given[:2], scale, "each", target, backend=backend)
    wanted = formula(cosines(*leaves), target, "each").mean()
    close(found, wanted, given[: 2 + learnt], leaves[: 2 + learnt], 3e-5)
    with torch.no_grad():
        assert_close(info_nce(*given[:2], scale, "each", target, backend=backend).double(), wanted, rtol=1e-6, atol=0)


def test_columns_as_bits():
    """A full word, its last bit the sign; none; columns at the borders of words, in any order."""
    columns = torch.full((3, 32), -1)
    columns[0] = 32 + torch.arange(32).flip(0)
    columns[2, 5:9] = torch.tensor([64, 31, 0, 69])
    found = columns_as_bits(columns, 70)
    assert found.tolist() == [[0, -1, 0], [0, 0, 0], [1 - 2**31, 0, 1 + 2**5]]


@pytest.mark.parametrize("form", FORMS)
def test_the_sweep_that_knows_the_normaliser_first(form, monkeypatch):
    """8 MND, as where no shift is known before the sums."""
    monkeypatch.setattr(fusedloss.backends.chunked, "can_exp", lambda problem: False)
    given, leaves = inputs(), inputs()
    close(info_nce(*given, form, backend="chunked"), mean(*leaves, form), given, leaves)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative(form, backend):
    twice = []
    given, leaves = inputs(), inputs()
    for loss, tensors in ((info_nce(*given, form, backend=backend), given), (mean(*leaves, form), leaves)):
        first = torch.autograd.grad(loss, tensors, create_graph=True)
        twice.append(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))
    for mine, their in zip(*twice, strict=True):
        assert_close(mine, their, rtol=1e-8, atol=1e-10)


@pytest.mark.interpreter
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [2.0, 20.0, 50.0])
@pytest.mark.parametrize(
    "backend, dtype",  # the interpreter multiplies no bfloat16
    [(b, d) for b in ("chunked", "dense", *KERNELS) for d in DTYPES if (b, d) != ("triton", torch.bfloat16)],
)
def test_the_error_budget(form, scale, backend, dtype):
    x, y, _ = inputs()
    exact, eager, given = (
        [t.detach().to(dtype).to(d).requires_grad_() for t in (x, y)] for d in (torch.float64, torch.float32, dtype)
    )
    s = torch.tensor(scale, dtype=torch.float64)
    wanted, plain = mean(*exact, s, form), mean(*eager, s.float(), form)
    found = info_nce(*given, scale, form, backend=backend)
    assert budget_share(found, plain, wanted, torch.float32) <= 1
    gradients = (torch.autograd.grad(l, v) for l, v in ((found, given), (plain, eager), (wanted, exact)))
    for mine, their, true in zip(*gradients, strict=True):
        assert budget_share(mine, their.to(dtype), true, dtype) <= 1


@pytest.mark.interpreter
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ALL)
def test_degenerate_rows(form, backend):
    dtype, _ = setting(backend)
    x, y = rows(3).to(dtype).requires_grad_(), rows(5, 1).to(dtype)
    none = torch.full((3, 2), -100)
    for target in (none, none[:, :0]):
        loss = info_nce(x, y, 5.0, form, target, backend=backend)
        loss.backward()
        assert loss == 0 and not x.grad.any()
    every = torch.arange(5).expand(3, 5).contiguous()
    assert info_nce(x, y, 5.0, form, every, backend=backend) == 0  # no negatives
    assert info_nce(x, y[:1], 5.0, form, none * 0, backend=backend) == 0  # one column
    assert info_nce(x[:0], y, 5.0, form, none[:0], backend=backend) == 0
    spoilt = rows(3).to(dtype)
    spoilt[1] = math.nan
    found = info_nce(spoilt, y, 5.0, form, every[:, :2], backend=backend, reduction="none")
    assert found.isnan().tolist() == [False, True, False]
    masked = info_nce(x, y, 5.0, form, every[:, :2], backend=backend, mask=torch.zeros(3, 5, dtype=torch.bool))
    assert masked == 0


@pytest.mark.interpreter
@pytest.mark.parametrize("backend", ALL)
def test_a_target_that_not_self_leaves_out_is_no_positive(backend):
    dtype, near = setting(backend)
    target = torch.tensor([[0, 1], [1, -100], [1, 2]])
    kept = torch.tensor([[-100, 1], [-100, -100], [1, -100]])
    x, y = rows(3), rows(5, 1)
    admitted = ~torch.eye(3, 5, dtype=torch.bool)
    wanted = formula(cosines(x, y, 5.0), kept, "each", admitted)[[0, 2]].mean()
    given = x.to(dtype), y.to(dtype), 5.0
    found = info_nce(*given, "each", target, mask=masks.not_self(), backend=backend)
    assert_close(found.double(), wanted, rtol=near, atol=0)


@pytest.mark.parametrize(
    "options, error",
    [
        ({"debiased": 0.1}, r"target \[M, P\] must not be given together with debiased"),
        ({"decoupled": True}, r"target \[M, P\] must not be given together with decoupled"),
        ({"label_smoothing": 0.1}, r"target \[M, P\] must not be given together with label_smoothing"),
        ({"return_stats": True}, r"target \[M, P\] must not be given together with return_stats"),
        ({"mask": masks.score_margin(0.1)}, r"target \[M, P\] must not be given together with score_margin"),
        ({"negatives": torch.ones(3, 2, 4)}, r"negatives must not be given together with target \[M, P\]"),
        ({"positives": "all"}, "positives must be one of 'each', 'joint', got 'all'"),
        ({"target": torch.zeros(2, 2, dtype=torch.int64)}, r"target must have shape \[3, P\], one index per positive"),
    ],
    ids=str,
)
def test_what_it_refuses(options, error):
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=error):
        fusedloss.info_nce(x, x, **{"target": torch.zeros(3, 2, dtype=torch.int64), **options})
    with pytest.raises(IndexError, match=r"target\[1, 0\] must be an index from 0 to 2, or -100"):
        fusedloss.info_nce(x, x, torch.tensor([[0, 1], [3, 0], [0, 0]]))


# A teacher's scores of the row's own list ---------------------------------------------------------------------------


@pytest.mark.interpreter
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("normalize", [True, False])
def test_teacher_scores_are_soft_targets(backend, normalize):
    K, (dtype, near) = 3, setting(backend)
    draw = torch.Generator().manual_seed(9)
    negatives = torch.randn(ROWS, K, D, generator=draw, dtype=torch.float64)
    teacher = 2 * torch.randn(ROWS, 1 + K, generator=draw, dtype=torch.float64)
    real = torch.rand(ROWS, K, generator=draw) < 0.7
    target = TARGET[:, 0]
    scale = 8.0 if normalize else 0.2
    given, leaves = ([*inputs(kind, scale), negatives.to(kind).requires_grad_()] for kind in (dtype, torch.float64))
    x, y, s, own = leaves
    unit = (lambda t: F.normalize(t, dim=-1)) if normalize else (lambda t: t)
    z = unit(x) @ unit(y).T * s
    private = (unit(own) * unit(x)[:, None]).sum(2) * s
    listed = torch.cat([z.gather(1, target.clamp(min=0)[:, None]), private], 1)
    share = torch.cat([teacher[:, :1], teacher[:, 1:].masked_fill(~real, -math.inf)], 1).softmax(1)
    columns = torch.cat([z, private.masked_fill(~real, -math.inf)], 1)
    losses = columns.logsumexp(1) - (share * listed).sum(1)
    x, y, s, own = given
    found = fusedloss.info_nce(
        x, y, target, temperature=1 / s, normalize=normalize, negatives=own, negatives_mask=real,
        teacher_scores=teacher, backend=backend,
    )  # fmt: skip
    close(found, losses[target >= 0].mean(), given, leaves, near)
    spoilt = teacher.clone()
    spoilt[target < 0] = math.nan
    again = fusedloss.info_nce(
        x, y, target, temperature=1 / s, normalize=normalize, negatives=own, negatives_mask=real,
        teacher_scores=spoilt, backend=backend,
    )  # fmt: skip
    assert_close(again, found)
    assert torch.autograd.grad(again, x)[0].isfinite().all()


def test_a_teacher_that_is_certain_is_the_plain_loss():
    x, y, _ = inputs()
    own, certain = (
        rows(ROWS, 4).reshape(ROWS, 1, D),
        torch.tensor([[0.0, -math.inf]], dtype=torch.float64).expand(ROWS, 2),
    )
    options = {"negatives": own, "temperature": 0.1, "normalize": True}
    assert_close(fusedloss.info_nce(x, y, teacher_scores=certain, **options), fusedloss.info_nce(x, y, **options))


def test_what_teacher_scores_need():
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="negatives must be given with teacher_scores"):
        fusedloss.info_nce(x, x, teacher_scores=torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"teacher_scores must be a floating tensor \[3, 3\], got shape \[3, 2\]"):
        fusedloss.info_nce(x, x, negatives=torch.ones(3, 2, 4), teacher_scores=torch.zeros(3, 2))
    with pytest.raises(TypeError, match=r"teacher_scores must be a floating tensor \[3, 3\], got torch.int64"):
        fusedloss.info_nce(x, x, negatives=torch.ones(3, 2, 4), teacher_scores=torch.zeros(3, 3, dtype=torch.int64))


# Drawn options ------------------------------------------------------------------------------------------------------


@pytest.mark.interpreter
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("backend", ["chunked", "dense", *KERNELS])
def test_drawn_options(seed, backend):
    draw = torch.Generator().manual_seed(seed)

    def whole(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    def chance():
        return bool(torch.rand(1, generator=draw) < 0.5)

    M, N, P, K, form = whole(1, 9), whole(1, 12), whole(1, 5), whole(0, 4), FORMS[whole(0, 1)]
    normalize, ignore = chance(), whole(-1, 1)
    target = torch.randint(N, (M, P), generator=draw)
    target[torch.rand(M, P, generator=draw) < 0.3] = ignore
    numbers = (torch.randn(n, 5, generator=draw, dtype=torch.float64) for n in (M, N, K))
    x, y, bank = (t * whole(1, 3) for t in numbers)
    s = torch.tensor(float(whole(1, 12)) if normalize else 0.7, dtype=torch.float64)
    bias = torch.randn(N + K, generator=draw, dtype=torch.float64)
    bias[torch.rand(N + K, generator=draw) < 0.2] = -math.inf
    bias = bias if chance() else torch.zeros(N + K, dtype=torch.float64)
    ids = torch.randint(4, (M,), generator=draw), torch.randint(4, (N + K,), generator=draw)
    dense = torch.rand(M, N + K, generator=draw) < 0.7
    weight = torch.rand(M, generator=draw, dtype=torch.float64).masked_fill(torch.rand(M, generator=draw) < 0.2, 0)
    dtype, near = setting(backend)
    kinds = (dtype, torch.float64)
    given, leaves = ([t.to(kind, copy=True).requires_grad_() for t in (x, y, s, bias)] for kind in kinds)
    unit = (lambda t: F.normalize(t, dim=1)) if normalize else (lambda t: t)

    x, y, s, bias = leaves
    z = unit(x) @ unit(torch.cat([y, bank])).T * s + bias
    kept = target.masked_fill(target == ignore, -100)
    kept = kept.masked_fill((kept >= 0) & (bias[kept.clamp(min=0)] == -math.inf), -100)
    counts = (kept >= 0).any(1)
    admitted = dense & (ids[0][:, None] != ids[1]) & (bias > -math.inf)
    losses = formula(z, kept, form, admitted)
    losses = (losses * (1 - torch.exp(-losses))).masked_fill(~counts, 0)
    total = weight[counts].sum()
    wanted = (weight * losses).sum() / (total if total else 1)

    x, y, s, bias = given
    found = fusedloss.info_nce(
        x, y, target, temperature=1 / s, normalize=normalize, positives=form, bank=bank.to(dtype), key_bias=bias,
        mask=masks.same_id(*ids) & dense, weight=weight.to(dtype), ignore_index=ignore, transform=transforms.focal(1.0),
        backend=backend, workspace_bytes=[None, 4096][whole(0, 1)],
    )  # fmt: skip
    assert_close(found.double(), wanted, rtol=near, atol=near / 1000)
    for mine, their in zip(torch.autograd.grad(found, given), torch.autograd.grad(wanted, leaves), strict=True):
        assert_close(mine.double(), their, rtol=10 * near, atol=near / 100)
