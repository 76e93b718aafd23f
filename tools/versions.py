"""What was run where: a row of docs/versions.md for each Python, torch and Triton that the suite ran under.

    make versions TORCH=2.15.0                          # the suite, and its row
    python tools/versions.py run.xml "what was run"     # the row of a `pytest --junitxml=run.xml` by this very Python

A later run under the same versions of the same tests takes its row.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).absolute().parent.parent
PAGE = ROOT / "docs" / "versions.md"
LIBRARIES = (
    "sentence-transformers",
    "open_clip_torch",
    "pytorch-metric-learning",
    "lightly",
    "lightgbm",
    "xgboost-cpu",
)
KEY = ("python", "torch", "triton", "tests")
COLUMNS = (*KEY, "passed", "failed", "skipped", "numpy", "libraries", "platform", "commit", "date")
HEAD = """# What was run where

A row is written by `make versions` (`TORCH=2.15.0`, `PYTHON=python3.14`), none by hand. Where "tests" is not \
`make test` it says which were run. Skipped: what needs a GPU, nvcc, or a library that is not there.

"""


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def outcome(junit: Path) -> dict[str, str]:
    """An error of a fixture is a failure; a test that is expected to fail counts as skipped, as in the file."""
    suites = list(ElementTree.parse(junit).getroot().iter("testsuite"))
    total = {
        name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "errors", "failures", "skipped")
    }
    failed = total["errors"] + total["failures"]
    passed = total["tests"] - failed - total["skipped"]
    if total["tests"] == 0:
        raise SystemExit(f"{junit} holds no test: nothing was run, or the run was interrupted")
    return {"passed": str(passed), "failed": str(failed), "skipped": str(total["skipped"])}


def here(tests: str) -> dict[str, str]:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "triton": version("triton") or "none",
        "tests": tests,
        "numpy": version("numpy"),
        "libraries": ", ".join(f"{name} {found}" for name in LIBRARIES if (found := version(name))) or "none",
        "platform": f"{platform.system()} {platform.machine()}",
        "commit": git("rev-parse", "--short", "HEAD") + (" and changes" if changed else ""),
        "date": datetime.date.today().isoformat(),
    }


def read(page: str) -> list[dict[str, str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def write(rows: list[dict[str, str]]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([row[name] for name in COLUMNS] for row in rows)]
    return HEAD + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def merged(rows: list[dict[str, str]], new: dict[str, str]) -> list[dict[str, str]]:
    """The newest versions first."""

    def numbers(row: dict[str, str]) -> list[list[int]]:
        parts = (row[name].partition("+")[0].split(".") for name in ("torch", "python"))
        return [[int(part) for part in of if part.isdigit()] for of in parts]

    others = [row for row in rows if any(row[name] != new[name] for name in KEY)]
    return sorted([*others, new], key=numbers, reverse=True)


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    row = here(sys.argv[2] if len(sys.argv) == 3 else "make test") | outcome(Path(sys.argv[1]))
    known = read(PAGE.read_text()) if PAGE.exists() else []
    PAGE.write_text(write(merged(known, row)))
    print(
        f"{row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped: a row of {PAGE.relative_to(ROOT)}"
    )
