"""Hard negatives: exact search finds what the encoder confuses, and training goes on with that.

    python examples/hard_negatives.py

`search.top_k` finds the nearest sources of every query without the matrix of all scores. The wrong ones among them are
each query's own negatives, `negatives=`. The data and the encoder are those of code_search.py; the measure is recall@1
on modules that training never saw. The same number of steps without mined negatives is shown beside it.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from code_search import TEMPERATURE, Encoder, encode, load_pairs, retrieval
from torch import Tensor

import fusedloss
from fusedloss.bench.measure import peak_memory
from fusedloss.search import top_k


def train_encoder(encoder: Encoder, pairs: list[tuple], steps: int, batch: int, mined: Tensor | None = None) -> None:
    """mined: `[pairs, K]`, the numbers of each pair's hard negatives."""
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.01, betas=(0.9, 0.98))
    for _ in range(steps):
        rows = torch.randperm(len(pairs))[:batch]
        query = encoder([pairs[i][3] for i in rows.tolist()], side=0)
        key = encoder([pairs[i][4] for i in rows.tolist()], side=1)
        negatives = None
        if mined is not None:
            chosen = mined[rows]
            negatives = encoder([pairs[i][4] for i in chosen.flatten().tolist()], side=1).view(*chosen.shape, -1)
        loss = fusedloss.info_nce(query, key, negatives=negatives, temperature=TEMPERATURE, normalize=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def mine(encoder: Encoder, pairs: list[tuple], count: int, skip: int = 2) -> Tensor:
    """The nearest but the `skip` very nearest, which may well be right answers, too, and but the pair's own."""
    query, key = (encode(encoder, [pair[3 + side] for pair in pairs], side) for side in (0, 1))
    _, found = top_k(query, key, skip + count + 1)
    own = found == torch.arange(len(pairs))[:, None]
    order = (own.int() * len(pairs) + torch.arange(found.shape[1])).argsort(1)  # the own one goes last
    return found.gather(1, order)[:, skip : skip + count]


def main() -> None:
    parser = argparse.ArgumentParser(description="Mine hard negatives by exact search and train with them.")
    parser.add_argument("--steps", type=int, default=60, help="before mining, and as many after it")
    parser.add_argument("--batch", type=int, default=32, help="pairs in a batch")
    parser.add_argument("--negatives", type=int, default=8, help="mined for each query")
    parser.add_argument("--megabytes", type=float, default=8, help="of Python source to read, at most")
    options = parser.parse_args()

    torch.manual_seed(0)
    train, held_out = load_pairs(options.megabytes)
    batch = min(options.batch, len(train))
    print(f"{len(train)} training pairs, {len(held_out)} held out; batch {batch}")
    encoder = Encoder()
    untrained = retrieval(encoder, held_out)["recall@1"]
    train_encoder(encoder, train, options.steps, batch)
    before = retrieval(encoder, held_out)["recall@1"]
    print(f"recall@1 {untrained:.3f} untrained, {before:.3f} after {options.steps} steps", flush=True)

    mined: list[Tensor] = []
    started = time.perf_counter()
    memory = peak_memory(lambda: mined.append(mine(encoder, train, options.negatives)))
    print(
        f"mined {options.negatives} negatives for each of {len(train)} queries in "
        f"{time.perf_counter() - started:.1f} s and {memory / 2**20:.0f} MiB"
    )
    found = {}
    for name, negatives in (("without", None), ("with", mined[0])):
        torch.manual_seed(1)
        other = copy.deepcopy(encoder)
        train_encoder(other, train, options.steps, batch, negatives)
        found[name] = retrieval(other, held_out)["recall@1"]
        print(f"{options.steps} more steps {name} mined negatives: recall@1 {found[name]:.3f}", flush=True)
    print(f"Held out, recall@1: {before:.3f} before, {found['with']:.3f} after")


if __name__ == "__main__":
    main()
