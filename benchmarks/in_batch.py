"""The in-batch family beside its bare products and the libraries it replaces, in one run.

    python benchmarks/in_batch.py --out benchmarks/results/in_batch.json
    python benchmarks/in_batch.py --device cuda --size 16384 65536 --out benchmarks/results/gpu-in_batch.json

Steps are forward and backward, interleaved, medians of the rounds. Memory is what a step needs on top of its inputs and
gradients, each in a fresh process. A library that would need more than the machine has is run under a limit of what is
available, so that it fails alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusedloss
from fusedloss.bench import measure, race, results, tables

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


def products(count: int, x: Tensor, columns: int, rows: int = 1024) -> Step:
    """`count` bare products of x's rows with `columns` x D numbers, a third of each kind, by the chunks of a sweep."""
    kinds = [count - 2 * (count // 3), count // 3, count // 3]
    y = normal(columns, x.shape[1], str(x.device), 9)
    tile, dx = x.new_empty(rows, columns), x.new_empty(rows, x.shape[1])
    dy = x.new_zeros(columns, x.shape[1])

    def run() -> None:
        for start in range(0, len(x), rows):
            chunk = x[start : start + rows]
            z = tile[: len(chunk)]
            for _ in range(kinds[0]):
                torch.mm(chunk, y.T, out=z)
            for _ in range(kinds[1]):
                torch.mm(z, y, out=dx[: len(chunk)])
            for _ in range(kinds[2]):
                dy.addmm_(z.T, chunk)

    return run


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


def upstream_nt_xent(z1: Tensor, z2: Tensor) -> Tensor:
    from pytorch_metric_learning.losses import NTXentLoss

    rows = torch.arange(len(z1), device=z1.device)
    return NTXentLoss(temperature=0.5)(torch.cat([z1, z2]), torch.cat([rows, rows]))


# What is measured -----------------------------------------------------------------------------------------------------


def gist(n: int, device: str) -> dict[str, Step]:
    x, y, gx, gy = (normal(n, 384, device, seed) for seed in range(4))
    return {
        "floor": products(12, x, n),
        "fusedloss": step(lambda a, p: fusedloss.gist_embed(a, p, guide=(gx, gy)), x, y),
        "sentence-transformers": step(lambda a, p: upstream_gist(a, p, (gx, gy)), x, y),
    }


def nt_xent(n: int, device: str, dim: int = 384) -> dict[str, Step]:
    """n rows: two views of n / 2."""
    x, y = (normal(n // 2, dim, device, seed) for seed in range(2))
    return {
        "floor": products(3, torch.cat([x, y]), n),
        "fusedloss": step(lambda a, p: fusedloss.nt_xent(a, p), x, y),
        "pytorch-metric-learning": step(upstream_nt_xent, x, y),
    }


def batch_hard(n: int, device: str) -> dict[str, Step]:
    x, given = normal(n, 384, device, 0), labels(n, device)
    return {
        "floor": products(2, x, n),
        "fusedloss": step(lambda e: fusedloss.batch_hard_triplet(e, given), x),
        "sentence-transformers": step(lambda e: upstream_batch_hard(e, given), x),
    }


def batch_all(n: int, device: str) -> dict[str, Step]:
    x, given = normal(n, 384, device, 0), labels(n, device)
    return {
        "floor": products(3, x, n),
        "fusedloss": step(lambda e: fusedloss.batch_all_triplet(e, given, margin=0.2), x),
    }


def siglip(n: int, device: str) -> dict[str, Step]:
    x, y = (normal(n, 384, device, seed) for seed in range(2))

    def eager(image: Tensor, text: Tensor) -> Tensor:
        z = 10.0 * image @ text.T - 10.0
        return -nn.functional.logsigmoid(z * (2 * torch.eye(n, device=z.device) - 1)).sum() / n

    return {
        "floor": products(3, x, n),
        "fusedloss": step(lambda a, b: fusedloss.siglip(a, b, 10.0, -10.0), x, y),
        "eager": step(eager, x, y),
    }


def matryoshka(n: int, device: str) -> dict[str, Step]:
    x, y = (normal(n, DIMS[0], device, seed) for seed in range(2))
    single = functools.partial(fusedloss.info_nce, normalize=True)

    def loop(query: Tensor, key: Tensor) -> Tensor:
        return sum(single(query[:, :dim], key[:, :dim]) for dim in DIMS)

    return {
        "floor": products(3, x, n),
        "single": step(single, x, y),
        "fusedloss": step(lambda q, k: fusedloss.matryoshka(fusedloss.info_nce, q, k, dims=DIMS), x, y),
        "loop": step(loop, x, y),
    }


CASES: dict[str, Callable[[int, str], dict[str, Step]]] = {
    "gist_embed": gist,
    "nt_xent": nt_xent,
    "nt_xent, D = 128": functools.partial(nt_xent, dim=128),
    "batch_hard_triplet": batch_hard,
    "batch_all_triplet": batch_all,
    "siglip": siglip,
    "matryoshka": matryoshka,
}
# On two CPU cores: where each is raced, and the largest at which the library it replaces is tried.
CPU_SIZES = {
    "gist_embed": (4096, (512, 1024, 2048)),
    "nt_xent": (16384, (512,)),
    "nt_xent, D = 128": (16384, ()),
    "batch_hard_triplet": (16384, (4096,)),
    "batch_all_triplet": (4096, ()),
    "siglip": (8192, ()),
    "matryoshka": (8192, ()),
}
GRADIENTS = {"gist_embed": 2, "nt_xent": 1, "nt_xent, D = 128": 1, "siglip": 2, "matryoshka": 2}  # x N x D; else 1


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
    calls = {name: call for name, call in CASES[case](n, device).items() if own(name) or device == "cuda"}
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
            if name != "floor":
                tick(f"{case}, N = {n}: memory")
                row["memory_bytes"] = measure.isolated(memory, case, name, n, device, False)
        found.append(row)
    return found


def own(name: str) -> bool:
    return name in ("floor", "fusedloss", "single", "loop", "eager")


def library_rows(case: str, sizes: tuple[int, ...], tick: Callable[..., None]) -> list[dict[str, Any]]:
    """The library's loss and ours at growing sizes, until it fails."""
    found = []
    for n in sizes:
        for name in CASES[case](64, "cpu"):
            if name in ("floor", "single", "loop"):
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

    def ratio(case: str, n: int, above: str, below: str) -> float:
        return at[case, n, above]["seconds"] / at[case, n, below]["seconds"]

    def mib(case: str, n: int) -> float:
        return at[case, n, "fusedloss"]["memory_bytes"] / MIB

    return [
        race.claim(
            "gist_embed, B=4096, D=384, guide of 384: time over its 12 bare products",
            ratio("gist_embed", 4096, "fusedloss", "floor"),
            1.3,
        ),
        race.claim("its MiB above inputs and gradients", mib("gist_embed", 4096), 128),
        race.claim(
            "matryoshka over 768, 512, 256, 128, 64, N=8192: time over the loss of 768 alone",
            ratio("matryoshka", 8192, "fusedloss", "single"),
            1.7,
        ),
        race.claim(
            "how much faster than the loop over the dims",
            ratio("matryoshka", 8192, "loop", "fusedloss"),
            1.3,
            at_least=True,
        ),
        race.claim(
            "nt_xent, 2B=16384, D=384: time over its three bare products",
            ratio("nt_xent", 16384, "fusedloss", "floor"),
            1.2,
        ),
        race.claim(
            "nt_xent, 2B=16384, D=128: time over its three bare products",
            ratio("nt_xent, D = 128", 16384, "fusedloss", "floor"),
            1.2,
        ),
        race.claim(
            "batch_hard_triplet, N=16384, D=384: MiB above inputs and gradients", mib("batch_hard_triplet", 16384), 128
        ),
        race.claim(
            "batch_hard_triplet, N=16384, D=384: time over two bare products",
            ratio("batch_hard_triplet", 16384, "fusedloss", "floor"),
            None,
        ),
        race.claim(
            "siglip, N=8192, D=384: time over its three bare products",
            ratio("siglip", 8192, "fusedloss", "floor"),
            None,
        ),
    ]


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
