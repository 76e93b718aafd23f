"""Losses of lists: what each means, what sentence-transformers 6.2.0 gives, and how they behave at their edges.

The formulas are written out here query by query from the definitions, in fp64, with every pair in a matrix.
"""

from __future__ import annotations

import contextlib
import functools
import math

import pytest
import torch
from grids import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from peaks import MIB, growth, measured
from torch import nn

import fusedloss
from fusedloss import testing
from fusedloss.bench import measure
from fusedloss.rowwise import lists as rowwise

WEIGHTINGS = ["ndcg_loss2pp", "ndcg_loss2", "ndcg_loss1", "lambda_rank", None]
BACKENDS = ["reference", "chunked"]

# Triton's interpreter computes what masks then leave out.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow):RuntimeWarning")


# The definitions ------------------------------------------------------------------------------------------------------


def lambda_formula(scores, labels, weighting="ndcg_loss2pp", k=None, sigma=1.0, eps=1e-10, mu=10.0, base=2.0):
    total, pairs = sum(s.sum() for s in scores) * 0, 0
    for s, y in zip(scores, labels, strict=True):
        order = s.detach().argsort(descending=True, stable=True)
        s, y, n = s[order], y[order].to(s.dtype), len(s)
        place = torch.arange(1, n + 1).to(s)
        top = n if k is None else k
        discount = torch.log2(1 + place)
        best = y.clamp(min=0).sort(descending=True).values
        gain = (2 ** y.clamp(min=0) - 1) / ((2**best - 1) / discount)[:top].sum().clamp(min=eps)
        distance = (place[:, None] - place).abs()
        apart = (gain[:, None] - gain).abs()
        lambda_rank = (1 / discount[:, None] - 1 / discount).abs() * apart
        near = 1 / torch.log2(1 + distance.clamp(min=1)) - 1 / torch.log2(2 + distance.clamp(min=1))
        ndcg_loss2 = near * apart  # 0 on the diagonal
        weight = {
            None: torch.ones_like(apart),
            "ndcg_loss1": (gain / discount)[:, None].expand(n, n),
            "ndcg_loss2": ndcg_loss2,
            "lambda_rank": lambda_rank,
            "ndcg_loss2pp": mu * ndcg_loss2 + lambda_rank,
        }[weighting]
        chosen = (place[:, None] <= top) | (place <= top)
        if weighting != "ndcg_loss1":
            chosen = chosen & (y[:, None] > y)
        losses = nn.functional.softplus(-sigma * (s[:, None] - s), threshold=1000) * weight
        total, pairs = total + losses[chosen].sum(), pairs + int(chosen.sum())
    return total / max(pairs, 1) / math.log(base)


def adr_formula(scores, labels, alpha=1.0):
    total = sum(s.sum() for s in scores) * 0
    for s, y in zip(scores, labels, strict=True):
        soft = 1 + (alpha * (s - s[:, None])).sigmoid().sum(1) - 0.5
        true = torch.tensor([(y > a).sum() + ((y == a).sum() + 1) / 2 for a in y]).to(s)
        total = total + ((true - soft) ** 2 / torch.log2(1 + true)).sum()
    return total / max(sum(len(s) for s in scores), 1)


def list_net_formula(scores, labels):
    losses = [-(y.to(s).softmax(0) * s.log_softmax(0)).sum() for s, y in zip(scores, labels, strict=True)]
    return torch.stack(losses).mean()


def list_mle_formula(scores, labels, weights=lambda n: torch.ones(n), by_label=False):
    losses = []
    for s, y in zip(scores, labels, strict=True):
        s = s[y.argsort(descending=True, stable=True)] if by_label else s
        terms = [w * (s[i:].logsumexp(0) - s[i]) for i, w in enumerate(weights(len(s)).to(s))]
        losses.append(sum(terms, s.sum() * 0))
    return torch.stack(losses).mean()


def position_weights(n):
    weights = torch.tensor([2.0 ** (n - i) - 1 for i in range(1, n + 1)], dtype=torch.float64)
    return weights / (weights.sum() + 1e-10)


# (ours, the formula) of lists of scores and labels, and the class and the options of sentence-transformers
CASES = {
    **{
        f"lambda_loss {weighting}, k={k}": (
            lambda s, y, w=weighting, k=k, **o: fusedloss.lambda_loss(s, y, weighting=w, k=k, sigma=1.3, mu=7.0, **o),
            lambda s, y, w=weighting, k=k: lambda_formula(s, y, w, k, sigma=1.3, mu=7.0),
        )
        for weighting in WEIGHTINGS
        for k in (None, 2)
    },
    "rank_net": (
        lambda s, y, **o: fusedloss.rank_net(s, y, reduction_log="natural", **o),
        lambda s, y: lambda_formula(s, y, None, base=math.e),
    ),
    "adr_mse": (lambda s, y, **o: fusedloss.adr_mse(s, y, alpha=1.7, **o), lambda s, y: adr_formula(s, y, 1.7)),
    "list_net": (fusedloss.list_net, list_net_formula),
    "list_mle": (fusedloss.list_mle, list_mle_formula),
    "list_mle by label": (
        lambda s, y, **o: fusedloss.list_mle(s, y, respect_input_order=False, **o),
        lambda s, y: list_mle_formula(s, y, by_label=True),
    ),
    "plist_mle": (fusedloss.plist_mle, lambda s, y: list_mle_formula(s, y, position_weights)),
    "plist_mle by label": (
        lambda s, y, **o: fusedloss.plist_mle(s, y, respect_input_order=False, **o),
        lambda s, y: list_mle_formula(s, y, position_weights, by_label=True),
    ),
}
FEW = ["lambda_loss ndcg_loss2pp, k=None", "lambda_loss ndcg_loss1, k=2", "rank_net", "adr_mse", "list_net"]
FEW += ["list_mle", "plist_mle by label"]


def a_batch(lengths, seed=0, dtype=torch.float64, ties=False, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    scores = [(torch.randn(n, generator=generator, dtype=torch.float64) * spread).to(dtype) for n in lengths]
    labels = [torch.randint(-1, 4, (n,), generator=generator).to(torch.float64) for n in lengths]
    return [s.round() for s in scores] if ties else scores, labels


def padded(scores, labels, n=None, holes=False, fill=math.nan):
    """[Q, n], [Q, n], mask. With holes padding stands between the documents, too."""
    n = n or max(map(len, scores)) + 3
    z, y = (torch.full((len(scores), n), fill, dtype=x[0].dtype) for x in (scores, labels))
    mask = torch.zeros(len(scores), n, dtype=torch.bool)
    for q, (s, label) in enumerate(zip(scores, labels, strict=True)):
        places = torch.randperm(n)[: len(s)].sort().values if holes else torch.arange(len(s))
        z[q, places], y[q, places], mask[q, places] = s, label, True
    return z, y, mask


def close(found, wanted, rtol=1e-11, atol=1e-13):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b.to(a), rtol=rtol, atol=atol)


# Values and gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", list(CASES))
@settings(deadline=None, max_examples=8)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 2**20), ties=st.booleans())
def test_the_definition(case, backend, lengths, seed, ties):
    ours, formula = CASES[case]
    scores, labels = a_batch(lengths, seed, ties=ties)
    found = testing.value_and_gradients(lambda *s: ours(list(s), labels, backend=backend), scores)
    close(found, testing.value_and_gradients(lambda *s: formula(list(s), labels), scores))


@pytest.mark.parametrize("n", [rowwise.ONE_BLOCK - 1, 150])
@pytest.mark.parametrize("case", list(CASES))
def test_lists_of_several_blocks(monkeypatch, case, n):
    """Blocks of queries, and of rows where lists are long."""
    for kind in rowwise.BLOCK:
        monkeypatch.setitem(rowwise.BLOCK, kind, 10000)
    ours, formula = CASES[case]
    scores, labels = a_batch([n, 1, n - 30, 40, n], seed=n)
    found = testing.value_and_gradients(lambda *s: ours(list(s), labels, backend="chunked"), scores)
    wanted = testing.value_and_gradients(lambda *s: formula(list(s), labels), scores)
    # 2^150 - 1 over the sum of such: rescaled or not, 1e-10 more or less
    close(found, wanted, rtol=1e-9 if "plist" in case else 1e-11)


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("holes", [False, True])
def test_padding_is_not_looked_at(case, backend, holes):
    """NaN in it stays there, its gradient is 0, and where it stands does not matter."""
    ours, formula = CASES[case]
    scores, labels = a_batch([5, 0, 11, 1, 40], seed=3, dtype=torch.float32)
    z, y, mask = padded(scores, labels, holes=holes)
    value, gradient = testing.value_and_gradients(lambda s: ours(s, y, mask=mask, backend=backend), [z])
    exact = [s.double() for s in scores if len(s)]
    wanted = testing.value_and_gradients(lambda *s: formula(list(s), [x for x in labels if len(x)]), exact)
    share = 0.8 if "list_" in case else 1.0  # of the queries, those with documents
    assert gradient[~mask].eq(0).all()
    close([value, gradient[mask]], [share * wanted[0], share * torch.cat(wanted[1:])], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_mask", [False, True])
def test_sum_and_none_are_queries_sums(case, backend, with_mask):
    ours, _ = CASES[case]
    scores, labels = a_batch([7, 7, 7], seed=5)
    z, y, mask = padded(scores, labels, n=7 + 2 * with_mask)
    options = {"mask": mask, "backend": backend} if with_mask else {"backend": backend}
    upstream = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    none, by_none = testing.value_and_gradients(
        lambda s: (ours(s, y, reduction="none", **options) * upstream).sum(), [z]
    )
    total = 0
    for q, (one, label, weight) in enumerate(zip(scores, labels, upstream, strict=True)):
        value, gradient = testing.value_and_gradients(lambda s, x=label: ours([s], [x], reduction="sum"), [one])
        close([by_none[q, :7]], [weight * gradient])
        total = total + weight * value
    close([none], [total])
    assert ours(z, y, reduction="none", **options).shape == (3,)


# sentence-transformers ------------------------------------------------------------------------------------------------


class Handing(nn.Module):
    """Hands the scores it was given to a loss of sentence-transformers, whose documents are their places."""

    num_labels = 1

    def __init__(self, flat):
        super().__init__()
        self.flat, self.device = flat, flat.device

    def preprocess(self, pairs, prompt=None, task=None):
        return {"places": torch.tensor([place for _, place in pairs])}

    def forward(self, features):
        return {"scores": self.flat[features["places"]][:, None]}


def upstream(name, scores, labels, **options):
    module = pytest.importorskip("sentence_transformers.cross_encoder.losses")
    flat, places = torch.cat(scores), torch.arange(sum(map(len, scores))).split([len(s) for s in scores])
    weighting = options.get("weighting_scheme")
    if isinstance(weighting, str):
        options["weighting_scheme"] = getattr(module, weighting)(
            **({"mu": options.pop("mu")} if "mu" in options else {})
        )
    loss = getattr(module, name)(Handing(flat), mini_batch_size=-1, **options)
    return loss([["query"] * len(scores), [p.tolist() for p in places]], list(labels))


@contextlib.contextmanager
def in_double():
    """sentence-transformers casts what it is given to fp32. Here to fp64, and so are the constants it makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def unlike(gain, discount, labels):
    """w_ij of i above j, not symmetric: the gain of i over the discount of j, and the label of i."""
    return gain[:, :, None] / discount[:, None, :] + labels[:, :, None]


SCHEMES = {
    "ndcg_loss2pp": "NDCGLoss2PPScheme",
    "ndcg_loss2": "NDCGLoss2Scheme",
    "ndcg_loss1": "NDCGLoss1Scheme",
    "lambda_rank": "LambdaRankScheme",
    None: "NoWeightingScheme",
    unlike: unlike,
}
LAMBDA = {
    "defaults": {},
    "k=3, eps": {"k": 3, "eps": 20.0},  # more than the best DCG of a short list
    "sigma, nats": {"sigma": 1.3, "reduction_log": "natural"},
}
# Ours, and the options of theirs.
UPSTREAM = {
    **{
        f"LambdaLoss {getattr(ours, '__name__', ours)}, {name}": (
            lambda s, y, w=ours, given=given, **o: fusedloss.lambda_loss(s, y, weighting=w, **given, **o),
            {"weighting_scheme": theirs, **given},
        )
        for ours, theirs in SCHEMES.items()
        for name, given in LAMBDA.items()
    },
    "LambdaLoss mu=7": (
        lambda s, y, **o: fusedloss.lambda_loss(s, y, mu=7.0, **o),
        {"weighting_scheme": "NDCGLoss2PPScheme", "mu": 7.0},
    ),
    "RankNetLoss": (fusedloss.rank_net, {}),
    "RankNetLoss k, sigma, nats": (
        lambda s, y, **o: fusedloss.rank_net(s, y, k=3, sigma=0.5, reduction_log="natural", **o),
        {"k": 3, "sigma": 0.5, "reduction_log": "natural"},
    ),
    "ADRMSELoss": (fusedloss.adr_mse, {}),
    "ADRMSELoss alpha": (lambda s, y, **o: fusedloss.adr_mse(s, y, alpha=0.7, **o), {"alpha": 0.7}),
    "ListNetLoss": (fusedloss.list_net, {}),
    "ListMLELoss": (fusedloss.list_mle, {}),
    "ListMLELoss by label": (
        lambda s, y, **o: fusedloss.list_mle(s, y, respect_input_order=False, **o),
        {"respect_input_order": False},
    ),
    "PListMLELoss": (fusedloss.plist_mle, {}),
    "PListMLELoss weights of 1": (
        lambda s, y, **o: fusedloss.plist_mle(s, y, lambda_weight=None, **o),
        {"lambda_weight": None},
    ),
    "PListMLELoss by label": (
        lambda s, y, **o: fusedloss.plist_mle(s, y, respect_input_order=False, **o),
        {"respect_input_order": False},
    ),
}


@pytest.mark.parametrize("case", list(UPSTREAM))
@pytest.mark.parametrize("lengths", [(5, 1, 9, 7), (140, 3)], ids=str)
def test_sentence_transformers(case, lengths):
    """Its classes in fp64. Equal labels keep their order here; its sort does not hold that from 17 documents on."""
    ours, options = UPSTREAM[case]
    scores, labels = a_batch(lengths, seed=sum(lengths))
    if "by label" in case:
        labels = [y + torch.rand_like(y) for y in labels]
    with in_double():
        theirs = lambda *s: upstream(case.split()[0], list(s), labels, **options)
        wanted = testing.value_and_gradients(theirs, scores)
    for backend in BACKENDS:
        found = testing.value_and_gradients(lambda *s, b=backend: ours(list(s), labels, backend=b), scores)
        close(found, wanted, rtol=1e-10, atol=1e-11 * max(w.abs().max().item() for w in wanted))


def test_sentence_transformers_in_fp32():
    """What it computes: short lists differ by rounding alone. (In long ones its positions cancel, ours do not.)"""
    scores, labels = a_batch((5, 1, 9, 7), dtype=torch.float32)
    found = testing.value_and_gradients(lambda *s: fusedloss.lambda_loss(list(s), labels), scores)
    wanted = testing.value_and_gradients(lambda *s: upstream("LambdaLoss", list(s), labels), scores)
    close(found, wanted, rtol=1e-5, atol=1e-6)


# Precision ------------------------------------------------------------------------------------------------------------


@functools.cache
def of_eager(case, dtype):
    """A batch, [loss, gradient] of it in fp64, and eager's errors.

    One number may be exact by luck: an error is the largest of four batches'.
    """
    errors = []
    for seed in range(1, 5):
        scores, labels = a_batch([40, 40, 40], seed=seed, dtype=dtype, spread=3.0)
        scores, formula = torch.stack(scores), lambda s, y=labels: CASES[case][1](list(s), y)
        eager = testing.value_and_gradients(lambda s, f=formula: f(s.float()), [scores])
        exact = testing.value_and_gradients(formula, [scores.double()])
        errors.append([(a.double() - b).abs().max().item() for a, b in zip(eager, exact, strict=True)])
    return scores, torch.stack(labels), exact, [max(e) for e in zip(*errors, strict=True)]


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("device", DEVICES)
def test_inside_the_error_budget(case, backend, dtype, device):
    """fp32 arithmetic whatever the scores' dtype, whose own the gradient has; two tiles of documents."""
    ours, (scores, labels, exact, errors) = CASES[case][0], of_eager(case, dtype)
    z, y = scores.to(device), labels.to(device)
    found = testing.value_and_gradients(lambda s: ours(s, y, backend=backend), [z])
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype
    for name, out, oracle, theirs in zip(("loss", "gradient"), found, exact, errors, strict=True):
        eps, size = torch.finfo(out.dtype).eps, oracle.abs().max().item()
        budget = 2 * theirs + eps * size
        if name == "gradient" and backend == "triton" and "list_mle" in case:
            # The interpreter scans one by one: two scans of 40 sums, rounded by eps / 2 each, which add up like a
            # random walk. What is scanned is the gradient plus the weight, at most 1 / 3 in a mean of three queries.
            budget += math.sqrt(2 * 40) * torch.finfo(torch.float32).eps / 2 * (size + 1 / 3)
        error = (out.cpu().double() - oracle).abs().max().item()
        assert error <= budget, f"{name}: {error / budget:.2f} of the budget"


def test_neighbours_far_down_a_list_keep_their_weight():
    """1 / log2(1 + p) - 1 / log2(2 + p) loses 4 digits in fp32 at p = 300: it is made in fp64."""
    n = 300
    scores, labels = torch.linspace(1, 0, n, dtype=torch.float64)[None], torch.zeros(1, n, dtype=torch.float64)
    labels[0, -1] = 1
    formula = lambda s: lambda_formula(list(s), list(labels), "lambda_rank")
    exact = testing.value_and_gradients(formula, [scores])[1]
    for backend in ("chunked", "triton"):
        ours = lambda s, b=backend: fusedloss.lambda_loss(s, labels, weighting="lambda_rank", backend=b)
        found = testing.value_and_gradients(ours, [scores.float()])[1]
        torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=0)


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("case", FEW)
def test_scores_far_apart(case, backend):
    ours, formula = CASES[case]
    """And none apart at all."""
    numbers = lambda *lists: [torch.tensor(x, dtype=torch.float64) for x in lists]
    scores = numbers([1e4, -1e4, 3, 9.9e3, -9.9e3], [-1e4, 1e4], [7, 7, 7, 7])
    labels = numbers([0, 3, 1, 2, 0], [1, 0], [1, 0, 3, 1])
    found = testing.value_and_gradients(lambda *s: ours(list(s), labels, backend=backend), [s.float() for s in scores])
    wanted = testing.value_and_gradients(lambda *s: formula(list(s), labels), scores)
    close(found, wanted, rtol=1e-5, atol=1e-6)


# Edges ----------------------------------------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_nothing_to_rank(case, backend, shape):
    ours, _ = CASES[case]
    scores = torch.zeros(shape, dtype=torch.float16, requires_grad=True)
    loss = ours(scores, torch.zeros(shape), backend=backend)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == 0 and scores.grad.shape == shape
    assert ours([], [], backend=backend).item() == 0
    assert ours(scores, torch.zeros(shape), backend=backend, reduction="none").shape == shape[:1]


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("case", list(CASES))
def test_lists_that_say_nothing(case, backend):
    """Queries without documents, of one, of equal labels, of labels 0: finite, and 0 where there is nothing to want."""
    ours, _ = CASES[case]
    scores = torch.randn(4, 6, requires_grad=True)
    labels = torch.tensor([[1.0], [2.0], [5.0], [0.0]]).repeat(1, 6)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[0], mask[1, 1:] = False, False
    loss = ours(scores, labels, mask=mask, backend=backend, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    assert loss.isfinite().all() and gradient.isfinite().all()
    assert gradient[:1].eq(0).all() and gradient[1].abs().max() < 1e-6 and loss[0] == 0
    if "ndcg_loss1" not in case:  # there a document is paired with itself
        assert loss[1].abs() < 1e-6
    if ("lambda_loss" in case and "ndcg_loss1" not in case) or case == "rank_net":
        assert loss.eq(0).all() and gradient.eq(0).all()
    nowhere = ours(scores, labels, mask=torch.zeros_like(mask), backend=backend)
    nowhere.backward()
    assert nowhere.item() == 0 and scores.grad.eq(0).all()


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize(
    "case, where",
    [
        *((case, "scores") for case in CASES),
        *((case, "labels") for case in CASES if case not in ("list_mle", "plist_mle")),  # where their order is given
    ],
)
def test_nan_is_not_swallowed(case, backend, where):
    ours, _ = CASES[case]
    scores, labels = torch.randn(2, 6), torch.randint(0, 4, (2, 6)).float()
    (scores if where == "scores" else labels)[1, 2] = math.nan
    loss, gradient = testing.value_and_gradients(
        lambda s: ours(s, labels, backend=backend, reduction="none").sum(), [scores]
    )
    assert loss.isnan() and gradient[1].isnan().any() and gradient[0].isfinite().all()


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_infinite_scores_are_very_far_away(weighting, backend):
    """As in sentence-transformers: the value of scores of +-1e8, and no gradient."""
    scores, labels = torch.tensor([[-math.inf, 1.0, 2.0, math.inf, 0.5]]), torch.tensor([[0.0, 1, 2, 3, 0]])
    ours = lambda s: fusedloss.lambda_loss(s, labels, weighting=weighting, backend=backend)
    loss, gradient = testing.value_and_gradients(ours, [scores])
    assert loss.isfinite() and gradient.isfinite().all() and gradient[0, 0] == 0 and gradient[0, 3] == 0
    close([loss], [upstream("LambdaLoss", list(scores), list(labels), weighting_scheme=SCHEMES[weighting])], rtol=1e-5)


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_gains_that_overflow(backend):
    """2^2000 in fp64: NaN as in sentence-transformers, and like there 0 where no pair counts. 2^200 is a number."""
    scores = torch.randn(2, 4)
    for label in (200.0, 2000.0):
        equal, mixed = torch.full((1, 4), label), torch.tensor([[label, 1, 0, 0]])
        for labels in (torch.cat([equal, equal]), torch.cat([mixed, equal])):
            with in_double():
                wanted = upstream("LambdaLoss", list(scores), list(labels))
            loss, gradient = testing.value_and_gradients(
                lambda s, y=labels: fusedloss.lambda_loss(s, y, backend=backend), [scores]
            )
            torch.testing.assert_close(loss, wanted.float(), equal_nan=True)
            assert gradient[1].eq(0).all()


# Functions as weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["NDCGLoss2PPScheme", "LambdaRankScheme", "NoWeightingScheme"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scheme_of_sentence_transformers(monkeypatch, weighting, backend):
    module = pytest.importorskip("sentence_transformers.cross_encoder.losses")
    for kind in rowwise.BLOCK:
        monkeypatch.setitem(rowwise.BLOCK, kind, 1000)  # some queries at once
    scores, labels = a_batch([5, 20, 12, 1, 9])
    scheme, name = getattr(module, weighting)(), next(ours for ours, theirs in SCHEMES.items() if theirs == weighting)
    loss = fusedloss.LambdaLoss(weighting=scheme, k=4, backend=backend)
    found = testing.value_and_gradients(lambda *s: loss(list(s), labels), scores)
    wanted = testing.value_and_gradients(lambda *s: lambda_formula(list(s), labels, name, 4), scores)
    close(found, wanted, rtol=1e-6, atol=1e-8)  # its discounts are rounded to fp32


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_are_not_symmetric(monkeypatch, backend):
    """In blocks, whose weights are those of i above j and of j above i."""
    monkeypatch.setattr(rowwise.walk, "ROWS", (8, 8))
    scores, labels = torch.randn(2, 70, dtype=torch.float64), torch.randint(0, 4, (2, 70)).double()

    def formula(s):
        total, pairs = 0, 0
        for one, y in zip(s, labels, strict=True):
            order = one.detach().argsort(descending=True, stable=True)
            one, y = one[order], y[order]
            discount = torch.log2(torch.arange(2, 72).double())
            gain = (2**y - 1) / ((2 ** y.sort(descending=True).values - 1) / discount).sum()
            weight = gain[:, None] / discount + y[:, None]
            chosen = y[:, None] > y
            losses = -weight * nn.functional.logsigmoid(one[:, None] - one)
            total, pairs = total + losses[chosen].sum(), pairs + chosen.sum()
        return total / pairs / math.log(2)

    ours = lambda s: fusedloss.lambda_loss(s, labels, weighting=unlike, backend=backend)
    close(testing.value_and_gradients(ours, [scores]), testing.value_and_gradients(formula, [scores]))


def test_weights_that_train():
    class Scheme(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0))

        def forward(self, gain, discount, labels):
            return self.factor * gain[:, :, None]

    scores, labels, scheme = torch.randn(2, 5), torch.tensor([[0.0, 1, 2, 3, 1]] * 2), Scheme()
    loss = fusedloss.LambdaLoss(weighting=scheme)
    value = loss(scores, labels)
    value.backward()
    close([scheme.factor.grad * 2], [value.detach()], rtol=1e-6)
    assert list(loss.parameters()) == [scheme.factor]
    with pytest.raises(RuntimeError, match="backend='reference'"):
        fusedloss.lambda_loss(scores, labels, weighting=lambda *args: scheme(*args))


def test_kernels_know_no_functions():
    with pytest.raises(fusedloss.UnsupportedError, match="a function as weighting"):
        fusedloss.lambda_loss(
            torch.randn(1, 3), torch.zeros(1, 3), weighting=lambda g, d, y: g[:, :, None], backend="triton"
        )


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_weights_by_place(backend):
    """As PListMLELambdaWeight's rank_discount_fn; they may be negative."""
    weights = lambda mask: (torch.cos(mask.cumsum(1).double())).masked_fill(~mask, 0)
    scores, labels = a_batch([6, 9, 1], dtype=torch.float32)
    z, y, mask = padded(scores, labels, holes=True)

    def of_length(n):
        weight = torch.cos(torch.arange(1, n + 1).double())
        return weight / (weight.sum() + 1e-10)

    loss = fusedloss.PListMLELoss(lambda_weight=weights, respect_input_order=False, backend=backend)
    value, gradient = testing.value_and_gradients(lambda s: loss(s, y, mask=mask), [z])
    exact = [s.double() for s in scores]
    wanted = testing.value_and_gradients(lambda *s: list_mle_formula(list(s), labels, of_length, by_label=True), exact)
    close([value, gradient[mask]], [wanted[0], torch.cat(wanted[1:])], rtol=1e-4, atol=1e-5)


def test_place_weights_of_sentence_transformers():
    module = pytest.importorskip("sentence_transformers.cross_encoder.losses")
    scores, labels = a_batch([6, 9, 150], dtype=torch.float32)
    ours = lambda **o: lambda *s: fusedloss.plist_mle(list(s), labels, **o)
    found = testing.value_and_gradients(ours(lambda_weight=module.PListMLELambdaWeight()), scores)
    close(found, testing.value_and_gradients(ours(), scores), rtol=1e-5, atol=1e-6)


# Autograd and memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FEW)
def test_backward_twice_but_not_of_itself(case):
    ours, _ = CASES[case]
    scores = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (3, 8)).double()
    loss = ours(scores, labels)
    first, second = (
        torch.autograd.grad(loss, scores, torch.tensor(u).double(), retain_graph=True)[0] for u in (1.0, 2.0)
    )
    close([second], [2 * first])
    with pytest.raises(
        fusedloss.UnsupportedError,
        match=r"backend must be 'reference' for second derivatives \(create_graph=True\)",
    ):
        torch.autograd.grad(ours(scores, labels, backend="chunked"), scores, create_graph=True)


@pytest.mark.parametrize("case", list(CASES))
def test_second_derivatives_of_the_reference(case):
    ours, formula = CASES[case]
    scores, labels = torch.randn(3, 8, dtype=torch.float64), torch.randint(0, 3, (3, 8)).double()
    along = torch.randn(3, 8, dtype=torch.float64)
    hessian = lambda f: torch.autograd.functional.hvp(f, scores, along)[1]
    found = hessian(lambda s: ours(s, labels, backend="reference"))
    close([found], [hessian(lambda s: formula(list(s), list(labels)))], rtol=1e-9)


@pytest.mark.parametrize("case", ["lambda_loss ndcg_loss2pp, k=None", "list_net"])
def test_labels_receive_their_gradient(case):
    ours, formula = CASES[case]
    scores, labels = a_batch([6, 6])
    tensors = [*scores, *(y + torch.rand_like(y) for y in labels)]
    found = testing.value_and_gradients(lambda *t: ours(list(t[:2]), list(t[2:])), tensors)
    close(found, testing.value_and_gradients(lambda *t: formula(list(t[:2]), list(t[2:])), tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FEW)
def test_a_gradient_is_all_that_is_saved(case, dtype):
    """By the walk: few elements run as a formula, which keeps what it likes."""
    ours, _ = CASES[case]
    scores, labels = torch.randn(8, 40, dtype=dtype, requires_grad=True), torch.randint(0, 3, (8, 40))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        ours(scores, labels, backend="chunked")
    assert sum(saved) <= 8 * 40 * 4 + 8  # fp32, and what multiplies it


@pytest.mark.lengthy
@pytest.mark.parametrize("case", FEW)
def test_under_a_compiler(case):
    torch._dynamo.reset()  # torch 2.10 takes one lambda for another that differs in a default: findings/ has it
    ours, _ = CASES[case]
    scores, labels = torch.randn(3, 8), torch.randint(0, 3, (3, 8)).float()
    compiled = torch.compile(lambda s: ours(s, labels), backend="eager", fullgraph=True)
    found = testing.value_and_gradients(compiled, [scores])
    close(found, testing.value_and_gradients(lambda s: ours(s, labels), [scores]), rtol=1e-5, atol=1e-6)


def peak(case: str, queries: int, documents: int) -> int:
    loss = CASES[case][0] if case in CASES else lambda s, y: upstream("LambdaLoss", list(s), list(y))
    scores = torch.randn(queries, documents, requires_grad=True)
    labels = torch.randint(0, 5, (queries, documents)).float()
    return measure.peak_memory(lambda: loss(scores, labels).backward())


def highest(documents: int) -> int:
    return max(peak(case, 2, documents) for case in FEW)


@pytest.mark.slow  # half a minute of the library's pairs
@measured
def test_pairs_are_not_kept():
    """64 queries of 1024 documents have 256 MiB of pairs in fp32, 2 queries of 4096 have 128 MiB."""
    pytest.importorskip("sentence_transformers")
    ours, theirs = growth(peak, FEW[0], 64, sizes=(2, 1024)), growth(peak, "library", 4, sizes=(2, 1024))
    assert ours < 0.1 * 16 * theirs  # the library's grows in proportion to its queries
    assert max(ours, growth(highest, sizes=(2, 4096))) < 32 * MIB


# Modules and errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function", [fusedloss.lambda_loss, fusedloss.list_net, fusedloss.plist_mle, fusedloss.adr_mse]
)
@pytest.mark.parametrize(
    "error, match, scores, labels, options",
    [
        (
            ValueError,
            r"scores must be \[queries, documents\] or a list of 1-D tensors, got shape \[5\]",
            torch.zeros(5),
            torch.zeros(5),
            {},
        ),
        (
            TypeError,
            "scores must be float16, bfloat16, float32 or float64, got torch.int64",
            torch.zeros(2, 3).long(),
            torch.zeros(2, 3),
            {},
        ),
        (
            ValueError,
            r"labels must have shape \[2, 3\], like scores, got \[3, 2\]",
            torch.zeros(2, 3),
            torch.zeros(3, 2),
            {},
        ),
        (
            TypeError,
            r"scores and labels must both be \[Q, n\] tensors or both be lists of 1-D tensors, got a Tensor as labels",
            [torch.zeros(3)],
            torch.zeros(1, 3),
            {},
        ),
        (
            ValueError,
            r"labels\[0\] must be a 1-D tensor, one number per document, got shape \[\]",
            [torch.zeros(3)],
            [torch.tensor(1.0)],
            {},
        ),
        (
            ValueError,
            r"labels must have lists of \[3\] documents, like scores, got \[2\]",
            [torch.zeros(3)],
            [torch.zeros(2)],
            {},
        ),
        (
            ValueError,
            "mask must be None if scores and labels are lists of tensors, which have no padding, got a mask",
            [torch.zeros(3)],
            [torch.zeros(3)],
            {"mask": torch.ones(1, 3)},
        ),
        (
            TypeError,
            r"mask must be a tensor of bool \[2, 3\], got torch.float32",
            torch.zeros(2, 3),
            torch.zeros(2, 3),
            {"mask": torch.ones(2, 3)},
        ),
        (
            ValueError,
            r"mask must be bool \[2, 3\], got shape \[2, 2\]",
            torch.zeros(2, 3),
            torch.zeros(2, 3),
            {"mask": torch.ones(2, 2).bool()},
        ),
        (
            ValueError,
            "reduction must be one of 'mean', 'sum', 'none', got 'avg'",
            torch.zeros(2, 3),
            torch.zeros(2, 3),
            {"reduction": "avg"},
        ),
        (
            ValueError,
            "backend must be one of 'auto', 'cuda', 'triton', 'chunked', 'dense', 'reference', got 'gpu'",
            torch.zeros(2, 3),
            torch.zeros(2, 3),
            {"backend": "gpu"},
        ),
        (fusedloss.UnsupportedError, "cuda", torch.zeros(2, 3), torch.zeros(2, 3), {"backend": "cuda"}),
    ],
)
def test_errors(function, error, match, scores, labels, options):
    with pytest.raises(error, match=match):
        function(scores, labels, **options)


@pytest.mark.parametrize(
    "function, match, options",
    [
        (
            fusedloss.lambda_loss,
            "weighting must be one of 'ndcg_loss2pp', 'ndcg_loss2', 'ndcg_loss1', 'lambda_rank', got 'ndcg'",
            {"weighting": "ndcg"},
        ),
        (fusedloss.lambda_loss, "sigma must be a positive number, got 0", {"sigma": 0}),
        (fusedloss.lambda_loss, "k must be at least 1 or None, got 0", {"k": 0}),
        (fusedloss.lambda_loss, "reduction_log must be one of 'binary', 'natural', got 'e'", {"reduction_log": "e"}),
        (
            fusedloss.lambda_loss,
            r"weighting must return a shape that broadcasts to \[2, 3, 3\], got \[7\]",
            {"weighting": lambda *a: torch.ones(7)},
        ),
        (fusedloss.adr_mse, "alpha must be a positive number, got -1", {"alpha": -1}),
        (fusedloss.plist_mle, "lambda_weight must be one of 'default', got 'rank'", {"lambda_weight": "rank"}),
        (
            fusedloss.plist_mle,
            r"lambda_weight must return a tensor \[2, 3\], got shape \[3\]",
            {"lambda_weight": lambda mask: torch.ones(3)},
        ),
    ],
)
def test_options_that_do_not_fit(function, match, options):
    with pytest.raises(ValueError, match=match):
        function(torch.zeros(2, 3), torch.zeros(2, 3), **options)


def test_lists_of_different_lengths_need_nothing_of_the_host():
    """Their padding is made where they are: a copied vector of lengths made a GPU wait, and could not be captured."""

    class Calls(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    seen: list[object] = []
    scores, labels = ([torch.rand(n, dtype=torch.float64) for n in (4, 1, 0, 3)] for _ in range(2))
    with Calls():
        found = fusedloss.list_net(scores, labels, reduction="none", backend="reference")
    assert torch.ones in seen and not {torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.item} & set(seen)
    wanted = [fusedloss.list_net(s[None], y[None], reduction="sum") for s, y in zip(scores, labels, strict=True)]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-12, atol=0)
