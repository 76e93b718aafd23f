"""tests/host/, where a CPU runs what is written with csrc/ptx.cuh: each instruction against the PTX ISA."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
GXX = shutil.which("g++")

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(GXX is None, reason="needs g++ for the host's build of the CUDA kernels"),
]

FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-DFUSEDLOSS_HOST"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def build(folder, *flags):
    binary = folder / "selftest"
    includes = ["-I", ROOT / "tests" / "host", "-I", ROOT / "csrc"]
    command = [GXX, *FLAGS, *flags, *includes, ROOT / "tests" / "host" / "selftest.cpp", "-o", binary]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return binary


@pytest.fixture(scope="module")
def selftest(tmp_path_factory):
    binary = build(tmp_path_factory.mktemp("host"), *SANITIZE)

    def run(*arguments, order="forward", copies="late", stdin=None):
        env = os.environ | {"FUSEDLOSS_HOST_ORDER": order, "FUSEDLOSS_HOST_COPIES": copies}
        env |= {"ASAN_OPTIONS": "detect_leaks=0"}  # leaks are found by ptrace, which a container may forbid
        return subprocess.run([binary, *map(str, arguments)], env=env, input=stdin, capture_output=True)

    return run


@pytest.fixture(params=["forward", "backward"])
def order(request):
    return request.param


def passes(done):
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("name", ["order", "refused_launches", "shared_memory_is_nan"])
def test_launches(selftest, order, name):
    passes(selftest(name, order=order))


@pytest.mark.parametrize("name", ["barrier", "warp_barrier", "named_barriers", "shuffles"])
def test_waiting(selftest, order, name):
    passes(selftest(name, order=order))


@pytest.mark.parametrize("copies", ["late", "early"])
@pytest.mark.parametrize("name", ["zero_fill", "copy_groups", "pipelines"])
def test_copies(selftest, order, copies, name):
    passes(selftest(name, order=order, copies=copies))


@pytest.mark.parametrize(
    "name", ["ldmatrix", "ldmatrix_trans", "stmatrix", "mma_bf16", "mma_fp16", "mma_tf32", "truncated_sums", "matmul"]
)
def test_matrices(selftest, order, name):
    passes(selftest(name, order=order))


FAULTS = {  # in selftest.cpp's order
    "divergence": r"divergent collective: \d+ lanes of the warp are in (sync_warp|shuffle_xor), this one in",
    "exit": r"31 wait in ldmatrix(.|\n)*deadlock",
    "block_barrier": r"all wait at barrier 0 with 32 of 64 threads(.|\n)*deadlock",
    "two_sizes": r"barrier 1 of (64 threads, and of 32|32 threads, and of 64)|deadlock",
    "barrier_number": r"barrier 16 of 64 threads: 0 to 15",
    "ldmatrix_unaligned": r"ldmatrix: shared address 8 is not aligned",
    "ldmatrix_beyond": r"ldmatrix: shared address 1008 is beyond the block's 992 bytes",
    "stmatrix_unaligned": r"stmatrix: shared address 8 is not aligned",
    "copy_to_unaligned": r"cp.async: shared address 4 is not aligned",
    "copy_from_unaligned": r"cp.async: 0x\w+ is not aligned to 16 bytes",
    "copy_beyond": r"cp.async: shared address 992 is beyond",
    "copy_source": r"AddressSanitizer: heap-buffer-overflow(.|\n)*READ of size 9",
    "load_unaligned": r"load: 0x\w+ is not aligned to 8 bytes",
    "load16_unaligned": r"load16: 0x\w+ is not aligned to 16 bytes",
    "store8_unaligned": r"store8: 0x\w+ is not aligned to 8 bytes",
    "not_shared": r"shared_address: 0x\w+ is not in shared memory",
    "shared_overrun": r"AddressSanitizer: heap-buffer-overflow(.|\n)*WRITE of size 1(.|\n)*0 bytes (after|to the)",
    "lane_mask": r"shuffle_xor: lane mask 32",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_the_program_and_is_named(selftest, order, name):
    done = selftest("fault", list(FAULTS).index(name), order=order)
    assert done.returncode != 0
    assert re.search(FAULTS[name], done.stderr.decode())


def test_fibers_of_other_processors(tmp_path):
    binary = build(tmp_path, "-DFUSEDLOSS_HOST_UCONTEXT")
    for name in ("order", "named_barriers", "matmul"):
        passes(subprocess.run([binary, name], capture_output=True))


def bits_to_float(bits):
    return bits.astype(np.uint32).view(np.float32)


def numbers():
    """Every sign, exponent and leading 7 bits of fp32 with what can follow them, every number of fp16 and what is half
    way to the next, those on both sides, and any."""
    leading = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    following = np.array(
        [0, 1, 0xFFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32
    )
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (halves[:-1] + halves[1:]) / 2  # exact
    between = np.concatenate([np.nextafter(between, to, dtype=np.float32) for to in (-np.inf, np.inf)] + [between])
    drawn = np.random.default_rng(0).integers(1 << 32, size=1 << 16, dtype=np.uint32)
    parts = [bits_to_float((leading | following).ravel()), halves, -halves, between, -between, bits_to_float(drawn)]
    edges = np.array([65504, 65519.996, 65520, 2**-24, 2**-25, np.nextafter(2**-25, 1), 2**-14, np.inf, np.nan], "f4")
    x = np.concatenate([*parts, edges, -edges])
    return x[: x.size // 2 * 2]


def converted(selftest, name, x, dtype):
    done = selftest(name, stdin=x.tobytes())
    passes(done)
    return np.frombuffer(done.stdout, dtype)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_pack_rounds_to_nearest(selftest, name):
    x = numbers()
    packed = converted(selftest, f"pack_{name}", x, np.uint16)  # a pair's first number is the lower half
    dtype = torch.bfloat16 if name == "bf16" else torch.float16
    expected = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
    expected = np.where(np.isnan(x), 0x7FFF, expected)  # the canonical one
    np.testing.assert_array_equal(packed, expected)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_every_16_bit_number_as_a_float(selftest, name):
    x = np.arange(1 << 16, dtype=np.uint16)
    dtype = torch.bfloat16 if name == "bf16" else torch.float16
    expected = torch.from_numpy(x.view(np.int16)).view(dtype).float().numpy()
    y = converted(selftest, f"from_{name}", x, np.float32)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(np.signbit(y), np.signbit(expected))


def test_tf32_rounds_half_away_from_zero(selftest):
    x = numbers()
    rounded = converted(selftest, "to_tf32", x, np.uint32)
    assert (rounded[np.isnan(x)] == 0x7FFFFFFF).all()
    assert (rounded[~np.isnan(x)] & 0x1FFF == 0).all()
    finite = x[np.isfinite(x)].astype(np.float64)
    _, exponent = np.frexp(finite)  # of a fraction in [1/2, 1)
    unit = np.ldexp(1.0, np.maximum(exponent - 1, -126) - 10)
    expected = np.copysign(np.floor(np.abs(finite) / unit + 0.5) * unit, finite)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(bits_to_float(rounded)[np.isfinite(x)], expected.astype(np.float32))


def test_exp2_flushes_denormals(selftest):
    special = np.array([0, -0.0, 127, 128, -126, -126.0001, -149, -150, np.inf, -np.inf, np.nan, 1e-40, -1e-40], "f4")
    x = np.concatenate([special, np.linspace(-160, 140, 20001, dtype=np.float32)])
    y = converted(selftest, "exp2", x, np.float32)
    exact = np.exp2(x.astype(np.float64))
    exact[exact < 2.0**-126] = 0
    exact[exact >= 2.0**128] = np.inf
    np.testing.assert_allclose(y, exact, rtol=2**-22, atol=0)
