"""Folds of one matrix against itself, by the kernels: chunks of rows and the rows behind them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from epilogue_checks import TILES

import fusedloss
from fusedloss import sweep, testing
from fusedloss.backends import SWEEPS, folds, reference, triton
from fusedloss.backends.protocol import Wants
from fusedloss.core.problem import Fold
from fusedloss.losses._folded import fold_problem
from fusedloss.losses._options import Call

KINDS = {
    "multi_similarity": (2.0, 40.0, 0.5),
    "circle": (0.4, 80.0),
    "sup_con_in": (),
    "pair_hinge": (0.53125, 1.0, 0.0),  # between the similarities of a lattice
}
COUNTED = ("circle", "pair_hinge")
KERNELS = ("triton", "cuda")
ROWS = 75
LABELS = {
    "four labels": lambda count: torch.arange(count) * 7 % 4 - 2**40,
    "one label": lambda count: torch.zeros(count, dtype=torch.int64),
    "no positives": lambda count: torch.arange(count),
    "two of each": lambda count: torch.arange(count) // 2,
}


def problem_of(kind, count=ROWS, labels="four labels", inputs="random", dtype=torch.float32, weighted=True):
    """Every third row is left out, where rows have weights."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 24, generator=generator)
    if inputs == "duplicates":
        x[1::2] = x[: count // 2 * 2 : 2]
    elif inputs == "zeros":
        x[::4] = 0
    if kind == "pair_hinge":
        x = x.round() / 4
    ids, weight = LABELS[labels](count), torch.rand(count, generator=generator) + 0.1
    weight[1::3] = 0
    fold = Fold(kind, KINDS[kind], labels=(ids, ids), itself=True)
    scale = torch.tensor(20.0 if kind == "sup_con_in" else 1.0)
    weight = weight if weighted else torch.ones(count)
    return fold_problem([x.to(dtype)], scale, weight, fold, Call(), cosine=kind != "pair_hinge")


def wants_of(problem, gradient=True):
    return Wants((gradient,), gradient and problem.fold.name == "sup_con_in", (False,))


def run(problem, backend, gradient=True):
    """Losses, counts, gradients by the rows and by the scale."""
    found = sweep.run(problem, SWEEPS[backend], wants_of(problem, gradient))
    return [x for x in (found.rows, *found.counted, *found.operands, found.scale) if x is not None]


def formula(problem, wide):
    x, scale, weight = (t.double() if wide else t.clone() for t in (*problem.operands, problem.scale, problem.weight))
    x.requires_grad_(), scale.requires_grad_()
    rows, counted = reference.loss_rows(replace(problem, operands=(x,), scale=scale, weight=weight))
    leaves = [x, *([scale] if wants_of(problem).scale else [])]
    return [rows.detach(), *counted, *torch.autograd.grad(rows.sum(), leaves)]


def assert_in_budget(problem, found):
    exact, baseline = formula(problem, True), formula(problem, False)
    for number, (a, b, c) in enumerate(zip(found, baseline, exact, strict=True)):
        if problem.fold.name in COUNTED and number == 1:
            assert torch.equal(a.double(), c.double())  # counts
        elif c.dim() == 0:  # terms of the scale's gradient cancel
            torch.testing.assert_close(a.double(), c, rtol=2e-5, atol=1e-3)
        else:
            # circle's logits are up to gamma (1 + m)^2 = 157, and a BLAS may round the two places of a pair apart.
            moves = 1e-5 if problem.fold.name == "circle" else 1e-6
            assert testing.budget_share(a, b, c, problem.dtype, moves * c.abs().max().item() + 1e-12) <= 1


@pytest.fixture
def chunks_of_32(monkeypatch):
    monkeypatch.setattr(sweep.chunks, "strip_rows", lambda *_: 32)


def counting(counted, name, method):
    def counts(self, strip, *rest):
        counted[name] += len(strip.x) * len(strip.y)
        return method(self, strip, *rest)

    return counts


@pytest.fixture
def taken(monkeypatch):
    """The similarities that the kernels are handed, by the method that hands them."""
    counted = Counter()
    for kind, names in ((folds.TwoSides, ("add", "write")), (folds.HalfHinges, ("write",))):
        for name in names:
            monkeypatch.setattr(kind, name, counting(counted, name, getattr(kind, name)))
    return counted


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("labels", "inputs"),
    [*((labels, "random") for labels in LABELS), ("four labels", "duplicates"), ("two of each", "zeros")],
)
def test_half_gives_the_formula(chunks_of_32, kind, labels, inputs, backend):
    problem = problem_of(kind, labels=labels, inputs=inputs)
    found = run(problem, backend)
    assert_in_budget(problem, found)
    assert all(map(torch.equal, found, run(problem, backend))), "other bits from run to run"
    torch.testing.assert_close(run(problem, backend, gradient=False)[0], found[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 32, 33])
def test_any_number_of_rows(chunks_of_32, kind, count, backend):
    problem = problem_of(kind, count, "two of each")
    assert_in_budget(problem, run(problem, backend))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", TILES)
def test_every_way_to_multiply(monkeypatch, chunks_of_32, kind, tile):
    monkeypatch.setattr(triton, "config_of", lambda strip, mode: TILES[tile])
    monkeypatch.setattr(triton, "_panel_columns", lambda strip, config: 2 * config.BLOCK_N)
    # The interpreter multiplies no bf16; the library does.
    dtype = torch.bfloat16 if tile == "library" else torch.float32
    problem = problem_of(kind, weighted=False, dtype=dtype)
    assert_in_budget(problem, run(problem, "triton"))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gradient", [True, False])
def test_a_pair_is_multiplied_once_outside_of_the_diagonal(chunks_of_32, taken, kind, gradient, backend):
    """Once for the sums and once for the gradient, or once for both where these are no sums of all."""
    run(problem_of(kind), backend, gradient)
    once = (ROWS**2 + 2 * 32**2 + (ROWS - 64) ** 2) // 2
    if kind == "pair_hinge":
        assert taken == {"write": once}
    else:
        assert taken == {"add": once, **({"write": once} if gradient else {})}


@pytest.mark.parametrize("backend", KERNELS)
def test_a_small_workspace_is_kept_to(taken, backend):
    """One chunk of 16 rows against all is what the budget allows."""
    problem = problem_of("circle", 64)
    run(replace(problem, workspace_bytes=16 * 64 * 4), backend)
    assert taken["write"] == (64**2 + 4 * 16**2) // 2


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_not_finite_spoil_what_they_spoil_in_whole_rows(monkeypatch, chunks_of_32, kind, backend):
    problem = problem_of(kind)
    (x,) = problem.operands
    x[40] = torch.nan  # a row that is left out is a column of the others
    for weight in (problem.weight, torch.zeros(ROWS)):
        given = replace(problem, weight=weight)
        found = run(given, backend)
        with monkeypatch.context() as patch:
            patch.setattr(sweep, "halved", lambda problem, backend: None)
            wanted = run(given, backend)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert not found[0].any()  # all rows are left out


PUBLIC = {
    "multi_similarity": fusedloss.multi_similarity,
    "circle": fusedloss.circle,
    "sup_con": lambda x, labels, **options: fusedloss.sup_con(x, labels, form="in", **options),
}


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("stride", [1, 2])
def test_losses_take_half(chunks_of_32, taken, name, stride, backend):
    """Also by labels that are not contiguous."""
    generator = torch.Generator().manual_seed(3)
    x, labels = torch.randn(ROWS, 24, generator=generator), (torch.arange(ROWS * stride) % 8)[::stride]
    step = lambda by: lambda x: PUBLIC[name](x, labels, backend=by)
    found = testing.value_and_gradients(step(backend), [x])
    wanted = testing.value_and_gradients(step("reference"), [x.double()])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
    assert taken["write"] == (ROWS**2 + 2 * 32**2 + (ROWS - 64) ** 2) // 2
