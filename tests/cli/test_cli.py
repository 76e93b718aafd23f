"""The command line: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import seconds

from fusedloss import cli, sweep, testing
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
    assert all(r["seconds_min"] <= r["seconds"] <= r["seconds_max"] and r["backend"] == "dense" for r in rows)
    with (tmp_path / "bench.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["kernel_operation_mode"] == "full"]
    times = {(r["kernel_provider"], int(r["x_value"])) for r in lines if r["metric_name"] == "speed"}
    assert times == {(r["racer"], r["n"]) for r in results["rows"]} and len(times) == 8
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
    assert results["interrupted"] and [r["rounds"] for r in results["rows"]] == [1, 1, 1, 1]
    assert all(r["ratio"] > 0 for r in results["rows"])
    assert "gradient_error" not in results["rows"][2] and "interrupted" in capsys.readouterr().err


def test_a_racer_that_fails_is_shown_and_the_others_race(monkeypatch):
    def out_of_memory(query, key, *arguments):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(testing, "eager_info_nce", out_of_memory)
    rows = race.race(race.Point(n=64, d=8), 1, {"fusedloss", "eager"}, False, lambda text: None, [])
    notes = {row["racer"]: row.get("note") for row in rows}
    assert notes == {"floor": None, "better floor": None, "fusedloss": None, "eager": "OOM"}


def test_unknown_racers_are_named(capsys):
    assert main([*TINY, "--racers", "fusedloss", "eagre"]) == 2
    assert "eagre" in capsys.readouterr().err


def test_backends_race_by_name():
    point = race.Point(n=64, d=8)
    assert "fusedloss:reference" in race.racers(point) and "fusedloss:reference" not in race.entered(point, None)
    rows = race.race(point, 1, {"fusedloss:reference"}, False, lambda text: None, [])
    assert [row["racer"] for row in rows] == ["floor", "better floor", "fusedloss:reference"]


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
    seconds = {"floor": 1.0, "better floor": 0.8, "fp32": 1.2, "cold": 1.3, "learnable": 1.2, "bf16": 0.5}
    seconds["F.linear_cross_entropy"] = 1.25

    def measured(rounds, tick, claims, samples):
        claims += race._time_claims(seconds)

    monkeypatch.setattr(race, "cpu_claims", measured)
    assert main(["bench", "--claims", "--out", str(tmp_path), "--name", "claims"]) == 1
    held = [c["held"] for c in json.loads((tmp_path / "claims.json").read_text())["claims"]]
    assert held == [False, None, True, True, True, None] and "NO" in capsys.readouterr().out
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


def interrupted(command, tmp_path, program=("-m", "fusedloss"), **environment):
    """Starts it, waits for its first line on stdout, and presses Ctrl-C. It has one line to say, and nothing before."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell starts what it puts into the background with SIGINT ignored, and children would inherit that.
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    child = subprocess.Popen([sys.executable, *program, *command], env=environment, cwd=tmp_path, **pipes)
    try:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        shown, errors = child.communicate(timeout=seconds(300))
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 130 and errors.count("interrupted") == errors.count("\n") == 1, errors
    return shown


@pytest.mark.parametrize("command", [["info"], ["check"], ["verify"], ["report"], ["bench"]])
def test_ctrl_c_while_torch_is_imported(command, tmp_path):
    (tmp_path / "torch.py").write_text(WAITS)
    assert interrupted(command, tmp_path) == ""


def test_ctrl_c_while_the_entry_point_imports_torch(tmp_path):
    (tmp_path / "torch.py").write_text(WAITS)
    script = tmp_path / "fusedloss"  # as pip writes it
    script.write_text("import sys\nfrom fusedloss.cli import main\nif __name__ == '__main__':\n    sys.exit(main())\n")
    assert interrupted(["info"], tmp_path, program=[str(script)]) == ""


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


@pytest.mark.parametrize("command", cli.EXAMPLES)
def test_help_tells_the_exit_codes_and_shows_examples(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and cli.EXIT_CODES.strip() in shown
    assert all(f"\n  {code} " in shown for code in (0, 1, 2, 130))
    assert len(cli.EXAMPLES[command]) >= 2
    for words, text in cli.EXAMPLES[command]:
        assert f"  python -m fusedloss {words}\n      {text}\n" in shown
        assert command in ("", words.split()[0])


def test_help_knows_the_entry_point(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/fusedloss"])
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: fusedloss ") and "\n  fusedloss bench --n 4096\n" in shown


def test_the_page_has_every_command_option_example_and_code(tmp_path, monkeypatch):
    """And each command line on it is one that the parser takes."""
    page = (ROOT / "docs" / "cli.md").read_text()
    monkeypatch.chdir(tmp_path)  # --out makes its folder
    lines = re.findall(r"^\$ fusedloss (.*)", page, re.MULTILINE)
    assert {words for examples in cli.EXAMPLES.values() for words, _ in examples} <= set(lines)
    for line in lines:
        cli.parser().parse_args(shlex.split(line.partition(" >")[0]))
    (commands,) = (action.choices for action in cli.parser()._actions if action.dest == "command")
    assert set(commands) == set(cli.COMMANDS) == set(cli.EXAMPLES) - {""}
    for name, command in commands.items():
        section = page.partition(f"\n## fusedloss {name}\n")[2].partition("\n## ")[0]
        assert f"{cli.COMMANDS[name]}." in section
        for action in command._actions:
            if action.help != "==SUPPRESS==" and action.dest not in ("help", "json"):
                assert f"`{action.option_strings[0]}`" in section, (name, action.dest)
    codes = re.findall(r"^\| (\d+) \|", page, re.MULTILINE)
    assert codes == re.findall(r"^  (\d+) ", cli.EXIT_CODES, re.MULTILINE)


def test_the_command_imports_no_kernels():
    """Neither Triton nor anything compiled, until a command asks a backend."""
    code = "import sys; from fusedloss.cli import main, parser; parser(); print(sorted(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = set(re.findall(r"'([^']+)'", shown))
    assert "fusedloss.cli" in loaded and not {"fusedloss.kernels", "fusedloss._C", "triton"} & loaded


# JSON -----------------------------------------------------------------------------------------------------------------


def printed(capsys, *command):
    """What stands on stdout, all of it JSON and without NaN, and the exit code."""

    def refused(name):
        raise AssertionError(f"{name} is not JSON")

    code = main([*command, "--json"])
    return json.loads(capsys.readouterr().out, parse_constant=refused), code


def test_info_as_json(monkeypatch, capsys):
    monkeypatch.setenv("FUSEDLOSS_WORKSPACE_BYTES", "1e9")
    found, code = printed(capsys, "info")
    assert code == 0 and found["torch"] == torch.__version__
    assert found["variables"]["FUSEDLOSS_BACKEND"] == {"value": None, "error": None}
    assert "must be a positive number" in found["variables"]["FUSEDLOSS_WORKSPACE_BYTES"]["error"]
    cpu = found["devices"][0]
    assert cpu["device"] == "cpu" and cpu["backends"].keys() == BACKENDS.keys() and cpu["backends"]["chunked"] is None


def test_check_as_json(monkeypatch, capsys):
    rows = [
        {"device": "cpu", "backend": "cuda", "dtype": "all", "loss": "all", "reason": "not built"},
        {"device": "cpu", "backend": "chunked", "dtype": "float32", "loss": "mse", "shares": [0.1, 0.2]},
        {"device": "cpu", "backend": "chunked", "dtype": "float32", "loss": "clip", "shares": [0.1, float("nan"), 0]},
        {"device": "cpu", "backend": "chunked", "dtype": "float32", "loss": "triplet", "error": "ValueError: no"},
    ]
    monkeypatch.setattr(check, "rows", lambda devices: iter(rows))
    found, code = printed(capsys, "check")
    assert code == 1 and [row["state"] for row in found] == ["cannot run", "ok", "failed", "failed"]
    assert found[1]["shares"] == {"value": 0.1, "first gradient": 0.2} and found[2]["shares"]["first gradient"] is None
    assert found[0]["reason"] == "not built" and found[3]["error"] == "ValueError: no"


def test_verify_as_json_where_nothing_runs(monkeypatch, capsys):
    monkeypatch.setattr("fusedloss.cli.verify.names", lambda *asked: ([], ["cuda: not built"]))
    assert printed(capsys, "verify", "--device", "cpu") == ([], 2)


def test_report_as_json_is_the_block_without_fences(capsys):
    found, code = printed(capsys, "report")
    assert code == 0 and main(["report"]) == 0
    assert json.loads(capsys.readouterr().out.strip().strip("`").removeprefix("json")) == found


def test_bench_as_json(capsys, tmp_path):
    found, code = printed(capsys, *TINY, "--racers", "fusedloss", "eager", "--out", str(tmp_path))
    assert code == 0 and [row["racer"] for row in found["rows"]] == ["floor", "better floor", "fusedloss", "eager"]
    assert found["environment"]["torch"] == torch.__version__ and not found["interrupted"]
    assert json.loads((tmp_path / "bench.json").read_text()) == found


def test_what_is_not_a_number_is_null_in_json(capsys):
    tables.print_json({"a": [float("nan"), -float("inf"), (1.5,)], "b": "NaN"})
    assert json.loads(capsys.readouterr().out) == {"a": [None, None, [1.5]], "b": "NaN"}


def test_library_calls_are_silent():
    """Nothing on stdout or stderr, and no log, where nothing is wrong: an import, a loss, a gradient, a search."""
    code = """
import logging, torch
logging.basicConfig(level=logging.INFO)
import fusedloss
x = torch.randn(8, 4, requires_grad=True)
fusedloss.info_nce(x, x.detach()).backward()
fusedloss.TripletLoss()(x, x, x).backward()
fusedloss.search.top_k(x.detach(), x.detach(), 2)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


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
