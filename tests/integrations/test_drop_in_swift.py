"""The drop-in of ms-swift's InfoNCE: the library's loss and gradient under each setting of the environment."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from ranks import Ranks

pytest.importorskip("swift.loss.embedding", reason="needs ms-swift")

from swift.loss import embedding, loss_map

from fusedloss.integrations import calls
from fusedloss.integrations import swift as fused

pytestmark = pytest.mark.upstream
STOCK = embedding.InfonceLoss


def batch(*hard, dim=8):
    """Unit rows of samples with these numbers of hard negatives, and their labels."""
    rows = sum(2 + n for n in hard)
    x = torch.randn(rows, dim, generator=torch.Generator().manual_seed(len(hard)), dtype=torch.float64)
    labels = torch.tensor([1 - bool(i) for n in hard for i in range(1 + n)])
    return torch.nn.functional.normalize(x, dim=1).requires_grad_(), labels


def run(kind, x, labels):
    np.random.seed(0)  # the library draws hard negatives by it
    value = kind(None, None)({"last_hidden_state": x}, labels)
    return value.detach(), *torch.autograd.grad(value, x)


def both(x, labels):
    before = calls.total()
    results = [run(kind, x, labels) for kind in (fused.InfonceLoss, STOCK)]
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)
    return calls.total() - before


ALIKE, RAGGED, PAIRS = (2, 2, 2, 2, 2), (1, 3, 2, 0, 1), (0, 0, 0, 0, 0, 0)
MASK, QUERIES, DOCUMENTS = "INFONCE_MASK_FAKE_NEGATIVE", "INFONCE_INCLUDE_QQ", "INFONCE_INCLUDE_DD"


@pytest.mark.parametrize(
    ("hard", "setting"),
    [
        (ALIKE, {}),
        (RAGGED, {}),
        (PAIRS, {"INFONCE_TEMPERATURE": "0.5"}),
        ((3,), {}),
        (ALIKE, {MASK: "True"}),
        (RAGGED, {MASK: "true", "INFONCE_FAKE_NEG_MARGIN": "0.0"}),
        (RAGGED, {QUERIES: "True"}),
        (ALIKE, {QUERIES: "True", MASK: "1", "INFONCE_FAKE_NEG_MARGIN": "0.05"}),
        (PAIRS, {DOCUMENTS: "True"}),
        (PAIRS, {DOCUMENTS: "True", QUERIES: "True"}),
        (PAIRS, {DOCUMENTS: "True", MASK: "True"}),
        ((1, 3, 2), {"INFONCE_HARD_NEGATIVES": "2"}),
        ((1, 4, 2), {"INFONCE_HARD_NEGATIVES": "4", MASK: "True"}),
    ],
)
def test_loss_and_gradient_are_the_librarys(hard, setting, monkeypatch):
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    assert both(*batch(*hard)) == 1


@pytest.mark.parametrize(
    ("hard", "setting"),
    [
        (ALIKE, {"INFONCE_USE_BATCH": "False"}),
        (ALIKE, {DOCUMENTS: "True"}),
        ((1, 3, 2), {DOCUMENTS: "True", "INFONCE_HARD_NEGATIVES": "2"}),
        (PAIRS, {DOCUMENTS: "True", QUERIES: "True", MASK: "True"}),
    ],
)
def test_what_runs_the_librarys_code(hard, setting, monkeypatch):
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    assert both(*batch(*hard)) == 0


def test_the_librarys_errors(monkeypatch):
    monkeypatch.setenv("INFONCE_HARD_NEGATIVES", "2")
    for kind in (fused.InfonceLoss, STOCK):
        with pytest.raises(AssertionError):  # a sample without hard negatives
            run(kind, *batch(1, 0, 2))
    monkeypatch.setenv("INFONCE_TEMPERATURE", "warm")
    for kind in (fused.InfonceLoss, STOCK):
        with pytest.raises(ValueError, match="could not convert string to float: 'warm'"):
            run(kind, *batch(2, 2))


def test_the_patch_and_back():
    outer = fused.patch()
    assert embedding.InfonceLoss is fused.InfonceLoss is loss_map["infonce"]
    inner = fused.patch()
    outer.undo()
    assert embedding.InfonceLoss is fused.InfonceLoss is loss_map["infonce"]
    inner.undo()
    assert embedding.InfonceLoss is STOCK is loss_map["infonce"]


# Across processes -----------------------------------------------------------------------------------------------------

# The hard negatives of each rank's samples, the setting, and whether both run fused.
ACROSS = {
    "ragged": (((1, 3, 0), (2, 2)), {}, True),
    "a margin": (((1, 1, 1), (1, 1)), {MASK: "True", "INFONCE_FAKE_NEG_MARGIN": "0.0"}, True),
    "queries, a margin": (((1, 2), (0, 1, 1)), {QUERIES: "True", MASK: "True"}, True),
    "documents": (((0, 0, 0), (0, 0, 0)), {DOCUMENTS: "True", QUERIES: "True"}, True),
    "hard negatives": (((3, 4), (2, 2)), {"INFONCE_HARD_NEGATIVES": "2"}, True),
    "drawn again": (((3, 3), (2, 2)), {"INFONCE_HARD_NEGATIVES": "3"}, False),  # on rank 1 alone
    "of a sample alone": (((1, 1), (1, 1)), {"INFONCE_USE_BATCH": "False"}, False),
}


def on_a_rank(rank):
    from accelerate import PartialState

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    PartialState(cpu=True)

    def compare(name):
        hard, setting, _ = ACROSS[name]
        with pytest.MonkeyPatch.context() as patch:
            for key, value in setting.items():
                patch.setenv(key, value)
            x, labels = batch(*hard[rank])
            x = (x.detach() * (-1) ** rank).requires_grad_()
            before = calls.total()
            found = [run(kind, x, labels) for kind in (fused.InfonceLoss, STOCK)]
            return found, calls.total() - before

    return compare


@pytest.fixture(scope="module")
def two_ranks():
    ranks = Ranks(2, on_a_rank)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("name", ACROSS)
def test_across_processes(name, two_ranks):
    for (found, wanted), ran in two_ranks(name):
        assert ran == ACROSS[name][2]
        for own, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)
