"""What a mask means: which columns compete, for every mask, alone and joined, and what is counted of them.

Formulas are dense: a bool matrix [M, N] of what may compete, -inf elsewhere, log_softmax, all in fp64.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from condition import of_logits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import fusedloss
from fusedloss import masks, testing
from fusedloss.core import mask as core
from fusedloss.core.mask import StripMask

BACKENDS = ["dense", "chunked", "reference"]
KERNELS = ["triton", "cuda"]
ALL = [*BACKENDS, *KERNELS]
REDUCTIONS = ["mean", "sum", "none"]
IGNORED = -100


@pytest.fixture
def small_chunks(monkeypatch):
    """Several row chunks and column tiles at tens of rows, so that masks are cut at their borders."""
    from fusedloss import sweep
    from fusedloss.backends import chunked

    monkeypatch.setattr(sweep.chunks, "chunk_rows", lambda M, *_: min(M, 5))
    monkeypatch.setattr("fusedloss.backends.dense.MOST", {})
    monkeypatch.setattr(sweep.chunks, "STATS_ROWS", {"cpu": 4, "cuda": 4})
    monkeypatch.setattr(sweep.chunks, "CONVERTED_COLUMNS", 7)
    monkeypatch.setattr(chunked.tiles, "TILE_COLUMNS", 7)


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


def by_score(margin, exempt, relative=1.0):
    def make(sim, target):
        rows, columns = sim.shape
        spared = torch.randint(-1, columns, (rows, 2)) if exempt else None
        admitted = ~(sim > relative * sim.gather(1, target[:, None]) + margin)
        if exempt:
            admitted |= (spared[:, :, None] == torch.arange(columns)).any(1)
        return masks.score_margin(margin, spared, relative=relative), admitted

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
    "score_margin, relative": by_score(0.05, True, 0.8),
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


@pytest.mark.pairwise
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
@pytest.mark.parametrize("backend", KERNELS)
def test_info_nce_in_kernels(names, label_smoothing, backend):
    """Odd sizes, larger than one of their tiles in columns."""
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
    same(lambda *t: ours(*(x.float() for x in t), backend=backend), formula, leaves, rtol=2e-5, atol=2e-6)


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


OTHER_DIRECTIONS = [
    ("query_to_doc", "query_to_query"),
    ("query_to_doc", "doc_to_query"),
    ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("directions", OTHER_DIRECTIONS, ids=len)
@pytest.mark.parametrize(
    "backend, names",
    [(b, n) for b in BACKENDS for n in (*CASES[:1], *COMBINED[:1], ("guide, relative",), ("guide", "bool"))]
    + [(b, ("guide",)) for b in KERNELS],
    ids=str,
)
def test_a_mask_concerns_the_documents_alone_where_there_are_other_directions(backend, directions, names):
    rows, kernel = 9, backend in KERNELS
    texts = [randn(rows, 5).float().double() for _ in range(3)]
    sim = cosines(texts[0], torch.cat(texts[1:]))
    mask, admitted = joined(names, sim.float() if kernel else sim, torch.arange(rows))

    def ours(a, p, n):
        a, p, n = (t.float() if kernel else t for t in (a, p, n))
        return fusedloss.multiple_negatives_ranking(
            a, p, n, scale=3.0, directions=directions, mask=mask, backend=backend
        )

    def formula(a, p, n):
        a, p, n = (F.normalize(t, dim=1) for t in (a, p, n))
        own = torch.eye(rows, dtype=torch.bool)
        drop = lambda z, where: z.masked_fill(where, -torch.inf)
        z = {
            "query_to_doc": drop(3 * a @ torch.cat([p, n]).T, ~admitted),
            "query_to_query": drop(3 * a @ a.T, own),
            "doc_to_query": 3 * p @ a.T,
            "doc_to_doc": drop(3 * p @ torch.cat([p, n]).T, torch.cat([own, own], 1)),
        }
        return (torch.cat([z[d] for d in directions], 1).logsumexp(1) - z["query_to_doc"].diagonal()).mean()

    tolerance = {"rtol": 2e-5, "atol": 2e-6} if kernel else {}
    same(ours, formula, texts, **tolerance)


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
@pytest.mark.parametrize("backend", KERNELS)
def test_clip_in_kernels(names, backend):
    leaves = [randn(70, 8), randn(70, 8), torch.tensor(2.5, dtype=torch.float64)]
    target, ones = torch.arange(70), torch.ones(70, dtype=torch.float64)
    mask, admitted = joined(names, randn(70, 70), target)
    ours, formula = clip_case(mask, admitted, target, ones, True, "mean")
    same(lambda *t: ours(*(x.float() for x in t), backend=backend), formula, leaves, rtol=2e-5, atol=2e-6)


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
    with pytest.raises(
        ValueError,
        match=r"mask must be masks.same_id, masks.same_group .*, got one for rows alone",
    ):
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
    torch.testing.assert_close(found, wanted, rtol=0, atol=of_logits(query @ without.T / 0.05))


# Ties -----------------------------------------------------------------------------------------------------------------

MANY, WIDE = 1500, 384


def lengths(rows, dtype):
    """Rows of different lengths, so that a cosine or a bound on its rounding cannot leave them out."""
    return torch.linspace(0.1, 30, rows, dtype=dtype)[:, None]


def only_duplicates(rows, copies):
    """Nothing but the target and its copies, which stand `rows` columns apart."""
    return masks.same_group(torch.arange(rows), torch.arange(rows).repeat(copies))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_a_duplicate_of_the_target_is_a_tie_for_score_margin(backend, dtype, normalize):
    """Its similarity is the target's, however a product of another shape rounds it: log 2 where it stays, else 0."""
    query, key = (torch.randn(MANY, WIDE, dtype=dtype) for _ in range(2))
    if normalize:
        query, key = query * lengths(MANY, dtype), key * lengths(MANY, dtype)
    mask = only_duplicates(MANY, 2) & masks.score_margin(0.0)
    options = {"mask": mask, "temperature": 1e4, "normalize": normalize, "reduction": "none", "backend": backend}
    rows = fusedloss.info_nce(query, torch.cat([key, key]), **options)
    close(rows, torch.full((MANY,), math.log(2)), rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [3, WIDE])
@pytest.mark.parametrize("length", [1.0, 0.7])
def test_a_duplicate_of_the_guides_target_is_a_tie(backend, dtype, width, length):
    """A threshold out of a separate dot product lies below half of these, by an ulp or two. So does any threshold, of
    a copy of another length: the same cosine, rounded otherwise."""
    query, key = (torch.randn(MANY, width, dtype=dtype) * lengths(MANY, dtype) for _ in range(2))
    mask = only_duplicates(MANY, 2) & masks.guide(query, torch.cat([key, length * key]))
    blank = torch.zeros(2 * MANY, 4, dtype=dtype)  # all logits are 0: the loss is the log of a count
    rows = fusedloss.info_nce(blank[:MANY], blank, mask=mask, reduction="none", backend=backend)
    close(rows, torch.full((MANY,), math.log(2)), rtol=1e-6)


def test_a_separate_dot_product_would_not_do():
    """What the tests above are about: that much of the positives rounds to less than a product's entry."""
    x, y = (F.normalize(torch.randn(MANY, WIDE), dim=1) for _ in range(2))
    apart = (x @ y.T).diagonal() > (x * y).sum(1)
    assert 0.2 < apart.float().mean() < 0.8


@pytest.mark.parametrize("name", ["score_margin", "guide"])
@pytest.mark.parametrize("backend", ALL)
def test_a_duplicate_in_another_block_is_a_tie(backend, name):
    """Positives again among the hard negatives: a block of another width, whose product may round otherwise."""
    rows, dim = (70, 40) if backend in KERNELS else (MANY, WIDE)
    anchor, positive = (torch.randn(rows, dim) * lengths(rows, torch.float32) for _ in range(2))
    negatives = [positive.clone(), torch.cat([positive, positive[:17]])]
    groups = torch.cat([torch.arange(rows).repeat(3), torch.full((17,), -1)])
    documents = torch.cat([positive, *negatives])
    part = masks.score_margin(0.0) if name == "score_margin" else masks.guide(anchor, documents)
    mask = masks.same_group(torch.arange(rows), groups) & part
    options = {"mask": mask, "scale": 1e-4, "reduction": "none", "backend": backend}
    loss = fusedloss.multiple_negatives_ranking(anchor, positive, *negatives, **options)
    close(loss, torch.full((rows,), math.log(3)), rtol=1e-4)


@pytest.mark.parametrize("backend", ALL)
def test_a_duplicate_among_the_negatives_of_gist_embed_is_a_tie(backend):
    """Guides whose positives lie far above all else, so that everything competes but the pairs of rows with themselves;
    embeddings of 0, so that the loss is the log of how many do."""
    rows, dim = (70, 40) if backend in KERNELS else (MANY, WIDE)
    guide_anchor = torch.randn(rows, dim)
    guide_positive = guide_anchor + 0.5 * torch.randn(rows, dim)
    blank = torch.zeros(rows, 4)
    options = {"guide": (guide_anchor, guide_positive, guide_positive), "reduction": "none", "backend": backend}
    loss = fusedloss.gist_embed(blank, blank, blank, **options)
    close(loss.exp(), torch.full((rows,), 4.0 * rows - 2), rtol=1e-5)
    loss = fusedloss.gist_embed(blank, blank, blank, margin=1e-3, **options)
    close(loss.exp(), torch.full((rows,), 4.0 * rows - 3), rtol=1e-5)  # and below a margin it is none


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", ["score_margin", "guide"])
def test_what_lies_clearly_above_is_no_tie(backend, name):
    """1e-5 above the target's cosine is dropped, 1e-5 below stays: log 2 of the two others, and not log 3."""
    angles = torch.tensor([1.0, 1.0 - 1e-4, 1.0 + 1e-4])
    key = torch.stack([angles.cos(), angles.sin()], dim=1)
    query = torch.tensor([[1.0, 0.0]])
    part = masks.score_margin(0.0) if name == "score_margin" else masks.guide(query, key)
    rows = fusedloss.info_nce(query, key, mask=part, temperature=1e4, reduction="none", backend=backend)
    close(rows, torch.tensor([math.log(2)]), rtol=1e-4)


# Errors ---------------------------------------------------------------------------------------------------------------

X = torch.arange(12.0).reshape(3, 4)
IDS = torch.arange(3)
ELSEWHERE = torch.arange(3, device="meta")
FREE = torch.ones(3, 3, dtype=torch.bool)


def with_mask(mask):
    return lambda: fusedloss.info_nce(X, X, mask=mask)


BAD = [
    (
        with_mask(masks.same_id(IDS.int(), IDS)),
        TypeError,
        r"same_id's row_ids must be a tensor of int64 .*, got torch.int32",
    ),
    (
        with_mask(masks.same_id(IDS, IDS.float())),
        TypeError,
        r"same_id's key_ids must be a tensor of int64 \[3\], got torch.float32",
    ),
    (
        with_mask(masks.same_id([0, 1, 2], IDS)),
        TypeError,
        r"same_id's row_ids must be a tensor of int64 \[3\], got a list",
    ),
    (with_mask(masks.same_id(IDS[:2], IDS)), ValueError, r"same_id's row_ids must be int64 \[3\], got shape \[2\]"),
    (
        with_mask(masks.same_id(IDS, IDS[:, None])),
        ValueError,
        r"same_id's key_ids must be int64 \[3\], got shape \[3, 1\]",
    ),
    (
        with_mask(masks.same_id(IDS, ELSEWHERE)),
        ValueError,
        "same_id's key_ids must be on cpu, like the embeddings, got meta",
    ),
    (
        with_mask(masks.same_group(IDS.bool(), IDS)),
        TypeError,
        r"same_group's row_groups must be a tensor of int64 \[3\], got torch.bool",
    ),
    (
        with_mask(masks.same_group(IDS, IDS[:1])),
        ValueError,
        r"same_group's key_groups must be int64 \[3\], got shape \[1\]",
    ),
    (
        with_mask(masks.same_group(ELSEWHERE, IDS)),
        ValueError,
        "same_group's row_groups must be on cpu, like the embeddings, got meta",
    ),
    (with_mask(FREE.float()), TypeError, r"mask must be a tensor of bool \[3, 3\], got torch.float32"),
    (with_mask(FREE[:2]), ValueError, r"mask must be bool \[3, 3\], got shape \[2, 3\]"),
    (with_mask(FREE.to("meta")), ValueError, "mask must be on cpu, like the embeddings, got meta"),
    (with_mask(FREE.to_sparse()), TypeError, "mask must be a dense tensor, got layout torch.sparse_coo"),
    (with_mask(0.1), TypeError, "mask must be one of fusedloss.masks or a bool tensor, got 0.1, a float"),
    (with_mask([masks.not_self()]), TypeError, "mask must be one of fusedloss.masks or a bool tensor, got a list"),
    (with_mask(masks.same_id), TypeError, "mask must be one of fusedloss.masks or a bool tensor, got a function"),
    (with_mask(masks.score_margin(0.0, IDS)), ValueError, r"exempt must be int64 \[3, any\], got shape \[3\]"),
    (
        with_mask(masks.score_margin(0.0, X)),
        TypeError,
        r"score_margin's exempt must be a tensor of int64 \[3, any\], got torch.float32",
    ),
    (
        with_mask(masks.score_margin(0.0, ELSEWHERE[:, None])),
        ValueError,
        "score_margin's exempt must be on cpu, like the embeddings, got meta",
    ),
    (lambda: masks.score_margin("0"), TypeError, "margin must be a number, got '.*', a str"),
    (lambda: masks.score_margin(math.nan), ValueError, "margin must be a finite number, got nan"),
    (lambda: masks.guide(X, X, margin=None), TypeError, "margin must be a number, got None"),
    (
        lambda: masks.guide(X, X, strategy="percentage"),
        ValueError,
        "strategy must be one of 'absolute'.*, got 'percentage'",
    ),
    (lambda: masks.guide(X, X[:, :2]), ValueError, "guide_key must have D = 4, like guide_query, got D = 2"),
    (
        lambda: masks.guide(IDS, X),
        TypeError,
        "guide_query must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    (lambda: masks.guide(X, X.to("meta")), ValueError, "guide_key must be on cpu, like guide_query, got meta"),
    (with_mask(masks.guide(X[:2], X)), ValueError, "guide_query must have 3 rows, as many as the loss has, got 2"),
    (with_mask(masks.guide(X, X[:2])), ValueError, "guide_key must have 3 rows, as many as the loss has, got 2"),
    (
        with_mask(masks.guide(*[X.to("meta")] * 2)),
        ValueError,
        "guide_query must be on cpu, like the embeddings, got meta",
    ),
    (lambda: masks.not_self(1.0), TypeError, "offset must be a whole number, got 1.0, a float"),
    (lambda: masks.guide(X, X) & masks.guide(X, X), ValueError, "a mask must hold at most one masks.guide, got two"),
    (lambda: masks.not_self() & masks.not_self(1), ValueError, "a mask must hold at most one masks.not_self, got two"),
    (
        lambda: masks.score_margin(1) & FREE & masks.score_margin(2),
        ValueError,
        "a mask must hold at most one masks.score_margin, got two",
    ),
    (
        lambda: masks.not_self() & 3,
        TypeError,
        r"a mask must be joined with one of fusedloss.masks or a bool tensor \[M, N\], got 3, an int",
    ),
    (
        lambda: fusedloss.multiple_negatives_ranking(X, X, X, mask=FREE),
        ValueError,
        r"mask must be bool \[3, 6\], got shape \[3, 3\]",
    ),
    (
        lambda: fusedloss.clip(X, X, 1.0, mask="same_id"),
        TypeError,
        "mask must be one of fusedloss.masks or a bool tensor, got 'same_id', a str",
    ),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_masks_are_named_with_their_remedy(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Statistics -----------------------------------------------------------------------------------------------------------


def directly(logits, target, admitted, scale, counted=None):
    """Stats over the rows that count, row by row."""
    accurate, ranks, positives, hardest, dropped, negatives = [], [], [], [], 0, 0
    for i, (z, t) in enumerate(zip(logits.double(), target.tolist(), strict=True)):
        if counted is not None and not counted[i]:
            continue
        rivals = [j for j in range(len(z)) if j != t and admitted[i, j]]
        above = sum(z[j] > z[t] for j in rivals)
        accurate.append(float(above == 0))
        ranks.append(1 / (1 + above))
        positives.append(z[t] / scale)
        if rivals:
            hardest.append(z[rivals].max() / scale)
        negatives += len(z) - 1
        dropped += len(z) - 1 - len(rivals)
    mean = lambda values: sum(values) / len(values) if values else 0.0
    return [mean(accurate), mean(ranks), mean(positives), mean(hardest), dropped / negatives if negatives else 0.0]


def counts_the_same(call, wanted, **tolerance):
    """`return_stats` adds statistics without gradient and changes neither the loss nor its gradient."""
    plain = call()
    loss, stats = call(return_stats=True)
    assert isinstance(stats, fusedloss.Stats)
    close(loss, plain.detach(), rtol=1e-6 if plain.dtype == torch.float32 else 1e-14)
    assert loss.requires_grad
    for name, found, value in zip(stats._fields, stats, wanted, strict=True):
        assert found.dim() == 0 and not found.requires_grad and found.dtype == plain.dtype, name
        close(found, value, **tolerance)


def leaf(rows, dim, backend):
    """What all backends can hold."""
    x = torch.randn(rows, dim)
    return (x if backend in KERNELS else x.double()).requires_grad_()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("names", [(), ("same_id",), ("score_margin, exempt",), COMBINED[3]], ids=" & ".join)
@pytest.mark.parametrize("with_gradient", [True, False])
def test_what_info_nce_counts(backend, names, with_gradient):
    query, key = leaf(11, 4, backend), leaf(17, 4, backend)
    target = torch.randint(0, 17, (11,))
    target[3] = IGNORED
    weight, bias = torch.rand(11), torch.randn(17)
    weight[2], bias[5] = 0, -torch.inf
    valid = target.clamp(min=0)
    sim = (query @ key.T).detach()
    mask, admitted = joined(names, sim, valid)
    admitted = admitted & (bias > -torch.inf)
    counted = (target != IGNORED) & (weight > 0) & admitted.gather(1, valid[:, None])[:, 0]

    def call(**options):
        with torch.set_grad_enabled(with_gradient):
            loss = fusedloss.info_nce(
                query,
                key,
                target,
                temperature=0.25,
                key_bias=bias,
                mask=mask,
                weight=weight,
                backend=backend,
                **options,
            )
        return loss if with_gradient else watched(loss)

    counts_the_same(call, directly(sim * 4 + bias, valid, admitted, 4, counted), rtol=1e-5, atol=1e-6)


def watched(result):
    """Without gradients the sweep is another; the check asks a loss for one."""
    if isinstance(result, tuple):
        return result[0].requires_grad_(), result[1]
    return result.requires_grad_()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("names", [(), ("same_id",), ("bool", "same_group")], ids=" & ".join)
def test_what_clip_counts_from_image_to_text(backend, names):
    image, text = leaf(13, 4, backend), leaf(13, 4, backend)
    target = torch.arange(13)
    sim = (image @ text.T).detach()
    mask, admitted = joined(names, sim, target)
    call = lambda **options: fusedloss.clip(image, text, 3.0, mask=mask, backend=backend, **options)
    counts_the_same(call, directly(sim * 3, target, admitted, 3), rtol=1e-5, atol=1e-6)
    with_bias = lambda **options: fusedloss.clip(
        image, text, 3.0, torch.ones(()), mask=mask, backend=backend, **options
    )
    counts_the_same(with_bias, directly(sim * 3, target, admitted, 3), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("partition_mode", ["joint", "per_direction"])
def test_what_multiple_negatives_ranking_counts(backend, partition_mode):
    """All columns of its one logsumexp; of several, those from query to document."""
    a, p, n = leaf(9, 4, backend), leaf(9, 4, backend), leaf(9, 4, backend)
    target, eye = torch.arange(9), torch.eye(9, dtype=torch.bool)
    mask, admitted = joined(("same_id",), torch.zeros(9, 18), target)
    sim = cosines(a, torch.cat([p, n])).detach()
    directions = ("query_to_doc", "doc_to_query")
    if partition_mode == "joint":
        directions = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
        other = cosines(p, a)[~eye].reshape(9, 8)  # the positive stands here a second time: no negative
        sim = torch.cat([sim, cosines(a, a), other, cosines(p, p), cosines(p, n)], dim=1).detach()
        admitted = torch.cat([admitted, ~eye, torch.ones(9, 8, dtype=torch.bool), ~eye, ~eye], dim=1)
    options = {"scale": 6.0, "mask": mask, "directions": directions, "partition_mode": partition_mode}
    call = lambda **more: fusedloss.multiple_negatives_ranking(a, p, n, backend=backend, **options, **more)
    counts_the_same(call, directly(sim * 6, target, admitted, 6), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend", ALL)
def test_what_gist_embed_counts(backend):
    """What the guide drops is masked, the pairs of rows with themselves among it."""
    texts = [leaf(8, 4, backend) for _ in range(3)]
    guides = [leaf(8, 5, backend).detach() for _ in range(3)]
    pairs = [(0, 1), (0, 0), (1, 1), (0, 2)]
    sim, guided = (torch.cat([cosines(x[i], x[j]) for i, j in pairs], dim=1).detach() for x in (texts, guides))
    target = torch.arange(8)
    admitted = guided <= guided.gather(1, target[:, None])
    call = lambda **options: fusedloss.gist_embed(*texts, guide=guides, temperature=0.2, backend=backend, **options)
    counts_the_same(call, directly(sim * 5, target, admitted, 5), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("loss", ["nt_xent", "decoupled_contrastive"])
def test_what_two_views_count(backend, loss):
    """Of the 2B - 1 columns beside the positive, the row itself is masked."""
    z1, z2 = leaf(7, 4, backend), leaf(7, 4, backend)
    sim = cosines(*[torch.cat([z1, z2])] * 2).detach()
    call = lambda **options: getattr(fusedloss, loss)(z1, z2, temperature=0.5, backend=backend, **options)
    wanted = directly(sim * 2, torch.arange(14).roll(7), ~torch.eye(14, dtype=torch.bool), 2)
    assert wanted[4] == 1 / 13
    counts_the_same(call, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ALL)
def test_what_is_counted_where_nothing_is(backend):
    """No row that counts, or no negative: zeros, not NaN; and a tie is won."""
    x = leaf(4, 3, backend)
    nobody = fusedloss.info_nce(x, x, torch.full((4,), IGNORED), backend=backend, return_stats=True)[1]
    assert nobody == (0, 0, 0, 0, 0)
    alone = fusedloss.clip(x[:1], x[:1], 2.0, normalize=True, backend=backend, return_stats=True)[1]
    close(torch.stack(alone), torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]), rtol=1e-6)
    key = torch.cat([x, x, x])
    tied = fusedloss.info_nce(x, key, normalize=True, backend=backend, return_stats=True)[1]
    assert tied.accuracy == 1 and tied.mean_reciprocal_rank == 1


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("normalize", [False, True])
def test_equal_keys_are_ties_also_where_their_similarity_is_near_0(backend, normalize):
    """Their products round by the rows' lengths; of most of these rows a bound by the similarity is far less."""
    rows, dim = (20, 96) if backend in KERNELS else (200, WIDE)
    query, key = torch.randn(rows, dim) * lengths(rows, torch.float32), torch.randn(dim)
    keys = key.expand(rows + 30, dim).contiguous()
    call = functools.partial(fusedloss.info_nce, query, temperature=1e3, normalize=normalize, backend=backend)
    loss, stats = call(keys, return_stats=True)
    assert stats.accuracy == 1 and stats.mean_reciprocal_rank == 1
    close(loss, torch.tensor(rows + 30).log(), rtol=1e-5)
    kept = call(keys, mask=masks.score_margin(0.0), reduction="none")
    close(kept, torch.full((rows,), math.log(rows + 30)), rtol=1e-5)
    keys[-1] += 1e-3 * query[5]
    assert call(keys, return_stats=True)[1].accuracy < 1


# A block's mask -------------------------------------------------------------------------------------------------------


def every_part(M, N):
    """A mask of which no two entries are alike."""
    number = iter(range(0, 10**6, 1000))
    ids = lambda count: next(number) + torch.arange(count)
    compare = tuple(core.Compare(ids(M), ids(N), keep) for keep in (True, False))
    guide = core.Guide(ids(M)[:, None].float(), ids(N)[:, None].float())
    return core.Mask(compare, torch.arange(M * N).reshape(M, N) % 7 > 2, 0.5, ids(M)[:, None], guide, ids(M), 3)


def tensors(mask):
    """By side: of rows, of columns, of both, and indices of columns."""
    guide = () if mask.guide is None else mask.guide
    rows, keys = [c.rows for c in mask.compare] + list(guide[:1]), [c.keys for c in mask.compare] + list(guide[1:])
    return rows, keys, [mask.dense], [x for x in (mask.exempt, mask.skip) if x is not None]


def test_a_mask_of_some_columns():
    mask = every_part(5, 7)
    parts = [mask.columns(slice(0, 3)), mask.columns(slice(3, 7))]
    for part, start in zip(parts, (0, 3), strict=True):
        assert (part.margin, part.skip_offset) == (0.5, 3)
        for found, wanted in zip(tensors(part)[3], tensors(mask)[3], strict=True):
            assert torch.equal(found + start, wanted)
    for side, dim in ((1, 0), (2, 1)):
        for *pieces, wanted in zip(*(tensors(p)[side] for p in (*parts, mask)), strict=True):
            assert torch.equal(torch.cat(pieces, dim), wanted)
    assert all(x is y for part in parts for x, y in zip(tensors(part)[0], tensors(mask)[0], strict=True))


def test_what_a_mask_holds_of_columns_is_mapped():
    mask = every_part(5, 7)
    found = mask.map_keys(lambda x: x + 1)
    assert all(map(torch.equal, found.keys, [x + 1 for x in tensors(mask)[1]]))
    assert [id(x) for x in mask.keys] == [id(x) for x in tensors(mask)[1]]
    for side in (0, 2, 3):
        assert all(x is y for x, y in zip(tensors(found)[side], tensors(mask)[side], strict=True))


def test_a_mask_turned_over():
    mask = every_part(5, 7)
    turned = mask.turned()
    assert turned.margin is turned.guide is turned.exempt is turned.skip is None
    assert torch.equal(turned.dense, mask.dense.T) and turned.turned().dense.equal(mask.dense)
    assert [(c.rows, c.keys, c.keep) for c in turned.compare] == [(c.keys, c.rows, c.keep) for c in mask.compare]


def test_a_mask_of_some_rows():
    mask = every_part(5, 7)
    strip = StripMask(mask.compare, mask.dense, torch.arange(5.0), mask.exempt, mask.skip)
    first, second = strip.rows(slice(0, 2)), strip.rows(slice(2, 5))
    for name in ("dense", "threshold", "exempt", "skip"):
        assert torch.equal(torch.cat([getattr(first, name), getattr(second, name)]), getattr(strip, name))
    for a, b, whole in zip(first.compare, second.compare, strip.compare, strict=True):
        assert torch.equal(torch.cat([a.rows, b.rows]), whole.rows) and a.keys is b.keys is whole.keys
    assert strip.rows(slice(0, 5)).dense is strip.dense
