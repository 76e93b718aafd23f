"""What the sdist and the wheels hold, that a wheel works away from the checkout, and which way imports point."""

import ast
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

ROOT = Path(__file__).parent.parent
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
    assert {f"csrc/{file.name}" for file in (source / "csrc").iterdir()} <= names
    assert {str(file.relative_to(source)) for file in source.glob("kernels/**/*.*")} <= names
    # What its Makefile's targets need.
    for folder in ("tests", "examples", "benchmarks"):
        assert {str(file.relative_to(source)) for file in (source / folder).glob("**/*.py")} <= names
    assert {"Makefile", "constraints.txt", "DESIGN.md", "docs/kernel-resources.md", "docs/cuda-resources.md"} <= names

    wheel = next(tmp_path.glob("dist/*.whl"))
    assert wheel.name == f"fusedloss-{fusedloss.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"fusedloss-{fusedloss.__version__}.dist-info/METADATA").decode()
    ours = {str(file.relative_to(source)) for file in source.glob("fusedloss/**/*.py")}
    kernels = {f"fusedloss/{file.relative_to(source)}" for file in source.glob("kernels/**/*.py")}
    data = {"fusedloss/py.typed", "fusedloss/_C.pyi", "fusedloss/trust/fastest.json"}
    assert kernels and ours | kernels | data <= names
    # Nothing else: no top-level kernels, no tests, no csrc.
    assert {name.split("/")[0] for name in names} == {"fusedloss", f"fusedloss-{fusedloss.__version__}.dist-info"}
    assert not [name for name in names if name.endswith((".so", ".cu", ".pyc"))]
    assert "License-Expression: Apache-2.0" in metadata
    requirements = {line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra" not in line}
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


# Dependencies point one way: losses -> sweep -> backends -> kernels and _C.


def modules():
    """Dotted name of every module, and its file."""
    for folder, package in (("fusedloss", "fusedloss"), ("kernels", "fusedloss.kernels")):
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *parts]).removesuffix(".__init__"), file


def imports(module, file):
    """Everything that a file imports, at any depth of its code. `from a import b` counts as a and as a.b."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, [base, node.module]))
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


def within(name, *packages):
    return any(name == package or name.startswith(package + ".") for package in packages)


UPPER = ("fusedloss.functional", "fusedloss.losses", "fusedloss.op")
DRIVERS = ("fusedloss.sweep", "fusedloss.rowwise")
FORBIDDEN = {
    "fusedloss.sweep": (*UPPER, "fusedloss.rowwise"),
    "fusedloss.sweep.chunks": tuple(f"fusedloss.sweep.{x}" for x in ("inputs", "admission", "gradients")),
    "fusedloss.sweep.inputs": tuple(f"fusedloss.sweep.{x}" for x in ("admission", "gradients")),
    "fusedloss.sweep.admission": tuple(f"fusedloss.sweep.{x}" for x in ("gradients", "smoothing", "folded")),
    "fusedloss.sweep.gradients": tuple(f"fusedloss.sweep.{x}" for x in ("admission", "smoothing", "folded")),
    "fusedloss.rowwise": (*UPPER, "fusedloss.sweep"),
    "fusedloss.backends": (*UPPER, *DRIVERS),
    # whether a backend may be taken
    "fusedloss.trust.ask": (*UPPER, *DRIVERS, "fusedloss.backends"),
    "fusedloss.trust.verdicts": (*UPPER, *DRIVERS, "fusedloss.backends"),
    "fusedloss.trust.families": (*UPPER, *DRIVERS, "fusedloss.backends"),
    "fusedloss.trust.order": (*UPPER, *DRIVERS, "fusedloss.backends"),
    "fusedloss.trust.audit": (*UPPER, *DRIVERS),  # whom the op asks
    # what all of the above share
    "fusedloss.packing": (*UPPER, *DRIVERS, "fusedloss.backends", "fusedloss.trust"),
    "fusedloss.problem": (*UPPER, *DRIVERS, "fusedloss.backends", "fusedloss.trust"),
    "fusedloss.epilogues": (*UPPER, *DRIVERS, "fusedloss.backends", "fusedloss.trust"),
    "fusedloss.products": (*UPPER, *DRIVERS, "fusedloss.backends", "fusedloss.trust", "fusedloss.problem"),
}
# What the child runs stands on all of the library, of which only the command line knows it.
ON_TOP = tuple(f"fusedloss.trust.{name}" for name in ("cases", "child", "draws", "race", "rowwise", "sweeps", "zones"))
ABOVE = (*ON_TOP, "fusedloss.__main__", "fusedloss.check", "fusedloss.verify")


@pytest.mark.parametrize("module, file", list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_one_way(module, file):
    names = set(imports(module, file))
    bad = {name for name in names if within(name, "kernels", "csrc", "tests")}  # of the checkout, not of the package
    for layer, forbidden in FORBIDDEN.items():
        if within(module, layer):
            bad |= {name for name in names if within(name, *forbidden)}
    if not within(module, *ABOVE):
        bad |= {name for name in names if within(name, *ON_TOP)}
    if within(module, "fusedloss.kernels"):
        allowed = (*sys.stdlib_module_names, "triton", "fusedloss.kernels")
        bad |= {name for name in names if not within(name, *allowed)}
    elif not within(module, "fusedloss.backends"):
        bad |= {name for name in names if within(name, "fusedloss.kernels", "fusedloss._C", "triton")}
    assert not bad
