"""`fusedloss.search.top_k`: torch.topk of the score matrix, in fp64, without that matrix."""

from __future__ import annotations

import pytest
import torch
from peaks import MIB, at_sizes, measured
from torch.nn import functional as F

from fusedloss import search
from fusedloss.bench import measure
from fusedloss.search import top_k


def matrix(query, corpus, similarity):
    query, corpus = query.double(), corpus.double()
    if similarity == "cos":
        return F.normalize(query, dim=1) @ F.normalize(corpus, dim=1).T
    if similarity == "dot":
        return query @ corpus.T
    return -torch.cdist(query, corpus, p=2.0 if similarity == "euclidean" else 1.0)


def expected(scores, k):
    """The lowest index first among equals, NaN above all: a stable sort."""
    values, indices = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    """Small tiles and slabs, so that every seam is crossed."""
    if request.param == "many tiles":
        monkeypatch.setattr(search, "TILE", 32)
        monkeypatch.setattr(search, "MIN_ROWS", 4)
        monkeypatch.setattr(search, "MIN_COLUMNS", 8)
        monkeypatch.setattr(search, "COLUMNS_PER_K", 1)
        monkeypatch.setattr(search, "LEAST_PER_K", 1)
        monkeypatch.setattr(search, "GROUP", 4)
        monkeypatch.setattr(search, "SLAB_BYTES", 2048)


@pytest.mark.parametrize("similarity", search.SIMILARITIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_it_is_the_topk_of_the_matrix(tiles, similarity, dtype):
    query, corpus = torch.randn(21, 12).to(dtype), torch.randn(137, 12).to(dtype)
    scores, indices = top_k(query, corpus, 7, similarity=similarity)
    every = matrix(query, corpus, similarity)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert scores.dtype == wide and indices.dtype == torch.int64 and scores.shape == indices.shape == (21, 7)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(scores.double(), every.topk(7).values, **tolerance)
    torch.testing.assert_close(every.gather(1, indices), every.topk(7).values, **tolerance)


@pytest.mark.parametrize("k", [1, 2, 9, 40])
@pytest.mark.parametrize("order", ["random", "ascending", "descending", "few values", "constant"])
def test_among_equals_the_lowest_index_comes_first(tiles, k, order):
    """Integers, so that equal scores are equal in any order of summation."""
    query = torch.randint(-3, 4, (11, 3)).float()
    corpus = torch.randint(-3, 4, (61, 3)).float()
    if order == "few values":
        corpus = corpus[torch.randint(3, (61,))]
    elif order == "constant":
        corpus = corpus[:1].expand(61, 3)
    elif order != "random":
        corpus = torch.arange(61.0)[:, None] * (1 if order == "ascending" else -1) * torch.ones(3)
        query = query.abs()
    scores, indices = top_k(query, corpus, k, similarity="dot")
    values, places = expected(query @ corpus.T, k)
    assert scores.equal(values) and indices.equal(places)


@pytest.mark.parametrize("k", [1, 5, 30])
def test_nan_is_above_all_and_infinities_are_in_their_places(tiles, k):
    query = torch.tensor([[1.0], [-1.0], [0.0], [torch.nan]])
    corpus = torch.randint(-5, 6, (41, 1)).float()
    corpus[[0, 9, 30]], corpus[[3, 17, 31]], corpus[[4, 40]] = torch.inf, -torch.inf, torch.nan
    scores, indices = top_k(query, corpus, k, similarity="dot")
    values, places = expected(query @ corpus.T, k)
    torch.testing.assert_close(scores, values, rtol=0, atol=0, equal_nan=True)
    assert indices.equal(places)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, torch.inf, 0.0])
def test_rows_of_one_value_only(tiles, value):
    scores, indices = top_k(torch.ones(3, 1), torch.full((33, 1), value), 5, similarity="dot")
    torch.testing.assert_close(scores, torch.full((3, 5), value), equal_nan=True)
    assert indices.equal(torch.arange(5).expand(3, 5))


@pytest.mark.parametrize("n", [0, 1, 4])
def test_beyond_the_corpus_there_is_nothing(tiles, n):
    query, corpus = torch.randn(5, 3), torch.randn(n, 3)
    scores, indices = top_k(query, corpus, 6)
    assert scores.shape == indices.shape == (5, 6)
    assert scores[:, n:].eq(-torch.inf).all() and indices[:, n:].eq(-1).all()
    values, places = expected(matrix(query, corpus, "cos"), n)
    torch.testing.assert_close(scores[:, :n], values.float())
    assert indices[:, :n].equal(places)


@pytest.mark.parametrize("n", [100, 4200])
def test_all_of_the_corpus(n):
    """As many as there are, no whole number of groups; and where one tile has them all, with duplicates at its edge."""
    query, corpus = torch.randint(-2, 3, (9, 2)).float(), torch.randint(-9, 10, (n, 2)).float()
    for k in (99, n):
        scores, indices = top_k(query, corpus, k, similarity="dot")
        values, places = expected(query @ corpus.T, k)
        assert scores.equal(values) and indices.equal(places)


def test_no_queries():
    scores, indices = top_k(torch.randn(0, 3), torch.randn(4, 3), 2)
    assert scores.shape == indices.shape == (0, 2)


def test_zero_rows_have_cosine_zero():
    scores, _ = top_k(torch.zeros(1, 3), torch.randn(4, 3), 2)
    assert scores.eq(0).all()


def test_strides_do_not_matter():
    query, corpus = torch.randn(6, 14)[:, ::2], torch.randn(7, 40).T
    for found, wanted in zip(top_k(query, corpus, 3), top_k(query.contiguous(), corpus.contiguous(), 3), strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_same_again():
    query, corpus = torch.randn(300, 16), torch.randn(5000, 16)
    first, second = (top_k(query, corpus, 20) for _ in range(2))
    assert first[0].equal(second[0]) and first[1].equal(second[1])


def test_no_gradients_and_no_autocast():
    query, corpus = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    plain = top_k(query, corpus, 3)
    with torch.autocast("cpu", torch.bfloat16):
        cast = top_k(query, corpus, 3)
    assert not plain[0].requires_grad and plain[0].equal(cast[0]) and plain[1].equal(cast[1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k": None}, TypeError, "k must be a whole number, got None"),
        ({"k": 2.0}, TypeError, "k must be a whole number, got 2.0, a float"),
        ({"k": True}, TypeError, "k must be a whole number, got True, a bool"),
        (
            {"similarity": "cosine"},
            ValueError,
            "similarity must be one of 'cos', 'dot', 'euclidean', 'manhattan', got 'cosine'",
        ),
        ({"query": torch.randn(3)}, ValueError, r"query must have two dimensions \[rows, D\], got shape \[3\]"),
        ({"query": [[1.0]]}, TypeError, r"query must be a tensor \[rows, D\], got a list"),
        ({"corpus": torch.randn(4, 5)}, ValueError, "D = 5"),
        (
            {"corpus": torch.randn(4, 3).double()},
            TypeError,
            "corpus must be torch.float32, like query, got torch.float64",
        ),
        (
            {"corpus": torch.randn(4, 3).to_sparse()},
            TypeError,
            "corpus must be a dense tensor, got layout torch.sparse_coo",
        ),
        ({"corpus": torch.empty(4, 3, device="meta")}, ValueError, "corpus must be on cpu, like query, got meta"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    arguments = {"query": torch.randn(2, 3), "corpus": torch.randn(4, 3), "k": 1} | arguments
    with pytest.raises(error, match=message):
        top_k(**arguments)


@pytest.mark.gpu
def test_the_corpus_may_stay_on_the_cpu(tiles):
    query, corpus = torch.randn(21, 12, device="cuda"), torch.randn(137, 12)
    scores, indices = top_k(query, corpus, 7)
    values, places = expected(matrix(query.cpu(), corpus, "cos"), 7)
    torch.testing.assert_close(scores.cpu(), values.float())
    assert scores.is_cuda and indices.cpu().equal(places)


def memory(n: int) -> int:
    query, corpus = torch.randn(2048, 32), torch.randn(n, 32)
    return measure.peak_memory(lambda: top_k(query, corpus, 10))


@measured
def test_memory_does_not_grow_with_the_corpus():
    """Matrices of 64 and of 512 MiB."""
    few, some, many = at_sizes(memory, sizes=(64, 8192, 65536))
    assert many - some < 64 * MIB and many - few < 64 * MIB, (few, some, many)
