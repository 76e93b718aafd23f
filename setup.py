"""Builds fusedloss._C from csrc/ for the GPUs of this machine; without one the wheel is pure Python. Metadata:
pyproject.toml.

FUSEDLOSS_CUDA=auto|0|1         auto: for the GPUs that are here, if nvcc is found; 0, false, no: never;
                                1, true, yes: for those of DEFAULT_ARCHS that nvcc knows, and fail without nvcc
FUSEDLOSS_CUDA_ARCHS="80;90a"   for these compute capabilities, GPU or none

A wheel for other machines takes FUSEDLOSS_CUDA=1: what builds often has no GPU. csrc/ knows nothing of torch, so one
build serves every torch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Collection
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# 100 and not 100a: nothing needs what only 10.0 has, and code of sm_100 runs on 10.3 as well.
DEFAULT_ARCHS = ("80", "86", "89", "90a", "100", "120")
# All but the files of sm_90a are written in what compute_80 has, so the front end reads them once for all
# architectures. Its PTX is also what GPUs compile that came later: PTX of a newer one would say the same.
OLDEST = 80
ROOT = Path(__file__).absolute().parent
BUILDING = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"} & set(sys.argv)

NINJA_FILE = """\
nvcc = {nvcc}
# A thread for each architecture's ptxas, since there are more of them than files. Compressed, 62 MB become 12.
flags = -O3 -std=c++17 --threads 0 -Xfatbin -compress-all -Xcompiler -fPIC,-fvisibility=hidden,-Wall $
  -DFUSEDLOSS_SM90A={sm90a}

# C75xx: ptxas put waits between products of a warpgroup, or serialised them. It says so and succeeds.
rule compile
  command = $nvcc -c $in -o $out -MD -MF $out.d $flags $options > $out.log 2>&1; made=$$?; cat $out.log; $
    [ $$made = 0 ] || exit $$made; if grep -q '(C75[0-9][0-9])' $out.log; then rm -f $out; $
    echo "fusedloss: this nvcc serialises the products of $in (C75.. above)."; $
    echo "FUSEDLOSS_CUDA_ARCHS without 90a builds without them, e.g. 80;90."; exit 1; fi
  depfile = $out.d
  deps = gcc
  description = compile $in

# The CUDA runtime is linked statically. exclude-libs keeps its symbols inside: torch loads a runtime of its own,
# maybe of another version, whose symbols of the same names would otherwise be used here.
rule link
  command = $nvcc -shared $in -o $out $options -Xlinker --exclude-libs=ALL
  description = link $out

"""


def find_nvcc() -> str | None:
    """CUDA_HOME when it is set, and nothing else then; PATH; /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin"] if home else [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return next((nvcc for place in places if (nvcc := shutil.which("nvcc", path=place))), None)


def wanted() -> bool | None:
    """FUSEDLOSS_CUDA; None: auto."""
    value = os.environ.get("FUSEDLOSS_CUDA", "")
    chosen = value.strip().lower() or "auto"
    path = ROOT / "fusedloss" / "core" / "environment.py"  # not imported: the package needs torch
    switch = runpy.run_path(str(path))["SWITCH"]
    if chosen != "auto" and chosen not in switch:
        sys.exit(f"FUSEDLOSS_CUDA must be auto, 1, true, yes, 0, false or no, got {value!r}; unset it for auto")
    return None if chosen == "auto" else switch[chosen]


def named() -> str | None:
    return os.environ.get("FUSEDLOSS_CUDA_ARCHS") or None


def choose_nvcc() -> str | None:
    """nvcc, or None for a pure-Python wheel, having said why."""
    value, asked = os.environ.get("FUSEDLOSS_CUDA", ""), wanted()
    nvcc, why = find_nvcc() if sys.platform == "linux" else None, None
    if asked is False:
        why = f"FUSEDLOSS_CUDA={value}"
    elif nvcc is None:
        why = "nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda)"
        if asked and BUILDING:
            sys.exit(f"fusedloss: FUSEDLOSS_CUDA={value}, but {why}")
    elif asked is None and named() is None and not usable(visible_gpus()[0]):
        gpus, reason = visible_gpus()
        why = f"{f'the GPUs here are older than sm_{OLDEST}' if gpus else f'no GPU is visible here ({reason})'}; "
        why += "FUSEDLOSS_CUDA=1 builds it all the same, for every architecture"
    if why and BUILDING:
        print(f"fusedloss: csrc/ is skipped, fusedloss._C will be missing: {why}", flush=True)
    return None if why else nvcc


@functools.cache
def visible_gpus() -> tuple[list[int], str]:
    """90 for a GPU of compute capability 9.0; and why there is none. By the driver: an isolated build has no torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return [], "the driver's libcuda.so.1 is not installed"
    if error := driver.cuInit(0):
        return [], f"the driver's cuInit returns {error}"
    number, found = ctypes.c_int(), []
    driver.cuDeviceGetCount(ctypes.byref(number))
    for index in range(number.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        driver.cuDeviceGet(ctypes.byref(device), index)
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        found.append(10 * major.value + minor.value)
    return found, "" if found else "the driver knows of none"


def usable(gpus: Collection[int]) -> list[int]:
    return sorted({gpu for gpu in gpus if gpu >= OLDEST})


def archs_of(gpus: Collection[int], defaults: Collection[str], known: Collection[str]) -> list[str]:
    """What `auto` builds: of each GPU its own architecture. One that nvcc does not know compiles the PTX."""
    own = {number(arch): arch for arch in defaults}
    return [own.get(gpu, str(gpu)) for gpu in usable(gpus) if gpu in own or f"sm_{gpu}" in known]


def letters(version: str) -> str:
    """What `nvcc --version` knows beside numbers: "a" came with CUDA 12.0, after sm_90 itself (11.8); "f" with 12.9."""
    found = re.search(r"release (\d+)\.(\d+)", version)
    release = tuple(map(int, found.groups())) if found else (0, 0)
    return "a" * (release >= (12, 0)) + "f" * (release >= (12, 9))


def pick_archs(override: str | None, known: Collection[str], letters: str = "af") -> list[str]:
    """`known`: what nvcc --list-gpu-code prints: numbers alone."""
    if override is None:
        archs = [arch for arch in DEFAULT_ARCHS if f"sm_{number(arch)}" in known]
        plain = [arch if arch[-1].isdigit() or arch[-1] in letters else f"{number(arch)}" for arch in archs]
        for arch in sorted(set(archs) - set(plain)):
            print(f"fusedloss: this nvcc has no sm_{arch}, its kernels are skipped: CUDA 12.0 has it", flush=True)
        return plain
    archs = override.replace(",", ";").split(";")
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            sys.exit(f'FUSEDLOSS_CUDA_ARCHS={override!r}: {arch!r} is not an architecture; needs e.g. "80;90a"')
        if number(arch) < OLDEST:
            sys.exit(f"FUSEDLOSS_CUDA_ARCHS={override!r}: the kernels need {OLDEST} or newer, not {arch}")
        if f"sm_{number(arch)}" not in known:
            there = " ".join(code.removeprefix("sm_") for code in known if code.startswith("sm_"))
            sys.exit(f"FUSEDLOSS_CUDA_ARCHS={override!r}: this nvcc does not know {arch}; it knows {there}")
        if not arch[-1].isdigit() and arch[-1] not in letters:
            needs = {"a": "12.0", "f": "12.9"}[arch[-1]]
            plain = f"CUDA {needs} has it; {number(arch)} is built without it"
            sys.exit(f"FUSEDLOSS_CUDA_ARCHS={override!r}: this nvcc knows {number(arch)}, but not {arch}: {plain}")
    return archs


def number(arch: str) -> int:
    return int(arch.rstrip("af"))


def is_sm90(source: str) -> bool:
    """TMA and wgmma: a file of sm_90a alone."""
    return "_sm90" in Path(source).name


def codes(archs: Collection[str], sources: Collection[str]) -> list[str]:
    """What the extension will hold: build_info()["archs"]."""
    found = {(number(arch), "") for arch in archs}
    if any(map(is_sm90, sources)) and "90a" in archs:
        found.add((90, "a"))
    return [*(f"sm_{arch}{letter}" for arch, letter in sorted(found)), f"compute_{OLDEST}"]


def gencode(source: str, codes: Collection[str]) -> str:
    if is_sm90(source):
        return "-gencode=arch=compute_90a,code=sm_90a"
    portable = ",".join(code for code in codes if code != "sm_90a")
    return f"'-gencode=arch=compute_{OLDEST},code=[{portable}]'"  # quoted: [ is the shell's


def ninja_file(nvcc: str, archs: Collection[str], sources: list[str], includes: list[str], target: Path) -> str:
    holds = codes(archs, sources)
    sm90a = "sm_90a" in holds
    lines = [NINJA_FILE.format(nvcc=shlex.quote(nvcc).replace("$", "$$"), sm90a=int(sm90a))]
    # Only what is no kernel asks for these. An isolated build has pybind11 elsewhere each time.
    host = f"-DFUSEDLOSS_ARCHS={':'.join(holds)} {' '.join(shlex.quote(f'-I{folder}') for folder in includes)}"
    # The long ones first: minutes on one core, while the rest take seconds.
    used = sorted((s for s in sources if sm90a or not is_sm90(s)), key=lambda s: ("similarity" not in s, s))
    objects = {source: f"{Path(source).name}.o" for source in used}
    for source, out in objects.items():
        options = gencode(source, holds) if source.endswith(".cu") else host.replace("$", "$$")
        lines += [f"build {out}: compile {path(ROOT / source)}", f"  options = {options}"]
    lines += [f"build {path(target)}: link {' '.join(objects.values())}", f"  options = {gencode('', holds)}", ""]
    return "\n".join(lines)


def path(file: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(file))  # as ninja escapes


class BuildExt(build_ext):
    """One ninja file. nvcc hands .cpp to the host's C++ compiler, so that one rule compiles both."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11  # here, because metadata and sdist need neither it nor ninja

        nvcc = choose_nvcc()
        assert nvcc
        known = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
        version = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
        archs = pick_archs(named(), known, letters(version))
        if wanted() is None and named() is None:
            archs = archs_of(visible_gpus()[0], archs, known)
        # An editable install gives a folder that it deletes: every change would be minutes of compiling everything.
        kept = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        work = kept if self.editable_mode else Path(self.build_temp).absolute()
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        for folder in (work, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        includes = [pybind11.get_include(), *self.include_dirs]
        (work / "build.ninja").write_text(ninja_file(nvcc, archs, ext.sources, includes, target))
        ninja = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        if subprocess.run([*ninja, "-C", str(work)]).returncode:
            sys.exit("fusedloss: csrc/ did not compile (above). FUSEDLOSS_CUDA=0 installs without it.")


if __name__ == "__main__":  # as setuptools runs it, too
    SOURCES = sorted(
        str(file.relative_to(ROOT)) for pattern in ("*.cu", "*.cpp") for file in (ROOT / "csrc").glob(pattern)
    )
    setup(
        # kernels/ is installed as fusedloss.kernels alone: the top-level name belongs to another distribution.
        packages=[*find_packages(include=["fusedloss", "fusedloss.*"]), "fusedloss.kernels"],
        ext_modules=[Extension("fusedloss._C", SOURCES)] if choose_nvcc() else [],
        cmdclass={"build_ext": BuildExt},
    )
