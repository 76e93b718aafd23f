"""The demo, small: it learns, it compares with eager, it draws."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

EXAMPLE = Path(__file__).parents[2] / "examples" / "code_search.py"


@pytest.mark.slow
def test_code_search_learns_and_draws(tmp_path):
    picture = tmp_path / "plot.png"
    command = [sys.executable, str(EXAMPLE), "--quick", "--device", "cpu", "--out", str(picture)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert shown.startswith("Code search")  # before torch is imported
    recall = {name: float(re.search(rf"{name} │ +[\d.]+ │ +([\d.]+)", shown).group(1)) for name in ("before", "after")}
    assert recall["after"] > recall["before"] + 0.1, recall
    assert "eager peak memory" in shown and picture.read_bytes().startswith(b"\x89PNG")
