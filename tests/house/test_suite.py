"""What the tests stand on: one case's fault is its own, waits are scaled, a bound knows the condition."""

from __future__ import annotations

import itertools
import os

import interpreter
import patience
import pytest
import ranks
import torch
import torch.distributed as dist
from condition import exact_and_moves, within
from grids import cover

import fusedloss


@pytest.mark.skipif(torch.cuda.is_available(), reason="processes are forked here, which CUDA does not survive")
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")
def test_a_fault_on_one_rank_fails_its_own_case_alone(monkeypatch):
    monkeypatch.setattr(ranks, "AFTER_A_FAULT", 0.1)  # the other rank waits for it until then

    def run(rank, case):
        if (rank, case) == (1, "raises"):
            raise ValueError("not this one")
        if (rank, case) == (1, "ends"):
            os._exit(3)
        number = torch.tensor(rank + 1)
        dist.all_reduce(number)
        return number.item()

    group = ranks.Ranks(2, lambda rank: lambda case: run(rank, case))
    try:
        assert group("adds") == [3, 3]
        with pytest.raises(ValueError, match="not this one") as told:
            group("raises")
        assert any("on rank 1" in note for note in told.value.__notes__)
        assert group("adds") == [3, 3]
        with pytest.raises(RuntimeError) as told:
            group("ends")
        assert "rank 1 ended with exit code 3" in " ".join([str(told.value), *getattr(told.value, "__notes__", [])])
        assert group("adds") == [3, 3]
    finally:
        group.stop()


def test_patience_is_a_factor(monkeypatch):
    monkeypatch.setenv("FUSEDLOSS_TEST_PATIENCE", "2.5")
    assert patience.seconds(4) == 10 and patience.delta(4).total_seconds() == 10
    for wrong in ("0", "-1", "much", "nan"):
        monkeypatch.setenv("FUSEDLOSS_TEST_PATIENCE", wrong)
        with pytest.raises(ValueError, match=f"FUSEDLOSS_TEST_PATIENCE must be a number above 0, got '{wrong}'"):
            patience.seconds(4)


def test_a_bound_is_as_wide_as_the_condition_and_no_wider():
    a, b = torch.tensor([1e4, 3.0]), torch.tensor([1e4 - 1.0, 1.0])

    def run(move):
        return {"difference": move(a.double()) - move(b.double())}

    exact, moves = exact_and_moves(run, torch.float32)
    assert exact["difference"].tolist() == [1, 2]
    eps = torch.finfo(torch.float32).eps
    assert 1e4 * eps < moves["difference"] < 1e5 * eps  # the first cancels: its operands' roundings are what is left
    other = (a - b).double()
    within(other + 1e4 * eps, other, exact["difference"], moves["difference"], "near")
    with pytest.raises(AssertionError, match="far: off by"):
        within(other + 1e6 * eps, other, exact["difference"], moves["difference"], "far")


def test_a_part_of_a_product_has_every_pair_or_every_triple():
    def combinations(cases, strength):
        return {found for case in cases for found in itertools.combinations(enumerate(case), strength)}

    product = list(itertools.product(range(4), range(7), range(1), range(3), range(2)))
    ragged = [case for case in product if case[0] != 3 or case[1] > 4]
    for cases in (product, ragged):
        places = cover(cases)
        part = [cases[place] for place in places]
        assert combinations(part, 2) == combinations(cases, 2) and len(part) < 4 * 7 * 1.5
        more = cover(cases, 3, beside=places)
        part = [cases[place] for place in more]
        assert combinations(part, 3) == combinations(cases, 3) and len(part) < 4 * 7 * 3 * 1.2
        assert places < more
    few = [(1, 5, 7), (1, 6, 7), (1, 6, 8)]
    assert cover([(5,), (6,)]) == {0, 1} and cover(few, 3) == {0, 1, 2} and cover([(), ()]) == {0, 1}
    assert cover([]) == set()


@pytest.mark.interpreter
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off")
def test_a_launch_in_the_interpreter_replaces_once_and_puts_back(monkeypatch):
    triton = pytest.importorskip("triton.runtime.interpreter")
    if not hasattr(triton, "_LangPatchScope"):
        pytest.skip("this Triton has another way to replace triton.language")
    x, y = torch.randn(2, 5, 8).requires_grad_()
    real, before = triton._patch_lang.__wrapped__, dict(vars(triton.tl))
    found = {}
    for way in ("real", "once"):
        calls = []
        monkeypatch.setattr(
            triton, "_patch_lang", lambda function, calls=calls: calls.append(function) or real(function)
        )
        if way == "once":
            monkeypatch.setattr(triton, "_patch_lang", interpreter.once(triton))
        loss = fusedloss.info_nce(x, y, backend="triton")
        found[way] = [loss.detach(), *torch.autograd.grad(loss, (x, y))], len(calls)
        assert dict(vars(triton.tl)) == before
    assert all(torch.equal(a, b) for a, b in zip(found["real"][0], found["once"][0], strict=True))
    assert found["once"][1] < found["real"][1] / 2
