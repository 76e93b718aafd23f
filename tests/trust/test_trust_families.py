"""Families of kernels: what a loss names is no less than what it launches."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from contract import CASES, WITHOUT_TRITON, Batch
from primitives import record

from fusedloss.backends import BACKENDS, folds
from fusedloss.bench.machine import probe
from fusedloss.core.mask import Guide, Mask
from fusedloss.trust import families

NO_BACKEND = {"global_orthogonal_regularization"}
# The problems are the same on both backends.
SHORT = ("batch_hard_triplet", "circle", "clip", "info_nce", "info_nce, guide", "siglip")
WALK = [
    pytest.param(backend, name, marks=[] if backend == "cuda" or name in SHORT else [pytest.mark.slow])
    for backend in families.BACKENDS
    for name in CASES
    if name not in NO_BACKEND
]


@pytest.mark.parametrize("backend, name", WALK)
def test_no_loss_launches_what_it_does_not_name(backend, name, monkeypatch):
    module, named = BACKENDS[backend], []
    why_not = module.why_not

    def asked(problem):  # by `select`, which will ask for the verdicts of these
        named.append(families.of_problem(problem))
        return why_not(problem)

    monkeypatch.setattr(module, "why_not", asked)
    launched = record(backend, monkeypatch)
    batch = Batch(5, torch.float32)
    try:
        value = CASES[name](batch).result(backend=backend)
    except NotImplementedError as error:  # without a sweep, with a margin's factor
        if backend == "triton":
            assert name in WITHOUT_TRITON
        else:
            assert "no kernel" in str(error)
        return
    if batch.leaves:
        torch.autograd.grad(value.sum(), batch.leaves, materialize_grads=True)
    of_sweeps = launched & {*families.SWEEP}
    assert bool(of_sweeps) == bool(named)
    assert of_sweeps <= set().union(*named)


def test_families_of_common_problems():
    x = probe("cpu")
    assert families.of_problem(x) == ("rows", "stats", "grad")
    assert families.of_problem(probe("cpu", cosine=True, scale_bound=20.0)) == ("rows", "stats", "exp", "grad")
    # What the host does not know to be safe, or fp16 cannot hold, is no stored exponential.
    for options in ({"cosine": True, "scale_bound": 60.0}, {"scale_bound": 20.0}):
        assert "exp" not in families.of_problem(probe("cpu", **options))
    assert "exp" not in families.of_problem(probe("cpu", torch.float16, cosine=True, scale_bound=20.0))
    both = families.of_problem(probe("cpu", symmetric=True, cosine=True, scale_bound=20.0))
    assert both == ("rows", "stats+columns", "stored", "grad+columns")
    assert families.of_problem(probe("cpu", top=True)) == ("rows", "top")
    # Smoothing is a rank-one correction, but under a softcap each row has its own.
    assert families.of_problem(probe("cpu", label_smoothing=0.1)) == ("rows", "stats", "grad")
    assert "tally" in families.of_problem(probe("cpu", label_smoothing=0.1, softcap=5.0))


def test_a_guide_of_another_dtype_is_named():
    problem, half = probe("cpu"), torch.ones(2, 3, dtype=torch.float16)
    block = dataclasses.replace(problem.blocks[0], mask=Mask(guide=Guide(half, half)))
    guided = dataclasses.replace(problem, blocks=(block,))
    assert {"rows", "guide", "masks"} <= set(families.of_problem(guided))
    assert families.guide_dtypes(guided) == (torch.float16,)
    assert families.guide_dtypes(problem) == ()


def test_families_of_backends():
    cuda, triton = families.of_backend("cuda"), families.of_backend("triton")
    assert set(cuda) == set(families.SWEEP) - set(families.TRITON_ONLY)
    assert set(triton) - set(cuda) == {*families.ROWWISE, *families.TRITON_ONLY}
    assert not set(cuda) - set(triton)
    for backend in families.BACKENDS:
        assert not {"exp", "stored", "fold:circle"} & set(families.of_backend(backend, "fp16"))
    with pytest.raises(ValueError, match="backend must be one of cuda, triton, got 'chunked'"):
        families.of_backend("chunked")


def test_the_folds_are_those_of_the_backends():
    assert {*folds.FOLDS, "distill", "distill_ce", "distill_mse"} == set(families.FOLDS)


@pytest.mark.parametrize(
    "dtype, tf32, wanted",
    [
        (torch.bfloat16, True, "bf16"),
        (torch.float16, False, "fp16"),
        (torch.float32, True, "tf32"),
        (torch.float32, False, "fp32"),
        (torch.float64, True, None),
    ],
)
def test_precision(dtype, tf32, wanted):
    from fusedloss.proof.cases import products

    with products("tf32" if tf32 else "fp32"):
        assert families.precision(dtype) == wanted
    assert families.precision(torch.float32) == "fp32"  # as it was


def test_a_list_net_asks_for_the_kernel_that_it_launches(monkeypatch):
    """Its rows are those of soft cross-entropy."""
    from fusedloss.rowwise.lists import listwise

    asked = []
    monkeypatch.setattr(listwise, "select_rowwise", lambda backend, x, family, **_: asked.append(family) or "reference")
    CASES["list_net"](Batch(5, torch.float32)).result()
    assert asked == ["classes"]
