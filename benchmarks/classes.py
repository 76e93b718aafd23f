"""Losses over classes beside their three bare products and the expressions they replace.

    python benchmarks/classes.py --out benchmarks/results/classes.json
    python benchmarks/classes.py --device cuda --dtype bfloat16 --size 32768 131072 4096

Steps are forward and backward, interleaved; ratios are medians of the rounds' own. Memory is what a step needs above
inputs and gradients, each in a fresh process. Half of the rows of "half ignored" have the ignored target.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fusedloss
from fusedloss.bench import measure, results, tables
from fusedloss.sweep.chunks import chunk_rows

MIB = 2**20
SIZE = (4096, 32768, 384)  # rows, classes, D
SMALL = (512, 1024, 128)  # what a process loads at its first step is not the step's
SOFTCAP = 30.0
Step = Callable[[], object]


def step(loss: Callable[..., Tensor], *leaves: Tensor) -> Step:
    leaves = tuple(x.detach().clone().requires_grad_() for x in leaves)

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss(*leaves).backward()

    return run


def products(x: Tensor, y: Tensor) -> Step:
    """z = x y^T, dx = z y and dy += z^T x, by the chunks of a sweep."""
    rows = chunk_rows(len(x), len(y), x.shape[1], x.element_size(), x.device)
    z, dx, dy = x.new_empty(rows, len(y)), x.new_empty(rows, x.shape[1]), torch.zeros_like(y)

    def run() -> None:
        for chunk in x.split(rows):
            part = z[: len(chunk)]
            torch.mm(chunk, y.T, out=part)
            torch.mm(part, y, out=dx[: len(chunk)])
            dy.addmm_(part.T, chunk)

    return run


def inputs(size: tuple[int, int, int], device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, class vectors, biases, targets; logits of unit variance."""
    rows, classes, dim = size
    generator = torch.Generator(device).manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator, device=device)
    target = torch.randint(classes, (rows,), generator=generator, device=device)
    return normal(rows, dim).to(dtype), (normal(classes, dim) / dim**0.5).to(dtype), normal(classes).to(dtype), target


def upstream(name: str, attribute: str, x: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """pytorch-metric-learning's loss, of class vectors that are given."""
    from pytorch_metric_learning import losses

    loss = getattr(losses, name)(num_classes=2, embedding_size=2)
    loss.num_classes = len(y)
    loss.cast_types = lambda *_: None
    del loss._parameters[attribute]
    setattr(loss, attribute, y.T if attribute == "W" else y)
    return loss(x, target)


def racers(case: str, size: tuple[int, int, int], device: str, dtype: torch.dtype) -> dict[str, Step]:
    x, y, bias, target = inputs(size, device, dtype)
    found: dict[str, Step] = {"floor": products(x, y)}
    if case == "arcface":
        found["fusedloss"] = step(lambda x, y: fusedloss.arcface(x, target, y), x, y)
        found["library"] = step(lambda x, y: upstream("ArcFaceLoss", "W", x, y, target), x, y)
        return found
    if case == "proxy_anchor":
        found["fusedloss"] = step(lambda x, y: fusedloss.proxy_anchor(x, target, y), x, y)
        found["library"] = step(lambda x, y: upstream("ProxyAnchorLoss", "proxies", x, y, target), x, y)
        return found
    if case == "half ignored":
        target[::2] = -100
    if case == "softcap":
        found["fusedloss"] = step(lambda x, y: fusedloss.linear_cross_entropy(x, y, target, softcap=SOFTCAP), x, y)
        bent = lambda x, y: F.cross_entropy(SOFTCAP * torch.tanh(F.linear(x, y) / SOFTCAP), target)
        found["torch"] = step(bent, x, y)
        return found
    leaves, named = (x, y), lambda bias=None: {"linear_bias": bias}
    if case == "bias":
        leaves = (x, y, bias)
    ours = lambda x, y, *b: fusedloss.linear_cross_entropy(x, y, target, **named(*b))
    found["fusedloss"] = step(ours, *leaves)
    if not hasattr(F, "linear_cross_entropy"):  # torch 2.13 has it
        return found
    options = torch.nn.LinearCrossEntropyOptions()
    found["torch"] = step(lambda x, y, *b: F.linear_cross_entropy(x, y, target, **named(*b)), *leaves)
    chunked = lambda x, y, *b: F.linear_cross_entropy(x, y, target, **named(*b), options=options)
    found["torch, chunked"] = step(chunked, *leaves)
    return found


CASES = ("plain", "bias", "half ignored", "softcap", "arcface", "proxy_anchor")


def memory(case: str, racer: str, size: tuple[int, int, int], device: str, dtype: torch.dtype) -> int:
    rows, classes, dim = size
    racers(case, SMALL, device, dtype)[racer]()
    call = racers(case, size, device, dtype)[racer]
    return measure.peak_memory(call, device) - (rows + classes) * dim * dtype.itemsize


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--size", type=int, nargs=3, default=SIZE, metavar=("ROWS", "CLASSES", "D"))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    size, dtype = tuple(options.size), getattr(torch, options.dtype)
    rows: list[dict[str, Any]] = []
    with tables.progress() as tick:
        for case in options.cases:
            calls = racers(case, size, options.device, dtype)
            taken: dict[str, list[float]] = {name: [] for name in calls}
            failed: dict[str, str] = {}
            note = lambda name, error, failed=failed: failed.update({name: f"{type(error).__name__}: {error}"[:120]})
            for name, spent in measure.samples_interleaved(calls, options.rounds, failed=note):
                taken[name].append(spent)
                tick(f"{case}: time")
            del calls
            for name, samples in taken.items():
                row: dict[str, Any] = {"case": case, "racer": name, "samples": samples, "note": failed.get(name, "")}
                if samples and name not in failed:
                    row["seconds"] = statistics.median(samples)
                    row["ratio"] = statistics.median(a / b for a, b in zip(samples, taken["floor"], strict=True))
                    if name != "floor":
                        tick(f"{case}: memory of {name}")
                        row["memory_bytes"] = measure.isolated(memory, case, name, size, options.device, dtype)
                rows.append(row)
    cells = [
        [
            row["case"],
            row["racer"],
            f"{row['seconds'] * 1e3:.0f}" if "seconds" in row else "",
            f"{row['ratio']:.2f}" if "ratio" in row else "",
            f"{row['memory_bytes'] / MIB:.0f}" if "memory_bytes" in row else "",
            row["note"],
        ]
        for row in rows
    ]
    title = f"{size[0]} rows, {size[1]} classes, D = {size[2]}, {options.dtype} on {options.device}"
    tables.table(title, ["case", "racer", "ms", "x floor", "memory MiB", "note"], cells)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        results.write_json(options.out, {"environment": results.environment(__file__), "size": size, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
