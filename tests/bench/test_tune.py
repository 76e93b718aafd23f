"""Which candidates benchmarks/tune.py times, and what it refuses; times themselves are a GPU's affair."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fusedloss.backends import BACKENDS
from fusedloss.backends.cuda import launching as cuda_launching

pytest.importorskip("triton")
pytest.importorskip("tabulate")


@pytest.fixture
def tune():
    path = Path(__file__).parents[2] / "benchmarks" / "tune.py"
    spec = importlib.util.spec_from_file_location("tune", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    module.use(None)


def test_the_plans_of_cuda(tune):
    assert tune.plans((9, 0)) == [(80, 1), (90, 1), (90, 2)]
    assert tune.plans((8, 0)) == tune.plans((12, 0)) == [(80, 1)]


def test_a_plan_is_made_in_place_of_the_usual_one(tune):
    def plan(capability, tensor_cores, aligned, narrow):
        return SimpleNamespace(capability=min(capability, built), cluster=1, asked=(tensor_cores, aligned, narrow))

    built = 90
    tune.use(tune.Plan(90, 2))
    made = cuda_launching.plan_of(lambda: SimpleNamespace(plan=plan), 90, True, True, False)
    assert (made.capability, made.cluster, made.asked) == (90, 2, (True, True, False))
    built = 80
    with pytest.raises(LookupError, match="no kernel of sm_90"):
        cuda_launching.plan_of(lambda: SimpleNamespace(plan=plan), 90, True, True, False)
    tune.use(None)
    assert cuda_launching.plan_of is tune.USUAL_PLAN


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("backend", ["cuda"])
def test_every_mode_runs_what_this_build_has(tune, monkeypatch, backend, capsys):
    """On a CPU: both kernels, since tests/host/ has that of sm_90 as well."""
    monkeypatch.setattr(tune, "N", 160)
    for mode in tune.MODES:
        case = tune.Case(BACKENDS[backend], mode, 48, 40, torch.device("cpu"))
        plans = tune.plans((9, 0))
        seconds = tune.times(case, plans, 1)
        assert set(seconds) == {None, *plans} and all(s > 0 for s in seconds.values())
    assert set(tune.times(case, [tune.Plan(100)], 1)) == {None}
    assert "Plan(capability=100, cluster=1): LookupError" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--out"),
        (["--out", "x.json", "--backend", "chunked"], "invalid choice"),
        (["--out", "x.json", "--backend", "cuda", "--write"], "have no table"),
        (["--out", "x.json", "--backend", "cuda"], "needs a CUDA device"),
    ],
)
def test_what_it_refuses(tune, arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        tune.main(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err
