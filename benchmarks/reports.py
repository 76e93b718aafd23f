"""Takes the blocks of `python -m fusedloss report` out of issues, and keeps each for docs/results/gpu.md.

    python benchmarks/reports.py issue-123.md issue-124.md     # files, or - for what is pasted into stdin

A block is written to benchmarks/results/reports, named after its GPU and torch; benchmarks/readme_table.py then writes
the table. A later block of the same GPU and torch takes the place of the earlier.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusedloss.cli.report import FORM
from fusedloss.trust.order import is_entry

REPORTS = Path(__file__).parent / "results" / "reports"


def blocks(text: str) -> Iterator[dict[str, Any]]:
    """The reports in a text, whatever else stands there."""
    for found in re.findall(r"```(?:json)?\s*\n(.*?)\n\s*```", text.replace("\r\n", "\n"), flags=re.DOTALL):
        try:
            report = json.loads(found)
        except ValueError:
            continue
        if isinstance(report, dict) and report.get("fusedloss report") == FORM:
            yield report


def raced(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Its GPUs that were raced: a table of times needs some."""
    return [d for d in report["devices"] if d["device"] != "cpu" and any(map(is_entry, d["races"]))]


def file_of(report: dict[str, Any], device: dict[str, Any]) -> str:
    words = f"{device['key']['device']} torch {report['versions']['torch']}"
    return re.sub(r"[^a-z0-9.]+", "-", words.lower()) + ".json"


def main(argv: list[str] | None = None, folder: Path = REPORTS) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("issues", nargs="+", help="files, or - for stdin")
    kept = 0
    for name in parser.parse_args(argv).issues:
        for report in blocks(sys.stdin.read() if name == "-" else Path(name).read_text()):
            for device in raced(report):
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / file_of(report, device)
                path.write_text(json.dumps({**report, "devices": [device]}, indent=1) + "\n")
                print(path)
                kept += 1
    if not kept:
        print("no block of `python -m fusedloss report` with a race on a GPU is in there", file=sys.stderr)
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())
