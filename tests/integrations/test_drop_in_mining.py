"""mine_hard_negatives: the library's rows for every option and output format, without queries x corpus scores."""

from __future__ import annotations

import inspect
import itertools
import logging
import random
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("sentence_transformers.base.losses.merged_forward", reason="sentence-transformers 6 is needed")
datasets = pytest.importorskip("datasets")

from sentence_transformers import SentenceTransformer, util  # noqa: E402
from sentence_transformers.util import mine_hard_negatives as stock  # noqa: E402

from fusedloss.integrations import Patch, calls  # noqa: E402
from fusedloss.integrations.sentence_transformers import mining  # noqa: E402

pytestmark = pytest.mark.upstream

NAME = mining.NAME
QUERIES, PASSAGES, D = 90, 240, 24


class Texts(nn.Module):
    """Looks a text's embedding up by the text: a seed of its own, so that no two texts are equally similar."""

    def __init__(self, dim=D):
        super().__init__()
        self.dim = dim
        self.register_buffer("nothing", torch.zeros(1))

    def tokenize(self, texts, **kwargs):
        return {"seed": torch.tensor([hash_of(text) for text in texts])}

    preprocess = tokenize

    def forward(self, features, **kwargs):
        rows = [torch.randn(self.dim, generator=torch.Generator().manual_seed(int(s))) for s in features["seed"]]
        return {**features, "sentence_embedding": torch.stack(rows) + 0.3}

    def get_sentence_embedding_dimension(self):
        return self.dim

    get_embedding_dimension = get_sentence_embedding_dimension

    def save(self, *args, **kwargs):
        pass


def hash_of(text):
    return sum(byte * 257**i for i, byte in enumerate(text.encode())) % 2**31


def model_of(similarity="cosine", **kwargs):
    return SentenceTransformer(modules=[Texts()], similarity_fn_name=similarity, device="cpu", **kwargs)


@pytest.fixture(scope="module")
def model():
    return model_of(prompts={"query": "query: ", "passage": "passage: "})


@pytest.fixture(scope="module")
def pairs():
    """Some queries have several passages, and some passages several queries."""
    rows = [(f"q{i % QUERIES}", f"p{i * 7 % PASSAGES}") for i in range(120)]
    return datasets.Dataset.from_dict({"question": [q for q, _ in rows], "answer": [p for _, p in rows]})


class Reranker:
    """A cross-encoder of which `predict` is all that is called; no two scores are equal, whose order the library leaves
    open.
    """

    def predict(self, sentences, convert_to_tensor=True, **kwargs):
        seeds = [hash_of(query + passage) % 2**24 for query, passage in sentences]
        return torch.tensor(seeds) / 2**24


def same(model, pairs, capsys=None, fused=True, **options):
    """The library's rows, what it prints, and what it leaves in `random`; scores to the rounding of fp32."""
    outcomes, printed, before = [], [], calls[NAME]
    for mine in (stock, mining.mine_hard_negatives):
        random.seed(3)
        outcomes.append((mine(pairs, model, **options), random.random()))
        printed.append(capsys.readouterr().out if capsys else "")
    (theirs, state), (ours, our_state) = outcomes
    assert state == our_state and ours.features == theirs.features and len(ours) == len(theirs)
    for column in theirs.column_names:
        if "score" in column:
            torch.testing.assert_close(flat(ours[column]), flat(theirs[column]), rtol=1e-5, atol=1e-6)
        else:
            assert ours[column][:] == theirs[column][:], column
    assert printed[0] == printed[1]
    assert calls[NAME] == before + fused
    return theirs


def flat(rows):
    return torch.tensor(list(itertools.chain.from_iterable(r if isinstance(r, list) else [r] for r in rows)))


CORPUS = [f"p{i}" for i in range(PASSAGES)]
FORMATS = ["triplet", "n-tuple", "n-tuple-scores", "labeled-pair", "labeled-list"]
OPTIONS = {
    "defaults": {},
    "corpus": {"corpus": CORPUS},
    "range": {"corpus": CORPUS, "range_min": 5, "range_max": 30},
    "range beyond the corpus": {"corpus": CORPUS, "range_min": 3, "range_max": 1000},
    "max_score": {"corpus": CORPUS, "max_score": 0.4},
    "min_score": {"corpus": CORPUS, "min_score": 0.2, "num_negatives": 9},
    "absolute_margin": {"corpus": CORPUS, "absolute_margin": 0.05},
    "relative_margin": {"corpus": CORPUS, "relative_margin": 0.1},
    "margin, deprecated": {"corpus": CORPUS, "margin": 0.02},
    "random": {"corpus": CORPUS, "sampling_strategy": "random", "range_max": 40},
    "random with margins": {"corpus": CORPUS, "sampling_strategy": "random", "max_score": 0.5, "relative_margin": 0.0},
    "queries in batches": {"corpus": CORPUS, "faiss_batch_size": 32},
    "one negative": {"corpus": CORPUS, "num_negatives": 1, "batch_size": 7},
}


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_librarys_rows(model, pairs, options, output_format, capsys):
    for output_scores in (False, True):
        found = same(model, pairs, capsys, **options, output_format=output_format, output_scores=output_scores)
    assert len(found)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan"])
def test_every_similarity_of_the_library(pairs, similarity):
    same(model_of(similarity), pairs, corpus=CORPUS, output_scores=True, verbose=False)


OTHERS = {
    "include_positives": {"include_positives": True},
    "include_positives in a range": {"include_positives": True, "range_max": 20, "output_format": "triplet"},
    "as_triplets": {"as_triplets": False},
    "prompt names": {"query_prompt_name": "query", "corpus_prompt_name": "passage"},
    "prompts": {"query_prompt": "Q ", "corpus_prompt": "P "},
    "columns": {"anchor_column_name": "answer", "positive_column_name": "question", "corpus": None},
    "a reranker": {"cross_encoder": Reranker(), "absolute_margin": 0.0, "output_scores": True},
    "a reranker and a minimum": {"cross_encoder": Reranker(), "min_score": 0.2, "output_format": "labeled-pair"},
    "a reranker and a range": {"cross_encoder": Reranker(), "relative_margin": 0.1, "range_max": 25},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_the_other_options(model, pairs, options, capsys):
    same(model, pairs, capsys, **{"corpus": CORPUS, **options})


def test_the_cache_is_the_librarys(model, pairs, tmp_path):
    mine = mining.mine_hard_negatives
    first = mine(pairs, model, corpus=CORPUS, cache_folder=str(tmp_path), verbose=False)
    assert len(list(tmp_path.glob("*_embeddings_*.npy"))) == 2
    for function in (stock, mine):
        assert function(pairs, model, corpus=CORPUS, cache_folder=str(tmp_path), verbose=False)[:] == first[:]


def test_signature_and_errors(model, pairs):
    mine = mining.mine_hard_negatives
    assert inspect.signature(mine) == inspect.signature(stock) and mine.__name__ == stock.__name__
    for options in (
        {"num_negatives": 0},
        {"range_min": -1},
        {"range_min": 5, "range_max": 5},
        {"output_format": "pairs"},
        {"faiss_batch_size": 0},
        {"unknown": 1},
    ):
        with pytest.raises((ValueError, TypeError)) as theirs:
            stock(pairs, model, **options)
        with pytest.raises(theirs.type) as ours:
            mine(pairs, model, **options)
        assert str(ours.value) == str(theirs.value)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'model'"):
        mine(pairs)


class Own(SentenceTransformer):
    def similarity(self, a, b):
        return util.cos_sim(a, b) ** 3


def test_an_own_similarity_runs_the_librarys_search(pairs, caplog, monkeypatch):
    monkeypatch.setattr("fusedloss.integrations._drop_in._warned", set())
    with caplog.at_level(logging.WARNING, logger="fusedloss"):
        for _ in range(2):
            same(Own(modules=[Texts()], device="cpu"), pairs, fused=False, corpus=CORPUS, faiss_batch_size=40)
    assert [record.message for record in caplog.records].count(
        f"{NAME} runs the library's own code, because its similarity is none of "
        "cos_sim, dot_score, euclidean_sim, manhattan_sim, pytorch_cos_sim"
    ) == 1


def test_autocast_runs_the_librarys_search(model, pairs):
    with torch.autocast("cpu", torch.bfloat16):
        same(model, pairs, fused=False, corpus=CORPUS[:20], verbose=False, output_format="n-tuple")


def test_faiss_is_left_to_the_library(model, pairs, monkeypatch):
    """A stand-in for the package: an index that searches by a matrix."""

    class Index:
        def __init__(self, dim):
            self.dim = dim

        def add(self, corpus):
            self.corpus = torch.from_numpy(corpus)

        def search(self, query, k):
            values, indices = (torch.from_numpy(query) @ self.corpus.T).topk(k)
            return values.numpy(), indices.numpy()

    faiss = type(sys)("faiss")
    faiss.IndexFlatIP = Index
    monkeypatch.setitem(sys.modules, "faiss", faiss)
    same(model, pairs, fused=False, corpus=CORPUS, use_faiss=True)


def test_it_can_be_turned_off(model, pairs, monkeypatch):
    monkeypatch.setenv("FUSEDLOSS_DISABLE", "1")
    same(model, pairs, fused=False, corpus=CORPUS)


def test_patched(model, pairs):
    with Patch({stock: mining.mine_hard_negatives}):
        assert util.mine_hard_negatives is mining.mine_hard_negatives
    assert util.mine_hard_negatives is stock


def test_what_else_is_done_to_the_scores_gets_the_matrix(model):
    """As a later version of the library may: sorting, slicing, a threshold."""
    query, corpus = (torch.randn(n, D).numpy() for n in (5, 9))
    scores = mining._Model(model).similarity(query, corpus)
    matrix = util.cos_sim(query, corpus)
    assert scores.shape == (5, 9) and torch.sort(scores, dim=1)[0].equal(matrix.sort(dim=1)[0])
    assert torch.topk(scores, 2, dim=0)[0].equal(matrix.topk(2, dim=0)[0])
    with pytest.raises(RuntimeError, match="out of range"):
        torch.topk(scores, k=10, dim=1)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operator returns."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


def test_no_scores_of_all_queries_and_passages(pairs):
    """Of 512 queries and 131072 passages they are 256 MiB; `top_k`'s tile, of 2^23 scores, is 32."""
    texts, passages = ([f"{kind}{i}" for i in range(n)] for kind, n in (("q", 512), ("p", 131072)))
    generator = torch.Generator().manual_seed(0)
    model = model_of("cosine")
    embedded = {len(t): torch.randn(len(t), D, generator=generator).numpy() for t in (texts, passages)}
    model.encode_query = model.encode_document = lambda texts, **kwargs: embedded[len(texts)]
    pairs = datasets.Dataset.from_dict({"question": texts, "answer": passages[:512]})
    for mine, least, most in ((stock, 256 << 20, 257 << 20), (mining.mine_hard_negatives, 0, 33 << 20)):
        with Largest() as largest:
            mine(pairs, model, corpus=passages, verbose=False)
        assert least <= largest.bytes <= most


def exact(texts):
    """A model of which every cosine is exact, so that what is equal is equal in every order of summation."""
    model = model_of("dot")
    embedded = {text: torch.tensor(row) for text, row in texts.items()}
    model.encode_query = model.encode_document = lambda texts, **kwargs: torch.stack(
        [embedded[text] for text in texts]
    ).numpy()
    return model


ONES = [f"one {i}" for i in range(40)]  # of equal scores, all of them


@pytest.mark.parametrize("output_format", FORMATS)
def test_of_equal_scores_the_first_in_the_corpus(output_format):
    """The library takes a second topk of what was found, and torch's leaves the order of equal scores open."""
    model = exact({"q": [1.0, 0.0], "p": [2.0, 0.0], "far": [-1.0, 0.0], **{one: [1.0, 1.0] for one in ONES}})
    pairs = datasets.Dataset.from_dict({"question": ["q"], "answer": ["p"]})
    found = mining.mine_hard_negatives(
        pairs, model, corpus=["far", *ONES], num_negatives=7, range_min=2, output_format=output_format, verbose=False
    )
    if output_format.startswith("n-tuple"):
        mined = [found[f"negative_{i}"][0] for i in range(1, 8)]
    elif output_format == "triplet":
        mined = found["negative"][:]
    else:
        (_, *mined) = found["answer"][0] if output_format == "labeled-list" else found["answer"]  # the positive first
    assert mined == ONES[2:9]


def test_a_column_of_a_dataset_is_a_corpus(model, pairs):
    """The library adds a list to it, which raises."""
    column = datasets.Dataset.from_dict({"text": CORPUS})["text"]
    wanted = mining.mine_hard_negatives(pairs, model, corpus=CORPUS, verbose=False)
    for corpus in (column, tuple(CORPUS)):
        assert mining.mine_hard_negatives(pairs, model, corpus=corpus, verbose=False)[:] == wanted[:]
    with pytest.raises(TypeError):
        mining.mine_hard_negatives(pairs, model, corpus="a passage, not a list of them", verbose=False)
