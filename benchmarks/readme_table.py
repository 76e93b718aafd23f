"""Writes the README's performance tables from the committed results. `--check` only says if they are up to date."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def claims() -> str:
    rows = [c for c in json.loads((RESULTS / "claims.json").read_text())["claims"] if c["claim"] != "seconds"]
    verdict = {True: "yes", False: "**no**", None: ""}
    table = [[c["claim"], f"{c['measured']:.3g}", c["required"] or "", verdict[c["held"]]] for c in rows]
    return tabulate(table, ["", "measured", "required", "held"], tablefmt="github", disable_numparse=True)


def race() -> str:
    rows = json.loads((RESULTS / "race.json").read_text())["rows"]

    def cells(row: dict) -> list[str]:
        if "seconds" not in row:
            return [str(row["n"]), row["racer"], "", "", "", "", row.get("note", "")]
        memory = row.get("memory_bytes")
        error = row.get("gradient_error")
        return [
            str(row["n"]),
            row["racer"],
            f"{row['seconds'] * 1e3:.0f}",
            f"{row['ratio']:.2f}",
            "" if memory is None else f"{memory / 2**20:.0f}",
            "" if error is None else f"{error:.1e}",
            row.get("note", ""),
        ]

    headers = ["N", "racer", "ms", "x floor", "memory, MiB", "gradient error", ""]
    return tabulate([cells(row) for row in rows], headers, tablefmt="github", disable_numparse=True)


def written(text: str) -> str:
    for name, table in (("claims", claims()), ("race", race())):
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        before, rest = text.split(start)
        text = before + start + "\n" + table + "\n" + end + rest.split(end)[1]
    return text


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text()
    if "--check" in sys.argv[1:]:
        if written(text) != text:
            print("README.md is out of date: run python benchmarks/readme_table.py", file=sys.stderr)
            return 1
        return 0
    readme.write_text(written(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
