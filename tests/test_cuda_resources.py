"""Every CUDA kernel in the built extension, on all of its architectures: what it takes, and with what it works.

Read from the library: nothing is compiled, and no GPU is needed.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

_C = pytest.importorskip("fusedloss._C", reason="fusedloss._C was not built: there was no nvcc")

HERE = Path(__file__).parent
TABLE = HERE.parent / "docs" / "cuda-resources.md"
DEFAULT = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120")
BUILT = _C.build_info()["archs"]
CODES = [arch for arch in BUILT if arch.startswith("sm_")]


@pytest.fixture(scope="module")
def reader() -> ModuleType:
    """cuda_resources.py, as a module."""
    specification = importlib.util.spec_from_file_location("cuda_resources", HERE / "cuda_resources.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["cuda_resources"] = module
    specification.loader.exec_module(module)
    if reason := module.why_not():
        pytest.skip(reason)
    return module


@pytest.fixture(scope="module")
def found(reader, request):
    return reader.read(Path(_C.__file__), request.config.cache.mkdir("cuda-resources"))


def test_build_info_says_what_is_inside(reader, found):
    assert set(found[1]) == set(CODES)
    listed = reader.run("cuobjdump", "--list-ptx", _C.__file__)
    ptx = {line.rpartition(".")[0].rpartition(".")[2] for line in listed.splitlines()}
    assert ptx == {arch.replace("compute_", "sm_") for arch in BUILT if arch.startswith("compute_")}


@pytest.mark.slow
@pytest.mark.parametrize("arch", [*DEFAULT, *(arch for arch in CODES if arch not in DEFAULT)])
def test_no_spills_it_fits_and_it_uses_the_hardware(reader, found, arch):
    if arch not in BUILT:
        pytest.skip(f"fusedloss._C was built for {' '.join(BUILT)}")
    kernels = found[1][arch]
    assert not reader.missing(arch, kernels)  # none was passed over
    wrong = {name: broken for name, entry in kernels.items() if (broken := reader.wrong(arch, name, entry))}
    assert not wrong, "\n".join(f"{name}: {', '.join(broken)}" for name, broken in wrong.items())


@pytest.mark.slow
def test_instructions_were_counted_where_they_may_differ(reader, found):
    """The oldest and the newest of one PTX, and what has sources of its own."""
    counted = [arch for arch, kernels in found[1].items() if all("HMMA" in entry for entry in kernels.values())]
    portable = [arch for arch in CODES if arch != "sm_90a"]
    assert {portable[0], portable[-1], *({"sm_90a"} & set(CODES))} <= set(counted)


def test_rules(reader):
    """They catch what they are for."""
    good = dict.fromkeys(reader.INSTRUCTIONS, 0) | {"registers": 255, "spilled": 0, "static": 0}
    good |= dict.fromkeys(("HMMA", "LDSM", "LDGSTS", "EX2", "STG.128"), 8)
    name = "similarity_sm80<bf16, Exp<false, true>>"
    assert reader.wrong("sm_120", name, good) == []
    assert reader.wrong("sm_120", name, good | {"static": 1024}) == []  # the system's
    for broken in (
        {"registers": 257},
        {"spilled": 8},
        {"static": 5 << 10},
        {"local": 1},
        {"EX2": 0},
        {"HMMA": 0},
        {"LDGSTS": 0},
        {"STG.128": 0},
        {"HGMMA": 1},
    ):
        assert len(reader.wrong("sm_120", name, good | broken)) == 1, broken
    assert reader.wrong("sm_80", name, good | {"static": 5 << 10}) == []
    assert reader.missing("sm_80", {}) == reader.PORTABLE
    assert reader.missing("sm_80", dict.fromkeys([*reader.PORTABLE, "new_kernel"], good)) == {"new_kernel"}


def test_the_committed_table_is_what_the_library_says(reader, found):
    """Of the compiler that it names; another one's registers differ."""
    compiler, kernels = found
    written = TABLE.read_text()
    if f"nvcc {compiler};" not in written:
        pytest.skip(f"{TABLE.name} is of another nvcc than {compiler}")
    if lacks := [arch for arch in DEFAULT if arch != "sm_90a" and arch not in BUILT]:
        pytest.skip(f"fusedloss._C was built without {' '.join(lacks)}")
    assert reader.table(compiler, kernels) == written, f"run python tests/cuda_resources.py --table > docs/{TABLE.name}"
