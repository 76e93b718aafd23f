"""Ctrl-C ends the command line with 130, whenever it comes, and without a traceback.

Importing torch takes seconds, and a KeyboardInterrupt in the midst of it may come out as another error. So while
imports run, and nothing was done that could be shown, the signal's handler ends the process. The package imports this
first: `python -m fusedloss` begins with fusedloss/__init__.py.
"""

from __future__ import annotations

import os
import signal
import sys

CODE = 130  # 128 + SIGINT, as in a shell


def _end(*_: object) -> None:
    os.write(2, b"interrupted: nothing was done yet\n")
    os._exit(CODE)


def importing() -> None:
    """Ctrl-C ends the process until `imported()`. Nothing where somebody else handles or ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def imported() -> None:
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# argv[0] is "-m" only while Python looks for the module that `python -m` names, which must be this package.
if sys.argv[:1] == ["-m"] and "fusedloss" in {word.removeprefix("-m") for word in sys.orig_argv}:
    importing()
