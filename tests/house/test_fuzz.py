"""The fuzzer (tests/fuzz), a minute of it: so many cases of every function, and the seeds of what it found."""

import functools

import pytest
import torch.distributed as dist
from fuzz import host
from fuzz.forbidden import complaints
from fuzz.run import DRAWERS, Outcome, describe, run

import fusedloss

CASES = 8  # of each function: by number, not by time, so that every machine sees the same

# What a case showed when it was first drawn. A drawer that is edited makes another case of its number: what matters
# are tests of their own as well.
FOUND = [
    ("global_orthogonal_regularization", 9017, "at the hinge the slope was 1"),
    ("contrastive_tension", 4, "a loss of 0.008 as 4.828 - 4.820"),
    ("cosent", 2235, "fp64: a loss of 2e-43 was 0"),
    ("matryoshka_2d", 2116, "the mean of an empty batch is 0, not NaN"),
    ("multiple_negatives_ranking", 2175, "gradients of 1e-247, whose squares are 0 in the budget"),
    ("cosent", 107, "reference: a loss of 9e-6 as the log of 1.000009"),
    ("matryoshka", 117, "reference: cosent's loss of 8e-12 was 0"),
    ("multi_similarity", 1017, "the formula's own log(1 + 1e-15) had one digit"),
    ("matryoshka_2d", 9, "a gradient of 0 between two sums of 55: the budget did not know of them"),
    ("proxy_nca", 119, "265 equal terms: the budget did not know how a sum of many is rounded"),
    ("sup_con", 106, "a gradient of 0 by an fp64 temperature beside bf16"),
    ("contrastive_tension_in_batch", 89, "283 terms of one size, by a row of zeros: roundings of one sign add up"),
    ("decoupled_contrastive", 86, "474 terms of one size, by a row of zeros"),
    ("online_contrastive", 113, "distances of 1 of both labels: a rounding decides which is hard"),
]


@pytest.fixture(scope="module", autouse=True)
def no_group_afterwards():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def passes(outcome: Outcome) -> None:
    told = "\n".join(str(failure) for failure in outcome.failures if failure.row is None)
    assert not outcome.failed, (
        f"python -m tests.fuzz --replay {outcome.name}:{outcome.seed}\n{describe(outcome)}\n{told}"
    )


@pytest.mark.lengthy
@pytest.mark.parametrize("name", sorted(DRAWERS))
def test_cases(name):
    for seed in range(CASES):
        passes(run(name, seed))


@pytest.mark.parametrize("name, seed", [case[:2] for case in FOUND])
def test_found_before(name, seed):
    passes(run(name, seed))


@pytest.mark.parametrize("name", ["info_nce", "sup_con", "siglip", "multiple_negatives_ranking"])
def test_on_the_host_build(name, host_extension):
    """csrc/ on a CPU, for a share of small cases."""
    with pytest.MonkeyPatch.context() as patch:
        host.use(host_extension, patch.setattr)
        for seed in range(100, 104):
            passes(run(name, seed, cuda=True))


@pytest.mark.parametrize("name", sorted(DRAWERS))
def test_forbidden(name):
    _, wrong = complaints(name, 0)
    assert not wrong, "\n".join(wrong)


def test_every_function_is_drawn():
    assert set(fusedloss.functional.__all__) | {"top_k"} == set(DRAWERS)


def test_a_wrong_answer_is_seen(monkeypatch):
    """One part in a million is too much in fp32."""
    exact = fusedloss.functional.mse
    wrong = functools.wraps(exact)(lambda *x, **o: exact(*x, **o) * (1 + 4e-6))
    monkeypatch.setattr(fusedloss.functional, "mse", wrong)
    assert any(run("mse", seed).failed for seed in range(6))
