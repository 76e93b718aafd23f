"""Prefixes whose similarities come out of one product, on Triton's interpreter; their values are in `proof.sweeps`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fusedloss
from fusedloss.backends import chunked, cuda, triton
from fusedloss.core.problem import Block, Problem
from fusedloss.sweep import Wants, run, together

pytest.importorskip("triton")
WANTS = Wants((True, True), True, (False,))


def problem_of(rows=70, columns=80, dims=(16, 64, 32), dtype=torch.float32, **fields):
    x, y = torch.randn(rows, 64, dtype=dtype), torch.randn(columns, 64, dtype=dtype)
    weights = tuple(1.0 - 0.5 * place for place in range(len(dims)))
    given = {"cosine": True, "prefixes": dims, "prefix_weights": weights, **fields}
    return Problem((x, y), (Block(0, 1),), torch.tensor(5.0), torch.arange(rows) % columns, torch.ones(rows), **given)


@pytest.fixture
def asked(monkeypatch):
    """[(primitive, prefixes, rows, elements of the workspace)] of those that share a product."""
    found = []

    def spied(name):
        original = getattr(triton, name)

        def call(*args, **options):
            strips, *rest = args[1:] if name == "exp_prefixes" else args
            outs = [] if name == "stats_prefixes" else [out for blocks in rest[0] for out in blocks]
            ends = tuple(blocks[0].x.shape[1] for blocks in strips)
            found.append((name, ends, len(strips[0][0].x), sum(out.numel() for out in outs)))
            return original(*args, **options)

        monkeypatch.setattr(triton, name, call)

    for name in ("stats_prefixes", "exp_prefixes", "grad_prefixes"):
        spied(name)
    return found


def results(problem, backend=triton):
    found = run(problem, backend, WANTS if problem.scale_bound is None else WANTS._replace(scale=False))
    return [x for x in (found.rows, *found.operands, found.scale) if x is not None]


def assert_same(found, wanted):
    for out, exact in zip(found, wanted, strict=True):
        assert (out - exact).abs().max() <= 2e-5 * exact.abs().max()


@pytest.mark.parametrize(
    "dims, shared",
    [
        ((64, 16, 32), (16, 32, 64)),  # ascending
        ((64, 20, 32, 8), (32, 64)),  # the others each by itself
        ((50, 48), (48, 50)),  # the longest ends anywhere
        ((16, 16, 32), (16, 32)),  # a prefix twice is one
        ((16,), ()),
        ((60, 20), ()),
    ],
)
def test_which_prefixes_share_a_product(dims, shared, asked):
    problem = problem_of(dims=dims)
    assert triton.common_prefixes(problem) == shared and cuda.common_prefixes(problem) == ()
    found = results(problem)
    assert [ends for _, ends, *_ in asked] == [shared] * (2 if shared else 0)  # statistics, then gradients
    assert_same(found, results(problem, chunked))


def test_gpus_that_do_not_share(monkeypatch):
    """With 256 columns a tile, or of products by the library."""
    problem = problem_of()
    meta = replace(problem, operands=tuple(x.to("meta") for x in problem.operands))
    for capability, shares in (((8, 0), True), ((8, 9), True), ((9, 0), False), ((10, 0), False), ((12, 0), True)):
        monkeypatch.setattr(triton, "capability_of", lambda device, capability=capability: capability)
        for precision in ("tf32", "ieee"):
            monkeypatch.setattr(triton, "precision_of", lambda dtype, device, precision=precision: precision)
            assert bool(triton.common_prefixes(meta)) == (shares and precision == "tf32")


@pytest.mark.parametrize("bound", [None, 5.0])
@pytest.mark.parametrize("rows", [1, 70])
def test_the_workspace_has_a_part_for_each_prefix(rows, bound, asked):
    """Within its bound; a bound that holds fewer than 64 rows of all takes one prefix at a time."""
    problem = problem_of(rows, scale_bound=bound)
    wanted = results(problem)
    assert asked.pop()[:3] == ("exp_prefixes" if bound else "grad_prefixes", (16, 32, 64), rows)
    for budget, shares in ((3 * 64 * 80 * 4, True), (3 * 64 * 80 * 4 - 1, rows == 1)):
        asked.clear()
        assert_same(results(replace(problem, workspace_bytes=budget)), wanted)
        assert bool(asked) == shares
        assert all(4 * elements <= budget for *_, elements in asked)


@pytest.mark.parametrize("fields", [{"label_smoothing": 0.1}, {"symmetric": True}, {"mirrored": True}], ids=str)
def test_what_is_swept_by_itself(fields):
    assert not together.fit(problem_of(80, **fields), (16, 64), triton)
    assert together.fit(problem_of(80), (16, 64), triton) and not together.fit(problem_of(80), (64,), triton)


def test_no_rows():
    found = results(problem_of(0))
    assert found[0].shape == (0,) and found[1].shape == (0, 64) and (found[2] == 0).all() and found[3] == 0


def test_blocks_of_a_loss(asked):
    """Hard negatives are a second block, with a launch of its own."""
    leaves = [torch.randn(21, 48).requires_grad_() for _ in range(3)]
    loss = fusedloss.multiple_negatives_ranking
    values = [fusedloss.matryoshka(loss, *leaves, dims=(48, 16), backend=b) for b in ("triton", "reference")]
    assert [name for name, *_ in asked] == ["exp_prefixes"]
    torch.testing.assert_close(*values)
    for a, b in zip(*(torch.autograd.grad(value, leaves) for value in values), strict=True):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max()
