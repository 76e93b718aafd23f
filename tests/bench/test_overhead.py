"""A small batch is one chunk and a handful of launches. Their number is tested; their time is a benchmark's affair."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import seconds

pytest.importorskip("triton")

# prepare, similarities, settle, two products, two finishes; a grad sweep adds one, columns another. Of cuda the scaled
# rows of an exp sweep are a launch of their own.
MOST = {"info_nce, normalize=True": 7, "info_nce": 8, "clip, learnable scale": 9, "multiple_negatives_ranking": 7}
MOST_OF_CUDA = MOST | {"info_nce, normalize=True": 8, "multiple_negatives_ranking": 8}


@pytest.mark.slow
def test_a_small_batch_is_a_handful_of_launches(tmp_path):
    """Compiled for sm_90 and launched into nothing, in a process without the interpreter."""
    script = Path(__file__).parents[2] / "benchmarks" / "overhead.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONSAFEPATH": "1", "FUSEDLOSS_BACKEND": "triton"}
    command = [sys.executable, str(script), "--repeats", "2", "--out", str(tmp_path / "out.json")]
    patience = seconds(3600)  # may build csrc/
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=patience)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    counts = {(row["backend"], row["loss"]): row["launches"] for row in rows}
    both = {"triton": MOST, "cuda": MOST_OF_CUDA if "cuda: needs" not in done.stderr else {}}
    assert counts == {(backend, loss): most for backend, losses in both.items() for loss, most in losses.items()}
    assert all(row["us"] > 0 < row["bare_us"] for row in rows)  # which is longer is a busy machine's affair
