"""Boosted trees: LambdaMART on lists, with `fusedloss.boosting` as lightgbm's objective.

    python examples/boosted_trees.py

`lightgbm_objective` gives lightgbm the first and second derivatives of `lambda_loss` over whole lists. Each list is a
docstring of code_search.py's data and the 20 sources that BM25 finds first: its own is worth 2, others of its file 1.
The measure is NDCG@10 on modules that training never saw: in BM25's order, and in that of the trees.
"""

from __future__ import annotations

import argparse
import collections
import math
import time
from typing import NamedTuple

import lightgbm
import numpy as np
from code_search import WORD, load_pairs, read_texts
from scipy import sparse

from fusedloss import boosting

DEPTH = 20  # documents in a list


class Lists(NamedTuple):
    features: np.ndarray  # [lists * DEPTH, features], BM25's score first
    labels: np.ndarray  # [lists * DEPTH]

    @property
    def sizes(self) -> list[int]:
        return [DEPTH] * (len(self.labels) // DEPTH)


def words(text: str) -> list[str]:
    return [word.lower() for word in WORD.findall(text)]


def counts(texts: list[str], number: dict[str, int]) -> sparse.csr_array:
    """`[texts, words]`."""
    found = [collections.Counter(number[word] for word in words(text) if word in number) for text in texts]
    values = [value for row in found for value in row.values()]
    columns = [column for row in found for column in row]
    ends = np.cumsum([0, *map(len, found)])
    return sparse.csr_array((np.array(values, dtype=np.float64), columns, ends), shape=(len(texts), len(number)))


def bm25(document: sparse.csr_array) -> sparse.csr_array:
    document = document.copy()
    length = np.maximum(document.sum(1), 1)
    idf = np.log(1 + len(length) / (1 + (document > 0).sum(0)))
    rows = np.repeat(np.arange(len(length)), np.diff(document.indptr))
    saturated = document.data / (document.data + 1.2 * (0.25 + 0.75 * length[rows] / length.mean()))
    document.data = saturated * idf[document.indices]
    return document


def lists_of(pairs: list[tuple]) -> Lists:
    """The lists of the queries whose own source is in it."""
    queries, titles, sources = zip(*pairs, strict=True)
    files = np.array([title.partition(":")[0] for title in titles])
    names = [title.partition(": ")[2] for title in titles]
    number = {word: i for i, word in enumerate(sorted({word for text in sources for word in words(text)}))}
    query = (counts(list(queries), number) > 0).astype(np.float64)
    heads = [code.partition("\n")[0] for code in sources]
    whole, head, named = (bm25(counts(texts, number)) for texts in (list(sources), heads, names))
    plain = (whole > 0).astype(np.float64)
    scores = (query @ whole.T).toarray()
    best = np.argsort(-scores, axis=1, kind="stable")[:, :DEPTH]
    kept = np.flatnonzero((best == np.arange(len(pairs))[:, None]).any(1))
    q, d = np.repeat(kept, DEPTH), best[kept].ravel()
    features = [
        scores[q, d],
        *((query @ part.T).toarray()[q, d] for part in (head, named, plain)),
        query.sum(1)[q],
        np.array([len(words(query)) for query in queries])[q],
        np.array([len(source) for source in sources])[d],
        np.array([source.count("\n") for source in sources])[d],
        np.array([source.startswith("class ") for source in sources])[d],
    ]
    labels = np.where(q == d, 2, (files[q] == files[d]).astype(int))
    return Lists(np.stack(features, axis=1).astype(np.float64), labels)


def ndcg(scores: np.ndarray, labels: np.ndarray, k: int = 10) -> float:
    discount = 1 / np.log2(np.arange(2, k + 2))
    gain = (2.0**labels - 1).reshape(-1, DEPTH)
    order = np.argsort(-scores.reshape(-1, DEPTH), axis=1, kind="stable")[:, :k]
    found = (np.take_along_axis(gain, order, axis=1) * discount).sum(1)
    return float((found / (-np.sort(-gain, axis=1)[:, :k] * discount).sum(1)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train LambdaMART with the derivatives of fusedloss.")
    parser.add_argument("--steps", type=int, default=60, help="trees")
    parser.add_argument("--megabytes", type=float, default=3, help="of Python source to read, at most")
    options = parser.parse_args()

    train, held_out = (lists_of(part) for part in load_pairs(options.megabytes, read_texts))
    print(f"{len(train.sizes)} lists of {DEPTH} documents to train on, {len(held_out.sizes)} held out")
    before, found = ndcg(held_out.features[:, 0], held_out.labels), math.nan
    for name, objective in (("lightgbm's lambdarank", "lambdarank"), ("fusedloss", boosting.lightgbm_objective(k=30))):
        started = time.perf_counter()
        dataset = lightgbm.Dataset(train.features, label=train.labels, group=train.sizes)
        settings = {"objective": objective, "num_leaves": 15, "learning_rate": 0.1, "verbosity": -1, "num_threads": 2}
        booster = lightgbm.train(settings, dataset, num_boost_round=options.steps)
        found = ndcg(booster.predict(held_out.features), held_out.labels)
        print(f"{options.steps} trees, {name}: NDCG@10 {found:.3f}, {time.perf_counter() - started:.1f} s", flush=True)
    print(f"Held out, NDCG@10: {before:.3f} before, {found:.3f} after")


if __name__ == "__main__":
    main()
