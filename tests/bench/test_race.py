"""The race: peers against fp64, racers that fail, the time budget, resuming, and what is written."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path

import patience
import pytest
import torch

from fusedloss import testing
from fusedloss.backends import BACKENDS
from fusedloss.bench import measure, peers, results
from fusedloss.bench import race as bench
from fusedloss.bench.peers import PEERS, Peer, Point

pytestmark = pytest.mark.processes

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ON_A_CPU = [name for name, peer in PEERS.items() if peer.module in ("", "sentence_transformers")]


def script(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


race = script("race")


def quiet(*arguments):
    pass


def raced(point, only, **options):
    rows = bench.race(point, 2, only, False, quiet, [], **options)
    return {row["racer"]: row for row in rows}


@pytest.fixture
def stand_in(monkeypatch):
    """Registers a peer for one test: `loss` of (query, key), or the reason why there is none."""

    def register(name, loss, **about):
        monkeypatch.setitem(PEERS, name, Peer(name, lambda point: loss, **about))

    return register


# The oracle and the peers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss, cosine", [("info_nce", False), ("info_nce", True), ("clip", False), ("clip", True)])
def test_the_oracle_agrees_with_the_reference(loss, cosine):
    query, key = testing.inputs("clustered", 50, 50, 12)
    query, key = 1.3 * query, 0.7 * key
    rows = torch.tensor([3, 0, 49])
    point = Point(loss, 50, 12)
    ours = bench.fused(point, "reference", **({"normalize": True} if cosine else {}))
    value, *wanted = testing.value_and_gradients(ours, [query.double(), key.double()])
    found = testing.exact_gradients(loss, query, key, point.scale, rows, cosine=cosine)
    torch.testing.assert_close(found, [value, wanted[0][rows], wanted[1][rows]], rtol=1e-9, atol=1e-12)


def test_the_oracle_of_siglip_is_its_formula():
    query, key = (x.double() for x in testing.inputs("random", 40, 40, 8))

    def siglip(q, k):
        return -torch.nn.functional.logsigmoid((2 * torch.eye(40) - 1) * (20 * q @ k.T - 10)).sum() / 40

    value, *wanted = testing.value_and_gradients(siglip, [query, key])
    found = testing.exact_gradients("siglip", query, key, 20.0, torch.arange(40), bias=-10.0)
    torch.testing.assert_close(found, [value, *wanted], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", ["info_nce", "clip", "multiple_negatives_ranking"])
@pytest.mark.parametrize("name", ON_A_CPU)
def test_peers_compute_the_loss_and_its_gradients(name, loss, monkeypatch):
    peer = PEERS[name]
    if peer.module:
        pytest.importorskip(peer.module)
    monkeypatch.setitem(peers.CHUNK_ROWS, "cpu", 32)  # several chunks
    point = Point(loss, 100, 16, kind="clustered")
    run = peer.enter(point)
    if isinstance(run, str):
        assert run == f"has no {loss}" or "2.13" in run
        return
    query, key = point.inputs()
    found = bench.forward_backward(run)(query, key)
    cosine = loss == "multiple_negatives_ranking"
    kind = "info_nce" if cosine else loss
    wanted = testing.exact_gradients(kind, query, key, point.scale, torch.arange(100), cosine=cosine)
    assert bench.gradient_error(found, wanted) < 1e-5
    assert found[0].item() == pytest.approx(wanted[0].item(), rel=1e-5)
    with torch.no_grad():
        assert run(query, key).item() == pytest.approx(wanted[0].item(), rel=1e-5)


def test_every_peer_says_why_it_does_not_run():
    rows = raced(Point(n=64, d=8), set(PEERS) - {"torch.compile"}, excluded={"memeff": "failed: it crashed"})
    assert set(rows) == {"floor", "better floor", *PEERS} - {"torch.compile"}
    assert all("seconds" in row or row["note"].startswith(("not run: ", "failed: ")) for row in rows.values())
    assert rows["memeff"]["note"] == "failed: it crashed"
    assert rows["Liger"]["note"].startswith(("not run: needs CUDA", "not run: liger-kernel is not installed"))


def test_every_peer_says_what_it_calls():
    assert all(peer.build.__doc__ or "_" in peer.build.__name__ for peer in PEERS.values())
    assert {"eager", "torch.compile", "checkpointed chunks", "F.linear_cross_entropy"} < set(PEERS)
    assert {"Inf-CL", "memeff", "cut-cross-entropy", "Liger", "siglip-kernel", "quack"} < set(PEERS)


# Racers that fail -----------------------------------------------------------------------------------------------------


def test_out_of_memory_a_crash_and_a_wrong_gradient_are_shown(stand_in):
    def out_of_memory(query, key):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def crash(query, key):
        raise RuntimeError("unspecified launch failure\nmore")

    def wrong(query, key):
        return 1.02 * testing.eager_info_nce(query, key)

    stand_in("hungry", out_of_memory)
    stand_in("crashing", crash)
    stand_in("wrong", wrong)
    stand_in("other", testing.eager_info_nce, caveat="another loss")
    stand_in("absent", "needs a license")
    rows = raced(Point(n=64, d=8), {"fusedloss", "hungry", "crashing", "wrong", "other", "absent"})
    assert rows["hungry"]["note"] == "OOM" and "seconds" not in rows["hungry"]
    assert rows["crashing"]["note"] == "failed: RuntimeError: unspecified launch failure"
    assert rows["wrong"]["note"] == "not ranked: gradient error above 0.01" and not rows["wrong"]["ranked"]
    assert rows["wrong"]["gradient_error"] == pytest.approx(0.02, rel=1e-3) and rows["wrong"]["seconds"] > 0
    assert rows["other"]["note"] == "not ranked: another loss" and rows["other"]["gradient_error"] < 1e-5
    assert rows["absent"]["note"] == "not run: needs a license"
    assert rows["fusedloss"]["ranked"] and "note" not in rows["fusedloss"]


def test_a_racer_that_fails_in_a_later_round_leaves_the_race(stand_in):
    calls = itertools.count()

    def tires(query, key):
        if next(calls) == 3:
            raise RuntimeError("tired")
        return testing.eager_info_nce(query, key)

    stand_in("tires", tires)
    rows = raced(Point(n=64, d=8), {"fusedloss", "tires"})
    assert rows["tires"]["note"] == "failed: RuntimeError: tired" and "ranked" not in rows["tires"]
    assert rows["fusedloss"]["rounds"] == 2 and rows["fusedloss"]["ranked"]


def on_a_gpu(monkeypatch, *names):
    """A CPU stands in for a device on which these backends run."""
    monkeypatch.setattr(Point, "device_type", "cuda")
    for name in ("cuda", "triton"):
        reason = None if name in names else "not built"
        monkeypatch.setattr(BACKENDS[name], "why_not", lambda problem, reason=reason: reason)


def test_both_kernel_backends_race_on_a_gpu(monkeypatch):
    monkeypatch.delenv("FUSEDLOSS_BACKEND", raising=False)
    on_a_gpu(monkeypatch, "cuda", "triton")
    own = {"fusedloss", bench.NORMALIZED, bench.GRAPHED}
    cuda, triton = ({f"fusedloss:{name}", f"fusedloss:{name}, normalize=True"} for name in ("cuda", "triton"))
    point = Point("clip", n=64, d=8)
    assert set(bench.entered(point, None, own=True)) == own | cuda | triton
    assert own | cuda | triton | {"eager"} < set(bench.entered(point, None))
    monkeypatch.setenv("FUSEDLOSS_BACKEND", "triton")  # as `make gpu` does: it is raced once
    found = bench.entered(point, None, {"fusedloss:cuda": "failed: it crashed"}, own=True)
    assert set(found) == own | cuda and found["fusedloss:cuda"].why_not == "failed: it crashed"
    assert {name: (racer.backend, racer.sweep) for name, racer in found.items()} == {
        "fusedloss": ("triton", "both directions"),
        bench.NORMALIZED: ("triton", "both directions, bounded"),
        bench.GRAPHED: ("triton", None),
        "fusedloss:cuda": ("cuda", "both directions"),
        "fusedloss:cuda, normalize=True": ("cuda", "both directions, bounded"),
    }
    assert bench.entered(replace(point, temperature=0.01), None, own=True)[bench.NORMALIZED].sweep == "both directions"
    assert set(bench.entered(point, {"fusedloss:triton", "eager"}, own=True)) == {"fusedloss:triton"}


def test_a_kernel_backend_that_cannot_run_says_why_on_a_gpu(monkeypatch):
    on_a_gpu(monkeypatch, "triton")
    assert bench.entered(Point(n=64, d=8), None)["fusedloss:cuda"].why_not == "not built"
    monkeypatch.undo()
    assert not any(name.startswith(("fusedloss:cuda", "fusedloss:triton")) for name in bench.entered(Point(), None))


def test_a_row_names_the_backend_that_auto_picks_at_its_size(monkeypatch):
    from fusedloss import backends
    from fusedloss.trust import order

    where = {"capability": [9, 0], "dtype": "fp32", "kind": "one direction, bounded", "D": 8}
    winners = ((64, "triton"), (4096, "cuda"))
    table = [{**where, "N": n, "backend": name, "seconds": {name: 1e-3}} for n, name in winners]
    on_a_gpu(monkeypatch, "cuda", "triton")
    monkeypatch.setattr(order, "_shipped", lambda: table)
    monkeypatch.setattr(order, "capability", lambda device: [9, 0])
    monkeypatch.setitem(backends.AUTO, "cpu", ("cuda", "triton"))
    monkeypatch.setattr(backends.ask, "admits", lambda *asked: True)
    monkeypatch.setattr(backends.dense, "MOST", {})
    order.forget()
    picks = {n: bench.racers(Point(n=n, d=8), bench.OWN)[bench.NORMALIZED].backend for n in (64, 8192)}
    order.forget()
    assert picks == {64: "triton", 8192: "cuda"}


def test_a_lost_device_ends_the_race_with_the_reason(monkeypatch, stand_in):
    def crash(query, key):
        raise RuntimeError("an illegal memory access was encountered")

    def lost():
        raise measure.DeviceLost("an illegal memory access was encountered")

    stand_in("crashing", crash)
    monkeypatch.setattr(measure, "free_memory", lost)
    rows = []
    with pytest.raises(measure.DeviceLost):
        bench.race(Point(n=64, d=8), 1, {"crashing"}, False, quiet, rows)
    assert "illegal memory access" in rows[-1]["note"]


def test_what_a_gpu_does_otherwise(monkeypatch):
    """Memory is the second run's, in this process; short steps are repeated. A CPU stands in for the device."""
    monkeypatch.setattr(Point, "device_type", "cuda")
    monkeypatch.setattr(measure, "isolated", None)
    monkeypatch.setattr(measure, "seconds", lambda call, repeats=1: (call(), bench.SAMPLE_SECONDS / 10)[1])
    repeated = {}
    whole = measure.samples_interleaved

    def samples(calls, rounds, **options):
        repeated.update(options["repeats"])
        return whole(calls, rounds, **options)

    monkeypatch.setattr(measure, "samples_interleaved", samples)
    rows = {r["racer"]: r for r in bench.race(Point(n=64, d=8), 2, {"fusedloss", "eager"}, True, quiet, [])}
    assert all(isinstance(rows[name]["memory_bytes"], int) and rows[name]["ranked"] for name in ("fusedloss", "eager"))
    assert set(repeated) >= {"floor", "fusedloss", "fusedloss forward"} and set(repeated.values()) == {10}
    assert bench.fits(Point(n=1 << 20), "eager")  # a GPU says OOM by itself


def test_after_the_deadline_nothing_begins():
    rows = raced(Point(n=64, d=8), {"fusedloss", "eager"}, until=0.0)
    assert [row.get("note") for row in rows.values()] == [None, None, bench.OUT_OF_TIME, bench.OUT_OF_TIME]
    assert rows["floor"]["rounds"] == 1


def test_a_slow_call_runs_fewer_rounds_and_repeats_count_once(monkeypatch):
    now = itertools.count()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(now)))  # a second a look
    told, ran = [], []
    calls = {"slow": lambda: ran.append("slow"), "quick": lambda: ran.append("quick")}
    for name, taken in measure.samples_interleaved(calls, 3, 0, repeats={"quick": 4}, limit=0.5, starting=told.append):
        assert taken == (0.25 if name == "quick" else 1.0)
    assert told == ["slow", "quick"] and ran == ["slow", *["quick"] * 4]


def test_a_peer_is_tried_in_a_process_of_its_own(monkeypatch):
    """On a CPU there is nothing to try; what a GPU would do, with a stand-in for the process."""
    assert bench.broken_peers("cpu", None, quiet) == {}

    def isolated(function, name, device, timeout):
        if name == "memeff":
            raise TimeoutError("did not return within 120 s")

    monkeypatch.setattr(measure, "isolated", isolated)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda module: object())
    found = bench.broken_peers("cuda", None, quiet)
    assert found == {"memeff": "failed: a tiny step beforehand: TimeoutError: did not return within 120 s"}


def test_isolated_gives_up():
    with pytest.raises(TimeoutError, match=r"sleep\(60,\) did not return within 1 s"):
        measure.isolated(__import__("time").sleep, 60, timeout=1.0)


# The grid and its time ------------------------------------------------------------------------------------------------


def test_the_grid_has_every_point():
    points = race.grid("cuda", "bf16")
    assert len(points) == len(set(points)) == 2 * 4 * 4 * 2 * 2
    assert {p.n for p in points} == {4096, 16384, 65536, 131072} and {p.d for p in points} == {384, 768, 1024, 4096}
    assert {round(p.scale, 9) for p in points} == {20, 100} and {p.kind for p in points} == {"random", "clustered"}
    assert {e.point for e in race.full(points)} == set(points)
    short = race.short(points)
    assert short[0].point == Point("info_nce", 65536, 768, "bf16", device="cuda") and short[0].field == "all"
    assert {e.point for e in short if e.field == "all"} == set(points)


def test_the_budget_is_obeyed():
    """Each step takes its share of a fake clock: no point begins that would end after the budget."""
    now, kept = [0.0], []

    def slow(entry):
        now[0] += entry.work / 1e12 + 5
        return [{"racer": "floor"}]

    entries = race.short(race.grid("cuda", "bf16"))
    left_out = race.run(entries, slow, lambda *about: kept.append(about), until=480.0, clock=lambda: now[0])
    assert now[0] <= 480.0 and left_out and len(kept) + len(left_out) == len(entries)
    assert [entry for entry, _, _ in kept][:2] == entries[:2]
    assert race.run(entries, slow, None, until=0.0, clock=lambda: now[0]) == entries


def test_whole_points_are_not_raced_again(tmp_path):
    entries = race.full(race.grid("cpu", "fp32"))[:3]
    store = race.Store(tmp_path, "race", [])
    rows = [{**asdict(e.point), "racer": "fusedloss", "seconds": 1.0, "samples": [1.0]} for e in entries]
    store.keep(entries[0], rows[:1], 1.0)
    store.keep(entries[1], [{**rows[1], "note": bench.OUT_OF_TIME}], 1.0)  # cut short: raced again

    again = race.Store(tmp_path, "race", [])
    assert "2 points" in again.resume()
    assert race.remaining(entries, again.done()) == entries[1:]
    assert race.remaining([entries[0]._replace(field="own")], again.done()) == []  # ours are among all
    again.keep(entries[1], rows[1:2], 1.0)
    again.finish([entries[2]])
    found = json.loads((tmp_path / "race.json").read_text())
    assert [row.get("note") for row in found["rows"]] == [None, None] and len(found["left_out"]) == 1
    assert (tmp_path / "race-info_nce.png").read_bytes().startswith(b"\x89PNG")

    found["environment"]["source"] = "other code"
    (tmp_path / "race.json").write_text(json.dumps(found))
    fresh = race.Store(tmp_path, "race", [])
    assert "other code" in fresh.resume() and fresh.done() == set()
    assert (tmp_path / "race.old.json").exists()


class Told:
    """A connection of a process that says what it is told to, then ends."""

    def __init__(self, *messages):
        self.messages, self.exitcode = list(messages), 9

    def send(self, job):
        self.job = job

    def poll(self, seconds):
        return bool(self.messages)

    def recv(self):
        message = self.messages.pop(0)
        if message is EOFError:
            raise EOFError
        return message

    def close(self):
        pass

    kill = join = close


def worker(told):
    made = race.Worker()
    made.process = made.connection = told
    return made


@pytest.mark.parametrize(
    "end, why",
    [
        ((EOFError,), "failed: ended its process with exit code 9"),
        ((), "failed: did not return within"),
        ((("failed", "DeviceLost: illegal", [{"racer": "memeff"}]),), "failed: DeviceLost: illegal"),
    ],
)
def test_who_ends_the_racing_process_is_left_out_of_the_next_try(end, why, monkeypatch):
    entry = race.Entry(Point(), "all")
    first = worker(Told(("doing", "info_nce N=4096, time: memeff", [{"racer": "memeff"}]), *end))
    with pytest.raises(race.Crash, match=why) as crash:
        first.race({}, float("inf"), quiet)
    assert first.process is None and crash.value.doing.endswith(": memeff")

    jobs = []

    class Once:
        def race(self, job, until, tick):
            jobs.append(job)
            if len(jobs) == 1:
                raise crash.value
            return [{"racer": "floor"}]

    options = {"rounds": 1, "limit": 1.0, "only": None, "with_memory": False}
    assert race.race_point(entry, Once(), options, {}, float("inf"), quiet) == [{"racer": "floor"}]
    assert jobs[0]["excluded"] == {} and why in jobs[1]["excluded"]["memeff"]

    jobs.clear()
    rows = race.race_point(entry, Once(), options, {}, 0.0, quiet)  # no time for another try
    assert len(jobs) == 1 and why in next(row["note"] for row in rows if row["racer"] == "memeff")


@pytest.mark.slow
def test_points_run_in_a_process_that_may_die(tmp_path, monkeypatch):
    """A real one: the stand-in ends its process, the others are raced without it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    (tmp_path / "dying.py").write_text(
        "import os, race\n"
        "from fusedloss.bench.peers import PEERS, Peer\n"
        "PEERS['dying'] = Peer('dying', lambda point: lambda q, k: os._exit(7))\n"
        "def work(connection):\n    race._work(connection)\n"
    )
    import dying

    try:
        entry = race.Entry(Point(n=64, d=8), "all")
        options = {"rounds": 1, "limit": 1.0, "only": {"fusedloss", "dying"}, "with_memory": False}
        until = race.time.monotonic() + patience.seconds(1800)
        process = race.Worker(dying.work)
        rows = {row["racer"]: row for row in race.race_point(entry, process, options, {}, until, quiet)}
        process.stop()
    finally:
        del PEERS["dying"]
    assert rows["dying"]["note"] == "failed: ended its process with exit code 7"
    assert rows["fusedloss"]["ranked"] and rows["floor"]["ratio"] == 1


# What is written ------------------------------------------------------------------------------------------------------


def test_the_csv_has_ligers_columns_and_marks(tmp_path):
    found = raced(Point(n=64, d=8), {"fusedloss", "eager"})
    found["fusedloss"]["memory_bytes"] = 3 << 20
    rows = list(found.values())
    results.write_csv(tmp_path / "race.csv", rows, results.environment())
    with (tmp_path / "race.csv").open() as file:
        lines = list(csv.DictReader(file))
    liger = (
        "kernel_name kernel_provider kernel_operation_mode metric_name metric_unit x_name x_label x_value y_value_50 "
    )
    liger += "y_value_20 y_value_80 extra_benchmark_config_str gpu_name timestamp liger_version"
    assert list(lines[0])[:15] == liger.split() and list(lines[0])[15:] == ["fusedloss_version", "ranked", "note"]
    ours = [line for line in lines if line["kernel_provider"] == "fusedloss"]
    modes = [(line["metric_name"], line["kernel_operation_mode"]) for line in ours]
    speed = [("speed", mode) for mode in ("full", "forward", "backward")]
    assert modes == [*speed, ("memory", "full"), ("gradient error", "full")]
    assert float(ours[0]["y_value_50"]) == pytest.approx(found["fusedloss"]["seconds"] * 1e3)
    assert float(ours[0]["y_value_20"]) <= float(ours[0]["y_value_50"]) <= float(ours[0]["y_value_80"])
    assert float(ours[3]["y_value_50"]) == 3.0 and ours[0]["ranked"] == "True"
    assert json.loads(ours[0]["extra_benchmark_config_str"])["d"] == 8


def gpu_results():
    point = Point("info_nce", 65536, 768, "bf16", device="cuda")
    place = {**asdict(point), "ranked": True, "gradient_error": 2e-3}
    rows = [
        {**asdict(point), "racer": "floor", "seconds": 0.03, "ratio": 1.0},
        {**place, "racer": "fusedloss", "seconds": 0.033, "ratio": 1.1, "memory_bytes": 4 * 65536 * 768 + (700 << 20)},
        {**place, "racer": "fusedloss, normalize=True", "seconds": 0.032, "ratio": 1.07},
        {**place, "racer": "memeff", "seconds": 0.15, "ratio": 5.0},
        {**place, "racer": "cut-cross-entropy, default filter", "seconds": 0.01, "ratio": 0.3, "ranked": False},
        {**asdict(point), "racer": "eager", "note": "OOM"},
    ]
    rows += [{**row, "temperature": 0.01} for row in rows]
    about = {**results.environment(), "device": "GPU 9000", "peers": {"memeff": "0.3.1"}}
    left_out = [{"point": asdict(replace(point, n=131072)), "field": "all"}]
    return {"environment": about, "left_out": left_out, "points": [], "rows": rows}


def test_the_summary_names_the_fastest_ranked_peer():
    line, harder = results.summary(gpu_results()["rows"])
    assert (line["ratio"], line["normalize_ratio"], line["peer"], line["peer_seconds"]) == (1.1, 1.07, "memeff", 0.15)
    assert line["workspace_bytes"] == 700 << 20 and harder["temperature"] == 0.01


def two_backends():
    """What `make gpu` leaves: `fusedloss` is Triton's, and cuda runs beside it."""
    found = gpu_results()
    found["environment"]["capability"] = [9, 0]
    for name, backend, sweep, seconds in (
        ("fusedloss", "triton", "one direction", 0.033),
        ("fusedloss:cuda", "cuda", "one direction", 0.031),
        ("fusedloss, normalize=True", "triton", "one direction, bounded", 0.032),
        ("fusedloss:cuda, normalize=True", "cuda", "one direction, bounded", 0.03201),
        ("fusedloss:chunked", "chunked", "one direction", 0.05),
        ("fusedloss:reference", "reference", "one direction", 0.001),
    ):
        about = {"racer": name, "backend": backend, "sweep": sweep, "seconds": seconds, "ratio": seconds / 0.03}
        place = found["rows"][1]
        found["rows"] = [r for r in found["rows"] if (r["racer"], r["temperature"]) != (name, 0.05)]
        found["rows"].append({**place, "ranked": True, "gradient_error": 2e-3, **about})
    return found


def test_the_summary_is_of_the_fastest_backend():
    line = next(line for line in results.summary(two_backends()["rows"]) if line["temperature"] == 0.05)
    assert line["seconds"] == 0.031 and line["normalize_ratio"] == pytest.approx(1.067, abs=1e-3)
    assert {k: round(v, 2) for k, v in line["ratios"].items()} == {"cuda": 1.03, "triton": 1.1, "chunked": 1.67}


def test_the_race_says_which_backend_is_faster_where(tmp_path, capsys):
    fastest, table, raced = script("fastest"), tmp_path / "table.json", tmp_path / "gpu.json"
    table.write_text("[]")
    raced.write_text(json.dumps(two_backends()))
    assert fastest.main([str(raced)], table) == 0
    place = {"capability": [9, 0], "dtype": "bf16", "N": 65536, "D": 768}
    times = {"cuda": 0.031, "triton": 0.033, "chunked": 0.05}
    here = {"kind": "one direction", "backend": "cuda", "seconds": times}
    unit = {"kind": "one direction, bounded", "backend": "triton", "seconds": {"triton": 0.032, "cuda": 0.03201}}
    assert json.loads(table.read_text()) == [{**place, **here}, {**place, **unit}]
    assert "2 points, 2 of this race; cuda 1, triton 1" in capsys.readouterr().out

    # A later race of one kind, in which cuda's gradient was wrong at the other.
    later = two_backends()
    later["rows"] = [row | {"ranked": "normalize" not in row["racer"]} for row in later["rows"]]
    next(r for r in later["rows"] if r["racer"] == "fusedloss:cuda")["seconds"] = 0.04
    raced.write_text(json.dumps(later))
    fastest.main([str(raced)], table)
    again = {"kind": "one direction", "backend": "triton", "seconds": {**times, "cuda": 0.04}}
    assert json.loads(table.read_text()) == [{**place, **again}, {**place, **unit}]

    later["environment"]["capability"] = None
    raced.write_text(json.dumps(later))
    with pytest.raises(SystemExit):
        fastest.main([str(raced)], table)
    assert "is no GPU" in capsys.readouterr().err and len(json.loads(table.read_text())) == 2


def test_the_page_shows_gpu_results_once_there_are_some(tmp_path):
    pytest.importorskip("tabulate")
    table = script("readme_table")
    assert "No results of a GPU are committed" in table.gpu(tmp_path)
    (tmp_path / "gpu.json").write_text(json.dumps(gpu_results()))
    (tmp_path / "gpu-info_nce.png").touch()
    text = table.gpu(tmp_path)
    assert "GPU 9000" in text and "memeff 0.3.1" in text and "gpu-info_nce.png" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| info_nce")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "info_nce",
        "65536 x 768",
        "bf16",
        "33.00",
        "1.10",
        *["", ""],
        "1.07",
        "memeff",
        "150.00",
        *["2.0e-03"] * 2,
        "700",
    ]
    assert "x floor at most 1.10" in text and "1 points did not fit" in text and "eager (OOM)" in text
    page = (BENCHMARKS.parent / "docs" / "results" / "gpu.md").read_text()
    assert text in table.written(page, tmp_path)
    assert "docs/results/gpu.md" in table.status(tmp_path) and "No result of a GPU" in table.status(tmp_path / "none")


def test_the_source_is_named(monkeypatch, tmp_path):
    before = results.source()
    assert len(before) == 12 and before == results.source()
    (tmp_path / "__init__.py").write_text("other = 1\n")
    monkeypatch.setattr(results.fusedloss, "__file__", str(tmp_path / "__init__.py"))
    assert results.source() != before
    assert set(BACKENDS) and results.environment()["source"] != before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_leaves_no_results(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        race.main(["short", "--device", "cuda", "--out", str(tmp_path)])
    assert ended.value.code == 2 and "sees no GPU here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
