"""The drop-ins beside the classes that they replace, at the loss stage: embeddings in, gradients by them out.

    python benchmarks/drop_in.py --out benchmarks/results/drop_in.json

Times are medians of interleaved rounds of forward and backward, and of a search. Memory is what a step needs on top of
its inputs and gradients, each in a fresh process.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusedloss.bench import measure, race, results, tables
from fusedloss.search import top_k

D = 384
BEST = 50  # mine_hard_negatives looks for a few more than it is to return
DEFAULT = 32  # the library's mini_batch_size
MIB = 2**20
Step = Callable[[], object]


class Model(nn.Sequential):
    """Stands in for a model of sentence-transformers: hands out embeddings that are there."""

    max_seq_length = 128

    def __init__(self, key: str = "own"):
        super().__init__(nn.Identity())
        self.key = key

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features[self.key]}


def normal(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed))


def cached_ranking(n: int, mini_batches: tuple[int, ...]) -> dict[str, Step]:
    """The loss stage of CachedMultipleNegativesRankingLoss, whose leaves come in mini-batches."""
    from sentence_transformers.sentence_transformer import losses

    from fusedloss.integrations import sentence_transformers as fused

    columns = [normal(n, seed) for seed in range(2)]

    def step(kind: type, mini_batch: int) -> Step:
        loss = kind(Model(), mini_batch_size=mini_batch)
        leaves = [[x.clone().requires_grad_() for x in column.split(mini_batch)] for column in columns]

        def run() -> None:
            for column in leaves:
                for leaf in column:
                    leaf.grad = None
            loss.calculate_loss(leaves, None, with_backward=True)

        return run

    found = {"fusedloss": step(fused.CachedMultipleNegativesRankingLoss, DEFAULT)}
    for size in mini_batches:
        found[f"sentence-transformers, {size}"] = step(losses.CachedMultipleNegativesRankingLoss, size)
    return found


def gist(n: int) -> dict[str, Step]:
    from sentence_transformers.sentence_transformer import losses

    from fusedloss.integrations import sentence_transformers as fused

    columns = [normal(n, seed).requires_grad_() for seed in range(2)]
    features = [{"own": x, "guide": normal(n, 7 + i)} for i, x in enumerate(columns)]

    def step(kind: type) -> Step:
        loss: Any = kind.__new__(kind)
        nn.Module.__init__(loss)
        loss.model, loss.guide, loss.must_retokenize = Model(), Model("guide"), False
        loss.temperature, loss.margin_strategy, loss.margin = 0.01, "absolute", 0.0
        loss.contrast_anchors = loss.contrast_positives = True
        loss.gather_across_devices = False
        loss.similarity_fct, loss.cross_entropy_loss = nn.CosineSimilarity(dim=-1), nn.CrossEntropyLoss()

        def run() -> None:
            for x in columns:
                x.grad = None
            loss(features, None).backward()

        return run

    return {"fusedloss": step(fused.GISTEmbedLoss), "sentence-transformers": step(losses.GISTEmbedLoss)}


def search(n: int) -> dict[str, Step]:
    """The 50 most similar of `n` passages for each of n / 16 questions, as mine_hard_negatives has them found."""
    from sentence_transformers import util

    questions, passages = normal(n // 16, 0), normal(n, 1)
    return {
        "fusedloss": lambda: top_k(questions, passages, BEST),
        "sentence-transformers": lambda: torch.topk(util.cos_sim(questions, passages), k=BEST, dim=1),
    }


def memory(case: str, n: int, racer: str) -> int:
    """Bytes of one step beyond its gradients; of a fresh process."""
    cases, gradients = {"gist": (gist, 2 * n * D * 4), "search": (search, 0)}[case]
    cases(64)[racer]()  # what is loaded at the first use is not the step's
    return measure.peak_memory(cases(n)[racer]) - gradients


def timed(case: str, calls: dict[str, Step], n: int, rounds: int, tick: Callable[..., None]) -> list[dict[str, Any]]:
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for name, spent in measure.samples_interleaved(calls, rounds):
        taken[name].append(spent)
        tick(f"{case}, N = {n}")
    return [
        {"case": case, "n": n, "racer": name, "seconds": statistics.median(spent), "samples": spent}
        for name, spent in taken.items()
    ]


def ratio(rows: list[dict[str, Any]], above: str, below: str) -> float:
    """Median over the rounds of one's time by the other's."""
    samples = {row["racer"]: row["samples"] for row in rows}
    return statistics.median(a / b for a, b in zip(samples[above], samples[below], strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranking", type=int, default=8192, help="N of the cached ranking loss")
    parser.add_argument("--gist", type=int, default=1024, help="B of GISTEmbedLoss")
    parser.add_argument("--search", type=int, default=65536, help="passages to search, for a 16th as many questions")
    parser.add_argument("--mini-batches", type=int, nargs="+", default=[DEFAULT, 256, 1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    environment = results.environment(__file__)
    with tables.progress((options.rounds + 1) * (len(options.mini_batches) + 5) + 4) as tick:
        sizes = tuple(options.mini_batches)
        cached = timed("cached ranking", cached_ranking(options.ranking, sizes), options.ranking, options.rounds, tick)
        gists = timed("gist", gist(options.gist), options.gist, options.rounds, tick)
        searches = timed("search", search(options.search), options.search, options.rounds, tick)
        for row in gists + searches:
            tick(f"{row['case']}, N = {row['n']}: memory")
            row["memory_bytes"] = measure.isolated(memory, row["case"], row["n"], row["racer"])
    best = min((row for row in cached if row["racer"] != "fusedloss"), key=lambda row: row["seconds"])["racer"]
    stage = f"cached MNRL's loss stage, N={options.ranking}, D={D}: "
    pairs = f"GISTEmbedLoss, B={options.gist}, D={D}: "
    found_in = f"search, {options.search // 16} questions, {options.search} passages, D={D}: "
    bytes_of = {(row["case"], row["racer"]): row["memory_bytes"] for row in gists + searches}
    share = lambda case: bytes_of[case, "fusedloss"] / bytes_of[case, "sentence-transformers"]
    found = [
        race.claim(f"{stage}times faster than {best}, its best mini-batch", ratio(cached, best, "fusedloss"), 1, True),
        race.claim(f"{pairs}times faster", ratio(gists, "sentence-transformers", "fusedloss"), 5, True),
        race.claim(f"{pairs}share of its memory", share("gist"), 0.01),
        race.claim(f"{found_in}times faster", ratio(searches, "sentence-transformers", "fusedloss"), None),
        race.claim(f"{found_in}share of its memory", share("search"), None),
    ]
    default = f"sentence-transformers, {DEFAULT}"
    if DEFAULT in sizes:
        found.insert(
            1, race.claim(f"{stage}times faster than its default", ratio(cached, default, "fusedloss"), 10, True)
        )
    rows = cached + gists + searches
    cells = [
        [
            row["case"],
            str(row["n"]),
            row["racer"],
            f"{row['seconds'] * 1e3:.0f}",
            f"{row['memory_bytes'] / MIB:.1f}" if "memory_bytes" in row else "",
        ]
        for row in rows
    ]
    tables.table("drop-ins", ["loss", "N", "racer", "ms", "memory MiB"], cells)
    race.show_claims(found)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        results.write_json(options.out, {"environment": environment, "rows": rows, "claims": found})
    return int(any(c["held"] is False for c in found))


if __name__ == "__main__":
    sys.exit(main())
