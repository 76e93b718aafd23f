"""MaxSim losses: their score function goes to an installed kernel package, here a stand-in that computes as it does."""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

pytest.importorskip("sentence_transformers.multi_vector_encoder.losses", reason="sentence-transformers 6.2 is needed")

from sentence_transformers.multi_vector_encoder import losses as stock
from sentence_transformers.multi_vector_encoder import scoring

from fusedloss.integrations import calls
from fusedloss.integrations.sentence_transformers import multi_vector_encoder as fused
from fusedloss.integrations.sentence_transformers import patch

pytestmark = pytest.mark.upstream

B, T, D = 4, 5, 8
PACKAGES = ["late_interaction_kernels", "flash_maxsim"]
used = []


def maxsim(Q, D, q_mask=None, d_mask=None):
    """[Nq, Lq, d] against all of [Nd, Ld, d], or each against its own of [Nq, K, Ld, d]; 0 for an empty document."""
    used.append("late_interaction_kernels")
    assert q_mask.dtype == d_mask.dtype == torch.bool
    sim = torch.einsum("qsd,ntd->qnst", Q, D) if D.dim() == 3 else torch.einsum("qsd,qntd->qnst", Q, D)
    keep = d_mask[None, :, None] if D.dim() == 3 else d_mask[:, :, None]
    best = sim.masked_fill(~keep, -torch.inf).amax(-1).float()
    return best.masked_fill(~q_mask[:, None] | ~keep.any(-1), 0).sum(-1)


def flash_maxsim_batched_train(Q, D, shared_docs=True, doc_lengths=None, query_lengths=None):
    used.append("flash_maxsim")
    assert shared_docs == (D.dim() == 3) and doc_lengths.dim() == 1
    place = torch.arange(max(Q.shape[-2], D.shape[-2]))
    lengths = doc_lengths if shared_docs else doc_lengths.view(D.shape[:2])
    scores = maxsim(Q, D, place[: Q.shape[-2]] < query_lengths[:, None], place[: D.shape[-2]] < lengths[..., None])
    used.pop()
    return torch.where((lengths == 0) & torch.ones_like(scores, dtype=torch.bool), -torch.inf, scores)


@pytest.fixture(params=PACKAGES)
def package(request, monkeypatch):
    module = ModuleType(request.param)
    module.__spec__ = importlib.machinery.ModuleSpec(request.param, None)
    module.maxsim, module.flash_maxsim_batched_train = maxsim, flash_maxsim_batched_train
    monkeypatch.setitem(sys.modules, request.param, module)
    monkeypatch.setattr(fused, "DEVICE", "cpu")
    used.clear()
    return request.param


class Encoder(nn.Module):
    """A linear layer over token features."""

    def __init__(self, dtype):
        super().__init__()
        self.linear = nn.Linear(3, D, bias=False).to(dtype)

    def forward(self, features, task=None, **kwargs):
        return {**features, "token_embeddings": self.linear(features["tokens"])}


def column(dtype, seed, empty=False):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, T, generator=generator) < 0.6  # with gaps, as where punctuation is skipped
    mask[:, 2] = True
    if empty:
        mask[1] = False
    return {"tokens": torch.randn(B, T, 3, generator=generator).to(dtype), "attention_mask": mask.long()}


CASES = [
    ("MultiVectorMultipleNegativesRankingLoss", "colbert_scores", {}),
    ("MultiVectorMultipleNegativesRankingLoss", "mean_colbert_scores", {"scale": 5.0, "score_mini_batch_size": 3}),
    ("CachedMultiVectorMultipleNegativesRankingLoss", "colbert_scores", {"mini_batch_size": 3}),
    ("MultiVectorDistillKLDivLoss", "colbert_kd_scores", {"temperature": 2.0}),
    ("MultiVectorDistillKLDivLoss", "mean_colbert_kd_scores", {}),
    ("MultiVectorMarginMSELoss", "colbert_scores_pairwise", {}),
    ("MultiVectorMarginMSELoss", "mean_colbert_scores_pairwise", {}),
]


def run(losses, name, score, options, dtype, empty=False):
    torch.manual_seed(1)
    loss = getattr(losses, name)(Encoder(dtype), similarity_fct=score, **options)
    columns = [column(dtype, seed, empty and seed == 2) for seed in range(3)]
    labels = None if "Ranking" in name else torch.rand(B, 2, generator=torch.Generator().manual_seed(9))
    value = loss(columns, labels)
    value.backward()
    return loss, value.detach(), loss.model.linear.weight.grad


@pytest.mark.parametrize(("name", "score", "options"), CASES)
@pytest.mark.parametrize("empty", [False, True], ids=["", "an empty document"])
def test_the_librarys_value_and_gradient(package, name, score, options, empty):
    before = calls[f"sentence_transformers.{name}"]
    score = getattr(scoring, score)
    _, value, gradient = run(stock, name, score, options, torch.float16, empty)
    assert not used
    loss, own_value, own_gradient = run(fused, name, score, options, torch.float16, empty)
    assert used and set(used) == {package} and calls[f"sentence_transformers.{name}"] > before
    torch.testing.assert_close(own_value, value)
    if gradient.isfinite().all():  # the square of an empty document's -1e9 is beyond fp16
        torch.testing.assert_close(own_gradient, gradient, rtol=2e-3, atol=2e-3)
    assert loss.similarity_fct is score
    if "Distill" in name:
        assert loss._checked_teacher_scale


@pytest.mark.parametrize("name", sorted({name for name, _, _ in CASES}))
@pytest.mark.parametrize("reason", ["fp32", "an own score", "XTR", "not on a GPU", "turned off"])
def test_the_librarys_own_code_elsewhere(package, name, reason, monkeypatch):
    score = next(getattr(scoring, s) for n, s, _ in CASES if n == name)
    dtype = torch.float32 if reason == "fp32" else torch.float16
    if reason == "XTR":
        kind = "_pairwise" if "Margin" in name else "_kd" if "Distill" in name else ""
        score = getattr(scoring, {"": "xtr_scores", "_kd": "xtr_kd_scores", "_pairwise": "xtr_scores_pairwise"}[kind])
    elif reason == "an own score":
        known = score
        score = lambda *args, **kwargs: known(*args, **kwargs)
    elif reason == "not on a GPU":
        monkeypatch.setattr(fused, "DEVICE", "cuda")
    elif reason == "turned off":
        monkeypatch.setenv("FUSEDLOSS_DISABLE", "1")
    before = dict(calls)
    _, value, gradient = run(stock, name, score, {}, dtype)
    _, own_value, own_gradient = run(fused, name, score, {}, dtype)
    assert not used and dict(calls) == before
    assert own_value.equal(value) and own_gradient.equal(gradient)


def test_without_a_package_the_library_runs(monkeypatch):
    monkeypatch.setattr(fused, "PACKAGES", {"a_package_that_is_not_installed": None})
    name, score, options = CASES[0]
    values = [run(losses, name, getattr(scoring, score), options, torch.float16)[1] for losses in (stock, fused)]
    assert values[0].equal(values[1])


@pytest.mark.parametrize("name, score, options", CASES)
def test_patched(name, score, options):
    """The library's code calls itself, not the class that stands in its place."""
    value = run(stock, name, getattr(scoring, score), options, torch.float32)[1]
    with patch():
        assert getattr(stock, name) is getattr(fused, name)
        assert run(stock, name, getattr(scoring, score), options, torch.float32)[1].equal(value)


@pytest.mark.parametrize("name", sorted({name for name, _, _ in CASES}))
def test_configuration_and_citation_are_the_librarys(name):
    ours, theirs = (getattr(losses, name)(Encoder(torch.float32)) for losses in (fused, stock))
    assert ours.get_config_dict() == theirs.get_config_dict() and ours.citation == theirs.citation
    assert type(ours).__name__ == name and isinstance(ours, getattr(stock, name))
