"""What a mask means: which columns compete, for every mask, alone and joined, and what is counted of them.

Formulas are dense: a bool matrix [M, N] of what may compete, -inf elsewhere, log_softmax, all in fp64.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import fusedloss
from fusedloss import masks, testing

BACKENDS = ["chunked", "reference"]
ALL = [*BACKENDS, "triton"]
REDUCTIONS = ["mean", "sum", "none"]
IGNORED = -100


@pytest.fixture
def small_chunks(monkeypatch):
    """Several row chunks and column tiles at tens of rows, so that masks are cut at their borders."""
    from fusedloss import sweep
    from fusedloss.backends import chunked

    monkeypatch.setattr(sweep, "chunk_rows", lambda M, *_: min(M, 5))
    monkeypatch.setattr(sweep, "STATS_ROWS", {"cpu": 4, "cuda": 4})
    monkeypatch.setattr(sweep, "CONVERTED_COLUMNS", 7)
    monkeypatch.setattr(chunked, "TILE_COLUMNS", 7)


def randomly(examples):
    """The chunks stay the same from one example to the next."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def close(found, wanted, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(found, torch.as_tensor(wanted).to(found), rtol=rtol, atol=atol)


def same(ours, formula, tensors, **tolerance):
    """Value and all gradients, against an upstream gradient that differs by row where the value does."""
    upstream = torch.rand(ours(*tensors).shape, dtype=torch.float64) + 0.5
    found = testing.value_and_gradients(lambda *t: (ours(*t) * upstream).sum(), tensors)
    wanted = testing.value_and_gradients(
        lambda *t: (formula(*t) * upstream).sum(), [t.double() if t.is_floating_point() else t for t in tensors]
    )
    for one, other in zip(found, wanted, strict=True):
        close(one.double(), other, **tolerance)


def reduce(rows, weight, reduction):
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / weight.sum() if weight.sum() else 0 * rows.sum()}[
        reduction
    ]


# The masks and their matrices -----------------------------------------------------------------------------------------


def cosines(x, y):
    return F.normalize(x.double(), dim=1) @ F.normalize(y.double(), dim=1).T


def by_guide(margin, strategy):
    def make(sim, target):
        rows, columns = sim.shape
        query, key = randn(rows, 4).to(sim.dtype), randn(columns, 4).to(sim.dtype)
        g = cosines(query, key)
        own = g.gather(1, target[:, None])
        threshold = own - margin if strategy == "absolute" else own - own.abs() * margin
        return masks.guide(query, key, margin=margin, strategy=strategy), ~(g > threshold)

    return make


def by_score(margin, exempt):
    def make(sim, target):
        rows, columns = sim.shape
        spared = torch.randint(-1, columns, (rows, 2)) if exempt else None
        admitted = ~(sim > sim.gather(1, target[:, None]) + margin)
        if exempt:
            admitted |= (spared[:, :, None] == torch.arange(columns)).any(1)
        return masks.score_margin(margin, spared), admitted

    return make


def by_id(sim, target):
    row_ids, key_ids = (torch.randint(-2, 2, (n,)) * 2**40 for n in sim.shape)
    return masks.same_id(row_ids, key_ids), row_ids[:, None] != key_ids


def by_group(sim, target):
    row_groups, key_groups = (torch.randint(0, 3, (n,)) - 2**62 for n in sim.shape)
    return masks.same_group(row_groups, key_groups), row_groups[:, None] == key_groups


def by_matrix(sim, target):
    allowed = torch.rand(sim.shape) < 0.6
    return allowed, allowed


def by_place(offset):
    def make(sim, target):
        rows, columns = (torch.arange(n) for n in sim.shape)
        return masks.not_self(offset), columns != rows[:, None] + offset

    return make


MASKS = {
    "same_id": by_id,
    "same_group": by_group,
    "bool": by_matrix,
    "score_margin": by_score(0.0, False),
    "score_margin, exempt": by_score(0.1, True),
    "score_margin, negative": by_score(-0.3, True),
    "guide": by_guide(0.0, "absolute"),
    "guide, absolute": by_guide(0.2, "absolute"),
    "guide, relative": by_guide(0.4, "relative"),
    "guide, negative margin": by_guide(-0.2, "absolute"),
    "guide, relative, negative margin": by_guide(-0.4, "relative"),
    "not_self": by_place(0),
    "not_self, offset": by_place(3),
    "not_self, to the left": by_place(-2),
}
COMBINED = [
    ("same_id", "score_margin, exempt"),
    ("guide, absolute", "not_self"),
    ("same_group", "same_id"),
    ("bool", "same_group", "guide, relative", "score_margin", "not_self, offset"),
    ("same_id", "same_id", "same_group"),
    ("guide", "bool", "bool"),
]
CASES = [(name,) for name in MASKS] + COMBINED


def joined(names, sim, target):
    """(mask, what it admits) of several: the target always competes, but under not_self."""
    mask, admitted = None, torch.ones_like(sim, dtype=torch.bool)
    is_target = torch.arange(sim.shape[1]) == target[:, None]
    skipped = torch.zeros_like(admitted)
    for name in names:
        part, allowed = MASKS[name](sim, target)
        mask = part if mask is None else mask & part
        admitted &= allowed
        if name.startswith("not_self"):
            skipped |= ~allowed
    return mask, (admitted | is_target) & ~skipped


def masked_rows(z, target, admitted, counts, label_smoothing=0.0):
    """`counts * cross-entropy` of each row over the columns that compete; rows that count 0 are left out."""
    rows = []
    for i in range(len(z)):
        if counts[i] == 0:
            rows.append(z[i].nan_to_num().sum() * 0)
            continue
        log_p = z[i].masked_fill(~admitted[i], -torch.inf).log_softmax(0)
        even = log_p[admitted[i]].mean()
        rows.append(-counts[i] * ((1 - label_smoothing) * log_p[target[i]] + label_smoothing * even))
    return torch.stack(rows)


# InfoNCE --------------------------------------------------------------------------------------------------------------


def info_nce_case(
    names, rows, columns, dim, *, normalize, label_smoothing, with_options, reduction, explicit, dtype=torch.float64
):
    """(loss of a backend, its formula, leaves); masks in `dtype`."""
    query, key, temperature = randn(rows, dim), randn(columns, dim), torch.tensor(0.7, dtype=torch.float64)
    target = torch.randint(0, columns, (rows,)) if explicit else torch.arange(rows)
    valid = target.clone()
    if explicit and rows > 1:
        target[rows // 2] = IGNORED
        valid[rows // 2] = 0
    options, weight, leaves = {}, torch.ones(rows, dtype=torch.float64), [query, key, temperature]
    if with_options:
        weight = torch.rand(rows, dtype=torch.float64) + 0.1
        weight[0] = 0
        bias = randn(columns)
        bias[columns // 2] = -torch.inf
        options, leaves = {"weight": weight}, [*leaves, bias]
    unit = F.normalize if normalize else lambda x: x
    mask, admitted = joined(names, (unit(query) @ unit(key).T).to(dtype), valid)
    if with_options:
        admitted = admitted & (bias > -torch.inf)
    counts = weight * (target != IGNORED) * admitted.gather(1, valid[:, None])[:, 0]

    def ours(q, k, t, *b, backend, **more):
        return fusedloss.info_nce(
            q,
            k,
            target if explicit else None,
            temperature=t,
            key_bias=b[0] if b else None,
            mask=mask,
            label_smoothing=label_smoothing,
            ignore_index=IGNORED,
            normalize=normalize,
            reduction=reduction,
            backend=backend,
            **options,
            **more,
        )

    def formula(q, k, t, *b):
        z = unit(q) @ unit(k).T / t
        if b:
            z = z + torch.where(b[0] == -torch.inf, 0, b[0])
        return reduce(masked_rows(z, valid, admitted, counts, label_smoothing), counts, reduction)

    return ours, formula, leaves


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("names", CASES, ids=" & ".join)
@pytest.mark.parametrize("backend", BACKENDS)
@randomly(6)
@given(data=st.data())
def test_info_nce_over_what_competes(backend, names, data):
    torch.manual_seed(data.draw(st.integers(0, 2**30), "seed"))
    rows = data.draw(st.integers(1, 13), "rows")
    explicit = data.draw(st.booleans(), "explicit target")
    ours, formula, leaves = info_nce_case(
        names,
        rows,
        data.draw(st.integers(1 if explicit else rows, 23), "columns"),
        data.draw(st.integers(2, 6), "dim"),
        normalize=data.draw(st.booleans(), "normalize"),
        label_smoothing=data.draw(st.sampled_from([0.0, 0.3, 1.0]), "label_smoothing"),
        with_options=data.draw(st.booleans(), "with weight and bias"),
        reduction=data.draw(st.sampled_from(REDUCTIONS), "reduction"),
        explicit=explicit,
    )
    same(lambda *t: ours(*t, backend=backend), formula, leaves)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("with_options", [False, True])
@pytest.mark.parametrize("explicit", [False, True])
def test_every_option_of_info_nce_beside_masks(backend, reduction, label_smoothing, normalize, with_options, explicit):
    ours, formula, leaves = info_nce_case(
        ("same_id", "guide, absolute", "score_margin, exempt", "not_self, offset"),
        12,
        17,
        5,
        normalize=normalize,
        label_smoothing=label_smoothing,
        with_options=with_options,
        reduction=reduction,
        explicit=explicit,
    )
    same(lambda *t: ours(*t, backend=backend), formula, leaves)


@pytest.mark.parametrize("names", [*CASES[:1], *CASES[2:5], *CASES[6:9], CASES[12], *COMBINED[3:4]], ids=" & ".join)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_info_nce_in_triton(names, label_smoothing):
    """Odd sizes, larger than one of its tiles in columns."""
    ours, formula, leaves = info_nce_case(
        names,
        19,
        150,
        8,
        normalize=True,
        label_smoothing=label_smoothing,
        with_options=True,
        reduction="mean",
        explicit=True,
        dtype=torch.float32,
    )
    # Values that fp32 holds: what competes is then decided by the same numbers.
    same(lambda *t: ours(*(x.float() for x in t), backend="triton"), formula, leaves, rtol=2e-5, atol=2e-6)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", [0, 2])
@pytest.mark.parametrize("names", [*CASES[:8], COMBINED[0]], ids=" & ".join)
def test_multiple_negatives_ranking_over_what_competes(backend, names, columns):
    """A mask lies over the documents, cut where one tensor of them ends and the next begins."""
    anchor, positive = randn(11, 5), randn(13, 5)
    negatives = [randn(9 + 5 * i, 5) for i in range(columns)]
    scale = torch.tensor(3.0, dtype=torch.float64)
    target = torch.arange(11)
    mask, admitted = joined(names, cosines(anchor, torch.cat([positive, *negatives])), target)

    def ours(a, p, *rest):
        return fusedloss.multiple_negatives_ranking(a, p, *rest[:-1], scale=rest[-1], mask=mask, backend=backend)

    def formula(a, p, *rest):
        z = rest[-1] * F.normalize(a, dim=1) @ F.normalize(torch.cat([p, *rest[:-1]]), dim=1).T
        return masked_rows(z, target, admitted, torch.ones(11)).mean()

    same(ours, formula, [anchor, positive, *negatives, scale])


# CLIP -----------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    "names", [("same_id",), ("same_group",), ("bool",), ("bool", "same_id", "same_group")], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
@randomly(8)
@given(data=st.data())
def test_clip_over_what_competes_in_both_directions(backend, names, data):
    """A pair that may not compete is out of its row's normaliser and of its column's."""
    torch.manual_seed(data.draw(st.integers(0, 2**30), "seed"))
    rows, dim = data.draw(st.integers(1, 19), "rows"), data.draw(st.integers(2, 6), "dim")
    normalize = data.draw(st.booleans(), "normalize")
    reduction = data.draw(st.sampled_from(REDUCTIONS), "reduction")
    leaves = [randn(rows, dim), randn(rows, dim), torch.tensor(2.5, dtype=torch.float64)]
    target, ones = torch.arange(rows), torch.ones(rows, dtype=torch.float64)
    mask, admitted = joined(names, randn(rows, rows), target)
    ours, formula = clip_case(mask, admitted, target, ones, normalize, reduction)
    same(lambda *t: ours(*t, backend=backend), formula, leaves)


def clip_case(mask, admitted, target, ones, normalize, reduction):
    def ours(i, t, s, backend):
        return fusedloss.clip(i, t, s, mask=mask, normalize=normalize, reduction=reduction, backend=backend)

    def formula(i, t, s):
        if normalize:
            i, t = F.normalize(i, dim=1), F.normalize(t, dim=1)
        z = s * i @ t.T
        both = masked_rows(z, target, admitted, ones) + masked_rows(z.T, target, admitted.T, ones)
        return reduce(both / 2, ones, reduction)

    return ours, formula


@pytest.mark.parametrize("names", [("same_id",), ("bool", "same_group")], ids=str)
def test_clip_in_triton(names):
    leaves = [randn(70, 8), randn(70, 8), torch.tensor(2.5, dtype=torch.float64)]
    target, ones = torch.arange(70), torch.ones(70, dtype=torch.float64)
    mask, admitted = joined(names, randn(70, 70), target)
    ours, formula = clip_case(mask, admitted, target, ones, True, "mean")
    same(lambda *t: ours(*(x.float() for x in t), backend="triton"), formula, leaves, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    "mask",
    [
        masks.score_margin(0.1),
        masks.guide(torch.ones(3, 2), torch.ones(3, 2)),
        masks.not_self(),
        masks.not_self(1) & torch.ones(3, 3, dtype=torch.bool),
    ],
    ids=["score_margin", "guide", "not_self", "joined"],
)
def test_clip_refuses_what_belongs_to_rows(mask):
    with pytest.raises(ValueError, match="mask has a part that belongs to rows.* and clip has two directions"):
        fusedloss.clip(torch.ones(3, 4), torch.ones(3, 4), 1.0, mask=mask)


# Rules ----------------------------------------------------------------------------------------------------------------

# Masks that admit nothing at all but the target, for 6 rows and 9 keys.
NOTHING = {
    "same_id": lambda: masks.same_id(torch.zeros(6).long(), torch.zeros(9).long()),
    "same_group": lambda: masks.same_group(torch.zeros(6).long(), torch.ones(9).long()),
    "bool": lambda: torch.zeros(6, 9, dtype=torch.bool),
    "score_margin": lambda: masks.score_margin(-1e3),
    "guide": lambda: masks.guide(torch.ones(6, 2), torch.ones(9, 2), margin=3.0),
}


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", list(NOTHING))
@pytest.mark.parametrize("label_smoothing", [0.0, 0.4])
def test_a_row_with_only_its_target_has_loss_zero_and_no_gradient(backend, name, label_smoothing):
    leaves = [randn(6, 4).float().requires_grad_(), randn(9, 4).float().requires_grad_()]
    target = torch.tensor([8, 0, 3, 3, 5, 1])
    options = {"mask": NOTHING[name](), "label_smoothing": label_smoothing, "backend": backend, "reduction": "none"}
    rows = fusedloss.info_nce(*leaves, target, **options)
    close(rows.detach(), torch.zeros(6), rtol=0, atol=1e-6 if label_smoothing else 0)
    rows.sum().backward()
    for leaf in leaves:
        close(leaf.grad, torch.zeros_like(leaf), rtol=0, atol=2e-6 if label_smoothing else 0)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", list(NOTHING))
def test_a_mask_that_drops_nearly_all_still_lets_the_exempt_and_the_other_rows_compete(backend, name):
    """Neighbouring rows do not see each other's mask."""
    query, key = randn(6, 4).float(), randn(9, 4).float()
    free = torch.tensor([False, True, False, True, True, False])
    dense = free[:, None].expand(6, 9)
    rows = fusedloss.info_nce(query, key, mask=dense.clone(), reduction="none", backend=backend)
    every = fusedloss.info_nce(query, key, reduction="none", backend=backend)
    close(rows, every * free, rtol=1e-6)


@pytest.mark.parametrize("backend", ALL)
def test_not_self_leaves_out_the_rows_whose_target_it_is(backend):
    """As ignore_index does: loss 0, out of the mean, no gradient."""
    query, key = randn(5, 4).float(), randn(7, 4).float()
    target = torch.tensor([0, 3, 2, 6, 4])  # of rows 0, 2 and 4 it is the row itself
    ignored = torch.where(target == torch.arange(5), IGNORED, target)
    step = lambda t: lambda q, k: fusedloss.info_nce(q, k, t, mask=masks.not_self(), backend=backend)
    found = testing.value_and_gradients(step(target), [query, key])
    for one, other in zip(found, testing.value_and_gradients(step(ignored), [query, key]), strict=True):
        close(one, other, rtol=0, atol=0)
    assert (found[1][[0, 2, 4]] == 0).all() and (found[1][[1, 3]] != 0).any()
    assert fusedloss.info_nce(query, key, mask=masks.not_self(), backend=backend) == 0


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.4])
def test_a_row_that_a_bias_leaves_out_and_a_mask_leaves_nothing_has_gradient_zero(backend, label_smoothing):
    """Its target's logit is -inf, and there is no other to take as a shift."""
    leaves = [randn(3, 4).float(), randn(5, 4).float(), torch.tensor(0.7), torch.zeros(5)]
    leaves[3][1] = -torch.inf
    allowed = torch.tensor([[True], [False], [True]]).expand(3, 5).contiguous()

    def step(q, k, t, b):
        options = {"mask": allowed, "label_smoothing": label_smoothing, "backend": backend}
        return fusedloss.info_nce(q, k, temperature=t, key_bias=b, **options)

    def without(q, k, t, b):
        kept = torch.tensor([0, 2])
        options = {"key_bias": b, "label_smoothing": label_smoothing, "backend": "reference"}
        return fusedloss.info_nce(q[kept], k, kept, temperature=t, **options)

    found, wanted = (testing.value_and_gradients(f, leaves) for f in (step, without))
    assert (found[1][1] == 0).all()
    for one, other in zip(found, wanted, strict=True):
        close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", ["bool", "same_id", "same_group", "score_margin", "not_self", "bias"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_masked_key_may_hold_anything(backend, name, bad):
    """The value does not see it; gradients of a product with NaN are NaN."""
    if name == "score_margin" and bad != bad:
        bad = 1e30  # NaN is larger than nothing
    rows = 1 if name == "not_self" else 5
    query, key = torch.rand(rows, 4) + 0.1, torch.rand(8, 4) + 0.1
    allowed = torch.ones(rows, 8, dtype=torch.bool)
    allowed[:, 6] = False
    ids = torch.arange(8) + 10
    ids[6] = 0
    zeros = torch.zeros(rows).long()
    mask = {
        "bool": allowed,
        "same_id": masks.same_id(zeros, ids),
        "same_group": masks.same_group(zeros, (ids == 0).long()),
        "score_margin": masks.score_margin(50.0),
        "not_self": masks.not_self(6),
        "bias": None,
    }[name]
    bias = torch.where(torch.arange(8) == 6, -torch.inf, 0) if name == "bias" else None
    wanted = fusedloss.info_nce(query, key, mask=mask, key_bias=bias, reduction="none", backend="reference")
    without = key[torch.arange(8) != 6]
    poisoned = key.clone()
    poisoned[6] = bad
    found = fusedloss.info_nce(query, poisoned, mask=mask, key_bias=bias, reduction="none", backend=backend)
    if name == "score_margin":  # the finite key was no worse than the others, and competed
        wanted = fusedloss.info_nce(query, without, reduction="none", backend="reference")
    close(found, wanted, rtol=1e-5)
