"""Texts that a batch holds twice: `masks.text_ids`, and `ids=` of the ranking losses against the formula in fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fusedloss
from fusedloss import masks

ROWS, D = 9, 6
ANCHORS = torch.tensor([0, 1, 2, 3, 4, 5, 0, 7, 8])  # rows 0 and 6 ask the same
POSITIVES = torch.tensor([20, 21, 22, 21, 24, 25, 26, 27, 28])  # rows 1 and 3 have the same answer
NEGATIVES = torch.tensor([20, 24, 22, 30, 31, 32, 33, 34, 21])  # row 0's is row 0's positive, row 8's rows 1's and 3's
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
PER_DIRECTION = {"directions": (ALL[0], ALL[2]), "partition_mode": "per_direction"}


def allowed(rows, anchors=ANCHORS, positives=POSITIVES, negatives=NEGATIVES):
    """Which pairs, and which hard negatives, may compete with each of the first rows; row by row as it is told."""
    pairs = [
        [anchors[i] != anchors[j] and positives[i] != positives[j] for j in range(len(positives))] for i in range(rows)
    ]
    hard = [[bool(positives[i] != n) for n in negatives] for i in range(rows)]
    return torch.tensor(pairs), torch.tensor(hard)


def dense(a, p, n, directions, partition_mode="joint", scale=3.0):
    """multiple_negatives_ranking with `ids`: logits, and a logsumexp of those that may compete."""
    a, p, n = (F.normalize(x, dim=1) for x in (a, p, n))
    pairs, hard = allowed(len(a))
    own = torch.eye(len(a), dtype=torch.bool)
    z = {
        ALL[0]: torch.cat([(a @ p.T).where(pairs | own, -torch.inf), (a @ n.T).where(hard, -torch.inf)], 1),
        ALL[1]: (a @ a.T).where(pairs & ~own, -torch.inf),
        ALL[2]: (p @ a.T).where(pairs | own, -torch.inf),
        ALL[3]: torch.cat([(p @ p.T).where(pairs & ~own, -torch.inf), (p @ n.T).where(hard & ~own, -torch.inf)], 1),
    }
    positive = scale * (a * p).sum(1)
    chosen = [scale * z[name] for name in ALL if name in directions]
    if partition_mode == "joint":
        return (torch.logsumexp(torch.cat(chosen, 1), 1) - positive).mean()
    return torch.stack([torch.logsumexp(x, 1) - positive for x in chosen]).mean()


def embeddings(count=3, rows=ROWS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, D, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(count)]


def same(found, wanted, inputs):
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for own, other in zip(*(torch.autograd.grad(x, inputs) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("dense", {"directions": ALL[:1]}),  # which has no other directions
        *((b, o) for b in ("chunked", "reference") for o in ({"directions": ALL}, PER_DIRECTION)),
    ],
    ids=str,
)
def test_ranking_is_the_formula(backend, options):
    inputs = embeddings()
    ids = (ANCHORS, POSITIVES, NEGATIVES)
    found = fusedloss.multiple_negatives_ranking(*inputs, ids=ids, scale=3.0, backend=backend, **options)
    same(found, dense(*inputs, **options), inputs)


def test_an_anchors_own_negative_stays_a_negative_of_an_equal_anchor():
    """Row 6 asks what row 0 asks: row 0's positive is no negative of row 6, row 6's hard negative one of row 0."""
    a, p, n = embeddings()
    ids = (ANCHORS, POSITIVES, NEGATIVES)
    rows = fusedloss.multiple_negatives_ranking(a, p, n, ids=ids, reduction="none", backend="chunked")
    by_p, by_n = torch.autograd.grad(rows[0], (p, n))
    assert not by_p[6].any() and by_p[0].any() and by_p[1].any()
    assert not by_n[0].any() and by_n[6].any()


def test_both_directions_over_one_matrix():
    """Pairs alone share their products, and are what a mask of either text gives."""
    a, p = embeddings(2)
    found = fusedloss.multiple_negatives_ranking(a, p, ids=(ANCHORS, POSITIVES), scale=3.0, **PER_DIRECTION)
    mask = masks.same_id(ANCHORS, ANCHORS) & masks.same_id(POSITIVES, POSITIVES)
    same(found, fusedloss.clip(a, p, 3.0, normalize=True, mask=mask), (a, p))


def test_documents_without_an_anchor_and_a_mask_beside():
    a, p = embeddings(1, rows=4)[0], embeddings(1, seed=1)[0]
    extra = masks.same_id(torch.arange(4), torch.arange(ROWS) - 1)
    found = fusedloss.multiple_negatives_ranking(a, p, ids=(ANCHORS[:4], POSITIVES), mask=extra, similarity="dot")
    pairs, _ = allowed(4, torch.cat([ANCHORS[:4], torch.arange(-5, 0)]))
    pairs &= torch.arange(4)[:, None] != torch.arange(ROWS) - 1
    own = torch.eye(4, ROWS, dtype=torch.bool)
    z = (20 * a @ p.T).where(pairs | own, -torch.inf)
    same(found, F.cross_entropy(z, torch.arange(4)), (a, p))


def test_all_the_same_text():
    """No negative is left: the loss is 0 and so are the gradients."""
    a, p = embeddings(2)
    once = torch.zeros(ROWS, dtype=torch.int64)
    loss = fusedloss.multiple_negatives_ranking(a, p, ids=(torch.arange(ROWS), once))
    assert loss.item() == 0 and not any(g.any() for g in torch.autograd.grad(loss, (a, p)))


def test_gist_is_the_formula():
    inputs = embeddings()
    guide = [x.detach() for x in embeddings(seed=5)]
    found = fusedloss.gist_embed(*inputs, guide=guide, ids=(ANCHORS, POSITIVES, NEGATIVES), temperature=0.3)
    (a, p, n), (ga, gp, gn) = ([F.normalize(x, dim=1) for x in xs] for xs in (inputs, guide))
    threshold = (ga * gp).sum(1, keepdim=True)
    pairs, hard = allowed(ROWS)
    own = torch.eye(ROWS, dtype=torch.bool)
    blocks = [
        (a @ p.T).where((pairs & (ga @ gp.T <= threshold)) | own, -torch.inf),
        (a @ a.T).where(pairs & (ga @ ga.T <= threshold), -torch.inf),
        (p @ p.T).where(pairs & (gp @ gp.T <= threshold), -torch.inf),
        (a @ n.T).where(hard & (ga @ gn.T <= threshold), -torch.inf),
    ]
    same(found, F.cross_entropy(torch.cat(blocks, 1) / 0.3, torch.arange(ROWS)), inputs)


def test_matryoshka_takes_them():
    inputs = embeddings()
    ids = (ANCHORS, POSITIVES, NEGATIVES)
    ranking = fusedloss.multiple_negatives_ranking
    found = fusedloss.matryoshka(ranking, *inputs, dims=(6, 2), ids=ids, directions=ALL)
    wanted = sum(ranking(*(x[:, :dim] for x in inputs), ids=ids, directions=ALL) for dim in (6, 2))
    same(found, wanted, inputs)


def test_refusals():
    a, p = embeddings(2)
    whole = torch.arange(ROWS)
    with pytest.raises(ValueError, match="ids must hold 2 tensors, one for each of anchor, positive, got 1"):
        fusedloss.multiple_negatives_ranking(a, p, ids=(whole,))
    with pytest.raises(ValueError, match=r"ids\[1\] must be int64 \[9\], got shape \[8\]"):
        fusedloss.multiple_negatives_ranking(a, p, ids=(whole, whole[:8]))
    with pytest.raises(TypeError, match=r"ids\[0\] must be a tensor of int64 \[9\], got torch.int32; call .long"):
        fusedloss.gist_embed(a, p, guide=(a, p), ids=(whole.int(), whole))
    with pytest.raises(TypeError, match="ids must be a sequence of int64 tensors"):
        fusedloss.gist_embed(a, p, guide=(a, p), ids=whole)


# Ids of texts ---------------------------------------------------------------------------------------------------------


def exact(tokens):
    """The formula, in Python's integers."""
    whole = 2**64 - 1
    total = 0
    for place, token in enumerate(tokens, 1):
        x = (token << 32) + place
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & whole
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & whole
        total += x ^ (x >> 31)
    total &= whole
    return total - 2**64 if total >> 63 else total


def test_text_ids_are_the_formula_whatever_the_padding():
    texts = [[5, 6, 7], [7, 6, 5], [5, 6], [5, 6, 7, 7], [2**31 - 1, 0, 1], []]
    for width, left in ((4, False), (4, True), (7, True)):
        tokens, real = torch.full((6, width), 3), torch.zeros(6, width, dtype=torch.int64)
        for row, text in enumerate(texts):
            start = width - len(text) if left else 0
            tokens[row, start : start + len(text)] = torch.tensor(text, dtype=torch.int64)
            real[row, start : start + len(text)] = 1
        assert masks.text_ids(tokens, real).tolist() == [exact(text) for text in texts]
        assert masks.text_ids(tokens.int(), real.bool()).tolist() == [exact(text) for text in texts]
    assert masks.text_ids(torch.tensor([[5, 6, 7]])).item() == exact([5, 6, 7])


def test_different_texts_have_different_ids():
    tokens = torch.cartesian_prod(*[torch.arange(16)] * 4)  # 65536 texts of four tokens that differ in few bits
    assert len(masks.text_ids(tokens).unique()) == len(tokens)


def test_text_ids_refuse():
    tokens = torch.arange(6).view(2, 3)
    with pytest.raises(TypeError, match=r"input_ids must be a tensor of integers, got torch\.float32"):
        masks.text_ids(tokens.float())
    with pytest.raises(ValueError, match=r"input_ids must be \[rows, places\], got shape \[6\]"):
        masks.text_ids(tokens.flatten())
    with pytest.raises(ValueError, match=r"attention_mask must be \[2, 3\], like input_ids, got shape \[2, 2\]"):
        masks.text_ids(tokens, tokens[:, :2])
    for wrong in (-1, 2**31):
        tokens[0, 1] = wrong
        with pytest.raises(ValueError, match=f"input_ids must hold numbers from 0 to 2147483647, got {wrong}"):
            masks.text_ids(tokens)
    assert masks.text_ids(tokens, torch.tensor([[1, 0, 1], [1, 1, 1]])).shape == (2,)  # of the padding none is read
