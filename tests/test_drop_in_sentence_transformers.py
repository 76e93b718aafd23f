"""The drop-ins of sentence-transformers' losses: the library's numbers and gradients, over every option.

Each case is built twice, from the library's class and from ours, around a small encoder with the same weights; values
and the gradients of all parameters must agree, and the counter must say that fused code ran.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import math
import random
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

st = pytest.importorskip("sentence_transformers.base.losses.merged_forward", reason="sentence-transformers 6 is needed")

from sentence_transformers import util  # noqa: E402
from sentence_transformers.sentence_transformer import losses as stock  # noqa: E402
from sentence_transformers.sparse_encoder import losses as stock_sparse  # noqa: E402
from transformers import PreTrainedTokenizerBase  # noqa: E402

from fusedloss.integrations import calls  # noqa: E402
from fusedloss.integrations import sentence_transformers as fused  # noqa: E402
from fusedloss.integrations.sentence_transformers import sparse_encoder as fused_sparse  # noqa: E402

B, F, D = 7, 5, 8
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


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
    yield case("ContrastiveLoss", labels=lambda dtype: numbers(dtype, B))
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
        second = labels if labels is None or labels.dim() < 2 or "MSE" not in type(loss).__name__ else labels
        if type(loss).__name__ == "SparseMSELoss":
            second = [labels] * columns
        value = loss.compute_loss_from_embeddings(embeddings, second)
    else:
        value = loss(given, labels)
    total = sum(value.values()) if isinstance(value, dict) else value
    total.backward()
    grads = {name: p.grad for name, p in loss.named_parameters() if not name.startswith("guide")}
    return value, grads


def same(ours, theirs, dtype=torch.float64):
    """Of one size to rounding: of the tensor's largest number where it is a gradient."""
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "columns", "labels", "module", "options"), CASES)
def test_values_and_gradients_are_the_librarys(name, columns, labels, module, options, dtype):
    labels = labels(dtype) if callable(labels) else labels
    before = calls[f"sentence_transformers.{name}"]
    found, wanted = (
        run(build(library, name, dtype, **options), columns, labels, dtype, module == "sparse")
        for library in libraries(module)
    )
    assert calls[f"sentence_transformers.{name}"] > before
    same(found, wanted, dtype)
