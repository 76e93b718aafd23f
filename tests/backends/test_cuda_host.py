"""The host's part of backend "cuda", with neither nvcc nor a GPU: bindings, launches, devices, streams and threads.

tests/stub/ has a CUDA runtime of two devices that runs nothing and checks what it is asked by CUDA's rules: grids,
blocks, shared memory and the attribute that allows it on *this* device, clusters, tensor maps, streams of the current
device, operands of the launch's. csrc/'s host code is compiled over it as it is, kernels without bodies. torch takes
the devices for CUDA's: tensors are FakeTensors on the second while the first is current, and backwards run in
autograd's threads. What a kernel computes is not here: tests/host/ runs those.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

STUB = Path(__file__).parents[1] / "stub"
GROUPS = re.findall(r"@group\ndef (\w+)", (STUB / "cases.py").read_text())


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stub_build", STUB / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# One test, and so one process for all: torch is told of the devices before it is imported, once.
@pytest.mark.host
@pytest.mark.processes
def test_the_host_part(build):
    if reason := build.why_not():
        pytest.skip(reason)
    env = {name: value for name, value in os.environ.items() if not name.startswith("FUSEDLOSS_")}
    command = [sys.executable, str(STUB / "cases.py"), str(build.build())]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == GROUPS
    assert all(len(cases) >= 5 for cases in found.values()), {group: len(cases) for group, cases in found.items()}
    broken = [f"{group}: {case}\n{text}" for group, cases in found.items() for case, text in cases.items() if text]
    assert not broken, "\n".join([f"{len(broken)} cases", *broken[:10]])


def test_only_the_kernels_bodies_are_left_out(build):
    """What is compiled is csrc/ less those, line by line."""
    names = set()
    for file in sorted(build.CSRC.rglob("*.*")):
        text, found = file.read_text(), build.without_kernels(file.read_text())
        if "__global__" not in text and "<<<" not in text:
            assert found == text
            continue
        names |= set(re.findall(r"(\w+)\([^{}()]*\) \{ ::stub::entered", found))
        lines = set(text.splitlines())
        changed = [line for line in found.splitlines() if line not in lines]
        assert all("::stub::" in line for line in changed), changed
        assert len(changed) == text.count("__global__") + text.count("<<<")
    assert names == {
        *("prepare_kernel", "merge_kernel", "settle_kernel", "scale_rows_kernel", "weigh_kernel", "finish_kernel"),
        *("similarity_sm80", "similarity_sm90"),
    }


def test_a_kernel_without_launch_bounds_is_refused(build):
    with pytest.raises(ValueError, match="without __launch_bounds__"):
        build.without_kernels("__global__ void kernel(int x) { if (x) { } }")
    assert build.without_kernels("__global__ void __launch_bounds__(3 * 128, 1) k() { if (x) { } } int y;") == (
        "__global__ void __launch_bounds__(3 * 128, 1) k() { ::stub::entered(__PRETTY_FUNCTION__, 3 * 128); } int y;"
    )


def test_epilogues_include_one_way(build):
    """Each header takes what stands before it here, and what every kernel knows."""
    order = ("math", "tile", "sums", "masks", "store", "logits", "relations", "softmax", "select", "folds", "sides")
    assert {file.name for file in (build.CSRC / "epilogues").iterdir()} == {f"{name}.cuh" for name in order}
    for place, name in enumerate(order):
        text = (build.CSRC / "epilogues" / f"{name}.cuh").read_text()
        before = {"../ptx.cuh", "../similarity.h", *(f"{one}.cuh" for one in order[:place])}
        assert set(re.findall(r'#include "(.+)"', text)) <= before, name
