"""In which order `auto` takes what is proved: by what was timed at the nearest point, here or on the author's GPU."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist

import fusedloss
from fusedloss import backends
from fusedloss.backends import select, select_rowwise
from fusedloss.core import checks
from fusedloss.core.problem import Block, Fold, Problem
from fusedloss.trust import families, order, verdicts

BOTH = ("cuda", "triton", "chunked", "reference")
CPU = torch.device("cpu")


def point(N, D, *fastest, kind="one direction", dtype="fp32", capability=(9, 0)):
    """The names, the fastest first."""
    seconds = {name: 1e-3 * place for place, name in enumerate(fastest, 1)}
    place = {"capability": [*capability], "dtype": dtype, "kind": kind, "N": N, "D": D}
    return {**place, "backend": fastest[0], "seconds": seconds}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A device on which `auto` has both, both run and all is proved; what ships of races, and what was raced there."""

    def raced(*table, own=(), names=BOTH):
        monkeypatch.setattr(order, "_shipped", lambda: list(table))
        monkeypatch.setattr(order, "capability", lambda device: [9, 0])
        monkeypatch.setitem(backends.AUTO, "cpu", names)
        for module in (backends.cuda, backends.triton):
            monkeypatch.setattr(module, "why_not", lambda problem: None)
        monkeypatch.setattr(backends.ask, "admits", lambda *asked: True)
        monkeypatch.delenv("FUSEDLOSS_BACKEND", raising=False)
        monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", str(tmp_path / "kept"))
        assert verdicts.keep(CPU, {}, list(own)) == ""
        order.forget()

    yield raced
    order.forget()


def problem(N, D, dtype=torch.float32, **options):
    x, rows = torch.empty(0, dtype=dtype).new_empty(1).expand(N, D), torch.empty(1).expand(N)
    return Problem((x, x), (Block(0, 1),), torch.ones(()), rows, rows, **options)


def test_the_table_that_ships_is_of_entries():
    for entry in order._shipped():
        assert order.is_entry(entry) and entry["backend"] == min(entry["seconds"], key=entry["seconds"].get)
        assert entry["kind"] in (*order.KINDS[0], *order.KINDS[1])


def test_the_nearest_point_by_ratio_decides(measured):
    measured(
        point(4096, 768, "triton", "cuda"), point(65536, 768, "cuda", "triton"), point(65536, 4096, "triton", "cuda")
    )
    picks = {size: select(problem(*size), "auto") for size in [(0, 8), (4096, 768), (16000, 768), (17000, 768)]}
    assert picks == {(0, 8): "triton", (4096, 768): "triton", (16000, 768): "triton", (17000, 768): "cuda"}
    assert select(problem(1 << 20, 1700), "auto") == "cuda" and select(problem(1 << 20, 1800), "auto") == "triton"


def test_points_are_of_the_same_device_precision_and_kind(measured, monkeypatch):
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
    monkeypatch.setattr(families, "tf32", lambda: True)
    assert select(problem(4096, 768, symmetric=True), "auto") == "cuda"  # tf32 was not raced
    measured(point(4096, 768, "triton", dtype="tf32"), point(4096, 768, "chunked", dtype="fp32"))
    assert select(problem(4096, 768), "auto") == "triton"
    monkeypatch.setattr(families, "tf32", lambda: False)
    assert select(problem(4096, 768), "auto") == "chunked"


def test_rows_count_as_much_as_columns(measured):
    square, wide = point(4096, 768, "triton"), point(65536, 768, "chunked") | {"M": 128}
    measured(square, wide)
    x, y = (torch.empty(1).expand(rows, 768) for rows in (128, 65536))
    row = torch.empty(1).expand(128)
    turned = torch.empty(1).expand(65536)
    assert select(Problem((x, y), (Block(0, 1),), torch.ones(()), row, row), "auto") == "chunked"
    assert select(Problem((y, x), (Block(0, 1),), torch.ones(()), turned, turned), "auto") == "triton"
    assert select(problem(65536, 768), "auto") == "triton"  # a factor of 16 away, and of 512 in rows alone
    assert not order.is_entry(wide | {"M": 0}) and not order.is_entry(wide | {"M": "256"})
    assert order.merged([square, wide], [wide | {"M": 512}]) == [square, wide, wide | {"M": 512}]


def test_the_families_of_a_kind_are_those_of_its_problem():
    for kinds, symmetric in zip(order.KINDS, (False, True), strict=True):
        for kind, options in zip(kinds, ({}, {"cosine": True, "scale_bound": 20.0}), strict=True):
            for dtype, precision in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")):
                asked = problem(64, 8, dtype, symmetric=symmetric, **options)
                if precision != "fp16":
                    assert order.raced_as(asked) == (kind, 64, 64, 8)
                for backend in families.BACKENDS:
                    needed = order.needs(precision, kind)
                    assert needed == families.of_problem(asked)
                    assert set(needed) <= set(families.of_backend(backend, precision))


def test_what_was_raced_here_comes_before_what_ships(measured):
    shipped, own = point(4096, 768, "triton", "cuda"), point(65536, 64, "chunked", "triton", "cuda")
    measured(shipped, own=[own])
    assert select(problem(4096, 768), "auto") == "chunked"  # however far
    assert select(problem(4096, 768, torch.bfloat16), "auto") == "cuda"  # of which nothing was
    measured(shipped, own=[point(4096, 768, "chunked", dtype="bf16")])
    assert select(problem(4096, 768), "auto") == "triton"


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {},
        point(64, 8, "triton") | {"seconds": {"triton": "1"}},
        point(64, 8, "triton") | {"seconds": {"triton": -1.0}},
        point(64, 8, "triton") | {"N": 0},
        point(64, 8, "triton") | {"D": "8"},
        {name: value for name, value in point(64, 8, "triton").items() if name != "seconds"},
    ],
)
def test_what_is_no_entry_is_left_out(measured, entry):
    measured(own=[entry, point(64, 8, "chunked")])
    assert order.raced(CPU) == [point(64, 8, "chunked")]
    assert select(problem(64, 8), "auto") == "chunked"


def test_what_was_not_timed_comes_after_what_was(measured, monkeypatch):
    measured(point(64, 8, "triton", "chunked"))
    assert order.order(BOTH, problem(64, 8)) == ("triton", "chunked", "cuda", "reference")
    monkeypatch.setattr(backends.triton, "why_not", lambda problem: "broken")
    assert select(problem(64, 8), "auto") == "chunked"
    assert select(problem(64, 8), "cuda") == "cuda"
    monkeypatch.setattr(backends.ask, "admits", lambda backend, *asked: backend != "triton")
    measured(point(64, 8, "cuda", "triton", "chunked"), names=("triton", "chunked"))
    assert order.order(("triton", "chunked"), problem(64, 8)) == ("triton", "chunked")


def test_plain_torch_where_it_wins_and_fits(measured, monkeypatch):
    measured(point(64, 8, "reference", "triton", "chunked"))
    assert select(problem(64, 8), "auto") == "reference"
    fits = int((checks.WORKSPACE_BYTES["cpu"] / 4 / order.MATERIALISED) ** 0.5)
    assert select(problem(fits, 8), "auto") == "reference" and select(problem(fits + 1, 8), "auto") == "triton"
    assert select(problem(64, 8, workspace_bytes=64 * 64 * 4 * order.MATERIALISED - 1), "auto") == "triton"
    assert select(problem(64, 8, wants_tally=True), "auto") == "triton"  # which was not raced
    assert select(problem(64, 8), "auto", plain=False) == "triton"
    monkeypatch.setenv("FUSEDLOSS_WORKSPACE_BYTES", "1000")
    assert select(problem(64, 8), "auto") == "triton"


def test_across_ranks_plain_torch_is_not_taken(measured):
    """A ring has no form of it."""
    measured(*(point(4, 8, "reference", "chunked", kind=kind) for kind in ("one direction", "one direction, bounded")))
    query, key = torch.randn(4, 8), torch.randn(4, 8)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for strategy in ("ring", "gather"):
            found = fusedloss.info_nce(query, key, group="world", strategy=strategy)
            torch.testing.assert_close(found, fusedloss.info_nce(query, key, backend="reference"))
    finally:
        dist.destroy_process_group()


def test_without_times_the_order_is_autos(measured):
    for names in (BOTH, ("triton", "chunked", "cuda", "reference")):
        measured(names=names)
        assert select(problem(64, 8), "auto") == names[0]


def test_of_a_device_without_kernels_nothing_is_looked_for(measured, monkeypatch):
    measured(own=[point(64, 8, "reference")], names=("chunked", "reference"))
    monkeypatch.setattr(order, "order", None)
    assert select(problem(64, 8), "auto") == "chunked"


def test_a_point_is_looked_for_once(measured, monkeypatch):
    measured(point(64, 8, "triton"))
    assert select(problem(64, 8), "auto") == "triton"
    monkeypatch.setattr(order, "_nearest", None)
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


def test_an_entry_takes_the_place_of_that_at_the_same_point():
    old = [point(64, 8, "triton"), point(128, 8, "triton")]
    new = [point(64, 8, "cuda"), point(64, 8, "cuda", dtype="bf16")]
    assert order.merged(old, new) == [new[1], new[0], old[1]]
    assert json.loads(json.dumps(order.merged(old, new))) == order.merged(old, new)
