"""The in-batch family beside its bare products and the libraries it replaces, in one run.

    python benchmarks/in_batch.py --out benchmarks/results/in_batch.json
    python benchmarks/in_batch.py --device cuda --size 16384 65536 --out benchmarks/results/gpu-in_batch.json

Steps are forward and backward, interleaved, medians of the rounds. Racers that stand for a bound: `floor` are the bare
products by torch.mm, `better floor` by whichever of MKL and oneDNN is the faster at each product, `whole square` is
the same loss without half of the tiles, `by torch.mm` without oneDNN. Memory is what a step needs on top of its inputs
and gradients, each in a fresh process. A library that would need more than the machine has is run under a limit of what
is available, so that it fails alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fusedloss
from fusedloss.bench import measure, peers, race, results, tables
from fusedloss.bench.floors import BETTER, FLOOR, FLOORS, floors

DIMS = (768, 512, 256, 128, 64)
MIB = 2**20
Step = Callable[[], object]


def normal(rows: int, dim: int, device: str, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return nn.functional.normalize(torch.randn(rows, dim, generator=generator, device=device), dim=1)


def labels(rows: int, device: str) -> Tensor:
    """Eight rows of each."""
    return torch.arange(rows, device=device) // 8


def step(loss: Callable[..., Tensor], *embeddings: Tensor) -> Step:
    leaves = [x.detach().clone().requires_grad_() for x in embeddings]

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss(*leaves).backward()

    return run


def products_of(x: Tensor, count: int = 3, rows: int = 1024) -> dict[str, Step]:
    """`count` bare products of x's rows with as many others, a third of each kind."""
    y = normal(*x.shape, str(x.device), 9)
    return floors(x, y, rows, (count - 2 * (count // 3), count // 3, count // 3))


def whole_square(run: Step) -> Step:
    """The step without half of the tiles, which were the only mode before."""

    def step() -> None:
        with mock.patch("fusedloss.sweep.halved", lambda *_: None):
            run()

    return step


def by_torch_mm(run: Step) -> Step:
    def step() -> None:
        with mock.patch.dict(os.environ, FUSEDLOSS_CPU_PRODUCTS="mkl"):
            run()

    return step


class Given(nn.Module):
    """Stands in for a model of sentence-transformers: hands out the embeddings that are its features."""

    max_seq_length = 128
    tokenizer = None

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["sentence_embedding"]}


# The library's, where they are installed ------------------------------------------------------------------------------


def upstream_gist(anchor: Tensor, positive: Tensor, guide: tuple[Tensor, Tensor]) -> Tensor:
    """The score stage of sentence-transformers' GISTEmbedLoss, by its own methods."""
    from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss

    loss = GISTEmbedLoss.__new__(GISTEmbedLoss)
    nn.Module.__init__(loss)
    loss.temperature, loss.margin_strategy, loss.margin = 0.01, "absolute", 0.0
    loss.contrast_anchors = loss.contrast_positives = True
    loss.gather_across_devices = False
    loss.similarity_fct, loss.cross_entropy_loss = nn.CosineSimilarity(dim=-1), nn.CrossEntropyLoss()
    loss.model, loss.guide, loss.must_retokenize = Given(), Given(), False
    columns = [{"sentence_embedding": x, "guide": g} for x, g in zip((anchor, positive), guide, strict=True)]

    class Guiding(nn.Module):
        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"sentence_embedding": features["guide"]}

    loss.guide = Guiding()
    return loss(columns, None)


def upstream_batch_hard(embeddings: Tensor, given: Tensor) -> Tensor:
    from sentence_transformers.sentence_transformer.losses import BatchHardTripletLoss

    return BatchHardTripletLoss(Given()).compute_loss_from_embeddings([embeddings], given)


def of_metric_learning(name: str, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    from pytorch_metric_learning import losses

    return getattr(losses, name)(**options)


def upstream_nt_xent(z1: Tensor, z2: Tensor) -> Tensor:
    rows = torch.arange(len(z1), device=z1.device)
    return of_metric_learning("NTXentLoss", temperature=0.5)(torch.cat([z1, z2]), torch.cat([rows, rows]))


def lightly_nt_xent(z1: Tensor, z2: Tensor) -> Tensor:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=0.5)(z1, z2)


def eager_nt_xent(z1: Tensor, z2: Tensor) -> Tensor:
    z = torch.cat([z1, z2])
    logits = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
    return nn.functional.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z1)))


# What is measured -----------------------------------------------------------------------------------------------------


def gist(n: int, device: str) -> dict[str, Step]:
    x, y, gx, gy = (normal(n, 384, device, seed) for seed in range(4))
    return products_of(x, 12) | {
        "fusedloss": step(lambda a, p: fusedloss.gist_embed(a, p, guide=(gx, gy)), x, y),
        "sentence-transformers": step(lambda a, p: upstream_gist(a, p, (gx, gy)), x, y),
    }


def nt_xent(n: int, device: str, dim: int = 384) -> dict[str, Step]:
    """n rows: two views of n / 2."""
    x, y = (normal(n // 2, dim, device, seed) for seed in range(2))
    ours = step(lambda a, p: fusedloss.nt_xent(a, p), x, y)
    return products_of(torch.cat([x, y])) | {
        "fusedloss": ours,
        "whole square": whole_square(ours),
        "eager": step(eager_nt_xent, x, y),
        "torch.compile": step(torch.compile(eager_nt_xent), x, y),
        "pytorch-metric-learning": step(upstream_nt_xent, x, y),
        "lightly": step(lightly_nt_xent, x, y),
    }


def labelled(name: str, theirs: str, options: dict[str, Any], n: int, device: str) -> dict[str, Step]:
    x, given = normal(n, 384, device, 0), labels(n, device)
    ours = step(lambda e: getattr(fusedloss, name)(e, given), x)
    return products_of(x) | {
        "fusedloss": ours,
        "whole square": whole_square(ours),
        "pytorch-metric-learning": step(lambda e: of_metric_learning(theirs, **options)(e, given), x),
    }


def info_nce(n: int, device: str) -> dict[str, Step]:
    x, y = (normal(n, 384, device, seed) for seed in range(2))
    ours = step(lambda q, k: fusedloss.info_nce(q, k), x, y)
    return products_of(x) | {"fusedloss": ours, "by torch.mm": by_torch_mm(ours)}


def batch_hard(n: int, device: str) -> dict[str, Step]:
    x, given = normal(n, 384, device, 0), labels(n, device)
    return products_of(x, 2) | {
        "fusedloss": step(lambda e: fusedloss.batch_hard_triplet(e, given), x),
        "sentence-transformers": step(lambda e: upstream_batch_hard(e, given), x),
    }


def mined(name: str, margin: float, n: int, device: str) -> dict[str, Step]:
    x, given = normal(n, 384, device, 0), labels(n, device)
    return products_of(x) | {"fusedloss": step(lambda e: getattr(fusedloss, name)(e, given, margin=margin), x)}


def siglip(n: int, device: str) -> dict[str, Step]:
    x, y = (normal(n, 384, device, seed) for seed in range(2))

    def eager(image: Tensor, text: Tensor) -> Tensor:
        z = 10.0 * image @ text.T - 10.0
        return -nn.functional.logsigmoid(z * (2 * torch.eye(n, device=z.device) - 1)).sum() / n

    return products_of(x) | {
        "fusedloss": step(lambda a, b: fusedloss.siglip(a, b, 10.0, -10.0), x, y),
        "eager": step(eager, x, y),
        "torch.compile": step(torch.compile(eager), x, y),
    }


def matryoshka(n: int, device: str) -> dict[str, Step]:
    x, y = (normal(n, DIMS[0], device, seed) for seed in range(2))
    single = functools.partial(fusedloss.info_nce, normalize=True)

    def loop(query: Tensor, key: Tensor) -> Tensor:
        return sum(single(query[:, :dim], key[:, :dim]) for dim in DIMS)

    return products_of(x) | {
        "single": step(single, x, y),
        "fusedloss": step(lambda q, k: fusedloss.matryoshka(fusedloss.info_nce, q, k, dims=DIMS), x, y),
        "loop": step(loop, x, y),
    }


CASES: dict[str, Callable[[int, str], dict[str, Step]]] = {
    "gist_embed": gist,
    "nt_xent": nt_xent,
    "nt_xent, D = 128": functools.partial(nt_xent, dim=128),
    "sup_con": functools.partial(labelled, "sup_con", "SupConLoss", {"temperature": 0.07}),
    "multi_similarity": functools.partial(labelled, "multi_similarity", "MultiSimilarityLoss", {}),
    "circle": functools.partial(labelled, "circle", "CircleLoss", {}),
    "info_nce": info_nce,
    "batch_hard_triplet": batch_hard,
    "batch_all_triplet": functools.partial(mined, "batch_all_triplet", 0.2),
    "batch_semi_hard_triplet": functools.partial(mined, "batch_semi_hard_triplet", 0.2),
    "siglip": siglip,
    "matryoshka": matryoshka,
}
# On two CPU cores: where each is raced, and at what sizes the code that it replaces is.
CPU_SIZES: dict[str, tuple[int, tuple[int, ...]]] = {
    "gist_embed": (4096, (512, 1024, 2048)),
    "nt_xent": (16384, (512, 4096)),
    "nt_xent, D = 128": (16384, ()),
    "sup_con": (8192, (2048,)),
    "multi_similarity": (8192, (2048,)),
    "circle": (8192, (2048,)),
    "info_nce": (16384, ()),
    "batch_hard_triplet": (16384, (4096,)),
    "batch_all_triplet": (4096, ()),
    "batch_semi_hard_triplet": (4096, ()),
    "siglip": (8192, (4096,)),
    "matryoshka": (8192, ()),
}
GRADIENTS = {  # x N x D; else 1
    "gist_embed": 2,
    "info_nce": 2,
    "siglip": 2,
    "matryoshka": 2,
}
OURS = ("fusedloss", "whole square", "by torch.mm", "single", "loop")


def memory(case: str, racer: str, n: int, device: str, limited: bool) -> int:
    """Bytes of one step beyond its gradients; of a fresh process."""
    call = CASES[case](n, device)[racer]
    # What the libraries load at their first use is not the step's.
    CASES[case](64, device)[racer]()
    if limited and device == "cpu":
        import resource

        most = race.available_bytes()
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    dim = DIMS[0] if case == "matryoshka" else 128 if case.endswith("128") else 384
    return measure.peak_memory(call, device) - GRADIENTS.get(case, 1) * n * dim * 4


def seconds(case: str, racer: str, n: int, device: str) -> float:
    import resource

    if device == "cpu":
        most = race.available_bytes()
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    call = CASES[case](n, device)[racer]
    return min(measure.seconds(call) for _ in range(2))


def rows_of(case: str, n: int, device: str, rounds: int, tick: Callable[..., None]) -> list[dict[str, Any]]:
    """Who fits beside each other, interleaved."""
    calls = {name: call for name, call in CASES[case](n, device).items() if name in FLOORS + OURS or device == "cuda"}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    failed: dict[str, str] = {}
    for name, spent in measure.samples_interleaved(
        calls, rounds, failed=lambda name, error: failed.update({name: _first_line(error)})
    ):
        taken[name].append(spent)
        tick(f"{case}, N = {n}: time")
    del calls
    found = []
    for name, spent in taken.items():
        row: dict[str, Any] = {"case": case, "n": n, "racer": name, "samples": spent}
        if name in failed:
            row["note"] = failed[name]
        elif spent:
            row["seconds"] = statistics.median(spent)
            if name not in FLOORS:
                tick(f"{case}, N = {n}: memory")
                row["memory_bytes"] = measure.isolated(memory, case, name, n, device, False)
        found.append(row)
    return found


def library_rows(case: str, sizes: tuple[int, ...], tick: Callable[..., None]) -> list[dict[str, Any]]:
    """The library's loss and ours at growing sizes, until it fails."""
    found = []
    for n in sizes:
        for name in CASES[case](64, "cpu"):
            if name in FLOORS or (name in OURS and name != "fusedloss"):
                continue
            tick(f"{case}, N = {n}: {name}")
            row: dict[str, Any] = {"case": case, "n": n, "racer": name}
            try:
                row["seconds"] = measure.isolated(seconds, case, name, n, "cpu", timeout=300)
                row["memory_bytes"] = measure.isolated(memory, case, name, n, "cpu", True, timeout=300)
            except Exception as error:
                row["note"] = _first_line(error)
            found.append(row)
    return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def claims(rows: list[dict[str, Any]]) -> list[dict]:
    at = {(row["case"], row["n"], row["racer"]): row for row in rows if "seconds" in row}
    found = []

    def taken(case: str, racer: str) -> float:
        return at[case, CPU_SIZES[case][0], racer]["seconds"]

    def ratio(text: str, case: str, below: str, most: float | None) -> None:
        found.append(race.claim(text, taken(case, "fusedloss") / taken(case, below), most))

    def over_floors(text: str, case: str, most: float | None, count: str = "three") -> None:
        ratio(f"{text}: time over its {count} bare products", case, FLOOR, most)
        ratio("over the faster of MKL's and oneDNN's", case, BETTER, None)

    def memory(text: str, case: str, most: float) -> None:
        found.append(race.claim(text, at[case, CPU_SIZES[case][0], "fusedloss"]["memory_bytes"] / MIB, most))

    over_floors("gist_embed, B=4096, D=384, guide of 384", "gist_embed", 1.10, "12")
    memory("its MiB above inputs and gradients", "gist_embed", 128)
    over_floors("nt_xent, 2B=16384, D=384", "nt_xent", 0.72)
    over_floors("nt_xent, 2B=16384, D=128", "nt_xent, D = 128", 0.82)
    for name in ("nt_xent", "sup_con", "multi_similarity", "circle"):
        most = None if name == "nt_xent" else 0.70
        ratio(f"{name}, N={CPU_SIZES[name][0]}, D=384: time over the whole square's", name, "whole square", most)
    over_floors("batch_hard_triplet, N=16384, D=384", "batch_hard_triplet", 0.60, "two")
    memory("its MiB above inputs and gradients", "batch_hard_triplet", 128)
    ratio("matryoshka over 768, 512, 256, 128, 64, N=8192: time over the loss of 768", "matryoshka", "single", 1.60)
    faster = taken("matryoshka", "loop") / taken("matryoshka", "fusedloss")
    found.append(race.claim("how much faster than the loop over the dims", faster, 1.3, at_least=True))
    over_floors("info_nce, N=16384, D=384", "info_nce", None)
    ratio("its time over that by torch.mm alone", "info_nce", "by torch.mm", None)
    over_floors("siglip, N=8192, D=384", "siglip", None)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, nargs="+", help="N of every case; on a CPU each has its own")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep-libraries", action="store_true", help="take the libraries' rows from --out as they are")
    options = parser.parse_args()
    environment = results.environment(__file__)
    environment["peers"] = peers.versions("lightly", "pytorch-metric-learning")
    rows: list[dict[str, Any]] = []
    plan = [(c, n) for c in options.cases for n in options.size or [CPU_SIZES[c][0]]]
    tried = {c: CPU_SIZES[c][1] for c in options.cases if options.device == "cpu" and not options.size}
    kept = []
    if options.keep_libraries:
        before = json.loads(options.out.read_text())
        kept = [{"kept_from": before["environment"]["date"], **row} for row in before["rows"] if "samples" not in row]
        tried = {}
    total = sum(3 * (options.rounds + 1) for _ in plan) + sum(2 * len(sizes) for sizes in tried.values())
    ended = None
    try:
        with tables.progress(total) as tick:
            for case, n in plan:
                rows += rows_of(case, n, options.device, options.rounds, tick)
            for case, sizes in tried.items():
                rows += library_rows(case, sizes, tick)
            rows += kept
    except KeyboardInterrupt:
        ended = "interrupted"
    whole = options.device == "cpu" and not options.size and len(options.cases) == len(CASES) and ended is None
    found = claims(rows) if whole else []
    if found:
        race.show_claims(found)
    cells = [
        [
            row["case"],
            str(row["n"]),
            row["racer"],
            f"{row['seconds'] * 1e3:.0f}" if "seconds" in row else "",
            f"{row['memory_bytes'] / MIB:.0f}" if "memory_bytes" in row else "",
            row.get("note", ""),
        ]
        for row in rows
    ]
    tables.table("in-batch losses", ["loss", "N", "racer", "ms", "memory MiB", "note"], cells)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        results.write_json(options.out, {"environment": environment, "rows": rows, "claims": found})
    return 130 if ended else int(any(c["held"] is False for c in found))


if __name__ == "__main__":
    sys.exit(main())
