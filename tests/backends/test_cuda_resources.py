"""Every CUDA kernel in the built extension, on all of its architectures: what it takes, and with what it works.

Read from the library; no GPU is needed. Where none is installed nvcc compiles it: for sm_80, sm_90 and sm_90a while
docs/cuda-resources.md is of this nvcc and these sources, since its writer held the others to the rules; for all
architectures otherwise, which takes 20 minutes of one core. These are tests of the grid.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import cuda_build
import pytest

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "cuda-resources.md"
DEFAULT = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120")


@pytest.fixture(scope="module")
def reader() -> ModuleType:
    """cuda_resources.py, as a module."""
    specification = importlib.util.spec_from_file_location("cuda_resources", ROOT / "tools" / "cuda_resources.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["cuda_resources"] = module
    specification.loader.exec_module(module)
    if reason := module.why_not():
        pytest.skip(reason)
    return module


@pytest.fixture(scope="module")
def library(reader) -> Path:
    return cuda_build.library()


@pytest.fixture(scope="module")
def built(library) -> list[str]:
    return cuda_build.archs_of(library)


@pytest.fixture(scope="module")
def codes(built) -> list[str]:
    return [arch for arch in built if arch.startswith("sm_")]


@pytest.fixture(scope="module")
def found(reader, library, request):
    return reader.read(library, request.config.cache.mkdir("cuda-resources"))


@pytest.mark.grid
def test_build_info_says_what_is_inside(reader, found, library, built, codes):
    assert set(found[1]) == set(codes)
    listed = reader.run("cuobjdump", "--list-ptx", str(library))
    ptx = {line.rpartition(".")[0].rpartition(".")[2] for line in listed.splitlines()}
    assert ptx == {arch.replace("compute_", "sm_") for arch in built if arch.startswith("compute_")}


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize("arch", [*DEFAULT, "others"])
def test_no_spills_it_fits_and_it_uses_the_hardware(reader, found, codes, arch):
    archs = [code for code in codes if code == arch or (arch == "others" and code not in DEFAULT)]
    if not archs:
        pytest.skip(f"fusedloss._C was built for {' '.join(codes)}")
    for code in archs:
        kernels = found[1][code]
        assert not reader.missing(code, kernels)  # none was passed over
        wrong = {name: broken for name, entry in kernels.items() if (broken := reader.wrong(code, name, entry))}
        assert not wrong, "\n".join(f"{code}: {name}: {', '.join(broken)}" for name, broken in wrong.items())


@pytest.mark.slow
@pytest.mark.grid
def test_instructions_were_counted_where_they_may_differ(found, codes):
    """The oldest and the newest of one PTX, and what has sources of its own."""
    counted = [arch for arch, kernels in found[1].items() if all("HMMA" in entry for entry in kernels.values())]
    portable = [arch for arch in codes if arch != "sm_90a"]
    assert {portable[0], portable[-1], *({"sm_90a"} & set(codes))} <= set(counted)


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


@pytest.mark.slow
@pytest.mark.grid
def test_the_committed_table_is_what_the_library_says(reader, found, codes):
    """Of the compiler that it names; another one's registers differ."""
    compiler, kernels = found
    written = TABLE.read_text()
    if f"nvcc {compiler} " not in written:
        pytest.skip(f"{TABLE.name} is of another nvcc than {compiler}")
    now, remedy = reader.table(compiler, kernels), f"run python tools/cuda_resources.py --table > docs/{TABLE.name}"
    if set(codes) >= set(DEFAULT):
        assert now.splitlines()[4:] == written.splitlines()[4:], remedy
    then = columns(written)
    for name, cells in columns(now).items():
        assert cells == then.get(name), f"{name}: {remedy}"


def columns(table: str) -> dict[str, dict[str, str]]:
    """Name of a column -> kernel -> cell. Of counts in the oldest's and the newest's code it is the oldest's."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    names: list[str] = []
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| kernel"):
            names = cells
        elif line.startswith("| `"):
            for name, cell in zip(names[1:], cells[1:], strict=True):
                found[name][cells[0]] = cell.partition(" / ")[0]
    return found
