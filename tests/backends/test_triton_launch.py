"""Triton's own JIT, binder, specialisation and launcher, over a driver that runs nothing (tests/launch/).

The interpreter, in which the other tests run the kernels, has a binder of its own and no launcher. A parameter that was
called `options` passed 16,000 tests there and was a SyntaxError at the first launch on any GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import contract
import pytest
from patience import seconds

pytest.importorskip("triton")

LAUNCH = Path(__file__).parents[1] / "launch"
CAPABILITIES = (80, 90, 100, 120)
DTYPES = ("bfloat16", "float16", "float32")
# Rows and D: one row; D = 1; ragged for every tile; one column more than two waves of tiles, at a D of whole vectors;
# the tiles of large batches, ragged in D; and D from which the vendor's library multiplies.
SHAPES = ((1, 8), (2, 1), (300, 72), (513, 64), (1200, 1000), (1200, 2400))


@pytest.fixture(scope="module")
def device() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launch_device", LAUNCH / "device.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["launch_device"] = module
    spec.loader.exec_module(module)
    if why := module.why_not():
        pytest.skip(why)
    module.build()
    return module


def child(device: ModuleType, cache: str, script: str, *arguments: str) -> Any:
    """What a script of tests/launch/ says, as JSON."""
    command = [sys.executable, str(LAUNCH / script), *arguments]
    environment = device.environment(device.BUILD / cache)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds(1800))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def walk(device: ModuleType, capability: int, cases: list[tuple[Any, ...]], whole: bool) -> dict[str, Any]:
    """whole: also through LLVM and ptxas, so that the driver sees what each kernel takes."""
    how = ("whole",) if whole else ("front", "front end only")
    return child(device, how[0], "walk.py", str(capability), json.dumps(cases), *how[1:])


LOSSES = [
    name
    for name, call in contract.CASES.items()
    if name not in contract.WITHOUT_TRITON
    and "backend" in inspect.signature(call(contract.Batch(4)).function).parameters
]


def cases(capability: int, part: int) -> list[tuple[Any, ...]]:
    """In six parts every loss has each shape, each dtype twice and each GPU; in three, each dtype and three shapes and
    GPUs; in one, one of each."""
    found = []
    for number, name in enumerate(LOSSES):
        shape = (number + part) % len(SHAPES)
        place = number // len(SHAPES) + shape
        if CAPABILITIES[place % len(CAPABILITIES)] == capability:
            found.append((name, DTYPES[place % len(DTYPES)], *SHAPES[shape], "as made"))
    return found


# What a launch does with a shape is its kernel's affair: losses of the same kernels have the other shapes.
PARTS = [part if part < 3 else pytest.param(part, marks=pytest.mark.whole) for part in range(len(SHAPES))]


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_loss_is_launched(device, capability, part):
    """Forward and backward, as a CUDA graph could hold them: nothing is read back, and nothing copied from the host."""
    asked = cases(capability, part)
    found = walk(device, capability, asked, whole=capability == 90)
    assert not found["failed"], "\n".join(found["failed"])
    assert len(asked) >= len(LOSSES) // 5 and sum(found["launches"].values()) > 2 * len(asked)


def test_the_parts_are_every_loss_in_each_shape_dtype_and_gpu():
    parts = [
        [
            (name, capability, dtype, shape)
            for capability in CAPABILITIES
            for name, dtype, *shape, _ in cases(capability, part)
        ]
        for part in range(len(SHAPES))
    ]
    every = [(name, capability, dtype, tuple(shape)) for part in parts for name, capability, dtype, shape in part]
    assert Counter(name for name, *_ in every) == dict.fromkeys(LOSSES, len(SHAPES))
    for kind, values in enumerate((CAPABILITIES, DTYPES, SHAPES), 1):
        assert {(case[0], case[kind]) for case in every} == set(itertools.product(LOSSES, values))
    short, first = every[: 3 * len(LOSSES)], every[: len(LOSSES)]
    assert {(case[0], case[2]) for case in short} == set(itertools.product(LOSSES, DTYPES))
    assert {case[1:] for case in first} == set(itertools.product(CAPABILITIES, DTYPES, SHAPES))
    for a, b in itertools.combinations(((1, CAPABILITIES), (2, DTYPES), (3, SHAPES)), 2):
        assert {(case[a[0]], case[b[0]]) for case in first} == set(itertools.product(a[1], b[1]))


LAYOUTS = ("as made", "expanded", "overlapping", "transposed", "odd address")
LARGE = (
    ("info_nce", "bfloat16", 2**18, 1024),
    ("clip", "bfloat16", 70000, 2400),
    *((name, "bfloat16", 2**21, 1100) for name in ("mse", "triplet", "cross_entropy", "softmax_pair", "list_net")),
)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_any_rows_are_launched(device, capability):
    """Rows that have no tensor map are copied: strides below a row's length, odd ones, odd addresses. And many rows."""
    losses = ("info_nce", "clip", "gist_embed", "siglip", "cross_entropy, probabilities", "contrastive", "softmax_pair")
    asked = [(name, "bfloat16", 300, 72, layout) for name in losses for layout in LAYOUTS]
    found = walk(device, capability, asked + [(*case, "as made") for case in LARGE], whole=False)
    assert not found["failed"], "\n".join(found["failed"])


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_prefixes_share_a_launch(device, capability):
    """Where they do. As many launches of each as a block has, whatever the number of prefixes."""
    asked = [
        (f"matryoshka, {name}", dtype, *shape, "as made")
        for name, dtype in (("fixed", "bfloat16"), ("learnt", "bfloat16"), ("learnt", "float16"))
        for shape in ((1, 64), (300, 72), (1200, 1000))
    ]
    found = walk(device, capability, asked, whole=False)
    assert not found["failed"], "\n".join(found["failed"])
    # Without a safe shift statistics come first.
    assert found["launches"].get("prefixes_kernel", 0) == (0 if capability == 90 else 3 * (1 + 2 + 2))


# Few tiles and many, multiples of 16 and none, and the last batch of an epoch, which may be one row.
BATCHES = (1, 2, 3, 7, 16, 31, 32, 48, 100, 128, 255, 256, 300, 512, 1000, 1024, 1030, 2047, 2048, 4096)


@pytest.mark.slow
def test_batch_sizes_share_kernels(device):
    """A new size in the midst of an epoch waits for the compiler, on every rank."""
    losses = (
        "clip",
        "info_nce, guide",
        "multiple_negatives_ranking",
        "siglip",
        "triplet",
        "cross_entropy",
        "mse, weight",
    )
    assert len(set(BATCHES)) == 20
    found = walk(
        device, 90, [(name, "bfloat16", rows, 64, "as made") for name in losses for rows in BATCHES], whole=False
    )
    assert not found["failed"], "\n".join(found["failed"])
    assert found["again"] > sum(found["launches"].values()) / 2  # of which walk.py asks Triton, too
    assert found["variants"].keys() == set(losses)
    variants = {(loss, kernel): n for loss, kernels in found["variants"].items() for kernel, n in kernels.items()}
    assert max(variants.values()) <= 6, variants


@pytest.mark.processes
def test_one_matrix_against_itself_takes_half_of_the_similarities(device):
    """By kernels, D = 768, in products of N x N x D: what DESIGN.md says. Nothing is read back to decide it."""
    found = {tuple(case): counts for *case, counts in child(device, "front", "counts.py")}
    work = {case: round(2 * (counts["launched"] + counts["products"]), 2) for case, counts in found.items()}
    twice = ("nt_xent, learned", "multi_similarity", "circle", "sup_con, in")
    for rows, stored, computed in ((2048, 4, 6), (16384, 3.33, 4.46), (65536, 4.12, 4.12)):
        assert [work["nt_xent", rows, half] for half in (False, True)] == [6, stored]
        for name in twice:
            assert [work[name, rows, half] for half in (False, True)] == [8, computed], name
            assert found[name, rows, True]["products"] == pytest.approx(1)
        once = (1 + 2048 / rows) / 2
        counts = found["nt_xent, learned", rows, True]
        assert counts["stats_rows"] + counts["stats_rows_and_columns"] == once
        # Both searches of batch-hard from one sweep.
        assert [work["batch_hard_triplet", rows, half] for half in (False, True)] == [4, round(2 * once, 2)]


@pytest.fixture(scope="module")
def failures(device) -> dict[str, list[str]]:
    return child(device, "front", "failures.py")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("what", "said"),
    {
        "compile": ("PTXASError", "`ptxas` failed with error code 255", "install triton again"),
        "compiler": ("RuntimeError", "Failed to find C compiler", "install gcc"),
        "load": ("RuntimeError", "no kernel image is available", "update the driver"),
        "launch": ("RuntimeError", "no kernel image is available", "update the driver"),
        "tensor map": ("RuntimeError", "globalStrides[0] must be at least the 128 bytes that it steps over, got 0", ""),
    }.items(),
)
def test_a_kernel_that_fails_says_what_to_run(failures, what, said):
    import triton

    kind, message, cause = failures[what]
    kernel = "similarity_kernel" if what == "tensor map" else "score_kernel"
    assert kind == "RuntimeError" and cause == said[0]
    assert message.startswith(
        f"backend 'triton': kernel '{kernel}' was not launched on cuda:0 (stub, sm_90) by Triton {triton.__version__}. "
    )
    for words in (*said, "Remedy: ", "`python -m fusedloss check`", "backend='chunked'"):
        assert words in message


@pytest.mark.processes
def test_the_stub_and_the_watch_refuse_what_a_gpu_would(failures):
    assert "gridDimY and gridDimZ must be at most 65535, got 65536, 1" in failures["grid"][1]
    assert "cannot be accessed from Triton (cpu tensor?)" in failures["host"][1]
    assert failures["empty grid"] == []
    watched = {name: said for name, said in failures.items() if name.startswith("captured ")}
    assert len(watched) == 10 and watched.pop("captured nothing") == []
    assert all(watched.values()), watched


# cuTensorMapEncodeTiled: what is asked for in the place of a good map, and the rule it breaks -------------------------

MAP = {"type": 9, "rank": 2, "address": 1 << 60, "dims": (72, 300), "strides": (144,), "box": (64, 128)}
MAP |= {"steps": (1, 1), "interleave": 0, "swizzle": 3, "fill": 0}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({}, ""),
        ({"type": 99}, "unknown data type 99"),
        ({"rank": 0}, "tensorRank must be 1 to 5, got 0"),
        ({"rank": 6}, "tensorRank must be 1 to 5, got 6"),
        ({"interleave": 2}, "interleaved tensors have 3 dimensions, got 2"),
        ({"address": 1 << 40}, "is no address of the device"),
        ({"address": (1 << 60) + 8}, "globalAddress must be a multiple of 16"),
        ({"dims": (72, 0)}, "globalDim[1] must be 1 to 2^32, got 0"),
        ({"dims": (72, 1 << 32)}, ""),
        ({"dims": (72, (1 << 32) + 1)}, "globalDim[1] must be 1 to 2^32, got 4294967297"),
        ({"strides": (152,)}, "globalStrides[0] must be a multiple of 16, got 152"),
        ({"strides": ((1 << 40) - 16,)}, ""),
        ({"strides": (1 << 40,)}, "globalStrides[0] must be below 2^40"),
        ({"strides": (0,)}, "globalStrides[0] must be at least the 144 bytes that it steps over, got 0"),
        ({"strides": (128,)}, "globalStrides[0] must be at least the 144 bytes that it steps over, got 128"),
        (
            {"rank": 3, "dims": (72, 300, 2), "strides": (144, 144), "box": (64, 1, 1), "steps": (1, 1, 1)},
            "43200 bytes",
        ),
        ({"box": (64, 257)}, "boxDim[1] must be 1 to 256, got 257"),
        ({"box": (64, 0)}, "boxDim[1] must be 1 to 256, got 0"),
        ({"box": (4, 8)}, "boxDim[0] must be a multiple of 16 bytes, got 8"),
        ({"box": (128, 8)}, "boxDim[0] must be at most the swizzle's 128 bytes, got 256"),
        ({"box": (128, 8), "swizzle": 0}, ""),
        ({"swizzle": 1}, "boxDim[0] must be at most the swizzle's 32 bytes, got 128"),
        ({"swizzle": 7}, "unknown swizzle 7"),
        ({"steps": (1, 9)}, "elementStrides[1] must be 1 to 8, got 9"),
        ({"steps": (0, 1)}, "elementStrides[0] must be 1 to 8, got 0"),
        ({"type": 3, "dims": (36, 300), "box": (32, 8), "fill": 1}, "only floating point is filled by NaN"),
    ],
)
def test_the_stub_knows_the_rules_of_a_tensor_map(device, change, rule):
    asked = MAP | change
    words = lambda values, kind: (kind * 5)(*values)
    room = (ctypes.c_uint64 * 32)()
    aligned = (ctypes.addressof(room) + 63) // 64 * 64
    code = library(device).cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned),
        asked["type"],
        asked["rank"],
        ctypes.c_void_p(asked["address"]),
        words(asked["dims"], ctypes.c_uint64),
        words(asked["strides"], ctypes.c_uint64),
        words(asked["box"], ctypes.c_uint32),
        words(asked["steps"], ctypes.c_uint32),
        asked["interleave"],
        asked["swizzle"],
        2,
        asked["fill"],
    )
    assert bool(code) == bool(rule)
    assert rule in error(device)


class Config(ctypes.Structure):
    """CUlaunchConfig"""

    _fields_ = [
        *((f"{what}Dim{axis}", ctypes.c_uint) for what in ("grid", "block") for axis in "XYZ"),
        ("sharedMemBytes", ctypes.c_uint),
        ("hStream", ctypes.c_void_p),
        ("attrs", ctypes.c_void_p),
        ("numAttrs", ctypes.c_uint),
    ]


@pytest.mark.parametrize(
    ("grid", "block", "shared", "allowed", "rule"),
    [
        ((2**31 - 1, 65535, 65535), (128, 1, 1), 48 << 10, 0, ""),
        ((2**31, 1, 1), (128, 1, 1), 0, 0, "gridDimX must be at most 2^31 - 1, got 2147483648"),
        ((1, 65536, 1), (128, 1, 1), 0, 0, "gridDimY and gridDimZ must be at most 65535, got 65536, 1"),
        ((1, 1, 65536), (128, 1, 1), 0, 0, "gridDimY and gridDimZ must be at most 65535, got 1, 65536"),
        ((1, 0, 1), (128, 1, 1), 0, 0, "no dimension of the grid may be 0, got 1 x 0 x 1"),
        ((1, 1, 1), (1024, 2, 1), 0, 0, "a block has 1 to 1024 threads, got 2048"),
        ((1, 1, 1), (128, 1, 1), 65536, 0, "65536 bytes of shared memory, it may have 49152"),
        ((1, 1, 1), (128, 1, 1), 232448, 232448, ""),
        (
            (1, 1, 1),
            (128, 1, 1),
            0,
            232449,
            "232449 bytes of shared memory and 0 fixed ones, sm_90 gives a block 232448",
        ),
    ],
)
def test_the_stub_knows_the_rules_of_a_launch(device, grid, block, shared, allowed, rule):
    driver, module, function = library(device), ctypes.c_void_p(), ctypes.c_void_p()
    driver.cuModuleLoadData(ctypes.byref(module), b"no cubin of kernel")
    driver.cuModuleGetFunction(ctypes.byref(function), module, b"kernel")
    code = driver.cuFuncSetAttribute(function, 8, allowed) if allowed else 0  # MAX_DYNAMIC_SHARED_SIZE_BYTES
    code = code or driver.cuLaunchKernelEx(ctypes.byref(Config(*grid, *block, shared)), function, None, None)
    assert bool(code) == bool(rule)
    assert rule in error(device)
    launched = driver.stub_launches().decode()
    x, y, z = grid
    assert launched == ("" if rule else f"kernel grid {x} {y} {z} block 128 1 1 shared {shared}\n")


def library(device: ModuleType) -> ctypes.CDLL:
    driver = ctypes.CDLL(str(device.BUILD / "libcuda.so.1"))
    driver.stub_launches.restype = ctypes.c_char_p
    assert driver.stub_be(90)
    return driver


def error(device: ModuleType) -> str:
    text = ctypes.c_char_p()
    library(device).cuGetErrorString(1, ctypes.byref(text))
    return text.value.decode()
