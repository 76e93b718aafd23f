"""Every kernel x mode x dtype, compiled without a GPU: what it takes, and with what it works.

For sm_90 while docs/kernel-resources.md is of this Triton and these sources, since its writer held the others to the
rules, for all seven architectures otherwise. The compiler needs a process without the interpreter: one for each.
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
import sources
import torch

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "kernel-resources.md"


@pytest.fixture(scope="module")
def compiler() -> ModuleType:
    """compile_kernels.py, as a module."""
    specification = importlib.util.spec_from_file_location("compile_kernels", ROOT / "tools" / "compile_kernels.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["compile_kernels"] = module
    specification.loader.exec_module(module)
    return module


ONE = "sm_90"  # of which nothing is taken on credit: descriptors, and the tightest registers


@pytest.fixture(scope="module")
def compiled(compiler) -> dict[str, list[dict[str, Any]]]:
    known = f"Triton {triton.__version__} from sources {compiler.digest(*compiler.SOURCES)} " in TABLE.read_text()
    return compiler.in_processes((ONE,) if known else compiler.TARGETS)


@pytest.mark.slow
def test_no_spills_they_fit_and_they_use_the_hardware(compiled, compiler):
    assert not compiler.faults(compiled)


@pytest.mark.slow
def test_the_committed_table_is_what_the_compiler_says(compiled, compiler):
    """Of the pinned Triton; another one's registers differ."""
    written = TABLE.read_text()
    if f"Triton {triton.__version__} " not in written:
        pytest.skip(f"{TABLE.name} is of another Triton than {triton.__version__}")
    now, then = sections(compiler.table(compiled)), sections(written)
    assert set(then) == set(compiler.TARGETS)
    for name, lines in now.items():
        assert lines == then[name], "run python tools/compile_kernels.py --table > docs/kernel-resources.md"


def test_the_rules_miss_no_kernel_and_see_a_spill(compiler, monkeypatch):
    none = compiler.faults({ONE: []})
    odd = [case for case in compiler.cases() if case[0] == "odd"]
    few = {*compiler.MASKED, *compiler.SOFTCAP, *compiler.FOLDS, *compiler.DISTILL, *compiler.SEVERAL}
    assert len(none) == 3 * len(compiler.MODES) + len(few) + len(odd) + len({*compiler.BY_ROW, *compiler.ROWWISE})
    counts = dict.fromkeys(("registers", "shared", "spilled", *compiler.INSTRUCTIONS, *compiler.AMD), 0)
    entry = counts | {"kernel": "rows", "mode": "times", "dtype": "float32", "precision": "", "spilled": 8}
    assert set(compiler.faults({ONE: [entry]})) - set(none) == {"sm_90: ('times', 'float32'): spills"}
    monkeypatch.setattr(compiler, "SPILLS", {triton.__version__: {ONE: {("times", "float32")}}})
    assert set(compiler.faults({ONE: [entry]})) < set(none)


def test_a_digest_is_of_code_and_not_of_comments(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    for name, comment in (("a.py", "#"), ("b.cu", "//")):
        file = tmp_path / name
        file.write_text("x = 1\n")
        before = sources.digest("*")
        file.write_text(f"{comment} why\n\nx = 1\n")
        assert sources.digest("*") == before
        file.write_text("x = 2\n")
        assert sources.digest("*") != before


def sections(table: str) -> dict[str, str]:
    return dict(part.strip().split("\n", 1) for part in table.split("\n## ")[1:])


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
    from fusedloss.backends.triton import launching

    given = []

    class Kernel:
        fn = None

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: given.append((grid, args, options))

    launching.launch(Kernel(), (2,), torch.device("cpu"), 1, BLOCK=16)
    assert given == [((2,), (1,), {"BLOCK": 16, "enable_fp_fusion": True})]
    package = Path(launching.__file__).parents[1]
    found = [path for path in package.rglob("*.py") for _ in re.findall(r"kernel\w*\)?\[", path.read_text())]
    assert found == [Path(launching.__file__)], "launched around `launch`"
