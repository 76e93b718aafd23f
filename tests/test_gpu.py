"""What only a GPU can show: no synchronisation, CUDA graphs, values that are not read back, devices and streams."""

from __future__ import annotations

import pytest
import torch

import fusedloss
from fusedloss import testing
from fusedloss.backends import BACKENDS
from fusedloss.info import probe

pytestmark = pytest.mark.gpu

BACKEND = pytest.mark.parametrize("backend", ["chunked", "triton"])
LOSSES = {
    "info_nce": lambda q, k, s, b: fusedloss.info_nce(q, k, temperature=1 / s, normalize=True, backend=b),
    "info_nce, scale known": lambda q, k, s, b: fusedloss.info_nce(q, k, temperature=0.05, normalize=True, backend=b),
    "clip": lambda q, k, s, b: fusedloss.clip(q, k, s, backend=b),
    "ranking": lambda q, k, s, b: fusedloss.multiple_negatives_ranking(q, k, k * 2, scale=s, backend=b),
}


def batch(backend, dtype=torch.float32, rows=300, dim=72):
    reason = BACKENDS[backend].why_not(probe("cuda", dtype))
    if reason:
        pytest.skip(f"{backend}: {reason}")
    query, key = (x.cuda().requires_grad_() for x in testing.inputs("random", rows, rows, dim, dtype))
    return query, key, torch.tensor(9.0, device="cuda", requires_grad=True)


def step(loss, backend, leaves):
    for leaf in leaves:
        leaf.grad = None
    value = LOSSES[loss](*leaves, backend)
    value.backward()
    return value.detach()


@BACKEND
@pytest.mark.parametrize("loss", list(LOSSES))
def test_nothing_synchronises(backend, loss):
    leaves = batch(backend)
    step(loss, backend, leaves)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(loss, backend, leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@BACKEND
@pytest.mark.parametrize("loss", list(LOSSES))
def test_a_captured_graph_follows_its_inputs(backend, loss):
    leaves = batch(backend, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(loss, backend, leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    for leaf in leaves:
        leaf.grad = None
    with torch.cuda.graph(graph):
        value = LOSSES[loss](*leaves, backend)
        value.backward()
    with torch.no_grad():
        leaves[0].copy_(leaves[0].flip(0) * 0.7)
    graph.replay()
    found = [value.clone(), leaves[0].grad.clone(), leaves[1].grad.clone()]
    wanted = testing.value_and_gradients(lambda *t: LOSSES[loss](*t, backend), leaves)
    for a, b in zip(found, wanted, strict=False):
        assert torch.equal(a, b)


@BACKEND
def test_an_out_of_range_target_gives_nan_and_the_environment_checks_it(backend, monkeypatch):
    query, key, _ = batch(backend)
    target = torch.arange(300, device="cuda")
    target[7] = 300
    assert torch.isnan(fusedloss.info_nce(query, key, target, backend=backend))
    monkeypatch.setenv("FUSEDLOSS_CHECK", "1")
    with pytest.raises(IndexError, match=r"target\[7\] is 300"):
        fusedloss.info_nce(query, key, target, backend=backend)


@BACKEND
@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("rows, dim", [(2048, 768), (6000, 100)])
def test_several_chunks_at_real_sizes_in_bf16(backend, loss, rows, dim):
    leaves = batch(backend, torch.bfloat16, rows, dim)
    found = testing.value_and_gradients(lambda *t: LOSSES[loss](*t, backend), leaves)
    exact = [t.detach().double() for t in leaves]
    wanted = testing.value_and_gradients(lambda *t: LOSSES[loss](*t, "reference"), exact)
    for a, b in zip(found, wanted, strict=True):
        assert ((a.double() - b).norm() / b.norm()) < 1e-2


@BACKEND
def test_compiles_in_one_graph(backend):
    query, key, scale = batch(backend, torch.bfloat16)
    compiled = torch.compile(LOSSES["info_nce"], fullgraph=True)
    found = testing.value_and_gradients(lambda *t: compiled(*t, backend), [query, key, scale])
    wanted = testing.value_and_gradients(lambda *t: LOSSES["info_nce"](*t, backend), [query, key, scale])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


def test_second_derivatives_are_refused_by_the_kernels():
    query, key, _ = batch("triton")
    loss = fusedloss.info_nce(query, key, backend="triton")
    with pytest.raises(RuntimeError, match="backend 'triton' has none"):
        torch.autograd.grad(loss, query, create_graph=True)
