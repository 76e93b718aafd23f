"""docs/scaling.md: its snippets run, its tables are the script's, and the model counts what it says it counts."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fusedloss

pytest.importorskip("tabulate")

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "scaling.md"

spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
scaling = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scaling)


@pytest.fixture
def alone(monkeypatch):
    """A process without torchrun, which ends without a group."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert not dist.is_initialized()
    yield
    dist.destroy_process_group()


def test_snippets_run_and_the_cached_step_has_the_plain_gradients(alone):
    here: dict = {}
    for snippet in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        exec(compile(snippet, str(PAGE), "exec"), here)
    model, batch = here["model"], (here["questions"], here["answers"])
    found = {}
    for name in ("plain", "cached"):
        model.zero_grad()
        if name == "cached":
            here["cached_step"](model, *batch, rows=100)
        else:
            query, key, temperature = model(*batch)
            fusedloss.info_nce(query, key, temperature=temperature, normalize=True).backward()
        found[name] = [p.grad.clone() for p in model.parameters()]
    torch.testing.assert_close(found["cached"], found["plain"], rtol=1e-4, atol=1e-6)


def test_the_page_is_what_the_script_writes():
    subprocess.run([sys.executable, "benchmarks/scaling.py", "--check"], cwd=ROOT, check=True)
    assert scaling.PLOT.read_bytes().startswith(b"\x89PNG")
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGE.read_text()):
        assert (PAGE.parent / target).exists(), target


def test_memory_of_gather_is_the_columns_and_that_of_the_ring_the_rows():
    machine, size = scaling.gpu(), 2**24 * 1024
    held = [scaling.memory(scaling.Place(2**24, world), machine, "gather").columns for world in (64, 1024)]
    # bf16 columns and gradients, and these in fp32 on their way back, of which the rank's own rows come.
    assert held == [8 * size + 4 * size / world for world in (64, 1024)]
    assert scaling.memory(scaling.Place(2**24, 64, itemsize=4), machine, "gather").columns > 12 * size
    held = [scaling.memory(scaling.Place(2**24, world), machine, "ring") for world in (64, 1024)]
    assert held[0].columns == 16 * held[1].columns == 20 * size / 64


def test_time_is_work_over_the_rate_where_links_are_free():
    machine = scaling.gpu()._replace(within=1e30, adapter=1e30, bandwidth=1e30)
    place = scaling.Place(2**20, 64)
    product = 2 * place.rows * place.columns * place.dim / machine.rate
    for strategy, symmetric, products in (("gather", False, 3), ("gather", True, 4), ("ring", False, 4)):
        spent = scaling.seconds(place._replace(symmetric=symmetric), machine, strategy)
        assert spent.products == pytest.approx(products * product) and spent.total < 1.01 * spent.products
    assert scaling.seconds(place._replace(world=1), scaling.gpu(), "gather").links == 0


def test_a_collective_takes_the_slower_way():
    machine = scaling.gpu()
    inside, across = (scaling.collective(1e9, world, machine) for world in (8, 1024))
    assert inside == pytest.approx(7 / 8 * 1e9 / 369e9, rel=0.05)
    assert across == pytest.approx(1e9 / (8 * 41e9) + 1023 * scaling.HOP, rel=0.05)


def test_the_ring_waits_where_shards_are_small():
    machine = scaling.gpu()
    waits = [scaling.seconds(scaling.Place(rows * 1024, 1024), machine, "ring").links for rows in (1024, 2**15)]
    assert waits[0] > 0 == waits[1]
