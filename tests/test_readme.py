"""The README runs: every Python snippet, and its tables are what the committed results say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippets_run(number):
    exec(compile(SNIPPETS[number], f"README.md, snippet {number + 1}", "exec"), {})


def test_there_are_snippets():
    assert len(SNIPPETS) >= 3


def test_tables_are_generated_from_the_committed_results():
    subprocess.run([sys.executable, "benchmarks/readme_table.py", "--check"], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", ["README.md", "DESIGN.md"])
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text()):
        assert (ROOT / target).exists(), target
