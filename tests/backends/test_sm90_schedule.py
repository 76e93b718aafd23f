"""csrc/sm90.h on a CPU: swizzle, descriptors, the pipeline in random interleavings, the order of tiles."""

import ast
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.host

ROOT = Path(__file__).parents[2]
CXX = shutil.which("g++")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if CXX is None:
        pytest.skip("there is no g++")
    out = tmp_path_factory.mktemp("sm90") / "test_sm90"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run([CXX, *flags, str(ROOT / "tests/host/test_sm90.cpp"), "-o", str(out)], check=True)
    return out


def test_addresses_and_interleavings(program):
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def place():
    """`place` of kernels/similarity.py, on Python's integers."""
    tree = ast.parse((ROOT / "kernels/similarity.py").read_text())
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "place")
    function.decorator_list.clear()
    tl = SimpleNamespace(cdiv=lambda a, b: -(-a // b), minimum=min, constexpr=int)
    names = {"tl": tl}
    exec(compile(ast.Module([function], []), "place", "exec"), names)
    return names["place"]


@pytest.mark.parametrize("M, N", [(1, 1), (128, 256), (1000, 3000), (1153, 257), (4096, 130), (2176, 5000)])
@pytest.mark.parametrize("GROUP_M", [4, 8])
def test_tiles_are_walked_as_by_triton(program, place, M, N, GROUP_M):
    m_tiles, n_tiles = -(-M // 128), -(-N // 256)
    done = subprocess.run(
        [program, str(m_tiles), str(n_tiles), str(GROUP_M)], capture_output=True, text=True, check=True
    )
    walked = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert walked == [place(tile, M, N, 128, 256, GROUP_M) for tile in range(m_tiles * n_tiles)]
    assert len(set(walked)) == len(walked)
