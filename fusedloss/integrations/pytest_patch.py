"""A pytest plugin that runs a library's own tests on the drop-ins: `pytest -p fusedloss.integrations.pytest_patch`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ._drop_in import calls

patches = []
for library in ("sentence_transformers", "open_clip", "pytorch_metric_learning", "lightly"):
    try:
        patches.append(import_module(f"fusedloss.integrations.{library}").patch())
    except ImportError:  # not installed
        continue


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"fused: {dict(sorted(calls.items()))}")
