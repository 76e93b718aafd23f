"""What `make` installs starts in a plain interpreter: every library, drop-in, example and benchmark."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from patience import seconds

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "torchvision_beside_cpu_torch.py"
LIBRARIES = ("sentence_transformers", "open_clip", "pytorch_metric_learning", "lightly")
# These take no arguments: being loaded is all that is asked of them.
WITHOUT_HELP = {"readme_table", "scaling"}


def plain(python, *arguments):
    """By a Python that knows nothing of pytest or of tests/conftest.py."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(python), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds(1200), cwd=ROOT)


STARTS = """
import contextlib, importlib, io, runpy, sys
from pathlib import Path

libraries, without_help = (words.split() for words in sys.argv[1:])
for library in libraries:
    importlib.import_module(library)
    importlib.import_module(f"fusedloss.integrations.{library}")
    print("imported", library)
for script in sorted(Path("examples").glob("*.py")) + sorted(Path("benchmarks").glob("*.py")):
    helps = script.stem not in without_help
    sys.path.insert(0, str(script.parent))
    sys.argv, shown = [str(script), "--help"], io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            runpy.run_path(str(script), run_name="__main__" if helps else script.stem)
    except SystemExit as done:
        assert helps and not done.code and "usage:" in shown.getvalue(), script
    else:
        assert not helps, script
    print("started", script)
"""


def test_all_of_it_starts_in_a_plain_interpreter():
    installed = [library for library in LIBRARIES if importlib.util.find_spec(library)]
    if installed != list(LIBRARIES):
        pytest.skip(f"of the libraries only these are installed: {installed}")
    # One process for all: what each imports is shared.
    done = plain(sys.executable, "-c", STARTS, " ".join(LIBRARIES), " ".join(WITHOUT_HELP))
    assert done.returncode == 0, done.stdout + done.stderr
    scripts = [*(ROOT / "examples").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    assert done.stdout.count("imported") == len(LIBRARIES) and done.stdout.count("started") == len(scripts) > 10


CALLED = """
import torch, torchvision
for operator in (torch.ops.torchvision.nms, torchvision.ops.nms):
    try:
        operator(torch.rand(3, 4), torch.rand(3), 0.5)
    except RuntimeError as error:
        print(str(error).replace(chr(10), " "))
"""


def test_a_torchvision_for_cuda_is_importable_and_its_operators_say_what_they_lack(tmp_path):
    """In an environment of its own, whose packages are those of this one without its .pth files."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    venv.create(tmp_path, symlinks=True)
    python = tmp_path / "bin" / "python"
    (site,) = tmp_path.glob("lib/python*/site-packages")
    packages = {Path(importlib.util.find_spec(name).origin).parents[1] for name in ("torch", "torchvision")}
    (site / "packages.pth").write_text("".join(f"{path}\n" for path in packages))
    done = plain(python, TOOL)
    if done.stdout == "torchvision is importable: nothing to do\n":
        pytest.skip("torchvision is built for this torch")
    assert done.returncode == 0 and "is importable, without its operators" in done.stdout, done.stdout + done.stderr
    assert {path.name for path in site.glob("_torchvision*.p*")} == {
        "_torchvision_beside_cpu_torch.py",
        "_torchvision_beside_cpu_torch.pth",
    }
    first, second = plain(python, "-c", CALLED).stdout.splitlines()
    assert first.startswith("torchvision::nms has no code: this torchvision was built for CUDA")
    assert second.startswith("Couldn't load custom C++ ops")


def test_the_tool_leaves_other_failures_alone(tmp_path):
    venv.create(tmp_path, symlinks=True)
    python = tmp_path / "bin" / "python"
    (site,) = tmp_path.glob("lib/python*/site-packages")
    assert plain(python, TOOL).stdout == "torchvision is not installed: nothing to do\n"
    (site / "torchvision").mkdir()
    (site / "torchvision" / "__init__.py").write_text("raise ImportError('libtorch_cpu.so: file too short')\n")
    done = plain(python, TOOL)
    assert done.returncode == 1 and "does not mend: ImportError: libtorch_cpu.so: file too short" in done.stderr
    assert not list(site.glob("_torchvision*"))
