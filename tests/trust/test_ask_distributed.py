"""Ranks of one group whose verdicts differ, so that each runs another backend, get the exact loss and do not hang."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

import fusedloss
from fusedloss import backends, masks
from fusedloss.trust import ask, families, verdicts
from fusedloss.trust.verdicts import FAILED, PROVED, Verdict

pytest.importorskip("triton")
pytestmark = [pytest.mark.processes, pytest.mark.interpreter]

if torch.cuda.is_available():
    pytest.skip("processes are forked here, which CUDA does not survive", allow_module_level=True)

CPU, D = torch.device("cpu"), 6
# Of each rank: all proved, all failed, or asked of a child when the loss is first called.
VERDICTS = {"proved, failed": (PROVED, FAILED), "failed, proved": (FAILED, PROVED), "asked, failed": ("asked", FAILED)}
SHARDS = ((5, 4), (0, 6))


def drawn(rows):
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, rows, D, generator=generator)
    temperature = torch.tensor(0.3)
    return x, y, temperature, torch.arange(rows) % 4


LOSSES = {
    "info_nce": lambda x, y, t, ids, **k: fusedloss.info_nce(x, y, temperature=t, **k),
    "info_nce, known scale": lambda x, y, t, ids, **k: fusedloss.info_nce(
        x, y, normalize=True, mask=masks.same_id(ids, ids), **k
    ),
    "info_nce, by row": lambda x, y, t, ids, **k: fusedloss.info_nce(x, y, temperature=t, reduction="none", **k),
    "margin": lambda x, y, t, ids, **k: fusedloss.info_nce(
        x, y, temperature=t, normalize=True, mask=masks.score_margin(0.1), **k
    ),
    "clip": lambda x, y, t, ids, **k: fusedloss.clip(x, y, 1 / t, **k),
    "clip, known scale": lambda x, y, t, ids, **k: fusedloss.clip(x, y, 10.0, normalize=True, **k),
    "siglip": lambda x, y, t, ids, **k: fusedloss.siglip(x, y, 1 / t, -0.5 / t, **k),
    "ranking": lambda x, y, t, ids, **k: fusedloss.multiple_negatives_ranking(
        x, y, scale=1 / t, directions=("query_to_doc", "doc_to_query"), **k
    ),
}


def results(name, tensors, **options):
    x, y, temperature, ids = tensors
    leaves = [t.clone().requires_grad_() for t in (x, y, temperature)]
    loss = LOSSES[name](*leaves, ids, **options)
    found = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    zeros = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]
    return [loss.detach(), *zeros]


def rank(number):
    """In a process of its own."""
    os.environ["FUSEDLOSS_VERIFY"] = "first"
    backends.AUTO["cpu"] = ("triton", "chunked", "reference")
    ask.COMMAND = [sys.executable, "-S", "-E", str(Path(__file__).parents[1] / "support" / "planted.py"), "proves"]
    taken = []
    first = backends.select

    def noted(*arguments, **options):
        taken.append(first(*arguments, **options))
        return taken[-1]

    fusedloss.distributed.agreement.select = fusedloss.distributed.gather.select = noted

    def run(case):
        name, states, strategy, shard, folder = case
        os.environ["FUSEDLOSS_CACHE_DIR"] = f"{folder}/{number}"  # else one would read the other's
        ask.forget()
        taken.clear()
        names = [verdicts.name_of("triton", family, "fp32") for family in families.of_backend("triton")]
        if states[number] != "asked":
            ask._known[CPU] = {each: Verdict(states[number], 1) for each in names}
        x, y, temperature, ids = drawn(sum(shard))
        part = slice(sum(shard[:number]), sum(shard[: number + 1]))
        found = results(
            name,
            (x[part], y[part], temperature, ids[part]),
            group=dist.group.WORLD,
            strategy=strategy,
            grad_scale="sum",
        )
        return found, set(taken)

    return run


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(2, rank)
    yield ranks
    ranks.stop()


@pytest.mark.pairwise
@pytest.mark.parametrize("shard", SHARDS, ids=str)
@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("states", VERDICTS)
@pytest.mark.parametrize("name", LOSSES)
def test_ranks_of_different_verdicts_get_the_exact_loss(name, states, strategy, shard, ranks, tmp_path):
    found = ranks((name, VERDICTS[states], strategy, shard, str(tmp_path)))
    for (_, taken), state in zip(found, VERDICTS[states], strict=True):
        assert taken == {"chunked" if state == FAILED else "triton"}
    wanted = results(name, drawn(sum(shard)), backend="reference")
    (first, x0, y0, t0), (second, x1, y1, t1) = (values for values, _ in found)
    value = torch.cat([first, second]) if first.dim() else first
    if not first.dim():
        assert first == second
    torch.testing.assert_close([value, torch.cat([x0, x1]), torch.cat([y0, y1]), t0 + t1], wanted)
