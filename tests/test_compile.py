"""Every kernel x mode x dtype on four architectures, compiled without a GPU: what it takes, and with what it works.

The compiler needs a process without the interpreter: one per architecture, two at a time.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
TABLE = HERE.parent / "docs" / "kernel-resources.md"
# Shared memory a block may have, in KiB; a multiprocessor's; the instruction of its tensor cores.
LIMITS = {80: (163, 164, "HMMA"), 90: (227, 228, "HGMMA"), 100: (227, 228, "UTCMMA"), 120: (99, 100, "HMMA")}
REGISTERS = 65536  # a multiprocessor's


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
    if entry["spilled"] or entry["local"]:
        found.append("spills")
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
    import triton

    written = TABLE.read_text()
    if f"Triton {triton.__version__} " not in written:
        pytest.skip(f"{TABLE.name} is of another Triton than {triton.__version__}")
    assert compiler.table(compiled) == written, "run python tests/compile_kernels.py --table > docs/kernel-resources.md"
