"""The drop-ins of NeMo Automodel's losses: the library's loss and gradients, on one process and on two."""

from __future__ import annotations

import pytest
import torch
from ranks import Ranks

pytest.importorskip("nemo_automodel.components.loss.infonce", reason="needs nemo-automodel")

from nemo_automodel.components.loss import embedding_distill, infonce

from fusedloss.integrations import calls
from fusedloss.integrations import nemo_automodel as fused

pytestmark = pytest.mark.upstream
B, K, D, T = 5, 3, 8, 6
DIRECTIONS = ["q2d", "d2q", "symmetric"]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def texts(rank=0, dtype=torch.float64):
    """Queries, documents and hard negatives of a rank, the student's and the teacher's, and which of these exist."""
    shapes = (B, D), (B, D), (B, K, D), (B, T), (B, T), (B, K, T)
    found = [randn(*shape, seed=10 * rank + seed, dtype=dtype) for seed, shape in enumerate(shapes)]
    mask = torch.arange(B * K).view(B, K) % 3 != rank
    return [x.requires_grad_() for x in found[:3]], found[3:], mask.long()


def run(loss, inputs, leaves):
    value = loss(*inputs)
    return value.detach(), *torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)


def same(found, wanted, rtol=1e-10, atol=1e-12):
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=rtol, atol=atol)


def contrasts(negatives, rank=0):
    own, _, mask = texts(rank)
    given = {"none": own[:2], "all": own, "masked": [*own, mask]}[negatives]
    return given, own[: 2 if negatives == "none" else 3]


@pytest.mark.parametrize("negatives", ["none", "all", "masked"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("learns", [False, True])
def test_info_nce_is_the_librarys(direction, negatives, learns):
    results, before = [], calls.total()
    for module in (fused, infonce):
        loss = module.InfoNCELoss(0.3, learnable_temperature=learns, direction=direction, normalize=not learns).double()
        inputs, leaves = contrasts(negatives)
        results.append(run(loss, inputs, [*leaves, *loss.parameters()]))
    assert calls.total() == before + 1
    same(*results)


def distills(negatives, rank=0):
    own, taught, mask = texts(rank, torch.float32)
    more = {"none": [], "all": [own[2], taught[2]], "masked": [own[2], taught[2], mask]}[negatives]
    return [*own[:2], *taught[:2], *more], own[: 2 if negatives == "none" else 3]


@pytest.mark.parametrize("negatives", ["none", "all", "masked"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("divergence", ["kl", "ce", "mse"])
def test_distillation_is_the_librarys(divergence, direction, negatives):
    results, before = [], calls.total()
    for module in (fused, infonce):
        loss = module.InfoNCEDistillLoss(0.3, direction, divergence=divergence)
        results.append(run(loss, *distills(negatives)))
    assert calls.total() == before + 1
    same(*results, rtol=2e-5, atol=1e-6)


def test_score_distillation_is_the_librarys():
    before, (own, taught, _) = calls.total(), texts()
    inputs = own[0], taught[0], own[1], taught[1]
    same(*(run(m.ScoreDistillLoss(0.2), inputs, own[:2]) for m in (fused, embedding_distill)))
    assert calls.total() == before + 1


def test_what_runs_the_librarys_code():
    own, taught, mask = texts()
    before = calls.copy()
    alone = [m.InfoNCELoss(0.3, use_in_batch_negatives=False) for m in (fused, infonce)]
    same(*(run(loss, [*own, mask], own) for loss in alone))
    wide = [m.InfoNCEDistillLoss(0.3) for m in (fused, infonce)]
    same(*(run(loss, [*own[:2], *taught[:2]], own[:2]) for loss in wide))
    for call in (
        lambda m: m.InfoNCELoss()(own[0], own[1][:4]),
        lambda m: m.InfoNCELoss(direction="up")(*own[:2]),
        lambda m: m.InfoNCELoss()(own[0], own[1], own[2][:, :, :3]),
        lambda m: m.InfoNCEDistillLoss()(*own[:2], *taught[:2], own[2]),
        lambda m: m.InfoNCEDistillLoss(divergence="js")(*own[:2], *taught[:2]),
    ):
        said = []
        for module in (fused, infonce):
            with pytest.raises(ValueError) as raised:
                call(module)
            said.append(str(raised.value))
        assert said[0] == said[1]
    assert calls == before


def on_a_rank(rank):
    def compare(case):
        kind, direction, negatives = case
        results, before = [], calls.total()
        for module in (fused, infonce):
            loss = getattr(module, kind)(0.3, direction=direction)
            results.append(run(loss, *(contrasts if kind == "InfoNCELoss" else distills)(negatives, rank)))
        return results, calls.total() - before

    return compare


@pytest.fixture(scope="module")
def two_ranks():
    ranks = Ranks(2, on_a_rank)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", ["InfoNCELoss", "InfoNCEDistillLoss"])
@pytest.mark.parametrize("negatives", ["none", "masked"])
def test_across_devices(kind, direction, negatives, two_ranks):
    """Every process has the library's loss, and its gradient by its own embeddings."""
    for results, ran in two_ranks((kind, direction, negatives)):
        assert ran == 1
        same(*results, **({} if kind == "InfoNCELoss" else {"rtol": 2e-5, "atol": 1e-6}))


def test_the_patch_and_back():
    stock = infonce.InfoNCELoss, infonce.InfoNCEDistillLoss, embedding_distill.ScoreDistillLoss
    with fused.patch():
        assert infonce.InfoNCELoss is fused.InfoNCELoss and infonce.InfoNCEDistillLoss is fused.InfoNCEDistillLoss
        assert embedding_distill.ScoreDistillLoss is fused.ScoreDistillLoss
    assert stock == (infonce.InfoNCELoss, infonce.InfoNCEDistillLoss, embedding_distill.ScoreDistillLoss)
