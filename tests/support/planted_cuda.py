"""The child that verifies, with tests/host/ as backend "cuda": `python planted_cuda.py FAULT DEVICE NAME...`.

FAULT: "none", or what is wrong with a kernel.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from fusedloss.backends import cuda
from fusedloss.backends.cuda import launching
from fusedloss.proof import child


def main(fault: str, *arguments: str) -> int:
    spec = importlib.util.spec_from_file_location("host_build", Path(__file__).parents[1] / "host" / "build.py")
    assert spec is not None and spec.loader is not None
    host = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(host)
    extension = host.load(host.build())
    launching.extension = lambda: extension
    if fault == "without the last column":
        right = cuda.top_rows
        cuda.top_rows = lambda strips: right([strip._replace(y=strip.y[:-1]) for strip in strips])
    else:
        assert fault == "none", fault
    return child.main(arguments)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
