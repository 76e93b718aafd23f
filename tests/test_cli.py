"""The command line: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest
import torch

from fusedloss import bench, check
from fusedloss.__main__ import main
from fusedloss.backends import BACKENDS


def test_info_lists_every_backend_with_a_reason(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown and "auto picks chunked" in shown
    assert all(name in shown for name in BACKENDS)
    assert "fusedloss._C" in shown and "available" in shown


def test_check_passes_here_and_fails_when_a_backend_is_wrong(capsys, monkeypatch):
    assert main(["check"]) == 0
    assert "FAILED" not in capsys.readouterr().out
    right = BACKENDS["chunked"].exp_rows

    def wrong(*arguments):
        sums, q = right(*arguments)
        return sums._replace(total=sums.total * 1.05), q

    monkeypatch.setattr(BACKENDS["chunked"], "exp_rows", wrong)
    assert main(["check"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("loss", ["info_nce", "clip", "multiple_negatives_ranking"])
def test_bench_races_and_writes_its_results(loss, tmp_path, capsys):
    arguments = ["bench", "--loss", loss, "--n", "128", "256", "--d", "32", "--rounds", "1", "--device", "cpu"]
    arguments += [] if loss == "info_nce" else ["--no-memory"]  # each memory run is a fresh process: seconds
    assert main([*arguments, "--racers", "fusedloss", "eager", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "bench.json").read_text())
    assert results["environment"]["torch"] == torch.__version__
    rows = [r for r in results["rows"] if r["racer"] == "fusedloss"]
    assert [r["n"] for r in rows] == [128, 256]
    assert all(r["ratio"] > 0 and r["gradient_error"] < 1e-5 and r["seconds"] > 0 for r in rows)
    with (tmp_path / "bench.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(results["rows"]) == 6
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_racer_that_would_not_fit_is_shown_and_not_run():
    point = bench.Point(n=1 << 20)
    assert not bench.fits(point, "eager") and bench.fits(point, "fusedloss")
    assert point.eager_bytes == 3 * 4 * 2**40


def test_an_inexact_racer_is_marked_not_ranked(monkeypatch):
    monkeypatch.setattr(bench, "gradient_error", lambda point, name: 0.5)
    rows = bench.race(bench.Point(n=64, d=8), 1, {"fusedloss"}, False, lambda text: None)
    assert "not ranked" in rows[-1]["note"]


def test_a_claim_that_does_not_hold_says_no():
    assert bench.claim("a", 1.2, 1.1)["held"] is False and bench.claim("b", 2.0, 1.8, at_least=True)["held"] is True


def test_check_reports_what_cannot_run():
    reasons = {row["backend"]: row["reason"] for row in check.rows(["cpu"]) if "reason" in row}
    assert "fusedloss._C" in reasons["cuda"]


def test_the_module_runs_and_explains_itself():
    shown = subprocess.run([sys.executable, "-m", "fusedloss", "-h"], capture_output=True, text=True, check=True).stdout
    assert all(word in shown for word in ("info", "check", "bench"))
    wrong = subprocess.run([sys.executable, "-m", "fusedloss", "bench", "--n", "0"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "needs a positive number" in wrong.stderr
