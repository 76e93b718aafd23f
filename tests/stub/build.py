"""csrc/'s host code over a CUDA runtime that runs nothing (runtime.cpp): its text as it is, but for kernels' bodies."""

from __future__ import annotations

import fcntl
import importlib.util
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).absolute().parents[2]
CSRC, STUB = ROOT / "csrc", ROOT / "tests" / "stub"
FLAGS = ["-O0", "-fPIC", "-shared"]
ARCHS = "sm_80:sm_90:sm_90a:sm_100:sm_120:compute_80"
DEFINES = ["-std=c++17", "-Wall", "-Wno-unknown-pragmas", f"-DFUSEDLOSS_ARCHS={ARCHS}", "-DFUSEDLOSS_SM90A=1"]
LIBRARIES = ("libcudart_stub.so", "libtorch_device.so", "_C.so")


def host() -> ModuleType:
    """tests/host/build.py, which compiles by content."""
    spec = importlib.util.spec_from_file_location("host_build", ROOT / "tests" / "host" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def why_not() -> str | None:
    import torch

    if torch.version.cuda or torch.version.hip:
        return "torch is built for GPUs: it would not take these for its own"
    include = Path(torch.__file__).parent / "include" / "ATen" / "detail" / "CUDAHooksInterface.h"
    return host().why_not() or (None if include.exists() else f"needs torch's headers: {include}")


def build() -> Path:
    """The folder with LIBRARIES, which keeps them for the next time; several processes may ask at once."""
    import torch

    tools, folder = host(), ROOT / "build" / "stub"
    (folder / "csrc").mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        bindings = tools.bindings()
        known = [sys.version, torch.__version__, tools._run("g++", "--version"), *FLAGS, *DEFINES]
        files = [*sorted(CSRC.rglob("*.*")), *sorted(STUB.glob("*.*"))]
        digest = tools._digest(known, [*files, bindings])
        where = Path(torch.__file__).parent
        own, torchs = f"-L{folder} -Wl,-rpath,{folder}".split(), f"-L{where}/lib -Wl,-rpath,{where}/lib".split()

        def library(name: str, *command: object) -> None:
            tools._make(folder / name, digest, lambda out: tools._run("g++", *FLAGS, *map(str, command), "-o", out))

        library("libcudart_stub.so", *DEFINES, f"-I{STUB}", STUB / "runtime.cpp")
        hooks = [STUB / "torch_device.cpp", *own, "-lcudart_stub", *torchs, "-lc10", "-ltorch_cpu"]
        with ThreadPoolExecutor(tools.JOBS) as pool:
            made = pool.submit(library, "libtorch_device.so", "-std=c++20", f"-I{where}/include", *hooks)
            objects = list(pool.map(lambda source: _compile(source, folder, digest, tools), _sources(folder)))
            made.result()
        library("_C.so", *objects, bindings, *own, "-lcudart_stub")
    return folder


def _sources(folder: Path) -> list[Path]:
    """csrc/ in `folder`; bindings.cpp is there already."""
    for file in CSRC.rglob("*.*"):
        copy = folder / "csrc" / file.relative_to(CSRC)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(without_kernels(file.read_text()))
    found = [file for file in sorted((folder / "csrc").iterdir()) if file.suffix in (".cu", ".cpp")]
    return [file for file in found if file.name != "bindings.cpp" and (CSRC / file.name).exists()]


def _compile(source: Path, folder: Path, digest: str, tools: ModuleType) -> Path:
    flags = [*FLAGS[:-1], *DEFINES, f"-I{STUB}", "-x", "c++", "-c", str(source)]
    out = folder / f"{source.name}.o"
    tools._make(out, digest, lambda new: tools._run("g++", *flags, "-o", new))
    return out


BOUNDS = re.compile(r"__launch_bounds__\(((?:[^(),]|\([^()]*\))+)[^)]*\)")


def without_kernels(text: str) -> str:
    """Each kernel's body says the kernel's name and its launch bounds; a launch is a call."""
    parts, left = [], 0
    while (start := text.find("__global__", left)) >= 0:
        opens = text.index("{", start)
        bounds = BOUNDS.search(text, start, opens)
        if bounds is None:
            raise ValueError(f"a kernel without __launch_bounds__: {text[start:opens]}")
        depth, end = 1, opens + 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        parts += [text[left : opens + 1], f" ::stub::entered(__PRETTY_FUNCTION__, {bounds[1]}); }}"]
        left = end
    text = "".join([*parts, text[left:]])
    return re.sub(r"(\w+)<<<(.*?)>>>\((.*?)\);", r"::stub::launch_chevrons(\1, \2, \3);", text)
