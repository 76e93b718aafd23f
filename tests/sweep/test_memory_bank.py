"""`info_nce(bank=)`: more columns that every row sees, where they lie: MoCo's queue, XBM's memory."""

from __future__ import annotations

import math

import pytest
import torch
from peaks import MIB, growth, measured
from torch.nn import functional as F

import fusedloss
from fusedloss import masks, testing
from fusedloss.bench import measure

BACKENDS = ["reference", "dense", "chunked", "triton", "cuda"]
FUSED = ["dense", "chunked", "triton", "cuda"]


def batch(rows=9, keys=12, size=20, dim=6, dtype=torch.float64):
    return [torch.randn(n, dim, dtype=dtype) for n in (rows, keys, size)]


def exact(backend):
    """The kernels have no fp64."""
    return (torch.float32, 2e-5) if backend in ("triton", "cuda") else (torch.float64, 1e-12)


def options(dtype):
    """One of everything that concerns columns; keys and bank hold some of the rows' own ids."""
    ids, columns = torch.arange(9) % 5, torch.arange(32) % 7
    bias = torch.randn(32, dtype=dtype)
    bias[[4, 25]] = -math.inf
    return {
        "plain": {},
        "cosine": {"normalize": True, "temperature": 0.2},
        "target and weight": {"target": torch.tensor([3, 0, -100, 6, 1, 2, 11, 5, 4]), "weight": torch.rand(9)},
        "key_bias": {"key_bias": bias},
        "label_smoothing": {"label_smoothing": 0.1, "normalize": True},
        "same_id": {"mask": masks.same_id(ids, columns), "label_smoothing": 0.1},
        "matrix and margin": {"mask": masks.score_margin(0.3) & (torch.rand(9, 32) < 0.7)},
        "not_self": {"mask": masks.not_self(), "target": torch.arange(9) + 3},
        "guide": {"mask": masks.guide(torch.randn(9, 4, dtype=dtype), torch.randn(32, 4, dtype=dtype))},
        "negatives": {"negatives": torch.randn(9, 2, 6, dtype=dtype)},
        "sum": {"reduction": "sum"},
        "none": {"reduction": "none"},
    }


@pytest.mark.parametrize("case", list(options(torch.float32)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bank_is_the_keys_behind_the_keys(backend, case):
    dtype, tolerance = exact(backend)
    query, key, bank = batch(dtype=dtype)
    given = options(dtype)[case] | {"backend": backend}
    temperature = torch.tensor(given.pop("temperature", 0.7), dtype=dtype)

    def pointed(q, k, t):
        return fusedloss.info_nce(q, k, bank=bank, temperature=t, **given).square().sum()

    def joined(q, k, t):
        return fusedloss.info_nce(q, torch.cat([k, bank]), temperature=t, **given).square().sum()

    found, wanted = (testing.value_and_gradients(f, [query, key, temperature]) for f in (pointed, joined))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_count_the_bank(backend):
    dtype, tolerance = exact(backend)
    query, key, bank = batch(dtype=dtype)
    mask = masks.same_id(torch.arange(9) % 5, torch.arange(32) % 7)
    given = {"mask": mask, "return_stats": True, "backend": backend}
    _, found = fusedloss.info_nce(query, key, bank=bank, **given)
    _, wanted = fusedloss.info_nce(query, torch.cat([key, bank]), **given)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bank_gets_no_gradient_and_an_empty_one_is_none(backend):
    dtype, _ = exact(backend)
    query, key, bank = batch(dtype=dtype)
    bank.requires_grad_()
    query.requires_grad_()
    fusedloss.info_nce(query, key, bank=bank, backend=backend).backward()
    assert bank.grad is None
    alone = fusedloss.info_nce(query, key, backend=backend)
    assert fusedloss.info_nce(query, key, bank=bank[:0], backend=backend) == alone


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_queue_stored_by_columns_is_taken_as_it_is(backend):
    dtype, tolerance = exact(backend)
    query, key, bank = batch(dtype=dtype)
    found = fusedloss.info_nce(query, key, bank=bank.T.contiguous().T, backend=backend)
    torch.testing.assert_close(
        found, fusedloss.info_nce(query, key, bank=bank, backend=backend), rtol=tolerance, atol=0
    )


def test_the_module_takes_it_in_forward():
    query, key, bank = batch()
    found = fusedloss.InfoNCELoss(0.1, normalize=True)(query, key, bank=bank)
    assert found == fusedloss.info_nce(query, key, bank=bank, temperature=0.1, normalize=True)


# Overwritten before the backward --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("backend", FUSED)
def test_a_queue_may_be_overwritten_before_the_backward(backend, reduction):
    """MoCo enqueues the batch's keys as soon as the loss is there."""
    dtype, tolerance = exact(backend)
    query, key, bank = batch(dtype=dtype)
    temperature = torch.tensor(0.7, dtype=dtype)

    def step(q, t, bank, enqueue):
        loss = fusedloss.info_nce(q, key, bank=bank, temperature=t, reduction=reduction, backend=backend)
        if enqueue:
            bank[: len(key)] = key
        return loss

    wanted = testing.value_and_gradients(lambda q, t: step(q, t, bank, False), [query, temperature])
    found = testing.value_and_gradients(lambda q, t: step(q, t, bank.clone(), True), [query, temperature])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=0)


NAMED = r"`bank`, or another tensor of the loss, must stay as it is .*, got one that was modified"


def overwritten(**given):
    query, key, bank = batch()
    query.requires_grad_()
    loss = fusedloss.info_nce(query, key, bank=bank, **given).sum()
    bank[: len(key)] = key
    return loss, query


def test_a_second_backward_needs_the_queue_as_it_was():
    loss, query = overwritten(backend="chunked")
    torch.autograd.grad(loss, query, retain_graph=True)
    with pytest.raises(RuntimeError, match=NAMED):
        torch.autograd.grad(loss, query)


def test_second_derivatives_need_the_queue_as_it_was():
    loss, query = overwritten(backend="chunked")
    with pytest.raises(RuntimeError, match=NAMED):
        torch.autograd.grad(loss, query, create_graph=True)


@pytest.mark.parametrize("given", [{"reduction": "none"}, {"backend": "reference"}], ids=str)
def test_a_backward_that_reads_the_queue_needs_it_as_it_was(given):
    loss, _ = overwritten(**given)
    named = "modified by an inplace operation" if "backend" in given else NAMED  # torch's own error
    with pytest.raises(RuntimeError, match=named):
        loss.backward()


def test_a_queue_that_requires_a_gradient_receives_none():
    query, key, bank = batch()
    wanted = fusedloss.info_nce(query, key, bank=bank)
    bank.requires_grad_()
    loss = fusedloss.info_nce(query.requires_grad_(), key, bank=bank)
    loss.backward()
    assert loss == wanted and bank.grad is None and query.grad.isfinite().all()


def test_a_graph_that_was_freed_still_says_so():
    query, key, bank = batch()
    loss = fusedloss.info_nce(query.requires_grad_(), key, bank=bank, backend="chunked")
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.lengthy
def test_compiled_the_queue_may_be_overwritten_too():
    query, key, bank = batch(dtype=torch.float32)

    def step(q, queue):
        return fusedloss.info_nce(q, key, bank=queue, temperature=0.7, backend="chunked")

    torch._dynamo.reset()
    wanted = testing.value_and_gradients(lambda q: step(q, bank), [query])
    leaf, queue = query.clone().requires_grad_(), bank.clone()
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(leaf, queue)
    queue[: len(key)] = key
    loss.backward()
    torch.testing.assert_close(leaf.grad, wanted[1], rtol=1e-5, atol=1e-7)


# Never copied ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
def test_what_is_kept_for_the_backward_is_the_bank_itself(normalize):
    query, key, bank = batch(dtype=torch.float32)
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.data_ptr()) or t, lambda t: t):
        fusedloss.info_nce(query.requires_grad_(), key, bank=bank, normalize=normalize, backend="chunked")
    assert bank.data_ptr() in kept


def bank_memory(normalize: bool, joined: bool, rows: int) -> int:
    """Of a step of 256 rows against a bank, of 4 KiB a row."""
    query, key, bank = torch.randn(256, 1024), torch.randn(256, 1024), torch.randn(rows, 1024)

    def step():
        given = {"normalize": normalize, "workspace_bytes": 16 * MIB, "backend": "chunked"}
        if joined:
            fusedloss.info_nce(query.requires_grad_(), torch.cat([key, bank]), **given).backward()
        else:
            fusedloss.info_nce(query.requires_grad_(), key, bank=bank, **given).backward()

    return measure.peak_memory(step)


@pytest.mark.slow
@measured
def test_a_bank_takes_no_memory_of_its_own():
    assert growth(bank_memory, False, True, sizes=(64, 65536)) > 256 * MIB  # or the next could not fail
    for normalize in (False, True):
        assert growth(bank_memory, normalize, False, sizes=(64, 65536)) < 64 * MIB


# The examples ---------------------------------------------------------------------------------------------------------


def test_moco():
    """Against its own logits [B, 1 + K] of `l_pos` and `l_neg`, through three steps of a queue."""
    encoder, dim, rows = torch.nn.Linear(5, 8, dtype=torch.float64), 8, 4
    queue, start = F.normalize(torch.randn(12, dim, dtype=torch.float64)), 0
    zeros = torch.zeros(rows, dtype=torch.long)
    columns = torch.cat([zeros, torch.ones(len(queue), dtype=torch.long)])
    for _ in range(4):
        x, key = torch.randn(rows, 5, dtype=torch.float64), F.normalize(torch.randn(rows, dim, dtype=torch.float64))
        query = F.normalize(encoder(x))
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1) / 0.2
        theirs = F.cross_entropy(logits, zeros)
        wanted = torch.autograd.grad(theirs, encoder.weight)[0]
        query = F.normalize(encoder(x))
        ours = fusedloss.info_nce(query, key, bank=queue, mask=masks.same_id(zeros, columns), temperature=0.2)
        queue[start : start + rows] = key
        start = (start + rows) % len(queue)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.autograd.grad(ours, encoder.weight)[0], wanted, rtol=1e-10, atol=1e-14)


def test_xbm():
    """A memory that fills up: equal labels compete neither in the batch nor in the memory."""
    memory, seen = torch.empty(10, 6, dtype=torch.float64), torch.empty(10, dtype=torch.long)
    for step in range(4):
        query, key, _ = batch(5, 5)
        label = torch.randint(3, (5,))
        full = min(step * 5, len(memory))
        columns = torch.cat([label, seen[:full]])
        loss = fusedloss.info_nce(query, key, bank=memory[:full], mask=masks.same_id(label, columns), normalize=True)
        logits = F.normalize(query) @ F.normalize(torch.cat([key, memory[:full]])).T / 0.05
        competes = (label[:, None] != columns) | torch.eye(5, len(columns), dtype=torch.bool)
        wanted = F.cross_entropy(logits.masked_fill(~competes, -math.inf), torch.arange(5))
        torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-14)
        start = step * 5 % len(memory)
        memory[start : start + 5], seen[start : start + 5] = key, label


# Errors ---------------------------------------------------------------------------------------------------------------

QUERY = torch.randn(4, 3)


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"bank": [1.0]}, TypeError, "bank must be a tensor .*got a list"),
        ({"bank": torch.randn(5)}, ValueError, r"bank must have two dimensions \[rows, D\], got shape \[5\]"),
        ({"bank": torch.randn(5, 2)}, ValueError, "bank must have D = 3, like query, got D = 2"),
        ({"bank": torch.randn(5, 3).double()}, TypeError, "bank must be torch.float32, like query, got torch.float64"),
        (
            {"bank": torch.randn(5, 3), "target": torch.full((4,), 6)},
            IndexError,
            r"target\[0\] must be an index from 0 to 3, or -100 to leave the row out, got 6",
        ),
        (
            {"bank": torch.randn(5, 3), "key_bias": torch.zeros(4)},
            ValueError,
            r"key_bias must have shape \[9\], one number per key and row of the bank, got \[4\]",
        ),
        (
            {"bank": torch.randn(5, 3), "mask": torch.ones(4, 4, dtype=torch.bool)},
            ValueError,
            r"mask must be bool \[4, 9\], got shape \[4, 4\]",
        ),
    ],
)
def test_errors_name_the_bank(given, error, message):
    with pytest.raises(error, match=message):
        fusedloss.info_nce(QUERY, QUERY, **given)


def test_prefixes_of_a_bank_are_columns_of_another_loss():
    with pytest.raises(ValueError, match="bank must not be given with info_nce under matryoshka, got it"):
        fusedloss.matryoshka(fusedloss.info_nce, QUERY, QUERY, dims=(3, 2), bank=QUERY)
