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
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import fusedloss
from fusedloss import measure, results, show

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


def sigmoid_focal_loss(x: Tensor, t: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """As in torchvision.ops."""
    p = torch.sigmoid(x)
    ce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    p_t = p * t + (1 - p) * (1 - t)
    return ((alpha * t + (1 - alpha) * (1 - t)) * ce * (1 - p_t) ** gamma).mean()


def pointwise(size: int, device: str, dtype: torch.dtype) -> list[Case]:
    x = normal(size, device=device, dtype=dtype)
    score = normal(size, device=device, dtype=dtype, seed=1)
    label = (score > 1).to(dtype)
    weight = score.abs()
    logits = x.view(-1, 16)
    by_class = torch.rand(16, device=device, dtype=dtype) + 1
    bce, theirs = fusedloss.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits
    # Forward reads both and writes the derivative, backward reads that and writes the gradient.
    least = 5 * size * x.itemsize

    def asymmetric(x: Tensor) -> Tensor:
        return (torch.where(x < score, 5.0, 1.0) * F.mse_loss(x, score, reduction="none")).mean()

    return [
        Case("mse", [x], lambda x: fusedloss.mse(x, score), lambda x: F.mse_loss(x, score), least),
        Case("l1", [x], lambda x: fusedloss.l1(x, score), lambda x: F.l1_loss(x, score), least),
        Case("huber", [x], lambda x: fusedloss.huber(x, score), lambda x: F.huber_loss(x, score), least),
        Case("smooth_l1", [x], lambda x: fusedloss.smooth_l1(x, score), lambda x: F.smooth_l1_loss(x, score), least),
        Case(
            "mse, weight",
            [x],
            lambda x: fusedloss.mse(x, score, weight=weight),
            lambda x: F.mse_loss(x, score, weight=weight),
            least + size * x.itemsize,
        ),
        Case("mse, under", [x], lambda x: fusedloss.mse(x, score, under=5.0), asymmetric, least),
        Case(
            "mse, none",
            [x],
            lambda x: fusedloss.mse(x, score, reduction="none").sum(),
            lambda x: F.mse_loss(x, score, reduction="none").sum(),
            least + 3 * size * x.itemsize,
        ),
        Case("bce", [x], lambda x: bce(x, label), lambda x: theirs(x, label), least),
        Case(
            "bce, pos_weight",
            [logits],
            lambda x: bce(x, label.view_as(x), pos_weight=by_class),
            lambda x: theirs(x, label.view_as(x), pos_weight=by_class),
            least,
        ),
        Case(
            "focal",
            [x],
            lambda x: fusedloss.focal(x, label, alpha=0.25),
            lambda x: sigmoid_focal_loss(x, label),
            least,
        ),
        Case(
            "focal, gamma",
            [x],
            lambda x: fusedloss.focal(x, label, alpha=0.25, gamma=1.5),
            lambda x: sigmoid_focal_loss(x, label, gamma=1.5),
            least,
        ),
    ]


def classes(size: int, device: str, dtype: torch.dtype) -> list[Case]:
    return []


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
