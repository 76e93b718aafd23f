"""How long a test waits before it calls something hung: `seconds(written)`, FUSEDLOSS_TEST_PATIENCE times `written`.

What is written at each timeout already allows for a machine with three times as much work as cores. No test asserts on
time itself, so patience costs nothing where nothing hangs; a slower machine (an emulator, say) sets it to 10.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable


def seconds(written: float) -> float:
    given = os.environ.get("FUSEDLOSS_TEST_PATIENCE", "1")
    try:
        factor = float(given)
    except ValueError:
        factor = 0.0
    if not 0 < factor < 1e6:
        raise ValueError(f"FUSEDLOSS_TEST_PATIENCE must be a number above 0, got {given!r}; unset it for 1")
    return written * factor


def delta(written: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=seconds(written))


def until(condition: Callable[[], object], written: float = 120.0) -> None:
    """Waits for an event that only shows by looking: a file, say."""
    deadline = time.monotonic() + seconds(written)
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"what was waited for did not happen within {seconds(written):.0f} s")
        time.sleep(0.05)
