"""Objectives of gradient boosting: derivatives of lambda_loss, and the trees that lightgbm grows from them."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

import fusedloss
from fusedloss import boosting
from fusedloss.rowwise import lists as rowwise

SIZES = [5, 1, 12, 3, 9, 12, 2]
WEIGHTINGS = ["lambda_rank", "ndcg_loss2", "ndcg_loss2pp", "ndcg_loss1", None]


def documents(sizes=SIZES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(sum(sizes), generator=generator, dtype=torch.float64)
    return scores, torch.randint(0, 5, (sum(sizes),), generator=generator)


def by_autograd(scores, labels, sizes, sigma=1.0, **options):
    """Of the sum of all pairs, in nats. Weights depend on ranks: a small step leaves them as they are."""
    leaf = scores.clone().requires_grad_()
    queries, graded = list(leaf.split(sizes)), list(labels.split(sizes))
    options.update(sigma=sigma, reduction="sum", reduction_log="natural", backend="reference")
    return torch.autograd.grad(fusedloss.lambda_loss(queries, graded, **options), leaf)[0]


# Derivatives ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"k": 3, "sigma": 1.7, "eps": 30.0, "mu": 2.0}], ids=["plain", "options"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_derivatives_of_lambda_loss(weighting, options):
    """By autograd, and the second by differences of the first: groups of many sizes, and one of 1."""
    scores, labels = documents()
    gradient, hessian = boosting.lambda_gradients(scores, labels, group=SIZES, weighting=weighting, **options)
    first = lambda s: by_autograd(s, labels, SIZES, weighting=weighting, **options)
    torch.testing.assert_close(gradient, first(scores), rtol=1e-11, atol=1e-12)
    differences = torch.zeros_like(scores)
    place = torch.cat([torch.arange(n) for n in SIZES])
    for i in range(max(SIZES)):  # the i-th document of every group at once
        step = 1e-5 * (place == i)
        differences += (first(scores + step) - first(scores - step)) / 2e-5 * (place == i)
    torch.testing.assert_close(hessian, differences, rtol=1e-6, atol=1e-8)
    assert gradient.abs().max() > 0.1 and hessian.min() >= 0


def test_a_pair_by_hand():
    """Two documents in the wrong order: p = sigmoid(s_1 - s_0), w = (1 - 1 / log2 3) (G_1 - G_0)."""
    gradient, hessian = boosting.lambda_gradients(torch.tensor([2.0, 0.5]).double(), torch.tensor([0, 2]))
    p, w = 1 / (1 + math.exp(-1.5)), 1 - 1 / math.log2(3)  # the best order's DCG is the gain itself
    torch.testing.assert_close(gradient, torch.tensor([p * w, -p * w]).double())
    torch.testing.assert_close(hessian, torch.tensor([w * p * (1 - p)] * 2).double())


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_nothing_to_want_is_nothing(weighting):
    """A group of one, of equal labels, of none, and no groups at all; ndcg_loss1 pairs equal labels, too."""
    scores = torch.randn(8, dtype=torch.float64)
    labels = torch.tensor([3, 1, 1, 1, 0, 0, 0, 0])
    gradient, hessian = boosting.lambda_gradients(scores, labels, group=[1, 3, 0, 4], weighting=weighting)
    quiet = slice(0, 1) if weighting == "ndcg_loss1" else slice(None)
    assert gradient[quiet].eq(0).all() and hessian[quiet].eq(0).all()
    if weighting == "ndcg_loss1":
        torch.testing.assert_close(gradient, by_autograd(scores, labels, [1, 3, 4], weighting=weighting))
    for found in boosting.lambda_gradients(scores[:0], labels[:0], group=[], weighting=weighting):
        assert found.shape == (0,)


def test_without_groups_all_are_one_query():
    scores, labels = documents()
    found = boosting.lambda_gradients(scores, labels)
    for a, b in zip(found, boosting.lambda_gradients(scores, labels, group=[len(scores)]), strict=True):
        assert torch.equal(a, b)


def test_groups_together_are_groups_apart(monkeypatch):
    """Whatever is padded together: each group has the derivatives that it has alone."""
    monkeypatch.setattr(boosting, "PAIRS", 300)
    for kind in rowwise.BLOCK:
        monkeypatch.setitem(rowwise.BLOCK, kind, 200)
    scores, labels = documents()
    found = boosting.lambda_gradients(scores, labels, group=SIZES, k=4)
    alone = [
        boosting.lambda_gradients(s, y, k=4) for s, y in zip(scores.split(SIZES), labels.split(SIZES), strict=True)
    ]
    for together, apart in zip(found, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(together, torch.cat(apart), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numpy_as_torch(dtype):
    scores, labels = documents()
    scores = scores.to(getattr(torch, dtype))
    kept = scores.clone()
    theirs = boosting.lambda_gradients(
        scores.numpy(), labels.numpy().astype(numpy.float32), group=numpy.array(SIZES, dtype=numpy.int32)
    )
    ours = boosting.lambda_gradients(scores, labels, group=torch.tensor(SIZES))
    for a, b in zip(theirs, ours, strict=True):
        assert isinstance(a, numpy.ndarray) and a.dtype == dtype and isinstance(b, torch.Tensor)
        assert numpy.array_equal(a, b.numpy())
    assert torch.equal(scores, kept) and not ours[0].requires_grad
    exact = boosting.lambda_gradients(scores.double(), labels, group=SIZES)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_a_function_as_weighting():
    scores, labels = documents()
    doubled = lambda gain, discount, labels: (
        2 * (1 / discount[:, :, None] - 1 / discount[:, None, :]).abs() * (gain[:, :, None] - gain[:, None, :]).abs()
    )
    found = boosting.lambda_gradients(scores, labels, group=SIZES, weighting=doubled)
    for a, b in zip(found, boosting.lambda_gradients(scores, labels, group=SIZES), strict=True):
        torch.testing.assert_close(a, 2 * b)


@pytest.mark.parametrize(
    "match, scores, labels, options",
    [
        (r"scores must be floating numbers .*, got torch.int64 \[3\]", torch.arange(3), torch.arange(3), {}),
        (
            r"scores must be floating numbers \[total\], got torch.float32 \[1, 3\]",
            torch.zeros(1, 3),
            torch.zeros(1, 3),
            {},
        ),
        (r"labels must have shape \[3\], like scores, got \[2\]", torch.zeros(3), torch.zeros(2), {}),
        (r"group must be .* 3 in all, got \[1, 1\]", torch.zeros(3), torch.zeros(3), {"group": [1, 1]}),
        (
            r"group must be each query's number of documents, 3 in all, got \[4, -1\]",
            torch.zeros(3),
            torch.zeros(3),
            {"group": [4, -1]},
        ),
        (
            "weighting must be one of 'ndcg_loss2pp', 'ndcg_loss2', 'ndcg_loss1', 'lambda_rank', got 'ndcg'",
            torch.zeros(3),
            torch.zeros(3),
            {"weighting": "ndcg"},
        ),
        ("k must be at least 1 or None, got 0", torch.zeros(3), torch.zeros(3), {"k": 0}),
        ("sigma must be a positive number, got -1", torch.zeros(3), torch.zeros(3), {"sigma": -1}),
    ],
)
def test_errors(match, scores, labels, options):
    with pytest.raises(ValueError, match=match):
        boosting.lambda_gradients(scores, labels, **options)


# Objectives -----------------------------------------------------------------------------------------------------------


class Dataset:
    """What objectives ask of a lightgbm.Dataset, and of an xgboost.DMatrix, in the same words."""

    def __init__(self, labels, group, weight=None):
        self.labels, self.group, self.weight = labels, group, weight

    def get_label(self):
        return self.labels

    def get_group(self):
        return self.group

    def get_weight(self):
        return self.weight


@pytest.mark.parametrize("make", [boosting.lightgbm_objective, boosting.xgboost_objective])
@pytest.mark.parametrize("per", ["none", "empty", "document", "query"])
def test_objectives_ask_the_dataset(make, per):
    """xgboost has a weight per query, lightgbm per document; xgboost's is empty where there is none."""
    scores, labels = (x.numpy() for x in documents())
    scores = scores.astype(numpy.float32)
    each = numpy.random.default_rng(0).uniform(0.5, 2, len(SIZES)).astype(numpy.float32)
    spread = numpy.repeat(each, SIZES)
    weight = {"none": None, "empty": numpy.array([]), "document": spread, "query": each}[per]
    group = numpy.array(SIZES, dtype=numpy.uint32)
    found = make(k=4, sigma=2.0)(scores, Dataset(labels.astype(numpy.float32), group, weight))
    factor = spread if per in ("document", "query") else numpy.ones_like(spread)
    factors = factor, factor * (2 if make is boosting.xgboost_objective else 1)
    wanted = boosting.lambda_gradients(scores, labels, group=SIZES, k=4, sigma=2.0)
    for a, b, f in zip(found, wanted, factors, strict=True):
        numpy.testing.assert_allclose(a, b * f, rtol=1e-6)
        assert a.shape == scores.shape and a.dtype == numpy.float32


def test_a_dataset_without_groups():
    for group in (None, []):
        with pytest.raises(
            ValueError, match="the dataset must have groups, the number of documents of each query, got none"
        ):
            boosting.lightgbm_objective()(numpy.zeros(3), Dataset(numpy.zeros(3), group))


# lightgbm -------------------------------------------------------------------------------------------------------------


K = 10
# Trees are alike only if sums are: one thread, and histograms of doubles.
PARAMS = {
    "learning_rate": 0.1,
    "num_leaves": 8,
    "min_data_in_leaf": 5,
    "verbosity": -1,
    "num_threads": 1,
    "deterministic": True,
    "seed": 0,
}


def ranking(queries=60, seed=0):
    """Features [documents, 6], of which three say how relevant a document is, and grades 0 to 4."""
    random = numpy.random.default_rng(seed)
    sizes = random.integers(1, 25, queries)
    features = random.normal(size=(sizes.sum(), 6))
    worth = features[:, 0] + 0.5 * features[:, 1] * features[:, 2] + 0.3 * random.normal(size=len(features))
    return features, numpy.digitize(worth, [-0.8, 0.0, 0.8, 1.5]).astype(numpy.float64), sizes


def ndcg(scores, labels, sizes, k=K):
    found, ends = [], numpy.cumsum(sizes)
    for start, end in zip(ends - sizes, ends, strict=True):
        gain = 2 ** labels[start:end] - 1
        discount = 1 / numpy.log2(numpy.arange(2, min(k, end - start) + 2))
        best = (numpy.sort(gain)[::-1][:k] * discount).sum()
        if best:
            order = numpy.argsort(-scores[start:end], kind="stable")
            found.append((gain[order][:k] * discount).sum() / best)
    return numpy.mean(found)


def train(objective, data, weight=None, rounds=20, **params):
    lightgbm = pytest.importorskip("lightgbm")
    features, labels, sizes = data
    dataset = lightgbm.Dataset(features, label=labels, group=sizes, weight=weight)
    return lightgbm.train({**PARAMS, "objective": objective, **params}, dataset, num_boost_round=rounds)


def test_training_ranks_what_it_has_not_seen():
    held_out = ranking(seed=1)
    booster = train(boosting.lightgbm_objective(k=K), ranking())
    start = ndcg(numpy.zeros(len(held_out[1])), *held_out[1:])
    assert start < 0.75
    assert ndcg(booster.predict(held_out[0]), *held_out[1:]) > 0.88


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_the_trees_of_lambdarank(sigma, weighted):
    """lightgbm's own objective without its norm; its sigmoid is a table of 2^20 steps."""
    data = ranking()
    weight = numpy.random.default_rng(2).uniform(0.5, 2, len(data[1])) if weighted else None
    ours = train(boosting.lightgbm_objective(k=K, sigma=sigma), data, weight)
    theirs = train("lambdarank", data, weight, sigmoid=sigma, lambdarank_truncation_level=K, lambdarank_norm=False)
    found, wanted = ours.predict(data[0]), theirs.predict(data[0])
    numpy.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * numpy.abs(wanted).max())
    assert numpy.abs(wanted).max() > 0.1


def test_as_an_objective_of_lgbm_ranker():
    lightgbm = pytest.importorskip("lightgbm")
    pytest.importorskip("sklearn")
    features, labels, sizes = data = ranking()
    ranker = lightgbm.LGBMRanker(objective=boosting.sklearn_objective(k=K), n_estimators=20, **PARAMS)
    ranker.fit(features, labels, group=sizes)
    booster = train(boosting.lightgbm_objective(k=K), data)
    numpy.testing.assert_allclose(ranker.predict(features, raw_score=True), booster.predict(features), rtol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("k", [3, 30])
def test_the_trees_of_xgboost(k, weighted):
    """rank:ndcg without its normalisation; it doubles the second derivatives. With a factor of 1 a tree is what one of
    twice the learning rate and twice the regularisation would be."""
    xgboost = pytest.importorskip("xgboost")
    features, labels, sizes = ranking()
    weight = numpy.random.default_rng(2).uniform(0.5, 2, len(sizes)) if weighted else None
    if weight is not None:
        weight /= weight.mean()  # as rank:ndcg does
    data = xgboost.DMatrix(features, label=labels, qid=numpy.repeat(numpy.arange(len(sizes)), sizes), weight=weight)

    def trees(params, objective=None, rounds=5):
        booster = xgboost.train(
            {"max_depth": 3, "base_score": 0.0, "nthread": 1, **params}, data, rounds, obj=objective
        )
        return booster.predict(data, output_margin=True)

    ranker = {"objective": "rank:ndcg", "lambdarank_pair_method": "topk", "lambdarank_num_pair_per_sample": k}
    plain = {"lambdarank_normalization": False, "lambdarank_score_normalization": False}
    wanted = trees({**ranker, **plain})
    close = {"rtol": 1e-4, "atol": 1e-4 * numpy.abs(wanted).max()}
    assert numpy.abs(wanted).max() > 0.1
    numpy.testing.assert_allclose(trees({}, boosting.xgboost_objective(k=k)), wanted, **close)
    newton = trees(
        {"eta": 0.3, "reg_lambda": 0.5, "min_child_weight": 0.5}, boosting.xgboost_objective(k=k, hessian_factor=1), 1
    )
    double = trees({"eta": 0.6, "reg_lambda": 1.0, "min_child_weight": 1.0}, boosting.xgboost_objective(k=k), 1)
    numpy.testing.assert_allclose(newton, double, **close)
