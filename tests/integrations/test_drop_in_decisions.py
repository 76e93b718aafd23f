"""Every input of the decision to fuse is asked at every call: one module, a call, a change, a call, the change undone.

After each step the value and the gradients are the library's for the state of that moment, and the counter says whether
fused code ran.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from fusedloss.integrations import calls

pytestmark = pytest.mark.upstream

N, D = 8, 6


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Mine(torch.Tensor):
    """Any subclass of Tensor."""


class Encoder(nn.Sequential):
    max_seq_length = 8
    similarity_fn_name = None

    def __init__(self):
        super().__init__(nn.Identity())

    def forward(self, features):
        return {"sentence_embedding": features["input_ids"]}

    def get_embedding_dimension(self):
        return D


# Changes: what is changed, of the module or of the tensors, and whether fused code runs while it is ------------------


def reassigned(path, value, fused=True):
    """An attribute of the module, or of what it holds."""
    *owners, name = path.split(".")

    @contextlib.contextmanager
    def change(loss, tensors):
        for owner in owners:
            loss = getattr(loss, owner)
        before = getattr(loss, name)
        setattr(loss, name, value)
        yield tensors
        setattr(loss, name, before)

    shown = getattr(value, "__name__", None) or str(value)
    return pytest.param(change, fused, id=f"{path}={' '.join(shown.split())[:40]}-{'fused' if fused else 'stock'}")


def hooked(path, fused=False):
    """A forward hook that doubles the output, on a part of the module."""

    @contextlib.contextmanager
    def change(loss, tensors):
        part = loss.get_submodule(path)
        handle = part.register_forward_hook(lambda module, args, output: 2 * output)
        yield tensors
        handle.remove()

    return pytest.param(change, fused, id=f"a hook on {path}")


def replaced(path, name, value):
    """A method, by an attribute of the object; there is none before."""

    @contextlib.contextmanager
    def change(loss, tensors):
        part = loss.get_submodule(path)
        setattr(part, name, value.__get__(part))
        yield tensors
        delattr(part, name)

    return pytest.param(change, False, id=f"own {path}.{name}")


def of_a_subclass(name, value):
    """The object becomes one of a subclass that overrides a method."""

    @contextlib.contextmanager
    def change(loss, tensors):
        kind = type(loss)
        loss.__class__ = type(kind.__name__, (kind,), {name: value})
        yield tensors
        loss.__class__ = kind

    return pytest.param(change, False, id=f"a subclass with its own {name}")


def given(what, function, fused=True, which=slice(None)):
    """Other tensors: `function` of those in `which`."""

    @contextlib.contextmanager
    def change(loss, tensors):
        tensors = list(tensors)
        tensors[which] = [function(x) if isinstance(x, torch.Tensor) else x for x in tensors[which]]
        yield tensors

    return pytest.param(change, fused, id=what)


@contextlib.contextmanager
def _autocast(loss, tensors):
    with torch.autocast("cpu", torch.bfloat16):
        yield tensors


@contextlib.contextmanager
def _disabled(loss, tensors):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSEDLOSS_DISABLE", "1")
        yield tensors


double = lambda x: x.detach().double().requires_grad_() if x.is_floating_point() else x
ALWAYS = [
    given("fp64", double),
    given("no gradients", torch.Tensor.detach),
    pytest.param(_autocast, True, id="autocast"),
    pytest.param(_disabled, False, id="FUSEDLOSS_DISABLE"),
]


def same(ours, theirs, tensors, name, fused, coarse):
    before, found = calls[name], []
    for call in (ours, theirs):
        value = call(tensors)
        leaves = [x for x in tensors if isinstance(x, torch.Tensor) and x.requires_grad]
        assert value.requires_grad or not leaves
        gradients = torch.autograd.grad(value, leaves, allow_unused=True) if leaves else []
        found.append([value.detach(), *(g for g in gradients if g is not None)])
    assert calls[name] == before + fused
    tolerance = dict(rtol=0.03, atol=0.03) if coarse else dict(rtol=2e-5, atol=2e-6)
    for own, wanted in zip(*found, strict=True):
        torch.testing.assert_close(own.to_dense().double(), wanted.to_dense().double(), **tolerance)
    return found[0][0]


def check(name, make, stage, tensors, change, fused):
    """make: the loss of ours (True) or theirs; stage: its value for the tensors."""
    ours, theirs = make(True), make(False)
    run = lambda tensors, fused=True, coarse=False: same(
        lambda x: stage(ours, x), lambda x: stage(theirs, x), tensors, name, fused, coarse
    )
    first = run(tensors)
    with change(ours, tensors), change(theirs, tensors) as changed:
        run(changed, fused, coarse=change is _autocast)
    assert run(tensors).equal(first)


# sentence-transformers ------------------------------------------------------------------------------------------------


def sentence(name, columns, labels, changes, **options):
    return [pytest.param(name, columns, labels, options, *c.values, id=f"{name}-{c.id}") for c in [*ALWAYS, *changes]]


def criterion(path, **changed):
    return [reassigned(f"{path}.{name}", value, False) for name, value in changed.items()] + [hooked(path)]


def sentence_cases():
    util = pytest.importorskip("sentence_transformers.util")
    similarities = [
        reassigned("similarity_fct", util.pairwise_dot_score),
        reassigned("similarity_fct", lambda a, b: util.pairwise_cos_sim(a, b) / 2, False),
    ]
    embeddings = [
        given(
            "a subclass of Tensor", lambda x: x.as_subclass(Mine) if x.is_floating_point() else x, False, slice(0, 2)
        ),
        given("back", lambda x: x),
    ]
    binary, real = torch.arange(N) % 2, numbers(9, N).sigmoid()
    yield from sentence(
        "MultipleNegativesRankingLoss",
        3,
        None,
        [
            *embeddings,
            given("more documents", lambda x: torch.cat([x, x + 1]), True, slice(1, 3)),
            reassigned("scale", 5.0),
            reassigned("scale", 1),
            reassigned("scale", True, False),
            reassigned("scale", torch.tensor(3.0)),
            reassigned("scale", -2.0, False),
            reassigned("similarity_fct", util.dot_score),
            reassigned("similarity_fct", lambda a, b: util.cos_sim(a, b) / 2, False),
            reassigned("directions", ("query_to_doc", "doc_to_query")),
            reassigned("partition_mode", "per_direction"),
            reassigned("hardness_mode", "hard_negatives"),
            reassigned("hardness_strength", 3.0),
        ],
    )
    yield from sentence(
        "MultipleNegativesRankingLoss",
        3,
        None,
        [
            reassigned("hardness_strength", 0.0),
            reassigned("hardness_strength", 9),
            reassigned("hardness_mode", None),
            reassigned("hardness_mode", "all_negatives"),
        ],
        hardness_mode="in_batch_negatives",
        hardness_strength=2.0,
    )
    for name in ("ContrastiveLoss", "OnlineContrastiveLoss"):
        losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
        yield from sentence(
            name,
            2,
            binary,
            [
                *embeddings,
                reassigned("margin", 0.9),
                reassigned("margin", torch.tensor(0.9), False),
                reassigned("distance_metric", losses.SiameseDistanceMetric.EUCLIDEAN),
                reassigned("distance_metric", lambda a, b: (a - b).square().sum(1), False),
                given("labels below 0", lambda y: 2 * y - 1, False, slice(2, 3)),
                given("floating labels", torch.Tensor.float, True, slice(2, 3)),
                *([reassigned("size_average", False)] if name == "ContrastiveLoss" else []),
            ],
        )
    yield from sentence("CosineSimilarityLoss", 2, real, [*embeddings, reassigned("loss_fct", nn.L1Loss())])
    scale = [reassigned("scale", 3.0), reassigned("scale", True, False), reassigned("scale", -1.0, False)]
    yield from sentence("CoSENTLoss", 2, real, [*embeddings, *scale, similarities[1]])
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    yield from sentence(
        "TripletLoss",
        3,
        None,
        [
            *embeddings,
            reassigned("triplet_margin", 0.5),
            reassigned("triplet_margin", True, False),
            reassigned("distance_metric", losses.TripletDistanceMetric.COSINE),
            reassigned("distance_metric", lambda a, b: (a - b).square().sum(1), False),
        ],
    )
    squares = criterion("loss_fct", reduction="sum")
    yield from sentence("MarginMSELoss", 3, real, [*embeddings, *squares, *similarities])
    teacher = numbers(9, N, 2)
    temperatures = [
        reassigned(f"{who}_temperature", value, fused)
        for who in ("student", "teacher")
        for value, fused in ((2.0, True), (torch.tensor(2.0), False))
    ]
    divergence = criterion("loss_fct", reduction="sum")
    yield from sentence("DistillKLDivLoss", 3, teacher, [*embeddings, *divergence, *similarities, *temperatures])


@pytest.mark.parametrize(("name", "columns", "labels", "options", "change", "fused"), [*sentence_cases()])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sentence_transformers(name, columns, labels, options, change, fused):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    from fusedloss.integrations import sentence_transformers as own

    tensors = [numbers(i, N, D).requires_grad_() for i in range(columns)] + [labels]
    stage = lambda loss, x: loss.compute_loss_from_embeddings(x[:-1], x[-1]).sum()
    make = lambda ours: getattr(own if ours else losses, name)(Encoder(), **options)
    check(f"sentence_transformers.{name}", make, stage, tensors, change, fused)


def test_sparse_embeddings_run_the_librarys_code():
    """Which has no gradients of sparse columns that it concatenates: its error is told, and the next call is fused."""
    pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    from fusedloss.integrations import sentence_transformers as own

    loss, name = own.MultipleNegativesRankingLoss(Encoder()), "sentence_transformers.MultipleNegativesRankingLoss"
    columns = [numbers(i, N, D) for i in range(2)]
    before = calls[name]
    first = loss.compute_loss_from_embeddings(columns, None)
    with pytest.raises(NotImplementedError):
        loss.compute_loss_from_embeddings([x.to_sparse() for x in columns], None)
    assert loss.compute_loss_from_embeddings(columns, None).equal(first) and calls[name] == before + 2


# sentence-transformers' cross-encoders --------------------------------------------------------------------------------


class Scores(nn.Module):
    """Stands in for a cross-encoder: hands out the scores that it is given."""

    device, num_labels = torch.device("cpu"), 1

    def __init__(self):
        super().__init__()
        self.scores = None

    def preprocess(self, pairs, prompt=None, task=None):
        return {}

    def forward(self, features):
        return {"scores": self.scores}


def crossed(name, labels, changes, always=ALWAYS):
    return [pytest.param(name, labels, *c.values, id=f"{name}-{c.id}") for c in [*always, *changes]]


CRITERION = "bce_with_logits_loss"
CROSSED = [
    *crossed(
        "BinaryCrossEntropyLoss",
        numbers(3, N).sigmoid(),
        [
            reassigned(f"{CRITERION}.reduction", "sum"),
            reassigned(f"{CRITERION}.pos_weight", torch.tensor(3.0)),
            hooked(CRITERION),
            given("fp64 labels", torch.Tensor.double, True, slice(1, 2)),
        ],
        [c for c in ALWAYS if c.id != "autocast"],  # of the model, here nothing
    ),
    *crossed("MSELoss", numbers(3, N), [reassigned("loss_fct.reduction", "sum"), hooked("loss_fct")], ALWAYS[1:2]),
]


@pytest.mark.parametrize(("name", "labels", "change", "fused"), CROSSED)
def test_cross_encoders(name, labels, change, fused):
    losses = pytest.importorskip("sentence_transformers.cross_encoder.losses")
    from fusedloss.integrations.sentence_transformers import cross_encoder as own

    def make(ours):
        with pytest.MonkeyPatch.context() as patch:  # the constructors accept nothing but a CrossEncoder
            for module in {losses.BinaryCrossEntropyLoss.__module__, losses.MSELoss.__module__}:
                patch.setattr(f"{module}.CrossEncoder", Scores)
            return getattr(own if ours else losses, name)(Scores())

    def stage(loss, tensors):
        loss.model.scores, labels = tensors
        return loss([["a"] * N, ["b"] * N], labels)

    tensors = [numbers(0, N, 1).requires_grad_(), labels]
    check(f"sentence_transformers.cross_encoder.{name}", make, stage, tensors, change, fused)


# open_clip, lightly and pytorch-metric-learning -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "fused"),
    [
        *ALWAYS,
        replaced("", "get_logits", lambda self, image, text, scale, logit_bias=None: (image @ text.T, text @ image.T)),
        of_a_subclass("get_ground_truth", lambda self, device, rows: torch.arange(rows).flip(0)),
        reassigned("cache_labels", True),
        given("a scale beyond fp32", lambda scale: torch.zeros_like(scale), True, slice(2, 3)),
        given("a number as scale", lambda scale: 3.0, True, slice(2, 3)),
        given("more texts than images", lambda text: text, True, slice(1, 2)),
    ],
)
def test_open_clip(change, fused):
    losses = pytest.importorskip("open_clip.loss")
    from fusedloss.integrations import open_clip as own

    image, text = (nn.functional.normalize(numbers(i, N, D)).requires_grad_() for i in range(2))
    tensors = [image, text, torch.tensor(5.0, requires_grad=True)]
    make = lambda ours: (own if ours else losses).ClipLoss()
    check("open_clip.ClipLoss", make, lambda loss, x: loss(*x), tensors, change, fused)


def lightly(name, changes):
    return [pytest.param(name, *c.values, id=f"{name}-{c.id}") for c in [*ALWAYS, *changes]]


@pytest.mark.parametrize(
    ("name", "change", "fused"),
    [
        *lightly(
            "NTXentLoss",
            [
                reassigned("temperature", 0.2),
                reassigned("temperature", -0.5, False),
                reassigned("temperature", True, False),
                reassigned("cross_entropy.label_smoothing", 0.1, False),
                reassigned("cross_entropy", nn.CrossEntropyLoss(reduction="sum"), False),
                hooked("cross_entropy"),
            ],
        ),
        *lightly(
            "DCLLoss",
            [
                reassigned("temperature", 0.2),
                reassigned("weight_fn", lambda a, b: (a * b).sum(1).exp()),
                of_a_subclass("_loss", lambda self, a, b, *others: (a - b).square().sum()),
                replaced("", "_loss", lambda self, a, b, *others: (a - b).square().sum()),
            ],
        ),
    ],
)
def test_lightly(name, change, fused):
    losses = pytest.importorskip("lightly.loss")
    from fusedloss.integrations import lightly as own

    tensors = [numbers(i, N, D).requires_grad_() for i in range(2)]
    make = lambda ours: getattr(own if ours else losses, name)()
    check(f"lightly.{name}", make, lambda loss, x: loss(*x), tensors, change, fused)


LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1])


def metric(name, changes, always=ALWAYS, **options):
    return [pytest.param(name, options, *c.values, id=f"{name}-{c.id}") for c in [*always, *changes]]


def metric_cases():
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")
    of_the_distance = [
        reassigned("distance", distances.DotProductSimilarity(normalize_embeddings=False)),
        reassigned("distance", distances.SNRDistance(), False),
        reassigned("distance.power", 2, False),
        reassigned("distance.normalize_embeddings", False),
        hooked("distance"),
        replaced("distance", "compute_mat", lambda self, x, y: x @ y.T / 2),
    ]
    others = [given("floating labels", torch.Tensor.double, False, slice(1, 2))]
    always = [c for c in ALWAYS if c.id != "autocast"]  # at N = 8 the library's own rounding is above the bound
    own = [reassigned("temperature", 0.2), reassigned("temperature", -0.2, False)]
    yield from metric("SupConLoss", [*of_the_distance, *others, *own, replaced("", "_compute_loss", _halved)], always)
    yield from metric(
        "MultiSimilarityLoss",
        [reassigned("alpha", 1.0), reassigned("base", 0.3), reassigned("beta", True, False)],
        always,
    )
    yield from metric(
        "CircleLoss",
        [
            reassigned("gamma", 20.0),
            reassigned("op", 1.1, False),
            reassigned("soft_plus.beta", 2, False),
            reassigned("soft_plus.threshold", 1, False),
            hooked("soft_plus"),
        ],
        always,
    )
    yield from metric(
        "TripletMarginLoss",
        [
            reassigned("margin", 0.3),
            reassigned("swap", True, False),
            reassigned("smooth_loss", True, False),
            reassigned("reducer", reducers.SumReducer()),
            reassigned("reducer", reducers.ThresholdReducer(low=0.01), False),
            hooked("distance"),
        ],
        always,
    )
    yield from metric("ContrastiveLoss", [reassigned("pos_margin", 0.1), reassigned("neg_margin", 0.8)], always)
    yield from metric(
        "ArcFaceLoss",
        [
            reassigned("scale", 16.0),
            reassigned("scale", -16.0, False),
            reassigned("margin", 0.2),
            reassigned("margin", -0.2, False),
            reassigned("cross_entropy.label_smoothing", 0.1, False),
            hooked("cross_entropy"),
            replaced("", "get_angles", lambda self, cosine: cosine),
        ],
        [c for c in always if c.id != "fp64"],  # casts the parameters for good
        num_classes=3,
        embedding_size=D,
    )


def _halved(self, matrix, *masks):
    return {"loss": {"losses": matrix.diagonal() / 2, "indices": torch.arange(N), "reduction_type": "element"}}


@pytest.mark.parametrize(("name", "options", "change", "fused"), [*metric_cases()])
def test_pytorch_metric_learning(name, options, change, fused):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    from fusedloss.integrations import pytorch_metric_learning as own

    def make(ours):
        torch.manual_seed(0)
        return getattr(own if ours else losses, name)(**options)

    tensors = [numbers(0, N, D).requires_grad_(), LABELS]
    check(f"pytorch_metric_learning.{name}", make, lambda loss, x: loss(*x), tensors, change, fused)
