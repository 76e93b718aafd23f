"""Who multiplies fp32 matrices on a CPU: the numbers of each, and the choice between them."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fusedloss
from fusedloss.core import products
from fusedloss.core.products import ALL, TERMS, TORCH, Chosen, add_mm, chosen, mm
from fusedloss.testing import budget_share, inputs, value_and_gradients

CPU = torch.device("cpu")
SIZES = (4096, 4096, 1000)  # a step of 1e11 operations, see LONG


@pytest.fixture(autouse=True)
def nothing_timed(monkeypatch):
    monkeypatch.delenv("FUSEDLOSS_CPU_PRODUCTS", raising=False)
    monkeypatch.setattr(products, "_faster", {})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def counted(monkeypatch, name):
    """The calls of a function of `products`, which runs as before."""
    calls, function = [], getattr(products, name)
    monkeypatch.setattr(products, name, lambda *arguments: calls.append(arguments) or function(*arguments))
    return calls


SHAPES = [(40, 30, 20), (70, 1100, 3), (1500, 900, 24), (1, 1, 1), (1, 700, 5), (5, 7, 1)]
EMPTY = [(0, 3, 2), (4, 3, 0), (4, 0, 3)]


@pytest.mark.parametrize("layout", ["rows", "columns", "cut"])
@pytest.mark.parametrize("M, K, N", SHAPES + EMPTY)
def test_both_multiply_within_the_budget(M, K, N, layout):
    """`cut`: views of wider matrices, as a chunk of the workspace is one."""
    generator = torch.Generator().manual_seed(M + K + N)

    def matrix(rows, columns):
        if layout == "columns":
            return torch.randn(columns, rows, generator=generator).T
        return torch.randn(rows, columns + 8 * (layout == "cut"), generator=generator)[:, :columns]

    a, b, total = matrix(M, K), matrix(K, N), matrix(M, N)
    exact = a.double() @ b.double()
    for terms in (0, TERMS, ALL):
        out, added = torch.full_like(total, float("nan")), total.clone()
        mm(out, a, b, terms)
        add_mm(added, a, b, terms)
        slack = 2 if terms == ALL else 1  # of more terms than TERMS
        assert not out.numel() or budget_share(out, a @ b, exact, torch.float32) <= slack
        assert not out.numel() or budget_share(added, total + a @ b, total + exact, torch.float32) <= slack


def test_copies_are_small(monkeypatch):
    monkeypatch.setattr(products, "PART", 1 << 14)
    monkeypatch.setattr(products, "TILE", 64)

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and not found._is_view() and all(found is not x for x in args):
                self.size = max(self.size, found.numel())
            return found

    x, y, w = torch.randn(64, 32), torch.randn(4000, 32), torch.randn(64, 4000)
    for out, a, b in ((x, w, y), (y, w.T, x)):  # dx, dy
        with Largest() as largest:
            add_mm(out.clone(), a, b, TERMS)
            assert 0 < largest.size <= 4000 * 32  # `out.clone()`, and no copy of `w`


@pytest.mark.parametrize("loss", ["info_nce", "clip", "sup_con", "gist_embed"])
@pytest.mark.parametrize("setting", ["mkl", "onednn"])
def test_losses_within_the_budget(setting, loss, monkeypatch):
    """D is longer than what oneDNN adds up at a time, and a workspace has two chunks."""
    monkeypatch.setenv("FUSEDLOSS_CPU_PRODUCTS", setting)
    calls = counted(monkeypatch, "_by_onednn")
    query, key = inputs("random", 130, 130, 700)
    guide = inputs("random", 130, 130, 24)

    def run(q, k, backend="chunked"):
        options = {"workspace_bytes": 1 << 16, "backend": backend}
        if loss == "sup_con":
            return fusedloss.sup_con(q + k, torch.arange(130) // 3, **options)
        if loss == "clip":
            return fusedloss.clip(q, k, 20.0, **options)
        more = {"guide": tuple(x.to(q.dtype) for x in guide)} if loss == "gist_embed" else {"normalize": True}
        return getattr(fusedloss, loss)(q, k, temperature=0.05, **more, **options)

    found = value_and_gradients(run, [query, key])
    eager = value_and_gradients(lambda q, k: run(q, k, "reference"), [query, key])
    exact = value_and_gradients(lambda q, k: run(q, k, "reference"), [query.double(), key.double()])
    for out, other, oracle in zip(found, eager, exact, strict=True):
        assert budget_share(out, other, oracle, torch.float32) <= 1
    assert bool(calls) == (setting == "onednn")
    again = value_and_gradients(run, [query, key])
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_similarities_are_by_onednn_unless_mkl_is_named(dtype, monkeypatch):
    assert chosen(4, 4, 8, dtype, CPU) == Chosen(sim=ALL)
    monkeypatch.setenv("FUSEDLOSS_CPU_PRODUCTS", "mkl")
    assert chosen(4, 4, 8, dtype, CPU) == TORCH


def test_a_wrong_name_is_an_error_that_names_the_variable(monkeypatch):
    monkeypatch.setenv("FUSEDLOSS_CPU_PRODUCTS", "blas")
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="FUSEDLOSS_CPU_PRODUCTS must be auto, mkl, onednn, got 'blas'; set one, or"):
        fusedloss.info_nce(x, x, backend="chunked")
    monkeypatch.setenv("FUSEDLOSS_CPU_PRODUCTS", " OneDNN ")
    assert chosen(4, 4, 3, torch.float32, CPU) == Chosen(TERMS, TERMS, TERMS)
    assert chosen(4, 4, 3, torch.float64, CPU) == chosen(4, 4, 3, torch.float32, torch.device("meta")) == TORCH


LACKING = {
    "not built": lambda patch: patch.setattr(torch.backends.mkldnn, "is_available", lambda: False),
    "turned off": lambda patch: patch.setattr(torch._C, "_get_mkldnn_enabled", lambda: False),
    "torch's precision": lambda patch: torch.set_float32_matmul_precision("medium"),
    "oneDNN's precision": lambda patch: patch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16"),
    "no operator": lambda patch: patch.setattr(products, "torch", WithoutOperator()),
}


class WithoutOperator:
    """torch, whose oneDNN has lost the operator."""

    class ops:
        mkldnn = object()

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.mark.parametrize("lacking", LACKING)
def test_torch_multiplies_where_onednn_may_not(lacking, monkeypatch):
    monkeypatch.setenv("FUSEDLOSS_CPU_PRODUCTS", "onednn")
    calls, x, before = counted(monkeypatch, "_by_onednn"), torch.randn(9, 4), torch.get_float32_matmul_precision()
    fusedloss.info_nce(x, x.flip(0), backend="chunked")
    assert calls
    calls.clear()
    try:
        LACKING[lacking](monkeypatch)
        for dtype in (torch.float32, torch.bfloat16):
            assert chosen(*SIZES, dtype, CPU) == TORCH
        assert bool(fusedloss.info_nce(x, x.flip(0), backend="chunked").isfinite()) and not calls
    finally:
        torch.set_float32_matmul_precision(before)


# auto -----------------------------------------------------------------------------------------------------------------


def test_auto_tries_once_a_class_and_only_for_long_steps(monkeypatch):
    tried = []

    def trial(name, rows, dim):
        tried.append((name, rows, dim))
        return name != "dx"

    monkeypatch.setattr(products, "_trial", trial)
    found = Chosen(sim=TERMS, dy=TERMS)
    assert chosen(4096, 4096, 900, torch.float32, CPU) == TORCH and not tried
    for _ in range(2):
        assert chosen(*SIZES, torch.float32, CPU) == found
    assert tried == [(name, 1024, 1000) for name in ("sim", "dx", "dy")]
    assert chosen(4096, 4096, 900, torch.float32, CPU) == TORCH  # as before the trial
    assert chosen(5000, 4095, 1000, torch.float32, CPU) == found and len(tried) == 3
    assert chosen(1 << 16, 1 << 16, 1000, torch.float32, CPU) == found and tried[3:] == [
        (name, 256, 1000) for name in ("sim", "dx", "dy")
    ]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert chosen(*SIZES, torch.float32, CPU) == TORCH  # the same step is shorter
    assert chosen(8192, 4096, 1000, torch.float32, CPU) == found and len(tried) == 9


@pytest.mark.parametrize(
    "rounds, faster",
    [([9, 0.5, 0.5], True), ([0.5, 0.95, 0.5], False), ([0.5, 0.5, 2.0], False)],
    ids=["twice", "not enough", "once"],
)
@pytest.mark.parametrize("name", Chosen._fields)
def test_the_faster_one_is_taken(name, rounds, faster, monkeypatch):
    """By a clock that a product moves on: 1 by torch.mm. The first round, with what is fresh, does not count."""
    now, onednn = [0.0], iter(rounds)
    monkeypatch.setattr(products.time, "thread_time", lambda: now[0])
    for step in ("mm", "add_mm"):
        function = getattr(products, step)

        def timed(out, a, b, terms, function=function):
            function(out, a, b, terms)
            now[0] += next(onednn) if terms else 1

        monkeypatch.setattr(products, step, timed)
    assert products._trial(name, 64, 16) is faster


def test_a_trial_moves_neither_random_numbers_nor_defaults(monkeypatch):
    state = torch.get_rng_state()
    monkeypatch.setattr(products, "LONG", 1)
    torch.set_default_dtype(torch.float64)
    try:
        chosen(64, 64, 16, torch.float32, CPU)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(products._faster) == 3 and torch.equal(torch.get_rng_state(), state)
