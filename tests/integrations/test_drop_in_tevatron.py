"""The drop-ins of tevatron's losses: the library's loss and gradients, on one process and on two."""

from __future__ import annotations

import pytest
import torch
from ranks import Ranks

pytest.importorskip("tevatron.loss", reason="needs tevatron")

from tevatron import loss as losses

from fusedloss.integrations import calls
from fusedloss.integrations import tevatron as fused

pytestmark = pytest.mark.upstream
B, G, D = 5, 3, 8


def embeddings(rank=0):
    generator = torch.Generator().manual_seed(rank)
    shapes = (B, D), (B * G, D)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def run(loss, inputs, *arguments, **options):
    value = loss(*inputs, *arguments, **options)
    return value.detach(), *torch.autograd.grad(value.sum(), inputs)


def same(found, wanted):
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_values_and_gradients_are_the_librarys(reduction):
    before = calls.total()
    found, wanted = (run(m.SimpleContrastiveLoss(G), embeddings(), reduction=reduction) for m in (fused, losses))
    assert calls.total() == before + 1
    same(found, wanted)


def test_given_targets_and_what_does_not_fit_are_the_librarys():
    target, before = torch.tensor([0, 2, 14, 3, 3]), calls.total()
    same(*(run(m.SimpleContrastiveLoss(G), embeddings(), target) for m in (fused, losses)))
    for library in (fused, losses):
        with pytest.raises(AssertionError):
            library.SimpleContrastiveLoss(G + 1)(*embeddings())
    assert calls.total() == before


def on_a_rank(rank):
    def compare(scaled):
        before = calls.total()
        found = [run(m.DistributedContrastiveLoss(G, scaled), embeddings(rank)) for m in (fused, losses)]
        return found, calls.total() - before

    return compare


@pytest.fixture(scope="module")
def two_ranks():
    ranks = Ranks(2, on_a_rank)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("scaled", [True, False])
def test_across_processes(scaled, two_ranks):
    for found, ran in two_ranks(scaled):
        assert ran == 1
        same(*found)


def test_the_patch_and_back():
    stock = losses.SimpleContrastiveLoss
    with fused.patch():
        assert losses.SimpleContrastiveLoss is fused.SimpleContrastiveLoss
    assert losses.SimpleContrastiveLoss is stock
