"""Losses of pairs and triplets: each is sentence-transformers' own class, value and gradients, in fp64.

The library's classes get a model that hands out the embeddings. Where ours differs on purpose (NaN, an empty batch) the
test says so.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import fusedloss
from fusedloss import testing
from fusedloss.rowwise import pairs

losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

BACKENDS = ["chunked", "reference"]
CONTRASTIVE = {
    "cosine": losses.SiameseDistanceMetric.COSINE_DISTANCE,
    "euclidean": losses.SiameseDistanceMetric.EUCLIDEAN,
    "manhattan": losses.SiameseDistanceMetric.MANHATTAN,
}
TRIPLET = {
    "cosine": losses.TripletDistanceMetric.COSINE,
    "euclidean": losses.TripletDistanceMetric.EUCLIDEAN,
    "manhattan": losses.TripletDistanceMetric.MANHATTAN,
}


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


class Given(nn.Module):
    """A model whose texts are embeddings already."""

    def forward(self, features):
        return {"sentence_embedding": features["x"]}


def upstream(cls, *args, **options):
    """The class's loss of embeddings and labels."""
    return cls(Given(), *args, **options).compute_loss_from_embeddings


def same(ours, theirs, tensors, rtol=1e-9, atol=1e-11):
    """Value and gradients, with an upstream weight so that it is not dropped on the way; small and block by block."""
    weighed = lambda f: lambda *t: 1.7 * f(*t)
    wanted = testing.value_and_gradients(weighed(theirs), tensors)
    for small in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not small:
                patch.setitem(pairs.BLOCK, "cpu", 2 * tensors[0].shape[1])
                patch.setattr(pairs, "_plain", lambda *_: False)
                patch.setattr(pairs, "few", lambda *_: False)
            found = testing.value_and_gradients(weighed(ours), tensors)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b.to(a.dtype), rtol=rtol, atol=atol)


@st.composite
def batches(draw, matrices, zeros=True):
    """Matrices among whose rows are copies of each other's, and zeros."""
    rows, dim = draw(st.integers(1, 8)), draw(st.integers(1, 7))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    found = [randn(rows, dim) * draw(st.sampled_from([0.3, 1.0, 4.0])) for _ in range(matrices)]
    for x in found[1:]:
        if draw(st.booleans()):
            x[draw(st.integers(0, rows - 1))] = found[0][-1]
            x[-1] = found[0][-1]
    if zeros and draw(st.booleans()):
        found[draw(st.integers(0, matrices - 1))][0] = 0
    return found


LABELS = [torch.int64, torch.bool, torch.float32, torch.int32, torch.uint8]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", CONTRASTIVE)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_contrastive(distance, backend, data):
    a, b = data.draw(batches(2))
    label = torch.randint(0, 2, (len(a),)).to(data.draw(st.sampled_from(LABELS)))
    if data.draw(st.booleans()):
        label = torch.randint(0, 8, (len(a),)) / 4  # other numbers weigh both terms
    margin = data.draw(st.sampled_from([0.5, 2.0, 0.0, -1.0]))
    for reduction in ("mean", "sum"):
        theirs = upstream(losses.ContrastiveLoss, CONTRASTIVE[distance], margin, reduction == "mean")
        options = {"distance": distance, "margin": margin, "reduction": reduction, "backend": backend}
        same(
            lambda a, b, o=options: fusedloss.contrastive(a, b, label, **o),
            # Upstream takes no bool: 1 - True raises.
            lambda a, b, f=theirs: f([a, b], label.float() if label.dtype == torch.bool else label),
            [a, b],
        )


@pytest.mark.parametrize("distance", ["euclidean", "manhattan"])
def test_contrastive_at_an_infinite_distance(distance):
    """A pair that is pushed is far enough; the others' loss is infinite. The library's, 0 times inf, is NaN."""
    a, b = randn(5, 4), randn(5, 4)
    a[1:4, 0] = torch.inf
    found = fusedloss.contrastive(a, b, torch.tensor([0, 0, 1, 0.5, 1]), distance=distance, reduction="none")
    assert found[1] == 0 and (found[2:4] == torch.inf).all() and found[[0, 4]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", CONTRASTIVE)
@pytest.mark.filterwarnings("ignore:OnlineContrastiveLoss expects binary labels")
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_online_contrastive(distance, backend, data):
    a, b = data.draw(batches(2))
    assume(distance != "cosine" or a.shape[1] > 1)  # of one feature all are 1 or -1: rounding says which is hard
    labels = data.draw(st.sampled_from([(0, 1), (0,), (1,), (0, 1, 2), (2,), (0, 2)]))
    label = torch.tensor(labels)[torch.randint(0, len(labels), (len(a),))]
    margin = data.draw(st.sampled_from([0.5, 2.0, 5.0]))
    theirs = upstream(losses.OnlineContrastiveLoss, CONTRASTIVE[distance], margin)
    same(
        lambda a, b: fusedloss.online_contrastive(a, b, label, distance=distance, margin=margin, backend=backend),
        lambda a, b: theirs([a, b], label) + 0 * (a.sum() + b.sum()),  # the library's may have no gradient at all
        [a, b],
    )


def test_online_contrastive_without_hard_pairs_is_zero():
    """All distances equal: nothing is strictly farther than the nearest negative."""
    a, b = torch.ones(4, 3).double(), torch.ones(4, 3).double()
    for label in ([0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [5, 5, 5, 5]):
        found = testing.value_and_gradients(
            lambda a, b, y=label: fusedloss.online_contrastive(a, b, torch.tensor(y)), [a, b]
        )
        assert all((t == 0).all() for t in found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", TRIPLET)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_triplet(distance, backend, data):
    # A zero anchor's cosines have gradients of 1e12, whose difference is not to be compared.
    tensors = data.draw(batches(3, zeros=distance != "cosine"))
    margin = data.draw(st.sampled_from([5.0, 0.3, 0.0, -0.5]))
    theirs = upstream(losses.TripletLoss, TRIPLET[distance], margin)
    same(
        lambda *t: fusedloss.triplet(*t, distance=distance, margin=margin, backend=backend),
        lambda *t: theirs(list(t), None),
        tensors,
    )


class SquaredError(nn.Module):
    """nn.MSELoss, which in torch 2.10 has no backward of fp64 cosines beside the fp32 labels that upstream makes."""

    def forward(self, found, wanted):
        return (found - wanted).square().mean()


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_cosine_similarity(backend, data):
    a, b = data.draw(batches(2))
    score = torch.randint(-4, 5, (len(a),)) / 4
    transform = data.draw(st.sampled_from([None, nn.Sigmoid(), torch.exp]))
    loss = data.draw(st.sampled_from(["mse", nn.L1Loss(), nn.SmoothL1Loss(reduction="sum"), SquaredError()]))
    theirs = upstream(
        losses.CosineSimilarityLoss, SquaredError() if loss == "mse" else loss, transform or nn.Identity()
    )
    same(
        lambda a, b: fusedloss.cosine_similarity(a, b, score, loss=loss, transform=transform, backend=backend),
        lambda a, b: theirs([a, b], score),
        [a, b],
    )


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_contrastive_tension(backend, data):
    a, b = data.draw(batches(2))
    label = torch.randint(0, 2, (len(a),)).to(data.draw(st.sampled_from(LABELS)))
    theirs = losses.ContrastiveTensionLoss(Given())
    same(
        lambda a, b: fusedloss.contrastive_tension(a, b, label, backend=backend),
        lambda a, b: theirs([{"x": a}, {"x": b}], label),
        [a, b],
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label", [0, 1])
def test_contrastive_tension_of_a_certain_pair(label, backend):
    """A small loss is not what two large numbers differ by: 5e-6 here, to a relative 2e-7."""
    dots = torch.tensor([4.8, 12.2, 30.0])
    a = (dots if label else -dots)[:, None]
    found = fusedloss.contrastive_tension(
        a, torch.ones(3, 1), torch.full((3,), label), reduction="none", backend=backend
    )
    torch.testing.assert_close(found.double(), torch.exp(-dots.double()).log1p(), rtol=3e-7, atol=0)


def test_contrastive_tension_of_large_dots():
    """log(1 + exp(z)) where exp(z) is beyond fp32."""
    a = torch.tensor([[100.0], [100.0], [-100.0], [-100.0]])
    found = fusedloss.contrastive_tension(a, a.abs(), torch.tensor([1, 0, 1, 0]), reduction="none")
    assert found.tolist() == [0.0, 1e4, 1e4, 0.0]


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_contrastive_tension_of_infinite_dots(backend):
    """A pair that is certainly right has loss 0 and no gradient; one that is wrong, or partly so, an infinite loss."""
    dots = torch.tensor([torch.inf, -torch.inf, torch.inf, -torch.inf, torch.inf]).requires_grad_()
    label = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5])
    found = fusedloss.contrastive_tension(dots[:, None], torch.ones(5, 1), label, reduction="none", backend=backend)
    assert found.tolist() == [0.0, 0.0, torch.inf, torch.inf, torch.inf]
    assert torch.autograd.grad(found[:4].sum(), dots)[0].tolist() == [0.0, 0.0, 1.0, -1.0, 0.0]


# Every loss -----------------------------------------------------------------------------------------------------------

LABEL = torch.tensor([1, 0, 0, 1, 0, 1, 1])
ALL = {
    "contrastive": lambda a, b, c, **o: fusedloss.contrastive(a, b, LABEL.to(a.device), **o),
    "contrastive, euclidean": lambda a, b, c, **o: fusedloss.contrastive(
        a, b, LABEL.to(a.device), distance="euclidean", margin=6.0, **o
    ),
    "contrastive, manhattan": lambda a, b, c, **o: fusedloss.contrastive(
        a, b, LABEL.to(a.device), distance="manhattan", margin=40.0, **o
    ),
    "online_contrastive": lambda a, b, c, **o: fusedloss.online_contrastive(a, b, LABEL.to(a.device), margin=1.5, **o),
    "triplet": lambda a, b, c, **o: fusedloss.triplet(a, b, c, **o),
    "triplet, cosine": lambda a, b, c, **o: fusedloss.triplet(a, b, c, distance="cosine", margin=0.5, **o),
    "triplet, manhattan": lambda a, b, c, **o: fusedloss.triplet(a, b, c, distance="manhattan", margin=9.0, **o),
    "cosine_similarity": lambda a, b, c, **o: fusedloss.cosine_similarity(a, b, LABEL.to(a.device), **o),
    "contrastive_tension": lambda a, b, c, **o: fusedloss.contrastive_tension(a, b, LABEL.to(a.device), **o),
}
WITH_ROWS = [name for name in ALL if name != "online_contrastive"]


def embeddings(dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    return [torch.randn(7, 24, dtype=torch.float64).to(dtype).to(device) for _ in range(3)]


@pytest.mark.parametrize("name", WITH_ROWS)
def test_reductions(name):
    tensors = embeddings()
    loss, weight = ALL[name], torch.rand(7, dtype=torch.float64)
    rows = loss(*tensors, reduction="none")
    assert rows.shape == (7,) and rows.dtype == torch.float64
    torch.testing.assert_close(loss(*tensors, reduction="sum"), rows.sum())
    torch.testing.assert_close(loss(*tensors, reduction="mean"), rows.mean())
    default = loss(*tensors)
    torch.testing.assert_close(default, rows.sum() if name == "contrastive_tension" else rows.mean())
    # Each row's gradient is its own.
    _, *found = testing.value_and_gradients(lambda *t: (loss(*t, reduction="none") * weight).sum(), tensors)
    _, *whole = testing.value_and_gradients(lambda *t: loss(*t, reduction="sum"), tensors)
    for a, b in zip(found, whole, strict=True):
        torch.testing.assert_close(a, b * weight[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("name", ALL)
def test_backends_and_dtypes(name, backend, dtype):
    check_backend(name, backend, dtype, "cpu")


def check_backend(name, backend, dtype, device):
    tensors = embeddings(dtype, device)
    ours = testing.value_and_gradients(lambda *t: ALL[name](*t, backend=backend), tensors)
    eager = testing.value_and_gradients(lambda *t: ALL[name](*(x.float() for x in t), backend="reference"), tensors)
    oracle = testing.value_and_gradients(lambda *t: ALL[name](*t, backend="reference"), [t.double() for t in tensors])
    for a, b, c in zip(ours, eager, oracle, strict=True):
        assert testing.budget_share(a, b, c, a.dtype) <= 1
    assert ours[0].dtype == torch.float32 and ours[0].shape == () and all(g.dtype == dtype for g in ours[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["triton", "chunked"])
@pytest.mark.parametrize("name", ALL)
def test_backends_and_dtypes_on_a_gpu(name, backend, dtype):
    check_backend(name, backend, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ALL)
def test_nothing_is_read_back_from_a_gpu(name):
    tensors = [t.requires_grad_() for t in embeddings(torch.float32, "cuda")]
    ALL[name](*tensors).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ALL[name](*tensors).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ALL)
def test_nan_in_nan_out(name, backend):
    for place in range(2):
        for row in (0, 1):  # a positive, a negative
            tensors = embeddings()
            tensors[place][row, 3] = torch.nan
            assert ALL[name](*tensors, backend=backend).isnan()


@pytest.mark.parametrize("name", ALL)
def test_second_derivatives(name, monkeypatch):
    monkeypatch.setattr(pairs, "_plain", lambda *_: False)
    monkeypatch.setattr(pairs, "few", lambda *_: False)
    leaves = [t.requires_grad_() for t in embeddings()]
    penalty = {}
    for backend in BACKENDS:
        found = torch.autograd.grad(ALL[name](*leaves, backend=backend), leaves[:2], create_graph=True)
        penalty[backend] = torch.autograd.grad(sum(g.square().sum() for g in found), leaves[:2])
    for a, b in zip(*penalty.values(), strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().max() > 0 or name == "triplet, manhattan"


def test_online_contrastive_takes_hard_pairs_only():
    """By hand: distances 0.1 and 0.4 of positives, 0.3 and 0.8 of negatives."""
    a = torch.zeros(5, 1)
    b = torch.tensor([[0.1], [0.4], [0.3], [0.8], [0.35]])
    label = torch.tensor([1, 1, 0, 0, 2])
    found = fusedloss.online_contrastive(a, b, label, distance="manhattan", margin=0.5)
    # Harder than the nearest negative: 0.4; nearer than the farthest positive: 0.3. The pair labelled 2 takes no part.
    assert found.item() == pytest.approx(0.4**2 + (0.5 - 0.3) ** 2, rel=1e-4)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x, y: fusedloss.contrastive(x, x[:2], y), ValueError, "b must have 3 rows, like a, got 2"),
        (lambda x, y: fusedloss.contrastive(x, x, y[:2]), ValueError, r"label must have shape \[3\], got \[2\]"),
        (
            lambda x, y: fusedloss.contrastive(x, x, [1, 0, 1]),
            TypeError,
            r"label must be a tensor of real numbers \[3\], got a list",
        ),
        *(
            (
                lambda x, y, loss=loss: loss(x, x, 2 * y - 1),
                ValueError,
                "label must hold 1 for the same and 0 for not, got -1 in row 1",
            )
            for loss in (fusedloss.contrastive, fusedloss.online_contrastive, fusedloss.contrastive_tension)
        ),
        (lambda x, y: fusedloss.contrastive(x, x, y, distance="l2"), ValueError, "distance must be one of.*, got 'l2'"),
        (
            lambda x, y: fusedloss.contrastive(x, x, y, margin="wide"),
            TypeError,
            "margin must be a number, got 'wide', a str",
        ),
        (
            lambda x, y: fusedloss.contrastive(x, x, y, reduction="batch"),
            ValueError,
            "reduction must be one of 'mean', 'sum', 'none', got 'batch'",
        ),
        (
            lambda x, y: fusedloss.contrastive(x, x.double(), y),
            TypeError,
            "b must be torch.float32, like a, got torch.float64",
        ),
        (
            lambda x, y: fusedloss.contrastive(Given(), x, y),
            TypeError,
            "a must be a tensor of embeddings, got the nn.Module Given",
        ),
        (lambda x, y: fusedloss.triplet(x, x, x[:1]), ValueError, "negative must have 3 rows, like anchor, got 1"),
        (
            lambda x, y: fusedloss.triplet(x, x, x, backend="fast"),
            ValueError,
            "backend must be one of 'auto', 'cuda', 'triton', 'chunked', 'dense', 'reference', got 'fast'",
        ),
        (
            lambda x, y: fusedloss.cosine_similarity(x, x, y, loss="mae"),
            ValueError,
            "loss must be 'mse' or .*, got 'mae'",
        ),
        (
            lambda x, y: fusedloss.cosine_similarity(x, x, y, transform=2),
            TypeError,
            r"transform must be a function of a tensor \[B\] or None, got 2, an int",
        ),
        (
            lambda x, y: fusedloss.cosine_similarity(x, x, y, loss=nn.L1Loss(), reduction="sum"),
            ValueError,
            "reduction must be 'mean', the default, if loss is a function, got 'sum'",
        ),
        (
            lambda x, y: fusedloss.TripletLoss(Given()),
            TypeError,
            "distance must not be a model, got the nn.Module Given",
        ),
        (
            lambda x, y: fusedloss.CosineSimilarityLoss(Given()),
            TypeError,
            "loss must not be a model, got the nn.Module Given",
        ),
        (
            lambda x, y: fusedloss.TripletLoss(distance="squared"),
            ValueError,
            "distance must be one of.*, got 'squared'",
        ),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(3, 4), torch.tensor([1, 0, 1]))


def test_autocast_rounds_nothing():
    """As in the library, whose similarities are fp32 under autocast."""
    a, b, c = embeddings(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fusedloss.triplet(a, b.bfloat16(), c)
    torch.testing.assert_close(found, fusedloss.triplet(a, b.bfloat16().float(), c))


@pytest.mark.parametrize("backend", ["chunked", "reference", "triton"])
@pytest.mark.parametrize("name", ["cosine_similarity", "contrastive"])
def test_a_row_shorter_than_eps_has_the_derivative_of_its_value(name, backend):
    """`<a, b> / (1e-8 |b|)`: torch's cosine_similarity projects, as if the norm were not a constant there."""
    a, b = torch.randn(5, 8), torch.randn(5, 8)
    a[2] *= 1e-10 / a[2].norm()
    label = torch.full((5,), 0.25)  # a score, or a share of both of contrastive's terms

    def formula(a, b):
        cosine = (a / a.norm(dim=1, keepdim=True).clamp(min=1e-8) * b / b.norm(dim=1, keepdim=True)).sum(1)
        if name == "cosine_similarity":
            return (cosine - label).square().mean()
        return (label * (1 - cosine).square() + (1 - label) * (cosine - 0.5).relu().square()).mean() / 2

    ours = lambda a, b: getattr(fusedloss, name)(a, b, label, backend=backend)
    found = testing.value_and_gradients(ours, [a, b])
    exact = testing.value_and_gradients(formula, [a.double(), b.double()])
    assert exact[1][2].norm() > 1e6
    for x, y in zip(found, exact, strict=True):
        assert (x.double() - y).abs().max() <= 1e-6 * y.abs().max()
    assert (found[1][:2].double() - exact[1][:2]).abs().max() <= 1e-6
