"""For which architectures fusedloss._C is built, by setup.py, and on which GPUs it then runs."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fusedloss.backends.cuda import old_driver, runs_on
from fusedloss.bench import machine

ROOT = Path(__file__).parents[2]
CUDA_13 = [f"sm_{number}" for number in (75, 80, 86, 87, 88, 89, 90, 100, 110, 103, 120, 121)] + ["compute_75"]
CUDA_12_0 = [f"sm_{number}" for number in (50, 60, 70, 75, 80, 86, 87, 89, 90)]
SOURCES = ["csrc/bindings.cpp", "csrc/rows.cu", "csrc/similarity_bf16.cu"]
SM90 = "csrc/similarity_sm90_bf16.cu"


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """setup.py, as a module: it builds nothing then."""
    pytest.importorskip("setuptools")
    specification = importlib.util.spec_from_file_location("fusedloss_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_what_nvcc_knows_of_the_defaults(build):
    assert build.pick_archs(None, CUDA_13) == ["80", "86", "89", "90a", "100", "120"]
    assert build.pick_archs(None, CUDA_12_0) == ["80", "86", "89", "90a"]


@pytest.mark.parametrize(
    "gpus, known, archs",
    [
        ([90], CUDA_13, ["90a"]),
        ([120, 89, 89], CUDA_13, ["89", "120"]),
        ([87, 103], CUDA_13, ["87", "103"]),  # no default's code runs on 8.7; 10.3's own is at hand
        ([75, 80], CUDA_13, ["80"]),
        ([100, 90], CUDA_12_0, ["90a"]),  # 10.0 compiles the PTX
        ([130], CUDA_13, []),
    ],
)
def test_of_each_gpu_its_own_architecture(build, gpus, known, archs):
    assert build.archs_of(gpus, build.pick_archs(None, known), known) == archs
    assert build.codes(archs, SOURCES)[-1] == "compute_80"


DRIVER = """
int cuInit(unsigned flags) { return RESULT; }
int cuDeviceGetCount(int* count) { *count = COUNT; return 0; }
int cuDeviceGet(int* device, int index) { *device = 10 + index; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    int of[2][2] = {{9, 0}, {7, 5}};
    *value = of[device - 10][attribute - 75];  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and MINOR
    return 0;
}
"""
BUILDS = "import runpy, sys; sys.argv = ['setup.py', 'build']; made = runpy.run_path('setup.py')"
BUILDS += "; made['find_nvcc'].__globals__['find_nvcc'] = lambda: 'nvcc'; print(made['choose_nvcc']())"


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("gcc") is None, reason="needs Linux and gcc")
@pytest.mark.parametrize(
    "result, count, variables, says",
    [
        (0, 1, {}, "nvcc"),
        (0, 2, {}, "nvcc"),
        (0, 1, {"FUSEDLOSS_CUDA": "0"}, "FUSEDLOSS_CUDA=0"),
        (0, 0, {}, "no GPU is visible here (the driver knows of none); FUSEDLOSS_CUDA=1 builds it all the same"),
        (803, 1, {}, "no GPU is visible here (the driver's cuInit returns 803); FUSEDLOSS_CUDA=1"),
        (0, 0, {"FUSEDLOSS_CUDA": "1"}, "nvcc"),
        (0, 0, {"FUSEDLOSS_CUDA_ARCHS": "80"}, "nvcc"),
    ],
)
def test_auto_asks_the_driver(tmp_path, result, count, variables, says):
    code = tmp_path / "driver.c"
    code.write_text(DRIVER.replace("RESULT", str(result)).replace("COUNT", str(count)))
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", code], check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FUSEDLOSS_")}
    environment |= {"LD_LIBRARY_PATH": str(tmp_path), **variables}
    done = subprocess.run([sys.executable, "-c", BUILDS], cwd=ROOT, env=environment, capture_output=True, text=True)
    *skipped, found = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    if says == "nvcc":
        assert found == "nvcc" and not skipped
    else:
        assert found == "None" and len(skipped) == 1 and says in skipped[0]


VERSION = "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release {0}, V{0}.89\n"


@pytest.mark.parametrize(
    "release, letters", [("11.8", ""), ("12.0", "a"), ("12.8", "a"), ("12.9", "af"), ("13.0", "af"), ("13.10", "af")]
)
def test_letters_came_with_releases(build, release, letters):
    assert build.letters(VERSION.format(release)) == letters


def test_letters_of_a_version_that_does_not_read(build):
    assert build.letters("nvcc from somewhere else") == ""


def test_an_nvcc_that_lists_90_without_90a_skips_it_and_says_so(build, capsys):
    """CUDA 11.8: sm_90 is listed, compute_90a came with 12.0."""
    picked = build.pick_archs(None, CUDA_12_0, letters="")
    assert picked == ["80", "86", "89", "90"]
    assert capsys.readouterr().out == (
        "fusedloss: this nvcc has no sm_90a, its kernels are skipped: CUDA 12.0 has it\n"
    )
    assert "sm_90a" not in build.codes(picked, [*SOURCES, SM90])
    made = build.ninja_file("nvcc", picked, [*SOURCES, SM90], [], Path("out.so"))
    assert Path(SM90).name not in made and "-DFUSEDLOSS_SM90A=0" in made
    build.pick_archs(None, CUDA_12_0, letters="a")
    assert capsys.readouterr().out == ""
    assert build.archs_of([90], picked, CUDA_12_0) == ["90"]  # where auto asks which GPUs there are


@pytest.mark.parametrize("arch, letters, needs", [("90a", "", "12.0"), ("120f", "a", "12.9")])
def test_a_letter_asked_for_by_name_that_nvcc_has_not_is_an_error(build, arch, letters, needs):
    plain = arch[:-1]
    with pytest.raises(SystemExit) as refused:
        build.pick_archs(f"80;{arch}", CUDA_13, letters)
    assert str(refused.value) == (
        f"FUSEDLOSS_CUDA_ARCHS='80;{arch}': this nvcc knows {plain}, but not {arch}: "
        f"CUDA {needs} has it; {plain} is built without it"
    )


@pytest.mark.parametrize("override, archs", [("80;90a", ["80", "90a"]), ("86,120f", ["86", "120f"]), ("121", ["121"])])
def test_archs_by_name(build, override, archs):
    assert build.pick_archs(override, CUDA_13) == archs


@pytest.mark.parametrize(
    "override, message",
    [
        ("sm_80", "'sm_80' is not an architecture"),
        ("8.0", "'8.0' is not an architecture"),
        ("80;;90", "'' is not an architecture"),
        ("80 90", "'80 90' is not an architecture"),
        ("75;80", "the kernels need 80 or newer, not 75"),
        ("80;130", "this nvcc does not know 130; it knows 75 80 86"),
    ],
)
def test_other_names_are_refused(build, override, message):
    with pytest.raises(SystemExit, match=re.escape(message)) as refused:
        build.pick_archs(override, CUDA_13)
    assert f"FUSEDLOSS_CUDA_ARCHS={override!r}" in str(refused.value)


@pytest.mark.parametrize(
    "archs, sources, codes",
    [
        (["80", "90a"], SOURCES, ["sm_80", "sm_90"]),
        (["80", "90a"], [*SOURCES, SM90], ["sm_80", "sm_90", "sm_90a"]),
        (["80", "90"], [*SOURCES, SM90], ["sm_80", "sm_90"]),
        (["120", "90", "90a", "80"], [*SOURCES, SM90], ["sm_80", "sm_90", "sm_90a", "sm_120"]),
        (["100a", "120f", "120"], SOURCES, ["sm_100", "sm_120"]),
    ],
)
def test_what_the_extension_holds(build, archs, sources, codes):
    assert build.codes(archs, sources) == [*codes, "compute_80"]
    made = build.ninja_file("nvcc", archs, sources, [], Path("out.so"))
    assert re.findall(r"-DFUSEDLOSS_ARCHS=(\S+)", made) == [":".join([*codes, "compute_80"])]
    assert re.findall(r"-DFUSEDLOSS_SM90A=(\d)", made) == [str(int("sm_90a" in codes))]
    assert ("similarity_sm90_bf16.cu.o: compile" in made) == ("sm_90a" in codes)


def test_one_front_end_for_all_architectures(build):
    codes = build.codes(["80", "90a"], [*SOURCES, SM90])
    assert build.gencode("csrc/rows.cu", codes) == "'-gencode=arch=compute_80,code=[sm_80,sm_90,compute_80]'"
    assert build.gencode(SM90, codes) == "-gencode=arch=compute_90a,code=sm_90a"


NOTE = "ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized in 'f'"


@pytest.mark.parametrize(
    "says, code, built",
    [
        ("", 0, True),
        ("ptxas info    : 0 bytes gmem", 0, True),
        (NOTE, 0, False),
        ("x\nptxas info    : (C7519) warpgroup.arrive is injected in around line 69\nx", 0, False),
        ("error: no such thing", 2, False),
    ],
    ids=["silent", "harmless", "serialised", "injected", "failed"],
)
def test_the_build_fails_where_ptxas_serialises_products(build, tmp_path, says, code, built):
    """By the rule itself, with a compiler that says what nvcc does, on the stream that it does."""
    ninja = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
    if ninja[0] == sys.executable and importlib.util.find_spec("ninja") is None:
        pytest.skip("needs ninja")
    (tmp_path / "says").write_text(says)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"""#!/bin/sh
cat {tmp_path}/says >&2
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; [ "$1" = -MF ] && : > "$2"; shift; done
exit {code}
""")
    nvcc.chmod(0o755)
    made = build.ninja_file(str(nvcc), ["90a"], [SM90], [], tmp_path / "out.so")
    (tmp_path / "build.ninja").write_text(made)
    for _ in range(2):  # what failed is not taken for built the next time
        done = subprocess.run([*ninja, "-C", str(tmp_path)], capture_output=True, text=True)
        assert (done.returncode == 0) == built, done.stdout
        assert (tmp_path / "similarity_sm90_bf16.cu.o").exists() == (built or code != 0)
    if says and not built:
        assert says.splitlines()[0] in done.stdout
    remedy = "FUSEDLOSS_CUDA_ARCHS without 90a builds without them, e.g. 80;90."  # a line: ninja shows commands, too
    assert (remedy in done.stdout.splitlines()) == (not built and code == 0)


# By CUDA's rules, of capabilities 8.0 and newer.
@pytest.mark.parametrize(
    "arch, yes, no",
    [
        ("sm_80", [80, 86, 89], [75, 87, 90, 100, 120]),
        ("sm_86", [86, 89], [80, 87, 90]),
        ("sm_87", [87], [86, 89, 90]),
        ("sm_90", [90], [89, 100]),
        ("sm_90a", [90], [89, 100]),
        ("compute_90a", [90], [89, 100, 120]),
        ("sm_100", [100, 103], [90, 101, 110, 120]),
        ("sm_100a", [100], [103, 120]),
        ("sm_100f", [100, 103], [110, 120]),
        ("compute_100f", [100, 103], [90, 120]),
        ("sm_110", [110], [120]),
        ("sm_120", [120, 121], [100, 110]),
        ("sm_121", [121], [120]),
        ("compute_80", [80, 86, 87, 89, 90, 100, 103, 110, 120, 121, 130], [75]),
        ("compute_120", [120, 121, 130], [80, 90, 100, 110]),
    ],
)
def test_where_it_runs(arch, yes, no):
    for number in (*yes, *no):
        assert runs_on([arch], divmod(number, 10)) == (number in yes), number


def test_where_several_run():
    archs = ["sm_80", "sm_90"]
    assert runs_on(archs, (8, 9)) and runs_on(archs, (9, 0)) and not runs_on(archs, (10, 0))
    assert not runs_on([], (9, 0))


BUILT = {"cuda_version": "12.6", "archs": ["sm_80", "sm_90", "sm_90a", "compute_80"]}


# By CUDA's rules: a runtime needs a driver of its major version, PTX one that is as new.
@pytest.mark.parametrize(
    "driver, capability, reason",
    [
        ("12.6", (9, 0), None),
        ("12.0", (9, 0), None),  # machine code: any minor version
        ("12.0", (8, 6), None),
        ("13.1", (9, 0), None),
        (
            "11.8",
            (9, 0),
            "the driver runs CUDA up to 11.8, and fusedloss._C was built with 12.6: update the driver to ",
        ),
        ("12.6", (12, 0), None),  # PTX
        ("12.8", (12, 0), None),
        ("12.4", (12, 0), "fusedloss._C has no machine code for the GPU, an sm_120, but PTX of CUDA 12.6, and the "),
        ("11.8", (12, 0), "the driver runs CUDA up to 11.8"),
        ("12.10", (12, 0), None),  # numbers, not text
        ("", (9, 0), None),  # nobody knows
    ],
)
def test_which_drivers_run_a_build(driver, capability, reason):
    found = old_driver(BUILT | {"driver_version": driver}, capability)
    if reason is None:
        assert found is None
        return
    assert found.startswith(reason)
    cuda = driver.partition(".")[0]
    assert found.endswith((f"with an nvcc of CUDA {cuda} (CUDA_HOME)", "again with FUSEDLOSS_CUDA_ARCHS=120"))


@pytest.mark.parametrize("capabilities", [[], [(9, 0)], [(12, 0), (7, 5)]])
def test_info_says_what_was_built_in_and_where_it_runs(monkeypatch, capabilities):
    built = {"cuda_version": "13.0", "archs": ["sm_80", "sm_90", "sm_90a", "compute_80"]}
    monkeypatch.setattr(machine.cuda, "build_info", lambda: built)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    line = machine.extension()
    assert line.startswith("CUDA 13.0: sm_80 sm_90 sm_90a compute_80")
    assert ("; runs on cuda:0 (sm_90)" in line) == (capabilities == [(9, 0)])
    assert ("; runs on cuda:0 (sm_120); does not run on cuda:1 (sm_75)" in line) == (len(capabilities) == 2)
    monkeypatch.setattr(machine.cuda, "build_info", lambda: built | {"driver_version": "12.4"})
    line = machine.extension()
    assert "; the driver runs CUDA up to 12.4" in line
    assert "; runs on" not in line
    assert line.count("; does not run on") == len(capabilities)
    monkeypatch.setattr(machine.cuda, "build_info", lambda: None)
    assert machine.extension().startswith("not built") and "FUSEDLOSS_CUDA=1" in machine.extension()
