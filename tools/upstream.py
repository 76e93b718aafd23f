"""A library's own tests of its losses: as they are, and with `patch()` before them.

    make test-upstream CHECKOUT=../pytorch-metric-learning

CHECKOUT is a clone of the library's repository, best at the version that is installed: Python may find either. Nothing
is fetched here, but the tests may download models. Fails if a test that passes without the drop-ins does not pass with
them, or if no fused code ran. `--out FILE` adds the outcome to a JSON file, `--only WORDS` picks tests as -k does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

PLUGIN = "pytest_patch"
TOOLS = Path(__file__).absolute().parent  # where it is
# Where each library's repository has the tests that call a loss. They come and go from version to version: those that
# are there run.
LIBRARIES = {
    "sentence_transformers": "tests/sentence_transformer/losses tests/sparse_encoder/losses tests/cross_encoder/losses "
    "tests/multi_vector_encoder/losses tests/util/test_hard_negatives.py",
    "pytorch_metric_learning": "tests/losses tests/reducers tests/regularizers tests/miners "
    "tests/utils/test_distributed.py tests/utils/test_loss_and_miner_utils.py "
    "tests/utils/test_module_with_records_and_reducer.py",
    "open_clip": "tests/test_loss.py tests/test_siglip_chunked_loss.py tests/test_task_specific_unit.py "
    "tests/test_task_base_unit.py tests/test_factory_task.py",
    "lightly": "tests/loss/test_ntx_ent_loss.py tests/loss/test_dcl_loss.py",
    "colpali_engine": "tests/loss/test_bi_losses.py tests/loss/test_gradcache.py",
    "nemo_automodel": "tests/unit_tests/loss/test_infonce.py tests/unit_tests/loss/test_embedding_distill.py",
}


def library_of(checkout: Path) -> str:
    for name in LIBRARIES:
        if any((checkout / folder / name / "__init__.py").is_file() for folder in (".", "src")):
            return name
    raise SystemExit(f"{checkout} has none of these packages: {', '.join(LIBRARIES)}. Give --library, or a clone.")


def run(checkout: Path, tests: list[str], folder: Path, options: list[str], patched: bool) -> dict[str, str]:
    """passed, failed, skipped or error, by the test's name."""
    report = folder / f"{patched}.xml"
    environment = os.environ | {"FUSEDLOSS_CALLS": str(folder / "calls.json")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TOOLS), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", f"--junitxml={report}"]
    command += ["-p", "no:cacheprovider", *(["-p", PLUGIN] if patched else []), *options, *tests]
    subprocess.run(command, cwd=checkout, env=environment)
    if not report.is_file():
        raise SystemExit(f"pytest wrote no report: {' '.join(command)}")
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        outcome = {"failure": "failed"}.get(kinds[0], kinds[0]) if kinds else "passed"
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--library", choices=LIBRARIES)
    parser.add_argument("--tests", nargs="+", help="instead of all tests of losses, relative to the checkout")
    parser.add_argument("--only", help="pytest's -k")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    library = arguments.library or library_of(arguments.checkout)
    folders = LIBRARIES[library]
    tests = arguments.tests or [name for name in folders.split() if (arguments.checkout / name).exists()]
    if not tests:
        raise SystemExit(f"{arguments.checkout} has none of the tests of {library}: {folders}")
    options = ["-k", arguments.only] if arguments.only else []
    with tempfile.TemporaryDirectory() as folder:
        stock = run(arguments.checkout, tests, Path(folder), options, patched=False)
        patched = run(arguments.checkout, tests, Path(folder), options, patched=True)
        told = json.loads((Path(folder) / "calls.json").read_text())
    version, calls = told["versions"][library], told["calls"]
    broken = sorted(name for name, outcome in stock.items() if outcome == "passed" != patched.get(name))
    counts = {
        name: dict(sorted(Counter(found.values()).items())) for name, found in (("stock", stock), ("patched", patched))
    }
    commit = subprocess.run(["git", "describe", "--always"], cwd=arguments.checkout, capture_output=True, text=True)
    print(f"{library} {version}, tests of {commit.stdout.strip() or arguments.checkout.name}")
    for name, found in counts.items():
        print(f"{name:8}", ", ".join(f"{number} {outcome}" for outcome, number in found.items()))
    print("calls that ran fused:", ", ".join(f"{name} {number}" for name, number in calls.items()) or "none")
    for name in broken:
        print("passes without the drop-ins only:", name)
    if arguments.out:
        outcome = {"version": version, "tests": commit.stdout.strip(), **counts, "broken": broken, "calls": calls}
        known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        arguments.out.write_text(json.dumps(known | {library: outcome}, indent=1, sort_keys=True) + "\n")
    return int(bool(broken) or not calls)


if __name__ == "__main__":
    sys.exit(main())
