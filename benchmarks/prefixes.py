"""The one-pass Matryoshka sweep against one loss at full width and against a loop over the dims; prints JSON.

    python benchmarks/prefixes.py [--n 4096] [--dims 768 512 256 128 64] [--rounds 5]

Forward and backward, interleaved, minima of the rounds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor

import fusedloss
from fusedloss.prefixes import sweep_prefixes
from fusedloss.sweep import chunk_rows


def racers(query: Tensor, key: Tensor, dims: list[int], temperature: float) -> dict[str, Callable[[], object]]:
    n, dim = query.shape
    scale, target, weight = torch.tensor(1 / temperature), torch.arange(n), torch.ones(n)
    chunk = chunk_rows(n, len(dims) * n, dim, 4, query.device)
    leaves = [x.clone().requires_grad_() for x in (query, key)]

    def single() -> None:
        fusedloss.info_nce(*leaves, temperature=temperature, normalize=True).backward()

    def loop() -> None:
        for d in dims:
            x, y = (leaf[:, :d] for leaf in leaves)
            fusedloss.info_nce(x, y, temperature=temperature, normalize=True).backward()

    def one_pass() -> None:
        sweep_prefixes(
            (query, key),
            [(0, 1, None)],
            scale,
            target,
            weight,
            dims,
            [1.0] * len(dims),
            (True, True),
            False,
            (False,),
            chunk=chunk,
        )

    return {"single": single, "loop": loop, "one_pass": one_pass}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--dims", type=int, nargs="+", default=[768, 512, 256, 128, 64])
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    query, key = (torch.randn(options.n, max(options.dims)) for _ in range(2))
    race = racers(query, key, options.dims, options.temperature)
    times: dict[str, list[float]] = {name: [] for name in race}
    for _ in range(options.rounds):
        for name, step in race.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    best = {name: min(samples) for name, samples in times.items()}
    ratios = {
        "one_pass_over_single": best["one_pass"] / best["single"],
        "loop_over_one_pass": best["loop"] / best["one_pass"],
    }
    print(json.dumps({**vars(options), "threads": torch.get_num_threads(), "seconds": best, **ratios}, indent=1))


if __name__ == "__main__":
    main()
