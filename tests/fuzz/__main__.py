"""python -m tests.fuzz: see the package."""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is first imported


def main() -> int:
    from .run import DRAWERS, describe, run, search

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="random calls against formulas in fp64")
    parser.add_argument("--seed", type=int, default=0, help="the first number of the cases' names (0)")
    parser.add_argument("--cases", type=int, help="how many; without it and --seconds 1000")
    parser.add_argument("--seconds", type=float, help="for how long")
    parser.add_argument(
        "--function", action="append", choices=sorted(DRAWERS), metavar="NAME", help="only this one; again: and that"
    )
    parser.add_argument("--replay", metavar="NAME:SEED", help="one case, in every form, with its errors")
    parser.add_argument("--cuda", action="store_true", help="csrc/ on a CPU as well, built on its first use")
    given = parser.parse_args()
    if given.cuda:
        from . import host

        host.use()
    if given.replay:
        name, _, seed = given.replay.partition(":")
        if name not in DRAWERS or not seed.isdecimal():
            parser.error(f"--replay must be NAME:SEED, such as info_nce:417, got {given.replay!r}")
        outcome = run(name, int(seed), cuda=given.cuda)
        print(describe(outcome))
        print("at a threshold: not compared" if outcome.unclear else "")
        for share, what in outcome.shares:
            print(f"    {share:8.3f} of what is allowed   {what}")
        for failure in outcome.failures:
            print(f"    wrong{f' (known, {failure.row})' if failure.row else ''}: {failure}")
        return int(outcome.failed)
    cases = 1000 if given.cases is None and given.seconds is None else given.cases
    names = given.function or sorted(DRAWERS)
    return int(search(names, given.seed, cases, given.seconds, given.cuda) > 0)


if __name__ == "__main__":
    sys.exit(main())
