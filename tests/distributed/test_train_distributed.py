"""The example under torchrun: the losses of one process on two, and Ctrl-C, checkpoint and resume change nothing."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import seconds, until

pytestmark = pytest.mark.processes

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_distributed.py"
SMALL = ("--device", "cpu", "--batch", "64", "--megabytes", "2")


def started(processes, log, steps, *options):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, str(EXAMPLE), *SMALL, "--steps", str(steps), "--log-file", str(log), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=log.parent, env=environment, **output)


def finished(process):
    shown = process.communicate(timeout=seconds(600))[0]
    assert process.returncode == 0, shown
    return shown


def losses(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return torch.tensor([[line["loss"], line["temperature"]] for line in lines])


@pytest.mark.slow
def test_two_processes_stopped_and_resumed_have_the_losses_of_one(tmp_path):
    alone, log = tmp_path / "alone.jsonl", tmp_path / "two.jsonl"
    saved = ("--checkpoint", str(tmp_path / "run.pt"))
    one, stopped = started(1, alone, 6), started(2, log, 10**6, *saved)
    until(lambda: stopped.poll() is not None or (log.exists() and log.read_text()), 600)
    stopped.send_signal(signal.SIGINT)
    shown = stopped.communicate(timeout=seconds(600))[0]
    assert "Stopped after step" in shown, shown
    reached = len(losses(log))
    assert "Held-out modules" in finished(one)

    shown = finished(started(2, log, max(6, reached + 1), *saved))
    assert f"from step {reached}" in shown
    expected, found = losses(alone), losses(log)
    assert len(expected) == 6
    torch.testing.assert_close(found[:6], expected, rtol=0, atol=1e-5)
    assert expected[:, 1].unique().numel() > 4  # the temperature learns


def test_a_checkpoint_of_another_run_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    example = importlib.import_module(EXAMPLE.stem)
    run = example.Run(argparse.Namespace(seed=0, batch=64, loss="clip"), 100, torch.device("cpu"))
    with pytest.raises(SystemExit, match=r"run\.pt is of a run with --batch 32, this one has 64: go on with the same"):
        run.load({"of": run.of | {"--batch": 32}}, Path("run.pt"))
