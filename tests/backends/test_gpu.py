"""What only a GPU can show: no synchronisation, CUDA graphs, values that are not read back, devices and streams."""

from __future__ import annotations

import pytest
import torch

import fusedloss
from fusedloss import testing
from fusedloss.backends import BACKENDS
from fusedloss.bench import measure
from fusedloss.bench.machine import probe

pytestmark = pytest.mark.gpu

BACKEND = pytest.mark.parametrize("backend", ["chunked", "triton", "cuda"])
KERNELS = pytest.mark.parametrize("backend", ["triton", "cuda"])
SWEEPS = {
    "info_nce": lambda q, k, s, b: fusedloss.info_nce(q, k, temperature=1 / s, normalize=True, backend=b),
    "info_nce, scale known": lambda q, k, s, b: fusedloss.info_nce(q, k, temperature=0.05, normalize=True, backend=b),
    "clip": lambda q, k, s, b: fusedloss.clip(q, k, s, backend=b),
    "siglip": lambda q, k, s, b: fusedloss.siglip(q, k, s, -4.0, backend=b),
    "ranking": lambda q, k, s, b: fusedloss.multiple_negatives_ranking(q, k, k * 2, scale=s, backend=b),
}
# One of each family without a sweep; backend "cuda" has no kernels for them.
ROWWISE = {
    "list": lambda q, k, s, b: fusedloss.rank_net(*lists(q, k), backend=b),
    "class": lambda q, k, s, b: fusedloss.cross_entropy(
        q, torch.arange(len(q), device=q.device) % q.shape[1], backend=b
    ),
    "pair": lambda q, k, s, b: fusedloss.cosine_similarity(q, k, k.detach().float()[:, 0], backend=b),
    "pointwise": lambda q, k, s, b: fusedloss.mse(q, k.detach(), backend=b),
}
LOSSES = SWEEPS | ROWWISE


def lists(query, key):
    """Three queries' documents, whose lengths the host knows."""
    n = len(query)
    scores = (query * key.detach()).sum(1)
    lengths = [n // 3, n // 2, n - n // 3 - n // 2]
    return scores.split(lengths), (numbers(query) % 3).split(lengths)


def numbers(x):
    return torch.arange(len(x), device=x.device)


def batch(backend, dtype=torch.float32, rows=300, dim=72, loss="info_nce"):
    reason = BACKENDS[backend].why_not(probe("cuda", dtype))
    if backend == "cuda" and loss in ROWWISE:
        reason = "fusedloss._C has no kernel for this loss"
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
    leaves = batch(backend, loss=loss)
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
    leaves = batch(backend, torch.bfloat16, loss=loss)
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
    found = [value.clone(), *(leaf.grad for leaf in leaves[:2])]
    wanted = testing.value_and_gradients(lambda *t: LOSSES[loss](*t, backend), leaves)
    for a, b in zip(found, wanted, strict=False):
        assert torch.equal(torch.zeros_like(b) if a is None else a, b)  # a target has no gradient


@BACKEND
@pytest.mark.parametrize("loss", list(LOSSES))
def test_a_second_device_while_the_first_is_current(backend, loss):
    """test_cuda_host.py asks the same of backend "cuda" without a GPU; here the numbers are compared, too."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    here = batch(backend, loss=loss)
    if reason := BACKENDS[backend].why_not(probe("cuda:1", torch.float32)):
        pytest.skip(f"{backend}: {reason}")
    assert torch.cuda.current_device() == 0
    wanted = testing.value_and_gradients(lambda *t: LOSSES[loss](*t, backend), here)
    found = testing.value_and_gradients(lambda *t: LOSSES[loss](*t, backend), [x.detach().to("cuda:1") for x in here])
    assert torch.cuda.current_device() == 0
    for a, b in zip(found, wanted, strict=True):
        assert a.device.index == 1
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-5, atol=1e-6)  # the GPUs need not be alike


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
    leaves = batch(backend, torch.bfloat16, rows, dim, loss)
    found = testing.value_and_gradients(lambda *t: LOSSES[loss](*t, backend), leaves)
    exact = [t.detach().double() for t in leaves]
    wanted = testing.value_and_gradients(lambda *t: LOSSES[loss](*t, "reference"), exact)
    for a, b in zip(found, wanted, strict=True):
        assert (a.double() - b).norm() <= 1e-2 * b.norm()


@BACKEND
def test_compiles_in_one_graph(backend):
    query, key, scale = batch(backend, torch.bfloat16)
    compiled = torch.compile(LOSSES["info_nce"], fullgraph=True)
    found = testing.value_and_gradients(lambda *t: compiled(*t, backend), [query, key, scale])
    wanted = testing.value_and_gradients(lambda *t: LOSSES["info_nce"](*t, backend), [query, key, scale])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


@KERNELS
def test_second_derivatives_of_the_kernels_are_the_formula_s(backend):
    query, key, _ = batch(backend)
    found = []
    for name in (backend, "reference"):
        loss = fusedloss.info_nce(query, key, backend=name)
        (gradient,) = torch.autograd.grad(loss, query, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), query)[0])
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [256, 100])
@KERNELS
def test_runs_are_equal_bit_for_bit(backend, loss, dtype, dim):
    leaves = batch(backend, dtype, 3000, dim, loss)
    first = testing.value_and_gradients(lambda *t: LOSSES[loss](*t, backend), leaves)
    again = testing.value_and_gradients(lambda *t: LOSSES[loss](*t, backend), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("gemm", ["descriptors", "pointers", "library"])
@pytest.mark.parametrize("loss", list(SWEEPS))
@pytest.mark.parametrize("dim", [100, 768])
def test_every_way_to_multiply_agrees(monkeypatch, gemm, loss, dim):
    """Whatever the table picks on this device: bf16 at real tiles, several waves of them, ragged in every direction."""
    from fusedloss.backends.triton import launching
    from fusedloss.backends.triton.config import Config

    if gemm == "descriptors" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors need compute capability 9.0")
    leaves = batch("triton", torch.bfloat16, 6001, dim)
    exact = [t.detach().double() for t in leaves]
    wanted = testing.value_and_gradients(lambda *t: LOSSES[loss](*t, "reference"), exact)
    for config in (
        Config(gemm, 128, 128, 64, num_stages=3),
        Config(gemm, 64, 128, 64, SUBTILES=1 if gemm == "library" else 2, num_warps=4, programs=2),
    ):
        monkeypatch.setattr(launching, "picked", lambda *where, config=config: config)
        found = testing.value_and_gradients(lambda *t: LOSSES[loss](*t, "triton"), leaves)
        for a, b in zip(found, wanted, strict=True):
            assert (a.double() - b).norm() <= 1e-2 * b.norm()


def unit(rows, dim, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.empty(rows, dim, dtype=torch.bfloat16, device="cuda")
    for part in x.split(65536):
        part.copy_(torch.nn.functional.normalize(torch.randn(part.shape, device="cuda", generator=generator), dim=1))
    return x


def needs(backend, gib):
    if reason := BACKENDS[backend].why_not(probe("cuda", torch.bfloat16)):
        pytest.skip(f"{backend}: {reason}")
    if torch.cuda.get_device_properties(0).total_memory < gib << 30:
        pytest.skip(f"needs {gib} GiB of GPU memory")


@pytest.mark.slow
@pytest.mark.parametrize("normalize", [True, False], ids=["one fused sweep", "two sweeps"])
@KERNELS
def test_a_million_rows_in_one_call(backend, normalize):
    """N = 2**20 at D = 1024: a workspace of 4e9 elements, and no more than 8 GiB beside gradients and dy's sums."""
    needs(backend, 64)
    n, dim, scale = 2**20, 1024, 20.0
    query, key = unit(n, dim, 0).requires_grad_(), unit(n, dim, 1).requires_grad_()
    with torch.no_grad():
        key[::2] = (key[::2].float() + query[::2].float()).bfloat16()

    def step():
        fusedloss.info_nce(query, key, temperature=1 / scale, normalize=normalize, backend=backend).backward()

    accumulator, gradients = n * dim * 4, 2 * n * dim * 2
    assert measure.peak_memory(step, "cuda") <= gradients + accumulator + (8 << 30)
    rows = torch.tensor([0, 1, 4095, 65536, n // 2 + 1, n - 2, n - 1], device="cuda")
    exact = query[rows].detach().double().requires_grad_()
    keys = [part.detach().double() for part in key.split(65536)]
    if normalize:
        keys = [torch.nn.functional.normalize(part, dim=1) for part in keys]
    unit_rows = torch.nn.functional.normalize(exact, dim=1) if normalize else exact
    logits = torch.cat([unit_rows @ part.T for part in keys], 1) * scale
    torch.nn.functional.cross_entropy(logits, rows, reduction="sum").div(n).backward()
    error = (query.grad[rows].double() - exact.grad).norm(dim=1) / exact.grad.norm(dim=1)
    assert error.max() < 2e-2
    if not normalize:  # sum_ij dz_ij z_ij, once by rows and once by columns
        by_row, by_column = ((x.detach().float() * x.grad.float()).sum().item() for x in (query, key))
        assert by_row == pytest.approx(by_column, rel=2e-2)


@pytest.mark.slow
@KERNELS
def test_keys_beyond_two_to_the_31_elements(backend):
    needs(backend, 24)
    n, dim = 2**20, 2304
    key = unit(n, dim, 1)
    assert key.numel() > 2**31
    target = torch.arange(n - 300, n, device="cuda")
    query = (unit(300, dim, 0).float() + key[target].float()).bfloat16()
    for normalize in (False, True):
        found = fusedloss.info_nce(query, key, target, normalize=normalize, reduction="none", backend=backend)
        exact = query.double()
        exact = torch.nn.functional.normalize(exact, dim=1) if normalize else exact
        columns = []
        for part in key.split(65536):
            norms = part.double().norm(dim=1) if normalize else 1
            columns.append(exact @ part.double().T / norms)
        wanted = torch.nn.functional.cross_entropy(torch.cat(columns, 1) * 20, target, reduction="none")
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n, dim", [(16384, 768), (65536, 768), (131072, 256)])
@KERNELS
def test_the_workspace_of_a_large_batch(backend, n, dim):
    needs(backend, 16)
    query, key = unit(n, dim, 0).requires_grad_(), unit(n, dim, 1).requires_grad_()

    def step():
        fusedloss.info_nce(query, key, temperature=0.05, normalize=True, backend=backend).backward()

    allowed = 2 * n * dim * 2 + n * dim * 4 + (1 << 30)
    assert measure.peak_memory(step, "cuda") <= allowed
