"""docs/versions.md is what tools/versions.py writes; another torch has an environment of its own."""

from __future__ import annotations

import shlex
import shutil
import subprocess

import pytest
import versions

JUNIT = '<testsuites><testsuite tests="{}" failures="1" errors="2" skipped="3" /></testsuites>'


def row(**cells: str) -> dict[str, str]:
    return dict.fromkeys(versions.COLUMNS, "x") | {"python": "3.11.7", "torch": "2.13.0+cpu", "triton": "3.7.1"} | cells


def test_the_page_is_written_not_edited():
    page = versions.PAGE.read_text()
    assert versions.write(versions.read(page)) == page


def test_a_later_run_takes_its_row():
    old, new = row(passed="1"), row(passed="2")
    others = [row(torch="2.9.1"), row(torch="2.15.0"), row(python="3.9.1"), row(tests="some")]
    found = versions.merged([old, *others], new)
    assert new in found and old not in found and len(found) == 5
    assert [one["torch"] for one in found] == ["2.15.0", *["2.13.0+cpu"] * 3, "2.9.1"]
    assert found[3]["python"] == "3.9.1"
    assert versions.read(versions.write(found)) == found


def test_counts_are_pytests(tmp_path):
    (tmp_path / "run.xml").write_text(JUNIT.format(10))
    assert versions.outcome(tmp_path / "run.xml") == {"passed": "4", "failed": "3", "skipped": "3"}
    (tmp_path / "run.xml").write_text('<testsuites><testsuite tests="0" /></testsuites>')
    with pytest.raises(SystemExit, match="holds no test"):
        versions.outcome(tmp_path / "run.xml")


@pytest.mark.processes
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("torch, more", [("9.8.7", []), ("2.10.0", ["numpy<2.4"])])
def test_another_torch_has_an_environment_of_its_own(torch, more):
    command = ["make", "--dry-run", "test", f"TORCH={torch}", "PYTHON=/opt/bin/python3.14"]
    shown = subprocess.run(command, cwd=versions.ROOT, check=True, capture_output=True, text=True).stdout
    assert f"/opt/bin/python3.14 -m venv .venv-torch-{torch}-python3.14" in shown
    assert f".venv-torch-{torch}-python3.14/bin/python -m pytest" in shown and " .venv/" not in shown
    assert shlex.split(next(line for line in shown.splitlines() if "printf" in line))[2:-2] == [
        f"torch=={torch}",
        *more,
    ]
    pins = subprocess.run(
        shown[(start := shown.index("grep ")) : shown.index(" >", start)],
        shell=True, cwd=versions.ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    names = {line.partition("==")[0] for line in pins.splitlines()}
    assert "pytest" in names and ("numpy" in names) == (not more) and not names & {"torch", "torchvision", "triton"}
