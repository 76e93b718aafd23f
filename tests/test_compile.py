"""Production tiles on every architecture, compiled without a GPU: tensor cores, no spills, it fits.

The compiler needs a process without the interpreter: one per architecture, two at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
# Shared memory a block may have, in KiB, and the tensor-core instruction in the PTX.
LIMITS = {
    80: (163, "mma.sync"),
    90: (227, "wgmma.mma_async"),
    100: (227, "tcgen05.mma"),
    120: (99, "mma.sync"),
}


def compile_all(capability: int) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, str(HERE / "compile_kernels.py"), str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled():
    with ThreadPoolExecutor(2) as pool:
        yield {capability: pool.submit(compile_all, capability) for capability in LIMITS}


@pytest.mark.slow
@pytest.mark.parametrize("capability", LIMITS)
def test_kernels_compile_within_the_resources(compiled: dict[int, Future], capability: int):
    shared_limit, instruction = LIMITS[capability]
    results = compiled[capability].result()
    wrong = []
    for result in results:
        uses_tensor_cores = result["dtype"] != "float32" or result["precision"] != "highest"
        if not (
            result["spilled"] == 0
            and result["shared"] <= shared_limit << 10
            and result["asynchronous_copies"]
            and result["tensor_cores"] == ([instruction] if uses_tensor_cores else [])
        ):
            wrong.append(result)
    assert not wrong, "\n".join(map(str, wrong))
    assert len(results) == 28
