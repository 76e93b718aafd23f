"""Which of the two backends with kernels `auto` takes, by a table of what a GPU raced."""

from __future__ import annotations

import pytest
import torch

import fusedloss
from fusedloss import backends
from fusedloss.backends import fastest, select, select_rowwise
from fusedloss.problem import Block, Fold, Problem

BOTH = ("cuda", "triton", "chunked", "reference")


def point(N, D, backend, kind="one direction", dtype="fp32", capability=(9, 0)):
    return {"capability": [*capability], "dtype": dtype, "kind": kind, "N": N, "D": D, "backend": backend}


@pytest.fixture
def measured(monkeypatch):
    """A device on which `auto` has both, both run and all is proved, and what was raced there."""

    def raced(*table, names=BOTH):
        fastest._order.cache_clear()
        monkeypatch.setattr(fastest, "_table", lambda: list(table))
        monkeypatch.setattr(fastest, "_capability", lambda device: [9, 0])
        monkeypatch.setitem(backends.AUTO, "cpu", names)
        for module in (backends.cuda, backends.triton):
            monkeypatch.setattr(module, "why_not", lambda problem: None)
        monkeypatch.setattr(backends.ask, "admits", lambda *asked: True)
        monkeypatch.delenv("FUSEDLOSS_BACKEND", raising=False)

    yield raced
    fastest._order.cache_clear()


def problem(N, D, dtype=torch.float32, **options):
    x, rows = torch.empty(0, dtype=dtype).new_empty(1).expand(N, D), torch.empty(1).expand(N)
    return Problem((x, x), (Block(0, 1),), torch.ones(()), rows, rows, **options)


def test_the_committed_table_is_of_points():
    for entry in fastest._table():
        assert set(entry) == {*point(1, 1, "cuda"), "ms", "other_ms"} and entry["ms"] <= entry["other_ms"]
        assert entry["backend"] in fastest.KERNELS and entry["kind"] in (*fastest.KINDS[0], *fastest.KINDS[1])


def test_the_nearest_point_by_ratio_decides(measured):
    measured(point(4096, 768, "triton"), point(65536, 768, "cuda"), point(65536, 4096, "triton"))
    picks = {size: select(problem(*size), "auto") for size in [(0, 8), (4096, 768), (16000, 768), (17000, 768)]}
    assert picks == {(0, 8): "triton", (4096, 768): "triton", (16000, 768): "triton", (17000, 768): "cuda"}
    assert select(problem(1 << 20, 1700), "auto") == "cuda" and select(problem(1 << 20, 1800), "auto") == "triton"


def test_points_are_of_the_same_device_dtype_and_kind(measured, monkeypatch):
    measured(
        point(4096, 768, "triton", capability=(8, 0)),
        point(4096, 768, "triton", dtype="bf16"),
        point(4096, 768, "triton", kind="both directions"),
        point(4096, 768, "triton", kind="one direction, bounded"),
    )
    bounded = {"cosine": True, "scale_bound": 20.0}
    assert select(problem(4096, 768), "auto") == "cuda"  # AUTO's own order
    assert select(problem(4096, 768, torch.bfloat16), "auto") == "triton"
    assert select(problem(4096, 768, symmetric=True), "auto") == "triton"
    assert select(problem(4096, 768, **bounded), "auto") == "triton"
    assert select(problem(4096, 768, symmetric=True, **bounded), "auto") == "cuda"
    assert select(problem(4096, 768, torch.bfloat16, fold=Fold("sigmoid")), "auto") == "cuda"
    monkeypatch.setattr(fastest, "tf32", lambda: True)
    assert select(problem(4096, 768, symmetric=True), "auto") == "cuda"  # tf32 was not raced


def test_an_empty_table_leaves_the_order_as_it_is(measured):
    for names in (BOTH, ("triton", "cuda", "chunked")):
        measured(names=names)
        assert select(problem(64, 8), "auto") == names[0]


def test_only_the_order_of_these_two_changes(measured, monkeypatch):
    measured(point(64, 8, "triton"), names=("reference", *BOTH))
    assert fastest.order(backends.AUTO["cpu"], problem(64, 8)) == ("reference", "triton", "cuda", *BOTH[2:])
    measured(point(64, 8, "triton"))
    assert select(problem(64, 8), "cuda") == "cuda"
    monkeypatch.setattr(backends.triton, "why_not", lambda problem: "broken")
    assert select(problem(64, 8), "auto") == "cuda"
    measured(point(64, 8, "triton"), names=("cuda", "chunked"))
    assert select(problem(64, 8), "auto") == "cuda"
    monkeypatch.setattr(backends.cuda, "why_not", lambda problem: "not built")
    assert select(problem(64, 8), "auto") == "chunked"


def test_a_point_is_looked_for_once(measured, monkeypatch):
    measured(point(64, 8, "triton"))
    assert select(problem(64, 8), "auto") == "triton"
    monkeypatch.setattr(fastest, "_faster", None)
    assert select(problem(64, 8), "auto") == "triton"


def test_while_compiling_the_order_is_auto_s_own(measured):
    """Sizes are symbols there."""
    measured(point(64, 8, "triton"), names=("chunked", "cuda", "triton"))
    query, key = torch.randn(64, 8), torch.randn(64, 8)
    compiled = torch.compile(lambda q, k: fusedloss.info_nce(q, k), fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(query, key), fusedloss.info_nce(query, key, backend="reference"))


def test_without_a_sweep_auto_goes_past_who_has_no_kernel(measured):
    measured()
    assert select_rowwise("auto", torch.ones(2, device="meta"), "pairs") == "chunked"
    assert select_rowwise("auto", torch.ones(2, dtype=torch.float64), "pairs") == "chunked"
    assert select_rowwise("auto", torch.ones(2), "pairs", unsupported="too long") == "chunked"
