"""Ctrl-C ends the command line with 130, whenever it comes, and without a traceback.

Importing torch takes seconds, and a KeyboardInterrupt in the midst of it may come out as another error. So while
imports run, and nothing was done that could be shown, the signal's handler ends the process. The package imports this
first: `python -m fusedloss` and the entry point `fusedloss` begin with fusedloss/__init__.py. Who watches a terminal
is told what takes so long.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

CODE = 130  # 128 + SIGINT, as in a shell
TOLD, ERASED = "importing torch ...", "\r\x1b[K"


def _end(*_: object) -> None:
    os.write(2, f"{ERASED if _watched() else ''}interrupted: nothing was done yet\n".encode())
    os._exit(CODE)


def _watched() -> bool:
    return os.isatty(2)


def importing() -> None:
    """Ctrl-C ends the process until `imported()`. Nothing where somebody else handles or ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
        if _watched():
            os.write(2, TOLD.encode())


def imported() -> None:
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if _watched():
            os.write(2, ERASED.encode())


# argv[0] is "-m" only while Python looks for the module that `python -m` names, which must be this package. The entry
# point is a file called fusedloss, on Windows fusedloss.exe.
as_module = sys.argv[:1] == ["-m"] and "fusedloss" in {word.removeprefix("-m") for word in sys.orig_argv}
if as_module or (sys.argv and Path(sys.argv[0]).name in ("fusedloss", "fusedloss.exe")):
    importing()
