"""The sm_90 kernel: every test of test_cuda_kernels.py once more, on a CPU as tests/host/ runs it, and on an H100.

Blocks get several tiles and rings wrap: there is one block, or cluster, or two for all tiles. What the host's threads
do first, when loads land and when products take place (tests/host/machine.h, ptx_host90.h) differs from case to case.
`make test` has a share of the cases; marker `grid` has every triple of values, with loads and products of both kinds,
and marker `whole` the rest.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import test_cuda_kernels as kernels
import torch
from grids import cover

from fusedloss.backends.cuda import launching

ROOT = Path(__file__).absolute().parents[2]
NUMBERS = ("bf16", "fp16", "tf32")
# Instances for clusters of two are those of 16 bits that are not narrow: similarity_sm90_run.cuh.
CLUSTERS = {
    *("test_products", "test_stats", "test_stats_of_several_strips", "test_stats_of_what_is_masked", "test_exp"),
    *("test_exp_of_what_is_masked", "test_grad", "test_guide", "test_a_guides_own_targets_are_ties"),
    *("test_a_nan_reaches_its_row_and_column_only", "test_extreme_logits_stay_finite"),
}
PLAIN = ("nothing else", "factors", "bias", "strange targets", "no target")

LOADS, PRODUCTS = ("early", "late"), ("issue", "wait")
MODES = tuple(itertools.product(LOADS, PRODUCTS))
RING = "twice around"
EVERY = 7  # of the table, which share runs in `make test`


@pytest.fixture(scope="module")
def host_build():
    """tests/host/build.py."""
    spec = importlib.util.spec_from_file_location("host_build", ROOT / "tests" / "host" / "build.py")
    assert spec is not None and spec.loader is not None
    host = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(host)
    if why := host.why_not():
        pytest.skip(why)
    return host


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
            if mark.name == "parametrize":
                axes[mark.args[0]] = [getattr(value, "values", (value,))[0] for value in mark.args[1]]
        if "layout" in axes:
            axes["layout"] = ["rows"]
        for values in itertools.product(*axes.values()):
            given = dict(zip(axes, values, strict=True))
            found.append(Case(len(found), name, given, 1))
            short = given.get("number", given.get("one_of_each")) != "tf32"
            narrow = given.get("given", "bias") not in PLAIN
            if name in CLUSTERS and short and not narrow:
                found.append(Case(len(found), name, given, 2))
    return found


CASES = table()


def part(strength: int) -> set[int]:
    """Indices of cases with every combination of values of `strength` axes, the cluster one of them, of each test."""
    found: set[int] = set()
    for _, several in itertools.groupby(CASES, key=lambda case: case.test):
        cases = list(several)
        values = [(*case.arguments.values(), case.cluster) for case in cases]
        found |= {cases[place].index for place in cover(values, strength)}
    return found


PAIRS, TRIPLES = part(2), part(3)


def but_whole(cases: list[Case], taken: set[int]) -> list[Any]:
    return [case if case.index in taken else pytest.param(case, marks=pytest.mark.whole) for case in cases]


def use(monkeypatch, load, cluster: int, blocks: int, capability: int = 90) -> list[Any]:
    """Launches of sm_90's kernel, whose plans are returned as they are made."""
    plans: list[Any] = []

    def plan(_, __, tensor_cores, aligned, narrow):
        made = load().plan(capability, tensor_cores, aligned, narrow)
        made.blocks = blocks
        made.cluster = 1 if narrow or made.capability != 90 else cluster
        plans.append(made)
        return made

    monkeypatch.setattr(launching, "plan_of", plan)
    monkeypatch.setattr(launching, "capability_of", lambda device: capability)
    return plans


def check(case: Case, device: torch.device, plans: list[Any], capability: int = 90) -> None:
    case.run(device)
    used = {(plan.capability, plan.cluster) for plan in plans}
    assert (capability, case.cluster if capability == 90 else 1) in used, used


def on_the_host(monkeypatch, extension, case: Case, loads: str, products: str, capability: int = 90) -> None:
    kernels.on_the_host(extension, monkeypatch)
    plans = use(monkeypatch, lambda: extension, case.cluster, case.cluster * (1 + case.index % 2), capability)
    settings = {"ORDER": case.order, "COPIES": loads, "PRODUCTS": products}
    for name, value in settings.items():
        monkeypatch.setenv(f"FUSEDLOSS_HOST_{name}", value)
    torch.manual_seed(0)
    try:
        check(case, torch.device("cpu"), plans, capability)
    except AssertionError as error:
        error.add_note(f"with {settings}")
        raise


@pytest.mark.parametrize("case", CASES[::EVERY], ids=str)
def test_table(case, host_extension, monkeypatch):
    on_the_host(monkeypatch, host_extension, case, *MODES[case.index // EVERY % len(MODES)])


@pytest.mark.grid
@pytest.mark.parametrize("case", but_whole(CASES, TRIPLES), ids=str)
def test_the_whole_table(case, host_extension, monkeypatch):
    """In one mode, and with the other loads and the other products."""
    for mode in (MODES[case.index % 4], MODES[3 - case.index % 4]):
        on_the_host(monkeypatch, host_extension, case, *mode)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in CASES if case.cluster == 2 or RING in str(case)], ids=str)
def test_an_h100(case, monkeypatch):
    """What test_cuda_kernels.py does not have there: clusters of two, and several tiles a block."""
    device = torch.device("cuda", torch.cuda.current_device())
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("needs compute capability 9.0")
    if reason := launching._why_not(torch.float32, device, launching.extension):
        pytest.skip(reason)
    check(case, device, use(monkeypatch, launching.extension, case.cluster, case.cluster * (1 + case.index % 2)))


# Faults that must be found --------------------------------------------------------------------------------------------

WRONG = r"[1-9]\d* of 240000 are wrong"
DEADLOCK = r"lanes 0 to 31 wait for the mbarrier at \d+, parity \d(.|\n)*deadlock"


class Fault(NamedTuple):
    """What is another line of csrc/, and what is then said, in this mode."""

    file: str
    line: str
    instead: str
    found: str
    cluster: int = 1
    order: str = "forward"
    loads: str = "early"
    products: str = "issue"


EXPECT = "ptx::mbarrier_expect(full, Config::kStageBytes"
FAULTS = {
    "a stage is let go before its product is over": Fault(
        "sm90.h",
        "ops.all_but_one_done();\n    ops.release(held.stage);",
        "ops.release(held.stage);\n    ops.all_but_one_done();",
        WRONG,
        products="wait",
    ),
    "consumers start with the producer's parity": Fault(
        "sm90.h", "consumer() { return {0, 0}; }", "consumer() { return {0, 1}; }", DEADLOCK
    ),
    "y's bytes are not expected": Fault(
        "similarity_sm90.cuh", EXPECT, EXPECT + " - Config::kYBytes", r"\d bytes more than were expected"
    ),
    "rows for the store are read where they do not lie": Fault(
        "epilogues/store.cuh", "taken = place(lane / 4, lane % 4)", "taken = lane", WRONG
    ),
    "y is sent to one block of two": Fault(
        "similarity_sm90.cuh", "(1 << Config::CLUSTER) - 1", "1", DEADLOCK, cluster=2, loads="late"
    ),
}
MORE_FAULTS = {
    "more bytes are expected than come": Fault("similarity_sm90.cuh", EXPECT, EXPECT + " + 16", DEADLOCK),
    "both parts of y lie in one place": Fault(
        "similarity_sm90.cuh", "y + rank * kPart * kRowBytes", "y", WRONG, cluster=2, order="3"
    ),
    "half of the consumers empty a stage": Fault(
        "similarity_sm90.cuh", "kReleases = 2 *", "kReleases =", "deadlock", order="backward"
    ),
    "the fold does not wait": Fault(
        "similarity_sm90.cuh", "ptx::wgmma_wait<0>()", "ptx::wgmma_wait<1>()", "without a wait", products="wait"
    ),
    "no fence between fold and product": Fault("similarity_sm90.cuh", "ptx::wgmma_fence();", "", r"no wgmma\.fence"),
    "no fence behind mbarrier.init": Fault(
        "similarity_sm90.cuh", "ptx::fence_barrier_init();", "", r"no fence followed mbarrier\.init"
    ),
    "a cluster starts without a barrier": Fault(
        "similarity_sm90.cuh", "ptx::cluster_sync();  // nobody", "ptx::sync();  // nobody", "no mbarrier at", cluster=2
    ),
    "a cluster ends without a barrier": Fault(
        *(
            "similarity_sm90.cuh",
            "if constexpr (CLUSTER > 1) ptx::cluster_sync();",
            "",
            r"block \d of the cluster has ended",
        ),
        cluster=2,
    ),
    "consumers want more registers than there are": Fault(
        "similarity_sm90.cuh",
        "240;\n  static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * 168);",
        "248;",
        r"lanes \d+ to 31 wait for registers(.|\n)*deadlock",
    ),
}


def products90(folder, *, file="", line="", instead=""):
    """tests/host/products90.cpp with csrc/ as it is, or with another line."""
    host, csrc = ROOT / "tests" / "host", folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    if file:
        text = (csrc / file).read_text()
        assert text.count(line) == 1
        (csrc / file).write_text(text.replace(line, instead))
    flags = ["-std=c++17", "-O1", "-Wno-psabi", "-DFUSEDLOSS_HOST", f"-I{host}", f"-I{csrc}"]
    subprocess.run(["g++", *flags, host / "products90.cpp", "-o", folder / "products90"], check=True)

    def run(cluster, order, loads, products):
        given = {"ORDER": order, "COPIES": loads, "PRODUCTS": products}
        env = os.environ | {f"FUSEDLOSS_HOST_{name}": value for name, value in given.items()}
        done = subprocess.run([folder / "products90", str(cluster)], env=env, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.host
def test_products_of_whole_numbers(tmp_path, host_build):
    run = products90(tmp_path)
    for cluster, order, (loads, products) in itertools.product((1, 2), ("forward", "backward", "7"), MODES):
        assert run(cluster, order, loads, products) == (0, "0 of 240000 are wrong\n"), (cluster, order, loads, products)


@pytest.mark.host
@pytest.mark.parametrize("name", [*FAULTS, *(pytest.param(name, marks=pytest.mark.grid) for name in MORE_FAULTS)])
def test_a_fault_is_found(name, tmp_path, host_build):
    fault = (FAULTS | MORE_FAULTS)[name]
    run = products90(tmp_path, file=fault.file, line=fault.line, instead=fault.instead)
    code, said = run(fault.cluster, fault.order, fault.loads, fault.products)
    assert code != 0
    assert re.search(fault.found, said), said[-3000:]


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


@pytest.mark.grid
@pytest.mark.host
@pytest.mark.parametrize(
    "case", but_whole([case for case in CASES if case.index in PAIRS or case.index % 2 == 0], PAIRS), ids=str
)
def test_the_table_as_a_gpu_rounds(case, fused_extension, monkeypatch):
    """By the kernels in turn."""
    capability = 90 if case.cluster == 2 or case.index // 2 % 2 else 80
    as_a_gpu_rounds(monkeypatch, case.index + 1)
    on_the_host(monkeypatch, fused_extension, case, "late", "issue", capability)
