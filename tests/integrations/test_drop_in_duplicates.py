"""The option `duplicates` of sentence-transformers' ranking losses: by tokens, by labels, in every form, on two ranks.

Expected values come from the library's own class around the pairs that remain, and from `ids=` of fusedloss's
functions, which tests/losses/test_duplicates.py holds to formulas.
"""

from __future__ import annotations

import pickle

import pytest
import torch
from ranks import Ranks
from torch import distributed, nn
from torch.nn import functional as F

pytest.importorskip("sentence_transformers.base.losses.merged_forward", reason="sentence-transformers 6 is needed")

from sentence_transformers.base.data_collator import BaseDataCollator
from sentence_transformers.sentence_transformer import losses as stock
from transformers import PreTrainedTokenizerBase

import fusedloss
from fusedloss.integrations import sentence_transformers as fused

pytestmark = [pytest.mark.upstream, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

MNRL, GIST = "MultipleNegativesRankingLoss", "GISTEmbedLoss"
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
# Six rows. Rows 0 and 3 have one positive, rows 1 and 5 one anchor; row 4's negative is row 2's positive.
ANCHORS = [[1, 2], [3, 4, 5], [6], [7, 8], [9, 1, 2], [3, 4, 5]]
POSITIVES = [[2, 2, 1], [4, 5], [5, 6, 7, 8], [2, 2, 1], [9], [1, 1]]
NEGATIVES = [[8, 8], [7, 7, 7], [6, 5], [1], [5, 6, 7, 8], [2]]
LABELS = torch.tensor([[0, 10, 20], [1, 11, 21], [2, 12, 22], [3, 10, 23], [4, 14, 12], [1, 15, 25]])


class Tokenizer(PreTrainedTokenizerBase):
    def __init__(self):
        pass

    def get_vocab(self):
        return {}

    def __repr__(self):
        return "Tokenizer()"


class Encoder(nn.Sequential):
    """The sum of the tokens' vectors, each divided by its place from the end."""

    similarity_fn_name, max_seq_length = None, 8

    def __init__(self, seed=0, dim=6):
        super().__init__(nn.Embedding(10, dim, dtype=torch.float64))
        generator = torch.Generator().manual_seed(seed)
        self[0].weight.data.normal_(generator=generator)
        self.tokenizer = Tokenizer()

    def get_embedding_dimension(self):
        return self[0].embedding_dim

    def forward(self, features):
        real = features["attention_mask"][..., None]
        place = real.flip(1).cumsum(1).flip(1)
        x = (self[0](features["input_ids"]) * real / place.clamp(min=1)).sum(1)
        return {**features, "sentence_embedding": x}


def column(texts, left=False):
    width = max(map(len, texts)) + left  # a column has a width of its own
    ids, real = torch.zeros(len(texts), width, dtype=torch.int64), torch.zeros(len(texts), width, dtype=torch.int64)
    for row, text in enumerate(texts):
        part = slice(width - len(text), None) if left else slice(len(text))
        ids[row, part], real[row, part] = torch.tensor(text), 1
    return {"input_ids": ids, "attention_mask": real}


def columns(rows=slice(None), left=False):
    return [column(texts[rows], left) for texts in (ANCHORS, POSITIVES, NEGATIVES)]


def build(name, library=fused, **options):
    size = {"mini_batch_size": 4} if name.startswith("Cached") else {}
    guide = {"guide": Encoder(5, dim=3)} if GIST in name else {}
    return getattr(library, name)(Encoder(), **guide, **size, **options)


def run(loss, given, labels=None):
    value = loss(given, labels)
    value.backward()
    return value.detach(), loss.model[0].weight.grad


def wanted(name, ids, count=3, **options):
    encoder, guide = Encoder(), Encoder(5, dim=3)
    given = columns()[:count]
    embeddings = [encoder(x)["sentence_embedding"] for x in given]
    if GIST in name:
        guides = [guide(x)["sentence_embedding"].detach() for x in given]
        value = fusedloss.gist_embed(*embeddings, guide=guides, ids=ids, **options)
    else:
        value = fusedloss.multiple_negatives_ranking(*embeddings, ids=ids, **options)
    value.backward()
    return value.detach(), encoder[0].weight.grad


def same(found, expected):
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("left", [False, True], ids=["padded right", "padded left"])
@pytest.mark.parametrize("name", [MNRL, f"Cached{MNRL}", GIST, f"Cached{GIST}"])
def test_texts_and_labels(name, left):
    options = {} if GIST in name else {"directions": ALL}
    expected = wanted(name, LABELS.unbind(1), **options)
    assert not torch.allclose(expected[0], wanted(name, None, **options)[0])
    same(run(build(name, duplicates="texts", **options), columns(left=left)), expected)
    same(run(build(name, duplicates="labels", **options), columns(), LABELS), expected)
    same(run(build(name, **options), columns(), LABELS), wanted(name, None, **options))  # the library reads no labels


def test_a_duplicate_weighs_nothing():
    """The loss of the rows that are left, by the library: each row's own negatives, row by row."""
    found, _ = run(build(MNRL, duplicates="texts"), columns())
    rows = []
    for row in range(6):
        keep = [j for j in range(6) if j == row or (LABELS[j, 0] != LABELS[row, 0] and LABELS[j, 1] != LABELS[row, 1])]
        hard = [n for n in range(6) if LABELS[n, 2] != LABELS[row, 1]]
        a, p, n = (Encoder()(x)["sentence_embedding"].detach() for x in columns())
        z = 20 * F.normalize(a, dim=1)[row] @ F.normalize(torch.cat([p[keep], n[hard]]), dim=1).T
        rows.append(F.cross_entropy(z, torch.tensor(keep.index(row))))
    torch.testing.assert_close(found, torch.stack(rows).mean())


def test_one_label_a_pair():
    """As the trainer hands on a column of integers: pairs of one label are no negatives, hard negatives all are."""
    pairs = torch.tensor([0, 1, 2, 0, 3, 1])
    ids = (pairs, pairs, torch.arange(6) - 9)
    for name in (MNRL, f"Cached{GIST}"):
        same(run(build(name, duplicates="labels"), columns(), pairs), wanted(name, ids))


@pytest.mark.parametrize("name", [MNRL, f"Cached{MNRL}", GIST, f"Cached{GIST}"])
def test_inside_matryoshka(name):
    expected = None
    for dim in (6, 3):
        encoder, guide = Encoder(), Encoder(5, dim=3)
        cut = [encoder(x)["sentence_embedding"][:, :dim] for x in columns()]
        if GIST in name:
            guides = [guide(x)["sentence_embedding"].detach() for x in columns()]
            value = fusedloss.gist_embed(*cut, guide=guides, ids=LABELS.unbind(1))
        else:
            value = fusedloss.multiple_negatives_ranking(*cut, ids=LABELS.unbind(1))
        value.backward()
        one = value.detach(), encoder[0].weight.grad
        expected = one if expected is None else [a + b for a, b in zip(expected, one, strict=True)]
    loss = build(name, duplicates="texts")
    same(run(fused.MatryoshkaLoss(loss.model, loss, [6, 3]), columns()), expected)


def test_the_data_collator_hands_on_ids():
    def preprocess(texts, prompt=None, task=None):
        return column(texts)

    rows = zip(ANCHORS, POSITIVES, NEGATIVES, LABELS.tolist(), strict=True)
    features = [dict(zip(("anchor", "positive", "negative", "label"), row, strict=True)) for row in rows]
    batch = BaseDataCollator(preprocess)(features)
    torch.testing.assert_close(batch["label"], LABELS)
    same(run(build(MNRL, duplicates="labels"), columns(), batch["label"]), wanted(MNRL, LABELS.unbind(1)))


def test_configuration_and_saving():
    loss = build(MNRL, duplicates="texts")
    assert loss.get_config_dict() == {**build(MNRL, stock).get_config_dict(), "duplicates": "texts"}
    assert "duplicates" not in build(MNRL).get_config_dict()
    before = build(MNRL, stock)
    with fused.patch():
        made = build(MNRL, stock, duplicates="texts")
        back, old = pickle.loads(pickle.dumps(made)), pickle.loads(pickle.dumps(before))
        assert back.duplicates == "texts" and old.duplicates is None
        same(run(back, columns()), wanted(MNRL, LABELS.unbind(1)))
        same(run(old, columns()), wanted(MNRL, None))


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match="duplicates must be one of 'texts', 'labels', got 'ids'"):
        build(MNRL, duplicates="ids")
    images = [{**x, "pixel_values": torch.zeros(6, 3)} for x in columns()]
    for name in (MNRL, f"Cached{GIST}"):
        with pytest.raises(ValueError, match="not padded tokens alone, got 'texts' and pixel_values"):
            build(name, duplicates="texts")(images, None)
    flat = [{"input_ids": torch.arange(6), "offsets": torch.arange(6)}] * 2
    with pytest.raises(ValueError, match="got 'texts' and offsets; give the data set a label column of ids"):
        build(MNRL, duplicates="texts")(flat, None)
    embeddings = [torch.randn(6, 4)] * 3
    with pytest.raises(ValueError, match="'labels' where the loss sees embeddings instead of texts, got 'texts'"):
        build(MNRL, duplicates="texts").compute_loss_from_embeddings(embeddings, None)
    by_labels = build(MNRL, duplicates="labels")
    for labels, got in ((None, "None"), (torch.rand(6), r"torch.float32 \[6\]"), (LABELS[:, :2], r"int64 \[6, 2\]")):
        with pytest.raises(ValueError, match=rf"labels must be int64 \[6\].* or \[6, 3\].*got .*{got}"):
            by_labels.compute_loss_from_embeddings(embeddings, labels)


def test_the_librarys_code_never_runs_in_its_place(monkeypatch):
    """It would take the duplicates for negatives."""
    loss = build(MNRL, duplicates="texts", similarity_fct=lambda a, b: a @ b.T)
    with pytest.raises(ValueError, match="duplicates must be None where the library's own code runs, because its sim"):
        loss(columns(), None)
    monkeypatch.setenv("FUSEDLOSS_DISABLE", "1")
    for name in (MNRL, f"Cached{MNRL}", GIST, f"Cached{GIST}"):
        with pytest.raises(ValueError, match="because FUSEDLOSS_DISABLE=1, got 'texts'"):
            build(name, duplicates="texts")(columns(), None)


# Across ranks ---------------------------------------------------------------------------------------------------------

GATHERED = [(MNRL, {"directions": ALL}), (f"Cached{MNRL}", {}), (f"Cached{GIST}", {"contrast_anchors": False})]


def on_a_rank(rank):
    def gathered(number):
        name, options = GATHERED[number]
        loss = build(name, duplicates="texts", gather_across_devices=True, **options)
        value, gradient = run(loss, columns(slice(3 * rank, 3 * rank + 3)))
        for x in (value, gradient):
            distributed.all_reduce(x)
        return value / 2, gradient / 2

    return gathered


@pytest.fixture(scope="module")
def two_ranks():
    ranks = Ranks(2, on_a_rank)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("number", range(len(GATHERED)), ids=[name for name, _ in GATHERED])
def test_duplicates_of_other_ranks(number, two_ranks):
    """Rows 0 and 3, 1 and 5 are on different ranks: together they have what one process has."""
    name, options = GATHERED[number]
    expected = wanted(name, LABELS.unbind(1), **options)
    for found in two_ranks(number):
        same(found, expected)
