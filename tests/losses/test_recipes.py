"""Each recipe against its paper's formula, written out in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fusedloss import recipes

B, D = 12, 16


def batch(count):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(count, B, D, generator=g, dtype=torch.float64)
    x[1] += 0.7 * x[0]  # positives are closer than most
    return [t.clone().requires_grad_() for t in x]


def cosines(x, y):
    return F.normalize(x, dim=1) @ F.normalize(y, dim=1).T


def qwen3(q, d, *negatives, t=0.1, margin=0.1):
    documents = [d, *negatives]
    own = torch.eye(B, dtype=torch.bool)
    s = cosines(q, d).diagonal()
    z = (s / t).exp()
    threshold = (s + margin).detach()[:, None]
    for number, x in enumerate(documents):
        sim = cosines(q, x)
        kept = (sim.detach() <= threshold) & ~own
        z = z + torch.where(kept, (sim / t).exp(), 0).sum(1)
        if number:  # the row's own, curated
            z = z + (sim.diagonal() / t).exp()
        sim = cosines(d, x)
        z = z + torch.where((sim.detach() <= threshold) & ~own, (sim / t).exp(), 0).sum(1)
    sim = cosines(q, q)
    z = z + torch.where((sim.detach() <= threshold) & ~own, (sim / t).exp(), 0).sum(1)
    return (z.log() - s / t).mean()


def gemma(q, p, n, teachers):
    s, hard = cosines(q, p), cosines(q, n)
    weight = torch.where(torch.eye(B, dtype=torch.bool), (5 * hard.detach()).exp(), 1)
    z = (20 * s).exp().sum(1) + (weight * (20 * hard).exp()).sum(1)
    off = ~torch.eye(B, dtype=torch.bool)
    loss = (z.log() - 20 * s.diagonal()).mean()
    loss = loss + cosines(q, q)[off].square().mean() + cosines(p, p)[off].square().mean()
    return loss + sum((x - t).norm(dim=1).mean() for x, t in zip((q, p, n), teachers, strict=True))


def kalm(q, p, n):
    z = torch.cat([cosines(q, p), cosines(q, n)], 1) * 50
    loss = F.cross_entropy(z, torch.arange(B), reduction="none")
    return ((1 - torch.exp(-loss)).sqrt().detach() * loss).mean()


def nv(q, p):
    s = cosines(q, p)
    kept = (s <= 0.95 * s.diagonal()[:, None]) | torch.eye(B, dtype=torch.bool)
    return F.cross_entropy((50 * s).masked_fill(~kept.detach(), -torch.inf), torch.arange(B))


def kgc(q, k):
    s = cosines(q, k) - 0.02 * torch.eye(B, dtype=torch.float64)
    return F.cross_entropy(s / 0.05, torch.arange(B))


TEACHERS = [t.detach() for t in batch(6)[3:]]
CASES = {
    "qwen3_embedding": (2, lambda *x: recipes.qwen3_embedding(*x, temperature=0.1), qwen3),
    "qwen3_embedding, negatives": (4, lambda *x: recipes.qwen3_embedding(*x, temperature=0.1), qwen3),
    "embedding_gemma": (
        3,
        lambda *x: recipes.embedding_gemma(*x, teacher=TEACHERS),
        lambda *x: gemma(*x, TEACHERS),
    ),
    "kalm_embedding_v2": (3, recipes.kalm_embedding_v2, kalm),
    "nv_retriever": (2, recipes.nv_retriever, nv),
    "sim_kgc": (2, recipes.sim_kgc, kgc),
}


@pytest.mark.parametrize("backend", ["chunked", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_a_recipe_is_its_papers_formula(name, backend, monkeypatch):
    monkeypatch.setenv("FUSEDLOSS_BACKEND", backend)
    count, ours, formula = CASES[name]
    inputs = batch(count)
    found, wanted = ours(*inputs), formula(*inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    for own, other in zip(*(torch.autograd.grad(x, inputs) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-10)


def test_every_recipe_has_a_case():
    public = {name for name, value in vars(recipes).items() if getattr(value, "__module__", "") == recipes.__name__}
    assert public == {name.split(",")[0] for name in CASES}


def test_recipes_refuse():
    q, p, n = batch(3)
    with pytest.raises(ValueError, match=r"negatives\[0\] must have 12 rows"):
        recipes.qwen3_embedding(q, p, n[:5])
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        recipes.qwen3_embedding(q, p, temperature=0.0)
    with pytest.raises(ValueError, match="teacher must hold 3 tensors"):
        recipes.embedding_gemma(q, p, n, teacher=(q, p))
    with pytest.raises(TypeError, match="teacher must be a sequence of embeddings"):
        recipes.embedding_gemma(q, p, teacher=q)
    with pytest.raises(ValueError, match="hardness must be a number of at least 0"):
        recipes.embedding_gemma(q, p, hardness=-1.0)
    with pytest.raises(ValueError, match="spread must be a number of at least 0"):
        recipes.embedding_gemma(q, p, spread=-1.0)
