"""What the sdist and the wheels hold, that a wheel works away from the checkout, and which way imports point."""

import ast
import graphlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from cuda_build import unoptimised

import fusedloss

ROOT = Path(__file__).parents[2]
NVCC = (
    shutil.which("nvcc", path=f"{os.environ['CUDA_HOME']}/bin")
    if os.environ.get("CUDA_HOME")
    else shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
)
SKIPPED = "csrc/ is skipped"  # what setup.py prints


def run(*args, cwd, check=True, **env):
    environ = {k: v for k, v in os.environ.items() if not k.startswith("FUSEDLOSS_")} | {
        k: str(v) for k, v in env.items()
    }
    done = subprocess.run([sys.executable, *args], cwd=cwd, env=environ, text=True, capture_output=True)
    output = done.stdout + done.stderr
    assert not check or done.returncode == 0, output
    return done.returncode, output


def build_wheel(source, out, check=True, kind="wheel", **env):
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    status, output = run("-c", code, cwd=source, check=check, **env)
    return status, output, next(out.glob("*.whl"), None)


def install(wheel, target):
    run("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target, wheel, cwd=target.parent)


@pytest.fixture(scope="module", autouse=True)
def tools():
    for name in ("build", "setuptools", "pybind11", "ninja"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"needs {name}: pip install -e .[dev]")


@pytest.fixture
def source(tmp_path):
    """A copy, so that a build neither finds nor leaves anything in the checkout."""
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    return Path(shutil.copytree(ROOT, tmp_path / "source", ignore=ignored))


@pytest.fixture
def no_nvcc(tmp_path):
    return {"CUDA_HOME": tmp_path / "no-cuda"}  # when it is set, nvcc is looked for there only


@pytest.mark.processes
def test_sdist_and_the_wheel_made_from_it(source, no_nvcc, tmp_path):
    _, output = run("-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", cwd=source, **no_nvcc)
    assert SKIPPED in output and "nvcc was not found" in output

    with tarfile.open(next(tmp_path.glob("dist/*.tar.gz"))) as sdist:
        base = f"fusedloss-{fusedloss.__version__}/"
        names = {name.removeprefix(base) for name in sdist.getnames()}
    assert {"LICENSE", "CHANGELOG.md", "setup.py", "pyproject.toml", "fusedloss/py.typed"} <= names
    assert {str(file.relative_to(source)) for file in source.glob("csrc/**/*.*")} <= names
    assert {str(file.relative_to(source)) for file in source.glob("kernels/**/*.*")} <= names
    # What its Makefile's targets need.
    assert "mkdocs.yml" in names
    for folder in ("tests", "examples", "benchmarks"):
        assert {str(file.relative_to(source)) for file in (source / folder).glob("**/*.py")} <= names
    assert {"Makefile", "constraints.txt", "DESIGN.md", "docs/kernel-resources.md", "docs/cuda-resources.md"} <= names
    assert {"CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "docs/contributing/add-a-loss.md"} <= names

    wheel = next(tmp_path.glob("dist/*.whl"))
    assert wheel.name == f"fusedloss-{fusedloss.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"fusedloss-{fusedloss.__version__}.dist-info/METADATA").decode()
        commands = archive.read(f"fusedloss-{fusedloss.__version__}.dist-info/entry_points.txt").decode()
    ours = {str(file.relative_to(source)) for file in source.glob("fusedloss/**/*.py")}
    kernels = {f"fusedloss/{file.relative_to(source)}" for file in source.glob("kernels/**/*.py")}
    data = {
        "fusedloss/py.typed",
        "fusedloss/_C.pyi",
        "fusedloss/nn.pyi",
        "fusedloss/functional.pyi",
        "fusedloss/trust/fastest.json",
    }
    assert kernels and ours | kernels | data <= names
    # Nothing else: no top-level kernels, no tests, no csrc.
    assert {name.split("/")[0] for name in names} == {"fusedloss", f"fusedloss-{fusedloss.__version__}.dist-info"}
    assert not [name for name in names if name.endswith((".so", ".cu", ".pyc"))]
    assert "License-Expression: Apache-2.0" in metadata
    requirements = {line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra" not in line}
    assert commands == "[console_scripts]\nfusedloss = fusedloss.cli:main\n"
    assert requirements == {
        "Requires-Dist: torch>=2.10",
        "Requires-Dist: numpy",
        'Requires-Dist: triton; platform_system == "Linux"',
    }
    if (ROOT / "README.md").exists():
        assert "Description-Content-Type: text/markdown" in metadata, 'pyproject.toml lacks readme = "README.md"'


@pytest.mark.processes
def test_pure_wheel_away_from_the_checkout(source, tmp_path):
    _, output, wheel = build_wheel(source, tmp_path, FUSEDLOSS_CUDA=0)
    assert SKIPPED in output and "FUSEDLOSS_CUDA=0" in output
    assert wheel.name.endswith("-py3-none-any.whl")
    assert ".so" not in "".join(zipfile.ZipFile(wheel).namelist())
    install(wheel, tmp_path / "site")
    code = """
        import fusedloss, fusedloss.kernels
        print(fusedloss.__file__, fusedloss.kernels.__file__, fusedloss.__version__, sep="\\n")
    """
    _, output = run("-c", unindent(code), cwd=tmp_path, PYTHONPATH=tmp_path / "site")
    site = tmp_path / "site" / "fusedloss"
    assert output.split() == [str(site / "__init__.py"), str(site / "kernels/__init__.py"), fusedloss.__version__]
    # A training step by names from each part of it, of which none may come from the checkout.
    code = """
        import sys, torch, fusedloss
        from fusedloss import functional, grad_cache, integrations, masks, nn, search, testing
        x, y = torch.randn(2, 5, 8).requires_grad_()
        loss = fusedloss.info_nce(x, y, mask=masks.not_self(1)) + nn.TripletLoss()(x, y, x.flip(0))
        loss.backward()
        assert loss.isfinite() and search.top_k(x.detach(), y.detach(), 2)[0].shape == (5, 2)
        own = [m.__file__ for n, m in sys.modules.items() if n.split(".")[0] in ("fusedloss", "kernels", "csrc")]
        assert len(own) > 50 and all(file.startswith(sys.argv[1]) for file in own), own
    """
    run("-c", unindent(code), site, cwd=tmp_path, PYTHONPATH=tmp_path / "site")
    # The entry point that the wheel brings, in a process that has only the wheel.
    _, output = run(tmp_path / "site" / "bin" / "fusedloss", "info", cwd=tmp_path, PYTHONPATH=tmp_path / "site")
    assert output.startswith(f"fusedloss  {fusedloss.__version__}\n") and "auto picks" in output
    _, output = run(tmp_path / "site" / "bin" / "fusedloss", "--help", cwd=tmp_path, PYTHONPATH=tmp_path / "site")
    assert output.startswith("usage: fusedloss ")


@pytest.mark.processes
def test_cuda_required_without_nvcc_fails(source, no_nvcc, tmp_path):
    status, output, wheel = build_wheel(source, tmp_path, check=False, FUSEDLOSS_CUDA=1, **no_nvcc)
    assert status != 0 and wheel is None
    assert "FUSEDLOSS_CUDA=1, but nvcc was not found" in output


@pytest.mark.processes
@pytest.mark.skipif(not NVCC, reason="needs nvcc")
def test_without_a_gpu_nothing_is_compiled(source, tmp_path):
    _, output, wheel = build_wheel(source, tmp_path, CUDA_VISIBLE_DEVICES="")
    assert SKIPPED in output and "no GPU is visible here" in output and "FUSEDLOSS_CUDA=1 builds it" in output
    assert wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.processes
@pytest.mark.parametrize("name, value", [("FUSEDLOSS_CUDA", "maybe"), ("FUSEDLOSS_CUDA_ARCHS", "sm_80")])
def test_bad_switches_are_named(source, tmp_path, name, value):
    if name == "FUSEDLOSS_CUDA_ARCHS" and not NVCC:
        pytest.skip("needs nvcc")
    status, output, _ = build_wheel(source, tmp_path, check=False, **{name: value})
    assert status != 0 and name in output and repr(value) in output


@pytest.mark.slow
@pytest.mark.skipif(not NVCC, reason="needs nvcc")
def test_cuda_wheel(source, tmp_path):
    # Unoptimised, and for one architecture. What the kernels take is test_cuda_resources.py's affair.
    fast = unoptimised(NVCC)
    _, output, wheel = build_wheel(source, tmp_path, FUSEDLOSS_CUDA=1, FUSEDLOSS_CUDA_ARCHS=80, **fast)
    assert SKIPPED not in output
    assert re.search(r"-cp3\d+-cp3\d+-linux_\w+\.whl$", wheel.name)
    install(wheel, tmp_path / "site")
    # It imports without a GPU and without torch; a launch then says what is wrong.
    code = """
        import sys
        sys.modules["torch"] = None
        from importlib.machinery import PathFinder
        from importlib.util import module_from_spec
        spec = PathFinder.find_spec("_C", [sys.argv[1]])
        _C = module_from_spec(spec)
        spec.loader.exec_module(_C)
        print(_C.build_info()["archs"])
        _C.scale_rows(_C.ScaleRowsParams(input=256, out=512, M=1, D=1, in_stride=1, out_stride=1), stream=0)
    """
    args = ("-c", unindent(code), tmp_path / "site" / "fusedloss")
    status, output = run(*args, cwd=tmp_path, check=False, CUDA_VISIBLE_DEVICES="")
    assert "['sm_80', 'compute_80']" in output
    assert status == 1 and "RuntimeError: scale_rows: cudaError" in output

    # torch loads a CUDA runtime of its own: ours must neither offer nor take symbols of those names.
    if nm := shutil.which("nm"):
        library = next(tmp_path.glob("site/fusedloss/_C.*.so"))
        symbols = subprocess.run([nm, "-D", library], check=True, capture_output=True, text=True).stdout
        assert not re.search(r" cuda\w+$", symbols, re.MULTILINE)

    # An editable install goes on where the last build ended; a header brings what includes it.
    (source / "csrc" / "rows.h").touch()
    _, output, _ = build_wheel(source, tmp_path / "editable", kind="editable", FUSEDLOSS_CUDA_ARCHS=80, **fast)
    compiled = {Path(name).name for name in re.findall(r"compile (\S+)", output)}
    assert compiled == {"bindings.cpp", "rows.cu"}
    assert list((source / "fusedloss").glob("_C.*.so"))


@pytest.mark.processes
def test_without_triton(tmp_path):
    code = """
        import sys
        sys.modules["triton"] = None
        import torch, fusedloss
        x, y = torch.randn(2, 5, 8)
        assert fusedloss.info_nce(x, y).isfinite()
        try:
            fusedloss.info_nce(x, y, backend="triton")
        except fusedloss.UnsupportedError as error:
            print(error)
    """
    _, output = run("-c", unindent(code), cwd=tmp_path)
    assert "triton" in output


def unindent(code):
    return "\n".join(line[8:] for line in code.splitlines())


# Folders are floors: imports point down, and what a room of the package may import is named here. A room is a folder of
# fusedloss/, or a file at its root; "fusedloss" is __init__.py, what users import.
ROOMS = {
    "core": "",
    "testing": "",
    "grad_cache": "core",
    "masks": "core",
    "transforms": "core",
    "search": "core",
    "trust": "core",
    "backends": "core trust kernels _C",
    "sweep": "core trust backends",
    "rowwise": "core backends",
    "distributed": "core backends sweep",
    "losses": "core masks transforms backends sweep rowwise distributed",
    "functional": "losses",
    "recipes": "core masks transforms losses functional",
    "nn": "losses functional",
    "boosting": "core rowwise losses",
    "costs": "core backends sweep",
    "fusedloss": "core masks transforms recipes search grad_cache boosting costs functional nn",
    "integrations": "core masks search rowwise losses functional fusedloss",
    "bench": "core testing trust backends sweep fusedloss",
    "proof": "core testing trust backends sweep rowwise functional fusedloss bench",
    "cli": "core trust backends bench proof",
    "__main__": "cli",
}


def modules():
    """Dotted name of every module, and its file."""
    for folder, package in (("fusedloss", "fusedloss"), ("kernels", "fusedloss.kernels")):
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *parts]).removesuffix(".__init__"), file


MODULES = dict(modules())


def imports(module, file):
    """The modules that a file imports, at any depth of its code."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, [base, node.module]))
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield name if name in MODULES or name == "fusedloss._C" else base


def room(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_what_its_line_names(name):
    found = {
        room(imported)
        for module, file in MODULES.items()
        if room(module) == name
        for imported in imports(module, file)
        if imported.split(".")[0] == "fusedloss"
    }
    assert found - {name} == set(ROOMS[name].split())


def test_every_room_has_a_line():
    assert {room(module) for module in MODULES} == {*ROOMS, "kernels"}


def test_drop_ins_come_in_through_public_doors():
    """A name with an underscore is for those who stand in the same folder."""
    for module, file in MODULES.items():
        if room(module) == "integrations":
            foreign = [
                name for name in imports(module, file) if name.startswith("fusedloss") and room(name) != room(module)
            ]
            private = [name for name in foreign if any(part.startswith("_") for part in name.split("."))]
            assert not private, module


def test_there_is_no_circle():
    """Between rooms nor between files; a package's own __init__ may import its files, and they what stands in it."""
    list(graphlib.TopologicalSorter({name: line.split() for name, line in ROOMS.items()}).static_order())
    files = {
        module: {name for name in imports(module, file) if name in MODULES and not module.startswith(f"{name}.")}
        for module, file in MODULES.items()
    }
    list(graphlib.TopologicalSorter(files).static_order())


def test_kernels_are_device_code_alone():
    """They import Triton and each other, and backends alone import them."""
    allowed = {*sys.stdlib_module_names, "triton"}
    for module, file in MODULES.items():
        names = set(imports(module, file))
        roots = {name.split(".")[0] for name in names}
        assert not roots & {"kernels", "csrc", "tests"}, module  # of the checkout, not of the package
        if room(module) == "kernels":
            assert {name for name in names if name.split(".")[0] not in allowed and room(name) != "kernels"} == set()
        elif room(module) != "backends":
            assert "triton" not in roots, module
