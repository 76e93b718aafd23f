"""The losses of published embedding models, on one data set.

    python examples/recipes.py                        # all of them
    python examples/recipes.py qwen3_embedding leaf   # some

Each recipe of `fusedloss.recipes` that takes a batch's pairs trains an encoder of one seed on the same batches, and
LEAF's student learns from the encoder that SimKGC's loss has trained. Left out are `jina_embeddings_v5` and
`nemotron_embed`, which learn from a teacher as well, and `bge_m3`, which takes scores of three kinds, of which this
encoder has one. The data and the encoder are those of code_search.py, and so is the measure, recall@10 on modules that
training never saw. The last line has the recipe that learnt least. A model of this size does not say which recipe is
the best one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from code_search import Encoder, load_pairs, retrieval
from torch import Tensor

from fusedloss import recipes

Loss = Callable[[Tensor, Tensor, list[int]], Tensor]
IN_BATCH: dict[str, Loss] = {
    "qwen3_embedding": lambda q, d, _: recipes.qwen3_embedding(q, d, temperature=0.05),
    "embedding_gemma": lambda q, d, _: recipes.embedding_gemma(q, d),
    "kalm_embedding_v2": lambda q, d, _: recipes.kalm_embedding_v2(q, d, scale=20.0),
    "nv_retriever": lambda q, d, _: recipes.nv_retriever(q, d, scale=20.0),
    "sim_kgc": lambda q, d, _: recipes.sim_kgc(q, d),
    "refined_logq": lambda q, d, _: recipes.refined_logq(q, d, q.new_full((len(q),), 1 / len(q))),
}
NAMES = [*IN_BATCH, "leaf"]


def train_encoder(loss: Loss, pairs: list[tuple], steps: int, batch: int) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder()
    groups = [{"params": encoder.vectors.parameters(), "lr": 0.01}, {"params": [encoder.log_weights], "lr": 0.1}]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
    for _ in range(steps):
        rows = torch.randint(len(pairs), (batch,)).tolist()
        query = encoder([pairs[i][3] for i in rows], side=0)
        document = encoder([pairs[i][4] for i in rows], side=1)
        value = loss(query, document, rows)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return encoder


def from_teacher(pairs: list[tuple], steps: int, batch: int) -> Loss:
    """LEAF's loss of both sides, by the embeddings of a trained encoder."""
    teacher = train_encoder(IN_BATCH["sim_kgc"], pairs, steps, batch)

    def loss(query: Tensor, document: Tensor, rows: list[int]) -> Tensor:
        with torch.no_grad():
            targets = [teacher([pairs[i][3 + side] for i in rows], side=side) for side in (0, 1)]
        return recipes.leaf(query, targets[0]) + recipes.leaf(document, targets[1])

    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an encoder with each recipe.")
    parser.add_argument("names", nargs="*", metavar="RECIPE", help=f"of {', '.join(NAMES)}; all if none is given")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=256, help="pairs in a batch")
    parser.add_argument("--megabytes", type=float, default=6, help="of Python source to read, at most")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"RECIPE must be of {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")

    train, held_out = load_pairs(options.megabytes)
    print(f"{len(train)} training pairs, {len(held_out)} held out; {options.steps} steps of {options.batch} pairs")
    torch.manual_seed(0)
    before = retrieval(Encoder(), held_out)["recall@10"]
    print(f"before training: recall@10 {before:.3f}")
    found = []
    for name in options.names or NAMES:
        started = time.perf_counter()
        loss = IN_BATCH.get(name) or from_teacher(train, options.steps, options.batch)
        encoder = train_encoder(loss, train, options.steps, options.batch)
        found.append(retrieval(encoder, held_out)["recall@10"])
        print(f"{name}: recall@10 {found[-1]:.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    print(f"Held out, recall@10: {before:.3f} before, {min(found):.3f} after")


if __name__ == "__main__":
    main()
