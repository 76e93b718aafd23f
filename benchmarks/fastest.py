"""Puts the faster of `cuda` and `triton` at each point of a race into the table that `auto` reads.

    python benchmarks/fastest.py benchmarks/results/gpu-full.json

Points of earlier races stay where this one has none. `auto` reads the table where it has kernels and nothing was raced
on the machine itself: fusedloss/trust/order.py, which has the form of an entry.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fusedloss.backends import KERNELS
from fusedloss.trust.order import merged

TABLE = Path(__file__).parents[1] / "fusedloss" / "trust" / "fastest.json"
RACED = (*KERNELS, "chunked")
PLACE = ("capability", "dtype", "kind", "N", "D")


def points(found: dict) -> list[dict]:
    """Where both are ranked, at scale 20 on random inputs: to a kernel the others are the same work."""
    seconds: dict[tuple, dict[str, float]] = {}
    for row in found["rows"]:
        plain = (row["temperature"], row["kind"]) == (0.05, "random")
        if plain and row.get("ranked") and row.get("sweep") and row.get("backend") in RACED:
            place = (*found["environment"]["capability"], row["dtype"], row["sweep"], row["n"], row["d"])
            at = seconds.setdefault(place, {})
            at[row["backend"]] = min(row["seconds"], at.get(row["backend"], row["seconds"]))
    return [
        {
            **dict(zip(PLACE, ([major, minor], *place), strict=True)),
            "backend": min(at, key=at.__getitem__),
            "seconds": dict(sorted(at.items(), key=lambda item: item[1])),
        }
        for (major, minor, *place), at in seconds.items()
        if set(KERNELS) <= set(at)
    ]


def main(argv: list[str] | None = None, table: Path = TABLE) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what benchmarks/race.py wrote")
    found = json.loads(parser.parse_args(argv).results.read_text())
    if not found["environment"].get("capability"):
        parser.error(f"{found['environment']['device']} is no GPU")
    new = points(found)
    entries = merged(json.loads(table.read_text()), new)
    table.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n" if entries else "[]\n")
    wins = {backend: sum(entry["backend"] == backend for entry in new) for backend in RACED}
    print(f"{table}: {len(entries)} points, {len(new)} of this race; " + ", ".join(f"{k} {n}" for k, n in wins.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
