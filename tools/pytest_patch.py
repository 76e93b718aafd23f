"""A library's own tests with the drop-ins in its classes' place: `PYTHONPATH=tools pytest -p pytest_patch`."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

from fusedloss.integrations import LIBRARY_UP_TO, calls

LIBRARIES = (
    "sentence_transformers",
    "open_clip",
    "pytorch_metric_learning",
    "lightly",
    "colpali_engine",
    "nemo_automodel",
)
missing: dict[str, ImportError] = {}


def pytest_configure(config: Any) -> None:
    LIBRARY_UP_TO.clear()  # the fused code is what is tested, in batches of few rows
    for name in LIBRARIES:
        try:
            importlib.import_module(f"fusedloss.integrations.{name}").patch()
        except ImportError as error:  # not installed
            missing[name] = error


def version(library: str) -> str:
    found: str | None = getattr(sys.modules[library], "__version__", None)
    return found or importlib.metadata.version(library)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("calls that ran fused")
    for name, count in sorted(calls.items()):
        terminalreporter.line(f"{count:6} {name}")
    for name, error in missing.items():
        terminalreporter.line(f"not patched: {name}: {error}")
    if "FUSEDLOSS_CALLS" in os.environ:  # for tools/upstream.py
        versions = {name: version(name) for name in LIBRARIES if name not in missing}
        found = {"calls": dict(sorted(calls.items())), "versions": versions}
        Path(os.environ["FUSEDLOSS_CALLS"]).write_text(json.dumps(found))
