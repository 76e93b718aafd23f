"""The files of a forge that nothing here can run: their shape, and the bans of pre-commit, which are run."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
WORKFLOWS = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
BANS = {hook["id"]: hook for repo in HOOKS for hook in repo["hooks"] if hook.get("language") == "pygrep"}
BANNED = {
    "no-item": ("fusedloss/losses/new.py", "    if x.sum().item() > 0:"),
    "no-block-ptr": ("kernels/new.py", "    p = tl.make_block_ptr(x, (M, D), (D, 1), (0, 0), (16, 16), (1, 0))"),
    "no-import-kernels": ("tests/new.py", "from kernels import masks"),
}


def applies(hook, name):
    excluded = "exclude" in hook and re.search(hook["exclude"], name)
    return re.search(hook.get("files", ""), name) and not excluded and (name.endswith(".py") or "types" not in hook)


def found(hook, name, text):
    return [f"{name}: {line.strip()}" for line in text.splitlines() if re.search(hook["entry"], line)]


@pytest.fixture(scope="module")
def files():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, whose files would be known")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    return [name for name in listed if name.endswith((".py", ".pyi")) and (ROOT / name).exists()]


@pytest.mark.parametrize("ban", BANS)
def test_a_ban_holds_and_finds_what_it_bans(ban, files):
    hook, (name, line) = BANS[ban], BANNED[ban]
    assert applies(hook, name) and found(hook, name, line)
    checked = [file for file in files if applies(hook, file)]
    assert len(checked) > 5
    assert not [line for file in checked for line in found(hook, file, (ROOT / file).read_text())]


def test_what_a_ban_leaves_out_needs_it(files):
    hook = BANS["no-item"]
    left_out = [file for file in files if re.search(hook["files"], file) and re.search(hook["exclude"], file)]
    assert len(left_out) == 7 and all(found(hook, file, (ROOT / file).read_text()) for file in left_out)


def test_hooks_are_pinned_and_ruff_is_the_suites():
    revisions = {repo["repo"].rpartition("/")[2]: repo["rev"] for repo in HOOKS if repo["repo"] != "local"}
    assert revisions["ruff-pre-commit"] == f"v{PINS['ruff']}"
    assert all(re.fullmatch(r"v\d+\.\d+\.\d+", revision) for revision in revisions.values())
    ids = {hook["id"] for repo in HOOKS for hook in repo["hooks"]}
    assert {"ruff-check", "ruff-format", "clang-format", "typos"} | BANS.keys() == ids


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_workflows_run_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    ran = [line for workflow in WORKFLOWS.values() for step in steps(workflow) for line in [step.get("run", "")]]
    targets = {target for line in ran for target in re.findall(r"\bmake ([a-z-]+)", line)}
    assert targets == {"lint", "test", "test-all", "test-whole", "fuzz", "wheel"}
    assert all(f"\n{target}: " in makefile for target in targets)
    assert "schedule" in WORKFLOWS["weekly.yml"][True] and "pull_request" in WORKFLOWS["tests.yml"][True]  # True: "on"
    for step in [step for workflow in WORKFLOWS.values() for step in steps(workflow)]:
        assert ("run" in step) != ("uses" in step)
        assert "uses" not in step or re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])


def test_the_matrix_is_what_the_package_promises():
    """The oldest torch and Python that pyproject.toml allows, the pinned torch, the newest Python."""
    matrix = WORKFLOWS["tests.yml"]["jobs"]["torch"]["strategy"]["matrix"]
    project = (ROOT / "pyproject.toml").read_text()
    (oldest,) = re.findall(r'"torch>=([\d.]+)"', project)
    assert matrix["torch"] == [f"{oldest}.0", PINS["torch"]]
    (low, end) = re.findall(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', project)[0]
    assert matrix["python"] == [f"3.{low}", f"3.{int(end) - 1}"]
    assert WORKFLOWS["tests.yml"]["jobs"]["wheel"]["strategy"]["matrix"]["python"] == matrix["python"]
    kinds = WORKFLOWS["tests.yml"]["jobs"]["kind"]["strategy"]["matrix"]["kind"]
    assert re.findall(r"KIND='not \((.*?)\)'", str(WORKFLOWS["tests.yml"]["jobs"]["torch"])) == [" or ".join(kinds)]


def test_the_bug_form_asks_for_the_report():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    first = form["body"][0]
    assert "python -m fusedloss report" in first["attributes"]["description"] and first["validations"]["required"]
    assert len({part["id"] for part in form["body"]}) == len(form["body"]) >= 3
