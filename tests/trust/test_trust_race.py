"""The race of what is proved, at small points of a CPU: Triton in its interpreter, csrc/ on the host's build."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from fusedloss import UnsupportedError, backends
from fusedloss.bench import measure
from fusedloss.cli import verify
from fusedloss.proof import child, race
from fusedloss.trust import ask, families, order, verdicts

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend, precision", [("triton", "fp32"), ("triton", "fp16"), ("cuda", "bf16")])
def test_entries_are_of_every_kind_and_point(backend, precision):
    if reason := backends.BACKENDS[backend].why_not_on(race.cases.DTYPES[precision], CPU):
        pytest.skip(reason)
    points = [(20, 20, 8), (33, 33, 5)] if backend == "cuda" else [(20, 20, 8)]
    asked = race.ALL_KINDS if precision == "fp16" else race.ALL_KINDS[1::2]
    found = list(race.race(CPU, [backend], precision, points, asked, rounds=1))
    kinds = [kind for kind in asked if precision != "fp16" or not kind.endswith("bounded")]
    at = [(order.rows_of(entry), entry["N"], entry["D"], entry["kind"]) for entry in found]
    assert at == [(*point, kind) for point in points for kind in kinds]
    for entry in found:
        assert order.is_entry(entry) and entry == json.loads(json.dumps(entry))
        assert (entry["capability"], entry["dtype"]) == ([], precision)
        assert set(entry["seconds"]) == {backend, "chunked", "reference"}
        assert entry["backend"] == min(entry["seconds"], key=entry["seconds"].get)


def test_rows_and_columns_may_differ():
    points = [(16, 16, 4), (40, 16, 4), (16, 40, 4)]
    found = list(race.race(CPU, [], "fp32", points, ("one direction",), rounds=1))
    assert [order.size_of(entry) for entry in found] == ["16 x 16 x 4", "40 x 16 x 4", "16 x 40 x 4"]
    assert ["M" in entry for entry in found] == [False, True, True] and all(map(order.is_entry, found))


def test_a_backend_that_raises_has_no_time(monkeypatch):
    step = race._step

    def one_fails(kind, name, query, key):
        def fails():
            raise (UnsupportedError("none") if kind.startswith("one") else torch.OutOfMemoryError("CUDA out of memory"))

        return fails if name == "triton" else step(kind, name, query, key)

    monkeypatch.setattr(race, "_step", one_fails)
    freed = []
    monkeypatch.setattr(measure, "free_memory", lambda: freed.append(1))
    found = list(race.race(CPU, ["triton"], "fp32", [(16, 16, 4)], ("one direction", "both directions"), rounds=1))
    assert [set(entry["seconds"]) for entry in found] == 2 * [{"chunked", "reference"}]
    assert len(freed) == 2
    monkeypatch.setattr(race, "_materialises", lambda device, M, N: False)
    assert list(race.race(CPU, ["triton"], "fp32", [(16, 16, 4)], rounds=1)) == []  # of one alone nothing is learnt


def test_each_step_is_what_auto_would_ask_for(monkeypatch):
    """The problem of each kind is of that kind, and goes to the backend that is timed."""
    asked = []
    for name in ("chunked", "reference"):
        module = backends.BACKENDS[name]
        why_not = lambda problem, name=name: asked.append((name, order.kind(problem), problem.symmetric))
        monkeypatch.setattr(module, "why_not", why_not)
    for kind in race.ALL_KINDS:
        asked.clear()
        list(race.race(CPU, [], "bf16", [(16, 16, 4)], (kind,), rounds=1))
        assert set(asked) == {(name, kind, kind.startswith("both")) for name in ("chunked", "reference")}


def test_the_switch_of_products_is_that_of_the_precision(monkeypatch):
    before = torch.backends.cuda.matmul.fp32_precision
    seen = set()
    step = race._step
    monkeypatch.setattr(
        race, "_step", lambda *a: seen.add(torch.backends.cuda.matmul.fp32_precision == "tf32") or step(*a)
    )
    for precision, tf32 in (("tf32", True), ("fp32", False)):
        seen.clear()
        list(race.race(CPU, [], precision, [(16, 16, 4)], rounds=1))
        assert seen == {tf32}
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_sizes_around_one():
    """The nearest first."""
    assert race.around(8192, 8192, 768) == [(8192, 8192, 768), (2048, 2048, 768), (32768, 32768, 768)]
    assert race.around(4096, 65536, 128) == [(4096, 65536, 128), (1024, 16384, 128), (16384, 262144, 128)]
    # what counts for all beyond is no warm-up of 32 rows
    assert race.around(32, 32, 768) == [(32, 32, 768), (724, 724, 768), (16384, 16384, 768)]
    assert race.around(2048, 2048, 768) == [(1024, 1024, 768), (4096, 4096, 768), (16384, 16384, 768)]
    # a step of four times that would take long, and the call's own is within a rounding
    (M, N, D), *_ = race.around(65536, 65536, 768)
    assert M == N and D == 768 and 65536 < M < 4 * 65536 and M * N * D <= 1.001 * race.MOST
    assert max(race.around(1 << 20, 1 << 20, 1024))[0] == 1 << 16
    assert race.around(1, 1, 8)[0] == (1, 1, 8)
    for M, N, D in [(1 << 24, 4, 64), (3, 1 << 23, 4096), (1, 1, 1), (1 << 22, 1 << 22, 4096)]:
        points = race.around(M, N, D)
        assert len(points) == 3 and all(min(point) > 0 and point[2] == D for point in points)
        assert max((m + n) * d for m, n, d in points) <= 1.001 * race.ROOM or (M + N) * D > race.ROOM


def test_sizes_of_verify():
    assert len(race.VERIFIED) == 20 and {D for *_, D in race.VERIFIED} == {128, 384, 768, 1024, 4096}


def test_steps_run_one_after_another(monkeypatch):
    """So that a machine that slows down does so for all."""
    ran = []
    monkeypatch.setattr(measure, "seconds", lambda call, repeats=1: ran.append(call) or 1e-3)
    list(race.race(CPU, [], "fp32", [(16, 16, 4)], ("one direction",), rounds=2))
    first, second = ran[:2]
    assert ran == [first, second, first, second, second, first]


# In a child, and kept -------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", str(tmp_path / "kept"))
    ask.forget()
    yield lambda: verdicts.read(CPU).races
    ask.forget()


def test_the_child_says_each_entry_as_it_comes():
    said = []
    say = lambda kind, **fields: said.append((kind, fields))
    child.race(CPU, {"fp32": [], "bf16": []}, say, [(16, 16, 4)])
    entries = [fields["entry"] for kind, fields in said if kind == "entry"]
    assert [entry["kind"] for entry in entries] == 2 * list(race.ALL_KINDS) and all(map(order.is_entry, entries))


@pytest.mark.parametrize("states", [["proved", "proved"], ["failed", "proved"], ["proved", "failed"], ["unknown"]])
def test_the_child_races_only_where_all_is_proved(states, monkeypatch):
    def proves(*asked):
        state = states[len(tried)]
        tried.append(state)
        if state == "unknown":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return state, 1, 0.1, 0.5, ""

    tried = []
    monkeypatch.setattr(child.cases, "prove", proves)
    names = [verdicts.name_of("triton", family, "fp32") for family in ("rows", "stats")][: len(states)]
    assert child.prove(CPU, names, lambda kind, **fields: None) is (states == ["proved", "proved"])
    assert tried == states and child.prove(CPU, [], lambda kind, **fields: None)


ENTRY = {"capability": [], "dtype": "fp32", "kind": "one direction", "N": 64, "D": 8}
ENTRY |= {"backend": "triton", "seconds": {"triton": 1e-3, "chunked": 2e-3}}


def plant(monkeypatch, *lines, then="0"):
    """A child that says these."""
    script = f"import json, sys; [print(json.dumps(line), flush=True) for line in {list(lines)!r}]; {then}"
    monkeypatch.setattr(ask, "COMMAND", [sys.executable, "-S", "-E", "-c", script])


def prove(*except_for):
    names = [verdicts.name_of("triton", family, "fp32") for family in verify.RACED if family not in except_for]
    ask.learn(CPU, {name: verdicts.Verdict(verdicts.PROVED, 1) for name in names})


def test_what_is_proved_is_raced_once_and_kept(kept, monkeypatch):
    ticks = []
    prove("grad")
    assert (
        verify.raced(CPU, [(64, 64, 8)], False, ticks.append) == "" and kept() == []
    )  # a part of the sweep is unknown
    prove()
    plant(monkeypatch, {"kind": "alive"}, {"kind": "entry", "entry": ENTRY})
    assert verify.raced(CPU, [(64, 64, 8)], False, ticks.append) == ""
    assert kept() == [ENTRY] and ticks == ["cpu fp32, one direction, 64 x 64 x 8: triton"]
    assert order.is_entry(kept()[0]) and set(ask.known(CPU)) and verdicts.read(CPU).verdicts  # beside the verdicts

    plant(monkeypatch, {"kind": "entry", "entry": ENTRY | {"N": 128}})
    assert verify.raced(CPU, [(64, 64, 8)], False, ticks.append) == "" and kept() == [ENTRY]
    assert verify.raced(CPU, [(64, 64, 8)], True, ticks.append) == "" and kept() == [ENTRY, ENTRY | {"N": 128}]


def test_what_a_first_use_timed_does_not_stand_for_all_points(kept, monkeypatch):
    prove()
    order.learn(CPU, ENTRY | {"N": 1024})
    points = [(16, 16, 8), (64, 64, 8), (256, 256, 8), (1024, 1024, 8)]
    plant(monkeypatch, *({"kind": "entry", "entry": ENTRY | {"N": N}} for N in (16, 64)))
    assert verify.raced(CPU, points, False, lambda text: None) == "" and len(kept()) == 3
    plant(monkeypatch, {"kind": "entry", "entry": ENTRY | {"N": 256}})
    assert verify.raced(CPU, points, False, lambda text: None) == "" and len(kept()) == 3  # one did not run there


def test_what_was_raced_before_the_child_died_is_kept(kept, monkeypatch):
    prove()
    plant(monkeypatch, {"kind": "entry", "entry": ENTRY}, then="sys.exit('lost')")
    assert verify.raced(CPU, [(64, 64, 8)], False, lambda text: None) == "cpu: the race ended early: exit code 1, lost"
    assert kept() == [ENTRY]
    monkeypatch.setattr(ask, "COMMAND", ["/nonexistent"])
    assert "no child process could be started" in verify.raced(CPU, [(64, 64, 8)], True, lambda text: None)


def test_a_sweep_of_the_race_is_of_families_that_are_known():
    every = {family for backend in families.BACKENDS for family in families.of_backend(backend)}
    assert set(verify.RACED) <= every
