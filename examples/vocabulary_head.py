"""A vocabulary head: a language model of Python source, trained without its matrix of logits.

    python examples/vocabulary_head.py

`linear_cross_entropy` takes the hidden states and the head's weight; the logits, tokens x vocabulary, are never held at
once. The model is that of Bengio et al. (2003): the next token from the eight before it. The data are the sources of
code_search.py, the measure is the perplexity of modules that training never saw (lower is better).
"""

from __future__ import annotations

import argparse
import collections
import re
import time

import torch
from code_search import load_pairs, read_texts
from torch import Tensor, nn
from torch.nn import functional as F

import fusedloss
from fusedloss.bench.measure import peak_memory

TOKEN = re.compile(r"[A-Za-z_]\w*|\d+|\n|[^\w\s]")
CONTEXT, DIM, HIDDEN = 8, 64, 128
UNKNOWN = 0


class Model(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, DIM)
        self.hidden = nn.Sequential(nn.Linear(CONTEXT * DIM, 256), nn.GELU(), nn.Linear(256, HIDDEN))
        self.head = nn.Linear(HIDDEN, vocabulary)
        nn.init.normal_(self.head.weight, std=0.02)

    def loss(self, before: Tensor, token: Tensor) -> Tensor:
        hidden = self.hidden(self.tokens(before).flatten(1))
        return fusedloss.linear_cross_entropy(hidden, self.head.weight, token, linear_bias=self.head.bias)


def memory(name: str, rows: int, vocabulary: int) -> int:
    """Of the loss alone, forward and backward."""
    hidden, weight = torch.randn(rows, HIDDEN, requires_grad=True), torch.randn(vocabulary, HIDDEN, requires_grad=True)
    token = torch.randint(vocabulary, (rows,))
    eager = lambda x, w, t: F.cross_entropy(x @ w.T, t)
    loss = eager if name == "eager torch" else fusedloss.linear_cross_entropy
    loss(hidden[:64], weight[:64], token[:64] % 64).backward()  # what is loaded on first use is not the loss's
    return peak_memory(lambda: loss(hidden, weight, token).backward())


@torch.no_grad()
def perplexity(model: Model, windows: Tensor) -> float:
    total = sum(model.loss(part[:, :-1], part[:, -1]) * len(part) for part in windows.split(8192))
    return (total / len(windows)).exp().item()


def windows_of(ids: list[int]) -> Tensor:
    return torch.tensor(ids).unfold(0, CONTEXT + 1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a language model whose logits are never in memory.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1024, help="tokens in a batch")
    parser.add_argument("--megabytes", type=float, default=2, help="of Python source to read, at most")
    options = parser.parse_args()

    torch.manual_seed(0)
    train, held_out = (
        [token for *_, code in part for token in TOKEN.findall(code)]
        for part in load_pairs(options.megabytes, read_texts)
    )
    known = [token for token, _ in collections.Counter(train).most_common(32767)]
    number = collections.defaultdict(lambda: UNKNOWN, {token: i for i, token in enumerate(known, 1)})
    vocabulary = len(known) + 1
    windows, held = (windows_of([number[token] for token in part]) for part in (train, held_out))
    held = held[torch.randperm(len(held))[:8192]]
    print(f"{len(windows)} tokens to train on, a vocabulary of {vocabulary}; {options.batch} tokens in a batch")
    for name in ("fusedloss", "eager torch"):
        found = memory(name, options.batch, vocabulary)
        print(f"the loss takes {found / 2**20:.0f} MiB: {name}", flush=True)

    model = Model(vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before, started = perplexity(model, held), time.perf_counter()
    for step in range(1, options.steps + 1):
        part = windows[torch.randint(len(windows), (options.batch,))]
        loss = model.loss(part[:, :-1], part[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (options.steps // 4 or 1) == 0:
            print(f"step {step}: loss {loss.item():.2f}, {time.perf_counter() - started:.0f} s", flush=True)
    print(f"Held out, perplexity: {before:.0f} before, {perplexity(model, held):.0f} after")


if __name__ == "__main__":
    main()
