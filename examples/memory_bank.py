"""A memory bank: the negatives of earlier batches, for batches that are small.

    python examples/memory_bank.py

`bank=` gives a loss more columns, which every row sees and which get no gradient (XBM, Wang et al. 2020; MoCo's queue
works alike). The loss reads the bank where it lies, and it may be overwritten as soon as the loss is computed. The data
and the encoder are those of code_search.py, and so is the measure, recall@10 on modules that training never saw. Two
encoders of one seed see the same batches of 32, one with a bank of 1024.
"""

from __future__ import annotations

import argparse
import time

import torch
from code_search import DIM, TEMPERATURE, Encoder, load_pairs, retrieval

import fusedloss


def train_encoder(pairs: list[tuple], steps: int, batch: int, bank_rows: int) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder()
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.01, betas=(0.9, 0.98))
    bank, filled, place = torch.zeros(bank_rows, DIM), 0, 0
    for _ in range(steps):
        rows = torch.randint(len(pairs), (batch,)).tolist()
        query = encoder([pairs[i][3] for i in rows], side=0)
        key = encoder([pairs[i][4] for i in rows], side=1)
        loss = fusedloss.info_nce(query, key, bank=bank[:filled], temperature=TEMPERATURE, normalize=True)
        if bank_rows:
            bank[place : place + batch] = key.detach()  # allowed: the forward has computed the gradient
            place = (place + batch) % bank_rows
            filled = min(filled + batch, bank_rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder


def main() -> None:
    parser = argparse.ArgumentParser(description="Train with the negatives of earlier batches.")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=32, help="pairs in a batch")
    parser.add_argument("--bank", type=int, default=1024, help="keys of earlier batches, a multiple of --batch")
    parser.add_argument("--megabytes", type=float, default=2, help="of Python source to read, at most")
    options = parser.parse_args()

    train, held_out = load_pairs(options.megabytes)
    print(f"{len(train)} training pairs, {len(held_out)} held out; {options.steps} steps of {options.batch} pairs")
    torch.manual_seed(0)
    before = retrieval(Encoder(), held_out)["recall@10"]
    found = {}
    for rows in (0, options.bank):
        started = time.perf_counter()
        found[rows] = retrieval(train_encoder(train, options.steps, options.batch, rows), held_out)["recall@10"]
        print(f"bank of {rows}: recall@10 {found[rows]:.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    print(f"Held out, recall@10: {before:.3f} before, {found[options.bank]:.3f} after")


if __name__ == "__main__":
    main()
