"""backend="cuda" on a CPU: csrc/ as tests/host/build.py compiles it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).absolute().parents[2]


def use(extension: ModuleType | None = None, put: Callable[..., None] = setattr) -> None:
    """For the whole process, unless `put` takes it back. Without an extension it is built into build/, minutes the
    first time."""
    from fusedloss.backends.cuda import launching

    if extension is None:
        spec = importlib.util.spec_from_file_location("host_build", ROOT / "tests" / "host" / "build.py")
        assert spec is not None and spec.loader is not None
        host = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(host)
        if why := host.why_not():
            raise SystemExit(f"--cuda must have a compiler: {why}")
        extension = host.load(host.build(ROOT / "build" / "fuzz"))
    put(launching, "extension", lambda: extension)
