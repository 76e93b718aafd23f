"""The in-batch family against the libraries whose names it bears, and against formulas in this file.

In fp64 both agree to rounding. A library that is not installed leaves its formula.
"""

from __future__ import annotations

import inspect
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import fusedloss
from fusedloss import masks, testing

BACKENDS = ["chunked", "reference"]
ALL = [*BACKENDS, "triton"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several row chunks and column tiles at tens of rows, so that blocks are cut at their borders."""
    from fusedloss import sweep
    from fusedloss.backends import chunked

    monkeypatch.setattr(sweep, "chunk_rows", lambda M, *_: min(M, 5))
    monkeypatch.setattr(sweep, "STATS_ROWS", {"cpu": 4, "cuda": 4})
    monkeypatch.setattr(sweep, "CONVERTED_COLUMNS", 7)
    monkeypatch.setattr(chunked, "TILE_COLUMNS", 7)


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def close(found, wanted, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(found, torch.as_tensor(wanted).to(found), rtol=rtol, atol=atol)


def same(ours, theirs, tensors, **tolerance):
    """Value and all gradients."""
    found, wanted = (testing.value_and_gradients(f, tensors) for f in (ours, theirs))
    for one, other in zip(found, wanted, strict=True):
        close(one, other, **tolerance)


def rows_same(ours, formula, tensors, **tolerance):
    """A loss for each row: each with an upstream gradient of its own."""
    upstream = torch.rand(formula(*tensors).shape, dtype=torch.float64) + 0.5
    close(ours(*tensors), formula(*tensors), **tolerance)
    same(*(lambda *t, f=f: (f(*t) * upstream).sum() for f in (ours, formula)), tensors, **tolerance)


def similarities(x, y, how="cos"):
    if how == "cos":
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    return x @ y.T


# Multiple negatives ranking -------------------------------------------------------------------------------------------

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
SUBSETS = [("query_to_doc", *others) for count in range(4) for others in itertools.combinations(DIRECTIONS[1:], count)]
SPLIT = [("query_to_doc",), ("query_to_doc", "doc_to_query")]
ACCEPTED = [(some, "joint") for some in SUBSETS] + [(some, "per_direction") for some in SPLIT]
HARDNESS = [None, "in_batch_negatives", "hard_negatives", "all_negatives"]


def ranking_rows(anchor, positive, *negatives, scale, similarity, directions, partition_mode, mode, strength):
    """Loss of each anchor, from its set of (logit) columns for every direction."""
    B, documents, rows = len(anchor), [positive, *negatives], []
    s = lambda x, y: similarities(x, y, similarity)
    for i in range(B):
        sets = {name: [] for name in directions}
        for number, column in enumerate(documents):
            to_doc, doc_to_doc = s(anchor[i : i + 1], column)[0], s(positive[i : i + 1], column)[0]
            for j in range(len(column)):
                hard = j == i and number > 0 and mode in ("hard_negatives", "all_negatives")
                in_batch = j != i and mode in ("in_batch_negatives", "all_negatives")
                penalty = strength * to_doc[j].detach() if hard or in_batch else 0
                sets["query_to_doc"].append(scale * to_doc[j] + penalty)
                if "doc_to_doc" in sets and j != i:
                    sets["doc_to_doc"].append(scale * doc_to_doc[j])
        for j in range(B):
            if "query_to_query" in sets and j != i:
                sets["query_to_query"].append(scale * s(anchor[i : i + 1], anchor)[0, j])
            if "doc_to_query" in sets:
                sets["doc_to_query"].append(scale * s(positive[i : i + 1], anchor)[0, j])
        if partition_mode == "joint":
            normalisers = [torch.stack(sum(sets.values(), [])).logsumexp(0)]
        else:
            normalisers = [torch.stack(columns).logsumexp(0) for columns in sets.values()]
        rows.append(sum(normalisers) / len(normalisers) - sets["query_to_doc"][i])
    return torch.stack(rows)


@pytest.mark.parametrize("directions, partition_mode", ACCEPTED, ids=lambda x: x if isinstance(x, str) else "+".join(x))
@pytest.mark.parametrize("mode", HARDNESS)
@pytest.mark.parametrize("columns", [0, 1, 2])
@pytest.mark.parametrize("similarity", ["cos", "dot"])
def test_ranking_is_sentence_transformers(directions, partition_mode, mode, columns, similarity):
    """All that its constructor accepts, for a batch and for one pair."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.util import cos_sim, dot_score

    strength = 0.7 if mode else 0.0
    theirs = MultipleNegativesRankingLoss(
        torch.nn.Identity(),
        scale=4.0,
        similarity_fct={"cos": cos_sim, "dot": dot_score}[similarity],
        directions=directions,
        partition_mode=partition_mode,
        hardness_mode=mode,
        hardness_strength=strength,
    )
    for rows in (8, 1):
        tensors = [randn(rows, 4) for _ in range(2 + columns)]
        for backend in BACKENDS:
            ours = lambda *t, backend=backend: fusedloss.multiple_negatives_ranking(
                *t,
                scale=4.0,
                similarity=similarity,
                directions=directions,
                partition_mode=partition_mode,
                hardness_mode=mode,
                hardness_strength=strength,
                backend=backend,
            )
            same(ours, lambda *t: theirs.compute_loss_from_embeddings(list(t), None), tensors)


@pytest.mark.parametrize("directions, partition_mode", ACCEPTED, ids=lambda x: x if isinstance(x, str) else "+".join(x))
@pytest.mark.parametrize("mode", HARDNESS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ranking_is_its_formula(directions, partition_mode, mode, backend):
    """By row, and with the gradient of a learnt scale, which upstream's number does not have."""
    tensors = [randn(7, 4), randn(7, 4), randn(7, 4), torch.tensor(3.0, dtype=torch.float64)]
    chosen = {"directions": directions, "partition_mode": partition_mode, "similarity": "cos"}
    ours = lambda *t: fusedloss.multiple_negatives_ranking(
        *t[:-1], scale=t[-1], hardness_mode=mode, hardness_strength=0.9, reduction="none", backend=backend, **chosen
    )
    rows_same(ours, lambda *t: ranking_rows(*t[:-1], scale=t[-1], mode=mode, strength=0.9, **chosen), tensors)


@pytest.mark.parametrize(
    "directions, partition_mode, mode",
    [
        (SUBSETS[-1], "joint", "all_negatives"),
        (SPLIT[1], "per_direction", None),
        (SPLIT[1], "per_direction", HARDNESS[1]),
    ],
)
def test_ranking_in_triton(directions, partition_mode, mode):
    tensors = [randn(21, 8).float() for _ in range(3)]
    chosen = {"directions": directions, "partition_mode": partition_mode, "similarity": "cos", "scale": 5.0}
    found = testing.value_and_gradients(
        lambda *t: fusedloss.multiple_negatives_ranking(
            *t, hardness_mode=mode, hardness_strength=2.0, backend="triton", **chosen
        ),
        tensors,
    )
    wanted = testing.value_and_gradients(
        lambda *t: ranking_rows(*t, mode=mode, strength=2.0, **chosen).mean(), [t.double() for t in tensors]
    )
    for one, other in zip(found, wanted, strict=True):
        close(one.double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", list(itertools.permutations(SUBSETS[-1]))[::5])
def test_directions_are_a_set(order):
    """Any order and any sequence."""
    tensors = [randn(6, 4) for _ in range(3)]
    wanted = fusedloss.multiple_negatives_ranking(*tensors, directions=SUBSETS[-1])
    close(fusedloss.multiple_negatives_ranking(*tensors, directions=list(order)), wanted)


# GISTEmbed ------------------------------------------------------------------------------------------------------------

FLAGS = list(itertools.product([True, False], repeat=2))
MARGINS = [0.0, 0.15, -0.2, 2.5, -2.5]


def gist_rows(texts, guides, temperature, strategy, margin, anchors, positives):
    """Loss of each anchor. Nothing drops a row's pair with itself but the guide."""
    pairs = [(0, 1)] + [(0, 0)] * anchors + [(1, 1)] * positives + [(0, k) for k in range(2, len(texts))]
    own = [similarities(guides[0][i : i + 1], guides[1][i : i + 1])[0, 0] for i in range(len(texts[0]))]
    rows = []
    for i, t in enumerate(own):
        threshold = t - margin if strategy == "absolute" else t - t.abs() * margin
        columns, positive = [], None
        for x, y in pairs:
            model, guide = (similarities(e[x][i : i + 1], e[y])[0] for e in (texts, guides))
            for j in range(len(model)):
                is_positive = (x, y) == (0, 1) and j == i
                if is_positive:
                    positive = model[j] / temperature
                if is_positive or guide[j] <= threshold:
                    columns.append(model[j] / temperature)
        rows.append(torch.stack(columns).logsumexp(0) - positive)
    return torch.stack(rows)


def tokenizer():
    from transformers import PreTrainedTokenizerBase

    class Tokenizer(PreTrainedTokenizerBase):
        def __init__(self):
            pass

        def get_vocab(self):
            return {}

    return Tokenizer()


class Encoder(torch.nn.Module):
    """Stands for a model: its embeddings are in the features."""

    def __init__(self, name):
        super().__init__()
        self.name, self.tokenizer, self.max_seq_length = name, tokenizer(), 8

    def __getitem__(self, index):
        return self

    def forward(self, features):
        return {"sentence_embedding": features[self.name]}


def upstream_gist(kind, guides, **options):
    """sentence-transformers' own loss as a function of embeddings."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import losses

    if kind == "CachedGISTEmbedLoss":
        loss = losses.CachedGISTEmbedLoss(Encoder("model"), Encoder("guide"), mini_batch_size=3, **options)
        return lambda *texts: loss.calculate_loss([list(x.split(3)) for x in texts], [list(g.split(3)) for g in guides])
    loss = losses.GISTEmbedLoss(Encoder("model"), Encoder("guide"), **options)
    return lambda *texts: loss([{"model": x, "guide": g} for x, g in zip(texts, guides, strict=True)], None)


def gist_case(columns, rows=8, dtype=torch.float64):
    """Guides that agree with the texts' pairing, more or less: some negatives lie above, some below."""
    texts = [randn(rows, 5).to(dtype) for _ in range(2 + columns)]
    guides = [randn(rows, 3).to(dtype) for _ in range(2 + columns)]
    guides[1] += guides[0] * 0.7
    return texts, guides


@pytest.mark.parametrize("kind, columns", [("GISTEmbedLoss", 0), ("GISTEmbedLoss", 1), ("CachedGISTEmbedLoss", 2)])
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("margin_strategy", ["absolute", "relative"])
@pytest.mark.parametrize("contrast_anchors, contrast_positives", FLAGS)
def test_gist_is_sentence_transformers(kind, columns, margin, margin_strategy, contrast_anchors, contrast_positives):
    options = {
        "temperature": 0.2,
        "margin_strategy": margin_strategy,
        "margin": margin,
        "contrast_anchors": contrast_anchors,
        "contrast_positives": contrast_positives,
    }
    texts, guides = gist_case(columns)
    theirs = upstream_gist(kind, guides, **options)
    for backend in BACKENDS:
        ours = lambda *t, backend=backend: fusedloss.gist_embed(*t, guide=guides, backend=backend, **options)
        same(ours, theirs, texts)


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("strategy", ["absolute", "relative"])
@pytest.mark.parametrize("columns", [0, 1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gist_is_its_formula(margin, strategy, columns, backend):
    """By row, and with the gradient of a learnt temperature."""
    for anchors, positives in FLAGS:
        texts, guides = gist_case(columns, rows=7)
        ours = lambda *t, a=anchors, p=positives, g=guides: fusedloss.gist_embed(
            *t[:-1],
            guide=g,
            temperature=t[-1],
            margin_strategy=strategy,
            margin=margin,
            contrast_anchors=a,
            contrast_positives=p,
            reduction="none",
            backend=backend,
        )
        formula = lambda *t, a=anchors, p=positives, g=guides: gist_rows(t[:-1], g, t[-1], strategy, margin, a, p)
        rows_same(ours, formula, [*texts, torch.tensor(0.3, dtype=torch.float64)])


@pytest.mark.parametrize("margin", [0.0, 0.3, -3.0])
def test_gist_in_triton(margin):
    texts, guides = gist_case(1, rows=21, dtype=torch.float32)
    ours = lambda *t: fusedloss.gist_embed(*t, guide=guides, temperature=0.2, margin=margin, backend="triton")
    found = testing.value_and_gradients(ours, texts)
    doubles = [g.double() for g in guides]
    wanted = testing.value_and_gradients(
        lambda *t: gist_rows(t, doubles, 0.2, "absolute", margin, True, True).mean(), [t.double() for t in texts]
    )
    for one, other in zip(found, wanted, strict=True):
        close(one.double(), other, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ALL)
def test_gist_keeps_the_pairs_of_rows_with_themselves_where_the_guide_takes_a_pair_for_one(backend):
    """guide(a) == guide(p): the threshold is 1, and no cosine is larger. Nothing else would drop those pairs; with
    embeddings of 0 the loss is the log of how many columns compete."""
    guide = torch.randn(9, 6)
    blank = torch.zeros(9, 4)
    for anchors, positives in FLAGS:
        chosen = {"contrast_anchors": anchors, "contrast_positives": positives, "reduction": "none", "backend": backend}
        rows = fusedloss.gist_embed(blank, blank, guide=(guide, guide.clone()), **chosen)
        close(rows.exp(), torch.full((9,), 9.0 * (1 + anchors + positives)), rtol=1e-5)
        rows = fusedloss.gist_embed(blank, blank, guide=(guide, guide.clone()), margin=1e-4, **chosen)
        close(rows.exp(), torch.full((9,), 9.0 + 8 * (anchors + positives)), rtol=1e-5)
