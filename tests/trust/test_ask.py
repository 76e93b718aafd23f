"""Whether `auto` takes a kernel: by its verdict, or after a child has found one. Here "the device" is the CPU."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from patience import seconds

import fusedloss
from fusedloss import UnsupportedError, backends
from fusedloss.backends import select, select_rowwise
from fusedloss.backends.triton import launching
from fusedloss.core import environment, rows
from fusedloss.core.mask import Mask
from fusedloss.core.problem import Block, Fold, Problem
from fusedloss.proof import cases
from fusedloss.sweep import autograd
from fusedloss.trust import ask, families, order, verdicts
from fusedloss.trust.verdicts import FAILED, PROVED, UNKNOWN, Verdict

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there the device is a GPU, and Triton compiles"),
]

CPU = torch.device("cpu")
PLANTED = Path(__file__).parents[1] / "support" / "planted.py"
ORDER = ("triton", "chunked", "reference")


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    """A cache of its own, and no memory of others; `auto` has Triton's kernels first, as on a GPU."""
    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setenv("FUSEDLOSS_VERIFY", "first")
    monkeypatch.delenv("FUSEDLOSS_BACKEND", raising=False)
    monkeypatch.setitem(backends.AUTO, "cpu", ORDER)
    monkeypatch.setattr(verdicts, "_ignored", set())
    ask.forget()
    yield
    ask.forget()


@pytest.fixture
def plant(monkeypatch):
    def planted(fault):
        monkeypatch.setattr(ask, "COMMAND", [sys.executable, "-S", "-E", str(PLANTED), fault])

    return planted


def problem(dtype=torch.float32, **options):
    x, ones = torch.ones(8, 4, dtype=dtype), torch.ones(8)
    return Problem((x, x), (Block(0, 1),), ones[0], torch.arange(8), ones, **options)


SIZE = ("one direction", 8, 8, 4)
NAMES = [verdicts.name_of("triton", family, "fp32") for family in families.of_problem(problem())]


def learn(state, *names, **fields):
    ask.learn(CPU, {name: Verdict(state, 1, **fields) for name in names or NAMES})


def states():
    return {name: verdict.state for name, verdict in verdicts.read(CPU).verdicts.items()}


def correct():
    """The loss of `auto` is right, whichever backend it takes."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(9, 5, generator=generator).requires_grad_() for _ in range(2))
    found = []
    for backend in ("auto", "reference"):
        loss = fusedloss.info_nce(query, key, temperature=torch.tensor(0.1), backend=backend)
        found.append([loss, *torch.autograd.grad(loss, (query, key))])
    torch.testing.assert_close(*found)


# By what is known -----------------------------------------------------------------------------------------------------


def test_what_is_proved_is_taken():
    learn(PROVED)
    assert select(problem(), "auto") == "triton"
    correct()


def test_one_family_that_failed_is_enough(monkeypatch):
    monkeypatch.setenv("FUSEDLOSS_VERIFY", "off")
    for name in NAMES:
        learn(PROVED)
        assert select(problem(), "auto") == "triton"
        learn(FAILED, name)
        assert select(problem(), "auto") == "chunked"
    correct()


def test_another_family_does_not_matter():
    learn(PROVED)
    learn(FAILED, "triton masks fp32", "triton stats bf16", "cuda stats fp32")
    assert select(problem(), "auto") == "triton"


def test_by_name_nothing_is_proved(plant, monkeypatch):
    plant("raises")
    learn(FAILED)
    assert select(problem(), "triton") == "triton"
    monkeypatch.setenv("FUSEDLOSS_BACKEND", "triton")
    assert select(problem(), "auto") == "triton"
    assert select_rowwise("auto", torch.ones(2, 2), "pairs") == "triton"


def test_what_a_named_backend_has_not_goes_to_a_proved_one(monkeypatch, plant):
    """FUSEDLOSS_BACKEND=cuda, of a loss that has no kernel there."""
    plant("fails")
    monkeypatch.setenv("FUSEDLOSS_BACKEND", "cuda")
    monkeypatch.setattr(backends.cuda, "why_not_on", lambda dtype, device: None)
    assert select_rowwise("auto", torch.ones(2, 2), "pairs") == "chunked"
    learn(PROVED, "triton pairs fp32")
    assert select_rowwise("auto", torch.ones(2, 2), "pairs") == "triton"


def test_a_loss_without_a_kernel_proves_nothing(plant):
    plant("raises")
    select_rowwise("auto", torch.ones(2), None)
    assert states() == {}


def test_the_first_proved_in_the_order(monkeypatch):
    monkeypatch.setenv("FUSEDLOSS_VERIFY", "off")
    monkeypatch.setitem(backends.AUTO, "cpu", ("cuda", *ORDER))
    for module in (backends.cuda, backends.triton):
        monkeypatch.setattr(module, "why_not", lambda problem: None)
    cuda = [name.replace("triton", "cuda") for name in NAMES]
    assert select(problem(), "auto") == "chunked"
    learn(PROVED)
    assert select(problem(), "auto") == "triton"
    learn(PROVED, *cuda)
    assert select(problem(), "auto") == "cuda"
    learn(FAILED, cuda[0])
    assert select(problem(), "auto") == "triton"


def test_the_order_on_a_gpu(monkeypatch):
    """csrc/ has nothing for the tensor cores of sm_100 and later."""
    device = torch.device("cuda", 0)
    for capability in (80, 90, 100, 120):
        monkeypatch.setattr(backends.cuda, "capability_of", lambda device, capability=capability: capability)
        old = ("cuda", "triton", "chunked", "reference")
        assert backends._auto(device) == (old if capability < 100 else ("triton", "chunked", "cuda", "reference"))
    assert backends._auto(torch.device("meta")) == ("chunked", "reference")


def test_a_guide_of_another_dtype_is_proved_in_its_own(monkeypatch):
    from fusedloss.core.mask import Guide, Mask

    monkeypatch.setenv("FUSEDLOSS_VERIFY", "off")
    guide = torch.ones(8, 3, dtype=torch.float16)
    x, ones = torch.ones(8, 4), torch.ones(8)
    guided = Problem((x, x), (Block(0, 1, mask=Mask(guide=Guide(guide, guide))),), ones[0], torch.arange(8), ones)
    names = [verdicts.name_of("triton", family, "fp32") for family in families.of_problem(guided)]
    learn(PROVED, *names)
    assert select(guided, "auto") == "chunked"
    learn(PROVED, "triton rows fp16", "triton guide fp16")
    assert select(guided, "auto") == "triton"


def test_fp64_has_no_kernel_and_no_proof(plant):
    plant("raises")
    assert select(problem(torch.float64), "auto") == "chunked"
    assert not ask.admits("triton", ("stats",), torch.float64, CPU) and states() == {}


def test_tf32_is_a_precision_of_its_own(monkeypatch):
    monkeypatch.setenv("FUSEDLOSS_VERIFY", "off")
    learn(PROVED)
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, taken in (("tf32", "chunked"), ("ieee", "triton")):
            matmul.fp32_precision = setting
            assert rows.tf32() is (setting == "tf32") and select(problem(), "auto") == taken
    finally:
        matmul.fp32_precision = before


def test_no_kernel_proved_and_nothing_else_allowed(monkeypatch):
    monkeypatch.setenv("FUSEDLOSS_VERIFY", "off")
    monkeypatch.setitem(backends.AUTO, "cpu", ("triton",))
    with pytest.raises(
        UnsupportedError, match=r"triton: not proved on this device, which `python -m fusedloss verify`"
    ):
        select(problem(), "auto")


# What calls before have settled ---------------------------------------------------------------------------------------


@pytest.fixture
def settled(monkeypatch):
    """What is proved was asked for twice, so that nothing more is asked."""
    monkeypatch.setenv("FUSEDLOSS_VERIFY", "off")
    learn(PROVED, *NAMES, "triton pairs fp32")
    pick = lambda: (select(problem(), "auto"), select_rowwise("auto", torch.ones(2, 2), "pairs"))
    assert [pick(), pick()] == [("triton", "triton")] * 2
    return pick


def test_what_is_settled_is_looked_up(settled, monkeypatch):
    for module, name in ((ask, "admits"), (ask, "settled"), (order, "order"), (families, "of_flags")):
        monkeypatch.setattr(module, name, None)
    assert settled() == ("triton", "triton")
    with pytest.raises(TypeError):  # another size is not
        select(problem(torch.float16), "auto")


def test_a_verdict_that_changes_changes_what_is_looked_up(settled):
    for name in NAMES:
        learn(FAILED, name)
        assert [settled(), settled()] == [("chunked", "triton")] * 2
        learn(PROVED, name)
        assert [settled(), settled()] == [("triton", "triton")] * 2
    learn(FAILED, "triton pairs fp32")
    assert [settled(), settled()] == [("triton", "chunked")] * 2
    ask.forget()
    verdicts.path(CPU).unlink()
    assert [settled(), settled()] == [("chunked", "chunked")] * 2  # unknown


def test_a_time_that_is_found_changes_what_is_looked_up(settled):
    place = {"capability": [], "dtype": "fp32", "kind": "one direction", "N": 8, "D": 4}
    order.learn(CPU, place | {"backend": "chunked", "seconds": {"chunked": 1e-3, "triton": 2e-3}})
    assert [settled(), settled()] == [("chunked", "triton")] * 2
    order.learn(CPU, place | {"backend": "triton", "seconds": {"triton": 1e-3, "chunked": 2e-3}})
    assert [settled(), settled()] == [("triton", "triton")] * 2


def test_variables_are_read_at_each_call(settled, monkeypatch):
    for named in ("chunked", "reference", "auto", " Chunked "):
        monkeypatch.setenv("FUSEDLOSS_BACKEND", named)
        taken = "triton" if named == "auto" else named.strip().lower()
        assert settled() == (taken, taken)
        monkeypatch.delenv("FUSEDLOSS_BACKEND")
        assert settled() == ("triton", "triton")
    monkeypatch.setenv("FUSEDLOSS_BACKEND", "none")
    with pytest.raises(ValueError, match="FUSEDLOSS_BACKEND must be"):
        settled()
    monkeypatch.delenv("FUSEDLOSS_BACKEND")
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(launching, "_why_not", lambda dtype, device, interpret: None if interpret else "no GPU")
    assert settled() == ("chunked", "chunked")


def test_a_variable_is_what_os_environ_says(monkeypatch):
    for name in environment.ENCODED:
        for value in ("1", "", " ü "):
            monkeypatch.setenv(name, value)
            assert environment.get(name) == value
        monkeypatch.delenv(name)
        assert environment.get(name) is None
    monkeypatch.setattr(os, "environ", {"FUSEDLOSS_BACKEND": "triton"})  # some put another mapping there
    assert environment.get("FUSEDLOSS_BACKEND") == "triton" and environment.get("FUSEDLOSS_VERIFY") is None


def test_what_hangs_on_the_mode_is_not_looked_up(monkeypatch):
    for mode, taken in 2 * [("off", "chunked"), ("trust", "triton")]:
        monkeypatch.setenv("FUSEDLOSS_VERIFY", mode)
        assert [select(problem(), "auto") for _ in range(3)] == [taken] * 3
        assert [select_rowwise("auto", torch.ones(2, 2), "pairs") for _ in range(3)] == [taken] * 3


def test_plain_torch_is_taken_only_where_it_fits_whatever_was_looked_up(settled, monkeypatch):
    seconds = {"reference": 1e-3, "triton": 2e-3, "chunked": 3e-3}
    place = {"capability": [], "dtype": "fp32", "kind": "one direction", "N": 8, "D": 4}
    order.learn(CPU, place | {"backend": "reference", "seconds": seconds})
    for _ in range(2):
        assert select(problem(), "auto") == "reference" and select(problem(), "auto", plain=False) == "triton"
        assert select(problem(workspace_bytes=100), "auto") == "triton"
        monkeypatch.setenv("FUSEDLOSS_WORKSPACE_BYTES", "100")
        assert select(problem(), "auto") == "triton"
        monkeypatch.delenv("FUSEDLOSS_WORKSPACE_BYTES")


def test_problems_that_differ_are_looked_up_apart(settled):
    x, ones = torch.ones(8, 4), torch.ones(8)
    masked = (Block(0, 1, mask=Mask(skip=torch.arange(8))),)
    for _ in range(2):
        assert select(Problem((x, x), masked, ones[0], torch.arange(8), ones), "auto") == "chunked"
        for options in ({"symmetric": True}, {"top": True}, {"softcap": 3.0}, {"wants_tally": True}):
            assert select(problem(**options), "auto") == "chunked"
        assert select(problem(cosine=True, scale_bound=20.0), "auto") == "chunked"
        assert select(problem(torch.float16), "auto") == "chunked"
        assert select(problem(fold=Fold("sigmoid")), "auto") == "chunked"
        assert settled() == ("triton", "triton")


def test_who_chose_by_a_verdict_of_before_is_not_looked_up(settled, monkeypatch):
    """Another thread's verdict comes while this one chooses."""
    choose = order.order

    def overtaken(names, asked):
        learn(FAILED)
        return choose(names, asked)

    seen = ask.settled
    monkeypatch.setattr(ask, "settled", lambda *asked: True)
    monkeypatch.setattr(order, "order", overtaken)
    order.choose_anew()
    assert select(problem(), "auto") == "triton"
    monkeypatch.setattr(ask, "settled", seen)
    monkeypatch.setattr(order, "order", choose)
    assert select(problem(), "auto") == "chunked"


def test_no_more_is_kept_than_a_few_sizes(settled, monkeypatch):
    monkeypatch.setattr(backends, "MOST_CHOSEN", 8)
    for count in range(1, 40):
        ones = torch.ones(count)
        asked = Problem((torch.ones(count, 4),) * 2, (Block(0, 1),), ones[0], torch.arange(count), ones)
        assert [select(asked, "auto") for _ in range(2)] == ["triton"] * 2 and len(order.chosen) <= 8


# FUSEDLOSS_VERIFY -----------------------------------------------------------------------------------------------------


def test_off_asks_nobody(monkeypatch, plant, caplog):
    plant("proves")
    monkeypatch.setenv("FUSEDLOSS_VERIFY", "off")
    assert select(problem(), "auto") == "chunked" and caplog.messages == [] and states() == {}
    monkeypatch.setenv("FUSEDLOSS_VERIFY", "first")  # read at each call
    assert select(problem(), "auto") == "triton"


def test_trust_asks_nobody_and_goes_by_what_failed(monkeypatch, plant, caplog):
    plant("raises")
    monkeypatch.setenv("FUSEDLOSS_VERIFY", "trust")
    assert select(problem(), "auto") == "triton" and caplog.messages == [] and states() == {}
    learn(FAILED, NAMES[0])
    assert select(problem(), "auto") == "chunked"


def test_an_unknown_mode_is_an_error(monkeypatch):
    monkeypatch.setenv("FUSEDLOSS_VERIFY", "yes")
    with pytest.raises(ValueError, match="FUSEDLOSS_VERIFY must be first, off, inline, trust, got 'yes'"):
        select(problem(), "auto")


def test_first_use_waits_for_the_child_once(plant, caplog, capfd):
    plant("proves")
    for _ in range(2):
        assert select(problem(), "auto") == "triton"
    before, after = caplog.messages
    name = verdicts.key(CPU)["device"]
    assert before.startswith(f"fusedloss: verifying triton ({', '.join(n.split()[1] for n in NAMES)}; fp32) on {name}")
    assert "python -m fusedloss verify" in before and "FUSEDLOSS_VERIFY=off" in before
    assert after.startswith(f"fusedloss: verified on {name}: {len(NAMES)} of {len(NAMES)} families, ")
    assert after.endswith(f"kept in {verdicts.path(CPU)}")
    assert states() == dict.fromkeys(NAMES, PROVED)
    ask.forget()  # as another process
    plant("raises")
    assert select(problem(), "auto") == "triton" and len(caplog.messages) == 2
    correct()
    assert capfd.readouterr().out == ""


def test_only_what_is_asked_for_is_proved(plant, tmp_path):
    count = tmp_path / "count"
    plant(f"counts:{count}")
    select_rowwise("auto", torch.ones(2, 2), "pairs")
    assert list(states()) == ["triton pairs fp32"]
    learn(PROVED, *NAMES[1:])
    assert select(problem(), "auto") == "triton"
    assert count.read_text() == "1\n1\n"


def test_the_lines_are_seen_without_a_configuration(caplog, capsys, monkeypatch):
    """By logging's last resort, which shows warnings and their text alone."""
    for logger in (logging.getLogger(), ask.logger):
        monkeypatch.setattr(logger, "handlers", [])
    ask._say("once")
    assert capsys.readouterr().err == "fusedloss: once\n"


def test_threads_ask_once(plant, tmp_path):
    count = tmp_path / "count"
    plant(f"counts:{count}")
    found = []
    threads = [threading.Thread(target=lambda: found.append(select(problem(), "auto"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["triton"] * 4 and count.read_text().count("\n") == 1


def test_what_is_unasked_is_not_proved(plant, monkeypatch):
    plant("raises")
    with ask.unasked():
        assert select(problem(), "auto") == "chunked" and states() == {}
        monkeypatch.setenv("FUSEDLOSS_VERIFY", "trust")
        assert select(problem(), "auto") == "triton"
    plant("proves")
    monkeypatch.setenv("FUSEDLOSS_VERIFY", "first")
    assert select(problem(), "auto") == "triton"


def test_while_a_graph_is_captured_nothing_is_verified(plant, monkeypatch, caplog):
    plant("proves")
    monkeypatch.setattr(ask, "capturing", lambda device: True)
    for _ in range(2):
        assert select(problem(), "auto") == "chunked"
    (line,) = caplog.messages
    assert "while a CUDA graph is captured" in line and "`python -m fusedloss verify`" in line and states() == {}
    monkeypatch.setattr(ask, "capturing", lambda device: False)
    assert select(problem(), "auto") == "triton"


def test_while_torch_compile_traces_nothing_is_verified(plant, monkeypatch, caplog):
    plant("proves")
    ran = []
    execute = autograd.execute
    monkeypatch.setattr(
        autograd,
        "execute",
        lambda problem, how, *rest, **more: ran.append(how.backend) or execute(problem, how, *rest, **more),
    )
    query, key = torch.randn(2, 9, 5)
    logged = lambda: [record.getMessage() for record in caplog.records if record.name == "fusedloss"]

    def losses(query, key, temperature, backend="auto"):
        free = fusedloss.info_nce(query, key, temperature=temperature, normalize=True, backend=backend)
        return [free, fusedloss.mse(query, key, backend=backend)]

    for known in ("chunked", "triton"):
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # the compiler's; Triton 3.6's interpreter has others
            compiled = torch.compile(losses, fullgraph=True, dynamic=True, backend="eager")
            wanted = losses(query, key, 0.1, backend="reference")
            torch.testing.assert_close(compiled(query, key, 0.1), wanted)
        assert set(ran) == {known}
        if known == "chunked":
            (line,) = logged()
            assert "while torch.compile traces" in line and "`python -m fusedloss verify`" in line and states() == {}
            learn(PROVED, *NAMES, "triton exp fp32", "triton pointwise fp32")
            ran.clear()
    assert len(logged()) == 1


# What a child does not survive ----------------------------------------------------------------------------------------

# The fault, its family's verdict, what of it is said. The others are proved, also those after it.
IN_A_FAMILY = [
    ("fails", FAILED, r"triton stats fp32 \(257 x 391 x 96: 3.1 of the budget\)"),
    ("raises", FAILED, r"exit code 1, RuntimeError: an illegal memory access was encountered\)"),
    ("exits", FAILED, r"triton stats fp32 \(257 x 391 x 96: the child that verifies: exit code 3\)"),
    ("crashes", FAILED, r"triton stats fp32 \(257 x 391 x 96: the child that verifies: ended by SIGSEGV\)"),
    ("hangs", FAILED, r"triton stats fp32 \(257 x 391 x 96: the child that verifies: no sign of life"),
    ("poisoned", FAILED, r"triton stats fp32 \(3.1 of the budget\)"),
    ("no memory", UNKNOWN, r"unknown, so another backend runs instead: triton stats fp32: CUDA out of memory"),
    ("killed", UNKNOWN, r"triton stats fp32.*: the child that verifies: ended by SIGKILL"),
]


@pytest.mark.parametrize("fault, state, said", IN_A_FAMILY, ids=[fault for fault, *_ in IN_A_FAMILY])
def test_a_fault_is_its_family_s_alone(fault, state, said, plant, monkeypatch, caplog, capfd):
    hears = ask._Child.hears

    def hears_of_a_try(child, limit):
        """Once a family is tried, silence is short; before, a busy machine starts a process when it does."""
        message = hears(child, 0.3 if getattr(child, "tries", False) and fault == "hangs" else seconds(120))
        child.tries = message["kind"] in ("trying", "alive")
        return message

    monkeypatch.setattr(ask._Child, "hears", hears_of_a_try)
    plant(f"{fault}:stats")
    names = ["triton rows fp32", "triton stats fp32", "triton grad fp32"]
    assert not ask.admits("triton", ("rows", "stats", "grad"), torch.float32, CPU)
    rest = {"triton rows fp32": PROVED, "triton grad fp32": PROVED}
    if fault == "killed":  # who kills processes may kill the next one, too
        del rest["triton grad fp32"]
    assert states() == rest | ({} if state == UNKNOWN else {"triton stats fp32": state})
    assert [verdict.state for verdict in map(ask.known(CPU).get, names)].count(PROVED) == len(rest)
    assert not ask.admits("triton", ("rows", "stats", "grad"), torch.float32, CPU)  # and nobody is asked again
    _, after = caplog.messages
    assert f"{len(rest)} of 3 families" in after
    assert re.search(said, after), after
    assert ask.admits("triton", ("rows",), torch.float32, CPU)
    correct()
    assert "Traceback" not in "".join([*capfd.readouterr(), *caplog.messages])


@pytest.mark.parametrize("fault", ["no context", "nowhere"])
def test_a_child_that_cannot_work_leaves_all_unknown(fault, plant, monkeypatch, caplog, capfd):
    plant(fault)
    if fault == "nowhere":
        monkeypatch.setattr(ask, "COMMAND", ["/nowhere/python"])
    for _ in range(3):
        assert select(problem(), "auto") == "chunked"
    _, after = caplog.messages
    assert f"0 of {len(NAMES)} families" in after and states() == {}
    assert ("busy or unavailable" if fault == "no context" else "no child process could be started") in after
    correct()
    assert "Traceback" not in capfd.readouterr().err
    ask.forget()  # another process may have more luck
    plant("proves")
    assert select(problem(), "auto") == "triton"


def test_the_call_waits_no_longer_than_it_says(plant, monkeypatch, caplog):
    plant("hangs")
    monkeypatch.setattr(ask, "TOTAL", 0.0)
    assert select(problem(), "auto") == "chunked" and states() == {}
    assert re.search(r"not done within -?0 s", caplog.messages[1])


def test_ctrl_c_takes_the_child_along(plant, monkeypatch):
    plant("hangs")
    children = []

    def interrupted(child, limit):
        children.append(child.process)
        raise KeyboardInterrupt

    monkeypatch.setattr(ask._Child, "hears", interrupted)
    with pytest.raises(KeyboardInterrupt):
        select(problem(), "auto")
    assert children[0].returncode is not None
    with verdicts.locked(CPU, 0, lambda: False) as held:
        assert held


@pytest.mark.parametrize("content", ["", '{"schema": 1, "key"', "another"])
def test_a_cache_that_is_not_read_is_found_anew(content, plant, caplog):
    plant("proves")
    learn(FAILED)
    file = verdicts.path(CPU)
    file.write_text(content)
    ask.forget()
    assert select(problem(), "auto") == "triton" and states() == dict.fromkeys(NAMES, PROVED)
    ignored, _, _ = caplog.messages
    assert f"the verdicts in {file} are ignored" in ignored
    correct()


def test_a_changed_source_is_verified_anew(plant, monkeypatch, tmp_path, caplog):
    source = tmp_path / "kernel.py"
    source.write_text("right")
    monkeypatch.setattr(verdicts, "sources", lambda: [source])
    ask.forget()
    learn(PROVED)
    plant("fails")
    assert select(problem(), "auto") == "triton" and caplog.messages == []
    source.write_text("wrong")
    ask.forget()
    assert select(problem(), "auto") == "chunked" and len(caplog.messages) == 2
    correct()


def test_a_folder_that_cannot_be_written_is_a_verdict_in_memory(plant, monkeypatch, caplog):
    plant("proves")
    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", "/proc/fusedloss")  # read-only for root as well
    for _ in range(2):
        assert select(problem(), "auto") == "triton"
    _, after = caplog.messages
    assert "kept in memory alone (" in after
    correct()


# The race after the proof --------------------------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch):
    """As if work on a CPU could be timed as that of a GPU is."""
    monkeypatch.setattr(ask, "TIMED", ("cpu",))
    monkeypatch.setattr(ask, "RACE", seconds(120))
    return lambda: order.kept(CPU)


def test_the_first_use_races_around_its_size(plant, timed, caplog, tmp_path):
    asked = tmp_path / "asked"
    plant(f"races:{asked}")
    assert select(problem(), "auto") == "triton"
    assert json.loads(asked.read_text()) == [{"fp32": ["triton"]}, [8, 8, 4], ["one direction"]]
    assert [order.size_of(entry) for entry in timed()] == ["8 x 8 x 4", "32 x 32 x 4", "128 x 128 x 4"]
    _, after = caplog.messages
    assert f"{len(NAMES)} of {len(NAMES)} families" in after and states() == dict.fromkeys(NAMES, PROVED)
    assert "; fastest: chunked at 8 x 8 x 4, chunked at 32 x 32 x 4, chunked at 128 x 128 x 4" in after
    plant("raises")
    assert select(problem(), "auto") == "chunked"
    ask.forget()  # as another process
    assert select(problem(), "auto") == "chunked" and len(caplog.messages) == 2
    correct()


RACES = [
    ("race raises", 1, "; the race ended early: exit code 1, RuntimeError: an illegal memory access was encountered"),
    ("race crashes", 1, "; the race ended early: ended by SIGSEGV"),
    ("race killed", 1, "; the race ended early: ended by SIGKILL"),
    ("race hangs", 0, "; the race ended early: out of time"),
    ("race says nonsense", 1, None),
]


@pytest.mark.parametrize("fault, entries, said", RACES, ids=[fault for fault, *_ in RACES])
def test_a_race_that_fails_takes_no_verdict_along(fault, entries, said, plant, timed, monkeypatch, caplog, capfd):
    plant(fault)
    if fault == "race hangs":
        monkeypatch.setattr(ask, "RACE", 0.3)
    assert select(problem(), "auto") == "triton"
    assert states() == dict.fromkeys(NAMES, PROVED) and len(timed()) == entries
    _, after = caplog.messages
    assert f"{len(NAMES)} of {len(NAMES)} families" in after and "unknown" not in after
    assert said in after if said else "ended early" not in after
    plant("raises")
    assert select(problem(), "auto") == ("chunked" if entries else "triton")
    correct()
    assert "Traceback" not in "".join([*capfd.readouterr(), *caplog.messages])


@pytest.mark.parametrize("fault", ["fails", "exits", "no memory"])
def test_what_is_not_proved_is_not_raced(fault, plant, timed, monkeypatch, caplog):
    """The child does not begin with it (`test_trust_race.py`), and no other child is asked to."""
    plant(f"{fault}:stats")
    asked = []
    monkeypatch.setattr(ask._Child, "__init__", given(ask._Child.__init__, asked))
    assert select(problem(), "auto") == "chunked"
    assert ["race" in names for names in asked] == [True] + [False] * (fault == "exits")
    assert "race" not in "".join(caplog.messages)


def given(start, asked):
    def started(child, device, names):
        asked.append(names)
        start(child, device, [name for name in names if " " in name and name[0] != "{"])

    return started


def test_a_race_is_of_all_that_is_proved_and_of_the_call_s_kind(plant, timed, monkeypatch, tmp_path):
    asked = tmp_path / "asked"
    plant(f"races:{asked}")
    monkeypatch.setattr(backends.triton, "why_not", lambda problem: None)
    learn(PROVED, *(name.replace("triton", "cuda") for name in NAMES))
    x, ones = torch.ones(9, 4), torch.ones(9)
    bounded = {"cosine": True, "scale_bound": 20.0}
    select(Problem((x, x[:5]), (Block(0, 1),), ones[0], torch.zeros(9, dtype=torch.int64), ones), "auto")
    select(problem(symmetric=True, **bounded), "auto")
    assert [json.loads(line) for line in asked.read_text().splitlines()] == [
        [{"fp32": ["cuda", "triton"]}, [9, 5, 4], ["one direction"]],
        [{"fp32": ["triton"]}, [8, 8, 4], ["both directions, bounded"]],
    ]
    # what was timed is not timed again for a family more
    ask.admits("triton", (*families.of_problem(problem()), "masks"), torch.float32, CPU, SIZE)
    assert states()["triton masks fp32"] == PROVED and len(asked.read_text().splitlines()) == 2


def test_what_has_no_place_in_a_table_is_not_raced(plant, timed, tmp_path):
    asked = tmp_path / "asked"
    plant(f"races:{asked}")
    for options in ({"fold": Fold("sigmoid")}, {"top": True}):
        assert select(problem(**options), "auto") == "triton"
    empty = Problem((torch.ones(0, 4),) * 2, (Block(0, 1),), torch.ones(()), torch.arange(0), torch.ones(0))
    assert select(empty, "auto") == "triton"
    assert select_rowwise("auto", torch.ones(2, 2), "pairs") == "triton"
    assert not asked.exists() and len(states()) > len(NAMES)


@pytest.mark.parametrize("mode", ["off", "trust", "inline"])
def test_in_other_modes_nothing_is_raced(mode, plant, timed, monkeypatch):
    plant("raises")
    monkeypatch.setenv("FUSEDLOSS_VERIFY", mode)
    monkeypatch.setattr(
        ask, "prove_inline", lambda device, names, found: [found(name, Verdict(PROVED, 1)) for name in names]
    )
    assert select(problem(), "auto") == ("chunked" if mode == "off" else "triton") and timed() == []


def test_on_a_device_that_is_not_timed_nothing_is_raced(plant, tmp_path):
    asked = tmp_path / "asked"
    plant(f"races:{asked}")
    assert select(problem(), "auto") == "triton" and not asked.exists() and order.kept(CPU) == []


def test_times_that_cannot_be_kept_count_in_this_process(plant, timed, monkeypatch):
    plant("races")
    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", "/proc/fusedloss")
    assert [select(problem(), "auto") for _ in range(2)] == ["triton", "chunked"]


def test_who_waits_for_a_proof_waits_for_its_times(plant, timed, monkeypatch):
    monkeypatch.setattr(ask, "TOTAL", seconds(120))
    plant("races")
    assert in_processes(2, lambda number: [select(problem(), "auto") for _ in range(2)][1]) == ["chunked"] * 2


IN_A_CHILD = """
import sys
from fusedloss.proof import child, race
race.LEAST = 64
child.cases.prove = lambda *asked: ("proved", 1, 0.1, 0.5, "")
sys.exit(child.main(sys.argv[1:]))
"""


@pytest.mark.interpreter
def test_the_child_races_after_its_proofs(timed, monkeypatch, caplog):
    """The real race, of Triton in its interpreter."""
    monkeypatch.setattr(ask, "COMMAND", [sys.executable, "-c", IN_A_CHILD])
    monkeypatch.setattr(ask, "SILENCE", seconds(600))
    monkeypatch.setattr(ask, "TOTAL", seconds(600))
    monkeypatch.setattr(ask, "RACE", seconds(600))
    assert select(problem(), "auto") == "triton"
    assert sorted(map(order.size_of, timed())) == ["16 x 16 x 4", "4 x 4 x 4", "64 x 64 x 4"], caplog.messages
    assert "ended early" not in caplog.messages[1], caplog.messages
    assert all(set(entry["seconds"]) == {"triton", "chunked", "reference"} for entry in timed())
    assert select(problem(), "auto") != "triton"  # the interpreter is never the fastest


# A kernel that is wrong -----------------------------------------------------------------------------------------------


def beyond(table):
    """A number behind its last one."""
    table.as_strided((1,), (1,), table.storage_offset() + table.numel()).fill_(1)


def without_the_last_column(run, epilogue, strip, *rest):
    run(epilogue, strip._replace(y=strip.y[:-1]), *rest)


def without_its_mask(run, epilogue, strip, *rest):
    run(epilogue, strip._replace(mask=None), *rest)


def past_its_output(run, epilogue, strip, out, args, config):
    run(epilogue, strip, out, args, config)
    beyond(args[0])


def with_a_nan(run, epilogue, strip, out, args, config):
    run(epilogue, strip, out, args, config)
    args[1][0, 0] = torch.nan


times = itertools.count()


def from_run_to_run(run, epilogue, strip, out, args, config):
    run(epilogue, strip, out, args, config)
    args[1].mul_(1 + 2**-23 * (next(times) % 2))


def that_raises(run, *rest):
    raise RuntimeError("no such kernel")


WRONG = [
    (without_the_last_column, "stats", r"off by [\d.e+inf]+ of the budget"),
    (without_its_mask, "masks", r"off by [\d.e+inf]+ of the budget"),
    (past_its_output, "stats", "written behind the end of float32"),
    (with_a_nan, "stats", "off by inf of the budget"),
    (from_run_to_run, "stats", "differs from run to run"),
    (that_raises, "stats", "RuntimeError: no such kernel"),
]


@pytest.mark.interpreter
@pytest.mark.parametrize("fault, family, said", WRONG, ids=[fault.__name__ for fault, *_ in WRONG])
def test_a_kernel_that_is_wrong_is_not_taken(fault, family, said, monkeypatch, caplog, capfd):
    monkeypatch.setenv("FUSEDLOSS_VERIFY", "inline")  # the proof is the child's, and a process costs seconds
    run, stats = backends.triton._similarities, backends.triton._softmax().stats

    def wrong(epilogue, *rest):
        return fault(run, epilogue, *rest) if epilogue is stats else run(epilogue, *rest)

    monkeypatch.setattr(backends.triton, "_similarities", wrong)
    learn(PROVED, *[name for name in (*NAMES, "triton masks fp32") if name != f"triton {family} fp32"])
    ids = torch.arange(9) % 4
    options = {"temperature": 0.1, "mask": fusedloss.masks.same_id(ids, ids) if family == "masks" else None}
    query, key = torch.randn(2, 9, 5)
    query.requires_grad_()
    losses = [fusedloss.info_nce(query, key, backend=backend, **options) for backend in ("auto", "reference")]
    torch.testing.assert_close(*[[loss, *torch.autograd.grad(loss, query)] for loss in losses])
    verdict = verdicts.read(CPU).verdicts[f"triton {family} fp32"]
    assert verdict.state == FAILED and verdict.cases > 0 and re.search(said, verdict.reason), verdict
    _, after = caplog.messages
    assert f"another backend runs instead of what failed: triton {family} fp32 ({verdict.reason})" in after
    assert "Traceback" not in "".join([*capfd.readouterr(), *caplog.messages])


def test_the_child_proves_what_is_right(monkeypatch, caplog):
    """The real one; of the cheapest family."""
    monkeypatch.setattr(ask, "SILENCE", seconds(600))
    monkeypatch.setattr(ask, "TOTAL", seconds(600))
    assert ask.admits("triton", ("pointwise",), torch.float32, CPU), caplog.messages
    verdict = verdicts.read(CPU).verdicts["triton pointwise fp32"]
    assert verdict.state == PROVED and verdict.cases > 1 and 0 < verdict.worst <= 1 and verdict.seconds > 0


@pytest.mark.slow
@pytest.mark.parametrize("fault, state", [("none", PROVED), ("without the last column", FAILED)])
def test_the_child_proves_cuda_s_kernels(fault, state, host_extension, monkeypatch):
    """Those of csrc/, compiled for a CPU."""
    monkeypatch.setattr(ask, "COMMAND", [sys.executable, str(PLANTED.with_name("planted_cuda.py")), fault])
    monkeypatch.setattr(ask, "SILENCE", seconds(600))
    monkeypatch.setattr(ask, "TOTAL", seconds(1200))
    assert ask.admits("cuda", ("top",), torch.float32, CPU) is (state == PROVED)
    verdict = verdicts.read(CPU).verdicts["cuda top fp32"]
    assert verdict.state == state and verdict.cases > 0 and not verdict.reason.startswith("the child"), verdict


# Several processes ----------------------------------------------------------------------------------------------------


def in_processes(count, run):
    """[run(number)] of forked ones that start together."""
    context = torch.multiprocessing.get_context("fork")
    gate, answers = context.Barrier(count), context.SimpleQueue()

    def work(number):
        ask.forget()
        gate.wait(seconds(120))
        answers.put((number, run(number)))

    processes = [context.Process(target=work, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds(240))
    assert [process.exitcode for process in processes] == [0] * count
    found = dict(answers.get() for _ in processes)
    return [found[number] for number in range(count)]


@pytest.mark.parametrize("fcntl", [verdicts.fcntl, None], ids=["fcntl", "without"])
def test_eight_processes_verify_once(fcntl, plant, tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts, "fcntl", fcntl)
    monkeypatch.setattr(ask, "TOTAL", seconds(120))
    count = tmp_path / "count"
    plant(f"counts:{count}")
    assert in_processes(8, lambda number: select(problem(), "auto")) == ["triton"] * 8
    assert count.read_text() == f"{len(NAMES)}\n"


def test_two_processes_that_ask_for_different_families_keep_both(plant, tmp_path, monkeypatch):
    monkeypatch.setattr(ask, "TOTAL", seconds(120))
    plant(f"counts:{tmp_path / 'count'}")
    taken = in_processes(2, lambda n: select_rowwise("auto", torch.ones(2, 2), ("pairs", "lists")[n]))
    assert taken == ["triton"] * 2
    assert states() == {"triton pairs fp32": PROVED, "triton lists fp32": PROVED}


def test_who_waits_too_long_goes_on_without(plant, monkeypatch, caplog):
    plant("raises")
    monkeypatch.setattr(ask, "TOTAL", 0.0)
    with verdicts.locked(CPU, 0, lambda: False):
        for _ in range(2):
            assert select(problem(), "auto") == "chunked"
    (line,) = caplog.messages
    assert "another process verifies" in line and states() == {}


# The command line -----------------------------------------------------------------------------------------------------


def run(*arguments):
    from fusedloss.__main__ import main

    return main(["verify", "--device", "cpu", "--backend", "triton", *arguments])


def of_pairs():
    return [f"triton pairs {precision}" for precision in families.PRECISIONS]


def test_verify_shows_a_table_and_keeps_it(plant, capsys):
    plant("proves")
    assert run("--family", "pairs") == 0
    shown = capsys.readouterr()
    assert "4 of 4 families proved" in shown.out and f"kept in {verdicts.path(CPU)}" in shown.out
    assert states() == dict.fromkeys(of_pairs(), PROVED)
    assert all(f"cpu {name}" in shown.err for name in of_pairs())  # the progress
    plant("fails")  # what is proved stays so
    assert run("--family", "pairs") == 0
    assert run("--family", "pairs", "--again") == 1
    assert "257 x 391 x 96: 3.1 of the budget" in capsys.readouterr().out
    assert states() == dict.fromkeys(of_pairs(), FAILED)
    plant("proves")  # and what failed has another chance
    assert run("--family", "pairs") == 0


def test_verify_takes_every_family(plant, capsys):
    plant("proves")
    assert run("--json") == 0
    rows = json.loads(capsys.readouterr().out)
    every = [
        ("triton", family, precision)
        for precision in families.PRECISIONS
        for family in families.of_backend("triton", precision)
        if precision != "bf16" or family in ("classes", "pairs", "lists", "pointwise")  # no products in the interpreter
    ]
    assert [(row["backend"], row["family"], row["precision"]) for row in rows] == every
    wanted = {"device": "cpu", "state": PROVED, "cases": 1, "worst": 0.5, "kept": str(verdicts.path(CPU))}
    assert all(row.items() >= wanted.items() for row in rows)


def test_verify_says_what_stays_unknown(plant, capsys):
    plant("no context")
    assert run("--family", "pairs") == 2
    shown = capsys.readouterr()
    assert "busy or unavailable" in shown.err and "0 of 4 families" in shown.out and "unknown" in shown.out


def test_verify_says_why_nothing_runs(capsys, monkeypatch):
    from fusedloss.__main__ import main

    monkeypatch.setattr(cases, "why_not", lambda *asked: "needs an NVIDIA GPU")
    assert main(["verify"]) == 0
    assert "nothing to verify here\ncpu: cuda: needs an NVIDIA GPU (bf16, fp16, tf32, fp32)" in capsys.readouterr().err
    assert run() == 2


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--backend", "chunked"], "invalid choice: 'chunked'"),
        (["--family", "statistics"], "--family must be one of rows, stats"),
        (["--device", "tpu"], "must be cpu, cuda, xpu, cuda:INDEX or xpu:INDEX, got 'tpu'"),
        (["--device", "cuda:7"], "--device cuda:7: torch .* sees no GPU here"),
        (["--device", "xpu"], "--device xpu: torch .* sees no GPU here"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_verify_refuses(wrong, message, capsys):
    from fusedloss.__main__ import main

    try:
        code = main(["verify", *wrong])
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and re.search(message, capsys.readouterr().err)


def test_verify_refuses_a_folder_that_is_a_file(monkeypatch, capsys):
    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", __file__)
    assert run() == 2
    assert "FUSEDLOSS_CACHE_DIR must be a folder, got the file" in capsys.readouterr().err


def test_ctrl_c_shows_what_was_verified(plant, capsys, monkeypatch):
    plant("hangs:pairs")
    hears = ask._Child.hears

    def interrupted(child, limit):
        message = hears(child, seconds(120))
        if message.get("name") == "triton pairs bf16":
            raise KeyboardInterrupt
        return message

    monkeypatch.setattr(ask._Child, "hears", interrupted)
    assert run() == 130
    shown = capsys.readouterr()
    before = 1  # classes
    assert "interrupted" in shown.err and "Traceback" not in shown.err
    assert f"{before} of " in shown.out and list(states().values()) == [PROVED] * before


def test_verify_says_that_nothing_can_be_kept(plant, capsys, monkeypatch):
    plant("proves")
    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", "/proc/fusedloss")
    assert run("--family", "pairs") == 0
    assert "kept nowhere" in capsys.readouterr().err


def test_info_shows_verdicts(capsys):
    from fusedloss.__main__ import main

    learn(FAILED, "triton stats fp32", "triton pairs fp16")
    learn(PROVED, "triton rows fp32")
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    every = sum(len(families.of_backend("triton", precision)) for precision in families.PRECISIONS)
    counts = f"1 families proved, 2 failed, {every - 3} unknown; failed: pairs fp16, stats fp32"
    assert f"  triton     {counts}\n" in shown.replace("stats fp32, pairs fp16", "pairs fp16, stats fp32")
    assert f"  verdicts   in {verdicts.path(CPU)}" in shown and "auto picks chunked" in shown


def test_info_proves_nothing(plant, capsys):
    from fusedloss.__main__ import main

    plant("proves")
    assert main(["info"]) == 0 and states() == {}
    assert "0 families proved" in capsys.readouterr().out
