"""The model of the kernels' pipeline against closed forms, and against what must hold of any pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pipeline_model as model
import pytest
from pipeline_model import Device, Kernel

# All rates but one resource's are as good as infinite.
FREE = Device(
    "free", 90, 132, fma=2048, store=1e9, l2=1e9, latency=0, trip=0, ex2=1e9, shared=1e9, ipc=1e9, ipc_warp=1e9
)
TILE = Kernel(128, 256, stages=4)
SHARED = replace(TILE, warps=4, consumers=2, ahead=True, lead=2)
PINGPONG = replace(SHARED, block_m=64, separate=True, lead=0)
ORDINARY = model.DEVICES["h200"]
FOLD = {"instructions": 9.0, "ex2": 1.0, "stored": 2}


@pytest.mark.parametrize("kernel", [TILE, SHARED, PINGPONG, replace(TILE, programs=2)])
def test_products_alone_run_at_the_peak(kernel):
    assert model.share(kernel, FREE, 768) == pytest.approx(1, rel=1e-3)


def test_without_a_producer_each_tile_waits_for_its_first_stage():
    """A load's latency, and the time of its bytes."""
    device = replace(FREE, latency=700, l2=96.0)
    fill = 700 + TILE.stage_bytes / 96
    assert model.clocks(TILE, device, 1024) == pytest.approx(16 * 1024 + fill, rel=1e-3)
    assert model.clocks(replace(TILE, ahead=True), device, 1024) == pytest.approx(16 * 1024, rel=1e-3)


@pytest.mark.parametrize("kernel", [TILE, SHARED, PINGPONG])
def test_a_slow_fold_takes_its_instructions(kernel):
    """100 instructions an element at 0.5 a clock of each of 4 schedulers of 32 lanes."""
    device, elements = replace(FREE, ipc=0.5), kernel.block_m * kernel.block_n
    slow = replace(kernel, instructions=100.0)
    fold = 100 * elements / 128 / 0.5
    hidden = kernel.separate  # by the other consumer's products
    products = 0 if hidden else kernel.peak(device, 64)
    assert model.clocks(slow, device, 64) == pytest.approx(fold + products, rel=0.02)


def test_one_warp_of_a_scheduler_issues_at_its_own_rate():
    slow = replace(PINGPONG, instructions=100.0)
    fold = 100 * 64 * 256 / 128 / 0.5
    device = replace(FREE, ipc_warp=0.5)  # the two consumers' folds run side by side
    assert model.clocks(slow, device, 64) == pytest.approx(fold / 2, rel=0.05)


def test_exponentials_and_stores_are_bounds():
    one = replace(FREE, ex2=1.0, store=1.0)
    exponentials = replace(TILE, ex2=1.0, instructions=1.0)
    assert model.clocks(exponentials, one, 64) == pytest.approx(128 * 256 + 1024, rel=0.01)
    assert model.clocks(replace(PINGPONG, stored=2), one, 64) == pytest.approx(2 * 64 * 256, rel=0.01)


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_a_short_ring_is_bound_by_latency(stages):
    """A latency is ten products. One stage stays with the product under way: `stages - 1` loads in each latency."""
    device = replace(FREE, latency=10240)
    found = model.clocks(replace(TILE, stages=stages, ahead=True), device, 2048)
    assert found == pytest.approx(32 * 10240 / (stages - 1), rel=0.05)


def test_l2_is_a_bound():
    device = replace(FREE, l2=24.0)
    assert model.clocks(replace(TILE, ahead=True), device, 768) == pytest.approx(12 * TILE.stage_bytes / 24, rel=0.01)
    shared = replace(TILE, ahead=True, cluster=2)
    assert model.clocks(shared, device, 768) == pytest.approx(12 * 32 * 1024 / 24, rel=0.01)


KERNELS = {
    "serial": replace(TILE, **FOLD),
    "two programs": replace(TILE, block_n=128, warps=4, programs=2, stages=3, **FOLD),
    "two consumers": replace(SHARED, **FOLD),
    "ping-pong": replace(PINGPONG, cluster=2, **FOLD),
}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("D", [64, 256, 1024])
def test_no_resource_is_used_beyond_its_rate(kernel, D):
    found = model.clocks(kernel, ORDINARY, D)
    for name, least in model.bounds(kernel, ORDINARY, D).items():
        assert found >= least * 0.99, name
    assert 0 < model.share(kernel, ORDINARY, D) <= 1


MORE = {
    "stages": lambda k, d: (replace(k, stages=k.stages + 2), d),
    "L2": lambda k, d: (k, replace(d, l2=d.l2 * 1.5)),
    "latency": lambda k, d: (k, replace(d, latency=d.latency / 2)),
    "instructions": lambda k, d: (replace(k, instructions=k.instructions / 2), d),
    "issue": lambda k, d: (k, replace(d, ipc=d.ipc * 1.2, ipc_warp=d.ipc_warp * 1.2)),
    "memory": lambda k, d: (k, replace(d, store=d.store * 2)),
}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("what", MORE)
def test_more_of_a_resource_never_costs(kernel, what):
    """But for the rhythm of consumers that meet: which of two requests comes first may change, as on a machine."""
    better, room = MORE[what](kernel, ORDINARY), 1.05 if kernel.lead else 1.01
    for D in (192, 768):
        assert model.clocks(*better, D) <= room * model.clocks(kernel, ORDINARY, D)


def test_a_launch_ends_with_its_last_round():
    kernel = KERNELS["serial"]
    one = model.launch(kernel, ORDINARY, 128 * 132, 256, 768)
    assert model.launch(kernel, ORDINARY, 128, 256, 768) == one
    assert model.launch(kernel, ORDINARY, 128 * 133, 256, 768) > 1.5 * one
    many = model.launch(kernel, ORDINARY, 128 * 132, 256 * 100, 768)
    assert many == pytest.approx(100 * model.clocks(kernel, ORDINARY, 768), rel=0.01)


PAGE = Path(__file__).parents[2] / "docs" / "results" / "gpu-model.md"


@pytest.mark.parametrize(
    ("backend", "device", "mode"),
    [("triton", "a100", "exp"), ("triton", "h200", "grad"), ("triton", "b200", "stats"), ("cuda", "h200", "exp")],
)
def test_the_page_is_what_the_model_says(backend, device, mode):
    """`python tools/pipeline_model.py > docs/results/gpu-model.md`; four of its rows, and all that is not a row."""
    (row,) = model.table(model.prediction(backend, device, mode), [])[:1]
    part = PAGE.read_text().partition(f"### {backend}\n")[2].partition("\n#")[0]
    unmeasured = [line.rpartition(" | ")[0] for line in part.splitlines()]  # a measured share may stand in its place
    assert row.rpartition(" | ")[0].removesuffix(" |") in [line.removesuffix(" |") for line in unmeasured]


def test_the_pages_inputs_are_the_models():
    text = PAGE.read_text()
    assert text.startswith(model.HEAD + "\n".join(model._inputs()))
    assert "\n".join(model._published()) in text and "\n".join(model._questions()) in text


@pytest.mark.parametrize("name", model.RULED)
def test_the_rule_for_tiles_is_near_the_models_best(name):
    """From a wave of tiles on. Below, and on an L40S, the model asks for more programs at once: see the page."""
    room = {"h200": 0.05, "a100": 0.09, "l40s": 0.23}[name]
    for mode in ("stats", "exp"):
        for size in (4096, 8192):
            for D in (384, 768, 1024):
                more, rule, best = model.excess(model.DEVICES[name], mode, size, D)
                assert more <= room, (mode, size, D, rule, best)


def test_without_an_assumption_a_published_estimate_comes_out():
    """An independent model of csrc/'s kernel as it was on 2026-11-29, with these inputs: exp 64, 78, 83 % at D = 384,
    768, 1024; stats 71, 83, 87; grad by columns 55, 71, 76; and 67 % of exp at D = 768 with 35 bytes a clock."""
    device = replace(ORDINARY, ipc=1.0, store=1e9)
    before = model.Kernel(128, 256, 4, warps=4, consumers=2, ahead=True, lead=2)
    folds = {"exp": (13.3, 1, 2), "stats": (10.5, 1, 0), "grad, columns": (19.8, 2, 2)}
    kernels = {
        mode: replace(before, instructions=instructions, ex2=ex2, stored=stored)
        for mode, (instructions, ex2, stored) in folds.items()
    }
    for mode, found in {"exp": (64, 78, 83), "stats": (71, 83, 87), "grad, columns": (55, 71, 76)}.items():
        for D, percent in zip((384, 768, 1024), found, strict=True):
            assert 100 * model.share(kernels[mode], device, D) == pytest.approx(percent, abs=1.6)
    low = replace(device, l2=35.0)
    assert 100 * model.share(kernels["exp"], low, 768) == pytest.approx(67, abs=1.6)
