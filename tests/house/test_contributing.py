"""The contributor's pages: "Add a loss" is followed to the letter, and what the others name is there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "contributing"
BLOCKS = re.compile(r'^```(python|diff|console)(?: title="(.+?)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def applied(text: str, diff: str) -> str:
    """`text` with the lines of a diff without numbers, whose other lines must stand there once."""
    lines = diff.splitlines(keepends=True)
    assert {line[0] for line in lines} <= {" ", "+", "-"}, diff
    old, new = ("".join(line[1:] for line in lines if line[0] in marks) for marks in (" -", " +"))
    assert text.count(old) == 1, f"the lines must stand in the file once, they do {text.count(old)} times:\n{old}"
    return text.replace(old, new)


@pytest.fixture
def copy(tmp_path):
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "results")
    copied = Path(shutil.copytree(ROOT, tmp_path / "checkout", ignore=ignored))
    # As an editable install of it: device code is fusedloss.kernels.
    (copied / "fusedloss" / "kernels").symlink_to(copied / "kernels", target_is_directory=True)
    return copied


@pytest.mark.slow
def test_add_a_loss_is_followed_to_the_letter(copy):
    page = (PAGES / "add-a-loss.md").read_text()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(copy)}
    ran = 0
    for kind, title, block in BLOCKS.findall(page):
        file = copy / title
        if kind == "python":
            assert title and not file.exists(), f"a block of Python is a new file, {title!r} is none"
            file.write_text(block)
        elif kind == "diff":
            file.write_text(applied(file.read_text(), block))
        else:
            for line in block.splitlines():
                assert line.startswith("$ python "), line
                command = [sys.executable, *shlex.split(line)[2:]]
                done = subprocess.run(command, cwd=copy, env=environment, text=True, capture_output=True)
                assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
                # pytest names a test that did not run, and has no exit code for one that chose too little.
                ran += sum(map(int, re.findall(r"^(\d+) passed", done.stdout, re.MULTILINE)))
    code = "import fusedloss; print(fusedloss.additive_margin.__module__, fusedloss.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, env=environment, text=True, capture_output=True)
    assert done.stdout.split() == ["fusedloss.losses.additive_margin", str(copy / "fusedloss" / "__init__.py")]
    assert ran >= 30, ran  # a loss has 38 tests there


def test_a_diff_fits_once_or_not_at_all():
    assert applied("a\nb\nc\n", " a\n-b\n+d\n") == "a\nd\nc\n"
    with pytest.raises(AssertionError, match="do 2 times"):
        applied("a\na\n", " a\n+b\n")
    with pytest.raises(AssertionError, match="do 0 times"):
        applied("a\n", " b\n+c\n")


@pytest.mark.parametrize("page", sorted([ROOT / "CONTRIBUTING.md", *PAGES.glob("*.md")]), ids=lambda path: path.name)
def test_what_a_page_names_is_there(page):
    """Files and folders of the checkout, targets of the Makefile, and links."""
    text = page.read_text()
    made = {title for _, title, _ in BLOCKS.findall(text)}
    for name in set(re.findall(r"`([\w./]+/[\w./*]*)`", text)):
        inside = any(list(place.glob(name.rstrip("/"))) for place in (ROOT, ROOT / "fusedloss"))
        assert inside or name in made, name
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z-]+)", text)):
        assert f"\n{target}:" in makefile, target
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
