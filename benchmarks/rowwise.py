"""Losses without a sweep beside the torch expressions they replace, forward and backward, in one run.

    python benchmarks/rowwise.py --out benchmarks/results/rowwise.json
    python benchmarks/rowwise.py --family pairs --size 1048576            # one family, to the terminal
    python benchmarks/rowwise.py --device cuda --out benchmarks/results/gpu-rowwise.json

A size is the number of elements of the prediction (or of each embedding matrix). On a CPU the figures are the ratio of
both times, and below 2^20 elements their difference. On a GPU also the share of the rate at which the device copies,
for the bytes that the loss must move: `bytes` in a case; and torch.compile's time, and Liger's where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import fusedloss
from fusedloss import measure, results, show
from fusedloss.rowwise import classes as rowwise_classes

LARGE = 1 << 20  # from here on the ratio is asked for, below it the difference
SIZES = {"cpu": (1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 23), "cuda": (1 << 16, 1 << 20, 1 << 24, 1 << 26)}
MOST_RATIO, MOST_EXTRA = 1.1, 30e-6


class Case(NamedTuple):
    """One loss: ours and torch's, functions of the same leaves; `bytes` moved by the least that a step can do."""

    name: str
    leaves: Sequence[Tensor]
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    bytes: int = 0
    liger: Callable[..., Tensor] | None = None


def normal(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def pointwise(size: int, device: str, dtype: torch.dtype) -> list[Case]:
    return []


def classes(size: int, device: str, dtype: torch.dtype) -> list[Case]:
    item = torch.finfo(dtype).bits // 8
    cases = []

    def rows(name: str, C: int, ours: Callable[..., Tensor], theirs: Callable[..., Tensor], **more: object) -> None:
        """Logits are read, their gradient written."""
        M = max(1, size // C)
        x, target = normal(M, C, device=device, dtype=dtype), torch.arange(M, device=device) * 7919 % C
        liger = None if more.get("liger") is None else partial(more["liger"], target=target)
        own, torchs = partial(ours, target=target), partial(theirs, target=target)
        cases.append(Case(f"{name}, C = {C}", [x], own, torchs, 2 * M * C * item, liger))

    for C in (10, 100, 1000, 32000):
        rows("cross_entropy", C, fusedloss.cross_entropy, F.cross_entropy, liger=liger_cross_entropy())
    smoothed = {"label_smoothing": 0.1}
    rows(
        "cross_entropy, smoothed",
        1000,
        partial(fusedloss.cross_entropy, **smoothed),
        partial(F.cross_entropy, **smoothed),
    )
    for C in (10, 1000):
        rows("focal", C, rowwise_classes.focal_classes, focal_in_torch)

    N, S = max(1, size // (21 * 4096)), min(4096, max(1, size // 21))  # segmentation: 21 classes, 64 x 64 places
    x, target = normal(N, 21, S, device=device, dtype=dtype), torch.arange(N * S, device=device).view(N, S) * 7919 % 21
    cases.append(
        Case(
            "cross_entropy, [N, 21, 64 x 64]",
            [x],
            partial(fusedloss.cross_entropy, target=target),
            partial(F.cross_entropy, target=target),
            2 * x.numel() * item,
        )
    )
    M = max(1, size // 1000)
    x, share = normal(M, 1000, device=device, dtype=dtype), normal(M, 1000, device=device, dtype=dtype).softmax(1)
    own, torchs = partial(fusedloss.cross_entropy, target=share), partial(F.cross_entropy, target=share)
    cases.append(Case("cross_entropy, probabilities, C = 1000", [x], own, torchs, 3 * x.numel() * item))

    B, D = max(1, size // 768), 768
    u, v, weight = (normal(*shape, device=device, dtype=dtype) for shape in ((B, D), (B, D), (3, 3 * D)))
    labels = torch.arange(B, device=device) % 3

    def theirs(u: Tensor, v: Tensor, weight: Tensor) -> Tensor:  # sentence-transformers' SoftmaxLoss
        return F.cross_entropy(F.linear(torch.cat([u, v, (u - v).abs()], 1), weight), labels)

    pair = lambda u, v, weight: fusedloss.softmax_pair(u, v, weight, None, labels)
    # u and v are read twice, and their gradients written.
    cases.append(Case("softmax_pair", [u, v, weight / D**0.5], pair, theirs, 6 * B * D * item))
    return cases


def focal_in_torch(x: Tensor, target: Tensor) -> Tensor:
    """As users write it."""
    log_p = F.log_softmax(x, 1).gather(1, target[:, None])[:, 0]
    return -((1 - log_p.exp()) ** 2 * log_p).mean()


def liger_cross_entropy() -> Callable[..., Tensor] | None:
    if importlib.util.find_spec("liger_kernel") is None or not torch.cuda.is_available():
        return None
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy


def pairs(size: int, device: str, dtype: torch.dtype) -> list[Case]:
    return []


def lists(size: int, device: str, dtype: torch.dtype) -> list[Case]:
    return []


FAMILIES = {"pointwise": pointwise, "classes": classes, "pairs": pairs, "lists": lists}


def step(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> Callable[[], None]:
    own = [x.detach().clone().requires_grad_() for x in leaves]

    def run() -> None:
        for leaf in own:
            leaf.grad = None
        function(*own).backward()

    return run


def compare(case: Case, rounds: int, compiled: bool) -> dict[str, float]:
    """Seconds of a step by whom, medians, and `ratio`: the median of the rounds' own ratios, which noise leaves alone.

    Short steps are repeated until a sample takes 2 ms.
    """
    racers = {"ours": case.ours, "torch": case.theirs}
    if case.liger is not None:
        racers["liger"] = case.liger
    if compiled:
        racers["torch.compile"] = torch.compile(case.theirs)
    steps = {name: step(function, case.leaves) for name, function in racers.items()}
    repeats = {}
    for name, run in steps.items():
        run()
        run()
        began = time.perf_counter()
        run()
        measure.synchronize()
        repeats[name] = max(1, round(2e-3 / (time.perf_counter() - began)))
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name in sorted(steps, reverse=bool(number % 2)):
            measure.synchronize()
            began = time.perf_counter()
            for _ in range(repeats[name]):
                steps[name]()
            measure.synchronize()
            samples[name].append((time.perf_counter() - began) / repeats[name])
    found = {name: statistics.median(taken) for name, taken in samples.items()}
    found["ratio"] = statistics.median(a / b for a, b in zip(samples["ours"], samples["torch"], strict=True))
    return found


def copy_rate(device: str, size: int = 1 << 28) -> float:
    """Bytes read and written a second by a copy of 256 MiB."""
    x = torch.empty(size, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    best = float("inf")
    for _ in range(5):
        measure.synchronize()
        began = time.perf_counter()
        y.copy_(x)
        measure.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size / best


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--size", nargs="*", type=int, help="elements of the prediction")
    parser.add_argument("--loss", nargs="*", help="only cases whose name starts so")
    parser.add_argument("--device", default="cpu", choices=tuple(SIZES))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--compile", action="store_true", help="torch.compile's time, too (on CUDA always)")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    rate = copy_rate(options.device)
    rows: list[dict] = []
    with show.progress() as tick:
        for size in options.size or SIZES[options.device]:
            for family in options.family:
                for case in FAMILIES[family](size, options.device, dtype):
                    if options.loss and not case.name.startswith(tuple(options.loss)):
                        continue
                    tick(f"{case.name}, {size} elements")
                    compiled = options.compile or options.device == "cuda"
                    found = compare(case, options.rounds, compiled)
                    share = case.bytes / found["ours"] / rate if case.bytes else None
                    rows.append({"family": family, "loss": case.name, "size": size, **found, "copy_share": share})
    table = []
    for row in rows:
        extra = row["ours"] - row["torch"]
        held = row["ratio"] <= MOST_RATIO if row["size"] >= LARGE else extra <= MOST_EXTRA or row["ratio"] <= MOST_RATIO
        row["held"] = held if options.device == "cpu" else None
        cells = (f"{row['ours'] * 1e6:.0f}", f"{row['torch'] * 1e6:.0f}", f"{row['ratio']:.2f}", f"{extra * 1e6:+.0f}")
        share = "" if row["copy_share"] is None else f"{row['copy_share']:.2f}"
        table.append([row["loss"], str(row["size"]), *cells, share, "" if held else "no"])
    columns = ["loss", "elements", "us", "torch, us", "ratio", "extra, us", "of the copy rate", "held"]
    show.table(f"{options.dtype} on {options.device}, forward and backward", columns, table)
    if options.out:
        found = {"environment": results.environment(__file__), "dtype": options.dtype, "copy_rate": rate, "rows": rows}
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
