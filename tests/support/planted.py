"""In the place of the child that verifies: `python tests/support/planted.py FAULT DEVICE NAME...`, without torch.

What it says are the lines of fusedloss/proof/child.py.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def say(kind: str, **fields: object) -> None:
    print(json.dumps({"kind": kind, **fields}), flush=True)


def prove(name: str, state: str = "proved", reason: str = "") -> None:
    say("verdict", name=name, state=state, cases=1, seconds=0.1, worst=0.5, reason=reason)


def main(fault: str, device: str, *names: str) -> None:
    fault, _, of = fault.partition(":")  # of: the family in which it happens; the others are proved
    if fault == "counts":
        with Path(of).open("a") as file:  # who started is counted
            file.write(f"{len(names)}\n")
        time.sleep(0.5)  # the others are to come while this one is at it
    names, asked = (names[:-2], json.loads(names[-1])) if "race" in names else (names, None)
    if fault == "no context":
        sys.exit("RuntimeError: CUDA-capable device(s) is/are busy or unavailable")
    for name in names:
        say("trying", name=name)
        say("alive", case="257 x 391 x 96")
        if fault in ("proves", "counts") or fault.startswith("race"):
            prove(name)
        elif of not in ("", name.split(" ")[1]):
            prove(name)
        elif fault == "fails":
            prove(name, "failed", "257 x 391 x 96: 3.1 of the budget")
        elif fault == "no memory":
            say("unknown", name=name, reason="CUDA out of memory")
        elif fault == "raises":
            raise RuntimeError("an illegal memory access was encountered")
        elif fault == "exits":
            sys.exit(3)
        elif fault == "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault == "hangs":
            signal.pause()
        elif fault == "poisoned":  # it says so, and no kernel after it would run
            prove(name, "failed", "3.1 of the budget")
            raise RuntimeError("an illegal memory access was encountered")
        else:
            raise ValueError(fault)
    if asked is not None:
        race(fault, of, **asked)


def race(fault: str, of: str, backends: dict[str, list[str]], around: list[int], kinds: list[str]) -> None:
    """At three sizes; `chunked` wins. of: a file in which stands what was asked for."""
    if of:
        with Path(of).open("a") as file:
            file.write(json.dumps([backends, around, kinds]) + "\n")
    M, N, D = around
    for precision, names in backends.items():
        for factor in (1, 4, 16):
            if fault == "race hangs":
                signal.pause()
            seconds = {"chunked": 1e-3} | dict.fromkeys(names, 2e-3)
            place = {"capability": [], "dtype": precision, "kind": kinds[0], "M": M * factor, "N": N * factor, "D": D}
            say("entry", entry=place | {"backend": "chunked", "seconds": seconds})
            if fault == "race raises":
                raise RuntimeError("an illegal memory access was encountered")
            if fault == "race crashes":
                os.kill(os.getpid(), signal.SIGSEGV)
            if fault == "race killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "race says nonsense":
                say("entry", entry={"N": "many"})
                say("entry")
                return
            time.sleep(0.2)  # the others are to come while it is at it


if __name__ == "__main__":
    main(*sys.argv[1:])
