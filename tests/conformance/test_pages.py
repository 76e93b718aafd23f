"""The pages beside the registry: what runs where is what the registry says, and what code cites of the maths stands."""

from __future__ import annotations

import re
from pathlib import Path

import epilogue_table

from fusedloss.core.folds import FOLDS

ROOT = Path(__file__).parents[2]
MATHS = (ROOT / "docs" / "internals" / "maths.md").read_text()
IMPLEMENTATIONS = (
    "fusedloss/core/softmax.py",
    "fusedloss/core/rows.py",
    "fusedloss/core/folds/distillation.py",
    "fusedloss/core/folds/sides.py",
    "fusedloss/core/folds/terms.py",
    "fusedloss/core/folds/triplets.py",
    "fusedloss/backends/protocol.py",
    "fusedloss/backends/chunked/half.py",
    "fusedloss/backends/chunked/masks.py",
    "fusedloss/backends/chunked/softmax.py",
    "fusedloss/sweep/prefixes.py",
    "kernels/softmax.py",
    "kernels/rows.py",
    "kernels/masks.py",
)


def test_what_runs_where_is_up_to_date():
    """`python tools/epilogue_table.py > docs/internals/epilogues.md`"""
    assert (ROOT / "docs" / "internals" / "epilogues.md").read_text() == epilogue_table.page()


def cited() -> dict[str, set[str]]:
    """Headings by file: `maths.md: Heading` up to the line's end, several with semicolons."""
    found: dict[str, set[str]] = {}
    for folder in ("fusedloss", "kernels", "csrc"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".cu", ".cuh", ".h", ".cpp"):
                lines = re.findall(r"maths\.md: ([^\n]+)", file.read_text())
                headings = {name.strip(' ."') for line in lines for name in line.split(";")}
                found |= {file.relative_to(ROOT).as_posix(): headings} if headings else {}
    return found


def test_every_cited_heading_stands():
    headings = set(re.findall(r"^## (.+)$", MATHS, re.MULTILINE))
    for file, names in cited().items():
        assert names <= headings, f"{file} cites {names - headings}"


def test_every_implementation_cites_it():
    assert set(IMPLEMENTATIONS) <= set(cited())


def test_every_fold_has_its_formula():
    rows = re.findall(r"^\| `(\w+)` \|", MATHS[MATHS.index("## Folds") :], re.MULTILINE)
    assert rows == list(FOLDS)
