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


def logq(q, k):
    z = cosines(q, k) / 0.1
    own = torch.eye(B, dtype=torch.bool)
    rest = (z - PROBABILITY.log()).masked_fill(own, -torch.inf).exp().sum(1)
    loss = -(z.diagonal().exp() / (z.diagonal().exp() + rest)).log()
    return ((1 - torch.exp(-loss)).detach() * loss).mean()


def leaf(first, second, unit=lambda x: F.normalize(x, dim=1)):
    return (unit((first + second) @ PROJECTION.T) - unit(PROJECTED)).square().sum(1).mean()


def warmth(x):
    return 0.1 + 0.05 * x.mean().sigmoid()


def apart(x, y):
    """Returns each projected row's 1 - cosine, and its mean squared distance."""
    x = x @ PROJECTION.T
    return 1 - cosines(x, y).diagonal(), (x - y).square().mean(1)


def jina(q, d, n, t, total=torch.mean):
    q_taught, d_taught = TAUGHT
    z = torch.cat([cosines(q, d), cosines(q, n)], 1) / t
    loss = F.cross_entropy(z, torch.arange(B))
    loss = loss + 2 * total(apart(q, q_taught)[0] + apart(d, d_taught)[0])
    off = ~torch.eye(B, dtype=torch.bool)
    return loss + cosines(q, q)[off].square().mean() + cosines(d, d)[off].square().mean()


def nemotron(q, d, listwise=0.0):
    (a, b), (c, e) = (apart(x, y) for x, y in zip((q, d), TAUGHT, strict=True))
    p, log_q = (cosines(*TAUGHT) / 0.05).softmax(1), (cosines(q, d) / 0.05).log_softmax(1)
    return (a + b + c + e).mean() + listwise * (p * (p.log() - log_q)).sum(1).mean()


def bge_m3(dense, lexical, multi):
    target = torch.arange(B) % 4
    nll = lambda z: -z.log_softmax(1)[torch.arange(B), target].mean()
    z = [x[:, :4] / 0.5 for x in (dense, lexical, multi)]
    joint = z[0] + 0.3 * z[1] + z[2]
    hard = (nll(z[0]) + 0.1 * nll(z[1]) + nll(z[2]) + nll(joint)) / 4
    soft = [-(joint.detach().softmax(1) * x.log_softmax(1)).sum(1).mean() for x in z]
    return (hard + (soft[0] + 0.1 * soft[1] + soft[2]) / 3) / 2


PROBABILITY = torch.rand(B, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / B + 0.01
PROJECTION, PROJECTED = (
    torch.randn(n, m, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n, m in ((7, D), (B, 7))
)
TAUGHT = [PROJECTED, PROJECTED.roll(1, 0) + PROJECTED]
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
    "refined_logq": (2, lambda q, k: recipes.refined_logq(q, k, PROBABILITY, temperature=0.1), logq),
    "leaf": (2, lambda x, y: recipes.leaf(x + y, PROJECTED, projection=PROJECTION), leaf),
    "leaf, as they are": (
        2,
        lambda x, y: recipes.leaf(x + y, PROJECTED, projection=PROJECTION, normalize=False),
        lambda x, y: leaf(x, y, unit=lambda x: x),
    ),
    "jina_embeddings_v5": (
        3,
        lambda q, d, n: recipes.jina_embeddings_v5(q, d, n, teacher=TAUGHT, projection=PROJECTION, temperature=0.1),
        lambda q, d, n: jina(q, d, n, 0.1),
    ),
    "jina_embeddings_v5, match as a sum and a learnt temperature": (
        4,
        lambda q, d, n, t: recipes.jina_embeddings_v5(
            q, d, n, teacher=TAUGHT, projection=PROJECTION, temperature=warmth(t), matching=2 * len(q)
        ),
        lambda q, d, n, t: jina(q, d, n, warmth(t), total=torch.sum),
    ),
    "nemotron_embed": (
        2,
        lambda q, d: recipes.nemotron_embed(q, d, teacher=TAUGHT, projection=PROJECTION),
        nemotron,
    ),
    "nemotron_embed, listwise": (
        2,
        lambda q, d: recipes.nemotron_embed(q, d, teacher=TAUGHT, projection=PROJECTION, listwise=0.5),
        lambda q, d: nemotron(q, d, 0.5),
    ),
    "bge_m3": (
        3,
        lambda *s: recipes.bge_m3(*(x[:, :4] for x in s), torch.arange(B) % 4, temperature=0.5),
        bge_m3,
    ),
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
    functions = {name for name, value in vars(recipes).items() if getattr(value, "__module__", "") == recipes.__name__}
    public = {name for name in functions if not name.startswith("_")}
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
    with pytest.raises(ValueError, match=r"probability must .*\[12\]"):
        recipes.refined_logq(q, p, PROBABILITY[:5])
    with pytest.raises(ValueError, match="weights must hold 3 numbers"):
        recipes.bge_m3(q, p, n, torch.arange(B), weights=(1.0,))
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        recipes.bge_m3(q, p, n, torch.arange(B), temperature=-1.0)
    for recipe in (recipes.jina_embeddings_v5, recipes.nemotron_embed):
        with pytest.raises(ValueError, match="teacher must hold 2 tensors"):
            recipe(q, p, teacher=[q])
        with pytest.raises(ValueError, match="document must have 12 rows"):
            recipe(q, p[:5], teacher=[q, p])
        with pytest.raises(ValueError, match="temperature must be a positive number"):
            recipe(q, p, teacher=[q, p], temperature=0.0)
    with pytest.raises(ValueError, match="matching must be a number of at least 0"):
        recipes.jina_embeddings_v5(q, p, teacher=[q, p], matching=-1.0)
    with pytest.raises(ValueError, match="squared must be a number of at least 0"):
        recipes.nemotron_embed(q, p, teacher=[q, p], squared=-1.0)
    with pytest.raises(TypeError, match="teacher must"):
        recipes.leaf(q, [p], normalize=False)
    with pytest.raises(ValueError, match="spread must be a number of at least 0"):
        recipes.embedding_gemma(q, p, spread=-1.0)


def test_nemotron_embed_projects_each_text_once():
    """Of a module with dropout, both distances are of one projection."""
    (q, d), seen = batch(2), []

    def projection(x):
        seen.append(x)
        return x @ PROJECTION.T

    found = recipes.nemotron_embed(q, d, teacher=TAUGHT, projection=projection)
    torch.testing.assert_close(found, nemotron(q, d), rtol=1e-9, atol=1e-9)
    assert len(seen) == 2
