"""Losses that look for pairs in a batch: triplets of labels, hardest negatives, multi-similarity, circle, ranking.

Each is compared, value and gradients, with its textbook formula, written out here in fp64 with loops or broadcasting,
and with the library that made its conventions known (sentence-transformers, pytorch-metric-learning).
"""

from __future__ import annotations

import contextlib
import functools
import math

import pytest
import torch
from grids import one_of
from hypothesis import given, settings
from hypothesis import strategies as st
from peaks import MIB, growth, measured
from torch.nn import functional as F

import fusedloss
from fusedloss import sweep, testing
from fusedloss.backends import chunked
from fusedloss.bench import measure
from fusedloss.core import folds, numerics

BACKENDS = ["dense", "chunked", "reference"]
KERNELS = ["triton", "cuda"]
DISTANCES = ["euclidean", "squared", "cosine"]


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


@contextlib.contextmanager
def chunks(rows, columns):
    """Several row chunks and column tiles at a handful of rows; a context, because hypothesis repeats the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep.chunks, "chunk_rows", lambda M, *_: max(1, min(M, rows)))
        patch.setattr("fusedloss.backends.dense.MOST", {})
        patch.setattr(sweep.chunks, "STATS_ROWS", {"cpu": rows, "cuda": rows})
        patch.setattr(chunked.tiles, "TILE_COLUMNS", columns)
        yield


def same(ours, formula, tensors, rtol=1e-10, atol=1e-11):
    """Value and gradients, with an upstream weight so that it is not dropped on the way."""
    found, wanted = (testing.value_and_gradients(lambda *t, f=f: 1.7 * f(*t), tensors) for f in (ours, formula))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=rtol, atol=atol)


# Textbook formulas ----------------------------------------------------------------------------------------------------


def matrix(x, distance):
    """All distances of the rows of `x`. The root of 0 has no gradient."""
    if distance == "cosine":
        unit = F.normalize(x, dim=1, eps=1e-12)
        return 1 - unit @ unit.T
    squared = (x[:, None] - x[None]).square().sum(2)
    if distance == "squared":
        return squared
    return torch.where(squared == 0, 0, torch.where(squared == 0, 1, squared).sqrt())


def positives(labels, i):
    return [j for j in range(len(labels)) if j != i and labels[j] == labels[i]]


def negatives(labels, i):
    return [j for j in range(len(labels)) if labels[j] != labels[i]]


def first(columns, value):
    """The first of those with the largest value."""
    return max(columns, key=lambda j: value(j).item())


def total(terms, like):
    return torch.stack(terms).sum() if terms else like.sum() * 0


def all_triplets(x, labels, margin=5.0, distance="euclidean"):
    d, labels = matrix(x, distance), labels.tolist()
    terms = [
        d[a, p] - d[a, n] + margin
        for a in range(len(labels))
        for p in positives(labels, a)
        for n in negatives(labels, a)
    ]
    losing = [term for term in terms if term > 0]
    return total(losing, x) / max(len(losing), 1)


def hardest(x, labels, distance):
    """hp - hn of each row; 0 where there is no other label, as hn is then defined as hp."""
    d, labels = matrix(x, distance), labels.tolist()
    for i in range(len(labels)):
        others, own = negatives(labels, i), positives(labels, i)
        if not others:
            yield x.sum() * 0
            continue
        nearest = first(others, lambda j, i=i: -d[i, j])
        yield (d[i, first(own, lambda j, i=i: d[i, j])].clamp(min=0) if own else 0) - d[i, nearest]


def hard_triplets(x, labels, margin=5.0, distance="euclidean"):
    return total([F.relu(apart + margin) for apart in hardest(x, labels, distance)], x) / max(len(x), 1)


def soft_triplets(x, labels, distance="euclidean"):
    return total([torch.log1p(apart.exp()) for apart in hardest(x, labels, distance)], x) / max(len(x), 1)


def semi_hard_triplets(x, labels, margin=5.0, distance="euclidean"):
    d, labels = matrix(x, distance), labels.tolist()
    terms = []
    for i in range(len(labels)):
        for j in positives(labels, i):
            others = negatives(labels, i)
            farther = [k for k in others if d[i, k] > d[i, j]]
            if farther:
                k = first(farther, lambda k, i=i: -d[i, k])
            elif others:
                k = first(others, lambda k, i=i: d[i, k])
            else:
                k = first(range(len(labels)), lambda k, i=i: -d[i, k])
            terms.append(F.relu(d[i, j] - d[i, k] + margin))
    return total(terms, x) / max(len(terms), 1)


def multi_similarity(x, labels, alpha=2.0, beta=50.0, base=0.5):
    s, labels = 1 - matrix(x, "cosine"), labels.tolist()
    terms = []
    for i in range(len(labels)):
        pull = 1 + total([torch.exp(-alpha * (s[i, j] - base)) for j in positives(labels, i)], x)
        push = 1 + total([torch.exp(beta * (s[i, j] - base)) for j in negatives(labels, i)], x)
        terms.append(pull.log() / alpha + push.log() / beta)
    return total(terms, x) / max(len(terms), 1)


def circle(x, labels, m=0.4, gamma=80.0):
    s, labels = 1 - matrix(x, "cosine"), labels.tolist()
    terms = []
    for i in range(len(labels)):
        a_p, a_n = F.relu(1 + m - s[i].detach()), F.relu(s[i].detach() + m)
        pull = [torch.exp(-gamma * a_p[j] * (s[i, j] - 1 + m)) for j in positives(labels, i)]
        push = [torch.exp(gamma * a_n[j] * (s[i, j] - m)) for j in negatives(labels, i)]
        terms.append(torch.log1p(total(pull, x) * total(push, x)))
    losing = [term for term in terms if term > 0]
    return total(losing, x) / max(len(losing), 1)


def mega_batch(anchor, positive, positive_margin=0.8, negative_margin=0.3):
    s = F.normalize(anchor, dim=1) @ F.normalize(positive, dim=1).T
    terms = []
    for i in range(len(s)):
        terms.append(F.relu(positive_margin - s[i, i]))
        others = [j for j in range(len(s)) if j != i]
        if others:
            terms.append(F.relu(s[i, first(others, lambda j, i=i: s[i, j])] - negative_margin))
    return total(terms, anchor) / max(len(s), 1)


def margin_ranking(anchor, positive, margin=0.5, similarity="cos"):
    if similarity == "cos":
        anchor, positive = F.normalize(anchor, dim=1), F.normalize(positive, dim=1)
    s = anchor @ positive.T
    terms = []
    for i in range(s.shape[0]):
        hinges = [F.relu(margin - s[i, i] + s[i, j]) for j in range(s.shape[1]) if j != i]
        terms.append(total(hinges, s) / max(len(hinges), 1))
    return total(terms, s) / max(len(terms), 1)


TRIPLETS = {
    "all": (fusedloss.batch_all_triplet, all_triplets),
    "hard": (fusedloss.batch_hard_triplet, hard_triplets),
    "soft": (fusedloss.batch_hard_soft_margin_triplet, soft_triplets),
    "semi-hard": (fusedloss.batch_semi_hard_triplet, semi_hard_triplets),
}
WEIGHED = {"multi-similarity": (fusedloss.multi_similarity, multi_similarity), "circle": (fusedloss.circle, circle)}
LABELLED = TRIPLETS | WEIGHED
PAIRS = {
    "mega-batch": (fusedloss.mega_batch_margin, mega_batch),
    "ranking": (fusedloss.in_batch_margin_ranking, margin_ranking),
}


def labelled_options(draw, name):
    """Options of a labelled loss, as hypothesis finds them."""
    if name == "multi-similarity":
        return {"alpha": draw(st.floats(0.1, 10)), "beta": draw(st.floats(0.1, 60)), "base": draw(st.floats(-1, 1))}
    if name == "circle":
        return {"m": draw(st.floats(-0.5, 1)), "gamma": draw(st.floats(0.1, 40))}
    options = {"distance": draw(st.sampled_from(DISTANCES))}
    if name != "soft":
        options["margin"] = draw(st.sampled_from([0.01, 0.2, 1.0, 5.0, -0.3]))
    return options


@st.composite
def batches(draw, name):
    """Embeddings, labels, options, and the sizes of row chunks and column tiles."""
    rows, dim = draw(st.integers(1, 11)), draw(st.integers(1, 6))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    labels = torch.randint(0, draw(st.integers(1, 5)), (rows,))
    x = randn(rows, dim) * draw(st.sampled_from([0.3, 1.0, 3.0]))
    if name != "ranking" and dim == 1:  # cosines of 1-d rows are all ties
        x = torch.cat([x, randn(rows, 1)], 1)
    return x, labels, labelled_options(draw, name), draw(st.integers(1, 12)), draw(st.integers(1, 12))


# Formulas -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LABELLED)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_labelled_losses_are_their_formulas(name, backend, data):
    x, labels, options, rows, columns = data.draw(batches(name))
    loss, formula = LABELLED[name]
    with chunks(rows, columns):
        same(lambda x: loss(x, labels, backend=backend, **options), lambda x: formula(x, labels, **options), [x])


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_mega_batch_margin_is_its_formula(backend, data):
    rows, dim = data.draw(st.integers(1, 11)), data.draw(st.integers(2, 6))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    anchor, positive = randn(rows, dim), randn(rows, dim)
    margins = {"positive_margin": data.draw(st.floats(-1, 1)), "negative_margin": data.draw(st.floats(-1, 1))}
    ours = lambda a, p: fusedloss.mega_batch_margin(a, p, backend=backend, **margins)
    with chunks(data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))):
        same(ours, lambda a, p: mega_batch(a, p, **margins), [anchor, positive])
        same(lambda x: ours(x, x), lambda x: mega_batch(x, x, **margins), [anchor])  # one operand on both sides


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_in_batch_margin_ranking_is_its_formula(backend, data):
    rows, more, dim = data.draw(st.integers(1, 11)), data.draw(st.integers(0, 6)), data.draw(st.integers(1, 6))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    anchor, positive = randn(rows, dim), randn(rows + more, dim)
    options = {"margin": data.draw(st.sampled_from([-0.2, 0.1, 0.5, 3.0])), "similarity": "dot"}
    if dim > 1:
        options["similarity"] = data.draw(st.sampled_from(["cos", "dot"]))
    ours = lambda a, p: fusedloss.in_batch_margin_ranking(a, p, backend=backend, **options)
    with chunks(data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))):
        same(ours, lambda a, p: margin_ranking(a, p, **options), [anchor, positive])
        same(lambda x: ours(x, x), lambda x: margin_ranking(x, x, **options), [anchor])


WITH_DISTANCE = [*((name, distance) for name in TRIPLETS for distance in DISTANCES), *((n, "cosine") for n in WEIGHED)]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name, distance", WITH_DISTANCE)
def test_labelled_losses_in_kernels(name, distance, backend):
    """The kernels' own tiles, in fp32."""
    loss, formula = LABELLED[name]
    options = {} if name in WEIGHED else {"distance": distance}
    x, labels = randn(19, 8).float(), torch.randint(0, 4, (19,))
    ours = lambda x: loss(x, labels, backend=backend, **options)
    same(ours, lambda x: formula(x.double(), labels, **options), [x], rtol=1e-4, atol=1e-5)


OF_16_BITS = [(torch.bfloat16, backend) for backend in (*BACKENDS, "cuda")]
OF_64_BITS = [(torch.float64, backend) for backend in BACKENDS]


@pytest.mark.pairwise
@pytest.mark.parametrize(
    "dtype, backend", [*((torch.float32, b) for b in (*BACKENDS, *KERNELS)), *OF_16_BITS, *OF_64_BITS], ids=str
)
@pytest.mark.parametrize("apart", [0.0, 1e-4, 1e-3])
@pytest.mark.parametrize("name", TRIPLETS)
def test_duplicates_are_at_distance_0(name, apart, dtype, backend):
    """Two texts of one label that are equal, or nearly: as the root of a rounded difference their distance would be
    2e-4 to 2e-2 of their length, and of a distance of 1e-3 a tenth would be noise."""
    loss, formula = LABELLED[name]
    x = F.normalize(randn(12, 384), dim=1)
    x, labels = torch.cat([x, x + apart * randn(12, 384) / 384**0.5]).to(dtype), torch.arange(12).repeat(2)
    options = {} if name == "soft" else {"margin": 1.5}
    found = testing.value_and_gradients(lambda x: loss(x, labels, backend=backend, **options), [x])
    exact = testing.value_and_gradients(lambda x: formula(x, labels, **options), [x.double()])
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-6, atol=0)
    if not apart:  # which of two equal negatives has the gradient is anybody's choice
        found, exact = (g[1][:12].double() + g[1][12:].double() for g in (found, exact))
        assert (found - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", PAIRS)
def test_losses_of_pairs_in_kernels(name, backend):
    loss, formula = PAIRS[name]
    tensors = [randn(19, 8).float(), randn(19, 8).float()]
    ours = lambda a, p: loss(a, p, backend=backend)
    same(ours, lambda a, p: formula(a.double(), p.double()), tensors, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["all", "semi-hard", *WEIGHED])
def test_a_small_workspace_gives_the_same(name):
    """Chunks as a user makes them: three here, the last one partly filled."""
    x, labels = randn(150, 5), torch.randint(0, 9, (150,))
    loss, _ = LABELLED[name]
    least = 64 * 160 * 8 * numerics.FOLD_COPIES
    with pytest.raises(ValueError, match=f"workspace_bytes must be at least .*, got 1; allow .*{least} bytes"):
        loss(x, labels, workspace_bytes=1, backend="chunked")
    same(
        lambda x: loss(x, labels, workspace_bytes=least, backend="chunked"),
        lambda x: loss(x, labels, backend="chunked"),
        [x],
    )


# The libraries --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentence_transformers():
    return pytest.importorskip("sentence_transformers.losses")


def model():
    """A sentence encoder whose sentences are embeddings already."""
    encoder = torch.nn.Module()
    encoder.forward = lambda features: {"sentence_embedding": features["x"]}
    return encoder


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [1, 2, 6, 40])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", TRIPLETS)
def test_triplets_as_in_sentence_transformers(sentence_transformers, name, distance, classes, backend):
    metric = sentence_transformers.BatchHardTripletLossDistanceFunction
    distance_metric = {
        "euclidean": metric.euclidean_distance,
        "squared": functools.partial(metric.euclidean_distance, squared=True),
        "cosine": metric.cosine_distance,
    }[distance]
    theirs = {
        "all": sentence_transformers.BatchAllTripletLoss,
        "hard": sentence_transformers.BatchHardTripletLoss,
        "soft": sentence_transformers.BatchHardSoftMarginTripletLoss,
        "semi-hard": sentence_transformers.BatchSemiHardTripletLoss,
    }[name]
    labels = torch.randint(0, classes, (24,))
    x = randn(24, 5) + randn(classes, 5)[labels]
    for margin in [None] if name == "soft" else [0.1, 5.0]:
        options = {} if margin is None else {"margin": margin}
        loss = theirs(model(), distance_metric=distance_metric, **options)
        # F.softplus is the identity from 20 on, which is 2e-9 off there.
        tolerance = {"atol": 1e-8} if (name, distance) == ("soft", "squared") else {}
        with chunks(7, 10):
            same(
                lambda x, o=options: TRIPLETS[name][0](x, labels, distance=distance, backend=backend, **o),
                lambda x, f=loss: f([{"x": x}], labels),
                [x],
                **tolerance,
            )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 2, 24])
@pytest.mark.parametrize("margins", [(0.8, 0.3), (0.1, -0.2)])
def test_mega_batch_margin_as_in_sentence_transformers(sentence_transformers, rows, margins, backend):
    theirs = sentence_transformers.MegaBatchMarginLoss(model(), *margins, use_mini_batched_version=False)
    anchor = randn(rows, 5)
    with chunks(7, 10):
        same(
            lambda a, p: fusedloss.mega_batch_margin(
                a, p, positive_margin=margins[0], negative_margin=margins[1], backend=backend
            ),
            lambda a, p: theirs.calculate_loss([[a], [p]]),
            [anchor, anchor + randn(rows, 5)],
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [1, 2, 6, 40])
@pytest.mark.parametrize("name", WEIGHED)
def test_as_in_pytorch_metric_learning(name, classes, backend):
    """With its default reducers: the mean over all rows, and over those that lose anything."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    labels = torch.randint(0, classes, (24,))
    x = randn(24, 5) + randn(classes, 5)[labels]
    for options in ({}, {"alpha": 3.0, "beta": 7.0, "base": 0.1} if name != "circle" else {"m": 0.25, "gamma": 9.0}):
        theirs = {"circle": losses.CircleLoss, "multi-similarity": losses.MultiSimilarityLoss}[name](**options)
        with chunks(7, 10):
            same(
                lambda x, o=options: WEIGHED[name][0](x, labels, backend=backend, **o),
                lambda x, f=theirs: f(x, labels),
                [x],
                atol=1e-8,  # theirs is F.softplus, the identity from 20 on
            )


# Degenerate batches ---------------------------------------------------------------------------------------------------


SETS = {
    "one label": [3, 3, 3, 3, 3, 3, 3],
    "all labels different": [6, 5, 4, 3, 2, 1, 0],
    "one row alone": [1, 1, 1, 9, 1, 1, 1],
    "a single row": [2],
    "two of one label": [2, 2],
    "two labels": [2, 3],
}


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SETS)
@pytest.mark.parametrize("name, distance", WITH_DISTANCE)
def test_degenerate_labels(name, distance, case, backend):
    labels = torch.tensor(SETS[case])
    x = randn(len(labels), 3)
    loss, formula = LABELLED[name]
    options = {} if name in WEIGHED else {"distance": distance}
    with chunks(3, 2):
        same(lambda x: loss(x, labels, backend=backend, **options), lambda x: formula(x, labels, **options), [x])


@pytest.mark.parametrize("backend", [*BACKENDS, *KERNELS])
@pytest.mark.parametrize("name", LABELLED)
def test_one_label_by_number(name, backend):
    """What the conventions say where there is no negative, without a formula in between."""
    x = randn(6, 3).float().requires_grad_()
    value = LABELLED[name][0](x, torch.full((6,), 8), backend=backend)
    value.backward()
    wanted = {"all": 0.0, "hard": 5.0, "soft": math.log(2), "circle": 0.0}.get(name)
    if wanted is not None:
        assert value.item() == pytest.approx(wanted, abs=1e-7)
        assert (x.grad == 0).all()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("backend", [*BACKENDS, *KERNELS])
def test_a_single_pair_has_no_negative(name, backend):
    anchor, positive = torch.tensor([[1.0, 0.0]]).requires_grad_(), torch.tensor([[0.6, 0.8]]).requires_grad_()
    value = PAIRS[name][0](anchor, positive, backend=backend)
    value.backward()
    assert value.item() == pytest.approx(0.2 if name == "mega-batch" else 0.0, abs=1e-6)
    # d(0.8 - cos)/d anchor: less of (0.6, 0.8) across the anchor
    wanted = [[0.0, -0.8]] if name == "mega-batch" else [[0.0, 0.0]]
    torch.testing.assert_close(anchor.grad, torch.tensor(wanted))


@pytest.mark.parametrize("backend", [*BACKENDS, *KERNELS])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", TRIPLETS)
def test_a_batch_of_duplicates_has_a_zero_gradient(name, distance, backend):
    """All distances are exactly 0: the root's slope must not show as an infinity or a NaN."""
    x = torch.tensor([[0.0, 2.0, 0.0, 0.0]]).repeat(8, 1).requires_grad_()
    labels = torch.arange(8) // 2
    value = TRIPLETS[name][0](x, labels, distance=distance, backend=backend)
    value.backward()
    assert value.item() == pytest.approx(math.log(2) if name == "soft" else 5.0)
    assert (x.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", TRIPLETS)
def test_duplicates_among_others(name, distance, backend):
    """Of the same label and of another; whole numbers, so that a distance of 0 is exactly 0 by every formula."""
    x = torch.tensor([[2, 0, 0, 1], [2, 0, 0, 1], [0, 4, 1, 0], [2, 0, 0, 1], [5, 1, 0, 3], [0, 4, 1, 0]]).double()
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    loss, formula = TRIPLETS[name]
    if (name, distance) == ("semi-hard", "cosine"):
        # Rounding decides there whether a duplicate is farther than another.
        found = testing.value_and_gradients(lambda x: loss(x, labels, distance=distance, backend=backend), [x])
        assert all(torch.isfinite(t).all() for t in found)
        return
    same(
        lambda x: loss(x, labels, distance=distance, backend=backend, **({} if name == "soft" else {"margin": 3.3})),
        lambda x: formula(x, labels, distance=distance, **({} if name == "soft" else {"margin": 3.3})),
        [x],
    )


@pytest.mark.parametrize("backend", [*BACKENDS, *KERNELS])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", ["hard", "soft"])
def test_the_first_of_equally_hard_ones_takes_the_gradient(name, distance, backend):
    """Vectors along the axes, of one length: distances take three values, and each tile holds several of each."""
    axes = torch.tensor([0, 1, 2, 3, 4, 5, 1, 3, 2, 0, 4, 1, 5, 2])
    x = 2 * torch.eye(6)[axes] * torch.tensor([1, 1, 1, -1, 1, 1, 1, -1, 1, 1, 1, -1, 1, 1])[:, None]
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 0, 1, 2, 2, 2, 0, 1])
    loss, formula = TRIPLETS[name]
    with chunks(4, 3):
        same(
            lambda x: loss(x, labels, distance=distance, backend=backend),
            lambda x: formula(x.double(), labels, distance=distance),
            [x],
            rtol=1e-5,
            atol=1e-6,
        )


@pytest.mark.parametrize("kind", ["random", "ties"])
@pytest.mark.parametrize("classes", [1, 3, 11, 60])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", ["all", "semi-hard"])
def test_few_positives_are_compared_one_by_one(monkeypatch, name, distance, classes, kind):
    """As the formula has it, also where distances are equal; "all" has the bits of sorted rows."""
    x, labels = randn(30, 3).float(), torch.randint(0, classes, (30,))
    x = x.round() if kind == "ties" and distance != "cosine" else x
    ours = lambda x, b="chunked": TRIPLETS[name][0](x, labels, margin=0.3, distance=distance, backend=b)
    with chunks(7, 9):
        ordered = testing.value_and_gradients(ours, [x])
        monkeypatch.setattr(folds.triplets, "FEW", 1)
        found = testing.value_and_gradients(ours, [x])
    for a, b in zip(found, testing.value_and_gradients(lambda x: ours(x, "reference"), [x]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert name == "semi-hard" or all(map(torch.equal, found, ordered))


@pytest.mark.parametrize("backend", [*BACKENDS, *KERNELS])
def test_mega_batch_margin_gives_a_tie_to_the_first(backend):
    anchor = 2 * torch.eye(4)[[0, 1, 2, 3, 0]]
    positive = torch.tensor([[1.0, 1, 1, 1]] * 5) * torch.tensor([[1, 1, -1, 1], *[[1, 1, 1, 1]] * 3, [1, -1, 1, 1]])
    with chunks(2, 2):
        same(
            lambda a, p: fusedloss.mega_batch_margin(a, p, backend=backend),
            lambda a, p: mega_batch(a.double(), p.double()),
            [anchor, positive],
            rtol=1e-5,
            atol=1e-6,
        )


@pytest.mark.parametrize("backend", [*BACKENDS, *KERNELS])
@pytest.mark.parametrize("name", LABELLED)
def test_labels_are_any_int64(name, backend):
    """Equal in their low 32 bits, or as float64, is not equal; the lowest and -1 are labels like others."""
    values = torch.tensor([-(2**63), 2**63 - 1, 0, 2**32, -1, 2**53, 2**53 + 1, 1, 2**32 + 1])
    kinds = torch.randint(0, len(values), (22,))
    x = randn(22, 4).float()
    loss = LABELLED[name][0]
    found, wanted = (
        testing.value_and_gradients(lambda x, y=labels: loss(x, y, backend=backend), [x])
        for labels in (values[kinds], kinds)
    )
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


# Precision ------------------------------------------------------------------------------------------------------------


@functools.cache
def large(name):
    """A batch of 512 in fp32, its loss, and the value and gradient in fp64."""
    torch.manual_seed(1)
    labels = torch.randint(0, 128, (512,))
    tensors = [(randn(512, 64) + randn(128, 64)[labels]).float()]
    if name in PAIRS:
        tensors.append((tensors[0] + randn(512, 64)).float())
        step = PAIRS[name][0]
    else:
        step = lambda x, backend: LABELLED[name][0](x, labels, backend=backend)
    exact = testing.value_and_gradients(lambda *t: step(*t, backend="chunked"), [t.double() for t in tensors])
    return tensors, step, exact


@pytest.mark.parametrize(
    "name, backend",
    # "reference" is cubic in two of them
    [
        (n, b)
        for n in (*LABELLED, *PAIRS)
        for b in BACKENDS
        if (n, b) not in {("all", BACKENDS[1]), ("semi-hard", BACKENDS[1])}
    ],
)
def test_fp32_has_its_digits(name, backend):
    tensors, step, exact = large(name)
    found = testing.value_and_gradients(lambda *t: step(*t, backend=backend), tensors)
    eps = torch.finfo(torch.float32).eps
    jumps = at_the_hinge(tensors[0], 16 * eps) if name == "all" else 0.0
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a.double() - b).norm() <= 16 * eps * b.norm() + (jumps if a.dim() else 0.0)


def at_the_hinge(x, share):
    """Of `large`'s triplets: those whose loss is 0 but for the rounding of their distances may have a gradient or not,
    which is at most that of three rows of length 2 over the number of triplets."""
    torch.manual_seed(1)
    labels, d, near, count = torch.randint(0, 128, (512,)), matrix(x.double(), "euclidean"), 0, 0
    for i, row in enumerate(d):
        own = labels == labels[i]
        hinge = row[own & (torch.arange(512) != i), None] - row[~own] + 5.0
        near, count = near + (hinge.abs() < share * row.max()).sum(), count + (hinge > 0).sum()
    return near * 12**0.5 / count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*LABELLED, *PAIRS])
def test_16_bit_inputs(name, dtype):
    """Losses in fp32; gradients in the dtype of the inputs, those of the same numbers in fp64.

    The factor is a gradient scaler's: gradients of a mean would be below what fp16 holds with all its digits.
    """
    labels = torch.randint(0, 24, (96,))
    narrow = [t[:96].to(dtype) for t in large(name)[0]]

    def step(*tensors):
        if name in PAIRS:
            return 1024 * PAIRS[name][0](*tensors, backend="chunked")
        return 1024 * LABELLED[name][0](*tensors, labels, backend="chunked")

    found = testing.value_and_gradients(step, narrow)
    exact = testing.value_and_gradients(step, [t.double() for t in narrow])
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-5, atol=0)
    for a, b in zip(found[1:], exact[1:], strict=True):
        assert a.dtype == dtype and torch.isfinite(a).all()
        assert (a.double() - b).norm() <= torch.finfo(dtype).eps * b.norm()


# Memory ---------------------------------------------------------------------------------------------------------------


def saved_bytes(step):
    """What the graph of a loss holds on to."""
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = step()
    return sum(sizes.values()), value


@pytest.mark.parametrize("name", [*LABELLED, *PAIRS])
def test_the_graph_keeps_matrices_of_embeddings_only(name):
    rows, dim = 1024, 8
    x, y = (torch.randn(rows, dim, requires_grad=True) for _ in range(2))
    if name in PAIRS:
        step = lambda: PAIRS[name][0](x, y, backend="chunked")
    else:
        labels = torch.arange(rows) // 2
        step = lambda: LABELLED[name][0](x, labels, backend="chunked")
    found, value = saved_bytes(step)
    assert found <= 8 * (4 * rows * dim)  # [N, N] would be 128 of these
    value.backward()


def peak_of_the_hardest(name: str, n: int) -> int:
    x, labels = torch.randn(n, 8, requires_grad=True), torch.arange(n) // 4
    y = torch.randn(n, 8)

    def step():
        loss = PAIRS[name][0](x, y, backend="chunked") if name in PAIRS else TRIPLETS[name][0](x, labels)
        loss.backward()

    return measure.peak_memory(step)


@measured
@pytest.mark.parametrize("name", one_of(["hard", "soft", "mega-batch"]))
def test_the_hardest_are_found_in_tiles(name):
    """[N, N] would be 256 MiB."""
    assert growth(peak_of_the_hardest, name, sizes=(64, 8192)) < 24 * MIB


def peak_of_triplets(name: str, classes: int | None, n: int) -> int:
    x, labels = torch.randn(n, 8, requires_grad=True), torch.arange(n) % (classes or n // 2)
    return measure.peak_memory(lambda: TRIPLETS[name][0](x, labels, backend="chunked").backward())


@measured
@pytest.mark.parametrize("name", one_of(["all", "semi-hard"]))
@pytest.mark.parametrize("classes", [None, 2])  # a label for two rows, or two labels
def test_triplets_are_never_listed(name, classes):
    """[N, N, N] would be 32 GiB, and a row of negatives for each pair of two labels 16; the workspace has 64 MiB."""
    assert growth(peak_of_triplets, name, classes, sizes=(64, 2048)) < 128 * MIB


@pytest.mark.parametrize("backend", ["dense", "chunked", "triton", "cuda"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_hardest_beside_what_is_not_finite(bad, backend):
    """The columns that are found are some of the batch, and the loss is not finite."""
    for spoilt in (0, 149, slice(None)):
        x = torch.randn(150, 8)
        x[spoilt] = bad
        x.requires_grad_()
        loss = fusedloss.batch_hard_triplet(x, torch.arange(150) % 3, backend=backend)
        (gradient,) = torch.autograd.grad(loss, x)
        assert not loss.isfinite() and not gradient[spoilt].isfinite().any()
