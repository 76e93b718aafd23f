"""Builds fusedloss._C from csrc/ where nvcc is found; elsewhere the wheel is pure Python. Metadata: pyproject.toml.

FUSEDLOSS_CUDA=auto|0|1      auto: build if nvcc is found; 0: never; 1: fail without nvcc
FUSEDLOSS_CUDA_ARCHS="80;90a"   compute capabilities; by default those of DEFAULT_ARCHS that nvcc knows

nvcc decides, never a visible GPU: machines that build often have none. csrc/ knows nothing of torch, so one build
serves every torch.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

DEFAULT_ARCHS = ("80", "90")
ROOT = Path(__file__).absolute().parent
BUILDING = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"} & set(sys.argv)

NINJA_FILE = """\
nvcc = {nvcc}
flags = -O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden,-Wall {defines} {includes}
gencode = {gencode}

rule compile
  command = $nvcc -c $in -o $out -MD -MF $out.d $flags $gencode
  depfile = $out.d
  deps = gcc
  description = compile $in

# The CUDA runtime is linked statically. exclude-libs keeps its symbols inside: torch loads a runtime of its own,
# maybe of another version, whose symbols of the same names would otherwise be used here.
rule link
  command = $nvcc -shared $in -o $out $gencode -Xlinker --exclude-libs=ALL
  description = link $out

"""


def find_nvcc() -> str | None:
    """CUDA_HOME when it is set, and nothing else then; PATH; /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin"] if home else [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return next((nvcc for place in places if (nvcc := shutil.which("nvcc", path=place))), None)


def choose_nvcc() -> str | None:
    """nvcc, or None for a pure-Python wheel, having said why."""
    wanted = os.environ.get("FUSEDLOSS_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"FUSEDLOSS_CUDA={wanted!r}: needs auto, 0 or 1")
    nvcc = find_nvcc() if sys.platform == "linux" else None
    if wanted == "0" or nvcc is None:
        why = "FUSEDLOSS_CUDA=0" if wanted == "0" else "nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda)"
        if wanted == "1" and BUILDING:
            sys.exit(f"fusedloss: FUSEDLOSS_CUDA=1, but {why}")
        if BUILDING:
            print(f"fusedloss: csrc/ is skipped, fusedloss._C will be missing: {why}", flush=True)
        return None
    return nvcc


def gencode(nvcc: str) -> list[str]:
    """Machine code for each architecture, and PTX of the newest portable one for GPUs that came later."""
    if override := os.environ.get("FUSEDLOSS_CUDA_ARCHS"):
        archs = override.replace(",", ";").split(";")
        if bad := [a for a in archs if not re.fullmatch(r"\d{2,3}[af]?", a)]:
            sys.exit(f'FUSEDLOSS_CUDA_ARCHS={override!r}: {bad[0]!r} is not an architecture; needs e.g. "80;90a"')
    else:
        known = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
        archs = [a for a in DEFAULT_ARCHS if f"sm_{a}" in known]
    codes = [(a, f"sm_{a}") for a in archs]
    portable = [a for a in archs if a.isdigit()]  # PTX of 90a runs on 90 alone
    if portable:
        codes.append((newest := max(portable, key=int), f"compute_{newest}"))
    return [f"-gencode=arch=compute_{arch},code={code}" for arch, code in codes]


class BuildExt(build_ext):
    """One ninja file. nvcc hands .cpp to the host's C++ compiler, so that one rule compiles both."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11  # here, because metadata and sdist need neither it nor ninja

        work = Path(self.build_temp).absolute()
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        for folder in (work, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        codes = gencode(NVCC)
        compiled_for = ":".join(code.rpartition("=")[2] for code in codes)
        includes = [shlex.quote(f"-I{folder}") for folder in [pybind11.get_include(), *self.include_dirs]]
        lines = [
            NINJA_FILE.format(
                nvcc=shlex.quote(NVCC).replace("$", "$$"),
                includes=" ".join(includes).replace("$", "$$"),
                defines=f"-DFUSEDLOSS_ARCHS={compiled_for}",
                gencode=" ".join(codes),
            )
        ]
        objects = {source: f"{Path(source).name}.o" for source in ext.sources}
        lines += [f"build {out}: compile {path(ROOT / source)}" for source, out in objects.items()]
        lines += [f"build {path(target)}: link {' '.join(objects.values())}", ""]
        (work / "build.ninja").write_text("\n".join(lines))
        ninja = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        if subprocess.run([*ninja, "-C", str(work)]).returncode:
            sys.exit("fusedloss: csrc/ did not compile (above). FUSEDLOSS_CUDA=0 installs without it.")


def path(file: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(file))  # as ninja escapes


NVCC = choose_nvcc()
SOURCES = sorted(str(file.relative_to(ROOT)) for pattern in ("*.cu", "*.cpp") for file in (ROOT / "csrc").glob(pattern))

setup(
    # kernels/ is installed as fusedloss.kernels alone: the top-level name belongs to another distribution.
    packages=[*find_packages(include=["fusedloss", "fusedloss.*"]), "fusedloss.kernels"],
    ext_modules=[Extension("fusedloss._C", SOURCES)] if NVCC else [],
    cmdclass={"build_ext": BuildExt},
)
