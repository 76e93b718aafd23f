"""GradCache: a batch whose activations would not fit, encoded a chunk at a time.

    python examples/grad_cache.py

A contrastive loss wants large batches, and an encoder's activations, not the loss, then fill the memory. GradCache
encodes 64 texts at a time and gives the gradients of the whole batch, for one more forward. The encoder is a small
transformer over the words of a text; the data are those of code_search.py, the measure is recall@10 on modules that
training never saw.
"""

from __future__ import annotations

import argparse
import time

import torch
from code_search import WORD, hash_of, load_pairs, read_texts
from torch import Tensor, nn

import fusedloss
from fusedloss.bench.measure import peak_memory
from fusedloss.grad_cache import GradCache
from fusedloss.search import top_k

VOCABULARY, WORDS, DIM = 2**15, 48, 64
CHUNK = 64


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, DIM, padding_idx=0)
        self.layer = nn.TransformerEncoderLayer(DIM, 4, 4 * DIM, dropout=0.1, batch_first=True, norm_first=True)

    def forward(self, text: Tensor) -> Tensor:
        padding = text == 0
        states = self.layer(self.words(text), src_key_padding_mask=padding)
        return states.masked_fill(padding[:, :, None], 0).sum(1)  # the loss divides by the norm


def tokens(texts: list[str]) -> Tensor:
    rows = [[1 + hash_of(word.lower()) % (VOCABULARY - 1) for word in WORD.findall(text)[:WORDS]] for text in texts]
    return torch.tensor([row + [0] * (WORDS - len(row)) if row else [1] + [0] * (WORDS - 1) for row in rows])


def plain_step(loss: nn.Module, encoder: Encoder):
    def step(query: Tensor, key: Tensor) -> Tensor:
        value = loss(encoder(query), encoder(key))
        value.backward()
        return value

    return step


def step_of(name: str, encoder: Encoder):
    loss = fusedloss.InfoNCELoss(0.05, normalize=True)
    return plain_step(loss, encoder) if name == "plain" else GradCache(loss, encoder, rows=CHUNK)


def memory(name: str, batch: int) -> int:
    step = step_of(name, Encoder())
    query, key = torch.randint(1, VOCABULARY, (2, batch, WORDS))
    step(query[:CHUNK], key[:CHUNK])  # what is loaded on first use is not the step's
    return peak_memory(lambda: step(query, key))


def difference(query: Tensor, key: Tensor) -> float:
    """Between the gradients of the two steps, without dropout, as a share of the largest."""
    gradients = []
    for name in ("plain", "GradCache"):
        torch.manual_seed(0)
        encoder = Encoder().eval()
        step_of(name, encoder)(query, key)
        gradients.append(torch.cat([p.grad.flatten() for p in encoder.parameters()]))
    return ((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()).item()


@torch.no_grad()
def recall(encoder: Encoder, query: Tensor, key: Tensor) -> float:
    encoder.eval()
    queries, keys = (torch.cat([encoder(chunk) for chunk in texts.split(256)]) for texts in (query, key))
    encoder.train()
    _, found = top_k(queries, keys, 10)
    return (found == torch.arange(len(query))[:, None]).any(1).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train with a batch whose activations are never all in memory.")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=256, help="pairs in a batch")
    parser.add_argument("--megabytes", type=float, default=4, help="of Python source to read, at most")
    options = parser.parse_args()

    train, held_out = load_pairs(options.megabytes, read_texts)
    print(f"{len(train)} training pairs, {len(held_out)} held out; batch {options.batch}, {CHUNK} texts at a time")
    query, key = (tokens([pair[part] for pair in train]) for part in (0, 2))
    query_held, key_held = (tokens([pair[part] for pair in held_out]) for part in (0, 2))
    for name in ("GradCache", "plain"):
        print(f"{name}: a step takes {memory(name, options.batch) / 2**20:.0f} MiB", flush=True)
    print(f"Largest difference of a gradient: {difference(query[:256], key[:256]):.0e} of the largest gradient")

    torch.manual_seed(0)
    encoder = Encoder()
    step = GradCache(fusedloss.InfoNCELoss(0.05, normalize=True), encoder, rows=CHUNK)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-3)
    before, started = recall(encoder, query_held, key_held), time.perf_counter()
    for number in range(1, options.steps + 1):
        rows = torch.randperm(len(query))[: options.batch]
        optimizer.zero_grad()
        loss = step(query[rows], key[rows])  # in place of the forward and loss.backward()
        optimizer.step()
        if number % (options.steps // 4 or 1) == 0:
            print(f"step {number}: loss {loss.item():.2f}, {time.perf_counter() - started:.0f} s", flush=True)
    print(f"Held out, recall@10: {before:.3f} before, {recall(encoder, query_held, key_held):.3f} after")


if __name__ == "__main__":
    main()
