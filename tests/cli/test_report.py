"""`python -m fusedloss report`, and the table of GPUs that is made of such blocks."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

import fusedloss
from fusedloss.__main__ import main
from fusedloss.cli import report
from fusedloss.trust import ask, verdicts
from fusedloss.trust.verdicts import FAILED, PROVED, Verdict

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
RACE = {"capability": [9, 0], "dtype": "bf16", "kind": "one direction, bounded", "N": 65536, "D": 768}
RACE |= {"backend": "triton", "seconds": {"triton": 0.0271, "chunked": 0.0544}}


@pytest.fixture
def kept(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", str(tmp_path / "of somebody"))
    ask.forget()
    ask.learn(CPU, {"triton stats fp32": Verdict(PROVED, 3), "triton grad fp32": Verdict(FAILED, 1, reason="3.1")})
    verdicts.keep(CPU, {}, [RACE, RACE | {"kind": "both directions, bounded", "N": 1024}])
    yield
    ask.forget()


@pytest.fixture
def reports():
    pytest.importorskip("tabulate")
    return script("reports")


def script(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_block_holds_versions_verdicts_and_races(kept, capsys, monkeypatch):
    monkeypatch.setenv("FUSEDLOSS_VERIFY", "off")
    assert main(["report"]) == 0
    shown = capsys.readouterr().out
    (text,) = re.findall(r"^```json\n(.*)\n```\n$", shown, flags=re.DOTALL)
    found = json.loads(text)
    about, (device,) = found["versions"], found["devices"]
    assert (about["fusedloss"], about["torch"]) == (fusedloss.__version__, torch.__version__)
    assert about["variables"] == {"FUSEDLOSS_VERIFY": "off"} and "of somebody" not in shown
    assert device["device"] == "cpu" and device["key"] == verdicts.key(CPU)
    states = device["verdicts"]["triton"]
    assert (states["proved"], states["failed"]) == (1, {"grad fp32": "3.1"}) and states["unknown"] > 20
    assert device["races"] == verdicts.read(CPU).races
    assert sum(line.strip().startswith(json.dumps(RACE)) for line in text.splitlines()) == 1  # a line for each
    assert max(map(len, text.splitlines())) < 400


def of_a_gpu(name="NVIDIA H200", **changed):
    found = {"fusedloss report": report.FORM, "versions": report.versions(), "devices": [report.of_device(CPU)]}
    found["devices"][0] |= {"device": "cuda:0", "name": f"{name}, sm_90, 140 GiB", **changed}
    found["devices"][0]["key"] = found["devices"][0]["key"] | {"device": name}
    return f"Fast here:\r\n\r\n```json\r\n{report._written(found)}\r\n```\r\nthanks"


def test_blocks_become_a_table_with_the_machine_named(kept, reports, tmp_path, capsys):
    issue, folder = tmp_path / "issue.md", tmp_path / "reports"
    issue.write_text(of_a_gpu() + "\n```json\n{}\n```\n```\nnot JSON\n```\n" + of_a_gpu("NVIDIA L4"))
    assert reports.main([str(issue)], folder) == 0
    assert reports.main([str(issue)], folder) == 0  # the same place
    assert sorted(path.name for path in folder.iterdir()) == [
        f"nvidia-{name}-torch-{torch.__version__.replace('+', '-')}.json" for name in ("h200", "l4")
    ]
    table = script("readme_table").gpus(tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[1:] for row in rows] == 2 * [
        ["both directions", "1024", "triton", "27.1", "54.4", ""],
        ["one direction", "65536", "triton", "27.1", "54.4", ""],
    ]
    assert rows[0][0] == f"NVIDIA H200, sm_90, 140 GiB; torch {torch.__version__}, fusedloss {fusedloss.__version__}"
    assert rows[1][0] == "" and rows[2][0].startswith("NVIDIA L4")


def test_nothing_is_taken_from_a_machine_without_times(kept, reports, tmp_path, capsys):
    issue = tmp_path / "issue.md"
    for text in ("nothing", f"```json\n{report._written({})}\n```", report.block(), of_a_gpu(races=[])):
        issue.write_text(text)
        assert reports.main([str(issue)], tmp_path / "reports") == 1
        assert "no block" in capsys.readouterr().err
    assert not (tmp_path / "reports").exists()
    assert "No report of a GPU has come in yet" in script("readme_table").gpus(tmp_path)
