"""Compiles what the launchers launch, for one architecture and without a GPU; JSON on stdout.

Run as `python compile_kernels.py 90`, in a process without TRITON_INTERPRET. The launchers run on
meta tensors with the kernel replaced by a recorder, so that tiles, flags and signatures are theirs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile

import torch
import triton
from fusedloss.kernels import softmax
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedloss.backends import triton as backend
from fusedloss.problem import Block, Problem, Softmax, Strip

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
TENSOR_CORES = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")
LARGE, SMALL = 8192, 512  # the usual tile, and the one for few tiles
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int64: "i64",
}


def launches(mode: str, dtype: torch.dtype, size: int) -> None:
    """The launcher of `mode` with every optional operand present: the most registers it needs."""
    empty = lambda *shape, kind=torch.float32: torch.empty(shape, dtype=kind, device="meta")
    x = empty(size, 768, kind=dtype)
    vector = empty(size)
    target = empty(size, kind=torch.int64)
    strip = Strip(x, x, empty(), vector, vector, vector, target)
    problem = Problem((x,), (Block(0, 0),), empty(), target, vector, scale_bound=20.0)
    out = empty(size, size, kind=dtype)
    with_q = Softmax(vector, vector, vector)
    without_q = Softmax(vector, vector, None)
    gain = empty() if dtype == torch.float16 else None
    match mode:
        case "stats":
            backend.stats_rows([strip])
        case "stats, columns":
            backend.stats_rows_and_columns(strip)
        case "exp":
            backend.exp_rows(problem, [strip], [out], None)
        case "exp, q":
            backend.exp_rows(problem, [strip], [out], vector)
        case "grad":
            backend.grad_rows([strip], [out], without_q, None, gain)
        case "grad, q":
            backend.grad_rows([strip], [out], with_q, None, gain)
        case "grad, columns":
            backend.grad_rows([strip], [out], without_q, without_q, gain)
        case "grad, columns, q":
            backend.grad_rows([strip], [out], with_q, with_q, gain)


MODES = (
    "stats",
    "stats, columns",
    "exp",
    "exp, q",
    "grad",
    "grad, q",
    "grad, columns",
    "grad, columns, q",
)


class Recorder:
    """Stands in for the kernel: compiles its arguments instead of launching them."""

    def __init__(self, kernel, capability: int):
        self.kernel, self.capability = kernel, capability

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, num_warps, num_stages, enable_fp_fusion, **constants):
        signature, values, attributes = {}, {}, {}

        def type_of(value, path):
            if isinstance(value, tuple):
                types = [type_of(v, (*path, i)) for i, v in enumerate(value)]
                return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
            if isinstance(value, torch.Tensor):
                attributes[path] = [["tt.divisibility", 16]]
                return "*" + TYPES[value.dtype]
            if isinstance(value, float):
                return "fp32"
            if isinstance(value, int) and value != 1:
                if value % 16 == 0:
                    attributes[path] = [["tt.divisibility", 16]]
                return "i32"
            values[path] = value
            return "constexpr"

        names = self.kernel.arg_names
        for index, name in enumerate(names):
            if index < len(args):
                signature[name] = type_of(args[index], (index,))
            else:
                signature[name], values[index,] = "constexpr", constants[name]
        self.compiled = triton.compile(
            ASTSource(self.kernel, signature, values, attributes),
            target=GPUTarget("cuda", self.capability, 32),
            options={
                "num_warps": num_warps,
                "num_stages": num_stages,
                "enable_fp_fusion": enable_fp_fusion,
            },
        )
        self.tile = tuple(constants[f"BLOCK_{axis}"] for axis in "MND")
        self.launch = (*self.tile, constants["SUBTILES"], num_warps, num_stages)


def resources(compiled) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"]}


def main(capability: int) -> None:
    kernel = softmax.similarity_kernel
    recorder = Recorder(kernel, capability)
    softmax.similarity_kernel = recorder
    backend._capability = lambda device: divmod(capability, 10)
    results = []
    cases = [
        *((mode, dtype, "highest", LARGE) for mode in MODES for dtype in ("bfloat16", "float16")),
        *((mode, "float32", "high", LARGE) for mode in MODES),
        # In full precision no tensor core is used and the tile is far from any limit.
        *((mode, "float32", "highest", LARGE) for mode in (MODES[0], MODES[-1])),
        *((mode, dtype, "high", SMALL) for mode in MODES[-1:] for dtype in ("bfloat16", "float32")),
    ]
    for mode, dtype, precision, size in cases:
        torch.set_float32_matmul_precision(precision)
        launches(mode, getattr(torch, dtype), size)
        ptx = recorder.compiled.asm["ptx"]
        results.append(
            {
                "mode": mode,
                "dtype": dtype,
                "precision": precision,
                "size": size,
                "tile": recorder.launch,
                "shared": recorder.compiled.metadata.shared,
                "tensor_cores": [name for name in TENSOR_CORES if name in ptx],
                "asynchronous_copies": "cp.async" in ptx,
                **resources(recorder.compiled),
            }
        )
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]))
