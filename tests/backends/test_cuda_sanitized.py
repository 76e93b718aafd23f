"""csrc/ on a CPU under AddressSanitizer and UndefinedBehaviorSanitizer: a kernel that reads or writes outside of a
tensor or of its shared memory ends the process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from patience import seconds

pytest.importorskip("pybind11")

TESTS = Path(__file__).parent
ROOT = TESTS.parents[1]
GXX = shutil.which("g++")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers' runtime is preloaded"),
    pytest.mark.skipif(GXX is None, reason="needs g++"),
]

# Every epilogue, mask and layout, each in one number format or two, and of large products the part with every pair of
# values; all of it would take minutes.
CHOSEN = {
    "test_cuda_kernels": "(cpu or first) and (bf16 or (fp32 and anywhere)) and not (whole or inside or stages or two)",
    "test_cuda_rows": "cpu and (float32 or bfloat16) and (515 or unaligned) and not finish",
    "test_backends": "cuda and (float32 or bfloat16) and ragged",
}


def sanitized(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """pytest with `arguments`, or `code`; the sanitizers' runtime is there before torch, and knows its allocations."""
    libraries = [shared(name) for name in ("libasan.so", "libubsan.so")]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # leaks: Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "FUSEDLOSS_HOST_SANITIZE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-x"]
    command = [*([sys.executable, "-c", code] if code else pytest_), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds(3600))


def shared(name: str) -> str:
    found = subprocess.run([str(GXX), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"{name} is not installed beside g++")
    return path


@pytest.mark.parametrize("file", CHOSEN)
def test_nothing_is_read_or_written_outside(file):
    done = sanitized(f"tests/backends/{file}.py", "-m", "not (gpu or grid or whole)", "-k", CHOSEN[file])
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout


# Of exactly the size that the kernels are told, and then one less than that.
OVERRUNS = """
import importlib.util, os, sys, torch

spec = importlib.util.spec_from_file_location("host_build", "tests/host/build.py")
host = importlib.util.module_from_spec(spec)
spec.loader.exec_module(host)
extension = host.load(host.build(sanitize=True))
from fusedloss.backends import cuda
from fusedloss.backends.cuda import launching
from fusedloss.core.strips import Strip

launching.extension = lambda: extension
x, y, out = torch.randn(128, 64), torch.randn(256, 64), torch.empty(128, 256)
strip = Strip(x, y, torch.tensor(1.0), None, None, torch.zeros(256), torch.zeros(128, dtype=torch.int64))
plain = launching.struct

def launch(field):
    def struct(name, **fields):
        if field in fields:
            fields[field] += 1
        return plain(name, **fields)

    launching.struct = struct
    cuda.stats_rows([strip]), cuda.similarities(strip, out)

for field in ("", "M", "N", "D", "stride_xm", "stride_om"):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        launch(field)
        os._exit(0)
    print(field or "nothing", "ok" if os.waitpid(child, 0)[1] == 0 else "found")
"""


def test_an_overrun_of_a_tensor_is_found():
    done = sanitized(code=OVERRUNS)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split("\n")[0] == "nothing ok", done.stderr[-4000:]
    found = dict(line.split() for line in done.stdout.splitlines())
    assert found == {"nothing": "ok"} | dict.fromkeys(("M", "N", "D", "stride_xm", "stride_om"), "found")
    assert done.stderr.count("heap-buffer-overflow") >= 5
