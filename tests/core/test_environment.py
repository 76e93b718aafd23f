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

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "torchvision_beside_cpu_torch.py"
LIBRARIES = ("sentence_transformers", "open_clip", "pytorch_metric_learning", "lightly")
# These take no arguments, or nobody runs them: being loaded is all that is asked of them.
WITHOUT_HELP = {"glyphs", "readme_table", "scaling", "small_cases"}


def plain(python, *arguments):
    """By a Python that knows nothing of pytest or of tests/conftest.py."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(python), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds(1200), cwd=ROOT)


STARTS = """
import contextlib, importlib, io, runpy, sys
from pathlib import Path

import torch, torchvision

if not torchvision.extension._has_ops():  # built for another torch: its operators say so
    for operator in (torch.ops.torchvision.nms, torchvision.ops.nms):
        try:
            operator(torch.rand(3, 4), torch.rand(3), 0.5)
        except RuntimeError as error:
            assert "torchvision::nms has no code" in str(error) or "load custom C++ ops" in str(error), error
        else:
            raise AssertionError("an operator without code has run")

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


@pytest.mark.slow
def test_all_of_it_starts_in_a_plain_interpreter():
    installed = [library for library in LIBRARIES if importlib.util.find_spec(library)]
    if installed != list(LIBRARIES):
        pytest.skip(f"of the libraries only these are installed: {installed}")
    # One process for all: what each imports is shared.
    done = plain(sys.executable, "-c", STARTS, " ".join(LIBRARIES), " ".join(WITHOUT_HELP))
    assert done.returncode == 0, done.stdout + done.stderr
    scripts = [*(ROOT / "examples").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    assert done.stdout.count("imported") == len(LIBRARIES) and done.stdout.count("started") == len(scripts) > 10


# Fails as the real one does, unless what the tool writes has run before.
STAND_IN = """
import sys
if not any(type(finder).__module__ == "_torchvision_beside_cpu_torch" for finder in sys.meta_path):
    raise RuntimeError("operator torchvision::nms does not exist")
"""


def test_the_tool_mends_what_it_is_for_and_nothing_else(tmp_path):
    venv.create(tmp_path, symlinks=True)
    python = tmp_path / "bin" / "python"
    (site,) = tmp_path.glob("lib/python*/site-packages")
    module = site / "torchvision" / "__init__.py"
    assert plain(python, TOOL).stdout == "torchvision is not installed: nothing to do\n"

    module.parent.mkdir()
    module.write_text("raise ImportError('libtorch_cpu.so: file too short')\n")
    done = plain(python, TOOL)
    assert done.returncode == 1 and "does not mend: ImportError: libtorch_cpu.so: file too short" in done.stderr
    assert not list(site.glob("_torchvision*"))

    module.write_text(STAND_IN)
    done = plain(python, TOOL)
    assert done.returncode == 0 and "is importable, without its operators" in done.stdout, done.stdout + done.stderr
    written = {f"_torchvision_beside_cpu_torch.{end}" for end in ("py", "pth")}
    assert {path.name for path in site.glob("_torchvision*.p*")} == written
    assert plain(python, TOOL).stdout == "torchvision is importable: nothing to do\n"
