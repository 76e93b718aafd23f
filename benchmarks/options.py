"""Options of the losses over the same loss without them, and distillation over its bare products, in one run.

    python benchmarks/options.py --out benchmarks/results/options.json

Steps are forward and backward, interleaved with the plain loss. A ratio is the median of the rounds' own, since a
machine may be slower for some rounds. An option that changes a row's loss should cost nothing, since the sweep has the
row's sums at hand: at most 1.03 times the plain loss. `info_nce_distill` needs four products of the student's rows and
two of the teacher's.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from in_batch import normal, step
from torch import Tensor, nn

import fusedloss
from fusedloss import masks, transforms
from fusedloss.bench import measure, results, tables
from fusedloss.bench.floors import FLOOR, floors

PLAIN = "plain"
MOST, MOST_OF_DISTILLATION = 1.03, 1.2
MIB = 2**20
STUDENT, TEACHER, CANDIDATES = 384, 768, 4
Step = Callable[[], object]


def several(n: int, *offsets: int) -> Tensor:
    """The row's own column and others, [N, P]."""
    return (torch.arange(n)[:, None] + torch.tensor(offsets)) % n


def phi(loss: Tensor) -> Tensor:
    return (1 + loss.square()).sqrt()


def info_nce_options(n: int) -> dict[str, dict[str, Any]]:
    scores = torch.randn(n, 1 + CANDIDATES, generator=torch.Generator().manual_seed(5))
    return {
        "focal(2)": {"transform": transforms.focal(2.0)},
        "focal(2, detach=True)": {"transform": transforms.focal(2.0, detach=True)},
        "refined_logq()": {"transform": transforms.refined_logq()},
        "generalised(0.7)": {"transform": transforms.generalised(0.7)},
        "clipped(5)": {"transform": transforms.clipped(5.0)},
        "a function": {"transform": phi},
        "decoupled": {"decoupled": True},
        "debiased=0.1": {"debiased": 0.1},
        "margin=0.1": {"margin": 0.1},
        "key_bias off the target": {"key_bias": scores[:, 0], "bias_on_target": False},
        'target [N, 4], "each"': {"target": several(n, 0, 1, 2, 3)},
        'target [N, 4], "joint"': {"target": several(n, 0, 1, 2, 3), "positives": "joint"},
        "score_margin(relative=0.95)": {"mask": masks.score_margin(relative=0.95)},
        "score_margin(factor=0.5)": {"mask": masks.score_margin(relative=0.95, factor=0.5)},
    }


def pairs(loss: Callable[..., Tensor], options: dict[str, dict[str, Any]], n: int) -> dict[str, Step]:
    x, y = (normal(n, STUDENT, "cpu", seed) for seed in range(2))
    return {name: step(functools.partial(loss, **given), x, y) for name, given in ({PLAIN: {}} | options).items()}


def info_nce(n: int) -> dict[str, Step]:
    cosines = functools.partial(fusedloss.info_nce, normalize=True)  # which a margin is of
    return pairs(cosines, info_nce_options(n), n)


def own_negatives(n: int) -> dict[str, Step]:
    """Four hard negatives a row, with and without a teacher's scores of the row's own candidates."""
    own = normal(n * CANDIDATES, STUDENT, "cpu", 2).view(n, CANDIDATES, STUDENT)
    scores = torch.randn(n, 1 + CANDIDATES, generator=torch.Generator().manual_seed(5))
    options = {"teacher_scores": {"teacher_scores": scores}}
    return pairs(functools.partial(fusedloss.info_nce, negatives=own), options, n)


def clip(n: int) -> dict[str, Step]:
    options = {
        "focal(2)": {"transform": transforms.focal(2.0)},
        "decoupled": {"decoupled": True},
        "debiased=0.1": {"debiased": 0.1},
    }
    return pairs(functools.partial(fusedloss.clip, logit_scale=20.0), options, n)


def nt_xent(n: int) -> dict[str, Step]:
    return pairs(fusedloss.nt_xent, {"focal(2)": {"transform": transforms.focal(2.0)}}, n // 2)


def distillation(n: int) -> dict[str, Step]:
    x, y = (normal(n, STUDENT, "cpu", seed) for seed in range(2))
    teacher = tuple(normal(n, TEACHER, "cpu", seed) for seed in (2, 3))
    rows = 1024
    student = floors(x, y, rows, (2, 1, 1))[FLOOR]
    taught = floors(*teacher, rows, (2, 0, 0))[FLOOR]

    def dense(query: Tensor, key: Tensor) -> Tensor:
        p = (teacher[0] @ teacher[1].T / 0.05).softmax(1)
        return nn.functional.kl_div((query @ key.T / 0.05).log_softmax(1), p, reduction="batchmean")

    return {
        FLOOR: lambda: (student(), taught()),
        "fusedloss": step(lambda q, k: fusedloss.info_nce_distill(q, k, *teacher), x, y),
        "dense torch": step(dense, x, y),
    }


CASES: dict[str, Callable[[int], dict[str, Step]]] = {
    "info_nce": info_nce,
    "info_nce, 4 own negatives": own_negatives,
    "clip": clip,
    "nt_xent": nt_xent,
    "info_nce_distill": distillation,
}


def memory(case: str, racer: str, n: int) -> int:
    """Bytes of one step beyond its gradients; of a fresh process."""
    call = CASES[case](n)[racer]
    CASES[case](64)[racer]()
    return measure.peak_memory(call, "cpu") - 2 * n * STUDENT * 4


def rows_of(case: str, n: int, rounds: int, tick: Callable[..., None]) -> list[dict[str, Any]]:
    taken: dict[str, list[float]] = {}
    for name, spent in measure.samples_interleaved(CASES[case](n), rounds):
        taken.setdefault(name, []).append(spent)
        tick(f"{case}: {name}")
    under = taken[FLOOR if FLOOR in taken else PLAIN]
    found = []
    for name, spent in taken.items():
        row = {"case": case, "n": n, "racer": name, "seconds": statistics.median(spent), "samples": spent}
        row["ratio"] = statistics.median(own / other for own, other in zip(spent, under, strict=True))
        if FLOOR in taken and name != FLOOR:
            row["memory_bytes"] = measure.isolated(memory, case, name, n)
        most = MOST_OF_DISTILLATION if name == "fusedloss" else None if FLOOR in taken or name == PLAIN else MOST
        found.append(row | {"most": most, "held": None if most is None else row["ratio"] <= most})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=8192, help="N")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    environment, rows, ended = results.environment(__file__), [], False
    total = sum(len(CASES[case](64)) * (given.rounds + 1) for case in given.cases)
    try:
        with tables.progress(total) as tick:
            for case in given.cases:
                rows += rows_of(case, given.size, given.rounds, tick)
    except KeyboardInterrupt:
        ended = True
    cells = [[row["case"], row["racer"], f"{row['seconds'] * 1e3:.0f}", f"{row['ratio']:.3f}"] for row in rows]
    tables.table("options", ["loss", "option", "ms", "ratio"], cells)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        results.write_json(given.out, {"environment": environment, "rows": rows})
    return 130 if ended else int(any(row["held"] is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
