"""benchmarks/small.py: it measures every loss and drop-in beside something that computes the same, and keeps what it
has. What the figures are is a quiet machine's affair."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import seconds

from fusedloss import functional as F
from fusedloss.integrations import _drop_in, calls

pytest.importorskip("tabulate")

ROOT = Path(__file__).parents[2]
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    readme_table, small, small_cases = map(importlib.import_module, ("readme_table", "small", "small_cases"))

CASES = small_cases.CASES
FEW = {"elements": 48, "lists": (3, 8), "drop-in lists": (3, 8)}
LIBRARIES = ("sentence_transformers", "open_clip", "pytorch_metric_learning", "lightly")
SHORT = {"bce": "binary_cross_entropy_with_logits"}


def test_every_loss_is_measured():
    measured = {name.partition(",")[0] for name in CASES}
    names = {name for name in F.__all__ if name.removesuffix("_loss") not in F.__all__ or not name.endswith("_loss")}
    assert names <= {SHORT.get(name, name).split(" ")[0] for name in measured}


@pytest.mark.upstream
@pytest.mark.parametrize("library", LIBRARIES)
def test_every_drop_in_is_measured_or_left_out_for_a_reason(library):
    pytest.importorskip(library)
    with importlib.import_module(f"fusedloss.integrations.{library}").patch() as patch:
        names = {own.__name__ for own in patch._replacements.values() if isinstance(own, type)}
    measured = {name.rpartition(".")[2] for name in CASES if name.startswith(f"{library}.")}
    assert names and names - measured <= small_cases.LEFT_OUT.keys()


def outcome(race, racer):
    """The value, and the gradients of the leaves or, if the racer's module holds them, of its parameters."""
    leaves = [x.detach().clone().requires_grad_() for x in race.leaves]
    torch.manual_seed(0)
    value = race.racers[racer](*leaves)
    if value.requires_grad:
        value.backward()
    return [value.detach(), *(x.grad for x in leaves or race.parameters[racer])]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n if "." not in n else pytest.param(n, marks=pytest.mark.upstream) for n in CASES])
def test_racers_compute_the_same(name, monkeypatch):
    monkeypatch.setattr(_drop_in, "LIBRARY_UP_TO", {})  # ours is what is compared
    case = CASES[name]
    race = case.at(FEW.get(case.family, 12))
    before = sum(calls.values())
    found = outcome(race, "fusedloss")
    if case.family.startswith("drop-in"):
        assert sum(calls.values()) > before, "it ran the library's code"
    others = [racer for racer in race.racers if racer != "fusedloss"]
    assert others
    for racer in others:
        for own, wanted in zip(found, outcome(race, racer), strict=True):
            if wanted is None:  # the library's module has class vectors of its own
                assert race.parameters[racer]
                continue
            scale = max(1.0, wanted.abs().max().item())
            torch.testing.assert_close(own.to(wanted.dtype), wanted, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.processes
def test_the_script(tmp_path):
    path = tmp_path / "found.json"
    command = [sys.executable, "benchmarks/small.py", "--losses", "sup_con,mse", "--sizes", "4,64", "--threads", "1"]
    done = subprocess.run([*command, "--rounds", "2", "--json", str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert {"commit", "cpu", "torch", "source", "date"} <= found["environment"].keys()
    wanted = [("sup_con", "sweep"), ("mse", "elements"), ("mse, weight", "elements")]
    rows = {(row["loss"], row["family"], row["size"]): row for row in found["rows"]}
    assert {(*case, size) for case in wanted for size in ("4", "64")} <= rows.keys()
    for row in rows.values():
        assert {"fusedloss", "eager"} <= row["us"].keys() and min(row["us"].values()) > 0
        assert row["ratio"] == max(row["ratios"].values()) == row["ratios"][row["against"]] and row["threads"] == 1
        few = row["family"] == "elements"
        assert row["held"] == (row["extra_us"] <= 10 if few else row["ratio"] <= 1.10)
    assert "sup_con" in done.stdout


@pytest.mark.slow
def test_the_hosts_part(tmp_path):
    """Compiled for sm_90 and launched into nothing, in a process without the interpreter."""
    pytest.importorskip("triton")
    path = tmp_path / "found.json"
    command = [sys.executable, "benchmarks/small.py", "--host", "--losses", "info_nce,clip", "--sizes", "64"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command += ["--rounds", "1", "--json", str(path)]
    patience = seconds(1800)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=patience)
    assert done.returncode == 0, done.stderr
    rows = {row["loss"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows.keys() == {"info_nce", "info_nce, normalize", "clip"}
    bounds = {"info_nce": 150, "clip": 200}
    for name, row in rows.items():
        assert row["family"] == "host" and row["launches"] >= 3 and min(row["us"].values()) > 0
        assert row["held"] == (row["us"]["fusedloss"] <= bounds[name] if name in bounds else None)


def test_a_slow_library_takes_one_step(monkeypatch):
    monkeypatch.setattr(small, "SLOW", 0.0)
    taken = []
    racers = {name: lambda x, name=name: taken.append(name) or x.sum() for name in ("fusedloss", "eager", "library")}
    case = small_cases.Case("sweep", lambda n: small_cases.Race([torch.ones(n)], racers))
    row = small.measured("any", case, 4, 1, 5, False)
    assert taken.count("library") <= 5 < taken.count("eager")
    assert row["us"].keys() == racers.keys() and row["ratios"].keys() == {"eager", "library"}


def test_a_run_that_is_interrupted_goes_on(tmp_path, monkeypatch, capsys):
    path, asked = tmp_path / "found.json", []

    def measured(name, case, size, threads, *_):
        asked.append(name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        about = {"loss": name, "family": case.family, "size": str(size), "threads": threads}
        return (
            about
            | {"us": {"fusedloss": 2.0, "eager": 1.0}, "ratios": {"eager": 2.0}, "against": "eager"}
            | {
                "ratio": 2.0,
                "held": False,
            }
        )

    monkeypatch.setattr(small, "measured", measured)
    command = ["--losses", "clip,siglip", "--sizes", "16", "--threads", "1", "--json", str(path)]
    assert small.main(command) == 130
    assert [row["loss"] for row in json.loads(path.read_text())["rows"]] == ["clip"]
    assert "1 of 2 points were not measured" in capsys.readouterr().out
    assert small.main(command) == 0 and asked == ["clip", "siglip", "siglip"]
    assert small.main([*command, "--seconds", "0"]) == 0 and len(asked) == 3
    with pytest.raises(SystemExit):
        small.main(["--losses", "clop"])
    assert "--losses: no loss or family clop" in capsys.readouterr().err


def row(loss, size, family="sweep", held=True, **more):
    about = {"loss": loss, "size": size, "family": family, "threads": 1, "held": held, "against": "eager"}
    return about | {"us": {"fusedloss": 30.0, "eager": 12.0}, "ratios": {"eager": 2.5}, "ratio": 2.5} | more


def test_the_table(tmp_path):
    by_class = {"against": "open_clip", "ratios": {"eager": 0.5, "open_clip": 1.25}, "ratio": 1.25}
    rows = [
        row("clip", "16", held=False),
        row("clip", "256", **by_class),
        row("mse", "64", family="elements", extra_us=18.0, held=False),
        {"loss": "batch_all_triplet", "family": "sweep", "size": "1024", "threads": 1, "note": "too large"},
    ]
    about = {"cpu": "a CPU", "date": "2026-01-02T", "commit": "abc", "torch": "2.13", "triton": "3.7", "peers": {}}
    found = {"environment": about, "rounds": 9, "left_out": {"SomeLoss": "no stage"}, "rows": rows}
    (tmp_path / "small.json").write_text(json.dumps(found))
    text = readme_table.small(tmp_path)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert ["clip", "**2.50**", "1.25 (eager 0.50)", ""] in lines
    assert ["batch_all_triplet", "", "", "not run"] in lines
    assert ["mse", "**+18 us**"] in lines
    assert "2 of 3 cells miss their bound" in text
    assert "batch_all_triplet at 1024: too large; SomeLoss: no stage" in text
    assert "Not measured yet" in readme_table.small_host(tmp_path)
    (tmp_path / "small_host.json").write_text(json.dumps(found | {"rows": [row("clip", "64", "host", held=False)]}))
    assert "**30 us, eager 12**" in readme_table.small_host(tmp_path)
    assert "torch.compile was not run for clip, mse" in readme_table.small_compiled(tmp_path)


def test_the_page_says_what_the_results_say():
    text = (ROOT / "docs" / "results" / "small.md").read_text()
    assert all(f"<!-- {table}:start -->" in text for table in ("small", "small_compiled", "small_host"))
    assert readme_table.written(text) == text
