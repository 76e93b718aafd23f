"""The sm_90 kernel: every test of test_cuda_kernels.py once more, on a CPU as tests/host/ runs it, and on an H100.

Blocks get several tiles and rings wrap: there is one block, or cluster, or two for all tiles. What the host's threads
do first, when loads land and when products take place (tests/host/machine.h, ptx_host90.h) differs from case to case;
marker `grid` has every case with every one of them.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any, NamedTuple

import pytest
import test_cuda_kernels as kernels
import torch

from fusedloss.backends import cuda

NUMBERS = ("bf16", "fp16", "tf32")
# Instances for clusters of two are those of bf16 that are not narrow: similarity_sm90_run.cuh.
CLUSTERS = {
    *("test_products", "test_stats", "test_stats_of_several_strips", "test_stats_of_what_is_masked", "test_exp"),
    *("test_exp_of_what_is_masked", "test_grad", "test_guide", "test_a_guides_own_targets_are_ties"),
    *("test_a_nan_reaches_its_row_and_column_only", "test_extreme_logits_stay_finite"),
}
PLAIN = ("nothing else", "factors", "bias", "strange targets", "no target")

LOADS, PRODUCTS = ("early", "late"), ("issue", "wait")
MODES = tuple(itertools.product(LOADS, PRODUCTS))
EVERY = 9  # of the table, which share runs in `make test`


class Case(NamedTuple):
    index: int
    test: str
    arguments: dict[str, Any]
    cluster: int

    def __str__(self) -> str:
        values = "-".join(str(value) for value in self.arguments.values())
        return f"{self.test.removeprefix('test_')}-{values}{'-cluster' if self.cluster == 2 else ''}"

    @property
    def order(self) -> str:
        """Of the threads: forward, backward, or at random by a seed."""
        return ("forward", "backward", str(self.index))[self.index % 3]

    def run(self, device: torch.device) -> None:
        arguments = dict(self.arguments)
        numbers = kernels.NUMBERS[arguments.get("number", arguments.get("one_of_each", "bf16"))]
        for name in ("number", "one_of_each"):
            if name in arguments:
                arguments[name] = numbers
        if "given" in arguments:
            arguments["given"] = kernels.SETS[arguments["given"]]
        with kernels.products(numbers):
            getattr(kernels, self.test)(device, **arguments)


def table() -> list[Case]:
    """From what the tests are parametrised by: operands as TMA takes them, numbers as wgmma does."""
    found: list[Case] = []
    for name, function in vars(kernels).items():
        parameters = inspect.signature(function).parameters if name.startswith("test_") else {}
        if "device" not in parameters:
            continue
        axes: dict[str, Any] = {"number": NUMBERS, "one_of_each": ("bf16", "tf32"), "given": kernels.SETS}
        axes = {axis: list(values) for axis, values in axes.items() if axis in parameters}
        for mark in getattr(function, "pytestmark", ()):
            axes[mark.args[0]] = [getattr(value, "values", (value,))[0] for value in mark.args[1]]
        if "layout" in axes:
            axes["layout"] = ["rows"]
        for values in itertools.product(*axes.values()):
            given = dict(zip(axes, values, strict=True))
            found.append(Case(len(found), name, given, 1))
            of_bf16 = given.get("number", given.get("one_of_each")) == "bf16"
            narrow = given.get("given", "bias") not in PLAIN or (given.get("by_columns") and given.get("with_q"))
            if name in CLUSTERS and of_bf16 and not narrow:
                found.append(Case(len(found), name, given, 2))
    return found


CASES = table()


def use(monkeypatch, load, cluster: int, blocks: int, capability: int = 90) -> list[Any]:
    """Launches of sm_90's kernel, whose plans are returned as they are made."""
    plans: list[Any] = []

    def plan(_, __, tensor_cores, aligned, narrow):
        made = load().plan(capability, tensor_cores, aligned, narrow)
        made.blocks = blocks
        made.cluster = 1 if narrow or made.capability != 90 else cluster
        plans.append(made)
        return made

    monkeypatch.setattr(cuda, "_plan", plan)
    monkeypatch.setattr(cuda, "capability_of", lambda device: capability)
    return plans


def check(case: Case, device: torch.device, plans: list[Any]) -> None:
    del plans[:]
    case.run(device)
    used = {(plan.capability, plan.cluster) for plan in plans}
    assert (90, case.cluster) in used, used


def on_the_host(monkeypatch, extension, case: Case, loads: str, products: str) -> None:
    kernels.on_the_host(extension, monkeypatch)
    plans = use(monkeypatch, lambda: extension, case.cluster, case.cluster * (1 + case.index % 2))
    settings = {"ORDER": case.order, "COPIES": loads, "PRODUCTS": products}
    for name, value in settings.items():
        monkeypatch.setenv(f"FUSEDLOSS_HOST_{name}", value)
    torch.manual_seed(0)
    try:
        check(case, torch.device("cpu"), plans)
    except AssertionError as error:
        error.add_note(f"with {settings}")
        raise


@pytest.mark.parametrize("case", CASES[::EVERY], ids=str)
def test_table(case, host_extension, monkeypatch):
    on_the_host(monkeypatch, host_extension, case, *MODES[case.index // EVERY % len(MODES)])


@pytest.mark.grid
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_whole_table_in_every_mode(case, host_extension, monkeypatch):
    for loads, products in MODES:
        on_the_host(monkeypatch, host_extension, case, loads, products)


# Arithmetic: what a GPU may do to the last bits -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def fused_extension(host_build):
    """x * y + z in one rounding wherever a compiler may, as nvcc does."""
    if "fma" not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip("this CPU has no FMA")
    return host_build.load(host_build.build(fused=True))


def as_a_gpu_rounds(monkeypatch, seed: int) -> None:
    monkeypatch.setenv("FUSEDLOSS_HOST_SUMS", "truncate")
    monkeypatch.setenv("FUSEDLOSS_HOST_ULPS", str(seed))
