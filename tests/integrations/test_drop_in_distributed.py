"""`gather_across_devices` of the drop-ins for sentence-transformers on two real processes, each with its own batch.

Both ranks build each case from the library's class and from ours, alone and with DistributedDataParallel around the
encoder. Cases run in one pair of processes, until one fails: the next has a new pair.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("sentence_transformers.base.losses.merged_forward", reason="sentence-transformers 6 is needed")

from sentence_transformers import util
from sentence_transformers.sentence_transformer import losses as stock
from sentence_transformers.sparse_encoder import losses as stock_sparse
from transformers import PreTrainedTokenizerBase

from fusedloss.integrations import calls
from fusedloss.integrations import sentence_transformers as fused
from fusedloss.integrations.sentence_transformers import sparse_encoder as fused_sparse

RANKS, ROWS, F, D = 2, 7, 5, 8
MNRL, GIST, SPARSE = "MultipleNegativesRankingLoss", "GISTEmbedLoss", "SparseMultipleNegativesRankingLoss"
SYMMETRIC = "MultipleNegativesSymmetricRankingLoss"
Q2D, Q2Q, D2Q, D2D = ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(
        torch.cuda.is_available(),
        reason="the processes are forked, which autograd refuses where it has threads for GPUs",
    ),
]


class Tokenizer(PreTrainedTokenizerBase):
    def __init__(self):
        pass

    def get_vocab(self):
        return {}


class Encoder(nn.Sequential):
    """Stands in for a model: two layers over features that are floats. The same weights on each rank."""

    max_seq_length = 8
    similarity_fn_name = None
    tokenizer = Tokenizer()

    def __init__(self, seed=0, dim=D):
        super().__init__(nn.Linear(F, D), nn.Tanh(), nn.Linear(D, dim))
        self.double()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=generator)

    def get_embedding_dimension(self):
        return self[2].out_features

    def forward(self, features):
        features["sentence_embedding"] = super().forward(features["input_ids"])
        return features


def features(columns, rows, rank):
    """A batch of this rank's own."""
    generator = torch.Generator().manual_seed(1 + rank)
    return [{"input_ids": torch.randn(rows, F, generator=generator, dtype=torch.float64)} for _ in range(columns)]


# Cases ----------------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    name: str
    columns: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    rows: int = ROWS
    dims: tuple[int, ...] = ()  # of a MatryoshkaLoss around it
    change: Callable[[nn.Module], object] | None = None
    is_fused: bool = True

    def __str__(self):
        shown = [getattr(value, "__name__", str(value)) for value in self.options.values()]
        around = f"{self.change.__name__}" if self.change else f"Matryoshka{self.dims}" if self.dims else ""
        return "-".join(filter(None, [self.name, around, *shown, f"{self.columns}x{self.rows}"]))

    def build(self, ours, gather=True):
        library = (fused_sparse, stock_sparse) if self.name == SPARSE else (fused, stock)
        kind = getattr(library[0 if ours else 1], self.name)
        guide = {"guide": Encoder(seed=5, dim=3)} if "guide" in inspect.signature(kind.__init__).parameters else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            loss = kind(Encoder(), **guide, gather_across_devices=gather, **self.options)
        if self.change:
            self.change(loss)
        if self.dims:
            loss = (fused if ours else stock).MatryoshkaLoss(loss.model, loss, self.dims)
        return loss


def squared(loss):
    loss.similarity_fct = lambda a, b: -(a[:, None] - b[None]).square().sum(-1)


def learnt(loss):
    loss.scale = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))


def ranking_options():
    """(columns, options) of MNRL, each for the plain and the cached loss."""
    for directions in [(Q2D,), (Q2D, Q2Q), (Q2D, D2Q), (Q2D, D2D), ALL]:
        yield from ((columns, {"directions": directions}) for columns in (2, 3))
    yield from ((n, {"directions": (Q2D, D2Q), "partition_mode": "per_direction"}) for n in (2, 3))
    for mode, columns in itertools.product(("in_batch_negatives", "hard_negatives", "all_negatives"), (2, 3)):
        yield columns, {"hardness_mode": mode, "hardness_strength": 3.0}
        yield columns, {"hardness_mode": mode, "hardness_strength": 3.0, "directions": ALL}
    yield 4, {"similarity_fct": util.dot_score, "scale": 0.5, "directions": ALL}


def gist_options():
    for strategy, margin in itertools.product(("absolute", "relative"), (0.0, 0.1, -0.3)):
        yield {"margin_strategy": strategy, "margin": margin, "temperature": 0.05}
    for anchors, positives in [(False, False), (False, True), (True, False)]:
        yield {"contrast_anchors": anchors, "contrast_positives": positives, "temperature": 0.05}


def cases():
    for columns, options in ranking_options():
        yield Case(MNRL, columns, options)
        yield Case("Cached" + MNRL, columns, {"mini_batch_size": 3, **options})
        if "hardness_mode" not in options:
            scale = {"scale": options.get("scale", 0.3)}
            yield Case(SPARSE, columns, options | scale)
    for columns in (2, 3):
        yield Case(SYMMETRIC, columns)
        yield Case("Cached" + SYMMETRIC, columns, {"mini_batch_size": 3})
    for options in gist_options():
        yield from (Case(GIST, columns, options) for columns in (2, 3))
        yield from (Case("Cached" + GIST, columns, {"mini_batch_size": 3, **options}) for columns in (2, 4))
    for size in (1, ROWS, 32):
        yield Case("Cached" + MNRL, 3, {"mini_batch_size": size, "directions": ALL})
        yield Case("Cached" + GIST, 3, {"mini_batch_size": size})
    for name in (MNRL, "Cached" + MNRL, GIST, "Cached" + GIST):
        options = {} if GIST in name else {"directions": ALL}
        yield Case(name, 3, options, rows=1)
        yield Case(name, 3, options, dims=(D, 3))
    hard = {"hardness_mode": "all_negatives", "hardness_strength": 3.0}
    yield from (Case(name, 3, hard, dims=(D, 3)) for name in (MNRL, "Cached" + MNRL))  # a pass for each dimension
    for name in (MNRL, "Cached" + MNRL):
        yield Case(name, 3, change=squared, is_fused=False)
    yield Case(MNRL, 3, {"directions": (Q2D, D2Q)}, change=learnt)  # the library's gradient is NaN with the others


CASES = list(cases())


# On a rank ------------------------------------------------------------------------------------------------------------


def run(loss, columns):
    """The loss, and the gradients of all its parameters."""
    if type(loss).__name__ == SPARSE:
        value = loss.compute_loss_from_embeddings([loss.model(x)["sentence_embedding"] for x in columns], None)
    else:
        value = loss(columns, None)
    value.backward()
    return value.detach(), {name: p.grad for name, p in loss.named_parameters() if not name.startswith("guide")}


def in_parallel(loss):
    """As the trainer does it: every loss in `loss` has the wrapped encoder."""
    model = DistributedDataParallel(loss.model)
    model.get_embedding_dimension = loss.model.get_embedding_dimension
    for module in list(loss.modules()):
        if "model" in module._modules:
            module.model = model
    return loss


def close(found, wanted, what):
    bound = 1e-10 * max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(found, wanted, rtol=0, atol=bound, msg=lambda message: f"{what}: {message}")


def same(found, wanted, what):
    (value, grads), (expected, expected_grads) = found, wanted
    close(value, expected, f"value {what}")
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert (grad is None) == (expected_grads[name] is None), name
        if grad is not None:
            close(grad, expected_grads[name], f"gradient of {name} {what}")


def check(case, rank):
    """All that is said between the ranks comes before the first assertion: one rank's failure leaves no other waiting.

    The ranks' averages are what one process has of both batches, except that GIST's anchors only meet their own.
    """
    batch = lambda: features(case.columns, case.rows, rank)
    ran, parallel, evaluated = [], [], []
    before = calls.copy()
    for ours in (True, False):
        ran.append(run(case.build(ours), batch()))
        parallel.append(run(in_parallel(case.build(ours)), batch()))
        if case.name != SPARSE:
            with torch.no_grad():
                evaluated.append(case.build(ours)(batch(), None))
        if ours:
            counted = calls - before
    encoder = [f"model.{name}" for name, _ in Encoder().named_parameters()]
    average = {name: ran[0][1][name].clone() for name in encoder}
    value = ran[0][0].clone()
    for x in (value, *average.values()):
        distributed.all_reduce(x)
        x /= RANKS

    shared = case.dims and GIST not in case.name  # all dimensions in one sweep, after one gather
    name, each = ("MatryoshkaLoss", 1) if shared else (case.name, max(1, len(case.dims)))
    expected = {f"sentence_transformers.{name}": (2 + len(evaluated) // 2) * each}
    assert counted == (expected if case.is_fused else {})
    assert calls - before == counted, "the library's class ran ours"
    same(*ran, "on a rank")
    same(*parallel, "in parallel")
    if evaluated:
        close(evaluated[0], evaluated[1], "without gradients")
    for name in encoder:
        close(parallel[0][1][name.replace("model.", "model.module.", 1)], average[name], f"average of {name}")
    if GIST not in case.name:
        both = zip(*(features(case.columns, case.rows, r) for r in range(RANKS)), strict=True)
        together = [{"input_ids": torch.cat([x["input_ids"] for x in column])} for column in both]
        wanted, grads = run(case.build(False, gather=False), together)
        close(value, wanted, "average value, and that of one process")
        for name in encoder:
            close(average[name], grads[name], f"average of {name}, and that of one process")


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(RANKS, lambda rank: lambda number: check(CASES[number], rank))
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("number", range(len(CASES)), ids=map(str, CASES))
def test_gathered_on_two_ranks(number, ranks):
    ranks(number)


# One exchange a step --------------------------------------------------------------------------------------------------


def exchanges(case):
    """How often the encoder's gradients are averaged in a step, of ours and of the library's."""
    found = []
    for ours in (True, False):
        loss, counted = in_parallel(case.build(ours)), []

        def hook(counted, bucket):
            counted.append(bucket.index())
            return distributed.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])

        (model,) = {id(m): m for m in loss.modules() if isinstance(m, DistributedDataParallel)}.values()
        model.register_comm_hook(counted, hook)
        run(loss, features(case.columns, case.rows, distributed.get_rank()))
        found.append(counted)
    return found


@pytest.fixture(scope="module")
def counting_ranks():
    ranks = Ranks(RANKS, lambda rank: exchanges)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize(
    "case",
    [
        Case("Cached" + MNRL, 3, {"mini_batch_size": 2}),
        Case("Cached" + MNRL, 3, {"mini_batch_size": 2}, dims=(D, 3)),
        Case("Cached" + GIST, 3, {"mini_batch_size": 2}),
    ],
    ids=str,
)
def test_a_cached_loss_averages_gradients_once(case, counting_ranks):
    """Each column has four chunks with a backward each; DistributedDataParallel exchanges its one bucket once."""
    for found in counting_ranks(case):
        assert found == [[0], [0]]
