"""Every kernel x mode x dtype on four architectures, compiled without a GPU: what it takes, and with what it works.

The compiler needs a process without the interpreter: one per architecture, two at a time.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import fusedloss.kernels
import pytest
import torch

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
TABLE = HERE.parent / "docs" / "kernel-resources.md"
# Shared memory a block may have, in KiB; a multiprocessor's; the instruction of its tensor cores.
LIMITS = {80: (163, 164, "HMMA"), 90: (227, 228, "HGMMA"), 100: (227, 228, "UTCMMA"), 120: (99, 100, "HMMA")}
REGISTERS = 65536  # a multiprocessor's
# Under which Triton a kernel spills, and where: (mode, dtype) by architecture. Under any other nothing does.
SPILLS: dict[str, dict[int, set[tuple[str, str]]]] = {}


@pytest.fixture(scope="module")
def compiler() -> ModuleType:
    """compile_kernels.py, as a module."""
    specification = importlib.util.spec_from_file_location("compile_kernels", HERE / "compile_kernels.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["compile_kernels"] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def compiled(compiler) -> dict[int, list[dict[str, Any]]]:
    return compiler.in_processes()


def wrong(capability: int, entry: dict[str, Any]) -> list[str]:
    """What an entry breaks of the rules."""
    block, multiprocessor, tensor_cores = LIMITS[capability]
    found = []
    if entry["shared"] > block << 10:
        found.append("shared memory")
    if "config" not in entry:
        whole_rows = ("prepare", "prepare, softcap, margin", "norms", "settle, patch", "weigh", "finish")
        if entry["mode"] in whole_rows and not entry["LDG.128"]:
            found.append("narrow loads")
        return found
    config = entry["config"]
    programs = config["programs"]
    if programs * entry["registers"] * 32 * config["num_warps"] > REGISTERS:
        found.append("registers of all programs")
    if programs * (entry["shared"] + 1024) > multiprocessor << 10:
        found.append("shared memory of all programs")
    stores = not entry["mode"].startswith(("stats", "top", "guide"))
    multiplies = config["GEMM"] != "library" and (entry["dtype"] != "float32" or entry["precision"] == "high")
    if bool(entry[tensor_cores]) != multiplies:
        found.append(f"{tensor_cores} {entry[tensor_cores]}")
    if bool(entry["UTMALDG"]) != (config["GEMM"] == "descriptors"):
        found.append(f"UTMALDG {entry['UTMALDG']}")
    if bool(entry["UTMASTG"]) != (config["GEMM"] == "descriptors" and stores):
        found.append(f"UTMASTG {entry['UTMASTG']}")
    if bool(entry["LDGSTS"]) != (config["GEMM"] == "pointers"):
        found.append(f"LDGSTS {entry['LDGSTS']}")
    if stores and config["GEMM"] != "descriptors" and multiplies and not entry["STG.128"]:
        found.append("narrow stores")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("capability", LIMITS)
def test_no_spills_it_fits_and_it_uses_the_hardware(compiled, compiler, capability):
    entries = compiled[capability]
    spills = {(entry["mode"], entry["dtype"]) for entry in entries if entry["spilled"] or entry["local"]}
    assert spills == SPILLS.get(triton.__version__, {}).get(capability, set())
    broken = [f"{wrong(capability, entry)}: {entry}" for entry in entries if wrong(capability, entry)]
    assert not broken, "\n".join(broken)
    kinds = {(e["mode"], e["dtype"], e["precision"] == "high") for e in entries if e["kernel"] == "similarities"}
    for mode in compiler.MODES:  # none was passed over
        assert {(mode, "bfloat16", False), (mode, "float16", False), (mode, "float32", True)} <= kinds
    for mode in (*compiler.MASKED, *compiler.SOFTCAP):
        assert (mode, "bfloat16", True) in kinds
    assert {e["mode"] for e in entries if e["kernel"] == "rows"} == {*compiler.BY_ROW, *compiler.ROWWISE}


@pytest.mark.slow
def test_the_committed_table_is_what_the_compiler_says(compiled, compiler):
    """Of the pinned Triton; another one's registers differ."""
    written = TABLE.read_text()
    if f"Triton {triton.__version__} " not in written:
        pytest.skip(f"{TABLE.name} is of another Triton than {triton.__version__}")
    assert compiler.table(compiled) == written, "run python tests/compile_kernels.py --table > docs/kernel-resources.md"


def device_functions() -> dict[str, Any]:
    """Every `@triton.jit` function of the package as the compiler has it, whether or not the interpreter runs here."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    found = {}
    for module in pkgutil.iter_modules(fusedloss.kernels.__path__):
        loaded = importlib.import_module(f"fusedloss.kernels.{module.name}")
        for name, value in vars(loaded).items():
            if isinstance(value, JITFunction | InterpretedFunction) and value.fn.__module__ == loaded.__name__:
                found[f"{module.name}.{name}"] = JITFunction(value.fn)
    return found


def names_of_a_launch() -> set[str]:
    """The options of a launch, and what the function that Triton writes to bind a kernel's arguments calls its own."""
    from triton.backends.nvidia.compiler import CUDAOptions
    from triton.runtime import jit

    def bare(first):
        pass

    bare = jit.JITFunction(bare)
    code = jit.create_function_from_signature(bare.signature, bare.params, None).__code__
    options = {field.name for field in dataclasses.fields(CUDAOptions)}
    own = {*code.co_varnames, *code.co_names} - {"first"}
    run = inspect.signature(jit.JITFunction.run).parameters.values()
    return {*options, *own, *(p.name for p in run if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))}


def test_no_kernel_calls_a_parameter_as_the_launcher_does():
    """`options` was one: the interpreter took it, and on a GPU the first launch was a SyntaxError."""
    from triton.runtime.jit import create_function_from_signature

    names = names_of_a_launch()
    assert {"options", "params", "backend", "debug", "num_warps", "num_stages", "num_ctas", "grid", "warmup"} <= names
    functions = device_functions()
    assert {"similarity.similarity_kernel", "pointwise.pointwise_kernel", "lists.lambda_kernel"} <= functions.keys()
    wrong = {name: names & set(function.arg_names) for name, function in functions.items()}
    assert not {name: found for name, found in wrong.items() if found}
    for function in functions.values():
        create_function_from_signature(function.signature, function.params, None)


def test_every_launch_fixes_whether_products_and_sums_are_fused():
    """Triton 3.10 changes the default, and with it results and instruction counts."""
    from fusedloss.backends import triton as backend

    given = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: given.append((grid, args, options))

    backend.launch(Kernel(), (2,), torch.device("cpu"), 1, BLOCK=16)
    assert given == [((2,), (1,), {"BLOCK": 16, "enable_fp_fusion": True})]
    package = Path(backend.__file__).parents[1]
    launching = [path for path in package.rglob("*.py") for _ in re.findall(r"kernel\w*\)?\[", path.read_text())]
    assert launching == [Path(backend.__file__)], "launched around backends/triton.py's launch"
