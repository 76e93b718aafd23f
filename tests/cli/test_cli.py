"""The command line: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import seconds

from fusedloss import sweep, testing
from fusedloss.__main__ import main
from fusedloss.backends import BACKENDS
from fusedloss.bench import measure, race, tables
from fusedloss.cli import check
from fusedloss.core import checks, environment
from fusedloss.integrations._drop_in import disabled

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]


def test_info_lists_every_backend_with_a_reason(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown and "auto picks chunked" in shown
    assert all(name in shown for name in BACKENDS)
    assert "\n_C  " in shown and "available" in shown
    assert "fusedloss._C was not built" in shown or "needs an NVIDIA GPU" in shown


@pytest.mark.slow
def test_check_passes_here_and_fails_when_a_backend_is_wrong(capsys, monkeypatch):
    assert main(["check"]) == 0
    assert "FAILED" not in capsys.readouterr().out
    right = BACKENDS["chunked"].exp_rows

    def wrong(*arguments):
        sums, q = right(*arguments)
        return sums._replace(total=sums.total * 1.05), q

    monkeypatch.setattr(BACKENDS["chunked"], "exp_rows", wrong)
    monkeypatch.setattr(check, "DTYPES", (torch.float32,))
    assert main(["check"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.slow
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
    assert all(r["seconds_min"] <= r["seconds"] <= r["seconds_max"] and r["backend"] == "chunked" for r in rows)
    with (tmp_path / "bench.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["kernel_operation_mode"] == "full"]
    times = {(r["kernel_provider"], int(r["x_value"])) for r in lines if r["metric_name"] == "speed"}
    assert times == {(r["racer"], r["n"]) for r in results["rows"]} and len(times) == 6
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_racer_that_would_not_fit_is_shown_and_not_run():
    point = race.Point(n=1 << 20)
    assert not race.fits(point, "eager") and race.fits(point, "fusedloss")
    assert point.eager_bytes == 3 * 4 * 2**40


def test_an_inexact_racer_is_marked_not_ranked(monkeypatch):
    monkeypatch.setattr(race, "gradient_error", lambda found, wanted: 0.5)
    rows = race.race(race.Point(n=64, d=8), 1, {"fusedloss"}, False, lambda text: None, [])
    assert "not ranked" in rows[-1]["note"]


def test_a_claim_that_does_not_hold_says_no():
    assert race.claim("a", 1.2, 1.1)["held"] is False and race.claim("b", 2.0, 1.8, at_least=True)["held"] is True


def test_info_survives_a_backend_that_cannot_run(capsys, monkeypatch):
    for name in ("cuda", "no-such-backend"):
        monkeypatch.setenv("FUSEDLOSS_BACKEND", name)
        assert main(["info"]) == 0
        shown = capsys.readouterr().out
        assert "auto picks nothing that runs" in shown and f"FUSEDLOSS_BACKEND={name}" in shown


def test_check_goes_on_after_a_backend_that_raises(capsys, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(BACKENDS["chunked"], "stats_rows_and_columns", broken)  # clip alone needs it
    monkeypatch.setattr(check, "DTYPES", (torch.float32,))
    assert main(["check"]) == 1
    shown = capsys.readouterr().out
    assert shown.count("no such kernel") == 1 and "reference" in shown


def test_tables_and_progress_without_rich(capsys, monkeypatch):
    for name in ("rich", "rich.console", "rich.table", "rich.text", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(check, "LOSSES", {})
    with tables.progress(2) as tick:
        tick("one")
        tick("one")
    tables.table("title", ["a", "longer"], [["1", "2"], ["wide cell", ""]])
    captured = capsys.readouterr()
    assert captured.err == "one\n"
    assert captured.out == "title\na          longer\n---------  ------\n1          2\nwide cell\n"


TINY = ["bench", "--n", "64", "--d", "8", "--rounds", "2", "--device", "cpu", "--no-memory"]


def test_ctrl_c_keeps_what_was_measured(capsys, monkeypatch, tmp_path):
    whole = measure.samples_interleaved

    def interrupted(calls, rounds, **options):
        yield from itertools.islice(whole(calls, rounds, **options), len(calls))
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "samples_interleaved", interrupted)
    assert main([*TINY, "--racers", "fusedloss", "eager", "--out", str(tmp_path)]) == 130
    results = json.loads((tmp_path / "bench.json").read_text())
    assert results["interrupted"] and [r["rounds"] for r in results["rows"]] == [1, 1, 1]
    assert all(r["ratio"] > 0 for r in results["rows"])
    assert "gradient_error" not in results["rows"][1] and "interrupted" in capsys.readouterr().err


def test_a_racer_that_fails_is_shown_and_the_others_race(monkeypatch):
    def out_of_memory(query, key, *arguments):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(testing, "eager_info_nce", out_of_memory)
    rows = race.race(race.Point(n=64, d=8), 1, {"fusedloss", "eager"}, False, lambda text: None, [])
    notes = {row["racer"]: row.get("note") for row in rows}
    assert notes == {"floor": None, "fusedloss": None, "eager": "OOM"}


def test_unknown_racers_are_named(capsys):
    assert main([*TINY, "--racers", "fusedloss", "eagre"]) == 2
    assert "eagre" in capsys.readouterr().err


def test_backends_race_by_name():
    point = race.Point(n=64, d=8)
    assert "fusedloss:reference" in race.racers(point) and "fusedloss:reference" not in race.entered(point, None)
    rows = race.race(point, 1, {"fusedloss:reference"}, False, lambda text: None, [])
    assert [row["racer"] for row in rows] == ["floor", "fusedloss:reference"]


@pytest.mark.slow
def test_every_size_is_compiled():
    """Dynamo stops compiling a function after so many sizes and runs it eagerly: that would race under a false name."""
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for n in (32, 48):  # two graphs each: with gradients and without
            rows = race.race(race.Point(n=n, d=8), 1, {"torch.compile"}, False, lambda text: None, [])
            assert "note" not in rows[-1] and rows[-1]["rounds"] == 1


def test_the_floor_has_the_chunks_of_its_device(monkeypatch):
    from types import SimpleNamespace

    card = SimpleNamespace(total_memory=143771 << 20, multi_processor_count=132)
    monkeypatch.setattr(sweep.chunks, "_properties", lambda device: card)
    assert race.floor_rows(race.Point(n=16384)) == 1024 and race.floor_rows(race.Point(n=65536)) == 256
    assert race.floor_rows(race.Point(n=16384, dtype="bf16")) == 1024  # the workspace is fp32 on a CPU
    assert race.floor_rows(race.Point(n=16384, dtype="bf16", device="cuda")) == 8448
    assert race.floor_rows(race.Point(n=100)) == 100


def test_eager_casts_16_bit_logits_up():
    assert race.Point(n=1024, dtype="bf16").eager_bytes == race.Point(n=1024).eager_bytes == 3 * 4 * 2**20


def test_claims_set_the_exit_code(monkeypatch, tmp_path, capsys):
    seconds = {"floor": 1.0, "fp32": 1.2, "cold": 1.3, "learnable": 1.2, "bf16": 0.5, "F.linear_cross_entropy": 1.25}

    def measured(rounds, tick, claims, samples):
        claims += race._time_claims(seconds)

    monkeypatch.setattr(race, "cpu_claims", measured)
    assert main(["bench", "--claims", "--out", str(tmp_path), "--name", "claims"]) == 1
    held = [c["held"] for c in json.loads((tmp_path / "claims.json").read_text())["claims"]]
    assert held == [False, True, True, True, None] and "NO" in capsys.readouterr().out
    seconds["fp32"] = 1.05
    assert main(["bench", "--claims"]) == 0


def test_check_reports_what_cannot_run(monkeypatch):
    monkeypatch.setattr(check, "LOSSES", {})
    reasons = {row["backend"]: row["reason"] for row in check.rows(["cpu"]) if "reason" in row}
    assert "fusedloss._C was not built" in reasons["cuda"] or "needs an NVIDIA GPU" in reasons["cuda"]


def test_the_module_runs_and_explains_itself():
    shown = subprocess.run([sys.executable, "-m", "fusedloss", "-h"], capture_output=True, text=True, check=True).stdout
    assert all(word in shown for word in ("info", "check", "verify", "bench"))
    wrong = subprocess.run([sys.executable, "-m", "fusedloss", "bench", "--n", "0"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "must be a positive whole number, got" in wrong.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_named(capsys):
    assert main(["bench", "--device", "cuda"]) == 2
    assert "sees no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--n", "abc"], "must be a positive whole number, got 'abc'"),
        (["--n", "0"], "must be a positive whole number, got '0'"),
        (["--temperature", "nan"], "must be a positive number, got 'nan'"),
        (["--temperature", "-1"], "expected at least one argument|must be a positive number, got '-1'"),
        (["--device", "tpu"], "must be cpu, cuda or cuda:INDEX, got 'tpu'"),
        (["--device", "cpu:7"], "must be cpu, cuda or cuda:INDEX, got 'cpu:7'"),
        (["--name", "a/b"], "must be a file name, got 'a/b'"),
        (["--out", __file__], "must be a folder"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bench_refuses_before_it_races(wrong, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", *wrong])
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_version(capsys):
    import fusedloss

    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and fusedloss.__version__ in capsys.readouterr().out


def test_bench_fails_where_our_own_racer_does(monkeypatch, capsys):
    monkeypatch.setenv("FUSEDLOSS_BACKEND", "cuda")
    assert main(["bench", "--n", "16", "--d", "4", "--rounds", "1", "--racers", "fusedloss", "--no-memory"]) == 1
    assert "failed:" in capsys.readouterr().out


# Ctrl-C is 130 everywhere and leaves no traceback. A torch that waits stands for the seconds in which it is imported.
WAITS = "import signal\nprint('ready', flush=True)\nsignal.pause()\n"


def interrupted(command, tmp_path, **environment):
    """Starts it, waits for its first line on stdout, and presses Ctrl-C."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell starts what it puts into the background with SIGINT ignored, and children would inherit that.
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    child = subprocess.Popen([sys.executable, "-m", "fusedloss", *command], env=environment, cwd=tmp_path, **pipes)
    try:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        shown, errors = child.communicate(timeout=seconds(300))
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 130 and "Traceback" not in errors and "interrupted" in errors
    return shown


@pytest.mark.parametrize("command", [["info"], ["check"], ["verify"], ["report"], ["bench"]])
def test_ctrl_c_while_torch_is_imported(command, tmp_path):
    (tmp_path / "torch.py").write_text(WAITS)
    assert interrupted(command, tmp_path) == ""


def test_ctrl_c_while_the_race_is_imported(tmp_path):
    """matplotlib, rich and inductor are imported when all else is there: the handler is Python's again by then."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'fusedloss.bench.race':\n"
        "            " + WAITS.replace("\n", "\n            ") + "\n"
        "sys.meta_path.insert(0, Finder)\n"
    )
    assert interrupted(["bench"], tmp_path) == ""


def test_ctrl_c_shows_what_was_checked(monkeypatch, capsys):
    def rows(devices):
        yield {"device": "cpu", "backend": "cuda", "dtype": "all", "loss": "all", "reason": "not built"}
        yield {"device": "cpu", "backend": "chunked", "dtype": "float32", "loss": "mse", "shares": [0.1, 0.2, 0.3]}
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "rows", rows)
    assert main(["check"]) == 130
    shown = capsys.readouterr()
    assert "not built" in shown.out and "0.30" in shown.out and "interrupted" in shown.err


def test_ctrl_c_elsewhere(monkeypatch, capsys):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr("fusedloss.bench.machine.lines", stop)
    assert main(["info"]) == 130 and capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("command", [[], ["info"], ["check"], ["verify"], ["report"], ["bench"]])
def test_help_tells_the_exit_codes(command, capsys):
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    shown = capsys.readouterr().out
    assert all(f"\n  {code} " in shown for code in (0, 1, 2, 130))


# Variables ------------------------------------------------------------------------------------------------------------


def test_every_variable_is_shown_and_documented(monkeypatch, capsys):
    """Those that the package and its build read, by their names in the source."""
    named = set()
    for file in [ROOT / "setup.py", ROOT / "tests" / "support" / "patience.py", *(ROOT / "fusedloss").rglob("*.py")]:
        named |= set(re.findall(r"FUSEDLOSS_\w+", file.read_text()))
    named -= {"FUSEDLOSS_SM90A", "FUSEDLOSS_ARCHS"}  # macros of csrc/
    assert named == {name for name in (*environment.VARIABLES, *environment.OTHERS) if name.startswith("FUSEDLOSS_")}
    page = (ROOT / "docs" / "backends.md").read_text()
    assert [name for name in named if name not in page] == []
    monkeypatch.setenv("FUSEDLOSS_WORKSPACE_BYTES", "1e9")
    monkeypatch.setenv("FUSEDLOSS_DISABLED", "1")
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{name}" in shown for name in named)
    assert "FUSEDLOSS_WORKSPACE_BYTES=1e9: FUSEDLOSS_WORKSPACE_BYTES must be a positive number of bytes" in shown
    assert "FUSEDLOSS_DISABLED=1: fusedloss has no variable of this name" in shown


@pytest.mark.parametrize("name", ["FUSEDLOSS_CHECK", "FUSEDLOSS_DISABLE"])
def test_a_switch_is_on_off_or_refused(name, monkeypatch):
    for on, values in ((True, ("1", "true", "YES")), (False, ("0", "False", " no ", ""))):
        for value in values:
            monkeypatch.setenv(name, value)
            assert environment.switch(name) is on
    monkeypatch.delenv(name)
    assert environment.switch(name) is False
    monkeypatch.setenv(name, "maybe")
    elsewhere = torch.ones(1, device="meta")
    with pytest.raises(ValueError, match=f"{name} must be 1, true, yes, 0, false or no, got 'maybe'; set {name}=1"):
        checks.reads_values(elsewhere) if name == "FUSEDLOSS_CHECK" else disabled()
